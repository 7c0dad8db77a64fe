//! Whitening: channels that are not only standardized but made uncorrelated, the costly ideal that Batch Normalization
//! approximates (Ioffe & Szegedy 2015, section 2).
//!
//! With the values of a group of channels as the columns of `X`, `m` of them, and `Xc = X - mean`:
//!
//! ```text
//! S = Xc Xc^T / m + eps I      Xhat = W Xc      y = gamma * Xhat + beta
//! ```
//!
//! where `W` is `S^(-1/2)`, or comes near it, see [`Method`]. A [`Whitening`] is a plan for tensors of one
//! [`Shape`] and element type, as [`BatchNorm`](crate::BatchNorm) is.
//!
//! ```
//! use batchnorm::whitening::Whitening;
//! use batchnorm::{Affine, Shape};
//!
//! // Two channels, of which one follows the other.
//! let x = [1.0f32, 1.1, 2.0, 1.9, 3.0, 3.2, 4.0, 3.8];
//! let mut y = [0.0; 8];
//! let plan = Whitening::<f32>::new(Shape::nc(4, 2)?)?.with_eps(0.0)?;
//! let mut saved = plan.saved();
//! plan.forward_train(&x, Affine::none(), &mut y, &mut saved)?;
//! let product: f32 = y.chunks(2).map(|pair| pair[0] * pair[1]).sum();
//! assert!(product.abs() < 1e-5);
//! # Ok::<(), batchnorm::Error>(())
//! ```
//!
//! # What it costs
//!
//! For groups of `g` channels about `3 g` additions and products per element forward, and `6 g` backward, beside one inverse
//! root per group, of the order of `g^3`. All of it is done in f64, whatever the elements are: a covariance squares the range
//! of its values, and what is small beside the largest variance would be lost in f32. Results are rounded to the type of the
//! parameters, and from there to that of the elements. docs/whitening.md has figures.
//!
//! # Promises
//!
//! - **Bits** do not depend on the number of threads. Products of matrices are left to a library that picks instructions
//!   by the CPU, so that, other than in the rest of this crate, last bits may differ between CPUs.
//! - **Errors** come before the first write, as everywhere.
//! - **Tensors** are dense; there are no views, masks, residuals or activations.
//! - **Range**: values around their mean are squared in f64. A group where the sum of all variances overflows (deviations of
//!   1e154 and more) becomes NaN, as one with an infinity does.
//! - **Memory**: calls allocate a few blocks of 128 KB per thread, more for groups of more than 128 channels; up to 32 MB of partial
//!   covariances; and a handful of matrices of `g^2` values for each group, of which [`Saved`] keeps three, or two per step of
//!   [`Method::IterNorm`].

mod matrix;
mod panel;
mod statistics;

use core::marker::PhantomData;
use core::ops::Range;

pub use matrix::Method;
pub use statistics::{Projection, Running, Saved};

use crate::affine::{Affine, Gradients};
use crate::element::{Element, Real};
use crate::error::{Error, Result, check_len};
use crate::grid::{Parallelism, among};
use crate::moments::check_eps;
use crate::running::{Momentum, Variance};
use crate::shape::Shape;
use crate::tensor::Disjoint;
use faer::Mat;
use panel::{Grid, each};
use statistics::{Group, check_groups};

/// Channels of a group unless another number is asked for.
const GROUP: usize = 64;

/// Whitening of tensors of one shape and element type.
///
/// ```
/// use batchnorm::whitening::{Method, Whitening};
/// use batchnorm::{Affine, Gradients, Shape};
/// # let (x, dy): (Vec<f32>, _) = ((0..8 * 6 * 25).map(|i| (i * i % 97) as f32).collect(), vec![1f32; 8 * 6 * 25]);
/// # let (mut y, mut dx) = (x.clone(), x.clone());
/// let plan = Whitening::<f32>::new(Shape::nchw(8, 6, 5, 5)?)?.with_method(Method::IterNorm { steps: 5 })?.with_group(3)?;
/// let mut saved = plan.saved();
/// plan.forward_train(&x, Affine::none(), &mut y, &mut saved)?;
/// plan.backward(&x, &dy, &saved, Affine::none(), Gradients { dx: Some(&mut dx), ..Default::default() })?;
/// # Ok::<(), batchnorm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Whitening<E: Element> {
    shape: Shape,
    group: usize,
    method: Method,
    eps: f64,
    parallelism: Parallelism,
    element: PhantomData<fn(E)>,
}

