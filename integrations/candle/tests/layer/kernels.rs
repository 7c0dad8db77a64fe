//! The layer has the bits of the kernels on the slices as they lie, in all types: nothing comes between.

use batchnorm::{Affine, BatchNorm, Element, Gradients, Layout, Momentum, Population, Shape, Variance};
use candle_core::{DType, Device, Tensor, Var, WithDType};
use candle_nn::BatchNormConfig;

use crate::support::{Memory, Variables, lying, normal, permutations, tensor, values};

const EPS: f64 = 1e-5;

/// The last is large enough for threads, and takes candle long: f32 alone has it.
const SHAPES: [&[usize]; 4] = [&[6, 5], &[3, 4, 5, 6], &[2, 3, 2, 3, 4], &[8, 32, 40, 40]];

/// A layer of parameters of one type beside the plan, on a tensor of `E` in either order of memory.
fn beside<E: Element<Param: WithDType> + WithDType>(parameters: DType, train: bool) {
    let shapes = if E::DTYPE == DType::F32 { &SHAPES[..] } else { &SHAPES[..3] };
    for (dims, memory) in shapes.iter().flat_map(|dims| [Memory::First, Memory::Last].map(|memory| (*dims, memory))) {
        let variables = Variables::new(dims[1], parameters);
        let len = dims.iter().product();
        let [x, dy] = [1, 2].map(|seed| lying(&tensor(&normal(len, seed), dims, E::DTYPE), memory));
        let (to, _) = permutations(dims.len());
        let in_memory = |tensor: &Tensor| -> Vec<E> {
            let tensor = if memory == Memory::Last { tensor.permute(to.clone()).unwrap() } else { tensor.clone() };
            tensor.flatten_all().unwrap().to_vec1().unwrap()
        };

        // The kernels alone.
        let of = |var: &Var| -> Vec<E::Param> { var.to_dtype(E::Param::DTYPE).unwrap().to_vec1().unwrap() };
        let (mean, var, gamma, beta) =
            (of(&variables.mean), of(&variables.var), of(&variables.weight), of(&variables.bias));
        let order = if memory == Memory::Last { Layout::ChannelsLast } else { Layout::ChannelsFirst };
        let plan = BatchNorm::<E>::new(Shape::new(order, dims[0], dims[1], &dims[2..]).unwrap()).unwrap();
        let (affine, mut saved, plan) = (Affine::new(&gamma, &beta), plan.saved(), plan.with_eps(EPS).unwrap());
        let (mut y, mut dx) = (vec![E::default(); len], vec![E::default(); len]);
        let [mut dgamma, mut dbeta] = [0; 2].map(|_| vec![E::Param::default(); dims[1]]);
        let mut running = plan.running(Momentum::WeightOfNew(0.1), Variance::Unbiased).unwrap();
        if train {
            plan.forward_train(&in_memory(&x), affine, &mut y, &mut saved).unwrap();
            running =
                batchnorm::Running::from_parts(mean, var, 0, Momentum::WeightOfNew(0.1), Variance::Unbiased).unwrap();
            running.update(&saved).unwrap();
        } else {
            plan.freeze(Population { mean: &mean, var: &var }, &mut saved).unwrap();
            plan.normalize(&in_memory(&x), affine, &saved, &mut y).unwrap();
        }
        let gradients =
            Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
        plan.backward(&in_memory(&x), &in_memory(&dy), &saved, affine, gradients).unwrap();

        // The layer.
        let layer = variables.ours(BatchNormConfig { eps: EPS, ..Default::default() });
        let leaf = Var::from_tensor(&x.contiguous().unwrap()).unwrap();
        let out =
            if train { layer.forward_train(&lying(&leaf, memory)) } else { layer.forward_eval(&lying(&leaf, memory)) };
        let out = out.unwrap();
        let found = (&out * &dy).unwrap().sum_all().unwrap().backward().unwrap();
        let what = format!("{:?} {dims:?} {memory:?} of {parameters:?}, train {train}", E::DTYPE);
        assert_eq!(in_memory(&out), y, "y of {what}");
        assert_eq!(in_memory(found.get(&leaf).unwrap()), dx, "dx of {what}");
        let mut pairs = vec![
            ("dgamma", found.get(&variables.weight).unwrap(), dgamma),
            ("dbeta", found.get(&variables.bias).unwrap(), dbeta),
        ];
        if train {
            pairs.push(("running mean", layer.running_mean(), running.mean().to_vec()));
            pairs.push(("running variance", layer.running_var(), running.var().to_vec()));
        }
        for (name, got, expected) in pairs {
            assert_eq!(got.dtype(), parameters);
            let expected = Tensor::new(expected, &Device::Cpu).unwrap().to_dtype(parameters).unwrap();
            assert_eq!(values(got), values(&expected), "{name} of {what}");
        }
    }
}

#[test]
fn each_type_has_the_bits_of_the_kernels() {
    for train in [true, false] {
        beside::<f32>(DType::F32, train);
        beside::<f64>(DType::F64, train);
        for parameters in [DType::F32, DType::BF16] {
            beside::<half::bf16>(parameters, train);
        }
        for parameters in [DType::F32, DType::F16] {
            beside::<half::f16>(parameters, train);
        }
    }
}

/// A half-precision layer is the one in f32, rounded once at the end.
#[test]
fn half_types_are_f32_rounded_once() {
    for dtype in [DType::BF16, DType::F16] {
        let dims = [4, 3, 5, 7];
        let [x, dy] = [1, 2].map(|seed| tensor(&normal(420, seed), &dims, dtype));
        let run = |wide: bool| {
            // Values of the half type, in either case.
            let variables = Variables::new(3, DType::F32);
            for var in [&variables.mean, &variables.var, &variables.weight, &variables.bias] {
                var.set(&var.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap()).unwrap();
            }
            let layer = variables.ours(BatchNormConfig::default());
            let convert = |tensor: &Tensor| if wide { tensor.to_dtype(DType::F32).unwrap() } else { tensor.clone() };
            let x = Var::from_tensor(&convert(&x)).unwrap();
            let y = layer.forward_train(&x).unwrap();
            let found = (&y * convert(&dy)).unwrap().sum_all().unwrap().backward().unwrap();
            let rounded = |tensor: &Tensor| values(&tensor.to_dtype(dtype).unwrap());
            let parameters = [&variables.weight, &variables.bias].map(|var| values(found.get(var).unwrap()));
            (rounded(&y), rounded(found.get(&x).unwrap()), parameters, values(layer.running_var()))
        };
        assert_eq!(run(false), run(true), "{dtype:?}");
    }
}
