//! The backward pass of the backward pass, for losses that contain gradients: gradient penalties, second-order methods.
//!
//! With `v` the gradient of the loss with respect to dx, `w` that with respect to dgamma, `u` that with respect to dbeta,
//! `g = gamma`, `s = inv_std` and means over the `m` values of a channel, `A = mean(dy)`, `B = mean(dy * xhat)`,
//! `V = mean(v)`, `C = mean(v * xhat)`, `D = mean(v * dy)`, differentiating `sum(v * dx) + w * dgamma + u * dbeta` gives
//!
//! ```text
//! wrt dy     g s ((v - V) - xhat C) + w xhat + u
//! wrt x      (w s - g s^2 C) (dy - A) - g s^2 B (v - V) - (g s^2 (D - V A - 3 B C) + w s B) xhat
//! wrt gamma  s m (D - V A - B C)
//! ```
//!
//! from `ds/dx_j = -s^2 xhat_j / m` and `dxhat_i/dx_j = s ((i == j) - 1/m - xhat_i xhat_j / m)`. Where the statistics are constants,
//! `g s v + w xhat + u`, `w s dy` and `s m D`. Batch Renormalization has `g r` for g and `xhat r + d` for xhat in dgamma.

use core::ops::Range;

use crate::activation::{Activation, Bend};
use crate::affine::Affine;
use crate::backward::{Channels, GradientSumsOf, Upstreams};
use crate::element::{Element, Real};
use crate::error::{Error, Result};
use crate::kernel::gradient::{self, Pair};
use crate::kernel::map::Target;
use crate::kernel::normalize::{self, Activated, Normalize};
use crate::moments::Saved;
use crate::operation::Operation;
use crate::pass::{BATCH, Context, Each};
use crate::plan::BatchNorm;
use crate::scratch::Scratch;
use crate::tensor::{Disjoint, Side, Source};

/// The gradients of a loss with respect to what [`BatchNorm::backward`] gave.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cotangents<'a, E: Element> {
    /// With respect to dx, of its length.
    pub dx: &'a [E],
    /// With respect to dgamma, `C` values; `None` stands for zeros.
    pub dgamma: Option<&'a [E::Param]>,
    /// With respect to dbeta, `C` values; `None` stands for zeros.
    pub dbeta: Option<&'a [E::Param]>,
}

/// The gradients of the same loss with respect to what [`BatchNorm::backward`] was given: any subset.
#[derive(Debug, PartialEq)]
pub struct SecondGradients<'a, E: Element> {
    /// With respect to x, of its length.
    pub x: Option<&'a mut [E]>,
    /// With respect to dy, of its length.
    pub dy: Option<&'a mut [E]>,
    /// With respect to gamma, `C` values.
    pub gamma: Option<&'a mut [E::Param]>,
}

impl<E: Element> Default for SecondGradients<'_, E> {
    fn default() -> Self {
        Self { x: None, dy: None, gamma: None }
    }
}

