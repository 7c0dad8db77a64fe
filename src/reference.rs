//! The specification: every operation in the plainest loops, in the order of arithmetic that the kernels promise.
//!
//! All tiers give the bits of these functions on any number of threads, which is how they are tested; a NaN is a
//! NaN, its sign and payload are left open. The functions are slow, allocate, and expect slices of the right
//! lengths: use them to check, not to compute.
//!
//! # The order
//!
//! A logical vector has [`lanes`] lanes. Sums are taken of two terms per element at once:
//!
//! - **A channel in planes** (channels first): the channel is cut into blocks by the shape alone, each of one or
//!   more contiguous runs: planes, the same parts of four, or four quarters of a part of one. The vectors are taken in
//!   groups of four: along the run, or, where a block has four runs or more, across four runs at the same place. The end
//!   of a run is filled up with zero terms, and missing runs are zero. A group adds `(v0 + v1) + (v2 + v3)` to the
//!   accumulator, lane by lane; after four groups, and at the end, the accumulator is widened, added to sums in f64 and
//!   cleared. The lanes of the sums are then added by halves: 16, 8, 4, 2, 1.
//! - **Rows of channels** (channels last, and NC): the rows are cut into blocks by the shape alone. Rows shorter than
//!   128 are joined until their length is a multiple of 16. Four (joined) rows are added per column in the same
//!   way, and after four such groups widened in the same way. The columns of one channel are then added in order.
//!
//! Blocks are merged from the first to the last. No multiplication and addition are ever fused.

use crate::activation::Activation;
use crate::affine::Affine;
use crate::deployment::quantized::Quantization;
use crate::element::{Element, Real};
use crate::grid::{Geometry, Planar, Rows, Runs};
use crate::moments::{GradientSums, Moments, Saved, inv_std, two_sum};
use crate::running::Population;
use crate::shape::Shape;
use crate::variants::double_backward::Cotangents;
use crate::variants::renorm::{Renorm, RenormLimits};

/// Lanes of a logical vector: 16 of f32, 8 of f64.
pub const fn lanes<P: Real>() -> usize {
    64 / size_of::<P>()
}

/// The number of channels, and of the neighbouring elements that are of one of them.
fn channels_and_run(shape: &Shape) -> (usize, usize) {
    match Geometry::new(shape) {
        Geometry::Planar(planar) => (planar.channels, planar.plane),
        Geometry::Rows(rows) => (rows.channels, 1),
    }
}

/// The channel of the element at `index`.
fn channel_of(shape: &Shape, index: usize) -> usize {
    let (channels, run) = channels_and_run(shape);
    index / run % channels
}

/// The elements of a channel.
fn elements_of(shape: &Shape, channel: usize) -> impl Iterator<Item = usize> {
    let (channels, run) = channels_and_run(shape);
    let starts = (0..shape.len()).step_by((channels * run).max(1));
    starts.flat_map(move |start| (0..run).map(move |i| start + channel * run + i))
}

/// The terms of one element.
type Pair<R> = (R, R);

fn plus<R: Real>(a: Pair<R>, b: Pair<R>) -> Pair<R> {
    (a.0 + b.0, a.1 + b.1)
}

fn tree<R: Real>(v: [Pair<R>; 4]) -> Pair<R> {
    plus(plus(v[0], v[1]), plus(v[2], v[3]))
}

/// An accumulator and the sum in f64 that it is widened to.
#[derive(Clone, Copy, Default)]
struct Sum<R> {
    narrow: Pair<R>,
    wide: (f64, f64),
}

impl<R: Real> Sum<R> {
    fn add(&mut self, group: Pair<R>) {
        self.narrow = plus(self.narrow, group);
    }

    fn widen(&mut self) {
        self.wide.0 += self.narrow.0.to_f64();
        self.wide.1 += self.narrow.1.to_f64();
        self.narrow = Pair::default();
    }
}

