//! What is beside plain passes: activations and residuals, backward from the output, second derivatives, strided tensors and
//! masks, on every tier: the bits of the reference.
#![no_main]

use arbitrary::Arbitrary;
use batchnorm::reference;
use batchnorm::{
    Activation, Affine, BatchNorm, Cotangents, Error, Gradients, Layout, Population, Quantization, Real, RenormLimits,
    Saved, SecondGradients, Shape, View,
};
use batchnorm_fuzz::{Setting, Tested, Values, assert_bits, assert_saved, variances, with_element};
use libfuzzer_sys::fuzz_target;

/// One variant at a time: all would leave few runs a second.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Which {
    Bent,
    FromOutput,
    Twice,
    Strided,
    Masked,
    Frozen,
    Renormalized,
    Ghost,
    Quantized,
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
    /// The scales of quantized tensors.
    scales: [f64; 2],
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
        Which::FromOutput => case.backward_from_output(&bn),
        Which::Twice => case.twice(&bn),
        Which::Strided => case.strided(&bn),
        Which::Masked => case.masked(&bn),
        Which::Frozen => case.frozen(&bn),
        Which::Renormalized => case.renormalized(&bn),
        Which::Ghost => case.ghost(&bn),
        Which::Quantized => (),
    });
    if let Which::Quantized = input.which {
        quantized(input);
    }
}

