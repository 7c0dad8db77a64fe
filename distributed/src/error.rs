//! Why a collective call was refused: every rank returns an error, and no output was touched.

use mpi::Rank;

/// Shorthand for results of this crate.
pub type Result<T> = core::result::Result<T, Error>;

/// Why a call was refused. If one rank refuses, all do.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The arguments of this rank were wrong, or the batch holds no values on any rank.
    #[error(transparent)]
    Local(#[from] batchnorm::Error),
    /// The arguments of this rank were right, those of another were not; that one has the reason.
    #[error("rank {rank} of the group refused its arguments and has the reason")]
    Remote {
        /// The lowest rank that refused.
        rank: Rank,
    },
    /// Ranks made plans for different numbers of channels.
    #[error("all ranks must normalize the same number of channels, got {least} on one and {most} on another")]
    Channels {
        /// The least number on any rank.
        least: u64,
        /// The most on any rank.
        most: u64,
    },
    /// Ranks made plans for different element types.
    #[error("all ranks must hold the same element type, got {one} on one and {other} on another")]
    ElementType {
        /// That with the fewest digits.
        one: &'static str,
        /// That with the most digits.
        other: &'static str,
    },
    /// Ranks made plans with different eps.
    #[error("all ranks must add the same eps to the variance, got {least} on one and {most} on another")]
    Eps {
        /// The least on any rank.
        least: f64,
        /// The most on any rank.
        most: f64,
    },
    /// A plan for another batch that is not what the ranks agreed on.
    #[error(
        "the ranks agreed on {expected_channels} channels and eps {expected_eps}, got a plan of {channels} channels and eps {eps}"
    )]
    Plan {
        /// Channels that were agreed on.
        expected_channels: usize,
        /// The eps that was agreed on.
        expected_eps: f64,
        /// Channels of the plan that was given.
        channels: usize,
        /// Its eps.
        eps: f64,
    },
    /// More channels than one collective of MPI can count.
    #[error("MPI counts the elements of a message to {}, got {channels} channels", i32::MAX)]
    TooManyChannels {
        /// Channels of the plan.
        channels: usize,
    },
}
