//! The sums that the gradients of gamma and beta are, and the gradient of the input.
//!
//! With `xhat = (x - mean) * inv_std` over `m` values (Ioffe & Szegedy 2015, section 3):
//!
//! ```text
//! dbeta = sum(dy)      dgamma = sum(dy * xhat)
//! dx = gamma * inv_std * ((dy - dbeta/m) - xhat * dgamma/m)
//! ```

use core::ops::Range;

use super::columns::{self, Columns, RowBlock};
use super::map::Map;
use super::sums::{RunSums, Terms};
use crate::activation::Bend;
use crate::element::{Element, Real};
use crate::forward::copy;
use crate::gates::Recorded;
use crate::grid::Runs;
use crate::pass::{BATCH, Each};
use crate::simd::{Compute, Isa, Vector};
use crate::tensor::Source;
use crate::view::{Pack, Packs};

/// Where the gradient of the affine part's output comes from: `dy` itself, or what an activation lets through of it.
pub(crate) trait Upstream<E: Element>: Packs<E> + Sync {
    /// Whether anything may stand beyond the elements of [`Upstream::at`] and [`Upstream::rebuild`]: zero times an infinite slope.
    const SPILLS: bool = false;

    /// Its elements from `at`: of a whole vector if `FULL`, else the first `n` and zeros, or anything if it [spills](Self::SPILLS).
    /// `centred` are those of `x - hi`, and `line` the forward pass's `[scale, shift]`.
    ///
    /// # Safety
    /// The elements lie inside the tensors.
    unsafe fn at<I: Isa, const FULL: bool>(
        &self,
        isa: I,
        centred: Compute<I, E>,
        line: [Compute<I, E>; 2],
        at: usize,
        n: usize,
    ) -> Compute<I, E>;

    /// The input from what is read in its place, which may be the output.
    #[inline(always)]
    fn rebuild<I: Isa>(&self, _: I, x: Compute<I, E>) -> Compute<I, E> {
        x
    }

    /// The same for one value.
    #[inline(always)]
    fn rebuild_one(&self, x: E::Param) -> E::Param {
        x
    }

    /// One element in f64.
    ///
    /// # Safety
    /// As [`Upstream::at`].
    unsafe fn wide(&self, centred: E::Param, line: [E::Param; 2], at: usize) -> f64;

    /// Asks the caches for the elements around `at`, which may lie anywhere.
    fn prefetch<I: Isa>(&self, isa: I, at: usize);
}

impl<E: Element> Packs<E> for Source<'_, E> {
    unsafe fn packed(self, pack: &mut Pack<'_, '_, E>) -> Self {
        // SAFETY: the caller's promise.
        unsafe { pack.pack(self) }
    }
}

impl<E: Element> Upstream<E> for Source<'_, E> {
    #[inline(always)]
    unsafe fn at<I: Isa, const FULL: bool>(
        &self,
        isa: I,
        _: Compute<I, E>,
        _: [Compute<I, E>; 2],
        at: usize,
        n: usize,
    ) -> Compute<I, E> {
        // SAFETY: the caller's promise.
        unsafe { self.load::<I, FULL>(isa, at, n) }
    }

    #[inline(always)]
    unsafe fn wide(&self, _: E::Param, _: [E::Param; 2], at: usize) -> f64 {
        // SAFETY: the caller's promise.
        unsafe { self.get(at) }.to_f64()
    }

    #[inline(always)]
    fn prefetch<I: Isa>(&self, isa: I, at: usize) {
        Source::prefetch(*self, isa, at);
    }
}

