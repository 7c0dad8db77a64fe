//! SIMD-optimized CPU kernels for Batch Normalization (Ioffe & Szegedy 2015), on raw slices.
//!
//! A [`BatchNorm`] is a plan for tensors of one [`Shape`] and element type. Its methods are the training forward
//! pass, inference and the backward pass, each also in place, and their halves for statistics that are shared
//! between shards of a batch. Slices are dense, or lie as a [`View`] tells, and may have any alignment.
//!
//! ```
//! use batchnorm::{Affine, BatchNorm, Shape};
//!
//! let x = [1.0f32, 10.0, 2.0, 20.0, 3.0, 30.0, 6.0, 60.0];
//! let mut y = [0.0; 8];
//! // Four samples of two channels.
//! let bn = BatchNorm::<f32>::new(Shape::nc(4, 2)?)?.with_eps(0.0)?;
//! let mut saved = bn.saved();
//! bn.forward_train(&x, Affine::none(), &mut y, &mut saved)?;
//! assert_eq!(saved.mean(), [3.0, 30.0]);
//! assert_eq!(saved.var(), [3.5, 350.0]);
//! # Ok::<(), batchnorm::Error>(())
//! ```
//!
//! | to | call |
//! |---|---|
//! | normalize with the statistics of the batch | [`BatchNorm::forward_train`] |
//! | normalize with those of the population | [`BatchNorm::forward_infer`] |
//! | get dx, dgamma, dbeta, or some of them | [`BatchNorm::backward`] |
//! | keep statistics from batch to batch | [`Running`] |
//! | train with the population's statistics as constants | [`BatchNorm::freeze`], [`BatchNorm::normalize`], [`BatchNorm::backward`] |
//! | normalize virtual batches by themselves | [`BatchNorm::ghost`] |
//! | correct small batches towards the population | [`Saved::renormalize`] |
//! | add a residual, apply an activation | [`Affine::with_residual`], [`Affine::with_activation`] |
//! | keep one bit per element for the activation's gradient | [`Affine::with_gates_to`], [`Affine::with_gates`] |
//! | leave padding out | [`BatchNorm::with_lengths`], [`BatchNorm::with_mask`] |
//! | use a slice of a larger tensor, or blocked channels | [`View`], [`BatchNorm::with_views`] |
//! | give up the input, go back from the output | [`BatchNorm::with_backward_from_output`] |
//! | differentiate a gradient | [`BatchNorm::double_backward`] |
//! | add up the gradients of micro-batches | [`BatchNorm::with_accumulation`] |
//! | recompute the population's statistics precisely | [`Running::recompute`] |
//! | do without the layer at inference | [`BatchNorm::fold_into_preceding`], [`BatchNorm::fold_into_following`], [`BatchNorm::scale_and_shift`] |
//! | infer on 8-bit integers | [`BatchNorm::forward_infer_quantized`] |
//! | share statistics between shards | [`BatchNorm::moments`], [`Moments::merge`], [`BatchNorm::finish`], [`BatchNorm::normalize`] |
//! | share gradients between shards | [`BatchNorm::gradient_sums`], [`GradientSums::merge`], [`BatchNorm::input_gradient`], [`BatchNorm::parameter_gradients`], [`BatchNorm::residual_gradient`] |
//! | choose the SIMD tier, the threads | [`BatchNorm::with_tier`], [`BatchNorm::with_parallelism`] |
//! | see what exactly is computed | [`reference`](mod@reference) |
//!
//! # Promises
//!
//! - **Bits.** Results depend on the shape, the layout and the values, never on the SIMD tier, the CPU, the number of
//!   threads or the alignment. They are those of [`reference`](mod@reference). Channels first and channels last add in different
//!   orders, so the two may differ in the last bits. Which NaN a NaN is, is left open.
//! - **Accuracy.** For f32 and `|mean|` up to 1e6 standard deviations, against exact results: variance within 1e-6
//!   relative, mean ([`Saved::mean`] with [`Saved::residue`]) within 1e-7 standard deviations, normalized values within `3e-7 * max(1, |xhat|)`. For f64 1e-13,
//!   1e-13 and 3e-13. bf16 and f16 are computed as f32 and rounded once. Values up to the largest finite f32 do
//!   not overflow. A constant channel gives exactly beta.
//! - **Errors.** Every bad argument gives an [`Error`], and then no output was touched. Nothing panics, but for
//!   [`reference`](mod@reference), which expects slices of the right lengths.
//! - **Memory.** A plan keeps its scratch; calls after the first allocate nothing but what they return.
//!
//! `whitening` computes in f64 with matrices, and makes promises of its own.
//!
//! # Features
//!
//! - `rayon` (default): large tensors are shared among the threads of the rayon pool that the caller is in.
//! - `half`: `half::bf16` and `half::f16` as element types.
//! - `whitening`: decorrelated channels, in `whitening`; brings faer.
//! - `ndarray`: passes over arrays of the crate ndarray where they lie, `Arrays`.

#![deny(missing_docs)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod activation;
mod affine;
#[cfg(feature = "ndarray")]
mod arrays;
mod backward;
mod deployment;
mod element;
mod error;
mod forward;
mod fresh;
mod gates;
mod grid;
mod halves;
mod kernel;
mod moments;
mod operation;
mod pass;
mod plan;
pub mod reference;
mod running;
mod scratch;
mod shape;
mod simd;
mod tensor;
mod variants;
mod view;
#[cfg(feature = "whitening")]
#[cfg_attr(docsrs, doc(cfg(feature = "whitening")))]
pub mod whitening;

pub use activation::Activation;
pub use affine::{Affine, Gradients};
#[cfg(feature = "ndarray")]
pub use arrays::{ArrayGradients, Arrays};
pub use deployment::fold::Layer;
pub use deployment::quantized::Quantization;
pub use element::{Element, Real};
pub use error::{Error, Result};
pub use grid::Parallelism;
pub use moments::{GradientSums, Moments, Saved};
pub use plan::{BatchNorm, Stores};
pub use running::{Momentum, Population, Running, Variance};
pub use shape::{Layout, Shape};
pub use simd::Tier;
pub use variants::double_backward::{Cotangents, SecondGradients};
pub use variants::ghost::Ghost;
pub use variants::renorm::RenormLimits;
pub use view::View;

/// The pages whose Rust blocks are compiled and run.
#[cfg(doctest)]
mod pages {
    macro_rules! pages {
        ($($name:ident $path:literal,)*) => {$(
            #[doc = include_str!(concat!("../", $path))]
            struct $name;
        )*};
    }

    pages! {
        Readme "README.md",
        Guide "docs/guide.md",
        FromPyTorch "docs/migrate/pytorch.md",
        FromKeras "docs/migrate/keras.md",
        FromOnnx "docs/migrate/onnx.md",
        FromCandle "docs/migrate/candle.md",
        FromBurn "docs/migrate/burn.md",
    }

    // With 16-bit types.
    #[cfg(feature = "half")]
    pages! {
        Choosing "docs/choosing.md",
    }

    #[cfg(feature = "ndarray")]
    pages! {
        Ndarray "docs/ndarray.md",
    }

    #[cfg(feature = "whitening")]
    pages! {
        Whitening "docs/whitening.md",
    }
}
