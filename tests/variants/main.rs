//! Every variant, bit for bit as the reference or plain loops have it, on every element type, layout and tier. One
//! registry names them; the test prints the table of what was covered.

#[path = "../common/mod.rs"]
mod common;
mod views;

use batchnorm::reference;
use batchnorm::{Activation, Affine, BatchNorm, Cotangents, Element, Error, GradientSums, Gradients, Parallelism};
use batchnorm::{Population, Real, RenormLimits, Saved, SecondGradients, Shape, Stores, Tier};
use common::{Bits, Data, assert_bits, plan, tiers};
use views::{blocked, masked, strided};

/// What a check runs on.
#[derive(Clone, Copy)]
struct Cell {
    shape: Shape,
    tier: Tier,
}

/// Data for one check.
struct Args<E: Element> {
    x: Vec<E>,
    dy: Vec<E>,
    gamma: Vec<E::Param>,
    beta: Vec<E::Param>,
    mean: Vec<E::Param>,
    var: Vec<E::Param>,
}

impl<E: Bits> Args<E> {
    fn new(shape: &Shape) -> Self {
        let (len, c) = (shape.len(), shape.channels());
        let positive = |seed| Data::Normal.fill::<E::Param>(c, seed).into_iter().map(|v| v * v).collect();
        Self {
            x: Data::Normal.fill(len, 1),
            dy: Data::Normal.fill(len, 2),
            gamma: Data::Normal.fill(c, 3),
            beta: Data::Normal.fill(c, 4),
            mean: Data::Normal.fill(c, 5),
            var: positive(6),
        }
    }

    fn affine(&self) -> Affine<'_, E> {
        Affine::new(&self.gamma, &self.beta)
    }

    fn population(&self) -> Population<'_, E::Param> {
        Population { mean: &self.mean, var: &self.var }
    }

    fn blank(&self) -> Vec<E> {
        vec![E::default(); self.x.len()]
    }

    fn params(&self, value: f64) -> Vec<E::Param> {
        vec![E::Param::from_f64(value); self.gamma.len()]
    }
}

const EPS: f64 = 1e-3;

impl Cell {
    fn plan<E: Element>(self) -> BatchNorm<E> {
        plan::<E>(self.shape, self.tier, Parallelism::Threads(2)).with_eps(EPS).unwrap()
    }

    /// The channel of each element.
    fn channels(self) -> impl Fn(usize) -> usize {
        let (spatial, channels, layout) = (self.shape.spatial(), self.shape.channels(), self.shape.layout());
        move |i| match layout {
            batchnorm::Layout::ChannelsFirst => i / spatial % channels,
            batchnorm::Layout::ChannelsLast => i % channels,
        }
    }
}

fn params<P: Real>(sums: &[GradientSums], of: impl Fn(&GradientSums) -> f64) -> Vec<P> {
    sums.iter().map(|sums| P::from_f64(of(sums))).collect()
}

fn frozen<E: Bits>(cell: Cell)
where
    E::Param: Bits,
{
    let (args, bn) = (Args::<E>::new(&cell.shape), cell.plan::<E>());
    let mut saved = bn.saved();
    bn.freeze(args.population(), &mut saved).unwrap();
    assert_bits("mean", saved.mean(), &args.mean);
    let inv_std: Vec<_> = args.var.iter().map(|var| E::Param::from_f64(1.0 / (var.to_f64() + EPS).sqrt())).collect();
    assert_bits("inv_std", saved.inv_std(), &inv_std);
    assert!(saved.is_frozen() && saved.count() == 0);

    let mut y = args.blank();
    bn.normalize(&args.x, args.affine(), &saved, &mut y).unwrap();
    assert_bits("y", &y, &reference::normalize(&cell.shape, &args.x, args.affine(), &saved));

    let channel = cell.channels();
    let scaled = |(i, dy): (usize, &E)| {
        let c = channel(i);
        E::from_param(dy.to_param() * E::Param::from_f64(args.gamma[c].to_f64() * inv_std[c].to_f64()))
    };
    let expected: Vec<E> = args.dy.iter().enumerate().map(scaled).collect();
    let sums = reference::gradient_sums(&cell.shape, &args.x, &args.dy, &saved, args.affine());
    assert_bits(
        "dx of the reference",
        &reference::input_gradient(&cell.shape, &args.x, &args.dy, &saved, args.affine(), &sums),
        &expected,
    );
    let (mut dx, mut dgamma, mut dbeta) = (args.blank(), args.params(0.0), args.params(0.0));
    let all = Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
    bn.backward(&args.x, &args.dy, &saved, args.affine(), all).unwrap();
    assert_bits("dx", &dx, &expected);
    assert_bits("dgamma", &dgamma, &params(&sums, |sums| sums.dy_xhat));
    assert_bits("dbeta", &dbeta, &params(&sums, |sums| sums.dy));
    let mut dx = args.blank();
    let alone = Gradients { dx: Some(&mut dx), ..Default::default() };
    bn.backward(&args.x, &args.dy, &saved, args.affine(), alone).unwrap();
    assert_bits("dx alone", &dx, &expected);
    let mut dx = args.dy.clone();
    bn.backward_in_place(&args.x, &mut dx, &saved, args.affine(), Gradients::default()).unwrap();
    assert_bits("dx in place", &dx, &expected);
    let mut dx = args.blank();
    bn.input_gradient(&args.x, &args.dy, &saved, args.affine(), &sums, &mut dx).unwrap();
    assert_bits("input_gradient", &dx, &expected);

    // A batch makes them its own again.
    bn.forward_train(&args.x, args.affine(), &mut y, &mut saved).unwrap();
    assert!(!saved.is_frozen());
    let of_batch: Saved<E::Param> = reference::finish(&reference::moments(&cell.shape, &args.x), EPS);
    assert_bits("mean of the batch", saved.mean(), of_batch.mean());
}

