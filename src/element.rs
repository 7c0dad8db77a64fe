//! The element types, and the type that each is computed in.

use core::fmt::Debug;
use core::ops::{Add, Mul, Sub};

use crate::operation::Execute;
use crate::simd::{Lanes, Storage};

/// A type that tensors are stored in: `f32`, `f64` and, with the feature `half`, `half::bf16` and `half::f16`.
///
/// Sealed: the kernels know each of them. All of them are `Copy + Default + Debug + PartialEq + Send + Sync + 'static`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no type that tensors are stored in",
    note = "these are f32 and f64, and half::bf16 and half::f16 with the feature `half` of batchnorm: `features = [\"half\"]`"
)]
pub trait Element: Debug + PartialEq + Storage<Compute = <Self as Element>::Param> + Execute {
    /// The type of parameters, statistics and all arithmetic: `f64` for `f64`, otherwise `f32`.
    type Param: Real;
    /// Bits of the significand, the hidden one included.
    const DIGITS: u32;
    /// The value, exactly.
    fn to_param(self) -> Self::Param;
    /// The nearest element, ties to even.
    fn from_param(value: Self::Param) -> Self;
}

/// A type that the kernels compute in: `f32` or `f64`. Sealed.
pub trait Real:
    Element<Param = Self> + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + PartialOrd + Lanes
{
    /// The value, exactly.
    fn to_f64(self) -> f64;
    /// The nearest value, ties to even.
    fn from_f64(value: f64) -> Self;
    /// The nearest value, the largest finite one in place of an overflow: a factor that stays finite
    /// keeps `0 * factor` at zero.
    fn from_f64_saturating(value: f64) -> Self;
    /// The largest finite value.
    const LARGEST: f64;
    /// Below this mean of squares, squares may have lost bits to underflow.
    const TINY_SQUARE: f64;
    /// A power of two that brings values with such squares to where none loses a bit.
    const ENLARGED: f64;
}

impl Element for f32 {
    type Param = f32;
    const DIGITS: u32 = f32::MANTISSA_DIGITS;
    #[inline(always)]
    fn to_param(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_param(value: f32) -> f32 {
        value
    }
}

impl Real for f32 {
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.into()
    }
    #[inline(always)]
    fn from_f64(value: f64) -> f32 {
        value as f32
    }
    #[inline(always)]
    fn from_f64_saturating(value: f64) -> f32 {
        let rounded = value as f32;
        if value.is_finite() { rounded.clamp(f32::MIN, f32::MAX) } else { rounded }
    }
    const LARGEST: f64 = f32::MAX as f64;
    // 2^-100: single squares down to 2^-26 of the mean are still normal numbers.
    const TINY_SQUARE: f64 = 7.888609052210118e-31;
    // 2^100: the square of the least number, 2^-149, becomes 2^-98.
    const ENLARGED: f64 = 1.2676506002282294e30;
}

impl Element for f64 {
    type Param = f64;
    const DIGITS: u32 = f64::MANTISSA_DIGITS;
    #[inline(always)]
    fn to_param(self) -> f64 {
        self
    }
    #[inline(always)]
    fn from_param(value: f64) -> f64 {
        value
    }
}

impl Real for f64 {
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn from_f64(value: f64) -> f64 {
        value
    }
    #[inline(always)]
    fn from_f64_saturating(value: f64) -> f64 {
        value
    }
    const LARGEST: f64 = f64::MAX;
    // Nothing asks for the moments of values below 1e-150.
    const TINY_SQUARE: f64 = 0.0;
    const ENLARGED: f64 = 1.0;
}

#[cfg(feature = "half")]
macro_rules! half_element {
    ($($t:ty),*) => {$(
        #[cfg_attr(docsrs, doc(cfg(feature = "half")))]
        impl Element for $t {
            type Param = f32;
            const DIGITS: u32 = <$t>::MANTISSA_DIGITS;
            #[inline(always)]
            fn to_param(self) -> f32 {
                self.to_f32()
            }
            #[inline(always)]
            fn from_param(value: f32) -> $t {
                <$t>::from_f32(value)
            }
        }
    )*};
}

#[cfg(feature = "half")]
half_element!(half::bf16, half::f16);
