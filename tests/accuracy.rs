//! The bounds on statistics and outputs, against exact integer arithmetic: values are `(level + j) * step` with
//! integers `j`, so that sums, variances and normalized values are known without rounding.
//!
//! `cargo test --test accuracy -- --nocapture` prints the worst errors.

mod common;

use batchnorm::{Affine, BatchNorm, Element, Layout, Moments, Real, Shape};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How the integers of a channel are spread; `scale` is about their deviation.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Spread {
    Normal,
    Uniform,
    /// Two values: roundings of the same sum repeat.
    Two,
    /// Ascending: no early shift suits the late values.
    Ramp,
    /// The first value far away.
    Outlier,
    /// The second half of the samples on another level.
    Jump,
}

const SPREADS: [Spread; 6] =
    [Spread::Normal, Spread::Uniform, Spread::Two, Spread::Ramp, Spread::Outlier, Spread::Jump];

impl Spread {
    fn integer(self, rng: &mut ChaCha8Rng, i: usize, count: usize, scale: i64) -> i64 {
        let mut uniform = |reach: i64| rng.random_range(-reach..=reach);
        match self {
            Spread::Normal => (0..12).map(|_| uniform(scale)).sum::<i64>() / 2,
            Spread::Uniform => uniform(2 * scale),
            Spread::Two => [-scale, scale][i % 2],
            Spread::Ramp => (4 * scale as i128 * i as i128 / count as i128) as i64 - 2 * scale,
            Spread::Outlier if i == 0 => 400 * scale,
            Spread::Outlier => uniform(scale),
            Spread::Jump if i < count / 2 => uniform(scale / 8 + 1) - 4 * scale,
            Spread::Jump => uniform(scale / 8 + 1) + 4 * scale,
        }
    }
}

/// The worst errors found.
#[derive(Debug, Clone, Copy, Default)]
struct Worst {
    /// Of the variance, relative.
    var: f64,
    /// Of the mean, in standard deviations.
    mean: f64,
    /// Of the normalized values, over max(1, |xhat|), beyond the rounding of the element type at the store.
    xhat: f64,
}

impl Worst {
    fn max(self, o: Self) -> Self {
        Self { var: self.var.max(o.var), mean: self.mean.max(o.mean), xhat: self.xhat.max(o.xhat) }
    }
}

/// One tensor: channel `c` at level `(c + 1) * level`, `step` a power of two; against the exact results.
fn measure<E: Element>(shape: Shape, spread: Spread, level: i64, scale: i64, step: f64, ulp: f64) -> Worst {
    let (channels, count) = (shape.channels(), shape.count());
    let mut rng = ChaCha8Rng::seed_from_u64(level as u64 ^ count as u64);
    let mut integers = vec![vec![0i64; count]; channels];
    let mut x = vec![E::default(); shape.len()];
    let index = |c: usize, i: usize| match shape.layout() {
        Layout::ChannelsFirst => (i / shape.spatial() * channels + c) * shape.spatial() + i % shape.spatial(),
        Layout::ChannelsLast => i * channels + c,
    };
    for (c, integers) in integers.iter_mut().enumerate() {
        for (i, j) in integers.iter_mut().enumerate() {
            let exact = |j: i64| (level + j) as f64 * step;
            *j = spread.integer(&mut rng, i, count, scale);
            let at = index(c, i);
            x[at] = E::from_param(E::Param::from_f64(exact(*j)));
            assert_eq!(x[at].to_param().to_f64(), exact(*j), "the type holds the value exactly");
        }
    }
    let bn = BatchNorm::<E>::new(shape).and_then(|bn| bn.with_eps(0.0)).unwrap();
    let (mut y, mut saved, mut moments) = (x.clone(), bn.saved(), vec![Moments::default(); channels]);
    bn.moments(&x, &mut moments).unwrap();
    bn.forward_train(&x, Affine::none(), &mut y, &mut saved).unwrap();

    let mut worst = Worst::default();
    let n = count as i128;
    for (c, integers) in integers.iter().enumerate() {
        let sum: i128 = integers.iter().map(|&j| j as i128).sum();
        let squares: i128 = integers.iter().map(|&j| j as i128 * j as i128).sum();
        let var = (n * squares - sum * sum) as f64 / (n * n) as f64;
        let std = var.sqrt();
        // In units of the step, around the level: the differences are exact.
        let offset = |mean: f64, residue: f64| (mean / step - level as f64) + residue / step;
        let mean_error = |mean: f64, residue: f64| (offset(mean, residue) - sum as f64 / n as f64).abs() / std;
        let m = &moments[c];
        worst.mean = worst.mean.max(mean_error(m.mean, m.residue));
        worst.mean = worst.mean.max(mean_error(saved.mean()[c].to_f64(), saved.residue()[c].to_f64()));
        worst.var = worst.var.max((m.variance() / (step * step) / var - 1.0).abs());
        // The variance itself may lie outside f32, which the normalized values do not mind.
        if (f32::MIN_POSITIVE as f64..f32::MAX as f64).contains(&(var * step * step)) {
            worst.var = worst.var.max((saved.var()[c].to_f64() / (step * step) / var - 1.0).abs());
        }
        for (i, &j) in integers.iter().enumerate() {
            let exact = (n * j as i128 - sum) as f64 / n as f64 / std;
            let got = y[index(c, i)].to_param().to_f64();
            let error = ((got - exact).abs() - ulp * exact.abs()).max(0.0);
            worst.xhat = worst.xhat.max(error / exact.abs().max(1.0));
        }
    }
    worst
}

