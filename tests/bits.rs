//! Every operation, element type and tier gives the bits of the reference, on any number of threads, at any
//! alignment, in place or not, in one call or in halves.

mod common;

use batchnorm::{
    Affine, Element, GradientSums, Gradients, Moments, Parallelism, Population, Real, Saved, Shape, Stores, Tier,
};
use batchnorm::{BatchNorm, reference};
use common::{Bits, Data, Misaligned, assert_bits, in_pool, plan, tiers};
use proptest::prelude::*;

/// One call of each operation.
#[derive(Debug, Clone)]
struct Case {
    shape: Shape,
    data: Data,
    seed: u64,
    offset: usize,
    threads: usize,
    gamma: bool,
    beta: bool,
    stores: Stores,
}

fn cases() -> impl Strategy<Value = Case> {
    let data = (0..Data::ALL.len()).prop_map(|i| Data::ALL[i]);
    let threads = prop_oneof![Just(1usize), Just(2), Just(3), Just(7)];
    let stores = prop_oneof![Just(Stores::Cached), Just(Stores::Streaming)];
    (common::shapes(), data, any::<u64>(), 0usize..16, threads, any::<bool>(), any::<bool>(), stores).prop_map(
        |(shape, data, seed, offset, threads, gamma, beta, stores)| Case {
            shape,
            data,
            seed,
            offset,
            threads,
            gamma,
            beta,
            stores,
        },
    )
}

/// Asserts that moments have the same bits.
#[track_caller]
fn assert_moments(what: &str, got: &[Moments], expected: &[Moments]) {
    let parts = |m: &[Moments]| m.iter().flat_map(|m| [m.count as f64, m.mean, m.residue, m.m2]).collect::<Vec<_>>();
    assert_bits(what, &parts(got), &parts(expected));
}

#[track_caller]
fn assert_sums(what: &str, got: &[GradientSums], expected: &[GradientSums]) {
    let parts = |s: &[GradientSums]| s.iter().flat_map(|s| [s.dy, s.dy_xhat]).collect::<Vec<_>>();
    assert_bits(what, &parts(got), &parts(expected));
}

#[track_caller]
fn assert_saved<P: Real + Bits>(what: &str, got: &Saved<P>, expected: &Saved<P>) {
    assert_eq!(got.count(), expected.count());
    assert_bits(what, got.mean(), expected.mean());
    assert_bits(what, got.residue(), expected.residue());
    assert_bits(what, got.var(), expected.var());
    assert_bits(what, got.inv_std(), expected.inv_std());
}

/// What the reference says, computed once for all tiers.
struct Expected<E: Element> {
    moments: Vec<Moments>,
    saved: Saved<E::Param>,
    y: Vec<E>,
    inferred: Vec<E>,
    sums: Vec<GradientSums>,
    dgamma: Vec<E::Param>,
    dbeta: Vec<E::Param>,
    dx: Vec<E>,
}

fn check<E: Bits>(case: &Case)
where
    E::Param: Bits,
{
    let Case { shape, data, seed, offset, threads, gamma, beta, stores } = case.clone();
    let (c, eps) = (shape.channels(), 1e-5);
    let (x, dy) = (data.fill::<E>(shape.len(), seed), Data::Normal.fill::<E>(shape.len(), seed ^ 1));
    let (g, b) = (Data::Normal.fill::<E::Param>(c, seed ^ 2), Data::Normal.fill::<E::Param>(c, seed ^ 3));
    let mean = Data::Normal.fill::<E::Param>(c, seed ^ 4);
    let var: Vec<_> = g.iter().map(|&g| g * g).collect();
    let affine = Affine::of(gamma.then_some(&g[..]), beta.then_some(&b[..]));
    let population = Population { mean: &mean, var: &var };

    let moments = reference::moments(&shape, &x);
    let saved = reference::finish::<E::Param>(&moments, eps);
    let sums = reference::gradient_sums(&shape, &x, &dy, &saved, affine);
    let expected = Expected {
        y: reference::normalize(&shape, &x, affine, &saved),
        inferred: reference::forward_infer(&shape, &x, affine, population, eps),
        dx: reference::input_gradient(&shape, &x, &dy, &saved, affine, &sums),
        dgamma: sums.iter().map(|s| E::Param::from_f64(s.dy_xhat)).collect(),
        dbeta: sums.iter().map(|s| E::Param::from_f64(s.dy)).collect(),
        moments,
        saved,
        sums,
    };
    let (x, dy) = (Misaligned::new(&x, offset), Misaligned::new(&dy, offset));
    for tier in tiers() {
        let bn = plan::<E>(shape, tier, Parallelism::Threads(threads)).with_eps(eps).unwrap().with_stores(stores);
        in_pool(threads, || check_tier(&bn, tier, &x, &dy, affine, population, &expected));
    }
}

