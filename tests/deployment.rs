//! Inference folded into neighbouring layers, against running both; as plain vectors; and on 8-bit integers.

mod common;

use batchnorm::View;
use batchnorm::reference;
use batchnorm::{
    Activation, Affine, BatchNorm, Error, Layer, Parallelism, Population, Quantization, Real, Shape, Stores,
};
use common::{Data, plan, tiers};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A layer over signals of one dimension, without padding, stride 1, in f64.
#[derive(Clone, Copy)]
struct Signal {
    inputs: usize,
    outputs: usize,
    taps: usize,
    groups: usize,
    transposed: bool,
}

impl Signal {
    fn layer(self) -> Layer {
        let layer = match self {
            Signal { transposed: true, .. } => Layer::transposed(self.inputs, self.outputs, self.taps),
            Signal { taps: 1, groups: 1, .. } => Layer::linear(self.outputs, self.inputs),
            _ => Layer::convolution(self.outputs, self.inputs, self.taps),
        };
        layer.with_groups(self.groups).unwrap()
    }

    /// The weight that joins an input to an output at a tap, if they are of one group.
    fn weight<P: Real>(self, weight: &[P], output: usize, input: usize, tap: usize) -> f64 {
        let (of_inputs, of_outputs) = (self.inputs / self.groups, self.outputs / self.groups);
        if input / of_inputs != output / of_outputs {
            return 0.0;
        }
        let joint = match self.transposed {
            true => input * of_outputs + output % of_outputs,
            false => output * of_inputs + input % of_inputs,
        };
        weight[joint * self.taps + tap].to_f64()
    }

    /// `x` is `[inputs][length]`.
    fn run<P: Real>(self, weight: &[P], bias: &[P], x: &[f64]) -> Vec<f64> {
        let length = x.len() / self.inputs;
        let (long, taps) =
            if self.transposed { (length + self.taps - 1, self.taps) } else { (length + 1 - self.taps, self.taps) };
        let mut y = Vec::new();
        for (output, bias) in bias.iter().enumerate() {
            for at in 0..long {
                let mut sum = bias.to_f64();
                for input in 0..self.inputs {
                    for tap in 0..taps {
                        let from = if self.transposed { at.checked_sub(tap) } else { Some(at + tap) };
                        if let Some(from) = from.filter(|&from| from < length) {
                            sum += self.weight(weight, output, input, tap) * x[input * length + from];
                        }
                    }
                }
                y.push(sum);
            }
        }
        y
    }
}

/// Random values; gamma has zeros and negative numbers.
struct Case<P> {
    weight: Vec<P>,
    bias: Vec<P>,
    x: Vec<f64>,
    gamma: Vec<P>,
    beta: Vec<P>,
    mean: Vec<P>,
    var: Vec<P>,
}

impl<P: Real> Case<P> {
    fn new(signal: Signal, channels: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut values =
            |n: usize, low: f64| -> Vec<P> { (0..n).map(|_| P::from_f64(rng.random_range(low..1.0))).collect() };
        let mut gamma = values(channels, -1.0);
        gamma[0] = P::from_f64(0.0);
        Self {
            weight: values(signal.layer().weights(), -1.0),
            bias: values(signal.outputs, -1.0),
            x: values(signal.inputs * 12, -1.0).into_iter().map(Real::to_f64).collect(),
            gamma,
            beta: values(channels, -1.0),
            mean: values(channels, -1.0),
            var: values(channels, 0.1),
        }
    }

    fn plan(&self) -> BatchNorm<P> {
        BatchNorm::new(Shape::nc(1, self.gamma.len()).unwrap()).unwrap().with_eps(1e-3).unwrap()
    }

    /// Inference in f64, of `[channels][length]`.
    fn normalize(&self, x: &[f64]) -> Vec<f64> {
        let length = x.len() / self.gamma.len();
        let value = |(i, x): (usize, &f64)| {
            let c = i / length;
            let [gamma, beta, mean, var] = [&self.gamma, &self.beta, &self.mean, &self.var].map(|v| v[c].to_f64());
            gamma * (x - mean) / (var + 1e-3).sqrt() + beta
        };
        x.iter().enumerate().map(value).collect()
    }

    fn parts(&self) -> (Affine<'_, P>, Population<'_, P>) {
        (Affine::new(&self.gamma, &self.beta), Population { mean: &self.mean, var: &self.var })
    }
}

