//! The layer against the kernels, finite differences, and results known beforehand.

use batchnorm::{Affine, BatchNorm, Element, Gradients, Shape};
use batchnorm_burn::BatchNormConfig;
use burn::module::Module;
use burn::nn;
use burn::tensor::{DType, Tensor, bf16, f16};

use crate::support::{Types, Whose, list, training, values};

/// The layer has the bits of the plan, so it is not burn's own operation that runs.
fn has_the_bits_of_the_kernels<E: Element + burn::tensor::Element>() {
    let (shape, sizes) = (Shape::nchw(3, 4, 5, 6).unwrap(), [3, 4, 5, 6]);
    let types = Types::both(<E as burn::tensor::Element>::dtype());
    let layer = types.layer(4, &training());
    let [x, dy] = [1, 2].map(|seed| types.random(sizes, seed, &training()));
    let x = x.require_grad();
    let y = Whose::Ours.forward(&layer, x.clone());
    let gradients = (y.clone() * dy.clone()).sum().backward();

    let elements = |tensor: Tensor<4>| tensor.into_data().try_into_vec::<E>().unwrap();
    let params = |tensor: Tensor<1>| -> Vec<E::Param> {
        tensor.into_data().try_into_vec::<E>().unwrap().into_iter().map(E::to_param).collect()
    };
    let bn = BatchNorm::<E>::new(shape).unwrap().with_eps(layer.epsilon).unwrap();
    let (gamma, beta) = (params(layer.gamma.val()), params(layer.beta.val()));
    let (affine, mut saved) = (Affine::new(&gamma, &beta), bn.saved());
    let [mut expected_y, mut expected_dx] = [(); 2].map(|()| vec![E::default(); shape.len()]);
    let x_values = elements(x.clone());
    bn.forward_train(&x_values, affine, &mut expected_y, &mut saved).unwrap();
    let to = Gradients { dx: Some(&mut expected_dx[..]), ..Default::default() };
    bn.backward(&x_values, &elements(dy), &saved, affine, to).unwrap();
    assert_eq!(elements(y), expected_y);
    assert_eq!(elements(Tensor::from_inner(x.grad(&gradients).unwrap())), expected_dx);
}

#[test]
fn bits() {
    has_the_bits_of_the_kernels::<f32>();
    has_the_bits_of_the_kernels::<f64>();
    has_the_bits_of_the_kernels::<f16>();
    has_the_bits_of_the_kernels::<bf16>();
}

/// Derivatives of `sum(dy * y)` by differences, for every value of one argument.
fn differences(at: &[f64], loss: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let along = |i: usize| {
        let moved = |by: f64| {
            let mut at = at.to_vec();
            at[i] += by;
            loss(&at)
        };
        (moved(STEP) - moved(-STEP)) / (2.0 * STEP)
    };
    (0..at.len()).map(along).collect()
}

fn check_differences<const D: usize>(shape: [usize; D], is_training: bool) {
    let types = Types::both(DType::F64);
    let device = training();
    let (channels, len) = (shape[1], shape.iter().product());
    let (x, dy) = (values(len, 1), values(len, 2));
    let layer = || {
        let layer = types.layer(channels, &device);
        if is_training { layer } else { nn::BatchNorm { training: layer.training.with_value(false), ..layer } }
    };
    let vector = |values: &[f64]| Tensor::<1>::from_data(values, (&device, DType::F64));
    let tensor = |values: &[f64]| vector(values).reshape(shape);
    let loss = |layer: &nn::BatchNorm, x: Tensor<D>| (Whose::Ours.forward(layer, x) * tensor(&dy)).sum();
    let value = |x: &[f64], gamma: &[f64], beta: &[f64]| {
        let mut layer = layer();
        layer.gamma = layer.gamma.map(|_| vector(gamma));
        layer.beta = layer.beta.map(|_| vector(beta));
        list(loss(&layer, tensor(x)))[0]
    };

    let layer = layer();
    let leaf = tensor(&x).require_grad();
    let gradients = loss(&layer, leaf.clone()).backward();
    let (gamma, beta) = (list(layer.gamma.val()), list(layer.beta.val()));
    for (what, got, expected) in [
        ("dx", list(leaf.grad(&gradients).unwrap()), differences(&x, |x| value(x, &gamma, &beta))),
        ("dgamma", list(layer.gamma.grad(&gradients).unwrap()), differences(&gamma, |gamma| value(&x, gamma, &beta))),
        ("dbeta", list(layer.beta.grad(&gradients).unwrap()), differences(&beta, |beta| value(&x, &gamma, beta))),
    ] {
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert!(
                (got - expected).abs() < 1e-8,
                "{shape:?}, {what}: element {i} is {got}, by differences {expected}"
            );
        }
    }
}

#[test]
fn finite_differences() {
    for is_training in [true, false] {
        check_differences([6, 3], is_training);
        check_differences([3, 2, 4], is_training);
        check_differences([2, 3, 2, 3], is_training);
    }
}

#[test]
fn one_value_per_channel() {
    let device = training();
    let layer = BatchNormConfig::new(3).with_momentum(0.25).init(&device);
    let x = Tensor::<2>::from_floats([[5.0, -7.0, 0.5]], &device).require_grad();
    let y = layer.forward(x.clone());
    let gradients = y.clone().powi_scalar(2).sum().backward();
    assert_eq!(list(y), [0.0; 3]);
    assert_eq!(list(x.grad(&gradients).unwrap()), [0.0; 3]);
    assert_eq!(list(layer.gamma.grad(&gradients).unwrap()), [0.0; 3]);
    // Three quarters of 0 and 1, and a quarter of the value and its biased variance, 0.
    assert_eq!(list(layer.running_mean.value_sync()), [1.25, -1.75, 0.125]);
    assert_eq!(list(layer.running_var.value_sync()), [0.75; 3]);
}

#[test]
fn an_empty_batch_is_inferred() {
    let layer = BatchNormConfig::new(3).init(&training()).valid();
    let y = layer.forward(Tensor::<4>::zeros([0, 3, 2, 2], &training().inner()));
    assert_eq!(y.dims(), [0, 3, 2, 2]);
}
