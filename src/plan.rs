//! The plan: a shape and options, checked once, and every operation on slices of that shape.

use std::sync::Arc;

use crate::activation::Activation;
use crate::affine::{Affine, Gradients};
use crate::backward::{Channels, Upstreams};
use crate::element::Element;
use crate::error::{Error, Result, check_len};
use crate::gates::Recorded;
use crate::grid::{Geometry, Parallelism, among};
use crate::kernel::map::{Map, Target};
use crate::moments::{AffineGradientsTo, Saved, check_eps};
use crate::operation::{Job, NormalizeTo, Operation, Origin};
use crate::pass::{Context, Given};
use crate::running::{Momentum, Population, Running, Variance, check_variances};
use crate::scratch::{Need, Pool};
use crate::shape::Shape;
use crate::simd::{Dispatched, Storage, Tier, largest_cache};
use crate::tensor::{Disjoint, InOut, Side, Source};
use crate::view::{View, Views};

/// How the results of a pass go to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Stores {
    /// Past the caches where what a pass reads and writes is more than half of the largest cache, and through them otherwise. With
    /// several threads it is `x` and `y` of more than all of it, and `x`, `dy` and `dx` of more than three quarters. No more than 96 MiB
    /// of that cache are counted on, since dozens of cores share a larger one.
    #[default]
    Auto,
    /// Through the caches: for a tensor that is read again at once.
    Cached,
    /// Past the caches, where the tier can and the pass is not in place: for a tensor that is read much later.
    Streaming,
}

/// Bytes of a tensor from which on it comes from memory: it is read ahead, and once if it can be.
const LARGE: usize = 8 << 20;
/// Quarters of the largest cache that a pass reads and writes from which on its results go past the caches, on one thread and on more:
/// those read a cache that they share faster, but write past it no faster. Of each, where that is two tensors and where it is more.
const STREAMED: [[usize; 2]; 2] = [[2, 2], [4, 3]];

/// Batch Normalization (Ioffe & Szegedy 2015) of tensors of one shape and element type.
///
/// A plan checks its shape and options once, and each call checks the lengths of its slices; nothing is written
/// unless all checks pass. Plans are shared between threads by reference. The memory for partial sums stays with
/// the plan between calls, so that calls after the first allocate nothing; see [`BatchNorm::scratch_len`].
///
/// ```
/// use batchnorm::{Affine, BatchNorm, Gradients, Shape};
/// # let (x, dy) = (vec![1f32; 8 * 3 * 5 * 5], vec![1f32; 8 * 3 * 5 * 5]);
/// # let (mut y, mut dx) = (x.clone(), x.clone());
/// # let (gamma, beta, mut dgamma, mut dbeta) = ([1f32; 3], [0f32; 3], [0f32; 3], [0f32; 3]);
/// let bn = BatchNorm::<f32>::new(Shape::nchw(8, 3, 5, 5)?)?;
/// let mut saved = bn.saved();
/// bn.forward_train(&x, Affine::new(&gamma, &beta), &mut y, &mut saved)?;
/// let (dx, dgamma, dbeta) = (Some(&mut dx[..]), Some(&mut dgamma[..]), Some(&mut dbeta[..]));
/// let gradients = Gradients { dx, dgamma, dbeta, ..Default::default() };
/// bn.backward(&x, &dy, &saved, Affine::scale(&gamma), gradients)?;
/// # Ok::<(), batchnorm::Error>(())
/// ```
#[derive(Debug)]
pub struct BatchNorm<E: Element> {
    shape: Shape,
    geometry: Geometry,
    eps: f64,
    tier: Dispatched,
    parallelism: Parallelism,
    stores: Stores,
    accumulates: bool,
    from_output: bool,
    views: Option<Arc<Views>>,
    pool: Pool<E::Param>,
}

impl<E: Element> Clone for BatchNorm<E> {
    /// The same plan, with scratch of its own.
    fn clone(&self) -> Self {
        Self { views: self.views.clone(), pool: Pool::new(), ..*self }
    }
}

