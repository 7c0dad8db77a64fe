//! The backward pass: the sums that the gradients are made of, and the coefficients of the input's gradient.

use core::ops::Range;

use crate::activation::{Activation, Bend};
use crate::affine::{Affine, Trained};
use crate::element::{Element, Real};
use crate::forward::{Statistics, lines};
use crate::grid::{Band, Runs};
use crate::kernel::columns::{Columns, RowBlock};
use crate::kernel::gradient::{self, Gate, Gated, Pair, Passed, Upstream};
use crate::kernel::sums::{Beside, RunSums};
use crate::moments::{MergeWeights, Saved, centre};
use crate::pass::{BATCH, Each, Reduction};
use crate::simd::{Isa, Kernel};
use crate::tensor::{Side, Source};
use crate::view::{Pack, Packs};

/// What backward passes read.
#[derive(Clone, Copy)]
pub(crate) struct Upstreams<'a, E: Element> {
    pub(crate) x: Source<'a, E>,
    pub(crate) dy: Source<'a, E>,
    pub(crate) affine: Affine<'a, E>,
    pub(crate) channels: Channels<'a, E::Param>,
}

/// What is known of channels, of whatever type their tensors are: what sums are completed with and coefficients made of.
#[derive(Clone, Copy)]
pub(crate) struct Channels<'a, P> {
    pub(crate) saved: &'a Saved<P>,
    pub(crate) trained: Trained<'a, P>,
    /// The number of values behind the sums.
    pub(crate) count: u64,
    /// Whether `x` is the output, from which the input is rebuilt up to scale and offset.
    pub(crate) is_output: bool,
}

impl<'a, E: Element> Upstreams<'a, E> {
    /// The gradient behind the activation, if there is one.
    pub(crate) fn gated(&self) -> Option<Gated<'a, E>> {
        let Affine { residual, output, activation, gates, .. } = self.affine;
        let source = |tensor| Source::new(tensor, Side::Y);
        let (gate, unbend) = match (gates, output) {
            _ if self.channels.is_output => (Gate::Output(self.x), activation.inverse()),
            (Some(gates), _) => (Gate::Bits(gates), Activation::None),
            (None, Some(output)) => (Gate::Output(source(output)), Activation::None),
            (None, None) => (Gate::Argument(residual.map(source)), Activation::None),
        };
        let (bend, unbend) = (Bend::new(activation), Bend::new(unbend));
        (activation != Activation::None).then_some(Gated { dy: self.dy, gate, bend, unbend })
    }

    /// The gradient behind the activation as a tensor of its own, see [`Passed`].
    pub(crate) fn passed(&self, scaled: bool) -> Passed<'a, E> {
        // Without an activation any tensor can be its output; this one is read anyway.
        let none = Bend::new(Activation::None);
        let whole = || Gated { dy: self.dy, gate: Gate::Output(self.dy), bend: none, unbend: none };
        Passed { x: self.x, upstream: self.gated().unwrap_or_else(whole), scaled }
    }

    /// The sums of a gradient, and of its products with xhat.
    pub(crate) fn sums<U, const K: usize>(&self, x: Source<'a, E>, upstream: U) -> GradientSumsOf<'a, E, U, K> {
        GradientSumsOf { channels: self.channels, pair: Pair { x, upstream }, is_plain: false }
    }
}

impl<P: Real> Channels<'_, P> {
    /// The forward pass's coefficients.
    pub(crate) fn lines(&self, channels: Range<usize>) -> [Each<P>; 3] {
        lines(self.trained, channels.clone(), &self.saved.statistics(channels))
    }

    /// A channel's `(hi, residue, inv_std)` of what is read: of the input, or of the output, whose mean and standard deviation
    /// are beta and gamma. `xhat = (x - hi - residue) * inv_std`.
    pub(crate) fn centre(&self, c: usize) -> (P, f64, P) {
        if !self.is_output {
            let (hi, residue) = self.saved.centre(c);
            return (hi, residue, self.saved.inv_std[c]);
        }
        let (gamma, beta) = self.saved.line(self.trained, c);
        let rounded = P::from_f64(beta);
        (rounded, beta - rounded.to_f64(), P::from_f64(1.0 / gamma))
    }

    /// [`Channels::centre`] of up to [`BATCH`] channels; `given` are their statistics.
    #[inline(always)]
    fn centres(&self, channels: Range<usize>, given: &Statistics<P>) -> Each<(P, f64, P)> {
        let mut all = [Default::default(); BATCH];
        if self.is_output {
            for (centre, c) in all.iter_mut().zip(channels) {
                *centre = self.centre(c);
            }
            return all;
        }
        // No branches, so that channels are computed several at a time; what lies beyond the last one is not used.
        for (i, all) in all.iter_mut().enumerate() {
            let (hi, residue) = centre(given.mean[i], given.residue[i], given.inv_std[i], given.reach);
            *all = (hi, residue, P::from_f64(given.inv_std[i]));
        }
        all
    }

    /// `[sum(dy), sum(dy * xhat)]` from what the kernels left, which took the rounded mean for the mean.
    #[inline(always)]
    pub(crate) fn complete(&self, channels: Range<usize>, [dy, dy_xhat]: &[Each<f64>; 2]) -> [Each<f64>; 2] {
        let mut sums = [*dy, *dy_xhat];
        let centres = self.centres(channels.clone(), &self.saved.statistics(channels));
        for (i, (_, residue, inv_std)) in centres.into_iter().enumerate() {
            let lacking = residue * inv_std.to_f64();
            sums[1][i] -= lacking * dy[i];
        }
        sums
    }

    /// The coefficients of the input's gradient from the sums: six, or seven where the upstream gradient asks for the last.
    #[inline(always)]
    pub(crate) fn coefficients<const K: usize>(
        &self,
        channels: Range<usize>,
        [dy, dy_xhat]: &[Each<f64>; 2],
    ) -> [Each<P>; K] {
        let saved = self.saved.statistics(channels.clone());
        let count = self.count as f64;
        let mut all = [[P::default(); BATCH]; K];
        let [gamma, _] = saved.gammas_betas(self.trained, channels.clone());
        for (i, centre) in self.centres(channels.clone(), &saved).into_iter().enumerate() {
            let scale = gamma[i] * saved.inv_std[i];
            let (slope, dy) = (-scale * (dy_xhat[i] / count), (dy[i] / count, scale));
            // The zero that adds nothing, not even a sign.
            let one = gradient::coefficients(centre, slope, dy, -0.0);
            for (all, one) in all.iter_mut().zip(one) {
                all[i] = one;
            }
        }
        if K > 6 {
            [_, _, all[K - 1]] = lines(self.trained, channels, &saved);
        }
        all
    }
}

