//! Running statistics under the conventions of the frameworks, with numbers worked by hand.

mod common;

use batchnorm::{Affine, BatchNorm, Error, Moments, Momentum, Population, Real, Running, Saved, Shape, Variance};
use common::{Bits, assert_bits, length};
use std::fmt::Debug;

const MOMENTUMS: [Momentum; 3] = [Momentum::WeightOfNew(0.25), Momentum::WeightOfOld(0.75), Momentum::Cumulative];
const VARIANCES: [Variance; 2] = [Variance::Biased, Variance::Unbiased];

/// The statistics of a batch of one channel.
fn batch<P: Bits + Real>(values: &[f64]) -> Saved<P> {
    let bn = BatchNorm::<P>::new(Shape::nc(values.len(), 1).unwrap()).unwrap();
    let mut x: Vec<P> = values.iter().map(|&v| P::from_f64(v)).collect();
    let mut saved = bn.saved();
    bn.forward_train_in_place(&mut x, Affine::none(), &mut saved).unwrap();
    saved
}

/// Asserts mean and variance of the only channel, to a few roundings of the type. A weight `1 - w` is known to an
/// epsilon of f64, whatever its size, and weighs values of up to 5.
#[track_caller]
fn assert_one<P: Real + Debug>(running: &Running<P>, mean: f64, var: f64) {
    assert_eq!((running.mean().len(), running.var().len()), (1, 1));
    let epsilon = if size_of::<P>() == 4 { f32::EPSILON.into() } else { f64::EPSILON };
    for (what, got, expected) in [("mean", running.mean()[0], mean), ("var", running.var()[0], var)] {
        let off = (got.to_f64() - expected).abs();
        let bound = 2.0 * epsilon * expected.abs() + 5.0 * f64::EPSILON;
        assert!(off <= bound, "{what} is {got:?}, expected {expected}");
    }
}

/// The batch 1, 2, 3, 6 has mean 3, biased variance 14/4 and unbiased variance 14/3.
fn known_numbers<P: Bits + Real>() {
    let saved = batch::<P>(&[1.0, 2.0, 3.0, 6.0]);
    let after_one = |momentum, variance| {
        let mut running = Running::<P>::new(1, momentum, variance).unwrap();
        assert_one(&running, 0.0, 1.0);
        running.update(&saved).unwrap();
        running
    };
    // PyTorch: 0.9 * 0 + 0.1 * 3 and 0.9 * 1 + 0.1 * 14/3 = 0.9 + 0.4666...; again: 0.27 + 0.3, 1.23 + 0.4666...
    let mut pytorch = after_one(Momentum::WeightOfNew(0.1), Variance::Unbiased);
    assert_one(&pytorch, 0.3, 1.366_666_666_666_666_7);
    pytorch.update(&saved).unwrap();
    assert_one(&pytorch, 0.57, 1.696_666_666_666_666_7);
    // Keras: 0.01 * 3 and 0.99 + 0.01 * 3.5; again: 0.0297 + 0.03, 0.99 * 1.025 + 0.035.
    let mut keras = after_one(Momentum::WeightOfOld(0.99), Variance::Biased);
    assert_one(&keras, 0.03, 1.025);
    keras.update(&saved).unwrap();
    assert_one(&keras, 0.0597, 1.04975);
    // ONNX: 0.9 and biased.
    assert_one(&after_one(Momentum::WeightOfOld(0.9), Variance::Biased), 0.3, 1.25);
    // The average of one batch is that batch: nothing is left of 0 and 1.
    assert_one(&after_one(Momentum::Cumulative, Variance::Biased), 3.0, 3.5);
    assert_one(&after_one(Momentum::Cumulative, Variance::Unbiased), 3.0, 14.0 / 3.0);
}

#[test]
fn known_numbers_by_hand() {
    known_numbers::<f32>();
    known_numbers::<f64>();
}

