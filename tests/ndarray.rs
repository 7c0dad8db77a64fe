//! Arrays: every pass gives the bits of the slice that holds the array's elements in the order of its memory, and writes
//! nothing between them. That order, and the layout, are worked out here once more, from how the array was made.

mod common;

use std::fmt::Debug;

use batchnorm::{Activation, Affine, ArrayGradients, Arrays, BatchNorm, Error, Gradients, Layout, Momentum};
use batchnorm::{Parallelism, Population, Real, Shape, Tier, Variance};
use common::{Bits, Data, assert_bits};
use ndarray::Slice;
use ndarray::prelude::*;
use proptest::prelude::*;

/// A part of an axis: elements before it, between its elements, and after it.
type Cut = (usize, usize, usize);

/// How an array lies within a larger one.
#[derive(Debug, Clone)]
struct Lie {
    sizes: Vec<usize>,
    /// The axes from the outermost in memory to the innermost, and the cut of each.
    memory: Vec<usize>,
    cuts: Vec<Cut>,
}

impl Lie {
    fn dense(sizes: &[usize]) -> Self {
        Self { sizes: sizes.to_vec(), memory: (0..sizes.len()).collect(), cuts: vec![(0, 1, 0); sizes.len()] }
    }

    /// The larger array, in the order of memory.
    fn whole<E: Bits>(&self) -> ArrayD<E>
    where
        E::Param: Bits,
    {
        let sizes = self.memory.iter().zip(&self.cuts).map(|(&axis, &(before, step, after))| {
            before + self.sizes[axis].saturating_sub(1) * step + self.sizes[axis].min(1) + after
        });
        ArrayD::from_elem(sizes.collect::<Vec<_>>(), E::from_param(E::Param::from_f64(7.0)))
    }

    fn slice(&self, at: usize) -> Slice {
        let (before, step, _) = self.cuts[at];
        let size = self.sizes[self.memory[at]];
        Slice::new(
            before as isize,
            Some((before + size.saturating_sub(1) * step + size.min(1)) as isize),
            step as isize,
        )
    }

    /// Where each axis is in memory.
    fn places(&self) -> Vec<usize> {
        (0..self.sizes.len()).map(|axis| self.memory.iter().position(|&a| a == axis).unwrap()).collect()
    }

    fn view<'a, E>(&self, whole: &'a ArrayD<E>) -> ArrayViewD<'a, E> {
        whole.slice_each_axis(|axis| self.slice(axis.axis.index())).permuted_axes(self.places())
    }

    fn view_mut<'a, E>(&self, whole: &'a mut ArrayD<E>) -> ArrayViewMutD<'a, E> {
        whole.slice_each_axis_mut(|axis| self.slice(axis.axis.index())).permuted_axes(self.places())
    }

    /// The larger array around elements in the order of `axes`.
    fn put<E: Bits>(&self, axes: &[usize], values: &[E]) -> ArrayD<E>
    where
        E::Param: Bits,
    {
        let mut whole = self.whole();
        let view = self.view_mut(&mut whole).permuted_axes(axes.to_vec());
        view.into_iter().zip(values).for_each(|(to, &value)| *to = value);
        whole
    }

    /// What lies from the first element to the last.
    fn slice_of<'a, E>(&self, whole: &'a ArrayD<E>) -> &'a [E] {
        let (mut first, mut last) = (0, 0);
        for ((&stride, &(before, step, _)), &axis) in whole.strides().iter().zip(&self.cuts).zip(&self.memory) {
            first += stride as usize * before;
            last += stride as usize * (before + (self.sizes[axis] - 1) * step);
        }
        &whole.as_slice().unwrap()[first..=last]
    }

    /// The layout of the memory, its axes in the order of the layout's letters, and their shape.
    fn order(&self, channels: usize) -> (Shape, Vec<usize>) {
        let (long, short): (Vec<usize>, _) = self.memory.iter().partition(|&&a| self.sizes[a] != 1 && a != channels);
        let place = |axis: usize| self.places()[axis];
        let outside = long.iter().filter(|&&axis| place(axis) < place(channels)).count();
        let last = outside == long.len();
        let short = short.into_iter().filter(|&axis| axis != channels);
        let (mut axes, batch) = match outside {
            0 => (long.clone(), 1),
            _ => (long.clone(), self.sizes[long[0]]),
        };
        axes.insert(if last { long.len() } else { outside.min(1) }, channels);
        axes.extend(short);
        let layout = if last { Layout::ChannelsLast } else { Layout::ChannelsFirst };
        let spatial = long.iter().skip(outside.min(1)).map(|&axis| self.sizes[axis]).collect::<Vec<_>>();
        (Shape::new(layout, batch, self.sizes[channels], &spatial).unwrap(), axes)
    }
}