fn shapes() -> Vec<(&'static str, Shape)> {
    [
        ("NCHW", Shape::nchw(8, 3, 56, 56)),
        ("NCHW", Shape::nchw(32, 3, 7, 7)),
        ("NCHW", Shape::nchw(1, 2, 300, 301)),
        ("NHWC", Shape::nhwc(8, 56, 56, 3)),
        ("NHWC", Shape::nhwc(32, 7, 7, 40)),
        ("NC", Shape::nc(5000, 17)),
        ("NC", Shape::nc(60, 130)),
    ]
    .map(|(name, shape)| (name, shape.unwrap()))
    .to_vec()
}

/// Asserts the bounds for every shape, spread and `(ratio, level, scale)`, and prints the worst of each layout.
fn check<E: Element>(name: &str, levels: &[(f64, i64, i64)], step: f64, ulp: f64, bound: Worst) {
    for &(ratio, level, scale) in levels {
        let mut of_layout: Vec<(&str, Worst)> = Vec::new();
        for (layout, shape) in shapes() {
            for spread in SPREADS {
                let worst = measure::<E>(shape, spread, level, scale, step, ulp);
                assert!(
                    worst.var <= bound.var && worst.mean <= bound.mean && worst.xhat <= bound.xhat,
                    "{name} {layout} {shape:?} {spread:?} mean/std {ratio:.0}: {worst:?} beyond {bound:?}"
                );
                match of_layout.iter_mut().find(|(l, _)| *l == layout) {
                    Some((_, total)) => *total = total.max(worst),
                    None => of_layout.push((layout, worst)),
                }
            }
        }
        for (layout, w) in of_layout {
            println!(
                "{name:<11} {layout:<5} mean/std {ratio:>8.0}: var {:8.1e}  mean {:8.1e}  xhat {:8.1e}",
                w.var, w.mean, w.xhat
            );
        }
    }
}

#[test]
fn f32_within_the_bounds() {
    // 24 bits hold the level and the integers together; the outlier is 400 times the scale.
    let levels = [
        (0.0, 0, 20_000),
        (100.0, 1 << 22, 10_000),
        (1e4, 1 << 22, 419),
        (1e5, 1 << 22, 42),
        (1e6, (1 << 23) + 5_000, 8),
    ];
    check::<f32>("f32", &levels, 2f64.powi(-22), 0.0, Worst { var: 1e-6, mean: 1e-7, xhat: 3e-7 });
}

#[test]
fn f32_far_from_one_within_the_bounds() {
    let levels = [(0.0, 0, 20_000), (1e5, 1 << 22, 42)];
    // Squares beyond the largest f32, and below the smallest.
    for (name, step) in [("f32 * 2^90", 2f64.powi(90)), ("f32 / 2^120", 2f64.powi(-120))] {
        check::<f32>(name, &levels, step, 0.0, Worst { var: 1e-6, mean: 1e-7, xhat: 3e-7 });
    }
}

#[test]
fn f64_within_the_bounds() {
    let levels = [(0.0, 0, 1 << 40), (100.0, 1 << 50, 1 << 41), (1e4, 1 << 50, 1 << 37), (1e6, 1 << 51, 1 << 31)];
    check::<f64>("f64", &levels, 2f64.powi(-40), 0.0, Worst { var: 1e-13, mean: 1e-13, xhat: 3e-13 });
}

#[cfg(feature = "half")]
#[test]
fn halves_compute_as_f32_and_round_once() {
    let bound = Worst { var: 1e-6, mean: 1e-7, xhat: 3e-7 };
    // 8 and 11 bits of significand: no room for the far outlier at other levels, so powers of two carry it.
    check_half::<half::bf16>("bf16", 2f64.powi(-8), 100, bound);
    check_half::<half::f16>("f16", 2f64.powi(-11), 1000, bound);
}

/// As [`check`], for the spreads that few bits can hold.
#[cfg(feature = "half")]
fn check_half<E: Element>(name: &str, ulp: f64, reach: i64, bound: Worst) {
    for (level, scale) in [(0, reach / 8), (reach * 3 / 4, 2)] {
        for (layout, shape) in shapes() {
            for spread in [Spread::Uniform, Spread::Two] {
                // Half an ulp of the stored value, which is at most `ulp` of it.
                let worst = measure::<E>(shape, spread, level, scale, 0.25, ulp * (1.0 + 1e-6));
                println!("{name:<5} {layout:<5} level {level}: {worst:?}");
                assert!(
                    worst.var <= bound.var && worst.mean <= bound.mean && worst.xhat <= bound.xhat,
                    "{name} {layout} {spread:?}: {worst:?} beyond {bound:?}"
                );
            }
        }
    }
}
