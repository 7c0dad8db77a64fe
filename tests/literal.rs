//! Small cases worked by hand: the numbers below were not made by this crate.

mod common;

use batchnorm::{Affine, BatchNorm, Element, GradientSums, Gradients, Moments, Population, Real, Saved, Shape};
use common::{Bits, assert_bits};

// Two channels of four values in two samples of two positions. With `eps` = 1/2, by hand:
//
//   channel 0: 1, 2, 3, 6          mean 3    deviations -2, -1, 0, 3   m2 14  var 3.5   inv_std 1/sqrt(4)  = 1/2
//   channel 1: 95, 99, 100, 106    mean 100  deviations -5, -1, 0, 6   m2 62  var 15.5  inv_std 1/sqrt(16) = 1/4
//   xhat 0: -1, -0.5, 0, 1.5           y = 2*xhat + 10:    8, 9, 10, 13
//   xhat 1: -1.25, -0.25, 0, 1.5       y = -4*xhat + 0.5:  5.5, 1.5, 0.5, -5.5
//   dy 0: 1, 0, 0, 1     dbeta 2   dgamma -1 + 1.5 = 0.5
//   dy 1: 2, -2, 4, 0    dbeta 4   dgamma -2.5 + 0.5 = -2
//   dx 0 =  2/2 * (dy - 2/4 - xhat * 0.5/4):  1 - 0.5 + 0.125, -0.5 + 0.0625, -0.5, 1 - 0.5 - 0.1875
//   dx 1 = -4/4 * (dy - 4/4 + xhat * 2/4):    -(2 - 1 - 0.625), -(-2 - 1 - 0.125), -(4 - 1), -(0 - 1 + 0.75)
//
// All of these are exact in every element type, so equality is asked for.
const EPS: f64 = 0.5;
const X: [[f64; 4]; 2] = [[1.0, 2.0, 3.0, 6.0], [95.0, 99.0, 100.0, 106.0]];
const GAMMA: [f64; 2] = [2.0, -4.0];
const BETA: [f64; 2] = [10.0, 0.5];
const XHAT: [[f64; 4]; 2] = [[-1.0, -0.5, 0.0, 1.5], [-1.25, -0.25, 0.0, 1.5]];
const Y: [[f64; 4]; 2] = [[8.0, 9.0, 10.0, 13.0], [5.5, 1.5, 0.5, -5.5]];
const DY: [[f64; 4]; 2] = [[1.0, 0.0, 0.0, 1.0], [2.0, -2.0, 4.0, 0.0]];
const DGAMMA: [f64; 2] = [0.5, -2.0];
const DBETA: [f64; 2] = [2.0, 4.0];
const DX: [[f64; 4]; 2] = [[0.625, -0.4375, -0.5, 0.3125], [-0.375, 3.125, -3.0, 0.25]];

fn params<P: Real>(values: &[f64]) -> Vec<P> {
    values.iter().map(|&v| P::from_f64(v)).collect()
}

/// The values as elements, which they must be exactly.
fn elements<E: Element>(values: impl IntoIterator<Item = f64>) -> Vec<E> {
    let element = |v| {
        let e = E::from_param(E::Param::from_f64(v));
        assert_eq!(e.to_param().to_f64(), v, "a literal that the type cannot hold");
        e
    };
    values.into_iter().map(element).collect()
}

/// The layouts that hold two channels in two samples of two positions, and one channel at a time.
#[derive(Debug, Clone, Copy)]
enum Form {
    /// N 2, C 2, S 2: the values 0 and 1 of channel 0, of channel 1, then 2 and 3 of each.
    Planes(fn() -> batchnorm::Result<Shape>),
    /// The values 0 of both channels, the values 1, and so on.
    Rows(fn() -> batchnorm::Result<Shape>),
    /// One channel alone.
    One(usize, fn() -> batchnorm::Result<Shape>),
}

