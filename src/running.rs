//! Running statistics, with the conventions that differ between frameworks as types.

use crate::element::Real;
use crate::error::{Error, Result, check_len};
use crate::moments::{Moments, Saved, common_count};

/// How much a new batch moves the running statistics. `running = keep * running + take * batch`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Momentum {
    /// The weight of the new value, `take = w`, `keep = 1 - w`: PyTorch's `momentum`, 0.1 by default there.
    WeightOfNew(f64),
    /// The weight of the old value, `keep = w`, `take = 1 - w`: `momentum` in Keras (0.99), ONNX (0.9) and the
    /// paper's moving averages.
    WeightOfOld(f64),
    /// The plain average of all batches so far, `take = 1/k` for the k-th batch: PyTorch's `momentum=None`.
    Cumulative,
}

impl Momentum {
    /// Refuses a weight outside 0 to 1.
    pub(crate) fn check(self) -> Result<()> {
        match self {
            Momentum::WeightOfNew(w) | Momentum::WeightOfOld(w) if !(0.0..=1.0).contains(&w) => {
                Err(Error::Momentum { got: w })
            }
            _ => Ok(()),
        }
    }

    /// What a running value becomes by that of the `batches`-th batch.
    pub(crate) fn mover(self, batches: u64) -> impl Fn(f64, f64) -> f64 {
        let (keep, take) = match self {
            Momentum::WeightOfNew(w) => (1.0 - w, w),
            Momentum::WeightOfOld(w) => (w, 1.0 - w),
            Momentum::Cumulative => {
                let take = 1.0 / batches as f64;
                (1.0 - take, take)
            }
        };
        // A weight of zero leaves a value out altogether, even an infinite one.
        let term = |weight: f64, value: f64| if weight == 0.0 { 0.0 } else { weight * value };
        move |old, new| term(keep, old) + term(take, new)
    }
}

/// Which variance of a batch enters the running variance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variance {
    /// `m2 / count`: ONNX, Keras, burn.
    Biased,
    /// `m2 / (count - 1)`: the paper (algorithm 2), PyTorch, candle, TensorFlow's fused operation.
    Unbiased,
}

impl Variance {
    /// What the biased variance of `count` values is multiplied with.
    pub(crate) fn correction(self, count: u64) -> Result<f64> {
        match self {
            _ if count == 0 => Err(Error::MissingStatistics),
            Variance::Biased => Ok(1.0),
            Variance::Unbiased if count == 1 => Err(Error::UnbiasedFromOne { count }),
            Variance::Unbiased => Ok(count as f64 / (count - 1) as f64),
        }
    }
}

/// Mean and variance of each channel to normalize with at inference: `mean` and `var` of `C` values each.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Population<'a, P> {
    /// The mean of each channel.
    pub mean: &'a [P],
    /// The variance of each channel.
    pub var: &'a [P],
}

/// Running mean and variance of each channel, updated from batch to batch.
///
/// The conventions have no default, because no two frameworks agree on them:
///
/// ```
/// use batchnorm::{Momentum, Running, Variance};
/// let pytorch = Running::<f32>::new(64, Momentum::WeightOfNew(0.1), Variance::Unbiased)?;
/// let keras = Running::<f32>::new(64, Momentum::WeightOfOld(0.99), Variance::Biased)?;
/// # Ok::<(), batchnorm::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Running<P> {
    mean: Vec<P>,
    var: Vec<P>,
    batches: u64,
    momentum: Momentum,
    variance: Variance,
}

impl<P: Real> Running<P> {
    /// Running statistics of `channels` channels that start at mean 0 and variance 1.
    ///
    /// # Errors
    /// [`Error::ZeroChannels`]; [`Error::Momentum`] for a weight outside 0 to 1.
    pub fn new(channels: usize, momentum: Momentum, variance: Variance) -> Result<Self> {
        let (mean, var) = (vec![P::default(); channels], vec![P::from_f64(1.0); channels]);
        Self::from_parts(mean, var, 0, momentum, variance)
    }

    /// Running statistics that continue from `mean` and `var` after `batches` batches, as read from a checkpoint.
    ///
    /// # Errors
    /// [`Error::ZeroChannels`]; [`Error::Length`] if `var` is not as long as `mean`; [`Error::Variance`];
    /// [`Error::Momentum`].
    pub fn from_parts(mean: Vec<P>, var: Vec<P>, batches: u64, momentum: Momentum, variance: Variance) -> Result<Self> {
        if mean.is_empty() {
            return Err(Error::ZeroChannels);
        }
        check_len("var", mean.len(), var.len())?;
        check_variances(&var)?;
        momentum.check()?;
        Ok(Self { mean, var, batches, momentum, variance })
    }

