//! Means, covariances and what is made of them, group by group.

use core::ops::Range;

use faer::Mat;

use super::Map;
use super::matrix::{Method, Root, add_product};
use crate::affine::Affine;
use crate::deployment::fold::Layer;
use crate::element::{Element, Real};
use crate::error::{Error, Result, check_len};
use crate::moments::MergeWeights;
use crate::running::{Momentum, Variance, check_variances};

/// Count, mean and products of deviations of a group of channels, as far as they were seen.
#[derive(Debug, Clone)]
pub(super) struct Moments {
    pub(super) channels: Range<usize>,
    pub(super) count: u64,
    pub(super) mean: Vec<f64>,
    /// The lower triangle.
    pub(super) squares: Mat<f64>,
}

impl Moments {
    pub(super) fn new(channels: Range<usize>) -> Self {
        let n = channels.len();
        Self { channels, count: 0, mean: vec![0.0; n], squares: Mat::zeros(n, n) }
    }

    /// Takes in other values: the pairwise update of Chan, Golub & LeVeque (1979), for pairs of channels.
    pub(super) fn merge(&mut self, other: &Self) {
        if self.count == 0 {
            *self = other.clone();
            return;
        }
        let weights = MergeWeights::new(self.count, other.count);
        let deltas: Vec<f64> = other.mean.iter().zip(&self.mean).map(|(new, old)| new - old).collect();
        for j in 0..deltas.len() {
            for i in j..deltas.len() {
                self.squares[(i, j)] += other.squares[(i, j)] + deltas[i] * deltas[j] * weights.m2;
            }
        }
        self.mean.iter_mut().zip(&deltas).for_each(|(mean, delta)| *mean += delta * weights.mean);
        self.count += other.count;
    }
}

/// The statistics of a group and the matrix that whitens it.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub(super) channels: Range<usize>,
    pub(super) mean: Vec<f64>,
    covariance: Mat<f64>,
    root: Root,
}

/// What a backward pass needs to know of a group: `dY Xc^T`, and the sums of `dY`.
pub(super) struct Crossed {
    pub(super) product: Mat<f64>,
    pub(super) sums: Vec<f64>,
}

impl Crossed {
    pub(super) fn new(channels: usize) -> Self {
        Self { product: Mat::zeros(channels, channels), sums: vec![0.0; channels] }
    }

    /// Adds those of other values.
    pub(super) fn add(&mut self, other: Self) {
        self.product += other.product;
        self.sums.iter_mut().zip(other.sums).for_each(|(sum, other)| *sum += other);
    }
}

impl Group {
    pub(super) fn new(method: Method, moments: &Moments, eps: f64) -> Result<Self> {
        let Moments { channels, count, mean, squares } = moments;
        let of = |i: usize, j: usize| squares[(i.max(j), i.min(j))] / *count as f64;
        let covariance = Mat::from_fn(mean.len(), mean.len(), of);
        Self::from_parts(method, channels.clone(), mean.clone(), covariance, eps)
    }

    pub(super) fn from_parts(
        method: Method,
        channels: Range<usize>,
        mean: Vec<f64>,
        covariance: Mat<f64>,
        eps: f64,
    ) -> Result<Self> {
        let root = Root::new(method, &covariance, eps, &channels)?;
        Ok(Self { channels, mean, covariance, root })
    }

    /// The forward pass.
    pub(super) fn map<E: Element>(&self, affine: Affine<'_, E>) -> Map {
        let of = |row: usize| affine.trained().channel(self.channels.start + row);
        let n = self.mean.len();
        let matrix = Mat::from_fn(n, n, |i, j| of(i).0 * self.root.matrix[(i, j)]);
        Map { channels: self.channels.clone(), matrix, from: self.mean.clone(), to: (0..n).map(|i| of(i).1).collect() }
    }

    /// `sum(dY o Xhat)` of each channel.
    pub(super) fn dgamma(&self, crossed: &Crossed) -> impl Iterator<Item = f64> {
        let w = &self.root.matrix;
        (0..w.nrows()).map(|i| (0..w.ncols()).map(|j| crossed.product[(i, j)] * w[(i, j)]).sum())
    }

    /// The gradient of the input, as maps of `dy` and of `x`.
    pub(super) fn gradient<E: Element>(&self, crossed: &Crossed, affine: Affine<'_, E>, count: u64) -> [Map; 2] {
        let gamma = |row: usize| affine.trained().channel(self.channels.start + row).0;
        let (n, count) = (self.mean.len(), count as f64);
        let of_matrix = Mat::from_fn(n, n, |i, j| gamma(i) * crossed.product[(i, j)]);
        let of_covariance = self.root.gradient(&of_matrix);
        let map = |matrix, from| Map { channels: self.channels.clone(), matrix, from, to: Vec::new() };
        let means = crossed.sums.iter().map(|sum| sum / count).collect();
        [
            map(Mat::from_fn(n, n, |i, j| self.root.matrix[(j, i)] * gamma(j)), means),
            map(Mat::from_fn(n, n, |i, j| of_covariance[(i, j)] / count), self.mean.clone()),
        ]
    }
}

