//! Whitening of any values, in groups of any size, with arguments good and bad: no call panics or hangs, one that is refused
//! leaves its outputs as they were, and threads change no bit.
#![no_main]

use arbitrary::Arbitrary;
use batchnorm::whitening::{Method, Whitening};
use batchnorm::{Affine, Error, Gradients, Layer, Layout, Momentum, Parallelism, Shape, Variance};
use batchnorm_fuzz::{Values, same_bits};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    last: bool,
    /// Batch, channels and spatial size.
    sizes: [u8; 3],
    group: u8,
    /// Of Newton's iteration, if that is the method.
    steps: Option<u8>,
    eps: f64,
    weight: f64,
    unbiased: bool,
    values: Values,
    bytes: &'a [u8],
    /// What the lengths of slices are off by.
    off: [i8; 4],
    /// The layer to fold into.
    layer: [u8; 3],
    transposed: bool,
}

/// A length, right or off by a few.
fn about(right: usize, off: i8) -> usize {
    // Most of the time right.
    if off % 2 == 0 { right } else { right.saturating_add_signed((off / 8).into()) }
}

fuzz_target!(|input: Input| {
    let [n, c, s] = input.sizes.map(|size| usize::from(size % 24));
    let layout = if input.last { Layout::ChannelsLast } else { Layout::ChannelsFirst };
    let Ok(shape) = Shape::new(layout, n, c, &[s]) else { return };
    let method = input.steps.map_or(Method::Zca, |steps| Method::IterNorm { steps: (steps % 16).into() });
    let Ok(plan) = Whitening::<f32>::new(shape).unwrap().with_method(method).with_group(input.group.into()) else {
        return;
    };
    let Ok(plan) = plan.clone().with_eps(input.eps).or_else(|_| plan.with_eps(1e-5)) else { return };

    let [of_x, of_y, of_params, of_dx] = input.off;
    let len = |off| about(shape.len(), off);
    let x: Vec<f32> = input.values.fill(input.bytes, 0, len(of_x));
    let params: Vec<f32> = input.values.fill(input.bytes, 1, about(c, of_params));
    let affine = Affine::new(&params, &params);
    let room = || vec![7f32; len(of_y)];
    let forward = |plan: &Whitening<f32>| {
        let (mut y, mut saved) = (room(), plan.saved());
        let result = plan.forward_train(&x, affine, &mut y, &mut saved);
        (y, saved, result)
    };
    let (y, saved, result) = forward(&plan);
    let (shared, ..) = forward(&plan.clone().with_parallelism(Parallelism::Threads(3)));
    assert!(same_bits(&y, &shared));
    if result.is_err() {
        assert!(same_bits(&y, &room()));
    }

    let mut dx = vec![7f32; len(of_dx)];
    let mut sums = [params.clone(), params.clone()];
    let [dgamma, dbeta] = &mut sums;
    let gradients = Gradients { dx: Some(&mut dx), dgamma: Some(dgamma), dbeta: Some(dbeta), ..Default::default() };
    if plan.backward(&x, &x, &saved, affine, gradients).is_err() {
        assert!(dx.iter().all(|&dx| dx == 7.0) && sums.iter().all(|sum| same_bits(sum, &params)));
    }

    let variance = if input.unbiased { Variance::Unbiased } else { Variance::Biased };
    let Ok(mut running) = plan.running(Momentum::WeightOfNew(input.weight), variance) else { return };
    let before = running.clone();
    if running.update(&saved).is_err() {
        assert_eq!(running, before);
    }
    let projection = match plan.projection(&running, affine) {
        Ok(projection) => projection,
        Err(Error::Singular { .. } | Error::Length { .. }) => return,
        Err(error) => panic!("{error}"),
    };
    let mut y = room();
    if plan.forward_infer(&x, &projection, &mut y).is_err() {
        assert!(same_bits(&y, &room()));
    }
    let [outputs, inputs, taps] = input.layer.map(|size| usize::from(size % 24));
    let layer = if input.transposed {
        Layer::transposed(inputs, outputs, taps)
    } else {
        Layer::convolution(outputs, inputs, taps)
    };
    let mut weights: Vec<f32> = input.values.fill(input.bytes, 2, layer.weights());
    let (mut bias, kept) = (vec![7f32; outputs], weights.clone());
    if projection.fold_into_following(layer, &mut weights, &mut bias).is_err() {
        assert!(same_bits(&weights, &kept) && bias.iter().all(|&bias| bias == 7.0));
    }
});
