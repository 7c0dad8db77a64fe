//! The layer, in the place of burn's.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Flag, Module, ModuleDisplay, Param, RunningState};
use burn::nn;
use burn::tensor::module::BatchNormTrainOutput;
use burn::tensor::{Device, Tensor, assert_shape};

use crate::operation::{batch_norm, batch_norm_train};

/// What a [`BatchNorm`] is made of, as [`burn::nn::BatchNormConfig`].
#[derive(Config, Debug)]
pub struct BatchNormConfig {
    /// The number of channels, at least one.
    pub num_features: usize,
    /// Added to the variance under the root, finite and above 0. Default: 1e-5
    #[config(default = 1e-5)]
    pub epsilon: f64,
    /// The weight of a new batch in the running statistics, from 0 to 1. Default: 0.1
    #[config(default = 0.1)]
    pub momentum: f64,
}

impl BatchNormConfig {
    /// A layer with gamma of ones, beta of zeros, and running statistics of mean 0 and variance 1.
    ///
    /// # Panics
    /// As burn's, for a value outside of the bounds above.
    pub fn init(&self, device: &Device) -> BatchNorm {
        let config = nn::BatchNormConfig::new(self.num_features);
        config.with_epsilon(self.epsilon).with_momentum(self.momentum).init(device).into()
    }
}

/// Batch Normalization (Ioffe & Szegedy 2015) of tensors `[N, C, ...]`, as [`burn::nn::BatchNorm`] but for its speed: the same
/// fields, so that records of either load into the other. `From` turns one into the other, sharing parameters and running
/// statistics.
///
/// ```
/// use batchnorm_burn::{BatchNorm, BatchNormConfig};
/// use burn::module::Module;
/// use burn::tensor::Device;
///
/// let trained = burn::nn::BatchNormConfig::new(8).init(&Device::flex());
/// let record = trained.into_record();
/// let bn = BatchNormConfig::new(8).init(&Device::flex()).load_record(record);
/// ```
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct BatchNorm {
    /// The trained scale of each channel.
    pub gamma: Param<Tensor<1>>,
    /// The trained offset of each channel.
    pub beta: Param<Tensor<1>>,
    /// Whether the layer trains on a device that differentiates; off in a layer that is frozen.
    pub training: Param<Flag>,
    /// The running mean.
    pub running_mean: RunningState<Tensor<1>>,
    /// The running variance, of biased variances.
    pub running_var: RunningState<Tensor<1>>,
    /// The weight of a new batch in the running statistics.
    pub momentum: f64,
    /// Added to the variance under the root.
    pub epsilon: f64,
}

impl BatchNorm {
    /// Normalizes a tensor of shape `[N, C, ...]`.
    ///
    /// On a device that differentiates, with the statistics of the batch, which enter the running ones; if the layer is
    /// frozen, and on other devices, with the running statistics.
    ///
    /// # Panics
    /// As burn's, for an input of one dimension or of other than C channels; on flex also for a batch without values in
    /// training, and a running variance that is negative or NaN in inference.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let [num_features] = self.gamma.shape().dims();
        assert_shape!(input, [_, num_features, ..]);
        let device = input.device();
        let (gamma, beta) = (self.gamma.val(), self.beta.val());
        if !(device.is_autodiff() && self.training.is_enabled()) {
            let [mean, variance] =
                [&self.running_mean, &self.running_var].map(|running| running.value().to_device(&device));
            return batch_norm(input, gamma, beta, mean, variance, self.epsilon);
        }
        let BatchNormTrainOutput { output, mean, variance } = batch_norm_train(input, gamma, beta, self.epsilon);
        for (running, batch) in [(&self.running_mean, mean), (&self.running_var, variance)] {
            let old = running.value_sync().to_device(&device);
            running.update((old * (1.0 - self.momentum) + batch * self.momentum).detach());
        }
        output
    }
}

impl ModuleDisplay for BatchNorm {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        nn::BatchNorm::from(self.clone()).custom_settings()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        nn::BatchNorm::from(self.clone()).custom_content(content)
    }
}

/// From one layer to the other, field by field.
macro_rules! convert {
    ($from:ty => $to:ty) => {
        impl From<$from> for $to {
            fn from(layer: $from) -> Self {
                Self {
                    gamma: layer.gamma,
                    beta: layer.beta,
                    training: layer.training,
                    running_mean: layer.running_mean,
                    running_var: layer.running_var,
                    momentum: layer.momentum,
                    epsilon: layer.epsilon,
                }
            }
        }
    };
}

convert!(nn::BatchNorm => BatchNorm);
convert!(BatchNorm => nn::BatchNorm);
