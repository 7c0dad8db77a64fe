//! Batch Normalization for [burn](https://burn.dev) on the kernels of [`batchnorm`], with autodiff.
//!
//! [`BatchNorm`] and [`BatchNormConfig`] stand for those of `burn::nn`: the same fields, defaults, records and behaviour, so that
//! one `use` changes.
//!
//! ```
//! use batchnorm_burn::{BatchNorm, BatchNormConfig};
//! use burn::module::Module;
//! use burn::tensor::{Device, Distribution, Tensor};
//!
//! let device = Device::flex().autodiff();
//! let bn: BatchNorm = BatchNormConfig::new(3).init(&device);
//! let x = Tensor::<4>::random([8, 3, 5, 5], Distribution::Default, &device).require_grad();
//! // Training: on a device that differentiates.
//! let gradients = bn.forward(x.clone()).powi_scalar(2).sum().backward();
//! assert_eq!(x.grad(&gradients).unwrap().dims(), [8, 3, 5, 5]);
//! // Inference, with the running statistics.
//! let y = bn.valid().forward(x.inner());
//! # assert_eq!(y.dims(), [8, 3, 5, 5]);
//! ```
//!
//! | to | call |
//! |---|---|
//! | use a layer | [`BatchNorm::forward`] |
//! | turn a layer of `burn::nn` into one of these, or back | `From` |
//! | normalize with the statistics of the batch | [`batch_norm_train`] |
//! | normalize with given statistics | [`batch_norm`] |
//!
//! # Backends
//!
//! The kernels serve tensors on flex, burn's own CPU backend, in f32, f64, f16 and bf16, and with the checkpointing strategies of
//! autodiff. On every other device the layer is burn's: the same results, at burn's speed. That holds for `burn-ndarray` too,
//! which burn has deprecated for flex.
//!
//! burn 0.22 has an operation of its own in its backend traits, `ModuleOps::batch_norm_train`, which autodiff takes as one step.
//! Only a backend itself can implement it (flex puts it together from tensor operations), so this crate is a backend extension
//! beside it, with the same arguments and results.
//!
//! # Conventions
//!
//! burn's: `momentum` is the weight of the new batch, `running = (1 - momentum) * running + momentum * batch`, 0.1 by default;
//! the running variance is the biased one; `epsilon` is added to the variance under the root, 1e-5 by default. The layer trains on
//! a device that differentiates, unless it is frozen: then, and elsewhere, it takes the running statistics as constants.
//!
//! # Memory
//!
//! A tensor that is dense is read where it lies: as `[N, C, ...]`, as a slice of whole samples, or with the channels last, as
//! `permute` of a `[N, ..., C]` tensor leaves it; the output then lies the same way. Other tensors are copied once. Backward
//! keeps the input and four numbers per channel, and writes the gradient over the one it was given where nobody else has that.
//! Inference writes over an input that nobody else has.
//!
//! # Panics
//!
//! burn's convention is to panic on wrong shapes, and these calls return tensors as burn's do, so they keep to it. Beyond burn's
//! checks, they panic with a message of [`batchnorm::Error`] for a batch without values in training, and for a variance that is
//! negative or NaN in inference, where burn returns NaNs.

#![deny(missing_docs)]

mod flex;
mod layer;
mod operation;

pub use layer::{BatchNorm, BatchNormConfig};
pub use operation::{batch_norm, batch_norm_train};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
