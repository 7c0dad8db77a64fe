//! AVX2 and F16C: a logical vector is two ymm registers.

use core::arch::x86_64::*;

use super::fold_four;
use crate::simd::{Isa, Part, Tier, Vector};

/// Proof that the CPU has AVX2 and F16C. If `APART`, vectors of f32 hold their lanes as two halves of a word are taken apart.
#[derive(Debug, Clone, Copy)]
pub struct Avx2<const APART: bool = false>(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")).then_some(Self(()))
    }
}

/// 16 lanes of f32: in order, or if `APART` even ones before odd ones.
#[derive(Debug, Clone, Copy)]
pub struct F32<const APART: bool = false>([__m256; 2]);

impl<const APART: bool> F32<APART> {
    /// The lane in each place.
    const PLACES: [[i32; 8]; 2] = match APART {
        false => [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]],
        true => [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]],
    };

    /// [`Self::PLACES`], of each register.
    #[inline(always)]
    fn lanes(_: Avx2<APART>) -> [__m256i; 2] {
        let [a, b] = &Self::PLACES;
        // SAFETY: the argument proves AVX2; both are 32 bytes.
        unsafe { [_mm256_loadu_si256(a.as_ptr().cast()), _mm256_loadu_si256(b.as_ptr().cast())] }
    }

    /// Lane masks, all ones where the lane is below `n`.
    #[inline(always)]
    fn below(isa: Avx2<APART>, n: usize) -> [__m256i; 2] {
        let [a, b] = Self::lanes(isa);
        // SAFETY: the argument proves AVX2.
        unsafe {
            let n = _mm256_set1_epi32(n as i32);
            [_mm256_cmpgt_epi32(n, a), _mm256_cmpgt_epi32(n, b)]
        }
    }

    /// Of lanes in order.
    #[inline(always)]
    fn of(_: Avx2<APART>, [a, b]: [__m256; 2]) -> Self {
        if !APART {
            return Self([a, b]);
        }
        // SAFETY: the argument proves AVX2.
        unsafe {
            let (low, high) = (_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
            let [even, odd] = [_mm256_shuffle_ps::<0x88>(low, high), _mm256_shuffle_ps::<0xdd>(low, high)];
            Self([even, odd])
        }
    }

    /// The lanes in order.
    #[inline(always)]
    fn in_order(self) -> [__m256; 2] {
        let [a, b] = self.0;
        if !APART {
            return [a, b];
        }
        // SAFETY: `self` proves AVX2.
        unsafe {
            let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            [_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high)]
        }
    }
}

/// 8 lanes of f64.
#[derive(Debug, Clone, Copy)]
pub struct F64([__m256d; 2]);

impl<const APART: bool> Isa for Avx2<APART> {
    const TIER: Tier = Tier::Avx2;
    const IN_ORDER: bool = !APART;
    type F32 = F32<APART>;
    type F64 = F64;
    type Apart = Avx2<true>;

    #[inline(always)]
    fn apart(self) -> Avx2<true> {
        Avx2(())
    }

