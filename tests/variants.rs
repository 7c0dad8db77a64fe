//! Every variant, bit for bit as the reference or plain loops have it, on every element type, layout and tier. One
//! registry names them; the test prints the table of what was covered.

mod common;

use batchnorm::reference;
use batchnorm::{
    Affine, BatchNorm, Element, GradientSums, Gradients, Parallelism, Population, Real, Saved, Shape, Tier,
};
use common::{Bits, Data, assert_bits, plan, tiers};

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

    fn affine(&self) -> Affine<'_, E::Param> {
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
    let sums = reference::gradient_sums(&cell.shape, &args.x, &args.dy, &saved);
    assert_bits(
        "dx of the reference",
        &reference::input_gradient(&cell.shape, &args.x, &args.dy, &saved, Some(&args.gamma), &sums),
        &expected,
    );
    let (mut dx, mut dgamma, mut dbeta) = (args.blank(), args.params(0.0), args.params(0.0));
    let all = Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta) };
    bn.backward(&args.x, &args.dy, &saved, Some(&args.gamma), all).unwrap();
    assert_bits("dx", &dx, &expected);
    assert_bits("dgamma", &dgamma, &params(&sums, |sums| sums.dy_xhat));
    assert_bits("dbeta", &dbeta, &params(&sums, |sums| sums.dy));
    let mut dx = args.blank();
    let alone = Gradients { dx: Some(&mut dx), ..Default::default() };
    bn.backward(&args.x, &args.dy, &saved, Some(&args.gamma), alone).unwrap();
    assert_bits("dx alone", &dx, &expected);
    let mut dx = args.dy.clone();
    bn.backward_in_place(&args.x, &mut dx, &saved, Some(&args.gamma), None, None).unwrap();
    assert_bits("dx in place", &dx, &expected);
    let mut dx = args.blank();
    bn.input_gradient(&args.x, &args.dy, &saved, Some(&args.gamma), &sums, &mut dx).unwrap();
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
    let sums = reference::gradient_sums(&cell.shape, &args.x, &args.dy, &saved);
    let (mut dx, mut dgamma, mut dbeta) = (args.blank(), args.params(3.5), args.params(-1.25));
    let (mut dgamma_then, mut dbeta_then) = (dgamma.clone(), dbeta.clone());
    for _ in 0..2 {
        let all = Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta) };
        bn.backward(&args.x, &args.dy, &saved, Some(&args.gamma), all).unwrap();
        for (c, sums) in sums.iter().enumerate() {
            dgamma_then[c] = E::Param::from_f64(dgamma_then[c].to_f64() + sums.dy_xhat);
            dbeta_then[c] = E::Param::from_f64(dbeta_then[c].to_f64() + sums.dy);
        }
        assert_bits("dgamma", &dgamma, &dgamma_then);
        assert_bits("dbeta", &dbeta, &dbeta_then);
        let expected = reference::input_gradient(&cell.shape, &args.x, &args.dy, &saved, Some(&args.gamma), &sums);
        assert_bits("dx", &dx, &expected);
    }
}

/// A variant with its check for each element type.
struct Variant {
    name: &'static str,
    checks: Vec<(&'static str, fn(Cell))>,
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
    for Variant { name, checks } in registry() {
        for &(_, check) in &checks {
            for (_, shape) in layouts.clone() {
                for tier in tiers() {
                    check(Cell { shape: shape.clone().unwrap(), tier });
                }
            }
        }
        println!("{name:24} {}", checks.iter().map(|check| check.0).collect::<Vec<_>>().join(" "));
    }
}
