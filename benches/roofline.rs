//! Each pass beside its yardstick: plain stream kernels that move the least bytes that the pass can move, with the
//! same threads in the same run. Prints a table and writes roofline.json into the target directory, or fused.json, unless only some of
//! the shapes, passes, layouts or threads were asked for.
//!
//! `cargo bench --bench roofline` runs all shapes, `-- --quick` a few of them in under a minute, `-- --fused` the passes with an
//! activation and a residual.

mod stream;

use std::collections::BTreeMap;
use std::time::Instant;

use batchnorm::{Activation, Affine, BatchNorm, Element, Gradients, Layout, Population, Real, Shape};
use clap::Parser;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;
use stream::Store;

/// Times each kernel against the memory traffic that it cannot avoid.
#[derive(Parser)]
struct Args {
    /// A few shapes, f32 alone, few turns
    #[arg(long)]
    quick: bool,
    /// Only shapes whose name contains this, such as 64x56x56
    #[arg(long)]
    shape: Option<String>,
    /// The passes with an activation and a residual instead of the plain ones; to fused.json
    #[arg(long)]
    fused: bool,
    /// Only this pass, such as forward, inference or backward
    #[arg(long)]
    pass: Option<String>,
    /// Only this layout, such as NCHW
    #[arg(long)]
    layout: Option<String>,
    /// Only this element type
    #[arg(long)]
    dtype: Option<String>,
    /// Images instead of 32 in the shapes of ResNet-50
    #[arg(long, default_value_t = BATCH)]
    batch: usize,
    /// Only this number of threads
    #[arg(long)]
    threads: Option<usize>,
    /// Turns per kernel
    #[arg(long)]
    turns: Option<usize>,
    /// Fail if the geometric mean of a pass over all layouts is over twice its goal
    #[arg(long)]
    check: bool,
    /// Passed by cargo bench
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    /// That what is measured is not what the pictures and tables show.
    fn is_partial(&self) -> bool {
        let of = self.shape.is_some() || self.pass.is_some() || self.layout.is_some() || self.threads.is_some();
        of || self.batch != BATCH
    }
}

/// Images in the shapes of ResNet-50.
const BATCH: usize = 32;

/// A shape of the table.
#[derive(Clone, Copy)]
struct Row {
    layout: &'static str,
    n: usize,
    c: usize,
    spatial: &'static [usize],
    quick: bool,
}

impl Row {
    fn shape(&self) -> Shape {
        let layout = if self.layout.ends_with('C') { Layout::ChannelsLast } else { Layout::ChannelsFirst };
        Shape::new(layout, self.n, self.c, self.spatial).expect("a shape of the table")
    }

    fn name(&self) -> String {
        [&[self.n, self.c], self.spatial].concat().iter().map(usize::to_string).collect::<Vec<_>>().join("x")
    }
}

/// The convolution outputs of ResNet-50, and shapes at the edges.
fn table(batch: usize) -> Vec<Row> {
    const RESNET: [(usize, &[usize], bool); 9] = [
        (64, &[112, 112], false),
        (64, &[56, 56], true),
        (256, &[56, 56], true),
        (128, &[28, 28], true),
        (512, &[28, 28], false),
        (256, &[14, 14], true),
        (1024, &[14, 14], true),
        (512, &[7, 7], true),
        (2048, &[7, 7], false),
    ];
    let mut rows = Vec::new();
    for layout in ["NCHW", "NHWC"] {
        rows.extend(RESNET.map(|(c, spatial, quick)| Row { layout, n: batch, c, spatial, quick }));
        rows.push(Row { layout, n: 1, c: 64, spatial: &[14, 14], quick: false });
        rows.push(Row { layout, n: 8, c: 3, spatial: &[512, 512], quick: false });
    }
    rows.push(Row { layout: "NC", n: 128, c: 1024, spatial: &[], quick: false });
    rows.push(Row { layout: "NC", n: 4096, c: 256, spatial: &[], quick: true });
    rows.push(Row { layout: "NCDHW", n: 2, c: 32, spatial: &[16, 56, 56], quick: false });
    rows
}

/// One line of the result.
#[derive(Serialize)]
struct Line {
    pass: &'static str,
    layout: &'static str,
    dtype: &'static str,
    shape: ShapeRecord,
    threads: usize,
    kernel_us: f64,
    stream_us: f64,
    ratio: f64,
}

