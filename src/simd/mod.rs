//! The SIMD tiers behind one small trait. Kernels are written once over [`Isa`] and [`Vector`].
//!
//! Every tier computes on the same logical vectors, 16 lanes of f32 or 8 of f64, and rounds each addition and
//! multiplication by itself, so that all tiers give the same bits.
//!
//! A value of a tier's type exists only where its CPU features were detected, and a value of its vectors only
//! where that type was at hand: that is what makes the arithmetic on vectors safe to call. The functions are
//! `#[inline(always)]` because code keeps a tier's features only when inlined into the tier's trampoline in
//! [`dispatch`](dispatch::dispatch).

pub(crate) mod dispatch;
mod portable;
mod tuning;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::sync::OnceLock;

use crate::element::{Element, Real};

pub(crate) use dispatch::{Dispatched, Kernel, dispatch};
pub use dispatch::{Part, Tier};
pub(crate) use tuning::Tuning;

/// Lanes of the widest logical vector (f32); buffers for one vector are this long.
pub(crate) const MAX_LANES: usize = 16;

/// The most bytes of the largest cache that are counted on: larger ones belong to dozens of cores.
const SHARED_CACHE: usize = 96 << 20;

/// Bytes of the cache that all of a tensor may lie in: the largest that the CPU tells of, or what many have.
pub(crate) fn largest_cache() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    #[cfg(target_arch = "x86_64")]
    let find = x86_64::largest_cache;
    #[cfg(not(target_arch = "x86_64"))]
    let find = || None;
    *BYTES.get_or_init(|| find().unwrap_or(32 << 20).min(SHARED_CACHE))
}

/// A set of instructions: the vectors it computes on and its conversions of half-width floats.
pub trait Isa: Copy + Send + Sync {
    /// The tier's name.
    const TIER: Tier;
    /// Whether [`Vector::stream`] stores past the caches.
    const STREAMS: bool = Self::TIER.streams();
    /// Whether vectors hold their lanes in order.
    const IN_ORDER: bool = true;
    /// 16 lanes of f32.
    type F32: Vector<Self, Scalar = f32>;
    /// 8 lanes of f64.
    type F64: Vector<Self, Scalar = f64>;
    /// The same tier with the lanes of its f32 where taking bf16 apart leaves them, for what treats all lanes alike. What asks for their
    /// order gets it, but at a price.
    type Apart: Isa;

    /// The same tier, apart.
    fn apart(self) -> Self::Apart;

    /// Runs `part` in a function of its own, compiled for the tier's features.
    fn call<P: Part<Self>>(self, part: P) -> P::Output;
    /// Asks the caches for the line at `at`, which may be any address.
    fn prefetch(self, at: *const u8);
    /// Makes streamed stores visible to other threads in order.
    fn fence(self);

