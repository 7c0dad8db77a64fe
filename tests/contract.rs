//! Every bad input gets the typed error that names it and leaves all arguments alone, and the edges of what is allowed
//! (empty batches, one value per channel, constant channels, many threads) give their documented results.

mod common;

use batchnorm::{
    Affine, BatchNorm, Element, Error, GradientSums, Gradients, Layer, Layout, Moments, Momentum, Parallelism,
};
use batchnorm::{Population, Real, Result, Running, Saved, Shape, Tier, Variance, View};
use common::{Bits, Data, assert_bits, length};

/// All that any operation reads or writes, under the names that errors use.
#[derive(Debug, Clone)]
struct Args<E: Element> {
    x: Vec<E>,
    y: Vec<E>,
    dy: Vec<E>,
    dx: Vec<E>,
    gamma: Vec<E::Param>,
    beta: Vec<E::Param>,
    dgamma: Vec<E::Param>,
    dbeta: Vec<E::Param>,
    mean: Vec<E::Param>,
    var: Vec<E::Param>,
    moments: Vec<Moments>,
    sums: Vec<GradientSums>,
    saved: Saved<E::Param>,
}

fn param<P: Real>(value: f64) -> P {
    P::from_f64(value)
}

fn element<E: Element>(value: f64) -> E {
    E::from_param(param(value))
}

/// Statistics of `count` values, for any number of channels.
fn saved<P: Real>(channels: usize, count: u64) -> Saved<P> {
    match channels {
        0 => Saved::new(0),
        c => Saved::from_parts(count, vec![param(0.25); c], vec![param(0.5); c], 1e-5).unwrap(),
    }
}

impl<E: Element> Args<E> {
    /// Valid arguments; the outputs hold values that no operation here writes.
    fn new(shape: &Shape) -> Self {
        let (len, c) = (shape.len(), shape.channels());
        let params = |value| vec![param(value); c];
        let count = shape.count() as u64;
        Self {
            x: Data::Normal.fill(len, 1),
            y: vec![element(77.0); len],
            dy: Data::Normal.fill(len, 2),
            dx: vec![element(78.0); len],
            gamma: params(2.0),
            beta: params(3.0),
            dgamma: params(79.0),
            dbeta: params(80.0),
            mean: params(0.5),
            var: params(4.0),
            moments: vec![Moments { count, mean: 0.5, residue: 0.0, m2: 81.0 }; c],
            sums: vec![GradientSums { dy: 82.0, dy_xhat: 83.0 }; c],
            // An empty shard gets the statistics of other shards.
            saved: saved(c, count.max(1)),
        }
    }

    fn resize(&mut self, what: &str, len: usize) {
        match what {
            "x" => self.x.resize(len, E::default()),
            "y" => self.y.resize(len, E::default()),
            "dy" => self.dy.resize(len, E::default()),
            "dx" => self.dx.resize(len, E::default()),
            "gamma" => self.gamma.resize(len, param(1.0)),
            "beta" => self.beta.resize(len, param(1.0)),
            "dgamma" => self.dgamma.resize(len, param(1.0)),
            "dbeta" => self.dbeta.resize(len, param(1.0)),
            "mean" => self.mean.resize(len, param(1.0)),
            "var" => self.var.resize(len, param(1.0)),
            "moments" => self.moments.resize(len, self.moments[0]),
            "sums" => self.sums.resize(len, GradientSums::default()),
            "saved" => self.saved = saved(len, self.saved.count()),
            _ => unreachable!("{what}"),
        }
    }
}

/// A public operation.
struct Call<E: Element> {
    name: &'static str,
    run: fn(&BatchNorm<E>, &mut Args<E>) -> Result<()>,
    /// The arguments whose lengths it checks.
    lengths: &'static [&'static str],
    /// Whether it needs at least one value per channel.
    trains: bool,
    /// Whether it needs statistics that a batch has filled.
    reads_saved: bool,
}