/// Where the sign that the activation saw comes from.
#[derive(Clone, Copy)]
pub(crate) enum Gate<'a, E> {
    /// The argument, computed again, with what was added to it.
    Argument(Option<Source<'a, E>>),
    /// The output, or anything of its sign.
    Output(Source<'a, E>),
    /// Bits that the forward pass recorded.
    Bits(Recorded<'a>),
}

/// `dy` where the activation's argument was positive, bent elsewhere.
#[derive(Clone, Copy)]
pub(crate) struct Gated<'a, E: Element> {
    pub(crate) dy: Source<'a, E>,
    pub(crate) gate: Gate<'a, E>,
    pub(crate) bend: Bend<E::Param>,
    /// What the input is rebuilt with.
    pub(crate) unbend: Bend<E::Param>,
}

impl<'a, E: Element> Gated<'a, E> {
    /// Whether the input is read to see the sign.
    fn recomputes(&self) -> bool {
        matches!(self.gate, Gate::Argument(_))
    }

    /// The same where it is ReLU of the argument to which nothing was added.
    pub(crate) fn rectified(self) -> Option<Rectified<'a, E>> {
        (matches!(self.gate, Gate::Argument(None)) && self.bend.is_relu()).then_some(Rectified(self.dy))
    }
}

impl<E: Element> Packs<E> for Gated<'_, E> {
    unsafe fn packed(self, pack: &mut Pack<'_, '_, E>) -> Self {
        // SAFETY: the caller's promise, for all.
        unsafe {
            let dy = pack.pack(self.dy);
            let gate = match self.gate {
                Gate::Argument(residual) => Gate::Argument(residual.map(|residual| pack.pack(residual))),
                Gate::Output(output) => Gate::Output(pack.pack(output)),
                Gate::Bits(gates) => Gate::Output(self.dy.moved_to(pack.unfold(gates))),
            };
            Self { dy, gate, ..self }
        }
    }
}

impl<E: Element> Upstream<E> for Gated<'_, E> {
    const SPILLS: bool = true;

    #[inline(always)]
    fn rebuild<I: Isa>(&self, isa: I, x: Compute<I, E>) -> Compute<I, E> {
        // Only an output is bent; a branch that never changes costs less than the bend.
        match self.gate {
            Gate::Output(_) => self.unbend.apply(isa, x, x),
            _ => x,
        }
    }

    #[inline(always)]
    fn rebuild_one(&self, x: E::Param) -> E::Param {
        self.unbend.scalar(x, x)
    }

    #[inline(always)]
    unsafe fn at<I: Isa, const FULL: bool>(
        &self,
        isa: I,
        centred: Compute<I, E>,
        [scale, shift]: [Compute<I, E>; 2],
        at: usize,
        n: usize,
    ) -> Compute<I, E> {
        // SAFETY: the caller's promise, for all.
        unsafe {
            let dy = self.dy.load::<I, FULL>(isa, at, n);
            let gate = match self.gate {
                Gate::Argument(None) => centred.mul(scale).add(shift),
                Gate::Argument(Some(residual)) => {
                    centred.mul(scale).add(shift).add(residual.load::<I, FULL>(isa, at, n))
                }
                Gate::Output(output) => output.load::<I, FULL>(isa, at, n),
                Gate::Bits(gates) => Compute::<I, E>::of_bits(isa, gates.bits(at)),
            };
            self.bend.apply(isa, gate, dy)
        }
    }

    #[inline(always)]
    unsafe fn wide(&self, centred: E::Param, [scale, shift]: [E::Param; 2], at: usize) -> f64 {
        // SAFETY: the caller's promise.
        let value = |of: Source<'_, E>| unsafe { of.get(at) };
        let gate = match self.gate {
            Gate::Argument(None) => centred * scale + shift,
            Gate::Argument(Some(residual)) => centred * scale + shift + value(residual),
            Gate::Output(output) => value(output),
            Gate::Bits(gates) => gates.sign(at),
        };
        self.bend.scalar(gate, value(self.dy).to_f64())
    }

    #[inline(always)]
    fn prefetch<I: Isa>(&self, isa: I, at: usize) {
        self.dy.prefetch(isa, at);
        match self.gate {
            Gate::Argument(None) => (),
            Gate::Argument(Some(source)) | Gate::Output(source) => source.prefetch(isa, at),
            Gate::Bits(gates) => isa.prefetch(gates.address(at)),
        }
    }
}

