//! Whitening against what defines it: covariances worked out value by value, finite differences, Batch Normalization.

mod common;

use batchnorm::whitening::{Method, Projection, Running, Saved, Whitening};
use batchnorm::{
    Affine, BatchNorm, Element, Error, Gradients, Layer, Layout, Momentum, Parallelism, Real, Shape, Variance,
};
use common::{Data, assert_bits, in_pool, length};
use proptest::prelude::*;

const METHODS: [Method; 2] = [Method::Zca, Method::IterNorm { steps: 5 }];

/// Both layouts, groups that leave a smaller one, several blocks, planes that end inside of one.
fn shapes() -> Vec<(Shape, usize)> {
    let shapes = [
        (Shape::nc(40, 6), 4),
        (Shape::nchw(5, 6, 3, 5), 4),
        (Shape::nhwc(5, 3, 5, 6), 4),
        (Shape::nchw(3, 5, 40, 41), 64),
        (Shape::nlc(2, 20_000, 7), 3),
        (Shape::nc(500, 130), 64),
        (Shape::ncl(2, 1, 300), 64),
    ];
    shapes.map(|(shape, group)| (shape.unwrap(), group)).into()
}

fn offset(shape: &Shape, channel: usize, position: usize) -> usize {
    let (channels, spatial) = (shape.channels(), shape.spatial());
    match shape.layout() {
        Layout::ChannelsFirst => (position / spatial * channels + channel) * spatial + position % spatial,
        Layout::ChannelsLast => position * channels + channel,
    }
}

/// Channels that follow each other in part, around means of their own.
fn correlated<E: Element>(shape: &Shape, seed: u64) -> Vec<E> {
    let noise: Vec<f64> = Data::Normal.fill(shape.len(), seed);
    let mut x = vec![E::default(); shape.len()];
    for position in 0..shape.count() {
        for channel in 0..shape.channels() {
            let own = noise[offset(shape, channel, position)];
            let next = noise[offset(shape, (channel + 1) % shape.channels(), position)];
            let value = (1.0 + 0.1 * (channel % 5) as f64) * own + 0.5 * next + 3.0 * (channel % 3) as f64;
            x[offset(shape, channel, position)] = E::from_param(E::Param::from_f64(value));
        }
    }
    x
}

fn wide<E: Element>(values: &[E]) -> Vec<f64> {
    values.iter().map(|v| v.to_param().to_f64()).collect()
}

/// The mean of a channel, and the covariance of two, by their definitions.
fn mean(shape: &Shape, x: &[f64], channel: usize) -> f64 {
    (0..shape.count()).map(|p| x[offset(shape, channel, p)]).sum::<f64>() / shape.count() as f64
}

fn covariance(shape: &Shape, x: &[f64], a: usize, b: usize) -> f64 {
    let (mean_a, mean_b) = (mean(shape, x, a), mean(shape, x, b));
    let product = |p| (x[offset(shape, a, p)] - mean_a) * (x[offset(shape, b, p)] - mean_b);
    (0..shape.count()).map(product).sum::<f64>() / shape.count() as f64
}

struct Forward<E> {
    y: Vec<E>,
    saved: Saved,
}

fn forward<E: Element>(plan: &Whitening<E>, x: &[E], affine: Affine<'_, E>) -> Forward<E> {
    let mut forward = Forward { y: vec![E::default(); x.len()], saved: plan.saved() };
    plan.forward_train(x, affine, &mut forward.y, &mut forward.saved).unwrap();
    forward
}

struct Backward<E: Element> {
    dx: Vec<E>,
    dgamma: Vec<E::Param>,
    dbeta: Vec<E::Param>,
}

fn backward<E: Element>(plan: &Whitening<E>, x: &[E], dy: &[E], saved: &Saved, affine: Affine<'_, E>) -> Backward<E> {
    let params = || vec![E::Param::default(); plan.shape().channels()];
    let mut run = Backward { dx: vec![E::default(); x.len()], dgamma: params(), dbeta: params() };
    let (dgamma, dbeta) = (Some(&mut run.dgamma[..]), Some(&mut run.dbeta[..]));
    let gradients = Gradients { dx: Some(&mut run.dx), dgamma, dbeta, ..Default::default() };
    plan.backward(x, dy, saved, affine, gradients).unwrap();
    run
}