/// All operations on tensors.
fn calls<E: Element>() -> Vec<Call<E>> {
    let call = |name, run, lengths, trains, reads_saved| Call { name, run, lengths, trains, reads_saved };
    vec![
        call(
            "forward_train",
            |bn, a| bn.forward_train(&a.x, Affine::new(&a.gamma, &a.beta), &mut a.y, &mut a.saved),
            &["x", "y", "gamma", "beta", "saved"],
            true,
            false,
        ),
        call(
            "forward_train_in_place",
            |bn, a| bn.forward_train_in_place(&mut a.x, Affine::new(&a.gamma, &a.beta), &mut a.saved),
            &["x", "gamma", "beta", "saved"],
            true,
            false,
        ),
        call(
            "forward_train_to_vec",
            |bn, a| bn.forward_train_to_vec(&a.x, Affine::new(&a.gamma, &a.beta), &mut a.saved).map(drop),
            &["x", "gamma", "beta", "saved"],
            true,
            false,
        ),
        call(
            "forward_infer",
            |bn, a| {
                let population = Population { mean: &a.mean, var: &a.var };
                bn.forward_infer(&a.x, Affine::new(&a.gamma, &a.beta), population, &mut a.y)
            },
            &["x", "y", "gamma", "beta", "mean", "var"],
            false,
            false,
        ),
        call(
            "forward_infer_in_place",
            |bn, a| {
                let population = Population { mean: &a.mean, var: &a.var };
                bn.forward_infer_in_place(&mut a.x, Affine::new(&a.gamma, &a.beta), population)
            },
            &["x", "gamma", "beta", "mean", "var"],
            false,
            false,
        ),
        call(
            "forward_infer_to_vec",
            |bn, a| {
                let population = Population { mean: &a.mean, var: &a.var };
                bn.forward_infer_to_vec(&a.x, Affine::new(&a.gamma, &a.beta), population).map(drop)
            },
            &["x", "gamma", "beta", "mean", "var"],
            false,
            false,
        ),
        call(
            "backward",
            |bn, a| {
                let gradients = Gradients {
                    dx: Some(&mut a.dx),
                    dgamma: Some(&mut a.dgamma),
                    dbeta: Some(&mut a.dbeta),
                    ..Default::default()
                };
                bn.backward(&a.x, &a.dy, &a.saved, Affine::scale(&a.gamma), gradients)
            },
            &["x", "dy", "saved", "gamma", "dx", "dgamma", "dbeta"],
            true,
            true,
        ),
        call(
            "backward_in_place",
            |bn, a| {
                let (dgamma, dbeta) = (Some(&mut a.dgamma[..]), Some(&mut a.dbeta[..]));
                let gradients = Gradients { dgamma, dbeta, ..Default::default() };
                bn.backward_in_place(&a.x, &mut a.dy, &a.saved, Affine::scale(&a.gamma), gradients)
            },
            &["x", "dy", "saved", "gamma", "dgamma", "dbeta"],
            true,
            true,
        ),
        call(
            "backward_to_vec",
            |bn, a| {
                let (dgamma, dbeta) = (Some(&mut a.dgamma[..]), Some(&mut a.dbeta[..]));
                let gradients = Gradients { dgamma, dbeta, ..Default::default() };
                bn.backward_to_vec(&a.x, &a.dy, &a.saved, Affine::scale(&a.gamma), gradients).map(drop)
            },
            &["x", "dy", "saved", "gamma", "dgamma", "dbeta"],
            true,
            true,
        ),
        call("moments", |bn, a| bn.moments(&a.x, &mut a.moments), &["x", "moments"], false, false),
        call("finish", |bn, a| bn.finish(&a.moments, &mut a.saved), &["moments", "saved"], true, false),
        call(
            "freeze",
            |bn, a| bn.freeze(Population { mean: &a.mean, var: &a.var }, &mut a.saved),
            &["mean", "var", "saved"],
            false,
            false,
        ),
        call(
            "scale_and_shift",
            |bn, a| {
                let population = Population { mean: &a.mean, var: &a.var };
                bn.scale_and_shift(Affine::new(&a.gamma, &a.beta), population, &mut a.dgamma, &mut a.dbeta)
            },
            &["gamma", "beta", "mean", "var"],
            false,
            false,
        ),
        call(
            "normalize",
            |bn, a| bn.normalize(&a.x, Affine::new(&a.gamma, &a.beta), &a.saved, &mut a.y),
            &["x", "gamma", "beta", "saved", "y"],
            false,
            true,
        ),
        call(
            "normalize_in_place",
            |bn, a| bn.normalize_in_place(&mut a.x, Affine::new(&a.gamma, &a.beta), &a.saved),
            &["x", "gamma", "beta", "saved"],
            false,
            true,
        ),
        call(
            "normalize_to_vec",
            |bn, a| bn.normalize_to_vec(&a.x, Affine::new(&a.gamma, &a.beta), &a.saved).map(drop),
            &["x", "gamma", "beta", "saved"],
            false,
            true,
        ),
        call(
            "gradient_sums",
            |bn, a| bn.gradient_sums(&a.x, &a.dy, &a.saved, Affine::none(), &mut a.sums),
            &["x", "dy", "saved", "sums"],
            false,
            true,
        ),
        call(
            "input_gradient",
            |bn, a| bn.input_gradient(&a.x, &a.dy, &a.saved, Affine::scale(&a.gamma), &a.sums, &mut a.dx),
            &["x", "dy", "saved", "gamma", "sums", "dx"],
            false,
            true,
        ),
        call(
            "input_gradient_in_place",
            |bn, a| bn.input_gradient_in_place(&a.x, &mut a.dy, &a.saved, Affine::scale(&a.gamma), &a.sums),
            &["x", "dy", "saved", "gamma", "sums"],
            false,
            true,
        ),
        call(
            "parameter_gradients",
            |bn, a| bn.parameter_gradients(&a.saved, &a.sums, Some(&mut a.dgamma), Some(&mut a.dbeta)),
            &["saved", "sums", "dgamma", "dbeta"],
            false,
            true,
        ),
        call(
            "check_forward_halves",
            |bn, a| bn.check_forward_halves(&a.x, Affine::new(&a.gamma, &a.beta), &a.y, &a.saved),
            &["x", "y", "gamma", "beta", "saved"],
            false,
            false,
        ),
        call(
            "check_backward_halves",
            |bn, a| {
                let (dgamma, dbeta) = (Some(&mut a.dgamma[..]), Some(&mut a.dbeta[..]));
                let gradients = Gradients { dx: Some(&mut a.dx), dgamma, dbeta, ..Default::default() };
                bn.check_backward_halves(&a.x, &a.dy, &a.saved, Affine::new(&a.gamma, &a.beta), &gradients)
            },
            &["x", "dy", "gamma", "beta", "saved", "dx", "dgamma", "dbeta"],
            false,
            true,
        ),
    ]
}