/// Every pass over arrays that lie like `x` and `y` against the same over dense slices.
fn check<E: Bits + Debug>(x_lie: &Lie, y_lie: &Lie, channels: usize)
where
    E::Param: Bits,
{
    let (shape, axes) = x_lie.order(channels);
    let (len, c) = (shape.len(), shape.channels());
    let [x, dy, residual] = [1, 2, 3].map(|seed| Data::Normal.fill::<E>(len, seed));
    let [gamma, beta, mean] = [4, 5, 6].map(|seed| Data::Normal.fill::<E::Param>(c, seed));
    let var: Vec<E::Param> = mean.iter().map(|&mean| mean * mean).collect();
    let population = Population { mean: &mean, var: &var };
    let zeros = || vec![E::Param::from_f64(0.0); c];
    let whole = |lie: &Lie, values: &[E]| lie.put(&axes, values);
    let (x_whole, dy_whole, residual_whole) = (whole(x_lie, &x), whole(y_lie, &dy), whole(y_lie, &residual));
    let (x_there, dy_there) = (x_lie.view(&x_whole), y_lie.view(&dy_whole));
    let residual_there = y_lie.slice_of(&residual_whole);
    let assert = |what: &str, lie: &Lie, got: &ArrayD<E>, dense: &[E]| {
        assert_bits(what, got.as_slice().unwrap(), whole(lie, dense).as_slice().unwrap());
    };

    let dense = BatchNorm::<E>::new(shape).unwrap().with_eps(1e-3).unwrap();
    let arrays = Arrays::new(&x_there, &dy_there, Axis(channels)).unwrap();
    let arrays = arrays.with_options(|plan| plan.with_eps(1e-3)).unwrap();
    // One channel lies in either layout.
    assert!(c == 1 || arrays.plan().shape().layout() == shape.layout());
    assert_eq!((arrays.plan().shape().count(), arrays.plan().shape().channels()), (shape.count(), c));

    let plain = Affine::new(&gamma, &beta);
    let bent = plain.with_activation(Activation::Relu);
    for (here, there) in [(plain, plain), (bent.with_residual(&residual), bent.with_residual(residual_there))] {
        let (mut saved, mut saved_there) = (dense.saved(), arrays.plan().saved());
        let (mut y, mut y_whole) = (vec![E::default(); len], y_lie.whole());
        dense.forward_train(&x, here, &mut y, &mut saved).unwrap();
        arrays.forward_train(&x_there, there, &mut y_lie.view_mut(&mut y_whole), &mut saved_there).unwrap();
        assert("y", y_lie, &y_whole, &y);
        assert_eq!(saved_there, saved);
        dense.forward_infer(&x, here, population, &mut y).unwrap();
        arrays.forward_infer(&x_there, there, population, &mut y_lie.view_mut(&mut y_whole)).unwrap();
        assert("inferred", y_lie, &y_whole, &y);

        let (mut dx, mut dz) = (y.clone(), y.clone());
        let [mut dgamma, mut dbeta, mut dgamma_there, mut dbeta_there] = [(); 4].map(|_| zeros());
        let (mut dx_whole, mut dz_whole) = (x_lie.whole(), y_lie.whole());
        let gradients = Gradients {
            dx: Some(&mut dx),
            dgamma: Some(&mut dgamma),
            dbeta: Some(&mut dbeta),
            dresidual: Some(&mut dz),
        };
        dense.backward(&x, &dy, &saved, here, gradients).unwrap();
        let gradients = ArrayGradients {
            dx: Some(&mut x_lie.view_mut(&mut dx_whole)),
            dgamma: Some(&mut dgamma_there),
            dbeta: Some(&mut dbeta_there),
            dresidual: Some(&mut y_lie.view_mut(&mut dz_whole)),
        };
        arrays.backward(&x_there, &dy_there, &saved, there, gradients).unwrap();
        assert("dx", x_lie, &dx_whole, &dx);
        assert("dresidual", y_lie, &dz_whole, &dz);
        assert_bits("dgamma", &dgamma_there, &dgamma);
        assert_bits("dbeta", &dbeta_there, &dbeta);
    }
}

fn check_all(x: &Lie, y: &Lie, channels: usize) {
    check::<f32>(x, y, channels);
    check::<f64>(x, y, channels);
    #[cfg(feature = "half")]
    {
        check::<half::bf16>(x, y, channels);
        check::<half::f16>(x, y, channels);
    }
}

