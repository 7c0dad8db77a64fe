//! What the caller gives beside the input, and wants beside the output: scale, offset and what follows them; gradients.

use core::ops::Range;

use crate::activation::Activation;
use crate::element::{Element, Real};
use crate::error::{Error, Result};
use crate::gates::{Recorded, Recording};
#[cfg(doc)]
use crate::plan::BatchNorm;

/// What follows normalization, `y = act(gamma * xhat + beta + residual)`: the trained scale and offset of each channel, `C`
/// values each, a tensor that is added, and an activation. The same is given to the forward and to the backward pass.
///
/// ```
/// # use batchnorm::{Activation, Affine};
/// # let (gamma, beta, residual) = ([1f32; 3], [0f32; 3], [0f32; 6]);
/// let affine = Affine::<f32>::new(&gamma, &beta).with_residual(&residual).with_activation(Activation::Relu);
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub struct Affine<'a, E: Element> {
    /// The scale; `None` stands for ones.
    pub gamma: Option<&'a [E::Param]>,
    /// The offset; `None` stands for zeros.
    pub beta: Option<&'a [E::Param]>,
    /// A tensor that is added before the activation.
    pub residual: Option<&'a [E]>,
    /// What is applied last.
    pub activation: Activation,
    /// The output of the forward pass. From its sign the backward pass sees where the activation bent; without it the
    /// argument of the activation is computed again, from `x`, gamma, beta and the residual. Forward passes ignore it.
    pub output: Option<&'a [E]>,
    pub(crate) gates: Option<Recorded<'a>>,
    pub(crate) recording: Option<Recording<'a>>,
}

impl<E: Element> Clone for Affine<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E: Element> Copy for Affine<'_, E> {}

impl<'a, E: Element> Affine<'a, E> {
    /// Scale and offset.
    pub fn new(gamma: &'a [E::Param], beta: &'a [E::Param]) -> Self {
        Self::of(Some(gamma), Some(beta))
    }

    /// The scale alone.
    pub fn scale(gamma: &'a [E::Param]) -> Self {
        Self::of(Some(gamma), None)
    }

    /// Neither: `y = xhat`. The same as `Affine::default()`.
    pub fn none() -> Self {
        Self::of(None, None)
    }

    /// Scale and offset, where there are.
    pub fn of(gamma: Option<&'a [E::Param]>, beta: Option<&'a [E::Param]>) -> Self {
        Self { gamma, beta, residual: None, activation: Activation::None, output: None, gates: None, recording: None }
    }

    /// With a tensor added before the activation.
    #[must_use]
    pub fn with_residual(self, residual: &'a [E]) -> Self {
        Self { residual: Some(residual), ..self }
    }

    /// With an activation.
    #[must_use]
    pub fn with_activation(self, activation: Activation) -> Self {
        Self { activation, ..self }
    }

    /// With the output of the forward pass, for the backward pass.
    #[must_use]
    pub fn with_output(self, output: &'a [E]) -> Self {
        Self { output: Some(output), ..self }
    }

    /// With [`BatchNorm::gates_len`] bytes into which the forward pass writes one bit per element: whether the argument of the
    /// activation was positive, or a NaN. Bit `i % 8` of byte `i / 8` is that of element `i`; the bits of the last bytes that
    /// belong to no element are left alone. Without an activation nothing is written. Backward passes ignore it.
    ///
    /// ```
    /// # use batchnorm::{Activation, Affine, BatchNorm, Gradients, Shape};
    /// # let (x, dy, mut y, mut dx) = ([1f32; 24], [1f32; 24], [0f32; 24], [0f32; 24]);
    /// # let (gamma, beta) = ([1f32; 3], [0f32; 3]);
    /// let bn = BatchNorm::<f32>::new(Shape::nc(8, 3)?)?;
    /// let affine = Affine::new(&gamma, &beta).with_activation(Activation::Relu);
    /// let (mut saved, mut gates) = (bn.saved(), vec![0; bn.gates_len()]);
    /// bn.forward_train(&x, affine.with_gates_to(&mut gates), &mut y, &mut saved)?;
    /// let gradients = Gradients { dx: Some(&mut dx), ..Default::default() };
    /// bn.backward(&x, &dy, &saved, affine.with_gates(&gates), gradients)?;
    /// # Ok::<(), batchnorm::Error>(())
    /// ```
    #[must_use]
    pub fn with_gates_to(self, gates: &'a mut [u8]) -> Self {
        Self { recording: Some(Recording::over(gates)), ..self }
    }

