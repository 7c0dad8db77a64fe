//! The layer: parameters, running statistics, and the passes over tensors of any of the types.

use std::sync::{Arc, OnceLock};

use batchnorm::{Momentum, Running, Saved, Shape, Variance};
use candle_core::{DType, Device, Error, Result, Tensor, Var, WithDType, bail};
use candle_nn::{BatchNormConfig, Init, ModuleT, VarBuilder};

use crate::op::{Float, NAME, Normalize, not_on_cpu};
use crate::order::Order;

/// Batch Normalization of tensors of (N, C, ...), as [`candle_nn::BatchNorm`].
///
/// Clones share their parameters and running statistics.
#[derive(Clone, Debug)]
pub struct BatchNorm {
    running_mean: Var,
    running_var: Var,
    weight_and_bias: Option<(Tensor, Tensor)>,
    remove_mean: bool,
    eps: f64,
    momentum: f64,
}

impl BatchNorm {
    /// A layer of given parameters and statistics, `num_features` values each, with a momentum of 0.1. A tensor that is a
    /// variable is shared, so that the running statistics are seen there too.
    ///
    /// # Errors
    /// For tensors of other sizes, a negative, infinite or NaN `eps`, or no features.
    pub fn new(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: f64,
    ) -> Result<Self> {
        let momentum = BatchNormConfig::default().momentum;
        Self::new_with_momentum(num_features, running_mean, running_var, weight, bias, eps, momentum)
    }

    /// [`BatchNorm::new`] without weight and bias.
    ///
    /// # Errors
    /// As [`BatchNorm::new`].
    pub fn new_no_bias(num_features: usize, running_mean: Tensor, running_var: Tensor, eps: f64) -> Result<Self> {
        let momentum = BatchNormConfig::default().momentum;
        Self::new_no_bias_with_momentum(num_features, running_mean, running_var, eps, momentum)
    }

    /// [`BatchNorm::new`] with the weight of a new batch in the running statistics.
    ///
    /// # Errors
    /// As [`BatchNorm::new`]; for a momentum outside 0 to 1.
    pub fn new_with_momentum(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: f64,
        momentum: f64,
    ) -> Result<Self> {
        let config = BatchNormConfig { eps, momentum, ..Default::default() };
        Self::with_config(num_features, config, running_mean, running_var, Some((weight, bias)))
    }

    /// [`BatchNorm::new_with_momentum`] without weight and bias.
    ///
    /// # Errors
    /// As [`BatchNorm::new_with_momentum`].
    pub fn new_no_bias_with_momentum(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        eps: f64,
        momentum: f64,
    ) -> Result<Self> {
        let config = BatchNormConfig { eps, momentum, ..Default::default() };
        Self::with_config(num_features, config, running_mean, running_var, None)
    }

    fn with_config(
        num_features: usize,
        config: BatchNormConfig,
        running_mean: Tensor,
        running_var: Tensor,
        weight_and_bias: Option<(Tensor, Tensor)>,
    ) -> Result<Self> {
        let BatchNormConfig { eps, remove_mean, momentum, .. } = config;
        // The kernels' own checks of sizes, eps and momentum.
        Shape::nc(0, num_features)
            .and_then(|shape| batchnorm::BatchNorm::<f64>::new(shape)?.with_eps(eps))
            .and_then(|plan| plan.running(Momentum::WeightOfNew(momentum), Variance::Unbiased))
            .map_err(Error::wrap)?;
        let affine = weight_and_bias.as_ref().map(|(weight, bias)| [("weight", weight), ("bias", bias)]);
        let statistics = [("running mean", &running_mean), ("running variance", &running_var)];
        for (what, tensor) in statistics.into_iter().chain(affine.into_iter().flatten()) {
            if tensor.dims() != [num_features] {
                bail!("{NAME}: expected a {what} of shape [{num_features}], got {:?}", tensor.dims())
            }
        }
        let (running_mean, running_var) = (Var::from_tensor(&running_mean)?, Var::from_tensor(&running_var)?);
        Ok(Self { running_mean, running_var, weight_and_bias, remove_mean, eps, momentum })
    }

    /// The running mean of each channel.
    pub fn running_mean(&self) -> &Tensor {
        self.running_mean.as_tensor()
    }

    /// The running variance of each channel, unbiased.
    pub fn running_var(&self) -> &Tensor {
        self.running_var.as_tensor()
    }

    /// The number added to the variance.
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// Gamma and beta.
    pub fn weight_and_bias(&self) -> Option<(&Tensor, &Tensor)> {
        self.weight_and_bias.as_ref().map(|(weight, bias)| (weight, bias))
    }

    /// The weight of a new batch in the running statistics.
    pub fn momentum(&self) -> f64 {
        self.momentum
    }

    /// Normalizes with the statistics of the batch, and moves the running ones towards them.
    ///
    /// # Errors
    /// For fewer than two dimensions, other channels than the layer has, an empty batch, a type that is no float, parameters of
    /// neither that type nor the one it is computed in, and devices other than the CPU. Nothing has changed then.
    pub fn forward_train(&self, x: &Tensor) -> Result<Tensor> {
        self.forward(x, true)
    }

    /// Normalizes with the running statistics. These are constants to the gradients, so that layers around it can be fine-tuned.
    ///
    /// # Errors
    /// As [`BatchNorm::forward_train`], but for empty batches; for a running variance that is negative or NaN.
    pub fn forward_eval(&self, x: &Tensor) -> Result<Tensor> {
        self.forward(x, false)
    }

