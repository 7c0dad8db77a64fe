//! The x86-64 tiers, picked at run time.

use core::arch::x86_64::*;

mod avx2;
mod avx512;

pub(crate) use avx2::Avx2;
pub(crate) use avx512::Avx512;

/// The sum of four lanes: the upper half is added to the lower one until one is left.
///
/// # Safety
/// The CPU has AVX.
#[inline(always)]
unsafe fn fold_four(four: __m256d) -> f64 {
    // SAFETY: the caller's promise.
    unsafe {
        let two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd::<1>(four));
        _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
    }
}
