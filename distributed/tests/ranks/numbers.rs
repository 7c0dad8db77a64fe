//! Statistics and gradients: against exact arithmetic on the joined batch, the same on all ranks, merged in the order of ranks.

use batchnorm::{Affine, BatchNorm, Element, GradientSums, Gradients, Moments, Momentum, Parallelism, Shape, Variance};
use batchnorm_mpi::SyncBatchNorm;
use mpi::topology::{Color, SimpleCommunicator};
use mpi::traits::*;

use crate::common::{Bits, Data, assert_bits};
use crate::counting;
use crate::exact::{Problem, Quantity, Results, Set, Statistics, USUAL, sets};
use crate::support::{Cut, Shard, assemble, assert_same, bits, bits_of_saved, catch, wide};

/// One plan on all ranks, for shards of a batch of that shape.
fn plan<E: Element>(comm: &SimpleCommunicator, shape: Shape, eps: f64) -> SyncBatchNorm<E> {
    SyncBatchNorm::new(BatchNorm::new(shape).unwrap().with_eps(eps).unwrap(), comm).unwrap()
}

/// Passes over one's own shard, put together with those of the other ranks; and the bits of what all ranks must share.
fn run<E: Bits>(comm: &SimpleCommunicator, problem: &Problem<E>, cut: Cut, during: bool) -> (Results, Vec<u64>)
where
    E::Param: Bits,
{
    let Shard { shape, elements, .. } = Shard::new(comm, &problem.shape, cut);
    let (channels, len) = (shape.channels(), problem.shape.len());
    let mut bn = plan::<E>(comm, shape, problem.eps).with_global_parameters(true);
    let x = &problem.x[elements.clone()];
    let (mut y, mut saved) = (x.to_vec(), bn.plan().saved());
    let mut moments = vec![Moments::default(); channels];
    bn.plan().moments(x, &mut moments).unwrap();
    bn.merge_moments(&mut moments).unwrap();
    match during {
        false => bn.forward_train(x, Affine::none(), &mut y, &mut saved).unwrap(),
        true => bn.forward_train_during(x, Affine::none(), &mut y, &mut saved, |_| ()).unwrap(),
    }
    let params = || vec![E::Param::default(); channels];
    let (mut dx, mut dgamma, mut dbeta) = (problem.dy.clone(), params(), params());
    // The parameters' gradients of the first are what stays.
    for (dy, dx) in problem.dy.iter().zip(&mut dx).rev() {
        let (dy, dx) = (&dy[elements.clone()], &mut dx[elements.clone()]);
        let (dgamma, dbeta) = (Some(&mut dgamma[..]), Some(&mut dbeta[..]));
        let gradients = Gradients { dx: Some(dx), dgamma, dbeta, ..Default::default() };
        match during {
            false => bn.backward(x, dy, &saved, Affine::none(), gradients).unwrap(),
            true => bn.backward_during(x, dy, &saved, Affine::none(), gradients, |_| ()).unwrap(),
        }
    }
    let shared = [bits_of_saved(&saved), bits(&dgamma), bits(&dbeta)].concat();
    let of = |f: fn(&Moments) -> f64| moments.iter().map(f).collect();
    let results = Results {
        statistics: vec![
            Statistics::of::<f64>(of(|m| m.mean), of(|m| m.residue), of(Moments::variance)),
            Statistics::of::<E::Param>(wide(saved.mean()), wide(saved.residue()), wide(saved.var())),
        ],
        y: assemble(comm, len, &elements, &y),
        dx: dx.map(|dx| assemble(comm, len, &elements, &dx[elements.clone()])),
        dgamma: wide(&dgamma),
        dbeta: wide(&dbeta),
    };
    (results, shared)
}

/// Within the bounds of the core, with the same statistics on all ranks.
fn check<E: Bits>(comm: &SimpleCommunicator, shape: Shape, set: &Set, cut: Cut, during: bool) -> Vec<u64>
where
    E::Param: Bits,
{
    let problem = Problem::<E>::new(shape, set);
    let (results, shared) = run(comm, &problem, cut, during);
    assert_same(comm, "saved, dgamma or dbeta", &shared);
    if comm.rank() == 0 {
        let errors = problem.errors(&results);
        for quantity in Quantity::ALL {
            let (error, most, name) = (errors.get(quantity), set.allowed::<E>(quantity), quantity.name());
            assert!(error <= most, "{shape:?} {set:?} {cut:?}: {name}: {error:.1e} > {most:.1e}");
        }
    }
    let all = results.y.iter().chain(results.dx.iter().flatten()).map(|v| v.to_bits());
    all.chain(shared).collect()
}