const SIGNALS: [Signal; 7] = [
    Signal { inputs: 5, outputs: 4, taps: 1, groups: 1, transposed: false },
    Signal { inputs: 6, outputs: 4, taps: 3, groups: 1, transposed: false },
    Signal { inputs: 6, outputs: 4, taps: 3, groups: 2, transposed: false },
    Signal { inputs: 6, outputs: 6, taps: 3, groups: 6, transposed: false },
    Signal { inputs: 3, outputs: 6, taps: 2, groups: 3, transposed: false },
    Signal { inputs: 6, outputs: 4, taps: 3, groups: 1, transposed: true },
    Signal { inputs: 6, outputs: 4, taps: 3, groups: 2, transposed: true },
];

/// Weights of about 1 and up to 18 terms: sums below 20 with one rounding of each weight.
#[track_caller]
fn assert_near<P: Real>(got: &[f64], expected: &[f64]) {
    let bound = if size_of::<P>() == 4 { 20.0 * 2f64.powi(-23) } else { 20.0 * 2f64.powi(-52) };
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        assert!((got - expected).abs() <= bound, "{got} against {expected}");
    }
}

fn folds<P: Real>() {
    for signal in SIGNALS {
        let case = Case::<P>::new(signal, signal.outputs);
        let (affine, population) = case.parts();
        for bias in [case.bias.clone(), vec![P::default(); signal.outputs]] {
            let (mut weight, mut folded) = (case.weight.clone(), bias.clone());
            case.plan().fold_into_preceding(signal.layer(), &mut weight, &mut folded, affine, population).unwrap();
            let expected = case.normalize(&signal.run(&case.weight, &bias, &case.x));
            assert_near::<P>(&signal.run(&weight, &folded, &case.x), &expected);
        }

        let case = Case::<P>::new(signal, signal.inputs);
        let (affine, population) = case.parts();
        let (mut weight, mut bias) = (case.weight.clone(), case.bias.clone());
        let folded = case.plan().fold_into_following(signal.layer(), &mut weight, &mut bias, affine, population);
        if signal.transposed {
            assert_eq!(folded, Err(Error::NotFoldable));
            assert_eq!((weight, bias), (case.weight, case.bias));
        } else {
            folded.unwrap();
            let expected = signal.run(&case.weight, &case.bias, &case.normalize(&case.x));
            assert_near::<P>(&signal.run(&weight, &bias, &case.x), &expected);
        }
    }
}

#[test]
fn a_folded_layer_gives_what_both_gave_in_f32() {
    folds::<f32>();
}

#[test]
fn a_folded_layer_gives_what_both_gave_in_f64() {
    folds::<f64>();
}

#[test]
fn scale_and_shift_are_those_of_the_formula() {
    let case = Case::<f64>::new(SIGNALS[1], 4);
    let (affine, population) = case.parts();
    let (mut scale, mut shift) = ([0.0; 4], [0.0; 4]);
    case.plan().scale_and_shift(affine, population, &mut scale, &mut shift).unwrap();
    let x = [0.5, -2.0, 3.0, 1.0];
    let line: Vec<f64> = (0..4).map(|c| x[c] * scale[c] + shift[c]).collect();
    assert_near::<f64>(&line, &case.normalize(&x));
    // The loss that the documentation warns of, in f32: the centred form keeps what the line loses.
    let bn = BatchNorm::<f32>::new(Shape::nc(1, 1).unwrap()).unwrap().with_eps(0.0).unwrap();
    let population = Population { mean: &[1e4], var: &[1.0] };
    let (mut scale, mut shift, mut y) = ([0.0], [0.0], [0.0]);
    bn.scale_and_shift(Affine::new(&[0.7], &[0.1]), population, &mut scale, &mut shift).unwrap();
    bn.forward_infer(&[10000.5], Affine::new(&[0.7], &[0.1]), population, &mut y).unwrap();
    let exact = f64::from(0.7f32) * 0.5 + f64::from(0.1f32);
    assert!((f64::from(y[0]) - exact).abs() < 1e-7);
    assert!((f64::from(10000.5f32 * scale[0] + shift[0]) - exact).abs() > 1e-5);
}

