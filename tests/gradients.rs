//! The backward pass is the derivative of the forward pass: against finite differences, by the identities that the
//! gradients satisfy, whole, in part and in shards.

mod common;

use batchnorm::{Affine, BatchNorm, Cotangents, Element, GradientSums, Gradients, Layout, Moments, Population};
use batchnorm::{Real, RenormLimits, Saved, SecondGradients, Shape};
use common::{Bits, Data, assert_bits};

/// Shapes of a few hundred elements: both geometries, planes that fill no vector, one channel, many channels.
fn shapes() -> [Shape; 9] {
    let shapes = [
        Shape::nc(6, 3),
        Shape::nc(5, 17),
        Shape::nc(40, 1),
        Shape::nchw(3, 2, 7, 7),
        Shape::nchw(2, 17, 2, 3),
        Shape::ncl(4, 1, 9),
        Shape::nhwc(2, 3, 3, 17),
        Shape::nhwc(2, 7, 7, 2),
        Shape::nc(3, 130),
    ];
    shapes.map(Result::unwrap)
}

fn channel_of(shape: &Shape, i: usize) -> usize {
    match shape.layout() {
        Layout::ChannelsFirst => i / shape.spatial() % shape.channels(),
        Layout::ChannelsLast => i % shape.channels(),
    }
}

/// A forward pass and all its gradients.
struct Run<E: Element> {
    y: Vec<E>,
    dx: Vec<E>,
    dgamma: Vec<E::Param>,
    dbeta: Vec<E::Param>,
    saved: Saved<E::Param>,
}

fn run<E: Element>(bn: &BatchNorm<E>, x: &[E], dy: &[E], affine: Affine<'_, E>) -> Run<E> {
    let params = || vec![E::Param::default(); bn.shape().channels()];
    let (y, dx) = (vec![E::default(); x.len()], vec![E::default(); x.len()]);
    let mut run = Run { y, dx, dgamma: params(), dbeta: params(), saved: bn.saved() };
    bn.forward_train(x, affine, &mut run.y, &mut run.saved).unwrap();
    let (dgamma, dbeta) = (Some(&mut run.dgamma[..]), Some(&mut run.dbeta[..]));
    bn.backward(x, dy, &run.saved, affine, Gradients { dx: Some(&mut run.dx), dgamma, dbeta, ..Default::default() })
        .unwrap();
    run
}

fn wide<E: Element>(values: &[E]) -> Vec<f64> {
    values.iter().map(|v| v.to_param().to_f64()).collect()
}

/// The largest absolute value.
fn size(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |most, v| v.abs().max(most))
}

/// Asserts that values lie within `bound` of those expected.
#[track_caller]
fn assert_near<E: Element>(what: &str, got: &[E], expected: &[f64], bound: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, expected)) in wide(got).into_iter().zip(expected).enumerate() {
        let off = (got - expected).abs();
        assert!(off <= bound, "{what} {i}: {got}, expected {expected}, off by {off:e}, allowed {bound:e}");
    }
}

/// The derivative of `sum(weights * y)` with respect to `values[i]`, from central differences over `h` and `2h`
/// combined so that the error is of the order of `h^4`.
fn slope(values: &[f64], i: usize, h: f64, weights: &[f64], y: impl Fn(&[f64]) -> Vec<f64>) -> f64 {
    let moved = |by: f64| {
        let mut values = values.to_vec();
        values[i] += by;
        y(&values)
    };
    // Differences are taken value by value, so that the sum cancels nothing.
    let difference = |h: f64| -> f64 {
        moved(h).into_iter().zip(moved(-h)).zip(weights).map(|((up, down), w)| w * (up - down)).sum::<f64>() / (2.0 * h)
    };
    (4.0 * difference(h) - difference(2.0 * h)) / 3.0
}

