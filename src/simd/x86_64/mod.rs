//! The x86-64 tiers, picked at run time.

use core::arch::x86_64::*;

mod avx2;
mod avx512;

pub(crate) use avx2::Avx2;
pub(crate) use avx512::Avx512;

/// The same index, of which a compiler knows nothing.
#[inline(always)]
pub(super) fn opaque(mut index: usize) -> usize {
    // SAFETY: no instruction at all.
    unsafe { core::arch::asm!("/* {0} */", inout(reg) index, options(pure, nomem, nostack, preserves_flags)) };
    index
}

/// Bytes below which no cache behind the first two levels is believed.
const LEAST: usize = 1 << 20;

/// Bytes of the largest cache behind the first two levels that the CPU tells of (CPUID leaf 4 of Intel, 8000001D of AMD, both of one
/// form). A virtual machine may hide it, or tell nonsense; the second level would then be a bad guess. Enclaves may not ask.
pub(super) fn largest_cache() -> Option<usize> {
    if cfg!(target_env = "sgx") {
        return None;
    }
    let listed = |range: u32, leaf: u32| {
        let caches = if __cpuid(range).eax >= leaf { 0..8 } else { 0..0 };
        caches.map(move |cache| __cpuid_count(leaf, cache)).take_while(|cache| cache.eax & 0x1f != 0)
    };
    let last = |cache: &CpuidResult| cache.eax >> 5 & 7 > 2;
    let bytes = listed(0, 4).chain(listed(0x8000_0000, 0x8000_001d)).filter(last).map(bytes_of).max()?;
    (bytes >= LEAST).then_some(bytes)
}

/// The bytes of a cache of that form: those of a line, partitions of a line, ways and sets, each less one.
fn bytes_of(cache: CpuidResult) -> usize {
    let [line, partitions, ways] = [0, 12, 22].map(|first| (cache.ebx >> first & 0x3ff) as usize + 1);
    line * partitions * ways * (cache.ecx as usize + 1)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_have_the_size_that_their_parts_make() {
        let of = |ebx, ecx| bytes_of(CpuidResult { eax: 0x121, ebx, ecx, edx: 0 });
        // 8 ways of 64 sets, 16 of 32768, 11 of 65536, lines of 64 bytes.
        assert_eq!(of(0x01c0_003f, 63), 32 << 10);
        assert_eq!(of(0x03c0_003f, 32767), 32 << 20);
        assert_eq!(of(0x0280_003f, 65535), 44 << 20);
        assert!(largest_cache().is_none_or(|bytes| bytes >= LEAST));
        // All of them zero.
        assert!(of(0, 0) < LEAST);
    }
}
