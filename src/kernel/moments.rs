//! Moments of a block in one pass: sums of `x - shift` and of its square, around a shift taken from the block.
//!
//! `mean = shift + s/n` and `m2 = q - s*s/n` (Chan, Golub & LeVeque, "Algorithms for computing the sample
//! variance", 1983, the shifted form). Where the sums show that the shift was bad or that squares left the range
//! of f32, the block, still in cache, is summed again in f64.

use core::marker::PhantomData;

use super::sums::{self, Columns, RowBlock, RunSums, Terms};
use crate::element::{Element, Real};
use crate::grid::{Band, Runs};
use crate::moments::two_sum;
use crate::simd::{Compute, Isa, Load, Native, Vector, Widened};

/// Places of a block that its shift is made of.
pub(crate) const SAMPLES: usize = 4;

/// `x - shift` and its square.
struct Deviations<L, E> {
    x: *const E,
    load: PhantomData<L>,
}

impl<I: Isa, E: Element, L: Load<I, Element = E>> Terms<I, 1> for Deviations<L, E> {
    type Vector = L::Vector;

    #[inline(always)]
    unsafe fn at<const FULL: bool>(
        &self,
        isa: I,
        [shift]: &[L::Vector; 1],
        at: usize,
        n: usize,
    ) -> (L::Vector, L::Vector) {
        // SAFETY: the caller's promise. Lanes filled with the shift deviate by zero.
        let x =
            unsafe { if FULL { L::load(isa, self.x.add(at)) } else { L::load_first(isa, self.x.add(at), n, *shift) } };
        let d = x.sub(*shift);
        (d, d.mul(d))
    }

    #[inline(always)]
    fn prefetch(&self, isa: I, at: usize) {
        isa.prefetch(self.x.wrapping_add(at).cast());
    }
}

/// Sums of `n` deviations from a shift and of their squares.
#[derive(Clone, Copy)]
struct Shifted {
    shift: f64,
    n: f64,
    s: f64,
    q: f64,
}

impl Shifted {
    /// Whether the shift lies within 1.4 standard deviations of the mean, so that `q - s*s/n` cancels little, and
    /// the squares kept their bits. A NaN or an infinity says no.
    #[inline(always)]
    fn is_sound<R: Real>(&self) -> bool {
        let square = self.s * (self.s / self.n);
        square <= 2.0 * (self.q - square) && self.q >= self.n * R::TINY_SQUARE && self.q < f64::INFINITY
    }

    /// The mean found, where another pass in f64 around it would do better.
    #[inline(always)]
    fn better_shift(&self) -> Option<f64> {
        let mean = self.shift + self.s / self.n;
        (!self.is_sound::<f64>() && mean.is_finite()).then_some(mean)
    }

    /// `[mean, residue, m2]`
    #[inline(always)]
    fn finish(&self) -> [f64; 3] {
        let offset = self.s / self.n;
        let (mean, residue) = two_sum(self.shift, offset);
        let m2 = self.q - self.s * offset;
        // The comparison keeps a NaN.
        [mean, residue, if m2 < 0.0 { 0.0 } else { m2 }]
    }
}

/// The mean of four values, unless it overflows.
#[inline(always)]
fn mean_of_four<R: Real>(v: [R; SAMPLES]) -> R {
    let mean = ((v[0] + v[1]) + (v[2] + v[3])) * R::from_f64(0.25);
    if mean.to_f64().is_finite() { mean } else { v[0] }
}

/// A shift for a block of a channel: the mean of four vectors spread over it, or of four values where runs are shorter
/// than a vector. Neighbours resemble each other, so a sample of the beginning would not do.
///
/// # Safety
/// The runs lie inside the tensor at `x` and are not empty.
#[inline(always)]
unsafe fn shift_of_runs<I: Isa, E: Element>(isa: I, x: *const E, runs: Runs) -> E::Param {
    let lanes = Compute::<I, E>::LANES;
    let places = runs.spread::<SAMPLES>(lanes.min(runs.len));
    let mut values = [E::Param::default(); SAMPLES];
    for (value, place) in values.iter_mut().zip(places) {
        // SAFETY: inside a run.
        *value = unsafe { x.add(place).read().to_param() };
    }
    if runs.len < lanes {
        return mean_of_four(values);
    }
    let mut vectors = [Compute::<I, E>::splat(isa, Default::default()); SAMPLES];
    for (vector, place) in vectors.iter_mut().zip(places) {
        // SAFETY: a whole vector from each place lies inside its run.
        *vector = unsafe { E::load(isa, x.add(place)) };
    }
    let sum = Compute::<I, E>::fold(sums::tree(vectors).widen_onto(Compute::<I, E>::no_sums(isa)));
    let mean = sum * (1.0 / (SAMPLES * lanes) as f64);
    if mean.is_finite() { E::Param::from_f64(mean) } else { values[0] }
}

/// The moments of one block of a channel, as far as it was seen.
pub(crate) type Block<I, E> = RunSums<I, Compute<I, E>, 1>;