    fn forward(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        match x.dtype() {
            DType::F32 => self.pass::<f32>(x, train),
            DType::F64 => self.pass::<f64>(x, train),
            DType::BF16 => self.pass::<half::bf16>(x, train),
            DType::F16 => self.pass::<half::f16>(x, train),
            dtype => Err(Error::UnsupportedDTypeForOp(dtype, NAME).bt()),
        }
    }

    fn pass<E: Float>(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let channels = self.running_mean.dim(0)?;
        if x.rank() < 2 || x.dim(1)? != channels {
            bail!("{NAME}: expected a tensor of (batch, {channels}, ...), got {:?}", x.dims())
        }
        if !x.device().is_cpu() {
            return Err(not_on_cpu(x.device()));
        }
        let (x, order) = Order::dense(x)?;
        let plan = order.shape(x.dims()).and_then(|shape| batchnorm::BatchNorm::<E>::new(shape)?.with_eps(self.eps));
        let plan = plan.map_err(Error::wrap)?;
        let count = plan.shape().count();
        let affine = match &self.weight_and_bias {
            Some((weight, bias)) => Some([parameter::<E>("weight", weight)?, parameter::<E>("bias", bias)?]),
            None => None,
        };
        let mut running = self.running::<E>(count)?;
        let saved = Arc::new(match train {
            true => OnceLock::new(),
            false => {
                let mut saved = plan.saved();
                plan.freeze(running.population(), &mut saved).map_err(Error::wrap)?;
                OnceLock::from(saved)
            }
        });
        let op = Normalize { plan, order, affine, saved: Arc::clone(&saved), remove_mean: self.remove_mean };
        let y = match &self.weight_and_bias {
            Some((weight, bias)) => x.apply_op3(weight, bias, op),
            None => x.apply_op1(op),
        }?;
        if let Some(saved) = saved.get().filter(|_| train) {
            self.update::<E>(&mut running, saved)?;
        }
        order.back(&y)
    }

    /// The running statistics, about to see `count` values of each channel.
    fn running<E: Float>(&self, count: usize) -> Result<Running<E::Param>> {
        let mean = parameter::<E>("running mean", self.running_mean())?;
        let var = parameter::<E>("running variance", self.running_var())?;
        // One value has no unbiased variance; see `update`.
        let variance = if count > 1 { Variance::Unbiased } else { Variance::Biased };
        Running::from_parts(mean, var, 0, Momentum::WeightOfNew(self.momentum), variance).map_err(Error::wrap)
    }

    fn update<E: Float>(&self, running: &mut Running<E::Param>, saved: &Saved<E::Param>) -> Result<()> {
        running.update(saved).map_err(Error::wrap)?;
        let set = |var: &Var, values: &[E::Param]| {
            var.set(&Tensor::from_slice(values, values.len(), &Device::Cpu)?.to_dtype(var.dtype())?)
        };
        if self.remove_mean {
            set(&self.running_mean, running.mean())?;
        }
        // One value tells nothing about the variance.
        if saved.count() > 1 { set(&self.running_var, running.var()) } else { Ok(()) }
    }
}

/// The values of a parameter or statistic for tensors of `E`.
fn parameter<E: Float>(what: &'static str, tensor: &Tensor) -> Result<Vec<E::Param>> {
    if !tensor.device().is_cpu() {
        return Err(not_on_cpu(tensor.device()));
    }
    let (stored, computed) = (E::DTYPE, E::Param::DTYPE);
    if ![stored, computed].contains(&tensor.dtype()) {
        let or = if stored == computed { String::new() } else { format!(" or {computed:?}") };
        bail!(
            "{NAME}: expected a {what} of {stored:?}{or} for an input of {stored:?}, got {:?}; cast the input",
            tensor.dtype()
        )
    }
    tensor.detach().to_dtype(computed)?.to_vec1()
}

impl ModuleT for BatchNorm {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.forward(x, train)
    }
}

impl TryFrom<&BatchNorm> for candle_nn::BatchNorm {
    type Error = Error;

    /// candle-nn's layer over the same parameters and running statistics, for what asks for one, such as
    /// [`candle_nn::Conv2d::absorb_bn`]. It subtracts the mean in training, whatever the configuration was.
    fn try_from(layer: &BatchNorm) -> Result<Self> {
        let (mean, var) = (layer.running_mean().clone(), layer.running_var().clone());
        let (channels, eps, momentum) = (mean.dim(0)?, layer.eps, layer.momentum);
        match layer.weight_and_bias.clone() {
            Some((weight, bias)) => Self::new_with_momentum(channels, mean, var, weight, bias, eps, momentum),
            None => Self::new_no_bias_with_momentum(channels, mean, var, eps, momentum),
        }
    }
}

/// A layer with the variables `running_mean`, `running_var` and, if `config.affine`, `weight` and `bias` of `vb`: those of
/// [`candle_nn::batch_norm()`].
///
/// # Errors
/// As [`BatchNorm::new_with_momentum`], and those of `vb`.
pub fn batch_norm<C: Into<BatchNormConfig>>(num_features: usize, config: C, vb: VarBuilder) -> Result<BatchNorm> {
    let config = config.into();
    let get = |name, init| vb.get_with_hints(num_features, name, Init::Const(init));
    let (running_mean, running_var) = (get("running_mean", 0.0)?, get("running_var", 1.0)?);
    let weight_and_bias = if config.affine { Some((get("weight", 1.0)?, get("bias", 0.0)?)) } else { None };
    BatchNorm::with_config(num_features, config, running_mean, running_var, weight_and_bias)
}