/// The sums of both terms over the runs of a block.
fn sum_runs<R: Real>(runs: Runs, term: impl Fn(usize) -> Pair<R>) -> (f64, f64) {
    let lanes = lanes::<R>();
    let mut sums = vec![Sum::<R>::default(); lanes];
    // Where the four vectors of each group begin, and where the run of each ends.
    let along = |run: usize| {
        let (start, end) = (runs.start + run * runs.stride, runs.start + run * runs.stride + runs.len);
        (start..end).step_by(4 * lanes).map(move |at| [0, 1, 2, 3].map(|v| (at + v * lanes, end)))
    };
    let across = |band: usize| {
        (0..runs.len).step_by(lanes).map(move |at| {
            [0, 1, 2, 3].map(|run| match band + run {
                run if run < runs.count => {
                    (runs.start + run * runs.stride + at, runs.start + run * runs.stride + runs.len)
                }
                _ => (0, 0),
            })
        })
    };
    let all: Vec<[(usize, usize); 4]> = if runs.count >= 4 {
        (0..runs.count).step_by(4).flat_map(across).collect()
    } else {
        (0..runs.count).flat_map(along).collect()
    };
    for (groups, group) in all.into_iter().enumerate() {
        for (lane, sum) in sums.iter_mut().enumerate() {
            sum.add(tree(group.map(|(at, end)| if at + lane < end { term(at + lane) } else { Pair::default() })));
        }
        if groups % 4 == 3 {
            sums.iter_mut().for_each(Sum::widen);
        }
    }
    sums.iter_mut().for_each(Sum::widen);
    let mut wide: Vec<_> = sums.iter().map(|sum| sum.wide).collect();
    wide.resize(16, (0.0, 0.0));
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            wide[i] = plus(wide[i], wide[i + half]);
        }
    }
    wide[0]
}

/// The sums of both terms for each channel over a block of rows.
fn sum_rows<R: Real>(rows: Rows, block: usize, term: impl Fn(usize) -> Pair<R>) -> Vec<(f64, f64)> {
    let range = rows.block(block);
    let (start, end, period) = (range.start * rows.channels, range.end * rows.channels, rows.period());
    let mut sums = vec![Sum::<R>::default(); period];
    for (g, group) in (start..end).step_by(4 * period).enumerate() {
        for (column, sum) in sums.iter_mut().enumerate() {
            sum.add(tree([0, 1, 2, 3].map(|row| {
                let i = group + row * period + column;
                if i < end { term(i) } else { Pair::default() }
            })));
        }
        if g % 4 == 3 || group + 4 * period >= end {
            sums.iter_mut().for_each(Sum::widen);
        }
    }
    let mut joined: Vec<_> = sums[..rows.channels].iter().map(|sum| sum.wide).collect();
    for c in rows.channels..period {
        joined[c % rows.channels] = plus(joined[c % rows.channels], sums[c].wide);
    }
    joined
}

/// The sums of one channel over a block of rows, row by row in f64.
fn sum_column(rows: Rows, block: usize, channel: usize, term: impl Fn(usize) -> Pair<f64>) -> (f64, f64) {
    rows.block(block).fold((0.0, 0.0), |sum, row| plus(sum, term(row * rows.channels + channel)))
}

/// The deviation of a value from a shift, scaled, and its square.
fn deviation<R: Real>(x: R, shift: R, scale: R) -> Pair<R> {
    let d = (x - shift) * scale;
    (d, d * d)
}

/// Whether sums of `n` deviations and squares can be trusted: the shift within 1.4 standard deviations of the mean,
/// the squares neither overflowed nor so small that bits were lost.
fn is_sound(n: f64, (s, q): (f64, f64), tiny: f64) -> bool {
    let square = s * (s / n);
    square <= 2.0 * (q - square) && q >= n * tiny && q < f64::INFINITY
}

