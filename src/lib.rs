//! Batch Normalization kernels.
#![deny(missing_docs)]

mod backward;
mod element;
mod error;
mod forward;
mod grid;
mod kernel;
mod moments;
mod pass;
mod plan;
pub mod reference;
mod running;
mod scratch;
mod shape;
mod simd;

pub use element::{Element, Real};
pub use error::{Error, Result};
pub use grid::Parallelism;
pub use moments::{GradientSums, Moments, Saved};
pub use plan::{Affine, BatchNorm, Gradients};
pub use running::{Momentum, Population, Running, Variance};
pub use shape::{Layout, Shape};
pub use simd::Tier;
