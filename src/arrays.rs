//! Arrays of the crate ndarray, read and written where they lie: their sizes and strides become a plan's shape and views.

use core::cmp::Reverse;

use ndarray::{ArrayRef, Axis, Dimension};

use crate::affine::{Affine, Gradients};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::moments::Saved;
use crate::plan::BatchNorm;
use crate::running::Population;
use crate::shape::{Layout, Shape};
use crate::tensor::{Disjoint, InOut, Side, Source};
use crate::view::View;

/// A plan for arrays of the crate [`ndarray`], of any number of axes and any strides that keep elements apart.
///
/// It is made for arrays that lie like `x` and like `y`; then `x` and `dx` lie as the one, `y`, `dy` and the gradient of a residual
/// as the other. References to arrays and to views of them are taken alike. What has a value per channel is a slice, and so is a
/// residual: `gamma.as_slice()`, `dgamma.as_slice_mut()` of an `Array1`.
///
/// ```
/// use batchnorm::{Affine, ArrayGradients, Arrays};
/// use ndarray::{Array4, Axis, s};
///
/// let batch = Array4::from_shape_fn((8, 16, 5, 6), |(n, c, h, w)| ((n * 7 + c * 5 + h * 3 + w) % 11) as f32);
/// // Half of the channels, where they lie, into an array of their own.
/// let x = batch.slice(s![.., 4..12, .., ..]);
/// let (mut y, dy) = (Array4::zeros(x.raw_dim()), Array4::ones(x.raw_dim()));
/// let bn = Arrays::new(&x, &y, Axis(1))?.with_options(|plan| plan.with_eps(1e-3))?;
/// let mut saved = bn.plan().saved();
/// bn.forward_train(&x, Affine::none(), &mut y, &mut saved)?;
///
/// // The gradient lies like `x`, here in an array as large as the batch.
/// let mut gradient = Array4::zeros(batch.raw_dim());
/// let mut dx = gradient.slice_mut(s![.., 4..12, .., ..]);
/// bn.backward(&x, &dy, &saved, Affine::none(), ArrayGradients { dx: Some(&mut dx), ..Default::default() })?;
/// # Ok::<(), batchnorm::Error>(())
/// ```
///
/// **Layout.** What counts is the memory of `x`, not the order of its axes: where the channels have the smallest stride the array is
/// channels last, otherwise channels first, its other axes from the largest stride to the smallest. So an array has the
/// bits that it has with its axes permuted, those of the slice that it is a view of. `plan().shape()` tells what was found.
///
/// ```
/// # use batchnorm::{Arrays, Layout};
/// # use ndarray::{Array4, Axis};
/// // Channels last in memory, with the axes in the order that PyTorch has them.
/// let x = Array4::<f32>::zeros((8, 5, 6, 16)).permuted_axes([0, 3, 1, 2]);
/// let bn = Arrays::new(&x, &x, Axis(1))?;
/// assert_eq!((bn.plan().shape().layout(), bn.plan().shape().channels()), (Layout::ChannelsLast, 16));
/// # Ok::<(), batchnorm::Error>(())
/// ```
///
/// **Speed.** Dense arrays take the way of dense slices. What lies otherwise is packed block by block into a cache, runs of memory at a
/// time, or element by element where the smallest stride is not 1.
#[derive(Debug, Clone)]
pub struct Arrays<E: Element, D: Dimension> {
    plan: BatchNorm<E>,
    channels: Axis,
    sizes: D,
    /// Of what lies like `x`, and of what lies like `y`.
    strides: [Box<[isize]>; 2],
}

/// The gradients that [`Arrays::backward`] is to write: any subset.
#[derive(Debug)]
pub struct ArrayGradients<'a, E: Element, D: Dimension> {
    /// With respect to the input; it lies like `x`.
    pub dx: Option<&'a mut ArrayRef<E, D>>,
    /// With respect to gamma, `C` values.
    pub dgamma: Option<&'a mut [E::Param]>,
    /// With respect to beta, `C` values.
    pub dbeta: Option<&'a mut [E::Param]>,
    /// With respect to the residual; it lies like `y`.
    pub dresidual: Option<&'a mut ArrayRef<E, D>>,
}

impl<E: Element, D: Dimension> Default for ArrayGradients<'_, E, D> {
    fn default() -> Self {
        Self { dx: None, dgamma: None, dbeta: None, dresidual: None }
    }
}