/// Mean, residue and m2 from sums around a shift, given a scale of the deviations. Where squares underflowed, they are
/// taken from enlarged deviations; where they are not sound, from `wide` sums in f64, around the same shift and then
/// around the mean found.
fn close_block<R: Real>(
    n: f64,
    shift: R,
    narrow: impl Fn(R) -> (f64, f64),
    wide: impl Fn(f64) -> (f64, f64),
) -> [f64; 3] {
    let scaled = |scale: f64| {
        let (s, q) = narrow(R::from_f64(scale));
        ((s, q), (s / scale, q / scale / scale))
    };
    let mut shift = shift.to_f64();
    let (seen, mut sums) = scaled(1.0);
    let mut sound = is_sound(n, seen, R::TINY_SQUARE);
    if !sound && sums.1 < n * R::TINY_SQUARE {
        let (seen, enlarged) = scaled(R::ENLARGED);
        sound = is_sound(n, seen, 0.0);
        sums = enlarged;
    }
    if !sound {
        sums = wide(shift);
        let mean = shift + sums.0 / n;
        if !is_sound(n, sums, 0.0) && mean.is_finite() {
            shift = mean;
            sums = wide(shift);
        }
    }
    let (s, q) = sums;
    let (mean, residue) = two_sum(shift, s / n);
    let m2 = match q - s * (s / n) {
        _ if q == f64::INFINITY && s.is_finite() => q,
        m2 if m2 < 0.0 => 0.0,
        m2 => m2,
    };
    [mean, residue, m2]
}

/// The mean of four values, unless it overflows.
fn mean_of_four<R: Real>(v: [R; 4]) -> R {
    let mean = ((v[0] + v[1]) + (v[2] + v[3])) * R::from_f64(0.25);
    if mean.to_f64().is_finite() { mean } else { v[0] }
}

fn planar_moments<E: Element>(planar: Planar, x: &[E], channel: usize, block: usize) -> [f64; 3] {
    let runs = planar.block(channel, block);
    let width = lanes::<E::Param>().min(runs.len);
    let places: [usize; 4] = runs.spread(width);
    let mut shift = mean_of_four(places.map(|at| x[at].to_param()));
    if runs.len >= lanes::<E::Param>() {
        let sample = |lane: usize| tree(places.map(|at| (x[at + lane].to_param(), E::Param::default()))).0.to_f64();
        let mut wide: Vec<f64> = (0..width).map(sample).collect();
        wide.resize(16, 0.0);
        for half in [8, 4, 2, 1] {
            (0..half).for_each(|i| wide[i] += wide[i + half]);
        }
        let mean = wide[0] * (1.0 / (4 * width) as f64);
        shift = if mean.is_finite() { E::Param::from_f64(mean) } else { x[places[0]].to_param() };
    }
    let narrow = |scale| sum_runs(runs, |i| deviation(x[i].to_param(), shift, scale));
    let wide = |shift| sum_runs(runs, |i| deviation(x[i].to_param().to_f64(), shift, 1.0));
    close_block(runs.size() as f64, shift, narrow, wide)
}

fn row_moments<E: Element>(rows: Rows, x: &[E], block: usize) -> Vec<[f64; 3]> {
    let range = rows.block(block);
    let shift = |c: usize| {
        let row = |i: usize| range.start + i * range.len() / 8;
        let v = [0, 1, 2, 3, 4, 5, 6, 7].map(|i| x[row(i) * rows.channels + c].to_param());
        let mean = (((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))) * E::Param::from_f64(0.125);
        if mean.to_f64().is_finite() { mean } else { v[0] }
    };
    let shifts: Vec<_> = (0..rows.channels).map(shift).collect();
    let sums = |scale| sum_rows(rows, block, |i| deviation(x[i].to_param(), shifts[i % rows.channels], scale));
    let (plain, enlarged) = (sums(E::Param::from_f64(1.0)), sums(E::Param::from_f64(E::Param::ENLARGED)));
    let close = |c: usize| {
        let narrow = |scale: E::Param| if scale.to_f64() == 1.0 { plain[c] } else { enlarged[c] };
        let wide = |shift| sum_column(rows, block, c, |i| deviation(x[i].to_param().to_f64(), shift, 1.0));
        close_block(range.len() as f64, shifts[c], narrow, wide)
    };
    (0..rows.channels).map(close).collect()
}