/// Asserts that `call` refuses `args` with `expected` and writes none of them. Debug texts are compared, because they
/// tell NaNs and signs of zero apart.
#[track_caller]
fn assert_refused<E: Element>(call: &Call<E>, bn: &BatchNorm<E>, mut args: Args<E>, expected: &Error) {
    let before = format!("{args:?}");
    assert_error(call.name, (call.run)(bn, &mut args), expected);
    assert_eq!(format!("{args:?}"), before, "{} wrote despite {expected}", call.name);
}

#[track_caller]
fn assert_error<T: std::fmt::Debug>(what: &str, result: Result<T>, expected: &Error) {
    assert_eq!(format!("{:?}", result.expect_err(what)), format!("{expected:?}"), "{what}");
}

fn full_shapes() -> [Shape; 5] {
    let shapes =
        [Shape::nc(3, 5), Shape::nchw(2, 3, 2, 2), Shape::nhwc(2, 2, 2, 3), Shape::nchw(4, 1, 3, 3), Shape::nc(1, 1)];
    shapes.map(Result::unwrap)
}

fn empty_shapes() -> [Shape; 6] {
    let shapes = [
        Shape::nc(0, 3),
        Shape::nc(0, 1),
        Shape::nchw(0, 3, 2, 2),
        Shape::nchw(2, 3, 0, 2),
        Shape::nhwc(2, 0, 2, 3),
        Shape::ncl(2, 1, 0),
    ];
    shapes.map(Result::unwrap)
}

fn wrong_lengths<E: Bits>() {
    for shape in full_shapes().into_iter().chain(empty_shapes()) {
        let bn = BatchNorm::<E>::new(shape).unwrap();
        for call in calls::<E>() {
            // What trains refuses an empty batch in any case.
            if shape.is_empty() && call.trains {
                continue;
            }
            (call.run)(&bn, &mut Args::new(&shape)).unwrap();
            for &what in call.lengths {
                let tensor = ["x", "y", "dy", "dx"].contains(&what);
                let expected = if tensor { shape.len() } else { shape.channels() };
                for got in [expected.wrapping_sub(1), expected + 1, 0] {
                    if got != expected && got != usize::MAX {
                        let mut args = Args::new(&shape);
                        args.resize(what, got);
                        assert_refused(&call, &bn, args, &length(what, expected, got));
                    }
                }
            }
        }
    }
}

fn empty_batches<E: Bits>() {
    for shape in empty_shapes() {
        let bn = BatchNorm::<E>::new(shape).unwrap();
        for call in calls::<E>() {
            let args = Args::new(&shape);
            if call.trains {
                let expected = Error::EmptyBatch { batch: shape.batch(), spatial: shape.spatial() };
                assert_refused(&call, &bn, args, &expected);
                continue;
            }
            let (mut expected, mut got) = (args.clone(), args);
            match call.name {
                "moments" => expected.moments.fill(Moments::default()),
                "gradient_sums" => expected.sums.fill(GradientSums::default()),
                // These do not look at the batch.
                "freeze" | "scale_and_shift" | "parameter_gradients" => {
                    let full = BatchNorm::<E>::new(Shape::nc(1, shape.channels()).unwrap()).unwrap();
                    (call.run)(&full, &mut expected).unwrap();
                }
                _ => (),
            }
            (call.run)(&bn, &mut got).unwrap();
            assert_eq!(format!("{got:?}"), format!("{expected:?}"), "{} of an empty batch", call.name);
        }
    }
}

