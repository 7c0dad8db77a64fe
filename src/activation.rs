//! What is applied last: an activation, to the sum with a residual where there is one.

use crate::element::Real;
use crate::error::{Error, Result};
use crate::simd::{Isa, Vector};

/// The activation of `y = act(gamma * xhat + beta + residual)`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum Activation {
    /// None: the sum itself.
    #[default]
    None,
    /// `max(v, 0)`; a NaN stays one.
    Relu,
    /// `v` where it is positive, and this slope times `v` elsewhere; a NaN stays one.
    LeakyRelu(f64),
}

impl Activation {
    /// What undoes it, where that is possible.
    pub(crate) fn inverse(self) -> Self {
        match self {
            Self::LeakyRelu(slope) => Self::LeakyRelu(1.0 / slope),
            other => other,
        }
    }

    pub(crate) fn check(self) -> Result<()> {
        match self {
            Self::LeakyRelu(slope) if !(slope.is_finite() && slope >= 0.0) => Err(Error::Slope { got: slope }),
            _ => Ok(()),
        }
    }
}

/// A line that bends at zero, as the kernels take it: forward a value by its own sign, backward a gradient by the sign of
/// the value.
#[derive(Clone, Copy)]
pub(crate) struct Bend<P> {
    slope: P,
    /// Positive where products with the slope are taken. With a slope of zero they would make NaNs of infinities, and
    /// negative zeros.
    kept: P,
}

impl<P: Real> Bend<P> {
    pub(crate) fn new(activation: Activation) -> Self {
        let slope = match activation {
            Activation::None => 1.0,
            Activation::Relu => 0.0,
            Activation::LeakyRelu(slope) => slope,
        };
        let kept = if activation == Activation::Relu { 0.0 } else { 1.0 };
        Self { slope: P::from_f64(slope), kept: P::from_f64(kept) }
    }

    /// Whether it is ReLU, which leaves zeros.
    pub(crate) fn is_relu(self) -> bool {
        self.kept <= P::default()
    }

    /// `value` where `gate` is positive or a NaN, bent elsewhere.
    #[inline(always)]
    pub(crate) fn apply<I: Isa, V: Vector<I, Scalar = P>>(self, isa: I, gate: V, value: V) -> V {
        // Zero for ReLU. Not a branch: it would double each loop.
        let bent = value.mul(V::splat(isa, self.slope)).where_positive(V::splat(isa, self.kept));
        value.unless_positive(gate, bent)
    }

    /// The same for one value.
    #[inline(always)]
    pub(crate) fn scalar<R: Real>(self, gate: P, value: R) -> R {
        match gate <= P::default() {
            true if self.is_relu() => R::default(),
            true => value * R::from_f64(self.slope.to_f64()),
            false => value,
        }
    }
}