/// The moments of each channel, as [`BatchNorm::moments`](crate::BatchNorm::moments).
pub fn moments<E: Element>(shape: &Shape, x: &[E]) -> Vec<Moments> {
    let mut total = vec![Moments::default(); shape.channels()];
    if shape.is_empty() {
        return total;
    }
    let mut add = |c: usize, [mean, residue, m2]: [f64; 3], count: usize| {
        total[c] = total[c].merge(Moments { count: count as u64, mean, residue, m2 });
    };
    match Geometry::new(shape) {
        Geometry::Planar(planar) => {
            for c in 0..planar.channels {
                for b in 0..planar.blocks() {
                    add(c, planar_moments(planar, x, c, b), planar.block(c, b).size());
                }
            }
        }
        Geometry::Rows(rows) => {
            for b in 0..rows.blocks() {
                for (c, values) in row_moments(rows, x, b).into_iter().enumerate() {
                    add(c, values, rows.block(b).len());
                }
            }
        }
    }
    total
}

/// Statistics from moments, as [`BatchNorm::finish`](crate::BatchNorm::finish).
pub fn finish<P: Real>(moments: &[Moments], eps: f64) -> Saved<P> {
    let mut saved = Saved::new(moments.len());
    saved.count = moments[0].count;
    for (c, m) in moments.iter().enumerate() {
        let mean = P::from_f64(m.mean);
        saved.mean[c] = mean;
        saved.residue[c] = P::from_f64((m.mean - mean.to_f64()) + m.residue);
        saved.var[c] = P::from_f64(m.variance());
        saved.inv_std[c] = P::from_f64_saturating(m.inv_std(eps));
    }
    saved
}

/// Statistics from moments of a renormalized batch, as [`BatchNorm::finish`](crate::BatchNorm::finish) into statistics for
/// which [`Saved::renormalize`] was called.
pub fn finish_renormalized<P: Real>(
    moments: &[Moments],
    eps: f64,
    population: Population<'_, P>,
    limits: RenormLimits,
) -> Saved<P> {
    let mut renorm = Renorm::new(limits, population);
    for (c, m) in moments.iter().enumerate() {
        let inverse = inv_std(population.var[c].to_f64(), eps);
        let r = (m.variance() + eps).sqrt() * inverse;
        let d = (m.mean - population.mean[c].to_f64()) * inverse;
        renorm.r[c] = P::from_f64(r.clamp(1.0 / limits.r_max, limits.r_max));
        renorm.d[c] = P::from_f64(d.clamp(-limits.d_max, limits.d_max));
    }
    Saved { renorm: Some(renorm), ..finish(moments, eps) }
}

/// dgamma and dbeta from gradient sums, as [`BatchNorm::backward`](crate::BatchNorm::backward).
pub fn affine_gradients<P: Real>(sums: &[GradientSums], saved: &Saved<P>) -> (Vec<P>, Vec<P>) {
    let dgamma = |(c, sums): (usize, &GradientSums)| match &saved.renorm {
        Some(renorm) => P::from_f64(sums.dy_xhat * renorm.r[c].to_f64() + sums.dy * renorm.d[c].to_f64()),
        None => P::from_f64(sums.dy_xhat),
    };
    (sums.iter().enumerate().map(dgamma).collect(), sums.iter().map(|sums| P::from_f64(sums.dy)).collect())
}

/// What takes the place of gamma and beta in a channel.
fn corrected<E: Element>(affine: Affine<'_, E>, c: usize, renorm: Option<&Renorm<E::Param>>) -> (f64, f64) {
    let gamma = affine.gamma.map_or(1.0, |gamma| gamma[c].to_f64());
    let beta = affine.beta.map_or(0.0, |beta| beta[c].to_f64());
    match renorm {
        Some(renorm) => (gamma * renorm.r[c].to_f64(), beta + gamma * renorm.d[c].to_f64()),
        None => (gamma, beta),
    }
}

/// What is taken from the values of a channel, and what its mean has beyond it: zero and all of the mean where one of `count`
/// values, 2^24 if that is 0, may lie further from the mean than the type holds.
fn centre<P: Real>(mean: P, residue: P, inv_std: f64, count: u64) -> (P, f64) {
    let count = if count == 0 { 16_777_216.0 } else { count as f64 };
    if P::LARGEST * inv_std < count.sqrt() {
        (P::default(), mean.to_f64() + residue.to_f64())
    } else {
        (mean, residue.to_f64())
    }
}

/// [`centre`] of saved statistics.
fn centre_of<P: Real>(saved: &Saved<P>, c: usize) -> (P, f64) {
    centre(saved.mean[c], saved.residue[c], saved.inv_std[c].to_f64(), saved.count)
}