fn bad_statistics<E: Bits>() {
    for shape in full_shapes().into_iter().chain(empty_shapes()) {
        let bn = BatchNorm::<E>::new(shape).unwrap();
        let (c, count) = (shape.channels(), shape.count() as u64);
        for call in calls::<E>() {
            if shape.is_empty() && call.trains {
                continue;
            }
            let refuse = |change: &dyn Fn(&mut Args<E>), expected: Error| {
                let mut args = Args::new(&shape);
                change(&mut args);
                assert_refused(&call, &bn, args, &expected);
            };
            if call.reads_saved {
                refuse(&|a| a.saved = Saved::new(c), Error::MissingStatistics);
            }
            if call.reads_saved && call.trains {
                for got in [count + 1, count + 1000] {
                    refuse(&|a| a.saved = saved(c, got), Error::Shards { expected: count, got });
                }
                if count > 1 {
                    refuse(&|a| a.saved = saved(c, count - 1), Error::Shards { expected: count, got: count - 1 });
                }
            }
            if call.lengths.contains(&"var") {
                for bad in [-1.0, -1e-30, f64::NAN, f64::NEG_INFINITY] {
                    let bad: E::Param = param(bad);
                    let expected = Error::Variance { channel: c - 1, got: bad.to_f64() };
                    refuse(&|a| a.var[c - 1] = bad, expected);
                }
                for good in [0.0, -0.0, f64::INFINITY] {
                    let mut args = Args::new(&shape);
                    args.var.fill(param(good));
                    (call.run)(&bn, &mut args).unwrap();
                }
            }
            if call.name == "finish" && c > 1 {
                let expected = Error::Count { channel: c - 1, expected: count, got: count + 7 };
                refuse(&|a| a.moments[c - 1].count = count + 7, expected);
                let expected = Error::Count { channel: 1, expected: count, got: 0 };
                refuse(&|a| a.moments[1] = Moments::default(), expected);
            }
            if call.name == "finish" {
                refuse(&|a| a.moments.fill(Moments::default()), Error::EmptyMoments);
            }
        }
    }
}

/// Values alone are never refused, the population variance apart, and never panic.
fn special_values<E: Bits>() {
    let specials = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, f64::MIN, f64::MIN_POSITIVE, -0.0];
    for (shape, special) in full_shapes().into_iter().flat_map(|s| specials.map(|v| (s, v))) {
        let bn = BatchNorm::<E>::new(shape).unwrap();
        for call in calls::<E>() {
            let mut a = Args::new(&shape);
            let (c, count) = (shape.channels(), a.saved.count());
            [&mut a.x, &mut a.dy].into_iter().for_each(|tensor| tensor.fill(element(special)));
            [&mut a.gamma, &mut a.beta, &mut a.mean].into_iter().for_each(|params| params.fill(param(special)));
            a.moments.iter_mut().for_each(|m| (m.mean, m.residue, m.m2) = (special, special, special));
            a.sums.fill(GradientSums { dy: special, dy_xhat: special });
            // As far as an inv_std can be.
            let size: E::Param = param(special.abs());
            let inv_std = if size.to_f64().is_infinite() { param(f64::NAN) } else { size };
            a.saved = Saved::from_parts(count, vec![param(special); c], vec![inv_std; c], 0.0).unwrap();
            (call.run)(&bn, &mut a).unwrap();
        }
    }
}

/// The layouts of one value per channel, for numbers of channels around vectors and joins.
fn single_values() -> Vec<Shape> {
    let of = |c| [Shape::nc(1, c), Shape::nchw(1, c, 1, 1), Shape::nhwc(1, 1, 1, c), Shape::ncdhw(1, c, 1, 1, 1)];
    [1, 2, 5, 17, 128, 300].into_iter().flat_map(of).map(Result::unwrap).collect()
}

/// The usual, none, and one whose inv_std, 1e150, is no f32.
const ALL_EPS: [f64; 3] = [1e-5, 0.0, 1e-300];

fn one_value_per_channel<E: Bits>()
where
    E::Param: Bits,
{
    for (shape, eps) in single_values().into_iter().flat_map(|s| ALL_EPS.map(|eps| (s, eps))) {
        let bn = BatchNorm::<E>::new(shape).unwrap().with_eps(eps).unwrap();
        let c = shape.channels();
        let (x, dy) = (Data::Offset.fill::<E>(c, 3), Data::Normal.fill::<E>(c, 4));
        let (gamma, beta) = (Data::Normal.fill::<E::Param>(c, 5), Data::Normal.fill::<E::Param>(c, 6));
        let (mut y, mut saved) = (vec![E::default(); c], bn.saved());
        bn.forward_train(&x, Affine::new(&gamma, &beta), &mut y, &mut saved).unwrap();
        let stored: Vec<E> = beta.iter().map(|&b| E::from_param(b)).collect();
        assert_bits("y is beta", &y, &stored);
        assert_bits("the mean", saved.mean(), &x.iter().map(|x| x.to_param()).collect::<Vec<_>>());
        assert_bits("the variance", saved.var(), &vec![E::Param::default(); c]);

        let (mut dx, mut dgamma, mut dbeta) = (y, beta.clone(), beta);
        let gradients =
            Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
        bn.backward(&x, &dy, &saved, Affine::scale(&gamma), gradients).unwrap();
        assert!(dx.iter().all(|&dx| dx == E::default()), "dx of one value: {dx:?}");
        assert!(dgamma.iter().all(|&dgamma| dgamma == E::Param::default()), "{dgamma:?}");
        assert_bits("dbeta is dy", &dbeta, &dy.iter().map(|dy| dy.to_param()).collect::<Vec<_>>());
    }
}

