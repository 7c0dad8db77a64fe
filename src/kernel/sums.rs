//! Sums of two terms per element, over the runs of a channel or over rows of channels, in one fixed order.
//!
//! Four vectors are added as a tree, `(v0 + v1) + (v2 + v3)`, to one accumulator; after four such groups the
//! accumulator is widened and added to a sum in f64. So a chain of roundings in f32 is at most six additions long,
//! and a sum of equal values hardly rounds at all. Missing vectors and lanes count as zero.

use crate::grid::{BAND, Band, Runs};
use crate::simd::{Isa, Lanes, MAX_LANES, Part, Vector, opaque, splats};

/// Vectors that are added as a tree.
pub(crate) const GROUP: usize = BAND;
/// Groups that are added up before they are widened to f64.
pub(crate) const GROUPS: usize = 4;

/// Bytes from one row to the next at which all lines of a column crowd the same few places of a first-level cache, as many as eight
/// in the smallest. The closer they come to that, the fewer rows are read at a time.
const FAR: usize = 4096;

/// Two terms per element, made of `K` parameters of the channel.
pub(crate) trait Terms<I: Isa, const K: usize> {
    /// Tensors that are read.
    const TENSORS: usize;
    /// Whether they are summed often enough for loops of their own in each case.
    const COMMON: bool = true;
    /// The vector that the terms are computed in.
    type Vector: Vector<I>;

    /// The terms of the elements from `at`: of a whole vector if `FULL`, else of the first `n` and zero beyond.
    ///
    /// # Safety
    /// The elements lie inside the tensors that the terms were made for.
    unsafe fn at<const FULL: bool>(
        &self,
        isa: I,
        params: &[Self::Vector; K],
        at: usize,
        n: usize,
    ) -> (Self::Vector, Self::Vector);

    /// Asks the caches for the elements around `at`, which may lie anywhere.
    fn prefetch(&self, isa: I, at: usize);
}

/// What is done beside sums, step by step. Not a closure, which a compiler may leave apart from the kernel and its tier.
pub(crate) trait Beside {
    /// The next step.
    ///
    /// # Safety
    /// As many are left.
    unsafe fn step(&mut self);
}

/// Nothing.
impl Beside for () {
    #[inline(always)]
    unsafe fn step(&mut self) {}
}

type Scalar<I, T, const K: usize> = <<T as Terms<I, K>>::Vector as Vector<I>>::Scalar;

#[inline(always)]
pub(crate) fn tree<I: Isa, V: Vector<I>>(v: [V; GROUP]) -> V {
    v[0].add(v[1]).add(v[2].add(v[3]))
}

/// The sums of both terms over a group of vectors, each `stride` after the one before: of whole ones if `FULL`, else of the
/// first `n` elements of each. Those `ahead` of them are prefetched, none for 0. If `CHAINED`, each place is made of the one before:
/// else compilers keep all their distances, and more than there are registers for.
///
/// # Safety
/// These elements lie inside the tensors that `terms` was made for.
#[inline(always)]
unsafe fn group<I: Isa, T: Terms<I, K>, const K: usize, const FULL: bool, const CHAINED: bool>(
    isa: I,
    terms: &T,
    params: &[T::Vector; K],
    (at, n): (usize, usize),
    stride: usize,
    ahead: usize,
) -> (T::Vector, T::Vector) {
    if ahead != 0 && !CHAINED {
        for j in 0..GROUP {
            terms.prefetch(isa, (at + j * stride).wrapping_add(ahead));
        }
    }
    let zero = T::Vector::splat(isa, Default::default());
    let (mut a, mut b) = ([zero; GROUP], [zero; GROUP]);
    let mut next = at;
    for j in 0..GROUP {
        let at = if CHAINED { opaque(next) } else { at + j * stride };
        if ahead != 0 && CHAINED {
            terms.prefetch(isa, at.wrapping_add(ahead));
        }
        // SAFETY: the caller's promise.
        (a[j], b[j]) = unsafe { terms.at::<FULL>(isa, params, at, n) };
        next = at + stride;
    }
    (tree(a), tree(b))
}

