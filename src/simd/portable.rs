//! The tier for every target: vectors of the crate `wide`, which compile to what the build's baseline has.

use wide::{f32x16, f64x8};

use super::{Isa, Part, Tier, Vector};

/// The portable tier; any CPU that runs the build has it.
#[derive(Debug, Clone, Copy)]
pub struct Portable;

impl Isa for Portable {
    const TIER: Tier = Tier::Portable;
    type F32 = f32x16;
    type F64 = f64x8;
    type Apart = Self;

    #[inline(always)]
    fn apart(self) -> Self {
        self
    }

    #[inline(always)]
    fn call<P: Part<Self>>(self, part: P) -> P::Output {
        part.call_portable(self)
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint; no address is wrong, and SSE is part of every x86-64.
        unsafe {
            core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(at.cast());
        }
        let _ = at;
    }
    #[inline(always)]
    fn fence(self) {}

    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> f32x16 {
        // SAFETY: 16 values can be read, as the caller promises.
        let bits = unsafe { from.cast::<[u16; 16]>().read_unaligned() };
        f32x16::new(bits.map(|b| f32::from_bits(u32::from(b) << 16)))
    }
    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn store_bf16(self, value: f32x16, to: *mut u16) {
        let bits = value.to_array().map(|v| half::bf16::from_f32(v).to_bits());
        // SAFETY: 16 values can be written, as the caller promises.
        unsafe { to.cast::<[u16; 16]>().write_unaligned(bits) }
    }
    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> f32x16 {
        use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
        // SAFETY: 16 values can be read, as the caller promises.
        let bits = unsafe { from.cast::<[u16; 16]>().read_unaligned() };
        let mut lanes = [0f32; 16];
        bits.reinterpret_cast::<half::f16>().convert_to_f32_slice(&mut lanes);
        f32x16::new(lanes)
    }
    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn store_f16(self, value: f32x16, to: *mut u16) {
        use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
        let mut bits = [0u16; 16];
        bits.reinterpret_cast_mut::<half::f16>().convert_from_f32_slice(&value.to_array());
        // SAFETY: 16 values can be written, as the caller promises.
        unsafe { to.cast::<[u16; 16]>().write_unaligned(bits) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> f32x16 {
        // SAFETY: 16 values can be read, as the caller promises.
        f32x16::new(unsafe { from.cast::<[i8; 16]>().read_unaligned() }.map(f32::from))
    }
    #[inline(always)]
    unsafe fn store_i8(self, value: f32x16, to: *mut i8) {
        // Beside so large a number the last bit is 1, and the low bits are the integer.
        let rounded = value.to_array().map(|v| (v.clamp(-128.0, 127.0) + 12_582_912.0).to_bits() as i8);
        // SAFETY: 16 values can be written, as the caller promises.
        unsafe { to.cast::<[i8; 16]>().write_unaligned(rounded) }
    }
    #[inline(always)]
    unsafe fn stream_i8(self, value: f32x16, to: *mut i8) {
        // SAFETY: the caller's promise is the callee's. There is no portable way past the caches.
        unsafe { self.store_i8(value, to) }
    }
    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn stream_bits(self, from: &[u16; 16], to: *mut u16) {
        // SAFETY: 16 values can be written, as the caller promises.
        unsafe { to.cast::<[u16; 16]>().write(*from) }
    }
}

macro_rules! wide_vector {
    ($vector:ty, $scalar:ty, $lanes:literal) => {
        impl Vector<Portable> for $vector {
            type Scalar = $scalar;
            type Wide = [f64x8; $lanes / 8];
            const LANES: usize = $lanes;

            #[inline(always)]
            fn splat(_: Portable, value: $scalar) -> Self {
                Self::splat(value)
            }
            #[inline(always)]
            unsafe fn load(_: Portable, from: *const $scalar) -> Self {
                // SAFETY: LANES values can be read, as the caller promises.
                Self::new(unsafe { from.cast::<[$scalar; $lanes]>().read_unaligned() })
            }
            #[inline(always)]
            unsafe fn load_first(_: Portable, from: *const $scalar, n: usize, fill: Self) -> Self {
                let mut lanes = fill.to_array();
                // SAFETY: n < LANES values can be read, as the caller promises.
                unsafe { core::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n) };
                Self::new(lanes)
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut $scalar) {
                // SAFETY: LANES values can be written, as the caller promises.
                unsafe { to.cast::<[$scalar; $lanes]>().write_unaligned(self.to_array()) }
            }
            #[inline(always)]
            unsafe fn stream(self, to: *mut $scalar) {
                // SAFETY: the caller's promise is the callee's. There is no portable way past the caches.
                unsafe { self.store(to) }
            }
            #[inline(always)]
            unsafe fn store_first(self, to: *mut $scalar, n: usize) {
                // SAFETY: n < LANES values can be written, as the caller promises.
                unsafe { core::ptr::copy_nonoverlapping(self.to_array().as_ptr(), to, n) }
            }
            #[inline(always)]
            fn first(self, n: usize, rest: Self) -> Self {
                let mut lanes = rest.to_array();
                lanes[..n].copy_from_slice(&self.to_array()[..n]);
                Self::new(lanes)
            }
            #[inline(always)]
            fn positive(self) -> u32 {
                !self.simd_le(Self::ZERO).to_bitmask() & ((1 << $lanes) - 1)
            }
            #[inline(always)]
            fn of_bits(_: Portable, bits: u32) -> Self {
                Self::new(core::array::from_fn(|lane| if bits >> lane & 1 == 1 { 1.0 } else { 0.0 }))
            }
            #[inline(always)]
            fn where_positive(self, gate: Self) -> Self {
                self.unless_positive(gate, Self::ZERO)
            }
            #[inline(always)]
            fn unless_positive(self, gate: Self, bent: Self) -> Self {
                gate.simd_le(Self::ZERO).select(bent, self)
            }
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self + other
            }
            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                self - other
            }
            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                self * other
            }
            #[inline(always)]
            fn widen_onto(self, mut sums: [f64x8; $lanes / 8]) -> [f64x8; $lanes / 8] {
                let lanes = self.to_array().map(f64::from);
                for (sums, lanes) in sums.iter_mut().zip(lanes.as_chunks().0) {
                    *sums += f64x8::new(*lanes);
                }
                sums
            }
            #[inline(always)]
            fn no_sums(_: Portable) -> [f64x8; $lanes / 8] {
                [f64x8::splat(0.0); $lanes / 8]
            }
            #[inline(always)]
            fn fold(sums: [f64x8; $lanes / 8]) -> f64 {
                let mut lanes = sums[0].to_array();
                for sums in &sums[1..] {
                    lanes = (f64x8::new(lanes) + *sums).to_array();
                }
                for half in [4, 2, 1] {
                    for i in 0..half {
                        lanes[i] += lanes[i + half];
                    }
                }
                lanes[0]
            }
            #[inline(always)]
            unsafe fn add_widened(self, sums: *mut f64) {
                for (i, lane) in self.to_array().into_iter().enumerate() {
                    // SAFETY: i < LANES, and LANES values are at `sums`, as the caller promises.
                    unsafe { *sums.add(i) += f64::from(lane) };
                }
            }
        }
    };
}

wide_vector!(f32x16, f32, 16);
wide_vector!(f64x8, f64, 8);