impl<E: Element, D: Dimension> Arrays<E, D> {
    /// A plan for arrays that lie like `x` and `y`, with the options of [`BatchNorm::new`]. PyTorch's channels are `Axis(1)`, those of
    /// Keras the last axis.
    ///
    /// # Errors
    /// [`Error::Axes`] for fewer than two axes, for more than a batch, channels and three others that are longer than 1, and for
    /// channels that are no axis; [`Error::Array`] for strides that are negative, broadcast (zero) or let elements share a place;
    /// [`Error::Sizes`] if the two differ in their sizes; as [`Shape::new`].
    pub fn new(x: &ArrayRef<E, D>, y: &ArrayRef<E, D>, channels: Axis) -> Result<Self> {
        Self::of(x, y, channels, BatchNorm::new)
    }

    /// The same options for other arrays, such as the last, smaller batch.
    ///
    /// # Errors
    /// As [`Arrays::new`].
    pub fn with_arrays(&self, x: &ArrayRef<E, D>, y: &ArrayRef<E, D>) -> Result<Self> {
        Self::of(x, y, self.channels, |shape| self.plan.with_shape(shape))
    }

    fn of(
        x: &ArrayRef<E, D>,
        y: &ArrayRef<E, D>,
        channels: Axis,
        plan: impl FnOnce(Shape) -> Result<BatchNorm<E>>,
    ) -> Result<Self> {
        if x.shape() != y.shape() {
            return Err(Error::Sizes { what: "y", expected: x.shape().into(), got: y.shape().into() });
        }
        let (shape, axes) = order(x, channels)?;
        let plan = plan(shape)?;
        let (x_view, y_view) = (view(&shape, &axes, x)?, view(&shape, &axes, y)?);
        let dense = View::dense(&shape);
        let plan = if x_view == dense && y_view == dense { plan } else { plan.with_views(x_view, y_view)? };
        Ok(Self { plan, channels, sizes: x.raw_dim(), strides: [x, y].map(|array| array.strides().into()) })
    }

    /// The same with other options of its plan.
    ///
    /// # Errors
    /// Those of `options`; [`Error::View`] if they make a plan for another shape or other views.
    pub fn with_options(self, options: impl FnOnce(BatchNorm<E>) -> Result<BatchNorm<E>>) -> Result<Self> {
        let plan = options(self.plan.clone())?;
        match plan.lies_like(&self.plan) {
            true => Ok(Self { plan, ..self }),
            false => Err(Error::View {
                reason:
                    "expected options alone; for other arrays, such as a smaller batch, there is `Arrays::with_arrays`"
                        .into(),
            }),
        }
    }

    /// The plan behind it, of which there are the room for statistics, running statistics and the shape.
    pub fn plan(&self) -> &BatchNorm<E> {
        &self.plan
    }

    /// [`BatchNorm::forward_train`]. A residual is a slice that lies like `y`, from its first element to its last.
    ///
    /// # Errors
    /// [`Error::Sizes`] and [`Error::Strides`] for `x` or `y`; as [`BatchNorm::forward_train`].
    pub fn forward_train(
        &self,
        x: &ArrayRef<E, D>,
        affine: Affine<'_, E>,
        y: &mut ArrayRef<E, D>,
        saved: &mut Saved<E::Param>,
    ) -> Result<()> {
        self.plan.train(self.forward(x, y)?, affine, saved)
    }

    /// [`BatchNorm::forward_infer`].
    ///
    /// # Errors
    /// [`Error::Sizes`] and [`Error::Strides`] for `x` or `y`; as [`BatchNorm::forward_infer`].
    pub fn forward_infer(
        &self,
        x: &ArrayRef<E, D>,
        affine: Affine<'_, E>,
        population: Population<'_, E::Param>,
        y: &mut ArrayRef<E, D>,
    ) -> Result<()> {
        self.plan.infer(self.forward(x, y)?, affine, population)
    }

    /// [`BatchNorm::backward`]. A residual and an output are slices that lie like `y`, from its first element to its last.
    ///
    /// # Errors
    /// [`Error::Sizes`] and [`Error::Strides`] for any array; as [`BatchNorm::backward`].
    pub fn backward(
        &self,
        x: &ArrayRef<E, D>,
        dy: &ArrayRef<E, D>,
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        ArrayGradients { dx, dgamma, dbeta, dresidual }: ArrayGradients<'_, E, D>,
    ) -> Result<()> {
        let (x, dy) = (self.source(Side::X, "x", x)?, self.source(Side::Y, "dy", dy)?);
        let dx = dx.map(|dx| self.target(Side::X, "dx", dx)).transpose()?;
        let dresidual = dresidual.map(|tensor| self.target(Side::Y, "dresidual", tensor)).transpose()?;
        let tensors = (dx.map(|to| InOut { from: dy, to }), dresidual);
        self.plan.differentiate(x, dy, tensors, saved, affine, Gradients { dgamma, dbeta, ..Default::default() })
    }

