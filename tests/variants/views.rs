//! Tensors that do not lie dense: every pass gives the bits of the dense tensor that the view stands for, and touches nothing
//! else. Where the elements lie is worked out here once more, element by element.

use batchnorm::{
    Activation, Affine, BatchNorm, Cotangents, Error, GradientSums, Gradients, Layout, Moments, Parallelism,
};
use batchnorm::{Population, Real, SecondGradients, Shape, View};

use crate::common::{Bits, Data, assert_bits, plan, tiers};
use crate::{Cell, EPS};

/// A tensor in memory: where each element of the dense one lies, and what else belongs to it, which becomes zero.
struct Place {
    len: usize,
    elements: Vec<usize>,
    zeros: Vec<usize>,
}

const GUARD: f64 = 7.0;

impl Place {
    fn put<E: Bits>(&self, dense: &[E]) -> Vec<E>
    where
        E::Param: Bits,
    {
        let mut memory = vec![E::from_param(E::Param::from_f64(GUARD)); self.len];
        self.elements.iter().zip(dense).for_each(|(&at, &value)| memory[at] = value);
        memory
    }

    fn blank<E: Bits>(&self) -> Vec<E>
    where
        E::Param: Bits,
    {
        self.put(&[])
    }

    /// What a pass must have written.
    fn assert<E: Bits>(&self, what: &str, got: &[E], dense: &[E])
    where
        E::Param: Bits,
    {
        let mut expected = self.put(dense);
        self.zeros.iter().for_each(|&at| expected[at] = E::default());
        assert_bits(what, got, &expected);
    }
}

