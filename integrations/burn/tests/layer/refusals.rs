//! Arguments that are refused, by panics as burn has it.

use batchnorm_burn::{BatchNormConfig, batch_norm, batch_norm_train};
use burn::module::{Module, RunningState};
use burn::tensor::{DType, Device, Tensor};

use crate::support::training;

#[test]
#[should_panic(expected = "num_features must be greater than zero")]
fn no_channels() {
    BatchNormConfig::new(0).init(&Device::flex());
}

#[test]
#[should_panic(expected = "epsilon must be finite and positive")]
fn a_negative_epsilon() {
    BatchNormConfig::new(1).with_epsilon(-1.0).init(&Device::flex());
}

#[test]
#[should_panic(expected = "momentum must be finite and within [0, 1]")]
fn a_momentum_above_one() {
    BatchNormConfig::new(1).with_momentum(1.5).init(&Device::flex());
}

#[test]
#[should_panic(expected = "expected rank at least 2, got 1")]
fn one_dimension() {
    BatchNormConfig::new(3).init(&training()).forward(Tensor::<1>::zeros([3], &training()));
}

#[test]
#[should_panic(expected = "expected 3, got 4")]
fn other_channels() {
    BatchNormConfig::new(3).init(&training()).forward(Tensor::<3>::zeros([2, 4, 5], &training()));
}

#[test]
#[should_panic(expected = "training needs at least one value per channel, got zero")]
fn an_empty_batch() {
    BatchNormConfig::new(3).init(&training()).forward(Tensor::<3>::zeros([0, 3, 5], &training()));
}

#[test]
#[should_panic(expected = "the variance of channel 1 must be at least 0, got -1")]
fn a_negative_variance() {
    let device = Device::flex();
    let mut layer = BatchNormConfig::new(2).init(&device).valid();
    layer.running_var = RunningState::new(Tensor::from_floats([1.0, -1.0], &device));
    layer.forward(Tensor::<2>::zeros([4, 2], &device));
}

#[test]
#[should_panic(expected = "expected gamma of F64 as the input is, got F32")]
fn another_element_type() {
    let layer = BatchNormConfig::new(2).init(&training());
    layer.forward(Tensor::<2>::zeros([4, 2], (&training(), DType::F64)));
}

fn vector(len: usize) -> Tensor<1> {
    Tensor::ones([len], &Device::flex())
}

#[test]
#[should_panic(expected = "`gamma` must hold 3 elements for this shape, got 4")]
fn more_parameters_than_channels() {
    batch_norm_train(Tensor::<2>::zeros([4, 3], &Device::flex()), vector(4), vector(3), 1e-5);
}

#[test]
#[should_panic(expected = "`mean` must hold 3 elements for this shape, got 2")]
fn fewer_statistics_than_channels() {
    let x = Tensor::<2>::zeros([4, 3], &Device::flex());
    batch_norm(x, vector(3), vector(3), vector(2), vector(2), 1e-5);
}

#[test]
#[should_panic(expected = "expected an input of shape [N, C, ...], got 1 dimension")]
fn an_operation_on_one_dimension() {
    batch_norm_train(vector(3), vector(3), vector(3), 1e-5);
}

#[test]
#[should_panic(expected = "eps must be finite and at least 0, got NaN")]
fn an_epsilon_that_is_not_a_number() {
    batch_norm_train(Tensor::<2>::zeros([4, 3], &Device::flex()), vector(3), vector(3), f64::NAN);
}
