//! The same as burn's layer, computed by that in f64 on the same values.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor, activation};

use crate::support::{Named, Types, View, Whose, assert_close, differentiate, list, train, training};

/// Element types and eight of their units in the last place; for f64 what the sums of the other layer may be off by.
const TYPES: [(DType, f64); 4] =
    [(DType::F32, 1e-6), (DType::F64, 1e-12), (DType::F16, 8.0 / 1024.0), (DType::BF16, 8.0 / 128.0)];

fn identity<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    tensor
}

#[track_caller]
fn check<const D: usize>(what: &str, shape: [usize; D], device: &Device, views: [View<D>; 2]) {
    for (dtype, bound) in TYPES {
        let got = train(Whose::Ours, Types::both(dtype), shape, device, views);
        let expected = train(Whose::Burns, Types { values: dtype, computed: DType::F64 }, shape, device, views);
        assert_close(&format!("{what} {shape:?} {dtype:?}"), &got, &expected, bound);
    }
}

#[test]
fn of_all_ranks() {
    check("NC", [16, 5], &training(), [identity; 2]);
    check("NCL", [4, 3, 7], &training(), [identity; 2]);
    check("NCHW", [3, 4, 5, 6], &training(), [identity; 2]);
    check("NCDHW", [2, 3, 2, 3, 4], &training(), [identity; 2]);
}

#[test]
fn of_a_tensor_that_threads_share() {
    check("large", [8, 16, 56, 56], &training(), [identity; 2]);
}

#[test]
fn of_tensors_that_lie_in_other_ways() {
    let last: View<4> = |tensor| tensor.permute([0, 3, 1, 2]);
    let last_copied: View<4> = |tensor| last_then_dense(tensor);
    let samples: View<4> = |tensor| tensor.narrow(0, 1, 2);
    let channels: View<4> = |tensor| tensor.narrow(1, 1, 2);
    let flipped: View<4> = |tensor| tensor.flip([0, 3]);
    let expanded: View<4> = |tensor| {
        let dims = tensor.dims();
        tensor.narrow(2, 0, 1).narrow(3, 0, 1).expand(dims)
    };
    for (what, views) in [
        ("channels last", [last, last]),
        ("channels last, gradient first", [last, last_copied]),
        ("channels first, gradient last", [last_copied, last]),
        ("samples", [samples, samples]),
        ("channels", [channels, channels]),
        ("flipped", [flipped, flipped]),
        ("expanded gradient", [identity, expanded]),
    ] {
        check(what, [4, 3, 5, 6], &training(), views);
    }
}

/// The values of `permute`, one after the other again.
fn last_then_dense(tensor: Tensor<4>) -> Tensor<4> {
    let tensor = tensor.permute([0, 3, 1, 2]);
    let dims = tensor.dims();
    tensor.flatten::<1>(0, 3).reshape(dims)
}

#[test]
fn with_checkpoints() {
    check("balanced", [3, 4, 5, 6], &training().gradient_checkpointing(), [activation::relu; 2]);
}

/// Both layers on the same case in f64.
#[track_caller]
fn compare(what: &str, case: impl Fn(Whose) -> Named) {
    assert_close(what, &case(Whose::Ours), &case(Whose::Burns), 1e-12);
}

const F64: Types = Types { values: DType::F64, computed: DType::F64 };

#[test]
fn frozen() {
    compare("running statistics as constants", |whose| {
        let mut named = Named::new();
        let device = training();
        let frozen = F64.layer(3, &device).freeze();
        let mut constant = F64.layer(3, &device);
        constant.training = Param::from_bool(false);
        for (what, layer) in [("frozen", frozen), ("not training", constant)] {
            let [x, dy] = [1, 2].map(|seed| F64.random([4, 3, 5], seed, &device));
            let x = x.require_grad();
            let y = whose.forward(&layer, x.clone());
            differentiate(&mut named, what, &[&layer], [x, y, dy]);
        }
        named
    });
}

#[test]
fn where_some_gradients_are_wanted() {
    compare("x is data", |whose| {
        let mut named = Named::new();
        let layer = F64.layer(3, &training());
        let [x, dy] = [1, 2].map(|seed| F64.random([4, 3, 5], seed, &training()));
        let y = whose.forward(&layer, x.clone());
        differentiate(&mut named, "x is data", &[&layer], [x, y, dy]);
        named
    });
    compare("gamma is frozen", |whose| {
        let mut named = Named::new();
        let mut layer = F64.layer(3, &training());
        layer.gamma = layer.gamma.set_require_grad(false);
        let [x, dy] = [1, 2].map(|seed| F64.random([4, 3, 5], seed, &training()));
        let x = x.require_grad();
        let y = whose.forward(&layer, x.clone());
        differentiate(&mut named, "gamma is frozen", &[&layer], [x, y, dy]);
        named
    });
}

#[test]
fn where_a_gradient_is_shared() {
    compare("two layers beside each other", |whose| {
        let mut named = Named::new();
        let device = training();
        let [one, other] = [F64.layer(3, &device), F64.layer(3, &device)];
        let [x, dy] = [1, 2].map(|seed| F64.random([4, 3, 5], seed, &device));
        let x = x.require_grad();
        // Both are given the same dy, which neither may write over before the other has read it.
        let y = whose.forward(&one, x.clone()) + whose.forward(&other, x.clone() * 2.0);
        differentiate(&mut named, "both", &[&one, &other], [x, y, dy]);
        named
    });
}

#[test]
fn inputs_are_left_alone() {
    for device in [Device::flex(), training()] {
        let layer = F64.layer(3, &device);
        let x = F64.random([4, 3, 5], 1, &device);
        let before = list(x.clone() * 1.0);
        let _y = Whose::Ours.forward(&layer, x.clone());
        let _y = Whose::Ours.forward(&layer.clone().freeze(), x.clone());
        assert_eq!(list(x), before);
    }
}
