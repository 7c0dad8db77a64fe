//! The backward pass: the sums that the gradients are made of, and the gradient of the input.

use crate::element::{Element, Real};
use crate::grid::{Band, InOut, Runs, Source};
use crate::kernel::gradient;
use crate::kernel::map::{Map, Target};
use crate::kernel::sums::{Columns, RowBlock, RunSums};
use crate::moments::{GradientSums, MergeWeights, Saved};
use crate::pass::{Application, Reduction};
use crate::simd::Isa;

/// The gradient sums of each channel, recorded by `close`.
pub(crate) struct GradientSumsOf<'a, E: Element, F> {
    pub(crate) x: Source<'a, E>,
    pub(crate) dy: Source<'a, E>,
    pub(crate) saved: &'a Saved<E::Param>,
    pub(crate) close: F,
}

impl<E: Element, T, F: Fn(usize, GradientSums) -> T + Sync> Reduction<E, 2> for GradientSumsOf<'_, E, F> {
    type Closed = T;
    type Block<I: Isa> = gradient::Block<I, E>;

    #[inline(always)]
    fn blank<I: Isa>(&self, isa: I) -> gradient::Block<I, E> {
        RunSums::new(isa, [E::Param::default(); 2])
    }

    #[inline(always)]
    unsafe fn begin<I: Isa>(&self, isa: I, channel: usize, _: Runs) -> gradient::Block<I, E> {
        RunSums::new(isa, [self.saved.mean[channel], self.saved.inv_std[channel]])
    }

    #[inline(always)]
    unsafe fn add<I: Isa>(&self, isa: I, block: &mut gradient::Block<I, E>, band: Band, ahead: usize) {
        // SAFETY: the caller's promise.
        unsafe { gradient::add(isa, self.x.as_ptr(), self.dy.as_ptr(), block, band, ahead) }
    }

    #[inline(always)]
    unsafe fn end<I: Isa>(&self, _: I, block: &gradient::Block<I, E>, runs: Runs) -> [f64; 2] {
        // SAFETY: the caller's promise.
        unsafe { gradient::end(self.x.as_ptr(), self.dy.as_ptr(), block, runs) }
    }

    #[inline(always)]
    unsafe fn rows<I: Isa>(&self, isa: I, block: RowBlock, columns: &mut Columns<'_, E::Param>, out: [&mut [f64]; 2]) {
        let (mean, inv_std) = (&self.saved.mean, &self.saved.inv_std);
        let (x, dy) = (self.x.as_ptr(), self.dy.as_ptr());
        // SAFETY: the caller's promise.
        unsafe { gradient::of_rows(isa, x, dy, |c| [mean[c], inv_std[c]], block, columns, out) }
    }

    #[inline(always)]
    fn merge(_: MergeWeights, a: [f64; 2], b: [f64; 2]) -> [f64; 2] {
        [a[0] + b[0], a[1] + b[1]]
    }

    unsafe fn close(&self, channel: usize, [dy, dy_xhat]: [f64; 2]) -> T {
        // The kernel left out what the rounded mean lacks.
        let lacking = self.saved.residue[channel].to_f64() * self.saved.inv_std[channel].to_f64();
        (self.close)(channel, GradientSums { dy, dy_xhat: dy_xhat - lacking * dy })
    }
}

/// `dx` from the gradient sums given.
pub(crate) struct InputGradientTo<'a, E: Element> {
    pub(crate) x: Source<'a, E>,
    /// From dy to dx.
    pub(crate) io: InOut<'a, E>,
    pub(crate) saved: &'a Saved<E::Param>,
    pub(crate) gamma: Option<&'a [E::Param]>,
    /// The number of values behind the sums.
    pub(crate) count: u64,
    pub(crate) streaming: bool,
}

impl<E: Element> Application<E, 6> for InputGradientTo<'_, E> {
    type Given = GradientSums;

    fn coefficients(&self, c: usize, sums: GradientSums) -> [E::Param; 6] {
        let gamma = self.gamma.map_or(E::Param::from_f64(1.0), |gamma| gamma[c]);
        let (mean, residue, inv_std) = (self.saved.mean[c], self.saved.residue[c], self.saved.inv_std[c]);
        gradient::coefficients(mean, residue, inv_std, gamma, sums, self.count as f64)
    }

    #[inline(always)]
    fn map<I: Isa>(&self) -> impl Map<I, 6, Element = E> {
        gradient::InputGradient::new(self.x.as_ptr(), self.io.from.as_ptr())
    }

    fn target(&self) -> Target<E> {
        Target { to: self.io.to.as_ptr(), streaming: self.streaming }
    }
}