    #[inline(always)]
    fn call<P: Part<Self>>(self, part: P) -> P::Output {
        // SAFETY: `self` proves that the features were detected.
        unsafe { part.call_avx2(self) }
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
    unsafe fn load_bf16(self, from: *const u16) -> F32<APART> {
        // SAFETY: `self` proves AVX2; 16 values can be read, as the caller promises.
        unsafe {
            if APART {
                let pairs = _mm256_loadu_si256(from.cast());
                let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(!0xffff));
                return F32([_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), _mm256_castsi256_ps(odd)]);
            }
            // Eight values in both halves of a register, of which each half takes its own: one instruction after the load.
            let upper = _mm256_setr_epi8(
                -1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, //
                -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15,
            );
            let widened = |at: *const u16| {
                let eight = _mm256_broadcastsi128_si256(_mm_loadu_si128(at.cast()));
                _mm256_castsi256_ps(_mm256_shuffle_epi8(eight, upper))
            };
            F32([widened(from), widened(from.add(8))])
        }
    }
    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn store_bf16(self, value: F32<APART>, to: *mut u16) {
        // SAFETY: `self` proves AVX2; 16 values can be written, as the caller promises.
        unsafe {
            let [a, b] = [bf16_bits(self, value.0[0]), bf16_bits(self, value.0[1])];
            if APART {
                let pairs = _mm256_blend_epi16::<0b1010_1010>(_mm256_srli_epi32::<16>(a), b);
                return _mm256_storeu_si256(to.cast(), pairs);
            }
            // The upper halves of all lanes, within each half of the registers; the permutation puts the quarters in order.
            let low = _mm256_setr_epi8(
                2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1, //
                2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1,
            );
            let high = _mm256_setr_epi8(
                -1, -1, -1, -1, -1, -1, -1, -1, 2, 3, 6, 7, 10, 11, 14, 15, //
                -1, -1, -1, -1, -1, -1, -1, -1, 2, 3, 6, 7, 10, 11, 14, 15,
            );
            let packed = _mm256_or_si256(_mm256_shuffle_epi8(a, low), _mm256_shuffle_epi8(b, high));
            _mm256_storeu_si256(to.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
        }
    }
    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> F32<APART> {
        // SAFETY: `self` proves F16C; 16 values can be read, as the caller promises.
        unsafe {
            F32::of(
                self,
                [_mm256_cvtph_ps(_mm_loadu_si128(from.cast())), _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast()))],
            )
        }
    }
    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn store_f16(self, value: F32<APART>, to: *mut u16) {
        // SAFETY: `self` proves F16C; 16 values can be written, as the caller promises.
        unsafe {
            let [a, b] = value.in_order();
            _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a));
            _mm_storeu_si128(to.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(b));
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> F32<APART> {
        // SAFETY: `self` proves AVX2; 16 values can be read, as the caller promises.
        unsafe {
            let values = _mm_loadu_si128(from.cast());
            let wide = |values| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values));
            F32::of(self, [wide(values), wide(_mm_srli_si128::<8>(values))])
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, value: F32<APART>, to: *mut i8) {
        // SAFETY: `self` proves AVX2; 16 values can be written, as the caller promises.
        unsafe { _mm_storeu_si128(to.cast(), i8_of(self, value.in_order())) }
    }
    #[inline(always)]
    unsafe fn stream_i8(self, value: F32<APART>, to: *mut i8) {
        // SAFETY: `self` proves AVX2; 16 bytes can be written and are aligned, as the caller promises.
        unsafe { _mm_stream_si128(to.cast(), i8_of(self, value.in_order())) }
    }
    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn stream_bits(self, from: &[u16; 16], to: *mut u16) {
        // SAFETY: `self` proves AVX2; 32 bytes can be written and are aligned, as the caller promises.
        unsafe { _mm256_stream_si256(to.cast(), _mm256_loadu_si256(from.as_ptr().cast())) }
    }
}

/// The lanes as integers, rounded and saturated.
#[inline(always)]
fn i8_of<const APART: bool>(_: Avx2<APART>, [a, b]: [__m256; 2]) -> __m128i {
    // SAFETY: the argument proves AVX2.
    unsafe {
        // What is too large would convert to the least integer, as what is too small does.
        let integers = |v: __m256| {
            let number = _mm256_and_ps(v, _mm256_cmp_ps::<_CMP_ORD_Q>(v, v));
            _mm256_cvtps_epi32(_mm256_min_ps(number, _mm256_set1_ps(127.0)))
        };
        // Packing works within each half of the registers; the permutation puts the quarters in order.
        let packed = _mm256_packs_epi32(integers(a), integers(b));
        let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
        _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256::<1>(ordered))
    }
}

/// The bits of each lane as bf16, rounded to nearest even; in the upper half of each lane. With no shift: few pipes do those.
#[cfg(feature = "half")]
#[inline(always)]
fn bf16_bits<const APART: bool>(_: Avx2<APART>, v: __m256) -> __m256i {
    // SAFETY: the argument proves AVX2.
    unsafe {
        let bits = _mm256_castps_si256(v);
        // One less than a half where the last bit that stays is zero.
        let last = _mm256_and_si256(bits, _mm256_set1_epi32(0x1_0000));
        let less = _mm256_cmpeq_epi32(last, _mm256_setzero_si256());
        _mm256_add_epi32(bits, _mm256_add_epi32(less, _mm256_set1_epi32(0x8000)))
    }
}

/// Lane masks, all ones where `lane < n`, for each of the two registers.
#[inline(always)]
fn first_f64<const APART: bool>(_: Avx2<APART>, n: usize) -> [__m256i; 2] {
    // SAFETY: the argument proves AVX2.
    unsafe {
        let n = _mm256_set1_epi64x(n as i64);
        let lanes = _mm256_setr_epi64x(0, 1, 2, 3);
        [_mm256_cmpgt_epi64(n, lanes), _mm256_cmpgt_epi64(n, _mm256_add_epi64(lanes, _mm256_set1_epi64x(4)))]
    }
}