fn accumulated<E: Bits>(cell: Cell)
where
    E::Param: Bits,
{
    let (args, bn) = (Args::<E>::new(&cell.shape), cell.plan::<E>().with_accumulation(true));
    let (mut saved, mut y) = (bn.saved(), args.blank());
    bn.forward_train(&args.x, args.affine(), &mut y, &mut saved).unwrap();
    let sums = reference::gradient_sums(&cell.shape, &args.x, &args.dy, &saved, args.affine());
    let (mut dx, mut dgamma, mut dbeta) = (args.blank(), args.params(3.5), args.params(-1.25));
    let (mut dgamma_then, mut dbeta_then) = (dgamma.clone(), dbeta.clone());
    for half in [false, true] {
        let all =
            Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
        match half {
            false => bn.backward(&args.x, &args.dy, &saved, args.affine(), all).unwrap(),
            true => bn.parameter_gradients(&saved, &sums, all.dgamma, all.dbeta).unwrap(),
        }
        for (c, sums) in sums.iter().enumerate() {
            dgamma_then[c] = E::Param::from_f64(dgamma_then[c].to_f64() + sums.dy_xhat);
            dbeta_then[c] = E::Param::from_f64(dbeta_then[c].to_f64() + sums.dy);
        }
        assert_bits("dgamma", &dgamma, &dgamma_then);
        assert_bits("dbeta", &dbeta, &dbeta_then);
        let expected = reference::input_gradient(&cell.shape, &args.x, &args.dy, &saved, args.affine(), &sums);
        assert_bits("dx", &dx, &expected);
    }
}

fn renormalized<E: Bits>(cell: Cell)
where
    E::Param: Bits,
{
    let (args, bn) = (Args::<E>::new(&cell.shape), cell.plan::<E>());
    let limits = RenormLimits { r_max: 1.5, d_max: 0.4 };
    let mut saved = bn.saved();
    saved.renormalize(args.population(), limits).unwrap();
    let moments = reference::moments(&cell.shape, &args.x);
    let expected = reference::finish_renormalized(&moments, EPS, args.population(), limits);
    let then = reference::normalize(&cell.shape, &args.x, args.affine(), &expected);
    let mut y = args.blank();
    bn.forward_train(&args.x, args.affine(), &mut y, &mut saved).unwrap();
    assert_bits("y", &y, &then);
    assert_bits("r", saved.corrections().unwrap().0, expected.corrections().unwrap().0);
    assert_bits("d", saved.corrections().unwrap().1, expected.corrections().unwrap().1);
    let mut y = args.x.clone();
    bn.forward_train_in_place(&mut y, args.affine(), &mut saved).unwrap();
    assert_bits("y in place", &y, &then);
    let mut y = args.blank();
    bn.finish(&moments, &mut saved).unwrap();
    bn.normalize(&args.x, args.affine(), &saved, &mut y).unwrap();
    assert_bits("y in halves", &y, &then);

    let sums = reference::gradient_sums(&cell.shape, &args.x, &args.dy, &saved, args.affine());
    let dx_then = reference::input_gradient(&cell.shape, &args.x, &args.dy, &saved, args.affine(), &sums);
    let (dgamma_then, dbeta_then) = reference::affine_gradients(&sums, &saved);
    let (mut dx, mut dgamma, mut dbeta) = (args.blank(), args.params(0.0), args.params(0.0));
    let all = Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
    bn.backward(&args.x, &args.dy, &saved, args.affine(), all).unwrap();
    assert_bits("dx", &dx, &dx_then);
    assert_bits("dgamma", &dgamma, &dgamma_then);
    assert_bits("dbeta", &dbeta, &dbeta_then);
    let mut dx = args.blank();
    bn.input_gradient(&args.x, &args.dy, &saved, args.affine(), &sums, &mut dx).unwrap();
    assert_bits("dx in halves", &dx, &dx_then);
    let (mut dgamma, mut dbeta) = (args.params(0.0), args.params(0.0));
    bn.parameter_gradients(&saved, &sums, Some(&mut dgamma), Some(&mut dbeta)).unwrap();
    assert_bits("dgamma in halves", &dgamma, &dgamma_then);
    assert_bits("dbeta in halves", &dbeta, &dbeta_then);

    saved.do_not_renormalize();
    let (mut y, mut plain) = (args.blank(), bn.saved());
    bn.forward_train(&args.x, args.affine(), &mut y, &mut saved).unwrap();
    bn.forward_train(&args.x, args.affine(), &mut y, &mut plain).unwrap();
    assert_eq!(saved, plain);
}

/// Plain plans on the parts of the batch say what is right.
fn ghost<E: Bits>(cell: Cell)
where
    E::Param: Bits,
{
    let (args, bn) = (Args::<E>::new(&cell.shape), cell.plan::<E>());
    let n = cell.shape.batch();
    let of_sample = cell.shape.len() / n;
    for samples in [1, 2, n - 1, n, n + 1] {
        let ghost = bn.clone().ghost(samples).unwrap();
        assert_eq!(ghost.batches(), n.div_ceil(samples));
        let (mut y, mut dx) = (args.blank(), args.blank());
        let (mut saved, mut dgamma, mut dbeta) = (ghost.saved(), args.params(9.0), args.params(9.0));
        ghost.forward_train(&args.x, args.affine(), &mut y, &mut saved).unwrap();
        let all =
            Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
        ghost.backward(&args.x, &args.dy, &saved, args.affine(), all).unwrap();
        let (mut dgamma_then, mut dbeta_then) = (args.params(0.0), args.params(0.0));
        for (g, part) in (0..n).step_by(samples).enumerate() {
            let size = samples.min(n - part);
            let range = part * of_sample..(part + size) * of_sample;
            let shape = Shape::new(cell.shape.layout(), size, cell.shape.channels(), &[cell.shape.spatial()]).unwrap();
            let (x, dy) = (&args.x[range.clone()], &args.dy[range.clone()]);
            let of_part: Saved<E::Param> = reference::finish(&reference::moments(&shape, x), EPS);
            assert_bits("mean", saved[g].mean(), of_part.mean());
            assert_bits("y", &y[range.clone()], &reference::normalize(&shape, x, args.affine(), &of_part));
            let sums = reference::gradient_sums(&shape, x, dy, &of_part, args.affine());
            let expected = reference::input_gradient(&shape, x, dy, &of_part, args.affine(), &sums);
            assert_bits("dx", &dx[range], &expected);
            for (c, sums) in sums.iter().enumerate() {
                dgamma_then[c] = E::Param::from_f64(dgamma_then[c].to_f64() + sums.dy_xhat);
                dbeta_then[c] = E::Param::from_f64(dbeta_then[c].to_f64() + sums.dy);
            }
        }
        assert_bits("dgamma", &dgamma, &dgamma_then);
        assert_bits("dbeta", &dbeta, &dbeta_then);
        let mut in_place = args.x.clone();
        ghost.forward_train_in_place(&mut in_place, args.affine(), &mut saved).unwrap();
        assert_bits("y in place", &in_place, &y);
        let (mut in_place, mut dgamma) = (args.dy.clone(), args.params(9.0));
        let gradients = Gradients { dgamma: Some(&mut dgamma), ..Default::default() };
        ghost.backward_in_place(&args.x, &mut in_place, &saved, args.affine(), gradients).unwrap();
        assert_bits("dx in place", &in_place, &dx);
        assert_bits("dgamma in place", &dgamma, &dgamma_then);
    }
}

