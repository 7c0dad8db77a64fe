//! Three hidden layers of 100 sigmoids behind Batch Normalization, with all parameters in one slice, so that one message sums
//! their gradients.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use batchnorm::{Affine, BatchNorm, Gradients, Momentum, Parallelism, Running, Saved, Shape, Variance};
use batchnorm_mpi::SyncBatchNorm;
use mpi::collective::SystemOperation;
use mpi::topology::SimpleCommunicator;
use mpi::traits::*;
use rand::{Rng, RngExt};

use crate::Result;
use crate::data::Images;
use crate::gemm::{Matrix, gemm};

/// Digits to tell apart.
pub const CLASSES: usize = 10;
const HIDDEN: [usize; 3] = [100; 3];

/// Where the parameters of a layer lie: weights, then gamma and beta, or the offsets of the last layer.
struct Layer {
    inputs: usize,
    outputs: usize,
    weights: Range<usize>,
    scale: Range<usize>,
    offset: Range<usize>,
}

struct Norm {
    sync: SyncBatchNorm<f32>,
    saved: Saved<f32>,
    running: Running<f32>,
}

pub struct Network {
    layers: Vec<Layer>,
    /// Of all layers but the last.
    norms: Vec<Norm>,
    parameters: Vec<f32>,
    gradients: Vec<f32>,
}

impl Network {
    /// For batches of which `images` are on this rank and the others on those of `norm`.
    pub fn new(inputs: usize, images: usize, norm: &SimpleCommunicator, rng: &mut impl Rng) -> Result<Self> {
        let widths = [&[inputs][..], &HIDDEN, &[CLASSES]].concat();
        let (mut layers, mut norms, mut parameters) = (Vec::new(), Vec::new(), Vec::new());
        for (l, width) in widths.windows(2).enumerate() {
            let (inputs, outputs) = (width[0], width[1]);
            let is_last = l == HIDDEN.len();
            let weights = parameters.len()..parameters.len() + inputs * outputs;
            // About normal: the sum of twelve uniform ones has the variance 1.
            let normal = |rng: &mut _| (0..12).map(|_| RngExt::random::<f32>(rng)).sum::<f32>() - 6.0;
            parameters.extend(weights.clone().map(|_| 0.1 * normal(rng)));
            let scale = weights.end..weights.end + if is_last { 0 } else { outputs };
            let offset = scale.end..scale.end + outputs;
            parameters.extend(scale.clone().map(|_| 1.0));
            parameters.extend(offset.clone().map(|_| 0.0));
            layers.push(Layer { inputs, outputs, weights, scale, offset });
            if !is_last {
                let plan = BatchNorm::new(Shape::nc(images, outputs)?)?.with_parallelism(Parallelism::Sequential);
                norms.push(Norm {
                    saved: plan.saved(),
                    running: plan.running(Momentum::WeightOfNew(0.1), Variance::Unbiased)?,
                    sync: SyncBatchNorm::new(plan, norm)?,
                });
            }
        }
        let gradients = vec![0.0; parameters.len()];
        Ok(Network { layers, norms, parameters, gradients })
    }