/// `dy` where the argument of ReLU was positive: the commonest gate, known when compiled. A look at the gate in each vector splits
/// loops, so that vectors are kept in memory between.
#[derive(Clone, Copy)]
pub(crate) struct Rectified<'a, E>(Source<'a, E>);

impl<E: Element> Packs<E> for Rectified<'_, E> {
    unsafe fn packed(self, pack: &mut Pack<'_, '_, E>) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { pack.pack(self.0) })
    }
}

impl<E: Element> Upstream<E> for Rectified<'_, E> {
    #[inline(always)]
    unsafe fn at<I: Isa, const FULL: bool>(
        &self,
        isa: I,
        centred: Compute<I, E>,
        [scale, shift]: [Compute<I, E>; 2],
        at: usize,
        n: usize,
    ) -> Compute<I, E> {
        // SAFETY: the caller's promise.
        let dy = unsafe { self.0.load::<I, FULL>(isa, at, n) };
        dy.where_positive(centred.mul(scale).add(shift))
    }

    #[inline(always)]
    unsafe fn wide(&self, centred: E::Param, [scale, shift]: [E::Param; 2], at: usize) -> f64 {
        // SAFETY: the caller's promise.
        let dy = unsafe { self.0.get(at) };
        if centred * scale + shift <= E::Param::default() { 0.0 } else { dy.to_f64() }
    }

    #[inline(always)]
    fn prefetch<I: Isa>(&self, isa: I, at: usize) {
        self.0.prefetch(isa, at);
    }
}

/// The upstream gradient itself, which is the residual's; or times the scale, which is the input's where the statistics are
/// constants.
#[derive(Clone, Copy)]
pub(crate) struct Passed<'a, E: Element> {
    pub(crate) x: Source<'a, E>,
    pub(crate) upstream: Gated<'a, E>,
    pub(crate) scaled: bool,
}

impl<E: Element> Packs<E> for Passed<'_, E> {
    unsafe fn packed(self, pack: &mut Pack<'_, '_, E>) -> Self {
        // SAFETY: the caller's promise, for both.
        unsafe {
            let x = if self.upstream.recomputes() { pack.pack(self.x) } else { self.x };
            Self { x, upstream: self.upstream.packed(pack), ..self }
        }
    }
}

impl<E: Element> Map<3> for Passed<'_, E> {
    type Element = E;

    #[inline(always)]
    unsafe fn raw<I: Isa, const FULL: bool>(
        &self,
        isa: I,
        [hi, scale, shift]: &[Compute<I, E>; 3],
        at: usize,
        n: usize,
    ) -> Compute<I, E> {
        // SAFETY: the caller's promise, for both.
        unsafe {
            let x = if self.upstream.recomputes() { self.x.load::<I, FULL>(isa, at, n) } else { *hi };
            let dy = self.upstream.at::<I, FULL>(isa, x.sub(*hi), [*scale, *shift], at, n);
            if self.scaled { dy.mul(*scale) } else { dy }
        }
    }

    #[inline(always)]
    fn prefetch<I: Isa>(&self, isa: I, at: usize) {
        if self.upstream.recomputes() {
            self.x.prefetch(isa, at);
        }
        self.upstream.prefetch(isa, at);
    }
}

/// What both halves of a backward pass read.
#[derive(Clone, Copy)]
pub(crate) struct Pair<'a, E, U> {
    pub(crate) x: Source<'a, E>,
    pub(crate) upstream: U,
}

impl<E: Element, U: Upstream<E>> Packs<E> for Pair<'_, E, U> {
    unsafe fn packed(self, pack: &mut Pack<'_, '_, E>) -> Self {
        // SAFETY: the caller's promise, for both.
        unsafe { Self { x: pack.pack(self.x), upstream: self.upstream.packed(pack) } }
    }
}

impl<E: Element, U: Upstream<E>> Pair<'_, E, U> {
    #[inline(always)]
    fn ask_for<I: Isa>(&self, isa: I, at: usize) {
        self.x.prefetch(isa, at);
        self.upstream.prefetch(isa, at);
    }
}