#[test]
fn virtual_batches_are_checked_before_any_is_written() {
    let bn = BatchNorm::<f32>::new(Shape::nc(5, 2).unwrap()).unwrap();
    assert_eq!(bn.clone().ghost(0).unwrap_err(), Error::VirtualBatch);
    assert_eq!(bn.clone().ghost(usize::MAX).unwrap().batches(), 1);
    let ghost = bn.clone().with_accumulation(true).ghost(2).unwrap();
    let (x, dy, mut y, mut saved) = ([1.0; 10], [1.0; 10], [7.0; 10], ghost.saved());
    let length = |what, expected, got| Err(Error::Length { what, expected, got });
    assert_eq!(ghost.forward_train(&x[1..], Affine::none(), &mut y, &mut saved), length("x", 10, 9));
    assert_eq!(ghost.forward_train(&x, Affine::none(), &mut y[1..], &mut saved), length("y", 10, 9));
    assert_eq!(ghost.forward_train(&x, Affine::none(), &mut y, &mut saved[1..]), length("saved", 3, 2));
    saved[2] = Saved::new(3);
    assert_eq!(ghost.forward_train(&x, Affine::none(), &mut y, &mut saved), length("saved", 2, 3));
    let mut saved = ghost.saved();
    assert_eq!(y, [7.0; 10]);
    ghost.forward_train(&x, Affine::none(), &mut y, &mut saved).unwrap();
    // The last one is the wrong batch: nothing of the first ones is written.
    saved[2] = saved[0].clone();
    let (mut dx, mut dgamma) = ([7.0; 10], [3.0; 2]);
    let gradients = Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: None, ..Default::default() };
    assert_eq!(ghost.backward(&x, &dy, &saved, Affine::none(), gradients), Err(Error::Shards { expected: 1, got: 2 }));
    saved[2] = Saved::new(2);
    let gradients = Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: None, ..Default::default() };
    assert_eq!(ghost.backward(&x, &dy, &saved, Affine::none(), gradients), Err(Error::MissingStatistics));
    assert_eq!((dx, dgamma), ([7.0; 10], [3.0; 2]));
    let empty = BatchNorm::<f32>::new(Shape::nc(0, 2).unwrap()).unwrap().ghost(2).unwrap();
    let refused = empty.forward_train(&[], Affine::none(), &mut [], &mut empty.saved());
    assert_eq!(refused, Err(Error::EmptyBatch { batch: 0, spatial: 1 }));
}

/// Every activation, with and without a residual; the backward pass with the output and without.
fn activated<E: Bits>(cell: Cell)
where
    E::Param: Bits,
{
    let (args, bn) = (Args::<E>::new(&cell.shape), cell.plan::<E>());
    let shape = &cell.shape;
    let residual = Data::Normal.fill::<E>(shape.len(), 8);
    let of_batch: Saved<E::Param> = reference::finish(&reference::moments(shape, &args.x), EPS);
    let mut constants = bn.saved();
    bn.freeze(args.population(), &mut constants).unwrap();
    for activation in [Activation::None, Activation::Relu, Activation::LeakyRelu(0.3)] {
        for affine in [args.affine(), args.affine().with_residual(&residual)] {
            let affine = affine.with_activation(activation);
            let then = reference::normalize(shape, &args.x, affine, &of_batch);
            let (mut y, mut saved) = (args.blank(), bn.saved());
            bn.forward_train(&args.x, affine, &mut y, &mut saved).unwrap();
            assert_bits("y", &y, &then);
            let mut in_place = args.x.clone();
            bn.forward_train_in_place(&mut in_place, affine, &mut saved).unwrap();
            assert_bits("y in place", &in_place, &then);
            let mut normalized = args.blank();
            bn.normalize(&args.x, affine, &saved, &mut normalized).unwrap();
            assert_bits("y in halves", &normalized, &then);
            let mut inferred = args.blank();
            bn.forward_infer(&args.x, affine, args.population(), &mut inferred).unwrap();
            let then = reference::forward_infer(shape, &args.x, affine, args.population(), EPS);
            assert_bits("inferred", &inferred, &then);
            for affine in [affine, affine.with_output(&y)] {
                for saved in [&saved, &constants] {
                    back(&bn, &args, saved, affine);
                }
            }
            // ReLU alone: a plain backward pass of what is left of dy.
            if activation == Activation::Relu {
                let left = |(y, dy): (&E, &E)| if y.to_param().to_f64() > 0.0 { *dy } else { E::default() };
                let left: Vec<E> = y.iter().zip(&args.dy).map(left).collect();
                let sums = reference::gradient_sums(shape, &args.x, &left, &saved, args.affine());
                let then = reference::input_gradient(shape, &args.x, &left, &saved, args.affine(), &sums);
                let (mut dx, mut dresidual) = (args.blank(), args.blank());
                let gradients = Gradients { dx: Some(&mut dx), dresidual: Some(&mut dresidual), ..Default::default() };
                bn.backward(&args.x, &args.dy, &saved, affine.with_output(&y), gradients).unwrap();
                assert_bits("dx of what is left", &dx, &then);
                assert_bits("what is left", &dresidual, &left);
            }
        }
    }
}

