//! Times this crate beside other libraries: everyone takes turns on the same problem, after their results were
//! compared. Prints a table and writes peers.json into the target directory, unless only some peers, shapes or passes were
//! asked for. Started by `benches/peers/run`.

mod burn_flex;
mod candle_cpu;
mod contestant;
mod ours;
mod problem;
mod quiet;
mod report;
mod server;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use batchnorm::Tier;
use clap::Parser;
use contestant::{About, Contestant};
use problem::{Dtype, Inputs, Pass, Problem, Size, compare};
use quiet::Ticks;
use report::Row;
use server::Server;

/// Times batchnorm beside other libraries.
#[derive(Parser)]
struct Args {
    /// Four shapes, f32 alone, all threads, few turns
    #[arg(long)]
    quick: bool,
    /// Only shapes whose name contains this, such as 64x56x56
    #[arg(long)]
    shape: Option<String>,
    /// Only this peer: pytorch, onednn, candle or burn
    #[arg(long)]
    peer: Option<String>,
    /// Only this pass
    #[arg(long)]
    pass: Option<Pass>,
    /// Only this element type
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Only this number of threads
    #[arg(long)]
    threads: Option<usize>,
    /// Turns of each contestant
    #[arg(long)]
    turns: Option<usize>,
    /// The target directory; given by `run`, as are the next two
    #[arg(long, hide = true)]
    target: PathBuf,
    /// The python that has torch
    #[arg(long, hide = true)]
    python: Option<PathBuf>,
    /// The oneDNN server
    #[arg(long, hide = true)]
    onednn: Option<PathBuf>,
}

/// The convolution outputs of ResNet-50, and whether they are in the quick run.
const SHAPES: [(usize, usize, bool); 9] = [
    (64, 112, false),
    (64, 56, true),
    (256, 56, true),
    (128, 28, false),
    (512, 28, false),
    (256, 14, true),
    (1024, 14, false),
    (512, 7, true),
    (2048, 7, false),
];
const BATCH: usize = 32;

/// Calls in a turn fill this many microseconds, so that the clock and the way to a server weigh nothing.
const TURN_US: f64 = 3e3;
/// After this many microseconds on the clock, and three turns, a contestant has shown what it can.
const ENOUGH_US: f64 = 2e6;
const FEWEST_TURNS: usize = 3;
/// How often a problem is timed at most, if something else uses the machine meanwhile.
const ATTEMPTS: usize = 4;

fn main() -> Result<()> {
    let args = Args::parse();
    let data = args.target.join("peers").join("data");
    std::fs::create_dir_all(&data)?;
    let (mut contestants, absent) = contestants(&args, &data);
    let all = num_cpus::get_physical();
    let mut threads = match args.threads {
        Some(only) => vec![only],
        None if args.quick => vec![all],
        None => vec![1, all],
    };
    threads.dedup();
    let dtypes = match args.dtype {
        Some(only) => vec![only],
        None if args.quick => vec![Dtype::F32],
        None => Dtype::ALL.to_vec(),
    };

    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    report::print_header();
    for (c, side, quick) in SHAPES {
        let size = Size { n: BATCH, c, h: side, w: side };
        if args.quick && !quick || args.shape.as_ref().is_some_and(|s| !size.to_string().contains(s.as_str())) {
            continue;
        }
        for &dtype in &dtypes {
            let inputs = Inputs::new(size, dtype);
            inputs.write(&data)?;
            for &threads in &threads {
                for pass in Pass::ALL {
                    if args.pass.is_none_or(|only| only == pass) {
                        let problem = Problem { pass, dtype, size, threads };
                        let turns = args.turns.unwrap_or(if args.quick { 7 } else { 11 });
                        let new = play(&problem, &inputs, &mut contestants, turns, &mut failures)?;
                        new.iter().for_each(Row::print);
                        rows.extend(new);
                    }
                }
            }
        }
    }
    std::fs::remove_dir_all(&data)?;
    report::print_summary(&rows);
    if args.shape.is_none() && args.pass.is_none() && args.peer.is_none() {
        let path = args.target.join("peers.json");
        std::fs::write(&path, serde_json::to_string_pretty(&rows)?)?;
        println!("\nwritten to {}", path.display());
    }
    absent.iter().for_each(|line| println!("absent: {line}"));
    ensure!(failures.is_empty(), "not timed:\n{}", failures.join("\n"));
    Ok(())
}

/// Both layouts of this crate, then the peers that are wanted; and why others are absent.
fn contestants(args: &Args, data: &Path) -> (Vec<Box<dyn Contestant>>, Vec<String>) {
    let mut present: Vec<Box<dyn Contestant>> = vec![Box::new(ours::new("NCHW")), Box::new(ours::new("NHWC"))];
    let mut absent = Vec::new();
    let wanted = |peer: &str| args.peer.as_ref().is_none_or(|only| only.eq_ignore_ascii_case(peer));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("servers/pytorch.py");
    let pytorch = args.python.as_deref().map(|python| vec![python, &script]);
    let onednn = args.onednn.as_deref().map(|server| vec![server]);
    // Blocks of a vector: others are left to a reference implementation.
    let blocked = if Tier::Avx512.is_available() { "nChw16c" } else { "nChw8c" };
    let servers: [(_, _, &[&str]); 2] =
        [("PyTorch", pytorch, &["NCHW", "NHWC"]), ("oneDNN", onednn, &["NCHW", "NHWC", blocked])];
    for (peer, command, layouts) in servers {
        if !wanted(peer) {
            continue;
        }
        let Some(command) = command else {
            absent.push(format!("{peer}: not installed; the first lines say why"));
            continue;
        };
        for layout in layouts {
            match Server::start(peer, layout, &command, data) {
                Ok(server) => present.push(Box::new(server)),
                Err(why) => absent.push(format!("{peer} {layout}: {why:#}")),
            }
        }
    }
    for peer in [candle_cpu::new(), burn_flex::new()] {
        if wanted(peer.about.peer) {
            present.push(Box::new(peer));
        }
    }
    (present, absent)
}

