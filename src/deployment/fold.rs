//! Inference without a pass of its own: as two plain vectors, or folded into the weights of a neighbouring layer.
//!
//! With `scale = gamma / sqrt(var + eps)` and `shift = beta - mean * scale` per channel, after a layer `W x + b`
//!
//! ```text
//! W' = scale * W      b' = scale * b + shift        (rows of W, per output channel)
//! ```
//!
//! and before one, where no padding enters between the two,
//!
//! ```text
//! W' = W * scale      b' = b + W * shift            (columns of W, per input channel)
//! ```
//!
//! (Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018,
//! section 3.2, for the first.)

use core::ops::Range;

use crate::affine::Affine;
use crate::element::{Element, Real};
use crate::error::{Error, Result, check_len};
use crate::moments::inv_std;
use crate::plan::BatchNorm;
use crate::running::Population;

/// How the weights of a linear layer or a convolution lie, so that Batch Normalization can be folded into them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    inputs: usize,
    outputs: usize,
    /// Weights of one pair of channels.
    taps: usize,
    groups: usize,
    transposed: bool,
}

impl Layer {
    /// A linear layer: weights `[outputs][inputs]`.
    pub fn linear(outputs: usize, inputs: usize) -> Self {
        Self::convolution(outputs, inputs, 1)
    }

    /// A convolution: weights `[outputs][inputs / groups][taps]`, `taps` the size of the kernel, 9 for 3 x 3.
    pub fn convolution(outputs: usize, inputs: usize, taps: usize) -> Self {
        Self { inputs, outputs, taps, groups: 1, transposed: false }
    }

    /// A transposed convolution: weights `[inputs][outputs / groups][taps]`.
    pub fn transposed(inputs: usize, outputs: usize, taps: usize) -> Self {
        Self { transposed: true, ..Self::convolution(outputs, inputs, taps) }
    }

    /// In groups of channels; as many as there are channels make it depthwise.
    ///
    /// # Errors
    /// [`Error::Groups`] if they do not divide both numbers of channels.
    pub fn with_groups(self, groups: usize) -> Result<Self> {
        let divides = |channels: usize| groups > 0 && channels.is_multiple_of(groups);
        match [self.inputs, self.outputs].into_iter().find(|&channels| !divides(channels)) {
            Some(channels) => Err(Error::Groups { channels, groups }),
            None => Ok(Self { groups, ..self }),
        }
    }

    /// The number of weights.
    pub fn weights(&self) -> usize {
        self.inputs.saturating_mul(self.outputs / self.groups).saturating_mul(self.taps)
    }

    /// Refuses slices of other lengths, and a layer that meets another number of channels.
    pub(crate) fn check<P>(&self, expected: usize, channels: usize, weight: &[P], bias: &[P]) -> Result<()> {
        if channels != expected {
            return Err(Error::LayerChannels { expected, got: channels });
        }
        check_len("weight", self.weights(), weight.len())?;
        check_len("bias", self.outputs, bias.len())
    }

    /// The inputs and the weights of a pair of channels, if all outputs see all inputs and are summed in order.
    #[cfg(feature = "whitening")]
    pub(crate) fn joined(&self) -> Result<(usize, usize)> {
        if self.transposed || self.groups > 1 { Err(Error::NotFoldable) } else { Ok((self.inputs, self.taps)) }
    }

    /// The weights that join an output to an input, in an order of rows, with both numbers.
    fn joints(self) -> impl Iterator<Item = (usize, usize, Range<usize>)> {
        let (rows, columns) = if self.transposed { (self.inputs, self.outputs) } else { (self.outputs, self.inputs) };
        let (of_group, row_group) = (columns / self.groups, rows / self.groups);
        // Without taps there is nothing to join, however many channels there are.
        let joints = if self.taps == 0 { 0 } else { rows * of_group };
        (0..joints).map(move |i| {
            let (row, column) = (i / of_group, i / of_group / row_group * of_group + i % of_group);
            let (output, input) = if self.transposed { (column, row) } else { (row, column) };
            (output, input, i * self.taps..(i + 1) * self.taps)
        })
    }
}

