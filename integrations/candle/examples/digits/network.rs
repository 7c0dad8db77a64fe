//! Two rounds of convolution, Batch Normalization, ReLU and pooling, then a linear layer, in candle; whose normalization is an
//! argument.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{Conv2d, Conv2dConfig, Linear, Module, ModuleT, Optimizer, SGD, VarBuilder, VarMap};
use rand::{Rng, RngExt};

/// Digits to tell apart.
pub const CLASSES: usize = 10;

/// Makes a layer for so many channels.
pub type Norm = fn(usize, VarBuilder) -> Result<Box<dyn ModuleT>>;

pub struct Network {
    rounds: Vec<(Conv2d, Box<dyn ModuleT>)>,
    output: Linear,
    optimizer: SGD,
}

impl Network {
    pub fn new([height, width]: [usize; 2], norm: Norm, rate: f64, rng: &mut impl Rng) -> Result<Self> {
        let variables = VarMap::new();
        let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
        let (mut rounds, mut channels) = (Vec::new(), 1);
        for (maps, name) in [(16, "round1"), (32, "round2")] {
            let config = Conv2dConfig { padding: 1, ..Default::default() };
            let conv = candle_nn::conv2d_no_bias(channels, maps, 3, config, vb.pp(name).pp("conv"))?;
            rounds.push((conv, norm(maps, vb.pp(name).pp("norm"))?));
            channels = maps;
        }
        let output = candle_nn::linear(channels * (height / 4) * (width / 4), CLASSES, vb.pp("output"))?;
        {
            // By name, so that the same seed gives the same network.
            let data = variables.data().lock().map_err(|_| candle_core::Error::msg("a thread panicked"))?;
            let mut named: Vec<_> = data.iter().collect();
            named.sort_by_key(|(name, _)| *name);
            for (name, var) in named {
                let inputs: usize = var.dims().iter().skip(1).product();
                let deviation = (2.0 / inputs as f32).sqrt();
                if var.rank() > 1 {
                    let values: Vec<f32> = (0..var.elem_count()).map(|_| deviation * normal(rng)).collect();
                    var.set(&Tensor::from_vec(values, var.dims(), &Device::Cpu)?)?;
                } else if name.starts_with("output") {
                    var.set(&var.zeros_like()?)?;
                }
            }
        }
        Ok(Self { rounds, output, optimizer: SGD::new(variables.all_vars(), rate)? })
    }

    fn forward(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let mut x = images.clone();
        for (conv, norm) in &self.rounds {
            x = norm.forward_t(&conv.forward(&x)?, train)?.relu()?.max_pool2d(2)?;
        }
        self.output.forward(&x.flatten_from(1)?)
    }

    /// One step on a batch; its loss before the step.
    pub fn step(&mut self, images: &Tensor, labels: &Tensor) -> Result<f32> {
        let loss = candle_nn::loss::cross_entropy(&self.forward(images, true)?, labels)?;
        self.optimizer.backward_step(&loss)?;
        loss.to_scalar()
    }

    /// Percent told right.
    pub fn accuracy(&self, images: &Tensor, labels: &Tensor) -> Result<f64> {
        let told = self.forward(images, false)?.argmax(D::Minus1)?;
        let right = told.eq(labels)?.to_dtype(DType::F64)?.mean_all()?;
        Ok(100.0 * right.to_scalar::<f64>()?)
    }
}

/// About normal: mean 0, deviation 1.
fn normal(rng: &mut impl Rng) -> f32 {
    (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0
}