/// Every pass of `bn` against the same of a plan for dense tensors.
fn check<E: Bits>(dense: &BatchNorm<E>, bn: &BatchNorm<E>, x_at: &Place, y_at: &Place)
where
    E::Param: Bits,
{
    let (len, c) = (dense.shape().len(), dense.shape().channels());
    let [x, dy, residual, v] = [1, 2, 3, 4].map(|seed| Data::Normal.fill::<E>(len, seed));
    let [gamma, beta, mean] = [5, 6, 7].map(|seed| Data::Normal.fill::<E::Param>(c, seed));
    let var: Vec<E::Param> = mean.iter().map(|&mean| mean * mean).collect();
    let population = Population { mean: &mean, var: &var };
    let (x_there, dy_there, residual_there) = (x_at.put(&x), y_at.put(&dy), y_at.put(&residual));
    let blank = || vec![E::default(); len];
    let zeros = || vec![E::Param::from_f64(0.0); c];
    let plain = Affine::new(&gamma, &beta);
    let bent = plain.with_activation(Activation::Relu);
    for (here, there) in [(plain, plain), (bent.with_residual(&residual), bent.with_residual(&residual_there))] {
        let (mut saved, mut saved_there) = (dense.saved(), bn.saved());
        let (mut y, mut y_there) = (blank(), y_at.blank());
        dense.forward_train(&x, here, &mut y, &mut saved).unwrap();
        bn.forward_train(&x_there, there, &mut y_there, &mut saved_there).unwrap();
        assert_eq!(saved_there, saved);
        y_at.assert("y", &y_there, &y);
        let kept = y_there.clone();
        let bits = || vec![0xa5; dense.gates_len()];
        let (mut gates, mut gates_there) = (bits(), bits());
        dense.forward_train(&x, here.with_gates_to(&mut gates), &mut y, &mut saved).unwrap();
        bn.forward_train(&x_there, there.with_gates_to(&mut gates_there), &mut y_there, &mut saved_there).unwrap();
        assert_eq!(gates_there, gates);
        dense.forward_infer(&x, here, population, &mut y).unwrap();
        bn.forward_infer(&x_there, there, population, &mut y_there).unwrap();
        y_at.assert("inferred", &y_there, &y);

        for there in [there, there.with_output(&kept), there.with_gates(&gates)] {
            let (mut dx, mut dgamma, mut dbeta, mut dz) = (blank(), zeros(), zeros(), blank());
            let (mut dx_there, mut dgamma_there, mut dbeta_there) = (x_at.blank(), zeros(), zeros());
            let mut dz_there = y_at.blank();
            let all = |dx, dgamma, dbeta, dz| Gradients {
                dx: Some(dx),
                dgamma: Some(dgamma),
                dbeta: Some(dbeta),
                dresidual: Some(dz),
            };
            let gradients = all(&mut dx, &mut dgamma, &mut dbeta, &mut dz);
            // f16 outputs may round to zero, so the sign is taken where the other takes it.
            let output = E::DIGITS < 20 && there.output.is_some();
            let rounded: Vec<E> = y_at.elements.iter().map(|&at| kept[at]).collect();
            let here = if output { here.with_output(&rounded) } else { here };
            dense.backward(&x, &dy, &saved, here, gradients).unwrap();
            let gradients = all(&mut dx_there, &mut dgamma_there, &mut dbeta_there, &mut dz_there);
            bn.backward(&x_there, &dy_there, &saved, there, gradients).unwrap();
            x_at.assert("dx", &dx_there, &dx);
            y_at.assert("dresidual", &dz_there, &dz);
            assert_bits("dgamma", &dgamma_there, &dgamma);
            assert_bits("dbeta", &dbeta_there, &dbeta);
        }
    }
    let mut saved = dense.saved();
    dense.forward_train(&x, plain, &mut blank(), &mut saved).unwrap();
    let (mut moments, mut moments_there) = (vec![Moments::default(); c], vec![Moments::default(); c]);
    dense.moments(&x, &mut moments).unwrap();
    bn.moments(&x_there, &mut moments_there).unwrap();
    assert_eq!(moments_there, moments);
    let (mut sums, mut sums_there) = (vec![GradientSums::default(); c], vec![GradientSums::default(); c]);
    dense.gradient_sums(&x, &dy, &saved, plain, &mut sums).unwrap();
    bn.gradient_sums(&x_there, &dy_there, &saved, plain, &mut sums_there).unwrap();
    assert_eq!(sums_there, sums);

    let (mut of_x, mut of_x_there, v_there) = (blank(), x_at.blank(), x_at.put(&v));
    let cotangents = |dx| Cotangents { dx, dgamma: Some(&beta[..]), dbeta: None };
    let gradients = SecondGradients { x: Some(&mut of_x), ..Default::default() };
    dense.double_backward(&x, &dy, &saved, plain, cotangents(&v), gradients).unwrap();
    let gradients = SecondGradients { x: Some(&mut of_x_there), ..Default::default() };
    bn.double_backward(&x_there, &dy_there, &saved, plain, cotangents(&v_there), gradients).unwrap();
    x_at.assert("of x", &of_x_there, &of_x);
}

/// The passes that write one tensor over another.
fn check_in_place<E: Bits>(dense: &BatchNorm<E>, bn: &BatchNorm<E>, at: &Place)
where
    E::Param: Bits,
{
    let len = dense.shape().len();
    let [x, dy] = [1, 2].map(|seed| Data::Normal.fill::<E>(len, seed));
    let (mut saved, mut y, mut dx) = (dense.saved(), x.clone(), dy.clone());
    let (mut y_there, mut dx_there) = (at.put(&x), at.put(&dy));
    let x_there = y_there.clone();
    dense.forward_train_in_place(&mut y, Affine::none(), &mut saved).unwrap();
    bn.forward_train_in_place(&mut y_there, Affine::none(), &mut saved).unwrap();
    at.assert("y in place", &y_there, &y);
    dense.backward_in_place(&x, &mut dx, &saved, Affine::none(), Gradients::default()).unwrap();
    bn.backward_in_place(&x_there, &mut dx_there, &saved, Affine::none(), Gradients::default()).unwrap();
    at.assert("dx in place", &dx_there, &dx);
}

/// The sizes of a shape in the order of its letters, the spatial ones made of two.
fn sizes(shape: &Shape) -> Vec<usize> {
    let (n, c, s) = (shape.batch(), shape.channels(), shape.spatial());
    let h = (1..=s).filter(|h| s.is_multiple_of(*h) && h * h <= s).max().unwrap_or(1);
    match shape.layout() {
        _ if s == 1 => vec![n, c],
        Layout::ChannelsFirst => vec![n, c, h, s / h],
        Layout::ChannelsLast => vec![n, h, s / h, c],
    }
}

