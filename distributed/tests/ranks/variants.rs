//! Options of plans and arguments on shards. With the same statistics and sums, what a shard gets is what its part of the
//! joined batch gets in one process, bit for bit.

use batchnorm::{
    Activation, Affine, BatchNorm, Element, GradientSums, Gradients, Population, Real, RenormLimits, Shape,
};
use batchnorm_mpi::SyncBatchNorm;
use mpi::topology::SimpleCommunicator;

use crate::common::{Bits, Data, assert_bits};
use crate::support::{Cut, Shard, assert_same, bits, bits_of_saved};

/// A joined batch; all ranks have all of it.
struct Joined<E: Element> {
    x: Vec<E>,
    dy: Vec<E>,
    residual: Vec<E>,
    gamma: Vec<E::Param>,
    beta: Vec<E::Param>,
}

impl<E: Element> Joined<E> {
    fn new(shape: &Shape) -> Self {
        let (len, c) = (shape.len(), shape.channels());
        let one = E::Param::from_f64(1.0);
        let gamma = Data::Normal.fill::<E::Param>(c, 14).into_iter();
        Self {
            x: Data::Normal.fill(len, 11),
            dy: Data::Normal.fill(len, 12),
            residual: Data::Normal.fill(len, 13),
            // Away from zero, for passes from the output.
            gamma: gamma.map(|v| if v.to_f64() < 0.0 { v - one } else { v + one }).collect(),
            beta: Data::Normal.fill(c, 15),
        }
    }
}

/// One step on `bn`, a plan for the shard, against `joined`, the same plan for the whole. Returns the bits that ranks share.
fn step<E: Bits>(
    bn: &mut SyncBatchNorm<E>,
    joined: &BatchNorm<E>,
    shard: &Shard,
    data: &Joined<E>,
    (with_residual, activation): (bool, Activation),
    option: &str,
) -> Vec<u64>
where
    E::Param: Bits,
{
    let here = shard.elements.clone();
    let c = joined.shape().channels();
    let from_output = option == "from output";
    let affine = Affine::new(&data.gamma, &data.beta).with_activation(activation);
    let of = |part: std::ops::Range<usize>| match with_residual {
        true => affine.with_residual(&data.residual[part]),
        false => affine,
    };
    let (affine_here, affine_joined) = (of(here.clone()), of(0..data.x.len()));
    let mut saved = bn.plan().saved();
    if option == "renormalized" {
        let (mean, var) = (vec![E::Param::from_f64(0.25); c], vec![E::Param::from_f64(0.5); c]);
        let population = Population { mean: &mean, var: &var };
        saved.renormalize(population, RenormLimits { r_max: 1.5, d_max: 0.1 }).unwrap();
    }

    let blank = || vec![E::from_param(E::Param::from_f64(7.0)); data.x.len()];
    let (mut y, mut y_joined) = (blank(), blank());
    bn.forward_train(&data.x[here.clone()], affine_here, &mut y[here.clone()], &mut saved).unwrap();
    joined.normalize(&data.x, affine_joined, &saved, &mut y_joined).unwrap();
    assert_bits("y", &y[here.clone()], &y_joined[here.clone()]);

    // Backward from the output reads the output.
    let x_joined = if from_output { &y_joined } else { &data.x };
    let (x, dy) = (&x_joined[here.clone()], &data.dy[here.clone()]);
    let mut mine = vec![GradientSums::default(); c];
    bn.plan().gradient_sums(x, dy, &saved, affine_here, &mut mine).unwrap();
    let mut all = mine.clone();
    bn.merge_sums(&mut all).unwrap();

    let params = || vec![E::Param::from_f64(3.0); c];
    for is_global in [false, true] {
        let mut bn = bn.with_plan(bn.plan().clone()).unwrap().with_global_parameters(is_global);
        let (mut dx, mut dresidual, mut dgamma, mut dbeta) = (blank(), blank(), params(), params());
        let gradients = Gradients {
            dx: Some(&mut dx[here.clone()]),
            dgamma: Some(&mut dgamma),
            dbeta: Some(&mut dbeta),
            dresidual: Some(&mut dresidual[here.clone()]),
        };
        bn.backward(x, dy, &saved, affine_here, gradients).unwrap();
        let (mut dx_then, mut dresidual_then, mut dgamma_then, mut dbeta_then) = (blank(), blank(), params(), params());
        joined.input_gradient(x_joined, &data.dy, &saved, affine_joined, &all, &mut dx_then).unwrap();
        joined.residual_gradient(x_joined, &data.dy, &saved, affine_joined, &mut dresidual_then).unwrap();
        let sums = if is_global { &all } else { &mine };
        for (c, sums) in sums.iter().enumerate() {
            let (r, d) = saved.corrections().map_or((1.0, 0.0), |(r, d)| (r[c].to_f64(), d[c].to_f64()));
            let dgamma = match option {
                "renormalized" => sums.dy_xhat * r + sums.dy * d,
                _ => sums.dy_xhat,
            };
            let before = if option == "accumulated" { 3.0 } else { 0.0 };
            dgamma_then[c] = E::Param::from_f64(before + dgamma);
            dbeta_then[c] = E::Param::from_f64(before + sums.dy);
        }
        assert_bits("dx", &dx[here.clone()], &dx_then[here.clone()]);
        assert_bits("dresidual", &dresidual[here.clone()], &dresidual_then[here.clone()]);
        assert_bits("dgamma", &dgamma, &dgamma_then);
        assert_bits("dbeta", &dbeta, &dbeta_then);
    }
    // Any subset, and ranks that want different ones.
    let mut dgamma = params();
    let dgamma = shard.samples.start.is_multiple_of(2).then_some(&mut dgamma[..]);
    bn.backward(x, dy, &saved, affine_here, Gradients { dgamma, ..Default::default() }).unwrap();

    let sums = all.iter().flat_map(|sums| [sums.dy.bits(), sums.dy_xhat.bits()]);
    bits_of_saved(&saved).into_iter().chain(sums).collect()
}