#[test]
fn mean_and_covariance_are_what_they_are_defined_as() {
    for (shape, group) in shapes() {
        let plan = Whitening::<f64>::new(shape).unwrap().with_group(group).unwrap();
        let x = correlated::<f64>(&shape, 1);
        let saved = forward(&plan, &x, Affine::none()).saved;
        assert_eq!(saved.count(), shape.count() as u64);
        for (channel, &got) in saved.mean().iter().enumerate() {
            assert!((got - mean(&shape, &x, channel)).abs() < 1e-13, "{shape:?}");
        }
        for (channels, got) in plan.groups().zip(saved.covariances()) {
            let n = channels.len();
            for (i, got) in got.iter().enumerate() {
                let expected = covariance(&shape, &x, channels.start + i / n, channels.start + i % n);
                assert!((got - expected).abs() < 1e-12, "{shape:?} {channels:?} {i}: {got} {expected}");
            }
        }
    }
}

#[test]
fn a_large_mean_costs_no_digits() {
    let shape = Shape::nchw(4, 3, 50, 50).unwrap();
    // Small integers: exact with and without what is added.
    let small: Vec<f32> = correlated::<f32>(&shape, 2).iter().map(|x| (x * 8.0).round()).collect();
    let large: Vec<f32> = small.iter().map(|x| x + 4_194_304.0).collect();
    let plan = Whitening::<f32>::new(shape).unwrap();
    let [small, large] = [&small, &large].map(|x| forward(&plan, x, Affine::none()));
    for (small, large) in small.saved.covariances()[0].iter().zip(&large.saved.covariances()[0]) {
        assert!((small - large).abs() < 1e-11 * small.abs().max(1.0), "{small} {large}");
    }
    for (small, large) in small.y.iter().zip(&large.y) {
        assert!((small - large).abs() < 1e-6, "{small} {large}");
    }
}

/// The covariance of what comes out, which is to be the identity.
fn whitens<E: Element>(within: f64) {
    for (shape, group) in shapes() {
        let plan = Whitening::<E>::new(shape).unwrap().with_group(group).unwrap().with_eps(0.0).unwrap();
        let y = wide(&forward(&plan, &correlated(&shape, 3), Affine::none()).y);
        for channels in plan.groups() {
            for a in channels.clone() {
                assert!(mean(&shape, &y, a).abs() < within);
                for b in channels.clone() {
                    let expected = if a == b { 1.0 } else { 0.0 };
                    let got = covariance(&shape, &y, a, b);
                    assert!((got - expected).abs() < within, "{shape:?} {a} {b}: {got}");
                }
            }
        }
    }
}

#[test]
fn what_comes_out_is_white() {
    whitens::<f32>(1e-5);
    whitens::<f64>(1e-11);
}

/// f32, bf16 and f16 are computed as f64 and rounded.
fn rounds<E: Element>() {
    for (shape, group) in shapes() {
        let x = correlated::<E>(&shape, 4);
        let dy: Vec<E> = Data::Normal.fill(shape.len(), 5);
        for method in METHODS {
            let narrow = Whitening::<E>::new(shape).unwrap().with_group(group).unwrap().with_method(method).unwrap();
            let exact = Whitening::<f64>::new(shape).unwrap().with_group(group).unwrap().with_method(method).unwrap();
            let got = forward(&narrow, &x, Affine::none());
            let expected = forward(&exact, &wide(&x), Affine::none());
            let rounded = |v: &f64| E::from_param(E::Param::from_f64(*v));
            assert_eq!(got.y, expected.y.iter().map(rounded).collect::<Vec<_>>(), "{shape:?}");
            let got = backward(&narrow, &x, &dy, &got.saved, Affine::none());
            let expected = backward(&exact, &wide(&x), &wide(&dy), &expected.saved, Affine::none());
            assert_eq!(got.dx, expected.dx.iter().map(rounded).collect::<Vec<_>>(), "{shape:?}");
        }
    }
}

