//! AVX-512: a logical vector is one zmm register.

use core::arch::x86_64::*;

use super::fold_four;
use crate::simd::{Isa, Part, Tier, Vector};

/// Proof that the CPU has AVX-512 F, BW, DQ and VL.
#[derive(Debug, Clone, Copy)]
pub struct Avx512(());

impl Avx512 {
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("f16c"))
        .then_some(Self(()))
    }
}

/// 16 lanes of f32.
#[derive(Debug, Clone, Copy)]
pub struct F32(__m512);

/// 8 lanes of f64.
#[derive(Debug, Clone, Copy)]
pub struct F64(__m512d);

/// Word `i / 2` at place `i`.
#[cfg(feature = "half")]
const UPPER_HALVES: __m512i = {
    let mut index = [0u16; 32];
    let mut i = 0;
    while i < 32 {
        index[i] = i as u16 / 2;
        i += 1;
    }
    // SAFETY: as many bytes, and any are a vector.
    unsafe { core::mem::transmute(index) }
};

impl Isa for Avx512 {
    const TIER: Tier = Tier::Avx512;
    type F32 = F32;
    type F64 = F64;
    type Apart = Self;

    #[inline(always)]
    fn apart(self) -> Self {
        self
    }

    #[inline(always)]
    fn call<P: Part<Self>>(self, part: P) -> P::Output {
        // SAFETY: `self` proves that the features were detected.
        unsafe { part.call_avx512(self) }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a hint; no address is wrong.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    fn fence(self) {
        // SAFETY: SSE is part of every x86-64.
        unsafe { _mm_sfence() }
    }

    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn load_bits_first(self, from: *const u16, n: usize) -> [u16; 16] {
        let mut bits = [0; 16];
        // SAFETY: `self` proves AVX-512; masked lanes are not touched, the others can be read, as the caller promises.
        unsafe {
            let loaded = _mm256_maskz_loadu_epi16((1 << n) - 1, from.cast());
            _mm256_storeu_si256(bits.as_mut_ptr().cast(), loaded);
        }
        bits
    }
    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn store_bits_first(self, bits: &[u16; 16], to: *mut u16, n: usize) {
        // SAFETY: `self` proves AVX-512; masked lanes are not touched, the others can be written, as the caller
        // promises.
        unsafe { _mm256_mask_storeu_epi16(to.cast(), (1 << n) - 1, _mm256_loadu_si256(bits.as_ptr().cast())) }
    }

    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> F32 {
        // SAFETY: `self` proves AVX-512; 16 values can be read, as the caller promises.
        unsafe {
            // One shuffle, of each value to the upper half of its lane, where widening and a shift would be two.
            let bits = _mm512_castsi256_si512(_mm256_loadu_si256(from.cast()));
            F32(_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAA_AAAA, UPPER_HALVES, bits)))
        }
    }
    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn store_bf16(self, value: F32, to: *mut u16) {
        // SAFETY: `self` proves AVX-512; 16 values can be written, as the caller promises.
        unsafe {
            let bits = _mm512_castps_si512(value.0);
            // Half of the last place kept, less one where that place is even: carries round to nearest even.
            let even = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x0001_0000));
            let half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
            let nearest = _mm512_mask_sub_epi32(half, even, half, _mm512_set1_epi32(1));
            // The upper half of each lane, packed: of the indices of 16-bit words, the odd ones.
            let odd = _mm512_set_epi16(
                0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3,
                1,
            );
            _mm256_storeu_si256(to.cast(), _mm512_castsi512_si256(_mm512_permutexvar_epi16(odd, nearest)));
        }
    }
    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> F32 {
        // SAFETY: `self` proves AVX-512; 16 values can be read, as the caller promises.
        unsafe { F32(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
    }
    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn store_f16(self, value: F32, to: *mut u16) {
        // SAFETY: `self` proves AVX-512; 16 values can be written, as the caller promises.
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value.0)) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> F32 {
        // SAFETY: `self` proves AVX-512; 16 values can be read, as the caller promises.
        unsafe { F32(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())))) }
    }
    #[inline(always)]
    unsafe fn store_i8(self, value: F32, to: *mut i8) {
        // SAFETY: `self` proves AVX-512; 16 values can be written, as the caller promises.
        unsafe { _mm_storeu_si128(to.cast(), i8_of(self, value)) }
    }
    #[inline(always)]
    unsafe fn stream_i8(self, value: F32, to: *mut i8) {
        // SAFETY: `self` proves AVX-512; 16 bytes can be written and are aligned, as the caller promises.
        unsafe { _mm_stream_si128(to.cast(), i8_of(self, value)) }
    }
    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn stream_bits(self, from: &[u16; 16], to: *mut u16) {
        // SAFETY: `self` proves AVX-512; 32 bytes can be written and are aligned, as the caller promises.
        unsafe { _mm256_stream_si256(to.cast(), _mm256_loadu_si256(from.as_ptr().cast())) }
    }
}