    fn forward<'a>(&self, x: &'a ArrayRef<E, D>, y: &'a mut ArrayRef<E, D>) -> Result<InOut<'a, E>> {
        Ok(InOut { from: self.source(Side::X, "x", x)?, to: self.target(Side::Y, "y", y)? })
    }

    fn source<'a>(&self, side: Side, what: &'static str, array: &'a ArrayRef<E, D>) -> Result<Source<'a, E>> {
        self.check(side, what, array)?;
        // SAFETY: the array has the sizes and strides that the view was made of, none of them negative, so what the view shows
        // are the elements of the array, which is borrowed.
        Ok(unsafe { Source::shown(array.as_ptr(), side) })
    }

    fn target<'a>(&self, side: Side, what: &'static str, array: &'a mut ArrayRef<E, D>) -> Result<Disjoint<'a, E>> {
        self.check(side, what, array)?;
        // SAFETY: as above, and the borrow is exclusive. Elements between those of the array are left alone: those of a strided
        // view are reached by pointers to themselves, and a dense one has no others.
        Ok(unsafe { Disjoint::shown(array.as_mut_ptr(), array.len(), side) })
    }

    /// Whether an array lies where the plan will look for it.
    fn check(&self, side: Side, what: &'static str, array: &ArrayRef<E, D>) -> Result<()> {
        if *array.shape() != *self.sizes.slice() {
            return Err(Error::Sizes { what, expected: self.sizes.slice().into(), got: array.shape().into() });
        }
        let expected = &self.strides[side as usize];
        let taken = |axis: usize| array.shape()[axis] > 1 && !array.is_empty();
        match (0..array.ndim()).all(|axis| !taken(axis) || array.strides()[axis] == expected[axis]) {
            true => Ok(()),
            false => Err(Error::Strides { what, expected: expected.to_vec(), got: array.strides().into() }),
        }
    }
}

/// The shape of an array, and its axes in the order of the letters of the layout; `None` for a batch of one that has no axis.
fn order<E, D: Dimension>(x: &ArrayRef<E, D>, channels: Axis) -> Result<(Shape, Vec<Option<usize>>)> {
    let (sizes, channels) = (x.shape(), channels.index());
    let refused = Error::Axes { axes: sizes.len(), channels };
    if sizes.len() < 2 || channels >= sizes.len() {
        return Err(refused);
    }
    // Strides of an array without elements say nothing.
    let stride = |axis: usize| if x.is_empty() { -(axis as isize) } else { x.strides()[axis] };
    let mut others: Vec<_> = (0..sizes.len()).filter(|&axis| axis != channels && sizes[axis] != 1).collect();
    others.sort_by_key(|&axis| Reverse(stride(axis)));
    let around = others.partition_point(|&axis| stride(axis) > stride(channels));
    let layout = if around == others.len() { Layout::ChannelsLast } else { Layout::ChannelsFirst };
    let batch = (around > 0).then(|| others.remove(0));
    if others.len() > 3 {
        return Err(refused);
    }
    let spatial: Vec<_> = others.iter().map(|&axis| sizes[axis]).collect();
    let shape = Shape::new(layout, batch.map_or(1, |axis| sizes[axis]), sizes[channels], &spatial)?;
    let mut axes: Vec<_> = [batch].into_iter().chain(others.into_iter().map(Some)).collect();
    axes.insert(if layout == Layout::ChannelsFirst { 1 } else { axes.len() }, Some(channels));
    Ok((shape, axes))
}

/// Where the elements of an array lie.
fn view<E, D: Dimension>(shape: &Shape, axes: &[Option<usize>], array: &ArrayRef<E, D>) -> Result<View> {
    if shape.is_empty() {
        return Ok(View::dense(shape));
    }
    let sizes: Vec<_> = axes.iter().map(|axis| axis.map_or(1, |axis| array.shape()[axis])).collect();
    // A stride that is never taken may be of any size.
    let taken = |axis: usize| if array.shape()[axis] > 1 { array.strides()[axis] } else { 0 };
    let strides = axes.iter().map(|axis| axis.map_or(0, taken).try_into());
    let strides: Vec<usize> =
        strides.collect::<core::result::Result<_, _>>().map_err(|_| Error::Array { reason: "an axis is reversed" })?;
    // The sizes are those of the shape.
    View::strided(shape, &sizes, &strides)
        .map_err(|_| Error::Array { reason: "elements share a place, as where it is broadcast" })
}
