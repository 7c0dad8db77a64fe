//! The bounds on statistics, outputs and gradients, against exact integer arithmetic, on all data sets of tests/exact.
//!
//! `cargo test --test accuracy -- --nocapture` prints the worst errors; docs/numerics.md explains them.

mod common;
mod exact;

use batchnorm::{Affine, BatchNorm, Element, GradientSums, Gradients, Layout, Moments, Population, Real, Shape};
use common::{Bits, assert_bits};
use exact::{Errors, Problem, Quantity, sets, shapes};

/// Measures every data set on every shape, and prints the worst errors of each layout.
fn check<E: Element>(name: &str) {
    let mut of_layouts: Vec<(&str, Errors)> = Vec::new();
    let mut beyond = String::new();
    for (layout, shape) in shapes() {
        for set in sets::<E>() {
            let problem = Problem::<E>::new(shape, &set);
            let errors = problem.errors(&problem.ours());
            for quantity in Quantity::ALL {
                let most = set.allowed::<E>(quantity);
                let error = errors.get(quantity);
                if error > most {
                    beyond += &format!("\n{name} {shape:?} {set:?}: {}: {error:.1e} > {most:.1e}", quantity.name());
                }
            }
            match of_layouts.iter_mut().find(|(l, _)| *l == layout) {
                Some((_, worst)) => *worst = worst.max(errors),
                None => of_layouts.push((layout, errors)),
            }
        }
    }
    assert!(beyond.is_empty(), "beyond what is allowed:{beyond}");
    for (layout, worst) in of_layouts {
        let columns = Quantity::ALL.map(|quantity| format!("{} {:.1e}", quantity.name(), worst.get(quantity)));
        println!("{name:<4} {layout:<4}: {}", columns.join(", "));
    }
}

#[test]
fn f32_within_the_bounds() {
    check::<f32>("f32");
}

#[test]
fn f64_within_the_bounds() {
    check::<f64>("f64");
}

/// Computed as f32 and rounded once.
#[cfg(feature = "half")]
#[test]
fn bf16_within_the_bounds() {
    check::<half::bf16>("bf16");
}

#[cfg(feature = "half")]
#[test]
fn f16_within_the_bounds() {
    check::<half::f16>("f16");
}

/// f32 counts to 2^24 and no further.
#[test]
fn counts_and_sums_are_no_floats() {
    let ones = vec![1f32; 1 << 25];
    let more = (1 << 24) + 1;
    // Planes in one sample and in many, rows.
    let shapes =
        [Shape::ncl(1, 1, more), Shape::ncl(1, 1, 1 << 25), Shape::ncl(1 << 12, 1, 1 << 13), Shape::nc(1 << 24, 2)];
    for shape in shapes.map(Result::unwrap) {
        let (x, count) = (&ones[..shape.len()], shape.count());
        let bn = BatchNorm::<f32>::new(shape).unwrap();
        let mut moments = vec![Moments::default(); shape.channels()];
        bn.moments(x, &mut moments).unwrap();
        assert_eq!(moments, vec![Moments { count: count as u64, mean: 1.0, residue: 0.0, m2: 0.0 }; shape.channels()]);
        let mut saved = bn.saved();
        bn.finish(&moments, &mut saved).unwrap();
        let mut sums = vec![GradientSums::default(); shape.channels()];
        bn.gradient_sums(x, x, &saved, Affine::none(), &mut sums).unwrap();
        assert_eq!(sums, vec![GradientSums { dy: count as f64, dy_xhat: 0.0 }; shape.channels()], "{shape:?}");
    }
    // Nothing 2^24 times and 2^24 + 1 once: the mean is 1.
    let zeros = Moments { count: more as u64 - 1, ..Moments::default() };
    let joined = zeros.merge(Moments { count: 1, mean: more as f64, ..Moments::default() });
    assert_eq!(joined.count, more as u64);
    let (mean, m2) = (joined.mean + joined.residue, zeros.count as f64 * more as f64);
    assert!((mean - 1.0).abs() < 1e-15 && (joined.m2 / m2 - 1.0).abs() < 1e-15, "{joined:?}, m2 should be {m2}");
}