/// Every layout and element type, at every distance of the mean from zero, with levels that differ between ranks.
pub fn shards(world: &SimpleCommunicator, cut: Cut) -> Vec<u64> {
    fn of<E: Bits>(world: &SimpleCommunicator, cut: Cut) -> Vec<u64>
    where
        E::Param: Bits,
    {
        let shapes = match cut {
            // One value for each channel of a shard.
            Cut::OneEach => vec![Shape::nc(90, 7), Shape::nchw(40, 3, 1, 1)],
            _ => vec![Shape::nc(60, 130), Shape::nchw(32, 3, 7, 7), Shape::nhwc(16, 7, 7, 5)],
        };
        let sets: Vec<_> = sets::<E>().into_iter().filter(|set| USUAL.contains(&set.family)).collect();
        let mut all = Vec::new();
        for (i, shape) in shapes.into_iter().map(Result::unwrap).enumerate() {
            // One form for this set and the other for the next.
            let forms = sets.iter().enumerate().map(|(j, set)| check::<E>(world, shape, set, cut, (i + j) % 2 == 0));
            all.extend(forms.flatten());
        }
        all
    }
    let all = [of::<f32>(world, cut), of::<f64>(world, cut)];
    #[cfg(feature = "half")]
    let all = match cut {
        // What is merged is no different for them.
        Cut::Ascending => [all.concat(), of::<half::bf16>(world, cut), of::<half::f16>(world, cut)].to_vec(),
        _ => all.to_vec(),
    };
    all.concat()
}

/// Everything that the values of ranks `0..n`, in this order, can be merged to: all ways to set parentheses.
fn merged_in_order<T: Copy + PartialEq>(of_ranks: &[T], merge: fn(T, T) -> T) -> Vec<T> {
    let n = of_ranks.len();
    // By first rank and length.
    let mut ways: Vec<Vec<Vec<T>>> = of_ranks.iter().map(|&value| vec![vec![value]]).collect();
    for length in 2..=n {
        for first in 0..=n - length {
            let mut found: Vec<T> = Vec::new();
            for left in 1..length {
                for &a in &ways[first][left - 1] {
                    for &b in &ways[first + left][length - left - 1] {
                        let value = merge(a, b);
                        if !found.contains(&value) {
                            found.push(value);
                        }
                    }
                }
            }
            ways[first].push(found);
        }
    }
    ways[0][n - 1].clone()
}

