//! The forward pass: moments of a batch, and coefficients from statistics of any origin.

use core::ops::Range;

use crate::affine::Trained;
use crate::element::{Element, Real};
use crate::grid::{Band, Runs};
use crate::kernel::columns::{Columns, RowBlock};
use crate::kernel::sums::Beside;
use crate::kernel::{moments, normalize};
use crate::moments::{MergeWeights, Saved, centre, reach};
use crate::pass::{BATCH, Each, Reduction};
use crate::simd::Isa;
use crate::tensor::Source;
use crate::variants::renorm::Corrections;
use crate::view::{Pack, Packs};

/// The statistics that channels are normalized with.
#[derive(Default)]
pub(crate) struct Statistics<P> {
    pub(crate) mean: Each<P>,
    pub(crate) residue: Each<P>,
    pub(crate) inv_std: Each<f64>,
    /// How many standard deviations values may lie from the mean.
    pub(crate) reach: f64,
    /// Those of Batch Renormalization, if any.
    pub(crate) corrections: Option<Corrections>,
}

impl<P: Real> Statistics<P> {
    /// [`corrected`] gammas and betas of the channels of these.
    #[inline(always)]
    pub(crate) fn gammas_betas(&self, trained: Trained<'_, P>, channels: Range<usize>) -> [Each<f64>; 2] {
        let mut gamma = wide(&each(trained.gamma, channels.clone(), P::from_f64(1.0)));
        let mut beta = wide(&each(trained.beta, channels, P::default()));
        if let Some([r, d]) = &self.corrections {
            for i in 0..BATCH {
                (gamma[i], beta[i]) = corrected((gamma[i], beta[i]), Some([r[i], d[i]]));
            }
        }
        [gamma, beta]
    }
}

/// What takes the place of gamma and beta where there are corrections: `gamma * r` and `beta + gamma * d`.
#[inline(always)]
fn corrected((gamma, beta): (f64, f64), corrections: Option<[f64; 2]>) -> (f64, f64) {
    corrections.map_or((gamma, beta), |[r, d]| (gamma * r, beta + gamma * d))
}

impl<P: Real> Saved<P> {
    #[inline(always)]
    pub(crate) fn statistics(&self, channels: Range<usize>) -> Statistics<P> {
        let inv_std = each(Some(&self.inv_std), channels.clone(), P::default());
        Statistics {
            mean: each(Some(&self.mean), channels.clone(), P::default()),
            residue: each(Some(&self.residue), channels.clone(), P::default()),
            inv_std: wide(&inv_std),
            reach: reach(self.count),
            corrections: self.renorm.as_ref().map(|renorm| renorm.corrections(channels)),
        }
    }

    /// [`corrected`] gamma and beta of one channel.
    #[inline(always)]
    pub(crate) fn line(&self, trained: Trained<'_, P>, c: usize) -> (f64, f64) {
        corrected(trained.channel(c), self.renorm.as_ref().map(|renorm| renorm.correction(c)))
    }

    /// [`centre`] of one channel.
    #[inline(always)]
    pub(crate) fn centre(&self, c: usize) -> (P, f64) {
        centre(self.mean[c], self.residue[c], self.inv_std[c].to_f64(), reach(self.count))
    }
}

/// Values of up to [`BATCH`] channels, or the same for each where none are given.
#[inline(always)]
pub(crate) fn each<P: Copy>(values: Option<&[P]>, channels: Range<usize>, otherwise: P) -> Each<P> {
    let mut each = [otherwise; BATCH];
    if let Some(values) = values {
        copy(&mut each[..channels.len()], &values[channels]);
    }
    each
}

/// The values in f64; unlike `map` it is inlined and vectorized.
#[inline(always)]
fn wide<P: Real>(values: &Each<P>) -> Each<f64> {
    let mut wide = [0.0; BATCH];
    for (wide, value) in wide.iter_mut().zip(values) {
        *wide = value.to_f64();
    }
    wide
}