/// Strides with `gap` elements more than dense ones in every dimension but the last, whose elements lie `step` apart.
fn strides(sizes: &[usize], gap: usize, step: usize) -> Vec<usize> {
    let mut strides = vec![step; sizes.len()];
    for k in (1..sizes.len()).rev() {
        strides[k - 1] = strides[k] * sizes[k] + gap;
    }
    strides
}

fn place_of(sizes: &[usize], strides: &[usize], len: usize) -> Place {
    let at = |mut i: usize| {
        let mut at = 0;
        for (size, stride) in sizes.iter().zip(strides).rev() {
            at += i % size * stride;
            i /= size;
        }
        at
    };
    Place { len, elements: (0..sizes.iter().product()).map(at).collect(), zeros: vec![] }
}

pub fn strided<E: Bits>(cell: Cell)
where
    E::Param: Bits,
{
    let shape = &cell.shape;
    let sizes = sizes(shape);
    let dense = cell.plan::<E>();
    let view = |gap, step| {
        let strides = strides(&sizes, gap, step);
        let view = View::strided(shape, &sizes, &strides).unwrap();
        // Longer than it need be.
        let place = place_of(&sizes, &strides, view.len() + gap);
        assert_eq!(place.elements.iter().max(), Some(&(view.len() - 1)));
        (view, place)
    };
    let ((x, x_at), (y, y_at)) = (view(3, 1), view(0, 1));
    assert_eq!(y, View::dense(shape));
    check(&dense, &dense.clone().with_views(x.clone(), y).unwrap(), &x_at, &y_at);
    let (y, y_at) = view(11, 2);
    check(&dense, &dense.clone().with_views(x.clone(), y).unwrap(), &x_at, &y_at);
    check_in_place(&dense, &dense.clone().with_views(x.clone(), x).unwrap(), &x_at);
}

pub fn blocked<E: Bits>(cell: Cell)
where
    E::Param: Bits,
{
    let (n, c, s) = (cell.shape.batch(), cell.shape.channels(), cell.shape.spatial());
    let shape = Shape::new(Layout::ChannelsFirst, n, c, &[s]).unwrap();
    let rows = Shape::new(Layout::ChannelsLast, n, c, &[s]).unwrap();
    let dense = plan::<E>(rows, cell.tier, Parallelism::Threads(2)).with_eps(EPS).unwrap();
    let place = |block: usize| {
        let blocks = c.div_ceil(block);
        let at =
            |position: usize, c: usize| ((position / s * blocks + c / block) * s + position % s) * block + c % block;
        let of = |channels: std::ops::Range<usize>| -> Vec<usize> {
            (0..n * s).flat_map(|position| channels.clone().map(move |c| at(position, c))).collect()
        };
        Place { len: n * blocks * s * block, elements: of(0..c), zeros: of(c..blocks * block) }
    };
    for (of_x, of_y) in [(8, 16), (16, 16), (5, 5)] {
        let views = [of_x, of_y].map(|block| View::blocked(&shape, block).unwrap());
        let (x_at, y_at) = (place(of_x), place(of_y));
        assert_eq!((views[0].len(), views[1].len()), (x_at.len, y_at.len));
        let [x, y] = views;
        let bn = plan::<E>(shape, cell.tier, Parallelism::Threads(2)).with_eps(EPS).unwrap().with_views(x, y).unwrap();
        check(&dense, &bn, &x_at, &y_at);
        if of_x == of_y {
            check_in_place(&dense, &bn, &x_at);
        }
    }
}