#[test]
fn the_weight_of_the_new_is_what_the_old_leaves() {
    let saved = batch::<f64>(&[1.0, 2.0, 3.0, 6.0]);
    for variance in VARIANCES {
        let updated = |momentum| {
            let mut running = Running::<f64>::new(1, momentum, variance).unwrap();
            (0..5).for_each(|_| running.update(&saved).unwrap());
            running
        };
        // 1 - 0.9 is not quite 0.1, 1 - 0.75 is 0.25.
        let (new, old) = (updated(Momentum::WeightOfNew(0.1)), updated(Momentum::WeightOfOld(0.9)));
        assert_one(&new, old.mean()[0], old.var()[0]);
        let (new, old) = (updated(Momentum::WeightOfNew(0.25)), updated(Momentum::WeightOfOld(0.75)));
        assert_eq!((new.mean(), new.var()), (old.mean(), old.var()));
    }
}

/// Means 1.5, 8, -1 and m2 0.5, 6, 0 of batches of 2, 4 and 3 values: each batch counts once, however large.
#[test]
fn cumulative_is_the_plain_average_over_batches() {
    let batches = [&[1.0, 2.0][..], &[6.0, 8.0, 9.0, 9.0], &[-1.0; 3]].map(batch::<f64>);
    let biased = [0.25, (0.25 + 1.5) / 2.0, (0.25 + 1.5) / 3.0];
    let unbiased = [0.5, (0.5 + 2.0) / 2.0, (0.5 + 2.0) / 3.0];
    for (variance, vars) in VARIANCES.into_iter().zip([biased, unbiased]) {
        let mut running = Running::<f64>::new(1, Momentum::Cumulative, variance).unwrap();
        for (k, ((batch, mean), var)) in batches.iter().zip([1.5, 4.75, 8.5 / 3.0]).zip(vars).enumerate() {
            running.update(batch).unwrap();
            assert_one(&running, mean, var);
            assert_eq!(running.batches(), k as u64 + 1);
        }
    }
}

/// The unbiased correction is that of all values of the batch, also when shards were joined.
#[test]
fn joined_shards_count_together() {
    let bn = BatchNorm::<f64>::new(Shape::nc(2, 1).unwrap()).unwrap();
    let mut total = Moments::default();
    for shard in [[1.0, 2.0], [3.0, 6.0]] {
        let mut moments = [total];
        bn.moments(&shard, &mut moments).unwrap();
        total = total.merge(moments[0]);
    }
    let mut saved = bn.saved();
    bn.finish(&[total], &mut saved).unwrap();
    let mut running = bn.running(Momentum::WeightOfNew(1.0), Variance::Unbiased).unwrap();
    running.update(&saved).unwrap();
    assert_one(&running, 3.0, 14.0 / 3.0);
}

#[test]
fn momentum_follows_a_schedule() {
    let saved = batch::<f64>(&[1.0, 3.0]);
    let mut running = Running::<f64>::new(1, Momentum::WeightOfNew(1.0), Variance::Biased).unwrap();
    running.update(&saved).unwrap();
    for got in [-0.1, 1.1, f64::NAN] {
        assert!(matches!(running.set_momentum(Momentum::WeightOfNew(got)), Err(Error::Momentum { .. })));
        assert_eq!(running.momentum(), Momentum::WeightOfNew(1.0));
    }
    running.set_momentum(Momentum::WeightOfNew(0.0)).unwrap();
    let before = (running.mean().to_vec(), running.var().to_vec());
    running.update(&saved).unwrap();
    let (mean, var, batches) = running.into_parts();
    assert_eq!((mean, var), before);
    assert_eq!(batches, 2);
}

