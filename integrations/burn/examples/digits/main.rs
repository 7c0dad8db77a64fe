//! A small convolutional network on handwritten digits, trained with this layer and with burn's, side by side from the same seed.
//!
//! `cargo run --release -p batchnorm-burn --example digits`

use std::error;
use std::path::PathBuf;

#[path = "../../../../examples/digits/data.rs"]
mod data;
mod network;

use burn::module::Module;
use burn::nn;
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::Parser;
use data::{Data, Images};
use network::{Network, Norm};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Trains one network with either layer and prints loss and accuracy.
#[derive(Parser)]
struct Args {
    /// A folder with the four IDX files of MNIST, plain or gzip, instead of the built-in digits
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Rounds over the training images
    #[arg(long, default_value_t = 5)]
    epochs: usize,
    /// Seeds the weights and the order of the images
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Fails unless both networks name 95 % of the test images
    #[arg(long)]
    check: bool,
}

type Result<T> = std::result::Result<T, Box<dyn error::Error + Send + Sync>>;

const BATCH: usize = 32;
const RATE: f64 = 0.1;

/// Images of (N, 1, height, width), and their digits.
fn tensors(
    images: &Images,
    which: &[usize],
    [height, width]: [usize; 2],
    device: &Device,
) -> (Tensor<4>, Tensor<1, Int>) {
    let pixels: Vec<f32> = which.iter().flat_map(|&i| images.image(i)).copied().collect();
    let labels: Vec<i32> = which.iter().map(|&i| images.labels[i].into()).collect();
    let pixels = TensorData::new(pixels, [which.len(), 1, height, width]);
    (Tensor::from_data(pixels, device), Tensor::from_data(TensorData::new(labels, [which.len()]), device))
}

/// Loss on the training images and accuracy on the test images, epoch by epoch.
fn train(norm: fn(usize, &Device) -> Norm, data: &Data, args: &Args) -> Vec<(f64, f64)> {
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let size = [data.height, data.width];
    let (mut order, all): (Vec<usize>, Vec<usize>) = ((0..data.train.len()).collect(), (0..data.test.len()).collect());
    let (test, test_labels) = tensors(&data.test, &all, size, &Device::flex());
    let device = Device::flex().autodiff();
    device.seed(args.seed);
    let mut network = Network::new(size, norm, &device);
    let mut optimizer = SgdConfig::new().init();
    let loss = nn::loss::CrossEntropyLossConfig::new().init(&device);
    let mut measured = Vec::new();
    for _ in 0..args.epochs {
        order.shuffle(&mut rng);
        let mut total = 0.0;
        for batch in order.chunks(BATCH) {
            let (pixels, labels) = tensors(&data.train, batch, size, &device);
            let loss = loss.forward(network.forward(pixels), labels);
            total += loss.clone().into_scalar::<f64>() * batch.len() as f64;
            let gradients = GradientsParams::from_grads(loss.backward(), &network);
            network = optimizer.step(RATE, network, gradients);
        }
        // Without autodiff, with the running statistics.
        let accuracy = network.valid().accuracy(test.clone(), test_labels.clone());
        measured.push((total / order.len() as f64, accuracy));
    }
    measured
}

fn main() -> Result<()> {
    let args = Args::parse();
    let data = match &args.data {
        Some(folder) => Data::idx(folder)?,
        None => Data::digits(&mut ChaCha8Rng::seed_from_u64(args.seed))?,
    };
    println!("Data: {}, {} images to train on, {} to test\n", data.name, data.train.len(), data.test.len());
    let (ours, burns) = (train(Norm::ours, &data, &args), train(Norm::burns, &data, &args));
    println!("| epoch | loss, batchnorm-burn | loss, burn | accuracy, batchnorm-burn | accuracy, burn |");
    println!("|---|---|---|---|---|");
    for (i, ((loss, accuracy), (burns_loss, burns_accuracy))) in ours.iter().zip(&burns).enumerate() {
        let [accuracy, burns_accuracy] = [accuracy, burns_accuracy].map(|share| 100.0 * share);
        println!("| {} | {loss:.6} | {burns_loss:.6} | {accuracy:.1} % | {burns_accuracy:.1} % |", i + 1);
    }
    let worst = ours.last().into_iter().chain(burns.last()).fold(1.0, |worst: f64, &(_, accuracy)| worst.min(accuracy));
    if args.check && worst < 0.95 {
        return Err(format!("a network names {:.1} % of the test images", 100.0 * worst).into());
    }
    Ok(())
}
