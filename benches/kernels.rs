//! Times of every pass over a table of shapes, for regressions: `cargo bench --bench kernels`.

use batchnorm::{Activation, Affine, BatchNorm, Cotangents, Gradients, Layout, Population, Quantization, RenormLimits};
use batchnorm::{SecondGradients, Shape, View};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// A large plane, small planes, a tensor that fits the cache, rows, and three channels.
fn shapes() -> [(&'static str, Shape); 7] {
    [
        ("nchw 8x64x56x56", Shape::nchw(8, 64, 56, 56)),
        ("nchw 32x256x7x7", Shape::nchw(32, 256, 7, 7)),
        ("nchw 1x64x14x14", Shape::nchw(1, 64, 14, 14)),
        ("nchw 2x3x256x256", Shape::nchw(2, 3, 256, 256)),
        ("nhwc 8x56x56x64", Shape::nhwc(8, 56, 56, 64)),
        ("nhwc 2x256x256x3", Shape::nhwc(2, 256, 256, 3)),
        ("nc 1024x512", Shape::nc(1024, 512)),
    ]
    .map(|(name, shape)| (name, shape.expect("a shape of the table")))
}

/// The gradients of the input, gamma and beta.
fn all<'a>(dx: &'a mut [f32], dgamma: &'a mut [f32], dbeta: &'a mut [f32]) -> Gradients<'a, f32> {
    Gradients { dx: Some(dx), dgamma: Some(dgamma), dbeta: Some(dbeta), ..Default::default() }
}