#[test]
fn gradients_are_finite_differences() {
    for (k, shape) in shapes().into_iter().enumerate() {
        let seed = k as u64;
        let (n, c) = (shape.len(), shape.channels());
        let (x, dy) = (Data::Normal.fill::<f64>(n, seed), Data::Normal.fill::<f64>(n, seed + 100));
        let (gamma, beta) = (Data::Normal.fill::<f64>(c, seed + 200), Data::Normal.fill::<f64>(c, seed + 300));
        // The large eps tells the places of eps apart.
        for eps in [1e-5, 0.3] {
            let bn = BatchNorm::<f64>::new(shape).unwrap().with_eps(eps).unwrap();
            let y = |x: &[f64], gamma: &[f64], beta: &[f64]| {
                let (mut y, mut saved) = (vec![0.0; n], bn.saved());
                bn.forward_train(x, Affine::new(gamma, beta), &mut y, &mut saved).unwrap();
                y
            };
            let got = run(&bn, &x, &dy, Affine::new(&gamma, &beta));
            // y is linear in gamma and beta, so large steps are exact there.
            let h = 1e-4;
            let dx: Vec<_> = (0..n).map(|i| slope(&x, i, h, &dy, |x| y(x, &gamma, &beta))).collect();
            let dgamma: Vec<_> = (0..c).map(|i| slope(&gamma, i, 0.5, &dy, |gamma| y(&x, gamma, &beta))).collect();
            let dbeta: Vec<_> = (0..c).map(|i| slope(&beta, i, 0.5, &dy, |beta| y(&x, &gamma, beta))).collect();
            assert_near(&format!("dx of {shape:?}, eps {eps}"), &got.dx, &dx, 1e-9 * size(&dx));
            assert_near("dgamma", &got.dgamma, &dgamma, 1e-13 * size(&dgamma));
            assert_near("dbeta", &got.dbeta, &dbeta, 1e-13 * size(&dbeta));
        }
    }
}

/// `sum(v * dx) + sum(w * dgamma) + sum(u * dbeta)` by x, dy and gamma, of batches, constants and corrected batches.
#[test]
fn second_derivatives_are_finite_differences() {
    for (k, shape) in shapes().into_iter().enumerate() {
        let (n, c) = (shape.len(), shape.channels());
        let fill = |len, i: u64| Data::Normal.fill::<f64>(len, k as u64 + 100 * i);
        let (x, dy, v) = (fill(n, 0), fill(n, 1), fill(n, 2));
        let (gamma, w, u, mean) = (fill(c, 3), fill(c, 4), fill(c, 5), fill(c, 6));
        let var: Vec<f64> = fill(c, 7).into_iter().map(|v| v * v + 0.1).collect();
        let bn = BatchNorm::<f64>::new(shape).unwrap().with_eps(0.1).unwrap();
        let population = Population { mean: &mean, var: &var };
        for state in ["batch", "frozen", "renormalized"] {
            // r and d are constants to the derivative, so they stay those of the point that is moved from.
            let at_rest = (state == "renormalized").then(|| {
                let (mut saved, mut y) = (bn.saved(), vec![0.0; n]);
                saved.renormalize(population, RenormLimits { r_max: 1.5, d_max: 0.4 }).unwrap();
                bn.forward_train(&x, Affine::scale(&gamma), &mut y, &mut saved).unwrap();
                let (r, d) = saved.corrections().unwrap();
                (r.to_vec(), d.to_vec())
            });
            let saved = |x: &[f64]| {
                let (mut saved, mut y) = (bn.saved(), vec![0.0; n]);
                match state {
                    "frozen" => bn.freeze(population, &mut saved).unwrap(),
                    _ => bn.forward_train(x, Affine::none(), &mut y, &mut saved).unwrap(),
                }
                saved
            };
            let back = |x: &[f64], dy: &[f64], gamma: &[f64]| {
                let (mut dx, mut dgamma, mut dbeta) = (vec![0.0; n], vec![0.0; c], vec![0.0; c]);
                // dx takes gamma * r, and dgamma is what r and d make of the plain one.
                let scale: Vec<f64> = match &at_rest {
                    Some((r, _)) => gamma.iter().zip(r).map(|(gamma, r)| gamma * r).collect(),
                    None => gamma.to_vec(),
                };
                let all = Gradients {
                    dx: Some(&mut dx),
                    dgamma: Some(&mut dgamma),
                    dbeta: Some(&mut dbeta),
                    ..Default::default()
                };
                bn.backward(x, dy, &saved(x), Affine::scale(&scale), all).unwrap();
                if let Some((r, d)) = &at_rest {
                    for i in 0..c {
                        dgamma[i] = dgamma[i] * r[i] + dbeta[i] * d[i];
                    }
                }
                [dx, dgamma, dbeta].concat()
            };
            let weights = [&v[..], &w, &u].concat();
            let of_x: Vec<_> = (0..n).map(|i| slope(&x, i, 1e-3, &weights, |x| back(x, &dy, &gamma))).collect();
            let of_dy: Vec<_> = (0..n).map(|i| slope(&dy, i, 0.5, &weights, |dy| back(&x, dy, &gamma))).collect();
            let of_gamma: Vec<_> = (0..c).map(|i| slope(&gamma, i, 0.5, &weights, |g| back(&x, &dy, g))).collect();

            let mut kept = saved(&x);
            if state == "renormalized" {
                kept.renormalize(population, RenormLimits { r_max: 1.5, d_max: 0.4 }).unwrap();
                bn.forward_train(&x, Affine::none(), &mut vec![0.0; n], &mut kept).unwrap();
            }
            let (mut got_x, mut got_dy, mut got_gamma) = (vec![0.0; n], vec![0.0; n], vec![0.0; c]);
            let all = SecondGradients { x: Some(&mut got_x), dy: Some(&mut got_dy), gamma: Some(&mut got_gamma) };
            let cotangents = Cotangents { dx: &v, dgamma: Some(&w), dbeta: Some(&u) };
            bn.double_backward(&x, &dy, &kept, Affine::scale(&gamma), cotangents, all).unwrap();
            let name = format!("{shape:?}, {state}");
            assert_near(&format!("of x, {name}"), &got_x, &of_x, 1e-7 * size(&of_x));
            assert_near(&format!("of dy, {name}"), &got_dy, &of_dy, 1e-12 * size(&of_dy));
            assert_near(&format!("of gamma, {name}"), &got_gamma, &of_gamma, 1e-12 * size(&of_gamma));
        }
    }
}

