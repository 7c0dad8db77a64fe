//! What the tests share: data, layers of both crates with the same variables, and a step that gives all gradients.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{BatchNormConfig, ModuleT, VarBuilder};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// About normal values, as f32 holds them, so that they are the same in f32 and f64.
pub fn normal(len: usize, seed: u64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| f64::from(((0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0) as f32)).collect()
}

pub fn tensor(values: &[f64], dims: &[usize], dtype: DType) -> Tensor {
    Tensor::from_slice(values, dims, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// The elements in the order of the dimensions.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// How a tensor of (N, C, ...) is to lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Memory {
    First,
    Last,
    /// A piece of a larger tensor, neither first nor last.
    Piece,
}

/// The same tensor, lying otherwise.
pub fn lying(tensor: &Tensor, memory: Memory) -> Tensor {
    let rank = tensor.rank();
    match memory {
        Memory::First => tensor.contiguous().unwrap(),
        Memory::Last => {
            let (to, back) = permutations(rank);
            tensor.permute(to).unwrap().contiguous().unwrap().permute(back).unwrap()
        }
        Memory::Piece => {
            let double = Tensor::cat(&[tensor, tensor], 1).unwrap();
            double.narrow(1, 0, tensor.dim(1).unwrap()).unwrap()
        }
    }
}

/// From (N, C, ...) to (N, ..., C), and back.
pub fn permutations(rank: usize) -> (Vec<usize>, Vec<usize>) {
    ([0].into_iter().chain(2..rank).chain([1]).collect(), [0, rank - 1].into_iter().chain(1..rank - 1).collect())
}

/// The variables of a layer.
pub struct Variables {
    pub mean: Var,
    pub var: Var,
    pub weight: Var,
    pub bias: Var,
}

impl Variables {
    pub fn new(channels: usize, dtype: DType) -> Self {
        let of = |seed: u64| normal(channels, 1000 + seed);
        let positive: Vec<_> = of(2).iter().map(|v| 0.5 + v.abs()).collect();
        let var = |values: &[f64]| Var::from_tensor(&tensor(values, &[channels], dtype)).unwrap();
        Self { mean: var(&of(1)), var: var(&positive), weight: var(&of(3)), bias: var(&of(4)) }
    }

    pub fn builder(&self) -> VarBuilder<'static> {
        let of = |(name, var): (&str, &Var)| (name.to_string(), var.as_tensor().clone());
        let named =
            [("running_mean", &self.mean), ("running_var", &self.var), ("weight", &self.weight), ("bias", &self.bias)];
        VarBuilder::from_tensors(HashMap::from_iter(named.map(of)), self.mean.dtype(), &Device::Cpu)
    }

    pub fn ours(&self, config: BatchNormConfig) -> batchnorm_candle::BatchNorm {
        batchnorm_candle::batch_norm(self.mean.dim(0).unwrap(), config, self.builder()).unwrap()
    }

    pub fn theirs(&self, config: BatchNormConfig) -> candle_nn::BatchNorm {
        candle_nn::batch_norm(self.mean.dim(0).unwrap(), config, self.builder()).unwrap()
    }
}

/// What a step gives, and what it leaves; empty where there is nothing.
pub struct Step {
    pub y: Tensor,
    pub named: Vec<(&'static str, Vec<f64>)>,
}

/// Forward, then back from `sum(y * dy)`. `x` is permuted from a variable if it lies so.
pub fn step(layer: &dyn ModuleT, variables: &Variables, x: &Tensor, dy: &Tensor, memory: Memory, train: bool) -> Step {
    let leaf = Var::from_tensor(x).unwrap();
    let x = lying(&leaf, memory);
    let y = layer.forward_t(&x, train).unwrap();
    let gradients = (&y * dy).unwrap().sum_all().unwrap().backward().unwrap();
    let gradient = |var: &Var| gradients.get(var).map(values).unwrap_or_default();
    let named = vec![
        ("y", values(&y)),
        ("dx", gradient(&leaf)),
        ("dgamma", gradient(&variables.weight)),
        ("dbeta", gradient(&variables.bias)),
        ("running mean", values(&variables.mean)),
        ("running variance", values(&variables.var)),
    ];
    Step { y, named }
}

/// Asserts that all results lie within `bound` of those expected, over the largest of each.
#[track_caller]
pub fn assert_near(what: &str, got: &Step, expected: &Step, bound: f64) {
    for ((name, got), (_, expected)) in got.named.iter().zip(&expected.named) {
        assert_eq!(got.len(), expected.len(), "{what}: {name}");
        let size = expected.iter().fold(1e-30f64, |most, v| v.abs().max(most));
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            let off = (got - expected).abs() / size;
            assert!(
                off <= bound,
                "{what}: {name} {i} is {got}, expected {expected}, off by {off:e}, allowed {bound:e}"
            );
        }
    }
}
