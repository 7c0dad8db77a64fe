//! Batch Renormalization (Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
//! Models", 2017): the statistics of a batch corrected towards those of the population, for small or uneven batches.
//!
//! ```text
//! r = clip(std_batch / std_population, 1/r_max, r_max)      d = clip((mean_batch - mean_population) / std_population, -d_max, d_max)
//! y = gamma * (xhat * r + d) + beta      std = sqrt(var + eps)
//! ```
//!
//! Backward, r and d are constants: `gamma * r` takes the place of gamma in dx, and `dgamma = sum(dy * (xhat * r + d))`.

use core::ops::Range;

use crate::element::Real;
use crate::error::{Error, Result};
use crate::forward::each;
use crate::moments::inv_std;
use crate::pass::{BATCH, Each};
use crate::running::Population;
use crate::tensor::Disjoint;

/// How far Batch Renormalization may correct: `r` to within `1/r_max` and `r_max`, `d` to within `-d_max` and `d_max`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RenormLimits {
    /// The limit of `r`, at least 1.
    pub r_max: f64,
    /// The limit of `d`, at least 0.
    pub d_max: f64,
}

impl RenormLimits {
    /// No correction: plain Batch Normalization.
    pub const NONE: Self = Self { r_max: 1.0, d_max: 0.0 };

    /// The schedule of the paper (section 4.2): none up to step 5000, then linearly to `r_max` = 3 at step 40000 and `d_max`
    /// = 5 at step 25000.
    pub fn at_step(step: u64) -> Self {
        let ramp = |end: f64| ((step as f64 - 5000.0) / (end - 5000.0)).clamp(0.0, 1.0);
        Self { r_max: 1.0 + 2.0 * ramp(40000.0), d_max: 5.0 * ramp(25000.0) }
    }

    pub(crate) fn check(self) -> Result<()> {
        if self.r_max >= 1.0 && self.d_max >= 0.0 {
            Ok(())
        } else {
            Err(Error::RenormLimits { r_max: self.r_max, d_max: self.d_max })
        }
    }
}

/// The population that batches are corrected towards, and the corrections of the last batch.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Renorm<P> {
    pub(crate) limits: RenormLimits,
    pub(crate) mean: Vec<P>,
    pub(crate) var: Vec<P>,
    pub(crate) r: Vec<P>,
    pub(crate) d: Vec<P>,
}

/// `r` and `d` of up to [`BATCH`] channels.
pub(crate) type Corrections = [Each<f64>; 2];

impl<P: Real> Renorm<P> {
    pub(crate) fn new(limits: RenormLimits, population: Population<'_, P>) -> Self {
        let (mean, var) = (population.mean.to_vec(), population.var.to_vec());
        Self { limits, r: vec![P::from_f64(1.0); mean.len()], d: vec![P::default(); mean.len()], mean, var }
    }

    pub(crate) fn corrections(&self, channels: Range<usize>) -> Corrections {
        [&self.r, &self.d].map(|of| each(Some(of), channels.clone(), P::default()).map(Real::to_f64))
    }

    /// `r` and `d` of one channel.
    #[inline(always)]
    pub(crate) fn correction(&self, c: usize) -> [f64; 2] {
        [self.r[c].to_f64(), self.d[c].to_f64()]
    }

    pub(crate) fn recorder(&mut self) -> RenormTo<'_, P> {
        let Self { limits, mean, var, r, d } = self;
        RenormTo { limits: *limits, population: Population { mean, var }, out: [r, d].map(|out| Disjoint::new(out)) }
    }
}

/// Where the corrections of a batch are kept, from several threads.
pub(crate) struct RenormTo<'a, P> {
    limits: RenormLimits,
    population: Population<'a, P>,
    out: [Disjoint<'a, P>; 2],
}

impl<P: Real> RenormTo<'_, P> {
    /// Keeps the corrections of up to [`BATCH`] channels of these statistics, and returns them.
    ///
    /// # Safety
    /// No other thread keeps the same channels.
    pub(crate) unsafe fn keep(
        &self,
        channels: Range<usize>,
        mean: &Each<f64>,
        var: &Each<f64>,
        eps: f64,
    ) -> Corrections {
        let RenormLimits { r_max, d_max } = self.limits;
        let of_mean = each(Some(self.population.mean), channels.clone(), P::default());
        let of_var = each(Some(self.population.var), channels.clone(), P::default());
        let mut kept = [[P::default(); BATCH]; 2];
        for i in 0..channels.len() {
            let inverse = inv_std(of_var[i].to_f64(), eps);
            kept[0][i] = P::from_f64(((var[i] + eps).sqrt() * inverse).clamp(1.0 / r_max, r_max));
            kept[1][i] = P::from_f64(((mean[i] - of_mean[i].to_f64()) * inverse).clamp(-d_max, d_max));
        }
        for (out, values) in self.out.iter().zip(&kept) {
            // SAFETY: the caller's promise.
            unsafe { out.slice(channels.clone()) }.copy_from_slice(&values[..channels.len()]);
        }
        kept.map(|kept| kept.map(Real::to_f64))
    }
}
