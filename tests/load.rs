//! One plan under load: from many threads at once, from inside jobs of the caller's, from pools of all sizes, and beside jobs that
//! panic. Every result has the bits of a sequential call.

mod common;

use batchnorm::{Activation, Layer, Momentum, Population, RenormLimits, Saved, Shape, Variance, View};
use batchnorm::{Affine, BatchNorm, Element, Error, Ghost, GradientSums, Gradients, Moments, Parallelism, Running};
use common::{Bits, Data, assert_bits, plan, tiers};

/// What crosses threads may: checked where it is compiled.
#[allow(dead_code, reason = "compiled, not called")]
fn crosses_threads<E: Element>() {
    fn assert<T: Send + Sync>() {}
    assert::<BatchNorm<E>>();
    assert::<Ghost<E>>();
    assert::<Saved<E::Param>>();
    assert::<Running<E::Param>>();
    assert::<Affine<'_, E>>();
    assert::<Gradients<'_, E>>();
    assert::<Population<'_, E::Param>>();
    assert::<Moments>();
    assert::<GradientSums>();
    assert::<RenormLimits>();
    assert::<Shape>();
    assert::<View>();
    assert::<Layer>();
    assert::<Error>();
}

/// A plan with data, and what a sequential call makes of them.
struct Work {
    bn: BatchNorm<f32>,
    x: Vec<f32>,
    dy: Vec<f32>,
    expected: [Vec<f32>; 5],
}

impl Work {
    fn new(shape: Shape, parallelism: Parallelism) -> Self {
        let tier = tiers().pop().unwrap();
        let (x, dy) = (Data::Offset.fill(shape.len(), 1), Data::Normal.fill(shape.len(), 2));
        let alone = plan::<f32>(shape, tier, Parallelism::Sequential);
        let expected = run(&alone, &x, &dy);
        Self { bn: alone.with_parallelism(parallelism), x, dy, expected }
    }

    /// Runs on the plan that all share.
    fn check(&self) {
        for (got, expected) in run(&self.bn, &self.x, &self.dy).iter().zip(&self.expected) {
            assert_bits(&format!("{:?}", self.bn.shape()), got, expected);
        }
    }
}

/// A step forward and back.
fn run(bn: &BatchNorm<f32>, x: &[f32], dy: &[f32]) -> [Vec<f32>; 5] {
    let affine = Affine::none().with_activation(Activation::LeakyRelu(0.1));
    let (mut y, mut dx, mut saved) = (vec![0.0; x.len()], vec![0.0; x.len()], bn.saved());
    let (mut dgamma, mut dbeta) = (vec![0.0; saved.channels()], vec![0.0; saved.channels()]);
    bn.forward_train(x, affine, &mut y, &mut saved).unwrap();
    let gradients =
        Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
    bn.backward(x, dy, &saved, affine, gradients).unwrap();
    [y, dx, dgamma, dbeta, saved.mean().to_vec()]
}

/// Each geometry; the last is large enough for `Parallelism::Auto` to use threads.
fn works() -> Vec<Work> {
    let shapes = [
        (Shape::nchw(3, 5, 9, 9), Parallelism::Threads(3)),
        (Shape::nc(70, 33), Parallelism::Threads(5)),
        (Shape::nhwc(2, 15, 15, 130), Parallelism::Threads(2)),
        (Shape::ncl(1, 1, 20_000), Parallelism::Threads(7)),
        (Shape::nchw(3, 22, 64, 64), Parallelism::Auto),
    ];
    shapes.into_iter().map(|(shape, parallelism)| Work::new(shape.unwrap(), parallelism)).collect()
}

#[test]
fn sixty_four_threads_call_one_plan() {
    let works = works();
    std::thread::scope(|scope| {
        for thread in 0..64 {
            let works = &works;
            scope.spawn(move || (0..works.len()).for_each(|i| works[(thread + i) % works.len()].check()));
        }
    });
}

#[test]
fn running_statistics_are_the_callers_to_share() {
    let work = Work::new(Shape::nc(64, 8).unwrap(), Parallelism::Threads(2));
    let running = std::sync::Mutex::new(work.bn.running(Momentum::Cumulative, Variance::Biased).unwrap());
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                let (mut y, mut saved) = (vec![0.0; work.x.len()], work.bn.saved());
                work.bn.forward_train(&work.x, Affine::none(), &mut y, &mut saved).unwrap();
                running.lock().unwrap().update(&saved).unwrap();
            });
        }
    });
    assert_eq!(running.into_inner().unwrap().batches(), 16);
}

