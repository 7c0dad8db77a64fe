//! Statistics of one channel: what crosses blocks, threads and machines.

use core::ops::Range;

use crate::element::Real;
use crate::error::{Error, Result};
use crate::forward::{Statistics, copy};
use crate::pass::{BATCH, Each};
use crate::running::Population;
use crate::tensor::Disjoint;
use crate::variants::renorm::{Renorm, RenormLimits, RenormTo};

/// Count, mean and sum of squared deviations of the values of one channel.
///
/// Two sets of values are joined by [`Moments::merge`], the pairwise form of Welford's update given by
/// Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979):
///
/// ```text
/// delta = mean_b - mean_a        n = n_a + n_b
/// mean  = mean_a + delta * n_b/n
/// m2    = m2_a + m2_b + delta^2 * n_a*n_b/n
/// ```
///
/// The mean is the unevaluated sum `mean + residue`, so that it is known far below an ulp of `mean`:
/// with `|mean|` a million times the standard deviation, an f64 alone would be good to 1e-10 of it only.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Moments {
    /// The number of values.
    pub count: u64,
    /// The mean, rounded to f64; 0 for no values.
    pub mean: f64,
    /// What the mean has beyond `mean`; at most half an ulp of it. 0 may be given where it is not known.
    pub residue: f64,
    /// The sum of squared deviations from the mean.
    pub m2: f64,
}

impl Moments {
    /// The moments of the values of `self` and `other` together. Depends on the order of the two only in rounding.
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        // Guards against 0 * inf, and lets an empty shard leave the bits alone.
        if other.count == 0 {
            return self;
        }
        if self.count == 0 {
            return other;
        }
        let weights = MergeWeights::new(self.count, other.count);
        let (mean, residue, m2) =
            weights.merge((self.mean, self.residue, self.m2), (other.mean, other.residue, other.m2));
        Self { count: self.count.saturating_add(other.count), mean, residue, m2 }
    }

    /// The biased variance, `m2 / count`; NaN for no values.
    pub fn variance(&self) -> f64 {
        self.m2 / self.count as f64
    }

    /// `1 / sqrt(variance + eps)`, and 0 where `variance + eps` is 0: a constant channel then normalizes
    /// to exactly beta whatever `eps` is.
    pub fn inv_std(&self, eps: f64) -> f64 {
        inv_std(self.variance(), eps)
    }
}

/// `1 / sqrt(var + eps)`, 0 where that would divide by zero.
#[inline(always)]
pub(crate) fn inv_std(var: f64, eps: f64) -> f64 {
    let square = var + eps;
    let inverse = 1.0 / square.sqrt();
    if square == 0.0 { 0.0 } else { inverse }
}

/// How many standard deviations a value may lie from the mean of `count` of them: `sqrt(count)` (Samuelson, "How deviant can
/// you be?", 1968). Of a population, whose count is not known (0), few lie further than this.
pub(crate) fn reach(count: u64) -> f64 {
    if count == 0 { 4096.0 } else { (count as f64).sqrt() }
}

/// What is taken from the values of a channel, and what the mean has beyond it: the rounded mean and its residue; or zero
/// and all of the mean, where a value may be further from it than the type holds. xhat is then off by an ulp of `|mean|/std`,
/// about as much as the values themselves were rounded by, and finite.
#[inline(always)]
pub(crate) fn centre<R: Real>(mean: R, residue: R, inv_std: f64, reach: f64) -> (R, f64) {
    let is_far = R::LARGEST * inv_std < reach;
    let all = mean.to_f64() + residue.to_f64();
    (if is_far { R::default() } else { mean }, if is_far { all } else { residue.to_f64() })
}

/// The number of values that all channels have seen; there is at least one channel.
pub(crate) fn common_count(moments: &[Moments]) -> Result<u64> {
    let expected = moments[0].count;
    match moments.iter().position(|moments| moments.count != expected) {
        Some(channel) => Err(Error::Count { channel, expected, got: moments[channel].count }),
        None => Ok(expected),
    }
}

/// The factors of a merge that depend on the counts alone; many channels share them.
#[derive(Clone, Copy)]
pub(crate) struct MergeWeights {
    /// `n_b / n`
    pub(crate) mean: f64,
    /// `n_a * n_b / n`
    pub(crate) m2: f64,
}

impl MergeWeights {
    #[inline(always)]
    pub(crate) fn new(a: u64, b: u64) -> Self {
        let mean = b as f64 / (a as f64 + b as f64);
        Self { mean, m2: a as f64 * mean }
    }