/// [`group`] where vector `j` has as many of `rest(j)` elements as it can.
///
/// # Safety
/// These elements lie inside the tensors that `terms` was made for.
#[inline(always)]
unsafe fn partial<I: Isa, T: Terms<I, K>, const K: usize>(
    isa: I,
    terms: &T,
    params: &[T::Vector; K],
    at: usize,
    stride: usize,
    ahead: usize,
    rest: impl Fn(usize) -> usize,
) -> (T::Vector, T::Vector) {
    let lanes = T::Vector::LANES;
    let zero = T::Vector::splat(isa, Default::default());
    let (mut a, mut b) = ([zero; GROUP], [zero; GROUP]);
    for j in 0..GROUP {
        let (at, n) = (at + j * stride, rest(j));
        if n > 0 && ahead != 0 {
            terms.prefetch(isa, at.wrapping_add(ahead));
        }
        // SAFETY: the caller's promise.
        unsafe {
            if n >= lanes {
                (a[j], b[j]) = terms.at::<true>(isa, params, at, lanes);
            } else if n > 0 {
                (a[j], b[j]) = terms.at::<false>(isa, params, at, n);
            }
        }
    }
    (tree(a), tree(b))
}

/// The sums of both terms over the first `n` elements from `at`, of more than none and fewer than a group of vectors that follow each
/// other.
///
/// # Safety
/// These elements lie inside the tensors that `terms` was made for.
#[inline(always)]
unsafe fn rest<I: Isa, T: Terms<I, K>, const K: usize>(
    isa: I,
    terms: &T,
    params: &[T::Vector; K],
    (at, n): (usize, usize),
) -> (T::Vector, T::Vector) {
    let lanes = T::Vector::LANES;
    let zero = T::Vector::splat(isa, Default::default());
    let (mut a, mut b) = ([zero; GROUP], [zero; GROUP]);
    // SAFETY: the caller's promise.
    unsafe {
        let mut last = (zero, zero);
        if !n.is_multiple_of(lanes) {
            last = terms.at::<false>(isa, params, at + n - n % lanes, n % lanes);
        }
        if n < lanes {
            // A tree with nothing but zeros beside it.
            return last;
        }
        for j in 0..GROUP {
            if (j + 1) * lanes <= n {
                (a[j], b[j]) = terms.at::<true>(isa, params, at + j * lanes, lanes);
            } else if j * lanes <= n {
                (a[j], b[j]) = last;
            }
        }
    }
    (tree(a), tree(b))
}

/// The sums of both terms over the runs of a channel, as far as they were seen.
#[derive(Clone, Copy)]
pub(crate) struct RunSums<I: Isa, V: Vector<I>, const K: usize> {
    /// The channel's parameters.
    pub(crate) params: [V::Scalar; K],
    narrow: [V; 2],
    wide: [V::Wide; 2],
    /// Groups in `narrow`.
    groups: usize,
}

impl<I: Isa, V: Vector<I>, const K: usize> RunSums<I, V, K> {
    #[inline(always)]
    pub(crate) fn new(isa: I, params: [V::Scalar; K]) -> Self {
        let zero = V::splat(isa, Default::default());
        Self { params, narrow: [zero; 2], wide: [V::no_sums(isa); 2], groups: 0 }
    }

