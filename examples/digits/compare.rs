//! Ways to normalize side by side: accuracy by step and by second.

use crate::data::Data;
use crate::experiment::{self, Point};
use crate::layers::{Dims, Layer};
use crate::network::Network;
use crate::{Args, Result, figure, introduce, make, percent, row, rows, scaled};
use batchnorm::Error;
use clap::ValueEnum;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::fs;
use std::io::Write;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Norm {
    /// A bias
    None,
    /// Batch Normalization
    Bn,
    /// Whitening by eigenvalues
    Zca,
    /// Whitening by five steps of Newton's iteration
    Iter,
}

impl Norm {
    fn name(self) -> &'static str {
        match self {
            Norm::None => "none",
            Norm::Bn => "BN",
            Norm::Zca => "ZCA",
            Norm::Iter => "IterNorm",
        }
    }

    fn layer(self, dims: Dims, group: usize) -> core::result::Result<Box<dyn Layer>, Error> {
        #[cfg(feature = "whitening")]
        {
            use batchnorm::whitening::Method;
            let method = match self {
                Norm::Zca => Some(Method::Zca),
                Norm::Iter => Some(Method::IterNorm { steps: 5 }),
                _ => None,
            };
            if let Some(method) = method {
                return Ok(Box::new(crate::whitened::Whitened::new(dims, method, group)?));
            }
        }
        let _ = group;
        make(self == Norm::Bn)(dims)
    }
}

/// Trains with each of `args.norm` in turn, from the same weights on the same batches.
pub fn report(args: &Args, data: &Data, out: &mut impl Write) -> Result<()> {
    if cfg!(not(feature = "whitening")) && args.norm.iter().any(|norm| [Norm::Zca, Norm::Iter].contains(norm)) {
        let how = "cargo run --release --features whitening --example digits -- --norm ...";
        return Err(format!("zca and iter need the feature whitening: {how}").into());
    }
    let inputs = data.height * data.width;
    let mut runs: Vec<(&str, Vec<Point>)> = Vec::new();
    for &norm in &args.norm {
        let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
        let make = |dims| norm.layer(dims, args.group.into());
        let network = Network::sigmoids(inputs, &make, &mut rng)?;
        let points = experiment::run(network, data, (args.steps, scaled(args.rate, 1)), &mut rng, || {})?;
        runs.push((norm.name(), points));
    }
    introduce(out, args, data)?;
    writeln!(out, "\nThree hidden layers of 100 sigmoids, rate {}: test accuracy in percent\n", scaled(args.rate, 1))?;
    let names = || runs.iter().map(|run| run.0);
    row(out, "step", names())?;
    for i in rows(&runs[0].1) {
        row(out, runs[0].1[i].step, runs.iter().map(|run| percent(run.1[i].accuracy)))?;
    }
    writeln!(out)?;
    row(out, "second", names())?;
    // Up to when the first is done, by halves.
    let end = runs.iter().flat_map(|run| run.1.last()).map(|point| point.seconds).fold(f64::MAX, f64::min);
    for at in (0..6).rev().map(|halves| end / f64::from(1 << halves)) {
        let latest = |points: &[Point]| points.iter().rfind(|point| point.seconds <= at).map_or(0.0, |p| p.accuracy);
        row(out, format!("{at:.3}"), runs.iter().map(|run| percent(latest(&run.1))))?;
    }
    let lasts = || runs.iter().flat_map(|run| run.1.last());
    row(out, "all", lasts().map(|point| format!("{:.2} s", point.seconds)))?;

    #[cfg(feature = "whitening")]
    let growth = crate::argument::report(data, args.seed, out)?;
    #[cfg(not(feature = "whitening"))]
    let growth = Vec::new();
    fs::write(&args.out, figure::compare(&runs, &growth)?)?;
    writeln!(out, "\nPicture: {}", args.out.display())?;
    Ok(())
}
