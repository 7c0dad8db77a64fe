//! Through the C interface come the bits of the Rust interface: each element type and layout, each pass, in place and not.

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use batchnorm::{
    Activation, Affine, BatchNorm, Element, Gradients, Layout, Momentum, Population, Real, Shape, Variance,
};
use batchnorm_c::*;
use half::{bf16, f16};

const SPATIAL: [usize; 2] = [5, 9];
const BATCH: usize = 6;
const EPS: f64 = 1e-4;
const SLOPE: f64 = 0.125;

/// Values of a few sizes, some beyond what f16 holds exactly; no NaN.
fn values<T: Element>(len: usize, seed: usize) -> Vec<T> {
    let value = |i: usize| {
        let i = i.wrapping_mul(2_654_435_761).wrapping_add(seed * 977) % 4001;
        (i as f64 - 2000.0) / 300.0 + (seed % 3) as f64
    };
    (0..len).map(|i| T::from_param(T::Param::from_f64(value(i)))).collect()
}

fn bytes<T: Element>(values: &[T]) -> &[u8] {
    // SAFETY: numbers have no padding.
    unsafe { core::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

#[track_caller]
fn assert_same<T: Element>(got: &[T], expected: &[T]) {
    assert!(bytes(got) == bytes(expected), "{got:?} is not {expected:?}");
}

#[track_caller]
fn ok(status: Status) {
    assert_eq!(status, Status::Ok);
}

fn ptr<T>(values: &[T]) -> (*const c_void, usize) {
    (values.as_ptr().cast(), values.len())
}

fn check<E: Element>(dtype: Dtype, layout: Layout, channels: usize, activation: Activation) {
    let shape = Shape::new(layout, BATCH, channels, &SPATIAL).unwrap();
    let bn = BatchNorm::<E>::new(shape).and_then(|bn| bn.with_eps(EPS)).unwrap();
    let (x, dy) = (values::<E>(shape.len(), 1), values::<E>(shape.len(), 2));
    let (gamma, beta) = (values::<E::Param>(channels, 3), values::<E::Param>(channels, 4));
    let (mut y, mut dx) = (vec![E::default(); shape.len()], vec![E::default(); shape.len()]);
    let zeros = vec![E::Param::default(); channels];
    let (mut dgamma, mut dbeta) = (zeros.clone(), zeros.clone());
    let affine = Affine::new(&gamma, &beta).with_activation(activation);
    let mut saved = bn.saved();
    bn.forward_train(&x, affine, &mut y, &mut saved).unwrap();
    let gradients =
        Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
    bn.backward(&x, &dy, &saved, affine, gradients).unwrap();
    let mut running = bn.running(Momentum::Cumulative, Variance::Unbiased).unwrap();
    (0..2).for_each(|_| running.update(&saved).unwrap());
    let mut inferred = y.clone();
    bn.forward_infer(&x, affine, running.population(), &mut inferred).unwrap();
    let mut frozen = bn.saved();
    bn.freeze(Population { mean: &zeros, var: running.var() }, &mut frozen).unwrap();
    let mut frozen_dx = dx.clone();
    bn.backward(&x, &dy, &frozen, affine, Gradients { dx: Some(&mut frozen_dx), ..Default::default() }).unwrap();

    // The same from the other side of the border.
    let len = shape.len();
    let ((px, _), (pdy, _), (pgamma, _), (pbeta, _)) = (ptr(&x), ptr(&dy), ptr(&gamma), ptr(&beta));
    let (mut plan, mut kept, mut other) = (null_mut(), null_mut(), null_mut());
    let (mut y2, mut dx2) = (vec![E::default(); len], vec![E::default(); len]);
    let (mut dgamma2, mut dbeta2, mut mean, mut var) = (zeros.clone(), zeros.clone(), zeros.clone(), zeros.clone());
    let (kind, slope) = match activation {
        Activation::LeakyRelu(slope) => (ActivationKind::LeakyRelu, slope),
        Activation::Relu => (ActivationKind::Relu, f64::NAN),
        _ => (ActivationKind::None, f64::NAN),
    };
    let layout = match layout {
        Layout::ChannelsFirst => LayoutKind::ChannelsFirst,
        Layout::ChannelsLast => LayoutKind::ChannelsLast,
    };
    let c = channels;
    let (y2p, dx2p) = (y2.as_mut_ptr().cast(), dx2.as_mut_ptr().cast());
    let (dgamma2p, dbeta2p): (*mut c_void, *mut c_void) = (dgamma2.as_mut_ptr().cast(), dbeta2.as_mut_ptr().cast());
    let (meanp, varp): (*mut c_void, *mut c_void) = (mean.as_mut_ptr().cast(), var.as_mut_ptr().cast());
    // SAFETY: all pointers lead to vectors of these lengths, and handles are made here.
    unsafe {
        ok(bn_plan_new(dtype as i32, layout as i32, BATCH, c, SPATIAL.as_ptr(), SPATIAL.len(), EPS, &mut plan));
        ok(bn_plan_set_activation(plan, kind as i32, slope));
        ok(bn_saved_new(plan, &mut kept));
        ok(bn_saved_new(plan, &mut other));
        ok(bn_forward_train(plan, px, len, pgamma, c, pbeta, c, y2p, len, kept));
        ok(bn_backward(plan, px, len, pdy, len, kept, pgamma, c, pbeta, c, dx2p, len, dgamma2p, c, dbeta2p, c));
        assert_eq!(bn_saved_count(kept), saved.count());
        let (momentum, variance) = (MomentumKind::Cumulative as i32, VarianceKind::Unbiased as i32);
        for batches in 0..2 {
            ok(bn_running_update(kept, momentum, 0.0, variance, batches, meanp, c, varp, c));
        }
    }
    assert_same(&y2, &y);
    assert_same(&dx2, &dx);
    assert_same(&dgamma2, &dgamma);
    assert_same(&dbeta2, &dbeta);
    assert_same(&mean, running.mean());
    assert_same(&var, running.var());
    // SAFETY: as above.
    unsafe {
        ok(bn_forward_infer(plan, px, len, pgamma, c, pbeta, c, meanp, c, varp, c, y2p, len));
        assert_same(&y2, &inferred);
        ok(bn_freeze(plan, zeros.as_ptr().cast(), c, varp, c, other));
        ok(bn_backward(plan, px, len, pdy, len, other, pgamma, c, pbeta, c, dx2p, len, null_mut(), 0, null_mut(), 0));
        assert_same(&dx2, &frozen_dx);

        // Statistics over the border and back lose the residue of the mean alone.
        for (statistic, expected) in [
            (Statistic::Mean, saved.mean()),
            (Statistic::Residue, saved.residue()),
            (Statistic::Var, saved.var()),
            (Statistic::InvStd, saved.inv_std()),
        ] {
            ok(bn_saved_read(kept, statistic as i32, meanp, c));
            assert_same(core::slice::from_raw_parts(meanp.cast::<E::Param>(), c), expected);
        }
        let (mean, inv_std) = (saved.mean().to_vec(), saved.inv_std().to_vec());
        ok(bn_saved_set(plan, other, saved.count(), mean.as_ptr().cast(), c, inv_std.as_ptr().cast(), c));
        let restored = batchnorm::Saved::from_parts(saved.count(), mean, inv_std, EPS).unwrap();
        bn.backward(&x, &dy, &restored, affine, Gradients { dx: Some(&mut dx), ..Default::default() }).unwrap();
        ok(bn_backward(plan, px, len, pdy, len, other, pgamma, c, pbeta, c, dx2p, len, null_mut(), 0, null_mut(), 0));
        assert_same(&dx2, &dx);

        // In place, and without gamma and beta.
        bn.forward_train(&x, Affine::none().with_activation(activation), &mut y, &mut saved).unwrap();
        y2.copy_from_slice(&x);
        let y2p: *mut c_void = y2.as_mut_ptr().cast();
        ok(bn_forward_train(plan, y2p, len, null(), 0, null(), 0, y2p, len, kept));
        assert_same(&y2, &y);
        bn_saved_free(kept);
        bn_saved_free(other);
        bn_plan_free(plan);
    }
}

#[test]
fn each_type_and_layout() {
    for layout in [Layout::ChannelsFirst, Layout::ChannelsLast] {
        for (channels, activation) in [(1, Activation::None), (7, Activation::Relu), (33, Activation::LeakyRelu(SLOPE))]
        {
            check::<f32>(Dtype::F32, layout, channels, activation);
            check::<f64>(Dtype::F64, layout, channels, activation);
            check::<bf16>(Dtype::Bf16, layout, channels, activation);
            check::<f16>(Dtype::F16, layout, channels, activation);
        }
    }
}