#[test]
fn what_does_not_fit_is_refused_and_left_alone() {
    let case = Case::<f32>::new(SIGNALS[1], 4);
    let (affine, population) = case.parts();
    let (bn, layer) = (case.plan(), SIGNALS[1].layer());
    let length = |what, expected, got| Err(Error::Length { what, expected, got });
    let (mut weight, mut bias) = (case.weight.clone(), case.bias.clone());
    assert_eq!(
        bn.fold_into_preceding(layer, &mut weight[1..], &mut bias, affine, population),
        length("weight", 72, 71)
    );
    assert_eq!(bn.fold_into_preceding(layer, &mut weight, &mut bias[1..], affine, population), length("bias", 4, 3));
    assert_eq!(
        bn.fold_into_following(layer, &mut weight, &mut bias, affine, population),
        Err(Error::LayerChannels { expected: 4, got: 6 })
    );
    let short = Population { mean: &case.mean[1..], ..population };
    assert_eq!(bn.fold_into_preceding(layer, &mut weight, &mut bias, affine, short), length("mean", 4, 3));
    let (mut scale, mut shift) = ([5.0; 4], [6.0; 3]);
    assert_eq!(bn.scale_and_shift(affine, population, &mut scale, &mut shift), length("shift", 4, 3));
    // More than a line per channel.
    let residual = [0.0; 4];
    for more in [affine.with_activation(Activation::Relu), affine.with_residual(&residual)] {
        let refused = Err(Error::FoldedAffine);
        assert_eq!(bn.fold_into_preceding(layer, &mut weight, &mut bias, more, population), refused);
        let after = Layer::convolution(6, 4, 3);
        assert_eq!(bn.fold_into_following(after, &mut weight, &mut [0.0; 6], more, population), refused);
        assert_eq!(bn.scale_and_shift(more, population, &mut scale, &mut [0.0; 4]), refused);
    }
    assert_eq!((weight, bias, scale, shift), (case.weight.clone(), case.bias.clone(), [5.0; 4], [6.0; 3]));
    assert_eq!(Layer::linear(4, 6).with_groups(0), Err(Error::Groups { channels: 6, groups: 0 }));
    assert_eq!(Layer::linear(4, 6).with_groups(3), Err(Error::Groups { channels: 4, groups: 3 }));
}

/// Bit for bit as the reference has it, and within half a step of what f64 says.
#[test]
fn quantized_inference_rounds_what_inference_gives() {
    let shapes = [
        Shape::nc(37, 19),
        Shape::nc(3, 300),
        Shape::nc(70_000, 3),
        Shape::ncl(5, 3, 41),
        Shape::nchw(2, 5, 7, 7),
        Shape::nchw(19, 5, 7, 7),
        Shape::nchw(1, 2, 300, 300),
        Shape::nhwc(2, 9, 9, 64),
        Shape::ncl(4, 1, 9),
        Shape::ncl(0, 3, 4),
    ];
    let (of_x, of_y) = (Quantization { scale: 0.05, zero_point: -7 }, Quantization { scale: 0.03, zero_point: 11 });
    for (k, shape) in shapes.into_iter().map(Result::unwrap).enumerate() {
        let c = shape.channels();
        let fill = |seed| Data::Normal.fill::<f32>(c, seed);
        let (mut gamma, beta, mean, var) =
            (fill(1), fill(2), fill(3), fill(4).into_iter().map(|v| v * v).collect::<Vec<_>>());
        // Results that are no numbers, and far beyond the range on both sides.
        gamma.iter_mut().zip([f32::NAN, 1e30, -f32::INFINITY]).for_each(|(gamma, odd)| *gamma = odd);
        let x: Vec<i8> = (0..shape.len()).map(|i| (i * i * 31 + i * 7 + k) as i8).collect();
        let population = Population { mean: &mean, var: &var };
        for activation in [Activation::None, Activation::Relu, Activation::LeakyRelu(0.3)] {
            let affine = Affine::new(&gamma, &beta).with_activation(activation);
            let then = reference::forward_infer_quantized(&shape, &x, of_x, affine, (population, 1e-3), of_y);
            for tier in tiers() {
                let bn = plan::<f32>(shape, tier, Parallelism::Threads(3)).with_eps(1e-3).unwrap();
                for (stores, first) in [(Stores::Cached, 5), (Stores::Streaming, 0), (Stores::Streaming, 3)] {
                    let (bn, mut y) = (bn.clone().with_stores(stores), vec![99; first + x.len()]);
                    bn.forward_infer_quantized(&x, of_x, affine, population, &mut y[first..], of_y).unwrap();
                    assert_eq!(y[first..], then, "{shape:?}, {tier}");
                }
                let mut y = x.clone();
                bn.forward_infer_quantized_in_place(&mut y, of_x, affine, population, of_y).unwrap();
                assert_eq!(y, then, "{shape:?}, {tier}, in place");
            }
            let wide: Vec<f64> = x.iter().map(|&q| of_x.scale * (f64::from(q) - f64::from(of_x.zero_point))).collect();
            let [gamma, beta, mean, var] =
                [&gamma, &beta, &mean, &var].map(|v| v.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>());
            let affine = Affine::<f64>::new(&gamma, &beta).with_activation(activation);
            let exact = reference::forward_infer(&shape, &wide, affine, Population { mean: &mean, var: &var }, 1e-3);
            for (i, (&q, exact)) in then.iter().zip(exact).enumerate() {
                let exact = (exact / of_y.scale + f64::from(of_y.zero_point)).clamp(-128.0, 127.0);
                if exact.is_nan() {
                    assert_eq!(q, 0);
                    continue;
                }
                assert!((f64::from(q) - exact).abs() <= 0.5 + 1e-4, "{shape:?} {i}: {q} for {exact}");
            }
        }
    }
}