/// Starts a block.
///
/// # Safety
/// The runs lie inside the tensor at `x` and are not empty.
#[inline(always)]
pub(crate) unsafe fn begin<I: Isa, E: Element>(isa: I, x: *const E, runs: Runs) -> Block<I, E> {
    // SAFETY: the caller's promise.
    RunSums::new(isa, [unsafe { shift_of_runs(isa, x, runs) }])
}

/// Adds a band, see [`RunSums::add`].
///
/// # Safety
/// The band lies inside the tensor at `x`.
#[inline(always)]
pub(crate) unsafe fn add<I: Isa, E: Element>(isa: I, x: *const E, block: &mut Block<I, E>, band: Band, ahead: usize) {
    // SAFETY: the caller's promise.
    unsafe { block.add(isa, &Deviations { x, load: PhantomData::<Native<E>> }, band, ahead) }
}

/// `[mean, residue, m2]` of a block whose runs were all added.
///
/// # Safety
/// The runs lie inside the tensor at `x` and are not empty.
#[inline(always)]
pub(crate) unsafe fn end<I: Isa, E: Element>(isa: I, x: *const E, block: &Block<I, E>, runs: Runs) -> [f64; 3] {
    let (s, q) = block.total();
    let shifted = Shifted { shift: block.params[0].to_f64(), n: runs.size() as f64, s, q };
    if shifted.is_sound::<E::Param>() {
        return shifted.finish();
    }
    // SAFETY: the caller's promise.
    unsafe { in_f64(isa, x, shifted, runs) }
}

/// `[mean, residue, m2]` of a block, summed again in f64.
///
/// # Safety
/// The runs lie inside the tensor at `x`.
#[cold]
#[inline(never)]
unsafe fn in_f64<I: Isa, E: Element>(isa: I, x: *const E, shifted: Shifted, runs: Runs) -> [f64; 3] {
    let terms = Deviations { x, load: PhantomData::<Widened<E>> };
    let mut wide = shifted;
    let mut again = Some(shifted.shift);
    // Once around the same shift, and once more around the mean if that was far off.
    for _ in 0..2 {
        let Some(shift) = again else { break };
        // SAFETY: the caller's promise.
        let (s, q) = unsafe { sums::over_runs(isa, &terms, [shift], runs) };
        wide = Shifted { shift, s, q, ..shifted };
        again = wide.better_shift();
    }
    wide.finish()
}

/// `[mean, residue, m2]` of each channel of a block of rows, for the channels of `block.columns`; value `k` of
/// channel `first + i` goes to `out[k][i]`.
///
/// # Safety
/// The block lies inside the tensor at `x`, starts with a row and is not empty.
#[inline(always)]
pub(crate) unsafe fn of_rows<I: Isa, E: Element>(
    isa: I,
    x: *const E,
    block: RowBlock,
    columns: &mut Columns<'_, E::Param>,
    out: [&mut [f64]; 3],
) {
    let channels = block.channels;
    let rows = block.len / channels;
    let n = rows as f64;
    let (first, last) = (block.columns.0, block.columns.1.min(block.channels));
    // SAFETY: row `r` and channel `c` lie inside the block.
    let value = |r: usize, c: usize| unsafe { x.add(block.start + r * channels + c).read().to_param() };
    for c in first..last {
        let at = |i: usize| value(i * rows / SAMPLES, c);
        columns.params[c - first] = mean_of_four([at(0), at(1), at(2), at(3)]);
    }
    for c in channels..block.period {
        columns.params[c] = columns.params[c - channels];
    }
    let terms = Deviations { x, load: PhantomData::<Native<E>> };
    // SAFETY: the caller's promise.
    unsafe { sums::over_rows(isa, &terms, block, columns) };
    let shifted = |columns: &Columns<'_, E::Param>, c: usize| Shifted {
        shift: columns.params[c - first].to_f64(),
        n,
        s: columns.wide[0][c - first],
        q: columns.wide[1][c - first],
    };
    let [mean, residue, m2] = out;
    let mut sound = true;
    for c in first..last {
        let shifted = shifted(columns, c);
        sound &= shifted.is_sound::<E::Param>();
        [mean[c - first], residue[c - first], m2[c - first]] = shifted.finish();
    }
    if sound {
        return;
    }
    for c in first..last {
        let shifted = shifted(columns, c);
        if !shifted.is_sound::<E::Param>() {
            let mut wide = shifted;
            let mut again = Some(shifted.shift);
            for _ in 0..2 {
                let Some(shift) = again else { break };
                let (mut s, mut q) = (0.0, 0.0);
                for r in 0..rows {
                    let d = value(r, c).to_f64() - shift;
                    s += d;
                    q += d * d;
                }
                wide = Shifted { shift, n, s, q };
                again = wide.better_shift();
            }
            [mean[c - first], residue[c - first], m2[c - first]] = wide.finish();
        }
    }
}