impl<E: Element> BatchNorm<E> {
    /// The backward pass of [`BatchNorm::backward`]: from the gradients of a loss with respect to dx, dgamma and dbeta, those with
    /// respect to x, dy and gamma. `x`, `dy`, `saved` and `affine` are those of the backward pass.
    ///
    /// ```
    /// # use batchnorm::{Affine, BatchNorm, Cotangents, Gradients, SecondGradients, Shape};
    /// # let (x, dy, gamma) = (vec![1f64; 12], vec![1f64; 12], [1f64; 3]);
    /// # let (mut y, mut dx, mut of_x, mut of_dy) = (x.clone(), x.clone(), x.clone(), x.clone());
    /// let bn = BatchNorm::<f64>::new(Shape::nc(4, 3)?)?;
    /// let (mut saved, affine) = (bn.saved(), Affine::scale(&gamma));
    /// bn.forward_train(&x, affine, &mut y, &mut saved)?;
    /// bn.backward(&x, &dy, &saved, affine, Gradients { dx: Some(&mut dx), ..Default::default() })?;
    /// // The penalty sum(dx^2) / 2 has the gradient dx with respect to dx.
    /// let cotangents = Cotangents { dx: &dx, dgamma: None, dbeta: None };
    /// let gradients = SecondGradients { x: Some(&mut of_x), dy: Some(&mut of_dy), ..Default::default() };
    /// bn.double_backward(&x, &dy, &saved, affine, cotangents, gradients)?;
    /// # Ok::<(), batchnorm::Error>(())
    /// ```
    ///
    /// The gradient with respect to x is written twice, rounded each time, and a few values per channel are allocated.
    ///
    /// # Errors
    /// As [`BatchNorm::backward`], for all slices; [`Error::SecondDerivative`] with an activation: its second derivative is zero,
    /// so pass in the place of `dy` what it lets through (`Gradients::dresidual`) and an affine part without it, and
    /// mask the gradient with respect to dy.
    pub fn double_backward(
        &self,
        x: &[E],
        dy: &[E],
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        cotangents: Cotangents<'_, E>,
        gradients: SecondGradients<'_, E>,
    ) -> Result<()> {
        let (of_x, of_dy) = (gradients.x.as_deref(), gradients.dy.as_deref());
        let given =
            [(Side::X, "x", Some(x)), (Side::Y, "dy", Some(dy)), (Side::X, "cotangent of dx", Some(cotangents.dx))];
        let wanted = [(Side::X, "gradient of x", of_x), (Side::Y, "gradient of dy", of_dy)];
        for (side, what, tensor) in given.into_iter().chain(wanted) {
            tensor.map_or(Ok(()), |tensor| self.check_tensor(side, what, tensor))?;
        }
        self.check_channels("cotangent of dgamma", cotangents.dgamma)?;
        self.check_channels("cotangent of dbeta", cotangents.dbeta)?;
        self.check_channels("gradient of gamma", gradients.gamma.as_deref())?;
        self.check_backward(saved, affine, None, None)?;
        if affine.activation != Activation::None {
            return Err(Error::SecondDerivative);
        }
        let to = |tensor, side| Target::new(Disjoint::tensor(tensor, side), false);
        let from = self.upstreams(Source::new(x, Side::X), Source::new(dy, Side::Y), saved, affine, self.count());
        let mut means = vec![[0.0; 5]; self.shape().channels()];
        self.execute(Operation::Twice(Twice {
            from,
            of: Upstreams { dy: Source::new(cotangents.dx, Side::X), ..from },
            of_dgamma: cotangents.dgamma,
            of_dbeta: cotangents.dbeta,
            means: Disjoint::new(&mut means),
            x: gradients.x.map(|tensor| to(tensor, Side::X)),
            dy: gradients.dy.map(|tensor| to(tensor, Side::Y)),
            gamma: gradients.gamma.map(Disjoint::new),
        }));
        Ok(())
    }
}

/// The operation.
pub(crate) struct Twice<'a, E: Element> {
    from: Upstreams<'a, E>,
    /// The same with the gradient of dx in the place of dy.
    of: Upstreams<'a, E>,
    of_dgamma: Option<&'a [E::Param]>,
    of_dbeta: Option<&'a [E::Param]>,
    /// `[A, B, V, C, D]` of each channel.
    means: Disjoint<'a, [f64; 5]>,
    x: Option<Target<'a, E>>,
    dy: Option<Target<'a, E>>,
    gamma: Option<Disjoint<'a, E::Param>>,
}

/// What the coefficients of a channel are made of, in the letters of the formulas.
struct Channel {
    s: f64,
    r: f64,
    /// `g r s`, what dy is multiplied by in dx.
    scale: f64,
    /// `w r`, and `u + w d`.
    of_xhat: f64,
    beside: f64,
    /// `[A, B, V, C, D]`; constant statistics have no use for the first four.
    means: [f64; 5],
}

impl Channel {
    /// What x is scaled by in the gradient of the means' part: `s (D - V A - k B C)`.
    fn bent(&self, k: f64) -> f64 {
        let [a, b, v, c, d] = self.means;
        self.s * (d - v * a - k * b * c)
    }
}