/// The even samples of a tensor twice as long, and half of each sample masked.
#[test]
fn quantized_views_and_masks() {
    let shape = Shape::nhwc(3, 4, 5, 20).unwrap();
    let sample = 4 * 5 * 20;
    let x: Vec<i8> = (0..6 * sample).map(|i| (i * i * 31 + i * 7) as i8).collect();
    let population = Population { mean: &[0.1; 20], var: &[2.0; 20] };
    let of = Quantization { scale: 0.05, zero_point: -7 };
    let even: Vec<i8> = x.chunks(2 * sample).flat_map(|pair| &pair[..sample]).copied().collect();
    let then = reference::forward_infer_quantized(&shape, &even, of, Affine::none(), (population, 1e-3), of);
    for tier in tiers() {
        let bn = plan::<f32>(shape, tier, Parallelism::Threads(2)).with_eps(1e-3).unwrap();
        let pairs = View::strided(&shape, &[3, 20, 20], &[2 * sample, 20, 1]).unwrap();
        let mut y = vec![0; even.len()];
        let viewing = bn.clone().with_views(pairs, View::dense(&shape)).unwrap();
        viewing.forward_infer_quantized(&x, of, Affine::none(), population, &mut y, of).unwrap();
        assert_eq!(y, then, "{tier}");
        let masked = bn.with_lengths(&[20, 7, 0]).unwrap();
        masked.forward_infer_quantized(&even, of, Affine::none(), population, &mut y, of).unwrap();
        let counts = |i: usize| i % sample < [20, 7, 0][i / sample] * 20;
        let expected: Vec<_> =
            then.iter().enumerate().map(|(i, &y)| if counts(i) { y } else { of.zero_point }).collect();
        assert_eq!(y, expected, "{tier}");
    }
}

#[test]
fn quantized_arguments_are_checked() {
    let bn = BatchNorm::<f32>::new(Shape::nc(2, 2).unwrap()).unwrap();
    let (x, mut y) = ([1i8; 4], [7i8; 4]);
    let population = Population { mean: &[0.0; 2], var: &[1.0; 2] };
    let good = Quantization { scale: 1.0, zero_point: 0 };
    let mut run = |x: &[i8], of_x, affine: Affine<'_, f32>, len: usize, of_y| {
        bn.forward_infer_quantized(x, of_x, affine, population, &mut y[..len], of_y)
    };
    let length = |what| Err(Error::Length { what, expected: 4, got: 3 });
    assert_eq!(run(&x[1..], good, Affine::none(), 4, good), length("x"));
    assert_eq!(run(&x, good, Affine::none(), 3, good), length("y"));
    for scale in [0.0, -1.0, f64::INFINITY] {
        let bad = Quantization { scale, zero_point: 0 };
        assert_eq!(run(&x, bad, Affine::none(), 4, good), Err(Error::Quantization { got: scale }));
        assert_eq!(run(&x, good, Affine::none(), 4, bad), Err(Error::Quantization { got: scale }));
    }
    let residual = [0.0; 4];
    assert_eq!(run(&x, good, Affine::none().with_residual(&residual), 4, good), Err(Error::QuantizedResidual));
    assert_eq!(
        run(&x, good, Affine::scale(&[1.0]), 4, good),
        Err(Error::Length { what: "gamma", expected: 2, got: 1 })
    );
    assert_eq!(y, [7; 4]);
}