impl Form {
    const ALL: [Form; 13] = [
        Form::Planes(|| Shape::ncl(2, 2, 2)),
        Form::Planes(|| Shape::nchw(2, 2, 1, 2)),
        Form::Planes(|| Shape::nchw(2, 2, 2, 1)),
        Form::Planes(|| Shape::ncdhw(2, 2, 1, 2, 1)),
        Form::Rows(|| Shape::nc(4, 2)),
        Form::Rows(|| Shape::nlc(2, 2, 2)),
        Form::Rows(|| Shape::nhwc(2, 1, 2, 2)),
        Form::Rows(|| Shape::ndhwc(2, 2, 1, 1, 2)),
        Form::Rows(|| Shape::nchw(4, 2, 1, 1)),
        Form::One(0, || Shape::nc(4, 1)),
        Form::One(1, || Shape::nc(4, 1)),
        Form::One(0, || Shape::nchw(2, 1, 1, 2)),
        Form::One(1, || Shape::nhwc(1, 2, 2, 1)),
    ];

    fn shape(self) -> Shape {
        match self {
            Form::Planes(shape) | Form::Rows(shape) | Form::One(_, shape) => shape().unwrap(),
        }
    }

    /// The values per channel, in the order of this layout.
    fn lay<E: Element>(self, v: [[f64; 4]; 2]) -> Vec<E> {
        match self {
            Form::Planes(_) => elements([v[0][0], v[0][1], v[1][0], v[1][1], v[0][2], v[0][3], v[1][2], v[1][3]]),
            Form::Rows(_) => elements((0..8).map(|i| v[i % 2][i / 2])),
            Form::One(c, _) => elements(v[c]),
        }
    }

    fn channels<P: Real>(self, v: [f64; 2]) -> Vec<P> {
        match self {
            Form::One(c, _) => params(&v[c..=c]),
            _ => params(&v),
        }
    }
}

fn by_hand<E: Bits>()
where
    E::Param: Bits,
{
    for form in Form::ALL {
        let bn = BatchNorm::<E>::new(form.shape()).unwrap().with_eps(EPS).unwrap();
        let (x, dy): (Vec<E>, Vec<E>) = (form.lay(X), form.lay(DY));
        let (gamma, beta) = (form.channels(GAMMA), form.channels(BETA));
        let affine = Affine::new(&gamma, &beta);
        let is = |what: &str, got: &[E], expected| assert_bits(&format!("{what} {form:?}"), got, &form.lay(expected));
        let are = |what: &str, got: &[E::Param], expected| {
            assert_bits(&format!("{what} {form:?}"), got, &form.channels(expected));
        };

        let (mut y, mut saved) = (x.clone(), bn.saved());
        bn.forward_train(&x, affine, &mut y, &mut saved).unwrap();
        is("y", &y, Y);
        assert_eq!(saved.count(), 4);
        are("mean", saved.mean(), [3.0, 100.0]);
        are("residue", saved.residue(), [0.0, 0.0]);
        are("var", saved.var(), [3.5, 15.5]);
        are("inv_std", saved.inv_std(), [0.5, 0.25]);

        bn.forward_train(&x, Affine::none(), &mut y, &mut saved).unwrap();
        is("xhat", &y, XHAT);
        bn.forward_train(&x, Affine::of(Some(&gamma), None), &mut y, &mut saved).unwrap();
        is("gamma alone", &y, [[-2.0, -1.0, 0.0, 3.0], [5.0, 1.0, 0.0, -6.0]]);
        bn.forward_train(&x, Affine::of(None, Some(&beta)), &mut y, &mut saved).unwrap();
        is("beta alone", &y, [[9.0, 9.5, 10.0, 11.5], [-0.75, 0.25, 0.5, 2.0]]);

        let (mut dx, mut dgamma, mut dbeta) = (x.clone(), gamma.clone(), beta.clone());
        let gradients =
            Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
        bn.backward(&x, &dy, &saved, Affine::scale(&gamma), gradients).unwrap();
        is("dx", &dx, DX);
        are("dgamma", &dgamma, DGAMMA);
        are("dbeta", &dbeta, DBETA);
        // Without gamma, dx lacks the factors 2 and -4.
        let gradients = Gradients { dx: Some(&mut dx), ..Default::default() };
        bn.backward(&x, &dy, &saved, Affine::none(), gradients).unwrap();
        is("dx without gamma", &dx, [[0.3125, -0.21875, -0.25, 0.15625], [0.09375, -0.78125, 0.75, -0.0625]]);

        // Variances 3.5 and 15.5 again, means 1 and 102: factors 2 * 1/2 = 1 and -4 * 1/4 = -1.
        let (mean, var) = (form.channels([1.0, 102.0]), form.channels([3.5, 15.5]));
        bn.forward_infer(&x, affine, Population { mean: &mean, var: &var }, &mut y).unwrap();
        is("inferred", &y, [[10.0, 11.0, 12.0, 15.0], [7.5, 3.5, 2.5, -3.5]]);
    }
}