    /// Adds a band. The elements `ahead` of it are prefetched, none for 0.
    ///
    /// # Safety
    /// The band lies inside the tensors that `terms` was made for.
    #[inline(always)]
    pub(crate) unsafe fn add<T: Terms<I, K, Vector = V>>(&mut self, isa: I, terms: &T, band: Band, ahead: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match band.across {
                true if band.rows < GROUP => isa.call(Few { sums: self, terms, band, ahead }),
                true => self.add_as::<T, true, false>(isa, terms, band, ahead, ()),
                false => self.add_as::<T, false, false>(isa, terms, band, ahead, ()),
            }
        }
    }

    /// Adds so many whole groups from the start of a band of [`GROUP`] runs, and takes a step `beside` after each.
    ///
    /// # Safety
    /// As [`RunSums::add`], and as [`Beside::step`] for each group.
    #[inline(always)]
    pub(crate) unsafe fn add_beside<T: Terms<I, K, Vector = V>>(
        &mut self,
        isa: I,
        terms: &T,
        (band, groups): (Band, usize),
        ahead: usize,
        beside: impl Beside,
    ) {
        let band = Band { len: groups * V::LANES, ..band };
        // SAFETY: the caller's promise.
        unsafe { self.add_as::<T, true, true>(isa, terms, band, ahead, beside) };
    }

    /// One run, or a group of them `ACROSS`; of `WHOLE` groups of vectors, or any.
    #[inline(always)]
    unsafe fn add_as<T: Terms<I, K, Vector = V>, const ACROSS: bool, const WHOLE: bool>(
        &mut self,
        isa: I,
        terms: &T,
        band: Band,
        ahead: usize,
        mut beside: impl Beside,
    ) {
        let params = splats::<I, V, K>(isa, &self.params);
        // From one vector of a group to the next, and from one group to the next.
        let (stride, step) = if ACROSS { (band.stride, V::LANES) } else { (V::LANES, GROUP * V::LANES) };
        let left = if WHOLE { 0 } else { band.len % step };
        let whole = band.len - left;
        // In registers, but for the sums in f64.
        let (mut narrow, mut groups) = (self.narrow, self.groups);
        // Loops of one tensor have registers enough.
        let chained = ACROSS && !WHOLE && T::TENSORS > 1 && ahead == 0;
        for i in (0..if chained { whole } else { 0 }).step_by(step) {
            let at = (band.start + i, V::LANES);
            // SAFETY: the elements asked for lie inside the band.
            let (a, b) = unsafe { group::<I, T, K, true, true>(isa, terms, &params, at, stride, 0) };
            self.push(isa, (&mut narrow, &mut groups), a, b);
        }
        for i in (0..if chained { 0 } else { whole }).step_by(step) {
            let at = (band.start + i, V::LANES);
            // SAFETY: the elements asked for lie inside the band.
            let (a, b) = unsafe { group::<I, T, K, true, false>(isa, terms, &params, at, stride, ahead) };
            self.push(isa, (&mut narrow, &mut groups), a, b);
            // SAFETY: the caller's promise.
            unsafe { beside.step() };
        }
        if left > 0 {
            let at = (band.start + whole, left);
            // SAFETY: the elements asked for lie inside the band.
            let (a, b) = unsafe {
                if !ACROSS {
                    rest::<I, T, K>(isa, terms, &params, at)
                } else if left <= V::LANES / 2 {
                    let (a, b) = group::<I, T, K, false, false>(isa, terms, &params, at, stride, ahead);
                    (a.lower(), b.lower())
                } else {
                    group::<I, T, K, false, false>(isa, terms, &params, at, stride, ahead)
                }
            };
            self.push(isa, (&mut narrow, &mut groups), a, b);
        }
        (self.narrow, self.groups) = (narrow, groups);
    }

    /// Adds the sums of a group to the `narrow` ones of so many, and those to the wide ones where they are as many as may be.
    #[inline(always)]
    fn push(&mut self, isa: I, (narrow, groups): (&mut [V; 2], &mut usize), a: V, b: V) {
        *narrow = [narrow[0].add(a), narrow[1].add(b)];
        *groups += 1;
        if *groups == GROUPS {
            self.wide = [narrow[0].widen_onto(self.wide[0]), narrow[1].widen_onto(self.wide[1])];
            (*narrow, *groups) = ([V::splat(isa, Default::default()); 2], 0);
        }
    }

    /// The sums so far.
    #[inline(always)]
    pub(crate) fn total(&self) -> (f64, f64) {
        let [a, b] = self.narrow;
        (V::fold(a.widen_onto(self.wide[0])), V::fold(b.widen_onto(self.wide[1])))
    }
}