#[cfg(feature = "rayon")]
mod in_pools {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use rayon::prelude::*;

    use super::*;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn calls_from_inside_jobs() {
        let works = works();
        for threads in [1, 2, 3, 16] {
            pool(threads).install(|| {
                works.par_iter().for_each(Work::check);
                rayon::join(|| works[0].check(), || rayon::join(|| works[1].check(), || works[4].check()));
                rayon::scope(|scope| {
                    for work in &works {
                        scope.spawn(|scope| {
                            work.check();
                            scope.spawn(|_| work.check());
                        });
                    }
                });
                // Jobs in jobs, all on one plan.
                (0..8).into_par_iter().for_each(|_| (0..4).into_par_iter().for_each(|_| works[1].check()));
            });
        }
    }

    #[test]
    fn calls_from_pools_beside_each_other() {
        let works = works();
        let pools: Vec<_> = [1, 2, 4, 9].map(pool).into_iter().collect();
        std::thread::scope(|scope| {
            for (i, pool) in pools.iter().enumerate() {
                let works = &works;
                scope.spawn(move || {
                    (0..works.len()).for_each(|k| pool.install(|| works[(i + k) % works.len()].check()))
                });
            }
        });
        // One pool calls into another.
        pools[1].install(|| pools[2].install(|| works[4].check()));
    }

    /// The payload of the panics here, so that no other one is taken for it.
    const EXPECTED: &str = "a panic of the caller's";

    /// Runs what panics as expected, without a word.
    fn panics(body: impl FnOnce()) {
        let payload = catch_unwind(AssertUnwindSafe(body)).expect_err("no panic");
        assert_eq!(payload.downcast_ref::<&str>(), Some(&EXPECTED));
    }

    fn panic_quietly() {
        std::panic::resume_unwind(Box::new(EXPECTED));
    }

    #[test]
    fn panics_beside_calls_and_between_them_leave_nothing_behind() {
        let works = works();
        for threads in [1, 2, 5] {
            let pool = pool(threads);
            pool.install(|| {
                for work in &works {
                    panics(|| {
                        rayon::join(|| work.check(), panic_quietly);
                    });
                    work.check();
                    panics(|| {
                        rayon::scope(|scope| {
                            scope.spawn(|_| work.check());
                            scope.spawn(|_| panic_quietly());
                            scope.spawn(|_| work.check());
                        });
                    });
                    let calls = AtomicUsize::new(0);
                    panics(|| {
                        (0..16).into_par_iter().for_each(|i| {
                            work.check();
                            calls.fetch_add(1, Ordering::Relaxed);
                            // In the midst of the calls of others.
                            if i % 4 == 1 {
                                panic_quietly();
                            }
                        });
                    });
                    assert!(calls.into_inner() > 0);
                    work.check();
                }
            });
            // And outside, where the pool is as before.
            works.iter().for_each(|work| pool.install(|| work.check()));
        }
    }

    /// The caller's thread unwinds through a borrow of the plan.
    #[test]
    fn a_thread_that_panics_beside_a_call() {
        let work = Work::new(Shape::nchw(3, 22, 64, 64).unwrap(), Parallelism::Threads(4));
        for _ in 0..8 {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    panics(|| {
                        work.check();
                        panic_quietly();
                    })
                });
                scope.spawn(|| work.check());
            });
        }
        work.check();
    }
}

/// Every element type, all threads on one plan and on plans of one shape.
#[test]
fn all_element_types_at_once() {
    fn check<E: Bits>(seed: u64) {
        let shape = Shape::nhwc(2, 20, 20, 40).unwrap();
        let x = Data::Normal.fill::<E>(shape.len(), seed);
        let forward = |bn: &BatchNorm<E>| {
            let (mut y, mut saved) = (x.clone(), bn.saved());
            bn.forward_train(&x, Affine::none(), &mut y, &mut saved).unwrap();
            y
        };
        let alone = BatchNorm::<E>::new(shape).unwrap().with_parallelism(Parallelism::Sequential);
        let (expected, bn) = (forward(&alone), alone.with_parallelism(Parallelism::Threads(3)));
        (0..4).for_each(|_| assert_bits("y", &forward(&bn), &expected));
    }
    std::thread::scope(|scope| {
        for seed in 0..8 {
            scope.spawn(move || check::<f32>(seed));
            scope.spawn(move || check::<f64>(seed));
            #[cfg(feature = "half")]
            scope.spawn(move || check::<half::bf16>(seed));
            #[cfg(feature = "half")]
            scope.spawn(move || check::<half::f16>(seed));
        }
    });
}
