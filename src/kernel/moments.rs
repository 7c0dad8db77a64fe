//! Moments of a block in one pass: sums of `x - shift` and of its square, around a shift taken from the block.
//!
//! `mean = shift + s/n` and `m2 = q - s*s/n` (Chan, Golub & LeVeque, "Algorithms for computing the sample
//! variance", 1983, the shifted form). The block, still in cache, is summed again where the sums show that squares
//! underflowed (enlarged by a power of two), overflowed or were taken around a bad shift (in f64). Where squares are likely to
//! underflow, deviations are enlarged at once; the results are the same.

use core::marker::PhantomData;

use super::columns::{self, Columns, RowBlock};
use super::sums::{self, Beside, RunSums, Terms};
use crate::element::{Element, Real};
use crate::grid::{Band, Runs};
use crate::moments::two_sum;
use crate::pass::{BATCH, Each};
use crate::simd::{Compute, Isa, Load, Native, Part, Vector, Widened};

/// Places of a block that its shift is made of.
pub(crate) const SAMPLES: usize = 4;

/// Rows of a block that its shifts are made of.
const ROW_SAMPLES: usize = 8;
/// In place of m2: to be summed again in f64, or first with enlarged deviations.
const AGAIN: f64 = -1.0;
const TINY: f64 = -2.0;
/// Channels of rows that are summed again together: a line of memory, read for one, has them all.
const TILE: usize = 16;

/// `(x - shift) * scale` and its square; without a scale if `PLAIN`.
struct Deviations<L, E: Element, const PLAIN: bool> {
    x: *const E,
    scale: E::Param,
    load: PhantomData<L>,
}

/// `x - shift` and its square.
fn deviations<E: Element>(x: *const E) -> Deviations<Native<E>, E, true> {
    Deviations { x, scale: E::Param::from_f64(1.0), load: PhantomData }
}

/// Both scaled: for values whose squares may underflow by [`Real::ENLARGED`].
fn scaled<E: Element>(x: *const E, scale: f64) -> Deviations<Native<E>, E, false> {
    Deviations { x, scale: E::Param::from_f64(scale), load: PhantomData }
}

/// `x - shift` and its square in f64.
fn widened<E: Element>(x: *const E) -> Deviations<Widened<E>, E, true> {
    Deviations { x, scale: E::Param::from_f64(1.0), load: PhantomData }
}