/// Short and long messages, which MPI may merge in different ways.
pub fn rank_order(world: &SimpleCommunicator) -> Vec<u64> {
    let mut all = Vec::new();
    for channels in [1, 3, 300, 20_000] {
        let data = |rank: usize, seed: u64| -> Vec<f64> {
            // The scale tells the ranks apart.
            let scale = 10f64.powi(rank as i32 % 3);
            let values = Data::Normal.fill::<f64>((rank % 3 + 1) * channels, seed + rank as u64);
            values.iter().map(|v| v * scale + rank as f64).collect()
        };
        let ranks = world.size() as usize;
        let (x_of, dy_of) = (|rank| data(rank, 1), |rank| data(rank, 100));
        let me = world.rank() as usize;
        let (x, dy) = (x_of(me), dy_of(me));
        let shape = |rank: usize| Shape::nc(rank % 3 + 1, channels).unwrap();
        let mut bn = plan::<f64>(world, shape(me), 1e-5).with_global_parameters(true);
        for during in [false, true] {
            let (mut y, mut saved) = (x.clone(), bn.plan().saved());
            let (mut dgamma, mut dbeta) = (vec![0.0; channels], vec![0.0; channels]);
            let gradients = Gradients { dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
            if during {
                bn.forward_train_during(&x, Affine::none(), &mut y, &mut saved, |_| ()).unwrap();
                bn.backward_during(&x, &dy, &saved, Affine::none(), gradients, |_| ()).unwrap();
            } else {
                bn.forward_train(&x, Affine::none(), &mut y, &mut saved).unwrap();
                bn.backward(&x, &dy, &saved, Affine::none(), gradients).unwrap();
            }
            all.extend([bits_of_saved(&saved), bits(&dgamma), bits(&dbeta)].concat());
            // What each rank has found by itself.
            let of_ranks: Vec<_> = (0..ranks)
                .map(|rank| {
                    let local = BatchNorm::<f64>::new(shape(rank)).unwrap();
                    let mut moments = vec![Moments::default(); channels];
                    let mut sums = vec![GradientSums::default(); channels];
                    local.moments(&x_of(rank), &mut moments).unwrap();
                    local.gradient_sums(&x_of(rank), &dy_of(rank), &saved, Affine::none(), &mut sums).unwrap();
                    (moments, sums)
                })
                .collect();
            // In another order the bits are others, or this shows nothing.
            let mut telling = 0;
            for c in (0..channels).step_by(channels / 50 + 1).chain([channels - 1]) {
                let moments: Vec<_> = of_ranks.iter().map(|(moments, _)| moments[c]).collect();
                let sums: Vec<_> = of_ranks.iter().map(|(_, sums)| sums[c]).collect();
                let is_saved = |m: &Moments| {
                    (saved.mean()[c], saved.residue()[c], saved.var()[c]) == (m.mean, m.residue, m.variance())
                };
                let is_sum = |s: &GradientSums| (dbeta[c], dgamma[c]) == (s.dy, s.dy_xhat);
                assert!(merged_in_order(&moments, Moments::merge).iter().any(is_saved), "moments of channel {c}");
                assert!(merged_in_order(&sums, GradientSums::merge).iter().any(is_sum), "sums of channel {c}");
                let backwards: Vec<_> = moments.iter().rev().copied().collect();
                telling += usize::from(!merged_in_order(&backwards, Moments::merge).iter().any(is_saved));
            }
            assert!(ranks == 1 || channels < 300 || telling > 0, "no channel tells the order");
        }
        assert_same(world, "a merged value", &all);
    }
    all
}

/// A group of one: no rounding is added.
pub fn alone(_world: &SimpleCommunicator) -> Vec<u64> {
    let myself = SimpleCommunicator::self_comm();
    let shape = Shape::nchw(5, 3, 7, 9).unwrap();
    let (x, dy) = (Data::Offset.fill::<f32>(shape.len(), 1), Data::Normal.fill::<f32>(shape.len(), 2));
    let gamma = Data::Normal.fill::<f32>(3, 3);
    let affine = Affine::scale(&gamma);
    let mut bn = plan::<f32>(&myself, shape, 1e-5);
    let core = bn.plan().clone();
    let blank = || vec![0f32; shape.len()];
    let (mut y, mut saved, mut y_then, mut saved_then) = (blank(), core.saved(), blank(), core.saved());
    core.forward_train(&x, affine, &mut y_then, &mut saved_then).unwrap();
    bn.forward_train(&x, affine, &mut y, &mut saved).unwrap();
    assert_bits("y", &y, &y_then);
    assert_eq!(saved, saved_then);
    let (mut dx, mut dgamma, mut dbeta) = (blank(), vec![0f32; 3], vec![0f32; 3]);
    let (mut dx_then, mut dgamma_then, mut dbeta_then) = (blank(), vec![0f32; 3], vec![0f32; 3]);
    fn all<'a>(dx: &'a mut [f32], dgamma: &'a mut [f32], dbeta: &'a mut [f32]) -> Gradients<'a, f32> {
        Gradients { dx: Some(dx), dgamma: Some(dgamma), dbeta: Some(dbeta), ..Default::default() }
    }
    core.backward(&x, &dy, &saved, affine, all(&mut dx_then, &mut dgamma_then, &mut dbeta_then)).unwrap();
    bn.backward(&x, &dy, &saved, affine, all(&mut dx, &mut dgamma, &mut dbeta)).unwrap();
    assert_bits("dx", &dx, &dx_then);
    assert_bits("dgamma", &dgamma, &dgamma_then);
    assert_bits("dbeta", &dbeta, &dbeta_then);
    bits(&dx)
}