fn check_tier<E: Bits>(
    bn: &BatchNorm<E>,
    tier: Tier,
    x: &Misaligned<E>,
    dy: &Misaligned<E>,
    affine: Affine<'_, E>,
    population: Population<'_, E::Param>,
    expected: &Expected<E>,
) where
    E::Param: Bits,
{
    let c = bn.shape().channels();
    let name = |what: &str| format!("{what} on {tier}");
    let blank = || Misaligned::new(&vec![E::default(); bn.shape().len()], 3);
    let params = || vec![E::Param::default(); c];
    let copy = |of: &Misaligned<E>| Misaligned::new(of.get(), 5);

    let (mut y, mut saved) = (blank(), bn.saved());
    bn.forward_train(x.get(), affine, y.get_mut(), &mut saved).unwrap();
    assert_saved(&name("saved"), &saved, &expected.saved);
    assert_bits(&name("forward_train"), y.get(), &expected.y);

    let (mut y, mut saved) = (copy(x), bn.saved());
    bn.forward_train_in_place(y.get_mut(), affine, &mut saved).unwrap();
    assert_saved(&name("saved in place"), &saved, &expected.saved);
    assert_bits(&name("forward_train_in_place"), y.get(), &expected.y);

    let mut saved = bn.saved();
    let y = bn.forward_train_to_vec(x.get(), affine, &mut saved).unwrap();
    assert_saved(&name("saved to vec"), &saved, &expected.saved);
    assert_bits(&name("forward_train_to_vec"), &y, &expected.y);

    let (mut moments, mut saved) = (vec![Moments::default(); c], bn.saved());
    bn.moments(x.get(), &mut moments).unwrap();
    assert_moments(&name("moments"), &moments, &expected.moments);
    bn.finish(&moments, &mut saved).unwrap();
    assert_saved(&name("finish"), &saved, &expected.saved);
    let mut y = blank();
    bn.normalize(x.get(), affine, &saved, y.get_mut()).unwrap();
    assert_bits(&name("normalize"), y.get(), &expected.y);
    let mut y = copy(x);
    bn.normalize_in_place(y.get_mut(), affine, &saved).unwrap();
    assert_bits(&name("normalize_in_place"), y.get(), &expected.y);

    assert_bits(&name("normalize_to_vec"), &bn.normalize_to_vec(x.get(), affine, &saved).unwrap(), &expected.y);

    let y = bn.forward_infer_to_vec(x.get(), affine, population).unwrap();
    assert_bits(&name("forward_infer_to_vec"), &y, &expected.inferred);
    let mut y = blank();
    bn.forward_infer(x.get(), affine, population, y.get_mut()).unwrap();
    assert_bits(&name("forward_infer"), y.get(), &expected.inferred);
    let mut y = copy(x);
    bn.forward_infer_in_place(y.get_mut(), affine, population).unwrap();
    assert_bits(&name("forward_infer_in_place"), y.get(), &expected.inferred);

    let (mut dx, mut dgamma, mut dbeta) = (blank(), params(), params());
    let gradients =
        Gradients { dx: Some(dx.get_mut()), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
    bn.backward(x.get(), dy.get(), &saved, affine, gradients).unwrap();
    assert_bits(&name("dgamma"), &dgamma, &expected.dgamma);
    assert_bits(&name("dbeta"), &dbeta, &expected.dbeta);
    assert_bits(&name("dx"), dx.get(), &expected.dx);

    let mut dgamma = params();
    let gradients = Gradients { dgamma: Some(&mut dgamma), ..Default::default() };
    bn.backward(x.get(), dy.get(), &saved, affine, gradients).unwrap();
    assert_bits(&name("dgamma alone"), &dgamma, &expected.dgamma);

    let (mut dx, mut dbeta) = (copy(dy), params());
    bn.backward_in_place(
        x.get(),
        dx.get_mut(),
        &saved,
        affine,
        Gradients { dbeta: Some(&mut dbeta), ..Default::default() },
    )
    .unwrap();
    assert_bits(&name("dx in place"), dx.get(), &expected.dx);
    assert_bits(&name("dbeta in place"), &dbeta, &expected.dbeta);

    let mut dgamma = params();
    let gradients = Gradients { dgamma: Some(&mut dgamma), ..Default::default() };
    let dx = bn.backward_to_vec(x.get(), dy.get(), &saved, affine, gradients).unwrap();
    assert_bits(&name("backward_to_vec"), &dx, &expected.dx);
    assert_bits(&name("dgamma to vec"), &dgamma, &expected.dgamma);

    let (mut sums, mut dx) = (vec![GradientSums::default(); c], blank());
    bn.gradient_sums(x.get(), dy.get(), &saved, affine, &mut sums).unwrap();
    assert_sums(&name("gradient_sums"), &sums, &expected.sums);
    bn.input_gradient(x.get(), dy.get(), &saved, affine, &sums, dx.get_mut()).unwrap();
    assert_bits(&name("input_gradient"), dx.get(), &expected.dx);
    let mut dx = copy(dy);
    bn.input_gradient_in_place(x.get(), dx.get_mut(), &saved, affine, &sums).unwrap();
    assert_bits(&name("input_gradient_in_place"), dx.get(), &expected.dx);
}

/// The corners that chance may miss: all kinds of data on shapes of each geometry.
fn corners<E: Bits>()
where
    E::Param: Bits,
{
    let shapes = [
        Shape::nc(1, 1),
        Shape::nc(1, 5),
        Shape::nc(3, 128),
        Shape::nc(300, 130),
        Shape::nc(129, 2049),
        Shape::ncl(70, 3, 1),
        Shape::nchw(5, 3, 7, 7),
        Shape::nchw(40, 2, 15, 15),
        Shape::nchw(2, 2, 128, 65),
        Shape::nchw(5, 2, 50, 42),
        Shape::ncl(7, 2, 4097),
        Shape::ncdhw(2, 5, 3, 4, 5),
        Shape::nhwc(3, 9, 9, 3),
        Shape::nhwc(2, 50, 50, 17),
        Shape::nlc(2, 700, 24),
        Shape::ndhwc(2, 3, 4, 5, 160),
    ];
    for (i, shape) in shapes.into_iter().enumerate() {
        for data in Data::ALL {
            let case = Case {
                shape: shape.clone().unwrap(),
                data,
                seed: i as u64,
                offset: i,
                threads: [1, 2, 3, 7][i % 4],
                gamma: i % 3 != 0,
                beta: i % 4 != 0,
                stores: [Stores::Cached, Stores::Streaming][i % 2],
            };
            check::<E>(&case);
        }
    }
}

/// Tensors that are read and written at the same time, in several batches of channels.
fn batches<E: Bits>()
where
    E::Param: Bits,
{
    for (threads, shape) in [
        (1, Shape::nchw(4, 22, 96, 96)),
        (2, Shape::nchw(35, 70, 17, 9)),
        (2, Shape::nchw(5, 150, 29, 37)),
        (2, Shape::nchw(9, 150, 17, 17)),
        (1, Shape::ncl(1, 70, 9001)),
    ] {
        let kinds =
            [(Stores::Cached, Data::Normal), (Stores::Streaming, Data::Normal), (Stores::Streaming, Data::Changing)];
        for (stores, data) in kinds {
            let shape = shape.clone().unwrap();
            check::<E>(&Case { shape, data, seed: 7, offset: 3, threads, gamma: true, beta: true, stores });
        }
    }
}

macro_rules! suite {
    ($($name:ident: $t:ty),*) => {$(
        mod $name {
            use super::*;

            #[test]
            fn corner_cases() {
                corners::<$t>();
            }

            #[test]
            fn batches_of_channels() {
                batches::<$t>();
            }

            proptest! {
                #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]
                #[test]
                fn random_cases(case in cases()) {
                    check::<$t>(&case);
                }
            }
        }
    )*};
}

suite!(f32_: f32, f64_: f64);
#[cfg(feature = "half")]
suite!(bf16_: half::bf16, f16_: half::f16);

#[test]
fn a_nan_stays_in_its_channel() {
    for (shape, at) in [(Shape::nchw(3, 4, 5, 5).unwrap(), 2 * 25 + 7), (Shape::nhwc(3, 5, 5, 4).unwrap(), 14)] {
        let clean = Data::Normal.fill::<f32>(shape.len(), 9);
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = clean.clone();
            x[at] = poison;
            let run = |x: &[f32]| {
                let bn = BatchNorm::<f32>::new(shape).unwrap();
                let (mut y, mut saved) = (vec![0.0; x.len()], bn.saved());
                bn.forward_train(x, Affine::none(), &mut y, &mut saved).unwrap();
                y
            };
            let (got, expected) = (run(&x), run(&clean));
            let channel = |i: usize| match shape.layout() {
                batchnorm::Layout::ChannelsFirst => i / 25 % 4,
                batchnorm::Layout::ChannelsLast => i % 4,
            };
            for i in 0..x.len() {
                if channel(i) == channel(at) {
                    assert!(got[i].is_nan());
                } else {
                    assert_eq!(got[i].to_bits(), expected[i].to_bits());
                }
            }
        }
    }
}