    /// Loads the bits of the first `n < 16` of 16 values, zeros for the others.
    ///
    /// # Safety
    /// `n` values can be read from `from`; nothing beyond them is touched.
    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn load_bits_first(self, from: *const u16, n: usize) -> [u16; 16] {
        // SAFETY: the first 8 or all, then what is left, as the caller promises.
        let halves = unsafe { [up_to_eight(from, n.min(8)), up_to_eight(from.wrapping_add(8), n.saturating_sub(8))] };
        let bytes = halves.map(u128::to_le_bytes);
        // SAFETY: both are 32 bytes, of which any will do.
        unsafe { core::mem::transmute::<[[u8; 16]; 2], [u16; 16]>(bytes) }
    }
    /// Stores the bits of the first `n < 16` of 16 values.
    ///
    /// # Safety
    /// `n` values can be written to `to`; nothing beyond them is touched.
    #[cfg(feature = "half")]
    #[inline(always)]
    unsafe fn store_bits_first(self, bits: &[u16; 16], to: *mut u16, n: usize) {
        // SAFETY: n < 16 values are written, as the caller promises, from a longer buffer.
        unsafe {
            match n {
                8.. => copy_ends::<8>(bits, to, n),
                4.. => copy_ends::<4>(bits, to, n),
                2.. => copy_ends::<2>(bits, to, n),
                1 => copy_ends::<1>(bits, to, n),
                0 => (),
            }
        }
    }
    /// Loads 16 bf16 values given by their bits.
    ///
    /// # Safety
    /// 16 values can be read from `from`; no alignment is asked for.
    #[cfg(feature = "half")]
    unsafe fn load_bf16(self, from: *const u16) -> Self::F32;
    /// Rounds to bf16, nearest even, and stores the bits. A NaN stays one unless the upper 16 of its bits are all ones and
    /// the rest would round up: what is computed from elements and from parameters whose NaNs are plain is none of those.
    ///
    /// # Safety
    /// 16 values can be written to `to`; no alignment is asked for.
    #[cfg(feature = "half")]
    unsafe fn store_bf16(self, value: Self::F32, to: *mut u16);
    /// Loads 16 f16 values given by their bits.
    ///
    /// # Safety
    /// 16 values can be read from `from`; no alignment is asked for.
    #[cfg(feature = "half")]
    unsafe fn load_f16(self, from: *const u16) -> Self::F32;
    /// Rounds to f16, nearest even, and stores the bits.
    ///
    /// # Safety
    /// 16 values can be written to `to`; no alignment is asked for.
    #[cfg(feature = "half")]
    unsafe fn store_f16(self, value: Self::F32, to: *mut u16);
    /// Loads 16 integers.
    ///
    /// # Safety
    /// 16 values can be read from `from`.
    unsafe fn load_i8(self, from: *const i8) -> Self::F32;
    /// Rounds to integers, ties to even, and stores them: the ends of the range for what is beyond it, zero for a NaN as plain as those
    /// of parameters are.
    ///
    /// # Safety
    /// 16 values can be written to `to`.
    unsafe fn store_i8(self, value: Self::F32, to: *mut i8);
    /// [`Isa::store_i8`] past the caches, where the tier can.
    ///
    /// # Safety
    /// 16 values can be written to `to`, which is aligned to 16 bytes.
    unsafe fn stream_i8(self, value: Self::F32, to: *mut i8);
    /// Stores 32 bytes past the caches, where the tier can.
    ///
    /// # Safety
    /// 16 values can be read from `from` and written to `to`, which is aligned to 32 bytes.
    #[cfg(feature = "half")]
    unsafe fn stream_bits(self, from: &[u16; 16], to: *mut u16);
}

/// A logical vector. Memory operations ask for no alignment.
pub trait Vector<I: Isa>: Copy {
    /// The type of one lane.
    type Scalar: Copy + Default;
    /// A lane of f64 for each lane.
    type Wide: Copy;
    /// The number of lanes.
    const LANES: usize;

    /// `value` in every lane.
    fn splat(isa: I, value: Self::Scalar) -> Self;
    /// Loads all lanes.
    ///
    /// # Safety
    /// `LANES` values can be read from `from`.
    unsafe fn load(isa: I, from: *const Self::Scalar) -> Self;
    /// Loads what [`Vector::keep`] stored.
    ///
    /// # Safety
    /// As [`Vector::load`].
    #[inline(always)]
    unsafe fn load_kept(isa: I, from: *const Self::Scalar) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self::load(isa, from) }
    }
    /// Stores all lanes in the order that vectors hold them in.
    ///
    /// # Safety
    /// As [`Vector::store`].
    #[inline(always)]
    unsafe fn keep(self, to: *mut Self::Scalar) {
        // SAFETY: the caller's promise.
        unsafe { self.store(to) }
    }
    /// Loads the first `n < LANES` lanes; the others come from `fill`.
    ///
    /// # Safety
    /// `n` values can be read from `from`; nothing beyond them is touched.
    unsafe fn load_first(isa: I, from: *const Self::Scalar, n: usize, fill: Self) -> Self;
    /// Stores all lanes.
    ///
    /// # Safety
    /// `LANES` values can be written to `to`.
    unsafe fn store(self, to: *mut Self::Scalar);
    /// Stores all lanes past the caches, where the tier can.
    ///
    /// # Safety
    /// `LANES` values can be written to `to`, which is aligned to the size of the vector.
    unsafe fn stream(self, to: *mut Self::Scalar);
    /// Stores the first `n < LANES` lanes.
    ///
    /// # Safety
    /// `n` values can be written to `to`; nothing beyond them is touched.
    unsafe fn store_first(self, to: *mut Self::Scalar, n: usize);
    /// The first `n < LANES` lanes of this, the others of `rest`.
    fn first(self, n: usize, rest: Self) -> Self;
    /// This, whose upper half of lanes is zero. A tier that keeps halves apart says so, and what the upper one was made of is not
    /// computed.
    #[inline(always)]
    fn lower(self) -> Self {
        self
    }
    /// A bit for each lane, the first one lowest: whether it is positive or a NaN.
    fn positive(self) -> u32;
    /// One in the lanes whose bits are set, zero elsewhere.
    fn of_bits(isa: I, bits: u32) -> Self;
    /// The lanes of this where `gate` is positive or a NaN, zero elsewhere.
    fn where_positive(self, gate: Self) -> Self;
    /// The lanes of this where `gate` is positive or a NaN, of `bent` elsewhere.
    fn unless_positive(self, gate: Self, bent: Self) -> Self;
    /// Lane-wise sum.
    fn add(self, other: Self) -> Self;
    /// Lane-wise difference.
    fn sub(self, other: Self) -> Self;
    /// Lane-wise product.
    fn mul(self, other: Self) -> Self;
    /// Each lane, widened to f64, added to the lane of its index of `sums`.
    fn widen_onto(self, sums: Self::Wide) -> Self::Wide;
    /// Zero in every lane.
    fn no_sums(isa: I) -> Self::Wide;
    /// The sum of all lanes: the upper half is added to the lower one until one is left.
    fn fold(sums: Self::Wide) -> f64;
    /// Adds each lane, widened to f64, to the f64 of its index at `sums`.
    ///
    /// # Safety
    /// `LANES` values can be read from and written to `sums`.
    unsafe fn add_widened(self, sums: *mut f64);
}