/// A contestant that is ready for a problem.
struct Player<'a> {
    contestant: &'a mut dyn Contestant,
    implementation: String,
    calls: usize,
    times: Vec<f64>,
}

/// One problem: everyone makes ready, is compared with this crate, and takes turns.
fn play(
    problem: &Problem,
    inputs: &Inputs,
    contestants: &mut [Box<dyn Contestant>],
    turns: usize,
    failures: &mut Vec<String>,
) -> Result<Vec<Row>> {
    let (ours, peers) = contestants.split_at_mut(2);
    if !peers.iter().any(|peer| peer.serves(problem)) {
        return Ok(Vec::new());
    }
    let mut expected = None;
    let mut players = Vec::new();
    for contestant in ours.iter_mut().chain(peers).filter(|c| c.serves(problem)) {
        let About { peer, layout, .. } = *contestant.about();
        let mut ready = || {
            let implementation = contestant.setup(problem, inputs)?;
            let got = contestant.result()?;
            compare(expected.get_or_insert_with(|| got.clone()), &got, problem.dtype.bound())?;
            let us = contestant.time(1)?;
            anyhow::Ok((implementation, (TURN_US / us).clamp(1.0, 50.0) as usize))
        };
        match ready() {
            Ok((implementation, calls)) => {
                let contestant = contestant.as_mut();
                players.push(Player { contestant, implementation, calls, times: Vec::new() });
            }
            Err(why) if peer == ours::NAME => return Err(why).context("this crate itself"),
            Err(why) => {
                let Problem { pass, dtype, size, threads } = problem;
                let (pass, dtype) = (pass.name(), dtype.name());
                let failure = format!("{peer} {pass} {layout} {dtype} {size} on {threads} threads: {why:#}");
                println!("{failure}");
                failures.push(failure);
            }
        }
    }
    drop(expected);

    let mut processes: Vec<u32> = players.iter().map(|player| player.contestant.process()).collect();
    processes.dedup();
    for attempts_left in (0..ATTEMPTS).rev() {
        let before = Ticks::now(&processes);
        take_turns(&mut players, turns)?;
        if before.zip(Ticks::now(&processes)).is_none_or(|(before, after)| before.quiet_until(&after)) {
            break;
        }
        let then = if attempts_left > 0 { "timing again" } else { "giving up: the next times are doubtful" };
        eprintln!("peers: something else used this machine; {then}");
    }
    let rows = rows(problem, &mut players);
    players.iter_mut().for_each(|player| player.contestant.clear());
    Ok(rows)
}

/// Everyone in turn, until all have had enough.
fn take_turns(players: &mut [Player<'_>], turns: usize) -> Result<()> {
    players.iter_mut().for_each(|player| player.times.clear());
    for _ in 0..turns {
        for player in &mut *players {
            let spent: f64 = player.times.iter().sum::<f64>() * player.calls as f64;
            if spent < ENOUGH_US || player.times.len() < FEWEST_TURNS {
                player.times.push(player.contestant.time(player.calls)?);
            }
        }
    }
    Ok(())
}

/// Each peer beside this crate in the same layout; oneDNN's own layout, and its best one, beside what they stand for.
fn rows(problem: &Problem, players: &mut [Player<'_>]) -> Vec<Row> {
    let medians: Vec<(About, &str, f64)> = players
        .iter_mut()
        .map(|player| {
            player.times.sort_by(f64::total_cmp);
            let median = player.times[player.times.len() / 2];
            (player.contestant.about().clone(), player.implementation.as_str(), median)
        })
        .collect();
    let (ours, peers) = medians.split_at(2);
    let row = |about: &About, implementation: &str, peer_us: f64, our_layout: &str| {
        let (ours, _, ours_us) = ours.iter().find(|o| o.0.layout == our_layout).expect("both layouts play");
        Row::new(problem, about, implementation, peer_us, ours.layout, *ours_us)
    };
    let mut rows = Vec::new();
    for (about, implementation, us) in peers {
        let our_layouts: &[&str] = match about.layout {
            "nChw8c" | "nChw16c" => &["NCHW", "NHWC"],
            same => &[same],
        };
        rows.extend(our_layouts.iter().map(|layout| row(about, implementation, *us, layout)));
    }
    let onednn = peers.iter().filter(|p| p.0.peer == "oneDNN");
    if let Some((about, implementation, us)) = onednn.min_by(|a, b| a.2.total_cmp(&b.2)) {
        let implementation = format!("{} {implementation}", about.layout);
        rows.push(row(&About { layout: "best", ..about.clone() }, &implementation, *us, "NCHW"));
    }
    rows
}