/// Adds a band of fewer runs than a group has vectors. There is one in a block at most, so that it is compiled apart.
struct Few<'s, 't, I: Isa, T: Terms<I, K>, const K: usize> {
    sums: &'s mut RunSums<I, T::Vector, K>,
    terms: &'t T,
    band: Band,
    ahead: usize,
}

impl<I: Isa, T: Terms<I, K>, const K: usize> Part<I> for Few<'_, '_, I, T, K> {
    type Output = ();
    #[inline(always)]
    fn run(self, isa: I) {
        let Self { sums, terms, band: Band { start, len, rows, stride, .. }, ahead } = self;
        let params = splats::<I, T::Vector, K>(isa, &sums.params);
        let (mut narrow, mut groups) = (sums.narrow, sums.groups);
        for i in (0..len).step_by(T::Vector::LANES) {
            let rest = |j: usize| if j < rows { len - i } else { 0 };
            // SAFETY: the promise of who made this.
            let (a, b) = unsafe { partial(isa, terms, &params, start + i, stride, ahead, rest) };
            sums.push(isa, (&mut narrow, &mut groups), a, b);
        }
        (sums.narrow, sums.groups) = (narrow, groups);
    }
}

/// The sums of both terms over all runs; `params` are the channel's.
///
/// # Safety
/// The runs lie inside the tensors that `terms` was made for.
#[inline(always)]
pub(crate) unsafe fn over_runs<I: Isa, T: Terms<I, K>, const K: usize>(
    isa: I,
    terms: &T,
    params: [Scalar<I, T, K>; K],
    runs: Runs,
) -> (f64, f64) {
    let mut sums = RunSums::new(isa, params);
    for band in runs.bands() {
        // SAFETY: the caller's promise.
        unsafe { sums.add(isa, terms, band, 0) };
    }
    sums.total()
}

/// A block of rows of `channels`: `len` elements from `start`, rows joined to columns that repeat with `period`. Sums
/// are taken over `columns` of it, whose first begins a vector.
#[derive(Clone, Copy)]
pub(crate) struct RowBlock {
    pub(crate) channels: usize,
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) period: usize,
    pub(crate) columns: (usize, usize),
    /// The channel of the first column; not zero where a tile of columns was packed.
    pub(crate) base: usize,
    /// How many elements ahead of what is read others are asked for.
    pub(crate) ahead: usize,
    pub(crate) asked: Asked,
}

/// Where rows wait, and how what lies ahead of them is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    /// In caches: in each row.
    Near,
    /// In memory: in each row.
    Far,
    /// In memory: in the order of addresses, if whole rows are read.
    InOrder,
}

/// Memory for the sums of rows: each array has a value per column, up to whole vectors.
pub(crate) struct Columns<'a, R> {
    /// The parameters of the terms, array after array.
    pub(crate) params: &'a mut [R],
    /// The accumulators of both terms, between sweeps.
    pub(crate) narrow: [&'a mut [R]; 2],
    /// The sums of both terms.
    pub(crate) wide: [&'a mut [f64]; 2],
    /// Whether the deviations of all channels of the block before, or of this one, are so small that they are enlarged.
    pub(crate) enlarged: bool,
}

/// The sums of both terms for each channel of the block, left in `columns.wide`; parameter `k` of the `i`-th column is at
/// `k * padded + i` of `columns.params`.
///
/// # Safety
/// The block lies inside the tensors that `terms` was made for.
#[inline(always)]
pub(crate) unsafe fn over_rows<I: Isa, R: Lanes, T: Terms<I, K, Vector = R::Vector<I>>, const K: usize>(
    isa: I,
    terms: &T,
    block: RowBlock,
    columns: &mut Columns<'_, R>,
) {
    let row = block.period * size_of::<R>();
    let in_order = block.asked == Asked::InOrder && block.columns == (0, block.period);
    // SAFETY: the caller's promise.
    unsafe {
        match row.min(FAR) * T::TENSORS {
            ..2048 if T::COMMON && !in_order && T::TENSORS == 1 => {
                sweeps::<I, R, T, K, GROUPS>(isa, terms, block, columns, false)
            }
            ..8192 if T::COMMON && !in_order => sweeps::<I, R, T, K, { GROUPS / 2 }>(isa, terms, block, columns, false),
            _ => sweeps::<I, R, T, K, { GROUPS / 4 }>(isa, terms, block, columns, in_order),
        }
    }
    columns.join(block);
}

/// [`group`] of the first `n` elements of each row, of which so many elements are left. At the ends of rows alone, so that it is
/// compiled apart.
struct Partial<'t, I: Isa, T: Terms<I, K>, const K: usize> {
    terms: &'t T,
    params: &'t [T::Vector; K],
    at: usize,
    stride: usize,
    left: usize,
    n: usize,
}