#[test]
fn narrow_elements_are_rounded_once_all_is_done() {
    rounds::<f32>();
    #[cfg(feature = "half")]
    {
        rounds::<half::bf16>();
        rounds::<half::f16>();
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for (shape, group) in shapes() {
        // Not f32, whose rounding would hide what differs.
        let x = correlated::<f64>(&shape, 6);
        let dy: Vec<f64> = Data::Normal.fill(shape.len(), 7);
        for method in METHODS {
            let run = |parallelism| {
                let plan = Whitening::<f64>::new(shape).unwrap().with_group(group).unwrap();
                let plan = plan.with_method(method).unwrap().with_parallelism(parallelism);
                let Forward { y, saved } = forward(&plan, &x, Affine::none());
                let Backward { dx, dgamma, dbeta } = backward(&plan, &x, &dy, &saved, Affine::none());
                [saved.mean(), saved.covariances().concat(), saved.matrices().concat(), y, dx, dgamma, dbeta].concat()
            };
            let alone = run(Parallelism::Sequential);
            for threads in [2, 3, 16] {
                let shared = in_pool(threads, || run(Parallelism::Threads(threads)));
                assert_bits(&format!("{shape:?} {method:?} {threads} threads"), &shared, &alone);
            }
        }
    }
}

#[test]
fn iternorm_tends_to_zca() {
    let shape = Shape::nchw(4, 6, 8, 8).unwrap();
    let x = correlated::<f64>(&shape, 8);
    let plan = Whitening::<f64>::new(shape).unwrap();
    let exact = forward(&plan, &x, Affine::none()).y;
    let distance = |steps| {
        let near = forward(&plan.clone().with_method(Method::IterNorm { steps }).unwrap(), &x, Affine::none()).y;
        near.iter().zip(&exact).fold(0.0, |most: f64, (near, exact)| most.max((near - exact).abs()))
    };
    let distances = [0, 3, 5, 7, 8].map(distance);
    assert!(distances.is_sorted_by(|a, b| a > b), "{distances:?}");
    // The iteration as the paper writes it is nowhere near after 30 steps.
    let many = [10, 30, 100].map(distance);
    assert!(many.iter().all(|&distance| distance < 1e-12), "{many:?}");
}

/// The derivative of `sum(y * dy)` with respect to one value, by central differences of four points.
fn difference(loss: impl Fn(f64) -> f64) -> f64 {
    let h = 1e-3;
    (8.0 * (loss(h) - loss(-h)) - (loss(2.0 * h) - loss(-2.0 * h))) / (12.0 * h)
}

fn check_gradients(plan: &Whitening<f64>, x: &[f64], what: &str) {
    let shape = *plan.shape();
    let dy: Vec<f64> = Data::Normal.fill(x.len(), 9);
    let gamma: Vec<f64> = (0..shape.channels()).map(|c| 0.5 + 0.25 * c as f64).collect();
    let beta: Vec<f64> = (0..shape.channels()).map(|c| 0.1 * c as f64).collect();
    let loss = |x: &[f64], gamma: &[f64], beta: &[f64]| -> f64 {
        forward(plan, x, Affine::new(gamma, beta)).y.iter().zip(&dy).map(|(y, dy)| y * dy).sum()
    };
    let changed = |of: &[f64], i: usize, h: f64| {
        let mut of = of.to_vec();
        of[i] += h;
        of
    };
    let affine = Affine::new(&gamma, &beta);
    let got = backward(plan, x, &dy, &forward(plan, x, affine).saved, affine);
    let check = |name: &str, got: &[f64], along: &dyn Fn(usize, f64) -> f64| {
        let most = got.iter().fold(0.0, |most: f64, v| most.max(v.abs()));
        for (i, got) in got.iter().enumerate() {
            let expected = difference(|h| along(i, h));
            assert!((got - expected).abs() < 1e-7 * most, "{what}: {name} {i}: {got}, by differences {expected}");
        }
    };
    check("dx", &got.dx, &|i, h| loss(&changed(x, i, h), &gamma, &beta));
    check("dgamma", &got.dgamma, &|i, h| loss(x, &changed(&gamma, i, h), &beta));
    check("dbeta", &got.dbeta, &|i, h| loss(x, &gamma, &changed(&beta, i, h)));
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let shapes = [Shape::nc(30, 5), Shape::nchw(3, 4, 3, 4), Shape::nhwc(3, 3, 4, 4), Shape::ncl(20, 1, 2)];
    for (shape, group) in shapes.into_iter().map(Result::unwrap).zip([3, 64, 4, 1]) {
        for method in METHODS.into_iter().chain([Method::IterNorm { steps: 0 }, Method::IterNorm { steps: 40 }]) {
            let plan = Whitening::new(shape).unwrap().with_group(group).unwrap().with_eps(0.1).unwrap();
            check_gradients(
                &plan.with_method(method).unwrap(),
                &correlated(&shape, 10),
                &format!("{shape:?} {method:?}"),
            );
        }
    }
}

#[test]
fn gradients_do_not_mind_equal_eigenvalues() {
    // All signs of three channels: uncorrelated, of one variance. The fourth is constant.
    let signs = |i: usize, channel: usize| if i >> channel & 1 == 0 { 1.0 } else { -1.0 };
    let x: Vec<f64> =
        (0..8).flat_map(|i| (0..4).map(move |channel| if channel == 3 { 2.0 } else { signs(i, channel) })).collect();
    for method in METHODS {
        let plan =
            Whitening::new(Shape::nc(8, 4).unwrap()).unwrap().with_eps(0.5).unwrap().with_method(method).unwrap();
        check_gradients(&plan, &x, &format!("{method:?}"));
    }
}

#[test]
fn groups_of_one_are_batch_normalization() {
    for (shape, _) in shapes() {
        let (x, dy) = (correlated::<f64>(&shape, 11), Data::Normal.fill::<f64>(shape.len(), 12));
        let gamma: Vec<f64> = (0..shape.channels()).map(|c| 1.0 + 0.1 * c as f64).collect();
        let affine = Affine::scale(&gamma);
        let bn = BatchNorm::<f64>::new(shape).unwrap();
        let (mut y, mut dx, mut saved) = (x.clone(), x.clone(), bn.saved());
        let mut dgamma = gamma.clone();
        bn.forward_train(&x, affine, &mut y, &mut saved).unwrap();
        let gradients = Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), ..Default::default() };
        bn.backward(&x, &dy, &saved, affine, gradients).unwrap();
        // Of one channel no step of Newton's changes anything: the trace is the variance.
        for method in METHODS {
            let plan = Whitening::<f64>::new(shape).unwrap().with_group(1).unwrap().with_method(method).unwrap();
            let got = forward(&plan, &x, affine);
            let gradients = backward(&plan, &x, &dy, &got.saved, affine);
            for (what, got, expected) in
                [("y", &got.y, &y), ("dx", &gradients.dx, &dx), ("dgamma", &gradients.dgamma, &dgamma)]
            {
                for (got, expected) in got.iter().zip(expected) {
                    let near = (got - expected).abs() < 1e-12 * expected.abs().max(1.0) * (shape.count() as f64).sqrt();
                    assert!(near, "{shape:?} {method:?} {what}: {got} {expected}");
                }
            }
        }
    }
}