impl<E: Element, U: Upstream<E>, const K: usize> Packs<E> for GradientSumsOf<'_, E, U, K> {
    unsafe fn packed(self, pack: &mut Pack<'_, '_, E>) -> Self {
        // SAFETY: the caller's promise.
        Self { pair: unsafe { self.pair.packed(pack) }, ..self }
    }
}

/// The gradient sums of each channel, with two parameters, or four where the upstream gradient asks for the last two.
#[derive(Clone, Copy)]
pub(crate) struct GradientSumsOf<'a, E: Element, U, const K: usize> {
    pub(crate) channels: Channels<'a, E::Param>,
    pub(crate) pair: Pair<'a, E, U>,
    /// Whether products are taken with what is read itself, not with xhat.
    pub(crate) is_plain: bool,
}

impl<E: Element, U, const K: usize> GradientSumsOf<'_, E, U, K> {
    /// The parameters of up to [`BATCH`] channels.
    #[inline(always)]
    fn params(&self, channels: Range<usize>) -> Params<'_, E::Param, K> {
        Params { of: &self.channels, channels, is_plain: self.is_plain }
    }
}

/// The parameters of the sums of up to [`BATCH`] channels, see [`gradient::of_rows`]. Compiled once for all that is summed.
struct Params<'c, P, const K: usize> {
    of: &'c Channels<'c, P>,
    channels: Range<usize>,
    is_plain: bool,
}

impl<P: Real, const K: usize> Kernel for Params<'_, P, K> {
    type Output = [Each<P>; K];
    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> Self::Output {
        let Self { of, channels, is_plain } = self;
        let mut params = [[P::default(); BATCH]; K];
        if is_plain {
            params[1] = [P::from_f64(1.0); BATCH];
            return params;
        }
        let saved = of.saved.statistics(channels.clone());
        for (i, (hi, _, inv_std)) in of.centres(channels.clone(), &saved).into_iter().enumerate() {
            (params[0][i], params[1][i]) = (hi, inv_std);
        }
        if K > 2 {
            [_, params[K - 2], params[K - 1]] = lines(of.trained, channels, &saved);
        }
        params
    }
}

impl<E: Element, U: Upstream<E>, const K: usize> Reduction<E, 2> for GradientSumsOf<'_, E, U, K> {
    const TENSORS: usize = 2;
    type Block<I: Isa> = gradient::Block<I, E, K>;

    #[inline(always)]
    fn blank<I: Isa>(&self, isa: I) -> gradient::Block<I, E, K> {
        RunSums::new(isa, [E::Param::default(); K])
    }

    #[inline(always)]
    unsafe fn begin<I: Isa>(
        &self,
        isa: I,
        channels: Range<usize>,
        _: (Runs, usize),
        blocks: &mut [gradient::Block<I, E, K>],
    ) {
        let params = isa.call(self.params(channels));
        for (i, block) in blocks.iter_mut().enumerate() {
            let mut of_channel = [E::Param::default(); K];
            for (param, params) in of_channel.iter_mut().zip(&params) {
                *param = params[i];
            }
            *block = RunSums::new(isa, of_channel);
        }
    }

    #[inline(always)]
    unsafe fn add<I: Isa>(
        &self,
        isa: I,
        blocks: &mut [gradient::Block<I, E, K>],
        (band, plane): (Band, usize),
        ahead: usize,
    ) {
        for (i, block) in blocks.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { block.add(isa, &self.pair, band.shifted(i * plane), ahead) };
        }
    }

    #[inline(always)]
    unsafe fn add_beside<I: Isa>(
        &self,
        isa: I,
        block: &mut gradient::Block<I, E, K>,
        groups: (Band, usize),
        ahead: usize,
        beside: impl Beside,
    ) {
        // SAFETY: the caller's promise.
        unsafe { block.add_beside(isa, &self.pair, groups, ahead, beside) }
    }

    #[inline(always)]
    unsafe fn end<I: Isa>(
        &self,
        _: I,
        blocks: &mut [gradient::Block<I, E, K>],
        first: (Runs, usize),
    ) -> [Each<f64>; 2] {
        // SAFETY: the caller's promise.
        unsafe { gradient::end::<I, E, U, K>(self.pair, blocks, first) }
    }

    #[inline(always)]
    unsafe fn rows<I: Isa>(&self, isa: I, block: RowBlock, columns: &mut Columns<'_, E::Param>, out: [&mut [f64]; 2]) {
        // SAFETY: the caller's promise.
        unsafe { gradient::of_rows(isa, self.pair, |channels| isa.call(self.params(channels)), block, columns, out) }
    }

    #[inline(always)]
    fn merge(_: MergeWeights, a: [f64; 2], b: [f64; 2]) -> [f64; 2] {
        [a[0] + b[0], a[1] + b[1]]
    }
}
