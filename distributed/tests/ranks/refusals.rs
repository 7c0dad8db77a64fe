//! Errors: the same call fails on all ranks, none waits, nothing is written, and the next call works.

use batchnorm::{Activation, Affine, BatchNorm, Element, Error as Core, Gradients, Moments, Saved, Shape};
use batchnorm_mpi::{Error, SyncBatchNorm};
use mpi::topology::SimpleCommunicator;
use mpi::traits::*;

use crate::common::{Data, length};

fn core(channels: usize, eps: f64) -> BatchNorm<f32> {
    BatchNorm::new(Shape::nc(3, channels).unwrap()).unwrap().with_eps(eps).unwrap()
}

/// Plans of which that of the last rank is another one; with one rank there is nothing to disagree about.
pub fn disagreement(world: &SimpleCommunicator) -> Vec<u64> {
    let (alone, last) = (world.size() == 1, world.rank() == world.size() - 1);
    fn made<E: Element>(bn: BatchNorm<E>, world: &SimpleCommunicator) -> Result<(), Error> {
        SyncBatchNorm::new(bn, world).map(drop)
    }
    let expect = |error| if alone { Ok(()) } else { Err(error) };
    let channels = made(core(if last { 2 } else { 5 }, 1e-5), world);
    assert_eq!(channels, expect(Error::Channels { least: 2, most: 5 }));
    let eps = made(core(5, if last { 1e-5 } else { 1e-3 }), world);
    assert_eq!(eps, expect(Error::Eps { least: 1e-5, most: 1e-3 }));
    let wide = BatchNorm::<f64>::new(Shape::nc(3, 5).unwrap()).unwrap();
    let types = if last { made(wide, world) } else { made(core(5, 1e-5), world) };
    assert_eq!(types, expect(Error::ElementType { one: "f32", other: "f64" }));
    #[cfg(feature = "half")]
    {
        let [shape, other] = [Shape::nc(3, 5), Shape::nhwc(1, 2, 2, 5)].map(Result::unwrap);
        let types = match last {
            true => made(BatchNorm::<half::bf16>::new(shape).unwrap(), world),
            false => made(BatchNorm::<half::f16>::new(other).unwrap(), world),
        };
        assert_eq!(types, expect(Error::ElementType { one: "bf16", other: "f16" }));
    }
    let said = expect(Error::Eps { least: 1e-5, most: 1e-3 }).map_err(|e| e.to_string());
    assert!(said.is_ok() || said.is_err_and(|said| said.contains("0.00001") && said.contains("0.001")));

    // Zeros of both signs, and everything that may differ.
    made(core(5, if last { -0.0 } else { 0.0 }), world).unwrap();
    let rank = world.rank() as usize;
    let shape = if last { Shape::nc(rank, 5) } else { Shape::nchw(rank, 5, 2, 3) };
    made(BatchNorm::<f32>::new(shape.unwrap()).unwrap(), world).unwrap();

    let many = BatchNorm::<f32>::new(Shape::nc(0, i32::MAX as usize).unwrap()).unwrap();
    assert_eq!(made(many, world), Err(Error::TooManyChannels { channels: i32::MAX as usize }));
    vec![]
}

/// All that the passes read and write.
#[derive(Debug, Clone)]
struct Args {
    x: Vec<f32>,
    dy: Vec<f32>,
    gamma: Vec<f32>,
    beta: Vec<f32>,
    residual: Vec<f32>,
    activation: Activation,
    y: Vec<f32>,
    saved: Saved<f32>,
    dx: Vec<f32>,
    dgamma: Vec<f32>,
    dbeta: Vec<f32>,
    dresidual: Vec<f32>,
    moments: Vec<Moments>,
}

impl Args {
    fn new(shape: &Shape) -> Self {
        let (len, c) = (shape.len(), shape.channels());
        let tensor = |seed| Data::Normal.fill(len, seed);
        Self {
            x: tensor(1),
            dy: tensor(2),
            gamma: vec![2.0; c],
            beta: vec![3.0; c],
            residual: tensor(3),
            activation: Activation::Relu,
            y: vec![7.0; len],
            saved: Saved::from_parts(4, vec![0.5; c], vec![0.5; c], 1e-5).unwrap(),
            dx: vec![8.0; len],
            dgamma: vec![9.0; c],
            dbeta: vec![10.0; c],
            dresidual: vec![11.0; len],
            moments: vec![Moments { count: 1, ..Moments::default() }; c],
        }
    }