/// What a plan is made with, on top of the shape.
fn option<E: Element>(bn: BatchNorm<E>, name: &str) -> BatchNorm<E> {
    match name {
        "accumulated" => bn.with_accumulation(true),
        "from output" => bn.with_backward_from_output(true),
        _ => bn,
    }
}

/// Every option, element type and layout.
pub fn all(world: &SimpleCommunicator) -> Vec<u64> {
    fn of<E: Bits>(world: &SimpleCommunicator) -> Vec<u64>
    where
        E::Param: Bits,
    {
        let mut shared = Vec::new();
        for shape in [Shape::nc(20, 19), Shape::nchw(11, 3, 3, 5), Shape::ndhwc(9, 2, 3, 2, 4)].map(Result::unwrap) {
            let data = Joined::<E>::new(&shape);
            for cut in [Cut::Ascending, Cut::Gaps] {
                let shard = Shard::new(world, &shape, cut);
                for name in ["plain", "accumulated", "renormalized", "from output"] {
                    let new = |shape| option(BatchNorm::<E>::new(shape).unwrap(), name);
                    let (joined, here) = (new(shape), new(shard.shape));
                    let mut bn = SyncBatchNorm::new(here, world).unwrap();
                    for after in [
                        (false, Activation::None),
                        (true, Activation::Relu),
                        (true, Activation::None),
                        (false, Activation::LeakyRelu(0.25)),
                    ] {
                        // What can be undone.
                        if name == "from output" && after.0 {
                            continue;
                        }
                        shared.extend(step(&mut bn, &joined, &shard, &data, after, name));
                    }
                }
            }
        }
        shared
    }
    let all = [of::<f32>(world), of::<f64>(world)].concat();
    #[cfg(feature = "half")]
    let all = [all, of::<half::bf16>(world), of::<half::f16>(world)].concat();
    assert_same(world, "saved or sums", &all);
    all
}

/// Lengths of samples that differ, some of them zero, so that a shard of several samples may hold no value.
pub fn masks(world: &SimpleCommunicator) -> Vec<u64> {
    let mut shared = Vec::new();
    for shape in [Shape::ncl(9, 3, 6), Shape::nlc(9, 6, 3)].map(Result::unwrap) {
        let data = Joined::<f32>::new(&shape);
        let lengths: Vec<usize> = (0..9).map(|n| if n < 2 { 0 } else { n * 5 % 7 }).collect();
        let joined = BatchNorm::<f32>::new(shape).unwrap().with_lengths(&lengths).unwrap();
        for cut in [Cut::Even, Cut::OneEach, Cut::Gaps] {
            let shard = Shard::new(world, &shape, cut);
            let dense = SyncBatchNorm::new(BatchNorm::<f32>::new(shard.shape).unwrap(), world).unwrap();
            let masked = dense.plan().with_lengths(&lengths[shard.samples.clone()]).unwrap();
            let mut bn = dense.with_plan(masked).unwrap();
            let after = (true, Activation::Relu);
            shared.extend(step(&mut bn, &joined, &shard, &data, after, "masked"));
        }
        // The values of each channel that count.
        assert_eq!(shared[0], lengths.iter().sum::<usize>() as u64);
    }
    assert_same(world, "saved or sums", &shared);
    shared
}

/// Statistics held constant: dx needs no sums, those of the parameters are still added.
pub fn frozen(world: &SimpleCommunicator) -> Vec<u64> {
    let shape = Shape::nhwc(8, 3, 3, 5).unwrap();
    let data = Joined::<f32>::new(&shape);
    let shard = Shard::new(world, &shape, Cut::Ascending);
    let (joined, here) = (BatchNorm::<f32>::new(shape).unwrap(), BatchNorm::<f32>::new(shard.shape).unwrap());
    let mut bn = SyncBatchNorm::new(here, world).unwrap();
    let mut saved = joined.saved();
    joined.freeze(Population { mean: &[0.5; 5], var: &[4.0; 5] }, &mut saved).unwrap();
    let affine = Affine::new(&data.gamma, &data.beta);
    let (mut dx, mut dx_then) = (vec![0.0; shard.shape.len()], vec![0.0; shape.len()]);
    let (x, dy) = (&data.x[shard.elements.clone()], &data.dy[shard.elements.clone()]);
    let gradients = Gradients { dx: Some(&mut dx), ..Default::default() };
    bn.backward(x, dy, &saved, affine, gradients).unwrap();
    let gradients = Gradients { dx: Some(&mut dx_then), ..Default::default() };
    joined.backward(&data.x, &data.dy, &saved, affine, gradients).unwrap();
    assert_bits("dx", &dx, &dx_then[shard.elements]);
    bits(&dx)
}