/// Each value in every lane of a vector of its own. A loop: what `map` of an array calls may be compiled without the tier.
#[inline(always)]
pub(crate) fn splats<I: Isa, V: Vector<I>, const K: usize>(isa: I, values: &[V::Scalar; K]) -> [V; K] {
    let mut vectors = [V::splat(isa, Default::default()); K];
    for (vector, &value) in vectors.iter_mut().zip(values) {
        *vector = V::splat(isa, value);
    }
    vectors
}

/// The same index, of which a compiler knows nothing.
#[inline(always)]
pub(crate) fn opaque(index: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    let index = x86_64::opaque(index);
    index
}

/// The bits of `n <= 8` values, the first one lowest, in loads that overlap: a call that copies so few takes longer.
///
/// # Safety
/// `n` values can be read from `from`.
#[cfg(feature = "half")]
#[inline(always)]
unsafe fn up_to_eight(from: *const u16, n: usize) -> u128 {
    let joined = |first: u128, last: u128, places: usize| first | last << (16 * places);
    // SAFETY: values from the first and up to the last, as the caller promises.
    unsafe {
        let of_four = |at: usize| u64::from_le_bytes(from.add(at).cast::<[u8; 8]>().read()).into();
        let of_two = |at: usize| u32::from_le_bytes(from.add(at).cast::<[u8; 4]>().read()).into();
        match n {
            4.. => joined(of_four(0), of_four(n - 4), n - 4),
            2.. => joined(of_two(0), of_two(n - 2), n - 2),
            1 => u16::from_le_bytes(from.cast::<[u8; 2]>().read()).into(),
            0 => 0,
        }
    }
}

/// Copies the first `LEN` and the last `LEN` of `n` values, at most twice as many.
///
/// # Safety
/// `n` values can be read from `from` and written to `to`.
#[cfg(feature = "half")]
#[inline(always)]
unsafe fn copy_ends<const LEN: usize>(from: &[u16; 16], to: *mut u16, n: usize) {
    for at in [0, n - LEN] {
        // SAFETY: values among the n.
        unsafe {
            to.add(at).cast::<[u16; LEN]>().write_unaligned(from.as_ptr().add(at).cast::<[u16; LEN]>().read_unaligned())
        };
    }
}

/// A scalar type that has vectors.
pub trait Lanes: Copy + Default {
    /// Its logical vector on a tier.
    type Vector<I: Isa>: Vector<I, Scalar = Self>;
}

impl Lanes for f32 {
    type Vector<I: Isa> = I::F32;
}

impl Lanes for f64 {
    type Vector<I: Isa> = I::F64;
}

