//! What is beside plain passes: activations and residuals, backward from the output, second derivatives, strided tensors and
//! masks, on every tier: the bits of the reference.
#![no_main]

use arbitrary::Arbitrary;
use batchnorm::reference;
use batchnorm::{
    Activation, Affine, BatchNorm, Cotangents, Error, Gradients, Layout, Saved, SecondGradients, Shape, View,
};
use batchnorm_fuzz::{Setting, Tested, Values, assert_bits, assert_saved, with_element};
use libfuzzer_sys::fuzz_target;

/// One variant at a time: all would leave few runs a second.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Which {
    Bent,
    FromOutput,
    Twice,
    Strided,
    Masked,
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    which: Which,
    setting: Setting,
    x: Values,
    dy: Values,
    residual: Option<Values>,
    /// None, ReLU, and slopes of a leaky ReLU.
    slope: Option<u8>,
    gaps: [u8; 3],
    bytes: &'a [u8],
}

fuzz_target!(|input: Input<'_>| with_element!(input.setting.kind, check(&input)));

fn check<E: Tested>(input: &Input<'_>) {
    let Input { setting, x, dy, residual, slope, bytes, .. } = input;
    let shape = setting.shape();
    let (x, dy) = (x.fill::<E>(bytes, 0, shape.len()), dy.fill::<E>(bytes, 7, shape.len()));
    let residual = residual.as_ref().map(|residual| residual.fill::<E>(bytes, 9, shape.len()));
    let params = setting.affine::<E::Param>(bytes);
    let activation = match slope {
        None => Activation::None,
        Some(0) => Activation::Relu,
        Some(slope) => Activation::LeakyRelu(f64::from(*slope) / 64.0 - 0.25),
    };
    let plain = params.get::<E>();
    let affine = match &residual {
        Some(residual) => plain.with_residual(residual),
        None => plain,
    };
    let case = Case { input, shape, x: &x, dy: &dy, plain, affine: affine.with_activation(activation) };
    setting.plans().for_each(|bn| match input.which {
        Which::Bent => case.bent(&bn),
        Which::FromOutput => case.from_output(&bn),
        Which::Twice => case.twice(&bn),
        Which::Strided => case.strided(&bn),
        Which::Masked => case.masked(&bn),
    });
}

struct Case<'a, E: Tested> {
    input: &'a Input<'a>,
    shape: Shape,
    x: &'a [E],
    dy: &'a [E],
    plain: Affine<'a, E>,
    affine: Affine<'a, E>,
}