/// The lanes as integers, rounded and saturated.
#[inline(always)]
fn i8_of(_: Avx512, value: F32) -> __m128i {
    // SAFETY: the argument proves AVX-512.
    unsafe {
        // What is too large would convert to the least integer, as what is too small does.
        let number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(value.0, value.0);
        let bounded = _mm512_maskz_min_ps(number, value.0, _mm512_set1_ps(127.0));
        _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(bounded))
    }
}

impl Vector<Avx512> for F32 {
    type Scalar = f32;
    type Wide = [F64; 2];
    const LANES: usize = 16;

    #[inline(always)]
    fn splat(_: Avx512, value: f32) -> Self {
        // SAFETY: the argument proves AVX-512.
        unsafe { Self(_mm512_set1_ps(value)) }
    }
    #[inline(always)]
    unsafe fn load(_: Avx512, from: *const f32) -> Self {
        // SAFETY: the argument proves AVX-512; 16 values can be read, as the caller promises.
        unsafe { Self(_mm512_loadu_ps(from)) }
    }
    #[inline(always)]
    unsafe fn load_first(_: Avx512, from: *const f32, n: usize, fill: Self) -> Self {
        // SAFETY: the argument proves AVX-512; masked lanes are not touched, the others can be read, as the caller
        // promises.
        unsafe { Self(_mm512_mask_loadu_ps(fill.0, (1 << n) - 1, from)) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: `self` proves AVX-512; 16 values can be written, as the caller promises.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        // SAFETY: `self` proves AVX-512; 16 aligned values can be written, as the caller promises.
        unsafe {
            _mm512_stream_ps(to, self.0);
        }
    }
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, n: usize) {
        // SAFETY: `self` proves AVX-512; masked lanes are not touched, the others can be written, as the caller
        // promises.
        unsafe { _mm512_mask_storeu_ps(to, (1 << n) - 1, self.0) }
    }
    #[inline(always)]
    fn first(self, n: usize, rest: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        unsafe { Self(_mm512_mask_mov_ps(rest.0, (1 << n) - 1, self.0)) }
    }
    #[inline(always)]
    fn positive(self) -> u32 {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(self.0, _mm512_setzero_ps()).into() }
    }
    #[inline(always)]
    fn of_bits(_: Avx512, bits: u32) -> Self {
        // SAFETY: the argument proves AVX-512.
        unsafe { Self(_mm512_maskz_mov_ps(bits as __mmask16, _mm512_set1_ps(1.0))) }
    }
    #[inline(always)]
    fn where_positive(self, gate: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        unsafe {
            let open = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(gate.0, _mm512_setzero_ps());
            Self(_mm512_maskz_mov_ps(open, self.0))
        }
    }
    #[inline(always)]
    fn unless_positive(self, gate: Self, bent: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        unsafe {
            let bends = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(gate.0, _mm512_setzero_ps());
            Self(_mm512_mask_mov_ps(self.0, bends, bent.0))
        }
    }
    #[inline(always)]
    fn add(self, o: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        unsafe { Self(_mm512_add_ps(self.0, o.0)) }
    }
    #[inline(always)]
    fn sub(self, o: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        unsafe { Self(_mm512_sub_ps(self.0, o.0)) }
    }
    #[inline(always)]
    fn mul(self, o: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        unsafe { Self(_mm512_mul_ps(self.0, o.0)) }
    }
    #[inline(always)]
    fn widen_onto(self, sums: [F64; 2]) -> [F64; 2] {
        // SAFETY: `self` proves AVX-512.
        let (low, high) = unsafe {
            let low = _mm512_cvtps_pd(_mm512_castps512_ps256(self.0));
            (F64(low), F64(_mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(self.0))))
        };
        [sums[0].add(low), sums[1].add(high)]
    }
    #[inline(always)]
    fn no_sums(isa: Avx512) -> [F64; 2] {
        [F64::splat(isa, 0.0); 2]
    }
    #[inline(always)]
    fn fold(sums: [F64; 2]) -> f64 {
        F64::fold(sums[0].add(sums[1]))
    }
    #[inline(always)]
    unsafe fn add_widened(self, sums: *mut f64) {
        // SAFETY: `self` proves AVX-512; 16 sums are at `sums`, as the caller promises.
        unsafe {
            let isa = Avx512(());
            let [low, high] = self.widen_onto([F64::load(isa, sums), F64::load(isa, sums.add(8))]);
            low.store(sums);
            high.store(sums.add(8));
        }
    }
}