/// `dy` and `dy * (x - hi) * inv_std`, `hi` the rounded mean; the parameters are `[hi, inv_std]` and, where the upstream
/// gradient needs them, the forward pass's `[scale, shift]`.
impl<I: Isa, E: Element, U: Upstream<E>, const K: usize> Terms<I, K> for Pair<'_, E, U> {
    const TENSORS: usize = 2;
    type Vector = Compute<I, E>;

    #[inline(always)]
    unsafe fn at<const FULL: bool>(
        &self,
        isa: I,
        params: &[Self::Vector; K],
        at: usize,
        n: usize,
    ) -> (Self::Vector, Self::Vector) {
        let (hi, inv_std) = (params[0], params[1]);
        // SAFETY: the caller's promise, for both.
        unsafe {
            let centred = self.upstream.rebuild(isa, self.x.load_or::<I, FULL>(isa, at, n, hi)).sub(hi);
            let dy = self.upstream.at::<I, FULL>(isa, centred, [params[K - 2], params[K - 1]], at, n);
            let terms = (dy, dy.mul(centred.mul(inv_std)));
            if FULL || !U::SPILLS {
                return terms;
            }
            let zero = Self::Vector::splat(isa, Default::default());
            (terms.0.first(n, zero), terms.1.first(n, zero))
        }
    }

    #[inline(always)]
    fn prefetch(&self, isa: I, at: usize) {
        self.ask_for(isa, at);
    }
}

#[inline(always)]
fn is_sound([a, b]: [f64; 2]) -> bool {
    a.is_finite() & b.is_finite()
}

/// The sums of one block of a channel, as far as it was seen.
pub(crate) type Block<I, E, const K: usize> = RunSums<I, Compute<I, E>, K>;

/// `[sum(dy), sum(dy * (x - hi) * inv_std)]` of the blocks of neighbouring channels, as [`moments::end`](super::moments::end).
///
/// # Safety
/// The runs lie inside the tensors.
#[inline(always)]
pub(crate) unsafe fn end<I: Isa, E: Element, U: Upstream<E>, const K: usize>(
    pair: Pair<'_, E, U>,
    blocks: &[Block<I, E, K>],
    (runs, plane): (Runs, usize),
) -> [Each<f64>; 2] {
    let mut values = [[0.0; BATCH]; 2];
    for (i, block) in blocks.iter().enumerate() {
        let (a, b) = block.total();
        [values[0][i], values[1][i]] = [a, b];
        if !is_sound([a, b]) {
            let elements = runs.shifted(i * plane).starts().flat_map(|start| start..start + runs.len);
            // SAFETY: the elements are those of the runs.
            [values[0][i], values[1][i]] = unsafe { in_f64(pair, block.params, elements) };
        }
    }
    values
}

/// The sums over `elements`, one after the other in f64, for what f32 does not hold.
///
/// # Safety
/// The elements lie inside the tensors.
unsafe fn in_f64<E: Element, U: Upstream<E>, const K: usize>(
    pair: Pair<'_, E, U>,
    params: [E::Param; K],
    elements: impl Iterator<Item = usize>,
) -> [f64; 2] {
    let [hi, inv_std] = [params[0], params[1]];
    elements.fold([0.0, 0.0], |[a, b], at| {
        // SAFETY: the caller's promise.
        let (x, dy) = unsafe {
            let x = pair.upstream.rebuild_one(pair.x.get(at));
            (x, pair.upstream.wide(x - hi, [params[K - 2], params[K - 1]], at))
        };
        [a + dy, b + dy * ((x.to_f64() - hi.to_f64()) * inv_std.to_f64())]
    })
}

