//! `y = gamma * (x - mean) * inv_std + beta`, in the centred form.
//!
//! With `hi` the mean rounded to the computed type (see [`centre`](crate::moments::centre)) and `scale = gamma * inv_std`, `y = (x - hi) * scale + shift`:
//! the difference is exact near the mean, and what `hi` lacks of the mean is in `shift`.

use super::map::Map;
use crate::activation::Bend;
use crate::element::{Element, Real};
use crate::gates::Recording;
use crate::simd::{Compute, Isa, Vector};
use crate::tensor::Source;
use crate::view::{Pack, Packs};

/// A channel's `[hi, scale, shift]` from `hi` and what the mean has beyond it.
#[inline(always)]
pub(crate) fn coefficients<R: Real>((hi, residue): (R, f64), inv_std: f64, gamma: f64, beta: f64) -> [R; 3] {
    let scale = gamma * inv_std;
    [hi, R::from_f64_saturating(scale), R::from_f64(beta - residue * scale)]
}

/// `y` from `x`.
#[derive(Clone, Copy)]
pub(crate) struct Normalize<'a, E>(pub(crate) Source<'a, E>);

impl<E: Element> Packs<E> for Normalize<'_, E> {
    unsafe fn packed(self, pack: &mut Pack<'_, '_, E>) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { pack.pack(self.0) })
    }
}

impl<E: Element> Map<3> for Normalize<'_, E> {
    type Element = E;

    #[inline(always)]
    unsafe fn raw<I: Isa, const FULL: bool>(
        &self,
        isa: I,
        [hi, scale, shift]: &[Compute<I, E>; 3],
        at: usize,
        n: usize,
    ) -> Compute<I, E> {
        // SAFETY: the caller's promise.
        let x = unsafe { self.0.load::<I, FULL>(isa, at, n) };
        x.sub(*hi).mul(*scale).add(*shift)
    }

    #[inline(always)]
    fn prefetch<I: Isa>(&self, isa: I, at: usize) {
        self.0.prefetch(isa, at);
    }
}

/// `y` from `x` behind ReLU, which most activations are.
#[derive(Clone, Copy)]
pub(crate) struct Rectified<'a, E>(pub(crate) Normalize<'a, E>);

impl<E: Element> Packs<E> for Rectified<'_, E> {
    unsafe fn packed(self, pack: &mut Pack<'_, '_, E>) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { self.0.packed(pack) })
    }
}

impl<E: Element> Map<3> for Rectified<'_, E> {
    type Element = E;

    #[inline(always)]
    unsafe fn raw<I: Isa, const FULL: bool>(
        &self,
        isa: I,
        params: &[Compute<I, E>; 3],
        at: usize,
        n: usize,
    ) -> Compute<I, E> {
        // SAFETY: the caller's promise.
        let value = unsafe { self.0.raw::<I, FULL>(isa, params, at, n) };
        value.where_positive(value)
    }

    #[inline(always)]
    fn prefetch<I: Isa>(&self, isa: I, at: usize) {
        self.0.prefetch(isa, at);
    }
}

/// `y` from `x`, with a residual if there is one, bent.
#[derive(Clone, Copy)]
pub(crate) struct Activated<'a, E: Element> {
    pub(crate) normalize: Normalize<'a, E>,
    pub(crate) residual: Option<Source<'a, E>>,
    pub(crate) bend: Bend<E::Param>,
    /// Where it bends, to be recorded.
    pub(crate) gates: Option<Recording<'a>>,
}

impl<E: Element> Packs<E> for Activated<'_, E> {
    unsafe fn packed(self, pack: &mut Pack<'_, '_, E>) -> Self {
        // SAFETY: the caller's promise, for both.
        unsafe {
            let residual = self.residual.map(|residual| pack.pack(residual));
            let gates = self.gates.map(|gates| gates.shifted(pack.start()));
            Self { normalize: self.normalize.packed(pack), residual, gates, ..self }
        }
    }
}

impl<E: Element> Map<3> for Activated<'_, E> {
    type Element = E;

    #[inline(always)]
    unsafe fn raw<I: Isa, const FULL: bool>(
        &self,
        isa: I,
        params: &[Compute<I, E>; 3],
        at: usize,
        n: usize,
    ) -> Compute<I, E> {
        // SAFETY: the caller's promise.
        let mut value = unsafe { self.normalize.raw::<I, FULL>(isa, params, at, n) };
        if let Some(residual) = self.residual {
            // SAFETY: the caller's promise.
            value = value.add(unsafe { residual.load::<I, FULL>(isa, at, n) });
        }
        value
    }

    #[inline(always)]
    unsafe fn finish<I: Isa, const FULL: bool>(
        &self,
        isa: I,
        raw: Compute<I, E>,
        at: usize,
        n: usize,
    ) -> Compute<I, E> {
        if let Some(gates) = self.gates {
            gates.record::<FULL>(raw.positive(), at, n);
        }
        self.bend.apply(isa, raw, raw)
    }

    #[inline(always)]
    fn prefetch<I: Isa>(&self, isa: I, at: usize) {
        self.normalize.prefetch(isa, at);
        if let Some(residual) = self.residual {
            residual.prefetch(isa, at);
        }
    }
}