/// Summed over a channel, `dx` is zero, and `dx * xhat` is what eps leaves of it: with `sum(xhat^2) = m*var/(var+eps)`,
/// `gamma * inv_std * dgamma * eps/(var + eps)`.
fn sums_of_dx<E: Bits>(epsilon: f64) {
    for (k, shape) in shapes().into_iter().enumerate() {
        let c = shape.channels();
        let (x, dy) = (Data::Normal.fill::<E>(shape.len(), k as u64), Data::Normal.fill::<E>(shape.len(), 50));
        let gamma = Data::Normal.fill::<E::Param>(c, 51);
        for eps in [0.0, 1e-5, 0.3] {
            let bn = BatchNorm::<E>::new(shape).unwrap().with_eps(eps).unwrap();
            let got = run(&bn, &x, &dy, Affine::of(Some(&gamma), None));
            let xhat = wide(&run(&bn, &x, &dy, Affine::none()).y);
            let (dx, dy) = (wide(&got.dx), wide(&dy));
            for c in 0..c {
                let of_channel = || (0..dx.len()).filter(|&i| channel_of(&shape, i) == c);
                let (sum, weighted) = of_channel().fold((0.0, 0.0), |s, i| (s.0 + dx[i], s.1 + dx[i] * xhat[i]));
                let [gamma, inv_std, var, dgamma, dbeta] =
                    [gamma[c], got.saved.inv_std()[c], got.saved.var()[c], got.dgamma[c], got.dbeta[c]]
                        .map(|v| v.to_f64());
                let scale = gamma * inv_std;
                let left = scale * dgamma * eps / (var + eps);
                // The sizes of the terms that cancel, each with a few roundings.
                let m = shape.count() as f64;
                let terms: f64 =
                    of_channel().map(|i| dy[i].abs() + (dbeta / m).abs() + (xhat[i] * dgamma / m).abs()).sum();
                let most = of_channel().fold(1.0, |most: f64, i| xhat[i].abs().max(most));
                let bound = 4.0 * epsilon * scale.abs() * terms;
                assert!(sum.abs() <= bound, "sum(dx) of {shape:?}, eps {eps}: {sum:e}, allowed {bound:e}");
                let (off, bound) = ((weighted - left).abs(), bound * most);
                assert!(off <= bound, "sum(dx*xhat) of {shape:?}, eps {eps}: off by {off:e}, allowed {bound:e}");
            }
        }
    }
}

