//! A small convolutional network on handwritten digits, trained with this layer and with burn's, side by side from the same seed.
//!
//! `cargo run --release -p batchnorm-burn --example digits`

use std::error::Error;

use batchnorm_burn::{BatchNorm, BatchNormConfig};
use burn::module::Module;
use burn::nn;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::Parser;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Trains one network with either layer and prints loss and accuracy.
#[derive(Parser)]
struct Args {
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

const SIDE: usize = 8;
const CLASSES: usize = 10;
const BATCH: usize = 32;
const RATE: f64 = 0.1;

/// Images with their digits.
type Labelled = (Vec<f32>, u8);

/// The digits of examples/digits, of which its README names the source: four of five to train on.
fn digits(rng: &mut ChaCha8Rng) -> Result<[Vec<Labelled>; 2], Box<dyn Error>> {
    let csv = include_bytes!("../../../examples/digits/digits.csv");
    let mut all = Vec::new();
    for record in csv::ReaderBuilder::new().has_headers(false).from_reader(&csv[..]).deserialize() {
        let record: Vec<u8> = record?;
        let (&label, pixels) = record.split_last().ok_or("digits.csv: an empty record")?;
        all.push((pixels.iter().map(|&pixel| f32::from(pixel) / 16.0).collect(), label));
    }
    all.shuffle(rng);
    let test = all.split_off(all.len() * 4 / 5);
    Ok([all, test])
}

/// Images and digits as tensors.
fn tensors(images: &[Labelled], device: &Device) -> (Tensor<4>, Tensor<1, Int>) {
    let pixels: Vec<f32> = images.iter().flat_map(|(pixels, _)| pixels).copied().collect();
    let labels: Vec<i32> = images.iter().map(|&(_, label)| label.into()).collect();
    let pixels = TensorData::new(pixels, [images.len(), 1, SIDE, SIDE]);
    (Tensor::from_data(pixels, device), Tensor::from_data(TensorData::new(labels, [images.len()]), device))
}

#[derive(Module, Debug)]
enum Norm {
    Ours(BatchNorm),
    Burns(nn::BatchNorm),
}

impl Norm {
    fn ours(channels: usize, device: &Device) -> Self {
        Self::Ours(BatchNormConfig::new(channels).init(device))
    }

    fn burns(channels: usize, device: &Device) -> Self {
        Self::Burns(nn::BatchNormConfig::new(channels).init(device))
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        match self {
            Norm::Ours(norm) => norm.forward(x),
            Norm::Burns(norm) => norm.forward(x),
        }
    }
}

/// Two convolutions, each normalized and followed by a ReLU, the second on half of the rows and columns, and a linear layer.
#[derive(Module, Debug)]
struct Network {
    convs: [Conv2d; 2],
    norms: [Norm; 2],
    last: nn::Linear,
}

impl Network {
    const MAPS: [usize; 2] = [8, 16];

    fn new(norm: fn(usize, &Device) -> Norm, device: &Device) -> Self {
        let [first, second] = Self::MAPS;
        let padding = nn::PaddingConfig2d::Explicit(1, 1, 1, 1);
        let conv = |from, to, stride: usize| {
            let config = Conv2dConfig::new([from, to], [3, 3]).with_padding(padding.clone()).with_bias(false);
            config.with_stride([stride; 2]).init(device)
        };
        Self {
            convs: [conv(1, first, 1), conv(first, second, 2)],
            norms: Self::MAPS.map(|maps| norm(maps, device)),
            last: nn::LinearConfig::new(second * SIDE * SIDE / 4, CLASSES).init(device),
        }
    }

    fn forward(&self, mut x: Tensor<4>) -> Tensor<2> {
        for (conv, norm) in self.convs.iter().zip(&self.norms) {
            x = relu(norm.forward(conv.forward(x)));
        }
        self.last.forward(x.flatten(1, 3))
    }

    /// The share of images whose digit it names.
    fn accuracy(&self, images: &[Labelled], device: &Device) -> f64 {
        let (pixels, labels) = tensors(images, device);
        let named = self.forward(pixels).argmax(1).squeeze_dim::<1>(1);
        let right = named.equal(labels).int().sum().into_scalar::<i64>();
        right as f64 / images.len() as f64
    }
}

/// Loss on the training images and accuracy on the test images, epoch by epoch.
fn train(norm: fn(usize, &Device) -> Norm, args: &Args) -> Result<Vec<(f64, f64)>, Box<dyn Error>> {
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let [mut images, test] = digits(&mut rng)?;
    let device = Device::flex().autodiff();
    device.seed(args.seed);
    let mut network = Network::new(norm, &device);
    let mut optimizer = SgdConfig::new().init();
    let loss = nn::loss::CrossEntropyLossConfig::new().init(&device);
    let mut measured = Vec::new();
    for _ in 0..args.epochs {
        images.shuffle(&mut rng);
        let mut total = 0.0;
        for batch in images.chunks(BATCH) {
            let (pixels, labels) = tensors(batch, &device);
            let loss = loss.forward(network.forward(pixels), labels);
            total += loss.clone().into_scalar::<f64>() * batch.len() as f64;
            let gradients = GradientsParams::from_grads(loss.backward(), &network);
            network = optimizer.step(RATE, network, gradients);
        }
        // Without autodiff, with the running statistics.
        measured.push((total / images.len() as f64, network.valid().accuracy(&test, &Device::flex())));
    }
    Ok(measured)
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let (ours, burns) = (train(Norm::ours, &args)?, train(Norm::burns, &args)?);
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
