//! The sums that the gradients of gamma and beta are, and the gradient of the input.
//!
//! With `xhat = (x - mean) * inv_std` over `m` values (Ioffe & Szegedy 2015, section 3):
//!
//! ```text
//! dbeta = sum(dy)      dgamma = sum(dy * xhat)
//! dx = gamma * inv_std * ((dy - dbeta/m) - xhat * dgamma/m)
//! ```

use core::marker::PhantomData;

use super::map::Map;
use super::sums::{self, Columns, RowBlock, RunSums, Terms};
use crate::element::{Element, Real};
use crate::grid::{Band, Runs};
use crate::simd::{Compute, Isa, Vector};

/// `dy` and `dy * (x - hi) * inv_std`, `hi` the rounded mean.
struct Weighted<E> {
    x: *const E,
    dy: *const E,
}

impl<I: Isa, E: Element> Terms<I, 2> for Weighted<E> {
    type Vector = Compute<I, E>;

    #[inline(always)]
    unsafe fn at<const FULL: bool>(
        &self,
        isa: I,
        [hi, inv_std]: &[Self::Vector; 2],
        at: usize,
        n: usize,
    ) -> (Self::Vector, Self::Vector) {
        // SAFETY: the caller's promise.
        let (x, dy) = unsafe {
            if FULL {
                (E::load(isa, self.x.add(at)), E::load(isa, self.dy.add(at)))
            } else {
                let zero = Compute::<I, E>::splat(isa, Default::default());
                (E::load_first(isa, self.x.add(at), n, *hi), E::load_first(isa, self.dy.add(at), n, zero))
            }
        };
        (dy, dy.mul(x.sub(*hi).mul(*inv_std)))
    }

    #[inline(always)]
    fn prefetch(&self, isa: I, at: usize) {
        isa.prefetch(self.x.wrapping_add(at).cast());
        isa.prefetch(self.dy.wrapping_add(at).cast());
    }
}

#[inline(always)]
fn is_sound([a, b]: [f64; 2]) -> bool {
    a.is_finite() & b.is_finite()
}

/// The sums of one block of a channel, as far as it was seen; the parameters are `[hi, inv_std]`.
pub(crate) type Block<I, E> = RunSums<I, Compute<I, E>, 2>;

/// Adds a band, see [`RunSums::add`].
///
/// # Safety
/// The band lies inside the tensors at `x` and `dy`.
#[inline(always)]
pub(crate) unsafe fn add<I: Isa, E: Element>(
    isa: I,
    x: *const E,
    dy: *const E,
    block: &mut Block<I, E>,
    band: Band,
    ahead: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { block.add(isa, &Weighted { x, dy }, band, ahead) }
}

/// `[sum(dy), sum(dy * (x - hi) * inv_std)]` of a block whose runs were all added.
///
/// # Safety
/// The runs lie inside the tensors at `x` and `dy`.
#[inline(always)]
pub(crate) unsafe fn end<I: Isa, E: Element>(x: *const E, dy: *const E, block: &Block<I, E>, runs: Runs) -> [f64; 2] {
    let (a, b) = block.total();
    if is_sound([a, b]) {
        return [a, b];
    }
    let elements = runs.starts().flat_map(|start| start..start + runs.len);
    // SAFETY: the elements are those of the runs.
    unsafe { in_f64(x, dy, block.params, elements) }
}

/// The sums over `elements`, one after the other in f64, for what f32 does not hold.
///
/// # Safety
/// The elements lie inside the tensors at `x` and `dy`.
unsafe fn in_f64<E: Element>(
    x: *const E,
    dy: *const E,
    params: [E::Param; 2],
    elements: impl Iterator<Item = usize>,
) -> [f64; 2] {
    let [hi, inv_std] = params.map(Real::to_f64);
    elements.fold([0.0, 0.0], |[a, b], at| {
        // SAFETY: the caller's promise.
        let (x, dy) = unsafe { (x.add(at).read().to_param().to_f64(), dy.add(at).read().to_param().to_f64()) };
        [a + dy, b + dy * ((x - hi) * inv_std)]
    })
}

