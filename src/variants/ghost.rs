//! Ghost Batch Normalization (Hoffer, Hubara & Soudry, "Train longer, generalize better", 2017): a large batch is
//! normalized as smaller virtual batches, each with statistics of its own.

use core::ops::Range;

use crate::affine::{Affine, Gradients};
use crate::element::Element;
use crate::error::{Error, Result, check_len};
use crate::moments::Saved;
use crate::plan::BatchNorm;
use crate::shape::Shape;

/// A plan that takes virtual batches of so many samples, the last one smaller where they do not divide the batch.
///
/// ```
/// use batchnorm::{Affine, BatchNorm, Gradients, Momentum, Shape, Variance};
/// # let (x, dy) = (vec![1f32; 96 * 3 * 4 * 4], vec![1f32; 96 * 3 * 4 * 4]);
/// # let (mut y, mut dx) = (x.clone(), x.clone());
/// let bn = BatchNorm::<f32>::new(Shape::nchw(96, 3, 4, 4)?)?;
/// let mut running = bn.running(Momentum::WeightOfNew(0.1), Variance::Unbiased)?;
/// let ghost = bn.ghost(32)?;
/// let mut saved = ghost.saved();
/// ghost.forward_train(&x, Affine::none(), &mut y, &mut saved)?;
/// // The moving average of the paper's algorithm 1: one step for each virtual batch, in order.
/// for saved in &saved {
///     running.update(saved)?;
/// }
/// ghost.backward(&x, &dy, &saved, Affine::none(), Gradients { dx: Some(&mut dx), ..Default::default() })?;
/// // Inference knows no virtual batches.
/// ghost.whole().forward_infer(&x, Affine::none(), running.population(), &mut y)?;
/// # Ok::<(), batchnorm::Error>(())
/// ```
///
/// Virtual batches are taken one after the other, each with the threads of the plan; dgamma and dbeta are added up in
/// that order, rounded each time. With [`Saved::renormalize`] each of them is corrected by itself.
#[derive(Debug, Clone)]
pub struct Ghost<E: Element> {
    whole: BatchNorm<E>,
    samples: usize,
    /// Of the first virtual batch, the last, and those between. All but the first add to dgamma and dbeta.
    first: BatchNorm<E>,
    between: BatchNorm<E>,
    last: BatchNorm<E>,
}

impl<E: Element> BatchNorm<E> {
    /// The same plan for virtual batches of `samples` samples.
    ///
    /// # Errors
    /// [`Error::VirtualBatch`] for zero samples; [`Error::View`] for tensors that do not lie dense.
    pub fn ghost(self, samples: usize) -> Result<Ghost<E>> {
        if samples == 0 {
            return Err(Error::VirtualBatch);
        }
        self.check_dense()?;
        let batch = self.shape().batch();
        let of = |samples: usize| self.with_shape(self.shape().with_batch(samples));
        let (first, rest) = (of(samples.min(batch))?, batch - batch.saturating_sub(1) / samples * samples);
        let (between, last) = (first.clone().with_accumulation(true), of(rest)?.with_accumulation(true));
        Ok(Ghost { whole: self, samples, first, between, last })
    }
}

impl<E: Element> Ghost<E> {
    /// The plan for the whole batch: for inference, which knows no virtual batches.
    pub fn whole(&self) -> &BatchNorm<E> {
        &self.whole
    }

    /// The number of virtual batches.
    pub fn batches(&self) -> usize {
        self.shape().batch().div_ceil(self.samples)
    }

    /// Room for the statistics of each virtual batch.
    pub fn saved(&self) -> Vec<Saved<E::Param>> {
        (0..self.batches()).map(|_| self.whole.saved()).collect()
    }

    fn shape(&self) -> &Shape {
        self.whole.shape()
    }

    /// The plan of each virtual batch, and its elements.
    fn parts(&self) -> impl Iterator<Item = (&BatchNorm<E>, Range<usize>)> {
        let (batches, between) = (self.batches(), self.between.shape().len());
        (0..batches).map(move |i| {
            let plan = match i {
                0 => &self.first,
                _ if i + 1 == batches => &self.last,
                _ => &self.between,
            };
            (plan, i * between..i * between + plan.shape().len())
        })
    }

