//! Each pass on values that are hard for f32 beside the same pass on ordinary ones, in turns: constant channels, values whose squares
//! underflow, subnormal ones, means far away. Prints the ratios, geometric mean and worst over some shapes, and writes values.json
//! into the target directory.
//!
//! `cargo bench --bench values`, under a minute.

#[allow(dead_code, reason = "no streams")]
mod stream;

use std::time::Instant;

use batchnorm::{Affine, BatchNorm, Gradients, Population, Shape};
use clap::Parser;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

/// Times each pass on hard values over its time on ordinary ones.
#[derive(Parser)]
struct Args {
    /// Turns per kernel
    #[arg(long, default_value_t = 15)]
    turns: usize,
    /// Passed by cargo bench
    #[arg(long, hide = true)]
    bench: bool,
}

/// One line of the result.
#[derive(Serialize)]
struct Line {
    pass: &'static str,
    values: &'static str,
    shape: &'static str,
    threads: usize,
    ratio: f64,
}

const PASSES: [&str; 3] = ["forward", "inference", "backward"];

/// A name, and what is made of values between -1 and 1.
type Kind = (&'static str, fn(f32) -> f32);

const KINDS: [Kind; 5] = [
    ("ordinary", |v| v),
    ("constant", |_| 5.0),
    ("squares underflow", |v| v * 1e-25),
    ("subnormal", |v| v * 1e-39),
    ("mean far away", |v| v + 1e4),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let shapes = [
        ("NCHW 32x64x56x56", Shape::nchw(32, 64, 56, 56)?),
        ("NCHW 32x128x28x28", Shape::nchw(32, 128, 28, 28)?),
        ("NCHW 32x256x14x14", Shape::nchw(32, 256, 14, 14)?),
        ("NCHW 32x512x7x7", Shape::nchw(32, 512, 7, 7)?),
        ("NHWC 32x64x56x56", Shape::nhwc(32, 56, 56, 64)?),
        ("NHWC 32x256x14x14", Shape::nhwc(32, 14, 14, 256)?),
        ("NC 4096x256", Shape::nc(4096, 256)?),
    ];
    let mut threads = vec![1, num_cpus::get_physical()];
    threads.dedup();
    println!("{:<10} {:<18} {:>7} {:>9} {:>6}  worst shape", "pass", "values", "threads", "geo mean", "worst");
    let mut lines = Vec::new();
    for threads in threads {
        let pool = stream::pool(threads)?;
        let mut ratios = [const { [const { Vec::new() }; KINDS.len()] }; PASSES.len()];
        for (_, shape) in shapes {
            let times = pool.install(|| time(shape, args.turns))?;
            for (ratios, times) in ratios.iter_mut().zip(times) {
                ratios.iter_mut().zip(times).for_each(|(ratios, time)| ratios.push(time / times[0]));
            }
        }
        for (pass, ratios) in PASSES.iter().zip(ratios) {
            for ((kind, _), ratios) in KINDS.iter().zip(ratios).skip(1) {
                let mean = stream::geometric_mean(ratios.iter().copied());
                let (worst, ratio) = ratios.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).expect("a shape");
                println!("{pass:<10} {kind:<18} {threads:>7} {mean:>9.2} {ratio:>6.2}  {}", shapes[worst].0);
                let line = |(&(shape, _), ratio): (_, f64)| Line { pass, values: kind, shape, threads, ratio };
                lines.extend(shapes.iter().zip(ratios).map(line));
            }
        }
    }
    stream::save("values.json", &lines)
}

/// The median of the time of each pass on each kind of values.
fn time(shape: Shape, turns: usize) -> batchnorm::Result<[[f64; KINDS.len()]; PASSES.len()]> {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut random = || -> Vec<f32> { (0..shape.len()).map(|_| rng.random_range(-1.0..1.0)).collect() };
    let (values, dy) = (random(), random());
    let tensors = KINDS.map(|(_, of)| values.iter().map(|&v| of(v)).collect::<Vec<_>>());
    let mut out = values;
    let (ones, zeros) = (vec![1.5; shape.channels()], vec![0.0; shape.channels()]);
    let (mut dgamma, mut dbeta) = (ones.clone(), ones.clone());
    let affine = Affine::new(&ones, &zeros);
    let bn = BatchNorm::<f32>::new(shape)?;
    let mut saved = KINDS.map(|_| bn.saved());
    let mut times = [const { [const { Vec::new() }; KINDS.len()] }; PASSES.len()];
    // The first turn warms up, and fills the statistics.
    for turn in 0..=turns {
        for (times, pass) in times.iter_mut().zip(PASSES) {
            // Each kind takes its turn to be the first.
            for kind in (0..KINDS.len()).map(|i| (i + turn) % KINDS.len()) {
                let (x, saved, times) = (&tensors[kind], &mut saved[kind], &mut times[kind]);
                let mut call = || match pass {
                    "inference" => bn.forward_infer(x, affine, Population { mean: &zeros, var: &ones }, &mut out),
                    "forward" => bn.forward_train(x, affine, &mut out, saved),
                    _ => {
                        let (dgamma, dbeta) = (Some(&mut dgamma[..]), Some(&mut dbeta[..]));
                        let gradients = Gradients { dx: Some(&mut out), dgamma, dbeta, ..Default::default() };
                        bn.backward(x, &dy, saved, affine, gradients)
                    }
                };
                call()?;
                let started = Instant::now();
                call()?;
                if turn > 0 {
                    times.push(started.elapsed().as_secs_f64());
                }
            }
        }
    }
    Ok(times.map(|of_pass| of_pass.map(stream::median)))
}