/// A channel's `(hi, scale, shift)`, from its [`centre`] and inv_std.
fn line<E: Element>(
    affine: Affine<'_, E>,
    c: usize,
    ((hi, residue), inv_std): ((E::Param, f64), f64),
    renorm: Option<&Renorm<E::Param>>,
) -> (E::Param, E::Param, E::Param) {
    let (gamma, beta) = corrected(affine, c, renorm);
    let scale = gamma * inv_std;
    (hi, E::Param::from_f64_saturating(scale), E::Param::from_f64(beta - residue * scale))
}

/// The same from saved statistics.
fn line_of<E: Element>(affine: Affine<'_, E>, c: usize, saved: &Saved<E::Param>) -> (E::Param, E::Param, E::Param) {
    line(affine, c, (centre_of(saved, c), saved.inv_std[c].to_f64()), saved.renorm.as_ref())
}

/// `(x - hi) * scale + shift + residual`, of element `i`.
fn argument<E: Element>(
    affine: Affine<'_, E>,
    (hi, scale, shift): (E::Param, E::Param, E::Param),
    x: E,
    i: usize,
) -> E::Param {
    let value = (x.to_param() - hi) * scale + shift;
    affine.residual.map_or(value, |residual| value + residual[i].to_param())
}

/// What an activation lets through of a gradient, given the activation's argument or result.
fn bend<P: Real, R: Real>(activation: Activation, gate: P, value: R) -> R {
    match activation {
        Activation::Relu if gate <= P::default() => R::default(),
        Activation::LeakyRelu(slope) if gate <= P::default() => value * R::from_f64(P::from_f64(slope).to_f64()),
        _ => value,
    }
}

/// The activation of `(x - hi) * scale + shift + residual` for each element.
fn affine_map<E: Element>(
    shape: &Shape,
    x: &[E],
    affine: Affine<'_, E>,
    line: impl Fn(usize) -> (E::Param, E::Param, E::Param),
) -> Vec<E> {
    let lines: Vec<_> = (0..shape.channels()).map(line).collect();
    let value = |(i, &x): (usize, &E)| {
        let value = argument(affine, lines[channel_of(shape, i)], x, i);
        E::from_param(bend(affine.activation, value, value))
    };
    x.iter().enumerate().map(value).collect()
}

/// The sign that the activation saw at each element, by its bit or by the output if they are given.
fn signs<E: Element>(shape: &Shape, x: &[E], saved: &Saved<E::Param>, affine: Affine<'_, E>) -> Vec<E::Param> {
    let lines: Vec<_> = (0..shape.channels()).map(|c| line_of(affine, c, saved)).collect();
    let gate = |(i, &x): (usize, &E)| match (affine.gates, affine.output) {
        (Some(gates), _) => gates.sign(i),
        (None, Some(output)) => output[i].to_param(),
        (None, None) => argument(affine, lines[channel_of(shape, i)], x, i),
    };
    x.iter().enumerate().map(gate).collect()
}

/// The bits that [`Affine::with_gates_to`] asks for, written to `gates`.
pub fn record_gates<E: Element>(
    shape: &Shape,
    x: &[E],
    affine: Affine<'_, E>,
    saved: &Saved<E::Param>,
    gates: &mut [u8],
) {
    let argument = Affine { gates: None, output: None, ..affine };
    for (i, value) in signs(shape, x, saved, argument).into_iter().enumerate() {
        let is_closed = value <= E::Param::default();
        gates[i / 8] = gates[i / 8] & !(1 << (i % 8)) | u8::from(!is_closed) << (i % 8);
    }
}

/// The gradient of the residual, as [`BatchNorm::backward`](crate::BatchNorm::backward): what the activation lets through
/// of `dy`.
pub fn residual_gradient<E: Element>(
    shape: &Shape,
    x: &[E],
    dy: &[E],
    saved: &Saved<E::Param>,
    affine: Affine<'_, E>,
) -> Vec<E> {
    let pass = |(gate, dy): (E::Param, &E)| E::from_param(bend(affine.activation, gate, dy.to_param()));
    signs(shape, x, saved, affine).into_iter().zip(dy).map(pass).collect()
}