impl<I: Isa, T: Terms<I, K>, const K: usize> Part<I> for Partial<'_, I, T, K> {
    type Output = (T::Vector, T::Vector);
    #[inline(always)]
    fn run(self, isa: I) -> Self::Output {
        let Self { terms, params, at, stride, left, n } = self;
        let rest = |j: usize| left.saturating_sub(j * stride).min(n);
        // SAFETY: the promise of who made this.
        unsafe { partial(isa, terms, params, at, stride, 0, rest) }
    }
}

/// The sums of columns, `H` groups of rows at a time. What follows is asked for `in_order`, or as it will be read.
#[inline(always)]
unsafe fn sweeps<I: Isa, R: Lanes, T: Terms<I, K, Vector = R::Vector<I>>, const K: usize, const H: usize>(
    isa: I,
    terms: &T,
    block: RowBlock,
    columns: &mut Columns<'_, R>,
    in_order: bool,
) {
    let lanes = R::Vector::<I>::LANES;
    let (first, last) = block.columns;
    let padded = columns.wide[0].len();
    assert!((last - first).next_multiple_of(MAX_LANES) <= padded);
    assert!(columns.params.len() >= K * padded && columns.wide[1].len() == padded);
    assert!(columns.narrow.iter().all(|narrow| narrow.len() == padded));
    let arrays = Arrays {
        params: columns.params.as_ptr(),
        padded,
        // By hand: what `map` of an array calls is compiled for each kernel again, and not always for its tier.
        narrow: [columns.narrow[0].as_mut_ptr(), columns.narrow[1].as_mut_ptr()],
        wide: [columns.wide[0].as_mut_ptr(), columns.wide[1].as_mut_ptr()],
    };
    // Places in the arrays count from the first column.
    let width = last - first;
    columns.wide.iter_mut().for_each(|wide| wide[..width.next_multiple_of(lanes)].fill(0.0));
    // Elements from one group of rows to the next, and of all groups of a sweep.
    let (step, tall) = (GROUP * block.period, H * GROUP * block.period);
    for (sweep, from) in (0..block.len).step_by(tall).enumerate() {
        let (begins, ends) =
            (sweep % (GROUPS / H) == 0, sweep % (GROUPS / H) == GROUPS / H - 1 || from + tall >= block.len);
        let start = block.start + from + first;
        // At the end of these rows what follows in the next ones.
        let ahead = |c: usize| block.ahead + if c + block.ahead < width { 0 } else { tall - width };
        let all = from + tall <= block.len;
        // Not from memory, where a CPU that waits for nothing else goes too far ahead of what was asked for.
        let near = const { I::TIER.tuning().near_rows_apart } && block.asked == Asked::Near;
        let whole = if all && near { width - width % lanes } else { 0 };
        for c in (0..whole).step_by(lanes) {
            // SAFETY: columns c..c + lanes lie below `padded`, the length of all arrays, by the assertions; the elements inside the
            // block, which is the caller's promise.
            unsafe {
                let mut sums: ColumnSums<_, K> = arrays.open(isa, c, begins);
                let (mut at, ahead) = (start + c, ahead(c));
                for _ in 0..H {
                    at = opaque(at);
                    sums.add(group::<I, T, K, true, true>(isa, terms, &sums.params, (at, lanes), block.period, ahead));
                    at += step;
                }
                arrays.close(sums, c, ends);
            }
        }
        for c in (whole..width).step_by(lanes) {
            // SAFETY: as above.
            unsafe {
                let mut sums: ColumnSums<_, K> = arrays.open(isa, c, begins);
                if all && c + lanes <= width {
                    let ahead = if in_order {
                        let next = block.start + from + tall + block.ahead + c * H * GROUP;
                        for i in 0..H * GROUP {
                            terms.prefetch(isa, next.wrapping_add(i * lanes));
                        }
                        0
                    } else {
                        ahead(c)
                    };
                    for g in 0..H {
                        let at = (start + c + g * step, lanes);
                        sums.add(group::<I, T, K, true, false>(isa, terms, &sums.params, at, block.period, ahead));
                    }
                } else {
                    for group in (0..tall.min(block.len - from)).step_by(step) {
                        let left = (block.len - from - group).saturating_sub(first + c);
                        let (params, at, n) = (&sums.params, start + c + group, width - c);
                        let (a, b) = isa.call(Partial { terms, params, at, stride: block.period, left, n });
                        sums.add((a, b));
                    }
                }
                arrays.close(sums, c, ends);
            }
        }
    }
}

