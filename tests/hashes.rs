//! The bits of every kernel, hashed and committed: tests/hashes.txt is the same on every CPU, operating system, tier, thread
//! count, set of features and level of optimization. After a deliberate change of bits, or with a new operation,
//! `BATCHNORM_WRITE_HASHES=1 cargo test --all-features --test hashes` writes the file anew.

mod common;

use batchnorm::{
    Activation, Affine, BatchNorm, Cotangents, Element, GradientSums, Gradients, Layer, Layout, Moments, Momentum,
    Parallelism, Population, Quantization, Real, RenormLimits, Result, Saved, SecondGradients, Shape, Stores, Tier,
    Variance, View,
};
use common::{Bits, in_pool, plan, tiers};

/// What an operation runs on, and with.
struct Cell {
    shape: Shape,
    tier: Tier,
    threads: usize,
    stores: Stores,
}

impl Cell {
    fn plan<E: Element>(&self) -> BatchNorm<E> {
        let parallelism = Parallelism::Threads(self.threads);
        plan::<E>(self.shape, self.tier, parallelism).with_eps(1e-3).unwrap().with_stores(self.stores)
    }
}

/// An element type and the type of its parameters, with bits to be hashed.
trait Stored: Bits + Element<Param: Bits> {}
impl<E: Bits + Element<Param: Bits>> Stored for E {}

/// Threads and stores of each run of the widest tier; the others do with the first two.
const RUNS: [(usize, Stores); 6] = [
    (1, Stores::Auto),
    (3, Stores::Streaming),
    (1, Stores::Streaming),
    (2, Stores::Streaming),
    (7, Stores::Streaming),
    (16, Stores::Cached),
];

/// Planes shorter than a vector and longer than a block (8192), alone and with others, one channel and many, rows that are joined and
/// not, in one block and in several.
fn shapes<E: Element>() -> [(&'static str, Vec<Shape>); 7] {
    // A large one, for one type.
    let wide = if E::DIGITS == 24 { Shape::nhwc(1, 3, 700, 128) } else { Shape::nhwc(1, 3, 7, 128) };
    [
        ("NC", vec![Shape::nc(1, 5), Shape::nc(37, 19), Shape::nc(130, 131), Shape::nc(4500, 3), Shape::nc(9000, 1)]),
        (
            "NCL",
            vec![
                Shape::ncl(70, 3, 1),
                Shape::ncl(5, 17, 41),
                Shape::ncl(1, 3, 9001),
                Shape::ncl(3, 1, 5000),
                Shape::ncl(5, 2, 4100),
            ],
        ),
        ("NCHW", vec![Shape::nchw(6, 5, 7, 7), Shape::nchw(40, 18, 5, 3), Shape::nchw(2, 2, 97, 89)]),
        ("NCDHW", vec![Shape::ncdhw(2, 3, 4, 5, 6), Shape::ncdhw(40, 2, 5, 5, 9)]),
        ("NLC", vec![Shape::nlc(3, 17, 24), Shape::nlc(2, 2300, 5)]),
        ("NHWC", vec![Shape::nhwc(2, 9, 9, 17), Shape::nhwc(1, 50, 50, 1), wide]),
        ("NDHWC", vec![Shape::ndhwc(2, 3, 4, 5, 130), Shape::ndhwc(2, 5, 6, 7, 33)]),
    ]
    .map(|(layout, shapes)| (layout, shapes.into_iter().map(Result::unwrap).collect()))
}

/// Numbers that are the same everywhere: integers (SplitMix64: Steele, Lea & Flood, "Fast splittable pseudorandom number
/// generators", 2014), scaled by powers of two.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// About normal, from -4 to 4, with as many digits as f64 has: sums of short numbers would not round.
    fn normal(&mut self) -> f64 {
        let bits = self.next();
        let sum: i64 = (0..4).map(|i| (bits >> (16 * i) & 0xffff) as i64).sum();
        ((sum - 0x20000) as f64 + (self.next() >> 11) as f64 / 2f64.powi(53)) / 32768.0
    }

    fn params<P: Real>(&mut self, len: usize) -> Vec<P> {
        (0..len).map(|_| P::from_f64(self.normal())).collect()
    }

    fn tensor<E: Element>(&mut self, len: usize) -> Vec<E> {
        (0..len).map(|_| E::from_param(E::Param::from_f64(self.normal()))).collect()
    }

    /// An input whose channels are each of another kind, so that sums are repeated around another shift, enlarged and in f64.
    fn input<E: Element>(&mut self, shape: &Shape) -> Vec<E> {
        // The range of f16 is small.
        let far = if E::DIGITS == 11 { 10 } else { 110 };
        let [huge, tiny] = [far, -far - 10].map(|exponent| 2f64.powi(exponent));
        let value = |i: usize| {
            let channel = match shape.layout() {
                Layout::ChannelsFirst => i / shape.spatial() % shape.channels(),
                Layout::ChannelsLast => i % shape.channels(),
            };
            let v = self.normal();
            let v = match (channel + shape.len()) % 8 {
                0 => 1000.0 + v,
                1 if i % 61 == channel => 4096.0 * v,
                2 => huge * v,
                3 => tiny * v,
                4 => 12.3,
                // f64 sums of f32 values round only where these are of very different sizes.
                5 => v / 2f64.powi(i as i32 % far),
                _ => v,
            };
            E::from_param(E::Param::from_f64(v))
        };
        (0..shape.len()).map(value).collect()
    }
}