#[derive(Serialize)]
struct ShapeRecord {
    n: usize,
    c: usize,
    spatial: Vec<usize>,
}

const PASSES: [&str; 3] = ["forward", "inference", "backward"];
/// With ReLU: alone, behind a residual, with its bits recorded; and back with its sign computed again, or from the bits.
const FUSED: [&str; 5] = ["forward act", "forward res act", "forward act bits", "backward act", "backward bits"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let mut lines = Vec::new();
    println!(
        "{:<16} {:<6} {:<16} {:<5} {:>7} {:>11} {:>11} {:>6}",
        "pass", "layout", "shape", "dtype", "threads", "kernel us", "stream us", "ratio"
    );
    let all = num_cpus::get_physical();
    let mut threads = vec![1, all];
    threads.dedup();
    for row in table(args.batch) {
        if args.quick && !row.quick || args.shape.as_ref().is_some_and(|s| !row.name().contains(s.as_str())) {
            continue;
        }
        if args.layout.as_ref().is_some_and(|l| l != row.layout) {
            continue;
        }
        let wanted = |dtype: &str| match &args.dtype {
            Some(only) => only == dtype,
            None => dtype == "f32" || !args.quick,
        };
        if wanted("f32") {
            run::<f32>("f32", row, &threads, &args, &mut lines)?;
        }
        if wanted("f64") {
            run::<f64>("f64", row, &threads, &args, &mut lines)?;
        }
        #[cfg(feature = "half")]
        {
            if wanted("bf16") {
                run::<half::bf16>("bf16", row, &threads, &args, &mut lines)?;
            }
            if wanted("f16") {
                run::<half::f16>("f16", row, &threads, &args, &mut lines)?;
            }
        }
    }
    summary(&lines);
    if !args.is_partial() {
        stream::save(if args.fused { "fused.json" } else { "roofline.json" }, &lines)?;
    }
    if args.check { check(&lines) } else { Ok(()) }
}

/// That each pass comes within twice its goal, layouts together, so that noise and the caches of one machine are allowed for.
fn check(lines: &[Line]) -> Result<(), Box<dyn std::error::Error>> {
    for group in groups(lines, |l| (l.pass, l.dtype, l.threads)) {
        let (pass, ratio) = (group[0].pass, mean(&group));
        if ratio > 2.0 * goal(pass) {
            return Err(format!("{pass}: {ratio:.2} is over twice {}", goal(pass)).into());
        }
    }
    Ok(())
}

/// The geometric mean of the ratios that a pass is to reach on tensors of f32.
fn goal(pass: &str) -> f64 {
    match pass {
        "inference" => 1.05,
        "backward" | "backward act" | "backward bits" => 1.15,
        _ => 1.12,
    }
}

/// The lines of each group, in the order of their keys.
fn groups<K: Ord>(lines: &[Line], key: impl Fn(&Line) -> K) -> Vec<Vec<&Line>> {
    let mut groups = BTreeMap::<K, Vec<&Line>>::new();
    for line in lines {
        groups.entry(key(line)).or_default().push(line);
    }
    groups.into_values().collect()
}

/// The geometric mean of the ratios.
fn mean(lines: &[&Line]) -> f64 {
    stream::geometric_mean(lines.iter().map(|l| l.ratio))
}

/// The geometric mean and the worst ratio of each pass, group of layouts, type and number of threads.
fn summary(lines: &[Line]) {
    println!("\n{:<16} {:<8} {:<5} {:>7} {:>9} {:>6}", "pass", "layouts", "dtype", "threads", "geo mean", "worst");
    let layouts = |l: &Line| if ["NHWC", "NC"].contains(&l.layout) { "NHWC, NC" } else { "NCHW" };
    for group in groups(lines, |l| (l.pass, layouts(l), l.dtype, l.threads)) {
        let first = group[0];
        let worst = group.iter().fold(0.0, |a: f64, l| a.max(l.ratio));
        println!(
            "{:<16} {:<8} {:<5} {:>7} {:>9.2} {worst:>6.2}",
            first.pass,
            layouts(first),
            first.dtype,
            first.threads,
            mean(&group)
        );
    }
}