#[test]
fn sums_of_dx_vanish() {
    sums_of_dx::<f32>(f32::EPSILON.into());
    sums_of_dx::<f64>(f64::EPSILON);
}

/// A constant added to the whole batch moves no output, so a constant dy has no gradient.
fn constant_dy<E: Bits>(epsilon: f64) {
    for (k, shape) in shapes().into_iter().enumerate() {
        let (n, c) = (shape.len(), shape.channels());
        let bn = BatchNorm::<E>::new(shape).unwrap();
        let gamma = Data::Normal.fill::<E::Param>(c, 52);
        let affine = Affine::of(Some(&gamma), None);
        for constant in [1.0, 0.1, -12345.678] {
            let dy = vec![E::from_param(E::Param::from_f64(constant)); n];
            // The sums of dy and of xhat are rounded in at most 16 additions, a term of the latter in 3 operations
            // before them; each of the two means is then off by at most 10 epsilon.
            let got = run(&bn, &Data::Normal.fill(n, k as u64), &dy, affine);
            let xhat = wide(&run(&bn, &Data::Normal.fill(n, k as u64), &dy, Affine::none()).y);
            for (i, dx) in wide(&got.dx).into_iter().enumerate() {
                let c = channel_of(&shape, i);
                let scale = gamma[c].to_f64() * got.saved.inv_std()[c].to_f64();
                let bound = 10.0 * epsilon * (scale * constant).abs() * (1.0 + xhat[i].abs());
                assert!(dx.abs() <= bound, "dx of {shape:?} {i}: {dx:e}, allowed {bound:e}");
            }
        }
    }
}

#[test]
fn constant_dy_has_no_gradient() {
    constant_dy::<f32>(f32::EPSILON.into());
    constant_dy::<f64>(f64::EPSILON);
}

/// Where all sums are exact, so are the zeros: x is 3 and 5 as often, which with `eps` = 3 makes inv_std 1/2 and xhat
/// -1/2 and 1/2, and dy is a power of two.
#[test]
fn constant_dy_has_no_gradient_exactly() {
    fn check<E: Bits>()
    where
        E::Param: Bits,
    {
        let shapes = [Shape::nc(8, 3), Shape::nchw(4, 3, 7, 7), Shape::nhwc(2, 8, 5, 17), Shape::ncl(1, 1, 64)];
        for shape in shapes.map(Result::unwrap) {
            let (per_sample, samples) = (shape.len() / shape.batch(), shape.batch());
            // Samples come in pairs that cancel; a single sample has them within.
            let sign = |i: usize| if samples > 1 { i / per_sample % 2 } else { i % 2 };
            let value = |i: usize| E::from_param(E::Param::from_f64([3.0, 5.0][sign(i)]));
            let x: Vec<E> = (0..shape.len()).map(value).collect();
            let gamma = Data::Normal.fill::<E::Param>(shape.channels(), 53);
            for constant in [1.0, -0.25, 1024.0] {
                let dy = vec![E::from_param(E::Param::from_f64(constant)); x.len()];
                let bn = BatchNorm::<E>::new(shape).unwrap().with_eps(3.0).unwrap();
                let got = run(&bn, &x, &dy, Affine::of(Some(&gamma), None));
                assert_bits("inv_std", got.saved.inv_std(), &vec![E::Param::from_f64(0.5); shape.channels()]);
                assert!(got.dx.iter().all(|&dx| dx == E::default()), "dx of {constant} on {shape:?}");
            }
        }
    }
    check::<f32>();
    check::<f64>();
    #[cfg(feature = "half")]
    {
        check::<half::bf16>();
        check::<half::f16>();
    }
}