    /// Merges `(mean, residue, m2)` of two sets.
    #[inline(always)]
    pub(crate) fn merge(self, a: (f64, f64, f64), b: (f64, f64, f64)) -> (f64, f64, f64) {
        let delta = (b.0 - a.0) + (b.1 - a.1);
        let (mean, residue) = two_sum(a.0, a.1 + delta * self.mean);
        (mean, residue, (a.2 + b.2) + delta * delta * self.m2)
    }
}

/// `a + b` as a rounded sum and its exact error (Knuth, The Art of Computer Programming, vol. 2, 4.2.2).
#[inline(always)]
pub(crate) fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let b_part = sum - a;
    let a_part = sum - b_part;
    (sum, (a - a_part) + (b - b_part))
}

/// Sums over the values of one channel that the gradients are made of. Shards are joined by adding.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct GradientSums {
    /// `sum(dy)`, which is dbeta.
    pub dy: f64,
    /// `sum(dy * xhat)`, which is dgamma.
    pub dy_xhat: f64,
}

impl GradientSums {
    /// The sums over the values of `self` and `other` together.
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        Self { dy: self.dy + other.dy, dy_xhat: self.dy_xhat + other.dy_xhat }
    }
}

/// What a training forward pass leaves for the backward pass and for running statistics: per channel
/// the mean, the biased variance and `inv_std = 1 / sqrt(var + eps)` of the batch.
///
/// Made empty by [`Saved::new`] or [`BatchNorm::saved`](crate::BatchNorm::saved), filled by
/// [`forward_train`](crate::BatchNorm::forward_train) or [`finish`](crate::BatchNorm::finish), and reused. It may hold the
/// statistics of the population instead, as constants, see [`BatchNorm::freeze`](crate::BatchNorm::freeze).
#[derive(Debug, Clone, PartialEq)]
pub struct Saved<P> {
    pub(crate) count: u64,
    /// Whether these are constants rather than the statistics of a batch.
    pub(crate) frozen: bool,
    pub(crate) mean: Vec<P>,
    pub(crate) residue: Vec<P>,
    pub(crate) var: Vec<P>,
    pub(crate) inv_std: Vec<P>,
    pub(crate) renorm: Option<Renorm<P>>,
}

impl<P: Real> Saved<P> {
    /// Room for `channels` channels, with no statistics yet.
    pub fn new(channels: usize) -> Self {
        let zeros = || vec![P::default(); channels];
        let (mean, residue, var, inv_std) = (zeros(), zeros(), zeros(), zeros());
        Self { count: 0, frozen: false, mean, residue, var, inv_std, renorm: None }
    }

    /// Statistics that were kept elsewhere, of `count` values per channel: for a framework that stores
    /// `mean` and `inv_std` as tensors of its own between forward and backward. The residue of the mean
    /// is taken as zero and the variance as `1/inv_std^2 - eps`, at least 0. It is not the variance that is given (PyTorch's
    /// `save_invstd` it is): no check can tell one from the other.
    ///
    /// # Errors
    /// [`Error::Length`] if the two differ in length, [`Error::MissingStatistics`] for a count of zero, [`Error::InvStd`] where that is
    /// negative or infinite, [`Error::ZeroChannels`], [`Error::Eps`].
    pub fn from_parts(count: u64, mean: Vec<P>, inv_std: Vec<P>, eps: f64) -> Result<Self> {
        if mean.is_empty() {
            return Err(Error::ZeroChannels);
        }
        crate::error::check_len("inv_std", mean.len(), inv_std.len())?;
        check_eps(eps)?;
        if count == 0 {
            return Err(Error::MissingStatistics);
        }
        let wrong = |i: &P| i.to_f64() < 0.0 || i.to_f64().is_infinite();
        if let Some(channel) = inv_std.iter().position(wrong) {
            return Err(Error::InvStd { channel, got: inv_std[channel].to_f64() });
        }
        let var = inv_std.iter().map(|i| {
            let i = i.to_f64();
            let var = 1.0 / (i * i) - eps;
            // An inv_std of 0 stands for a variance of 0; a NaN stays one.
            P::from_f64(if i == 0.0 || var < 0.0 { 0.0 } else { var })
        });
        let (var, residue) = (var.collect(), vec![P::default(); mean.len()]);
        Ok(Self { count, frozen: false, mean, residue, var, inv_std, renorm: None })
    }

