//! Data sets whose statistics and gradients are known without rounding, and how far results are off: what
//! tests/accuracy.rs holds to the bounds and examples/numerics prints.
//!
//! Values are `j * 2^exponent` with integers `j`, so that their sums and the sums of their products are integers.
#![allow(dead_code, reason = "each binary uses a part")]

use std::ops::Range;

use batchnorm::{Affine, BatchNorm, Element, Gradients, Layout, Moments, Real, Shape};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How the integers of a channel are spread; `scale` is about their deviation.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Spread {
    /// About: the sum of four uniform ones.
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
    /// 1e8 + 1, -1e8 + 1, 1, 1 and again.
    Alternating,
    Constant,
}

impl Spread {
    fn integer(self, rng: &mut ChaCha8Rng, i: usize, count: usize, scale: i64) -> i64 {
        let mut uniform = |reach: i64| rng.random_range(-reach..=reach);
        match self {
            Spread::Normal => (0..4).map(|_| uniform(scale)).sum(),
            Spread::Uniform => uniform(2 * scale),
            Spread::Two => [-scale, scale][i % 2],
            Spread::Ramp => (4 * scale as i128 * i as i128 / count as i128) as i64 - 2 * scale,
            Spread::Outlier if i == 0 => 400 * scale,
            Spread::Outlier => uniform(scale),
            Spread::Jump if i < count / 2 => uniform(scale / 8 + 1) - 4 * scale,
            Spread::Jump => uniform(scale / 8 + 1) + 4 * scale,
            Spread::Alternating => [100_000_001, -99_999_999, 1, 1][i % 4],
            Spread::Constant => 0,
        }
    }

    /// The largest integer at this scale.
    fn reach(self, scale: i64) -> i64 {
        match self {
            Spread::Normal => 4 * scale,
            Spread::Uniform | Spread::Ramp => 2 * scale,
            Spread::Two => scale,
            Spread::Outlier => 400 * scale,
            Spread::Jump => 5 * scale,
            Spread::Alternating => 100_000_001,
            Spread::Constant => 0,
        }
    }
}

/// One data set: `(level + j) * 2^exponent`.
#[derive(Debug, Clone, Copy)]
pub struct Set {
    /// Its row in the tables.
    pub family: &'static str,
    spread: Spread,
    level: i64,
    scale: i64,
    exponent: i32,
    pub eps: f64,
}

/// Exponents of the least number and of the first power of two beyond the largest.
fn range<E: Element>() -> (i32, i32) {
    match E::DIGITS {
        8 => (-133, 128),
        11 => (-24, 16),
        24 => (-149, 128),
        _ => (-1074, 1024),
    }
}

/// The families of values as they come, whose levels are those that the promise names.
pub const USUAL: [&str; 6] =
    ["mean/std 0", "mean/std 1e2", "mean/std 1e4", "mean/std 1e6", "outlier first", "jump of level"];

/// The family that reaches the largest finite number.
const NEAR_LARGEST: &str = "near the largest";

