//! Synchronised Batch Normalization over MPI: a batch that is split over processes is normalized with the statistics of all of
//! it.
//!
//! A [`SyncBatchNorm`] is a plan of [`batchnorm`] and a communicator. Its passes are those of the plan with one collective each:
//! forward merges count, mean and sum of squared deviations of each channel, by Chan's form of Welford's update; backward adds
//! the two sums of each channel.
//!
//! | to | call |
//! |---|---|
//! | make a plan with the other ranks | [`SyncBatchNorm::new`] |
//! | normalize with the statistics of the whole batch | [`SyncBatchNorm::forward_train`] |
//! | get dx, dgamma, dbeta | [`SyncBatchNorm::backward`], [`SyncBatchNorm::with_global_parameters`] |
//! | work while a collective is under way | [`SyncBatchNorm::forward_train_during`], [`SyncBatchNorm::backward_during`] |
//! | take a batch of another size, or with a mask | [`SyncBatchNorm::with_shape`], [`SyncBatchNorm::with_plan`] |
//! | put passes together from halves | [`SyncBatchNorm::merge_moments`], [`SyncBatchNorm::merge_sums`] |
//! | keep statistics from batch to batch, infer | [`batchnorm::Running`], [`BatchNorm::forward_infer`](batchnorm::BatchNorm::forward_infer), on each rank |
//!
//! # Promises
//!
//! - **Bits.** All ranks hold the same statistics, bit for bit, and the same shards give the same bits in every run with the
//!   same MPI library on the same layout of ranks: the operation is not commutative as far as MPI knows, so that it merges in
//!   the order of ranks. Another number of ranks, or another split, may change the last bits.
//! - **Accuracy.** Against one process on the joined batch: the bounds of [`batchnorm`] on mean, variance, y and dx.
//! - **Errors.** Wrong arguments on one rank give an error on all; no rank waits for one that refused. Nothing panics, and no
//!   output is touched on errors.
//! - **Memory.** Messages stay with the plan; calls after the first allocate nothing here (MPI may).
//!
//! # What MPI does
//!
//! It is called on the thread that calls this crate, and there alone: `Threading::Funneled` is enough, and what rayon needs.
//!
//! Errors inside MPI end the job, as its default error handler has it. So does a rank that dies: `mpirun` ends the others and
//! says which one it was. A rank that returns or panics while others wait in a collective is not dead: it waits in
//! `MPI_Finalize` for them, and they for it. Where a rank may fail outside of this crate, let it call
//! [`Communicator::abort`](mpi::traits::Communicator::abort), or build with `panic = "abort"`.
//!
//! docs/distributed.md has the costs.

#![deny(missing_docs)]

mod error;
mod group;
mod sync;
mod wire;

pub use error::{Error, Result};
pub use group::Pending;
pub use sync::SyncBatchNorm;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
