//! What is computed: a shape, a pass, a type, and inputs that every contestant reads alike.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum;
use half::bf16;

pub const EPS: f64 = 1e-5;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Pass {
    /// Forward in training
    Forward,
    Inference,
    /// All three gradients, after a forward pass that is not timed
    Backward,
    /// Forward in training, then all three gradients
    Step,
}

impl Pass {
    pub const ALL: [Self; 4] = [Self::Forward, Self::Inference, Self::Backward, Self::Step];

    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Inference => "inference",
            Self::Backward => "backward",
            Self::Step => "step",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Dtype {
    F32,
    Bf16,
}

impl Dtype {
    pub const ALL: [Self; 2] = [Self::F32, Self::Bf16];

    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// How far results may be apart, relative to the largest value. All compute in f32, and sums of 400,000 values in
    /// f32 may lose a few digits. For bf16, two roundings to 8 bits may be one step of 2^-8 apart, at the largest value.
    pub fn bound(self) -> f32 {
        match self {
            Self::F32 => 1e-4,
            Self::Bf16 => 1e-2,
        }
    }
}

/// The sizes of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub n: usize,
    pub c: usize,
    pub h: usize,
    pub w: usize,
}

impl Size {
    pub fn len(self) -> usize {
        self.n * self.c * self.h * self.w
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}x{}x{}x{}", self.n, self.c, self.h, self.w))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    pub pass: Pass,
    pub dtype: Dtype,
    pub size: Size,
    pub threads: usize,
}

/// Tensors in NCHW, as f32 that the element type holds exactly; a value per channel of the others.
pub struct Inputs {
    pub x: Vec<f32>,
    pub dy: Vec<f32>,
    pub gamma: Vec<f32>,
    pub beta: Vec<f32>,
    pub mean: Vec<f32>,
    pub var: Vec<f32>,
}

impl Inputs {
    pub fn new(size: Size, dtype: Dtype) -> Self {
        // Golden-ratio steps: spread evenly, no two alike, no period that a channel could fall in step with.
        let value = |i: usize| ((i as f64 * 0.618_033_988_75).fract() * 2.0 - 1.0) as f32;
        let plane = size.h * size.w;
        // Means of their own, so that no sum is near zero, where nothing could be said of its error.
        let element = |i: usize, step: usize| {
            let exact = value(step) + 0.5 + 0.25 * value(i / plane % size.c);
            match dtype {
                Dtype::F32 => exact,
                Dtype::Bf16 => bf16::from_f32(exact).to_f32(),
            }
        };
        let channels = |f: fn(f32) -> f32| (0..size.c).map(|c| f(value(c))).collect();
        Self {
            x: (0..size.len()).map(|i| element(i, i)).collect(),
            dy: (0..size.len()).map(|i| element(i, size.len() - i)).collect(),
            gamma: channels(|v| 1.5 + 0.5 * v),
            beta: channels(|v| -v),
            mean: channels(|v| 0.5 * v),
            var: channels(|v| 1.5 - v),
        }
    }

    /// Writes them for the servers, as plain f32.
    pub fn write(&self, directory: &Path) -> Result<()> {
        let Self { x, dy, gamma, beta, mean, var } = self;
        let files = [("x", x), ("dy", dy), ("gamma", gamma), ("beta", beta), ("mean", mean), ("var", var)];
        for (name, values) in files {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
            std::fs::write(directory.join(name), bytes).with_context(|| format!("writing {name}"))?;
        }
        Ok(())
    }
}

/// Results by name (y, dx, dgamma, dbeta), tensors in NCHW.
pub type Outputs = Vec<(&'static str, Vec<f32>)>;

/// The names of what a pass computes.
pub fn output_names(pass: Pass) -> &'static [&'static str] {
    match pass {
        Pass::Forward | Pass::Inference => &["y"],
        Pass::Backward => &["dx", "dgamma", "dbeta"],
        Pass::Step => &["y", "dx", "dgamma", "dbeta"],
    }
}

/// Reads what a server wrote.
pub fn read_outputs(pass: Pass, directory: &Path) -> Result<Outputs> {
    let read = |&name: &&'static str| {
        let bytes = std::fs::read(directory.join(name)).with_context(|| format!("reading {name}"))?;
        let values = bytes.as_chunks().0.iter().map(|b| f32::from_ne_bytes(*b)).collect();
        Ok((name, values))
    };
    output_names(pass).iter().map(read).collect()
}

/// Fails where the results of a peer are not those expected.
pub fn compare(expected: &Outputs, got: &Outputs, bound: f32) -> Result<()> {
    anyhow::ensure!(expected.len() == got.len(), "{} results instead of {}", got.len(), expected.len());
    for ((name, expected), (_, got)) in expected.iter().zip(got) {
        anyhow::ensure!(expected.len() == got.len(), "{} values of {name} instead of {}", got.len(), expected.len());
        let largest = expected.iter().fold(0.0, |a: f32, b| a.max(b.abs()));
        // A NaN is no number that `max` would keep.
        let apart = expected.iter().zip(got).fold(0.0, |a: f32, (e, g)| {
            let d = (e - g).abs();
            if d.is_nan() { f32::INFINITY } else { a.max(d) }
        });
        anyhow::ensure!(apart <= bound * largest, "{name} is {apart:e} off, where the largest value is {largest}");
    }
    Ok(())
}
