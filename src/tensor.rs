//! The tensors and arrays of a pass as its threads share them: read by all, written in disjoint parts.

use core::marker::PhantomData;
use core::ops::Range;

use crate::element::Element;
use crate::simd::{Compute, Isa, Storage, Vector};

/// Whose view tells where the elements of a tensor lie: the input's, or the output's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    X,
    Y,
}

/// A slice whose disjoint parts are written by several threads: the one place that splits output.
#[derive(Clone, Copy)]
pub(crate) struct Disjoint<'a, T> {
    ptr: *mut T,
    len: usize,
    side: Side,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out elements as `&mut [T]` would when split, which needs T: Send; callers keep the parts apart.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
// SAFETY: as above; sharing it gives no access without the promise of `slice`.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// An array, or anything else of which views know nothing.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self::tensor(slice, Side::Y)
    }

    pub(crate) fn tensor(slice: &'a mut [T], side: Side) -> Self {
        Self { ptr: slice.as_mut_ptr(), len: slice.len(), side, life: PhantomData }
    }

    /// A tensor that begins at `ptr`, what its view shows of `len` elements alone.
    ///
    /// # Safety
    /// The elements that the view shows may be written for `'a`, and nothing else accesses them. They may hold nothing yet where
    /// they are written alone.
    pub(crate) unsafe fn shown(ptr: *mut T, len: usize, side: Side) -> Self {
        Self { ptr, len, side, life: PhantomData }
    }

    pub(crate) fn side(&self) -> Side {
        self.side
    }

    pub(crate) fn as_ptr(&self) -> *mut T {
        self.ptr
    }

    /// The same to be read, where each element is read before it is written.
    pub(crate) fn source(&self) -> Source<'a, T> {
        Source { ptr: self.ptr, side: self.side, life: PhantomData }
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// No other reference to any of them lives at the same time.
    #[allow(clippy::mut_from_ref, reason = "the caller keeps the parts apart")]
    pub(crate) unsafe fn slice(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "range outside of the slice");
        // SAFETY: inside the slice, and exclusive as the caller promises.
        unsafe { core::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }
}

impl<'a, E: Storage> Disjoint<'a, E> {
    /// Scratch for as many elements as it has parameters, which are at least as large.
    pub(crate) fn elements(scratch: &'a mut [E::Compute]) -> Self {
        const { assert!(size_of::<E>() <= size_of::<E::Compute>() && align_of::<E>() <= align_of::<E::Compute>()) };
        Self { ptr: scratch.as_mut_ptr().cast(), len: scratch.len(), side: Side::Y, life: PhantomData }
    }
}

/// A tensor that a pass reads, shared by threads while another [`Disjoint`] writes, perhaps in place.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a, T> {
    ptr: *const T,
    side: Side,
    life: PhantomData<&'a [T]>,
}

// SAFETY: it is read only where the callers of the kernels promise that no thread writes the same element.
unsafe impl<T: Sync> Send for Source<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Source<'_, T> {}

impl<'a, T> Source<'a, T> {
    pub(crate) fn new(slice: &'a [T], side: Side) -> Self {
        Self { ptr: slice.as_ptr(), side, life: PhantomData }
    }

    /// A tensor that begins at `ptr`, what its view shows alone.
    ///
    /// # Safety
    /// The elements that the view shows may be read for `'a`, and nothing writes them but the pass itself, in place.
    #[cfg(feature = "ndarray")]
    pub(crate) unsafe fn shown(ptr: *const T, side: Side) -> Self {
        Self { ptr, side, life: PhantomData }
    }

    pub(crate) fn as_ptr(&self) -> *const T {
        self.ptr
    }

    pub(crate) fn side(&self) -> Side {
        self.side
    }

    /// The same tensor, its elements elsewhere.
    pub(crate) fn moved_to(self, ptr: *const T) -> Self {
        Self { ptr, ..self }
    }
}

impl<E: Storage> Source<'_, E> {
    /// The elements from `at`: of a whole vector if `FULL`, else the first `n` and `fill`.
    ///
    /// # Safety
    /// They lie inside the tensor, and no thread writes them meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn load_or<I: Isa, const FULL: bool>(
        self,
        isa: I,
        at: usize,
        n: usize,
        fill: Compute<I, E>,
    ) -> Compute<I, E> {
        // SAFETY: the caller's promise.
        unsafe {
            let from = self.ptr.add(at);
            if FULL { E::load(isa, from) } else { E::load_first(isa, from, n, fill) }
        }
    }

    /// The same, filled with zeros.
    ///
    /// # Safety
    /// As [`Source::load_or`].
    #[inline(always)]
    pub(crate) unsafe fn load<I: Isa, const FULL: bool>(self, isa: I, at: usize, n: usize) -> Compute<I, E> {
        // SAFETY: the caller's promise.
        unsafe { self.load_or::<I, FULL>(isa, at, n, Compute::<I, E>::splat(isa, Default::default())) }
    }

    /// Asks the caches for the elements around `at`, which may lie anywhere.
    #[inline(always)]
    pub(crate) fn prefetch<I: Isa>(self, isa: I, at: usize) {
        isa.prefetch(self.ptr.wrapping_add(at).cast());
    }
}

impl<E: Element> Source<'_, E> {
    /// One element, as it is computed with.
    ///
    /// # Safety
    /// As [`Source::load_or`].
    #[inline(always)]
    pub(crate) unsafe fn get(self, at: usize) -> E::Param {
        // SAFETY: the caller's promise.
        unsafe { self.ptr.add(at).read() }.to_param()
    }
}

/// A tensor read and a tensor written: two slices, or one.
#[derive(Clone, Copy)]
pub(crate) struct InOut<'a, T> {
    pub(crate) from: Source<'a, T>,
    pub(crate) to: Disjoint<'a, T>,
}

impl<'a, T> InOut<'a, T> {
    /// `x` to `y`.
    pub(crate) fn forward(x: &'a [T], y: &'a mut [T]) -> Self {
        Self { from: Source::new(x, Side::X), to: Disjoint::tensor(y, Side::Y) }
    }

    /// `dy` to `dx`.
    pub(crate) fn backward(dy: &'a [T], dx: &'a mut [T]) -> Self {
        Self { from: Source::new(dy, Side::Y), to: Disjoint::tensor(dx, Side::X) }
    }

    pub(crate) fn is_in_place(&self) -> bool {
        core::ptr::eq(self.from.ptr, self.to.ptr)
    }

    pub(crate) fn in_place(data: &'a mut [T]) -> Self {
        let to = Disjoint::new(data);
        Self { from: to.source(), to }
    }
}