fn two_shards<E: Bits>()
where
    E::Param: Bits,
{
    // Sample 0 and sample 1 of the layouts in planes and in rows, as shards of one sample each. Sums of a shard:
    //   0: dy 1, 0     xhat -1, -0.5         sums 1, -1       2, -2    xhat -1.25, -0.25    sums 0, -2
    //   1: dy 0, 1     xhat 0, 1.5           sums 1, 1.5      4, 0     xhat 0, 1.5          sums 4, 0
    let moments = |mean: f64, m2: f64| Moments { count: 2, mean, residue: 0.0, m2 };
    let sums = |dy, dy_xhat| GradientSums { dy, dy_xhat };
    let of_shard = [
        ([moments(1.5, 0.5), moments(97.0, 8.0)], [sums(1.0, -1.0), sums(0.0, -2.0)]),
        ([moments(4.5, 4.5), moments(103.0, 18.0)], [sums(1.0, 1.5), sums(4.0, 0.0)]),
    ];
    let forms = [
        (Form::Planes(|| Shape::nchw(2, 2, 1, 2)), Shape::nchw(1, 2, 1, 2)),
        (Form::Rows(|| Shape::nhwc(2, 1, 2, 2)), Shape::nhwc(1, 1, 2, 2)),
        (Form::Rows(|| Shape::nc(4, 2)), Shape::nc(2, 2)),
    ];
    for (form, shape) in forms {
        let bn = BatchNorm::<E>::new(shape.unwrap()).unwrap().with_eps(EPS).unwrap();
        let (x, dy): (Vec<E>, Vec<E>) = (form.lay(X), form.lay(DY));
        let (gamma, beta): (Vec<E::Param>, Vec<E::Param>) = (params(&GAMMA), params(&BETA));
        let (mut total, mut saved) = (vec![Moments::default(); 2], bn.saved());
        for (x, (expected, _)) in x.chunks(4).zip(of_shard) {
            let mut moments = [Moments::default(); 2];
            bn.moments(x, &mut moments).unwrap();
            assert_eq!(moments, expected, "{form:?}");
            (0..2).for_each(|c| total[c] = total[c].merge(moments[c]));
        }
        // Four values each: m2 = 0.5 + 4.5 + 3^2 * 2*2/4 = 14, and 8 + 18 + 6^2 * 2*2/4 = 62.
        let of_four = |mean: f64, m2: f64| Moments { count: 4, mean, residue: 0.0, m2 };
        assert_eq!(total, [of_four(3.0, 14.0), of_four(100.0, 62.0)]);
        bn.finish(&total, &mut saved).unwrap();
        assert_eq!(saved.count(), 4);

        let mut total = vec![GradientSums::default(); 2];
        for ((x, dy), (_, expected)) in x.chunks(4).zip(dy.chunks(4)).zip(of_shard) {
            let mut sums = [GradientSums::default(); 2];
            bn.gradient_sums(x, dy, &saved, Affine::none(), &mut sums).unwrap();
            assert_eq!(sums, expected, "{form:?}");
            (0..2).for_each(|c| total[c] = total[c].merge(sums[c]));
        }
        assert_eq!(total, [sums(2.0, 0.5), sums(4.0, -2.0)]);

        let (mut y, mut dx) = (x.clone(), x.clone());
        for (i, x) in x.chunks(4).enumerate() {
            let at = 4 * i..4 * i + 4;
            bn.normalize(x, Affine::new(&gamma, &beta), &saved, &mut y[at.clone()]).unwrap();
            bn.input_gradient(x, &dy[at.clone()], &saved, Affine::scale(&gamma), &total, &mut dx[at]).unwrap();
        }
        assert_bits("y", &y, &form.lay(Y));
        assert_bits("dx", &dx, &form.lay(DX));
    }
}

