//! Two convolutions and a linear layer in burn; whose normalization is between them is an argument.

use batchnorm_burn::{BatchNorm, BatchNormConfig};
use burn::module::Module;
use burn::nn;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor};

/// Digits to tell apart.
pub const CLASSES: usize = 10;

/// Whose normalization it is.
#[derive(Module, Debug)]
pub enum Norm {
    Ours(BatchNorm),
    Burns(nn::BatchNorm),
}

impl Norm {
    pub fn ours(channels: usize, device: &Device) -> Self {
        Self::Ours(BatchNormConfig::new(channels).init(device))
    }

    pub fn burns(channels: usize, device: &Device) -> Self {
        Self::Burns(nn::BatchNormConfig::new(channels).init(device))
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        match self {
            Norm::Ours(norm) => norm.forward(x),
            Norm::Burns(norm) => norm.forward(x),
        }
    }
}

/// Two convolutions, each normalized and followed by a ReLU, the second on half of the rows and columns, and a linear layer.
#[derive(Module, Debug)]
pub struct Network {
    convs: [Conv2d; 2],
    norms: [Norm; 2],
    last: nn::Linear,
}

impl Network {
    const MAPS: [usize; 2] = [8, 16];

    pub fn new([height, width]: [usize; 2], norm: fn(usize, &Device) -> Norm, device: &Device) -> Self {
        let [first, second] = Self::MAPS;
        let padding = nn::PaddingConfig2d::Explicit(1, 1, 1, 1);
        let conv = |from, to, stride: usize| {
            let config = Conv2dConfig::new([from, to], [3, 3]).with_padding(padding.clone()).with_bias(false);
            config.with_stride([stride; 2]).init(device)
        };
        Self {
            convs: [conv(1, first, 1), conv(first, second, 2)],
            norms: Self::MAPS.map(|maps| norm(maps, device)),
            last: nn::LinearConfig::new(second * height.div_ceil(2) * width.div_ceil(2), CLASSES).init(device),
        }
    }

    pub fn forward(&self, mut x: Tensor<4>) -> Tensor<2> {
        for (conv, norm) in self.convs.iter().zip(&self.norms) {
            x = relu(norm.forward(conv.forward(x)));
        }
        self.last.forward(x.flatten(1, 3))
    }

    /// The share of images whose digit it names.
    pub fn accuracy(&self, images: Tensor<4>, labels: Tensor<1, Int>) -> f64 {
        let [count] = labels.dims();
        let named = self.forward(images).argmax(1).squeeze_dim::<1>(1);
        let right = named.equal(labels).int().sum().into_scalar::<i64>();
        right as f64 / count as f64
    }
}