/// What operations are given.
struct Args<E: Element> {
    x: Vec<E>,
    dy: Vec<E>,
    z: Vec<E>,
    gamma: Vec<E::Param>,
    beta: Vec<E::Param>,
    mean: Vec<E::Param>,
    var: Vec<E::Param>,
}

impl<E: Stored> Args<E> {
    fn new(shape: &Shape) -> Self {
        let (len, c) = (shape.len(), shape.channels());
        let mut numbers = Numbers(len as u64);
        let (x, dy, z) = (numbers.input(shape), numbers.tensor(len), numbers.tensor(len));
        let [gamma, beta, mean, deviation] = [(); 4].map(|()| numbers.params::<E::Param>(c));
        Self { x, dy, z, gamma, beta, mean, var: deviation.iter().map(|&v| v * v).collect() }
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

    fn zeros(&self) -> Vec<E::Param> {
        vec![E::Param::default(); self.gamma.len()]
    }
}

/// The hash of all that operations wrote, value by value (FxHash, of the Rust compiler).
#[derive(Default)]
struct Hash(u64);

impl Hash {
    fn put<T: Bits>(&mut self, values: &[T]) {
        for value in values {
            self.0 = (self.0.rotate_left(5) ^ value.bits()).wrapping_mul(0x517c_c1b7_2722_0a95);
        }
    }

    fn put_all<T: Bits, const N: usize>(&mut self, tensors: [&[T]; N]) {
        tensors.into_iter().for_each(|values| self.put(values));
    }

    fn saved<P: Real + Bits>(&mut self, saved: &Saved<P>) {
        self.put_all([saved.mean(), saved.residue(), saved.var(), saved.inv_std()]);
        saved.corrections().into_iter().for_each(|(r, d)| self.put_all([r, d]));
    }

    fn moments(&mut self, moments: &[Moments]) {
        moments.iter().for_each(|m| self.put(&[m.count as f64, m.mean, m.residue, m.m2]));
    }

    fn sums(&mut self, sums: &[GradientSums]) {
        sums.iter().for_each(|sums| self.put(&[sums.dy, sums.dy_xhat]));
    }
}

/// Runs on one shape and hashes what it wrote.
type Operation<E> = fn(&Cell, &Args<E>, &mut Hash) -> Result<()>;

/// Every operation with a kernel of its own. To add one, add a line, and write the file anew.
fn registry<E: Stored>() -> Vec<(&'static str, Operation<E>)> {
    vec![
        ("forward_train", forward_train),
        ("halves", halves),
        ("running", running),
        ("forward_infer", forward_infer),
        ("folded", folded),
        ("backward", backward),
        ("gradient_halves", gradient_halves),
        ("accumulated", accumulated),
        ("activated", activated),
        ("gated", gated),
        ("frozen", frozen),
        ("renormalized", renormalized),
        ("ghost", ghost),
        ("from_output", from_output),
        ("double_backward", double_backward),
        ("strided", strided),
        ("blocked", blocked),
        ("masked", masked),
    ]
}

fn forward_train<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let bn = cell.plan::<E>();
    train(&bn, args, args.affine(), &mut bn.saved(), hash)
}