/// The data sets that the type can hold.
pub fn sets<E: Element>() -> Vec<Set> {
    use Spread::*;
    let mut sets = Vec::new();
    let mut raw = |family, spreads: &[Spread], (level, scale): (i64, i64), exponent: i32, eps| {
        sets.extend(spreads.iter().map(|&spread| Set { family, spread, level, scale, exponent, eps }));
    };
    // 24 bits hold level and integers together; f64 has 29 more below them.
    let fine = E::DIGITS.max(24) - 24;
    let mut add = |family, spreads: &[Spread], (level, scale): (i64, i64), exponent: i32, eps| {
        raw(family, spreads, (level << fine, scale << fine), exponent - fine as i32, eps);
    };
    let usual = [Normal, Uniform, Two, Ramp];
    let near = [(0, 20_000), (1 << 20, 10_486), (1 << 22, 419), ((1 << 23) + 5_000, 8)];
    for (family, level) in USUAL.into_iter().zip(near) {
        add(family, &usual, level, -22, 0.0);
    }
    for level in near {
        add(USUAL[4], &[Outlier], level, -22, 0.0);
        add(USUAL[5], &[Jump], level, -22, 0.0);
    }
    // Neighbouring floats.
    add("mean/std 1e7", &usual, ((1 << 24) - 2_000, 2), -22, 0.0);
    let all = [Normal, Uniform, Two, Ramp, Outlier, Jump];
    // Where the squares of f32, or the sums of those of f64, come near the limits.
    let (up, down) = if E::DIGITS == 53 { (450, -450) } else { (90, -120) };
    for level in [(0, 20_000), (1 << 22, 42)] {
        add("large or small squares", &all, level, up, 0.0);
        add("large or small squares", &all, level, down, 0.0);
    }
    for (level, exponent) in [((0, 20_000), -28), ((0, 20_000), -42), ((1 << 22, 419), -42)] {
        add("var far below eps", &usual, level, exponent, 1e-5);
    }
    let (least, top) = range::<E>();
    if E::DIGITS < 53 {
        // 255 * 2^16, rounded to eight digits, is still finite. The mean of the ramp and of the two values is in the middle, so
        // that no deviation overflows; values that lie anywhere from one end to the other have larger ones.
        add(NEAR_LARGEST, &[Two], (0, 255 << 16), top - 24, 0.0);
        add(NEAR_LARGEST, &[Ramp], (0, 255 << 15), top - 24, 0.0);
        add(NEAR_LARGEST, &[Uniform], (0, 127 << 15), top - 24, 0.0);
        add(NEAR_LARGEST, &[Uniform], (248 << 16, 2 << 16), top - 24, 0.0);
        add("deviations overflow", &[Uniform], (0, 255 << 15), top - 24, 0.0);
        raw("subnormal", &[Uniform, Two], (0, 1 << (E::DIGITS - 2)), least, 0.0);
    }
    raw("subnormal", &[Uniform, Two], (0, 1 << (E::DIGITS - 2)), least, 1e-5);
    raw("1e8, -1e8 and 1", &[Alternating], (0, 1), 0, 0.0);
    for value in [0.0, 100.0, 1e10, -15.94, 1e30, 1e-40] {
        let (mut level, mut exponent) = (E::from_param(E::Param::from_f64(value)).to_param().to_f64(), 0);
        // Overflown to infinity or rounded to zero, it is another constant.
        if level.is_infinite() || (value != 0.0 && level == 0.0) {
            continue;
        }
        while level.fract() != 0.0 {
            (level, exponent) = (level * 2.0, exponent - 1);
        }
        while level.abs() >= 2f64.powi(53) {
            (level, exponent) = (level / 2.0, exponent + 1);
        }
        for eps in [0.0, 1e-5] {
            raw("constant", &[Constant], (level as i64, 0), exponent, eps);
        }
    }
    sets.retain(Set::fits::<E>);
    sets
}

/// Ones, of which `2^24 + 1` are: more than f32 can count.
pub const ONES: Set =
    Set { family: "2^24 + 1 ones", spread: Spread::Constant, level: 1, scale: 0, exponent: 0, eps: 1e-5 };

impl Set {
    /// The ulp of `|mean|/std`, where deviations may be larger than the largest number that is computed with: xhat is made of
    /// differences of such numbers there.
    fn coarse<P: Real>(&self) -> f64 {
        let std = self.scale as f64 * 2.0 / 3f64.sqrt();
        if self.family == NEAR_LARGEST { self.level as f64 / std * 2f64.powi(1 - P::DIGITS as i32) } else { 0.0 }
    }

    /// What is allowed of a quantity.
    pub fn allowed<E: Element>(&self, quantity: Quantity) -> f64 {
        match quantity {
            _ if self.spread == Spread::Constant && EXACT.contains(&quantity) => 0.0,
            Quantity::Var | Quantity::Mean | Quantity::Dbeta => allowed::<E::Param>(quantity),
            _ => allowed::<E::Param>(quantity) + self.coarse::<E::Param>(),
        }
    }

    /// Whether the type reaches that far and tells the values apart.
    fn fits<E: Element>(&self) -> bool {
        let (least, top) = range::<E>();
        let level = self.level.abs() as f64;
        let finest = (level + self.scale as f64) * 2f64.powi(-(E::DIGITS as i32));
        let is_fine = self.scale == 0 || (finest.max(power(1.0, least - self.exponent)) <= self.scale as f64 / 2.0);
        // Compared with 2^-DIGITS to spare, for the rounding to the type.
        let reach = (level + self.spread.reach(self.scale) as f64) * (1.0 + 2f64.powi(-(E::DIGITS as i32)));
        is_fine && reach < power(1.0, top - self.exponent)
    }
}