/// Each subset of the gradients has the bits of all together.
#[test]
fn any_subset_has_the_same_bits() {
    fn check<E: Bits>()
    where
        E::Param: Bits,
    {
        // Beside the small ones, two with several blocks, which threads may share.
        let large = [Shape::nchw(3, 3, 120, 100), Shape::nhwc(3, 40, 60, 10)].map(Result::unwrap);
        for shape in shapes().into_iter().chain(large) {
            let (n, c) = (shape.len(), shape.channels());
            let (x, dy) = (Data::Offset.fill::<E>(n, 54), Data::Normal.fill::<E>(n, 55));
            let gamma = Data::Normal.fill::<E::Param>(c, 56);
            let bn = BatchNorm::<E>::new(shape).unwrap();
            let all = run(&bn, &x, &dy, Affine::of(Some(&gamma), None));
            for subset in 0..8 {
                let (mut dx, mut dgamma, mut dbeta) = (dy.clone(), gamma.clone(), gamma.clone());
                let gradients = Gradients {
                    dx: (subset & 1 != 0).then_some(&mut dx[..]),
                    dgamma: (subset & 2 != 0).then_some(&mut dgamma[..]),
                    dbeta: (subset & 4 != 0).then_some(&mut dbeta[..]),
                    ..Default::default()
                };
                bn.backward(&x, &dy, &all.saved, Affine::scale(&gamma), gradients).unwrap();
                let what = |name: &str| format!("{name} of subset {subset:03b} on {shape:?}");
                assert_bits(&what("dx"), &dx, if subset & 1 != 0 { &all.dx } else { &dy });
                assert_bits(&what("dgamma"), &dgamma, if subset & 2 != 0 { &all.dgamma } else { &gamma });
                assert_bits(&what("dbeta"), &dbeta, if subset & 4 != 0 { &all.dbeta } else { &gamma });
            }
        }
    }
    check::<f32>();
    check::<f64>();
}

/// Forward and backward in halves, on shards of the batch of these sizes.
fn in_shards<E: Element>(
    shape: Shape,
    batches: &[usize],
    x: &[E],
    dy: &[E],
    gamma: &[E::Param],
    beta: &[E::Param],
) -> Run<E> {
    let whole = BatchNorm::<E>::new(shape).unwrap();
    let (c, per_sample) = (shape.channels(), shape.channels() * shape.spatial());
    let mut at = 0;
    let mut shards = Vec::new();
    for &n in batches {
        let part = Shape::new(shape.layout(), n, c, &[shape.spatial()]).unwrap();
        shards.push((whole.with_shape(part).unwrap(), at..at + n * per_sample));
        at += n * per_sample;
    }
    assert_eq!(at, x.len());

    let (mut moments, mut saved) = (vec![Moments::default(); c], whole.saved());
    for (bn, range) in &shards {
        let mut of_shard = vec![Moments { count: 99, mean: 9.0, residue: 9.0, m2: 9.0 }; c];
        bn.moments(&x[range.clone()], &mut of_shard).unwrap();
        (0..c).for_each(|c| moments[c] = moments[c].merge(of_shard[c]));
    }
    // Any plan of the channels and eps can finish.
    shards[0].0.finish(&moments, &mut saved).unwrap();
    let mut sums: Option<Vec<GradientSums>> = None;
    for (bn, range) in &shards {
        let mut of_shard = vec![GradientSums { dy: 9.0, dy_xhat: 9.0 }; c];
        bn.gradient_sums(&x[range.clone()], &dy[range.clone()], &saved, Affine::none(), &mut of_shard).unwrap();
        let merged = |sums: Vec<GradientSums>| sums.into_iter().zip(&of_shard).map(|(a, &b)| a.merge(b)).collect();
        sums = Some(sums.map_or(of_shard.clone(), merged));
    }
    let sums = sums.unwrap();
    let (mut y, mut dx) = (x.to_vec(), x.to_vec());
    for (bn, range) in &shards {
        let (x, dy) = (&x[range.clone()], &dy[range.clone()]);
        bn.normalize(x, Affine::new(gamma, beta), &saved, &mut y[range.clone()]).unwrap();
        bn.input_gradient(x, dy, &saved, Affine::scale(gamma), &sums, &mut dx[range.clone()]).unwrap();
    }
    let dgamma = sums.iter().map(|s| E::Param::from_f64(s.dy_xhat)).collect();
    let dbeta = sums.iter().map(|s| E::Param::from_f64(s.dy)).collect();
    Run { y, dx, dgamma, dbeta, saved }
}