/// The parameters of a vector of columns, and the sums of their terms.
struct ColumnSums<V, const K: usize> {
    params: [V; K],
    sums: [V; 2],
}

impl<V, const K: usize> ColumnSums<V, K> {
    #[inline(always)]
    fn add<I: Isa>(&mut self, (a, b): (V, V))
    where
        V: Vector<I>,
    {
        self.sums = [self.sums[0].add(a), self.sums[1].add(b)];
    }
}

/// The arrays of [`Columns`], each of `padded` values or, of parameters, of a multiple.
struct Arrays<R> {
    params: *const R,
    padded: usize,
    narrow: [*mut R; 2],
    wide: [*mut f64; 2],
}

impl<R: Lanes> Arrays<R> {
    /// Begins the sums of a vector of columns, or goes on with them.
    ///
    /// # Safety
    /// They lie inside the arrays.
    #[inline(always)]
    unsafe fn open<I: Isa, const K: usize>(&self, isa: I, c: usize, begins: bool) -> ColumnSums<R::Vector<I>, K> {
        let zero = R::Vector::<I>::splat(isa, R::default());
        let mut sums = ColumnSums { params: [zero; K], sums: [zero; 2] };
        // SAFETY: the caller's promise.
        unsafe {
            for (k, vector) in sums.params.iter_mut().enumerate() {
                *vector = R::Vector::<I>::load(isa, self.params.add(k * self.padded + c));
            }
            if !begins {
                sums.sums[0] = R::Vector::<I>::load(isa, self.narrow[0].add(c));
                sums.sums[1] = R::Vector::<I>::load(isa, self.narrow[1].add(c));
            }
        }
        sums
    }

    /// Ends these sums, or leaves them for later.
    ///
    /// # Safety
    /// As [`Arrays::open`].
    #[inline(always)]
    unsafe fn close<I: Isa, const K: usize>(
        &self,
        ColumnSums { sums: [a, b], .. }: ColumnSums<R::Vector<I>, K>,
        c: usize,
        ends: bool,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            if ends {
                a.add_widened(self.wide[0].add(c));
                b.add_widened(self.wide[1].add(c));
            } else {
                a.store(self.narrow[0].add(c));
                b.store(self.narrow[1].add(c));
            }
        }
    }
}

impl<R> Columns<'_, R> {
    /// Adds up the sums of the columns of joined rows that belong to the same channel.
    #[inline(always)]
    fn join(&mut self, block: RowBlock) {
        for wide in &mut self.wide {
            for c in block.channels..block.period {
                wide[c % block.channels] += wide[c];
            }
        }
    }
}
