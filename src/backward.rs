//! The backward pass: the sums that the gradients are made of, and the gradient of the input.

use core::ops::Range;

use crate::element::{Element, Real};
use crate::forward::{each, lines};
use crate::grid::{Band, Disjoint, InOut, Runs, Source};
use crate::kernel::gradient::{self, Gated, Upstream};
use crate::kernel::map::{Map, Target};
use crate::kernel::sums::{Columns, RowBlock, RunSums};
use crate::moments::{Keep, MergeWeights, Saved};
use crate::pass::{Application, BATCH, Each, Reduction};
use crate::plan::Affine;
use crate::simd::Isa;

/// The gradient sums of each channel.
pub(crate) struct GradientSumsOf<'a, E: Element, U, O, const K: usize> {
    pub(crate) x: Source<'a, E>,
    pub(crate) upstream: U,
    pub(crate) affine: Affine<'a, E>,
    pub(crate) saved: &'a Saved<E::Param>,
    pub(crate) out: O,
}

impl<E: Element, U, O, const K: usize> GradientSumsOf<'_, E, U, O, K> {
    /// The parameters of a channel, see [`gradient::of_rows`].
    fn params(&self, c: usize) -> [E::Param; K] {
        let mut params = [E::Param::default(); K];
        (params[0], params[1]) = (self.saved.mean[c], self.saved.inv_std[c]);
        if K > 2 {
            let [_, scale, shift] = lines(self.affine, c..c + 1, &self.saved.statistics(c..c + 1));
            (params[K - 2], params[K - 1]) = (scale[0], shift[0]);
        }
        params
    }
}

impl<E, U, O, const K: usize> Reduction<E, 2> for GradientSumsOf<'_, E, U, O, K>
where
    E: Element,
    U: Upstream<E>,
    O: Keep<2>,
{
    type Closed = [Each<f64>; 2];
    type Block<I: Isa> = gradient::Block<I, E, K>;

    #[inline(always)]
    fn blank<I: Isa>(&self, isa: I) -> gradient::Block<I, E, K> {
        RunSums::new(isa, [E::Param::default(); K])
    }

    #[inline(always)]
    unsafe fn begin<I: Isa>(&self, isa: I, channel: usize, _: Runs) -> gradient::Block<I, E, K> {
        RunSums::new(isa, self.params(channel))
    }

    #[inline(always)]
    unsafe fn add<I: Isa>(&self, isa: I, block: &mut gradient::Block<I, E, K>, band: Band, ahead: usize) {
        // SAFETY: the caller's promise.
        unsafe { gradient::add(isa, self.x.as_ptr(), &self.upstream, block, band, ahead) }
    }

    #[inline(always)]
    unsafe fn end<I: Isa>(&self, _: I, block: &gradient::Block<I, E, K>, runs: Runs) -> [f64; 2] {
        // SAFETY: the caller's promise.
        unsafe { gradient::end::<I, E, U, K>(self.x.as_ptr(), &self.upstream, block, runs) }
    }

    #[inline(always)]
    unsafe fn rows<I: Isa>(&self, isa: I, block: RowBlock, columns: &mut Columns<'_, E::Param>, out: [&mut [f64]; 2]) {
        // SAFETY: the caller's promise.
        unsafe { gradient::of_rows(isa, self.x.as_ptr(), &self.upstream, |c| self.params(c), block, columns, out) }
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

/// `dx` from the gradient sums given, with six coefficients, or seven where the upstream gradient asks for the last.
pub(crate) struct InputGradientTo<'a, E: Element, U, const K: usize> {
    pub(crate) x: Source<'a, E>,
    pub(crate) upstream: U,
    pub(crate) to: Disjoint<'a, E>,
    pub(crate) saved: &'a Saved<E::Param>,
    pub(crate) affine: Affine<'a, E>,
    /// The number of values behind the sums.
    pub(crate) count: u64,
    pub(crate) streaming: bool,
}

impl<E: Element, U: Upstream<E>, const K: usize> Application<E, K> for InputGradientTo<'_, E, U, K> {
    type Given = [Each<f64>; 2];

    fn coefficients(&self, channels: Range<usize>, [dy, dy_xhat]: &Self::Given) -> [Each<E::Param>; K] {
        let gamma = each(self.affine.gamma, channels.clone(), E::Param::from_f64(1.0));
        let inv_std = each(Some(&self.saved.inv_std), channels.clone(), E::Param::default());
        let saved = self.saved.statistics(channels.clone());
        let count = self.count as f64;
        let mut all = [[E::Param::default(); BATCH]; K];
        for i in 0..channels.len() {
            let (mean, residue) = (saved.mean[i], saved.residue[i]);
            let gamma = saved.corrected(gamma[i].to_f64(), i);
            let one = gradient::coefficients(mean, residue, inv_std[i], gamma, [dy[i], dy_xhat[i]], count);
            for (all, one) in all.iter_mut().zip(one) {
                all[i] = one;
            }
        }
        if K > 6 {
            [_, _, all[K - 1]] = lines(self.affine, channels, &saved);
        }
        all
    }

    #[inline(always)]
    fn map<I: Isa>(&self) -> impl Map<I, K, Element = E> {
        gradient::InputGradient::new(self.x.as_ptr(), &self.upstream)
    }

    fn target(&self) -> Target<E> {
        Target { to: self.to.as_ptr(), streaming: self.streaming }
    }
}

/// `dx` where the statistics are constants.
pub(crate) struct FrozenGradientTo<'a, E: Element> {
    pub(crate) io: InOut<'a, E>,
    pub(crate) saved: &'a Saved<E::Param>,
    pub(crate) affine: Affine<'a, E>,
    pub(crate) streaming: bool,
}

impl<E: Element> Application<E, 1> for FrozenGradientTo<'_, E> {
    type Given = [Each<f64>; 2];

    fn coefficients(&self, channels: Range<usize>, _: &Self::Given) -> [Each<E::Param>; 1] {
        let gamma = each(self.affine.gamma, channels.clone(), E::Param::from_f64(1.0));
        let inv_std = self.saved.statistics(channels).inv_std;
        [core::array::from_fn(|i| E::Param::from_f64_saturating(gamma[i].to_f64() * inv_std[i]))]
    }

    #[inline(always)]
    fn map<I: Isa>(&self) -> impl Map<I, 1, Element = E> {
        gradient::Scaled::new(self.io.from.as_ptr())
    }

    fn target(&self) -> Target<E> {
        Target { to: self.io.to.as_ptr(), streaming: self.streaming }
    }
}

/// What an activation lets through of `dy`, see [`gradient::Passed`].
pub(crate) struct PassedTo<'a, E: Element> {
    pub(crate) x: Source<'a, E>,
    pub(crate) upstream: Gated<'a, E>,
    pub(crate) scaled: bool,
    pub(crate) to: Disjoint<'a, E>,
    pub(crate) saved: &'a Saved<E::Param>,
    pub(crate) affine: Affine<'a, E>,
    pub(crate) streaming: bool,
}

impl<E: Element> Application<E, 3> for PassedTo<'_, E> {
    type Given = ();

    fn coefficients(&self, channels: Range<usize>, (): &()) -> [Each<E::Param>; 3] {
        lines(self.affine, channels.clone(), &self.saved.statistics(channels))
    }

    #[inline(always)]
    fn map<I: Isa>(&self) -> impl Map<I, 3, Element = E> {
        gradient::Passed::new(self.x.as_ptr(), &self.upstream, self.scaled)
    }

    fn target(&self) -> Target<E> {
        Target { to: self.to.as_ptr(), streaming: self.streaming }
    }
}