/// `y`, as [`BatchNorm::normalize`](crate::BatchNorm::normalize).
pub fn normalize<E: Element>(shape: &Shape, x: &[E], affine: Affine<'_, E>, saved: &Saved<E::Param>) -> Vec<E> {
    affine_map(shape, x, affine, |c| line_of(affine, c, saved))
}

/// `y`, as [`BatchNorm::forward_infer`](crate::BatchNorm::forward_infer).
pub fn forward_infer<E: Element>(
    shape: &Shape,
    x: &[E],
    affine: Affine<'_, E>,
    population: Population<'_, E::Param>,
    eps: f64,
) -> Vec<E> {
    affine_map(shape, x, affine, |c| {
        let inv_std = inv_std(population.var[c].to_f64(), eps);
        let centre = centre(population.mean[c], E::Param::default(), inv_std, 0);
        line(affine, c, (centre, inv_std), None)
    })
}

/// What a backward pass reads in the place of xhat: the input, or the output.
struct Read<'a, E: Element> {
    x: &'a [E],
    saved: &'a Saved<E::Param>,
    affine: Affine<'a, E>,
    is_output: bool,
}

impl<E: Element> Read<'_, E> {
    /// The value of element `i`, behind no activation.
    fn value(&self, i: usize) -> E::Param {
        let x = self.x[i].to_param();
        match self.affine.activation {
            Activation::LeakyRelu(slope) if self.is_output && x <= E::Param::default() => {
                x * E::Param::from_f64(1.0 / slope)
            }
            _ => x,
        }
    }

    /// `(hi, residue, inv_std)` of the values of a channel: those of the input, or beta and gamma's.
    fn centre(&self, c: usize) -> (E::Param, f64, E::Param) {
        if !self.is_output {
            let (hi, residue) = centre_of(self.saved, c);
            return (hi, residue, self.saved.inv_std[c]);
        }
        let (gamma, beta) = corrected(self.affine, c, self.saved.renorm.as_ref());
        let rounded = E::Param::from_f64(beta);
        (rounded, beta - rounded.to_f64(), E::Param::from_f64(1.0 / gamma))
    }

    fn signs(&self, shape: &Shape) -> Vec<E::Param> {
        let of_output = Affine { gates: None, output: Some(self.x), ..self.affine };
        let affine = if self.is_output { of_output } else { self.affine };
        signs(shape, self.x, self.saved, affine)
    }
}

/// The gradient sums, as [`BatchNorm::gradient_sums`](crate::BatchNorm::gradient_sums) of a plan that goes back from the output.
pub fn gradient_sums_from_output<E: Element>(
    shape: &Shape,
    y: &[E],
    dy: &[E],
    saved: &Saved<E::Param>,
    affine: Affine<'_, E>,
) -> Vec<GradientSums> {
    sums_of(shape, &Read { x: y, saved, affine, is_output: true }, dy)
}

/// dx, as [`BatchNorm::input_gradient`](crate::BatchNorm::input_gradient) of a plan that goes back from the output.
pub fn input_gradient_from_output<E: Element>(
    shape: &Shape,
    y: &[E],
    dy: &[E],
    saved: &Saved<E::Param>,
    affine: Affine<'_, E>,
    sums: &[GradientSums],
) -> Vec<E> {
    gradient_of(shape, &Read { x: y, saved, affine, is_output: true }, dy, sums)
}

/// The gradient sums of each channel, as [`BatchNorm::gradient_sums`](crate::BatchNorm::gradient_sums).
pub fn gradient_sums<E: Element>(
    shape: &Shape,
    x: &[E],
    dy: &[E],
    saved: &Saved<E::Param>,
    affine: Affine<'_, E>,
) -> Vec<GradientSums> {
    sums_of(shape, &Read { x, saved, affine, is_output: false }, dy)
}