/// Ways to cut an axis and to turn memory, and sizes to fit.
fn lie(sizes: Vec<usize>) -> impl Strategy<Value = Lie> {
    let axes = sizes.len();
    let cut = prop_oneof![3 => Just((0, 1, 0)), 2 => (0..4usize, 1..4usize, 0..4usize)];
    let memory = prop_oneof![Just((0..axes).collect::<Vec<_>>()), Just((0..axes).collect::<Vec<_>>()).prop_shuffle()];
    (memory, prop::collection::vec(cut, axes)).prop_map(move |(memory, cuts)| Lie {
        sizes: sizes.clone(),
        memory,
        cuts,
    })
}

fn case() -> impl Strategy<Value = (Lie, Lie, usize)> {
    let size = prop_oneof![3 => 1..6usize, 1 => Just(1), 1 => 15..20usize];
    prop::collection::vec(size, 2..=5)
        .prop_filter("more than a quick case", |sizes| sizes.iter().product::<usize>() <= 40_000)
        .prop_flat_map(|sizes| (lie(sizes.clone()), lie(sizes.clone()), 0..sizes.len()))
        // A batch of one that has no axis takes the place of one.
        .prop_filter("room for a batch", |(x, _, channels)| {
            x.order(*channels).0.batch() > 1 || x.sizes.iter().filter(|&&size| size > 1).count() < 5
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_slicing_has_the_bits_of_a_dense_copy((x, y, channels) in case()) {
        check_all(&x, &y, channels);
    }
}

#[test]
fn dense_arrays_need_no_views() {
    let (n, c) = (3, 5);
    let of =
        |letters: &str| -> Vec<usize> { letters.chars().map(|l| [n, c, 2, 7, 6]["ncdhw".find(l).unwrap()]).collect() };
    for letters in ["nc", "nch", "nhc", "nchw", "nhwc", "ncdhw", "ndhwc"] {
        let (lie, channels) = (Lie::dense(&of(letters)), letters.find('c').unwrap());
        check_all(&lie, &lie, channels);
        let x = lie.whole::<f32>();
        // Virtual batches are of dense tensors alone.
        assert!(Arrays::new(&x, &x, Axis(channels)).unwrap().plan().clone().ghost(2).is_ok(), "{letters}");
        let view = x.t();
        assert!(Arrays::new(&view, &view, Axis(letters.len() - 1 - channels)).unwrap().plan().clone().ghost(2).is_ok());
    }
}

#[test]
fn crops_and_slices_of_channels() {
    let whole = Lie::dense(&[4, 6, 9, 10]);
    let crop = Lie { cuts: vec![(0, 1, 0), (0, 1, 0), (1, 1, 2), (3, 1, 1)], ..whole.clone() };
    let channels = Lie { cuts: vec![(0, 1, 0), (2, 1, 3), (0, 1, 0), (0, 1, 0)], ..whole.clone() };
    let steps = Lie { cuts: vec![(1, 2, 0), (0, 3, 1), (0, 2, 0), (1, 2, 1)], ..whole.clone() };
    for lie in [&crop, &channels, &steps] {
        for channel in [1, 3] {
            check_all(lie, &whole, channel);
            check_all(&whole, lie, channel);
        }
    }
    // Large enough for threads and for the batches of a fused pass.
    let whole = Lie::dense(&[8, 24, 64, 56]);
    let crop = Lie { cuts: vec![(0, 1, 1), (3, 1, 0), (2, 1, 2), (4, 1, 4)], ..whole.clone() };
    common::in_pool(2, || {
        check::<f32>(&crop, &whole, 1);
        check::<f32>(&crop, &crop, 1);
        check::<f32>(&crop, &whole, 3);
    });
}

/// Elements of two arrays that lie between each other's.
#[test]
fn channels_by_turns() {
    let mut whole = Array3::from_shape_fn((7, 8, 11), |(n, c, l)| (n * 31 + c * 17 + l * 7) as f32 % 19.0);
    let x = whole.slice(s![.., 0..;2, ..]).to_owned();
    let (odd, mut y) = (whole.slice(s![.., 1..;2, ..]).to_owned(), Array3::zeros(x.raw_dim()));
    let bn = Arrays::new(&x, &y, Axis(1)).unwrap();
    let (mut saved, mut saved_there) = (bn.plan().saved(), bn.plan().saved());
    bn.forward_train(&x, Affine::none(), &mut y, &mut saved).unwrap();
    assert_ne!(y, odd);

    let (x_there, mut y_there) = whole.multi_slice_mut((s![.., 0..;2, ..], s![.., 1..;2, ..]));
    let bn = Arrays::new(&x_there, &y_there, Axis(1)).unwrap();
    bn.forward_train(&x_there, Affine::none(), &mut y_there, &mut saved_there).unwrap();
    assert_eq!(y_there, y);
    assert_eq!((x_there, saved_there), (x.clone().view_mut(), saved));
}

#[test]
fn options_stay_with_the_arrays() {
    let x = Array4::<f32>::zeros((2, 3, 4, 5));
    let of = || Arrays::new(&x, &x, Axis(1)).unwrap();
    let bn = of().with_options(|plan| plan.with_tier(Tier::Portable)?.with_accumulation(true).with_eps(0.5)).unwrap();
    assert_eq!((bn.plan().tier(), bn.plan().eps()), (Tier::Portable, 0.5));
    let bn = bn.with_options(|plan| Ok(plan.with_parallelism(Parallelism::Sequential))).unwrap();
    assert_eq!(bn.plan().eps(), 0.5);
    assert!(bn.plan().running(Momentum::Cumulative, Variance::Biased).is_ok());
    assert!(matches!(of().with_options(|plan| plan.with_eps(-1.0)), Err(Error::Eps { .. })));
    // For another batch, the options stay.
    let two = Arrays::new(&x, &x, Axis(1)).unwrap().with_options(|plan| plan.with_eps(0.5)).unwrap();
    let one = x.slice(s![1.., .., .., ..]);
    let one = two.with_arrays(&one, &one).unwrap();
    assert_eq!((one.plan().eps(), one.plan().shape().batch(), one.plan().shape().channels()), (0.5, 1, 3));
    let other = Shape::nchw(2, 3, 5, 5).unwrap();
    assert!(matches!(of().with_options(|plan| plan.with_shape(other)), Err(Error::View { .. })));
    assert!(matches!(of().with_options(|plan| plan.with_mask(&[true; 40])), Err(Error::View { .. })));
}

#[test]
fn arrays_without_elements() {
    for sizes in [(0, 3, 4), (2, 3, 0)] {
        let mut y = Array3::<f32>::zeros(sizes);
        let x = y.clone();
        let bn = Arrays::new(&x, &y, Axis(1)).unwrap();
        let refused = Err(Error::EmptyBatch { batch: sizes.0, spatial: sizes.2 });
        assert_eq!(bn.forward_train(&x, Affine::none(), &mut y, &mut bn.plan().saved()), refused);
        bn.forward_infer(&x, Affine::none(), Population { mean: &[0.0; 3], var: &[1.0; 3] }, &mut y).unwrap();
    }
    let x = Array3::<f32>::zeros((2, 0, 4));
    assert_eq!(Arrays::new(&x, &x, Axis(1)).unwrap_err(), Error::ZeroChannels);
}

#[test]
fn what_has_no_place_of_its_own_is_refused() {
    fn refused<D: Dimension>(x: &ndarray::ArrayRef<f32, D>, channels: usize) -> &'static str {
        match Arrays::new(x, x, Axis(channels)) {
            Err(Error::Array { reason }) => reason,
            Err(Error::Axes { axes, channels: got }) if axes == x.ndim() && got == channels => "axes",
            other => panic!("{other:?}"),
        }
    }
    let x = Array4::<f32>::zeros((2, 3, 4, 5));
    assert!(refused(&x.slice(s![.., .., ..;-1, ..]), 1).contains("reversed"));
    assert!(refused(&x.slice(s![.., ..;-2, .., ..]), 1).contains("reversed"));
    let row = Array1::<f32>::zeros(3);
    assert!(refused(&row.broadcast((4, 3)).unwrap(), 1).contains("broadcast"));
    let windows = ndarray::ArrayView::from_shape((3, 4).strides((1, 1)), &[0.0; 6]).unwrap();
    assert!(refused(&windows, 1).contains("share a place"));
    assert_eq!([refused(&row, 0), refused(&x, 4)], ["axes"; 2]);
    let six = Array::<f32, _>::zeros((2, 2, 2, 2, 2, 2));
    (0..6).for_each(|channels| assert_eq!(refused(&six, channels), "axes"));
    // Axes of one element do not count: five others at most, or four where the channels come first in memory.
    assert!(
        Arrays::new(&six.slice(s![.., .., .., .., .., ..1]), &six.slice(s![.., .., .., .., .., ..1]), Axis(1)).is_ok()
    );
    let five = Array::<f32, _>::zeros((2, 2, 2, 2, 2));
    assert!(Arrays::new(&five, &five, Axis(1)).is_ok() && Arrays::new(&five, &five, Axis(4)).is_ok());
    assert_eq!(refused(&five, 0), "axes");
    // A reversed axis of one element is none.
    assert!(Arrays::new(&x.slice(s![..1;-1, .., .., ..]), &x.slice(s![..1, .., .., ..]), Axis(1)).is_ok());
    let mut one = Array2::<f32>::zeros((3, 1));
    one.invert_axis(Axis(1));
    assert!(one.strides()[1] < 0 && Arrays::new(&one, &one, Axis(1)).is_ok());
}

/// Each array of each call, of other sizes and of other strides; and nothing is written.
#[test]
fn arrays_of_another_plan_are_refused() {
    let dense = Array2::<f32>::from_elem((4, 3), 5.0);
    let (more, wide) = (Array2::<f32>::zeros((5, 3)), Array2::<f32>::zeros((4, 6)));
    let (fortran, cut) = (Array2::<f32>::zeros((3, 4)), wide.slice(s![.., ..3]));
    let bn = Arrays::new(&dense, &dense, Axis(1)).unwrap();
    let population = Population { mean: &[0.0; 3], var: &[1.0; 3] };
    let mut saved = bn.plan().saved();
    bn.forward_train(&dense, Affine::none(), &mut dense.clone(), &mut saved).unwrap();
    for (bad, is_size) in [(more.view(), true), (cut, false), (fortran.t(), false)] {
        let expected = |what| match is_size {
            true => Error::Sizes { what, expected: vec![4, 3], got: vec![5, 3] },
            false => Error::Strides { what, expected: vec![3, 1], got: bad.strides().to_vec() },
        };
        let mut y = dense.clone();
        let mut written = more.clone();
        let mut cut_written = wide.clone();
        let mut fortran_written = fortran.clone();
        let mut out = match (is_size, bad.strides()[1]) {
            (true, _) => written.view_mut(),
            (false, 1) => cut_written.slice_mut(s![.., ..3]),
            _ => fortran_written.view_mut().reversed_axes(),
        };
        let before = saved.clone();
        let none = Affine::none;
        assert_eq!(bn.forward_train(&bad, none(), &mut y, &mut saved).unwrap_err(), expected("x"));
        assert_eq!(bn.forward_train(&dense, none(), &mut out, &mut saved).unwrap_err(), expected("y"));
        assert_eq!(bn.forward_infer(&bad, none(), population, &mut y).unwrap_err(), expected("x"));
        assert_eq!(bn.forward_infer(&dense, none(), population, &mut out).unwrap_err(), expected("y"));
        let no = ArrayGradients::default;
        assert_eq!(bn.backward(&bad, &dense, &saved, none(), no()).unwrap_err(), expected("x"));
        assert_eq!(bn.backward(&dense, &bad, &saved, none(), no()).unwrap_err(), expected("dy"));
        let dx = ArrayGradients { dx: Some(&mut out), ..no() };
        assert_eq!(bn.backward(&dense, &dense, &saved, none(), dx).unwrap_err(), expected("dx"));
        let dz = ArrayGradients { dresidual: Some(&mut out), ..no() };
        assert_eq!(bn.backward(&dense, &dense, &saved, none(), dz).unwrap_err(), expected("dresidual"));
        assert!(out.iter().all(|&value| value == 0.0));
        assert_eq!((y, &saved), (dense.clone(), &before));
    }
    let refused = Error::Sizes { what: "y", expected: vec![4, 3], got: vec![5, 3] };
    assert_eq!(Arrays::new(&dense, &more, Axis(1)).unwrap_err(), refused);
    // What a plan for slices refuses too.
    let gamma = Affine::scale(&[1.0; 2]);
    let refused = Err(common::length("gamma", 3, 2));
    assert_eq!(bn.forward_infer(&dense, gamma, population, &mut dense.clone()), refused);
}

#[test]
fn the_stride_of_an_axis_of_length_one_does_not_matter() {
    let x = Array4::<f32>::ones((4, 3, 1, 5));
    let mut y = ndarray::Array3::<f32>::zeros((4, 3, 5)).insert_axis(Axis(2));
    assert_ne!(x.strides(), y.strides());
    let bn = Arrays::new(&x, &x, Axis(1)).unwrap();
    bn.forward_train(&x, Affine::none(), &mut y, &mut bn.plan().saved()).unwrap();
}