fn constant_channels<E: Bits>()
where
    E::Param: Bits,
{
    // The last two have several blocks to merge.
    let shapes = [
        Shape::nc(7, 3),
        Shape::nc(2, 130),
        Shape::ncl(5, 3, 11),
        Shape::nchw(40, 2, 7, 7),
        Shape::nhwc(3, 9, 9, 3),
        Shape::ncl(70, 1, 1),
        Shape::nchw(2, 2, 100, 100),
        Shape::nlc(2, 3000, 3),
    ];
    // 0.1 and -15.94 are rounded by every type; the last overflows when a few are added in f32.
    let constants = [0.0, 0.1, 100.0, 1e10, -15.94, 1e30, 1e-40, -3e38];
    for (shape, eps) in shapes.into_iter().flat_map(|s| ALL_EPS.map(|eps| (s.clone().unwrap(), eps))) {
        let bn = BatchNorm::<E>::new(shape).unwrap().with_eps(eps).unwrap();
        let c = shape.channels();
        let gamma: Vec<E::Param> = (0..c).map(|c| param([2.0, -7.0, 1e3][c % 3])).collect();
        let beta: Vec<E::Param> = (0..c).map(|c| param([-1.5, 0.0, 0.3][c % 3])).collect();
        let channel = |i: usize| match shape.layout() {
            Layout::ChannelsFirst => i / shape.spatial() % c,
            Layout::ChannelsLast => i % c,
        };
        for constant in constants {
            let value: E = element(constant);
            if !value.to_param().to_f64().is_finite() {
                continue;
            }
            let x = vec![value; shape.len()];
            let (mut y, mut saved) = (vec![E::default(); x.len()], bn.saved());
            bn.forward_train(&x, Affine::new(&gamma, &beta), &mut y, &mut saved).unwrap();
            let stored: Vec<E> = (0..y.len()).map(|i| E::from_param(beta[channel(i)])).collect();
            assert_bits(&format!("constant {constant}, eps {eps}, {shape:?}"), &y, &stored);
            assert_bits("the mean", saved.mean(), &vec![value.to_param(); c]);
            assert_bits("the variance", saved.var(), &vec![E::Param::default(); c]);
            if eps == 0.0 {
                let (dy, mut dx) = (Data::Normal.fill::<E>(x.len(), 7), y);
                let gradients = Gradients { dx: Some(&mut dx), ..Default::default() };
                bn.backward(&x, &dy, &saved, Affine::scale(&gamma), gradients).unwrap();
                assert!(dx.iter().all(|&dx| dx == E::default()), "dx of constant {constant} without eps");
            }
        }
    }
}

macro_rules! for_each_element {
    ($($test:ident),*) => {$(
        mod $test {
            #[test]
            fn f32_and_f64() {
                super::$test::<f32>();
                super::$test::<f64>();
            }

            #[cfg(feature = "half")]
            #[test]
            fn bf16_and_f16() {
                super::$test::<half::bf16>();
                super::$test::<half::f16>();
            }
        }
    )*};
}

for_each_element!(
    wrong_lengths,
    empty_batches,
    bad_statistics,
    special_values,
    one_value_per_channel,
    constant_channels
);

#[test]
fn shapes_that_fit_no_slice() {
    let limit = isize::MAX as usize / size_of::<f64>();
    let half = 1usize << (usize::BITS / 2);
    let dims: [&[usize]; 8] = [
        &[limit + 1, 1],
        &[usize::MAX, 2],
        &[half, half],
        &[2, 3, usize::MAX],
        // A zero elsewhere does not hide the overflow.
        &[0, usize::MAX, 2],
        &[usize::MAX, 2, 0],
        &[2, usize::MAX, 0, 3],
        &[half, 3, half, 0],
    ];
    for dims in dims {
        for layout in [Layout::ChannelsFirst, Layout::ChannelsLast] {
            let expected = Error::ShapeOverflow { dims: dims.to_vec() };
            assert_error("shape", Shape::new(layout, dims[0], dims[1], &dims[2..]), &expected);
        }
    }
    let named = [
        (Shape::nc(usize::MAX, 2), vec![usize::MAX, 2]),
        (Shape::ncl(2, 3, usize::MAX), vec![2, 3, usize::MAX]),
        (Shape::nchw(2, 3, half, half), vec![2, 3, half, half]),
        (Shape::ncdhw(2, 3, 4, half, half), vec![2, 3, 4, half, half]),
        (Shape::nlc(2, usize::MAX, 3), vec![2, 3, usize::MAX]),
        (Shape::nhwc(2, half, half, 3), vec![2, 3, half, half]),
        (Shape::ndhwc(2, 4, half, half, 3), vec![2, 3, 4, half, half]),
    ];
    for (shape, dims) in named {
        assert_error("named constructor", shape, &Error::ShapeOverflow { dims });
    }
    for shape in [Shape::nc(3, 0), Shape::nchw(2, 0, 3, 3), Shape::nhwc(0, 2, 2, 0), Shape::nc(usize::MAX, 0)] {
        assert_error("no channel", shape, &Error::ZeroChannels);
    }
    // The largest shapes are valid, and refuse the slices that exist.
    for shape in [Shape::nc(1, limit), Shape::nc(limit, 1), Shape::ncl(1, 7, limit / 7)].map(Result::unwrap) {
        let bn = BatchNorm::<f32>::new(shape).unwrap();
        let result = bn.forward_train(&[0.0], Affine::none(), &mut [0.0], &mut Saved::new(1));
        assert_error("huge", result, &length("x", shape.len(), 1));
    }
}

