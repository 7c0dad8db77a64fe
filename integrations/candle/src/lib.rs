//! Batch Normalization for [candle](candle_core), on the kernels of [`batchnorm`].
//!
//! [`BatchNorm`], [`batch_norm`] and [`BatchNormConfig`] have the interface, the names of variables and the conventions of those
//! of [`candle_nn`]: change the `use`, and weights, configuration and training loop stay.
//!
//! ```
//! use batchnorm_candle::{BatchNormConfig, batch_norm};
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{ModuleT, VarBuilder, VarMap};
//!
//! let variables = VarMap::new();
//! let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
//! let bn = batch_norm(3, BatchNormConfig::default(), vb.pp("bn1"))?;
//! let x = Tensor::randn(0f32, 1.0, (8, 3, 5, 5), &Device::Cpu)?;
//! let y = bn.forward_t(&x, true)?;
//! let gradients = y.sqr()?.mean_all()?.backward()?;
//! assert!(gradients.get(bn.weight_and_bias().unwrap().0).is_some());
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! A pass is one operation of candle's graph, forward and back, where [`candle_nn`] puts it together from a dozen. What is
//! different:
//!
//! - **Memory order.** A tensor whose channels are last in memory, as an NHWC tensor permuted to (N, C, H, W), is taken as it
//!   lies, and its output lies the same. Other strides are made contiguous once.
//! - **Types.** f32, f64, bf16 and f16; half types are computed as f32 and rounded once. Parameters and running statistics of a
//!   half input may be of its type or f32; [`candle_nn`] needs weights of its type beside statistics of f32 in training, and
//!   statistics of its type at evaluation.
//! - **One value per channel.** y is beta and the running variance stays as it was, since one value tells nothing about it.
//!   [`candle_nn`] makes it NaN for good.
//! - **Numbers.** The accuracy and the bits that [`batchnorm`] promises. Running statistics are computed in f64 and rounded once.
//! - **Errors.** An empty batch in training is refused, as is a running variance that is negative or NaN: the message names the
//!   channel. [`candle_nn`] goes on with NaNs. An error leaves everything as it was.
//! - **Devices.** The CPU alone.
//!
//! Gradients are computed for what candle keeps track of: without tracked arguments nothing is kept, and an `x` that is no
//! variable and comes from none costs no gradient. The running statistics are constants to [`BatchNorm::forward_eval`]. The
//! gradients themselves cannot be differentiated. Large tensors are shared among the threads of rayon's pool.

#![deny(missing_docs)]

mod layer;
mod op;
mod order;

pub use candle_nn::BatchNormConfig;
pub use layer::{BatchNorm, batch_norm};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
