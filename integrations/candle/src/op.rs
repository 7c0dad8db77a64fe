//! Normalization as one operation of candle's graph, with the gradients of all its arguments.

use std::sync::{Arc, OnceLock};

use batchnorm::{Affine, BatchNorm, Element, GradientSums, Gradients, Moments, Saved};
use candle_core::{CpuStorage, CustomOp1, CustomOp3, Device, Error, Layout, Result, Shape, Storage, Tensor, WithDType};

use crate::order::Order;

/// What the operation is called in messages.
pub(crate) const NAME: &str = "batch-norm";

/// The element types that candle and the kernels share.
pub(crate) trait Float: Element<Param: WithDType> + WithDType {}

impl Float for f32 {}
impl Float for f64 {}
impl Float for half::bf16 {}
impl Float for half::f16 {}

/// The gradients of three arguments, where they are asked for.
type Three = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

/// `y` of `x`, and of gamma and beta where there are.
pub(crate) struct Normalize<E: Float> {
    pub(crate) plan: BatchNorm<E>,
    pub(crate) order: Order,
    /// Gamma and beta as they were when the operation was made: the optimizer may have moved them before backward. The
    /// operation takes them as arguments too, so that their gradients find them.
    pub(crate) affine: Option<[Vec<E::Param>; 2]>,
    /// The statistics of the batch, which the forward pass leaves here, or from the outset those of the population.
    pub(crate) saved: Arc<OnceLock<Saved<E::Param>>>,
    /// Whether the mean of the batch is subtracted.
    pub(crate) remove_mean: bool,
}

impl<E: Float> Normalize<E> {
    fn affine(&self) -> Affine<'_, E> {
        self.affine.as_ref().map_or(Affine::none(), |[gamma, beta]| Affine::new(gamma, beta))
    }

    /// The elements of a tensor of the plan's shape that lies dense.
    fn elements<'a>(&self, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [E]> {
        let (data, start) = (E::cpu_storage_as_slice(storage)?, layout.start_offset());
        match data.get(start..start + self.plan.shape().len()) {
            Some(elements) if layout.shape().elem_count() == elements.len() => Ok(elements),
            _ => candle_core::bail!("{NAME}: {:?} is not a tensor of {} elements", layout, self.plan.shape().len()),
        }
    }

    fn forward(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = self.elements(storage, layout)?;
        let y = match self.saved.get() {
            Some(saved) => self.plan.normalize_to_vec(x, self.affine(), saved),
            None => {
                let mut saved = self.plan.saved();
                let y = self.train(x, &mut saved);
                if y.is_ok() {
                    // A second run would find the same.
                    let _ = self.saved.set(saved);
                }
                y
            }
        };
        let y = y.map_err(Error::wrap)?;
        Ok((E::to_cpu_storage_owned(y), Shape::from(self.order.in_memory(layout.dims()))))
    }

    fn train(&self, x: &[E], saved: &mut Saved<E::Param>) -> batchnorm::Result<Vec<E>> {
        if self.remove_mean {
            return self.plan.forward_train_to_vec(x, self.affine(), saved);
        }
        let mut moments = vec![Moments::default(); self.plan.shape().channels()];
        self.plan.moments(x, &mut moments)?;
        for of in &mut moments {
            // Deviations from zero: sum(x^2) = sum((x - mean)^2) + count * mean^2.
            *of = Moments { m2: of.m2 + of.count as f64 * of.mean * of.mean, count: of.count, ..Moments::default() };
        }
        self.plan.finish(&moments, saved)?;
        self.plan.normalize_to_vec(x, self.affine(), saved)
    }

    /// The gradients of x, gamma and beta, as far as candle keeps track of them.
    fn backward(&self, x: &Tensor, gamma: Option<&Tensor>, beta: Option<&Tensor>, dy: &Tensor) -> Result<Three> {
        let Some(saved) = self.saved.get() else { candle_core::bail!("{NAME}: backward before forward") };
        let channels = self.plan.shape().channels();
        let room = |of: Option<&Tensor>| of.filter(|of| of.track_op()).map(|_| vec![E::Param::default(); channels]);
        let (mut dgamma, mut dbeta) = (room(gamma), room(beta));
        let dx = {
            let dy = dy.contiguous()?;
            let ((x_storage, x_layout), (dy_storage, dy_layout)) = (x.storage_and_layout(), dy.storage_and_layout());
            let values = self.elements(on_cpu(&x_storage)?, x_layout)?;
            let dy = self.elements(on_cpu(&dy_storage)?, dy_layout)?;
            let gradients =
                Gradients { dgamma: dgamma.as_deref_mut(), dbeta: dbeta.as_deref_mut(), ..Default::default() };
            self.differentiate(values, dy, saved, gradients, x.track_op()).map_err(Error::wrap)?
        };
        let of_parameter = |gradient: Option<Vec<E::Param>>, of: Option<&Tensor>| match (gradient, of) {
            (Some(gradient), Some(of)) => {
                Tensor::from_vec(gradient, channels, of.device())?.to_dtype(of.dtype()).map(Some)
            }
            _ => Ok(None),
        };
        let of_x = |dx| self.order.back(&Tensor::from_vec(dx, self.order.in_memory(x.dims()), x.device())?);
        Ok((dx.map(of_x).transpose()?, of_parameter(dgamma, gamma)?, of_parameter(dbeta, beta)?))
    }

    /// The gradient of x, if that is wanted, beside those asked for.
    fn differentiate(
        &self,
        x: &[E],
        dy: &[E],
        saved: &Saved<E::Param>,
        gradients: Gradients<'_, E>,
        wants_dx: bool,
    ) -> batchnorm::Result<Option<Vec<E>>> {
        match (self.remove_mean, wants_dx) {
            (true, true) => return self.plan.backward_to_vec(x, dy, saved, self.affine(), gradients).map(Some),
            (true, false) => return self.plan.backward(x, dy, saved, self.affine(), gradients).map(|()| None),
            (false, _) => (),
        }
        let mut sums = vec![GradientSums::default(); self.plan.shape().channels()];
        self.plan.gradient_sums(x, dy, saved, self.affine(), &mut sums)?;
        self.plan.parameter_gradients(saved, &sums, gradients.dgamma, gradients.dbeta)?;
        // Nothing was subtracted, so nothing comes back through a mean. (Through constants nothing comes anyway.)
        sums.iter_mut().for_each(|sums| sums.dy = 0.0);
        let input_gradient = || {
            let mut dx = vec![E::default(); x.len()];
            self.plan.input_gradient(x, dy, saved, self.affine(), &sums, &mut dx).map(|()| dx)
        };
        wants_dx.then(input_gradient).transpose()
    }
}

impl<E: Float> CustomOp1 for Normalize<E> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward(storage, layout)
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (dx, ..) = self.backward(x, None, None, dy)?;
        Ok(dx)
    }
}

impl<E: Float> CustomOp3 for Normalize<E> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
        _gamma: &CpuStorage,
        _gamma_layout: &Layout,
        _beta: &CpuStorage,
        _beta_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward(storage, layout)
    }

    fn bwd(&self, x: &Tensor, gamma: &Tensor, beta: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Three> {
        self.backward(x, Some(gamma), Some(beta), dy)
    }
}

fn on_cpu(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => Err(not_on_cpu(&storage.device())),
    }
}

/// Why a tensor is refused.
pub(crate) fn not_on_cpu(device: &Device) -> Error {
    Error::Msg(format!("{NAME}: expected tensors on the CPU, got one on {:?}", device.location())).bt()
}
