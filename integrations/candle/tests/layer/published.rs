//! Values of PyTorch that the tests of candle-nn 0.11 publish (candle-nn/tests/batch_norm.rs, MIT OR Apache-2.0): a batch of
//! (2, 5, 3, 4), what `torch.nn.BatchNorm2d(5, affine=False)` makes of it, and its running statistics, to four decimals.

use batchnorm_candle::BatchNorm;
use candle_core::{DType, Device, Tensor};

use crate::support::values;

#[rustfmt::skip]
const INPUT: [f32; 120] = [
    -0.7493, -1.0410, 1.6977, -0.6579, 1.7982, -0.0087, 0.2812, -0.1190, 0.2908, -0.5975, -0.0278, -0.2138, -1.3130,
    -1.6048, -2.2028, 0.9452, 0.4002, 0.0831, 1.0004, 0.1860, 0.5004, 0.5539, 0.9991, -0.2540, -0.0703, -0.3752,
    -0.1096, -0.2374, 1.0258, -2.2208, -0.0257, 0.6073, -1.1627, -0.0964, -1.9718, 1.6577, 0.1931, -0.3692, -0.8011,
    0.9059, 0.4797, 0.6521, -0.0165, -0.6683, -0.4148, 2.0649, -0.8276, 1.7947, -0.2061, 0.5812, -1.3598, 1.6192,
    1.0466, -0.4423, 0.4202, 0.1749, 0.6969, 0.2616, -0.0369, -1.4951, -0.0814, -0.1877, 0.0267, 0.6150, 0.2402,
    -1.1440, -2.0068, 0.6032, -2.6639, 0.8260, 0.1085, -0.1693, 1.2805, 0.7654, -0.4930, 0.3770, 1.1309, 0.2303,
    0.2949, -0.2634, -0.5225, 0.4269, 0.6341, 1.5736, 0.9827, -1.2499, 0.3509, -1.6243, -0.8123, 0.7634, -0.3047,
    0.0143, -0.4032, 0.0537, 0.7022, 0.8405, -1.2221, -1.6847, -0.0714, -0.1608, 0.5579, -1.5858, 0.4617, -0.6480,
    0.1332, 0.0419, -0.9784, 0.4173, 1.2313, -1.9046, -0.1656, 0.1259, 0.0763, 1.4252, -0.9115, -0.1093, -0.3100,
    -0.6734, -1.4357, 0.9205,
];

#[rustfmt::skip]
const OUTPUT: [f32; 120] = [
    -0.6391, -0.9414, 1.8965, -0.5444, 2.0007, 0.1283, 0.4287, 0.014, 0.4387, -0.4818, 0.1085, -0.0842, -1.6809,
    -2.0057, -2.6714, 0.8328, 0.2262, -0.1268, 0.8943, -0.0123, 0.3377, 0.3973, 0.8928, -0.5021, 0.0861, -0.2324,
    0.0451, -0.0884, 1.2311, -2.1603, 0.1327, 0.7939, -1.055, 0.0589, -1.9002, 1.8912, 0.2918, -0.3253, -0.7993,
    1.0741, 0.6063, 0.7955, 0.0617, -0.6536, -0.3754, 2.3461, -0.8284, 2.0495, -0.201, 0.6476, -1.4446, 1.7665,
    1.1493, -0.4556, 0.4741, 0.2097, 0.7723, 0.3031, -0.0186, -1.5905, 0.053, -0.0572, 0.165, 0.7746, 0.3862, -1.0481,
    -1.9422, 0.7624, -2.6231, 0.9933, 0.2498, -0.0381, 1.2061, 0.6327, -0.7681, 0.2004, 1.0396, 0.037, 0.109, -0.5125,
    -0.8009, 0.2559, 0.4865, 1.5324, 1.1861, -1.1461, 0.5261, -1.5372, -0.689, 0.957, -0.1587, 0.1745, -0.2616,
    0.2156, 0.8931, 1.0375, -1.2614, -1.7691, 0.0015, -0.0966, 0.6921, -1.6605, 0.5866, -0.6313, 0.226, 0.1258,
    -0.9939, 0.5378, 1.3484, -2.0319, -0.1574, 0.1568, 0.1034, 1.5574, -0.9614, -0.0967, -0.313, -0.7047, -1.5264,
    1.0134,
];

const RUNNING_MEAN: [f32; 5] = [-0.0133, 0.0197, -0.0153, -0.0073, -0.0020];
const RUNNING_VAR: [f32; 5] = [0.9972, 0.9842, 0.9956, 0.9866, 0.9898];

/// Half of the last decimal, a little rounding of f32, and as much as eps moves: the values are of 1e-5, the test uses 1e-8.
#[track_caller]
fn assert_printed(what: &str, got: &Tensor, expected: &[f32]) {
    for (i, (got, &expected)) in values(got).into_iter().zip(expected).enumerate() {
        assert!((got - f64::from(expected)).abs() < 5.1e-5, "{what} {i}: {got}, expected {expected}");
    }
}

#[test]
fn torch_values_that_candle_publishes() {
    let (zeros, ones) = (Tensor::zeros(5, DType::F32, &Device::Cpu), Tensor::ones(5, DType::F32, &Device::Cpu));
    let bn = BatchNorm::new_no_bias(5, zeros.unwrap(), ones.unwrap(), 1e-8).unwrap();
    let x = Tensor::new(&INPUT, &Device::Cpu).unwrap().reshape((2, 5, 3, 4)).unwrap();
    let y = bn.forward_train(&x).unwrap();
    assert_eq!(y.dims(), x.dims());
    assert_printed("y", &y, &OUTPUT);
    assert_printed("running mean", bn.running_mean(), &RUNNING_MEAN);
    assert_printed("running variance", bn.running_var(), &RUNNING_VAR);
}

#[test]
fn weight_and_bias_follow() {
    let of = |value: f32, strided: bool| {
        let one = Tensor::new(&[value], &Device::Cpu).unwrap().broadcast_as(5).unwrap();
        if strided { one } else { one.contiguous().unwrap() }
    };
    let x = Tensor::new(&INPUT, &Device::Cpu).unwrap().reshape((2, 5, 3, 4)).unwrap();
    for strided in [false, true] {
        let bn = BatchNorm::new(5, of(0.0, false), of(1.0, false), of(0.5, strided), of(-1.5, strided), 1e-8).unwrap();
        let y = bn.forward_train(&x).unwrap();
        let xhat = ((y + 1.5).unwrap() * 2.0).unwrap();
        assert_printed("xhat", &xhat, &OUTPUT);
    }
}