impl<E: Element> Twice<'_, E> {
    /// Runs.
    ///
    /// # Safety
    /// As [`Operation::run`].
    pub(crate) unsafe fn run(self, context: Context<'_>, scratch: &mut Scratch<E::Param>) {
        let Self { from, of, means, .. } = self;
        let count = from.channels.count as f64;
        // The first one has dy in the place of xhat; what it finds beside D is overwritten.
        let of_both = GradientSumsOf { is_plain: true, ..of.sums::<_, 2>(from.dy, of.dy) };
        for (at, sums) in [(3, of_both), (0, from.sums(from.x, from.dy)), (2, of.sums(of.x, of.dy))] {
            let keep = |channels: Range<usize>, values: &[Each<f64>; 2]| {
                // SAFETY: each channel is closed once.
                let means = unsafe { means.slice(channels.clone()) };
                let sums = if sums.is_plain { *values } else { sums.channels.complete(channels, values) };
                for (i, means) in means.iter_mut().enumerate() {
                    for (k, sums) in sums.iter().enumerate() {
                        means[at + k] = sums[i] / count;
                    }
                }
            };
            // SAFETY: the caller's promise.
            unsafe { context.reduce::<E, _, 2>(&sums, &keep, scratch) };
        }
        // SAFETY: the caller's promise, and no two of them are written at a time.
        unsafe {
            if let Some(to) = self.dy {
                let pair = Pair { x: of.x, upstream: of.dy };
                context.apply::<_, _, 6>(pair, &|channels| self.wrt_dy(channels), to, scratch);
            }
            if let Some(to) = self.x {
                let pair = Pair { x: from.x, upstream: from.dy };
                context.apply::<_, _, 6>(pair, &|channels| self.wrt_x(channels), to, scratch);
                let (normalize, bend) = (Normalize(of.dy), Bend::new(Activation::None));
                let rest = Activated { normalize, residual: Some(to.to.source()), bend, gates: None };
                context.apply(rest, &|channels| self.rest_wrt_x(channels), to, scratch);
            }
            if let Some(to) = self.gamma {
                for (c, gamma) in to.slice(0..from.channels.saved.channels()).iter_mut().enumerate() {
                    let channel = self.channel(c);
                    *gamma = E::Param::from_f64(channel.r * count * channel.bent(1.0));
                }
            }
        }
    }

    fn channel(&self, c: usize) -> Channel {
        let Channels { saved, trained, .. } = self.from.channels;
        let (gamma, _) = saved.line(trained, c);
        let [r, d] = saved.renorm.as_ref().map_or([1.0, 0.0], |renorm| renorm.correction(c));
        let [w, u] = [self.of_dgamma, self.of_dbeta].map(|of| of.map_or(0.0, |of| of[c].to_f64()));
        // SAFETY: the reductions are over.
        let mut means = unsafe { self.means.slice(c..c + 1) }[0];
        if saved.frozen {
            means[..4].fill(0.0);
        }
        let s = saved.inv_std[c].to_f64();
        Channel { s, r, scale: gamma * s, of_xhat: w * r, beside: u + w * d, means }
    }

    /// The coefficients of a map of what is read for xhat and of a gradient, see [`gradient::coefficients`].
    fn each(&self, channels: Range<usize>, of: impl Fn(Channel) -> (f64, (f64, f64), f64)) -> [Each<E::Param>; 6] {
        let mut all = [[E::Param::default(); BATCH]; 6];
        for (i, c) in channels.enumerate() {
            let (slope, of_gradient, beside) = of(self.channel(c));
            let one = gradient::coefficients(self.from.channels.centre(c), slope, of_gradient, beside);
            for (all, one) in all.iter_mut().zip(one) {
                all[i] = one;
            }
        }
        all
    }

    fn wrt_dy(&self, channels: Range<usize>) -> [Each<E::Param>; 6] {
        self.each(channels, |channel| {
            let [_, _, v, c, _] = channel.means;
            (channel.of_xhat - channel.scale * c, (v, channel.scale), channel.beside)
        })
    }

    /// The part that is made of x and dy.
    fn wrt_x(&self, channels: Range<usize>) -> [Each<E::Param>; 6] {
        let frozen = self.from.channels.saved.frozen;
        self.each(channels, |channel| {
            let [a, b, _, c, _] = channel.means;
            let slope = -channel.scale * channel.bent(3.0) - channel.of_xhat * channel.s * b;
            (if frozen { 0.0 } else { slope }, (a, (channel.of_xhat - channel.scale * c) * channel.s), 0.0)
        })
    }

    /// The part that is made of v, see [`normalize::coefficients`].
    fn rest_wrt_x(&self, channels: Range<usize>) -> [Each<E::Param>; 3] {
        let mut all = [[E::Param::default(); BATCH]; 3];
        for (i, c) in channels.enumerate() {
            let Channel { s, scale, means: [_, b, v, ..], .. } = self.channel(c);
            let rounded = E::Param::from_f64(v);
            let residue = E::Param::from_f64(v - rounded.to_f64());
            [all[0][i], all[1][i], all[2][i]] =
                normalize::coefficients((rounded, residue.to_f64()), s, -scale * b, 0.0);
        }
        all
    }
}