/// Deviations are enlarged where the block before needed it, or the shift is tiny.
#[test]
fn blocks_need_not_resemble_each_other() {
    for shape in [Shape::nlc(4, 3000, 24), Shape::nchw(12, 20, 50, 50), Shape::nc(700, 130)].map(Result::unwrap) {
        let normal = Data::Normal.fill::<f32>(shape.len(), 5);
        for scales in [&[1e-17, 1.0][..], &[1.0, 1e-17, 8e-16, 1e-17], &[1e-39, 0.0, 1e22], &[0.0, 1.0, 1e-17, 1e5]] {
            let scale = |i: usize| scales[i * scales.len() / normal.len()];
            let x: Vec<f32> = normal.iter().enumerate().map(|(i, v)| v * scale(i)).collect();
            let expected = reference::moments(&shape, &x);
            for tier in tiers() {
                let bn = plan::<f32>(shape, tier, Parallelism::Sequential);
                let mut moments = vec![Moments::default(); shape.channels()];
                bn.moments(&x, &mut moments).unwrap();
                assert_moments(&format!("moments of {shape:?} with {scales:?} on {tier}"), &moments, &expected);
            }
        }
    }
}

#[test]
fn an_infinite_mean_gives_what_the_reference_gives() {
    for shape in [Shape::nc(1, 1), Shape::nchw(2, 2, 5, 7), Shape::nhwc(2, 3, 3, 20)].map(Result::unwrap) {
        let (x, dy) = (Data::Normal.fill::<f32>(shape.len(), 1), Data::Normal.fill::<f32>(shape.len(), 2));
        let (count, c) = (shape.count() as u64, shape.channels());
        let saved = Saved::from_parts(count, vec![f32::INFINITY; c], vec![1.0; c], 1e-5).unwrap();
        let expected = reference::gradient_sums(&shape, &x, &dy, &saved, Affine::none());
        for tier in tiers() {
            let bn = plan::<f32>(shape, tier, Parallelism::Sequential);
            let mut sums = vec![GradientSums::default(); c];
            bn.gradient_sums(&x, &dy, &saved, Affine::none(), &mut sums).unwrap();
            assert_sums(&format!("gradient_sums on {tier}"), &sums, &expected);
        }
    }
}

