//! `y = gamma * (x - mean) * inv_std + beta`, in the centred form.
//!
//! With `hi` the mean rounded to the computed type and `scale = gamma * inv_std`, `y = (x - hi) * scale + shift`:
//! the difference is exact near the mean, and what `hi` lacks of the mean is in `shift`.

use core::marker::PhantomData;

use super::map::Map;
use crate::activation::Bend;
use crate::element::{Element, Real};
use crate::simd::{Compute, Isa, Vector};

/// A channel's `[hi, scale, shift]`.
#[inline(always)]
pub(crate) fn coefficients<R: Real>(mean: R, residue: R, inv_std: f64, gamma: f64, beta: f64) -> [R; 3] {
    let scale = gamma * inv_std;
    [mean, R::from_f64_saturating(scale), R::from_f64(beta - residue.to_f64() * scale)]
}

/// `y` from `x`.
pub(crate) struct Normalize<'a, E> {
    x: *const E,
    life: PhantomData<&'a [E]>,
}

impl<E> Normalize<'_, E> {
    pub(crate) fn new(x: *const E) -> Self {
        Self { x, life: PhantomData }
    }
}

impl<I: Isa, E: Element> Map<I, 3> for Normalize<'_, E> {
    type Element = E;

    #[inline(always)]
    unsafe fn at<const FULL: bool>(
        &self,
        isa: I,
        [hi, scale, shift]: &[Compute<I, E>; 3],
        at: usize,
        n: usize,
    ) -> Compute<I, E> {
        // SAFETY: the caller's promise.
        let x = unsafe { if FULL { E::load(isa, self.x.add(at)) } else { E::load_first(isa, self.x.add(at), n, *hi) } };
        x.sub(*hi).mul(*scale).add(*shift)
    }

    #[inline(always)]
    fn prefetch(&self, isa: I, at: usize) {
        isa.prefetch(self.x.wrapping_add(at).cast());
    }
}

/// `y` from `x`, with a residual if there is one, bent.
pub(crate) struct Activated<'a, E: Element> {
    normalize: Normalize<'a, E>,
    residual: Option<*const E>,
    bend: Bend<E::Param>,
}

impl<E: Element> Activated<'_, E> {
    pub(crate) fn new(x: *const E, residual: Option<*const E>, bend: Bend<E::Param>) -> Self {
        Self { normalize: Normalize::new(x), residual, bend }
    }
}

impl<I: Isa, E: Element> Map<I, 3> for Activated<'_, E> {
    type Element = E;

    #[inline(always)]
    unsafe fn at<const FULL: bool>(&self, isa: I, params: &[Compute<I, E>; 3], at: usize, n: usize) -> Compute<I, E> {
        // SAFETY: the caller's promise.
        let mut value = unsafe { self.normalize.at::<FULL>(isa, params, at, n) };
        if let Some(residual) = self.residual {
            // SAFETY: the caller's promise.
            value = value.add(unsafe { load::<I, E, FULL>(isa, residual, at, n) });
        }
        self.bend.apply(isa, value, value)
    }

    #[inline(always)]
    fn prefetch(&self, isa: I, at: usize) {
        Map::<I, 3>::prefetch(&self.normalize, isa, at);
        if let Some(residual) = self.residual {
            isa.prefetch(residual.wrapping_add(at).cast());
        }
    }
}

/// The elements from `at`: of a whole vector if `FULL`, else the first `n` and zeros.
///
/// # Safety
/// They can be read.
#[inline(always)]
pub(crate) unsafe fn load<I: Isa, E: Element, const FULL: bool>(
    isa: I,
    from: *const E,
    at: usize,
    n: usize,
) -> Compute<I, E> {
    // SAFETY: the caller's promise.
    unsafe {
        if FULL {
            E::load(isa, from.add(at))
        } else {
            E::load_first(isa, from.add(at), n, Compute::<I, E>::splat(isa, Default::default()))
        }
    }
}
