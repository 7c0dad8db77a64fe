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

use crate::activation::Activation;
use crate::affine::Affine;
use crate::error::{Error, Result, check_len};
use crate::grid::{Geometry, for_each_piece};
use crate::plan::BatchNorm;
use crate::running::Population;
use crate::simd::{Isa, Kernel, dispatch};
use crate::tensor::InOut;

/// What the integers of a tensor stand for: `scale * (q - zero_point)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quantization {
    /// The step between neighbours.
    pub scale: f64,
    /// What zero is.
    pub zero_point: i8,
}

/// Elements that are computed together.
const CHUNK: usize = 64;
/// 1.5 * 2^23.
const LARGE: f32 = 12_582_912.0;
/// Elements of the shortest plane that is taken by itself, and the fewest images for which shorter ones are not.
const PLANE: usize = 1024;
const IMAGES: usize = 8;
/// Elements of a plane that are worth another task, and about as many of rows.
const PART: usize = 1 << 16;

impl BatchNorm<f32> {
    /// [`BatchNorm::forward_infer`] of quantized tensors. Results beyond the range of `i8` become its ends.
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
    /// As [`BatchNorm::forward_infer`]; [`Error::Quantization`] for a scale that is not positive and finite; [`Error::View`] for a
    /// plan with views, and [`Error::QuantizedResidual`] for a residual, which would have a scale of its own.
    pub fn forward_infer_quantized(
        &self,
        x: &[i8],
        of_x: Quantization,
        affine: Affine<'_, f32>,
        population: Population<'_, f32>,
        y: &mut [i8],
        of_y: Quantization,
    ) -> Result<()> {
        check_len("x", self.shape().len(), x.len())?;
        check_len("y", self.shape().len(), y.len())?;
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
        check_len("x", self.shape().len(), x.len())?;
        self.infer_quantized(InOut::in_place(x), [of_x, of_y], affine, population)
    }

    fn infer_quantized(
        &self,
        io: InOut<'_, i8>,
        [of_x, of_y]: [Quantization; 2],
        affine: Affine<'_, f32>,
        population: Population<'_, f32>,
    ) -> Result<()> {
        self.check_dense()?;
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
        let line = |c: usize| {
            let (scale, shift) = self.line(affine, population, c);
            let zero = of_x.scale * f64::from(of_x.zero_point);
            [(scale * of_x.scale / of_y.scale) as f32, ((shift - zero * scale) / of_y.scale) as f32]
        };
        let lines: Vec<[f32; 2]> = (0..self.shape().channels()).map(line).collect();
        let slope = match affine.activation {
            Activation::None => Some(1.0),
            Activation::Relu => None,
            Activation::LeakyRelu(slope) => Some(slope as f32),
        };
        let write = |range: Range<usize>, [a, b]: [&[f32]; 2]| {
            let zero_point = f32::from(of_y.zero_point);
            dispatch(self.dispatched(), Write { io, range, a, b, slope, zero_point });
        };
        let workers = self.workers(self.shape().len());
        // Rows, or images of small planes, with the coefficients of each element of one.
        let (rows, run) = match Geometry::new(self.shape()) {
            Geometry::Planar(planar) if planar.plane >= PLANE || planar.planes < IMAGES => {
                let parts = planar.plane.div_ceil(PART);
                for_each_piece(workers, planar.planes * planar.channels * parts, &|_, items| {
                    for item in items {
                        let (plane, part) = (item / parts, item % parts);
                        let [a, b] = lines[plane % planar.channels].map(|value| [value; CHUNK]);
                        let at = |part: usize| plane * planar.plane + (part * PART).min(planar.plane);
                        write(at(part)..at(part + 1), [&a, &b]);
                    }
                });
                return Ok(());
            }
            Geometry::Planar(planar) => (planar.planes, planar.plane),
            Geometry::Rows(rows) => (rows.rows, 1),
        };
        let row = lines.len() * run;
        if row == 0 {
            return Ok(());
        }
        // Short ones are repeated, so that chunks are full.
        let repeated = (4 * CHUNK).div_ceil(row);
        let [a, b] = [0, 1].map(|k| {
            let values = lines.iter().flat_map(|line| core::iter::repeat_n(line[k], run));
            core::iter::repeat_n(values, repeated).flatten().collect::<Vec<_>>()
        });
        let part = repeated * (PART / a.len()).max(1);
        for_each_piece(workers, rows.div_ceil(part), &|_, parts| {
            let at = |i: usize| (i * part).min(rows) * row;
            write(at(parts.start)..at(parts.end), [&a, &b]);
        });
        Ok(())
    }
}

/// Writes the elements of `range`, with coefficients that repeat from its start on.
struct Write<'a> {
    io: InOut<'a, i8>,
    range: Range<usize>,
    a: &'a [f32],
    b: &'a [f32],
    /// Of what is not positive; none makes it zero, infinities too.
    slope: Option<f32>,
    zero_point: f32,
}

impl Kernel for Write<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let Self { io, ref range, a, b, .. } = self;
        let (mut at, mut k) = (range.start, 0);
        while at < range.end {
            let n = CHUNK.min(range.end - at).min(a.len() - k);
            // SAFETY: the elements lie inside both tensors, whose lengths were checked, and no other piece has them.
            unsafe {
                let (from, to) = (io.from.as_ptr().add(at), io.to.as_ptr().add(at));
                match (a[k..].first_chunk(), b[k..].first_chunk()) {
                    (Some(a), Some(b)) if n == CHUNK => {
                        let mut values = from.cast::<[i8; CHUNK]>().read_unaligned();
                        self.compute(&mut values, a, b);
                        to.cast::<[i8; CHUNK]>().write_unaligned(values);
                    }
                    _ => {
                        let (mut values, mut of_a, mut of_b) = ([0; CHUNK], [0.0; CHUNK], [0.0; CHUNK]);
                        core::ptr::copy_nonoverlapping(from, values.as_mut_ptr(), n);
                        of_a[..n].copy_from_slice(&a[k..k + n]);
                        of_b[..n].copy_from_slice(&b[k..k + n]);
                        self.compute(&mut values, &of_a, &of_b);
                        core::ptr::copy_nonoverlapping(values.as_ptr(), to, n);
                    }
                }
            }
            at += n;
            k = if k + n == a.len() { 0 } else { k + n };
        }
    }
}

impl Write<'_> {
    // A plain loop over arrays, which compilers turn into vectors of the tier.
    #[inline(always)]
    fn compute(&self, values: &mut [i8; CHUNK], a: &[f32; CHUNK], b: &[f32; CHUNK]) {
        let (slope, keeps) = (self.slope.unwrap_or(0.0), self.slope.is_some());
        for i in 0..CHUNK {
            let line = f32::from(values[i]) * a[i] + b[i];
            let below = if keeps { line * slope } else { 0.0 };
            let bent = if line <= 0.0 { below } else { line };
            // Beside so large a number the last bit is 1, and the low bits are the integer.
            let rounded = (bent + self.zero_point).clamp(-128.0, 127.0) + LARGE;
            values[i] = rounded.to_bits() as i8;
        }
    }
}
