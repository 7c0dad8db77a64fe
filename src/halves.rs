//! The halves of the passes, for batches whose shards meet between them: moments and normalization, gradient sums and
//! gradients.

use crate::affine::{Affine, Gradients};
use crate::element::Element;
use crate::error::{Error, Result, check_len};
use crate::kernel::map::Target;
use crate::moments::{GradientSums, Keep, Moments, MomentsTo, Saved, SumsTo, common_count};
use crate::operation::{Operation, Origin};
use crate::pass::BATCH;
use crate::plan::BatchNorm;
use crate::tensor::{Disjoint, InOut, Side, Source};

impl<E: Element> BatchNorm<E> {
    /// The first half of a training forward pass: count, mean and sum of squared deviations of each channel. Shards of
    /// a batch are joined by [`Moments::merge`], channel by channel; an empty shard has moments of count zero.
    ///
    /// # Errors
    /// [`Error::Length`] for `x` or `moments` (`C` entries).
    pub fn moments(&self, x: &[E], moments: &mut [Moments]) -> Result<()> {
        self.check_tensor(Side::X, "x", x)?;
        self.check_channels("moments", Some(moments))?;
        moments.fill(Moments::default());
        let out = MomentsTo { count: self.count(), out: Disjoint::new(moments) };
        self.execute(Operation::Moments { x: Source::new(x, Side::X), out });
        Ok(())
    }