/// Times all passes of one shape and type.
fn run<E: Element>(
    dtype: &'static str,
    row: Row,
    threads: &[usize],
    args: &Args,
    lines: &mut Vec<Line>,
) -> Result<(), Box<dyn std::error::Error>> {
    let shape = row.shape();
    let mut rng = SmallRng::seed_from_u64(1);
    let mut random = || -> Vec<E> {
        (0..shape.len()).map(|_| E::from_param(E::Param::from_f64(rng.random_range(-1.0..1.0)))).collect()
    };
    let (x, dy) = (random(), random());
    let mut out = x.clone();
    let ones = vec![E::Param::from_f64(1.5); shape.channels()];
    let zeros = vec![E::Param::from_f64(0.5); shape.channels()];
    let (mut dgamma, mut dbeta) = (ones.clone(), ones.clone());
    let affine = Affine::new(&ones, &zeros);
    let relu = affine.with_activation(Activation::Relu);
    let bn = BatchNorm::<E>::new(shape)?;
    let mut saved = bn.saved();
    let mut gates = vec![0; bn.gates_len()];
    bn.forward_train(&x, relu.with_gates_to(&mut gates), &mut out, &mut saved)?;
    for &threads in threads {
        if args.threads.is_some_and(|only| only != threads) {
            continue;
        }
        let pool = stream::pool(threads)?;
        for &pass in if args.fused { &FUSED[..] } else { &PASSES[..] } {
            if args.pass.as_ref().is_some_and(|only| only != pass) {
                continue;
            }
            let rows_in_training = shape.layout() == Layout::ChannelsLast && pass != "inference";
            let backward = pass.starts_with("backward");
            let two = backward || pass == "forward res act";
            let yardstick = |out: &mut [E], store| {
                let (a, b) = (stream::bytes(&x), two.then(|| stream::bytes(&dy)));
                if rows_in_training {
                    stream::read(threads, a, b.filter(|_| backward));
                }
                stream::write(threads, a, b, stream::bytes_mut(out), store);
            };
            let mut kernel = |out: &mut [E]| match pass {
                "inference" => bn.forward_infer(&x, affine, Population { mean: &zeros, var: &ones }, out),
                "forward" => bn.forward_train(&x, affine, out, &mut saved),
                "forward act" => bn.forward_train(&x, relu, out, &mut saved),
                "forward res act" => bn.forward_train(&x, relu.with_residual(&dy), out, &mut saved),
                "forward act bits" => bn.forward_train(&x, relu.with_gates_to(&mut gates), out, &mut saved),
                _ => {
                    let affine = match pass {
                        "backward act" => relu,
                        "backward bits" => relu.with_gates(&gates),
                        _ => affine,
                    };
                    let gradients = Gradients {
                        dx: Some(out),
                        dgamma: Some(&mut dgamma),
                        dbeta: Some(&mut dbeta),
                        ..Default::default()
                    };
                    bn.backward(&x, &dy, &saved, affine, gradients)
                }
            };
            let turns = args.turns.unwrap_or(if args.quick { 15 } else { 31 });
            let (kernel_us, stream_us) = pool.install(|| {
                let mut times = [const { Vec::new() }; 3];
                // Enough calls a turn for the clock, and for the caches to forget what was timed before.
                let started = Instant::now();
                kernel(&mut out).expect("a call of the bench");
                let calls = (2e-3 / started.elapsed().as_secs_f64()).clamp(1.0, 500.0) as usize;
                for _ in 0..turns {
                    let mut time = |slot: usize, f: &mut dyn FnMut()| {
                        f();
                        let started = Instant::now();
                        (0..calls).for_each(|_| f());
                        times[slot].push(started.elapsed().as_secs_f64() * 1e6 / calls as f64);
                    };
                    time(0, &mut || kernel(&mut out).expect("a call of the bench"));
                    time(1, &mut || yardstick(&mut out, Store::Plain));
                    time(2, &mut || yardstick(&mut out, Store::Streaming));
                }
                let [kernel, plain, streaming] = times.map(stream::median);
                (kernel, plain.min(streaming))
            });
            let ratio = kernel_us / stream_us;
            println!(
                "{pass:<16} {:<6} {:<16} {dtype:<5} {threads:>7} {kernel_us:>11.1} {stream_us:>11.1} {ratio:>6.2}",
                row.layout,
                row.name(),
            );
            let shape = ShapeRecord { n: row.n, c: row.c, spatial: row.spatial.to_vec() };
            lines.push(Line { pass, layout: row.layout, dtype, shape, threads, kernel_us, stream_us, ratio });
        }
    }
    Ok(())
}