pub fn masked<E: Bits>(cell: Cell)
where
    E::Param: Bits,
{
    let shape = &cell.shape;
    let (n, c, s) = (shape.batch(), shape.channels(), shape.spatial());
    let at = |position: usize, c_of: usize| match shape.layout() {
        Layout::ChannelsFirst => (position / s * c + c_of) * s + position % s,
        Layout::ChannelsLast => position * c + c_of,
    };
    let lengths: Vec<usize> = (0..n).map(|i| (i * 7 + 3) % (s + 1)).collect();
    let by_length: Vec<bool> = (0..n * s).map(|i| i % s < lengths[i / s]).collect();
    let scattered: Vec<bool> = (0..n * s).map(|i| i * i % 7 != 2 && i % 5 != 0).collect();
    let bn = cell.plan::<E>();
    for (mask, by_length) in [(&by_length, true), (&scattered, false)] {
        let positions = |wanted: bool| -> Vec<usize> { (0..n * s).filter(|&i| mask[i] == wanted).collect() };
        let valid = positions(true);
        let logical = Shape::new(shape.layout(), 1, c, &[valid.len()]).unwrap();
        let elements = match shape.layout() {
            Layout::ChannelsFirst => (0..c).flat_map(|c| valid.iter().map(move |&p| at(p, c))).collect(),
            Layout::ChannelsLast => valid.iter().flat_map(|&p| (0..c).map(move |c| at(p, c))).collect(),
        };
        let zeros = positions(false).into_iter().flat_map(|p| (0..c).map(move |c| at(p, c))).collect();
        let place = Place { len: shape.len(), elements, zeros };
        let dense = plan::<E>(logical, cell.tier, Parallelism::Threads(2)).with_eps(EPS).unwrap();
        let masked = bn.with_mask(mask).unwrap();
        check(&dense, &masked, &place, &place);
        check_in_place(&dense, &masked, &place);
        if by_length {
            check(&dense, &bn.with_lengths(&lengths).unwrap(), &place, &place);
        }
    }
}

#[test]
fn views_that_do_not_fit_are_refused() {
    let shape = Shape::nchw(2, 3, 4, 5).unwrap();
    let refused =
        |sizes: &[usize], strides: &[usize]| matches!(View::strided(&shape, sizes, strides), Err(Error::View { .. }));
    let sizes = [2, 3, 4, 5];
    assert!(!refused(&sizes, &[60, 20, 5, 1]));
    assert!(!refused(&[2, 3, 20], &[60, 20, 1]));
    // Planes within each other's gaps are apart too.
    assert!(!refused(&sizes, &[60, 5, 15, 1]));
    for strides in [[60, 20, 5, 2], [60, 20, 4, 1], [59, 20, 5, 1], [0, 20, 5, 1], [usize::MAX, 20, 5, 1]] {
        assert!(refused(&sizes, &strides), "{strides:?}");
    }
    assert!(refused(&[2, 3, 5, 5], &[75, 25, 5, 1]));
    let error = View::strided(&shape, &[2, 3, 5, 5], &[75, 25, 5, 1]).unwrap_err().to_string();
    let parts = ["2 samples, 3 channels and 20 positions", "ChannelsFirst", "[2, 3, 5, 5]", "[75, 25, 5, 1]"];
    parts.iter().for_each(|part| assert!(error.contains(part), "`{error}` lacks `{part}`"));
    assert!(refused(&[3, 2, 4, 5], &[60, 20, 5, 1]));
    assert!(refused(&[2, 3], &[3, 1]) && refused(&[120], &[1]) && refused(&[2, 3, 20], &[60, 20, 5, 1]));
    let rows = Shape::nhwc(2, 4, 5, 3).unwrap();
    for (shape, block) in [(&shape, 0), (&rows, 8), (&shape, usize::MAX)] {
        assert!(matches!(View::blocked(shape, block), Err(Error::View { .. })), "{block}");
    }

    let bn = || BatchNorm::<f32>::new(shape).unwrap();
    let (dense, blocked) = (View::dense(&shape), View::blocked(&shape, 8).unwrap());
    let refused = |x: &View, y: &View| matches!(bn().with_views(x.clone(), y.clone()), Err(Error::View { .. }));
    assert!(refused(&dense, &blocked) && refused(&View::dense(&rows), &View::dense(&rows)));
    assert!(bn().with_lengths(&[20]).is_err() && bn().with_lengths(&[20, 21]).is_err());
    assert!(bn().with_mask(&[true; 39]).is_err());

    // Slices may be longer, not shorter; a tensor and what is written over it lie alike.
    let wide = View::strided(&shape, &sizes, &[100, 30, 6, 1]).unwrap();
    assert_eq!(wide.len(), 100 + 60 + 18 + 5);
    let bn = bn().with_views(wide, dense).unwrap();
    let population = Population { mean: &[0.0; 3], var: &[1.0; 3] };
    let (x, mut y) = ([0.0f32; 183], [7.0f32; 121]);
    let short = Err(Error::Length { what: "x", expected: 183, got: 182 });
    assert_eq!(bn.forward_infer(&x[1..], Affine::none(), population, &mut y), short);
    let short = Err(Error::Length { what: "y", expected: 120, got: 119 });
    assert_eq!(bn.forward_infer(&x, Affine::none(), population, &mut y[..119]), short);
    let in_place = bn.forward_infer_in_place(&mut x.clone(), Affine::none(), population);
    assert!(matches!(in_place, Err(Error::View { .. })));
    assert!(matches!(bn.clone().ghost(1), Err(Error::View { .. })));
    assert!(matches!(bn.with_lengths(&[1, 1]), Err(Error::View { .. })));
    assert!(matches!(bn.with_mask(&[true; 40]), Err(Error::View { .. })));
    assert!(matches!(bn.clone().with_views(View::dense(&shape), View::dense(&shape)), Err(Error::View { .. })));
    assert_eq!(y, [7.0; 121]);
    bn.forward_infer(&x, Affine::none(), population, &mut y).unwrap();
    assert_eq!((y[119], y[120]), (0.0, 7.0));
}