macro_rules! for_each_element {
    ($($name:ident: $t:ty),*) => {$(
        mod $name {
            #[test]
            fn by_hand() {
                super::by_hand::<$t>();
            }
            #[test]
            fn two_shards() {
                super::two_shards::<$t>();
            }
        }
    )*};
}

for_each_element!(f32_: f32, f64_: f64);
#[cfg(feature = "half")]
for_each_element!(bf16_: half::bf16, f16_: half::f16);

/// 1, 2, 3, 4 have mean 2.5 and variance 5/4; with the usual eps, 1/sqrt(1.25001) = 0.89442361331261788...
#[test]
fn the_usual_eps() {
    fn check<E: Element>(tolerance: f64) {
        let bn = BatchNorm::<E>::new(Shape::nc(4, 1).unwrap()).unwrap();
        let (mut y, mut saved) = (vec![E::default(); 4], bn.saved());
        bn.forward_train(&elements([1.0, 2.0, 3.0, 4.0]), Affine::none(), &mut y, &mut saved).unwrap();
        let expected = [-1.341_635_419_968_927, -0.447_211_806_656_309, 0.447_211_806_656_309, 1.341_635_419_968_927];
        for (y, expected) in y.iter().zip(expected) {
            let y = y.to_param().to_f64();
            assert!((y - expected).abs() <= tolerance * expected.abs(), "{y}, expected {expected}");
        }
    }
    check::<f32>(1.2e-7);
    check::<f64>(4e-16);
}

#[test]
fn merging_moments() {
    let of = |count, mean, m2| Moments { count, mean, residue: 0.0, m2 };
    // {1, 2, 3} and {6}: mean 2 + 4 * 1/4, m2 2 + 0 + 4^2 * 3*1/4.
    assert_eq!(of(3, 2.0, 2.0).merge(of(1, 6.0, 0.0)), of(4, 3.0, 14.0));
    assert_eq!(of(1, 6.0, 0.0).merge(of(3, 2.0, 2.0)), of(4, 3.0, 14.0));
    // No values: nothing changes, not even infinities.
    for m in [of(3, 2.0, 2.0), of(1, f64::INFINITY, f64::INFINITY), Moments::default()] {
        assert_eq!(m.merge(Moments::default()), m);
        assert_eq!(Moments::default().merge(m), m);
    }
    // The mean of 2^53 and 2^53 + 2 lies between two f64: the residue holds what the mean lacks.
    let large = 2f64.powi(53);
    let merged = of(1, large, 0.0).merge(of(1, large + 2.0, 0.0));
    assert_eq!(merged, Moments { count: 2, mean: large, residue: 1.0, m2: 2.0 });
    // One more of the mean itself, 2^53 + 1, moves neither the mean nor m2.
    let middle = Moments { count: 1, mean: large, residue: 1.0, m2: 0.0 };
    assert_eq!(merged.merge(middle), Moments { count: 3, mean: large, residue: 1.0, m2: 2.0 });
    // A count that no f32 holds: 2^24 values and one.
    assert_eq!(of(1 << 24, 1.0, 0.0).merge(of(1, 1.0, 0.0)), of((1 << 24) + 1, 1.0, 0.0));

    assert_eq!(of(4, 3.0, 14.0).variance(), 3.5);
    assert_eq!(of(4, 3.0, 14.0).inv_std(EPS), 0.5);
    assert_eq!(of(4, 3.0, 0.0).inv_std(0.0), 0.0);
    assert!(Moments::default().variance().is_nan());
}