/// What a training forward pass leaves for the backward pass and for running statistics: mean and covariance of each group,
/// and the inverse root.
#[derive(Debug, Clone, Default)]
pub struct Saved {
    pub(super) count: u64,
    pub(super) groups: Vec<Group>,
}

impl Saved {
    /// The number of values per channel; 0 before the first batch.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The mean of each channel.
    pub fn mean(&self) -> Vec<f64> {
        self.groups.iter().flat_map(|group| &group.mean).copied().collect()
    }

    /// The covariance of each group, divided by the number of values and without eps, row after row.
    pub fn covariances(&self) -> Vec<Vec<f64>> {
        self.groups.iter().map(|group| elements(&group.covariance)).collect()
    }

    /// The matrix `W` of each group, row after row.
    pub fn matrices(&self) -> Vec<Vec<f64>> {
        self.groups.iter().map(|group| elements(&group.root.matrix)).collect()
    }
}

/// Row after row.
fn elements(matrix: &Mat<f64>) -> Vec<f64> {
    matrix.row_iter().flat_map(|row| row.iter().copied().collect::<Vec<_>>()).collect()
}

/// Running mean and covariance of each group, in f64.
///
/// ```
/// use batchnorm::whitening::Whitening;
/// use batchnorm::{Affine, Momentum, Shape, Variance};
/// # let (x, mut y) = ([1.0f32, 1.1, 2.0, 1.9, 3.0, 3.2, 4.0, 3.8], [0f32; 8]);
/// let plan = Whitening::<f32>::new(Shape::nc(4, 2)?)?;
/// let (mut saved, mut running) = (plan.saved(), plan.running(Momentum::WeightOfNew(0.1), Variance::Unbiased)?);
/// plan.forward_train(&x, Affine::none(), &mut y, &mut saved)?;
/// running.update(&saved)?;
/// let projection = plan.projection(&running, Affine::none())?;
/// plan.forward_infer(&x, &projection, &mut y)?;
/// # Ok::<(), batchnorm::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Running {
    mean: Vec<f64>,
    /// With their channels.
    covariances: Vec<(Range<usize>, Mat<f64>)>,
    batches: u64,
    momentum: Momentum,
    variance: Variance,
}

impl Running {
    pub(super) fn new(
        groups: impl Iterator<Item = Range<usize>>,
        momentum: Momentum,
        variance: Variance,
    ) -> Result<Self> {
        momentum.check()?;
        let covariances: Vec<_> =
            groups.map(|group| (group.clone(), Mat::identity(group.len(), group.len()))).collect();
        let channels = covariances.iter().map(|(group, _)| group.len()).sum();
        Ok(Self { mean: vec![0.0; channels], covariances, batches: 0, momentum, variance })
    }

    /// Moves the running statistics towards those of a batch, the covariance as [`Variance`] says for its diagonal.
    ///
    /// # Errors
    /// [`Error::MissingStatistics`] if no batch filled `saved`; [`Error::WhiteningGroups`] for other groups;
    /// [`Error::UnbiasedFromOne`]. The statistics are unchanged then.
    pub fn update(&mut self, saved: &Saved) -> Result<()> {
        let correction = self.variance.correction(saved.count)?;
        self.check_groups("saved", saved.groups.iter().map(|group| group.channels.clone()))?;
        self.batches = self.batches.saturating_add(1);
        let moved = self.momentum.mover(self.batches);
        for (group, (channels, covariance)) in saved.groups.iter().zip(&mut self.covariances) {
            for (mean, new) in self.mean[channels.clone()].iter_mut().zip(&group.mean) {
                *mean = moved(*mean, *new);
            }
            let of = |i, j| moved(covariance[(i, j)], group.covariance[(i, j)] * correction);
            *covariance = Mat::from_fn(channels.len(), channels.len(), of);
        }
        Ok(())
    }