#[test]
fn blocks_of_an_empty_tensor_are_left_alone() {
    for shape in [Shape::nchw(0, 3, 2, 2), Shape::nchw(2, 3, 0, 2)].map(Result::unwrap) {
        let view = View::blocked(&shape, 8).unwrap();
        assert!(view.is_empty());
        let bn = BatchNorm::<f32>::new(shape).unwrap().with_views(view.clone(), view).unwrap();
        let population = Population { mean: &[0.0; 3], var: &[1.0; 3] };
        let mut y = [7.0; 2];
        bn.forward_infer(&[1.0; 2], Affine::none(), population, &mut y).unwrap();
        assert_eq!(y, [7.0; 2]);
    }
}

#[test]
fn a_mask_that_hides_all_leaves_zeros() {
    let bn = BatchNorm::<f32>::new(Shape::ncl(2, 3, 4).unwrap()).unwrap().with_lengths(&[0, 0]).unwrap();
    let (x, mut y, mut saved) = ([1.0; 24], [7.0; 24], bn.saved());
    let refused = bn.forward_train(&x, Affine::none(), &mut y, &mut saved);
    assert!(matches!(refused, Err(Error::EmptyBatch { .. })));
    assert_eq!(y, [7.0; 24]);
    bn.forward_infer(&x, Affine::none(), Population { mean: &[0.0; 3], var: &[1.0; 3] }, &mut y).unwrap();
    assert_eq!(y, [0.0; 24]);
    // A shard without values in a batch that has some.
    bn.freeze(Population { mean: &[0.0; 3], var: &[1.0; 3] }, &mut saved).unwrap();
    let mut dresidual = [7.0; 24];
    bn.residual_gradient(&x, &x, &saved, Affine::none(), &mut dresidual).unwrap();
    assert_eq!(dresidual, [0.0; 24]);
}

/// Packed stretches that begin where neither vectors nor, in the last one, rows do.
#[test]
fn long_tensors_are_packed_in_many_stretches() {
    for tier in tiers() {
        for shape in [Shape::nhwc(1, 3, 6, 2051), Shape::nhwc(1, 90, 70, 7), Shape::nchw(3, 13, 37, 29)] {
            let cell = Cell { shape: shape.unwrap(), tier };
            strided::<f32>(cell);
            strided::<f64>(cell);
        }
    }
}