/// Inference on 8-bit integers.
fn quantized(input: &Input<'_>) {
    let Input { setting, bytes, gaps, scales, slope, .. } = input;
    let shape = setting.shape();
    let values = |salt| setting.params.fill::<f32>(bytes, salt, shape.channels());
    let (mean, var) = (values(5), variances(values(6)));
    let population = Population { mean: &mean, var: &var };
    let params = setting.affine::<f32>(bytes);
    let activation = slope.map_or(Activation::None, |slope| Activation::LeakyRelu(f64::from(slope) / 64.0));
    let affine = params.get::<f32>().with_activation(activation);
    let x: Vec<i8> =
        (0..shape.len()).map(|i| bytes.get(i % bytes.len().max(1)).map_or(1, |b| b.cast_signed())).collect();
    let of = |i: usize| Quantization { scale: scales[i], zero_point: gaps[i].cast_signed() };
    for bn in setting.plans::<f32>() {
        let mut y = vec![77; x.len()];
        match bn.forward_infer_quantized(&x, of(0), affine, population, &mut y, of(1)) {
            Err(Error::Quantization { .. }) => assert!(y.iter().all(|&y| y == 77)),
            other => {
                other.unwrap();
                let then = reference::forward_infer_quantized(&shape, &x, of(0), affine, (population, bn.eps()), of(1));
                assert_eq!(y, then, "quantized on {}", bn.tier());
                let mut over = x.clone();
                bn.forward_infer_quantized_in_place(&mut over, of(0), affine, population, of(1)).unwrap();
                assert_eq!(over, then, "quantized in place on {}", bn.tier());
            }
        }
    }
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

    fn backward_from_output(&self, bn: &BatchNorm<E>) {
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

    /// The population's statistics as constants.
    fn frozen(&self, bn: &BatchNorm<E>) {
        let (mean, var) = self.population();
        let mut saved = bn.saved();
        bn.freeze(Population { mean: &mean, var: &var }, &mut saved).unwrap();
        let mut y = self.blank();
        if bn.normalize(self.x, self.affine, &saved, &mut y).is_err() {
            return;
        }
        let then = reference::normalize(&self.shape, self.x, self.affine, &saved);
        assert_bits("y of constants", bn.tier(), &y, &then);
        self.back(bn, &saved);
    }

    /// Corrected towards the population.
    fn renormalized(&self, bn: &BatchNorm<E>) {
        let (mean, var) = self.population();
        let population = Population { mean: &mean, var: &var };
        let [_, step, _] = self.input.gaps;
        let limits = RenormLimits::at_step(u64::from(step) * 300);
        let (mut y, mut saved) = (self.blank(), bn.saved());
        saved.renormalize(population, limits).unwrap();
        if bn.forward_train(self.x, self.affine, &mut y, &mut saved).is_err() {
            return;
        }
        let moments = reference::moments(&self.shape, self.x);
        let then = reference::finish_renormalized(&moments, bn.eps(), population, limits);
        assert_saved("renormalized", bn.tier(), &saved, &then);
        let y_then = reference::normalize(&self.shape, self.x, self.affine, &then);
        assert_bits("y renormalized", bn.tier(), &y, &y_then);
        self.back(bn, &saved);
        saved.do_not_renormalize();
        bn.forward_train(self.x, self.affine, &mut y, &mut saved).unwrap();
        assert_saved("no longer renormalized", bn.tier(), &saved, &self.saved(bn));
    }

    fn population(&self) -> (Vec<E::Param>, Vec<E::Param>) {
        let (setting, bytes) = (&self.input.setting, self.input.bytes);
        let values = |salt| setting.params.fill(bytes, salt, self.shape.channels());
        (values(5), variances(values(6)))
    }

    /// The backward pass with any statistics.
    fn back(&self, bn: &BatchNorm<E>, saved: &Saved<E::Param>) {
        let sums = reference::gradient_sums(&self.shape, self.x, self.dy, saved, self.affine);
        let dx_then = reference::input_gradient(&self.shape, self.x, self.dy, saved, self.affine, &sums);
        let (dgamma_then, dbeta_then) = reference::affine_gradients::<E::Param>(&sums, saved);
        let (mut dx, mut dgamma, mut dbeta) = (self.dy.to_vec(), dgamma_then.clone(), dbeta_then.clone());
        let zero = E::Param::from_f64(0.0);
        dgamma.fill(zero);
        dbeta.fill(zero);
        let gradients = Gradients { dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta), ..Default::default() };
        bn.backward_in_place(self.x, &mut dx, saved, self.affine, gradients).unwrap();
        assert_bits("dx in place", bn.tier(), &dx, &dx_then);
        assert_bits("dgamma", bn.tier(), &dgamma, &dgamma_then);
        assert_bits("dbeta", bn.tier(), &dbeta, &dbeta_then);
        // Added to the zeros that add nothing, not even a sign.
        let nothing = E::Param::from_f64(-0.0);
        dgamma.fill(nothing);
        dbeta.fill(nothing);
        let adding = bn.clone().with_accumulation(true);
        adding.parameter_gradients(saved, &sums, Some(&mut dgamma), Some(&mut dbeta)).unwrap();
        assert_bits("dgamma added", bn.tier(), &dgamma, &dgamma_then);
        assert_bits("dbeta added", bn.tier(), &dbeta, &dbeta_then);
    }

    /// Virtual batches, each as a batch of its own.
    fn ghost(&self, bn: &BatchNorm<E>) {
        let (batch, sample) = (self.shape.batch(), self.shape.len() / self.shape.batch());
        // Few enough for many runs a second.
        let of = (usize::from(self.input.gaps[0]) + 1).max(batch / 32);
        let ghost = bn.clone().ghost(of).unwrap();
        let (mut y, mut dx, mut saved) = (self.blank(), self.blank(), ghost.saved());
        let mut gates = vec![0; bn.gates_len()];
        if ghost.forward_train(self.x, self.affine.with_gates_to(&mut gates), &mut y, &mut saved).is_err() {
            return;
        }
        let gradients = Gradients { dx: Some(&mut dx), ..Default::default() };
        ghost.backward(self.x, self.dy, &saved, self.affine.with_gates(&gates), gradients).unwrap();
        let parts = self.x.chunks(of * sample).zip(self.dy.chunks(of * sample)).zip(y.chunks(of * sample));
        for (((x, dy), y), (dx, saved)) in parts.zip(dx.chunks(of * sample).zip(&saved)) {
            let (c, s) = (self.shape.channels(), self.shape.spatial());
            let shape = Shape::new(self.shape.layout(), x.len() / sample, c, &[s]).unwrap();
            let then = reference::finish(&reference::moments(&shape, x), bn.eps());
            assert_saved("virtual batch", bn.tier(), saved, &then);
            // The residual is of the whole batch, so it is left to the tests.
            if self.affine.residual.is_none() {
                let y_then = reference::normalize(&shape, x, self.affine, &then);
                assert_bits("y of a virtual batch", bn.tier(), y, &y_then);
                let sums = reference::gradient_sums(&shape, x, dy, &then, self.affine);
                let dx_then = reference::input_gradient(&shape, x, dy, &then, self.affine, &sums);
                assert_bits("dx of a virtual batch", bn.tier(), dx, &dx_then);
            }
        }
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