/// Even and odd ranks by themselves, at the same time as all of them.
pub fn groups(world: &SimpleCommunicator) -> Vec<u64> {
    let color = Color::with_value(world.rank() % 2);
    let half = world.split_by_color(color).unwrap();
    let set = sets::<f32>()[0];
    let mut all = check::<f32>(&half, Shape::nchw(32, 3, 7, 7).unwrap(), &set, Cut::Even, false);
    all.extend(check::<f32>(&half, Shape::nc(20 + world.rank() as usize % 2, 9).unwrap(), &set, Cut::Ascending, true));

    // One value on each rank, its number: the mean tells the group.
    let mut of_half = plan::<f64>(&half, Shape::nc(1, 1).unwrap(), 0.0);
    let mut of_all = plan::<f64>(world, Shape::nc(1, 1).unwrap(), 0.0);
    assert_eq!((of_half.ranks(), of_half.rank()), (half.size(), half.rank()));
    assert_eq!((of_all.ranks(), of_all.rank()), (world.size(), world.rank()));
    let x = [f64::from(world.rank())];
    let (mut y, mut saved_half, mut saved_all) = ([0.0], of_half.plan().saved(), of_all.plan().saved());
    // The odd ranks are with their group while the even ones are with all, and the other way round.
    of_all
        .forward_train_during(&x, Affine::none(), &mut y, &mut saved_all, |_| {
            of_half.forward_train(&x, Affine::none(), &mut [0.0], &mut saved_half).unwrap();
        })
        .unwrap();
    assert_eq!(saved_all.count(), world.size() as u64);
    assert_eq!(saved_all.mean()[0] + saved_all.residue()[0], f64::from(world.size() - 1) / 2.0);
    let mean = f64::from(world.rank() % 2) + f64::from(half.size() - 1);
    assert_eq!(saved_half.count(), half.size() as u64);
    assert!((saved_half.mean()[0] + saved_half.residue()[0] - mean).abs() < 1e-15);

    // What the caller has under way on the same communicator may come in another order.
    if world.rank() == 0 {
        of_all.forward_train_during(&x, Affine::none(), &mut y, &mut saved_all, |_| ()).unwrap();
        world.immediate_barrier().wait();
    } else {
        let barrier = world.immediate_barrier();
        of_all.forward_train_during(&x, Affine::none(), &mut y, &mut saved_all, |_| ()).unwrap();
        barrier.wait();
    }
    all
}

/// Of the whole batch, with its count; and recomputed from all moments.
pub fn running(world: &SimpleCommunicator) -> Vec<u64> {
    let joined = Shape::nlc(13, 5, 4).unwrap();
    let x = Data::Normal.fill::<f32>(joined.len(), 5);
    let Shard { shape, elements, .. } = Shard::new(world, &joined, Cut::Ascending);
    let mut bn = plan::<f32>(world, shape, 1e-5);
    let core = BatchNorm::<f32>::new(joined).unwrap();
    let x_here = &x[elements];
    let (mut saved, mut saved_then) = (bn.plan().saved(), core.saved());
    core.forward_train(&x, Affine::none(), &mut x.clone(), &mut saved_then).unwrap();
    let close = |what: &str, got: &[f32], then: &[f32]| {
        for (got, then) in got.iter().zip(then) {
            // Four ulps of values about 1.
            assert!((got - then).abs() <= 4.0 * f32::EPSILON * then.abs().max(1.0), "{what}: {got}, expected {then}");
        }
    };
    let mut all = Vec::new();
    for variance in [Variance::Biased, Variance::Unbiased] {
        let new = || core.running(Momentum::WeightOfNew(1.0), variance).unwrap();
        let (mut running, mut then) = (new(), new());
        bn.forward_train(x_here, Affine::none(), &mut x_here.to_vec(), &mut saved).unwrap();
        running.update(&saved).unwrap();
        then.update(&saved_then).unwrap();
        close("mean", running.mean(), then.mean());
        close("variance", running.var(), then.var());
        let mut moments = vec![Moments::default(); 4];
        bn.plan().moments(x_here, &mut moments).unwrap();
        bn.merge_moments(&mut moments).unwrap();
        running.recompute(&moments).unwrap();
        close("recomputed variance", running.var(), then.var());
        all.extend([bits(running.mean()), bits(running.var())].concat());
    }
    assert_same(world, "running statistics", &all);
    all
}