fn kernels(criterion: &mut Criterion) {
    for (name, shape) in shapes() {
        let x: Vec<f32> = (0..shape.len()).map(|i| (i as f32 * 0.618_034).fract()).collect();
        let dy: Vec<f32> = x.iter().rev().copied().collect();
        let mut out = x.clone();
        let (gamma, beta) = (vec![1.5; shape.channels()], vec![0.5; shape.channels()]);
        let (mut dgamma, mut dbeta) = (gamma.clone(), beta.clone());
        let affine = Affine::new(&gamma, &beta);
        let population = Population { mean: &beta, var: &gamma };
        let bn = BatchNorm::<f32>::new(shape).expect("a plan for the table");
        let mut saved = bn.saved();
        bn.forward_train(&x, affine, &mut out, &mut saved).expect("a call of the bench");

        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Bytes(size_of_val(&x[..]) as u64));
        group.bench_function(BenchmarkId::from_parameter("forward"), |bench| {
            bench.iter(|| bn.forward_train(&x, affine, &mut out, &mut saved));
        });
        group.bench_function(BenchmarkId::from_parameter("inference"), |bench| {
            bench.iter(|| bn.forward_infer(&x, affine, population, &mut out));
        });
        let (bytes, mut bytes_out) = (vec![3i8; shape.len()], vec![0i8; shape.len()]);
        let steps = Quantization { scale: 0.02, zero_point: 3 };
        group.bench_function(BenchmarkId::from_parameter("inference, quantized"), |bench| {
            bench.iter(|| bn.forward_infer_quantized(&bytes, steps, affine, population, &mut bytes_out, steps));
        });
        group.bench_function(BenchmarkId::from_parameter("inference in place"), |bench| {
            bench.iter_batched_ref(
                || x.clone(),
                |x| bn.forward_infer_in_place(x, affine, population),
                BatchSize::LargeInput,
            );
        });
        group.bench_function(BenchmarkId::from_parameter("backward"), |bench| {
            bench.iter(|| bn.backward(&x, &dy, &saved, affine, all(&mut out, &mut dgamma, &mut dbeta)));
        });
        let fused = affine.with_residual(&dy).with_activation(Activation::Relu);
        group.bench_function(BenchmarkId::from_parameter("forward, residual and ReLU"), |bench| {
            bench.iter(|| bn.forward_train(&x, fused, &mut out, &mut saved));
        });
        let mut gates = vec![0; bn.gates_len()];
        group.bench_function(BenchmarkId::from_parameter("forward, residual, ReLU and its bits"), |bench| {
            bench.iter(|| bn.forward_train(&x, fused.with_gates_to(&mut gates), &mut out, &mut saved));
        });
        group.bench_function(BenchmarkId::from_parameter("backward, ReLU by its bits"), |bench| {
            let fused = fused.with_gates(&gates);
            bench.iter(|| bn.backward(&x, &dy, &saved, fused, all(&mut out, &mut dgamma, &mut dbeta)));
        });
        let output = out.clone();
        let fused = fused.with_output(&output);
        group.bench_function(BenchmarkId::from_parameter("backward, ReLU"), |bench| {
            bench.iter(|| bn.backward(&x, &dy, &saved, fused, all(&mut out, &mut dgamma, &mut dbeta)));
        });
        let from_output = bn.clone().with_backward_from_output(true);
        let (leaky, output) = (affine.with_activation(Activation::LeakyRelu(0.01)), out.clone());
        group.bench_function(BenchmarkId::from_parameter("backward, from the output"), |bench| {
            bench.iter(|| from_output.backward(&output, &dy, &saved, leaky, all(&mut out, &mut dgamma, &mut dbeta)));
        });
        group.bench_function(BenchmarkId::from_parameter("double backward"), |bench| {
            let cotangents = Cotangents { dx: &output, dgamma: None, dbeta: None };
            bench.iter(|| {
                let gradients = SecondGradients { x: Some(&mut out), ..Default::default() };
                bn.double_backward(&x, &dy, &saved, affine, cotangents, gradients)
            });
        });
        bn.freeze(population, &mut saved).expect("statistics of the bench");
        group.bench_function(BenchmarkId::from_parameter("backward, frozen"), |bench| {
            bench.iter(|| bn.backward(&x, &dy, &saved, affine, all(&mut out, &mut dgamma, &mut dbeta)));
        });
        group.bench_function(BenchmarkId::from_parameter("dx, frozen"), |bench| {
            bench.iter(|| {
                let gradients = Gradients { dx: Some(&mut out), ..Default::default() };
                bn.backward(&x, &dy, &saved, Affine::scale(&gamma), gradients)
            });
        });
        saved.renormalize(population, RenormLimits::at_step(30_000)).expect("statistics of the bench");
        group.bench_function(BenchmarkId::from_parameter("forward, renormalized"), |bench| {
            bench.iter(|| bn.forward_train(&x, affine, &mut out, &mut saved));
        });
        let ghost = bn.clone().ghost(shape.batch().div_ceil(4)).expect("virtual batches of the bench");
        let mut saved = ghost.saved();
        group.bench_function(BenchmarkId::from_parameter("forward, ghost"), |bench| {
            bench.iter(|| ghost.forward_train(&x, affine, &mut out, &mut saved));
        });
        let (n, c, size) = (shape.batch(), shape.channels(), shape.spatial());
        // Half of the channels of a larger tensor.
        let (sizes, strides) = match shape.layout() {
            Layout::ChannelsFirst => ([n, c, size], [2 * c * size, size, 1]),
            Layout::ChannelsLast => ([n, size, c], [2 * c * size, 2 * c, 1]),
        };
        let slice = View::strided(&shape, &sizes, &strides).expect("strides of the bench");
        let big = vec![1.5; slice.len()];
        let sliced = bn.clone().with_views(slice, View::dense(&shape)).expect("views of the bench");
        let mut saved = bn.saved();
        group.bench_function(BenchmarkId::from_parameter("forward, channel slice"), |bench| {
            bench.iter(|| sliced.forward_train(&big, affine, &mut out, &mut saved));
        });
        if let Ok(blocks) = View::blocked(&shape, 16) {
            let (x, mut y) = (vec![1.5; blocks.len()], vec![0.0; blocks.len()]);
            let blocked = bn.clone().with_views(blocks.clone(), blocks).expect("views of the bench");
            group.bench_function(BenchmarkId::from_parameter("forward, nChw16c"), |bench| {
                bench.iter(|| blocked.forward_train(&x, affine, &mut y, &mut saved));
            });
        }
        let lengths: Vec<_> = (0..n).map(|i| size - size / 2 * (i % 2)).collect();
        let masked = bn.with_lengths(&lengths).expect("lengths of the bench");
        group.bench_function(BenchmarkId::from_parameter("forward, every second sample half as long"), |bench| {
            bench.iter(|| masked.forward_train(&x, affine, &mut out, &mut saved));
        });
        group.finish();
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