    /// With the bits that the forward pass wrote, for the backward pass, which then needs neither the output nor the argument of
    /// the activation. They count before [`Affine::output`]. Forward passes ignore them.
    #[must_use]
    pub fn with_gates(self, gates: &'a [u8]) -> Self {
        Self { gates: Some(Recorded::new(gates)), ..self }
    }

    /// Whether nothing follows scale and offset.
    pub(crate) fn is_last(&self) -> bool {
        self.residual.is_none() && self.activation == Activation::None
    }

    /// Where bits are recorded, if there is anything to record.
    pub(crate) fn recording(&self) -> Option<Recording<'a>> {
        self.recording.filter(|_| self.activation != Activation::None)
    }

    /// Scale and offset alone.
    pub(crate) fn trained(&self) -> Trained<'a, E::Param> {
        Trained { gamma: self.gamma, beta: self.beta }
    }

    /// That of a part of the batch.
    pub(crate) fn part(self, range: Range<usize>) -> Self {
        let of = |tensor: Option<&'a [E]>| tensor.map(|tensor| &tensor[range.clone()]);
        let (gates, recording) = (self.gates, self.recording);
        Self {
            residual: of(self.residual),
            output: of(self.output),
            gates: gates.map(|gates| gates.part(range.clone())),
            recording: recording.map(|gates| gates.part(range.clone())),
            ..self
        }
    }
}

impl<E: Element> Default for Affine<'_, E> {
    fn default() -> Self {
        Self::none()
    }
}

/// The trained parameters of an affine part, of which coefficients are made whatever the tensors' type.
#[derive(Clone, Copy)]
pub(crate) struct Trained<'a, P> {
    pub(crate) gamma: Option<&'a [P]>,
    pub(crate) beta: Option<&'a [P]>,
}

impl<P: Real> Trained<'_, P> {
    /// Gamma and beta of a channel.
    #[inline(always)]
    pub(crate) fn channel(&self, c: usize) -> (f64, f64) {
        let gamma = self.gamma.map_or(1.0, |gamma| gamma[c].to_f64());
        (gamma, self.beta.map_or(0.0, |beta| beta[c].to_f64()))
    }
}

/// The gradients that [`BatchNorm::backward`] is to write: any subset.
///
/// ```
/// # use batchnorm::Gradients;
/// # let mut dx = [0f32; 4];
/// let frozen_affine = Gradients::<f32> { dx: Some(&mut dx), ..Default::default() };
/// ```
#[derive(Debug, PartialEq)]
pub struct Gradients<'a, E: Element> {
    /// With respect to the input, of the input's length.
    pub dx: Option<&'a mut [E]>,
    /// With respect to gamma, `C` values.
    pub dgamma: Option<&'a mut [E::Param]>,
    /// With respect to beta, `C` values.
    pub dbeta: Option<&'a mut [E::Param]>,
    /// With respect to the residual, of the input's length: what the activation lets through of `dy`.
    pub dresidual: Option<&'a mut [E]>,
}

impl<E: Element> Gradients<'_, E> {
    /// Refuses a dx beside the one that is written over dy.
    pub(crate) fn check_in_place(&self) -> Result<()> {
        if self.dx.is_some() { Err(Error::InPlace) } else { Ok(()) }
    }

    /// Those of a part of the batch.
    pub(crate) fn part(&mut self, range: Range<usize>) -> Gradients<'_, E> {
        Gradients {
            dx: self.dx.as_deref_mut().map(|dx| &mut dx[range.clone()]),
            dgamma: self.dgamma.as_deref_mut(),
            dbeta: self.dbeta.as_deref_mut(),
            dresidual: self.dresidual.as_deref_mut().map(|dresidual| &mut dresidual[range]),
        }
    }
}

impl<E: Element> Default for Gradients<'_, E> {
    fn default() -> Self {
        Self { dx: None, dgamma: None, dbeta: None, dresidual: None }
    }
}