/// Work while a collective is under way: it is done, it may poll, meet others, and panic.
pub fn meanwhile(world: &SimpleCommunicator) -> Vec<u64> {
    let joined = Shape::nc(40, 30).unwrap();
    let (x, dy) = (Data::Normal.fill::<f32>(joined.len(), 5), Data::Normal.fill::<f32>(joined.len(), 6));
    let Shard { shape, elements, .. } = Shard::new(world, &joined, Cut::Ascending);
    let (x, dy) = (&x[elements.clone()], &dy[elements]);
    let mut bn = plan::<f32>(world, shape, 1e-5);
    let mut other = plan::<f32>(world, shape, 1e-5);
    let (mut y, mut saved) = (x.to_vec(), bn.plan().saved());
    let (mut y_then, mut saved_then) = (x.to_vec(), bn.plan().saved());
    let done = bn
        .forward_train_during(x, Affine::none(), &mut y_then, &mut saved_then, |pending| {
            while !pending.poll() {
                std::thread::yield_now();
            }
            assert!(pending.poll(), "complete is complete");
            "done"
        })
        .unwrap();
    assert_eq!(done, "done");
    // Never polled, polled once, and beside the collectives of another plan.
    bn.forward_train_during(x, Affine::none(), &mut y, &mut saved, |_| ()).unwrap();
    assert_bits("y", &y, &y_then);
    let mut dx = x.to_vec();
    let gradients = Gradients { dx: Some(&mut dx), ..Default::default() };
    bn.backward_during(x, dy, &saved, Affine::none(), gradients, |pending| {
        pending.poll();
        let (mut y, mut saved) = (x.to_vec(), other.plan().saved());
        other.forward_train_during(x, Affine::none(), &mut y, &mut saved, |_| ()).unwrap();
        assert_eq!(saved, saved_then);
    })
    .unwrap();

    // A panic on one rank leaves neither the others nor the plan behind.
    let before = y.clone();
    if world.rank() == world.size() - 1 {
        catch(|| {
            bn.forward_train_during(x, Affine::none(), &mut y, &mut saved, |_| panic!("expected by this case"))
                .unwrap();
        });
        assert_bits("y", &y, &before);
    } else {
        bn.forward_train_during(x, Affine::none(), &mut y, &mut saved, |_| ()).unwrap();
    }
    bn.forward_train_during(x, Affine::none(), &mut y, &mut saved, |_| ()).unwrap();
    assert_bits("y after a panic", &y, &y_then);
    assert_eq!(saved, saved_then);
    assert_same(world, "saved", &bits_of_saved(&saved));
    bits(&dx)
}

/// Calls after the first allocate nothing, on this side of MPI.
pub fn allocations(world: &SimpleCommunicator) -> Vec<u64> {
    let shape = Shape::nc(7, 40).unwrap();
    let core = BatchNorm::<f32>::new(shape).unwrap().with_parallelism(Parallelism::Sequential);
    let mut bn = SyncBatchNorm::new(core, world).unwrap();
    let x = Data::Normal.fill::<f32>(shape.len(), 1);
    let (mut y, mut dx, mut saved) = (x.clone(), x.clone(), bn.plan().saved());
    let mut step = || {
        bn.forward_train(&x, Affine::none(), &mut y, &mut saved).unwrap();
        bn.forward_train_during(&x, Affine::none(), &mut y, &mut saved, |pending| pending.poll()).unwrap();
        let gradients = Gradients { dx: Some(&mut dx), ..Default::default() };
        bn.backward(&x, &y, &saved, Affine::none(), gradients).unwrap();
        bn.backward_during(&x, &y, &saved, Affine::none(), Gradients::default(), |_| ()).unwrap();
    };
    step();
    assert_eq!(counting::allocations(step), 0);
    vec![]
}
