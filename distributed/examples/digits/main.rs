//! The digits in data-parallel form: each rank trains on its part of every batch, gradients are summed over the ranks, and Batch
//! Normalization is synchronised, or not, or all is done in one process.
//!
//! `mpirun -n 2 cargo run --release -p batchnorm-mpi --example digits`

#[path = "../../../examples/digits/data.rs"]
mod data;
#[path = "../../../examples/digits/gemm.rs"]
mod gemm;
mod network;

use std::error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use data::Data;
use mpi::collective::SystemOperation;
use mpi::topology::SimpleCommunicator;
use mpi::traits::*;
use network::Network;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Trains three hidden layers of 100 sigmoids on digits, in parallel, with and without synchronised Batch Normalization.
#[derive(Parser)]
struct Args {
    /// A folder with the four IDX files of MNIST, plain or gzip, instead of the built-in digits
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Images of a batch on each rank
    #[arg(long, default_value = "2", value_parser = clap::value_parser!(u16).range(1..=1000))]
    batch: u16,
    /// Training steps
    #[arg(long, default_value = "6000", default_value_if("short", "true", "1500"))]
    steps: u32,
    /// The learning rate
    #[arg(long, default_value_t = 0.1)]
    rate: f32,
    /// Seed of the split into training and test images, of the weights and of the batches
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Fewer steps
    #[arg(long)]
    short: bool,
    /// Fail unless synchronised training is as good as one process, and training without synchronisation worse
    #[arg(long)]
    check: bool,
}

type Result<T> = std::result::Result<T, Box<dyn error::Error + Send + Sync>>;

/// The last part of the steps, over which accuracies are averaged, and how often they are measured there.
const TAIL: (u32, u32) = (4, 10);

fn main() -> ExitCode {
    let args = Args::parse();
    let Some(universe) = mpi::initialize() else { return ExitCode::FAILURE };
    let world = universe.world();
    match report(&args, &world) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error on rank {}: {e}", world.rank());
            // The others may be waiting for this one.
            world.abort(1)
        }
    }
}

fn report(args: &Args, world: &SimpleCommunicator) -> Result<()> {
    let data = match &args.data {
        Some(folder) => Data::idx(folder)?,
        None => Data::digits(&mut ChaCha8Rng::seed_from_u64(args.seed))?,
    };
    let myself = SimpleCommunicator::self_comm();
    let (ranks, here) = (world.size() as usize, usize::from(args.batch));
    if data.train.len() < ranks * here {
        return Err(format!("{} training images do not fill a batch of {}", data.train.len(), ranks * here).into());
    }
    if world.rank() == 0 {
        println!("Data: {}, {} images to train on, {} to test", data.name, data.train.len(), data.test.len());
        println!("{ranks} ranks with {here} images of every batch each, {} steps, seed {}\n", args.steps, args.seed);
        println!("{:<34}{:>18}", "Batch Normalization", "test accuracy, %");
    }
    // Whose statistics are shared, and whose gradients are summed.
    let [together, apart, alone] = [
        ("synchronised", world, world),
        ("not synchronised", &myself, world),
        ("one process, the same batches", &myself, &myself),
    ]
    .map(|(name, norm, gradients)| -> Result<f64> {
        let accuracy = train(args, &data, norm, gradients)?;
        // Without synchronisation each rank has running statistics of its own.
        let mut sum = 0.0;
        world.all_reduce_into(&accuracy, &mut sum, SystemOperation::sum());
        let mean = 100.0 * sum / f64::from(world.size());
        if world.rank() == 0 {
            println!("{name:<34}{mean:>18.2}");
        }
        Ok(mean)
    });
    let (together, apart, alone) = (together?, apart?, alone?);
    if args.check && !((together - alone).abs() < 1.5 && apart < alone - 3.0) {
        return Err("expected the first and the third to be alike, and the second to be worse".into());
    }
    Ok(())
}

/// Trains one network, and gives its accuracy in the last part of the training.
fn train(args: &Args, data: &Data, norm: &SimpleCommunicator, gradients: &SimpleCommunicator) -> Result<f64> {
    // The same on all ranks: weights, batches.
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let world = SimpleCommunicator::world();
    let whole = usize::from(args.batch) * world.size() as usize;
    let here = whole / gradients.size() as usize;
    let mut network = Network::new(data.height * data.width, here, norm, &mut rng)?;
    let mut order: Vec<usize> = (0..data.train.len()).collect();
    let (mut used, mut accuracies) = (order.len(), Vec::new());
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    let tail = (args.steps / TAIL.0).max(1);
    for step in 1..=args.steps {
        if order.len() - used < whole {
            order.shuffle(&mut rng);
            used = 0;
        }
        let mine = used + here * gradients.rank() as usize;
        used += whole;
        pixels.clear();
        labels.clear();
        for &i in &order[mine..mine + here] {
            pixels.extend_from_slice(data.train.image(i));
            labels.push(data.train.labels[i]);
        }
        network.step(&pixels, &labels, whole, args.rate, gradients)?;
        if step > args.steps - tail && (args.steps - step).is_multiple_of(tail.div_ceil(TAIL.1)) {
            accuracies.push(network.accuracy(&data.test)?);
        }
    }
    let bits = network.digest();
    let mut all = vec![0; world.size() as usize];
    world.all_gather_into(&bits, &mut all[..]);
    if all.iter().any(|other| *other != bits) {
        return Err("the ranks' networks are not the same".into());
    }
    Ok(accuracies.iter().sum::<f64>() / accuracies.len().max(1) as f64)
}
