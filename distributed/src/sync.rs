//! The plan of a rank: the operations of [`BatchNorm`] on a batch that is split over the ranks of a group.

use std::rc::Rc;

use batchnorm::{Affine, BatchNorm, Element, GradientSums, Gradients, Moments, Saved, Shape};
use mpi::Rank;
use mpi::traits::Communicator;

use crate::error::{Error, Result};
use crate::group::{Blocking, During, Exchange, Group, Meeting, Pending};
use crate::wire::{WireMoments, WireSums};

/// Batch Normalization of a batch that is split over the ranks of a group, each with a shard of any size, also none.
///
/// All methods but [`with_shape`](Self::with_shape), [`with_plan`](Self::with_plan) and the getters are collective: every rank of
/// the group calls them, in the same order. All ranks then hold the same statistics, bit for bit. If the arguments of
/// one rank are wrong, every rank gets an error and no output is touched.
///
/// ```no_run
/// use batchnorm::{Affine, BatchNorm, Gradients, Momentum, Shape, Variance};
/// use batchnorm_mpi::SyncBatchNorm;
/// use mpi::{Threading, traits::*};
///
/// let (universe, _) = mpi::initialize_with_threading(Threading::Funneled).ok_or("MPI is up already")?;
/// let world = universe.world();
/// // Shards of 1, 2, 3, ... samples of two channels.
/// let shape = Shape::nc(1 + world.rank() as usize, 2)?;
/// let (x, dy) = (vec![world.rank() as f32; shape.len()], vec![1.0; shape.len()]);
/// let (mut y, mut dx) = (vec![0.0; shape.len()], vec![0.0; shape.len()]);
///
/// let mut bn = SyncBatchNorm::new(BatchNorm::<f32>::new(shape)?, &world)?;
/// let mut saved = bn.plan().saved();
/// bn.forward_train(&x, Affine::none(), &mut y, &mut saved)?;
/// // The statistics are those of all shards, and so are the running ones.
/// let mut running = bn.plan().running(Momentum::WeightOfNew(0.1), Variance::Unbiased)?;
/// running.update(&saved)?;
/// bn.backward(&x, &dy, &saved, Affine::none(), Gradients { dx: Some(&mut dx), ..Default::default() })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// It stays on its thread, which is one that may call MPI.
pub struct SyncBatchNorm<E: Element> {
    bn: BatchNorm<E>,
    group: Rc<Group>,
    global_parameters: bool,
    moments: Exchange<WireMoments>,
    sums: Exchange<WireSums>,
}

impl<E: Element> SyncBatchNorm<E> {
    /// A plan of the ranks of `comm`, each with its own shape, views or mask. The communicator is duplicated, once per plan made
    /// here. A collective.
    ///
    /// # Errors
    /// On every rank: [`Error::Channels`], [`Error::ElementType`] or [`Error::Eps`] if ranks disagree about them, in this order;
    /// [`Error::TooManyChannels`] for 2^31 - 1 and more.
    pub fn new(bn: BatchNorm<E>, comm: &impl Communicator) -> Result<Self> {
        let group = Rc::new(Group::agree(&bn, comm)?);
        Ok(Self::of(bn, group, false))
    }

    fn of(bn: BatchNorm<E>, group: Rc<Group>, global_parameters: bool) -> Self {
        let channels = bn.shape().channels();
        Self { bn, group, global_parameters, moments: Exchange::new(channels), sums: Exchange::new(channels) }
    }

    /// Whether [`SyncBatchNorm::backward`] gives dgamma and dbeta of the whole batch, the same on every rank, rather than those
    /// of this shard. Off by default, because data-parallel training sums the gradients of all parameters anyway. It costs
    /// nothing.
    #[must_use]
    pub fn with_global_parameters(self, global_parameters: bool) -> Self {
        Self { global_parameters, ..self }
    }

    /// The same group and options for a shard of another shape, such as that of the last, smaller batch. Not a collective: other
    /// ranks may keep their shapes.
    ///
    /// # Errors
    /// [`Error::Plan`] for another number of channels.
    pub fn with_shape(&self, shape: Shape) -> Result<Self> {
        self.with_plan(self.bn.with_shape(shape)?)
    }

    /// The same group for another plan, such as one with the mask of the next batch. Not a collective.
    ///
    /// # Errors
    /// [`Error::Plan`] for another number of channels or another eps than the ranks agreed on.
    pub fn with_plan(&self, bn: BatchNorm<E>) -> Result<Self> {
        let (expected_channels, expected_eps) = (self.bn.shape().channels(), self.bn.eps());
        let (channels, eps) = (bn.shape().channels(), bn.eps());
        if (channels, eps) != (expected_channels, expected_eps) {
            return Err(Error::Plan { expected_channels, expected_eps, channels, eps });
        }
        Ok(Self::of(bn, Rc::clone(&self.group), self.global_parameters))
    }

    /// The plan of this rank.
    pub fn plan(&self) -> &BatchNorm<E> {
        &self.bn
    }

    /// The number of ranks.
    pub fn ranks(&self) -> Rank {
        self.group.size()
    }

    /// The rank of this process in the group.
    pub fn rank(&self) -> Rank {
        self.group.rank()
    }