impl<I: Isa, E: Element, L: Load<I, Element = E>, const PLAIN: bool> Terms<I, 1> for Deviations<L, E, PLAIN>
where
    <L::Vector as Vector<I>>::Scalar: Real,
{
    const TENSORS: usize = 1;
    const COMMON: bool = PLAIN;
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
        let d = if PLAIN { d } else { d.mul(L::Vector::splat(isa, Real::from_f64(self.scale.to_f64()))) };
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
        // No branches, so that channels of rows are judged several at a time.
        (square <= 2.0 * (self.q - square)) & (self.q >= self.n * R::TINY_SQUARE) & (self.q < f64::INFINITY)
    }

    /// Whether bits of the squares were lost to underflow, and to nothing else.
    #[inline(always)]
    fn is_tiny<R: Real>(&self) -> bool {
        self.q < self.n * R::TINY_SQUARE
    }

    /// Where these are of enlarged deviations, whether [`Shifted::is_tiny`] would surely be true of plain ones: those squares would
    /// be the same but for roundings and 2^-149 each.
    #[inline(always)]
    fn was_tiny<R: Real>(&self) -> bool {
        self.q < self.n * (0.5 * R::TINY_SQUARE * R::ENLARGED * R::ENLARGED)
    }

    /// The sums of deviations, where these are of enlarged ones, if they can be trusted.
    #[inline(always)]
    fn shrunk<R: Real>(&self) -> Option<Self> {
        let scale = 1.0 / R::ENLARGED;
        self.is_sound::<f64>().then_some(Shifted { s: self.s * scale, q: self.q * scale * scale, ..*self })
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
        // Squares of finite values that overflow make an infinity, not a NaN. The comparison below keeps a NaN.
        let m2 = if (self.q == f64::INFINITY) & (self.s.abs() < f64::INFINITY) { self.q } else { m2 };
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

/// Asks the caches for the shift's places.
#[inline(always)]
pub(crate) fn foresee<I: Isa, E: Element>(isa: I, x: *const E, runs: Runs) {
    let width = Compute::<I, E>::LANES.min(runs.len);
    for place in runs.spread::<SAMPLES>(width) {
        isa.prefetch(x.wrapping_add(place).cast());
        isa.prefetch(x.wrapping_add(place + width - 1).cast());
    }
}

/// The moments of one block of a channel, as far as it was seen.
#[derive(Clone, Copy)]
pub(crate) struct Block<I: Isa, E: Element> {
    sums: RunSums<I, Compute<I, E>, 1>,
    /// The channel, of which the block before tells something.
    channel: usize,
    /// Whether deviations are enlarged, since those of the block before had to be or the shift is tiny. Tiny squares take several
    /// times as long, and then all is summed again.
    enlarged: bool,
}

impl<I: Isa, E: Element> Block<I, E> {
    /// One that was not started.
    #[inline(always)]
    pub(crate) fn blank(isa: I) -> Self {
        Self { sums: RunSums::new(isa, Default::default()), channel: 0, enlarged: false }
    }

    /// Starts the next block, of the same channel or another.
    ///
    /// # Safety
    /// The runs lie inside the tensor at `x` and are not empty.
    #[inline(always)]
    pub(crate) unsafe fn begin(&mut self, isa: I, x: *const E, channel: usize, runs: Runs) {
        // SAFETY: the caller's promise.
        let shift = unsafe { shift_of_runs(isa, x, runs) };
        let square = shift.to_f64() * shift.to_f64();
        let tiny = (square > 0.0) & (square < E::Param::TINY_SQUARE);
        let enlarged = tiny | (self.enlarged & (self.channel == channel));
        *self = Self { sums: RunSums::new(isa, [shift]), channel, enlarged };
    }
}

/// Adds a band to the block of the first of some neighbouring channels, and those each `plane` further on to others, see
/// [`RunSums::add`].
///
/// # Safety
/// The bands lie inside the tensor at `x`.
#[inline(always)]
pub(crate) unsafe fn add<I: Isa, E: Element>(
    isa: I,
    x: *const E,
    blocks: &mut [Block<I, E>],
    (band, plane): (Band, usize),
    ahead: usize,
) {
    let mut enlarged = false;
    for block in &*blocks {
        enlarged |= block.enlarged;
    }
    if enlarged {
        return isa.call(Scaled { x, blocks, first: (band, plane), ahead });
    }
    for (i, block) in blocks.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { block.sums.add(isa, &deviations(x), band.shifted(i * plane), ahead) };
    }
}

/// [`add`] where deviations are enlarged, or not. Rare, so compiled once, apart from what uses it.
struct Scaled<'b, I: Isa, E: Element> {
    x: *const E,
    blocks: &'b mut [Block<I, E>],
    first: (Band, usize),
    ahead: usize,
}

impl<I: Isa, E: Element> Part<I> for Scaled<'_, I, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, isa: I) {
        let Self { x, blocks, first: (band, plane), ahead } = self;
        for (i, block) in blocks.iter_mut().enumerate() {
            let scale = if block.enlarged { E::Param::ENLARGED } else { 1.0 };
            // SAFETY: the promise of who made this.
            unsafe { block.sums.add(isa, &scaled(x, scale), band.shifted(i * plane), ahead) };
        }
    }
}