    fn forward(&mut self, bn: &mut SyncBatchNorm<f32>, during: bool) -> Result<(), Error> {
        let affine =
            Affine::new(&self.gamma, &self.beta).with_residual(&self.residual).with_activation(self.activation);
        let mut worked = false;
        let done = match during {
            false => bn.forward_train(&self.x, affine, &mut self.y, &mut self.saved),
            true => bn.forward_train_during(&self.x, affine, &mut self.y, &mut self.saved, |_| worked = true),
        };
        assert_eq!(worked, during, "work is done whatever comes");
        done
    }

    fn backward(&mut self, bn: &mut SyncBatchNorm<f32>, during: bool) -> Result<(), Error> {
        let affine =
            Affine::new(&self.gamma, &self.beta).with_residual(&self.residual).with_activation(self.activation);
        let gradients = Gradients {
            dx: Some(&mut self.dx),
            dgamma: Some(&mut self.dgamma),
            dbeta: Some(&mut self.dbeta),
            dresidual: Some(&mut self.dresidual),
        };
        let mut worked = false;
        let done = match during {
            false => bn.backward(&self.x, &self.dy, &self.saved, affine, gradients),
            true => bn.backward_during(&self.x, &self.dy, &self.saved, affine, gradients, |_| worked = true),
        };
        assert_eq!(worked, during, "work is done whatever comes");
        done
    }

    fn moments(&mut self, bn: &mut SyncBatchNorm<f32>, _during: bool) -> Result<(), Error> {
        bn.merge_moments(&mut self.moments)
    }
}

/// A call, what is wrong with its arguments, and what that gives.
type Wrong = (fn(&mut Args, &mut SyncBatchNorm<f32>, bool) -> Result<(), Error>, fn(&mut Args), Core);

/// Shards of three samples of two channels.
fn wrong() -> Vec<Wrong> {
    let slope = || Core::Slope { got: -1.0 };
    let (forward, backward, moments) = (
        (|a, bn, during| a.forward(bn, during)) as fn(&mut Args, &mut _, _) -> _,
        (|a, bn, during| a.backward(bn, during)) as fn(&mut Args, &mut _, _) -> _,
        (|a, bn, during| a.moments(bn, during)) as fn(&mut Args, &mut _, _) -> _,
    );
    vec![
        (forward, |a| a.x.truncate(5), length("x", 6, 5)),
        (forward, |a| a.y.push(0.0), length("y", 6, 7)),
        (forward, |a| a.gamma.truncate(1), length("gamma", 2, 1)),
        (forward, |a| a.beta.truncate(1), length("beta", 2, 1)),
        (forward, |a| a.residual.truncate(1), length("residual", 6, 1)),
        (forward, |a| a.activation = Activation::LeakyRelu(-1.0), slope()),
        (forward, |a| a.saved = Saved::new(3), length("saved", 2, 3)),
        (backward, |a| a.x.truncate(5), length("x", 6, 5)),
        (backward, |a| a.dy.truncate(5), length("dy", 6, 5)),
        (backward, |a| a.dx.truncate(5), length("dx", 6, 5)),
        (backward, |a| a.dresidual.truncate(5), length("dresidual", 6, 5)),
        (backward, |a| a.dgamma.truncate(1), length("dgamma", 2, 1)),
        (backward, |a| a.dbeta.push(1.0), length("dbeta", 2, 3)),
        (backward, |a| a.gamma.truncate(1), length("gamma", 2, 1)),
        (backward, |a| a.activation = Activation::LeakyRelu(-1.0), slope()),
        (backward, |a| a.saved = Saved::new(3), length("saved", 2, 3)),
        (backward, |a| a.saved = Saved::new(2), Core::MissingStatistics),
        (moments, |a| a.moments.truncate(1), length("moments", 2, 1)),
    ]
}

