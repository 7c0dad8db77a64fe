//! Figure 1 of Ioffe & Szegedy (2015) on real handwritten digits: the same sigmoid network with
//! and without Batch Normalization, plus a small convolutional one for the NCHW kernels; or, with `--norm`, ways to
//! normalize side by side.

#[cfg(feature = "whitening")]
mod argument;
mod compare;
mod data;
mod experiment;
mod figure;
mod gemm;
mod layers;
mod network;
#[path = "../plot/mod.rs"]
mod plot;
#[cfg(feature = "whitening")]
mod whitened;

use clap::Parser;
use clap::builder::ArgPredicate;
use data::Data;
use experiment::{PERCENTILES, Point};
use indicatif::{ProgressBar, ProgressStyle};
use layers::{BATCH, Bias, Norm};
use network::{MakeNorm, Network};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::error;
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Write};
use std::panic;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Instant;

/// Trains the network of Figure 1 of the Batch Normalization paper, with and without it.
#[derive(Parser)]
struct Args {
    /// A folder with the four IDX files of MNIST, plain or gzip, instead of the built-in digits
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Training steps of the sigmoid network; the convolutional one takes a twentieth
    #[arg(long, default_value = "10000", default_value_if("short", "true", "400"))]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    steps: u64,
    /// The lowest learning rate; the others are 5 and 30 times as high
    #[arg(long, default_value_t = 0.1)]
    rate: f64,
    /// Seed of the split into training and test images, of the weights and of the batches
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Instead, train the sigmoid network once with each of these, one after the other, so that seconds compare
    #[arg(long, value_enum, value_name = "NORM", value_delimiter = ',')]
    norm: Vec<compare::Norm>,
    /// How many channels are whitened together, with --norm
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    group: u16,
    /// Where the picture goes
    #[arg(long, value_name = "FILE", default_value = "figure1.svg")]
    #[arg(default_value_if("norm", ArgPredicate::IsPresent, "norms.svg"))]
    out: PathBuf,
    /// Few steps: shows that everything works, not what the paper claims
    #[arg(long)]
    short: bool,
}

/// What the learning rate is multiplied by; the paper's BN-x5 and BN-x30.
const FACTORS: [u16; 3] = [1, 5, 30];

/// Without, then with Batch Normalization.
type Pair = [Vec<Point>; 2];

type Result<T> = std::result::Result<T, Box<dyn error::Error + Send + Sync>>;