impl<E: Tested> Case<'_, E> {
    fn blank(&self) -> Vec<E> {
        vec![E::sentinel(); self.x.len()]
    }

    fn saved(&self, bn: &BatchNorm<E>) -> Saved<E::Param> {
        reference::finish(&reference::moments(&self.shape, self.x), bn.eps())
    }

    fn bent(&self, bn: &BatchNorm<E>) {
        let (mut y, mut saved) = (self.blank(), bn.saved());
        let mut gates = vec![0; bn.gates_len()];
        match bn.forward_train(self.x, self.affine.with_gates_to(&mut gates), &mut y, &mut saved) {
            Err(Error::Slope { .. }) => return assert!(y.iter().all(|&y| y.bits() == E::sentinel().bits())),
            other => other.unwrap(),
        }
        let then = self.saved(bn);
        assert_saved("saved", bn.tier(), &saved, &then);
        assert_bits("y", bn.tier(), &y, &reference::normalize(&self.shape, self.x, self.affine, &then));
        let mut gates_then = vec![0; gates.len()];
        if self.affine.activation != Activation::None {
            reference::record_gates(&self.shape, self.x, self.affine, &then, &mut gates_then);
        }
        assert_eq!(gates, gates_then, "gates, {}", bn.tier());
        for affine in [self.affine, self.affine.with_output(&y), self.affine.with_gates(&gates)] {
            let (mut dx, mut dresidual) = (self.blank(), self.blank());
            let gradients = Gradients { dx: Some(&mut dx), dresidual: Some(&mut dresidual), ..Default::default() };
            bn.backward(self.x, self.dy, &saved, affine, gradients).unwrap();
            let sums = reference::gradient_sums(&self.shape, self.x, self.dy, &then, affine);
            let dx_then = reference::input_gradient(&self.shape, self.x, self.dy, &then, affine, &sums);
            assert_bits("dx", bn.tier(), &dx, &dx_then);
            let dresidual_then = reference::residual_gradient(&self.shape, self.x, self.dy, &then, affine);
            assert_bits("dresidual", bn.tier(), &dresidual, &dresidual_then);
        }
    }

    fn from_output(&self, bn: &BatchNorm<E>) {
        let bn = bn.clone().with_backward_from_output(true);
        let (mut y, mut saved) = (self.x.to_vec(), bn.saved());
        if bn.forward_train_in_place(&mut y, self.affine, &mut saved).is_err() {
            return;
        }
        let mut dx = self.blank();
        let gradients = Gradients { dx: Some(&mut dx), ..Default::default() };
        match bn.backward(&y, self.dy, &saved, self.affine, gradients) {
            Err(Error::NotInvertible | Error::Gamma { .. }) => {
                assert!(dx.iter().all(|&dx| dx.bits() == E::sentinel().bits()));
            }
            other => {
                other.unwrap();
                let sums = reference::gradient_sums_from_output(&self.shape, &y, self.dy, &saved, self.affine);
                let then = reference::input_gradient_from_output(&self.shape, &y, self.dy, &saved, self.affine, &sums);
                assert_bits("dx from the output", bn.tier(), &dx, &then);
            }
        }
    }

    fn twice(&self, bn: &BatchNorm<E>) {
        let saved = self.saved(bn);
        // Any tensor can be the gradient of dx.
        let cotangents = Cotangents { dx: self.dy, dgamma: self.plain.beta, dbeta: self.plain.gamma };
        let then = reference::double_backward(&self.shape, self.x, self.x, &saved, self.plain, cotangents);
        let (mut of_x, mut of_dy, mut of_gamma) = (self.blank(), self.blank(), then.2.clone());
        let gradients = SecondGradients { x: Some(&mut of_x), dy: Some(&mut of_dy), gamma: Some(&mut of_gamma) };
        bn.double_backward(self.x, self.x, &saved, self.plain, cotangents, gradients).unwrap();
        assert_bits("of x", bn.tier(), &of_x, &then.0);
        assert_bits("of dy", bn.tier(), &of_dy, &then.1);
        assert_bits("of gamma", bn.tier(), &of_gamma, &then.2);
    }

    /// Elements with gaps between rows, samples, and what lies between.
    fn strided(&self, bn: &BatchNorm<E>) {
        let (n, c, s) = (self.shape.batch(), self.shape.channels(), self.shape.spatial());
        let sizes = match self.shape.layout() {
            Layout::ChannelsFirst => [n, c, s],
            Layout::ChannelsLast => [n, s, c],
        };
        let [inner, outer, more] = self.input.gaps.map(usize::from);
        let middle = sizes[2] + inner;
        let strides = [sizes[1] * middle + outer, middle, 1];
        let view = View::strided(&self.shape, &sizes, &strides).unwrap();
        let place =
            |i: usize| i / sizes[2] / sizes[1] * strides[0] + i / sizes[2] % sizes[1] * strides[1] + i % sizes[2];
        let mut there = vec![E::sentinel(); view.len() + more];
        self.x.iter().enumerate().for_each(|(i, &x)| there[place(i)] = x);
        let bn = bn.clone().with_views(view, View::dense(&self.shape)).unwrap();
        let (mut y, mut saved, then) = (self.blank(), bn.saved(), self.saved(&bn));
        bn.forward_train(&there, self.plain, &mut y, &mut saved).unwrap();
        assert_saved("strided, saved", bn.tier(), &saved, &then);
        assert_bits("strided, y", bn.tier(), &y, &reference::normalize(&self.shape, self.x, self.plain, &then));
        let mut dx = vec![E::sentinel(); there.len()];
        let gradients = Gradients { dx: Some(&mut dx), ..Default::default() };
        bn.backward(&there, self.dy, &saved, self.plain, gradients).unwrap();
        let sums = reference::gradient_sums(&self.shape, self.x, self.dy, &then, self.plain);
        let dx_then = reference::input_gradient(&self.shape, self.x, self.dy, &then, self.plain, &sums);
        there.fill(E::sentinel());
        dx_then.iter().enumerate().for_each(|(i, &dx)| there[place(i)] = dx);
        assert_bits("strided, dx", bn.tier(), &dx, &there);
    }

    /// Positions left out.
    fn masked(&self, bn: &BatchNorm<E>) {
        let (c, s) = (self.shape.channels(), self.shape.spatial());
        let byte = |i: usize| self.input.bytes.get(i / 8 % self.input.bytes.len().max(1)).copied().unwrap_or(0xa5);
        let mask: Vec<bool> = (0..self.shape.count()).map(|i| byte(i) >> (i % 8) & 1 == 1).collect();
        let valid: Vec<usize> = (0..mask.len()).filter(|&i| mask[i]).collect();
        let bn = bn.with_mask(&mask).unwrap();
        let (mut y, mut saved) = (self.blank(), bn.saved());
        let logical = Shape::new(self.shape.layout(), 1, c, &[valid.len()]).unwrap();
        let places: Vec<usize> = match self.shape.layout() {
            Layout::ChannelsFirst => {
                (0..c).flat_map(|c_of| valid.iter().map(move |&p| (p / s * c + c_of) * s + p % s)).collect()
            }
            Layout::ChannelsLast => valid.iter().flat_map(|&p| (0..c).map(move |c_of| p * c + c_of)).collect(),
        };
        let left: Vec<E> = places.iter().map(|&at| self.x[at]).collect();
        let result = bn.forward_train(self.x, self.plain, &mut y, &mut saved);
        if valid.is_empty() {
            return assert!(matches!(result, Err(Error::EmptyBatch { .. })));
        }
        result.unwrap();
        let then = reference::finish(&reference::moments(&logical, &left), bn.eps());
        assert_saved("masked, saved", bn.tier(), &saved, &then);
        let mut expected = vec![E::default(); y.len()];
        let y_then = reference::normalize(&logical, &left, self.plain, &then);
        places.iter().zip(y_then).for_each(|(&at, y)| expected[at] = y);
        assert_bits("masked, y", bn.tier(), &y, &expected);
    }
}
