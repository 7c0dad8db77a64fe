//! What the tests share: data, either layer, and what it computes.

use batchnorm_burn::BatchNorm;
use burn::module::{Module, Param, RunningState};
use burn::nn;
use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Whose forward pass runs, on the same parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Whose {
    Ours,
    Burns,
}

impl Whose {
    pub fn forward<const D: usize>(self, layer: &nn::BatchNorm, x: Tensor<D>) -> Tensor<D> {
        match self {
            Whose::Ours => BatchNorm::from(layer.clone()).forward(x),
            Whose::Burns => layer.forward(x),
        }
    }
}

pub fn training() -> Device {
    Device::flex().autodiff()
}

/// Values of one `dtype`, in a tensor of another that holds them exactly.
#[derive(Debug, Clone, Copy)]
pub struct Types {
    pub values: DType,
    pub computed: DType,
}

impl Types {
    pub fn both(dtype: DType) -> Self {
        Self { values: dtype, computed: dtype }
    }

    pub fn tensor<const D: usize>(self, data: TensorData, device: &Device) -> Tensor<D> {
        Tensor::<D>::from_data(data.convert_dtype(self.values), (device, self.values)).cast(self.computed)
    }

    /// About uniform, of deviation 1 around 0.5.
    pub fn random<const D: usize>(self, shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
        self.tensor(TensorData::new(values(shape.iter().product(), seed), shape), device)
    }

    /// A layer that has seen other data: nothing in it is as it was initialized.
    pub fn layer(self, channels: usize, device: &Device) -> nn::BatchNorm {
        let mut layer = nn::BatchNormConfig::new(channels).with_momentum(0.2).with_epsilon(1e-3).init(device);
        let vector = |seed| self.random::<1>([channels], seed, device);
        layer.gamma = Param::from_tensor(vector(100));
        layer.beta = Param::from_tensor(vector(101));
        layer.running_mean = RunningState::new(vector(102));
        layer.running_var = RunningState::new(vector(103).abs() + 0.5);
        layer
    }
}

pub fn values(len: usize, seed: u64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.25..2.25)).collect()
}

pub fn list<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().convert::<f64>().try_into_vec().unwrap()
}

/// What was computed, by name.
pub type Named = Vec<(String, Vec<f64>)>;

/// Puts `y` on the list, the gradients of `sum(y * dy)`, and the running statistics of the layers behind `y`.
pub fn differentiate<const D: usize>(
    named: &mut Named,
    what: &str,
    layers: &[&nn::BatchNorm],
    [x, y, dy]: [Tensor<D>; 3],
) {
    let gradients = (y.clone() * dy).sum().backward();
    let mut put =
        |name: &str, values: Option<Vec<f64>>| named.push((format!("{what}: {name}"), values.unwrap_or_default()));
    put("y", Some(list(y)));
    put("dx", x.grad(&gradients).map(list));
    for layer in layers {
        put("dgamma", layer.gamma.grad(&gradients).map(list));
        put("dbeta", layer.beta.grad(&gradients).map(list));
        put("running mean", Some(list(layer.running_mean.value_sync())));
        put("running variance", Some(list(layer.running_var.value_sync())));
    }
}

/// A change of how a tensor lies, which both the input and the gradient of the output may go through.
pub type View<const D: usize> = fn(Tensor<D>) -> Tensor<D>;

/// Three steps of training on other data each, and inference after them. The views are those of x and of dy.
pub fn train<const D: usize>(
    whose: Whose,
    types: Types,
    shape: [usize; D],
    device: &Device,
    [of_x, of_dy]: [View<D>; 2],
) -> Named {
    let mut named = Named::new();
    let data = |seed| types.random(shape, seed, device);
    let layer = types.layer(of_x(data(0)).dims()[1], device);
    for step in 0..3 {
        let x = data(step).require_grad();
        let y = whose.forward(&layer, of_x(x.clone()));
        differentiate(&mut named, &format!("step {step}"), &[&layer], [x, y, of_dy(data(10 + step))]);
    }
    let y = whose.forward(&layer.valid(), of_x(data(20)).inner());
    named.push(("inference: y".into(), list(y)));
    named
}

/// Compares by the largest value of each list, or 1.
#[track_caller]
pub fn assert_close(what: &str, got: &Named, expected: &Named, bound: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for ((name, got), (_, expected)) in got.iter().zip(expected) {
        assert_eq!(got.len(), expected.len(), "{what}, {name}");
        let scale = expected.iter().fold(1.0, |most: f64, value| most.max(value.abs()));
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            let error = (got - expected).abs() / scale;
            assert!(error <= bound, "{what}, {name}: element {i} is {got}, expected {expected}: off by {error:e}");
        }
    }
}