    /// Moves the running statistics towards those of a batch. Computed in f64, rounded once. A batch with NaN or
    /// infinities makes the statistics of its channels NaN, as training has diverged;
    /// [`forward_infer`](crate::BatchNorm::forward_infer) then refuses them by the name of the channel. An f32 variance
    /// beyond 3.4e38, of values around 1e19 and more, becomes infinite, and inference then gives beta.
    ///
    /// # Errors
    /// [`Error::MissingStatistics`] if no batch filled `saved`, [`Error::FrozenStatistics`] if it holds constants; [`Error::Length`] for
    /// another number of channels; [`Error::UnbiasedFromOne`] for the unbiased variance of one value. The statistics are unchanged then.
    pub fn update(&mut self, saved: &Saved<P>) -> Result<()> {
        check_len("saved", self.mean.len(), saved.channels())?;
        if saved.is_frozen() {
            return Err(Error::FrozenStatistics);
        }
        let correction = self.variance.correction(saved.count())?;
        self.batches = self.batches.saturating_add(1);
        let moved = self.momentum.mover(self.batches);
        for (c, (mean, var)) in self.mean.iter_mut().zip(&mut self.var).enumerate() {
            *mean = P::from_f64(moved(mean.to_f64(), saved.mean[c].to_f64()));
            *var = P::from_f64(moved(var.to_f64(), saved.var[c].to_f64() * correction));
        }
        Ok(())
    }

    /// Replaces the running statistics by those of all values behind `moments`: of many batches in evaluation, computed with
    /// [`BatchNorm::moments`](crate::BatchNorm::moments) and merged channel by channel. Moving averages lag behind the
    /// weights and weigh the last batches most; these are exact (PreciseBN: Wu & Johnson, "Rethinking 'Batch' in BatchNorm",
    /// 2021, section 3). The number of batches is left alone.
    ///
    /// ```
    /// # use batchnorm::{BatchNorm, Moments, Momentum, Shape, Variance};
    /// # let batches = [[1f32, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]];
    /// let bn = BatchNorm::<f32>::new(Shape::nc(4, 1)?)?;
    /// let mut running = bn.running(Momentum::WeightOfNew(0.1), Variance::Unbiased)?;
    /// let (mut total, mut batch) = (vec![Moments::default(); 1], vec![Moments::default(); 1]);
    /// for x in &batches {
    ///     bn.moments(x, &mut batch)?;
    ///     total.iter_mut().zip(&batch).for_each(|(total, batch)| *total = total.merge(*batch));
    /// }
    /// running.recompute(&total)?;
    /// assert_eq!((running.mean(), running.var()), (&[4.5][..], &[6.0][..]));
    /// # Ok::<(), batchnorm::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Length`] for another number of channels; [`Error::Count`] if channels counted different numbers;
    /// [`Error::MissingStatistics`] for moments of no values; [`Error::UnbiasedFromOne`]. The statistics are unchanged then.
    pub fn recompute(&mut self, moments: &[Moments]) -> Result<()> {
        check_len("moments", self.mean.len(), moments.len())?;
        let count = common_count(moments)?;
        let correction = self.variance.correction(count)?;
        for ((mean, var), moments) in self.mean.iter_mut().zip(&mut self.var).zip(moments) {
            *mean = P::from_f64(moments.mean);
            *var = P::from_f64(moments.variance() * correction);
        }
        Ok(())
    }

    /// Goes on with another weight, for a schedule.
    ///
    /// # Errors
    /// [`Error::Momentum`] for one outside 0 to 1. The weight is unchanged then.
    pub fn set_momentum(&mut self, momentum: Momentum) -> Result<()> {
        momentum.check()?;
        self.momentum = momentum;
        Ok(())
    }

    /// How a batch is weighed.
    pub fn momentum(&self) -> Momentum {
        self.momentum
    }

    /// Mean, variance and the number of batches, without a copy: what [`Running::from_parts`] takes.
    pub fn into_parts(self) -> (Vec<P>, Vec<P>, u64) {
        (self.mean, self.var, self.batches)
    }

    /// The running mean of each channel.
    pub fn mean(&self) -> &[P] {
        &self.mean
    }

    /// The running variance of each channel.
    pub fn var(&self) -> &[P] {
        &self.var
    }

    /// The number of batches seen.
    pub fn batches(&self) -> u64 {
        self.batches
    }

    /// The statistics for [`forward_infer`](crate::BatchNorm::forward_infer).
    pub fn population(&self) -> Population<'_, P> {
        Population { mean: &self.mean, var: &self.var }
    }
}

/// Refuses a variance that is negative or NaN.
pub(crate) fn check_variances<P: Real>(var: &[P]) -> Result<()> {
    match var.iter().position(|v| v.to_f64().is_nan() || v.to_f64() < 0.0) {
        Some(channel) => Err(Error::Variance { channel, got: var[channel].to_f64() }),
        None => Ok(()),
    }
}
