//! Sums of two terms per element over rows of channels, for each column: groups of rows as [`sums`](super::sums) adds vectors, so
//! that each channel's sums are those of its rows alone, however many are read at a time.

use super::sums::{GROUP, GROUPS, Terms, group, partial};
use crate::simd::{Isa, Lanes, MAX_LANES, Part, Vector, opaque};

/// Bytes from one row to the next at which all lines of a column crowd the same few places of a first-level cache, as many as eight
/// in the smallest. The closer they come to that, the fewer rows are read at a time.
const FAR: usize = 4096;

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
    /// Anywhere: rows of a few vectors in the order of addresses, in which whole ones are read.
    Short,
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
    let lanes = R::Vector::<I>::LANES;
    let is_whole = block.columns == (0, block.period);
    let in_order = block.asked == Asked::InOrder && is_whole;
    let is_short =
        const { T::COMMON && !I::TIER.tuning().short_rows.is_empty() } && block.asked == Asked::Short && is_whole;
    // SAFETY: the caller's promise.
    unsafe {
        match row.min(FAR) * T::TENSORS {
            _ if is_short && block.period == 4 * lanes => short::<I, R, T, K, 4>(isa, terms, block, columns),
            _ if is_short && block.period == 3 * lanes => short::<I, R, T, K, 3>(isa, terms, block, columns),
            _ if is_short && block.period == 2 * lanes => short::<I, R, T, K, 2>(isa, terms, block, columns),
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
    let arrays = Arrays::new::<K>(columns, last - first);
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
        let near = const { I::TIER.tuning().near_rows_apart } && matches!(block.asked, Asked::Near | Asked::Short);
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

/// The sums of the columns of whole rows of `N` vectors, read in the order of memory. They stay in registers, with the parameters.
#[inline(always)]
unsafe fn short<I: Isa, R: Lanes, T: Terms<I, K, Vector = R::Vector<I>>, const K: usize, const N: usize>(
    isa: I,
    terms: &T,
    block: RowBlock,
    columns: &mut Columns<'_, R>,
) {
    let lanes = R::Vector::<I>::LANES;
    let arrays = Arrays::new::<K>(columns, N * lanes);
    columns.wide.iter_mut().for_each(|wide| wide[..N * lanes].fill(0.0));
    let step = GROUP * block.period;
    let (mut at, end) = (block.start, block.start + block.len);
    // SAFETY: `N` vectors lie below the length of all arrays, as was asserted; the elements inside the block, which is the caller's
    // promise.
    unsafe {
        let mut params = [[R::Vector::<I>::splat(isa, R::default()); K]; N];
        for (j, params) in params.iter_mut().enumerate() {
            *params = arrays.open(isa, j * lanes, true).params;
        }
        while at + GROUPS * step <= end {
            let mut sums = [[R::Vector::<I>::splat(isa, R::default()); 2]; N];
            for _ in 0..GROUPS {
                add_rows(isa, terms, &params, &mut sums, (opaque(at), block.period), block.ahead);
                at += step;
            }
            for (j, (params, sums)) in params.into_iter().zip(sums).enumerate() {
                arrays.close(ColumnSums { params, sums }, j * lanes, true);
            }
        }
        // Parameters are loaded again, since those above would leave their registers to be passed to what is compiled apart.
        for j in 0..N {
            let mut sums: ColumnSums<_, K> = arrays.open(isa, j * lanes, true);
            for row in (at..end).step_by(step) {
                let (at, left) = (row + j * lanes, (end - row).saturating_sub(j * lanes));
                let params = &sums.params;
                sums.add(isa.call(Partial { terms, params, at, stride: block.period, left, n: lanes }));
            }
            arrays.close(sums, j * lanes, true);
        }
    }
}

/// Adds a group of rows of `N` vectors to their sums, `stride` from one to the next. Those `ahead` of them are prefetched.
///
/// # Safety
/// These elements lie inside the tensors that `terms` was made for.
#[inline(always)]
unsafe fn add_rows<I: Isa, T: Terms<I, K>, const K: usize, const N: usize>(
    isa: I,
    terms: &T,
    params: &[[T::Vector; K]; N],
    sums: &mut [[T::Vector; 2]; N],
    (at, stride): (usize, usize),
    ahead: usize,
) {
    // SAFETY: the caller's promise.
    let row = |i: usize| unsafe { of_row(isa, terms, params, opaque(at + i * stride), ahead) };
    // As the tree of a group, in an order that keeps few vectors.
    let pair = added(row(0), row(1));
    let group = added(pair, added(row(2), row(3)));
    *sums = added(*sums, group);
}

/// The terms of `N` vectors that follow each other, and those `ahead` of them prefetched.
///
/// # Safety
/// As [`add_rows`].
#[inline(always)]
unsafe fn of_row<I: Isa, T: Terms<I, K>, const K: usize, const N: usize>(
    isa: I,
    terms: &T,
    params: &[[T::Vector; K]; N],
    at: usize,
    ahead: usize,
) -> [[T::Vector; 2]; N] {
    let mut of_row = [[T::Vector::splat(isa, Default::default()); 2]; N];
    // By index: with iterators compilers ask for lines after all else, which takes longer.
    for j in 0..N {
        let at = at + j * T::Vector::LANES;
        terms.prefetch(isa, at.wrapping_add(ahead));
        // SAFETY: the caller's promise.
        of_row[j] = unsafe { terms.at::<true>(isa, &params[j], at, T::Vector::LANES) }.into();
    }
    of_row
}

/// The sums of two rows of terms.
#[inline(always)]
fn added<I: Isa, V: Vector<I>, const N: usize>(mut a: [[V; 2]; N], b: [[V; 2]; N]) -> [[V; 2]; N] {
    for (a, b) in a.iter_mut().zip(b) {
        *a = [a[0].add(b[0]), a[1].add(b[1])];
    }
    a
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
    /// Those of so many columns, with `K` parameters.
    ///
    /// # Panics
    /// If they are shorter than whole vectors of these columns.
    #[inline(always)]
    fn new<const K: usize>(columns: &mut Columns<'_, R>, width: usize) -> Self {
        let padded = columns.wide[0].len();
        assert!(width.next_multiple_of(MAX_LANES) <= padded);
        assert!(columns.params.len() >= K * padded && columns.wide[1].len() == padded);
        assert!(columns.narrow.iter().all(|narrow| narrow.len() == padded));
        Self {
            params: columns.params.as_ptr(),
            padded,
            // By hand: what `map` of an array calls is compiled for each kernel again, and not always for its tier.
            narrow: [columns.narrow[0].as_mut_ptr(), columns.narrow[1].as_mut_ptr()],
            wide: [columns.wide[0].as_mut_ptr(), columns.wide[1].as_mut_ptr()],
        }
    }

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
