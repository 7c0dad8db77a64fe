//! The numbers that stand for choices. Functions take them as plain integers, because C lets an enumeration have any value.

use batchnorm::{Activation, Layout, Momentum, Tier, Variance};

use crate::arguments::choose;
use crate::status::Result;

/// What tensors hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Dtype {
    /// float
    F32 = 0,
    /// double
    F64 = 1,
    /// The upper half of a float, as uint16_t.
    Bf16 = 2,
    /// IEEE 754 binary16, as uint16_t.
    F16 = 3,
}

impl Dtype {
    pub(crate) fn new(number: i32) -> Result<Self> {
        choose("bn_dtype", number, &[Self::F32, Self::F64, Self::Bf16, Self::F16].map(|dtype| (dtype as i32, dtype)))
    }
}

/// Where the channel stands among the dimensions of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum LayoutKind {
    /// Batch, channels, spatial sizes: NCL, NCHW, NCDHW.
    ChannelsFirst = 0,
    /// Batch, spatial sizes, channels: NLC, NHWC, NDHWC. For NC, which has no spatial sizes, either will do.
    ChannelsLast = 1,
}

pub(crate) fn layout(number: i32) -> Result<Layout> {
    let choices = [
        (LayoutKind::ChannelsFirst as i32, Layout::ChannelsFirst),
        (LayoutKind::ChannelsLast as i32, Layout::ChannelsLast),
    ];
    choose("bn_layout", number, &choices)
}

/// The SIMD instructions to run on. They change the speed and no bit of the results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum TierKind {
    /// The widest that this CPU has.
    Best = 0,
    /// What every CPU of this architecture has.
    Portable = 1,
    /// x86-64 with AVX2 and F16C.
    Avx2 = 2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512 = 3,
}

pub(crate) fn tier(number: i32) -> Result<Tier> {
    let choices = [
        (TierKind::Best as i32, Tier::best()),
        (TierKind::Portable as i32, Tier::Portable),
        (TierKind::Avx2 as i32, Tier::Avx2),
        (TierKind::Avx512 as i32, Tier::Avx512),
    ];
    choose("bn_tier", number, &choices)
}

/// What is applied to the normalized value, forward, and counted in, backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum ActivationKind {
    /// Nothing.
    None = 0,
    /// The larger of the value and 0.
    Relu = 1,
    /// The value where it is positive, elsewhere a slope times it.
    LeakyRelu = 2,
}

pub(crate) fn activation(number: i32, slope: f64) -> Result<Activation> {
    let choices = [
        (ActivationKind::None as i32, Activation::None),
        (ActivationKind::Relu as i32, Activation::Relu),
        (ActivationKind::LeakyRelu as i32, Activation::LeakyRelu(slope)),
    ];
    choose("bn_activation", number, &choices)
}

/// How the weight of running statistics is meant. Frameworks differ, so there is no default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum MomentumKind {
    /// The weight of the new value: PyTorch's momentum, 0.1 there.
    WeightOfNew = 0,
    /// The weight of the old value: momentum in Keras (0.99) and ONNX (0.9).
    WeightOfOld = 1,
    /// The plain average of all batches: PyTorch's momentum=None.
    Cumulative = 2,
}

pub(crate) fn momentum(number: i32, weight: f64) -> Result<Momentum> {
    let choices = [
        (MomentumKind::WeightOfNew as i32, Momentum::WeightOfNew(weight)),
        (MomentumKind::WeightOfOld as i32, Momentum::WeightOfOld(weight)),
        (MomentumKind::Cumulative as i32, Momentum::Cumulative),
    ];
    choose("bn_momentum", number, &choices)
}

/// Which variance of a batch enters the running variance. Frameworks differ, so there is no default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum VarianceKind {
    /// Divided by the number of values: ONNX, Keras.
    Biased = 0,
    /// Divided by one less: the paper, PyTorch, TensorFlow's fused operation.
    Unbiased = 1,
}

pub(crate) fn variance(number: i32) -> Result<Variance> {
    let choices =
        [(VarianceKind::Biased as i32, Variance::Biased), (VarianceKind::Unbiased as i32, Variance::Unbiased)];
    choose("bn_variance", number, &choices)
}

/// A statistic of a batch, one value per channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Statistic {
    /// The mean.
    Mean = 0,
    /// What the mean has beyond its rounded value.
    Residue = 1,
    /// The biased variance.
    Var = 2,
    /// 1 / sqrt(var + eps), and 0 where var + eps is 0.
    InvStd = 3,
}

impl Statistic {
    pub(crate) fn new(number: i32) -> Result<Self> {
        let all = [Self::Mean, Self::Residue, Self::Var, Self::InvStd];
        choose("bn_statistic", number, &all.map(|statistic| (statistic as i32, statistic)))
    }
}