/// How an element type goes through memory.
pub trait Storage: Copy + Default + Send + Sync + 'static {
    /// The type it is computed in.
    type Compute: Real;
    /// The tier for what treats all lanes alike.
    type Unordered<I: Isa>: Isa;

    /// The tier for what treats all lanes alike.
    fn unordered<I: Isa>(isa: I) -> Self::Unordered<I>;

    /// Loads one vector.
    ///
    /// # Safety
    /// As [`Vector::load`].
    unsafe fn load<I: Isa>(isa: I, from: *const Self) -> Compute<I, Self>;
    /// Loads the first `n` lanes, the others from `fill`.
    ///
    /// # Safety
    /// As [`Vector::load_first`].
    unsafe fn load_first<I: Isa>(isa: I, from: *const Self, n: usize, fill: Compute<I, Self>) -> Compute<I, Self>;
    /// Rounds and stores one vector.
    ///
    /// # Safety
    /// As [`Vector::store`].
    unsafe fn store<I: Isa>(isa: I, value: Compute<I, Self>, to: *mut Self);
    /// Rounds and stores one vector past the caches, where the tier can.
    ///
    /// # Safety
    /// As [`Vector::store`], and `to` is aligned to the size of a stored vector.
    unsafe fn stream<I: Isa>(isa: I, value: Compute<I, Self>, to: *mut Self);
    /// Rounds and stores the first `n` lanes.
    ///
    /// # Safety
    /// As [`Vector::store_first`].
    unsafe fn store_first<I: Isa>(isa: I, value: Compute<I, Self>, to: *mut Self, n: usize);
}

/// The vector that elements of type `E` are computed in.
pub(crate) type Compute<I, E> = <<E as Storage>::Compute as Lanes>::Vector<I>;

macro_rules! plain_storage {
    ($($t:ty),*) => {$(
        impl Storage for $t {
            type Compute = $t;
            type Unordered<I: Isa> = I;
            #[inline(always)]
            fn unordered<I: Isa>(isa: I) -> I {
                isa
            }
            #[inline(always)]
            unsafe fn load<I: Isa>(isa: I, from: *const $t) -> Compute<I, $t> {
                // SAFETY: the caller's promise is the callee's.
                unsafe { Compute::<I, $t>::load(isa, from) }
            }
            #[inline(always)]
            unsafe fn load_first<I: Isa>(isa: I, from: *const $t, n: usize, fill: Compute<I, $t>) -> Compute<I, $t> {
                // SAFETY: the caller's promise is the callee's.
                unsafe { Compute::<I, $t>::load_first(isa, from, n, fill) }
            }
            #[inline(always)]
            unsafe fn store<I: Isa>(_: I, value: Compute<I, $t>, to: *mut $t) {
                // SAFETY: the caller's promise is the callee's.
                unsafe { value.store(to) }
            }
            #[inline(always)]
            unsafe fn stream<I: Isa>(_: I, value: Compute<I, $t>, to: *mut $t) {
                // SAFETY: the caller's promise is the callee's.
                unsafe { value.stream(to) }
            }
            #[inline(always)]
            unsafe fn store_first<I: Isa>(_: I, value: Compute<I, $t>, to: *mut $t, n: usize) {
                // SAFETY: the caller's promise is the callee's.
                unsafe { value.store_first(to, n) }
            }
        }
    )*};
}

plain_storage!(f32, f64);

#[cfg(feature = "half")]
macro_rules! half_storage {
    ($($t:ty: $load:ident $store:ident, $isa:ident => $unordered:ty, $value:expr;)*) => {$(
        impl Storage for $t {
            type Compute = f32;
            type Unordered<I: Isa> = $unordered;
            #[inline(always)]
            fn unordered<I: Isa>($isa: I) -> $unordered {
                $value
            }
            #[inline(always)]
            unsafe fn load<I: Isa>(isa: I, from: *const $t) -> I::F32 {
                // SAFETY: the caller's promise is the callee's; the type is a transparent u16.
                unsafe { isa.$load(from.cast()) }
            }
            #[inline(always)]
            unsafe fn load_first<I: Isa>(isa: I, from: *const $t, n: usize, fill: I::F32) -> I::F32 {
                // SAFETY: the caller's promise is the callee's; then a buffer of LANES is read.
                unsafe {
                    let bits = isa.load_bits_first(from.cast(), n);
                    isa.$load(bits.as_ptr()).first(n, fill)
                }
            }
            #[inline(always)]
            unsafe fn store<I: Isa>(isa: I, value: I::F32, to: *mut $t) {
                // SAFETY: the caller's promise is the callee's; the type is a transparent u16.
                unsafe { isa.$store(value, to.cast()) }
            }
            #[inline(always)]
            unsafe fn stream<I: Isa>(isa: I, value: I::F32, to: *mut $t) {
                let mut bits = [0u16; MAX_LANES];
                // SAFETY: a whole vector lands in a buffer of LANES; the rest is the caller's promise.
                unsafe {
                    isa.$store(value, bits.as_mut_ptr());
                    isa.stream_bits(&bits, to.cast());
                }
            }
            #[inline(always)]
            unsafe fn store_first<I: Isa>(isa: I, value: I::F32, to: *mut $t, n: usize) {
                let mut bits = [0u16; MAX_LANES];
                // SAFETY: a whole vector lands in a buffer of LANES; the rest is the caller's promise.
                unsafe {
                    isa.$store(value, bits.as_mut_ptr());
                    isa.store_bits_first(&bits, to.cast(), n);
                }
            }
        }
    )*};
}