/// Rounding to bf16 could carry out of a NaN whose bits are all ones.
#[cfg(feature = "half")]
#[test]
fn every_nan_stays_one_in_bf16() {
    use half::bf16;
    let payloads = [0x7f80_0001, 0x7fc0_0000, 0x7fff_8000, 0x7fff_ffff, 0xffff_ffff].map(f32::from_bits);
    for shape in [Shape::nchw(2, 5, 3, 7), Shape::nhwc(2, 3, 7, 5)].map(Result::unwrap) {
        let mut x = Data::Normal.fill::<bf16>(shape.len(), 3);
        let dy = Data::Normal.fill::<bf16>(shape.len(), 4);
        for tier in tiers() {
            let bn = plan::<bf16>(shape, tier, Parallelism::Sequential);
            let (one, mut out) = ([1.0; 5], x.clone());
            let all_nan = |out: &[bf16], what: &str| assert!(out.iter().all(|v| v.is_nan()), "{what} on {tier}");
            let population = Population { mean: &one, var: &one };
            for (gamma, beta) in [(&payloads, &one), (&one, &payloads)] {
                bn.forward_infer(&x, Affine::new(gamma, beta), population, &mut out).unwrap();
                all_nan(&out, "y from gamma or beta");
            }
            let count = shape.count() as u64;
            for (mean, inv_std) in [(&payloads, &one), (&one, &payloads)] {
                let saved = Saved::from_parts(count, mean.to_vec(), inv_std.to_vec(), 1e-5).unwrap();
                bn.normalize(&x, Affine::none(), &saved, &mut out).unwrap();
                all_nan(&out, "y from statistics");
                let gradients = Gradients { dx: Some(&mut out), ..Default::default() };
                bn.backward(&x, &dy, &saved, Affine::none(), gradients).unwrap();
                all_nan(&out, "dx from statistics");
            }
        }
        for (i, bits) in [0x7f81, 0x7fc0, 0x7fff, 0xff81, 0xffff].into_iter().enumerate() {
            x[i] = bf16::from_bits(bits);
        }
        for tier in tiers() {
            let mut out = dy.clone();
            let (mean, var) = ([0.0; 5], [1.0; 5]);
            let bn = plan::<bf16>(shape, tier, Parallelism::Sequential);
            bn.forward_infer(&x, Affine::none(), Population { mean: &mean, var: &var }, &mut out).unwrap();
            assert!(out[..5].iter().all(|v| v.is_nan()) && out[5..].iter().all(|v| !v.is_nan()), "{tier}");
        }
    }
}
