//! What synchronisation costs: the time of each collective by channels and ranks, its share of a step, the bytes that a rank
//! sends, and the model of docs/distributed.md fitted to these times.
//!
//! `mpirun -n 2 cargo run --release -p batchnorm-mpi --example collective`

use std::error::Error;
use std::time::Instant;

use batchnorm::{Affine, BatchNorm, GradientSums, Gradients, Moments, Parallelism, Shape};
use batchnorm_mpi::SyncBatchNorm;
use clap::Parser;
use mpi::collective::SystemOperation;
use mpi::topology::{Color, SimpleCommunicator};
use mpi::traits::*;

/// Measures the collectives on groups of 1, 2, 4, ... ranks and on all.
#[derive(Parser)]
struct Args {
    /// Calls in one measurement; the median of eleven measurements counts
    #[arg(long, default_value = "200", default_value_if("quick", "true", "3"))]
    calls: u32,
    /// Values of a shard, over all channels
    #[arg(long, default_value = "1605632", default_value_if("quick", "true", "65536"))]
    values: usize,
    /// Shows that it runs; the times mean nothing
    #[arg(long)]
    quick: bool,
}

const CHANNELS: [usize; 12] = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384];
/// Bytes of a message up to which Open MPI sends it at once over shared memory; a longer one waits until it is asked for.
const EAGER: f64 = 4096.0;
/// Bytes of a channel on the wire, forward and backward.
const BYTES: [usize; 2] = [size_of::<Moments>(), size_of::<GradientSums>()];

