//! The backward pass: the sums that the gradients are made of, and the gradient of the input.

use core::ops::Range;

use crate::element::{Element, Real};
use crate::forward::each;
use crate::grid::{Band, InOut, Runs, Source};
use crate::kernel::gradient;
use crate::kernel::map::{Map, Target};
use crate::kernel::sums::{Columns, RowBlock, RunSums};
use crate::moments::{Keep, MergeWeights, Saved};
use crate::pass::{Application, BATCH, Each, Reduction};
use crate::simd::Isa;

/// The gradient sums of each channel.
pub(crate) struct GradientSumsOf<'a, E: Element, O> {
    pub(crate) x: Source<'a, E>,
    pub(crate) dy: Source<'a, E>,
    pub(crate) saved: &'a Saved<E::Param>,
    pub(crate) out: O,
}

impl<E: Element, O: Keep<2>> Reduction<E, 2> for GradientSumsOf<'_, E, O> {
    type Closed = [Each<f64>; 2];
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

    unsafe fn close(&self, channels: Range<usize>, [dy, dy_xhat]: &[Each<f64>; 2]) -> [Each<f64>; 2] {
        let saved = self.saved.statistics(channels.clone());
        let mut sums = [*dy, *dy_xhat];
        for i in 0..channels.len() {
            // The kernel left out what the rounded mean lacks.
            let lacking = saved.residue[i].to_f64() * saved.inv_std[i];
            sums[1][i] -= lacking * dy[i];
        }
        // SAFETY: the caller's promise.
        unsafe { self.out.keep(channels, &sums) };
        sums
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
    type Given = [Each<f64>; 2];

    fn coefficients(&self, channels: Range<usize>, [dy, dy_xhat]: &Self::Given) -> [Each<E::Param>; 6] {
        let gamma = each(self.gamma, channels.clone(), E::Param::from_f64(1.0));
        let inv_std = each(Some(&self.saved.inv_std), channels.clone(), E::Param::default());
        let saved = self.saved.statistics(channels.clone());
        let count = self.count as f64;
        let mut all = [[E::Param::default(); BATCH]; 6];
        for i in 0..channels.len() {
            let (mean, residue) = (saved.mean[i], saved.residue[i]);
            let one = {
                let gamma = saved.corrected(gamma[i].to_f64(), i);
                gradient::coefficients(mean, residue, inv_std[i], gamma, [dy[i], dy_xhat[i]], count)
            };
            [all[0][i], all[1][i], all[2][i], all[3][i], all[4][i], all[5][i]] = one;
        }
        all
    }

    #[inline(always)]
    fn map<I: Isa>(&self) -> impl Map<I, 6, Element = E> {
        gradient::InputGradient::new(self.x.as_ptr(), self.io.from.as_ptr())
    }

    fn target(&self) -> Target<E> {
        Target { to: self.io.to.as_ptr(), streaming: self.streaming }
    }
}

/// `dx` where the statistics are constants.
pub(crate) struct FrozenGradientTo<'a, E: Element>(pub(crate) InputGradientTo<'a, E>);

impl<E: Element> Application<E, 1> for FrozenGradientTo<'_, E> {
    type Given = [Each<f64>; 2];

    fn coefficients(&self, channels: Range<usize>, _: &Self::Given) -> [Each<E::Param>; 1] {
        let gamma = each(self.0.gamma, channels.clone(), E::Param::from_f64(1.0));
        let inv_std = self.0.saved.statistics(channels).inv_std;
        [core::array::from_fn(|i| E::Param::from_f64_saturating(gamma[i].to_f64() * inv_std[i]))]
    }

    #[inline(always)]
    fn map<I: Isa>(&self) -> impl Map<I, 1, Element = E> {
        gradient::Scaled::new(self.0.io.from.as_ptr())
    }

    fn target(&self) -> Target<E> {
        self.0.target()
    }
}
