//! Whitening in the place of Batch Normalization.

use crate::layers::{BATCH, Dims, Layer, descend, shape};
use batchnorm::whitening::{Method, Running, Saved, Whitening};
use batchnorm::{Affine, Error, Gradients, Momentum, Parallelism, Variance};

/// What is added to the variances: batches of 60 say little about directions of small variance.
const EPS: f64 = 1e-3;

/// Whitening with a learned scale and shift, and the moving population statistics.
pub struct Whitened {
    dims: Dims,
    batch: Whitening<f32>,
    saved: Saved,
    running: Running,
    gamma: Vec<f32>,
    beta: Vec<f32>,
    dgamma: Vec<f32>,
    dbeta: Vec<f32>,
}

impl Whitened {
    /// Of groups of so many channels.
    pub fn new(dims: Dims, method: Method, group: usize) -> Result<Self, Error> {
        let channels = dims[0];
        let batch = Whitening::new(shape(dims, BATCH)?)?.with_method(method)?.with_group(group)?.with_eps(EPS)?;
        let batch = batch.with_parallelism(Parallelism::Sequential);
        Ok(Whitened {
            dims,
            saved: batch.saved(),
            running: batch.running(Momentum::WeightOfNew(0.1), Variance::Unbiased)?,
            batch,
            gamma: vec![1.0; channels],
            beta: vec![0.0; channels],
            dgamma: vec![0.0; channels],
            dbeta: vec![0.0; channels],
        })
    }
}

impl Layer for Whitened {
    fn outputs(&self) -> usize {
        self.dims.iter().product()
    }

    fn infer(&self, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
        let plan = self.batch.with_shape(shape(self.dims, x.len() / self.outputs())?)?;
        let projection = plan.projection(&self.running, Affine::new(&self.gamma, &self.beta))?;
        plan.forward_infer(x, &projection, y)
    }

    fn train(&mut self, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
        let affine = Affine::new(&self.gamma, &self.beta);
        self.batch.forward_train(x, affine, y, &mut self.saved)?;
        self.running.update(&self.saved)
    }

    fn backward(&mut self, rate: f32, x: &[f32], _y: &[f32], dy: &[f32], dx: Option<&mut [f32]>) -> Result<(), Error> {
        let gradients =
            Gradients { dx, dgamma: Some(&mut self.dgamma), dbeta: Some(&mut self.dbeta), ..Default::default() };
        self.batch.backward(x, dy, &self.saved, Affine::scale(&self.gamma), gradients)?;
        descend(&mut self.gamma, rate, &self.dgamma);
        descend(&mut self.beta, rate, &self.dbeta);
        Ok(())
    }
}