/// One bit per element for the activation: wherever the output lies, in place, and stored past the caches.
fn gated<E: Bits>(cell: Cell)
where
    E::Param: Bits,
{
    let (args, cached) = (Args::<E>::new(&cell.shape), cell.plan::<E>());
    let shape = &cell.shape;
    let residual = Data::Normal.fill::<E>(shape.len(), 8);
    let of_batch: Saved<E::Param> = reference::finish(&reference::moments(shape, &args.x), EPS);
    let mut constants = cached.saved();
    cached.freeze(args.population(), &mut constants).unwrap();
    let blank = vec![0xa5; cached.gates_len()];
    for affine in [args.affine(), args.affine().with_residual(&residual)] {
        let affine = affine.with_activation(Activation::LeakyRelu(0.3));
        let (y_then, mut then) = (reference::normalize(shape, &args.x, affine, &of_batch), blank.clone());
        reference::record_gates(shape, &args.x, affine, &of_batch, &mut then);
        let mut saved = cached.saved();
        for bn in [cached.clone().with_stores(Stores::Streaming), cached.clone()] {
            for first in [0, 1, 8] {
                let (mut y, mut gates) = (vec![E::default(); first + shape.len()], blank.clone());
                bn.forward_train(&args.x, affine.with_gates_to(&mut gates), &mut y[first..], &mut saved).unwrap();
                assert_bits("y", &y[first..], &y_then);
                assert_eq!(gates, then, "gates from {first}");
                gates.copy_from_slice(&blank);
                bn.normalize(&args.x, affine.with_gates_to(&mut gates), &saved, &mut y[first..]).unwrap();
                assert_eq!(gates, then, "gates in halves");
                y[first..].copy_from_slice(&args.x);
                gates.copy_from_slice(&blank);
                let to = affine.with_gates_to(&mut gates);
                bn.forward_train_in_place(&mut y[first..], to, &mut saved).unwrap();
                assert_bits("y in place", &y[first..], &y_then);
                assert_eq!(gates, then, "gates in place");
            }
        }
        let of_bits = reference::gradient_sums(shape, &args.x, &args.dy, &saved, affine.with_gates(&then));
        assert_eq!(of_bits, reference::gradient_sums(shape, &args.x, &args.dy, &saved, affine));
        // Bits that no forward pass would give tell whether they alone are seen.
        let others: Vec<u8> = then.iter().enumerate().map(|(i, bits)| bits ^ (i * 73) as u8).collect();
        for gates in [&then, &others] {
            for saved in [&saved, &constants] {
                back(&cached, &args, saved, affine.with_gates(gates));
            }
        }
        let ghost = cached.clone().ghost(2).unwrap();
        let (mut saved, mut gates) = (ghost.saved(), blank.clone());
        let mut y = args.blank();
        ghost.forward_train(&args.x, affine.with_gates_to(&mut gates), &mut y, &mut saved).unwrap();
        let [with, without] = [affine.with_gates(&gates), affine].map(|affine| {
            let (mut dx, mut dgamma) = (args.blank(), args.params(0.0));
            let gradients = Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), ..Default::default() };
            ghost.backward(&args.x, &args.dy, &saved, affine, gradients).unwrap();
            (dx, dgamma)
        });
        assert_bits("dx of virtual batches", &with.0, &without.0);
        assert_bits("dgamma of virtual batches", &with.1, &without.1);
    }
}

#[test]
fn gates_are_checked_and_spare_bits_left_alone() {
    let bn = BatchNorm::<f32>::new(Shape::nc(3, 1).unwrap()).unwrap();
    let (x, mut y, mut saved) = ([1.0, f32::NAN, -1.0], [7.0; 3], bn.saved());
    let relu = Affine::none().with_activation(Activation::Relu);
    let expected = bn.gates_len();
    let length = |got| Err(Error::Length { what: "gates", expected, got });
    let mut gates = vec![0xff; expected + 1];
    assert_eq!(bn.forward_train(&x, relu.with_gates_to(&mut gates), &mut y, &mut saved), length(expected + 1));
    assert_eq!((y, &gates[..]), ([7.0; 3], &vec![0xff; expected + 1][..]));
    bn.freeze(Population { mean: &[0.0], var: &[1.0] }, &mut saved).unwrap();
    let backward = |gates, gradients| bn.backward(&x, &x, &saved, relu.with_gates(gates), gradients);
    assert_eq!(backward(&gates[2..], Gradients::default()), length(expected - 1));
    bn.normalize(&x, relu.with_gates_to(&mut gates[..expected]), &saved, &mut y).unwrap();
    assert_eq!(gates[0], 0b1111_1011);
    bn.normalize(&x, Affine::none().with_gates_to(&mut gates[1..]), &saved, &mut y).unwrap();
    assert!(gates[1..].iter().all(|&bits| bits == 0xff), "nothing bends, so nothing is recorded");
    let mut other = [7.0; 3];
    let gradients = Gradients { dx: Some(&mut other), ..Default::default() };
    assert_eq!(bn.backward_in_place(&x, &mut y, &saved, relu, gradients), Err(Error::InPlace));
}

