//! One value per channel, no values, special values, and arguments that are refused.

use batchnorm_candle::{BatchNorm, BatchNormConfig, batch_norm};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{ModuleT, VarBuilder, VarMap};

use crate::support::{Variables, normal, tensor, values};

#[test]
fn one_value_per_channel_gives_beta_and_leaves_the_variance() {
    for dims in [&[1, 3][..], &[1, 3, 1, 1]] {
        let variables = Variables::new(3, DType::F32);
        let (mean, var) = (values(&variables.mean), values(&variables.var));
        let layer = variables.ours(BatchNormConfig::default());
        let x = Var::from_tensor(&tensor(&[5.0, -7.0, 1e30], dims, DType::F32)).unwrap();
        let y = layer.forward_train(&x).unwrap();
        assert_eq!(values(&y), values(&variables.bias));
        assert_eq!(values(layer.running_var()), var);
        let moved: Vec<_> = mean.iter().zip(values(&x)).map(|(old, new)| 0.9 * old + 0.1 * new).collect();
        for (got, expected) in values(layer.running_mean()).into_iter().zip(moved) {
            assert!((got - expected).abs() <= 1e-7 * expected.abs().max(1.0));
        }
        let found = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(values(found.get(&x).unwrap()), [0.0; 3]);
        assert_eq!(values(found.get(&variables.weight).unwrap()), [0.0; 3]);
        assert_eq!(values(found.get(&variables.bias).unwrap()), [1.0; 3]);

        // What is better here: candle-nn has a NaN from then on.
        let theirs = Variables::new(3, DType::F32);
        theirs.theirs(BatchNormConfig::default()).forward_train(&x).unwrap();
        assert!(values(&theirs.var).iter().all(|v| v.is_nan()));
    }
}

/// What candle-nn's own test asks of one value: the variables of the map are moved.
#[test]
fn the_mean_of_one_value_moves() {
    let map = VarMap::new();
    let bn = batch_norm(1, 1e-5, VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu)).unwrap();
    bn.forward_train(&Tensor::ones((1, 1), DType::F32, &Device::Cpu).unwrap()).unwrap();
    let data = map.data().lock().unwrap();
    assert_eq!(values(&data["running_mean"]), [f64::from(0.1f32)]);
    assert_eq!(values(&data["running_var"]), [1.0]);
}

#[test]
fn constant_channels_give_beta() {
    let variables = Variables::new(2, DType::F32);
    let x = tensor(&[1e10, -3.0].repeat(50), &[50, 2], DType::F32);
    let y = variables.ours(BatchNormConfig::from(0.0)).forward_train(&x).unwrap();
    assert_eq!(values(&y), values(&variables.bias).repeat(50));
}

#[test]
fn an_empty_batch_is_refused_in_training_and_empty_at_evaluation() {
    for dims in [&[0, 3, 4][..], &[2, 3, 0]] {
        let variables = Variables::new(3, DType::F32);
        let layer = variables.ours(BatchNormConfig::default());
        let x = Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
        refused(layer.forward_train(&x), "training needs at least one value per channel");
        assert_eq!(layer.forward_eval(&x).unwrap().dims(), dims);
    }
}

/// A diverged channel is named, at evaluation and in the next step.
#[test]
fn a_running_variance_that_is_no_variance_is_refused() {
    let variables = Variables::new(2, DType::F32);
    let layer = variables.ours(BatchNormConfig::default());
    let x = tensor(&[1.0, f64::NAN, 2.0, 3.0], &[2, 2], DType::F32);
    let y = values(&layer.forward_train(&x).unwrap());
    assert!(y[0].is_finite() && y[1].is_nan() && y[2].is_finite() && y[3].is_nan());
    for train in [true, false] {
        refused(layer.forward_t(&x, train), "the variance of channel 1 must be at least 0, got NaN");
    }
}

#[track_caller]
fn refused<T>(result: candle_core::Result<T>, why: &str) {
    let message = result.err().expect("an error").to_string();
    assert!(message.contains(why), "{message:?} does not say {why:?}");
}

#[test]
fn bad_arguments_are_refused_and_nothing_moves() {
    let of = |len: usize, dtype| Tensor::ones(len, dtype, &Device::Cpu).unwrap();
    let f = |len| of(len, DType::F32);
    refused(BatchNorm::new(3, f(2), f(3), f(3), f(3), 1e-5), "running mean of shape [3], got [2]");
    refused(BatchNorm::new(3, f(3), f(4), f(3), f(3), 1e-5), "running variance of shape [3], got [4]");
    refused(BatchNorm::new(3, f(3), f(3), f(1), f(3), 1e-5), "weight of shape [3], got [1]");
    refused(BatchNorm::new(3, f(3), f(3), f(3), f(6), 1e-5), "bias of shape [3], got [6]");
    refused(BatchNorm::new_no_bias(0, f(0), f(0), 1e-5), "at least one channel");
    for eps in [-1e-5, f64::NAN, f64::INFINITY] {
        refused(BatchNorm::new_no_bias(3, f(3), f(3), eps), "eps must be finite and at least 0");
        let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
        refused(batch_norm(3, eps, vb), "eps must be finite and at least 0");
    }
    for momentum in [-0.1, 1.1, f64::NAN] {
        let made = BatchNorm::new_no_bias_with_momentum(3, f(3), f(3), 1e-5, momentum);
        refused(made, "a momentum weight must lie between 0 and 1");
    }

    let variables = Variables::new(3, DType::F32);
    let before = [values(&variables.mean), values(&variables.var)];
    let layer = variables.ours(BatchNormConfig::default());
    for train in [true, false] {
        let pass = |x: &Tensor| layer.forward_t(x, train);
        let ones = |dims: &[usize], dtype| Tensor::ones(dims, dtype, &Device::Cpu).unwrap();
        refused(pass(&ones(&[], DType::F32)), "expected a tensor of (batch, 3, ...), got []");
        refused(pass(&ones(&[3], DType::F32)), "expected a tensor of (batch, 3, ...), got [3]");
        refused(pass(&ones(&[3, 4], DType::F32)), "expected a tensor of (batch, 3, ...), got [3, 4]");
        refused(pass(&ones(&[2, 3], DType::U32)), "unsupported dtype U32 for op batch-norm");
        refused(pass(&ones(&[2, 3], DType::F64)), "weight of F64 for an input of F64, got F32");
        let bf16 = BatchNorm::new_no_bias(3, of(3, DType::F16), of(3, DType::F16), 1e-5).unwrap();
        let message = "running mean of BF16 or F32 for an input of BF16, got F16";
        refused(bf16.forward_t(&ones(&[2, 3], DType::BF16), train), message);
    }
    assert_eq!([values(&variables.mean), values(&variables.var)], before);
}

/// Evaluation does not move the running statistics, and gives the same each time.
#[test]
fn evaluation_moves_nothing() {
    let variables = Variables::new(3, DType::F32);
    let before = [values(&variables.mean), values(&variables.var)];
    let layer = variables.ours(BatchNormConfig::default());
    let x = tensor(&normal(30, 1), &[10, 3], DType::F32);
    let [first, second] = [0; 2].map(|_| values(&layer.forward_eval(&x).unwrap()));
    assert_eq!(first, second);
    assert_eq!([values(&variables.mean), values(&variables.var)], before);
}