impl<E: Element> BatchNorm<E> {
    /// A plan with `eps` = 1e-5, the widest tier of this CPU, and threads as in [`Parallelism::Auto`].
    ///
    /// # Errors
    /// None today; a shape that cannot be served would be refused here.
    pub fn new(shape: Shape) -> Result<Self> {
        Ok(Self {
            shape,
            geometry: Geometry::new(&shape),
            eps: 1e-5,
            tier: Dispatched::new(Tier::best())?,
            parallelism: Parallelism::Auto,
            stores: Stores::Auto,
            accumulates: false,
            from_output: false,
            views: None,
            pool: Pool::new(),
        })
    }

    /// The number added to the variance under the square root; 0 is allowed.
    ///
    /// # Errors
    /// [`Error::Eps`] if it is negative, infinite or NaN.
    pub fn with_eps(self, eps: f64) -> Result<Self> {
        check_eps(eps)?;
        Ok(Self { eps, ..self })
    }

    /// The SIMD tier to run on. It changes the speed and no bit of the results.
    ///
    /// # Errors
    /// [`Error::TierUnavailable`] if this CPU or build does not have it.
    pub fn with_tier(self, tier: Tier) -> Result<Self> {
        Ok(Self { tier: Dispatched::new(tier)?, ..self })
    }

    /// The use of threads. It changes the speed and no bit of the results.
    #[must_use]
    pub fn with_parallelism(self, parallelism: Parallelism) -> Self {
        Self { parallelism, ..self }
    }

    /// How results go to memory. It changes the speed and no bit of the results.
    #[must_use]
    pub fn with_stores(self, stores: Stores) -> Self {
        Self { stores, ..self }
    }

    /// Whether [`BatchNorm::backward`] adds to dgamma and dbeta rather than overwriting them, so that the micro-batches of
    /// one step share them. dx is overwritten either way.
    #[must_use]
    pub fn with_accumulation(self, accumulates: bool) -> Self {
        Self { accumulates, ..self }
    }

    /// Whether backward passes are given the output `y` in the place of the input `x`, whose buffer was given up:
    /// [`BatchNorm::forward_train_in_place`] wrote `y` over it. `xhat = (act^-1(y) - beta) / gamma` (Rota Bulo, Porzi &
    /// Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", 2018, section 3).
    ///
    /// ```
    /// # use batchnorm::{Activation, Affine, BatchNorm, Gradients, Shape};
    /// # let (mut tensor, dy, mut dx) = (vec![1f32; 24], vec![1f32; 24], vec![0f32; 24]);
    /// # let (gamma, beta) = ([1f32; 3], [0f32; 3]);
    /// let bn = BatchNorm::<f32>::new(Shape::nc(8, 3)?)?.with_backward_from_output(true);
    /// let affine = Affine::new(&gamma, &beta).with_activation(Activation::LeakyRelu(0.01));
    /// let mut saved = bn.saved();
    /// bn.forward_train_in_place(&mut tensor, affine, &mut saved)?;
    /// bn.backward(&tensor, &dy, &saved, affine, Gradients { dx: Some(&mut dx), ..Default::default() })?;
    /// # Ok::<(), batchnorm::Error>(())
    /// ```
    ///
    /// Backward passes then need gamma and beta as they were, no residual, and an activation that can be undone: none or a leaky
    /// ReLU with a slope above 0 ([`Error::NotInvertible`]). The output is rounded, and the smaller gamma is beside beta, the
    /// less of xhat is left in it: where half of its digits would be lost the pass is refused ([`Error::Gamma`]).
    #[must_use]
    pub fn with_backward_from_output(self, from_output: bool) -> Self {
        Self { from_output, ..self }
    }

    /// Tensors that do not lie dense: `x` and `dx` as one view has it, `y`, `dy`, the residual and the output as the other. Slices may
    /// be longer than the views; what these do not show is left alone, but for the padding of blocked channels, which is
    /// written as zeros. A pass in place needs two equal views.
    ///
    /// The results have the bits of dense tensors. Each block is packed into a cache on its way, which costs more than reading
    /// dense memory, and no pass reads memory once for both its halves.
    ///
    /// # Errors
    /// [`Error::View`] for views of another shape, or of two orders: blocked tensors are computed as channels last; and for a plan
    /// that has views or a mask.
    pub fn with_views(self, x: View, y: View) -> Result<Self> {
        self.check_dense()?;
        let views = Views::new(&self.shape, x, y)?;
        Ok(self.viewing(views))
    }