/// The backward passes against the reference.
fn back<E: Bits>(bn: &BatchNorm<E>, args: &Args<E>, saved: &Saved<E::Param>, affine: Affine<'_, E>)
where
    E::Param: Bits,
{
    let Args { x, dy, .. } = args;
    let sums = reference::gradient_sums(bn.shape(), x, dy, saved, affine);
    let dx_then = reference::input_gradient(bn.shape(), x, dy, saved, affine, &sums);
    let dresidual_then = reference::residual_gradient(bn.shape(), x, dy, saved, affine);
    let (dgamma_then, dbeta_then) = reference::affine_gradients::<E::Param>(&sums, saved);
    let (mut dx, mut dresidual) = (args.blank(), args.blank());
    let (mut dgamma, mut dbeta) = (args.params(0.0), args.params(0.0));
    let all = Gradients {
        dx: Some(&mut dx),
        dgamma: Some(&mut dgamma),
        dbeta: Some(&mut dbeta),
        dresidual: Some(&mut dresidual),
    };
    bn.backward(x, dy, saved, affine, all).unwrap();
    assert_bits("dx", &dx, &dx_then);
    assert_bits("dgamma", &dgamma, &dgamma_then);
    assert_bits("dbeta", &dbeta, &dbeta_then);
    assert_bits("dresidual", &dresidual, &dresidual_then);
    let (mut dx, mut dresidual, mut dbeta) = (dy.clone(), args.blank(), args.params(0.0));
    let beside = Gradients { dbeta: Some(&mut dbeta), dresidual: Some(&mut dresidual), ..Default::default() };
    bn.backward_in_place(x, &mut dx, saved, affine, beside).unwrap();
    assert_bits("dx in place", &dx, &dx_then);
    assert_bits("dresidual in place", &dresidual, &dresidual_then);
    dresidual.fill(E::default());
    assert_bits("dbeta in place", &dbeta, &dbeta_then);
    let alone = Gradients { dresidual: Some(&mut dresidual), ..Default::default() };
    bn.backward(x, dy, saved, affine, alone).unwrap();
    assert_bits("dresidual alone", &dresidual, &dresidual_then);
    let mut dgamma = args.params(0.0);
    let alone = Gradients { dgamma: Some(&mut dgamma), ..Default::default() };
    bn.backward(x, dy, saved, affine, alone).unwrap();
    assert_bits("dgamma alone", &dgamma, &dgamma_then);
    let mut halves = vec![GradientSums::default(); args.gamma.len()];
    bn.gradient_sums(x, dy, saved, affine, &mut halves).unwrap();
    assert_eq!(halves, sums);
    let mut dx = args.blank();
    bn.input_gradient(x, dy, saved, affine, &halves, &mut dx).unwrap();
    assert_bits("dx in halves", &dx, &dx_then);
    let (mut dresidual, mut dgamma, mut dbeta) = (args.blank(), args.params(0.0), args.params(0.0));
    bn.parameter_gradients(saved, &halves, Some(&mut dgamma), Some(&mut dbeta)).unwrap();
    assert_bits("dgamma in halves", &dgamma, &dgamma_then);
    assert_bits("dbeta in halves", &dbeta, &dbeta_then);
    bn.residual_gradient(x, dy, saved, affine, &mut dresidual).unwrap();
    assert_bits("dresidual in halves", &dresidual, &dresidual_then);
}

#[test]
fn activations_pass_nans_and_are_checked() {
    let bn = BatchNorm::<f32>::new(Shape::nc(4, 1).unwrap()).unwrap().with_eps(0.0).unwrap();
    let population = Population { mean: &[0.0], var: &[1.0] };
    let x = [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, -2.0];
    let mut y = [0.0; 4];
    let mut run =
        |activation| bn.forward_infer(&x, Affine::none().with_activation(activation), population, &mut y).map(|()| y);
    let relu = run(Activation::Relu).unwrap();
    assert!(relu[0].is_nan());
    assert_eq!(
        relu[1..].iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
        [0.0f32, f32::INFINITY, 0.0].map(f32::to_bits)
    );
    let leaky = run(Activation::LeakyRelu(0.5)).unwrap();
    assert!(leaky[0].is_nan());
    assert_eq!(leaky[1..], [f32::NEG_INFINITY, f32::INFINITY, -1.0]);
    for got in [-0.1, f64::NAN, f64::INFINITY] {
        assert!(matches!(run(Activation::LeakyRelu(got)), Err(Error::Slope { .. })));
    }
    let (mut dx, mut y) = ([7.0; 4], [7.0; 4]);
    let mut saved = bn.saved();
    let length = |what| Err(Error::Length { what, expected: 4, got: 3 });
    assert_eq!(bn.forward_train(&x, Affine::none().with_residual(&x[1..]), &mut y, &mut saved), length("residual"));
    bn.freeze(population, &mut saved).unwrap();
    let gradients = Gradients { dx: Some(&mut dx), ..Default::default() };
    let affine = Affine::none().with_output(&y[1..]);
    assert_eq!(bn.backward(&x, &x, &saved, affine, gradients), length("output"));
    let mut short = [7.0; 3];
    let gradients = Gradients { dx: Some(&mut dx), dresidual: Some(&mut short), ..Default::default() };
    assert_eq!(bn.backward(&x, &x, &saved, Affine::none(), gradients), length("dresidual"));
    assert_eq!(bn.residual_gradient(&x, &x, &saved, Affine::none(), &mut short), length("dresidual"));
    assert_eq!((dx, y, short), ([7.0; 4], [7.0; 4], [7.0; 3]));
}

/// The input given up to the output, forward and back, with every statistic that there is.
fn from_output<E: Bits>(cell: Cell)
where
    E::Param: Bits,
{
    let mut args = Args::<E>::new(&cell.shape);
    // Gammas of both signs, none near zero; xhat is smooth in them.
    for gamma in &mut args.gamma {
        let size = E::Param::from_f64(gamma.to_f64().abs() + 0.5);
        *gamma = if gamma.to_f64() < 0.0 { E::Param::from_f64(-1.0) * size } else { size };
    }
    let bn = cell.plan::<E>().with_backward_from_output(true);
    let (dy, shape) = (&args.dy, &cell.shape);
    for activation in [Activation::None, Activation::LeakyRelu(0.2)] {
        let affine = args.affine().with_activation(activation);
        for state in ["batch", "frozen", "renormalized"] {
            let (mut y, mut saved) = (args.x.clone(), bn.saved());
            match state {
                "frozen" => {
                    bn.freeze(args.population(), &mut saved).unwrap();
                    bn.normalize_in_place(&mut y, affine, &saved).unwrap();
                }
                _ => {
                    if state == "renormalized" {
                        saved.renormalize(args.population(), RenormLimits { r_max: 1.5, d_max: 0.4 }).unwrap();
                    }
                    bn.forward_train_in_place(&mut y, affine, &mut saved).unwrap();
                }
            }
            let sums = reference::gradient_sums_from_output(shape, &y, dy, &saved, affine);
            let dx_then = reference::input_gradient_from_output(shape, &y, dy, &saved, affine, &sums);
            let (dgamma_then, dbeta_then) = reference::affine_gradients::<E::Param>(&sums, &saved);
            let (mut dx, mut dgamma, mut dbeta) = (args.blank(), args.params(0.0), args.params(0.0));
            let (dx_to, dgamma_to, dbeta_to) = (Some(&mut dx[..]), Some(&mut dgamma[..]), Some(&mut dbeta[..]));
            let all = Gradients { dx: dx_to, dgamma: dgamma_to, dbeta: dbeta_to, ..Default::default() };
            bn.backward(&y, dy, &saved, affine, all).unwrap();
            assert_bits("dx", &dx, &dx_then);
            assert_bits("dgamma", &dgamma, &dgamma_then);
            assert_bits("dbeta", &dbeta, &dbeta_then);
            let mut dx = dy.clone();
            bn.backward_in_place(&y, &mut dx, &saved, affine, Gradients::default()).unwrap();
            assert_bits("dx in place", &dx, &dx_then);
            let mut halves = vec![GradientSums::default(); args.gamma.len()];
            bn.gradient_sums(&y, dy, &saved, affine, &mut halves).unwrap();
            assert_eq!(halves, sums);
            bn.input_gradient_in_place(&y, &mut dx, &saved, affine, &halves).unwrap();

            // What went back from the input says what is right; in f64 there are digits enough to tell.
            if E::DIGITS > 50 {
                let straight = reference::gradient_sums(shape, &args.x, dy, &saved, affine);
                let dx = reference::input_gradient(shape, &args.x, dy, &saved, affine, &straight);
                let (dgamma, dbeta) = reference::affine_gradients::<E::Param>(&straight, &saved);
                close("dx", &dx_then, &dx, 1e-9);
                close("dgamma", &dgamma_then, &dgamma, 1e-9);
                close("dbeta", &dbeta_then, &dbeta, 1e-9);
            }
        }
    }
}

/// The backward pass of the backward pass; tests/gradients.rs has it by finite differences.
fn twice<E: Bits>(cell: Cell)
where
    E::Param: Bits,
{
    let (args, bn) = (Args::<E>::new(&cell.shape), cell.plan::<E>());
    let of_dx = Data::Normal.fill::<E>(args.x.len(), 9);
    let of_dgamma = Data::Normal.fill::<E::Param>(args.gamma.len(), 10);
    for state in ["batch", "frozen", "renormalized"] {
        let (mut y, mut saved) = (args.blank(), bn.saved());
        match state {
            "frozen" => bn.freeze(args.population(), &mut saved).unwrap(),
            "renormalized" => {
                saved.renormalize(args.population(), RenormLimits { r_max: 1.5, d_max: 0.4 }).unwrap();
                bn.forward_train(&args.x, args.affine(), &mut y, &mut saved).unwrap();
            }
            _ => bn.forward_train(&args.x, args.affine(), &mut y, &mut saved).unwrap(),
        }
        let cotangents = Cotangents { dx: &of_dx, dgamma: Some(&of_dgamma), dbeta: Some(&args.beta) };
        let then = reference::double_backward(&cell.shape, &args.x, &args.dy, &saved, args.affine(), cotangents);
        let (mut of_x, mut of_dy, mut of_gamma) = (args.blank(), args.blank(), args.params(0.0));
        let all = SecondGradients { x: Some(&mut of_x), dy: Some(&mut of_dy), gamma: Some(&mut of_gamma) };
        bn.double_backward(&args.x, &args.dy, &saved, args.affine(), cotangents, all).unwrap();
        assert_bits("of x", &of_x, &then.0);
        assert_bits("of dy", &of_dy, &then.1);
        assert_bits("of gamma", &of_gamma, &then.2);
        let mut of_x = args.blank();
        let one = SecondGradients { x: Some(&mut of_x), ..Default::default() };
        bn.double_backward(&args.x, &args.dy, &saved, args.affine(), cotangents, one).unwrap();
        assert_bits("of x alone", &of_x, &then.0);
    }
}

#[test]
fn second_derivatives_are_checked_before_any_is_written() {
    let bn = BatchNorm::<f32>::new(Shape::nc(4, 1).unwrap()).unwrap();
    let (x, mut saved) = ([1.0f32, 2.0, 3.0, 4.0], bn.saved());
    let (mut of_x, mut of_gamma) = ([7.0; 4], [7.0]);
    let mut run = |saved: &Saved<f32>, affine: Affine<'_, f32>, cotangents: Cotangents<'_, f32>, len: usize| {
        let gradients = SecondGradients { x: Some(&mut of_x[..len]), gamma: Some(&mut of_gamma), dy: None };
        bn.double_backward(&x, &x, saved, affine, cotangents, gradients)
    };
    let plain = Cotangents { dx: &x, dgamma: None, dbeta: None };
    assert_eq!(run(&saved, Affine::none(), plain, 4), Err(Error::MissingStatistics));
    bn.freeze(Population { mean: &[0.0], var: &[1.0] }, &mut saved).unwrap();
    let length = |what, expected, got| Err(Error::Length { what, expected, got });
    assert_eq!(run(&saved, Affine::none(), plain, 3), length("gradient of x", 4, 3));
    let short = Cotangents { dx: &x[1..], ..plain };
    assert_eq!(run(&saved, Affine::none(), short, 4), length("cotangent of dx", 4, 3));
    let long = Cotangents { dgamma: Some(&x), ..plain };
    assert_eq!(run(&saved, Affine::none(), long, 4), length("cotangent of dgamma", 1, 4));
    let bent = Affine::none().with_activation(Activation::Relu);
    assert_eq!(run(&saved, bent, plain, 4), Err(Error::SecondDerivative));
    assert_eq!((of_x, of_gamma), ([7.0; 4], [7.0]));
}

/// Equal within `bound` of the largest expected value.
fn close<E: Element>(what: &str, got: &[E], expected: &[E], bound: f64) {
    let value = |v: &E| v.to_param().to_f64();
    let most = expected.iter().map(value).fold(0.0, |most: f64, v| most.max(v.abs()));
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let off = (value(got) - value(expected)).abs();
        assert!(off <= bound * most, "{what} {i}: {got:?} for {expected:?}, {off:e} off beside {most:e}");
    }
}