impl Vector<Avx512> for F64 {
    type Scalar = f64;
    type Wide = F64;
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(_: Avx512, value: f64) -> Self {
        // SAFETY: the argument proves AVX-512.
        unsafe { Self(_mm512_set1_pd(value)) }
    }
    #[inline(always)]
    unsafe fn load(_: Avx512, from: *const f64) -> Self {
        // SAFETY: the argument proves AVX-512; 8 values can be read, as the caller promises.
        unsafe { Self(_mm512_loadu_pd(from)) }
    }
    #[inline(always)]
    unsafe fn load_first(_: Avx512, from: *const f64, n: usize, fill: Self) -> Self {
        // SAFETY: the argument proves AVX-512; masked lanes are not touched, the others can be read, as the caller
        // promises.
        unsafe { Self(_mm512_mask_loadu_pd(fill.0, (1 << n) - 1, from)) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f64) {
        // SAFETY: `self` proves AVX-512; 8 values can be written, as the caller promises.
        unsafe { _mm512_storeu_pd(to, self.0) }
    }
    #[inline(always)]
    unsafe fn stream(self, to: *mut f64) {
        // SAFETY: `self` proves AVX-512; 8 aligned values can be written, as the caller promises.
        unsafe {
            _mm512_stream_pd(to, self.0);
        }
    }
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f64, n: usize) {
        // SAFETY: `self` proves AVX-512; masked lanes are not touched, the others can be written, as the caller
        // promises.
        unsafe { _mm512_mask_storeu_pd(to, (1 << n) - 1, self.0) }
    }
    #[inline(always)]
    fn first(self, n: usize, rest: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        unsafe { Self(_mm512_mask_mov_pd(rest.0, (1 << n) - 1, self.0)) }
    }
    #[inline(always)]
    fn positive(self) -> u32 {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_cmp_pd_mask::<_CMP_NLE_UQ>(self.0, _mm512_setzero_pd()).into() }
    }
    #[inline(always)]
    fn of_bits(_: Avx512, bits: u32) -> Self {
        // SAFETY: the argument proves AVX-512.
        unsafe { Self(_mm512_maskz_mov_pd(bits as __mmask8, _mm512_set1_pd(1.0))) }
    }
    #[inline(always)]
    fn where_positive(self, gate: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        unsafe {
            let open = _mm512_cmp_pd_mask::<_CMP_NLE_UQ>(gate.0, _mm512_setzero_pd());
            Self(_mm512_maskz_mov_pd(open, self.0))
        }
    }
    #[inline(always)]
    fn unless_positive(self, gate: Self, bent: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        unsafe {
            let bends = _mm512_cmp_pd_mask::<_CMP_LE_OQ>(gate.0, _mm512_setzero_pd());
            Self(_mm512_mask_mov_pd(self.0, bends, bent.0))
        }
    }
    #[inline(always)]
    fn add(self, o: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        unsafe { Self(_mm512_add_pd(self.0, o.0)) }
    }
    #[inline(always)]
    fn sub(self, o: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        unsafe { Self(_mm512_sub_pd(self.0, o.0)) }
    }
    #[inline(always)]
    fn mul(self, o: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        unsafe { Self(_mm512_mul_pd(self.0, o.0)) }
    }
    #[inline(always)]
    fn widen_onto(self, sums: F64) -> F64 {
        sums.add(self)
    }
    #[inline(always)]
    fn no_sums(isa: Avx512) -> F64 {
        Self::splat(isa, 0.0)
    }
    #[inline(always)]
    fn fold(sums: F64) -> f64 {
        // SAFETY: the argument proves AVX-512.
        unsafe { fold_four(_mm256_add_pd(_mm512_castpd512_pd256(sums.0), _mm512_extractf64x4_pd::<1>(sums.0))) }
    }
    #[inline(always)]
    unsafe fn add_widened(self, sums: *mut f64) {
        // SAFETY: `self` proves AVX-512; 8 sums are at `sums`, as the caller promises.
        unsafe { self.add(Self::load(Avx512(()), sums)).store(sums) }
    }
}