/// Training forward passes, out of place and in place.
fn train<E: Stored>(
    bn: &BatchNorm<E>,
    args: &Args<E>,
    affine: Affine<'_, E>,
    saved: &mut Saved<E::Param>,
    hash: &mut Hash,
) -> Result<()> {
    let (mut y, mut in_place) = (args.blank(), args.x.clone());
    bn.forward_train(&args.x, affine, &mut y, saved)?;
    hash.put(&y);
    bn.forward_train_in_place(&mut in_place, affine, saved)?;
    hash.put(&in_place);
    hash.saved(saved);
    Ok(())
}

/// All gradients at once, some, and dx in place.
fn back<E: Stored>(
    bn: &BatchNorm<E>,
    x: &[E],
    args: &Args<E>,
    affine: Affine<'_, E>,
    saved: &Saved<E::Param>,
    hash: &mut Hash,
) -> Result<()> {
    let (mut dx, mut dresidual, mut dgamma, mut dbeta) = (args.blank(), args.blank(), args.zeros(), args.zeros());
    let all = Gradients {
        dx: Some(&mut dx),
        dgamma: Some(&mut dgamma),
        dbeta: Some(&mut dbeta),
        dresidual: affine.residual.map(|_| &mut dresidual[..]),
    };
    bn.backward(x, &args.dy, saved, affine, all)?;
    hash.put_all([&dx, &dresidual]);
    hash.put_all([&dgamma, &dbeta]);
    dx.copy_from_slice(&args.dy);
    bn.backward_in_place(x, &mut dx, saved, affine, Gradients { dbeta: Some(&mut dbeta), ..Default::default() })?;
    bn.backward(x, &args.dy, saved, affine, Gradients { dgamma: Some(&mut dgamma), ..Default::default() })?;
    hash.put(&dx);
    hash.put_all([&dgamma, &dbeta]);
    Ok(())
}

fn halves<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let bn = cell.plan::<E>();
    let (mut moments, mut saved) = (vec![Moments::default(); args.gamma.len()], bn.saved());
    bn.moments(&args.x, &mut moments)?;
    hash.moments(&moments);
    // As of two shards.
    let merged: Vec<_> = moments.iter().map(|moments| moments.merge(*moments)).collect();
    bn.finish(&merged, &mut saved)?;
    hash.moments(&merged);
    hash.saved(&saved);
    let (mut y, mut in_place) = (args.blank(), args.x.clone());
    bn.normalize(&args.x, args.affine(), &saved, &mut y)?;
    bn.normalize_in_place(&mut in_place, args.affine(), &saved)?;
    hash.put_all([&y, &in_place]);
    Ok(())
}

fn running<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let bn = cell.plan::<E>();
    let (mut moments, mut saved) = (vec![Moments::default(); args.gamma.len()], bn.saved());
    bn.moments(&args.x, &mut moments)?;
    bn.finish(&moments, &mut saved)?;
    let variance = if bn.shape().count() > 1 { Variance::Unbiased } else { Variance::Biased };
    for momentum in [Momentum::WeightOfNew(0.1), Momentum::WeightOfOld(0.99), Momentum::Cumulative] {
        let mut running = bn.running(momentum, variance)?;
        running.update(&saved)?;
        running.update(&saved)?;
        hash.put_all([running.mean(), running.var()]);
        running.recompute(&moments)?;
        hash.put_all([running.mean(), running.var()]);
    }
    Ok(())
}

fn forward_infer<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let (bn, mut y, mut in_place) = (cell.plan::<E>(), args.blank(), args.x.clone());
    bn.forward_infer(&args.x, args.affine(), args.population(), &mut y)?;
    bn.forward_infer_in_place(&mut in_place, args.affine(), args.population())?;
    hash.put_all([&y, &in_place]);
    Ok(())
}

fn folded<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let (bn, c) = (cell.plan::<E>(), args.gamma.len());
    let (mut scale, mut shift) = (args.zeros(), args.zeros());
    bn.scale_and_shift(args.affine(), args.population(), &mut scale, &mut shift)?;
    let layer = Layer::convolution(c, c, 3);
    let mut weight = Numbers(9).params(layer.weights());
    bn.fold_into_preceding(layer, &mut weight, &mut scale, args.affine(), args.population())?;
    bn.fold_into_following(layer, &mut weight, &mut shift, args.affine(), args.population())?;
    hash.put_all([&scale, &shift, &weight]);
    Ok(())
}