/// Running statistics that are those of the last batch.
fn last<E: Element>(plan: &Whitening<E>, saved: &Saved) -> Running {
    let mut running = plan.running(Momentum::WeightOfNew(1.0), Variance::Biased).unwrap();
    running.update(saved).unwrap();
    running
}

/// A plan for six channels in groups of four, x and y of training, and inference with the statistics of that batch.
fn projected(shape: Shape, seed: u64) -> (Whitening<f64>, [Vec<f64>; 2], Projection) {
    let plan = Whitening::<f64>::new(shape).unwrap().with_group(4).unwrap();
    let x = correlated::<f64>(&shape, seed);
    let params: Vec<f64> = (0..6).map(|c| 1.0 + 0.1 * c as f64).collect();
    let affine = Affine::new(&params, &params);
    let Forward { y, saved } = forward(&plan, &x, affine);
    let projection = plan.projection(&last(&plan, &saved), affine).unwrap();
    (plan, [x, y], projection)
}

#[test]
fn inference_with_the_statistics_of_the_batch_is_training() {
    for (shape, group) in shapes() {
        for method in METHODS {
            let plan = Whitening::<f32>::new(shape).unwrap().with_group(group).unwrap().with_method(method).unwrap();
            let x = correlated::<f32>(&shape, 13);
            let params: Vec<f32> = (0..shape.channels()).map(|c| 1.0 + 0.01 * c as f32).collect();
            let affine = Affine::new(&params, &params);
            let trained = forward(&plan, &x, affine);
            let projection = plan.projection(&last(&plan, &trained.saved), affine).unwrap();
            let mut y = vec![0f32; x.len()];
            plan.forward_infer(&x, &projection, &mut y).unwrap();
            assert_bits(&format!("{shape:?} {method:?}"), &y, &trained.y);
            let mut x = x;
            plan.forward_infer_in_place(&mut x, &projection).unwrap();
            assert_bits(&format!("{shape:?} {method:?} in place"), &x, &trained.y);
        }
    }
}