    fn check(&self, tensors: [(&'static str, usize); 2], affine: Affine<'_, E>, saved: usize) -> Result<()> {
        for (what, len) in tensors {
            check_len(what, self.shape().len(), len)?;
        }
        self.whole.check_affine(affine)?;
        self.whole.check_batch()?;
        check_len("saved", self.batches(), saved)
    }

    /// [`BatchNorm::forward_train`] of each virtual batch.
    ///
    /// # Errors
    /// As [`BatchNorm::forward_train`]; `saved` has an entry for each virtual batch.
    pub fn forward_train(
        &self,
        x: &[E],
        affine: Affine<'_, E>,
        y: &mut [E],
        saved: &mut [Saved<E::Param>],
    ) -> Result<()> {
        self.check([("x", x.len()), ("y", y.len())], affine, saved.len())?;
        for ((bn, part), saved) in self.parts().zip(&*saved) {
            bn.check_train(affine.part(part), saved)?;
        }
        for ((bn, part), saved) in self.parts().zip(saved) {
            bn.forward_train(&x[part.clone()], affine.part(part.clone()), &mut y[part], saved)?;
        }
        Ok(())
    }

    /// [`Ghost::forward_train`] with `y` written over `x`.
    ///
    /// # Errors
    /// As [`Ghost::forward_train`].
    pub fn forward_train_in_place(
        &self,
        x: &mut [E],
        affine: Affine<'_, E>,
        saved: &mut [Saved<E::Param>],
    ) -> Result<()> {
        self.check([("x", x.len()); 2], affine, saved.len())?;
        for ((bn, part), saved) in self.parts().zip(&*saved) {
            bn.check_train(affine.part(part), saved)?;
        }
        for ((bn, part), saved) in self.parts().zip(saved) {
            bn.forward_train_in_place(&mut x[part.clone()], affine.part(part), saved)?;
        }
        Ok(())
    }

    /// [`BatchNorm::backward`] of each virtual batch; dgamma and dbeta are sums over all of them.
    ///
    /// # Errors
    /// As [`BatchNorm::backward`]; `saved` has an entry for each virtual batch.
    pub fn backward(
        &self,
        x: &[E],
        dy: &[E],
        saved: &[Saved<E::Param>],
        affine: Affine<'_, E>,
        mut gradients: Gradients<'_, E>,
    ) -> Result<()> {
        self.check_backward([x.len(), dy.len()], saved, affine, &gradients)?;
        for ((bn, part), saved) in self.parts().zip(saved) {
            let (x, dy) = (&x[part.clone()], &dy[part.clone()]);
            bn.backward(x, dy, saved, affine.part(part.clone()), gradients.part(part))?;
        }
        Ok(())
    }

    /// [`Ghost::backward`] with dx written over `dy`.
    ///
    /// # Errors
    /// As [`Ghost::backward`] and [`BatchNorm::backward_in_place`].
    pub fn backward_in_place(
        &self,
        x: &[E],
        dy: &mut [E],
        saved: &[Saved<E::Param>],
        affine: Affine<'_, E>,
        mut gradients: Gradients<'_, E>,
    ) -> Result<()> {
        gradients.check_in_place()?;
        self.check_backward([x.len(), dy.len()], saved, affine, &gradients)?;
        for ((bn, part), saved) in self.parts().zip(saved) {
            let (x, dy) = (&x[part.clone()], &mut dy[part.clone()]);
            bn.backward_in_place(x, dy, saved, affine.part(part.clone()), gradients.part(part))?;
        }
        Ok(())
    }

    fn check_backward(
        &self,
        [x, dy]: [usize; 2],
        saved: &[Saved<E::Param>],
        affine: Affine<'_, E>,
        Gradients { dx, dgamma, dbeta, dresidual }: &Gradients<'_, E>,
    ) -> Result<()> {
        for (what, tensor) in [("dx", dx), ("dresidual", dresidual)] {
            tensor.as_ref().map_or(Ok(()), |tensor| check_len(what, self.shape().len(), tensor.len()))?;
        }
        self.check([("x", x), ("dy", dy)], affine, saved.len())?;
        for ((bn, part), saved) in self.parts().zip(saved) {
            bn.check_backward(saved, affine.part(part), dgamma.as_deref(), dbeta.as_deref())?;
        }
        Ok(())
    }
}