fn backward<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let bn = cell.plan::<E>();
    let mut saved = bn.saved();
    bn.forward_train(&args.x, args.affine(), &mut args.blank(), &mut saved)?;
    back(&bn, &args.x, args, args.affine(), &saved, hash)
}

fn gradient_halves<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let bn = cell.plan::<E>();
    let (mut saved, mut sums) = (bn.saved(), vec![GradientSums::default(); args.gamma.len()]);
    bn.forward_train(&args.x, args.affine(), &mut args.blank(), &mut saved)?;
    bn.gradient_sums(&args.x, &args.dy, &saved, args.affine(), &mut sums)?;
    hash.sums(&sums);
    let merged: Vec<_> = sums.iter().map(|sums| sums.merge(*sums)).collect();
    let (mut dx, mut in_place) = (args.blank(), args.dy.clone());
    bn.input_gradient(&args.x, &args.dy, &saved, args.affine(), &merged, &mut dx)?;
    bn.input_gradient_in_place(&args.x, &mut in_place, &saved, args.affine(), &sums)?;
    hash.put_all([&dx, &in_place]);
    Ok(())
}

fn accumulated<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let bn = cell.plan::<E>().with_accumulation(true);
    let mut saved = bn.saved();
    bn.forward_train(&args.x, args.affine(), &mut args.blank(), &mut saved)?;
    let (mut dgamma, mut dbeta) = (args.mean.clone(), args.var.clone());
    let gradients = Gradients { dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
    bn.backward(&args.x, &args.dy, &saved, args.affine(), gradients)?;
    hash.put_all([&dgamma, &dbeta]);
    Ok(())
}

fn activated<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let (bn, mut y) = (cell.plan::<E>(), args.blank());
    for affine in [
        args.affine().with_activation(Activation::Relu),
        args.affine().with_activation(Activation::LeakyRelu(0.3)).with_residual(&args.z),
    ] {
        let mut saved = bn.saved();
        train(&bn, args, affine, &mut saved, hash)?;
        bn.forward_infer(&args.x, affine, args.population(), &mut y)?;
        hash.put(&y);
        bn.normalize(&args.x, affine, &saved, &mut y)?;
        back(&bn, &args.x, args, affine, &saved, hash)?;
        back(&bn, &args.x, args, affine.with_output(&y), &saved, hash)?;
    }
    Ok(())
}

fn gated<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let (bn, mut y) = (cell.plan::<E>(), args.blank());
    let (mut gates, mut saved) = (vec![0; bn.gates_len()], bn.saved());
    let affine = args.affine().with_activation(Activation::LeakyRelu(0.3)).with_residual(&args.z);
    bn.forward_train(&args.x, affine.with_gates_to(&mut gates), &mut y, &mut saved)?;
    hash.put(&y);
    hash.put(&gates.iter().map(|&bits| f32::from(bits)).collect::<Vec<_>>());
    // Bits of no forward pass, so that they alone can be what is seen.
    gates.iter_mut().zip((0u8..=255).cycle()).for_each(|(bits, i)| *bits ^= i.wrapping_mul(73));
    back(&bn, &args.x, args, affine.with_gates(&gates), &saved, hash)
}

fn frozen<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let (bn, mut y) = (cell.plan::<E>(), args.blank());
    let mut saved = bn.saved();
    bn.freeze(args.population(), &mut saved)?;
    bn.normalize(&args.x, args.affine(), &saved, &mut y)?;
    hash.put(&y);
    back(&bn, &args.x, args, args.affine(), &saved, hash)
}

const LIMITS: RenormLimits = RenormLimits { r_max: 1.5, d_max: 0.4 };

fn renormalized<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let bn = cell.plan::<E>();
    let mut saved = bn.saved();
    saved.renormalize(args.population(), LIMITS)?;
    train(&bn, args, args.affine(), &mut saved, hash)?;
    back(&bn, &args.x, args, args.affine(), &saved, hash)
}