    /// Continues from a checkpoint: `mean` has a value per channel and `covariances` a matrix per group, row after row, as
    /// [`Running::mean`] and [`Running::covariances`] gave them after `batches` batches.
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::Variance`] for a variance that is negative or NaN; [`Error::Covariance`] for a matrix that is not
    /// symmetric. The statistics are unchanged then.
    pub fn restore(&mut self, mean: &[f64], covariances: &[Vec<f64>], batches: u64) -> Result<()> {
        check_len("mean", self.mean.len(), mean.len())?;
        check_len("covariances", self.covariances.len(), covariances.len())?;
        let mut restored = Vec::with_capacity(covariances.len());
        for ((channels, _), given) in self.covariances.iter().zip(covariances) {
            let n = channels.len();
            check_len("covariance", n * n, given.len())?;
            let of = |i: usize, j: usize| given[i * n + j];
            let pairs = (0..n).flat_map(|i| (0..i).map(move |j| (j, i)));
            for (first, second) in pairs {
                let got = [of(first, second), of(second, first)];
                if got[0] != got[1] {
                    return Err(Error::Covariance {
                        first: channels.start + first,
                        second: channels.start + second,
                        got,
                    });
                }
            }
            restored.push((channels.clone(), Mat::from_fn(n, n, of)));
        }
        check_variances(&variances(&restored))?;
        self.mean.copy_from_slice(mean);
        (self.covariances, self.batches) = (restored, batches);
        Ok(())
    }

    /// The running mean of each channel.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// The running covariance of each group, row after row.
    pub fn covariances(&self) -> Vec<Vec<f64>> {
        self.covariances.iter().map(|(_, covariance)| elements(covariance)).collect()
    }

    /// The number of batches seen.
    pub fn batches(&self) -> u64 {
        self.batches
    }

    pub(super) fn check_groups(&self, what: &'static str, got: impl Iterator<Item = Range<usize>>) -> Result<()> {
        check_groups(what, self.covariances.iter().map(|(channels, _)| channels.clone()), got)
    }

    pub(super) fn projection<E: Element>(&self, method: Method, affine: Affine<'_, E>, eps: f64) -> Result<Projection> {
        check_variances(&variances(&self.covariances))?;
        let maps = self.covariances.iter().map(|(channels, covariance)| {
            let mean = self.mean[channels.clone()].to_vec();
            Ok(Group::from_parts(method, channels.clone(), mean, covariance.clone(), eps)?.map(affine))
        });
        Ok(Projection { maps: maps.collect::<Result<_>>()? })
    }
}

/// The diagonals of covariance matrices, one after the other.
fn variances(covariances: &[(Range<usize>, Mat<f64>)]) -> Vec<f64> {
    covariances.iter().flat_map(|(channels, matrix)| (0..channels.len()).map(|i| matrix[(i, i)])).collect()
}

/// Refuses groups other than those expected.
pub(super) fn check_groups(
    what: &'static str,
    expected: impl Iterator<Item = Range<usize>>,
    got: impl Iterator<Item = Range<usize>>,
) -> Result<()> {
    // All groups are as large as the first, but for the last.
    let of = |groups: &mut dyn Iterator<Item = Range<usize>>| {
        let first = groups.next().unwrap_or(0..0);
        let end = first.end;
        (groups.last().map_or(end, |last| last.end), first.len())
    };
    let [expected, got] = [of(&mut { expected }), of(&mut { got })];
    if expected == got { Ok(()) } else { Err(Error::WhiteningGroups { what, expected, got }) }
}

/// Inference as a matrix per group: `y = A (x - mean) + beta`, `A` the matrix `W` of the running covariance, its rows multiplied
/// by gamma.
#[derive(Debug, Clone)]
pub struct Projection {
    pub(super) maps: Vec<Map>,
}

impl Projection {
    /// The matrix `A` of each group, row after row.
    pub fn matrices(&self) -> Vec<Vec<f64>> {
        self.maps.iter().map(|map| elements(&map.matrix)).collect()
    }

    /// The offset `b = beta - A mean` of each channel: `y = A x + b`.
    pub fn offsets(&self) -> Vec<f64> {
        let of_row = |map: &Map, i: usize| (0..map.from.len()).map(|j| map.matrix[(i, j)] * map.from[j]).sum::<f64>();
        self.maps.iter().flat_map(|map| map.to.iter().enumerate().map(|(i, to)| to - of_row(map, i))).collect()
    }

    /// Folds inference into the linear layer or convolution after it, which then gives alone what it gave with whitening: with
    /// `y = A x + b`, `b = beta - A mean`,
    ///
    /// ```text
    /// W' = W A      b' = b_layer + W b
    /// ```
    ///
    /// for each of a convolution's taps. Exact only if that layer pads nothing. Computed in f64 and rounded once.
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::LayerChannels`]; [`Error::NotFoldable`] for a transposed convolution and one in groups.
    pub fn fold_into_following<P: Real>(&self, layer: Layer, weight: &mut [P], bias: &mut [P]) -> Result<()> {
        let channels = self.maps.iter().map(|map| map.channels.len()).sum();
        let (inputs, taps) = layer.joined()?;
        layer.check(channels, inputs, weight, bias)?;
        for (weights, bias) in weight.chunks_exact_mut(inputs.saturating_mul(taps).max(1)).zip(bias) {
            let mut shift = 0.0;
            for map in &self.maps {
                let of_group = &mut weights[map.channels.start * taps..map.channels.end * taps];
                let n = map.channels.len();
                // The layer's weights of the group as a matrix with a row for each tap.
                let old = Mat::from_fn(taps, n, |tap, i| of_group[i * taps + tap].to_f64());
                let mut new = Mat::zeros(taps, n);
                add_product(new.as_mut(), old.as_ref(), map.matrix.as_ref(), 1.0);
                for tap in 0..taps {
                    for i in 0..n {
                        of_group[i * taps + tap] = P::from_f64(new[(tap, i)]);
                        shift += old[(tap, i)] * map.to[i] - new[(tap, i)] * map.from[i];
                    }
                }
            }
            *bias = P::from_f64(bias.to_f64() + shift);
        }
        Ok(())
    }
}
