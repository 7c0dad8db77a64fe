//! Backward passes, in one call, in halves, in place and to new vectors, for any subset of the gradients, on every tier: the bits of
//! the reference.
#![no_main]

use arbitrary::Arbitrary;
use batchnorm::{Affine, BatchNorm, Error, GradientSums, Gradients, Real, Saved, reference};
use batchnorm_fuzz::{Foreign, Placed, Setting, Tested, Values, assert_bits, sums_parts, with_element};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    setting: Setting,
    x: Values,
    dy: Values,
    /// Statistics of other values than `x`.
    foreign: Option<Foreign>,
    /// Which gradients are asked for.
    subset: Subset,
    bytes: &'a [u8],
}

#[derive(Arbitrary, Debug, Clone, Copy)]
struct Subset {
    dx: bool,
    dgamma: bool,
    dbeta: bool,
}

fuzz_target!(|input: Input<'_>| with_element!(input.setting.kind, check(&input)));

/// The arguments of all calls, and what the reference makes of them.
struct Case<'a, E: Tested> {
    setting: &'a Setting,
    subset: Subset,
    gamma: Option<&'a [E::Param]>,
    x: Placed<E>,
    dy: Placed<E>,
    saved: Saved<E::Param>,
    sums: Vec<GradientSums>,
    dx: Vec<E>,
    dgamma: Vec<E::Param>,
    dbeta: Vec<E::Param>,
}

fn check<E: Tested>(input: &Input<'_>) {
    let Input { setting, x, dy, foreign, subset, bytes } = input;
    let shape = setting.shape();
    let x = x.fill::<E>(bytes, 0, shape.len());
    let dy = dy.fill::<E>(bytes, 7, shape.len());
    let params = setting.affine::<E::Param>(bytes);
    let gamma = params.get::<E>().gamma;

    let own = || reference::finish(&reference::moments(&shape, &x), setting.eps());
    let saved = foreign.map_or_else(own, |foreign| foreign.saved(setting, bytes));
    let sums = reference::gradient_sums(&shape, &x, &dy, &saved, Affine::of(gamma, None));
    let case = Case {
        setting,
        subset: *subset,
        gamma,
        dx: reference::input_gradient(&shape, &x, &dy, &saved, Affine::of(gamma, None), &sums),
        dgamma: sums.iter().map(|s| E::Param::from_f64(s.dy_xhat)).collect(),
        dbeta: sums.iter().map(|s| E::Param::from_f64(s.dy)).collect(),
        x: setting.placed(&x),
        dy: setting.placed(&dy),
        saved,
        sums,
    };
    setting.plans().for_each(|bn| check_plan(&bn, &case));
}

fn check_plan<E: Tested>(bn: &BatchNorm<E>, case: &Case<'_, E>) {
    let (x, dy, saved, gamma, tier) = (case.x.get(), case.dy.get(), &case.saved, case.gamma, bn.tier());
    let room = || case.setting.room::<E>(x.len());
    let channels = bn.shape().channels();

    let mut sums = vec![GradientSums::default(); channels];
    bn.gradient_sums(x, dy, saved, Affine::of(gamma, None), &mut sums).unwrap();
    assert_bits("gradient_sums", tier, &sums_parts(&sums), &sums_parts(&case.sums));
    let mut dx = room();
    bn.input_gradient(x, dy, saved, Affine::of(gamma, None), &sums, dx.get_mut()).unwrap();
    assert_bits("input_gradient", tier, dx.get(), &case.dx);
    let mut dx = case.setting.placed(dy);
    bn.input_gradient_in_place(x, dx.get_mut(), saved, Affine::of(gamma, None), &sums).unwrap();
    assert_bits("input_gradient_in_place", tier, dx.get(), &case.dx);

    let all = Subset { dx: true, dgamma: true, dbeta: true };
    for Subset { dx, dgamma, dbeta } in [all, case.subset] {
        let outputs = || {
            let param = |asked: bool| asked.then(|| case.setting.room::<E::Param>(channels));
            (param(dgamma), param(dbeta))
        };
        let (mut out_dx, (mut out_dgamma, mut out_dbeta)) = (dx.then(room), outputs());
        let dx = out_dx.as_mut().map(Placed::get_mut);
        let gradients = Gradients { dx, ..asked([&mut out_dgamma, &mut out_dbeta]) };
        let result = bn.backward(x, dy, saved, Affine::of(gamma, None), gradients);
        check_gradients("backward", bn, case, result, &out_dx, [&out_dgamma, &out_dbeta]);

        let (mut out_dx, (mut out_dgamma, mut out_dbeta)) = (Some(case.setting.placed(dy)), outputs());
        let gradients = asked([&mut out_dgamma, &mut out_dbeta]);
        let dy = out_dx.as_mut().map(Placed::get_mut).unwrap();
        let result = bn.backward_in_place(x, dy, saved, Affine::of(gamma, None), gradients);
        check_gradients("backward_in_place", bn, case, result, &out_dx, [&out_dgamma, &out_dbeta]);

        let (mut out_dgamma, mut out_dbeta) = outputs();
        let gradients = asked([&mut out_dgamma, &mut out_dbeta]);
        let result = bn.backward_to_vec(x, case.dy.get(), saved, Affine::of(gamma, None), gradients);
        let result = result.map(|dx| assert_bits("backward_to_vec, dx", tier, &dx, &case.dx));
        check_gradients("backward_to_vec", bn, case, result, &None, [&out_dgamma, &out_dbeta]);
    }
}

/// The gradients of gamma and beta that there is room for.
fn asked<E: Tested>([dgamma, dbeta]: [&mut Option<Placed<E::Param>>; 2]) -> Gradients<'_, E> {
    let [dgamma, dbeta] = [dgamma, dbeta].map(|room| room.as_mut().map(Placed::get_mut));
    Gradients { dgamma, dbeta, ..Default::default() }
}

/// Compares what was asked for. Statistics of another number of values are for the halves alone.
fn check_gradients<E: Tested>(
    what: &str,
    bn: &BatchNorm<E>,
    case: &Case<'_, E>,
    result: Result<(), Error>,
    dx: &Option<Placed<E>>,
    [dgamma, dbeta]: [&Option<Placed<E::Param>>; 2],
) {
    let (expected, got) = (bn.shape().count() as u64, case.saved.count());
    if expected != got {
        assert_eq!(result, Err(Error::Shards { expected, got }), "{what}");
        return;
    }
    result.unwrap();
    let name = |gradient: &str| format!("{what}, {gradient}");
    if let Some(dx) = dx {
        assert_bits(&name("dx"), bn.tier(), dx.get(), &case.dx);
    }
    for (gradient, out, expected) in [("dgamma", dgamma, &case.dgamma), ("dbeta", dbeta, &case.dbeta)] {
        if let Some(out) = out {
            assert_bits(&name(gradient), bn.tier(), out.get(), expected);
        }
    }
}