#[test]
fn a_projection_is_a_matrix_and_an_offset() {
    let (plan, [x, y], projection) = projected(Shape::nc(40, 6).unwrap(), 20);
    let (matrices, offsets) = (projection.matrices(), projection.offsets());
    assert_eq!(matrices.iter().map(Vec::len).collect::<Vec<_>>(), [16, 4]);
    for (n, row) in x.chunks(6).enumerate() {
        for (channels, matrix) in plan.groups().zip(&matrices) {
            for (row_of_matrix, c) in matrix.chunks(channels.len()).zip(channels.clone()) {
                let product: f64 = row_of_matrix.iter().zip(&row[channels.clone()]).map(|(a, x)| a * x).sum();
                let (got, expected) = (product + offsets[c], y[n * 6 + c]);
                assert!((got - expected).abs() < 1e-12, "{n} {c}: {got} {expected}");
            }
        }
    }
}

#[test]
fn variances_below_the_rounding_of_others_are_not_enlarged() {
    // Uncorrelated, of variances 1e20 and 1: beside the first, the second may as well be 0.
    let x = [1e10, 1.0, -1e10, 1.0, 1e10, -1.0, -1e10, -1.0];
    let plan = Whitening::<f64>::new(Shape::nc(4, 2).unwrap()).unwrap();
    for (i, y) in forward(&plan, &x, Affine::none()).y.iter().enumerate() {
        let most = if i % 2 == 0 { 1.0 + 1e-12 } else { 1.0 };
        assert!(y.abs() <= most, "{i}: {y}");
    }
    // By itself it is as good as any.
    let alone = forward(&plan.with_group(1).unwrap(), &x, Affine::none()).y;
    assert!(alone.iter().all(|y| (y.abs() - 1.0).abs() < 1e-5), "{alone:?}");
}

#[test]
fn running_statistics_move_as_they_are_told() {
    let shape = Shape::nc(4, 2).unwrap();
    let plan = Whitening::<f64>::new(shape).unwrap();
    let x = [1.0, 1.0, -1.0, -1.0, 3.0, 1.0, -3.0, -1.0];
    let saved = forward(&plan, &x, Affine::none()).saved;
    // The squares: 1 + 1 + 9 + 9, the products 1 + 1 + 3 + 3.
    assert_eq!(saved.covariances(), [[5.0, 2.0, 2.0, 1.0]]);
    let mut running = plan.running(Momentum::WeightOfNew(0.5), Variance::Unbiased).unwrap();
    assert_eq!((running.mean(), running.covariances()), (&[0.0, 0.0][..], vec![vec![1.0, 0.0, 0.0, 1.0]]));
    running.update(&saved).unwrap();
    let unbiased = [5.0, 2.0, 2.0, 1.0].map(|v| 0.5 * (v * (4.0 / 3.0)));
    assert_eq!(running.covariances(), [[0.5 + unbiased[0], unbiased[1], unbiased[2], 0.5 + unbiased[3]]]);
    assert_eq!(running.batches(), 1);
    let mut other = plan.running(Momentum::WeightOfNew(0.5), Variance::Unbiased).unwrap();
    other.restore(running.mean(), &running.covariances(), running.batches()).unwrap();
    assert_eq!(other, running);
    assert_eq!(other.restore(&[0.0], &[vec![0.0; 4]], 1), Err(length("mean", 2, 1)));
    assert_eq!(other.restore(&[0.0; 2], &[vec![0.0; 3]], 1), Err(length("covariance", 4, 3)));
    let got = other.restore(&[0.0; 2], &[vec![1.0, 0.5, 0.0, 1.0]], 1);
    assert_eq!(got, Err(Error::Covariance { first: 0, second: 1, got: [0.5, 0.0] }));
    let mut of_groups = Whitening::<f64>::new(Shape::nc(4, 5).unwrap())
        .and_then(|plan| plan.with_group(2)?.running(Momentum::Cumulative, Variance::Biased))
        .unwrap();
    let groups = [vec![1.0, 0.0, 0.0, 1.0], vec![1.0, 0.5, 0.25, 1.0], vec![1.0]];
    let refused = Error::Covariance { first: 2, second: 3, got: [0.5, 0.25] };
    assert_eq!(of_groups.restore(&[0.0; 5], &groups, 1), Err(refused));
    assert_eq!(
        other.restore(&[0.0; 2], &[vec![1.0, 0.5, 0.5, -1.0]], 1),
        Err(Error::Variance { channel: 1, got: -1.0 })
    );
    assert_eq!(other, running);
    assert_eq!(running.update(&plan.saved()), Err(Error::MissingStatistics));
    let pairs = plan.clone().with_group(1).unwrap();
    let of_pairs = forward(&pairs, &x, Affine::none()).saved;
    let refused = Error::WhiteningGroups { what: "saved", expected: (2, 2), got: (2, 1) };
    assert_eq!(refused.to_string(), "`saved` must be of 2 channels in groups of 2, got 2 channels in groups of 1");
    assert_eq!(running.update(&of_pairs), Err(refused));
    // A batch with a NaN makes running variances that inference refuses.
    let nan = forward(&plan, &[f64::NAN; 8], Affine::none()).saved;
    running.update(&nan).unwrap();
    assert!(matches!(plan.projection(&running, Affine::none()), Err(Error::Variance { channel: 0, .. })));
}