/// Adds groups of a band, see [`RunSums::add_beside`].
///
/// # Safety
/// As [`add`].
#[inline(always)]
pub(crate) unsafe fn add_beside<I: Isa, E: Element>(
    isa: I,
    x: *const E,
    block: &mut Block<I, E>,
    (band, groups): (Band, usize),
    ahead: usize,
    mut beside: impl Beside,
) {
    // SAFETY: the caller's promise, for all.
    unsafe {
        if !block.enlarged {
            return block.sums.add_beside(isa, &deviations(x), (band, groups), ahead, beside);
        }
        let first = (Band { len: groups * Compute::<I, E>::LANES, ..band }, 0);
        isa.call(Scaled { x, blocks: core::slice::from_mut(block), first, ahead });
        for _ in 0..groups {
            beside.step();
        }
    }
}

/// `[mean, residue, m2]` of the blocks of neighbouring channels whose runs were all added: those of the first one, and each `plane`
/// further on; value `k` of the `i`-th is `[k][i]`. At most [`BATCH`].
///
/// # Safety
/// The runs lie inside the tensor at `x` and are not empty.
#[inline(always)]
pub(crate) unsafe fn end<I: Isa, E: Element>(
    isa: I,
    x: *const E,
    blocks: &mut [Block<I, E>],
    (runs, plane): (Runs, usize),
) -> [Each<f64>; 3] {
    let n = runs.size() as f64;
    let mut sums = [[0.0; BATCH]; 3];
    let mut sound = true;
    for (i, block) in blocks.iter().enumerate() {
        let (s, q) = block.sums.total();
        [sums[0][i], sums[1][i], sums[2][i]] = [block.sums.params[0].to_f64(), s, q];
        sound &= !block.enlarged;
    }
    let shifted = |i: usize| Shifted { shift: sums[0][i], n, s: sums[1][i], q: sums[2][i] };
    let [mut mean, mut residue, mut m2] = [[0.0; BATCH]; 3];
    // No branches, so that channels are judged several at a time.
    for (i, mean) in mean[..blocks.len()].iter_mut().enumerate() {
        [*mean, residue[i], m2[i]] = shifted(i).finish();
        sound &= shifted(i).is_sound::<E::Param>();
    }
    if !sound {
        for (i, block) in blocks.iter_mut().enumerate() {
            if block.enlarged || !shifted(i).is_sound::<E::Param>() {
                let runs = runs.shifted(i * plane);
                let again = Again { x, block: *block, shifted: shifted(i), runs };
                ([mean[i], residue[i], m2[i]], block.enlarged) = isa.call(again);
            }
        }
    }
    [mean, residue, m2]
}

/// `[mean, residue, m2]` of a block, summed again where it must be: enlarged if its squares are tiny, plain if they were enlarged and
/// are not, else in f64; and whether enlarged sums did. The runs lie inside the tensor at `x`. Rare, so compiled once, apart from what
/// uses it.
struct Again<I: Isa, E: Element> {
    x: *const E,
    block: Block<I, E>,
    shifted: Shifted,
    runs: Runs,
}

impl<I: Isa, E: Element> Part<I> for Again<I, E> {
    type Output = ([f64; 3], bool);
    #[inline(always)]
    fn run(mut self, isa: I) -> Self::Output {
        if self.block.enlarged && !self.shifted.was_tiny::<E::Param>() {
            self.sum(isa, false);
            if self.shifted.is_sound::<E::Param>() {
                return (self.shifted.finish(), false);
            }
        }
        if !self.block.enlarged && self.shifted.is_tiny::<E::Param>() {
            self.sum(isa, true);
        }
        if self.block.enlarged
            && let Some(shrunk) = self.shifted.shrunk::<E::Param>()
        {
            return (shrunk.finish(), true);
        }
        // SAFETY: the promise of who made this.
        (unsafe { in_f64(isa, self.x, self.shifted, self.runs) }, false)
    }
}