#[cfg(feature = "half")]
half_storage!(
    half::bf16: load_bf16 store_bf16, isa => I::Apart, isa.apart();
    half::f16: load_f16 store_f16, isa => I, isa;
);

/// Integers that stand for themselves; stores round and saturate.
impl Storage for i8 {
    type Compute = f32;
    type Unordered<I: Isa> = I;
    #[inline(always)]
    fn unordered<I: Isa>(isa: I) -> I {
        isa
    }
    #[inline(always)]
    unsafe fn load<I: Isa>(isa: I, from: *const i8) -> I::F32 {
        // SAFETY: the caller's promise is the callee's.
        unsafe { isa.load_i8(from) }
    }
    #[inline(always)]
    unsafe fn load_first<I: Isa>(isa: I, from: *const i8, n: usize, fill: I::F32) -> I::F32 {
        let mut values = [0; MAX_LANES];
        // SAFETY: n < LANES values are read, as the caller promises; then a buffer of LANES is.
        unsafe {
            core::ptr::copy_nonoverlapping(from, values.as_mut_ptr(), n);
            isa.load_i8(values.as_ptr()).first(n, fill)
        }
    }
    #[inline(always)]
    unsafe fn store<I: Isa>(isa: I, value: I::F32, to: *mut i8) {
        // SAFETY: the caller's promise is the callee's.
        unsafe { isa.store_i8(value, to) }
    }
    #[inline(always)]
    unsafe fn stream<I: Isa>(isa: I, value: I::F32, to: *mut i8) {
        // SAFETY: the caller's promise is the callee's.
        unsafe { isa.stream_i8(value, to) }
    }
    #[inline(always)]
    unsafe fn store_first<I: Isa>(isa: I, value: I::F32, to: *mut i8, n: usize) {
        let mut values = [0; MAX_LANES];
        // SAFETY: a whole vector lands in a buffer of LANES; n values can be written, as the caller promises.
        unsafe {
            isa.store_i8(value, values.as_mut_ptr());
            core::ptr::copy_nonoverlapping(values.as_ptr(), to, n);
        }
    }
}

/// A way to load elements as vectors: in the type they are computed in, or in f64.
pub(crate) trait Load<I: Isa> {
    /// The element type.
    type Element: Element;
    /// The vector that it becomes.
    type Vector: Vector<I>;
    /// Loads one vector.
    ///
    /// # Safety
    /// As [`Vector::load`].
    unsafe fn load(isa: I, from: *const Self::Element) -> Self::Vector;
    /// Loads the first `n` lanes, the others from `fill`.
    ///
    /// # Safety
    /// As [`Vector::load_first`].
    unsafe fn load_first(isa: I, from: *const Self::Element, n: usize, fill: Self::Vector) -> Self::Vector;
}

/// Loads in the type that the elements are computed in.
pub(crate) struct Native<E>(core::marker::PhantomData<E>);

impl<I: Isa, E: Element> Load<I> for Native<E> {
    type Element = E;
    type Vector = Compute<I, E>;
    #[inline(always)]
    unsafe fn load(isa: I, from: *const E) -> Self::Vector {
        // SAFETY: the caller's promise is the callee's.
        unsafe { E::load(isa, from) }
    }
    #[inline(always)]
    unsafe fn load_first(isa: I, from: *const E, n: usize, fill: Self::Vector) -> Self::Vector {
        // SAFETY: the caller's promise is the callee's.
        unsafe { E::load_first(isa, from, n, fill) }
    }
}

/// Loads as f64, for data that f32 sums do not carry. Rare, so it goes lane by lane.
pub(crate) struct Widened<E>(core::marker::PhantomData<E>);

