//! Forward passes, in one call, in halves, in place and to new vectors, on every tier: the bits of the reference.
#![no_main]

use arbitrary::Arbitrary;
use batchnorm::{Affine, BatchNorm, Moments, Population, Saved, reference};
use batchnorm_fuzz::{
    Foreign, Placed, Setting, Tested, Values, assert_bits, assert_saved, moments_parts, variances, with_element,
};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    setting: Setting,
    x: Values,
    foreign: Foreign,
    bytes: &'a [u8],
}

fuzz_target!(|input: Input<'_>| with_element!(input.setting.kind, check(&input)));

/// The arguments of all calls, and what the reference makes of them.
struct Case<'a, E: Tested> {
    setting: &'a Setting,
    affine: Affine<'a, E>,
    x: Placed<E>,
    population: Population<'a, E::Param>,
    foreign: Saved<E::Param>,
    moments: Vec<Moments>,
    saved: Saved<E::Param>,
    y: Vec<E>,
    inferred: Vec<E>,
    of_foreign: Vec<E>,
}

fn check<E: Tested>(input: &Input<'_>) {
    let Input { setting, x, foreign, bytes } = input;
    let (shape, eps) = (setting.shape(), setting.eps());
    let x = x.fill::<E>(bytes, 0, shape.len());
    let params = setting.affine::<E::Param>(bytes);
    let affine = params.get();
    let statistic = |salt| setting.params.fill::<E::Param>(bytes, salt, shape.channels());
    let (mean, var) = (statistic(3), variances(statistic(4)));
    let population = Population { mean: &mean, var: &var };
    let foreign = foreign.saved(setting, bytes);

    let moments = reference::moments(&shape, &x);
    let saved = reference::finish(&moments, eps);
    let case = Case {
        setting,
        affine,
        population,
        y: reference::normalize(&shape, &x, affine, &saved),
        inferred: reference::forward_infer(&shape, &x, affine, population, eps),
        of_foreign: reference::normalize(&shape, &x, affine, &foreign),
        x: setting.placed(&x),
        foreign,
        moments,
        saved,
    };
    setting.plans().for_each(|bn| check_plan(&bn, &case));
}

fn check_plan<E: Tested>(bn: &BatchNorm<E>, case: &Case<'_, E>) {
    let Case { setting, affine, x, population, .. } = case;
    let (affine, population, x, tier) = (*affine, *population, x.get(), bn.tier());
    let room = || setting.room::<E>(x.len());

    let (mut y, mut saved) = (room(), bn.saved());
    bn.forward_train(x, affine, y.get_mut(), &mut saved).unwrap();
    assert_saved("forward_train, saved", tier, &saved, &case.saved);
    assert_bits("forward_train", tier, y.get(), &case.y);

    let (mut y, mut saved) = (setting.placed(x), bn.saved());
    bn.forward_train_in_place(y.get_mut(), affine, &mut saved).unwrap();
    assert_saved("forward_train_in_place, saved", tier, &saved, &case.saved);
    assert_bits("forward_train_in_place", tier, y.get(), &case.y);

    let mut saved = bn.saved();
    let y = bn.forward_train_to_vec(x, affine, &mut saved).unwrap();
    assert_saved("forward_train_to_vec, saved", tier, &saved, &case.saved);
    assert_bits("forward_train_to_vec", tier, &y, &case.y);

    let mut moments = vec![Moments::default(); bn.shape().channels()];
    bn.moments(x, &mut moments).unwrap();
    assert_bits("moments", tier, &moments_parts(&moments), &moments_parts(&case.moments));
    let mut saved = bn.saved();
    bn.finish(&moments, &mut saved).unwrap();
    assert_saved("finish", tier, &saved, &case.saved);

    for (what, saved, expected) in
        [("normalize", &saved, &case.y), ("normalize, foreign", &case.foreign, &case.of_foreign)]
    {
        let mut y = room();
        bn.normalize(x, affine, saved, y.get_mut()).unwrap();
        assert_bits(what, tier, y.get(), expected);
        let mut y = setting.placed(x);
        bn.normalize_in_place(y.get_mut(), affine, saved).unwrap();
        assert_bits(&format!("{what}, in place"), tier, y.get(), expected);
        let y = bn.normalize_to_vec(x, affine, saved).unwrap();
        assert_bits(&format!("{what}, to a vector"), tier, &y, expected);
    }

    let mut y = room();
    bn.forward_infer(x, affine, population, y.get_mut()).unwrap();
    assert_bits("forward_infer", tier, y.get(), &case.inferred);
    let mut y = setting.placed(x);
    bn.forward_infer_in_place(y.get_mut(), affine, population).unwrap();
    assert_bits("forward_infer_in_place", tier, y.get(), &case.inferred);
    let y = bn.forward_infer_to_vec(x, affine, population).unwrap();
    assert_bits("forward_infer_to_vec", tier, &y, &case.inferred);
}