    /// One step of gradient descent on the mean cross-entropy of a batch of `whole` images, of which the ranks of `comm` have
    /// parts.
    pub fn step(
        &mut self,
        pixels: &[f32],
        labels: &[u8],
        whole: usize,
        rate: f32,
        comm: &SimpleCommunicator,
    ) -> Result<()> {
        let Self { layers, norms, parameters, gradients } = self;
        // What enters each layer, and what enters its normalization.
        let (mut inputs, mut sums) = (vec![pixels.to_vec()], Vec::new());
        for (l, layer) in layers.iter().enumerate() {
            let z = layer.product(&inputs[l], parameters);
            if let Some(Norm { sync, saved, running }) = norms.get_mut(l) {
                let affine = Affine::new(&parameters[layer.scale.clone()], &parameters[layer.offset.clone()]);
                let mut y = vec![0.0; z.len()];
                sync.forward_train(&z, affine, &mut y, saved)?;
                running.update(saved)?;
                inputs.push(y.into_iter().map(sigmoid).collect());
            }
            sums.push(z);
        }

        let mut dy = sums.pop().unwrap_or_default();
        let last = layers.len() - 1;
        for (scores, &label) in dy.chunks_exact_mut(CLASSES).zip(labels) {
            scores.iter_mut().zip(&parameters[layers[last].offset.clone()]).for_each(|(s, offset)| *s += offset);
            softmax(scores);
            scores[usize::from(label)] -= 1.0;
            scores.iter_mut().for_each(|s| *s /= whole as f32);
        }
        gradients[layers[last].offset.clone()].fill(0.0);
        for scores in dy.chunks_exact(CLASSES) {
            gradients[layers[last].offset.clone()].iter_mut().zip(scores).for_each(|(g, dy)| *g += dy);
        }
        for (l, layer) in layers.iter().enumerate().rev() {
            if let Some(Norm { sync, saved, .. }) = norms.get_mut(l) {
                let affine = Affine::new(&parameters[layer.scale.clone()], &parameters[layer.offset.clone()]);
                // gamma and beta lie one after the other.
                let both = &mut gradients[layer.scale.start..layer.offset.end];
                let (dgamma, dbeta) = both.split_at_mut(layer.outputs);
                let mut dx = vec![0.0; dy.len()];
                let gradients =
                    Gradients { dx: Some(&mut dx), dgamma: Some(dgamma), dbeta: Some(dbeta), ..Default::default() };
                sync.backward(&sums[l], &dy, saved, affine, gradients)?;
                dy = dx;
            }
            let dy_matrix = Matrix::new(&dy, labels.len(), layer.outputs);
            let x = Matrix::new(&inputs[l], labels.len(), layer.inputs);
            gemm(1.0, x.transposed(), dy_matrix, 0.0, &mut gradients[layer.weights.clone()]);
            if l > 0 {
                let mut dx = vec![0.0; inputs[l].len()];
                gemm(1.0, dy_matrix, layer.weights(parameters).transposed(), 0.0, &mut dx);
                // Through the sigmoid.
                dx.iter_mut().zip(&inputs[l]).for_each(|(dx, a)| *dx *= a * (1.0 - a));
                dy = dx;
            }
        }

        let mut summed = vec![0.0; gradients.len()];
        comm.all_reduce_into(&gradients[..], &mut summed[..], SystemOperation::sum());
        parameters.iter_mut().zip(&summed).for_each(|(p, g)| *p -= rate * g);
        Ok(())
    }

    /// Part of the images told right, by the running statistics.
    pub fn accuracy(&self, images: &Images) -> Result<f64> {
        let mut x = images.pixels.clone();
        for (l, layer) in self.layers.iter().enumerate() {
            let z = layer.product(&x, &self.parameters);
            x = match self.norms.get(l) {
                Some(Norm { sync, running, .. }) => {
                    let scale = &self.parameters[layer.scale.clone()];
                    let affine = Affine::new(scale, &self.parameters[layer.offset.clone()]);
                    let mut y = vec![0.0; z.len()];
                    let plan = sync.plan().with_shape(Shape::nc(images.len(), layer.outputs)?)?;
                    plan.forward_infer(&z, affine, running.population(), &mut y)?;
                    y.into_iter().map(sigmoid).collect()
                }
                None => z,
            };
        }
        let offset = &self.parameters[self.layers[self.layers.len() - 1].offset.clone()];
        let score = |scores: &[f32], class: usize| scores[class] + offset[class];
        let best =
            |scores: &[f32]| (0..CLASSES).max_by(|&a, &b| score(scores, a).total_cmp(&score(scores, b))).unwrap_or(0);
        let told = x.chunks_exact(CLASSES).zip(&images.labels).filter(|(s, l)| best(s) == usize::from(**l));
        Ok(told.count() as f64 / images.len() as f64)
    }

    /// A digest of the parameters' bits.
    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.parameters.iter().for_each(|p| p.to_bits().hash(&mut hasher));
        hasher.finish()
    }
}

impl Layer {
    fn weights<'a>(&self, parameters: &'a [f32]) -> Matrix<'a> {
        Matrix::new(&parameters[self.weights.clone()], self.inputs, self.outputs)
    }

    fn product(&self, x: &[f32], parameters: &[f32]) -> Vec<f32> {
        let images = x.len() / self.inputs;
        let mut z = vec![0.0; images * self.outputs];
        gemm(1.0, Matrix::new(x, images, self.inputs), self.weights(parameters), 0.0, &mut z);
        z
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn softmax(scores: &mut [f32]) {
    // The largest score leaves as exp(0), so no exponential overflows.
    let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|s| *s = (*s - top).exp());
    let sum: f32 = scores.iter().sum();
    scores.iter_mut().for_each(|s| *s /= sum);
}