impl<I: Isa, E: Element> Load<I> for Widened<E> {
    type Element = E;
    type Vector = I::F64;
    #[inline(always)]
    unsafe fn load(isa: I, from: *const E) -> I::F64 {
        let mut lanes = [0f64; MAX_LANES];
        // SAFETY: LANES values are read, as the caller promises, into a longer buffer.
        unsafe {
            for (i, lane) in lanes.iter_mut().enumerate().take(I::F64::LANES) {
                *lane = from.add(i).read().to_param().to_f64();
            }
            I::F64::load(isa, lanes.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn load_first(isa: I, from: *const E, n: usize, fill: I::F64) -> I::F64 {
        let mut lanes = [0f64; MAX_LANES];
        // SAFETY: n < LANES values are read, as the caller promises, into a longer buffer.
        unsafe {
            for (i, lane) in lanes.iter_mut().enumerate().take(n) {
                *lane = from.add(i).read().to_param().to_f64();
            }
            I::F64::load_first(isa, lanes.as_ptr(), n, fill)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks what depends on the order of lanes.
    struct Ordered;

    impl Kernel for Ordered {
        type Output = ();
        fn run<I: Isa>(self, isa: I) {
            // SAFETY: arrays are as long as a vector, or longer than what is touched of them.
            unsafe {
                let values: [f32; 16] = core::array::from_fn(|lane| lane as f32 - 7.5);
                let (all, filler) = (I::F32::load(isa, values.as_ptr()), I::F32::splat(isa, 100.0));
                let stored = |vector: I::F32| {
                    let mut to = [0.0; 16];
                    vector.store(to.as_mut_ptr());
                    to
                };
                assert_eq!(stored(all), values);
                let mut kept = [0.0; 16];
                all.keep(kept.as_mut_ptr());
                assert_eq!(kept == values, I::IN_ORDER);
                assert_eq!(stored(I::F32::load_kept(isa, kept.as_ptr())), values);
                assert_eq!(stored(all.lower())[..8], values[..8]);
                for n in 0..16 {
                    let expected: [f32; 16] = core::array::from_fn(|lane| if lane < n { values[lane] } else { 100.0 });
                    assert_eq!(stored(all.first(n, filler)), expected);
                    assert_eq!(stored(I::F32::load_first(isa, values.as_ptr(), n, filler)), expected);
                    let mut to = [100.0; 16];
                    all.store_first(to.as_mut_ptr(), n);
                    assert_eq!(to, expected);
                }
                assert_eq!(all.positive(), 0xff00);
                for bits in [0xff00, 0x5a3c, 1, 1 << 15] {
                    assert_eq!(
                        stored(I::F32::of_bits(isa, bits)),
                        core::array::from_fn(|lane| (bits >> lane & 1) as f32)
                    );
                    assert_eq!(I::F32::of_bits(isa, bits).positive(), bits);
                }
                // Values that show in which order they are added.
                let huge: [f32; 16] = core::array::from_fn(|lane| 1.7f32.powi(7 * lane as i32));
                let huge = I::F32::load(isa, huge.as_ptr());
                let mut sums: Vec<f64> = stored(huge).map(f64::from).into();
                let mut added = [0.5; 16];
                huge.add_widened(added.as_mut_ptr());
                assert_eq!(added[..], sums.iter().map(|sum| sum + 0.5).collect::<Vec<_>>());
                while sums.len() > 1 {
                    let upper = sums.split_off(sums.len() / 2);
                    sums.iter_mut().zip(upper).for_each(|(lower, upper)| *lower += upper);
                }
                assert_eq!(I::F32::fold(huge.widen_onto(I::F32::no_sums(isa))), sums[0]);
                #[cfg(feature = "half")]
                {
                    let (ones, mut bits) = (core::array::from_fn::<u16, 16, _>(|lane| 0x3f80 + lane as u16), [0; 16]);
                    isa.store_bf16(isa.load_bf16(ones.as_ptr()), bits.as_mut_ptr());
                    assert_eq!(bits, ones);
                    isa.store_f16(isa.load_f16(ones.as_ptr()), bits.as_mut_ptr());
                    assert_eq!(bits, ones);
                    assert_eq!(
                        stored(isa.load_bf16(ones.as_ptr())),
                        ones.map(|bits| half::bf16::from_bits(bits).to_f32())
                    );
                    assert_eq!(
                        stored(isa.load_f16(ones.as_ptr())),
                        ones.map(|bits| half::f16::from_bits(bits).to_f32())
                    );
                }
            }
        }
    }

    struct Apart;

    impl Kernel for Apart {
        type Output = ();
        fn run<I: Isa>(self, isa: I) {
            isa.apart().call(Ordered);
        }
    }

    #[test]
    fn lanes_have_the_same_order_on_each_tier() {
        for tier in Tier::available() {
            let tier = Dispatched::new(tier).unwrap();
            dispatch(tier, Ordered);
            dispatch(tier, Apart);
        }
    }
}