/// A batch without samples is a no-op for every view, and a stride that is never taken may have any size.
#[test]
fn views_of_nothing_and_strides_not_taken() {
    let population = Population { mean: &[0.0; 3], var: &[1.0; 3] };
    for shape in [Shape::nchw(0, 3, 4, 5), Shape::nchw(2, 3, 0, 5)].map(Result::unwrap) {
        let sizes = [shape.batch(), 3, 4 * usize::from(shape.spatial() > 0), 5];
        let views = [View::strided(&shape, &sizes, &[200, 60, 6, 1]).unwrap(), View::blocked(&shape, 8).unwrap()];
        for view in views {
            let bn = BatchNorm::<f32>::new(shape).unwrap().with_views(view.clone(), view).unwrap();
            bn.forward_infer(&[], Affine::none(), population, &mut []).unwrap();
            bn.normalize(&[], Affine::none(), &saved(3, 4), &mut []).unwrap();
        }
    }
    let shape = Shape::nchw(2, 1, 4, 5).unwrap();
    let (x, population) = (Data::Normal.fill::<f32>(shape.len(), 1), Population { mean: &[0.0], var: &[1.0] });
    let infer = |stride: usize| {
        let view = View::strided(&shape, &[2, 1, 4, 5], &[20, stride, 5, 1]).unwrap();
        let apart = View::strided(&shape, &[2, 1, 4, 5], &[100, stride, 6, 1]).unwrap();
        let mut y = vec![0.0; apart.len()];
        let bn = BatchNorm::<f32>::new(shape).unwrap().with_views(view, apart).unwrap();
        bn.forward_infer(&x, Affine::none(), population, &mut y).unwrap();
        y
    };
    assert_eq!(infer(usize::MAX), infer(20));
}

/// Room for packed elements is that of the tensor at hand, not of the largest block on the most threads.
#[test]
fn scratch_of_small_views_is_small() {
    for shape in [Shape::nlc(2, 8, 64), Shape::ncl(2, 64, 8), Shape::nc(9, 300)].map(Result::unwrap) {
        let bn = BatchNorm::<f32>::new(shape).unwrap().with_parallelism(Parallelism::Threads(1024));
        let bn = bn.with_mask(&vec![true; shape.count()]).unwrap();
        assert!(bn.scratch_len() < 4 << 20, "{} bytes for {shape:?}", bn.scratch_len());
    }
}

/// A layer without taps has no weights, so any number of channels fits its slice.
#[test]
fn layers_without_weights() {
    let bn = BatchNorm::<f32>::new(Shape::nc(1, 3).unwrap()).unwrap();
    let (mut bias, population) = ([1.0; 3], Population { mean: &[0.0; 3], var: &[1.0; 3] });
    let layer = Layer::convolution(3, usize::MAX, 0);
    bn.with_eps(0.0).unwrap().fold_into_preceding(layer, &mut [], &mut bias, Affine::none(), population).unwrap();
    assert_eq!(bias, [1.0; 3]);
}