impl<I: Isa, E: Element> Again<I, E> {
    /// Sums all again, `enlarged` or not.
    #[inline(always)]
    fn sum(&mut self, isa: I, enlarged: bool) {
        let Self { x, block, shifted, runs } = self;
        *block = Block { sums: RunSums::new(isa, block.sums.params), enlarged, ..*block };
        for band in runs.bands() {
            isa.call(Scaled { x: *x, blocks: core::slice::from_mut(block), first: (band, 0), ahead: 0 });
        }
        (shifted.s, shifted.q) = block.sums.total();
    }
}

/// `[mean, residue, m2]` of a block, summed again in f64.
///
/// # Safety
/// The runs lie inside the tensor at `x`.
#[inline(always)]
unsafe fn in_f64<I: Isa, E: Element>(isa: I, x: *const E, shifted: Shifted, runs: Runs) -> [f64; 3] {
    let terms = widened(x);
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

/// Shifts for the channels of a block of rows: the mean of eight rows spread over it, one value each, so that hardly any
/// channel is summed twice.
///
/// # Safety
/// As [`of_rows`]; `shifts` are as long as the arrays of its columns.
#[inline(always)]
unsafe fn shifts_of_rows<I: Isa, E: Element>(isa: I, x: *const E, block: RowBlock, shifts: &mut [E::Param]) {
    let lanes = Compute::<I, E>::LANES;
    let rows = block.len / block.channels;
    let (first, last) = (block.columns.0, block.columns.1.min(block.channels));
    let zero = Compute::<I, E>::splat(isa, Default::default());
    let share = Compute::<I, E>::splat(isa, E::Param::from_f64(1.0 / ROW_SAMPLES as f64));
    assert!((last - first).next_multiple_of(lanes) <= shifts.len());
    for c in (first..last).step_by(lanes) {
        let mut samples = [zero; ROW_SAMPLES];
        for (i, sample) in samples.iter_mut().enumerate() {
            // SAFETY: up to a vector of a row of the block.
            unsafe {
                let from = x.add(block.start + i * rows / ROW_SAMPLES * block.channels + c);
                *sample = if c + lanes <= last { E::load(isa, from) } else { E::load_first(isa, from, last - c, zero) };
            }
        }
        let [s0, s1, s2, s3, s4, s5, s6, s7] = samples;
        let sum = sums::tree([s0, s1, s2, s3]).add(sums::tree([s4, s5, s6, s7]));
        // SAFETY: inside the array, by the assertion.
        unsafe { sum.mul(share).store(shifts.as_mut_ptr().add(c - first)) };
    }
}

/// The sums of enlarged deviations for each channel of a block of rows, see [`columns::over_rows`]. Rare, so compiled apart.
struct EnlargedRows<'b, 'a, E: Element> {
    x: *const E,
    block: RowBlock,
    columns: &'b mut Columns<'a, E::Param>,
}

impl<I: Isa, E: Element> Part<I> for EnlargedRows<'_, '_, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, isa: I) {
        // SAFETY: the promise of who made this.
        unsafe { columns::over_rows(isa, &scaled(self.x, E::Param::ENLARGED), self.block, self.columns) };
    }
}

