//! A tensor of more than 2^31 elements: statistics against exact integers, elements against the reference, also beyond what 31
//! bits can index. It takes 4.3 GB and a minute or two, so it runs when asked for:
//!
//! `cargo test --all-features --test big -- --ignored`
#![cfg(all(feature = "half", feature = "rayon"))]

use batchnorm::{Affine, BatchNorm, Gradients, Layout, Population, Shape, reference};
use half::bf16;
use rayon::prelude::*;

const CHANNELS: usize = 24;
/// 2 * 6700 * 6700 * 24 is 2^31 + 7e6.
const SIDE: usize = 6700;

/// An integer that bf16 holds exactly, with a mean of its own for each channel.
fn value(i: usize, c: usize) -> i64 {
    let noise = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 57;
    noise as i64 - 64 + 16 * (c as i64 % 8)
}

fn element(i: usize, c: usize) -> bf16 {
    bf16::from_f32(value(i, c) as f32)
}

fn channel(shape: &Shape, i: usize) -> usize {
    match shape.layout() {
        Layout::ChannelsFirst => i / shape.spatial() % shape.channels(),
        Layout::ChannelsLast => i % shape.channels(),
    }
}

/// Writes the values, and returns the sum and the sum of squares of each channel.
fn fill(shape: &Shape, x: &mut [bf16]) -> Vec<[i64; 2]> {
    const CHUNK: usize = 1 << 16;
    let none = || vec![[0; 2]; shape.channels()];
    let add = |mut sums: Vec<[i64; 2]>, (k, chunk): (usize, &mut [bf16])| {
        for (i, x) in (k * CHUNK..).zip(chunk) {
            let c = channel(shape, i);
            let v = value(i, c);
            *x = bf16::from_f32(v as f32);
            sums[c][0] += v;
            sums[c][1] += v * v;
        }
        sums
    };
    let join = |a: Vec<[i64; 2]>, b: Vec<[i64; 2]>| a.iter().zip(b).map(|(a, b)| [a[0] + b[0], a[1] + b[1]]).collect();
    x.par_chunks_mut(CHUNK).enumerate().fold(none, add).reduce(none, join)
}

#[track_caller]
fn close(what: &str, got: f64, expected: f64, bound: f64) {
    assert!((got - expected).abs() <= bound, "{what}: {got} for {expected}");
}

/// Positions at both ends, around powers of two, and beyond 2^31.
fn samples(len: usize) -> Vec<usize> {
    let around = |at: usize| at.saturating_sub(300)..(at + 300).min(len);
    [0, 1 << 16, 1 << 30, 1 << 31, len - len / 1000, len].into_iter().flat_map(around).collect()
}

fn check(shape: Shape, x: &mut [bf16]) {
    assert!(shape.len() > 1 << 31);
    let (sums, m) = (fill(&shape, x), shape.count() as f64);
    let bn = BatchNorm::<bf16>::new(shape).unwrap();
    let (c, mut saved) = (shape.channels(), bn.saved());
    let gamma: Vec<f32> = (0..c).map(|c| 1.0 + c as f32 / 8.0).collect();
    let beta: Vec<f32> = (0..c).map(|c| c as f32 - 8.0).collect();
    let affine = Affine::new(&gamma, &beta);

    let x = &mut x[..shape.len()];
    let (mut moments, mut dgamma, mut dbeta) = (vec![Default::default(); c], vec![0.0; c], vec![0.0; c]);
    bn.moments(x, &mut moments).unwrap();
    bn.finish(&moments, &mut saved).unwrap();
    // The tensor as its own gradient, so that it is there once.
    let gradients = Gradients { dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
    bn.backward(x, x, &saved, affine, gradients).unwrap();
    let halves = saved.clone();
    bn.forward_train_in_place(x, affine, &mut saved).unwrap();
    assert_eq!(saved, halves);
    for (k, [sum, squares]) in sums.into_iter().enumerate() {
        let (mean, count) = (sum as f64 / m, shape.count() as i128);
        let var = (count * squares as i128 - sum as i128 * sum as i128) as f64 / (m * m);
        let std = (var + bn.eps()).sqrt();
        assert_eq!(moments[k].count, shape.count() as u64);
        close("mean of the moments", moments[k].mean, mean, 1e-12 * mean.abs().max(std));
        close("mean", saved.mean()[k].into(), mean, 1e-7 * mean.abs().max(std));
        close("var", saved.var()[k].into(), var, 1e-6 * var);
        close("dbeta", dbeta[k].into(), sum as f64, 1e-6 * m * std);
        close("dgamma", dgamma[k].into(), m * var / std, 1e-6 * m * std);
    }

    // What was written is what the reference has for each of these elements alone.
    let row = Shape::nc(1, c).unwrap();
    let at_statistics = |i: usize| {
        let mut of_row = vec![bf16::ZERO; c];
        of_row[channel(&shape, i)] = element(i, channel(&shape, i));
        of_row
    };
    for i in samples(shape.len()) {
        let expected = reference::normalize(&row, &at_statistics(i), affine, &saved)[channel(&shape, i)];
        assert_eq!(x[i].to_bits(), expected.to_bits(), "element {i} of {shape:?}");
    }
    let (mean, var) = (vec![0.5; c], vec![2.0; c]);
    let population = Population { mean: &mean, var: &var };
    let before: Vec<_> = samples(shape.len()).into_iter().map(|i| (i, x[i])).collect();
    bn.forward_infer_in_place(x, affine, population).unwrap();
    for (i, before) in before {
        let mut of_row = vec![bf16::ZERO; c];
        of_row[channel(&shape, i)] = before;
        let expected = reference::forward_infer(&row, &of_row, affine, population, bn.eps())[channel(&shape, i)];
        assert_eq!(x[i].to_bits(), expected.to_bits(), "inferred element {i} of {shape:?}");
    }
}

#[test]
#[ignore = "takes 4.3 GB"]
fn more_elements_than_31_bits_count() {
    let shapes = [
        Shape::nchw(2, CHANNELS, SIDE, SIDE),
        Shape::nhwc(2, SIDE, SIDE, CHANNELS),
        // One channel of all.
        Shape::ncl(1, 1, 2 * CHANNELS * SIDE * SIDE),
    ];
    // One allocation for all.
    let shapes = shapes.map(Result::unwrap);
    let mut x = vec![bf16::ZERO; shapes[0].len()];
    shapes.into_iter().for_each(|shape| check(shape, &mut x));
}
