//! One bit per element: whether the activation let it through. A forward pass records the bits, a backward pass reads them.
//!
//! Bit `i % 8` of byte `i / 8` is that of element `i` of the dense tensor.

use core::ops::Range;
use core::sync::atomic::{AtomicU8, Ordering::Relaxed};

use crate::element::Real;
use crate::error::{Result, check_len};

/// Bytes beyond those that are full of bits, so that any bits are read as four bytes.
const SPARE: usize = 4;

/// The bits of a tensor, or of a part of one.
#[derive(Debug)]
pub(crate) struct Gates<'a, B> {
    bytes: &'a [B],
    /// The bit of the first element.
    first: usize,
}

impl<B> Clone for Gates<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for Gates<'_, B> {}

/// Bits that threads record.
pub(crate) type Recording<'a> = Gates<'a, AtomicU8>;
/// Bits that were recorded.
pub(crate) type Recorded<'a> = Gates<'a, u8>;

impl<'a, B> Gates<'a, B> {
    pub(crate) fn new(bytes: &'a [B]) -> Self {
        Self { bytes, first: 0 }
    }

    /// The bytes for so many elements.
    pub(crate) fn len_for(elements: usize) -> usize {
        elements / 8 + SPARE
    }

    pub(crate) fn check(&self, elements: usize) -> Result<()> {
        check_len("gates", Self::len_for(self.first + elements), self.bytes.len())
    }

    /// The bit of the first element.
    pub(crate) fn first(&self) -> usize {
        self.first
    }

    /// Those of the elements from `by` on.
    pub(crate) fn shifted(self, by: usize) -> Self {
        Self { first: self.first + by, ..self }
    }

    /// Those of some elements alone.
    pub(crate) fn part(self, range: Range<usize>) -> Self {
        let (from, first) = (range.start / 8, range.start % 8);
        Self { bytes: &self.bytes[from..from + Self::len_for(first + range.len())], first }
    }
}

impl<'a> Recording<'a> {
    /// For a caller that lends its bytes. Passes may share them: no data races, though the bits of two passes mix.
    pub(crate) fn over(bytes: &'a mut [u8]) -> Self {
        // SAFETY: the two types have the same size and alignment, and the borrow is exclusive as long as this lives.
        Self::new(unsafe { &*(core::ptr::from_mut(bytes) as *const [AtomicU8]) })
    }

    /// Records the bits of the elements from `at`: of `lanes` elements that begin a byte if `FULL`, else of the first `n`,
    /// fewer than 17, anywhere.
    #[inline(always)]
    pub(crate) fn record<const FULL: bool>(self, bits: u32, at: usize, n: usize) {
        let at = self.first + at;
        if FULL {
            debug_assert!(at.is_multiple_of(8) && n.is_multiple_of(8));
            for (byte, bits) in self.bytes[at / 8..][..n / 8].iter().zip(bits.to_le_bytes()) {
                byte.store(bits, Relaxed);
            }
            return;
        }
        // Other threads have the other bits of the first and the last byte.
        let mask = ((1u32 << n) - 1) << (at % 8);
        let (bits, mask) = (((bits << (at % 8)) & mask).to_le_bytes(), mask.to_le_bytes());
        for ((byte, bits), mask) in self.bytes[at / 8..].iter().zip(bits).zip(mask).filter(|&(_, mask)| mask != 0) {
            byte.fetch_and(!mask, Relaxed);
            byte.fetch_or(bits, Relaxed);
        }
    }
}

impl Recorded<'_> {
    /// The bits of the elements from `at`, at least 25 of them or all that are left, in the low bits.
    #[inline(always)]
    pub(crate) fn bits(self, at: usize) -> u32 {
        let at = self.first + at;
        let four = self.bytes[at / 8..].first_chunk().copied().unwrap_or_default();
        u32::from_le_bytes(four) >> (at % 8)
    }

    /// One if the bit of an element is set, else zero: a value of the sign that the activation saw.
    #[inline(always)]
    pub(crate) fn sign<R: Real>(self, at: usize) -> R {
        R::from_f64(f64::from(self.bits(at) & 1))
    }

    /// The byte of the element at `at`, which may lie anywhere.
    #[inline(always)]
    pub(crate) fn address(self, at: usize) -> *const u8 {
        self.bytes.as_ptr().wrapping_add(self.first.wrapping_add(at) / 8)
    }
}