#[test]
fn outputs_that_do_not_tell_the_input_are_refused() {
    let bn = BatchNorm::<f32>::new(Shape::nc(4, 1).unwrap()).unwrap().with_backward_from_output(true);
    let (y, mut saved) = ([1.0f32, 2.0, 3.0, 4.0], bn.saved());
    bn.freeze(Population { mean: &[0.0], var: &[1.0] }, &mut saved).unwrap();
    let back = |affine: Affine<'_, f32>| {
        let (mut dx, mut sums) = ([7.0; 4], [GradientSums::default()]);
        let all = bn.backward(&y, &y, &saved, affine, Gradients { dx: Some(&mut dx), ..Default::default() });
        assert_eq!(bn.gradient_sums(&y, &y, &saved, affine, &mut sums).is_err(), all.is_err());
        assert_eq!(all.is_err(), dx == [7.0; 4]);
        assert_eq!(bn.input_gradient(&y, &y, &saved, affine, &sums, &mut dx).is_err(), all.is_err());
        all
    };
    let one = Affine::scale(&[1.0]);
    assert_eq!(back(one), Ok(()));
    assert_eq!(back(one.with_activation(Activation::LeakyRelu(0.1))), Ok(()));
    for activation in [Activation::Relu, Activation::LeakyRelu(0.0)] {
        assert_eq!(back(one.with_activation(activation)), Err(Error::NotInvertible));
    }
    assert_eq!(back(one.with_residual(&y)), Err(Error::NotInvertible));
    for (gamma, beta) in [(0.0, 0.0), (1e-35, 0.0), (f32::NAN, 0.0), (-2e-4, 1.0), (1.0, -5000.0)] {
        let got = back(Affine::new(&[gamma], &[beta]));
        assert!(matches!(got, Err(Error::Gamma { channel: 0, .. })), "{gamma} {beta}: {got:?}");
    }
    assert_eq!(back(Affine::new(&[-3e-4], &[1.0])), Ok(()));
}