#[test]
fn options_out_of_range() {
    let shape = Shape::nc(4, 2).unwrap();
    let plan = || BatchNorm::<f32>::new(shape).unwrap();
    for got in [-1.0, -1e-300, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        assert_error("with_eps", plan().with_eps(got), &Error::Eps { got });
        assert_error("from_parts", Saved::from_parts(4, vec![0f32], vec![1.0], got), &Error::Eps { got });
    }
    for eps in [0.0, -0.0, 1e-300, f64::MAX] {
        assert_eq!(plan().with_eps(eps).unwrap().eps(), eps);
    }

    let momentums = [Momentum::WeightOfNew as fn(f64) -> Momentum, Momentum::WeightOfOld];
    for momentum in momentums {
        for got in [-0.1, 1.0000001, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let (momentum, expected) = (momentum(got), Error::Momentum { got });
            assert_error("running", plan().running(momentum, Variance::Biased), &expected);
            assert_error("new", Running::<f32>::new(2, momentum, Variance::Biased), &expected);
            let parts = Running::from_parts(vec![0f64; 2], vec![1.0; 2], 3, momentum, Variance::Biased);
            assert_error("from_parts", parts, &expected);
        }
        for weight in [0.0, -0.0, 0.5, 1.0] {
            plan().running(momentum(weight), Variance::Unbiased).unwrap();
        }
    }

    for (tier, result) in Tier::ALL.map(|tier| (tier, plan().with_tier(tier))) {
        match tier.is_available() {
            true => assert_eq!(result.unwrap().tier(), tier),
            false => assert_error("with_tier", result, &Error::TierUnavailable { tier }),
        }
    }
}

#[test]
fn parts_that_do_not_fit() {
    let parts = |count, mean: &[f32], inv_std: &[f32]| Saved::from_parts(count, mean.to_vec(), inv_std.to_vec(), 1e-5);
    assert_error("saved", parts(4, &[], &[]), &Error::ZeroChannels);
    assert_error("saved", parts(4, &[], &[1.0]), &Error::ZeroChannels);
    assert_error("saved", parts(4, &[0.0, 1.0], &[1.0]), &length("inv_std", 2, 1));
    assert_error("saved", parts(4, &[0.0], &[1.0, 1.0]), &length("inv_std", 1, 2));
    assert_error("saved", parts(0, &[0.0], &[1.0]), &Error::MissingStatistics);
    for got in [-0.5, f32::INFINITY, f32::NEG_INFINITY] {
        let refused = Error::InvStd { channel: 1, got: got.into() };
        assert_error("saved", parts(4, &[0.0; 3], &[1.0, got, -1.0]), &refused);
    }
    assert!(parts(4, &[0.0], &[f32::NAN]).is_ok());

    let running = |mean: &[f64], var: &[f64]| {
        Running::from_parts(mean.to_vec(), var.to_vec(), 1, Momentum::Cumulative, Variance::Unbiased)
    };
    assert_error("running", running(&[], &[]), &Error::ZeroChannels);
    assert_error("running", running(&[0.0; 2], &[1.0; 3]), &length("var", 2, 3));
    assert_error("running", running(&[0.0; 2], &[]), &length("var", 2, 0));
    for got in [-1e-9, f64::NAN, f64::NEG_INFINITY] {
        assert_error("running", running(&[0.0; 3], &[0.0, got, -5.0]), &Error::Variance { channel: 1, got });
    }
    let none = Running::<f64>::new(0, Momentum::Cumulative, Variance::Biased);
    assert_error("running", none, &Error::ZeroChannels);

    for variance in [Variance::Biased, Variance::Unbiased] {
        let mut running = Running::<f32>::new(2, Momentum::WeightOfNew(0.1), variance).unwrap();
        let before = running.clone();
        let mut refuse = |what, saved: &Saved<f32>, expected| {
            assert_error(what, running.update(saved), &expected);
            assert_eq!(running, before, "{what}");
        };
        for channels in [0, 1, 3] {
            refuse("channels", &saved(channels, 4), length("saved", 2, channels));
        }
        refuse("never filled", &Saved::new(2), Error::MissingStatistics);
        let (mut constants, of_two) = (Saved::new(2), Shape::nc(4, 2).and_then(BatchNorm::<f32>::new).unwrap());
        of_two.freeze(Population { mean: &[0.5; 2], var: &[2.0; 2] }, &mut constants).unwrap();
        refuse("constants", &constants, Error::FrozenStatistics);
        match variance {
            Variance::Unbiased => refuse("one value", &saved(2, 1), Error::UnbiasedFromOne { count: 1 }),
            Variance::Biased => running.update(&saved(2, 1)).unwrap(),
        }
    }
}