impl<const APART: bool> Vector<Avx2<APART>> for F32<APART> {
    type Scalar = f32;
    type Wide = [F64; 2];
    const LANES: usize = 16;

    #[inline(always)]
    fn splat(_: Avx2<APART>, value: f32) -> Self {
        // SAFETY: the argument proves AVX2.
        unsafe { Self([_mm256_set1_ps(value); 2]) }
    }
    #[inline(always)]
    unsafe fn load(isa: Avx2<APART>, from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self::of(isa, Self::load_kept(isa, from).0) }
    }
    #[inline(always)]
    unsafe fn load_kept(_: Avx2<APART>, from: *const f32) -> Self {
        // SAFETY: the argument proves AVX2; 16 values can be read, as the caller promises.
        unsafe { Self([_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))]) }
    }
    #[inline(always)]
    unsafe fn keep(self, to: *mut f32) {
        // SAFETY: `self` proves AVX2; 16 values can be written, as the caller promises.
        unsafe {
            _mm256_storeu_ps(to, self.0[0]);
            _mm256_storeu_ps(to.add(8), self.0[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_first(isa: Avx2<APART>, from: *const f32, n: usize, fill: Self) -> Self {
        let [a, b] = F32::<false>::below(Avx2(()), n);
        // SAFETY: the argument proves AVX2; masked lanes are not touched, the others can be read, as the caller promises.
        let read = unsafe { [_mm256_maskload_ps(from, a), _mm256_maskload_ps(from.wrapping_add(8), b)] };
        Self::of(isa, read).first(n, fill)
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { Self(self.in_order()).keep(to) }
    }
    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        // SAFETY: `self` proves AVX2; 16 aligned values can be written, as the caller promises.
        unsafe {
            let [a, b] = self.in_order();
            _mm256_stream_ps(to, a);
            _mm256_stream_ps(to.add(8), b);
        }
    }
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, n: usize) {
        let ([a, b], masks) = (self.in_order(), F32::<false>::below(Avx2(()), n));
        // SAFETY: `self` proves AVX2; masked lanes are not touched, the others can be written, as the caller promises.
        unsafe {
            _mm256_maskstore_ps(to, masks[0], a);
            _mm256_maskstore_ps(to.wrapping_add(8), masks[1], b);
        }
    }
    #[inline(always)]
    fn first(self, n: usize, rest: Self) -> Self {
        let masks = Self::below(Avx2(()), n);
        // SAFETY: `self` proves AVX2.
        let blend = |i: usize| unsafe { _mm256_blendv_ps(rest.0[i], self.0[i], _mm256_castsi256_ps(masks[i])) };
        Self([blend(0), blend(1)])
    }
    #[inline(always)]
    fn lower(self) -> Self {
        if APART {
            return self;
        }
        // SAFETY: `self` proves AVX2.
        Self([self.0[0], unsafe { _mm256_setzero_ps() }])
    }
    #[inline(always)]
    fn positive(self) -> u32 {
        // SAFETY: `self` proves AVX2.
        let bits =
            |v: __m256| unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NLE_UQ>(v, _mm256_setzero_ps())) as u32 };
        let [a, b] = self.in_order();
        bits(a) | bits(b) << 8
    }
    #[inline(always)]
    fn of_bits(isa: Avx2<APART>, bits: u32) -> Self {
        let lanes = Self::lanes(isa);
        // SAFETY: the argument proves AVX2.
        let ones = |i: usize| unsafe {
            let of_lane = _mm256_sllv_epi32(_mm256_set1_epi32(1), lanes[i]);
            let set = _mm256_and_si256(_mm256_set1_epi32(bits as i32), of_lane);
            let open = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, of_lane));
            _mm256_and_ps(open, _mm256_set1_ps(1.0))
        };
        Self([ones(0), ones(1)])
    }
    #[inline(always)]
    fn where_positive(self, gate: Self) -> Self {
        // SAFETY: `self` proves AVX2.
        let lanes = |i: usize| unsafe {
            let open = _mm256_cmp_ps::<_CMP_NLE_UQ>(gate.0[i], _mm256_setzero_ps());
            _mm256_and_ps(self.0[i], open)
        };
        Self([lanes(0), lanes(1)])
    }
    #[inline(always)]
    fn unless_positive(self, gate: Self, bent: Self) -> Self {
        // SAFETY: `self` proves AVX2.
        let lanes = |i: usize| unsafe {
            let bends = _mm256_cmp_ps::<_CMP_LE_OQ>(gate.0[i], _mm256_setzero_ps());
            _mm256_blendv_ps(self.0[i], bent.0[i], bends)
        };
        Self([lanes(0), lanes(1)])
    }
    #[inline(always)]
    fn add(self, o: Self) -> Self {
        // SAFETY: `self` proves AVX2.
        unsafe { Self([_mm256_add_ps(self.0[0], o.0[0]), _mm256_add_ps(self.0[1], o.0[1])]) }
    }
    #[inline(always)]
    fn sub(self, o: Self) -> Self {
        // SAFETY: `self` proves AVX2.
        unsafe { Self([_mm256_sub_ps(self.0[0], o.0[0]), _mm256_sub_ps(self.0[1], o.0[1])]) }
    }
    #[inline(always)]
    fn mul(self, o: Self) -> Self {
        // SAFETY: `self` proves AVX2.
        unsafe { Self([_mm256_mul_ps(self.0[0], o.0[0]), _mm256_mul_ps(self.0[1], o.0[1])]) }
    }
    #[inline(always)]
    fn widen_onto(self, mut sums: [F64; 2]) -> [F64; 2] {
        for (v, sums) in self.in_order().into_iter().zip(&mut sums) {
            // SAFETY: `self` proves AVX2.
            let (low, high) =
                unsafe { (_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(v))) };
            *sums = sums.plus(F64([low, high]));
        }
        sums
    }
    #[inline(always)]
    fn no_sums(isa: Avx2<APART>) -> [F64; 2] {
        [F64::splat(isa, 0.0); 2]
    }
    #[inline(always)]
    fn fold(sums: [F64; 2]) -> f64 {
        sums[0].plus(sums[1]).folded()
    }
    #[inline(always)]
    unsafe fn add_widened(self, sums: *mut f64) {
        // SAFETY: `self` proves AVX2; 16 sums are at `sums`, as the caller promises.
        unsafe {
            let isa = Avx2::<APART>(());
            let [low, high] = self.widen_onto([F64::load(isa, sums), F64::load(isa, sums.add(8))]);
            Vector::<Avx2<APART>>::store(low, sums);
            Vector::<Avx2<APART>>::store(high, sums.add(8));
        }
    }
}