#[test]
fn the_layer_after_it_takes_inference_in() {
    let (outputs, taps) = (3, 4);
    let (_, [x, y], projection) = projected(Shape::ncl(5, 6, taps).unwrap(), 14);
    let weight: Vec<f64> = Data::Normal.fill(outputs * 6 * taps, 15);
    let (mut folded, mut bias) = (weight.clone(), vec![0.5; outputs]);
    let layer = Layer::convolution(outputs, 6, taps);
    projection.fold_into_following(layer, &mut folded, &mut bias).unwrap();
    // The convolution at the one place where its taps fit.
    let convolve = |weight: &[f64], x: &[f64], n: usize, o: usize| -> f64 {
        (0..6 * taps).map(|i| weight[o * 6 * taps + i] * x[n * 24 + i]).sum()
    };
    for n in 0..5 {
        for (o, bias) in bias.iter().enumerate() {
            let (got, expected) = (convolve(&folded, &x, n, o) + bias, convolve(&weight, &y, n, o) + 0.5);
            assert!((got - expected).abs() < 1e-11, "{got} {expected}");
        }
    }
    let mut refused = |layer: Layer| projection.fold_into_following(layer, &mut folded, &mut bias).unwrap_err();
    assert_eq!(refused(Layer::transposed(6, outputs, taps)), Error::NotFoldable);
    assert_eq!(refused(layer.with_groups(3).unwrap()), Error::NotFoldable);
    assert_eq!(refused(Layer::convolution(outputs, 5, taps)), Error::LayerChannels { expected: 6, got: 5 });
}

#[test]
fn singular_covariances_are_refused_or_carried_by_eps() {
    // Fewer values than channels; one channel twice another; a constant channel.
    let few = (Shape::nc(3, 4).unwrap(), Data::Normal.fill::<f64>(12, 16));
    let twice = (Shape::nc(4, 2).unwrap(), vec![1.0, 2.0, 3.0, 6.0, -1.0, -2.0, 0.5, 1.0]);
    let constant = (Shape::nc(3, 2).unwrap(), vec![7.0, 1.0, 7.0, 2.0, 7.0, 4.0]);
    for (shape, x) in [few, twice, constant] {
        let plan = Whitening::<f64>::new(shape).unwrap();
        let (mut y, mut saved) = (vec![3.0; x.len()], plan.saved());
        let got = plan.clone().with_eps(0.0).unwrap().forward_train(&x, Affine::none(), &mut y, &mut saved);
        assert_eq!(got, Err(Error::Singular { first: 0, last: shape.channels() - 1 }));
        assert!(saved.count() == 0 && y.iter().all(|&y| y == 3.0));
        for method in METHODS {
            let plan = plan.clone().with_method(method).unwrap();
            let Forward { y, saved } = forward(&plan, &x, Affine::none());
            let dx = backward(&plan, &x, &x, &saved, Affine::none()).dx;
            assert!(y.iter().chain(&dx).all(|value| value.is_finite()), "{shape:?} {method:?}");
        }
    }
    let plan = Whitening::<f64>::new(Shape::nc(3, 1).unwrap()).unwrap().with_eps(0.0).unwrap();
    let plan = plan.with_method(Method::IterNorm { steps: 5 }).unwrap();
    let got = plan.forward_train(&[2.0; 3], Affine::none(), &mut [0.0; 3], &mut plan.saved());
    assert_eq!(got, Err(Error::Singular { first: 0, last: 0 }));
}

#[test]
fn constants_and_single_values_give_beta() {
    for (n, method) in [(1, METHODS[0]), (1, METHODS[1]), (5, METHODS[0]), (5, METHODS[1])] {
        let plan = Whitening::<f32>::new(Shape::nc(n, 3).unwrap()).unwrap().with_method(method).unwrap();
        let x = [3.0f32, -15.94, 1e30].repeat(n);
        let Forward { y, saved } = forward(&plan, &x, Affine::of(None, Some(&[1.0, 2.0, 3.0])));
        assert_eq!(y, [1.0, 2.0, 3.0].repeat(n));
        assert_eq!(backward(&plan, &x, &x, &saved, Affine::none()).dx, [0.0; 3].repeat(n));
    }
}