fn sums_of<E: Element>(shape: &Shape, read: &Read<'_, E>, dy: &[E]) -> Vec<GradientSums> {
    let activation = read.affine.activation;
    let mut total: Vec<Option<(f64, f64)>> = vec![None; shape.channels()];
    let mut add = |c: usize, sums| total[c] = Some(total[c].map_or(sums, |total| plus(total, sums)));
    let signs = read.signs(shape);
    let narrow = |i: usize| {
        let (mean, _, inv_std) = read.centre(channel_of(shape, i));
        let dy = bend(activation, signs[i], dy[i].to_param());
        (dy, dy * ((read.value(i) - mean) * inv_std))
    };
    let wide = |i: usize| {
        let (mean, _, inv_std) = read.centre(channel_of(shape, i));
        let dy = bend(activation, signs[i], dy[i].to_param().to_f64());
        (dy, dy * ((read.value(i).to_f64() - mean.to_f64()) * inv_std.to_f64()))
    };
    let is_sound = |sums: (f64, f64)| sums.0.is_finite() && sums.1.is_finite();
    match Geometry::new(shape) {
        _ if shape.is_empty() => (),
        Geometry::Planar(planar) => {
            for c in 0..planar.channels {
                for b in 0..planar.blocks() {
                    let runs = planar.block(c, b);
                    let sums = sum_runs(runs, narrow);
                    let elements = (0..runs.size()).map(|i| runs.start + i / runs.len * runs.stride + i % runs.len);
                    add(c, if is_sound(sums) { sums } else { elements.fold((0.0, 0.0), |sum, i| plus(sum, wide(i))) });
                }
            }
        }
        Geometry::Rows(rows) => {
            for b in 0..rows.blocks() {
                for (c, sums) in sum_rows(rows, b, narrow).into_iter().enumerate() {
                    add(c, if is_sound(sums) { sums } else { sum_column(rows, b, c, wide) });
                }
            }
        }
    }
    let close = |(c, total): (usize, Option<(f64, f64)>)| {
        let (dy, dy_h) = total.unwrap_or_default();
        let (_, residue, inv_std) = read.centre(c);
        let lacking = residue * inv_std.to_f64();
        GradientSums { dy, dy_xhat: dy_h - lacking * dy }
    };
    total.into_iter().enumerate().map(close).collect()
}

/// dx, as [`BatchNorm::input_gradient`](crate::BatchNorm::input_gradient).
pub fn input_gradient<E: Element>(
    shape: &Shape,
    x: &[E],
    dy: &[E],
    saved: &Saved<E::Param>,
    affine: Affine<'_, E>,
    sums: &[GradientSums],
) -> Vec<E> {
    gradient_of(shape, &Read { x, saved, affine, is_output: false }, dy, sums)
}

fn gradient_of<E: Element>(shape: &Shape, read: &Read<'_, E>, dy: &[E], sums: &[GradientSums]) -> Vec<E> {
    let Read { saved, affine, .. } = *read;
    let count = saved.count as f64;
    let signs = read.signs(shape);
    let value = |i: usize| {
        let c = channel_of(shape, i);
        let dy = bend(affine.activation, signs[i], dy[i].to_param());
        let scale = corrected(affine, c, saved.renorm.as_ref()).0 * saved.inv_std[c].to_f64();
        if saved.frozen {
            return E::from_param(dy * E::Param::from_f64_saturating(scale));
        }
        let slope = -scale * (sums[c].dy_xhat / count);
        let dy_mean = sums[c].dy / count;
        let rounded = E::Param::from_f64(dy_mean);
        let (mean, residue, inv_std) = read.centre(c);
        let shift = -(dy_mean - rounded.to_f64()) * scale - residue * inv_std.to_f64() * slope;
        let centred = (dy - rounded) * E::Param::from_f64_saturating(scale) + E::Param::from_f64(shift);
        let xhat = (read.value(i) - mean) * inv_std;
        E::from_param(centred + xhat * E::Param::from_f64(slope))
    };
    (0..dy.len()).map(value).collect()
}

