//! Inference on tensors of 8-bit integers.
//!
//! A quantized tensor stands for `scale * (q - zero_point)` (Jacob et al., "Quantization and Training of Neural Networks for
//! Efficient Integer-Arithmetic-Only Inference", 2018, section 2.1). With `s = gamma / sqrt(var + eps)`,
//!
//! ```text
//! y_q = saturate(round(act(x_q * a + b) + zero_point_y))
//! a = s * scale_x / scale_y      b = (beta - (mean + scale_x * zero_point_x) * s) / scale_y
//! ```
//!
//! `a` and `b` are computed in f64 and rounded to f32, the rest is f32, ties to even.

use core::ops::Range;

use crate::activation::Bend;
use crate::affine::Affine;
use crate::error::{Error, Result};
use crate::kernel::map::Map;
use crate::pass::BATCH;
use crate::plan::BatchNorm;
use crate::running::Population;
use crate::simd::{Compute, Isa, Vector};
use crate::tensor::{InOut, Side, Source};
use crate::view::{Pack, Packs};

/// What the integers of a tensor stand for: `scale * (q - zero_point)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quantization {
    /// The step between neighbours.
    pub scale: f64,
    /// What zero is.
    pub zero_point: i8,
}

impl BatchNorm<f32> {
    /// [`BatchNorm::forward_infer`] of quantized tensors. Results beyond the range of `i8` become its ends, and a NaN becomes 0.
    /// Where a view or a mask shows nothing, the output's zero point is written.
    ///
    /// ```
    /// use batchnorm::{Affine, BatchNorm, Population, Quantization, Shape};
    /// let bn = BatchNorm::<f32>::new(Shape::nc(2, 2)?)?.with_eps(0.0)?;
    /// let population = Population { mean: &[1.0, 0.0], var: &[4.0, 1.0] };
    /// // Steps of 0.5 around 10, and of 0.25 around 0.
    /// let (of_x, of_y) = (Quantization { scale: 0.5, zero_point: 10 }, Quantization { scale: 0.25, zero_point: 0 });
    /// let (x, mut y) = ([10, 10, 14, 120], [0; 4]);
    /// bn.forward_infer_quantized(&x, of_x, Affine::none(), population, &mut y, of_y)?;
    /// assert_eq!(y, [-2, 0, 2, 127]);
    /// # Ok::<(), batchnorm::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`BatchNorm::forward_infer`]; [`Error::Quantization`] for a scale that is not positive and finite;
    /// [`Error::QuantizedResidual`] for a residual, which would have a scale of its own.
    pub fn forward_infer_quantized(
        &self,
        x: &[i8],
        of_x: Quantization,
        affine: Affine<'_, f32>,
        population: Population<'_, f32>,
        y: &mut [i8],
        of_y: Quantization,
    ) -> Result<()> {
        self.check_tensor(Side::X, "x", x)?;
        self.check_tensor(Side::Y, "y", y)?;
        self.infer_quantized(InOut::forward(x, y), [of_x, of_y], affine, population)
    }

    /// [`BatchNorm::forward_infer_quantized`] with `y` written over `x`.
    ///
    /// # Errors
    /// As [`BatchNorm::forward_infer_quantized`].
    pub fn forward_infer_quantized_in_place(
        &self,
        x: &mut [i8],
        of_x: Quantization,
        affine: Affine<'_, f32>,
        population: Population<'_, f32>,
        of_y: Quantization,
    ) -> Result<()> {
        self.check_in_place(Side::X, "x", x)?;
        self.infer_quantized(InOut::in_place(x), [of_x, of_y], affine, population)
    }

    fn infer_quantized(
        &self,
        io: InOut<'_, i8>,
        [of_x, of_y]: [Quantization; 2],
        affine: Affine<'_, f32>,
        population: Population<'_, f32>,
    ) -> Result<()> {
        self.check_affine(affine)?;
        self.check_population(population)?;
        if affine.residual.is_some() {
            return Err(Error::QuantizedResidual);
        }
        for Quantization { scale: got, .. } in [of_x, of_y] {
            if !(got.is_finite() && got > 0.0) {
                return Err(Error::Quantization { got });
            }
        }
        let lines = |channels: Range<usize>| {
            let mut lines = [[0.0; BATCH]; 2];
            for (i, c) in channels.enumerate() {
                let (scale, shift) = self.line(affine, population, c);
                let zero = of_x.scale * f64::from(of_x.zero_point);
                lines[0][i] = (scale * of_x.scale / of_y.scale) as f32;
                lines[1][i] = ((shift - zero * scale) / of_y.scale) as f32;
            }
            lines
        };
        let map = Requantize { x: io.from, bend: Bend::new(affine.activation), zero_point: of_y.zero_point };
        self.map(io, map, &lines);
        Ok(())
    }
}

/// `act(x * a + b) + zero_point`, which the store rounds.
#[derive(Clone, Copy)]
struct Requantize<'a> {
    x: Source<'a, i8>,
    bend: Bend<f32>,
    zero_point: i8,
}

impl Packs<i8> for Requantize<'_> {
    unsafe fn packed(self, pack: &mut Pack<'_, '_, i8>) -> Self {
        // SAFETY: the caller's promise.
        Self { x: unsafe { pack.pack(self.x) }, ..self }
    }
}

impl Map<2> for Requantize<'_> {
    type Element = i8;

    #[inline(always)]
    unsafe fn raw<I: Isa, const FULL: bool>(
        &self,
        isa: I,
        [a, b]: &[Compute<I, i8>; 2],
        at: usize,
        n: usize,
    ) -> Compute<I, i8> {
        // SAFETY: the caller's promise.
        let x = unsafe { self.x.load::<I, FULL>(isa, at, n) };
        let line = x.mul(*a).add(*b);
        self.bend.apply(isa, line, line).add(Vector::splat(isa, self.zero_point.into()))
    }

    fn zero(&self) -> i8 {
        self.zero_point
    }

    #[inline(always)]
    fn prefetch<I: Isa>(&self, isa: I, at: usize) {
        self.x.prefetch(isa, at);
    }
}