    /// Samples of different lengths: of sample `n` the first `lengths[n]` positions count, in the statistics and in the
    /// gradients. At the others `y` and `dx` are zero. For dense tensors, and for this batch: the next one needs a plan of its
    /// own.
    ///
    /// # Errors
    /// [`Error::Length`] for other than `N` lengths; [`Error::SampleLength`] for one above the spatial size; [`Error::View`] for a plan
    /// that has views or a mask.
    pub fn with_lengths(&self, lengths: &[usize]) -> Result<Self> {
        self.check_dense()?;
        let spatial = self.shape.spatial();
        check_len("lengths", self.shape.batch(), lengths.len())?;
        if let Some(sample) = lengths.iter().position(|&length| length > spatial) {
            return Err(Error::SampleLength { sample, spatial, got: lengths[sample] });
        }
        let valid = lengths.iter().flat_map(|&length| (0..spatial).map(move |position| position < length));
        Ok(self.clone().viewing(Views::masked(&self.shape, valid)?))
    }

    /// The same for a mask: position `s` of sample `n` counts where `mask[n * S + s]`.
    ///
    /// # Errors
    /// [`Error::Length`] for other than `N * S` entries; [`Error::View`] for a plan that has views or a mask.
    pub fn with_mask(&self, mask: &[bool]) -> Result<Self> {
        self.check_dense()?;
        check_len("mask", self.shape.count(), mask.len())?;
        Ok(self.clone().viewing(Views::masked(&self.shape, mask.iter().copied())?))
    }

    fn viewing(self, views: Views) -> Self {
        Self { geometry: Geometry::new(&views.logical()), views: Some(Arc::new(views)), pool: Pool::new(), ..self }
    }

    /// Whether the tensors of another plan lie where those of this one do.
    #[cfg(feature = "ndarray")]
    pub(crate) fn lies_like(&self, other: &Self) -> bool {
        self.shape == other.shape && self.views == other.views
    }

    /// Refuses to go on without the views.
    pub(crate) fn check_dense(&self) -> Result<()> {
        match self.views {
            None => Ok(()),
            Some(_) => Err(Error::View {
                reason: "expected a plan for dense tensors, this one has views, lengths or a mask".into(),
            }),
        }
    }

    /// The same options for another shape, such as the last, smaller batch, of dense tensors.
    ///
    /// # Errors
    /// As [`BatchNorm::new`].
    pub fn with_shape(&self, shape: Shape) -> Result<Self> {
        Ok(Self { shape, geometry: Geometry::new(&shape), views: None, pool: Pool::new(), ..*self })
    }

    /// The shape of the tensors.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The number added to the variance.
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// The SIMD tier that the kernels run on.
    pub fn tier(&self) -> Tier {
        self.tier.tier()
    }

    /// Room for the statistics of a batch, to be filled by a forward pass and reused.
    pub fn saved(&self) -> Saved<E::Param> {
        Saved::new(self.shape.channels())
    }

    /// Running statistics for the channels of this plan, starting at mean 0 and variance 1.
    ///
    /// # Errors
    /// [`Error::Momentum`] for a weight outside 0 to 1.
    pub fn running(&self, momentum: Momentum, variance: Variance) -> Result<Running<E::Param>> {
        Running::new(self.shape.channels(), momentum, variance)
    }

    /// Bytes of scratch that one call on this plan uses at most, from the thread pool that this is asked in. It is
    /// allocated by the first call, or ahead of it by [`BatchNorm::reserve`], and kept.
    pub fn scratch_len(&self) -> usize {
        self.most_scratch().bytes::<E::Param>()
    }

    /// Bytes that [`Affine::with_gates_to`] and [`Affine::with_gates`] take: one bit per element, rounded up, and a few more.
    pub fn gates_len(&self) -> usize {
        Recorded::len_for(self.logical().len())
    }

    /// Allocates scratch for `calls` calls at the same time, so that not even the first ones allocate.
    pub fn reserve(&self, calls: usize) {
        self.pool.reserve(calls, self.most_scratch());
    }

    fn most_scratch(&self) -> Need {
        Operation::<E>::most(&self.context())
    }

