//! One training run, and what is measured on the way.

use crate::data::{Data, Images};
use crate::layers::BATCH;
use crate::network::{CLASSES, Network};
use batchnorm::Error;
use rand::Rng;
use rand::seq::SliceRandom;
use std::time::{Duration, Instant};

/// Measurements after the one at step zero.
const POINTS: u64 = 50;

/// The percentiles that the paper shows.
pub const PERCENTILES: [f32; 3] = [15.0, 50.0, 85.0];

/// Everything measured at one step, on all of the test images and by the population statistics,
/// which before the first step are mean 0 and variance 1. Nothing is smoothed, and the images are
/// the same every time, so whatever moves is the network.
#[derive(Clone, Copy)]
pub struct Point {
    pub step: u64,
    /// What training took up to it, without the measurements.
    pub seconds: f64,
    /// Part of the images told right.
    pub accuracy: f64,
    /// `PERCENTILES` of the input of the watched unit.
    pub input: [f32; 3],
}

/// Trains `network` and measures it at squares of equal parts, so most often early, where most
/// happens. Calls `tick` after each step.
pub fn run(
    mut network: Network,
    data: &Data,
    (steps, rate): (u64, f32),
    rng: &mut impl Rng,
    tick: impl Fn(),
) -> Result<Vec<Point>, Error> {
    let mut batches = Batches::new(&data.train);
    let mut points: Vec<Point> = Vec::new();
    let mut spent = Duration::ZERO;
    for step in 0..=steps {
        let wanted = |i: u64| (steps * i * i).div_ceil(POINTS * POINTS);
        if (0..=POINTS).any(|i| wanted(i) == step) {
            points.push(Point { step, seconds: spent.as_secs_f64(), ..measure(&mut network, &data.test)? });
        }
        if step < steps {
            let (pixels, labels) = batches.next(rng);
            let begin = Instant::now();
            network.step(pixels, labels, rate)?;
            spent += begin.elapsed();
            tick();
        }
    }
    Ok(points)
}

fn measure(network: &mut Network, test: &Images) -> Result<Point, Error> {
    /// Images in one call, to bound the memory that a large test set takes.
    const AT_ONCE: usize = 500;
    let mut right = 0;
    let mut inputs = Vec::with_capacity(test.len());
    let chunks = test.pixels.chunks(AT_ONCE * test.size);
    for (pixels, labels) in chunks.zip(test.labels.chunks(AT_ONCE)) {
        let scores = network.infer(pixels)?.chunks_exact(CLASSES);
        let best = |scores: &[f32]| (0..CLASSES).max_by(|&a, &b| scores[a].total_cmp(&scores[b]));
        let told = scores.zip(labels);
        right += told.filter(|(s, l)| best(s) == Some(usize::from(**l))).count();
        inputs.extend(network.watched());
    }
    inputs.sort_by(f32::total_cmp);
    let accuracy = right as f64 / test.len() as f64;
    Ok(Point { step: 0, seconds: 0.0, accuracy, input: PERCENTILES.map(|p| percentile(&inputs, p)) })
}

/// By linear interpolation between the two nearest of the sorted, not empty `values`.
fn percentile(values: &[f32], percent: f32) -> f32 {
    let at = percent / 100.0 * (values.len() - 1) as f32;
    let (low, high) = (values[at.floor() as usize], values[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

/// Batches without end, the images shuffled anew for each round; what does not fill a batch at
/// the end of a round is left out of it.
pub struct Batches<'a> {
    images: &'a Images,
    order: Vec<usize>,
    used: usize,
    pixels: Vec<f32>,
    labels: Vec<u8>,
}

impl<'a> Batches<'a> {
    pub fn new(images: &'a Images) -> Self {
        Batches {
            images,
            order: (0..images.len()).collect(),
            used: images.len(),
            pixels: Vec::new(),
            labels: Vec::new(),
        }
    }

    pub fn next(&mut self, rng: &mut impl Rng) -> (&[f32], &[u8]) {
        if self.order.len() - self.used < BATCH {
            self.order.shuffle(rng);
            self.used = 0;
        }
        self.pixels.clear();
        self.labels.clear();
        for &i in &self.order[self.used..][..BATCH] {
            self.pixels.extend_from_slice(self.images.image(i));
            self.labels.push(self.images.labels[i]);
        }
        self.used += BATCH;
        (&self.pixels, &self.labels)
    }
}
