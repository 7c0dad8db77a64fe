//! How the cost of each pass grows with the size of the tensor, from 1 KB to 1 GB, and with threads. Prints a table and
//! writes sweep.json into the target directory.
//!
//! `cargo bench --bench sweep` takes about two minutes and 5 GB of memory; `-- --most 64` stops at 64 MB.

#[allow(dead_code, reason = "all but the mean of ratios")]
mod stream;

use std::time::Instant;

use batchnorm::{Affine, BatchNorm, Gradients, Layout, Population, Shape};
use clap::Parser;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;
use stream::Store;

/// Times each pass over tensors of f32 that grow fourfold.
#[derive(Parser)]
struct Args {
    /// The largest tensor, in megabytes
    #[arg(long, default_value_t = 1024)]
    most: usize,
    /// Turns per pass and size
    #[arg(long, default_value_t = 9)]
    turns: usize,
    /// Passed by cargo bench
    #[arg(long, hide = true)]
    bench: bool,
}

/// One line of the result.
#[derive(Serialize)]
struct Line {
    pass: &'static str,
    layout: &'static str,
    bytes: usize,
    threads: usize,
    ns_per_element: f64,
}

/// Eight images of 32 channels, or one of four where that is too much.
fn shape(layout: Layout, elements: usize) -> Shape {
    let (n, c) = if elements < 4096 { (1, 4) } else { (8, 32) };
    Shape::new(layout, n, c, &[elements / (n * c)]).expect("a shape of the sweep")
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let mut lines = Vec::new();
    println!("{:<10} {:<6} {:>12} {:>7} {:>14}", "pass", "layout", "bytes", "threads", "ns per element");
    let sizes =
        std::iter::successors(Some(1024), |bytes| Some(bytes * 4)).take_while(|bytes| *bytes <= args.most << 20);
    for bytes in sizes {
        let elements = bytes / size_of::<f32>();
        let mut rng = SmallRng::seed_from_u64(1);
        let x: Vec<f32> = (0..elements).map(|_| rng.random_range(-1.0..1.0)).collect();
        let dy = x.clone();
        let (mut y, mut dx) = (x.clone(), x.clone());
        for threads in 1..=num_cpus::get_physical() {
            let pool = stream::pool(threads)?;
            for (layout, name) in [(Layout::ChannelsFirst, "NCHW"), (Layout::ChannelsLast, "NHWC")] {
                let bn = BatchNorm::<f32>::new(shape(layout, elements))?;
                let gamma = vec![1.5; bn.shape().channels()];
                let affine = Affine::new(&gamma, &gamma);
                let (mut dgamma, mut dbeta) = (gamma.clone(), gamma.clone());
                let mut saved = bn.saved();
                let mut record = |pass, layout, call: &mut (dyn FnMut() + Send)| {
                    let ns_per_element = pool.install(|| time(call, args.turns)) / elements as f64;
                    println!("{pass:<10} {layout:<6} {bytes:>12} {threads:>7} {ns_per_element:>14.3}");
                    lines.push(Line { pass, layout, bytes, threads, ns_per_element });
                };
                record("forward", name, &mut || {
                    bn.forward_train(&x, affine, &mut y, &mut saved).expect("a call of the bench")
                });
                record("backward", name, &mut || {
                    let gradients = Gradients {
                        dx: Some(&mut dx),
                        dgamma: Some(&mut dgamma),
                        dbeta: Some(&mut dbeta),
                        ..Default::default()
                    };
                    bn.backward(&x, &dy, &saved, Affine::scale(&gamma), gradients).expect("a call of the bench");
                });
                record("inference", name, &mut || {
                    let population = Population { mean: &gamma, var: &gamma };
                    bn.forward_infer(&x, affine, population, &mut y).expect("a call of the bench");
                });
                if layout == Layout::ChannelsFirst {
                    record("read", "-", &mut || stream::read(threads, stream::bytes(&x), None));
                    for (pass, store) in [("copy", Store::Plain), ("stream", Store::Streaming)] {
                        record(pass, "-", &mut || {
                            stream::write(threads, stream::bytes(&x), None, stream::bytes_mut(&mut y), store)
                        });
                    }
                }
            }
        }
    }
    stream::save("sweep.json", &lines)
}

/// The median time of a call in nanoseconds, after one to warm up.
fn time(call: &mut (dyn FnMut() + Send), turns: usize) -> f64 {
    let started = Instant::now();
    call();
    let calls = (200e-6 / started.elapsed().as_secs_f64()).clamp(1.0, 1000.0) as usize;
    let turn = |_| {
        let started = Instant::now();
        (0..calls).for_each(|_| call());
        started.elapsed().as_secs_f64() * 1e9 / calls as f64
    };
    stream::median((0..turns).map(turn).collect())
}
