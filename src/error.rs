//! Why a call was refused. Every check happens before the first write, so output is untouched on error.

use std::borrow::Cow;

use crate::Tier;

/// Shorthand for results of this crate.
pub type Result<T> = core::result::Result<T, Error>;

/// Why a call was refused: what was expected and what was got.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A slice does not have the length that the shape asks for.
    #[error("`{what}` must hold {expected} elements for this shape, got {got}")]
    Length {
        /// The argument's name.
        what: &'static str,
        /// Elements that the shape asks for.
        expected: usize,
        /// Elements that were given.
        got: usize,
    },
    /// The product of the dimensions does not fit a slice.
    #[error("the shape {dims:?} holds more bytes than a slice can (expected at most isize::MAX)")]
    ShapeOverflow {
        /// The dimensions in the order in which they were given.
        dims: Vec<usize>,
    },
    /// A shape or a set of statistics with no channel.
    #[error("expected at least one channel, got zero")]
    ZeroChannels,
    /// Batch statistics were asked of a batch without values.
    #[error(
        "training needs at least one value per channel, got zero (batch {batch}, spatial size {spatial}{})",
        if *batch == 0 || *spatial == 0 { "" } else { ", all of it masked" }
    )]
    EmptyBatch {
        /// The number of samples.
        batch: usize,
        /// The number of values per sample and channel.
        spatial: usize,
    },
    /// Moments of no values for a batch that has some.
    #[error("the moments count no values: expected those of `moments`, of each shard of the batch and merged")]
    EmptyMoments,
    /// A pass in place, or one that returns its result, was asked to write it elsewhere too.
    #[error("dx is written over dy in place, or returned; expected gradients without a dx of their own (`dx: None`)")]
    InPlace,
    /// `eps` is negative, infinite or NaN.
    #[error("eps must be finite and at least 0, got {got}")]
    Eps {
        /// The value that was given.
        got: f64,
    },
    /// A weight of running statistics outside 0 to 1.
    #[error("a momentum weight must lie between 0 and 1, got {got}")]
    Momentum {
        /// The value that was given.
        got: f64,
    },
    /// A variance that is negative or NaN.
    #[error("the variance of channel {channel} must be at least 0, got {got}")]
    Variance {
        /// The first channel at fault.
        channel: usize,
        /// Its variance.
        got: f64,
    },
    /// An inv_std that is negative or infinite.
    #[error("inv_std of channel {channel} must be finite and at least 0, as 1 / sqrt(var + eps) is, got {got}")]
    InvStd {
        /// The first channel at fault.
        channel: usize,
        /// Its inv_std.
        got: f64,
    },
    /// The unbiased variance divides by `count - 1`.
    #[error(
        "the unbiased variance needs at least two values per channel, got {count}; leave such a batch out, or take Variance::Biased"
    )]
    UnbiasedFromOne {
        /// Values per channel.
        count: u64,
    },
    /// Statistics that no batch has filled yet.
    #[error("expected the statistics of a batch, got none: run a forward pass or `finish` first")]
    MissingStatistics,
    /// Constants where the statistics of a batch were expected.
    #[error("expected the statistics of a batch, got constants (`freeze`), from which there is nothing to learn")]
    FrozenStatistics,
    /// Channels of one call that saw different numbers of values.
    #[error(
        "all channels must have seen the same number of values: channel 0 has {expected}, channel {channel} has {got}"
    )]
    Count {
        /// The first channel at fault.
        channel: usize,
        /// Values that channel 0 has seen.
        expected: u64,
        /// Values that this channel has seen.
        got: u64,
    },
    /// Statistics of more or fewer values than the batch of a whole backward pass has.
    #[error(
        "the saved statistics are of {got} values per channel, this batch has {expected}; for a smaller batch use the plan that its forward pass used, for statistics shared between shards gradient_sums, input_gradient and parameter_gradients"
    )]
    Shards {
        /// Values per channel of the shape.
        expected: u64,
        /// Values per channel of the statistics.
        got: u64,
    },
    /// Limits of Batch Renormalization that leave no room.
    #[error("Batch Renormalization needs r_max of at least 1 and d_max of at least 0, got {r_max} and {d_max}")]
    RenormLimits {
        /// The limit of r that was given.
        r_max: f64,
        /// The limit of d that was given.
        d_max: f64,
    },
    /// Virtual batches without samples.
    #[error("a virtual batch needs at least one sample, got zero")]
    VirtualBatch,
    /// A slope of a leaky ReLU that is negative, infinite or NaN.
    #[error("the slope of a leaky ReLU must be finite and at least 0, got {got}")]
    Slope {
        /// The value that was given.
        got: f64,
    },
    /// The input cannot be rebuilt from an output behind a residual or an activation that is not strictly increasing.
    #[error(
        "backward from the output needs an activation that can be undone, none or a leaky ReLU with a slope above 0, and no residual"
    )]
    NotInvertible,
    /// The input cannot be rebuilt from an output that hardly depends on it.
    #[error(
        "backward from the output divides by gamma, which is too close to zero in channel {channel}: {got}, beside a beta of {beta}; keep x for this layer instead"
    )]
    Gamma {
        /// The first channel at fault.
        channel: usize,
        /// Its gamma.
        got: f64,
        /// Its beta.
        beta: f64,
    },
    /// Second derivatives behind an activation.
    #[error(
        "second derivatives are taken without the activation: mask dy and its gradient, and pass an affine part without it"
    )]
    SecondDerivative,
    /// A sample that is longer than there is room.
    #[error("the length of sample {sample} must be at most the spatial size, {spatial}, got {got}")]
    SampleLength {
        /// The first sample at fault.
        sample: usize,
        /// The spatial size of the shape.
        spatial: usize,
        /// The length that was given.
        got: usize,
    },
    /// A layer to fold into with another number of channels on the side of Batch Normalization.
    #[error("expected a layer that has {expected} channels on this side, as the plan has, got one with {got}")]
    LayerChannels {
        /// Channels of the plan.
        expected: usize,
        /// The outputs of a layer before it, the inputs of one after it.
        got: usize,
    },
    /// A view or a mask that does not fit.
    #[error("this view cannot be used: {reason}")]
    View {
        /// What was expected, and what was got where those are numbers.
        reason: Cow<'static, str>,
    },
    /// An array with too few or too many axes, or without the axis that was to be the channels.
    #[cfg(feature = "ndarray")]
    #[error(
        "expected an array with a batch, channels and up to three other axes longer than 1, got {axes} axes and the channels as Axis({channels})"
    )]
    Axes {
        /// The number of axes of the array.
        axes: usize,
        /// The axis that was to be the channels.
        channels: usize,
    },
    /// An array whose elements have no places of their own, one after the other.
    #[cfg(feature = "ndarray")]
    #[error("an array cannot be used where it lies: {reason}; copy it with `as_standard_layout`")]
    Array {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// An array of other sizes than those of the plan.
    #[cfg(feature = "ndarray")]
    #[error(
        "`{what}` must be an array of the sizes {expected:?}, got {got:?}; `Arrays::with_arrays` makes a plan for other sizes"
    )]
    Sizes {
        /// The argument's name.
        what: &'static str,
        /// The sizes of the plan.
        expected: Vec<usize>,
        /// The sizes that were given.
        got: Vec<usize>,
    },
    /// An array that lies otherwise than the one that the plan was made for.
    #[cfg(feature = "ndarray")]
    #[error(
        "`{what}` must be an array with the strides {expected:?}, got {got:?}; copy it into one that lies so, or make a plan for arrays that lie as it does with `Arrays::with_arrays`"
    )]
    Strides {
        /// The argument's name.
        what: &'static str,
        /// The strides of the plan, in elements.
        expected: Vec<isize>,
        /// The strides that were given.
        got: Vec<isize>,
    },
    /// The scale of a quantized tensor is zero, negative, infinite or NaN.
    #[error("the scale of a quantized tensor must be finite and above 0, got {got}")]
    Quantization {
        /// The value that was given.
        got: f64,
    },
    /// A residual for quantized inference.
    #[error("quantized inference takes no residual: it would have a scale of its own")]
    QuantizedResidual,
    /// More than gamma and beta to be folded.
    #[error(
        "only gamma and beta can be folded: pass an affine part without activation and residual, and apply these where they were"
    )]
    FoldedAffine,
    /// Groups that do not divide the channels of a layer.
    #[error("{groups} groups do not divide {channels} channels")]
    Groups {
        /// The channels at fault.
        channels: usize,
        /// The groups that were given.
        groups: usize,
    },
    /// Batch Normalization before a transposed convolution, or whitening before one in groups.
    #[error(
        "a transposed convolution cannot take in what precedes it: its outputs see different numbers of inputs; nor can one in groups take in whitening, which mixes channels"
    )]
    NotFoldable,
    /// A covariance without an inverse root.
    #[cfg(feature = "whitening")]
    #[cfg_attr(docsrs, doc(cfg(feature = "whitening")))]
    #[error(
        "the covariance of channels {first} to {last} is singular to working precision: one of them follows from the others, or there are fewer values than channels; expected an eps above 0, smaller groups or a larger batch"
    )]
    Singular {
        /// The first channel of the group.
        first: usize,
        /// Its last channel.
        last: usize,
    },
    /// Statistics of other groups of channels.
    #[cfg(feature = "whitening")]
    #[cfg_attr(docsrs, doc(cfg(feature = "whitening")))]
    #[error(
        "`{what}` must be of {} channels in groups of {}, got {} channels in groups of {}",
        expected.0, expected.1, got.0, got.1
    )]
    WhiteningGroups {
        /// The argument's name.
        what: &'static str,
        /// All channels, and those of a group.
        expected: (usize, usize),
        /// All channels, and those of a group, that were given.
        got: (usize, usize),
    },
    /// A covariance that is not the same both ways.
    #[cfg(feature = "whitening")]
    #[cfg_attr(docsrs, doc(cfg(feature = "whitening")))]
    #[error("the covariance of channels {first} and {second} must be the same both ways, got {} and {}", got[0], got[1])]
    Covariance {
        /// The first pair of channels at fault.
        first: usize,
        /// The other channel of the pair.
        second: usize,
        /// Their covariance in the rows of either.
        got: [f64; 2],
    },
    /// More steps of Newton's iteration than change anything.
    #[cfg(feature = "whitening")]
    #[cfg_attr(docsrs, doc(cfg(feature = "whitening")))]
    #[error("IterNorm takes at most {} steps, got {got}", crate::whitening::Method::MOST_STEPS)]
    NewtonSteps {
        /// The number that was given.
        got: usize,
    },
    /// Whitening with more than gamma and beta.
    #[cfg(feature = "whitening")]
    #[cfg_attr(docsrs, doc(cfg(feature = "whitening")))]
    #[error("whitening takes gamma and beta alone, no residual and no activation")]
    WhiteningAffine,
    /// This CPU, or this build, does not have the tier.
    #[error("the {tier} tier is not available here, expected one of: {}", Tier::list())]
    TierUnavailable {
        /// The tier that was asked for.
        tier: Tier,
    },
}

/// Checks the length of the argument `what`.
pub(crate) fn check_len(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::Length { what, expected, got }) }
}