/// `y`, as [`BatchNorm::forward_infer_quantized`](crate::BatchNorm::forward_infer_quantized).
pub fn forward_infer_quantized(
    shape: &Shape,
    x: &[i8],
    of_x: Quantization,
    affine: Affine<'_, f32>,
    (population, eps): (Population<'_, f32>, f64),
    of_y: Quantization,
) -> Vec<i8> {
    let value = |(i, &x): (usize, &i8)| {
        let c = channel_of(shape, i);
        let (gamma, beta) = corrected(affine, c, None);
        let scale = gamma * inv_std(f64::from(population.var[c]), eps);
        let shift = beta - f64::from(population.mean[c]) * scale;
        let a = (scale * of_x.scale / of_y.scale) as f32;
        let b = ((shift - of_x.scale * f64::from(of_x.zero_point) * scale) / of_y.scale) as f32;
        let line = f32::from(x) * a + b;
        let rounded = (bend(affine.activation, line, line) + f32::from(of_y.zero_point)).round_ties_even();
        // Saturates, as conversions do.
        rounded as i8
    };
    x.iter().enumerate().map(value).collect()
}

/// The gradients with respect to x, dy and gamma, as [`BatchNorm::double_backward`](crate::BatchNorm::double_backward).
pub fn double_backward<E: Element>(
    shape: &Shape,
    x: &[E],
    dy: &[E],
    saved: &Saved<E::Param>,
    affine: Affine<'_, E>,
    cotangents: Cotangents<'_, E>,
) -> (Vec<E>, Vec<E>, Vec<E::Param>) {
    let (m, v, channels) = (shape.count() as f64, cotangents.dx, shape.channels());
    let affine = Affine::of(affine.gamma, affine.beta);
    // Sums of products with dy itself: those of an input with mean 0 and inv_std 1.
    let mut unit = Saved::new(channels);
    unit.inv_std.fill(E::Param::from_f64(1.0));
    let sums = [gradient_sums(shape, x, dy, saved, affine), gradient_sums(shape, x, v, saved, affine)];
    let of_both = gradient_sums(shape, dy, v, &unit, affine);
    let (mut of_x, mut of_dy, mut of_gamma) = (x.to_vec(), dy.to_vec(), unit.mean.clone());
    let narrow = E::Param::from_f64;
    for c in 0..channels {
        let [mut a, mut b, mut mean_v, mut cx] =
            [sums[0][c].dy, sums[0][c].dy_xhat, sums[1][c].dy, sums[1][c].dy_xhat].map(|sum| sum / m);
        let d = of_both[c].dy_xhat / m;
        if saved.frozen {
            [a, b, mean_v, cx] = [0.0; 4];
        }
        let (r, offset) = saved.renorm.as_ref().map_or((1.0, 0.0), |n| (n.r[c].to_f64(), n.d[c].to_f64()));
        let w = cotangents.dgamma.map_or(0.0, |w| w[c].to_f64());
        let u = cotangents.dbeta.map_or(0.0, |u| u[c].to_f64());
        let s = saved.inv_std[c].to_f64();
        let scale = corrected(affine, c, saved.renorm.as_ref()).0 * s;
        of_gamma[c] = narrow(r * m * (s * (d - mean_v * a - b * cx)));

        let (centre, residue) = centre_of(saved, c);
        let xhat = |i: usize| (x[i].to_param() - centre) * saved.inv_std[c];
        let map = |i: usize, of: &[E], mean: f64, scale: f64, slope: f64, beside: f64| {
            let rounded = narrow(mean);
            let shift = -(mean - rounded.to_f64()) * scale - residue * s * slope + beside;
            let scaled = (of[i].to_param() - rounded) * E::Param::from_f64_saturating(scale) + narrow(shift);
            E::from_param(scaled + xhat(i) * narrow(slope))
        };
        let bent = if saved.frozen { 0.0 } else { -scale * (s * (d - mean_v * a - 3.0 * b * cx)) - w * r * s * b };
        let of_v = -scale * b * s;
        let (hi, of_v_rounded) = (narrow(mean_v), E::Param::from_f64_saturating(of_v));
        let of_v_shift = narrow(0.0 - narrow(mean_v - hi.to_f64()).to_f64() * of_v);
        for i in elements_of(shape, c) {
            of_dy[i] = map(i, v, mean_v, scale, w * r - scale * cx, u + w * offset);
            let part = map(i, dy, a, (w * r - scale * cx) * s, bent, 0.0);
            let rest = (v[i].to_param() - hi) * of_v_rounded + of_v_shift;
            of_x[i] = E::from_param(rest + part.to_param());
        }
    }
    (of_x, of_dy, of_gamma)
}