/// Whatever eps is.
#[test]
fn a_constant_channel_gives_beta() {
    fn check<E: Bits>(constants: &[f64])
    where
        E::Param: Bits,
    {
        let element = |v: f64| E::from_param(E::Param::from_f64(v));
        for (_, shape) in shapes() {
            for &constant in constants {
                for eps in [0.0, 1e-5] {
                    let bn = BatchNorm::<E>::new(shape).and_then(|bn| bn.with_eps(eps)).unwrap();
                    let (gamma, beta) = ([-1.7, 0.3].map(E::Param::from_f64), E::Param::from_f64(0.1));
                    let gamma: Vec<_> = (0..shape.channels()).map(|c| gamma[c % 2]).collect();
                    let (x, mut y) = (vec![element(constant); shape.len()], vec![E::default(); shape.len()]);
                    let mut saved = bn.saved();
                    let beta = vec![beta; gamma.len()];
                    bn.forward_train(&x, Affine::new(&gamma, &beta), &mut y, &mut saved).unwrap();
                    assert_bits(&format!("{constant} on {shape:?}"), &y, &vec![element(0.1); shape.len()]);
                }
            }
        }
    }
    let all = [0.0, 100.0, 1e10, -15.94, 1e30, 1e-40];
    check::<f32>(&[&all[..], &[f32::MAX.into()]].concat());
    check::<f64>(&all);
    #[cfg(feature = "half")]
    {
        check::<half::bf16>(&[&all[..], &[half::bf16::MAX.into()]].concat());
        check::<half::f16>(&[0.0, 100.0, -15.94, half::f16::MAX.into()]);
    }
}

/// Where no number of the type is the variance or inv_std, results are defined all the same.
#[test]
fn beyond_the_range_of_squares() {
    fn check<E: Bits + Element<Param = E> + Real>(value: f64, inv_std: f64) {
        for shape in [Shape::nc(64, 1), Shape::nc(64, 3), Shape::nchw(4, 3, 4, 4)].map(Result::unwrap) {
            let x: Vec<E> = (0..shape.len()).map(|i| E::from_f64([-value, value][i % 2])).collect();
            let bn = BatchNorm::<E>::new(shape).and_then(|bn| bn.with_eps(0.0)).unwrap();
            let (mut y, mut saved) = (x.clone(), bn.saved());
            bn.forward_train(&x, Affine::none(), &mut y, &mut saved).unwrap();
            let inv_std = E::from_f64(inv_std);
            let xhat: Vec<E> = x.iter().map(|&x| x * inv_std + E::default()).collect();
            assert_bits("inv_std", saved.inv_std(), &vec![inv_std; shape.channels()]);
            assert_bits("y", &y, &xhat);
        }
    }
    // 2^140 is none, the largest number takes its place.
    check::<f32>(2f64.powi(-140), f32::MAX.into());
    // The variance is infinite, xhat is not.
    check::<f32>(2f64.powi(127), 2f64.powi(-127));
    // The squares are zero: as of a constant.
    check::<f64>(1e-200, 0.0);
    // They are infinite, and so is the variance.
    check::<f64>(1e200, 0.0);
}

/// One value at one end of the type, the others near the other end: their difference is no number of the type.
#[test]
fn finite_values_have_finite_results() {
    for shape in [Shape::nc(5000, 1), Shape::nc(37, 3), Shape::nchw(3, 2, 60, 61), Shape::nhwc(2, 40, 41, 5)] {
        let shape = shape.unwrap();
        let bn = BatchNorm::<f32>::new(shape).unwrap();
        let mut x = vec![f32::MAX / 1.5; shape.len()];
        x[..shape.channels()].fill(f32::MIN);
        if shape.layout() == Layout::ChannelsFirst {
            x.iter_mut().step_by(shape.spatial()).for_each(|x| *x = f32::MIN);
        }
        let dy: Vec<f32> = (0..shape.len()).map(|i| (i % 7) as f32).collect();
        let (mut y, mut dx, mut saved) = (x.clone(), x.clone(), bn.saved());
        bn.forward_train(&x, Affine::none(), &mut y, &mut saved).unwrap();
        bn.backward(&x, &dy, &saved, Affine::none(), Gradients { dx: Some(&mut dx), ..Default::default() }).unwrap();
        // As deviant as a value can be (Samuelson).
        let most = 1.01 * (shape.count() as f32).sqrt();
        assert!(y.iter().all(|y| y.abs() <= most), "{shape:?}: {y:?}");
        assert!(dx.iter().all(|dx| dx.is_finite()), "{shape:?}");
        // The variance is no f32.
        let population = Population { mean: saved.mean(), var: saved.var() };
        bn.forward_infer(&x, Affine::none(), population, &mut y).unwrap();
        assert!(y.iter().all(|&y| y == 0.0), "{shape:?}");
    }
}