    fn context(&self) -> Context<'_> {
        self.context_of::<E>()
    }

    /// For tensors of `T`.
    fn context_of<T>(&self) -> Context<'_> {
        let bytes = self.shape.len() * size_of::<T>();
        let workers = self.parallelism.workers(bytes);
        Context {
            geometry: self.geometry,
            tier: self.tier,
            workers,
            views: self.views.as_deref(),
            large: bytes >= LARGE || self.stores == Stores::Streaming,
        }
    }

    /// Whether a pass over so many `tensors` stores past the caches. In place the lines are at hand anyway.
    pub(crate) fn streams<T>(&self, in_place: bool, tensors: usize) -> bool {
        let bytes = self.shape.len() * size_of::<T>();
        !in_place
            && self.views.is_none()
            && match self.stores {
                Stores::Cached => false,
                Stores::Streaming => true,
                Stores::Auto => {
                    let several = self.parallelism.workers(bytes) > 1;
                    let quarters = STREAMED[usize::from(several)][usize::from(tensors > 2)];
                    bytes.saturating_mul(tensors) >= largest_cache() / 4 * quarters
                }
            }
    }

    pub(crate) fn check_tensor<T>(&self, side: Side, what: &'static str, got: &[T]) -> Result<()> {
        match &self.views {
            Some(views) => views.check(side, what, got.len()),
            None => check_len(what, self.shape.len(), got.len()),
        }
    }

    /// A tensor that is written over another.
    pub(crate) fn check_in_place<T>(&self, side: Side, what: &'static str, got: &[T]) -> Result<()> {
        self.check_tensor(side, what, got)?;
        self.views.as_ref().map_or(Ok(()), |views| views.check_in_place())
    }

    /// Values per channel.
    pub(crate) fn count(&self) -> u64 {
        self.logical().count() as u64
    }

    /// The dense tensor that the kernels see.
    fn logical(&self) -> Shape {
        self.views.as_ref().map_or(self.shape, |views| views.logical())
    }

    pub(crate) fn check_channels<T>(&self, what: &'static str, got: Option<&[T]>) -> Result<()> {
        got.map_or(Ok(()), |got| check_len(what, self.shape.channels(), got.len()))
    }

    pub(crate) fn check_affine(&self, affine: Affine<'_, E>) -> Result<()> {
        self.check_channels("gamma", affine.gamma)?;
        self.check_channels("beta", affine.beta)?;
        for (what, tensor) in [("residual", affine.residual), ("output", affine.output)] {
            tensor.map_or(Ok(()), |tensor| self.check_tensor(Side::Y, what, tensor))?;
        }
        let elements = self.logical().len();
        affine.gates.map_or(Ok(()), |gates| gates.check(elements))?;
        affine.recording.map_or(Ok(()), |gates| gates.check(elements))?;
        affine.activation.check()
    }

    pub(crate) fn check_population(&self, population: Population<'_, E::Param>) -> Result<()> {
        self.check_channels("mean", Some(population.mean))?;
        self.check_channels("var", Some(population.var))?;
        check_variances(population.var)
    }

    pub(crate) fn check_batch(&self) -> Result<()> {
        match self.count() {
            0 => Err(Error::EmptyBatch { batch: self.shape.batch(), spatial: self.shape.spatial() }),
            _ => Ok(()),
        }
    }

    /// Whether the input can be rebuilt, if it must.
    pub(crate) fn check_rebuild(&self, affine: Affine<'_, E>, saved: &Saved<E::Param>) -> Result<()> {
        if !self.from_output {
            return Ok(());
        }
        match affine.activation {
            Activation::LeakyRelu(slope) if slope > 0.0 => (),
            Activation::None => (),
            _ => return Err(Error::NotInvertible),
        }
        if affine.residual.is_some() {
            return Err(Error::NotInvertible);
        }
        for channel in 0..self.shape.channels() {
            let (gamma, beta) = saved.line(affine.trained(), channel);
            // A power of two for each half digit, and reciprocals that are normal numbers.
            let least = (beta.abs() / f64::from(1u32 << (E::DIGITS / 2))).max(1e-30);
            if gamma.is_nan() || beta.is_nan() || gamma.abs() < least {
                return Err(Error::Gamma { channel, got: gamma, beta });
            }
        }
        Ok(())
    }

    pub(crate) fn check_saved(&self, saved: &Saved<E::Param>) -> Result<()> {
        check_len("saved", self.shape.channels(), saved.channels())?;
        if saved.count == 0 && !saved.frozen { Err(Error::MissingStatistics) } else { Ok(()) }
    }

    /// Training forward pass: `y = gamma * (x - mean) * inv_std + beta` with the mean and the biased variance of the
    /// batch, `inv_std = 1 / sqrt(var + eps)`; the statistics go to `saved` (Ioffe & Szegedy 2015, algorithm 1).
    ///
    /// # Errors
    /// [`Error::Length`] for `x`, `y`, gamma, beta or `saved`; [`Error::EmptyBatch`] without values.
    pub fn forward_train(
        &self,
        x: &[E],
        affine: Affine<'_, E>,
        y: &mut [E],
        saved: &mut Saved<E::Param>,
    ) -> Result<()> {
        self.check_tensor(Side::X, "x", x)?;
        self.check_tensor(Side::Y, "y", y)?;
        self.train(InOut::forward(x, y), affine, saved)
    }

    /// [`BatchNorm::forward_train`] with `y` written over `x`. The backward pass needs `x`, so this suits networks
    /// that keep a copy or recompute it.
    ///
    /// # Errors
    /// As [`BatchNorm::forward_train`].
    pub fn forward_train_in_place(
        &self,
        x: &mut [E],
        affine: Affine<'_, E>,
        saved: &mut Saved<E::Param>,
    ) -> Result<()> {
        self.check_in_place(Side::X, "x", x)?;
        self.train(InOut::in_place(x), affine, saved)
    }

    /// All that a training forward pass asks of its arguments but for the lengths of tensors.
    pub(crate) fn check_train(&self, affine: Affine<'_, E>, saved: &Saved<E::Param>) -> Result<()> {
        self.check_affine(affine)?;
        check_len("saved", self.shape.channels(), saved.channels())?;
        self.check_batch()
    }

    pub(crate) fn train(&self, io: InOut<'_, E>, affine: Affine<'_, E>, saved: &mut Saved<E::Param>) -> Result<()> {
        self.check_train(affine, saved)?;
        let count = self.count();
        let normalize = self.normalize_to(io, affine);
        self.execute(Operation::Train { normalize, record: saved.recorder(count, self.eps) });
        Ok(())
    }

    /// Inference: `y = gamma * (x - mean) / sqrt(var + eps) + beta` with the statistics of the population. An empty
    /// batch is a no-op.
    ///
    /// # Errors
    /// [`Error::Length`] for `x`, `y`, gamma, beta, mean or var; [`Error::Variance`] for a negative or NaN variance.
    pub fn forward_infer(
        &self,
        x: &[E],
        affine: Affine<'_, E>,
        population: Population<'_, E::Param>,
        y: &mut [E],
    ) -> Result<()> {
        self.check_tensor(Side::X, "x", x)?;
        self.check_tensor(Side::Y, "y", y)?;
        self.infer(InOut::forward(x, y), affine, population)
    }

    /// [`BatchNorm::forward_infer`] with `y` written over `x`.
    ///
    /// # Errors
    /// As [`BatchNorm::forward_infer`].
    pub fn forward_infer_in_place(
        &self,
        x: &mut [E],
        affine: Affine<'_, E>,
        population: Population<'_, E::Param>,
    ) -> Result<()> {
        self.check_in_place(Side::X, "x", x)?;
        self.infer(InOut::in_place(x), affine, population)
    }

    pub(crate) fn infer(
        &self,
        io: InOut<'_, E>,
        affine: Affine<'_, E>,
        population: Population<'_, E::Param>,
    ) -> Result<()> {
        self.check_affine(affine)?;
        self.check_population(population)?;
        let origin = Origin::Population { population, eps: self.eps };
        self.execute(Operation::Normalize { normalize: self.normalize_to(io, affine), origin });
        Ok(())
    }

    pub(crate) fn normalize_to<'a>(&self, io: InOut<'a, E>, affine: Affine<'a, E>) -> NormalizeTo<'a, E> {
        let first_bit = affine.recording().map(|gates| gates.first());
        let y = Target::new(io.to, self.streams::<E>(io.is_in_place(), 2)).with_bits(first_bit);
        NormalizeTo { x: io.from, affine, y }
    }

    /// Runs an operation on tensors of the plan's shape, all of whose arguments were checked.
    pub(crate) fn execute(&self, operation: Operation<'_, E>) {
        if self.logical().is_empty() {
            // The first halves were seen to.
            return operation.target().map_or((), |target| self.clear(target, E::default()));
        }
        let context = self.context();
        self.pool.with(operation.need(&context), |scratch| {
            let job = Job { operation, context, scratch };
            // SAFETY: the lengths were checked, and the operation holds the borrows.
            among(context.workers, || unsafe { E::execute(job) });
        });
    }

    /// Maps a tensor of any stored type, with the coefficients given; its length was checked.
    pub(crate) fn map<M: Map<K>, const K: usize>(
        &self,
        io: InOut<'_, M::Element>,
        map: M,
        given: Given<'_, E::Param, K>,
    ) where
        M::Element: Storage<Compute = E::Param>,
    {
        let target = Target::new(io.to, self.streams::<M::Element>(io.is_in_place(), 2));
        if self.logical().is_empty() {
            return self.clear(target, map.zero());
        }
        let context = self.context_of::<M::Element>();
        self.pool.with(context.need::<0, K>(), |scratch| {
            // SAFETY: the length was checked, and the caller holds the borrows.
            among(context.workers, || unsafe { context.apply(map, given, target, scratch) });
        });
    }

    /// All that there is to do for a tensor without elements: zeros where a mask hides them.
    fn clear<T: Storage>(&self, target: Target<'_, T>, zero: T) {
        if let Some(views) = &self.views {
            // SAFETY: the caller holds the borrow.
            unsafe { views.clear(target.to, zero) };
        }
    }

    /// The backward pass: with `m` values per channel and `xhat = (x - mean) * inv_std`,
    ///
    /// ```text
    /// dbeta = sum(dy)      dgamma = sum(dy * xhat)
    /// dx = gamma * inv_std * (dy - dbeta/m - xhat * dgamma/m)
    /// ```
    ///
    /// (Ioffe & Szegedy 2015, section 3, simplified). `x` and `saved` are those of the forward pass; `gamma: None`
    /// stands for ones. Any subset of the gradients is written.
    ///
    /// # Errors
    /// [`Error::Length`] for any slice; [`Error::EmptyBatch`] without values; [`Error::MissingStatistics`] if no
    /// forward pass filled `saved`; [`Error::Shards`] if `saved` is of another number of values than this batch.
    pub fn backward(
        &self,
        x: &[E],
        dy: &[E],
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        gradients: Gradients<'_, E>,
    ) -> Result<()> {
        self.check_tensor(Side::Y, "dy", dy)?;
        if let Some(dx) = &gradients.dx {
            self.check_tensor(Side::X, "dx", dx)?;
        }
        let (dx, rest) = (gradients.dx.map(|dx| InOut::backward(dy, dx)), Gradients { dx: None, ..gradients });
        self.differentiate_slices(x, Source::new(dy, Side::Y), dx, saved, affine, rest)
    }

    /// [`BatchNorm::backward`] with dx written over `dy`.
    ///
    /// # Errors
    /// As [`BatchNorm::backward`]; [`Error::InPlace`] if `gradients` asks for dx elsewhere.
    pub fn backward_in_place(
        &self,
        x: &[E],
        dy: &mut [E],
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        gradients: Gradients<'_, E>,
    ) -> Result<()> {
        gradients.check_in_place()?;
        self.check_in_place(Side::Y, "dy", dy)?;
        let dx = InOut::in_place(dy);
        self.differentiate_slices(x, dx.from, Some(dx), saved, affine, gradients)
    }

    /// All that a backward pass asks of its arguments but for the lengths of tensors.
    pub(crate) fn check_backward(
        &self,
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        dgamma: Option<&[E::Param]>,
        dbeta: Option<&[E::Param]>,
    ) -> Result<()> {
        self.check_affine(affine)?;
        self.check_channels("dgamma", dgamma)?;
        self.check_channels("dbeta", dbeta)?;
        self.check_batch()?;
        self.check_saved(saved)?;
        let count = self.count();
        if saved.count != count && !saved.frozen {
            return Err(Error::Shards { expected: count, got: saved.count });
        }
        self.check_rebuild(affine, saved)
    }

    /// What a backward pass reads, of `count` values per channel.
    pub(crate) fn upstreams<'a>(
        &self,
        x: Source<'a, E>,
        dy: Source<'a, E>,
        saved: &'a Saved<E::Param>,
        affine: Affine<'a, E>,
        count: u64,
    ) -> Upstreams<'a, E> {
        let channels = Channels { saved, trained: affine.trained(), count, is_output: self.from_output };
        Upstreams { x, dy, affine, channels }
    }

    /// Where the gradients of gamma and beta go.
    pub(crate) fn gradients_to<'a>(
        &self,
        saved: &'a Saved<E::Param>,
        dgamma: Option<&'a mut [E::Param]>,
        dbeta: Option<&'a mut [E::Param]>,
    ) -> AffineGradientsTo<'a, E::Param> {
        let (dgamma, dbeta) = (dgamma.map(Disjoint::new), dbeta.map(Disjoint::new));
        AffineGradientsTo { accumulates: self.accumulates, renorm: saved.renorm.as_ref(), dgamma, dbeta }
    }

    /// The gradients, `dx` apart from the others.
    pub(crate) fn differentiate_slices(
        &self,
        x: &[E],
        dy: Source<'_, E>,
        dx: Option<InOut<'_, E>>,
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        Gradients { dgamma, dbeta, dresidual, .. }: Gradients<'_, E>,
    ) -> Result<()> {
        self.check_tensor(Side::X, "x", x)?;
        dresidual.as_ref().map_or(Ok(()), |dresidual| self.check_tensor(Side::Y, "dresidual", dresidual))?;
        let dresidual = dresidual.map(|tensor| Disjoint::tensor(tensor, Side::Y));
        let affine_gradients = Gradients { dgamma, dbeta, ..Default::default() };
        self.differentiate(Source::new(x, Side::X), dy, (dx, dresidual), saved, affine, affine_gradients)
    }

    /// The gradients of tensors that were checked, `dx` and the residual's apart from the others.
    pub(crate) fn differentiate(
        &self,
        x: Source<'_, E>,
        dy: Source<'_, E>,
        (dx, dresidual): (Option<InOut<'_, E>>, Option<Disjoint<'_, E>>),
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        Gradients { dgamma, dbeta, .. }: Gradients<'_, E>,
    ) -> Result<()> {
        self.check_backward(saved, affine, dgamma.as_deref(), dbeta.as_deref())?;
        let from = self.upstreams(x, dy, saved, affine, self.count());
        let out = self.gradients_to(saved, dgamma, dbeta);
        let streaming = self.streams::<E>(dx.is_some_and(|dx| dx.is_in_place()), 3);
        let target = |to| Target::new(to, streaming);
        let (dx, dresidual) = (dx.map(|dx| target(dx.to)), dresidual.map(target));
        self.execute(Operation::Backward { from, dx, dresidual, out });
        Ok(())
    }

    /// Takes the statistics of the population as constants, to train with them frozen: `saved` then serves
    /// [`BatchNorm::normalize`], and backward passes give the gradients with mean and variance held constant,
    ///
    /// ```text
    /// dbeta = sum(dy)      dgamma = sum(dy * xhat)      dx = gamma * inv_std * dy
    /// ```
    ///
    /// as fine-tuning with frozen Batch Normalization does. inv_std is rounded to the parameters' type here, which
    /// [`BatchNorm::forward_infer`] does not do; the last bit of `y` may differ between the two.
    ///
    /// ```
    /// # use batchnorm::{Affine, BatchNorm, Gradients, Population, Shape};
    /// # let (x, dy, mut y, mut dx) = ([1f32; 8], [1f32; 8], [0f32; 8], [0f32; 8]);
    /// let bn = BatchNorm::<f32>::new(Shape::nc(4, 2)?)?.with_eps(0.0)?;
    /// let mut saved = bn.saved();
    /// bn.freeze(Population { mean: &[0.0, 1.0], var: &[4.0, 4.0] }, &mut saved)?;
    /// bn.normalize(&x, Affine::none(), &saved, &mut y)?;
    /// bn.backward(&x, &dy, &saved, Affine::none(), Gradients { dx: Some(&mut dx), ..Default::default() })?;
    /// assert_eq!(dx, [0.5; 8]);
    /// # Ok::<(), batchnorm::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Length`] for mean, var or `saved`; [`Error::Variance`].
    pub fn freeze(&self, population: Population<'_, E::Param>, saved: &mut Saved<E::Param>) -> Result<()> {
        self.check_population(population)?;
        check_len("saved", self.shape.channels(), saved.channels())?;
        saved.freeze(population, self.eps);
        Ok(())
    }
}