    /// [`BatchNorm::forward_train`] with the statistics of all shards, in one collective. Every rank's `saved` counts the
    /// values of all, so that running statistics updated with it are those of the whole batch.
    ///
    /// # Errors
    /// [`Error::Local`] with what was wrong on this rank, or with [`batchnorm::Error::EmptyBatch`] if no rank has values;
    /// [`Error::Remote`].
    pub fn forward_train(
        &mut self,
        x: &[E],
        affine: Affine<'_, E>,
        y: &mut [E],
        saved: &mut Saved<E::Param>,
    ) -> Result<()> {
        self.forward(x, affine, y, saved, Blocking)
    }

    /// [`SyncBatchNorm::forward_train`], with `work` done while the collective is under way. What it returns is returned.
    ///
    /// Ranks may differ in what they do meanwhile, and other collectives may run in it, in the same order on all ranks. MPI may
    /// set parentheses in other places than for [`SyncBatchNorm::forward_train`], so the last bits of the two may differ; each
    /// by itself is the same on all ranks and in every run.
    ///
    /// # Errors
    /// As [`SyncBatchNorm::forward_train`]; the work is done all the same.
    pub fn forward_train_during<T>(
        &mut self,
        x: &[E],
        affine: Affine<'_, E>,
        y: &mut [E],
        saved: &mut Saved<E::Param>,
        work: impl FnOnce(&mut Pending<'_>) -> T,
    ) -> Result<T> {
        self.forward(x, affine, y, saved, During(work))
    }

    fn forward<M: Meeting>(
        &mut self,
        x: &[E],
        affine: Affine<'_, E>,
        y: &mut [E],
        saved: &mut Saved<E::Param>,
        meeting: M,
    ) -> Result<M::Done> {
        let Self { bn, group, moments, .. } = self;
        // All that may be refused is refused before the ranks meet.
        let own = bn.check_forward_halves(x, affine, y, saved).and_then(|()| bn.moments(x, &mut moments.mine));
        let done = moments.merge(group, own, meeting)?;
        bn.finish(&moments.merged, saved)?;
        bn.normalize(x, affine, saved, y)?;
        Ok(done)
    }

    /// [`BatchNorm::backward`] with the sums of all shards, in one collective. dx is that of this shard; dgamma and dbeta are
    /// too, unless [`SyncBatchNorm::with_global_parameters`] says otherwise. Ranks may want different gradients.
    ///
    /// # Errors
    /// [`Error::Local`] with what was wrong on this rank; [`Error::Remote`].
    pub fn backward(
        &mut self,
        x: &[E],
        dy: &[E],
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        gradients: Gradients<'_, E>,
    ) -> Result<()> {
        self.differentiate(x, dy, saved, affine, gradients, Blocking)
    }

    /// [`SyncBatchNorm::backward`], with `work` done while the collective is under way, as in
    /// [`SyncBatchNorm::forward_train_during`].
    ///
    /// # Errors
    /// As [`SyncBatchNorm::backward`]; the work is done all the same.
    pub fn backward_during<T>(
        &mut self,
        x: &[E],
        dy: &[E],
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        gradients: Gradients<'_, E>,
        work: impl FnOnce(&mut Pending<'_>) -> T,
    ) -> Result<T> {
        self.differentiate(x, dy, saved, affine, gradients, During(work))
    }

    fn differentiate<M: Meeting>(
        &mut self,
        x: &[E],
        dy: &[E],
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        gradients: Gradients<'_, E>,
        meeting: M,
    ) -> Result<M::Done> {
        let Self { bn, group, global_parameters, sums, .. } = self;
        let own = bn
            .check_backward_halves(x, dy, saved, affine, &gradients)
            .and_then(|()| bn.gradient_sums(x, dy, saved, affine, &mut sums.mine));
        let done = sums.merge(group, own, meeting)?;
        let Gradients { dx, dgamma, dbeta, dresidual } = gradients;
        if let Some(dresidual) = dresidual {
            bn.residual_gradient(x, dy, saved, affine, dresidual)?;
        }
        if let Some(dx) = dx {
            bn.input_gradient(x, dy, saved, affine, &sums.merged, dx)?;
        }
        let of = if *global_parameters { &sums.merged } else { &sums.mine };
        bn.parameter_gradients(saved, of, dgamma, dbeta)?;
        Ok(done)
    }

    /// The collective of the forward pass alone: `moments` of each shard become those of all. For passes that are put together
    /// from the halves of [`BatchNorm`], in place for instance, and for [`batchnorm::Running::recompute`].
    ///
    /// # Errors
    /// [`Error::Local`] for other than `C` moments; [`Error::Remote`].
    pub fn merge_moments(&mut self, moments: &mut [Moments]) -> Result<()> {
        self.moments.merge_given(&self.group, "moments", moments)
    }

    /// The collective of the backward pass alone: `sums` of each shard become those of all.
    ///
    /// # Errors
    /// [`Error::Local`] for other than `C` sums; [`Error::Remote`].
    pub fn merge_sums(&mut self, sums: &mut [GradientSums]) -> Result<()> {
        self.sums.merge_given(&self.group, "sums", sums)
    }
}

impl<E: Element> core::fmt::Debug for SyncBatchNorm<E> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self { bn, global_parameters, .. } = self;
        f.debug_struct("SyncBatchNorm")
            .field("plan", bn)
            .field("global_parameters", global_parameters)
            .finish_non_exhaustive()
    }
}
