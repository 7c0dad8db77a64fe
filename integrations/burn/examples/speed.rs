//! A training step of the layer, forward and backward, beside burn's own: `burn::nn::BatchNorm` on flex, with the threads and
//! the SIMD that burn has by default.
//!
//! `cargo run --release -p batchnorm-burn --example speed`

use std::time::{Duration, Instant};

use batchnorm_burn::BatchNorm;
use burn::nn;
use burn::tensor::{Device, Distribution, Tensor};
use clap::Parser;

/// Times both layers in turns.
#[derive(Parser)]
struct Args {
    /// Batch, channels, height and width
    #[arg(long, num_args = 4, default_values_t = [32, 64, 56, 56])]
    shape: Vec<usize>,
    /// Turns of each; the median counts
    #[arg(long, default_value = "31", default_value_if("quick", "true", "3"))]
    turns: usize,
    /// Shows that it runs; the times mean little
    #[arg(long)]
    quick: bool,
}

/// Forward and backward from `y` to x, gamma and beta, which burn begins with a dy of ones.
fn step(forward: impl Fn(Tensor<4>) -> Tensor<4>, x: &Tensor<4>) -> Duration {
    let start = Instant::now();
    let gradients = forward(x.clone()).backward();
    assert!(x.grad(&gradients).is_some());
    start.elapsed()
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    1e3 * times[times.len() / 2].as_secs_f64()
}

fn main() {
    let args = Args::parse();
    let shape: [usize; 4] = args.shape.try_into().expect("clap counts them");
    let device = Device::flex().autodiff();
    let x = Tensor::<4>::random(shape, Distribution::Normal(0.0, 1.0), &device).require_grad();
    let burns = nn::BatchNormConfig::new(shape[1]).init(&device);
    let ours = BatchNorm::from(nn::BatchNormConfig::new(shape[1]).init(&device));
    let (mut our_times, mut burns_times) = (Vec::new(), Vec::new());
    // The first turn warms up.
    for turn in 0..=args.turns {
        let times = (step(|x| ours.forward(x), &x), step(|x| burns.forward(x), &x));
        if turn > 0 {
            our_times.push(times.0);
            burns_times.push(times.1);
        }
    }
    let (ours, burns) = (median(our_times), median(burns_times));
    println!("{shape:?} f32, forward with backward, medians of {} turns", args.turns);
    println!("| batchnorm-burn | burn | ratio |");
    println!("|---|---|---|");
    println!("| {ours:.2} ms | {burns:.2} ms | {:.1} |", burns / ours);
}
