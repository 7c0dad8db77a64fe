//! Outputs, gradients and running statistics beside candle-nn's layer, over several steps.

use batchnorm_candle::batch_norm;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{BatchNormConfig, Module, ModuleT, VarBuilder, VarMap};

use crate::support::{Memory, Variables, assert_near, lying, normal, permutations, step, tensor, values};

const SHAPES: [&[usize]; 8] =
    [&[6, 3], &[40, 1], &[33, 130], &[4, 3, 9], &[3, 4, 5, 6], &[2, 17, 3, 3], &[9, 2, 1, 1], &[2, 3, 2, 3, 4]];

fn configs() -> [BatchNormConfig; 4] {
    let usual = BatchNormConfig::default();
    [
        usual,
        BatchNormConfig { eps: 0.3, momentum: 0.7, ..usual },
        BatchNormConfig { affine: false, ..usual },
        BatchNormConfig { remove_mean: false, ..usual },
    ]
}

/// Three steps of training and one of evaluation, each beside candle-nn in f64 on the same values.
fn beside(dtype: DType, bound: f64) {
    for dims in SHAPES {
        for config in configs() {
            for memory in [Memory::First, Memory::Last, Memory::Piece] {
                let channels = dims[1];
                let (here, there) = (Variables::new(channels, dtype), Variables::new(channels, DType::F64));
                let (ours, theirs) = (here.ours(config), there.theirs(config));
                for k in 0..4 {
                    let len = dims.iter().product();
                    // Another mean and deviation at each step, of few digits.
                    let x: Vec<_> =
                        normal(len, k).iter().map(|v| (v * 4.0).round() / 2f64.powi(k as i32) + 3.0).collect();
                    let dy = normal(len, 100 + k);
                    let train = k < 3;
                    let run = |layer: &dyn ModuleT, variables, dtype| {
                        let (x, dy) = (tensor(&x, dims, dtype), tensor(&dy, dims, dtype));
                        step(layer, variables, &x, &dy, memory, train)
                    };
                    let (got, expected) = (run(&ours, &here, dtype), run(&theirs, &there, DType::F64));
                    assert_eq!(got.y.dtype(), dtype);
                    assert_near(&format!("{dims:?} {memory:?} {config:?} step {k}"), &got, &expected, bound);
                }
            }
        }
    }
}

#[test]
fn f64_is_candle_nn() {
    assert_eq!((BatchNormConfig::default().eps, BatchNormConfig::default().momentum), (1e-5, 0.1));
    beside(DType::F64, 1e-13);
}

#[test]
fn f32_is_candle_nn_in_f64() {
    beside(DType::F32, 1e-6);
}

/// One set of variables for both: names, and who sees updates.
#[test]
fn variables_are_those_of_candle_nn() {
    for affine in [true, false] {
        let config = BatchNormConfig { affine, ..Default::default() };
        let (mine, other) = (VarMap::new(), VarMap::new());
        let builder = |map: &VarMap| VarBuilder::from_varmap(map, DType::F32, &Device::Cpu).pp("block").pp("bn");
        let ours = batch_norm(3, config, builder(&mine)).unwrap();
        candle_nn::batch_norm(3, config, builder(&other)).unwrap();
        let all = |map: &VarMap| {
            let data = map.data().lock().unwrap();
            let mut all: Vec<_> = data.iter().map(|(name, var)| (name.clone(), values(var))).collect();
            all.sort_by(|a, b| a.0.cmp(&b.0));
            all
        };
        assert_eq!(all(&mine), all(&other));

        let theirs = candle_nn::batch_norm(3, config, builder(&mine)).unwrap();
        let x = tensor(&normal(60, 1), &[4, 3, 5], DType::F32);
        ours.forward_train(&x).unwrap();
        assert_ne!(values(ours.running_mean()), [0.0; 3]);
        assert_eq!(values(ours.running_mean()), values(theirs.running_mean()));
        assert_eq!(values(ours.running_var()), values(theirs.running_var()));
        let (got, expected) = (ours.forward_t(&x, false).unwrap(), theirs.forward_t(&x, false).unwrap());
        for (got, expected) in values(&got).into_iter().zip(values(&expected)) {
            assert!((got - expected).abs() < 1e-6);
        }
    }
}

