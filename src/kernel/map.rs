//! One value per element, over the runs of a channel or over rows of channels.
//!
//! The values do not depend on where a vector begins, so vectors in the middle begin where stores are aligned, and
//! the first and the last one overlap them.

use crate::element::Element;
use crate::grid::Runs;
use crate::simd::{Compute, Isa, MAX_LANES, Storage as _, Vector};

/// A value per element, made of `K` parameters of the channel.
pub(crate) trait Map<I: Isa, const K: usize> {
    /// The type that is written.
    type Element: Element;

    /// The values of the elements from `at`: of a whole vector if `FULL`, else of the first `n`.
    ///
    /// # Safety
    /// The elements lie inside the tensors that the map was made for.
    unsafe fn at<const FULL: bool>(
        &self,
        isa: I,
        params: &[Compute<I, Self::Element>; K],
        at: usize,
        n: usize,
    ) -> Compute<I, Self::Element>;

    /// Asks the caches for the elements around `at`, which may lie anywhere.
    fn prefetch(&self, isa: I, at: usize);
}

/// Where values go, and how.
#[derive(Clone, Copy)]
pub(crate) struct Target<E> {
    pub(crate) to: *mut E,
    /// Past the caches; never in place.
    pub(crate) streaming: bool,
}

impl<E: Element> Target<E> {
    /// Where arrays of parameters begin, so that they are aligned where the elements of a tensor are.
    pub(crate) fn lead(&self) -> usize {
        let lanes = MAX_LANES * size_of::<f32>() / size_of::<E::Param>();
        (lanes - self.unaligned(0, lanes).unwrap_or(0)) % lanes
    }

    /// How many elements from `at` come before the first one at a multiple of a stored vector of `lanes`; none where no
    /// element is.
    #[inline(always)]
    fn unaligned(&self, at: usize, lanes: usize) -> Option<usize> {
        let address = self.to.wrapping_add(at) as usize;
        let bytes = address.wrapping_neg() % (lanes * size_of::<E>());
        bytes.is_multiple_of(size_of::<E>()).then_some(bytes / size_of::<E>())
    }
}

/// The parameters of one vector after another.
trait Parameters<I: Isa, E: Element, const K: usize> {
    /// Goes to the vector that begins with element `i` of the span.
    fn seek(&mut self, i: usize);
    /// The parameters of the vector, which is then passed over.
    fn next(&mut self, isa: I) -> [Compute<I, E>; K];
}

/// The same for all elements.
struct Same<V, const K: usize>([V; K]);

impl<I: Isa, E: Element, const K: usize> Parameters<I, E, K> for Same<Compute<I, E>, K> {
    #[inline(always)]
    fn seek(&mut self, _: usize) {}
    #[inline(always)]
    fn next(&mut self, _: I) -> [Compute<I, E>; K] {
        self.0
    }
}

/// The parameters of the columns of rows: parameter `k` of column `c` is at `k * padded + lead + c` of `params`. The
/// columns repeat with `period`, at least a vector, and the first ones stand once more after the last, so that a vector
/// may begin anywhere.
#[derive(Clone, Copy)]
pub(crate) struct Periodic<'a, R> {
    pub(crate) params: &'a [R],
    pub(crate) padded: usize,
    pub(crate) lead: usize,
    pub(crate) period: usize,
    pub(crate) column: usize,
}

impl<I: Isa, E: Element, const K: usize> Parameters<I, E, K> for Periodic<'_, E::Param> {
    #[inline(always)]
    fn seek(&mut self, i: usize) {
        self.column = i % self.period;
    }
    #[inline(always)]
    fn next(&mut self, isa: I) -> [Compute<I, E>; K] {
        let at = self.lead + self.column;
        let mut vectors = [Compute::<I, E>::splat(isa, Default::default()); K];
        for (k, vector) in vectors.iter_mut().enumerate() {
            // SAFETY: the column lies below the period, and a vector more lies below `padded`, see `over_rows`.
            *vector = unsafe { Compute::<I, E>::load(isa, self.params.as_ptr().add(k * self.padded + at)) };
        }
        self.column += Compute::<I, E>::LANES;
        if self.column >= self.period {
            self.column -= self.period;
        }
        vectors
    }
}

