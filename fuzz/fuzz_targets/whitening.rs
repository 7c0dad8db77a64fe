//! Whitening of any values, in groups of any size, with arguments good and bad: no call panics or hangs, one that is refused
//! leaves its outputs as they were, and threads change no bit, of any element type.
#![no_main]

use arbitrary::Arbitrary;
use batchnorm::whitening::{Method, Saved, Whitening};
use batchnorm::{Affine, Error, Gradients, Layer, Layout, Momentum, Parallelism, Shape, Variance};
use batchnorm_fuzz::{Bits, Kind, Tested, Values, same_bits, with_element};
use libfuzzer_sys::fuzz_target;

/// Elements of the largest tensor: several blocks of few channels.
const MOST: usize = 40_000;

#[derive(Arbitrary, Debug, Clone, Copy)]
struct Input<'a> {
    kind: Kind,
    last: bool,
    batch: u8,
    channels: u8,
    spatial: u16,
    /// Halvings of the limit: most tensors are small, so that most runs are short.
    halvings: u8,
    group: u8,
    /// Of Newton's iteration, if that is the method.
    steps: Option<u8>,
    eps: f64,
    weight: f64,
    unbiased: bool,
    values: Values,
    bytes: &'a [u8],
    /// What the lengths of slices are off by.
    off: [i8; 4],
    /// The layer to fold into.
    layer: [u8; 3],
    transposed: bool,
}

/// A length, right or off by a few.
fn about(right: usize, off: i8) -> usize {
    // Most of the time right.
    if off % 2 == 0 { right } else { right.saturating_add_signed((off / 8).into()) }
}

fuzz_target!(|input: Input| with_element!(input.kind, check(input)));

fn check<E: Tested>(input: Input) {
    let (batch, channels) = (usize::from(input.batch % 24), usize::from(input.channels % 24));
    let most = (MOST >> (input.halvings % 12)) / (batch * channels).max(1);
    let layout = if input.last { Layout::ChannelsLast } else { Layout::ChannelsFirst };
    let Ok(shape) = Shape::new(layout, batch, channels, &[usize::from(input.spatial) % (most + 1)]) else { return };
    // One in 256 is too many.
    let method = input.steps.map_or(Method::Zca, |steps| Method::IterNorm {
        steps: if steps == u8::MAX { usize::MAX } else { (steps % 16).into() },
    });
    let plan = Whitening::<E>::new(shape).and_then(|plan| plan.with_method(method)?.with_group(input.group.into()));
    let Ok(plan) = plan else { return };
    let Ok(plan) = plan.clone().with_eps(input.eps).or_else(|_| plan.with_eps(1e-5)) else { return };

    let [of_x, of_y, of_params, of_dx] = input.off;
    let len = |off| about(shape.len(), off);
    let x: Vec<E> = input.values.fill(input.bytes, 0, len(of_x));
    let params: Vec<E::Param> = input.values.fill(input.bytes, 1, about(channels, of_params));
    let affine = Affine::new(&params, &params);
    let room = |off| vec![E::sentinel(); len(off)];
    let forward = |plan: &Whitening<E>| {
        let (mut y, mut saved) = (room(of_y), plan.saved());
        let result = plan.forward_train(&x, affine, &mut y, &mut saved);
        (y, saved, result)
    };
    let numbers = |saved: &Saved| [saved.mean(), saved.covariances().concat(), saved.matrices().concat()].concat();
    let (y, saved, result) = forward(&plan);
    let threaded = plan.clone().with_parallelism(Parallelism::Threads(3));
    let (shared, saved_by_all, _) = forward(&threaded);
    assert!(same_bits(&y, &shared) && same_bits(&numbers(&saved), &numbers(&saved_by_all)));
    if result.is_err() {
        assert!(same_bits(&y, &room(of_y)) && saved.count() == 0);
    }

    let backward = |plan: &Whitening<E>| {
        let (mut dx, mut dgamma, mut dbeta) = (room(of_dx), params.clone(), params.clone());
        let of = (Some(&mut dx[..]), Some(&mut dgamma[..]), Some(&mut dbeta[..]));
        let gradients = Gradients { dx: of.0, dgamma: of.1, dbeta: of.2, ..Default::default() };
        let result = plan.backward(&x, &x, &saved, affine, gradients);
        (dx, [dgamma, dbeta].concat(), result)
    };
    let (dx, of_params, result) = backward(&plan);
    let (shared, shared_params, _) = backward(&threaded);
    assert!(same_bits(&dx, &shared) && same_bits(&of_params, &shared_params));
    if result.is_err() {
        assert!(same_bits(&dx, &room(of_dx)) && same_bits(&of_params, &[&params[..], &params].concat()));
    }

    let variance = if input.unbiased { Variance::Unbiased } else { Variance::Biased };
    let Ok(mut running) = plan.running(Momentum::WeightOfNew(input.weight), variance) else { return };
    let before = running.clone();
    if running.update(&saved).is_err() {
        assert_eq!(running, before);
    }
    let projection = match plan.projection(&running, affine) {
        Ok(projection) => projection,
        Err(Error::Singular { .. } | Error::Length { .. } | Error::Variance { .. }) => return,
        Err(error) => panic!("{error}"),
    };
    let mut y = room(of_y);
    if plan.forward_infer(&x, &projection, &mut y).is_err() {
        assert!(same_bits(&y, &room(of_y)));
    } else {
        let mut x = x;
        plan.forward_infer_in_place(&mut x, &projection).unwrap();
        assert!(same_bits(&x, &y));
    }
    let [outputs, inputs, taps] = input.layer.map(|size| usize::from(size % 24));
    let layer = if input.transposed {
        Layer::transposed(inputs, outputs, taps)
    } else {
        Layer::convolution(outputs, inputs, taps)
    };
    let mut weights: Vec<E::Param> = input.values.fill(input.bytes, 2, layer.weights());
    let (mut bias, kept) = (vec![E::Param::sentinel(); outputs], weights.clone());
    if projection.fold_into_following(layer, &mut weights, &mut bias).is_err() {
        assert!(same_bits(&weights, &kept) && same_bits(&bias, &vec![E::Param::sentinel(); outputs]));
    }
}