    /// From the next batch on, statistics are corrected towards those of the population as Batch Renormalization does
    /// (Ioffe 2017): with `std = sqrt(var + eps)`,
    ///
    /// ```text
    /// r = clip(std_batch / std_population, 1/r_max, r_max)
    /// d = clip((mean_batch - mean_population) / std_population, -d_max, d_max)
    /// y = gamma * (xhat * r + d) + beta
    /// ```
    ///
    /// and backward passes take r and d as constants. A step of training, with the paper's schedule of the limits:
    ///
    /// ```
    /// # use batchnorm::{Affine, BatchNorm, Gradients, Momentum, RenormLimits, Shape, Variance};
    /// # let (x, mut y, step) = ([1f32, 2.0, 3.0, 5.0], [0f32; 4], 30_000);
    /// # let bn = BatchNorm::<f32>::new(Shape::nc(4, 1)?)?;
    /// # let (mut saved, mut running) = (bn.saved(), bn.running(Momentum::WeightOfNew(0.01), Variance::Unbiased)?);
    /// saved.renormalize(running.population(), RenormLimits::at_step(step))?;
    /// bn.forward_train(&x, Affine::none(), &mut y, &mut saved)?;
    /// running.update(&saved)?;
    /// # Ok::<(), batchnorm::Error>(())
    /// ```
    ///
    /// The population is copied, so it may be updated before the backward pass.
    ///
    /// # Errors
    /// [`Error::Length`] for mean or var; [`Error::Variance`]; [`Error::RenormLimits`] for `r_max` below 1 or `d_max` below 0.
    pub fn renormalize(&mut self, population: Population<'_, P>, limits: RenormLimits) -> Result<()> {
        crate::error::check_len("mean", self.channels(), population.mean.len())?;
        crate::error::check_len("var", self.channels(), population.var.len())?;
        crate::running::check_variances(population.var)?;
        limits.check()?;
        match &mut self.renorm {
            Some(renorm) => {
                renorm.limits = limits;
                renorm.mean.copy_from_slice(population.mean);
                renorm.var.copy_from_slice(population.var);
            }
            None => self.renorm = Some(Renorm::new(limits, population)),
        }
        Ok(())
    }

    /// From the next batch on, statistics are not corrected.
    pub fn do_not_renormalize(&mut self) {
        self.renorm = None;
    }

    /// `r` and `d` of each channel of the last batch, if it was renormalized.
    pub fn corrections(&self) -> Option<(&[P], &[P])> {
        self.renorm.as_ref().map(|renorm| (&renorm.r[..], &renorm.d[..]))
    }

    /// The number of channels.
    pub fn channels(&self) -> usize {
        self.mean.len()
    }

    /// The number of values per channel; 0 before the first batch, and for statistics that are constants.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether these are the statistics of the population, taken as constants.
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// The mean of each channel.
    pub fn mean(&self) -> &[P] {
        &self.mean
    }

    /// What each mean has beyond its rounded value in [`Saved::mean`]. It matters where `|mean|` is
    /// thousands of times the standard deviation.
    pub fn residue(&self) -> &[P] {
        &self.residue
    }

    /// The biased variance of each channel.
    pub fn var(&self) -> &[P] {
        &self.var
    }

    /// `1 / sqrt(var + eps)` of each channel; 0 where `var + eps` is 0, the largest finite number where
    /// it would overflow.
    pub fn inv_std(&self) -> &[P] {
        &self.inv_std
    }

    /// Takes the statistics of a batch of `count` values, from several threads.
    pub(crate) fn recorder(&mut self, count: u64, eps: f64) -> Recorder<'_, P> {
        (self.count, self.frozen) = (count, false);
        let Self { mean, residue, var, inv_std, renorm, .. } = self;
        Recorder {
            fields: [mean, residue, var, inv_std].map(|field| Disjoint::new(field)),
            renorm: renorm.as_mut().map(Renorm::recorder),
            count: count as f64,
            reach: reach(count),
            eps,
        }
    }
}

/// Where the values of channels are kept when all their blocks are merged.
pub(crate) trait Keep<const S: usize>: Sync {
    /// What is made of them.
    type Kept;

    /// Keeps those of up to [`BATCH`] channels.
    ///
    /// # Safety
    /// No other thread keeps the same channels.
    unsafe fn keep(&self, channels: Range<usize>, values: &[Each<f64>; S]) -> Self::Kept;
}

/// The fields of [`Saved`], open to several threads.
pub(crate) struct Recorder<'a, P> {
    fields: [Disjoint<'a, P>; 4],
    renorm: Option<RenormTo<'a, P>>,
    count: f64,
    reach: f64,
    eps: f64,
}

