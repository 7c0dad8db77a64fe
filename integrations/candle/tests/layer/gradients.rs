//! Gradients are finite differences in f64: in training, without the mean, and at evaluation with constant statistics.

use candle_core::{DType, Tensor, Var};
use candle_nn::BatchNormConfig;

use crate::support::{Memory, Variables, lying, normal, tensor, values};

/// The derivative of `loss` by each of `values`, from central differences over `h` and `2h` whose errors of `h^2` cancel.
fn slopes(values: &[f64], h: f64, loss: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let along = |i: usize, by: f64| {
        let mut values = values.to_vec();
        values[i] += by;
        loss(&values)
    };
    let difference = |i, h: f64| (along(i, h) - along(i, -h)) / (2.0 * h);
    (0..values.len()).map(|i| (4.0 * difference(i, h) - difference(i, 2.0 * h)) / 3.0).collect()
}

#[track_caller]
fn assert_near(what: &str, got: &Tensor, expected: &[f64]) {
    for (i, (got, expected)) in values(got).into_iter().zip(expected).enumerate() {
        let off = (got - expected).abs();
        assert!(off < 1e-8, "{what} {i}: {got}, expected {expected}");
    }
}

#[test]
fn gradients_are_finite_differences() {
    let usual = BatchNormConfig { eps: 1e-2, ..Default::default() };
    for (dims, memory) in [(&[5, 3][..], Memory::First), (&[3, 2, 2, 3], Memory::First), (&[3, 2, 2, 3], Memory::Last)]
    {
        for (train, config) in [
            (true, usual),
            (true, BatchNormConfig { remove_mean: false, ..usual }),
            (false, usual),
            (false, BatchNormConfig { remove_mean: false, ..usual }),
            (true, BatchNormConfig { affine: false, ..usual }),
        ] {
            let (len, channels) = (dims.iter().product(), dims[1]);
            // A mean far from zero tells whether it is subtracted.
            let x: Vec<_> = normal(len, 1).iter().map(|v| v + 2.0).collect();
            let dy = tensor(&normal(len, 2), dims, DType::F64);
            let at = |x: &[f64], gamma: Option<&[f64]>, beta: Option<&[f64]>| {
                let variables = Variables::new(channels, DType::F64);
                for (var, values) in [(&variables.weight, gamma), (&variables.bias, beta)] {
                    let values = values.map_or(var.copy().unwrap(), |values| tensor(values, &[channels], DType::F64));
                    var.set(&values).unwrap();
                }
                let x = Var::from_tensor(&tensor(x, dims, DType::F64)).unwrap();
                let layer = variables.ours(config);
                let lying = lying(&x, memory);
                let y = if train { layer.forward_train(&lying) } else { layer.forward_eval(&lying) };
                let loss = (y.unwrap() * &dy).unwrap().sum_all().unwrap();
                (loss, x, variables)
            };
            let loss = |x: &[f64], gamma: Option<&[f64]>, beta: Option<&[f64]>| {
                at(x, gamma, beta).0.to_scalar::<f64>().unwrap()
            };
            let (value, leaf, variables) = at(&x, None, None);
            let found = value.backward().unwrap();
            let what = format!("{dims:?} {memory:?} train {train} {config:?}");
            assert_near(&format!("dx, {what}"), found.get(&leaf).unwrap(), &slopes(&x, 1e-3, |x| loss(x, None, None)));
            if config.affine {
                let (gamma, beta) = (values(&variables.weight), values(&variables.bias));
                let dgamma = slopes(&gamma, 0.5, |gamma| loss(&x, Some(gamma), None));
                assert_near(&format!("dgamma, {what}"), found.get(&variables.weight).unwrap(), &dgamma);
                let dbeta = slopes(&beta, 0.5, |beta| loss(&x, None, Some(beta)));
                assert_near(&format!("dbeta, {what}"), found.get(&variables.bias).unwrap(), &dbeta);
            }
        }
    }
}

/// The optimizer may move gamma between the passes.
#[test]
fn backward_takes_gamma_of_the_forward_pass() {
    let gradient = |moved: bool| {
        let variables = Variables::new(2, DType::F64);
        let x = Var::from_tensor(&tensor(&normal(12, 1), &[6, 2], DType::F64)).unwrap();
        let y = variables.ours(BatchNormConfig::default()).forward_train(&x).unwrap();
        let loss = y.sqr().unwrap().sum_all().unwrap();
        if moved {
            variables.weight.set(&tensor(&[7.0, 8.0], &[2], DType::F64)).unwrap();
        }
        values(loss.backward().unwrap().get(&x).unwrap())
    };
    assert_eq!(gradient(true), gradient(false));
}

/// What candle does not keep track of has no gradient, and the others are as they were.
#[test]
fn gradients_are_of_what_is_tracked() {
    let (x, dy) = (tensor(&normal(24, 1), &[4, 2, 3], DType::F32), tensor(&normal(24, 2), &[4, 2, 3], DType::F32));
    for train in [true, false] {
        let run = |tracked: [bool; 3]| {
            let variables = Variables::new(2, DType::F32);
            let detached = |var: &Var, keep: bool| if keep { var.as_tensor().clone() } else { var.detach() };
            let leaf = Var::from_tensor(&x).unwrap();
            let layer = batchnorm_candle::BatchNorm::new(
                2,
                variables.mean.detach(),
                variables.var.detach(),
                detached(&variables.weight, tracked[1]),
                detached(&variables.bias, tracked[2]),
                1e-5,
            )
            .unwrap();
            let x = detached(&leaf, tracked[0]);
            let y = if train { layer.forward_train(&x) } else { layer.forward_eval(&x) }.unwrap();
            assert_eq!(y.track_op(), tracked.contains(&true));
            let found = (y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
            // Nor was anything computed for the tensors themselves.
            let (weight, bias) = layer.weight_and_bias().unwrap();
            assert_eq!([&x, weight, bias].map(|tensor| found.get(tensor).is_some()), tracked);
            [&leaf, &variables.weight, &variables.bias].map(|var| found.get(var).map(values))
        };
        let all = run([true; 3]);
        for k in 0..8 {
            let tracked = [0, 1, 2].map(|i| k >> i & 1 == 1);
            let expected = [0, 1, 2].map(|i| all[i].clone().filter(|_| tracked[i]));
            assert_eq!(run(tracked), expected, "{tracked:?}");
        }
    }
}