/// `value * 2^exponent`, where 2^exponent itself may be out of range.
fn power(value: f64, exponent: i32) -> f64 {
    let half = exponent / 2;
    value * 2f64.powi(half) * 2f64.powi(exponent - half)
}

/// The nearest element to `integer * 2^exponent`, and the integer that it is.
fn element<E: Element>(integer: i64, exponent: i32) -> (E, i64) {
    let e = E::from_param(E::Param::from_f64(power(integer as f64, exponent)));
    (e, power(e.to_param().to_f64(), -exponent) as i64)
}

/// Tensors, and the integers that they were made of.
pub struct Problem<E: Element> {
    pub shape: Shape,
    pub eps: f64,
    pub x: Vec<E>,
    /// One of random values and one that is constant.
    pub dy: [Vec<E>; 2],
    exponent: i32,
    exponent_dy: i32,
    /// By channel.
    integers: Vec<Vec<i64>>,
    integers_dy: Vec<Vec<i64>>,
    constant: f64,
}

fn index(shape: &Shape, c: usize, i: usize) -> usize {
    match shape.layout() {
        Layout::ChannelsFirst => (i / shape.spatial() * shape.channels() + c) * shape.spatial() + i % shape.spatial(),
        Layout::ChannelsLast => i * shape.channels() + c,
    }
}

impl<E: Element> Problem<E> {
    pub fn new(shape: Shape, set: &Set) -> Self {
        let (channels, count) = (shape.channels(), shape.count());
        let mut rng = ChaCha8Rng::seed_from_u64(set.level as u64 ^ count as u64);
        // dy of the size of std makes dx of the size of 1; not where sums of dy would overflow or lose bits.
        let std = power(set.scale as f64, set.exponent).hypot(set.eps.sqrt()).clamp(2f64.powi(-20), 2f64.powi(90));
        // More bits for f64 here too; products of all 53 would overflow.
        let fine = (E::DIGITS.max(24) - 24).min(24);
        let exponent_dy = std.log2() as i32 - 22 - fine as i32;
        let zeros = vec![E::default(); shape.len()];
        let mut problem = Self {
            shape,
            eps: set.eps,
            x: zeros.clone(),
            dy: [zeros.clone(), zeros],
            exponent: set.exponent,
            exponent_dy,
            integers: vec![Vec::with_capacity(count); channels],
            integers_dy: vec![Vec::with_capacity(count); channels],
            constant: 0.0,
        };
        // 0.1 has no short binary digits.
        let (constant, _) = element::<E>(((0.1 * 2f64.powi(25)) as i64) << fine, exponent_dy);
        problem.dy[1].fill(constant);
        problem.constant = constant.to_param().to_f64();
        for c in 0..channels {
            for i in 0..count {
                let at = index(&shape, c, i);
                let ideal = set.level + set.spread.integer(&mut rng, i, count, set.scale);
                let (x, integer) = element(ideal, set.exponent);
                let (dy, integer_dy) =
                    element((1 << (20 + fine)) + rng.random_range(-1 << (22 + fine)..1 << (22 + fine)), exponent_dy);
                (problem.x[at], problem.dy[0][at]) = (x, dy);
                problem.integers[c].push(integer);
                problem.integers_dy[c].push(integer_dy);
            }
        }
        problem
    }

    /// The results of this crate, from whole passes and, for the statistics, from the half as well.
    pub fn ours(&self) -> Results {
        let bn = BatchNorm::<E>::new(self.shape).and_then(|bn| bn.with_eps(self.eps)).unwrap();
        let channels = self.shape.channels();
        let (mut y, mut saved, mut moments) = (self.x.clone(), bn.saved(), vec![Moments::default(); channels]);
        bn.moments(&self.x, &mut moments).unwrap();
        bn.forward_train(&self.x, Affine::none(), &mut y, &mut saved).unwrap();
        let params = || vec![E::Param::default(); channels];
        let (mut dx, mut dgamma, mut dbeta) = (self.dy.clone(), params(), params());
        for (dy, dx) in self.dy.iter().zip(&mut dx).rev() {
            let (dgamma, dbeta) = (Some(&mut dgamma[..]), Some(&mut dbeta[..]));
            let gradients = Gradients { dx: Some(dx), dgamma, dbeta, ..Default::default() };
            bn.backward(&self.x, dy, &saved, Affine::none(), gradients).unwrap();
        }
        let of = |f: fn(&Moments) -> f64| moments.iter().map(f).collect();
        Results {
            statistics: vec![
                Statistics::of::<f64>(of(|m| m.mean), of(|m| m.residue), of(Moments::variance)),
                Statistics::of::<E::Param>(wide(saved.mean()), wide(saved.residue()), wide(saved.var())),
            ],
            y: wide(&y),
            dx: dx.map(|dx| wide(&dx)),
            dgamma: wide(&dgamma),
            dbeta: wide(&dbeta),
        }
    }