/// `[sum(dy), sum(dy * (x - hi) * inv_std)]` of each channel of a block of rows, for the channels of
/// `block.columns`; value `k` of channel `first + i` goes to `out[k][i]`. `params` are those of [`Pair`],
/// of up to [`BATCH`] channels.
///
/// # Safety
/// The block lies inside the tensors and starts with a row.
#[inline(always)]
pub(crate) unsafe fn of_rows<I: Isa, E: Element, U: Upstream<E>, const K: usize>(
    isa: I,
    pair: Pair<'_, E, U>,
    params: impl Fn(Range<usize>) -> [Each<E::Param>; K],
    block: RowBlock,
    columns: &mut Columns<'_, E::Param>,
    out: [&mut [f64]; 2],
) {
    let channels = block.channels;
    let (first, last) = (block.columns.0, block.columns.1.min(block.channels));
    let padded = columns.wide[0].len();
    for from in (first..last).step_by(BATCH) {
        let n = BATCH.min(last - from);
        let values = params(block.base + from..block.base + from + n);
        for (k, values) in values.iter().enumerate() {
            let at = k * padded + from - first;
            copy(&mut columns.params[at..at + n], &values[..n]);
        }
    }
    for c in channels..block.period {
        for k in 0..K {
            columns.params[k * padded + c] = columns.params[k * padded + c - channels];
        }
    }
    // SAFETY: the caller's promise.
    unsafe { columns::over_rows::<_, _, _, K>(isa, &pair, block, columns) };
    let width = last - first;
    let [a, b] = out.map(|out| &mut out[..width]);
    let [wide_a, wide_b] = columns.wide.each_ref().map(|wide| &wide[..width]);
    let mut sound = true;
    for c in 0..width {
        (a[c], b[c]) = (wide_a[c], wide_b[c]);
        sound &= is_sound([a[c], b[c]]);
    }
    if sound {
        return;
    }
    for c in (0..width).filter(|&c| !is_sound([wide_a[c], wide_b[c]])) {
        let elements = (0..block.len / channels).map(|row| block.start + row * channels + first + c);
        // SAFETY: the elements are those of the channel in the block.
        [a[c], b[c]] =
            unsafe { in_f64(pair, core::array::from_fn::<_, K, _>(|k| columns.params[k * padded + c]), elements) };
    }
}

/// A channel's `[hi, inv_std, slope, dy_mean, scale, shift]`:
/// `dx = ((dy - dy_mean) * scale + shift) + ((x - hi) * inv_std) * slope`. Both means are rounded to the computed
/// type and what they lack is in `shift`, with what is added beside.
#[inline(always)]
pub(crate) fn coefficients<R: Real>(
    (hi, residue, inv_std): (R, f64, R),
    slope: f64,
    (dy_mean, scale): (f64, f64),
    beside: f64,
) -> [R; 6] {
    let rounded = R::from_f64(dy_mean);
    let shift = -(dy_mean - rounded.to_f64()) * scale - residue * inv_std.to_f64() * slope;
    [hi, inv_std, R::from_f64(slope), rounded, R::from_f64_saturating(scale), R::from_f64(shift + beside)]
}

/// `dx`. After the six coefficients comes the forward pass's shift, where the upstream gradient needs it; its scale is among
/// the six.
impl<E: Element, U: Upstream<E>, const K: usize> Map<K> for Pair<'_, E, U> {
    const TENSORS: usize = 2;
    type Element = E;

    #[inline(always)]
    unsafe fn raw<I: Isa, const FULL: bool>(
        &self,
        isa: I,
        params: &[Compute<I, E>; K],
        at: usize,
        n: usize,
    ) -> Compute<I, E> {
        let [hi, inv_std, slope, dy_mean, scale, shift] =
            [params[0], params[1], params[2], params[3], params[4], params[5]];
        // SAFETY: the caller's promise, for both.
        let (centred, dy) = unsafe {
            let centred = self.upstream.rebuild(isa, self.x.load::<I, FULL>(isa, at, n)).sub(hi);
            (centred, self.upstream.at::<I, FULL>(isa, centred, [scale, params[K - 1]], at, n))
        };
        dy.sub(dy_mean).mul(scale).add(shift).add(centred.mul(inv_std).mul(slope))
    }

    #[inline(always)]
    fn prefetch<I: Isa>(&self, isa: I, at: usize) {
        self.ask_for(isa, at);
    }
}