#[test]
fn the_smallest_eps_carries_constants() {
    let shape = Shape::nc(5, 3).unwrap();
    let x = [3.0, -15.94, 1e30].repeat(5);
    let dy: Vec<f64> = Data::Normal.fill(15, 21);
    for method in METHODS {
        let plan = Whitening::<f64>::new(shape).unwrap().with_eps(1e-300).unwrap().with_method(method).unwrap();
        let Forward { y, saved } = forward(&plan, &x, Affine::none());
        let dx = backward(&plan, &x, &dy, &saved, Affine::none()).dx;
        assert!(y == [0.0; 15] && dx.iter().all(|dx| dx.is_finite()), "{method:?}: {y:?} {dx:?}");
    }
}

#[test]
fn a_nan_stays_in_its_group() {
    let shape = Shape::nc(10, 4).unwrap();
    let clean = correlated::<f32>(&shape, 17);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = clean.clone();
        x[0] = bad;
        for method in METHODS {
            let plan = Whitening::<f32>::new(shape).unwrap().with_group(2).unwrap().with_method(method).unwrap();
            let [got, expected] = [&x, &clean].map(|x| forward(&plan, x, Affine::none()));
            let dx = backward(&plan, &x, &clean, &got.saved, Affine::none()).dx;
            for (i, (got, expected)) in got.y.iter().zip(&expected.y).enumerate() {
                let bad = i % 4 < 2;
                assert_eq!((got.is_nan(), dx[i].is_nan()), (bad, bad), "{method:?} {i}");
                assert!(bad || got == expected);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the values and sizes: an error that leaves `y` alone, or a result for each element.
    #[test]
    fn nothing_panics(
        shape in common::shapes(),
        group in 1usize..80,
        steps in proptest::option::of(0usize..8),
        eps in prop::sample::select(vec![0.0, 1e-300, 1e-5, 1e30]),
        data in prop::sample::select(Data::ALL.to_vec()),
        seed: u64,
    ) {
        let method = steps.map_or(Method::Zca, |steps| Method::IterNorm { steps });
        let plan = Whitening::<f32>::new(shape).unwrap().with_group(group).unwrap().with_method(method).unwrap();
        let plan = plan.with_eps(eps).unwrap();
        let x: Vec<f32> = data.fill(shape.len(), seed);
        let (mut y, mut saved) = (vec![7f32; x.len()], plan.saved());
        match plan.forward_train(&x, Affine::none(), &mut y, &mut saved) {
            Ok(()) => {
                let dx = backward(&plan, &x, &x, &saved, Affine::none()).dx;
                prop_assert!(y.iter().chain(&dx).all(|&value| value != 7.0));
                if saved.matrices().concat().iter().all(|value| value.is_finite()) {
                    prop_assert!(y.iter().all(|value| value.is_finite()));
                }
            }
            Err(Error::Singular { .. } | Error::EmptyBatch { .. }) => prop_assert!(y.iter().all(|&y| y == 7.0)),
            Err(error) => prop_assert!(false, "{error}"),
        }
    }
}

#[test]
fn bad_arguments_are_refused_and_touch_nothing() {
    let shape = Shape::nc(4, 2).unwrap();
    let plan = Whitening::<f32>::new(shape).unwrap();
    let x = correlated::<f32>(&shape, 18);
    let saved = forward(&plan, &x, Affine::none()).saved;
    let mut y = vec![9f32; 8];
    let mut room = plan.saved();
    let none = Affine::none();
    assert_eq!(plan.forward_train(&x[1..], none, &mut y, &mut room), Err(length("x", 8, 7)));
    assert_eq!(plan.forward_train(&x, none, &mut y[1..], &mut room), Err(length("y", 8, 7)));
    assert_eq!(plan.forward_train(&x, Affine::scale(&[1.0]), &mut y, &mut room), Err(length("gamma", 2, 1)));
    assert_eq!(plan.forward_train(&x, none.with_residual(&x), &mut y, &mut room), Err(Error::WhiteningAffine));
    let refused = |plan: &Whitening<f32>, x: &[f32], dy: &[f32], saved: &Saved, affine| {
        let (mut dx, mut dgamma, mut dbeta) = (vec![9f32; plan.shape().len()], [9f32; 2], [9f32; 2]);
        let of = (Some(&mut dx[..]), Some(&mut dgamma[..]), Some(&mut dbeta[..]));
        let gradients = Gradients { dx: of.0, dgamma: of.1, dbeta: of.2, ..Default::default() };
        let error = plan.backward(x, dy, saved, affine, gradients).unwrap_err();
        assert!(dx.iter().chain(&dgamma).chain(&dbeta).all(|&value| value == 9.0), "{error}");
        error
    };
    assert_eq!(refused(&plan, &x[1..], &x, &saved, none), length("x", 8, 7));
    assert_eq!(refused(&plan, &x, &x[1..], &saved, none), length("dy", 8, 7));
    assert_eq!(refused(&plan, &x, &x, &plan.saved(), none), Error::MissingStatistics);
    assert_eq!(refused(&plan, &x, &x, &saved, none.with_residual(&x)), Error::WhiteningAffine);
    let of_one = forward(&plan.clone().with_group(1).unwrap(), &x, none).saved;
    let other = Error::WhiteningGroups { what: "saved", expected: (2, 2), got: (2, 1) };
    assert_eq!(refused(&plan, &x, &x, &of_one, none), other);
    let larger = plan.with_shape(Shape::nc(5, 2).unwrap()).unwrap();
    let more = correlated::<f32>(larger.shape(), 19);
    assert_eq!(refused(&larger, &more, &more, &saved, none), Error::Shards { expected: 5, got: 4 });
    for short in 0..3 {
        let (mut dx, mut dgamma, mut dbeta) = ([9f32; 8], [9f32; 2], [9f32; 2]);
        let from = |i| usize::from(i == short);
        let of = (Some(&mut dx[from(0)..]), Some(&mut dgamma[from(1)..]), Some(&mut dbeta[from(2)..]));
        let gradients = Gradients { dx: of.0, dgamma: of.1, dbeta: of.2, ..Default::default() };
        let got = plan.backward(&x, &x, &saved, none, gradients);
        assert_eq!(got, Err([length("dx", 8, 7), length("dgamma", 2, 1), length("dbeta", 2, 1)][short].clone()));
        assert!(dx.iter().chain(&dgamma).chain(&dbeta).all(|&value| value == 9.0));
    }
    let wanted = Gradients { dresidual: Some(&mut y), ..Default::default() };
    assert_eq!(plan.backward(&x, &x, &saved, none, wanted), Err(Error::WhiteningAffine));
    let wider = plan.with_shape(Shape::nc(4, 3).unwrap()).unwrap();
    let projection = plan.projection(&last(&plan, &saved), none).unwrap();
    let other = Error::WhiteningGroups { what: "projection", expected: (3, 3), got: (2, 2) };
    assert_eq!(wider.forward_infer(&[0.0; 12], &projection, &mut [0.0; 12]), Err(other.clone()));
    assert_eq!(wider.forward_infer_in_place(&mut [0.0; 12], &projection), Err(other));
    assert_eq!(plan.forward_infer(&x[1..], &projection, &mut y), Err(length("x", 8, 7)));
    assert_eq!(plan.forward_infer(&x, &projection, &mut y[1..]), Err(length("y", 8, 7)));
    assert_eq!(plan.forward_infer_in_place(&mut y[1..], &projection), Err(length("x", 8, 7)));
    let empty = plan.with_shape(Shape::nc(0, 2).unwrap()).unwrap();
    let got = empty.forward_train(&[], none, &mut [], &mut room);
    assert_eq!(got, Err(Error::EmptyBatch { batch: 0, spatial: 1 }));
    assert_eq!(empty.forward_infer(&[], &projection, &mut []), Ok(()));
    assert_eq!(plan.clone().with_group(0).unwrap_err(), Error::ZeroChannels);
    let many = Shape::nc(0, 1 << (usize::BITS / 2)).unwrap();
    let all = plan.with_shape(many).unwrap().with_group(usize::MAX).unwrap_err();
    assert_eq!(all, Error::ShapeOverflow { dims: vec![many.channels(); 2] });
    let too_many = Method::IterNorm { steps: Method::MOST_STEPS + 1 };
    assert_eq!(plan.clone().with_method(too_many).unwrap_err(), Error::NewtonSteps { got: 101 });
    let none_of_all = Layer::convolution(0, 2, usize::MAX);
    assert_eq!(projection.fold_into_following::<f32>(none_of_all, &mut [], &mut []), Ok(()));
    assert_eq!(plan.clone().with_eps(-1.0).unwrap_err(), Error::Eps { got: -1.0 });
    assert_eq!((room.count(), &y[..]), (0, &[9f32; 8][..]));
}