    /// The worst errors of results over the channels.
    pub fn errors(&self, results: &Results) -> Errors {
        (0..self.shape.channels()).map(|c| self.channel_errors(c, results)).fold(Errors::NONE, Errors::max)
    }

    fn channel_errors(&self, c: usize, results: &Results) -> Errors {
        let (x, dy) = (&self.integers[c], &self.integers_dy[c]);
        let (n, m) = (x.len() as i128, x.len() as f64);
        let sum: i128 = x.iter().map(|&j| i128::from(j)).sum();
        // In units of 2^exponent the mean is floor + rest/n; deviations and, squared, the variance have these units too.
        let (floor, rest) = (sum.div_euclid(n), sum.rem_euclid(n));
        let squares: i128 = x.iter().map(|&j| (i128::from(j) - floor).pow(2)).sum();
        let var = match n.checked_mul(squares) {
            Some(product) => (product - rest * rest) as f64 / (m * m),
            // Beside squares that large the rest is nothing.
            None => squares as f64 / m,
        };
        let (mean, std) = (floor as f64 + rest as f64 / m, var.sqrt());
        let real_var = power(var, 2 * self.exponent);
        // xhat is the deviation times `inverse * 2^unit`.
        let (inverse, unit) = match self.eps {
            0.0 if var == 0.0 => (0.0, 0),
            0.0 => (1.0 / std, 0),
            eps => (1.0 / (real_var + eps).sqrt(), self.exponent),
        };
        let deviation = |&j: &i64| (n * (i128::from(j) - floor) - rest) as f64 / m;
        let xhat: Vec<f64> = x.iter().map(|j| power(deviation(j) * inverse, unit)).collect();

        let mut errors = Errors::NONE;
        for of in &results.statistics {
            let [found, residue, least] = [of.mean[c], of.residue[c], of.least].map(|v| power(v, -self.exponent));
            // Near the mean the difference is exact.
            let off = ((found - floor as f64) + residue - rest as f64 / m).abs();
            errors.note(Quantity::Mean, positive(off - least / 2.0), or_else(std, mean.abs()));
            // It may lie outside the type, which the normalized values do not mind.
            if var == 0.0 || of.range.contains(&real_var) {
                errors.note(Quantity::Var, power(of.var[c], -2 * self.exponent) - var, or_else(var, mean * mean));
            }
        }
        let spread = power(std * inverse, unit);
        for (i, xhat) in xhat.iter().enumerate() {
            let off = beyond_rounding::<E>(results.y[index(&self.shape, c, i)], *xhat);
            errors.note(Quantity::Xhat, off, or_else(xhat.abs().max(spread), 1.0));
        }

        let unit_dy = power(1.0, self.exponent_dy);
        let sum_dy: i128 = dy.iter().map(|&j| i128::from(j)).sum();
        let products: i128 = x.iter().zip(dy).map(|(&x, &dy)| i128::from(dy) * (i128::from(x) - floor)).sum();
        let dbeta = sum_dy as f64 * unit_dy;
        let dgamma = power((n * products - rest * sum_dy) as f64 / m * inverse, unit) * unit_dy;
        let size = |dy: i64| dy.unsigned_abs() as f64 * unit_dy;
        let size_dy: f64 = dy.iter().map(|&dy| size(dy)).sum();
        let size_product: f64 = dy.iter().zip(&xhat).map(|(&dy, xhat)| size(dy) * xhat.abs()).sum();
        let size_xhat: f64 = xhat.iter().map(|xhat| xhat.abs()).sum();
        errors.note(Quantity::Dbeta, results.dbeta[c] - dbeta, size_dy);
        errors.note(Quantity::Dgamma, results.dgamma[c] - dgamma, or_else(size_product, size_dy));

        let inv_std = power(inverse, unit - self.exponent);
        let (mut total, mut allowed, mut sizes) = (Compensated::default(), 0.0, 0.0);
        for (i, (&dy, xhat)) in dy.iter().zip(&xhat).enumerate() {
            let [dx, dx_of_constant] = results.dx.each_ref().map(|dx| dx[index(&self.shape, c, i)]);
            let centred = (n * i128::from(dy) - sum_dy) as f64 / m * unit_dy;
            let exact = inv_std * (centred - xhat * (dgamma / m));
            // The terms that cancel.
            let terms = inv_std * (size(dy) + size_dy / m + xhat.abs() * (size_product / m));
            errors.note(Quantity::Dx, beyond_rounding::<E>(dx, exact), terms);
            let terms_of_constant = inv_std * self.constant * (2.0 + xhat.abs() * (size_xhat / m));
            errors.note(Quantity::DxOfConstant, beyond_rounding::<E>(dx_of_constant, 0.0), terms_of_constant);
            total.add(dx);
            allowed += half_ulp::<E>(exact);
            sizes += terms;
        }
        errors.note(Quantity::SumDx, positive(total.sum().abs() - allowed), sizes);
        errors
    }
}