/// The first `n` elements from `x`, up to [`TILE`], in f64, and zeros.
///
/// # Safety
/// `n` elements can be read from `x`.
#[inline(always)]
unsafe fn tile_of<I: Isa, E: Element>(isa: I, x: *const E, n: usize) -> [f64; TILE] {
    let lanes = Compute::<I, E>::LANES;
    let zero = Compute::<I, E>::splat(isa, Default::default());
    let mut tile = [E::Param::default(); TILE];
    for from in (0..n).step_by(lanes) {
        // SAFETY: the caller's promise; a vector lies inside the tile, whose length is a multiple of one.
        unsafe {
            let at = x.add(from);
            let vector = if from + lanes <= n { E::load(isa, at) } else { E::load_first(isa, at, n - from, zero) };
            vector.store(tile.as_mut_ptr().add(from));
        }
    }
    tile.map(Real::to_f64)
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
    // SAFETY: the caller's promise.
    unsafe { shifts_of_rows(isa, x, block, columns.params) };
    let width = last - first;
    for (c, shift) in columns.params[..width].iter_mut().enumerate() {
        if !shift.to_f64().is_finite() {
            *shift = value(0, first + c);
        }
    }
    let (mut tiny, mut nonzero) = (true, false);
    for shift in &columns.params[..width] {
        let square = shift.to_f64() * shift.to_f64();
        (tiny, nonzero) = (tiny & (square < E::Param::TINY_SQUARE), nonzero | (square > 0.0));
    }
    columns.enlarged |= tiny & nonzero;
    for c in channels..block.period {
        columns.params[c] = columns.params[c - channels];
    }
    let [mean, residue, m2] = out.map(|out| &mut out[..width]);
    let shifted = |columns: &Columns<'_, E::Param>, c: usize| {
        let [s, q] = columns.wide.each_ref().map(|wide| wide[c]);
        Shifted { shift: columns.params[c].to_f64(), n, s, q }
    };
    if columns.enlarged {
        isa.call(EnlargedRows { x, block, columns });
        for c in 0..width {
            let shifted = shifted(columns, c);
            let shrunk = if shifted.was_tiny::<E::Param>() { shifted.shrunk::<E::Param>() } else { None };
            columns.enlarged &= shrunk.is_some();
            [mean[c], residue[c], m2[c]] = shrunk.unwrap_or(shifted).finish();
        }
        if columns.enlarged {
            return;
        }
    }
    // SAFETY: the caller's promise.
    unsafe { columns::over_rows(isa, &deviations(x), block, columns) };
    let (mut sound, mut tiny) = (true, false);
    for c in 0..width {
        let shifted = shifted(columns, c);
        let (is_sound, is_tiny) = (shifted.is_sound::<E::Param>(), shifted.is_tiny::<E::Param>());
        (sound, tiny) = (sound & is_sound, tiny | is_tiny);
        [mean[c], residue[c], m2[c]] = shifted.finish();
        m2[c] = if is_sound { m2[c] } else { [AGAIN, TINY][usize::from(is_tiny)] };
    }
    if sound {
        return;
    }
    if tiny {
        isa.call(EnlargedRows { x, block, columns });
        columns.enlarged = true;
        for c in 0..width {
            let mut shrunk = None;
            if m2[c] == TINY {
                m2[c] = AGAIN;
                shrunk = shifted(columns, c).shrunk::<E::Param>();
            }
            match shrunk {
                Some(shrunk) => [mean[c], residue[c], m2[c]] = shrunk.finish(),
                None => columns.enlarged = false,
            }
        }
    }
    for from in (0..width).step_by(TILE) {
        let tile = from..(from + TILE).min(width);
        // The results of the others stay.
        let mut again: [Option<f64>; TILE] = core::array::from_fn(|i| {
            let c = from + i;
            (c < width && m2[c] == AGAIN).then(|| columns.params[c].to_f64())
        });
        // Once around the same shift, and once more around the mean if that was far off.
        for _ in 0..2 {
            if again.iter().all(Option::is_none) {
                break;
            }
            let shift = again.map(|shift| shift.unwrap_or(0.0));
            let (mut s, mut q) = ([0.0; TILE], [0.0; TILE]);
            for r in 0..rows {
                // SAFETY: up to a tile of a row of the block.
                let x = unsafe { tile_of::<I, E>(isa, x.add(block.start + r * channels + first + from), tile.len()) };
                for i in 0..TILE {
                    let d = x[i] - shift[i];
                    s[i] += d;
                    q[i] += d * d;
                }
            }
            for c in tile.clone() {
                let i = c - from;
                if again[i].is_some() {
                    let wide = Shifted { shift: shift[i], n, s: s[i], q: q[i] };
                    [mean[c], residue[c], m2[c]] = wide.finish();
                    again[i] = wide.better_shift();
                }
            }
        }
    }
}