/// Copies values of up to [`BATCH`] channels: of all mostly, which takes no call.
#[inline(always)]
pub(crate) fn copy<P: Copy>(to: &mut [P], from: &[P]) {
    match (<&mut Each<P>>::try_from(&mut *to), <&Each<P>>::try_from(from)) {
        (Ok(to), Ok(from)) => *to = *from,
        _ => to.copy_from_slice(from),
    }
}

/// The moments of each channel.
#[derive(Clone, Copy)]
pub(crate) struct MomentsOf<'a, E>(pub(crate) Source<'a, E>);

impl<E: Element> Packs<E> for MomentsOf<'_, E> {
    unsafe fn packed(self, pack: &mut Pack<'_, '_, E>) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { pack.pack(self.0) })
    }
}

impl<E: Element> Reduction<E, 3> for MomentsOf<'_, E> {
    const TENSORS: usize = 1;
    type Block<I: Isa> = moments::Block<I, E>;

    #[inline(always)]
    fn blank<I: Isa>(&self, isa: I) -> moments::Block<I, E> {
        moments::Block::blank(isa)
    }

    #[inline(always)]
    unsafe fn begin<I: Isa>(
        &self,
        isa: I,
        channels: Range<usize>,
        (first, plane): (Runs, usize),
        blocks: &mut [moments::Block<I, E>],
    ) {
        for (i, block) in blocks.iter_mut().enumerate() {
            // SAFETY: the caller's promise; an empty tensor has no blocks.
            unsafe { block.begin(isa, self.0.as_ptr(), channels.start + i, first.shifted(i * plane)) };
        }
    }

    #[inline(always)]
    fn foresee<I: Isa>(&self, isa: I, channels: usize, (first, plane): (Runs, usize)) {
        for i in 0..channels {
            moments::foresee(isa, self.0.as_ptr(), first.shifted(i * plane));
        }
    }

    #[inline(always)]
    unsafe fn add<I: Isa>(&self, isa: I, blocks: &mut [moments::Block<I, E>], first: (Band, usize), ahead: usize) {
        // SAFETY: the caller's promise.
        unsafe { moments::add(isa, self.0.as_ptr(), blocks, first, ahead) }
    }

    #[inline(always)]
    unsafe fn add_beside<I: Isa>(
        &self,
        isa: I,
        block: &mut moments::Block<I, E>,
        groups: (Band, usize),
        ahead: usize,
        beside: impl Beside,
    ) {
        // SAFETY: the caller's promise.
        unsafe { moments::add_beside(isa, self.0.as_ptr(), block, groups, ahead, beside) }
    }

    #[inline(always)]
    unsafe fn end<I: Isa>(&self, isa: I, blocks: &mut [moments::Block<I, E>], first: (Runs, usize)) -> [Each<f64>; 3] {
        // SAFETY: the caller's promise; an empty tensor has no blocks.
        unsafe { moments::end(isa, self.0.as_ptr(), blocks, first) }
    }

    #[inline(always)]
    unsafe fn rows<I: Isa>(&self, isa: I, block: RowBlock, columns: &mut Columns<'_, E::Param>, out: [&mut [f64]; 3]) {
        // SAFETY: the caller's promise; an empty tensor has no blocks.
        unsafe { moments::of_rows(isa, self.0.as_ptr(), block, columns, out) }
    }

    #[inline(always)]
    fn merge(weights: MergeWeights, a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
        weights.merge(a.into(), b.into()).into()
    }
}

/// `[hi, scale, shift]` of up to [`BATCH`] channels.
#[inline(always)]
pub(crate) fn lines<P: Real>(trained: Trained<'_, P>, channels: Range<usize>, given: &Statistics<P>) -> [Each<P>; 3] {
    let mut all = [[P::default(); BATCH]; 3];
    let [gamma, beta] = given.gammas_betas(trained, channels);
    // No branches, so that channels are computed several at a time; what lies beyond the last one is not used.
    for i in 0..BATCH {
        let centre = centre(given.mean[i], given.residue[i], given.inv_std[i], given.reach);
        let one = normalize::coefficients(centre, given.inv_std[i], gamma[i], beta[i]);
        [all[0][i], all[1][i], all[2][i]] = one;
    }
    all
}