fn main() -> ExitCode {
    match report(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

fn report(args: &Args) -> Result<()> {
    let begin = Instant::now();
    if !FACTORS.iter().all(|f| scaled(args.rate, *f).is_normal() && args.rate > 0.0) {
        return Err(format!("--rate {:e} is not a usable learning rate", args.rate).into());
    }
    let data = match &args.data {
        Some(folder) => Data::idx(folder)?,
        None => Data::digits(&mut ChaCha8Rng::seed_from_u64(args.seed))?,
    };
    let count = data.train.len();
    if count < BATCH {
        return Err(format!("{count} training images do not fill a batch of {BATCH}").into());
    }
    // Tried before the work, so that a wrong path costs no time, without emptying the file or leaving an empty one.
    let picture = |e| format!("{}: {e}", args.out.display());
    let existed = args.out.exists();
    File::options().create(true).append(true).open(&args.out).map_err(picture)?;
    if !existed {
        fs::remove_file(&args.out).map_err(picture)?;
    }

    if !args.norm.is_empty() {
        compare::report(args, &data, &mut io::stdout().lock())?;
        eprintln!("{:.1} s", begin.elapsed().as_secs_f64());
        return Ok(());
    }
    let (sigmoids, convolutions) = train(args, &data)?;
    fs::write(&args.out, figure::draw(&sigmoids[0])?).map_err(picture)?;

    let out = &mut io::stdout().lock();
    introduce(out, args, &data)?;

    writeln!(out, "\nThree hidden layers of 100 sigmoids: test accuracy in percent,")?;
    writeln!(out, "without and with Batch Normalization (BN)\n")?;
    accuracies(out, args.rate, &sigmoids)?;
    for (factor, pair) in FACTORS.iter().zip(&sigmoids) {
        let rate = scaled(args.rate, *factor);
        writeln!(out, "\nInput of unit 0 of the last sigmoids over the test images, rate {rate}\n")?;
        percentiles(out, pair)?;
    }
    writeln!(out, "\nTwo convolutions with ReLU: test accuracy in percent\n")?;
    accuracies(out, args.rate, &[convolutions])?;

    writeln!(out, "\nPicture: {}", args.out.display())?;
    // Apart from the rest, which is the same for the same seed.
    eprintln!("{:.1} s", begin.elapsed().as_secs_f64());
    Ok(())
}

fn introduce(out: &mut impl Write, args: &Args, data: &Data) -> io::Result<()> {
    let (height, width) = (data.height, data.width);
    let (count, tested) = (data.train.len(), data.test.len());
    writeln!(out, "Data: {}, {height} x {width} pixels", data.name)?;
    writeln!(out, "{count} images to train on, {tested} to test, batch {BATCH}, seed {}", args.seed)
}

/// The learning rate times a factor, short of the noise in the last digits of a double.
fn scaled(rate: f64, factor: u16) -> f32 {
    (rate * f64::from(factor)) as f32
}

/// Runs everything, each network on a thread of its own: the sigmoid pairs by `FACTORS`, then the
/// convolutional pair.
fn train(args: &Args, data: &Data) -> Result<(Vec<Pair>, Pair)> {
    let image = [1, data.height, data.width];
    let few = args.steps.div_ceil(20);
    let runs = 2 * FACTORS.len() as u64;
    let bar = ProgressBar::new(runs * args.steps + 2 * few).with_style(ProgressStyle::with_template(
        "{bar:40} {percent:>3}% of {len} steps, {elapsed} elapsed, {eta} left",
    )?);
    // The same seed for every network: same weights where the shapes agree, same batches.
    let rng = || ChaCha8Rng::seed_from_u64(args.seed);
    let run = |network, rate, steps, mut rng| {
        experiment::run(network, data, (steps, rate), &mut rng, || bar.inc(1))
            .map_err(|e| format!("learning rate {rate}: {e}").into())
    };
    let sigmoids = |factor, norm| {
        let mut rng = rng();
        let network = Network::sigmoids(image.iter().product(), make(norm), &mut rng)?;
        run(network, scaled(args.rate, factor), args.steps, rng)
    };
    let convolutions = |norm| {
        let mut rng = rng();
        let network = Network::convolutions(image, make(norm), &mut rng)?;
        run(network, scaled(args.rate, 1), few, rng)
    };
    let (sigmoids, convolutions) = thread::scope(|scope| {
        let convolutions = [false, true].map(|norm| scope.spawn(move || convolutions(norm)));
        let sigmoids = FACTORS.map(|f| [false, true].map(|norm| scope.spawn(move || sigmoids(f, norm))));
        (sigmoids.map(join), join(convolutions))
    });
    bar.finish_and_clear();
    Ok((sigmoids.into_iter().collect::<Result<_>>()?, convolutions?))
}

fn make(norm: bool) -> MakeNorm<'static> {
    if norm { &|dims| Ok(Box::new(Norm::new(dims)?)) } else { &|dims| Ok(Box::new(Bias::new(dims))) }
}

type Handle<'a> = thread::ScopedJoinHandle<'a, Result<Vec<Point>>>;

fn join([without, with]: [Handle; 2]) -> Result<Pair> {
    let wait = |run: Handle| run.join().unwrap_or_else(|e| panic::resume_unwind(e));
    let (without, with) = (wait(without), wait(with));
    Ok([without?, with?])
}

fn accuracies(out: &mut impl Write, rate: f64, pairs: &[Pair]) -> io::Result<()> {
    let runs = || pairs.iter().flatten();
    let rates = FACTORS[..pairs.len()].iter().map(|f| scaled(rate, *f).to_string());
    row(out, "rate", rates.flat_map(|rate| [String::new(), rate]))?;
    row(out, "step", pairs.iter().flat_map(|_| ["without", "BN"]))?;
    for i in rows(&pairs[0][0]) {
        row(out, pairs[0][0][i].step, runs().map(|points| percent(points[i].accuracy)))?;
    }
    // Figure 3 of the paper: the best, and how soon each run is as good as the first ever is.
    let best = |points: &[Point]| points.iter().map(|p| p.accuracy).fold(0.0, f64::max);
    row(out, "best", runs().map(|points| percent(best(points))))?;
    let goal = best(&pairs[0][0]);
    let reached = |points: &[Point]| points.iter().find(|p| p.accuracy >= goal).map(|p| p.step);
    let reached = runs().map(|points| reached(points).map_or("never".into(), |s| s.to_string()));
    row(out, "reached", reached)?;
    writeln!(out, "reached: the first step measured with at least {}, the best of the first column", percent(goal))
}

fn percentiles(out: &mut impl Write, pair: &Pair) -> io::Result<()> {
    row(out, "", ["", "without", "", "", "BN", ""])?;
    row(out, "step", [PERCENTILES; 2].iter().flatten().map(|p| format!("{p}th")))?;
    for i in rows(&pair[0]) {
        let inputs = pair.iter().flat_map(|points| points[i].input);
        row(out, pair[0][i].step, inputs.map(|x| format!("{x:.2}")))?;
    }
    Ok(())
}

fn percent(part: f64) -> String {
    format!("{:.2}", 100.0 * part)
}

fn row<T: Display>(out: &mut impl Write, head: impl Display, cells: impl IntoIterator<Item = T>) -> io::Result<()> {
    write!(out, "{head:>8}")?;
    for cell in cells {
        write!(out, "{cell:>10}")?;
    }
    writeln!(out)
}

/// About eleven rows of a table, spread over the points, first and last included.
fn rows(points: &[Point]) -> impl Iterator<Item = usize> {
    let last = points.len() - 1;
    let parts = last.min(10);
    (0..=parts).map(move |i| i * last / parts)
}
