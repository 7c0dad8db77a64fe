//! One value per element, over the runs of a channel or over rows of channels.

use crate::element::Element;
use crate::grid::Runs;
use crate::simd::{Compute, Isa, Storage as _, Vector};

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
}

/// Writes the elements `start..start + len` with the same parameters.
#[inline(always)]
unsafe fn contiguous<I: Isa, M: Map<I, K>, const K: usize>(
    isa: I,
    map: &M,
    params: &[Compute<I, M::Element>; K],
    start: usize,
    len: usize,
    to: *mut M::Element,
) {
    let lanes = Compute::<I, M::Element>::LANES;
    let mut i = 0;
    // SAFETY: all elements lie inside the run, which is the caller's promise.
    unsafe {
        while i + lanes <= len {
            let value = map.at::<true>(isa, params, start + i, lanes);
            M::Element::store(isa, value, to.add(start + i));
            i += lanes;
        }
        if i < len {
            let value = map.at::<false>(isa, params, start + i, len - i);
            M::Element::store_first(isa, value, to.add(start + i), len - i);
        }
    }
}

/// Writes the elements of all runs; `params` are the channel's.
///
/// # Safety
/// The runs lie inside the tensors that `map` was made for and the one at `to`, and nothing else accesses those
/// elements of `to` meanwhile.
#[inline(always)]
pub(crate) unsafe fn over_runs<I: Isa, M: Map<I, K>, const K: usize>(
    isa: I,
    map: &M,
    params: [<M::Element as Element>::Param; K],
    runs: Runs,
    to: *mut M::Element,
) {
    let mut vectors = [Compute::<I, M::Element>::splat(isa, Default::default()); K];
    for k in 0..K {
        vectors[k] = Compute::<I, M::Element>::splat(isa, params[k]);
    }
    for run in 0..runs.count {
        // SAFETY: the caller's promise.
        unsafe { contiguous(isa, map, &vectors, runs.start + run * runs.stride, runs.len, to) }
    }
}

/// Writes `len` elements from `start`, which begins a row; parameter `k` of column `c` is at `k * padded + c` of
/// `params`, the columns repeating with `period`.
///
/// # Safety
/// As [`over_runs`], for those elements.
#[inline(always)]
pub(crate) unsafe fn over_rows<I: Isa, M: Map<I, K>, const K: usize>(
    isa: I,
    map: &M,
    params: &[<M::Element as Element>::Param],
    period: usize,
    start: usize,
    len: usize,
    to: *mut M::Element,
) {
    let lanes = Compute::<I, M::Element>::LANES;
    let padded = params.len() / K;
    assert!(period.next_multiple_of(lanes) <= padded);
    let mut vectors = [Compute::<I, M::Element>::splat(isa, Default::default()); K];
    let mut row = 0;
    while row < len {
        let width = period.min(len - row);
        let mut c = 0;
        while c < width {
            let n = (width - c).min(lanes);
            // SAFETY: c + lanes lies below `padded` by the assertion; the elements are the caller's promise.
            unsafe {
                for (k, vector) in vectors.iter_mut().enumerate() {
                    *vector = Compute::<I, M::Element>::load(isa, params.as_ptr().add(k * padded + c));
                }
                let at = start + row + c;
                if n == lanes {
                    M::Element::store(isa, map.at::<true>(isa, &vectors, at, n), to.add(at));
                } else {
                    M::Element::store_first(isa, map.at::<false>(isa, &vectors, at, n), to.add(at), n);
                }
            }
            c += lanes;
        }
        row += width;
    }
}