impl<E: Element> BatchNorm<E> {
    /// Folds inference into the layer before it: afterwards the layer alone gives what it gave with Batch Normalization. An
    /// activation stays yours to apply, so `affine` has none. `bias` has a value per output channel, zeros for a layer without.
    /// Computed in f64 and rounded once.
    ///
    /// ```
    /// use batchnorm::{Affine, BatchNorm, Layer, Population, Shape};
    /// let (mut weight, mut bias) = (vec![1f32; 16 * 3 * 9], vec![0f32; 16]);
    /// # let (gamma, beta, mean, var) = (vec![2f32; 16], vec![0f32; 16], vec![0f32; 16], vec![1f32; 16]);
    /// let bn = BatchNorm::<f32>::new(Shape::nchw(1, 16, 30, 30)?)?;
    /// let layer = Layer::convolution(16, 3, 9);
    /// bn.fold_into_preceding(
    ///     layer,
    ///     &mut weight,
    ///     &mut bias,
    ///     Affine::new(&gamma, &beta),
    ///     Population { mean: &mean, var: &var },
    /// )?;
    /// # Ok::<(), batchnorm::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Length`] for any slice; [`Error::LayerChannels`] where the layer's outputs are not the plan's channels;
    /// [`Error::FoldedAffine`] for an activation or a residual; [`Error::Variance`].
    pub fn fold_into_preceding(
        &self,
        layer: Layer,
        weight: &mut [E::Param],
        bias: &mut [E::Param],
        affine: Affine<'_, E>,
        population: Population<'_, E::Param>,
    ) -> Result<()> {
        self.check_fold(layer.outputs, layer, weight, bias, affine, population)?;
        for (output, _, taps) in layer.joints() {
            let (scale, _) = self.line(affine, population, output);
            weight[taps].iter_mut().for_each(|w| *w = E::Param::from_f64(w.to_f64() * scale));
        }
        for (c, bias) in bias.iter_mut().enumerate() {
            let (scale, shift) = self.line(affine, population, c);
            *bias = E::Param::from_f64(bias.to_f64() * scale + shift);
        }
        Ok(())
    }

    /// Folds inference into the linear layer or convolution after it. Exact only if that layer pads nothing: padding
    /// enters as zero after Batch Normalization, and would have to enter as `-shift / scale` before it.
    ///
    /// # Errors
    /// As [`BatchNorm::fold_into_preceding`], of the layer's inputs; [`Error::NotFoldable`] for a transposed convolution,
    /// whose outputs see different numbers of inputs.
    pub fn fold_into_following(
        &self,
        layer: Layer,
        weight: &mut [E::Param],
        bias: &mut [E::Param],
        affine: Affine<'_, E>,
        population: Population<'_, E::Param>,
    ) -> Result<()> {
        self.check_fold(layer.inputs, layer, weight, bias, affine, population)?;
        if layer.transposed {
            return Err(Error::NotFoldable);
        }
        let mut sum = 0.0;
        for (output, input, taps) in layer.joints() {
            let (scale, shift) = self.line(affine, population, input);
            for w in &mut weight[taps] {
                sum += w.to_f64() * shift;
                *w = E::Param::from_f64(w.to_f64() * scale);
            }
            // The inputs of an output come one after the other.
            if (input + 1).is_multiple_of(layer.inputs / layer.groups) {
                bias[output] = E::Param::from_f64(bias[output].to_f64() + sum);
                sum = 0.0;
            }
        }
        Ok(())
    }

    /// Inference as plain vectors, `y = x * scale + shift` with `scale = gamma / sqrt(var + eps)` and
    /// `shift = beta - mean * scale`, for engines that take nothing else. Computed in f64 and rounded once.
    ///
    /// Where `|mean|` is many standard deviations, `x * scale` and `shift` are large and cancel: in f32 the result is off by
    /// about `6e-8 * |mean| / std`, where [`BatchNorm::forward_infer`] subtracts the mean first and loses nothing.
    ///
    /// # Errors
    /// [`Error::Length`] for any slice; [`Error::FoldedAffine`] for an activation or a residual; [`Error::Variance`].
    pub fn scale_and_shift(
        &self,
        affine: Affine<'_, E>,
        population: Population<'_, E::Param>,
        scale: &mut [E::Param],
        shift: &mut [E::Param],
    ) -> Result<()> {
        self.check_folded(affine, population)?;
        self.check_channels("scale", Some(scale))?;
        self.check_channels("shift", Some(shift))?;
        for c in 0..self.shape().channels() {
            let (a, b) = self.line(affine, population, c);
            (scale[c], shift[c]) = (Real::from_f64_saturating(a), Real::from_f64(b));
        }
        Ok(())
    }

    /// Scale and shift of a channel at inference.
    pub(crate) fn line(&self, affine: Affine<'_, E>, population: Population<'_, E::Param>, c: usize) -> (f64, f64) {
        let (gamma, beta) = affine.trained().channel(c);
        let scale = gamma * inv_std(population.var[c].to_f64(), self.eps());
        (scale, beta - population.mean[c].to_f64() * scale)
    }

    fn check_fold(
        &self,
        channels: usize,
        layer: Layer,
        weight: &[E::Param],
        bias: &[E::Param],
        affine: Affine<'_, E>,
        population: Population<'_, E::Param>,
    ) -> Result<()> {
        layer.check(self.shape().channels(), channels, weight, bias)?;
        self.check_folded(affine, population)
    }

    /// Refuses what is more than a line per channel.
    fn check_folded(&self, affine: Affine<'_, E>, population: Population<'_, E::Param>) -> Result<()> {
        self.check_affine(affine)?;
        self.check_population(population)?;
        if affine.is_last() { Ok(()) } else { Err(Error::FoldedAffine) }
    }
}
