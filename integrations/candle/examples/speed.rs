//! This crate's layer beside candle-nn's, in turns: medians of the time of a pass, and how many times as fast it is.
//!
//! `RAYON_NUM_THREADS=2 cargo run --release -p batchnorm-candle --example speed`, with `-- --quick` in seconds.

use std::time::Instant;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, Var};
use candle_nn::{BatchNormConfig, ModuleT, VarBuilder, VarMap};
use clap::Parser;

/// Times batchnorm-candle and candle-nn.
#[derive(Parser)]
struct Args {
    /// One shape, few turns
    #[arg(long)]
    quick: bool,
    /// Turns of each contestant
    #[arg(long)]
    turns: Option<usize>,
    /// A shape of its own, such as 32,64,56,56
    #[arg(long, value_delimiter = ',')]
    shape: Option<Vec<usize>>,
}

const SHAPES: [&[usize]; 4] = [&[32, 64, 56, 56], &[32, 128, 28, 28], &[32, 512, 7, 7], &[4096, 256]];

/// How far a pass goes.
#[derive(Clone, Copy)]
enum Pass {
    Eval,
    Forward,
    /// And back from y: candle takes ones for its gradient.
    Step,
    /// And back from the loss `sum(y * dy)`, whose own operations count too.
    Loss,
}

const PASSES: [(&str, Pass); 4] = [
    ("forward at evaluation", Pass::Eval),
    ("forward in training", Pass::Forward),
    ("forward with backward", Pass::Step),
    ("the same from sum(y*dy)", Pass::Loss),
];

fn run(layer: &dyn ModuleT, pass: Pass, x: &Var, dy: &Tensor) -> Result<()> {
    let y = layer.forward_t(x, !matches!(pass, Pass::Eval))?;
    match pass {
        Pass::Eval | Pass::Forward => Ok(()),
        Pass::Step => y.backward().map(drop),
        Pass::Loss => (&y * dy)?.sum_all()?.backward().map(drop),
    }
}

/// What candle's graph costs with a layer that does nothing: the same memory under another node.
struct Nothing;

impl ModuleT for Nothing {
    fn forward_t(&self, x: &Tensor, _train: bool) -> Result<Tensor> {
        x.reshape(x.shape())
    }
}

/// An operation that copies, in both directions: the least that a layer with an output of its own costs.
struct Copies;

impl ModuleT for Copies {
    fn forward_t(&self, x: &Tensor, _train: bool) -> Result<Tensor> {
        x.apply_op1(Copy)
    }
}

struct Copy;

impl CustomOp1 for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = storage.as_slice::<f32>()?.to_vec();
        Ok((CpuStorage::F32(x), layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        dy.copy().map(Some)
    }
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() -> Result<()> {
    let args = Args::parse();
    let turns = args.turns.unwrap_or(if args.quick { 5 } else { 25 }).max(1);
    let shapes = match &args.shape {
        Some(shape) => vec![shape.as_slice()],
        None => SHAPES[..if args.quick { 1 } else { SHAPES.len() }].to_vec(),
    };
    println!("f32, {} threads, medians of {turns} turns in ms", candle_core::utils::get_num_threads());
    println!(
        "{:<16}{:<26}{:>12}{:>12}{:>12}{:>12}{:>8}",
        "shape", "pass", "batchnorm", "candle-nn", "copy", "nothing", "ratio"
    );
    for dims in shapes {
        let (variables, config) = (VarMap::new(), BatchNormConfig::default());
        let vb = || VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
        let channels = dims.get(1).copied().unwrap_or_default();
        let ours = batchnorm_candle::batch_norm(channels, config, vb().pp("ours"))?;
        let theirs = candle_nn::batch_norm(channels, config, vb().pp("theirs"))?;
        let contestants: [&dyn ModuleT; 4] = [&ours, &theirs, &Copies, &Nothing];
        let x = Var::from_tensor(&Tensor::randn(0f32, 1.0, dims, &Device::Cpu)?)?;
        let dy = Tensor::randn(0f32, 1.0, dims, &Device::Cpu)?;
        for (name, pass) in PASSES {
            let mut times = [const { Vec::new() }; 4];
            // The first turn is not on the clock.
            for turn in 0..=turns {
                for (layer, times) in contestants.iter().zip(&mut times) {
                    let start = Instant::now();
                    run(*layer, pass, &x, &dy)?;
                    if turn > 0 {
                        times.push(1e3 * start.elapsed().as_secs_f64());
                    }
                }
            }
            let [ours, theirs, copy, nothing] = times.each_mut().map(|times| median(times));
            let shape = dims.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
            println!(
                "{shape:<16}{name:<26}{ours:>12.3}{theirs:>12.3}{copy:>12.3}{nothing:>12.3}{:>8.1}",
                theirs / ours
            );
        }
    }
    Ok(())
}