#[test]
fn constructors_and_accessors_are_those_of_candle_nn() {
    let of = |value: f64| tensor(&[value; 3], &[3], DType::F32);
    let new = batchnorm_candle::BatchNorm::new_with_momentum(3, of(1.0), of(2.0), of(3.0), of(4.0), 1e-3, 0.2).unwrap();
    assert_eq!((new.eps(), new.momentum()), (1e-3, 0.2));
    let (weight, bias) = new.weight_and_bias().unwrap();
    let all = [new.running_mean(), new.running_var(), weight, bias].map(values);
    assert_eq!(all, [[1.0; 3], [2.0; 3], [3.0; 3], [4.0; 3]]);

    let plain = batchnorm_candle::BatchNorm::new(3, of(1.0), of(2.0), of(3.0), of(4.0), 1e-3).unwrap();
    assert_eq!(
        plain.momentum(),
        candle_nn::BatchNorm::new(3, of(1.0), of(2.0), of(3.0), of(4.0), 1e-3).unwrap().momentum()
    );
    let bare = batchnorm_candle::BatchNorm::new_no_bias(3, of(1.0), of(2.0), 1e-3).unwrap();
    assert!(bare.weight_and_bias().is_none());
    let bare = batchnorm_candle::BatchNorm::new_no_bias_with_momentum(3, of(1.0), of(2.0), 1e-3, 0.4).unwrap();
    assert!(bare.weight_and_bias().is_none() && bare.momentum() == 0.4);

    // A variable is shared, by clones too.
    let mean = Var::from_tensor(&of(0.0)).unwrap();
    let layer = batchnorm_candle::BatchNorm::new_no_bias(3, mean.as_tensor().clone(), of(1.0), 1e-3).unwrap();
    layer.clone().forward_train(&tensor(&normal(12, 1), &[4, 3], DType::F32)).unwrap();
    assert_ne!(values(&mean), [0.0; 3]);
    assert_eq!(values(&mean), values(layer.running_mean()));
}

/// A convolution takes the layer in as it does candle-nn's.
#[test]
fn a_convolution_takes_it_in() {
    let variables = Variables::new(3, DType::F64);
    let layer = variables.ours(BatchNormConfig::default());
    let weight = tensor(&normal(3 * 2 * 3 * 3, 1), &[3, 2, 3, 3], DType::F64);
    let conv = candle_nn::Conv2d::new(weight, None, Default::default());
    let folded = conv.absorb_bn(&(&layer).try_into().unwrap()).unwrap();
    let x = tensor(&normal(4 * 2 * 5 * 5, 2), &[4, 2, 5, 5], DType::F64);
    let expected = values(&layer.forward_eval(&conv.forward(&x).unwrap()).unwrap());
    for (got, expected) in values(&folded.forward(&x).unwrap()).into_iter().zip(expected) {
        assert!((got - expected).abs() < 1e-12, "{got}, expected {expected}");
    }
}

/// The output lies as the input does, whatever that is called by the time it comes to the layer.
#[test]
fn memory_order_is_kept() {
    for dims in SHAPES {
        for train in [true, false] {
            let variables = Variables::new(dims[1], DType::F32);
            let layer = variables.ours(BatchNormConfig::default());
            let x = tensor(&normal(dims.iter().product(), 1), dims, DType::F32);
            let (to, _) = permutations(dims.len());
            let last = lying(&x, Memory::Last);
            assert!(last.permute(to).unwrap().is_contiguous());
            let y = layer.forward_t(&last, train).unwrap();
            assert_eq!((y.dims(), y.stride()), (last.dims(), last.stride()), "{dims:?}");
            let y = layer.forward_t(&x, train).unwrap();
            assert!(y.is_contiguous());
        }
    }
}

/// A slice that begins inside of its storage is read from its beginning.
#[test]
fn slices_are_read_where_they_begin() {
    let variables = Variables::new(3, DType::F32);
    let layer = variables.ours(BatchNormConfig::default());
    let all = tensor(&normal(6 * 3 * 4, 1), &[6, 3, 4], DType::F32);
    for x in [all.clone(), lying(&all, Memory::Last)] {
        let slice = x.narrow(0, 2, 3).unwrap();
        let alone = slice.contiguous().unwrap();
        assert_ne!(slice.layout().start_offset(), 0);
        let [got, expected] = [&slice, &alone].map(|x: &Tensor| values(&layer.forward_eval(x).unwrap()));
        assert_eq!(got, expected);
    }
}