/// Slopes that are infinite in f32, of an activation or of its inverse, where no value is bent: the lanes beyond the ends of runs and of
/// rows must not be either.
#[test]
fn slopes_beyond_the_type_spoil_no_sums() {
    let shapes = [4, 7, 8, 9, 15, 24].map(|plane| Shape::ncl(4, 3, plane)).into_iter().chain([Shape::nc(101, 3)]);
    let shapes: Vec<_> = shapes.map(Result::unwrap).collect();
    for (tier, shape) in tiers().into_iter().flat_map(|tier| shapes.iter().map(move |&shape| (tier, shape))) {
        let [x, dy] = [1, 2].map(|seed| Data::Normal.fill::<f32>(shape.len(), seed));
        let bn = plan::<f32>(shape, tier, Parallelism::Sequential);
        let mut saved = bn.saved();
        for (beta, slope, from_output) in [(10.0, 1e39, false), (-1.0, 1e-39, true)] {
            let (gamma, beta) = ([1.0; 3], [beta; 3]);
            let affine = Affine::new(&gamma, &beta).with_activation(Activation::LeakyRelu(slope));
            let bn = bn.clone().with_backward_from_output(from_output);
            let mut y = vec![0.0; shape.len()];
            bn.forward_train(&x, affine, &mut y, &mut saved).unwrap();
            y.iter_mut().for_each(|y| *y = y.abs() + 0.5);
            let mut sums = [GradientSums::default(); 3];
            let then = if from_output {
                bn.gradient_sums(&y, &dy, &saved, affine, &mut sums).unwrap();
                reference::gradient_sums_from_output(&shape, &y, &dy, &saved, affine)
            } else {
                let affine = affine.with_output(&y);
                bn.gradient_sums(&x, &dy, &saved, affine, &mut sums).unwrap();
                reference::gradient_sums(&shape, &x, &dy, &saved, affine)
            };
            for (sums, then) in sums.iter().zip(&then) {
                assert!(sums.dy.is_finite() && sums.dy_xhat.is_finite());
                assert_bits("sums", &[sums.dy, sums.dy_xhat], &[then.dy, then.dy_xhat]);
            }
        }
    }
}

/// Coefficients so small that all products vanish: what is left of dx is a sign.
#[test]
fn zeros_keep_their_signs() {
    let (x, dy) = ([-1.0f32, 1.0, -3.0, 3.0], [-1e-20f32, 1e-20, 1e-20, -1e-20]);
    for tier in tiers() {
        let bn = plan::<f32>(Shape::nc(4, 1).unwrap(), tier, Parallelism::Sequential);
        let (mut dx, mut saved) = ([7.0; 4], bn.saved());
        bn.forward_train(&x, Affine::none(), &mut dx, &mut saved).unwrap();
        let affine = Affine::scale(&[1e-42]);
        bn.backward(&x, &dy, &saved, affine, Gradients { dx: Some(&mut dx), ..Default::default() }).unwrap();
        let sums = reference::gradient_sums(bn.shape(), &x, &dy, &saved, affine);
        let then = reference::input_gradient(bn.shape(), &x, &dy, &saved, affine, &sums);
        assert_eq!(then[0].to_bits(), (-0.0f32).to_bits());
        assert_bits("dx", &dx, &then);
    }
}