    /// Turns moments, of this batch or of several shards merged, into the statistics to normalize with.
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::EmptyMoments`] if the moments count no values, [`Error::EmptyBatch`] if the plan's own batch has
    /// none either; [`Error::Count`] if channels counted different numbers.
    pub fn finish(&self, moments: &[Moments], saved: &mut Saved<E::Param>) -> Result<()> {
        self.check_channels("moments", Some(moments))?;
        check_len("saved", self.shape().channels(), saved.channels())?;
        let expected = common_count(moments)?;
        if expected == 0 {
            self.check_batch()?;
            return Err(Error::EmptyMoments);
        }
        let record = saved.recorder(expected, self.eps());
        keep_all(&record, moments, |moments| [moments.mean, moments.residue, moments.m2]);
        Ok(())
    }

    /// The second half of a training forward pass: `y` from the statistics in `saved`. After
    /// [`BatchNorm::moments`] and [`BatchNorm::finish`] on the same `x`, `y` has the bits that
    /// [`BatchNorm::forward_train`] gives. An empty shard is a no-op.
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::MissingStatistics`].
    pub fn normalize(&self, x: &[E], affine: Affine<'_, E>, saved: &Saved<E::Param>, y: &mut [E]) -> Result<()> {
        self.check_tensor(Side::X, "x", x)?;
        self.check_tensor(Side::Y, "y", y)?;
        self.normalize_io(InOut::forward(x, y), affine, saved)
    }

    /// [`BatchNorm::normalize`] with `y` written over `x`.
    ///
    /// # Errors
    /// As [`BatchNorm::normalize`].
    pub fn normalize_in_place(&self, x: &mut [E], affine: Affine<'_, E>, saved: &Saved<E::Param>) -> Result<()> {
        self.check_in_place(Side::X, "x", x)?;
        self.normalize_io(InOut::in_place(x), affine, saved)
    }

    pub(crate) fn normalize_io(&self, io: InOut<'_, E>, affine: Affine<'_, E>, saved: &Saved<E::Param>) -> Result<()> {
        self.check_affine(affine)?;
        self.check_saved(saved)?;
        let origin = Origin::Batch(saved);
        self.execute(Operation::Normalize { normalize: self.normalize_to(io, affine), origin });
        Ok(())
    }

    /// The first half of a backward pass: `sum(dy)` and `sum(dy * xhat)` of each channel, which are dbeta and dgamma.
    /// Shards of a batch are joined by [`GradientSums::merge`]; an empty shard has sums of zero.
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::MissingStatistics`].
    pub fn gradient_sums(
        &self,
        x: &[E],
        dy: &[E],
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        sums: &mut [GradientSums],
    ) -> Result<()> {
        self.check_tensor(Side::X, "x", x)?;
        self.check_tensor(Side::Y, "dy", dy)?;
        self.check_affine(affine)?;
        self.check_channels("sums", Some(sums))?;
        self.check_saved(saved)?;
        self.check_rebuild(affine, saved)?;
        sums.fill(GradientSums::default());
        let from = self.upstreams(Source::new(x, Side::X), Source::new(dy, Side::Y), saved, affine, saved.count);
        self.execute(Operation::GradientSums { from, out: SumsTo(Disjoint::new(sums)) });
        Ok(())
    }

    /// The second half of a backward pass: dx from the sums over the whole batch. The number of values behind the
    /// sums is that of `saved`. With the sums of the same `x` and `dy`, dx has the bits that
    /// [`BatchNorm::backward`] gives. An empty shard is a no-op.
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::MissingStatistics`].
    pub fn input_gradient(
        &self,
        x: &[E],
        dy: &[E],
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        sums: &[GradientSums],
        dx: &mut [E],
    ) -> Result<()> {
        self.check_tensor(Side::Y, "dy", dy)?;
        self.check_tensor(Side::X, "dx", dx)?;
        self.input_gradient_io(x, InOut::backward(dy, dx), saved, affine, sums)
    }

    /// [`BatchNorm::input_gradient`] with dx written over `dy`.
    ///
    /// # Errors
    /// As [`BatchNorm::input_gradient`].
    pub fn input_gradient_in_place(
        &self,
        x: &[E],
        dy: &mut [E],
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        sums: &[GradientSums],
    ) -> Result<()> {
        self.check_in_place(Side::Y, "dy", dy)?;
        self.input_gradient_io(x, InOut::in_place(dy), saved, affine, sums)
    }

    fn input_gradient_io(
        &self,
        x: &[E],
        io: InOut<'_, E>,
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        sums: &[GradientSums],
    ) -> Result<()> {
        self.check_tensor(Side::X, "x", x)?;
        self.check_affine(affine)?;
        self.check_channels("sums", Some(sums))?;
        self.check_saved(saved)?;
        self.check_rebuild(affine, saved)?;
        let from = self.upstreams(Source::new(x, Side::X), io.from, saved, affine, saved.count);
        let dx = Target::new(io.to, self.streams::<E>(io.is_in_place(), 3));
        self.execute(Operation::InputGradient { from, dx, sums });
        Ok(())
    }

    /// The second half of a backward pass for gamma and beta: dgamma and dbeta from the sums of this shard, or of all of them,
    /// with the corrections of Batch Renormalization, and added to what is there if the plan accumulates. Those that
    /// [`BatchNorm::backward`] gives, with the sums of the same `x` and `dy`.
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::MissingStatistics`].
    pub fn parameter_gradients(
        &self,
        saved: &Saved<E::Param>,
        sums: &[GradientSums],
        dgamma: Option<&mut [E::Param]>,
        dbeta: Option<&mut [E::Param]>,
    ) -> Result<()> {
        self.check_channels("sums", Some(sums))?;
        self.check_channels("dgamma", dgamma.as_deref())?;
        self.check_channels("dbeta", dbeta.as_deref())?;
        self.check_saved(saved)?;
        let out = self.gradients_to(saved, dgamma, dbeta);
        keep_all(&out, sums, |sums| [sums.dy, sums.dy_xhat]);
        Ok(())
    }

    /// The gradient of the residual alone, what the activation lets through of `dy`: no sums enter it. An empty shard is a
    /// no-op.
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::MissingStatistics`].
    pub fn residual_gradient(
        &self,
        x: &[E],
        dy: &[E],
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        dresidual: &mut [E],
    ) -> Result<()> {
        let gradients = Gradients { dresidual: Some(dresidual), ..Default::default() };
        self.check_backward_halves(x, dy, saved, affine, &gradients)?;
        let from = self.upstreams(Source::new(x, Side::X), Source::new(dy, Side::Y), saved, affine, saved.count);
        let streaming = self.streams::<E>(false, 3);
        let dresidual = gradients.dresidual.map(|tensor| Target::new(Disjoint::tensor(tensor, Side::Y), streaming));
        let out = self.gradients_to(saved, None, None);
        self.execute(Operation::Backward { from, dx: None, dresidual, out });
        Ok(())
    }

    /// All that [`BatchNorm::moments`] and [`BatchNorm::normalize`] ask of their arguments, of which nothing is written: for
    /// shards that wait for each other between the halves and must refuse before they meet. `saved` may be empty yet.
    ///
    /// # Errors
    /// [`Error::Length`].
    pub fn check_forward_halves(&self, x: &[E], affine: Affine<'_, E>, y: &[E], saved: &Saved<E::Param>) -> Result<()> {
        self.check_tensor(Side::X, "x", x)?;
        self.check_tensor(Side::Y, "y", y)?;
        self.check_affine(affine)?;
        check_len("saved", self.shape().channels(), saved.channels())
    }

    /// The same for the halves of a backward pass: [`BatchNorm::gradient_sums`], [`BatchNorm::input_gradient`],
    /// [`BatchNorm::parameter_gradients`] and [`BatchNorm::residual_gradient`].
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::MissingStatistics`].
    pub fn check_backward_halves(
        &self,
        x: &[E],
        dy: &[E],
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        gradients: &Gradients<'_, E>,
    ) -> Result<()> {
        self.check_tensor(Side::X, "x", x)?;
        self.check_tensor(Side::Y, "dy", dy)?;
        let of = |side, what, tensor: &Option<&mut [E]>| {
            tensor.as_deref().map_or(Ok(()), |tensor| self.check_tensor(side, what, tensor))
        };
        of(Side::X, "dx", &gradients.dx)?;
        of(Side::Y, "dresidual", &gradients.dresidual)?;
        self.check_affine(affine)?;
        self.check_channels("dgamma", gradients.dgamma.as_deref())?;
        self.check_channels("dbeta", gradients.dbeta.as_deref())?;
        self.check_saved(saved)?;
        self.check_rebuild(affine, saved)
    }
}

/// Keeps the values of all channels.
fn keep_all<T, const S: usize>(keep: &impl Keep<S>, all: &[T], values_of: impl Fn(&T) -> [f64; S]) {
    for (batch, all) in all.chunks(BATCH).enumerate() {
        let mut values = [[0.0; BATCH]; S];
        for (i, one) in all.iter().enumerate() {
            for (values, value) in values.iter_mut().zip(values_of(one)) {
                values[i] = value;
            }
        }
        let start = batch * BATCH;
        // SAFETY: each channel once, on one thread.
        unsafe { keep.keep(start..start + all.len(), &values) };
    }
}
