//! The x86-64 tiers, picked at run time.

use core::arch::x86_64::*;

mod avx2;
mod avx512;

pub(crate) use avx2::Avx2;
pub(crate) use avx512::Avx512;

/// Bytes of the largest cache that the CPU tells of (CPUID leaf 4 of Intel, 8000001D of AMD, both of one form).
pub(super) fn largest_cache() -> Option<usize> {
    let listed = |range: u32, leaf: u32| {
        let caches = if __cpuid(range).eax >= leaf { 0..8 } else { 0..0 };
        caches.map(move |cache| __cpuid_count(leaf, cache)).take_while(|cache| cache.eax & 0x1f != 0)
    };
    let bytes = |cache: CpuidResult| {
        let [line, partitions, ways] = [0, 12, 22].map(|first| (cache.ebx >> first & 0x3ff) as usize + 1);
        line * partitions * ways * (cache.ecx as usize + 1)
    };
    listed(0, 4).chain(listed(0x8000_0000, 0x8000_001d)).map(bytes).max()
}

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