impl F64 {
    #[inline(always)]
    fn plus(self, o: Self) -> Self {
        // SAFETY: `self` proves AVX2.
        unsafe { Self([_mm256_add_pd(self.0[0], o.0[0]), _mm256_add_pd(self.0[1], o.0[1])]) }
    }
    /// As [`Vector::fold`].
    #[inline(always)]
    fn folded(self) -> f64 {
        // SAFETY: `self` proves AVX2.
        unsafe { fold_four(_mm256_add_pd(self.0[0], self.0[1])) }
    }
}

impl<const APART: bool> Vector<Avx2<APART>> for F64 {
    type Scalar = f64;
    type Wide = F64;
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(_: Avx2<APART>, value: f64) -> Self {
        // SAFETY: the argument proves AVX2.
        unsafe { Self([_mm256_set1_pd(value); 2]) }
    }
    #[inline(always)]
    unsafe fn load(_: Avx2<APART>, from: *const f64) -> Self {
        // SAFETY: the argument proves AVX2; 8 values can be read, as the caller promises.
        unsafe { Self([_mm256_loadu_pd(from), _mm256_loadu_pd(from.add(4))]) }
    }
    #[inline(always)]
    unsafe fn load_first(isa: Avx2<APART>, from: *const f64, n: usize, fill: Self) -> Self {
        let [a, b] = first_f64(isa, n);
        // SAFETY: `isa` proves AVX2; masked lanes are not touched, the others can be read, as the caller promises.
        unsafe {
            Self([
                _mm256_blendv_pd(fill.0[0], _mm256_maskload_pd(from, a), _mm256_castsi256_pd(a)),
                _mm256_blendv_pd(fill.0[1], _mm256_maskload_pd(from.wrapping_add(4), b), _mm256_castsi256_pd(b)),
            ])
        }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f64) {
        // SAFETY: `self` proves AVX2; 8 values can be written, as the caller promises.
        unsafe {
            _mm256_storeu_pd(to, self.0[0]);
            _mm256_storeu_pd(to.add(4), self.0[1]);
        }
    }
    #[inline(always)]
    unsafe fn stream(self, to: *mut f64) {
        // SAFETY: `self` proves AVX2; 8 aligned values can be written, as the caller promises.
        unsafe {
            _mm256_stream_pd(to, self.0[0]);
            _mm256_stream_pd(to.add(4), self.0[1]);
        }
    }
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f64, n: usize) {
        let [a, b] = first_f64(Avx2::<APART>(()), n);
        // SAFETY: `self` proves AVX2; masked lanes are not touched, the others can be written, as the caller promises.
        unsafe {
            _mm256_maskstore_pd(to, a, self.0[0]);
            _mm256_maskstore_pd(to.wrapping_add(4), b, self.0[1]);
        }
    }
    #[inline(always)]
    fn first(self, n: usize, rest: Self) -> Self {
        let masks = first_f64(Avx2::<APART>(()), n);
        // SAFETY: `self` proves AVX2.
        let blend = |i: usize| unsafe { _mm256_blendv_pd(rest.0[i], self.0[i], _mm256_castsi256_pd(masks[i])) };
        Self([blend(0), blend(1)])
    }
    #[inline(always)]
    fn lower(self) -> Self {
        // SAFETY: `self` proves AVX2.
        Self([self.0[0], unsafe { _mm256_setzero_pd() }])
    }
    #[inline(always)]
    fn positive(self) -> u32 {
        // SAFETY: `self` proves AVX2.
        let bits = |i: usize| unsafe {
            _mm256_movemask_pd(_mm256_cmp_pd::<_CMP_NLE_UQ>(self.0[i], _mm256_setzero_pd())) as u32
        };
        bits(0) | bits(1) << 4
    }
    #[inline(always)]
    fn of_bits(_: Avx2<APART>, bits: u32) -> Self {
        // SAFETY: the argument proves AVX2.
        let lanes = |bits: u32| unsafe {
            let of_lane = _mm256_setr_epi64x(1, 2, 4, 8);
            let set = _mm256_and_si256(_mm256_set1_epi64x(bits as i64), of_lane);
            let open = _mm256_castsi256_pd(_mm256_cmpeq_epi64(set, of_lane));
            _mm256_and_pd(open, _mm256_set1_pd(1.0))
        };
        Self([lanes(bits), lanes(bits >> 4)])
    }
    #[inline(always)]
    fn where_positive(self, gate: Self) -> Self {
        // SAFETY: `self` proves AVX2.
        let lanes = |i: usize| unsafe {
            let open = _mm256_cmp_pd::<_CMP_NLE_UQ>(gate.0[i], _mm256_setzero_pd());
            _mm256_and_pd(self.0[i], open)
        };
        Self([lanes(0), lanes(1)])
    }
    #[inline(always)]
    fn unless_positive(self, gate: Self, bent: Self) -> Self {
        // SAFETY: `self` proves AVX2.
        let lanes = |i: usize| unsafe {
            let bends = _mm256_cmp_pd::<_CMP_LE_OQ>(gate.0[i], _mm256_setzero_pd());
            _mm256_blendv_pd(self.0[i], bent.0[i], bends)
        };
        Self([lanes(0), lanes(1)])
    }
    #[inline(always)]
    fn add(self, o: Self) -> Self {
        self.plus(o)
    }
    #[inline(always)]
    fn sub(self, o: Self) -> Self {
        // SAFETY: `self` proves AVX2.
        unsafe { Self([_mm256_sub_pd(self.0[0], o.0[0]), _mm256_sub_pd(self.0[1], o.0[1])]) }
    }
    #[inline(always)]
    fn mul(self, o: Self) -> Self {
        // SAFETY: `self` proves AVX2.
        unsafe { Self([_mm256_mul_pd(self.0[0], o.0[0]), _mm256_mul_pd(self.0[1], o.0[1])]) }
    }
    #[inline(always)]
    fn widen_onto(self, sums: F64) -> F64 {
        sums.plus(self)
    }
    #[inline(always)]
    fn no_sums(isa: Avx2<APART>) -> F64 {
        Self::splat(isa, 0.0)
    }
    #[inline(always)]
    fn fold(sums: F64) -> f64 {
        sums.folded()
    }
    #[inline(always)]
    unsafe fn add_widened(self, sums: *mut f64) {
        // SAFETY: `self` proves AVX2; 8 sums are at `sums`, as the caller promises.
        unsafe {
            let sum = self.plus(Self::load(Avx2::<APART>(()), sums));
            Vector::<Avx2<APART>>::store(sum, sums)
        }
    }
}