/// Wrong on the first rank, on the last, and on all from the second on.
pub fn arguments(world: &SimpleCommunicator) -> Vec<u64> {
    let shape = Shape::nc(3, 2).unwrap();
    let plan = BatchNorm::<f32>::new(shape).unwrap();
    let mut bn = SyncBatchNorm::new(plan.clone(), world).unwrap();
    let (me, ranks) = (world.rank(), world.size());
    for (call, change, expected) in wrong() {
        for during in [false, true] {
            for wrong in [0..1, ranks - 1..ranks, 1.min(ranks - 1)..ranks] {
                let mut args = Args::new(&shape);
                if wrong.contains(&me) {
                    change(&mut args);
                }
                let before = format!("{args:?}");
                let got = call(&mut args, &mut bn, during).unwrap_err();
                let expected = match wrong.contains(&me) {
                    true => Error::Local(expected.clone()),
                    false => Error::Remote { rank: wrong.start },
                };
                assert_eq!(got, expected);
                assert_eq!(format!("{args:?}"), before, "written despite {got}");
                call(&mut Args::new(&shape), &mut bn, during).unwrap();
            }
        }
    }
    assert!(Error::Remote { rank: 3 }.to_string().contains("rank 3"));

    // The input of the whole cannot be rebuilt on one rank: its gamma is too close to zero.
    let mut bn = SyncBatchNorm::new(plan.with_backward_from_output(true), world).unwrap();
    let mut args = Args::new(&shape);
    if me == 0 {
        args.gamma[1] = 1e-9;
    }
    let before = args.clone();
    let affine = Affine::new(&args.gamma, &args.beta);
    let gradients = Gradients { dx: Some(&mut args.dx), ..Default::default() };
    let got = bn.backward(&args.x, &args.dy, &args.saved, affine, gradients).unwrap_err();
    match me {
        0 => assert!(matches!(got, Error::Local(Core::Gamma { channel: 1, .. }))),
        _ => assert_eq!(got, Error::Remote { rank: 0 }),
    }
    assert_eq!(args.dx, before.dx);
    vec![]
}

/// All shards empty.
pub fn no_values(world: &SimpleCommunicator) -> Vec<u64> {
    let shape = Shape::nchw(0, 2, 3, 4).unwrap();
    let mut bn = SyncBatchNorm::new(BatchNorm::<f32>::new(shape).unwrap(), world).unwrap();
    let empty = Error::Local(Core::EmptyBatch { batch: 0, spatial: 12 });
    let mut saved = Saved::from_parts(5, vec![1.0; 2], vec![2.0; 2], 1e-5).unwrap();
    let before = saved.clone();
    assert_eq!(bn.forward_train(&[], Affine::none(), &mut [], &mut saved), Err(empty.clone()));
    assert_eq!(bn.forward_train_during(&[], Affine::none(), &mut [], &mut saved, |_| 3), Err(empty));
    assert_eq!(saved, before);

    // One value on the last rank is a batch.
    let last = world.rank() == world.size() - 1;
    let mut bn = bn.with_shape(Shape::nc(usize::from(last), 2).unwrap()).unwrap();
    let x = if last { vec![3.0, 4.0] } else { vec![] };
    let mut y = x.clone();
    bn.forward_train(&x, Affine::none(), &mut y, &mut saved).unwrap();
    assert_eq!((saved.count(), saved.mean(), saved.var()), (1, &[3.0, 4.0][..], &[0.0; 2][..]));
    assert_eq!(y, vec![0.0; x.len()]);
    vec![]
}

/// Plans for the same group.
pub fn plans(world: &SimpleCommunicator) -> Vec<u64> {
    let bn = SyncBatchNorm::new(core(5, 1e-3), world).unwrap().with_global_parameters(true);
    let other = |channels, eps| Error::Plan { expected_channels: 5, expected_eps: 1e-3, channels, eps };
    assert_eq!(bn.with_shape(Shape::nc(3, 4).unwrap()).unwrap_err(), other(4, 1e-3));
    assert_eq!(bn.with_plan(core(5, 1e-5)).unwrap_err(), other(5, 1e-5));
    let rank = world.rank() as usize;
    let mut next = bn.with_shape(Shape::nc(rank, 5).unwrap()).unwrap();
    // The group outlives the first plan.
    drop(bn);
    let (x, mut saved) = (vec![1.0; rank * 5], next.plan().saved());
    let result = next.forward_train(&x, Affine::none(), &mut x.clone(), &mut saved);
    if world.size() > 1 {
        result.unwrap();
        assert_eq!(saved.count(), (0..world.size() as u64).sum::<u64>());
        let mut dbeta = vec![0.0; 5];
        let gradients = Gradients { dbeta: Some(&mut dbeta), ..Default::default() };
        next.backward(&x, &x, &saved, Affine::none(), gradients).unwrap();
        assert_eq!(dbeta, vec![saved.count() as f32; 5], "options are kept");
    }
    vec![]
}

/// The last rank dies while the others wait for it.
pub fn die(world: &SimpleCommunicator, die: fn() -> !) -> ! {
    let mut bn = SyncBatchNorm::new(core(5, 1e-5), world).unwrap();
    if world.rank() == world.size() - 1 {
        std::thread::sleep(std::time::Duration::from_millis(300));
        die();
    }
    let (x, mut saved) = (vec![1.0; 15], bn.plan().saved());
    let result = bn.forward_train(&x, Affine::none(), &mut x.clone(), &mut saved);
    unreachable!("met a rank that died: {result:?}")
}
