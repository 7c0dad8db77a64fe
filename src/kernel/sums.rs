//! Sums of two terms per element over the runs of a channel, in one fixed order; [`columns`](super::columns) has those over rows.
//!
//! Four vectors are added as a tree, `(v0 + v1) + (v2 + v3)`, to one accumulator; after four such groups the
//! accumulator is widened and added to a sum in f64. So a chain of roundings in f32 is at most six additions long,
//! and a sum of equal values hardly rounds at all. Missing vectors and lanes count as zero.

use crate::grid::{BAND, Band, Runs};
use crate::simd::{Isa, Part, Vector, opaque, splats};

/// Vectors that are added as a tree.
pub(crate) const GROUP: usize = BAND;
/// Groups that are added up before they are widened to f64.
pub(crate) const GROUPS: usize = 4;

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
pub(super) unsafe fn group<I: Isa, T: Terms<I, K>, const K: usize, const FULL: bool, const CHAINED: bool>(
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
pub(super) unsafe fn partial<I: Isa, T: Terms<I, K>, const K: usize>(
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
