//! Arguments of what is beside plain passes, good and bad: views of any sizes and strides, masks and lengths, virtual batches,
//! layers to fold into, steps of integers, bits. No call panics or hangs, and one that is refused leaves its outputs as they
//! were.
#![no_main]

use arbitrary::Arbitrary;
use batchnorm::{
    Activation, Affine, BatchNorm, Cotangents, Error, GradientSums, Gradients, Layer, Layout, Moments, Momentum,
    Population, Quantization, RenormLimits, Running, SecondGradients, Shape, Variance, View,
};
use batchnorm_fuzz::{Bits, same_bits};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    last: bool,
    /// Batch, channels and spatial size of the plan.
    sizes: [u8; 3],
    /// The spatial sizes that a view is given, before those of the shape.
    view: Viewed,
    /// Lengths of samples, and masks.
    lengths: Vec<u8>,
    mask: Vec<bool>,
    samples: usize,
    layer: [u8; 4],
    transposed: bool,
    limits: [f64; 2],
    scales: [f64; 2],
    slope: Option<f64>,
    /// What the lengths of slices are off by.
    off: [i8; 4],
    count: u8,
    weight: f64,
}

#[derive(Arbitrary, Debug)]
enum Viewed {
    None,
    Strided(Vec<(u8, u16)>),
    /// Of the shape's sizes.
    Fitting([u16; 3]),
    Blocked(usize),
    Lengths,
    Mask,
}

fuzz_target!(|input: Input| {
    let [n, c, s] = input.sizes.map(|size| usize::from(size % 24));
    let layout = if input.last { Layout::ChannelsLast } else { Layout::ChannelsFirst };
    let Ok(shape) = Shape::new(layout, n, c, &[s]) else { return };
    let bn = BatchNorm::<f32>::new(shape).unwrap();
    let plan = match &input.view {
        Viewed::None => Ok(bn.clone()),
        Viewed::Strided(dims) => {
            let (sizes, strides): (Vec<_>, Vec<_>) =
                dims.iter().map(|&(size, stride)| (usize::from(size), usize::from(stride))).unzip();
            View::strided(&shape, &sizes, &strides).and_then(|view| bn.clone().with_views(view, View::dense(&shape)))
        }
        Viewed::Fitting(strides) => {
            let sizes = if input.last { [n, s, c] } else { [n, c, s] };
            let strides = [strides[0], strides[1], strides[2] % 2 + 1].map(usize::from);
            View::strided(&shape, &sizes, &strides).and_then(|view| bn.clone().with_views(view.clone(), view))
        }
        &Viewed::Blocked(block) => {
            View::blocked(&shape, block).and_then(|view| bn.clone().with_views(view.clone(), view))
        }
        Viewed::Lengths => bn.with_lengths(&input.lengths.iter().map(|&l| l.into()).collect::<Vec<_>>()),
        Viewed::Mask => bn.with_mask(&input.mask),
    };
    if let Ok(plan) = plan {
        passes(&input, &plan);
    }
    beside(&input, bn);
});

/// A length, right or off by a few.
fn about(right: usize, off: i8) -> usize {
    // Most of the time right.
    if off % 2 == 0 { right } else { right.saturating_add_signed((off / 8).into()) }
}

/// More than any view of so small a shape shows.
const MOST: usize = 1 << 22;

fn passes(input: &Input, bn: &BatchNorm<f32>) {
    let (x_len, y_len) = match &input.view {
        Viewed::Strided(_) | Viewed::Fitting(_) | Viewed::Blocked(_) => (MOST, MOST),
        _ => (bn.shape().len(), bn.shape().len()),
    };
    let [x_len, y_len] = [about(x_len, input.off[0]), about(y_len, input.off[1])];
    let (x, dy) = (vec![1.5f32; x_len], vec![0.5f32; y_len]);
    let (mut y, mut dx) = (vec![f32::sentinel(); y_len], vec![f32::sentinel(); x_len]);
    let mut saved = bn.saved();
    let mut gates = vec![0xa5; about(bn.gates_len(), input.off[2])];
    let activation = input.slope.map_or(Activation::None, Activation::LeakyRelu);
    let affine = Affine::none().with_activation(activation);
    let trained = bn.forward_train(&x, affine.with_gates_to(&mut gates), &mut y, &mut saved);
    if trained.is_err() {
        assert!(same_bits(&y, &vec![f32::sentinel(); y_len]) && gates.iter().all(|&bits| bits == 0xa5));
    }
    let gradients = Gradients { dx: Some(&mut dx), ..Default::default() };
    if bn.backward(&x, &dy, &saved, affine.with_gates(&gates), gradients).is_err() {
        assert!(same_bits(&dx, &vec![f32::sentinel(); x_len]));
    }
    halves(input, bn, &x, &dy);
    let mut in_place = dy.clone();
    let from_output = bn.clone().with_backward_from_output(true);
    let refused = from_output.backward_in_place(&x, &mut in_place, &saved, affine, Gradients::default()).is_err();
    assert!(!refused || same_bits(&in_place, &dy));
    let cotangents = Cotangents { dx: &x, dgamma: None, dbeta: None };
    dx.fill(f32::sentinel());
    let second = SecondGradients { x: Some(&mut dx), ..Default::default() };
    if bn.double_backward(&x, &dy, &saved, affine, cotangents, second).is_err() {
        assert!(same_bits(&dx, &vec![f32::sentinel(); x_len]));
    }
    let (bytes, mut bytes_out) = (vec![3i8; x_len], vec![77i8; y_len]);
    let of = |i: usize| Quantization { scale: input.scales[i], zero_point: 5 };
    let (mean, var) = (vec![0.5; bn.shape().channels()], vec![2.0; about(bn.shape().channels(), input.off[3])]);
    let population = Population { mean: &mean, var: &var };
    if bn.forward_infer_quantized(&bytes, of(0), affine, population, &mut bytes_out, of(1)).is_err() {
        assert!(bytes_out.iter().all(|&byte| byte == 77));
    }
    let mut bytes_over = bytes.clone();
    if bn.forward_infer_quantized_in_place(&mut bytes_over, of(0), affine, population, of(1)).is_err() {
        assert_eq!(bytes_over, bytes);
    }
}

