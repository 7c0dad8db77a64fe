//! The two networks, each with or without a normalization, and one step of gradient descent.

use crate::layers::{BATCH, Bias, Conv, Dense, Dims, Elementwise, Layer, Pool};
use batchnorm::Error;
use rand::Rng;

/// Digits to tell apart.
pub const CLASSES: usize = 10;

/// Units of each hidden layer of the paper's network.
const HIDDEN: usize = 100;

/// Makes what stands before each nonlinearity: a normalization, or a bias.
pub type MakeNorm<'a> = &'a dyn Fn(Dims) -> Result<Box<dyn Layer>, Error>;

pub struct Network {
    inputs: usize,
    layers: Vec<Box<dyn Layer>>,
    /// What enters each layer, then what leaves the last one.
    values: Vec<Vec<f32>>,
    /// The layer whose input `watched` gives.
    watch: usize,
}

impl Network {
    fn new(inputs: usize, layers: Vec<Box<dyn Layer>>, watch: usize) -> Self {
        let values = vec![Vec::new(); layers.len() + 1];
        Network { inputs, layers, values, watch }
    }

    /// Section 4.1 of the paper: three hidden layers of 100 sigmoids, small Gaussian weights.
    /// Watches the last sigmoids.
    pub fn sigmoids(inputs: usize, norm: MakeNorm, rng: &mut impl Rng) -> Result<Self, Error> {
        let mut layers: Vec<Box<dyn Layer>> = Vec::new();
        let mut width = inputs;
        for _ in 0..3 {
            layers.push(Box::new(Dense::new(width, HIDDEN, 0.1, rng)));
            layers.push(norm([HIDDEN, 1, 1])?);
            layers.push(Box::new(Elementwise::sigmoid(HIDDEN)));
            width = HIDDEN;
        }
        let watch = layers.len() - 1;
        layers.push(Box::new(Dense::new(width, CLASSES, 0.1, rng)));
        layers.push(Box::new(Bias::new([CLASSES, 1, 1])));
        Ok(Self::new(inputs, layers, watch))
    }

    /// Two rounds of convolution, normalization, ReLU and pooling, then a linear layer: the same
    /// kernels on NCHW maps. Watches the last ReLUs.
    pub fn convolutions(image: Dims, norm: MakeNorm, rng: &mut impl Rng) -> Result<Self, Error> {
        let mut layers: Vec<Box<dyn Layer>> = Vec::new();
        let mut dims = image;
        for maps in [8, 16] {
            let conv = Conv::new(dims, maps, rng);
            dims[0] = maps;
            layers.push(Box::new(conv));
            layers.push(norm(dims)?);
            layers.push(Box::new(Elementwise::relu(dims.iter().product())));
            let pool = Pool::new(dims);
            dims = pool.dims();
            layers.push(Box::new(pool));
        }
        let watch = layers.len() - 2;
        let features = dims.iter().product();
        layers.push(Box::new(Dense::new(features, CLASSES, 0.1, rng)));
        layers.push(Box::new(Bias::new([CLASSES, 1, 1])));
        Ok(Self::new(image.iter().product(), layers, watch))
    }

    /// Runs `x` through the layers, each fed by `pass(layer, input, output)`.
    fn forward(
        &mut self,
        x: &[f32],
        mut pass: impl FnMut(&mut dyn Layer, &[f32], &mut [f32]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let images = x.len() / self.inputs;
        self.values[0].clear();
        self.values[0].extend_from_slice(x);
        for (i, layer) in self.layers.iter_mut().enumerate() {
            let (before, after) = self.values.split_at_mut(i + 1);
            let y = &mut after[0];
            y.resize(images * layer.outputs(), 0.0);
            pass(layer.as_mut(), &before[i], y)?;
        }
        Ok(())
    }

    /// One score for each class and image, by the population statistics where there is a `Norm`.
    pub fn infer(&mut self, x: &[f32]) -> Result<&[f32], Error> {
        self.forward(x, |layer, x, y| layer.infer(x, y))?;
        Ok(&self.values[self.layers.len()])
    }

    /// The inputs of unit zero of the watched layer in the last pass, one for each image.
    pub fn watched(&self) -> impl Iterator<Item = f32> {
        let units = self.layers[self.watch].outputs();
        self.values[self.watch].iter().step_by(units).copied()
    }

    /// One step of stochastic gradient descent on the mean cross-entropy of a batch.
    pub fn step(&mut self, x: &[f32], labels: &[u8], rate: f32) -> Result<(), Error> {
        debug_assert_eq!(labels.len(), BATCH);
        self.forward(x, |layer, x, y| layer.train(x, y))?;
        let mut dy = self.values[self.layers.len()].clone();
        for (scores, &label) in dy.chunks_exact_mut(CLASSES).zip(labels) {
            softmax(scores);
            scores[usize::from(label)] -= 1.0;
            scores.iter_mut().for_each(|s| *s /= labels.len() as f32);
        }
        let mut dx = Vec::new();
        for (i, layer) in self.layers.iter_mut().enumerate().rev() {
            let (x, y) = (&self.values[i], &self.values[i + 1]);
            dx.resize(x.len(), 0.0);
            layer.backward(rate, x, y, &dy, (i > 0).then_some(&mut dx))?;
            std::mem::swap(&mut dx, &mut dy);
        }
        Ok(())
    }
}

/// Scores to probabilities.
pub fn softmax(scores: &mut [f32]) {
    // The largest score leaves as exp(0), so no exponential overflows.
    let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|s| *s = (*s - top).exp());
    let sum: f32 = scores.iter().sum();
    scores.iter_mut().for_each(|s| *s /= sum);
}