#[test]
fn from_parts_continues() {
    let batches = [&[1.0, 2.0][..], &[6.0, 8.0, 9.0, 9.0], &[-1.0; 3], &[0.0, 9.0]].map(batch::<f32>);
    for (momentum, variance) in MOMENTUMS.into_iter().flat_map(|m| VARIANCES.map(|v| (m, v))) {
        let mut whole = Running::<f32>::new(1, momentum, variance).unwrap();
        for (k, batch) in batches.iter().enumerate() {
            let (mean, var, seen) = (whole.mean().to_vec(), whole.var().to_vec(), whole.batches());
            assert_eq!(seen, k as u64);
            let mut continued = Running::from_parts(mean, var, seen, momentum, variance).unwrap();
            assert_eq!(continued, whole);
            whole.update(batch).unwrap();
            continued.update(batch).unwrap();
            assert_eq!(continued, whole);
        }
    }
    // With two batches seen, the third has a weight of 1/3.
    let mut running = Running::from_parts(vec![6.0], vec![3.0], 2, Momentum::Cumulative, Variance::Biased).unwrap();
    running.update(&batch::<f64>(&[-1.0, 1.0])).unwrap();
    assert_one(&running, 4.0, 7.0 / 3.0);
    assert_eq!(running.batches(), 3);
}

#[test]
fn weights_of_zero_and_one() {
    let finite = batch::<f32>(&[1.0, 2.0, 3.0, 6.0]);
    let diverged = batch::<f32>(&[1.0, f32::NAN.into(), 3.0]);
    assert!(diverged.mean()[0].is_nan() && diverged.var()[0].is_nan());
    let (ignore, replace) = (
        [Momentum::WeightOfNew(0.0), Momentum::WeightOfOld(1.0)],
        [Momentum::WeightOfNew(1.0), Momentum::WeightOfOld(0.0)],
    );
    for momentum in ignore {
        let mut running = Running::from_parts(vec![0.1f32], vec![0.7], 3, momentum, Variance::Unbiased).unwrap();
        for saved in [&finite, &diverged] {
            running.update(saved).unwrap();
            assert_eq!((running.mean(), running.var()), (&[0.1][..], &[0.7][..]));
        }
        // A batch without weight is a batch all the same.
        assert_eq!(running.batches(), 5);
    }
    for momentum in replace.into_iter().chain([Momentum::Cumulative]) {
        // Nothing is left of the old, be it infinite.
        let (mean, var) = (vec![f32::NEG_INFINITY], vec![f32::INFINITY]);
        let mut running = Running::from_parts(mean, var, 0, momentum, Variance::Biased).unwrap();
        running.update(&finite).unwrap();
        assert_eq!((running.mean(), running.var()), (&[3.0][..], &[3.5][..]));
    }
}

#[test]
fn channels_are_apart() {
    let bn = BatchNorm::<f64>::new(Shape::nchw(2, 3, 1, 2).unwrap()).unwrap();
    let mut running = bn.running(Momentum::WeightOfNew(0.5), Variance::Biased).unwrap();
    // Channels 1, 2, 3, 6; 5, 5, 5, 5; and one with a NaN.
    let mut x = [1.0, 2.0, 5.0, 5.0, 0.0, f64::NAN, 3.0, 6.0, 5.0, 5.0, 0.0, 0.0];
    let mut saved = bn.saved();
    bn.forward_train_in_place(&mut x, Affine::none(), &mut saved).unwrap();
    running.update(&saved).unwrap();
    assert_bits("mean", running.mean(), &[1.5, 2.5, f64::NAN]);
    assert_bits("var", running.var(), &[2.25, 0.5, f64::NAN]);

    // Inference refuses the channel that diverged, by its number, and writes nothing.
    let mut y = [7.0; 12];
    let error = bn.forward_infer(&[0.0; 12], Affine::none(), running.population(), &mut y).unwrap_err();
    assert!(matches!(error, Error::Variance { channel: 2, got } if got.is_nan()), "{error}");
    assert_eq!(y, [7.0; 12]);
}