fn ghost<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let ghost = cell.plan::<E>().ghost(cell.shape.batch().div_ceil(3))?;
    let (mut y, mut dx, mut dgamma, mut dbeta) = (args.blank(), args.dy.clone(), args.zeros(), args.zeros());
    let mut saved = ghost.saved();
    ghost.forward_train(&args.x, args.affine(), &mut y, &mut saved)?;
    let gradients = Gradients { dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
    ghost.backward_in_place(&args.x, &mut dx, &saved, args.affine(), gradients)?;
    hash.put_all([&y, &dx]);
    hash.put_all([&dgamma, &dbeta]);
    saved.iter().for_each(|saved| hash.saved(saved));
    Ok(())
}

fn from_output<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let bn = cell.plan::<E>().with_backward_from_output(true);
    // Far enough from zero.
    let gamma: Vec<_> = args.gamma.iter().map(|&gamma| E::Param::from_f64(gamma.to_f64().abs() + 0.5)).collect();
    let affine = Affine::new(&gamma, &args.beta).with_activation(Activation::LeakyRelu(0.2));
    let (mut y, mut saved) = (args.x.clone(), bn.saved());
    bn.forward_train_in_place(&mut y, affine, &mut saved)?;
    back(&bn, &y, args, affine, &saved, hash)
}

fn double_backward<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let bn = cell.plan::<E>();
    let [mut of_batch, mut constant] = [bn.saved(), bn.saved()];
    bn.forward_train(&args.x, args.affine(), &mut args.blank(), &mut of_batch)?;
    bn.freeze(args.population(), &mut constant)?;
    for saved in [of_batch, constant] {
        let (mut of_x, mut of_dy, mut of_gamma) = (args.blank(), args.blank(), args.zeros());
        let cotangents = Cotangents { dx: &args.z, dgamma: Some(&args.mean), dbeta: Some(&args.beta) };
        let all = SecondGradients { x: Some(&mut of_x), dy: Some(&mut of_dy), gamma: Some(&mut of_gamma) };
        bn.double_backward(&args.x, &args.dy, &saved, args.affine(), cotangents, all)?;
        hash.put_all([&of_x, &of_dy]);
        hash.put(&of_gamma);
    }
    Ok(())
}

/// Forward and backward where slices hold more than the elements.
fn viewed<E: Stored>(bn: &BatchNorm<E>, args: &Args<E>, [x_len, y_len]: [usize; 2], hash: &mut Hash) -> Result<()> {
    let mut numbers = Numbers(x_len as u64);
    let (x, dy) = (numbers.tensor::<E>(x_len), numbers.tensor::<E>(y_len));
    let (mut y, mut dx, mut saved) = (dy.clone(), x.clone(), bn.saved());
    let (mut dgamma, mut dbeta) = (args.zeros(), args.zeros());
    bn.forward_train(&x, args.affine(), &mut y, &mut saved)?;
    let all = Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
    bn.backward(&x, &dy, &saved, args.affine(), all)?;
    hash.put_all([&y, &dx]);
    hash.put_all([&dgamma, &dbeta]);
    hash.saved(&saved);
    bn.forward_infer(&x, args.affine(), args.population(), &mut y)?;
    hash.put(&y);
    Ok(())
}

fn strided<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let (n, c, s) = (cell.shape.batch(), cell.shape.channels(), cell.shape.spatial());
    let (outer, inner) = if cell.shape.layout() == Layout::ChannelsFirst { (c, s) } else { (s, c) };
    let view = |gap| View::strided(&cell.shape, &[n, outer, inner], &[outer * (inner + gap) + gap, inner + gap, 1]);
    let (x, y) = (view(3)?, view(5)?);
    let lens = [x.len(), y.len()];
    viewed(&cell.plan::<E>().with_views(x, y)?, args, lens, hash)
}

/// Of tensors that would have the channels first.
fn blocked<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    if cell.shape.layout() == Layout::ChannelsLast {
        return Ok(());
    }
    let (x, y) = (View::blocked(&cell.shape, 8)?, View::blocked(&cell.shape, 16)?);
    let lens = [x.len(), y.len()];
    viewed(&cell.plan::<E>().with_views(x, y)?, args, lens, hash)
}

fn masked<E: Stored>(cell: &Cell, args: &Args<E>, hash: &mut Hash) -> Result<()> {
    let (bn, s, lens) = (cell.plan::<E>(), cell.shape.spatial(), [cell.shape.len(); 2]);
    // The first position counts in both.
    let mask: Vec<_> = (0..cell.shape.count()).map(|i| i * i % 7 != 2).collect();
    let lengths: Vec<_> = (0..cell.shape.batch()).map(|i| s - i % s.min(3)).collect();
    viewed(&bn.with_mask(&mask)?, args, lens, hash)?;
    viewed(&bn.with_lengths(&lengths)?, args, lens, hash)
}

