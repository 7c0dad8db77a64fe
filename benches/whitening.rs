//! What whitening costs beside Batch Normalization, against the number of channels. Prints a table and writes whitening.json
//! into the target directory.
//!
//! `cargo bench --bench whitening --all-features` takes about a minute; `-- --most 32` stops at 32 channels.

#[allow(dead_code, reason = "the median and the file of results alone")]
mod stream;

use std::time::Instant;

use batchnorm::whitening::{Method, Whitening};
use batchnorm::{Affine, BatchNorm, Gradients, Shape};
use clap::Parser;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

/// Times forward and backward passes of Batch Normalization and of whitening side by side.
#[derive(Parser)]
struct Args {
    /// The most channels
    #[arg(long, default_value_t = 512)]
    most: usize,
    /// Turns per pass and number of channels
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
    norm: &'static str,
    channels: usize,
    ns_per_element: f64,
}

const NEWTON: Method = Method::IterNorm { steps: 5 };

/// A name and a call of either pass.
type Pair<'a> = (&'static str, Box<dyn FnMut(&'static str) + 'a>);

/// Both kinds of plans have passes of the same names.
macro_rules! pair {
    ($name:literal, $plan:expr, $x:expr, $dy:expr) => {{
        let (plan, x, dy) = ($plan, $x, $dy);
        let (mut out, mut saved) = (vec![0.0; x.len()], plan.saved());
        let call = move |pass| {
            let done = if pass == "forward" {
                plan.forward_train(x, Affine::none(), &mut out, &mut saved)
            } else {
                let gradients = Gradients { dx: Some(&mut out), ..Default::default() };
                plan.backward(x, dy, &saved, Affine::none(), gradients)
            };
            done.expect("a call of the bench");
        };
        ($name, Box::new(call))
    }};
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let mut lines = Vec::new();
    println!("{:<10} {:<20} {:>8} {:>14}", "pass", "norm", "channels", "ns per element");
    for channels in std::iter::successors(Some(8), |channels| Some(channels * 2)).take_while(|c| *c <= args.most) {
        let shape = Shape::nchw(32, channels, 28, 28)?;
        let mut rng = SmallRng::seed_from_u64(1);
        let x: Vec<f32> = (0..shape.len()).map(|_| rng.random_range(-1.0..1.0)).collect();
        let dy: Vec<f32> = (0..shape.len()).map(|_| rng.random_range(-1.0..1.0)).collect();
        let whitening = Whitening::<f32>::new(shape)?;
        let mut pairs: Vec<Pair> = vec![pair!("Batch Normalization", BatchNorm::<f32>::new(shape)?, &x, &dy)];
        if channels > 64 {
            pairs.push(pair!("ZCA, groups of 64", whitening.clone(), &x, &dy));
        }
        let all = whitening.with_group(channels)?;
        pairs.push(pair!("ZCA, one group", all.clone(), &x, &dy));
        pairs.push(pair!("IterNorm, one group", all.with_method(NEWTON)?, &x, &dy));
        for pass in ["forward", "backward"] {
            // In turns, so that what else runs on the machine slows all of them.
            let mut times = vec![Vec::new(); pairs.len()];
            for _ in 0..=args.turns {
                for ((_, call), times) in pairs.iter_mut().zip(&mut times) {
                    let started = Instant::now();
                    call(pass);
                    times.push(started.elapsed().as_secs_f64() * 1e9);
                }
            }
            for (&(norm, _), times) in pairs.iter().zip(times) {
                // The first warms up.
                let ns_per_element = stream::median(times[1..].to_vec()) / shape.len() as f64;
                println!("{pass:<10} {norm:<20} {channels:>8} {ns_per_element:>14.3}");
                lines.push(Line { pass, norm, channels, ns_per_element });
            }
        }
    }
    stream::save("whitening.json", &lines)
}