#[test]
fn refused_batches_change_nothing() {
    let one = batch::<f64>(&[4.0]);
    for (momentum, variance) in MOMENTUMS.into_iter().flat_map(|m| VARIANCES.map(|v| (m, v))) {
        let mut running = Running::<f64>::new(1, momentum, variance).unwrap();
        running.update(&batch(&[1.0, 2.0, 3.0, 6.0])).unwrap();
        let before = running.clone();
        let mut refuse = |saved: &Saved<f64>, expected: Error| {
            assert_eq!(running.update(saved), Err(expected));
            assert_eq!(running, before);
        };
        refuse(&Saved::new(1), Error::MissingStatistics);
        refuse(&Saved::new(2), length("saved", 1, 2));
        match variance {
            Variance::Unbiased => refuse(&one, Error::UnbiasedFromOne { count: 1 }),
            // The biased variance of one value is 0.
            Variance::Biased => {
                let (mean, var) = (running.mean()[0], running.var()[0]);
                running.update(&one).unwrap();
                let keep = if momentum == Momentum::Cumulative { 0.5 } else { 0.75 };
                assert_one(&running, mean * keep + 4.0 * (1.0 - keep), var * keep);
            }
        }
    }
}

/// Mean 1.5 and variance 2.25 after one batch of 1, 2, 3, 6 with half the weight; eps 4 makes inv_std 1/2.5.
#[test]
fn population_feeds_inference() {
    let bn = BatchNorm::<f64>::new(Shape::nc(4, 1).unwrap()).unwrap().with_eps(4.0).unwrap();
    let mut running = bn.running(Momentum::WeightOfOld(0.5), Variance::Biased).unwrap();
    let (x, mut y, mut saved) = ([1.0, 2.0, 3.0, 6.0], [0.0; 4], bn.saved());
    // Before the first batch: mean 0 and variance 1, as eps 3 has it, 1/sqrt(1 + 3) = 1/2.
    let other = BatchNorm::<f64>::new(*bn.shape()).unwrap().with_eps(3.0).unwrap();
    other.forward_infer(&x, Affine::none(), running.population(), &mut y).unwrap();
    assert_eq!(y, [0.5, 1.0, 1.5, 3.0]);

    bn.forward_train(&x, Affine::none(), &mut y, &mut saved).unwrap();
    running.update(&saved).unwrap();
    assert_eq!(running.population(), Population { mean: &[1.5], var: &[2.25] });
    bn.forward_infer(&x, Affine::new(&[10.0], &[100.0]), running.population(), &mut y).unwrap();
    for (y, expected) in y.into_iter().zip([98.0, 102.0, 106.0, 118.0]) {
        assert!((y - expected).abs() <= 1e-13, "{y}, expected {expected}");
    }
}

#[test]
fn recomputed_statistics_are_those_of_all_values() {
    let batches = [vec![1.0f32, 10.0, 3.0, 30.0], vec![5.0, 50.0, 7.0, 70.0, 9.0, 90.0]];
    let mut total = vec![Moments::default(); 2];
    for x in &batches {
        let bn = BatchNorm::<f32>::new(Shape::nc(x.len() / 2, 2).unwrap()).unwrap();
        let mut batch = vec![Moments::default(); 2];
        bn.moments(x, &mut batch).unwrap();
        total.iter_mut().zip(&batch).for_each(|(total, batch)| *total = total.merge(*batch));
    }
    // 1, 3, 5, 7, 9: mean 5, sum of squares 40.
    for (variance, expected) in [(Variance::Biased, [8.0, 800.0]), (Variance::Unbiased, [10.0, 1000.0])] {
        let mut running = Running::<f32>::new(2, Momentum::WeightOfNew(0.1), variance).unwrap();
        running.recompute(&total).unwrap();
        assert_eq!((running.mean(), running.var()), (&[5.0, 50.0][..], &expected[..]));
        assert_eq!(running.batches(), 0);
    }
    let mut running = Running::<f32>::new(2, Momentum::WeightOfNew(0.1), Variance::Unbiased).unwrap();
    let before = running.clone();
    let one = Moments { count: 1, ..total[0] };
    assert_eq!(running.recompute(&total[1..]), Err(Error::Length { what: "moments", expected: 2, got: 1 }));
    assert_eq!(running.recompute(&[Moments::default(); 2]), Err(Error::MissingStatistics));
    assert_eq!(running.recompute(&[one; 2]), Err(Error::UnbiasedFromOne { count: 1 }));
    assert_eq!(running.recompute(&[total[0], one]), Err(Error::Count { channel: 1, expected: 5, got: 1 }));
    assert_eq!(running, before);
}
