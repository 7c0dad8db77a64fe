//! A small convolutional network on digits, trained with this crate's layer and with candle-nn's from the same weights on the
//! same batches, side by side.
//!
//! `cargo run --release -p batchnorm-candle --example digits`

#[path = "../../../../examples/digits/data.rs"]
mod data;
mod network;

use std::error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use batchnorm_candle::BatchNormConfig;
use candle_core::{Device, Tensor};
use clap::Parser;
use data::{Data, Images};
use network::{Network, Norm};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Trains a convolutional network on digits with batchnorm-candle and with candle-nn.
#[derive(Parser)]
struct Args {
    /// A folder with the four IDX files of MNIST, plain or gzip, instead of the built-in digits
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Training steps
    #[arg(long, default_value = "300", default_value_if("short", "true", "60"))]
    steps: u32,
    /// Images of a batch
    #[arg(long, default_value = "60", value_parser = clap::value_parser!(u16).range(1..=1000))]
    batch: u16,
    /// The learning rate
    #[arg(long, default_value_t = 0.1)]
    rate: f64,
    /// Seed of the split into training and test images, of the weights and of the batches
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Fewer steps
    #[arg(long)]
    short: bool,
    /// Fail unless both learn, alike
    #[arg(long)]
    check: bool,
}

type Result<T> = std::result::Result<T, Box<dyn error::Error + Send + Sync>>;

/// Lines of the table.
const LINES: u32 = 6;

const NORMS: [(&str, Norm); 2] = [
    ("batchnorm", |channels, vb| Ok(Box::new(batchnorm_candle::batch_norm(channels, BatchNormConfig::default(), vb)?))),
    ("candle-nn", |channels, vb| Ok(Box::new(candle_nn::batch_norm(channels, BatchNormConfig::default(), vb)?))),
];

fn main() -> Result<()> {
    let args = Args::parse();
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let data = match &args.data {
        Some(folder) => Data::idx(folder)?,
        None => Data::digits(&mut rng)?,
    };
    let (size, batch) = ([data.height, data.width], usize::from(args.batch));
    if data.train.len() < batch {
        return Err(format!("{} training images do not fill a batch of {batch}", data.train.len()).into());
    }
    println!("Data: {}, {} images to train on, {} to test", data.name, data.train.len(), data.test.len());
    println!("{} steps of {batch} images, seed {}\n", args.steps, args.seed);
    println!("{:>6}{:>24}{:>30}", "", "training loss", "test accuracy, %");
    print!("{:>6}", "step");
    NORMS.iter().chain(&NORMS).for_each(|(name, _)| print!("{name:>14}"));
    println!();

    // Each from the same seed.
    let make = |norm| Network::new(size, norm, args.rate, &mut ChaCha8Rng::seed_from_u64(args.seed));
    let mut networks = [make(NORMS[0].1)?, make(NORMS[1].1)?];
    let all: Vec<usize> = (0..data.test.len()).collect();
    let (test, test_labels) = tensors(&data.test, &all, size)?;
    let mut order: Vec<usize> = (0..data.train.len()).collect();
    let (mut used, mut times) = (order.len(), [Duration::ZERO; 2]);
    let (mut first, mut last) = ([0.0; 2], [0.0; 2]);
    for step in 1..=args.steps {
        if order.len() - used < batch {
            order.shuffle(&mut rng);
            used = 0;
        }
        let (images, labels) = tensors(&data.train, &order[used..used + batch], size)?;
        used += batch;
        let mut losses = [0.0; 2];
        for ((network, loss), time) in networks.iter_mut().zip(&mut losses).zip(&mut times) {
            let start = Instant::now();
            *loss = network.step(&images, &labels)?;
            *time += start.elapsed();
        }
        if step == 1 {
            first = losses;
        }
        if step == 1 || step.is_multiple_of((args.steps / (LINES - 1)).max(1)) || step == args.steps {
            for (network, accuracy) in networks.iter().zip(&mut last) {
                *accuracy = network.accuracy(&test, &test_labels)?;
            }
            let ([a, b], [c, d]) = (losses, last);
            println!("{step:>6}{a:>14.4}{b:>14.4}{c:>14.1}{d:>14.1}");
        }
    }
    let [ours, theirs] = times.map(|time| time.as_secs_f64());
    println!(
        "\nTraining took {ours:.2} s with batchnorm and {theirs:.2} s with candle-nn: {:.1} times as long.",
        theirs / ours
    );
    let alike = (first[0] - first[1]).abs() < 1e-4 && (last[0] - last[1]).abs() < 3.0;
    if args.check && !(alike && last[0] > 80.0) {
        return Err("expected both to begin alike, to end alike, and to tell eight digits of ten".into());
    }
    Ok(())
}

/// Images as (N, 1, height, width), and their labels.
fn tensors(images: &Images, which: &[usize], [height, width]: [usize; 2]) -> Result<(Tensor, Tensor)> {
    let pixels: Vec<f32> = which.iter().flat_map(|&i| images.image(i)).copied().collect();
    let labels: Vec<u32> = which.iter().map(|&i| u32::from(images.labels[i])).collect();
    let labels = Tensor::new(labels, &Device::Cpu)?;
    Ok((Tensor::from_vec(pixels, (which.len(), 1, height, width), &Device::Cpu)?, labels))
}