/// Writes the elements `start..start + len`, and prefetches those `ahead` of them, none for 0. Stores are aligned but
/// for the first and the last vector.
#[inline(always)]
unsafe fn span<I: Isa, M: Map<I, K>, P: Parameters<I, M::Element, K>, const K: usize, const STREAM: bool>(
    isa: I,
    map: &M,
    params: &mut P,
    (start, len): (usize, usize),
    target: Target<M::Element>,
    ahead: usize,
) {
    let lanes = Compute::<I, M::Element>::LANES;
    // SAFETY: all elements lie inside the span, which is the caller's promise.
    unsafe {
        let to = target.to.add(start);
        params.seek(0);
        if len < lanes {
            let value = map.at::<false>(isa, &params.next(isa), start, len);
            return M::Element::store_first(isa, value, to, len);
        }
        // Both are loaded before anything is stored, because in place they overlap what the loop writes.
        let first = map.at::<true>(isa, &params.next(isa), start, lanes);
        params.seek(len - lanes);
        let last = map.at::<true>(isa, &params.next(isa), start + len - lanes, lanes);
        let aligned = target.unaligned(start, lanes);
        let head = aligned.unwrap_or(0);
        let stream = STREAM && aligned.is_some();
        let mut i = head;
        params.seek(i);
        while i + lanes <= len {
            if ahead > 0 {
                map.prefetch(isa, start + i + ahead);
            }
            let value = map.at::<true>(isa, &params.next(isa), start + i, lanes);
            if stream {
                M::Element::stream(isa, value, to.add(i));
            } else {
                M::Element::store(isa, value, to.add(i));
            }
            i += lanes;
        }
        if head > 0 {
            M::Element::store_first(isa, first, to, head);
        }
        if i < len {
            if stream {
                // The whole last vector would fetch a streamed line again; nothing here is in place.
                params.seek(i);
                let value = map.at::<false>(isa, &params.next(isa), start + i, len - i);
                M::Element::store_first(isa, value, to.add(i), len - i);
            } else {
                M::Element::store(isa, last, to.add(len - lanes));
            }
        }
    }
}

/// Writes the elements of all runs for neighbouring channels, in the order of memory: `runs` are those of the first, those
/// of the next begin `pitch` elements later, and so on; `params` has an entry for each. The elements `ahead` of them are
/// prefetched, none for 0.
///
/// # Safety
/// The runs lie inside the tensors that `map` was made for and the one of `target`, and nothing else accesses those
/// elements of it meanwhile.
#[inline(always)]
pub(crate) unsafe fn over_runs<I: Isa, M: Map<I, K>, const K: usize>(
    isa: I,
    map: &M,
    params: &[[<M::Element as Element>::Param; K]],
    (runs, pitch): (Runs, usize),
    target: Target<M::Element>,
    ahead: usize,
) {
    for run in 0..runs.count {
        for (c, params) in params.iter().enumerate() {
            let mut same = Same([Compute::<I, M::Element>::splat(isa, Default::default()); K]);
            for (vector, &param) in same.0.iter_mut().zip(params) {
                *vector = Compute::<I, M::Element>::splat(isa, param);
            }
            let at = (runs.start + run * runs.stride + c * pitch, runs.len);
            // SAFETY: the caller's promise.
            unsafe {
                if target.streaming {
                    span::<I, M, _, K, true>(isa, map, &mut same, at, target, ahead);
                } else {
                    span::<I, M, _, K, false>(isa, map, &mut same, at, target, ahead);
                }
            }
        }
    }
}

/// Writes `len` elements from `start`, which begins a row.
///
/// # Safety
/// As [`over_runs`], for those elements.
#[inline(always)]
pub(crate) unsafe fn over_rows<I: Isa, M: Map<I, K>, const K: usize>(
    isa: I,
    map: &M,
    mut params: Periodic<'_, <M::Element as Element>::Param>,
    at: (usize, usize),
    target: Target<M::Element>,
) {
    assert!(params.period >= MAX_LANES && params.lead + params.period + MAX_LANES <= params.padded);
    assert!(params.params.len() >= K * params.padded);
    // SAFETY: the caller's promise.
    unsafe {
        if target.streaming {
            span::<I, M, _, K, true>(isa, map, &mut params, at, target, 0);
        } else {
            span::<I, M, _, K, false>(isa, map, &mut params, at, target, 0);
        }
    }
}