/// The formulas in the plainest form, in f64, with both limits reached and not.
#[test]
fn renormalization_follows_the_paper() {
    let (n, c) = (50, 4);
    let shape = Shape::nc(n, c).unwrap();
    let (x, dy) = (Data::Normal.fill::<f64>(n * c, 1), Data::Normal.fill::<f64>(n * c, 2));
    let (gamma, beta) = ([0.5, -2.0, 1.5, 3.0], [0.1, 0.2, -0.3, 0.4]);
    // Close to the batch, too narrow and to the left, too wide, far to the right.
    let (mean, var) = ([0.05, -9.0, 0.0, 30.0], [1.1, 0.04, 90.0, 1.0]);
    let limits = RenormLimits { r_max: 2.0, d_max: 3.0 };
    let bn = BatchNorm::<f64>::new(shape).unwrap().with_eps(EPS).unwrap();
    let (mut saved, mut y) = (bn.saved(), vec![0.0; n * c]);
    saved.renormalize(Population { mean: &mean, var: &var }, limits).unwrap();
    bn.forward_train(&x, Affine::new(&gamma, &beta), &mut y, &mut saved).unwrap();
    let (mut dx, mut dgamma, mut dbeta) = (vec![0.0; n * c], [0.0; 4], [0.0; 4]);
    let all = Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
    bn.backward(&x, &dy, &saved, Affine::scale(&gamma), all).unwrap();

    let near = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-11, "{got} against {expected}");
    for k in 0..c {
        let column = |of: &[f64]| (0..n).map(|i| of[i * c + k]).collect::<Vec<_>>();
        let average = |of: &mut dyn Iterator<Item = f64>| of.sum::<f64>() / n as f64;
        let (x, dy) = (column(&x), column(&dy));
        let mu = average(&mut x.iter().copied());
        let sigma = (average(&mut x.iter().map(|x| (x - mu) * (x - mu))) + EPS).sqrt();
        let of_population = (var[k] + EPS).sqrt();
        let r = (sigma / of_population).clamp(0.5, 2.0);
        let d = ((mu - mean[k]) / of_population).clamp(-3.0, 3.0);
        let xhat: Vec<f64> = x.iter().map(|x| (x - mu) / sigma).collect();
        let g: Vec<f64> = dy.iter().map(|dy| dy * gamma[k] * r).collect();
        let (g_mean, gx_mean) = (average(&mut g.iter().copied()), average(&mut (0..n).map(|i| g[i] * xhat[i])));
        for i in 0..n {
            near(y[i * c + k], gamma[k] * (xhat[i] * r + d) + beta[k]);
            near(dx[i * c + k], (g[i] - g_mean - xhat[i] * gx_mean) / sigma);
        }
        near(dgamma[k], (0..n).map(|i| dy[i] * (xhat[i] * r + d)).sum());
        near(dbeta[k], dy.iter().sum());
    }
    let (r, d) = saved.corrections().unwrap();
    assert!(r[0] > 0.5 && r[0] < 2.0 && r[1] == 2.0 && r[2] == 0.5, "{r:?}");
    assert!(d[0].abs() < 3.0 && d[1] == 3.0 && d[3] == -3.0, "{d:?}");
}

#[test]
fn renormalization_is_scheduled_and_checked() {
    let limits = |step| RenormLimits::at_step(step);
    assert_eq!(limits(0), RenormLimits::NONE);
    assert_eq!(limits(5000), RenormLimits::NONE);
    assert_eq!(limits(15000), RenormLimits { r_max: 1.0 + 2.0 * 10.0 / 35.0, d_max: 2.5 });
    assert_eq!(limits(1 << 40), RenormLimits { r_max: 3.0, d_max: 5.0 });
    let mut saved = Saved::<f32>::new(2);
    let before = saved.clone();
    let population = Population { mean: &[0.0f32; 2], var: &[1.0; 2] };
    for (r_max, d_max) in [(0.9, 1.0), (1.0, -0.1), (f64::NAN, 0.0)] {
        let refused = saved.renormalize(population, RenormLimits { r_max, d_max }).unwrap_err();
        assert!(matches!(refused, Error::RenormLimits { .. }), "{refused}");
    }
    let short = Population { mean: &[0.0f32], ..population };
    let length = Error::Length { what: "mean", expected: 2, got: 1 };
    assert_eq!(saved.renormalize(short, RenormLimits::NONE), Err(length));
    let negative = Population { var: &[1.0f32, -1.0], ..population };
    assert_eq!(saved.renormalize(negative, RenormLimits::NONE), Err(Error::Variance { channel: 1, got: -1.0 }));
    assert_eq!(saved, before);
}

/// The name of an element type, and a check on it.
type Check = (&'static str, fn(Cell));

/// A variant with its check for each element type.
struct Variant {
    name: &'static str,
    checks: Vec<Check>,
}

macro_rules! registry {
    ($($name:literal: $check:ident,)*) => {
        vec![$(Variant {
            name: $name,
            checks: vec![
                ("f32", $check::<f32>),
                ("f64", $check::<f64>),
                #[cfg(feature = "half")]
                ("bf16", $check::<half::bf16>),
                #[cfg(feature = "half")]
                ("f16", $check::<half::f16>),
            ],
        },)*]
    };
}

fn registry() -> Vec<Variant> {
    registry![
        "frozen statistics": frozen,
        "accumulated gradients": accumulated,
        "Batch Renormalization": renormalized,
        "virtual batches (ghost)": ghost,
        "activation and residual": activated,
        "bits of activations": gated,
        "backward from the output": from_output,
        "second derivatives": twice,
        "strided tensors": strided,
        "blocked channels": blocked,
        "masks and lengths": masked,
    ]
}

#[test]
fn every_variant_on_every_type_layout_and_tier() {
    let layouts = [
        ("NC", Shape::nc(37, 19)),
        ("NCL", Shape::ncl(5, 3, 41)),
        ("NCHW", Shape::nchw(6, 5, 7, 7)),
        ("NCDHW", Shape::ncdhw(2, 3, 4, 5, 6)),
        ("NLC", Shape::nlc(3, 17, 24)),
        ("NHWC", Shape::nhwc(2, 9, 9, 17)),
        ("NDHWC", Shape::ndhwc(2, 3, 4, 5, 130)),
    ];
    println!(
        "on {} and {}:",
        layouts.each_ref().map(|layout| layout.0).join(", "),
        tiers().iter().map(|tier| tier.to_string()).collect::<Vec<_>>().join(", ")
    );
    let mut failed = Vec::new();
    for Variant { name, checks } in registry() {
        for &(element, check) in &checks {
            for (layout, shape) in layouts.clone() {
                for tier in tiers() {
                    let cell = Cell { shape: shape.clone().unwrap(), tier };
                    if std::panic::catch_unwind(|| check(cell)).is_err() {
                        failed.push(format!("{name}: {element}, {layout}, {tier}"));
                    }
                }
            }
        }
        println!("{name:24} {}", checks.iter().map(|check| check.0).collect::<Vec<_>>().join(" "));
    }
    assert!(failed.is_empty(), "{failed:#?}");
}