/// The unit of an error, another where that is zero.
fn or_else(unit: f64, other: f64) -> f64 {
    if unit > 0.0 { unit } else { other }
}

/// 0 for negative values; unlike `max`, it keeps a NaN.
fn positive(value: f64) -> f64 {
    if value < 0.0 { 0.0 } else { value }
}

/// What rounding to the nearest element may change, where results are computed in a wider type.
fn half_ulp<E: Element>(value: f64) -> f64 {
    let digits = E::DIGITS as i32;
    // The value that was rounded is itself a little off.
    if digits < 24 { power(value.abs(), -digits).max(power(0.5, range::<E>().0)) * (1.0 + 1e-6) } else { 0.0 }
}

fn beyond_rounding<E: Element>(got: f64, exact: f64) -> f64 {
    positive((got - exact).abs() - half_ulp::<E>(exact))
}

/// A sum that carries the roundings along (Neumaier 1974).
#[derive(Default)]
struct Compensated {
    sum: f64,
    rest: f64,
}

impl Compensated {
    fn add(&mut self, v: f64) {
        let sum = self.sum + v;
        self.rest += if self.sum.abs() >= v.abs() { (self.sum - sum) + v } else { (v - sum) + self.sum };
        self.sum = sum;
    }

    fn sum(&self) -> f64 {
        self.sum + self.rest
    }
}

/// What a contestant found, by channel or element.
pub struct Results {
    pub statistics: Vec<Statistics>,
    pub y: Vec<f64>,
    pub dx: [Vec<f64>; 2],
    pub dgamma: Vec<f64>,
    pub dbeta: Vec<f64>,
}

pub struct Statistics {
    pub mean: Vec<f64>,
    /// What the mean has beyond its rounded value.
    pub residue: Vec<f64>,
    pub var: Vec<f64>,
    /// The normal numbers of the type: the variances that it holds in full.
    pub range: Range<f64>,
    /// The least number of the type: a mean is known to half of it.
    pub least: f64,
}

impl Statistics {
    /// Held in a type.
    pub fn of<P: Real>(mean: Vec<f64>, residue: Vec<f64>, var: Vec<f64>) -> Self {
        let (least, _) = range::<P>();
        let range =
            if P::DIGITS == 24 { f32::MIN_POSITIVE.into()..f32::MAX.into() } else { f64::MIN_POSITIVE..f64::MAX };
        Self { mean, residue, var, range, least: power(1.0, least) }
    }
}

fn wide<E: Element>(values: &[E]) -> Vec<f64> {
    values.iter().map(|v| v.to_param().to_f64()).collect()
}