fn shards_agree<E: Bits>(epsilon: f64)
where
    E::Param: Bits,
{
    let shapes = [Shape::nc(7, 5), Shape::nchw(7, 3, 7, 7), Shape::nhwc(7, 5, 5, 17), Shape::nchw(7, 2, 90, 100)];
    for shape in shapes.map(Result::unwrap) {
        let (n, c) = (shape.len(), shape.channels());
        for data in [Data::Normal, Data::Offset] {
            let (x, dy) = (data.fill::<E>(n, 57), Data::Normal.fill::<E>(n, 58));
            let (gamma, beta) = (Data::Normal.fill::<E::Param>(c, 59), Data::Normal.fill::<E::Param>(c, 60));
            let bn = BatchNorm::<E>::new(shape).unwrap();
            let whole = run(&bn, &x, &dy, Affine::new(&gamma, &beta));
            for batches in [&[7][..], &[3, 4], &[1, 6], &[2, 4, 1], &[3, 0, 4]] {
                let what = |name: &str| format!("{name} of {data:?} {shape:?} in {batches:?}");
                let got = in_shards(shape, batches, &x, &dy, &gamma, &beta);
                assert_eq!(got.saved.count(), shape.count() as u64);
                if batches.len() == 1 {
                    assert_eq!(got.saved, whole.saved, "{}", what("saved"));
                    assert_bits(&what("y"), &got.y, &whole.y);
                    assert_bits(&what("dx"), &got.dx, &whole.dx);
                    assert_bits(&what("dgamma"), &got.dgamma, &whole.dgamma);
                    assert_bits(&what("dbeta"), &got.dbeta, &whole.dbeta);
                    continue;
                }
                let (y, dx) = (wide(&whole.y), wide(&whole.dx));
                assert_near(&what("y"), &got.y, &y, 8.0 * epsilon * size(&y));
                assert_near(&what("dx"), &got.dx, &dx, 8.0 * epsilon * size(&dx));
                // Sums of `count` terms of size one, whose roundings partly cancel.
                let bound = 8.0 * epsilon * (shape.count() as f64).sqrt();
                assert_near(&what("dgamma"), &got.dgamma, &wide(&whole.dgamma), bound);
                assert_near(&what("dbeta"), &got.dbeta, &wide(&whole.dbeta), bound);
            }
        }
    }
}

#[test]
fn shards_agree_with_the_joined_batch() {
    shards_agree::<f32>(f32::EPSILON.into());
    shards_agree::<f64>(f64::EPSILON);
}

/// With the mean a million deviations away, f32 lies as near to f64 on the same values as it does around zero.
#[test]
fn a_far_mean_costs_f32_nothing() {
    let shapes = [Shape::nc(200, 5), Shape::nchw(9, 3, 7, 7), Shape::nhwc(4, 9, 9, 17), Shape::nchw(2, 2, 100, 100)];
    for shape in shapes.map(Result::unwrap) {
        let (n, c) = (shape.len(), shape.channels());
        let dy = Data::Normal.fill::<f32>(n, 61);
        let gamma = Data::Normal.fill::<f32>(c, 62);
        for mean in [0.0, 1e6, -1e6] {
            // Another mean in each channel, so that none is a round number.
            let noise = Data::Normal.fill::<f64>(n, 63);
            let x: Vec<f32> =
                (0..n).map(|i| (mean * (1.0 + 1e-2 * channel_of(&shape, i) as f64) + noise[i]) as f32).collect();
            let got = run(&BatchNorm::<f32>::new(shape).unwrap(), &x, &dy, Affine::of(Some(&gamma), None));
            let (x, dy, gamma) = (wide(&x), wide(&dy), wide(&gamma));
            let bn = BatchNorm::<f64>::new(shape).unwrap();
            let expected = run(&bn, &x, &dy, Affine::of(Some(&gamma), None));
            let what = |name: &str| format!("{name} of {shape:?} around {mean}");
            assert_near(&what("y"), &got.y, &expected.y, 4e-7 * size(&expected.y));
            assert_near(&what("dx"), &got.dx, &expected.dx, 4e-7 * size(&expected.dx));
            let bound = 4e-7 * (shape.count() as f64).sqrt();
            assert_near(&what("dgamma"), &got.dgamma, &expected.dgamma, bound);
            assert_near(&what("dbeta"), &got.dbeta, &expected.dbeta, bound);
        }
    }
}