/// `[sum(dy), sum(dy * (x - hi) * inv_std)]` of each channel of a block of rows, for the channels of
/// `block.columns`; value `k` of channel `first + i` goes to `out[k][i]`. `params(c)` are `[hi, inv_std]`.
///
/// # Safety
/// The block lies inside the tensors at `x` and `dy` and starts with a row.
#[inline(always)]
pub(crate) unsafe fn of_rows<I: Isa, E: Element>(
    isa: I,
    x: *const E,
    dy: *const E,
    params: impl Fn(usize) -> [E::Param; 2],
    block: RowBlock,
    columns: &mut Columns<'_, E::Param>,
    out: [&mut [f64]; 2],
) {
    let channels = block.channels;
    let (first, last) = (block.columns.0, block.columns.1.min(block.channels));
    let padded = columns.wide[0].len();
    for c in first..last {
        [columns.params[c - first], columns.params[padded + c - first]] = params(c);
    }
    for c in channels..block.period {
        columns.params[c] = columns.params[c - channels];
        columns.params[padded + c] = columns.params[padded + c - channels];
    }
    // SAFETY: the caller's promise.
    unsafe { sums::over_rows(isa, &Weighted { x, dy }, block, columns) };
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
        [a[c], b[c]] = unsafe { in_f64(x, dy, params(first + c), elements) };
    }
}

/// A channel's `[hi, inv_std, slope, dy_mean, scale, shift]`: with `scale = gamma * inv_std`,
/// `dx = ((dy - dy_mean) * scale + shift) + ((x - hi) * inv_std) * slope`. Both means are rounded to the computed
/// type and what they lack is in `shift`.
#[inline(always)]
pub(crate) fn coefficients<R: Real>(
    mean: R,
    residue: R,
    inv_std: R,
    gamma: f64,
    [dy, dy_xhat]: [f64; 2],
    count: f64,
) -> [R; 6] {
    let scale = gamma * inv_std.to_f64();
    let slope = -scale * (dy_xhat / count);
    let dy_mean = dy / count;
    let rounded = R::from_f64(dy_mean);
    let shift = -(dy_mean - rounded.to_f64()) * scale - residue.to_f64() * inv_std.to_f64() * slope;
    [mean, inv_std, R::from_f64(slope), rounded, R::from_f64_saturating(scale), R::from_f64(shift)]
}

/// `dx = dy * scale`, where the statistics are constants.
pub(crate) struct Scaled<'a, E> {
    dy: *const E,
    life: PhantomData<&'a [E]>,
}

impl<E> Scaled<'_, E> {
    pub(crate) fn new(dy: *const E) -> Self {
        Self { dy, life: PhantomData }
    }
}

impl<I: Isa, E: Element> Map<I, 1> for Scaled<'_, E> {
    type Element = E;

    #[inline(always)]
    unsafe fn at<const FULL: bool>(&self, isa: I, [scale]: &[Compute<I, E>; 1], at: usize, n: usize) -> Compute<I, E> {
        // SAFETY: the caller's promise.
        let dy = unsafe {
            if FULL { E::load(isa, self.dy.add(at)) } else { E::load_first(isa, self.dy.add(at), n, *scale) }
        };
        dy.mul(*scale)
    }

    #[inline(always)]
    fn prefetch(&self, isa: I, at: usize) {
        isa.prefetch(self.dy.wrapping_add(at).cast());
    }
}

/// `dx` from `x` and `dy`.
pub(crate) struct InputGradient<'a, E> {
    x: *const E,
    dy: *const E,
    life: PhantomData<&'a [E]>,
}

impl<E> InputGradient<'_, E> {
    pub(crate) fn new(x: *const E, dy: *const E) -> Self {
        Self { x, dy, life: PhantomData }
    }
}

impl<I: Isa, E: Element> Map<I, 6> for InputGradient<'_, E> {
    type Element = E;

    #[inline(always)]
    unsafe fn at<const FULL: bool>(
        &self,
        isa: I,
        [hi, inv_std, slope, dy_mean, scale, shift]: &[Compute<I, E>; 6],
        at: usize,
        n: usize,
    ) -> Compute<I, E> {
        // SAFETY: the caller's promise.
        let (x, dy) = unsafe {
            if FULL {
                (E::load(isa, self.x.add(at)), E::load(isa, self.dy.add(at)))
            } else {
                (E::load_first(isa, self.x.add(at), n, *hi), E::load_first(isa, self.dy.add(at), n, *dy_mean))
            }
        };
        let xhat = x.sub(*hi).mul(*inv_std);
        dy.sub(*dy_mean).mul(*scale).add(*shift).add(xhat.mul(*slope))
    }

    #[inline(always)]
    fn prefetch(&self, isa: I, at: usize) {
        isa.prefetch(self.x.wrapping_add(at).cast());
        isa.prefetch(self.dy.wrapping_add(at).cast());
    }
}