#[test]
fn statistics_kept_elsewhere() {
    // inv_std 1/2 with eps 1/2: 4 - 1/2; inv_std 0 stands for a constant channel without eps; 2 is more than
    // eps allows, 1/4 - 1/2 < 0.
    let saved = Saved::from_parts(9, vec![1.0, 2.0, 3.0], vec![0.5, 0.0, 2.0], EPS).unwrap();
    assert_eq!((saved.count(), saved.channels()), (9, 3));
    assert_eq!(saved.mean(), [1.0, 2.0, 3.0]);
    assert_eq!(saved.var(), [3.5, 0.0, 0.0]);
    assert_eq!(saved.residue(), [0.0; 3]);
}

/// The mean 2^24 + 1/2 has no f32: `mean` is 2^24 and the residue 1/2. 2^24 - 2 twice and 2^24 + 2, 2^24 + 4 are
/// -2.5, -2.5, 1.5, 3.5 from it: m2 = 6.25 + 6.25 + 2.25 + 12.25 = 27, and with eps = 9.25, inv_std = 1/sqrt(16).
#[test]
fn a_mean_between_two_floats() {
    let bn = BatchNorm::<f32>::new(Shape::nc(4, 1).unwrap()).unwrap().with_eps(9.25).unwrap();
    let x = [16777214.0, 16777218.0, 16777214.0, 16777220.0];
    let (mut y, mut saved) = ([0.0; 4], bn.saved());
    bn.forward_train(&x, Affine::none(), &mut y, &mut saved).unwrap();
    assert_eq!((saved.mean()[0], saved.residue()[0]), (16777216.0, 0.5));
    assert_eq!((saved.var()[0], saved.inv_std()[0]), (6.75, 0.25));
    assert_eq!(y, [-0.625, 0.375, -0.625, 0.875]);
    // dy = 1, 0, 0, 1: dbeta 2, dgamma -0.625 + 0.875; dx = (dy - 0.5 - xhat/16) / 4,
    // in 512ths 128 * (dy - 0.5) - 8*xhat.
    let (mut dx, mut dgamma, mut dbeta) = ([0.0; 4], [0.0], [0.0]);
    let gradients =
        Gradients { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
    bn.backward(&x, &[1.0, 0.0, 0.0, 1.0], &saved, Affine::none(), gradients).unwrap();
    assert_eq!((dgamma, dbeta), ([0.25], [2.0]));
    assert_eq!(dx.map(|dx| dx * 512.0), [69.0, -67.0, -59.0, 57.0]);
}

/// One rounding, to the nearest and ties to even, at the store; parameters and statistics are f32.
#[cfg(feature = "half")]
mod rounding {
    use super::*;
    use half::{bf16, f16};

    /// Infers `x + beta` in f32 for each pair and compares with the expected bits.
    fn check<E: Bits + Element<Param = f32>>(cases: &[(E, f32, E)]) {
        // One value per row, with a channel for each case; and 40 of them in a plane, for whole vectors.
        for spatial in [1, 40] {
            let shape = Shape::ncl(1, cases.len(), spatial).unwrap();
            let bn = BatchNorm::<E>::new(shape).unwrap().with_eps(0.0).unwrap();
            let x: Vec<E> = cases.iter().flat_map(|case| vec![case.0; spatial]).collect();
            let beta: Vec<f32> = cases.iter().map(|case| case.1).collect();
            let expected: Vec<E> = cases.iter().flat_map(|case| vec![case.2; spatial]).collect();
            let (mean, var) = (vec![0.0; beta.len()], vec![1.0; beta.len()]);
            let population = Population { mean: &mean, var: &var };
            let mut y = x.clone();
            bn.forward_infer(&x, Affine::of(None, Some(&beta)), population, &mut y).unwrap();
            assert_bits("rounded", &y, &expected);
        }
    }

    fn power(exponent: i32) -> f32 {
        2f32.powi(exponent)
    }

    #[test]
    fn bf16_has_eight_bits() {
        let b = bf16::from_bits;
        check(&[
            // Next to 1.0 (0x3f80) the step is 2^-7: half a step goes to the even neighbour.
            (b(0x3f80), power(-8), b(0x3f80)),
            (b(0x3f80), power(-8) + power(-20), b(0x3f81)),
            (b(0x3f81), power(-8), b(0x3f82)),
            (b(0x3f81), power(-8) - power(-20), b(0x3f81)),
            (b(0xbf81), -power(-8), b(0xbf82)),
            // The largest is 0x7f7f, 2^128 - 2^120; half a step more is infinite, less is not.
            (b(0x7f7f), power(119), b(0x7f80)),
            (b(0x7f7f), power(118), b(0x7f7f)),
            // The smallest is 2^-133: half of it is 0, three halves of it are two.
            (b(0x0000), power(-134), b(0x0000)),
            (b(0x0001), power(-134), b(0x0002)),
            (b(0x8000), -power(-133), b(0x8001)),
        ]);
    }

    #[test]
    fn f16_has_eleven_bits() {
        let h = f16::from_bits;
        check(&[
            // Next to 1.0 (0x3c00) the step is 2^-10.
            (h(0x3c00), power(-11), h(0x3c00)),
            (h(0x3c00), power(-11) + power(-22), h(0x3c01)),
            (h(0x3c01), power(-11), h(0x3c02)),
            (h(0x3c01), power(-11) - power(-22), h(0x3c01)),
            (h(0xbc01), -power(-11), h(0xbc02)),
            // The largest is 65504 (0x7bff), with a step of 32.
            (h(0x7bff), 16.0, h(0x7c00)),
            (h(0x7bff), 15.5, h(0x7bff)),
            // The smallest is 2^-24.
            (h(0x0000), power(-25), h(0x0000)),
            (h(0x0001), power(-25), h(0x0002)),
            (h(0x8000), -power(-24), h(0x8001)),
        ]);
    }

    /// 1, 2, 4: mean 7/3 = 2.33333..., variance 14/9 = 1.55555..., in f32 and not in the type of the elements.
    #[test]
    fn statistics_are_not_rounded_to_the_elements() {
        fn check<E: Element<Param = f32>>() {
            let bn = BatchNorm::<E>::new(Shape::nc(3, 1).unwrap()).unwrap().with_eps(0.0).unwrap();
            let (mut y, mut saved) = (vec![E::default(); 3], bn.saved());
            bn.forward_train(&elements([1.0, 2.0, 4.0]), Affine::none(), &mut y, &mut saved).unwrap();
            assert_eq!(saved.mean(), [2.333_333_3]);
            assert_eq!(saved.var(), [1.555_555_6]);
        }
        check::<bf16>();
        check::<f16>();
    }

    /// 2048 values of 1000 and 2048 of 1008: the sum, 4 million, is far beyond the largest f16.
    #[test]
    fn sums_do_not_overflow_f16() {
        let bn = BatchNorm::<f16>::new(Shape::nchw(1, 1, 64, 64).unwrap()).unwrap().with_eps(0.0).unwrap();
        let x = elements::<f16>((0..4096).map(|i| if i % 2 == 0 { 1000.0 } else { 1008.0 }));
        let (mut y, mut saved) = (x.clone(), bn.saved());
        bn.forward_train(&x, Affine::none(), &mut y, &mut saved).unwrap();
        assert_eq!((saved.mean(), saved.var(), saved.inv_std()), (&[1004.0][..], &[16.0][..], &[0.25][..]));
        assert_bits("y", &y, &elements((0..4096).map(|i| if i % 2 == 0 { -1.0 } else { 1.0 })));
    }
}
