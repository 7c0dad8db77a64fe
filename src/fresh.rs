//! Passes that return their output as a new vector, as the operations of frameworks do: memory that is written once, and not
//! filled with zeros before.

use crate::affine::{Affine, Gradients};
use crate::element::Element;
use crate::error::Result;
use crate::moments::Saved;
use crate::plan::BatchNorm;
use crate::running::Population;
use crate::tensor::{Disjoint, InOut, Side, Source};

impl<E: Element> BatchNorm<E> {
    /// [`BatchNorm::forward_train`] to a new vector, the `y` that is returned.
    ///
    /// # Errors
    /// As [`BatchNorm::forward_train`]; [`Error::View`](crate::Error::View) for a plan with views or a mask.
    pub fn forward_train_to_vec(&self, x: &[E], affine: Affine<'_, E>, saved: &mut Saved<E::Param>) -> Result<Vec<E>> {
        self.fresh(self.source(Side::X, "x", x)?, |io| self.train(io, affine, saved))
    }

    /// [`BatchNorm::forward_infer`] to a new vector, the `y` that is returned.
    ///
    /// # Errors
    /// As [`BatchNorm::forward_infer`]; [`Error::View`](crate::Error::View) for a plan with views or a mask.
    pub fn forward_infer_to_vec(
        &self,
        x: &[E],
        affine: Affine<'_, E>,
        population: Population<'_, E::Param>,
    ) -> Result<Vec<E>> {
        self.fresh(self.source(Side::X, "x", x)?, |io| self.infer(io, affine, population))
    }

    /// [`BatchNorm::normalize`] to a new vector, the `y` that is returned.
    ///
    /// # Errors
    /// As [`BatchNorm::normalize`]; [`Error::View`](crate::Error::View) for a plan with views or a mask.
    pub fn normalize_to_vec(&self, x: &[E], affine: Affine<'_, E>, saved: &Saved<E::Param>) -> Result<Vec<E>> {
        self.fresh(self.source(Side::X, "x", x)?, |io| self.normalize_io(io, affine, saved))
    }

    /// [`BatchNorm::backward`] with dx in a new vector, which is returned.
    ///
    /// ```
    /// # use batchnorm::{Affine, BatchNorm, Gradients, Shape};
    /// let bn = BatchNorm::<f32>::new(Shape::nc(4, 2)?)?;
    /// let (x, dy, mut saved) = ([1.0, 10.0, 2.0, 20.0, 3.0, 30.0, 6.0, 60.0], [0.0, 1.0, 2.0, 3.0, 3.0, 2.0, 1.0, 0.0], bn.saved());
    /// let y: Vec<f32> = bn.forward_train_to_vec(&x, Affine::none(), &mut saved)?;
    /// let mut dgamma = [0.0; 2];
    /// let gradients = Gradients { dgamma: Some(&mut dgamma), ..Default::default() };
    /// let dx: Vec<f32> = bn.backward_to_vec(&x, &dy, &saved, Affine::none(), gradients)?;
    /// assert_eq!((y.len(), dx.len()), (8, 8));
    /// # Ok::<(), batchnorm::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`BatchNorm::backward`]; [`Error::InPlace`](crate::Error::InPlace) if `gradients` asks for dx elsewhere;
    /// [`Error::View`](crate::Error::View) for a plan with views or a mask.
    pub fn backward_to_vec(
        &self,
        x: &[E],
        dy: &[E],
        saved: &Saved<E::Param>,
        affine: Affine<'_, E>,
        gradients: Gradients<'_, E>,
    ) -> Result<Vec<E>> {
        gradients.check_in_place()?;
        let dy = self.source(Side::Y, "dy", dy)?;
        self.fresh(dy, |io| self.differentiate_slices(x, dy, Some(io), saved, affine, gradients))
    }

    fn source<'a>(&self, side: Side, what: &'static str, tensor: &'a [E]) -> Result<Source<'a, E>> {
        self.check_tensor(side, what, tensor)?;
        Ok(Source::new(tensor, side))
    }

    /// The tensor that a pass makes of another, whose length was checked: a wrong shape may be larger than any memory.
    fn fresh(&self, from: Source<'_, E>, pass: impl FnOnce(InOut<'_, E>) -> Result<()>) -> Result<Vec<E>> {
        // Views leave elements alone.
        self.check_dense()?;
        let side = if from.side() == Side::X { Side::Y } else { Side::X };
        let len = self.shape().len();
        let mut tensor = Vec::with_capacity(len);
        // SAFETY: the vector has room for so many elements, and nothing else accesses them. Passes do not read their target.
        let to = unsafe { Disjoint::shown(tensor.as_mut_ptr(), len, side) };
        pass(InOut { from, to })?;
        // SAFETY: a pass that was not refused writes all elements of a dense tensor.
        unsafe { tensor.set_len(len) };
        Ok(tensor)
    }
}