/// One collective, measured.
#[derive(Clone, Copy)]
struct Point {
    /// Rounds of recursive doubling.
    rounds: f64,
    /// Of a message.
    bytes: f64,
    /// Of the call, in microseconds.
    time: f64,
    /// Of the same call on one rank, which sends nothing.
    alone: f64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let universe = mpi::initialize().ok_or("MPI is up already")?;
    let world = universe.world();
    let is_first = world.rank() == 0;
    if is_first {
        let library = mpi::environment::library_version()?;
        println!("{} ranks, {}", world.size(), library.trim_end_matches('\0').trim());
        println!(
            "times in microseconds: the median of 11 measurements of {} calls each, on the slowest rank\n",
            args.calls
        );
        println!("| ranks | C | KiB sent, forward | moments | KiB sent, backward | sums | step | share |");
        println!("|---|---|---|---|---|---|---|---|");
    }
    let mut points: [Vec<Point>; 2] = Default::default();
    let sizes = (0..).map(|i| 1 << i).take_while(|&size| size < world.size()).chain([world.size()]);
    for size in sizes {
        // The other ranks wait for this group.
        let color = if world.rank() < size { Color::with_value(0) } else { Color::undefined() };
        if let Some(group) = world.split_by_color(color) {
            // Beyond a power of two, the ranks left over hand in theirs before and get the result after.
            let rounds = f64::from(size.ilog2()) + if size.count_ones() == 1 { 0.0 } else { 2.0 };
            for channels in CHANNELS {
                let [moments, sums, step] = measure(&args, &group, channels)?;
                let bytes = BYTES.map(|bytes| ((channels + 1) * bytes) as f64);
                if is_first {
                    let [kib, kib_back] = bytes.map(|bytes| rounds * bytes / 1024.0);
                    let share = 100.0 * (moments + sums) / step;
                    println!(
                        "| {size} | {channels} | {kib:.1} | {moments:.1} | {kib_back:.1} | {sums:.1} | {step:.0} | {share:.1} % |"
                    );
                }
                for (points, (bytes, time)) in points.iter_mut().zip(bytes.into_iter().zip([moments, sums])) {
                    let alone = points.iter().find(|p| p.bytes == bytes).map_or(time, |p| p.alone);
                    points.push(Point { rounds, bytes, time, alone });
                }
            }
        }
        // No spinning beside the group.
        let barrier = world.immediate_barrier();
        let mut pending = Some(barrier);
        while let Some(request) = pending.take() {
            pending = request.test().err();
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
    if is_first && world.size() > 1 {
        model(&points);
    }
    Ok(())
}

/// Microseconds of the collective of moments, of that of sums, and of a whole step.
fn measure(args: &Args, group: &SimpleCommunicator, channels: usize) -> Result<[f64; 3], Box<dyn Error>> {
    let shape = Shape::nc((args.values / channels).max(2), channels)?;
    let bn = BatchNorm::<f32>::new(shape)?.with_parallelism(Parallelism::Sequential);
    let mut sync = SyncBatchNorm::new(bn, group)?;
    let (mut moments, mut sums) = (vec![Moments::default(); channels], vec![GradientSums::default(); channels]);
    let x: Vec<f32> = (0..shape.len()).map(|i| (i % 101) as f32).collect();
    sync.plan().moments(&x, &mut moments)?;
    let of_moments = time(group, args.calls, || Ok(sync.merge_moments(&mut moments.clone())?))?;
    let of_sums = time(group, args.calls, || Ok(sync.merge_sums(&mut sums)?))?;
    let (mut y, mut dx, mut saved) = (x.clone(), x.clone(), sync.plan().saved());
    let step = time(group, args.calls.div_ceil(20), || {
        sync.forward_train(&x, Affine::none(), &mut y, &mut saved)?;
        let gradients = Gradients { dx: Some(&mut dx), ..Default::default() };
        Ok(sync.backward(&x, &y, &saved, Affine::none(), gradients)?)
    })?;
    Ok([of_moments, of_sums, step])
}

/// Microseconds of a call.
fn time(
    group: &SimpleCommunicator,
    calls: u32,
    mut call: impl FnMut() -> Result<(), Box<dyn Error>>,
) -> Result<f64, Box<dyn Error>> {
    let mut times = Vec::new();
    for warm in (0..12).map(|turn| turn > 0) {
        group.barrier();
        let begin = Instant::now();
        for _ in 0..calls {
            call()?;
        }
        let here = begin.elapsed().as_secs_f64() * 1e6 / f64::from(calls);
        let mut slowest = 0.0;
        group.all_reduce_into(&here, &mut slowest, SystemOperation::max());
        if warm {
            times.push(slowest);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// Latency and time per byte of `time = alone + rounds * (latency + bytes * per_byte)`, by least squares of relative errors.
fn fit(points: &[Point]) -> [f64; 2] {
    let (mut aa, mut ab, mut bb, mut a, mut b) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for p in points {
        // Divided by the time, so that errors are relative.
        let [latency, per_byte] = [p.rounds / p.time, p.rounds * p.bytes / p.time];
        let rest = (p.time - p.alone) / p.time;
        aa += latency * latency;
        ab += latency * per_byte;
        bb += per_byte * per_byte;
        a += latency * rest;
        b += per_byte * rest;
    }
    let determinant = aa * bb - ab * ab;
    [(a * bb - b * ab) / determinant, (aa * b - ab * a) / determinant]
}

/// Prints the fit, how far off it is, and what it says of more ranks.
fn model(points: &[Vec<Point>; 2]) {
    println!("\n| collective | messages | latency of a round, us | GB/s in a round | worst measured / fitted |");
    println!("|---|---|---|---|---|");
    let fits = ["moments", "sums"].iter().zip(points).map(|(name, points)| {
        ["up to 4 KiB", "longer"].map(|length| {
            let of = |p: &Point| p.rounds > 0.0 && (p.bytes <= EAGER) == (length != "longer");
            let apart: Vec<Point> = points.iter().copied().filter(of).collect();
            let [latency, per_byte] = fit(&apart);
            let fitted = |p: &Point| p.alone + p.rounds * (latency + p.bytes * per_byte);
            let off = apart.iter().map(|p| (p.time / fitted(p)).max(fitted(p) / p.time)).fold(1.0, f64::max);
            println!("| {name} | {length} | {latency:.2} | {:.2} | {off:.2} |", 1e-3 / per_byte);
            [latency, per_byte]
        })
    });
    let fits: Vec<_> = fits.collect();
    println!("\nWith these between all ranks, the rounds of both collectives of a step, in microseconds:\n");
    println!("| C | 64 ranks | 1024 ranks | 16384 ranks |");
    println!("|---|---|---|---|");
    for channels in [64, 256, 2048] {
        let of = |rounds: f64| -> f64 {
            let round = |([short, long], of_channel): (&[[f64; 2]; 2], usize)| {
                let bytes = ((channels + 1) * of_channel) as f64;
                let [latency, per_byte] = if bytes <= EAGER { short } else { long };
                latency + per_byte * bytes
            };
            rounds * fits.iter().zip(BYTES).map(round).sum::<f64>()
        };
        println!("| {channels} | {:.0} | {:.0} | {:.0} |", of(6.0), of(10.0), of(14.0));
    }
}
