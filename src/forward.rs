//! The forward pass: moments of a batch, and normalization with statistics of any origin.

use crate::element::{Element, Real};
use crate::grid::{Band, InOut, Runs, Source};
use crate::kernel::map::{Map, Target};
use crate::kernel::sums::{Columns, RowBlock, RunSums};
use crate::kernel::{moments, normalize};
use crate::moments::{MergeWeights, Moments, Saved};
use crate::pass::{Application, Reduction};
use crate::plan::Affine;
use crate::simd::Isa;

/// The statistics that a channel is normalized with.
pub(crate) struct Statistics<P> {
    pub(crate) mean: P,
    pub(crate) residue: P,
    pub(crate) inv_std: f64,
}

impl<P: Real> Saved<P> {
    pub(crate) fn statistics(&self, c: usize) -> Statistics<P> {
        Statistics { mean: self.mean[c], residue: self.residue[c], inv_std: self.inv_std[c].to_f64() }
    }
}

/// The moments of each channel, recorded by `close`.
pub(crate) struct MomentsOf<'a, E, F> {
    pub(crate) x: Source<'a, E>,
    pub(crate) count: u64,
    pub(crate) close: F,
}

impl<E: Element, T, F: Fn(usize, Moments) -> T + Sync> Reduction<E, 3> for MomentsOf<'_, E, F> {
    type Closed = T;
    type Block<I: Isa> = moments::Block<I, E>;

    #[inline(always)]
    fn blank<I: Isa>(&self, isa: I) -> moments::Block<I, E> {
        RunSums::new(isa, [E::Param::default(); 1])
    }

    #[inline(always)]
    unsafe fn begin<I: Isa>(&self, isa: I, _: usize, runs: Runs) -> moments::Block<I, E> {
        // SAFETY: the caller's promise; an empty tensor has no blocks.
        unsafe { moments::begin(isa, self.x.as_ptr(), runs) }
    }

    #[inline(always)]
    unsafe fn add<I: Isa>(&self, isa: I, block: &mut moments::Block<I, E>, band: Band, ahead: usize) {
        // SAFETY: the caller's promise.
        unsafe { moments::add(isa, self.x.as_ptr(), block, band, ahead) }
    }

    #[inline(always)]
    unsafe fn end<I: Isa>(&self, isa: I, block: &moments::Block<I, E>, runs: Runs) -> [f64; 3] {
        // SAFETY: the caller's promise; an empty tensor has no blocks.
        unsafe { moments::end(isa, self.x.as_ptr(), block, runs) }
    }

    #[inline(always)]
    unsafe fn rows<I: Isa>(&self, isa: I, block: RowBlock, columns: &mut Columns<'_, E::Param>, out: [&mut [f64]; 3]) {
        // SAFETY: the caller's promise; an empty tensor has no blocks.
        unsafe { moments::of_rows(isa, self.x.as_ptr(), block, columns, out) }
    }

    #[inline(always)]
    fn merge(weights: MergeWeights, a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
        weights.merge(a.into(), b.into()).into()
    }

    unsafe fn close(&self, channel: usize, [mean, residue, m2]: [f64; 3]) -> T {
        (self.close)(channel, Moments { count: self.count, mean, residue, m2 })
    }
}

/// `y` with gamma and beta, from statistics given.
pub(crate) struct NormalizeTo<'a, E: Element> {
    pub(crate) io: InOut<'a, E>,
    pub(crate) affine: Affine<'a, E::Param>,
    pub(crate) streaming: bool,
}

impl<E: Element> Application<E, 3> for NormalizeTo<'_, E> {
    type Given = Statistics<E::Param>;

    fn coefficients(&self, c: usize, given: Self::Given) -> [E::Param; 3] {
        let gamma = self.affine.gamma.map_or(E::Param::from_f64(1.0), |gamma| gamma[c]);
        let beta = self.affine.beta.map_or(E::Param::from_f64(0.0), |beta| beta[c]);
        normalize::coefficients(given.mean, given.residue, given.inv_std, gamma, beta)
    }

    #[inline(always)]
    fn map<I: Isa>(&self) -> impl Map<I, 3, Element = E> {
        normalize::Normalize::new(self.io.from.as_ptr())
    }

    fn target(&self) -> Target<E> {
        Target { to: self.io.to.as_ptr(), streaming: self.streaming }
    }
}
