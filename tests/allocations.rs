//! Calls allocate nothing once a plan has its scratch: with `reserve` not even the first one does.

mod counting;

use batchnorm::{
    Affine, BatchNorm, Element, GradientSums, Gradients, Moments, Parallelism, Population, Real, Shape, Tier,
};
use counting::allocations;

fn check<E: Element>(shape: Shape, tier: Tier, parallelism: Parallelism) {
    let c = shape.channels();
    let mut x: Vec<E> = (0..shape.len()).map(|i| E::from_param(E::Param::from_f64((i % 13) as f64))).collect();
    let dy = x.clone();
    let (mut y, mut dx) = (x.clone(), x.clone());
    let gamma = vec![E::Param::from_f64(1.5); c];
    let (mut dgamma, mut dbeta) = (gamma.clone(), gamma.clone());
    let (mut moments, mut sums) = (vec![Moments::default(); c], vec![GradientSums::default(); c]);
    let affine = Affine::new(&gamma, &gamma);
    let population = Population { mean: &gamma, var: &gamma };

    let bn = BatchNorm::<E>::new(shape).unwrap().with_tier(tier).unwrap().with_parallelism(parallelism);
    let mut saved = bn.saved();
    bn.reserve(1);
    let mut all = || {
        bn.forward_train(&x, affine, &mut y, &mut saved).unwrap();
        bn.backward(
            &x,
            &dy,
            &saved,
            Affine::scale(&gamma),
            Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() },
        )
        .unwrap();
        bn.forward_infer(&x, affine, population, &mut y).unwrap();
        bn.moments(&x, &mut moments).unwrap();
        bn.normalize(&x, affine, &saved, &mut y).unwrap();
        bn.gradient_sums(&x, &dy, &saved, affine, &mut sums).unwrap();
        bn.input_gradient(&x, &dy, &saved, Affine::scale(&gamma), &sums, &mut dx).unwrap();
        bn.forward_train_in_place(&mut x, affine, &mut saved).unwrap();
    };
    assert_eq!(allocations(&mut all), 0, "first calls, {shape:?} on {tier}, {parallelism:?}");
    assert_eq!(allocations(|| (0..3).for_each(|_| all())), 0, "later calls, {shape:?} on {tier}, {parallelism:?}");
}

// One test alone: another one would be counted too.
#[test]
fn calls_allocate_nothing() {
    let shapes = [
        Shape::nchw(1, 64, 14, 14),
        Shape::nchw(5, 3, 65, 65),
        Shape::nchw(40, 17, 7, 7),
        Shape::nchw(2, 64, 160, 160),
        Shape::nchw(1, 1, 300, 300),
        Shape::nhwc(4, 20, 20, 3),
        Shape::nhwc(4, 20, 20, 300),
        Shape::nc(128, 1024),
    ]
    .map(Result::unwrap);
    for shape in shapes {
        for tier in Tier::available() {
            check::<f32>(shape, tier, Parallelism::Sequential);
        }
        check::<f64>(shape, Tier::Portable, Parallelism::Sequential);
        #[cfg(feature = "half")]
        check::<half::bf16>(shape, Tier::Portable, Parallelism::Sequential);
    }
    // From inside a pool, whose threads have started: rayon itself allocates where work enters it.
    #[cfg(feature = "rayon")]
    {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        pool.broadcast(|_| ());
        for shape in shapes {
            pool.install(|| check::<f32>(shape, Tier::Portable, Parallelism::Threads(3)));
            pool.install(|| check::<f32>(shape, Tier::Portable, Parallelism::Auto));
        }
    }
}