#[test]
fn messages_say_what_was_expected_and_got() {
    let parts: [(Error, &[&str]); 16] = [
        (length("dgamma", 64, 63), &["`dgamma`", "64", "63"]),
        (Error::ShapeOverflow { dims: vec![2, 3] }, &["[2, 3]", "isize::MAX"]),
        (Error::ZeroChannels, &["at least one channel", "zero"]),
        (Error::EmptyBatch { batch: 0, spatial: 49 }, &["at least one value", "batch 0", "spatial size 49"]),
        (Error::EmptyMoments, &["no values", "`moments`", "merged"]),
        (Error::InvStd { channel: 3, got: -0.5 }, &["inv_std", "channel 3", "at least 0", "-0.5"]),
        (Error::FrozenStatistics, &["statistics of a batch", "constants", "`freeze`"]),
        (Error::FoldedAffine, &["gamma and beta", "without activation and residual"]),
        (Error::Eps { got: -0.5 }, &["eps", "finite", "at least 0", "-0.5"]),
        (Error::Momentum { got: 1.5 }, &["momentum", "between 0 and 1", "1.5"]),
        (Error::Variance { channel: 7, got: f64::NAN }, &["variance", "channel 7", "at least 0", "NaN"]),
        (Error::UnbiasedFromOne { count: 1 }, &["unbiased", "at least two", "got 1"]),
        (Error::MissingStatistics, &["expected the statistics", "got none", "forward"]),
        (Error::Count { channel: 3, expected: 8, got: 9 }, &["same number", "channel 0 has 8", "channel 3 has 9"]),
        (Error::Shards { expected: 8, got: 16 }, &["of 16 values", "has 8", "gradient_sums", "input_gradient"]),
        // Names the tiers that there are.
        (Error::TierUnavailable { tier: Tier::Avx512 }, &["avx512", "not available", "portable"]),
    ];
    for (error, parts) in parts {
        let text = error.to_string();
        parts.iter().for_each(|part| assert!(text.contains(part), "`{text}` lacks `{part}`"));
    }
}

#[test]
fn one_plan_serves_many_threads() {
    fn shared<T: Send + Sync>(_: &T) {}
    // Large enough that `Auto` uses the pool.
    for shape in [Shape::nchw(4, 20, 32, 32).unwrap(), Shape::nhwc(4, 32, 32, 20).unwrap()] {
        let run = |bn: &BatchNorm<f32>, seed: u64| {
            let (x, dy) = (Data::Offset.fill::<f32>(shape.len(), seed), Data::Normal.fill::<f32>(shape.len(), !seed));
            let (mut y, mut saved, mut dx) = (vec![0.0; x.len()], bn.saved(), vec![0.0; x.len()]);
            let (mut dgamma, mut dbeta) = (vec![0.0; shape.channels()], vec![0.0; shape.channels()]);
            bn.forward_train(&x, Affine::none(), &mut y, &mut saved).unwrap();
            let gradients = Gradients {
                dx: Some(&mut dx),
                dgamma: Some(&mut dgamma),
                dbeta: Some(&mut dbeta),
                ..Default::default()
            };
            bn.backward(&x, &dy, &saved, Affine::none(), gradients).unwrap();
            [y, dx, dgamma, dbeta, saved.mean().to_vec(), saved.inv_std().to_vec()]
        };
        let alone = BatchNorm::new(shape).unwrap().with_parallelism(Parallelism::Sequential);
        let expected: Vec<_> = (0..4).map(|seed| run(&alone, seed)).collect();
        for parallelism in [Parallelism::Sequential, Parallelism::Auto, Parallelism::Threads(3)] {
            let bn = BatchNorm::new(shape).unwrap().with_parallelism(parallelism);
            shared(&bn);
            std::thread::scope(|scope| {
                for (seed, expected) in expected.iter().enumerate() {
                    let (bn, run) = (&bn, &run);
                    scope.spawn(move || {
                        for _ in 0..2 {
                            for (got, expected) in run(bn, seed as u64).iter().zip(expected) {
                                assert_bits(&format!("{parallelism:?}, {shape:?}"), got, expected);
                            }
                        }
                    });
                }
            });
        }
    }
}

#[test]
fn new_vectors_are_of_dense_tensors_and_hold_dx_alone() {
    let bn = BatchNorm::<f32>::new(Shape::ncl(2, 3, 4).unwrap()).unwrap();
    let (x, none, mut saved) = ([1.0; 24], Affine::none, bn.saved());
    bn.forward_train_to_vec(&x, none(), &mut saved).unwrap();
    let mut dx = [7.0; 24];
    let gradients = Gradients { dx: Some(&mut dx), ..Default::default() };
    assert_eq!(bn.backward_to_vec(&x, &x, &saved, none(), gradients), Err(Error::InPlace));
    assert_eq!(dx, [7.0; 24]);

    // Nothing is allocated for a shape that the input does not have.
    let samples = isize::MAX as usize / 128;
    let vast = bn.with_shape(Shape::ncl(samples, 3, 4).unwrap()).unwrap();
    let expected = Error::Length { what: "x", expected: 12 * samples, got: 24 };
    assert_eq!(vast.forward_train_to_vec(&x, none(), &mut saved), Err(expected));

    let (masked, before) = (bn.with_mask(&[true; 8]).unwrap(), saved.clone());
    let population = Population { mean: &[0.0; 3], var: &[1.0; 3] };
    let refused = [
        masked.forward_train_to_vec(&x, none(), &mut saved),
        masked.forward_infer_to_vec(&x, none(), population),
        masked.normalize_to_vec(&x, none(), &before),
        masked.backward_to_vec(&x, &x, &before, none(), Gradients::default()),
    ];
    assert!(refused.iter().all(|refused| matches!(refused, Err(Error::View { .. }))), "{refused:?}");
    assert_eq!(saved, before);
}