impl<E: Element> Whitening<E> {
    /// A plan with [`Method::Zca`], `eps` = 1e-5, groups of 64 channels, and threads as in [`Parallelism::Auto`].
    ///
    /// # Errors
    /// None today; a shape that cannot be served would be refused here.
    pub fn new(shape: Shape) -> Result<Self> {
        let (method, parallelism) = (Method::Zca, Parallelism::Auto);
        Self { shape, group: GROUP, method, eps: 1e-5, parallelism, element: PhantomData }.checked()
    }

    /// How the inverse root is taken.
    ///
    /// # Errors
    /// [`Error::NewtonSteps`] for more than [`Method::MOST_STEPS`].
    pub fn with_method(self, method: Method) -> Result<Self> {
        method.check()?;
        Ok(Self { method, ..self })
    }

    /// How many neighbouring channels are whitened together, the last group being smaller where they do not divide the
    /// channels. As many as there are channels, or more, whiten all together; groups of one are Batch Normalization.
    ///
    /// # Errors
    /// [`Error::ZeroChannels`] for none; [`Error::ShapeOverflow`] for so many that no slice holds their covariance.
    pub fn with_group(self, channels: usize) -> Result<Self> {
        if channels == 0 { Err(Error::ZeroChannels) } else { Self { group: channels, ..self }.checked() }
    }

    /// The number that is added to the variances, on the diagonal of the covariance; 0 is allowed.
    ///
    /// # Errors
    /// [`Error::Eps`] if it is negative, infinite or NaN.
    pub fn with_eps(self, eps: f64) -> Result<Self> {
        check_eps(eps)?;
        Ok(Self { eps, ..self })
    }

    /// The use of threads. It changes the speed and no bit of the results.
    #[must_use]
    pub fn with_parallelism(self, parallelism: Parallelism) -> Self {
        Self { parallelism, ..self }
    }

    /// The same options for another shape.
    ///
    /// # Errors
    /// As [`Whitening::with_group`].
    pub fn with_shape(&self, shape: Shape) -> Result<Self> {
        Self { shape, ..*self }.checked()
    }

    /// Refuses groups whose covariance no slice can hold.
    fn checked(self) -> Result<Self> {
        let largest = self.grid().group;
        let bytes = largest.checked_mul(largest).and_then(|values| values.checked_mul(size_of::<f64>()));
        match bytes.and_then(|bytes| isize::try_from(bytes).ok()) {
            Some(_) => Ok(self),
            None => Err(Error::ShapeOverflow { dims: vec![largest, largest] }),
        }
    }

    /// The shape of the tensors.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The number added to the variances.
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// How the inverse root is taken.
    pub fn method(&self) -> Method {
        self.method
    }

    /// The channels of each group.
    pub fn groups(&self) -> impl ExactSizeIterator<Item = Range<usize>> + use<E> {
        groups_of(self.shape.channels(), self.group)
    }

    /// Room for the statistics of a batch, which a forward pass puts there.
    pub fn saved(&self) -> Saved {
        Saved::default()
    }

    /// Running statistics for the groups of this plan, starting at mean 0 and the identity as covariance.
    ///
    /// # Errors
    /// [`Error::Momentum`] for a weight outside 0 to 1.
    pub fn running(&self, momentum: Momentum, variance: Variance) -> Result<Running> {
        Running::new(self.groups(), momentum, variance)
    }