fn quantized(cell: &Cell, args: &Args<f32>, hash: &mut Hash) -> Result<()> {
    let (bn, mut numbers) = (cell.plan::<f32>(), Numbers(1));
    let x: Vec<i8> = args.x.iter().map(|_| numbers.next() as i8).collect();
    let (of_x, of_y) = (Quantization { scale: 0.03, zero_point: 5 }, Quantization { scale: 0.05, zero_point: -7 });
    for activation in [Activation::None, Activation::Relu, Activation::LeakyRelu(0.3)] {
        let affine = args.affine().with_activation(activation);
        let (mut y, mut in_place) = (vec![0; x.len()], x.clone());
        bn.forward_infer_quantized(&x, of_x, affine, args.population(), &mut y, of_y)?;
        bn.forward_infer_quantized_in_place(&mut in_place, of_x, affine, args.population(), of_y)?;
        y.iter().chain(&in_place).for_each(|&q| hash.put(&[f32::from(q)]));
    }
    Ok(())
}

/// What a run gives, a line for each operation and layout.
fn lines<E: Stored>(
    element: &str,
    operations: &[(&str, Operation<E>)],
    tier: Tier,
    (threads, stores): (usize, Stores),
) -> Vec<String> {
    let mut lines = Vec::new();
    for (layout, shapes) in shapes::<E>() {
        let cases: Vec<_> =
            shapes.into_iter().map(|shape| (Cell { shape, tier, threads, stores }, Args::<E>::new(&shape))).collect();
        for (name, operation) in operations {
            let mut hash = Hash::default();
            cases.iter().for_each(|(cell, args)| operation(cell, args, &mut hash).unwrap());
            // A layout that does not have the operation wrote nothing.
            if hash.0 != 0 {
                lines.push(format!("{name:15} {element:4} {layout:5} {:016x}", hash.0));
            }
        }
    }
    lines
}

/// Those of all element types of the build.
fn all_lines(tier: Tier, run: (usize, Stores)) -> Vec<String> {
    let on_f32 = [registry(), vec![("quantized", quantized)]].concat();
    [
        lines::<f32>("f32", &on_f32, tier, run),
        lines::<f64>("f64", &registry(), tier, run),
        #[cfg(feature = "half")]
        lines::<half::bf16>("bf16", &registry(), tier, run),
        #[cfg(feature = "half")]
        lines::<half::f16>("f16", &registry(), tier, run),
    ]
    .concat()
}

#[test]
fn every_run_gives_the_committed_hashes() {
    const TITLE: &str = "# operation, element type, layout, hash of the outputs; written by tests/hashes.rs\n";
    if std::env::var_os("BATCHNORM_WRITE_HASHES").is_some() {
        if cfg!(not(feature = "half")) {
            panic!("without the feature half, lines would be missing");
        }
        let text = TITLE.to_string() + &all_lines(Tier::Portable, RUNS[0]).join("\n") + "\n";
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hashes.txt"), text).unwrap();
        return;
    }
    let halves = |line: &str| line.contains(" bf16 ") || line.contains(" f16 ");
    let committed: Vec<_> = include_str!("hashes.txt")
        .lines()
        .filter(|line| !line.starts_with('#') && (cfg!(feature = "half") || !halves(line)))
        .collect();
    let (tiers, mut wrong) = (tiers(), Vec::new());
    for &tier in &tiers {
        let runs = if tiers.last() == Some(&tier) { &RUNS[..] } else { &RUNS[..2] };
        for &run in runs.iter().filter(|run| cfg!(feature = "rayon") || run.0 == 1) {
            let got = in_pool(run.0, || all_lines(tier, run));
            let name = format!("{tier}, {} threads, {:?} stores", run.0, run.1);
            let differ = got.iter().filter(|line| !committed.contains(&line.as_str()));
            wrong.extend(differ.map(|line| format!("got   {line} on {name}")));
            let missing = committed.iter().filter(|line| !got.iter().any(|got| got == *line));
            wrong.extend(missing.map(|line| format!("lacks {line} on {name}")));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} lines differ, the first ones:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(40)].join("\n")
    );
}