/// Whether a call was refused for its arguments, not for want of statistics.
fn refused(result: Result<(), Error>) -> bool {
    result.is_err_and(|error| error != Error::MissingStatistics)
}

/// The halves refuse what the checks ahead of them refuse, and nothing else.
fn halves(input: &Input, bn: &BatchNorm<f32>, x: &[f32], dy: &[f32]) {
    let channels = bn.shape().channels();
    let activation = input.slope.map_or(Activation::None, Activation::LeakyRelu);
    let affine = Affine::none().with_activation(activation);
    let (mut y, mut dx) = (vec![f32::sentinel(); dy.len()], vec![f32::sentinel(); x.len()]);
    let mut dresidual = y.clone();
    let [mut dgamma, mut dbeta] = [2, 3].map(|i| vec![f32::sentinel(); about(channels, input.off[i])]);
    let (mut saved, mut moments, mut sums) =
        (bn.saved(), vec![Moments::default(); channels], vec![GradientSums::default(); channels]);

    let checked = bn.check_forward_halves(x, affine, &y, &saved).is_err();
    let first = bn.moments(x, &mut moments);
    // An empty batch leaves nothing to finish.
    let _ = bn.finish(&moments, &mut saved);
    let second = bn.normalize(x, affine, &saved, &mut y);
    assert_eq!(checked, first.is_err() || refused(second));

    let bn = bn.clone().with_accumulation(input.last);
    let gradients = Gradients {
        dx: Some(&mut dx),
        dgamma: Some(&mut dgamma),
        dbeta: Some(&mut dbeta),
        dresidual: Some(&mut dresidual),
    };
    let checked = refused(bn.check_backward_halves(x, dy, &saved, affine, &gradients));
    let first = bn.gradient_sums(x, dy, &saved, affine, &mut sums);
    let results = [
        bn.input_gradient(x, dy, &saved, affine, &sums, &mut dx),
        bn.parameter_gradients(&saved, &sums, Some(&mut dgamma), Some(&mut dbeta)),
        bn.residual_gradient(x, dy, &saved, affine, &mut dresidual),
    ];
    assert_eq!(checked, refused(first) || results.into_iter().any(refused));
}

fn beside(input: &Input, bn: BatchNorm<f32>) {
    let channels = bn.shape().channels();
    let (mean, var) = (vec![0.5; channels], vec![2.0; about(channels, input.off[3])]);
    let population = Population { mean: &mean, var: &var };
    let [r_max, d_max] = input.limits;
    let mut saved = bn.saved();
    let before = saved.clone();
    let limits = RenormLimits { r_max, d_max };
    if saved.renormalize(population, limits).is_err() {
        assert_eq!(saved, before);
    }
    if bn.freeze(population, &mut saved).is_err() {
        assert!(saved.count() == 0 && !saved.is_frozen());
    }
    let [outputs, inputs, taps, groups] = input.layer.map(usize::from);
    let layer = match input.transposed {
        true => Layer::transposed(inputs, outputs, taps),
        false if taps == 1 => Layer::linear(outputs, inputs),
        false => Layer::convolution(outputs, inputs, taps),
    };
    if let Ok(layer) = layer.with_groups(groups) {
        let weight = vec![1.5f32; about(layer.weights(), input.off[0])];
        let bias = vec![0.5f32; about(outputs, input.off[1])];
        for following in [false, true] {
            let (mut folded, mut with_bias) = (weight.clone(), bias.clone());
            let fold = if following { BatchNorm::fold_into_following } else { BatchNorm::fold_into_preceding };
            if fold(&bn, layer, &mut folded, &mut with_bias, Affine::none(), population).is_err() {
                assert!(same_bits(&folded, &weight) && same_bits(&with_bias, &bias));
            }
        }
    }
    let [mut scale, mut shift] = [2, 1].map(|i| vec![f32::sentinel(); about(channels, input.off[i])]);
    if bn.scale_and_shift(Affine::none(), population, &mut scale, &mut shift).is_err() {
        assert!(scale.iter().chain(&shift).all(|v| v.bits() == f32::sentinel().bits()));
    }
    if let Ok(mut running) = Running::<f32>::new(channels, Momentum::Cumulative, Variance::Unbiased) {
        let before = running.clone();
        let count = u64::from(input.count);
        let moments = vec![Moments { count, mean: input.weight, ..Default::default() }; about(channels, input.off[0])];
        if running.recompute(&moments).is_err() {
            assert_eq!(running, before);
        }
    }
    let len = bn.shape().len();
    match bn.ghost(input.samples) {
        Err(error) => assert_eq!(error, Error::VirtualBatch),
        Ok(ghost) => {
            let [x, dy] = [0, 1].map(|i| vec![1.5; about(len, input.off[i])]);
            let (mut saved, mut y) = (ghost.saved(), dy.clone());
            let trained = ghost.forward_train(&x, Affine::none(), &mut y, &mut saved);
            assert!(trained.is_ok() || same_bits(&y, &dy));
            let mut dx = x.clone();
            let gradients = Gradients { dx: Some(&mut dx), ..Default::default() };
            let refused = ghost.backward(&x, &dy, &saved, Affine::none(), gradients).is_err();
            assert!(!refused || same_bits(&dx, &x));
        }
    }
}