    /// The training forward pass: `y = gamma * W (x - mean) + beta` with the statistics of the batch, which go to `saved`.
    ///
    /// A group with a NaN or an infinity becomes NaN. Constant channels give beta where `eps` is not 0, and so do all channels of
    /// a batch of one value.
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::EmptyBatch`]; [`Error::Singular`] where no inverse root exists and `eps` is 0, as with fewer
    /// values than channels ([`Method::IterNorm`] does not take the root, and refuses only groups in which every variance is 0);
    /// [`Error::WhiteningAffine`] for a residual or an activation. Nothing is written then.
    pub fn forward_train(&self, x: &[E], affine: Affine<'_, E>, y: &mut [E], saved: &mut Saved) -> Result<()> {
        self.check_len("x", x)?;
        self.check_len("y", y)?;
        self.check_affine(affine)?;
        if self.shape.count() == 0 {
            return Err(Error::EmptyBatch { batch: self.shape.batch(), spatial: self.shape.spatial() });
        }
        self.among(|plan| {
            let moments = plan.grid().statistics(x);
            let groups = each(plan.workers(), moments.len(), |g| Group::new(plan.method, &moments[g], plan.eps));
            *saved = Saved { count: plan.shape.count() as u64, groups: groups.into_iter().collect::<Result<_>>()? };
            let maps: Vec<_> = saved.groups.iter().map(|group| group.map(affine)).collect();
            plan.grid().project(Some(x), &maps, Disjoint::new(y));
            Ok(())
        })
    }

    /// What inference does with the statistics, scale and offset given, worked out once.
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::WhiteningGroups`] for statistics of other groups; [`Error::Variance`] for running variances
    /// that are negative or NaN; [`Error::Singular`]; [`Error::WhiteningAffine`].
    pub fn projection(&self, running: &Running, affine: Affine<'_, E>) -> Result<Projection> {
        self.check_affine(affine)?;
        running.check_groups("running", self.groups())?;
        running.projection(self.method, affine, self.eps)
    }

    /// Inference: `y = gamma * W (x - mean) + beta`, with what [`Whitening::projection`] made of the running statistics.
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::WhiteningGroups`] for a projection of other groups.
    pub fn forward_infer(&self, x: &[E], projection: &Projection, y: &mut [E]) -> Result<()> {
        self.check_len("x", x)?;
        self.infer(Some(x), projection, ("y", y))
    }

    /// [`Whitening::forward_infer`] with `x` replaced by `y`, the same bits.
    ///
    /// # Errors
    /// As [`Whitening::forward_infer`].
    pub fn forward_infer_in_place(&self, x: &mut [E], projection: &Projection) -> Result<()> {
        self.infer(None, projection, ("x", x))
    }

    fn infer(&self, x: Option<&[E]>, projection: &Projection, (name, y): (&'static str, &mut [E])) -> Result<()> {
        self.check_len(name, y)?;
        self.check_groups("projection", projection.maps.iter().map(|map| map.channels.clone()))?;
        self.among(|plan| {
            plan.grid().project(x, &projection.maps, Disjoint::new(y));
            Ok(())
        })
    }

    /// The gradients of a training pass, through mean and covariance. gamma is that of the forward pass; beta is not used.
    ///
    /// With `G = dXhat Xc^T`, for [`Method::Zca`] and `S = D diag(l) D^T`:
    ///
    /// ```text
    /// F_ij = -1 / (sqrt(l_i) sqrt(l_j) (sqrt(l_i) + sqrt(l_j)))      dS = D (F o (D^T G D)) D^T
    /// dX = W (dXhat - rowmean(dXhat)) + (dS + dS^T) Xc / m
    /// ```
    ///
    /// the derivative of a matrix function by divided differences (Daleckii & Krein 1965), which stays finite where
    /// eigenvalues are equal, while the form of Huang et al. (2018) divides by their difference.
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::MissingStatistics`]; [`Error::WhiteningGroups`] for statistics of other groups;
    /// [`Error::Shards`] for those of another number of values; [`Error::WhiteningAffine`], also for a gradient of the
    /// residual.
    pub fn backward(
        &self,
        x: &[E],
        dy: &[E],
        saved: &Saved,
        affine: Affine<'_, E>,
        gradients: Gradients<'_, E>,
    ) -> Result<()> {
        let Gradients { dx, dgamma, dbeta, dresidual } = gradients;
        let channels = self.shape.channels();
        self.check_len("x", x)?;
        self.check_len("dy", dy)?;
        dx.as_deref().map_or(Ok(()), |dx| self.check_len("dx", dx))?;
        dgamma.as_deref().map_or(Ok(()), |dgamma| check_len("dgamma", channels, dgamma.len()))?;
        dbeta.as_deref().map_or(Ok(()), |dbeta| check_len("dbeta", channels, dbeta.len()))?;
        self.check_affine(affine)?;
        if dresidual.is_some() {
            return Err(Error::WhiteningAffine);
        }
        if saved.count == 0 {
            return Err(Error::MissingStatistics);
        }
        self.check_groups("saved", saved.groups.iter().map(|group| group.channels.clone()))?;
        let count = self.shape.count() as u64;
        if saved.count != count {
            return Err(Error::Shards { expected: count, got: saved.count });
        }
        self.among(|plan| {
            let crossed = plan.grid().crossed(x, dy, &saved.groups);
            let to_params = |values: Vec<f64>, to: Option<&mut [E::Param]>| {
                for (to, value) in to.into_iter().flatten().zip(values) {
                    *to = E::Param::from_f64(value);
                }
            };
            let pairs = || saved.groups.iter().zip(&crossed);
            to_params(pairs().flat_map(|(group, crossed)| group.dgamma(crossed)).collect(), dgamma);
            to_params(crossed.iter().flat_map(|crossed| crossed.sums.clone()).collect(), dbeta);
            if let Some(dx) = dx {
                let maps =
                    each(plan.workers(), crossed.len(), |g| saved.groups[g].gradient(&crossed[g], affine, count));
                plan.grid().gradient(x, dy, &maps, Disjoint::new(dx));
            }
            Ok(())
        })
    }

    fn check_len(&self, what: &'static str, got: &[E]) -> Result<()> {
        check_len(what, self.shape.len(), got.len())
    }

    fn check_affine(&self, affine: Affine<'_, E>) -> Result<()> {
        let channels = self.shape.channels();
        affine.gamma.map_or(Ok(()), |gamma| check_len("gamma", channels, gamma.len()))?;
        affine.beta.map_or(Ok(()), |beta| check_len("beta", channels, beta.len()))?;
        if affine.is_last() { Ok(()) } else { Err(Error::WhiteningAffine) }
    }

    /// Whether something was made for the groups of this plan.
    fn check_groups(&self, what: &'static str, got: impl Iterator<Item = Range<usize>>) -> Result<()> {
        check_groups(what, self.groups(), got)
    }

    /// Arithmetic, not memory, is what the threads share, so they are worth it sooner.
    fn workers(&self) -> usize {
        let group = self.group.min(self.shape.channels()).min(GROUP);
        self.parallelism.workers(self.shape.len().saturating_mul(size_of::<f64>() * group))
    }

    fn grid(&self) -> Grid {
        Grid { shape: self.shape, group: self.group.min(self.shape.channels()), workers: self.workers() }
    }

    /// Runs a call among the threads that share it.
    fn among(&self, call: impl FnOnce(&Self) -> Result<()> + Send) -> Result<()> {
        let mut result = Ok(());
        among(self.workers(), || result = call(self));
        result
    }
}

/// The groups of so many channels.
fn groups_of(channels: usize, group: usize) -> impl ExactSizeIterator<Item = Range<usize>> {
    (0..channels).step_by(group).map(move |start| start..start.saturating_add(group).min(channels))
}

/// A matrix and what belongs to the rows before and after it: `to + matrix (x - from)`.
#[derive(Debug, Clone)]
pub(crate) struct Map {
    pub(crate) channels: Range<usize>,
    pub(crate) matrix: Mat<f64>,
    pub(crate) from: Vec<f64>,
    pub(crate) to: Vec<f64>,
}