/// What is measured, and in which unit. Terms are those of a sum or difference before they cancel; of elements in a
/// narrower type than the arithmetic, the rounding at the store is taken off.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Quantity {
    /// Relative; of a constant, over the squared mean.
    Var,
    /// In standard deviations; of a constant, over the mean.
    Mean,
    /// Over `max(std*inv_std, |xhat|)`, which is `max(1, |xhat|)` where eps is 0; of a constant, absolute.
    Xhat,
    /// Over `sum(|dy|)`.
    Dbeta,
    /// Over `sum(|dy*xhat|)`.
    Dgamma,
    /// Over the terms, `inv_std * (|dy| + mean(|dy|) + |xhat| * mean(|dy*xhat|))`.
    Dx,
    /// The sum over a channel, which is 0, over the sum of these terms.
    SumDx,
    /// What a constant dy makes, which is 0, over the same terms for that dy.
    DxOfConstant,
}

impl Quantity {
    pub const ALL: [Self; 8] =
        [Self::Var, Self::Mean, Self::Xhat, Self::Dbeta, Self::Dgamma, Self::Dx, Self::SumDx, Self::DxOfConstant];

    pub fn name(self) -> &'static str {
        ["var", "mean", "xhat", "dbeta", "dgamma", "dx", "sum dx", "dx of constant dy"][self as usize]
    }
}

/// An error for each quantity; NaN for one that was not measured, infinity for one whose result is none.
#[derive(Debug, Clone, Copy)]
pub struct Errors([f64; Quantity::ALL.len()]);

impl Errors {
    pub const NONE: Self = Self([f64::NAN; Quantity::ALL.len()]);

    pub fn get(&self, quantity: Quantity) -> f64 {
        self.0[quantity as usize]
    }

    fn note(&mut self, quantity: Quantity, off: f64, unit: f64) {
        let error = if off == 0.0 { 0.0 } else { (off / unit).abs() };
        let worst = &mut self.0[quantity as usize];
        *worst = worst.max(if error.is_nan() { f64::INFINITY } else { error });
    }

    #[must_use]
    pub fn max(self, o: Self) -> Self {
        Self(core::array::from_fn(|i| self.0[i].max(o.0[i])))
    }
}

/// What is allowed of each quantity. For var, mean and xhat it is the promise of the crate.
///
/// Of gradients in f32 it counts roundings of u = 2^-24. A sum has six additions in a row and a store, 7u for dbeta. A
/// product has three roundings before that, and inv_std one and half of the error of var: 11u + 5e-7 for dgamma. dx
/// joins `(dy - dbeta/m)*inv_std`, 13u + 5e-7, and `xhat * inv_std*dgamma/m`, 18u + 1.5e-6. A constant dy leaves the
/// roundings of both sums, 11u, and the error of the mean. In sums of dx the roundings that all elements share are those
/// of the sum of dy; 8u, as in tests/gradients.rs. Sums in f64 have at most 300 additions in a row.
fn allowed<P: Real>(quantity: Quantity) -> f64 {
    let (f32, f64) = match quantity {
        Quantity::Var => (1e-6, 1e-13),
        Quantity::Mean => (1e-7, 1e-13),
        Quantity::Xhat => (3e-7, 3e-13),
        Quantity::Dbeta => (4.2e-7, 1e-13),
        Quantity::Dgamma => (1.2e-6, 2e-13),
        Quantity::Dx => (2.6e-6, 3e-13),
        Quantity::SumDx => (4.8e-7, 1e-13),
        Quantity::DxOfConstant => (8e-7, 1e-13),
    };
    if P::DIGITS == 24 { f32 } else { f64 }
}

/// What has no error where x is constant: it is its own mean, the rest is zero.
const EXACT: [Quantity; 4] = [Quantity::Var, Quantity::Mean, Quantity::Xhat, Quantity::Dgamma];

/// Both geometries; planes that are many, few, and longer than a block.
pub fn shapes() -> Vec<(&'static str, Shape)> {
    [
        ("NCHW", Shape::nchw(4, 3, 56, 56)),
        ("NCHW", Shape::nchw(32, 3, 7, 7)),
        ("NCHW", Shape::nchw(1, 1, 250, 251)),
        ("NHWC", Shape::nhwc(4, 56, 56, 3)),
        ("NHWC", Shape::nhwc(16, 7, 7, 40)),
        ("NC", Shape::nc(4500, 9)),
        ("NC", Shape::nc(60, 130)),
    ]
    .map(|(name, shape)| (name, shape.unwrap()))
    .to_vec()
}