impl<P: Real> Keep<3> for Recorder<'_, P> {
    /// What the forward pass needs.
    type Kept = Statistics<P>;

    #[inline(always)]
    unsafe fn keep(&self, channels: Range<usize>, [mean, residue, m2]: &[Each<f64>; 3]) -> Statistics<P> {
        let mut kept = Statistics { reach: self.reach, ..Default::default() };
        let (mut var, mut inv_std_of) = ([P::default(); BATCH], [P::default(); BATCH]);
        let mut exact = [0.0; BATCH];
        // No branches, so that channels are computed several at a time; what lies beyond the last one is not used.
        for i in 0..BATCH {
            let rounded = P::from_f64(mean[i]);
            kept.mean[i] = rounded;
            kept.residue[i] = P::from_f64((mean[i] - rounded.to_f64()) + residue[i]);
            exact[i] = m2[i] / self.count;
            var[i] = P::from_f64(exact[i]);
            inv_std_of[i] = P::from_f64_saturating(inv_std(exact[i], self.eps));
            kept.inv_std[i] = inv_std_of[i].to_f64();
        }
        for (field, values) in self.fields.iter().zip([&kept.mean, &kept.residue, &var, &inv_std_of]) {
            // SAFETY: the caller's promise.
            copy(unsafe { field.slice(channels.clone()) }, &values[..channels.len()]);
        }
        // SAFETY: the caller's promise.
        kept.corrections = self.renorm.as_ref().map(|to| unsafe { to.keep(channels, mean, &exact, self.eps) });
        kept
    }
}

/// Keeps [`Moments`] of `count` values.
pub(crate) struct MomentsTo<'a> {
    pub(crate) count: u64,
    pub(crate) out: Disjoint<'a, Moments>,
}

impl Keep<3> for MomentsTo<'_> {
    type Kept = ();

    unsafe fn keep(&self, channels: Range<usize>, [mean, residue, m2]: &[Each<f64>; 3]) {
        // SAFETY: the caller's promise.
        for (i, out) in unsafe { self.out.slice(channels) }.iter_mut().enumerate() {
            *out = Moments { count: self.count, mean: mean[i], residue: residue[i], m2: m2[i] };
        }
    }
}

/// Keeps [`GradientSums`].
pub(crate) struct SumsTo<'a>(pub(crate) Disjoint<'a, GradientSums>);

impl Keep<2> for SumsTo<'_> {
    type Kept = ();

    unsafe fn keep(&self, channels: Range<usize>, [dy, dy_xhat]: &[Each<f64>; 2]) {
        // SAFETY: the caller's promise.
        for (i, out) in unsafe { self.0.slice(channels) }.iter_mut().enumerate() {
            *out = GradientSums { dy: dy[i], dy_xhat: dy_xhat[i] };
        }
    }
}

/// Keeps the gradients of gamma and beta that are wanted, or adds them to what is there.
pub(crate) struct AffineGradientsTo<'a, P> {
    pub(crate) accumulates: bool,
    pub(crate) renorm: Option<&'a Renorm<P>>,
    pub(crate) dgamma: Option<Disjoint<'a, P>>,
    pub(crate) dbeta: Option<Disjoint<'a, P>>,
}

impl<P> AffineGradientsTo<'_, P> {
    pub(crate) fn is_wanted(&self) -> bool {
        self.dgamma.is_some() || self.dbeta.is_some()
    }
}

impl<P: Real> Keep<2> for AffineGradientsTo<'_, P> {
    type Kept = ();

    #[inline(always)]
    unsafe fn keep(&self, channels: Range<usize>, [dy, dy_xhat]: &[Each<f64>; 2]) {
        let dgamma = match self.renorm.map(|renorm| renorm.corrections(channels.clone())) {
            Some([r, d]) => core::array::from_fn(|i| dy_xhat[i] * r[i] + dy[i] * d[i]),
            None => *dy_xhat,
        };
        for (out, sums) in [(self.dgamma, &dgamma), (self.dbeta, dy)] {
            let Some(out) = out else { continue };
            // SAFETY: the caller's promise.
            for (out, &sum) in unsafe { out.slice(channels.clone()) }.iter_mut().zip(sums) {
                *out = P::from_f64(if self.accumulates { out.to_f64() + sum } else { sum });
            }
        }
    }
}

impl<P: Real> Saved<P> {
    /// Takes the statistics of the population as constants.
    pub(crate) fn freeze(&mut self, Population { mean, var }: Population<'_, P>, eps: f64) {
        (self.count, self.frozen, self.renorm) = (0, true, None);
        self.mean.copy_from_slice(mean);
        self.residue.fill(P::default());
        self.var.copy_from_slice(var);
        for (to, var) in self.inv_std.iter_mut().zip(var) {
            *to = P::from_f64_saturating(inv_std(var.to_f64(), eps));
        }
    }
}

pub(crate) fn check_eps(eps: f64) -> Result<()> {
    if eps.is_finite() && eps >= 0.0 { Ok(()) } else { Err(Error::Eps { got: eps }) }
}
