//! The layers of both networks. Each takes its own gradient step inside its backward pass.

use crate::gemm::{Matrix, gemm};
use batchnorm::{Affine, BatchNorm, Error, Gradients, Momentum, Parallelism, Running, Saved, Shape, Variance};
use rand::{Rng, RngExt};

/// Channels, height and width of what one image is at some layer; a dense layer has 1 x 1 maps.
pub type Dims = [usize; 3];

/// Images in a training batch, as in the paper.
pub const BATCH: usize = 60;

/// One layer. Slices hold whole batches, image by image.
pub trait Layer: Send {
    /// Floats that leave this layer for one image.
    fn outputs(&self) -> usize;

    fn infer(&self, x: &[f32], y: &mut [f32]) -> Result<(), Error>;

    /// The forward pass of a training step; other than `infer` only where batch statistics matter.
    fn train(&mut self, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
        self.infer(x, y)
    }

    /// Writes the gradient for `x`, unless nobody wants it, then moves the layer's own parameters
    /// by `-rate` times their gradient. `x` and `y` are those of the last call of `train`.
    fn backward(&mut self, rate: f32, x: &[f32], y: &[f32], dy: &[f32], dx: Option<&mut [f32]>) -> Result<(), Error>;
}

/// Gaussian numbers of mean zero by the Box-Muller transform.
fn gaussian(count: usize, deviation: f32, rng: &mut impl Rng) -> Vec<f32> {
    let draw = |_| {
        // 1 - [0, 1) keeps the logarithm away from zero.
        let (u, v) = (1.0 - rng.random::<f32>(), rng.random::<f32>());
        deviation * (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
    };
    (0..count).map(draw).collect()
}

/// `p -= rate * gradient`
pub fn descend(p: &mut [f32], rate: f32, gradient: &[f32]) {
    for (p, g) in p.iter_mut().zip(gradient) {
        *p -= rate * g;
    }
}

/// A linear layer without a bias, which Batch Normalization would take away again.
pub struct Dense {
    weights: Vec<f32>,
    inputs: usize,
    outputs: usize,
}

impl Dense {
    pub fn new(inputs: usize, outputs: usize, deviation: f32, rng: &mut impl Rng) -> Self {
        let weights = gaussian(inputs * outputs, deviation, rng);
        Dense { weights, inputs, outputs }
    }

    fn weights(&self) -> Matrix<'_> {
        Matrix::new(&self.weights, self.inputs, self.outputs)
    }
}

impl Layer for Dense {
    fn outputs(&self) -> usize {
        self.outputs
    }

    fn infer(&self, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
        let x = Matrix::new(x, x.len() / self.inputs, self.inputs);
        gemm(1.0, x, self.weights(), 0.0, y);
        Ok(())
    }

    fn backward(&mut self, rate: f32, x: &[f32], _y: &[f32], dy: &[f32], dx: Option<&mut [f32]>) -> Result<(), Error> {
        let x = Matrix::new(x, x.len() / self.inputs, self.inputs);
        let dy = Matrix::new(dy, dy.len() / self.outputs, self.outputs);
        if let Some(dx) = dx {
            gemm(1.0, dy, self.weights().transposed(), 0.0, dx);
        }
        gemm(-rate, x.transposed(), dy, 1.0, &mut self.weights);
        Ok(())
    }
}

/// A 3 x 3 convolution, stride one, a border of zeros, no bias; by im2col, so that the output of
/// the matrix product is NCHW as it stands.
pub struct Conv {
    weights: Vec<f32>,
    from: Dims,
    maps: usize,
}

impl Conv {
    pub fn new(from: Dims, maps: usize, rng: &mut impl Rng) -> Self {
        let taps = 9 * from[0];
        // The deviation that keeps the variance of what ReLU lets through.
        let weights = gaussian(maps * taps, (2.0 / taps as f32).sqrt(), rng);
        Conv { weights, from, maps }
    }

    fn weights(&self) -> Matrix<'_> {
        Matrix::new(&self.weights, self.maps, 9 * self.from[0])
    }

    /// Calls `f(index in the columns, index in the image, length)` for every run of pixels that
    /// one tap reads in one row.
    fn runs(&self, mut f: impl FnMut(usize, usize, usize)) {
        let [channels, height, width] = self.from;
        for tap in 0..9 * channels {
            let (channel, dy, dx) = (tap / 9, tap / 3 % 3, tap % 3);
            // Output columns whose input column, one to the left plus `dx`, is inside the image.
            let (first, end) = (1_usize.saturating_sub(dx), width.min(width + 1 - dx));
            for row in 0..height {
                let source = row + dy;
                if (1..=height).contains(&source) {
                    let column = (tap * height + row) * width + first;
                    let pixel = (channel * height + source - 1) * width + first + dx - 1;
                    f(column, pixel, end - first);
                }
            }
        }
    }

    /// Room for the columns of one image. The places of the border are never written and stay zero.
    fn columns(&self) -> Vec<f32> {
        vec![0.0; 9 * self.from.iter().product::<usize>()]
    }

    fn fill(&self, image: &[f32], columns: &mut [f32]) {
        self.runs(|to, from, len| {
            columns[to..to + len].copy_from_slice(&image[from..from + len]);
        });
    }

    fn area(&self) -> usize {
        self.from[1] * self.from[2]
    }
}

impl Layer for Conv {
    fn outputs(&self) -> usize {
        self.maps * self.area()
    }

    fn infer(&self, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
        let mut columns = self.columns();
        let images = x.chunks_exact(self.from.iter().product());
        for (x, y) in images.zip(y.chunks_exact_mut(self.outputs())) {
            self.fill(x, &mut columns);
            let columns = Matrix::new(&columns, 9 * self.from[0], self.area());
            gemm(1.0, self.weights(), columns, 0.0, y);
        }
        Ok(())
    }

    fn backward(&mut self, rate: f32, x: &[f32], _y: &[f32], dy: &[f32], dx: Option<&mut [f32]>) -> Result<(), Error> {
        let (taps, area) = (9 * self.from[0], self.area());
        let size = self.from.iter().product();
        let mut columns = self.columns();
        if let Some(dx) = dx {
            dx.fill(0.0);
            let images = dx.chunks_exact_mut(size);
            for (dx, dy) in images.zip(dy.chunks_exact(self.outputs())) {
                let dy = Matrix::new(dy, self.maps, area);
                gemm(1.0, self.weights().transposed(), dy, 0.0, &mut columns);
                self.runs(|from, to, len| {
                    let dx = dx[to..to + len].iter_mut();
                    dx.zip(&columns[from..from + len]).for_each(|(a, b)| *a += b);
                });
            }
            columns.fill(0.0);
        }
        let outputs = self.outputs();
        for (x, dy) in x.chunks_exact(size).zip(dy.chunks_exact(outputs)) {
            self.fill(x, &mut columns);
            let columns = Matrix::new(&columns, taps, area);
            let dy = Matrix::new(dy, self.maps, area);
            gemm(-rate, dy, columns.transposed(), 1.0, &mut self.weights);
        }
        Ok(())
    }
}

/// The shape of a batch of so many images.
pub fn shape([c, h, w]: Dims, images: usize) -> Result<Shape, Error> {
    match (h, w) {
        (1, 1) => Shape::nc(images, c),
        _ => Shape::nchw(images, c, h, w),
    }
}

/// Batch Normalization with a learned scale and shift, and the moving population statistics.
pub struct Norm {
    dims: Dims,
    batch: BatchNorm<f32>,
    saved: Saved<f32>,
    running: Running<f32>,
    gamma: Vec<f32>,
    beta: Vec<f32>,
    dgamma: Vec<f32>,
    dbeta: Vec<f32>,
}

impl Norm {
    pub fn new(dims: Dims) -> Result<Self, Error> {
        let channels = dims[0];
        let batch = Self::kernels(dims, BATCH)?;
        Ok(Norm {
            dims,
            saved: batch.saved(),
            batch,
            running: Running::new(channels, Momentum::WeightOfNew(0.1), Variance::Unbiased)?,
            gamma: vec![1.0; channels],
            beta: vec![0.0; channels],
            dgamma: vec![0.0; channels],
            dbeta: vec![0.0; channels],
        })
    }

    fn kernels(dims: Dims, images: usize) -> Result<BatchNorm<f32>, Error> {
        // Every network trains on a thread of its own, which is all the parallelism there is to have.
        Ok(BatchNorm::new(shape(dims, images)?)?.with_parallelism(Parallelism::Sequential))
    }
}

impl Layer for Norm {
    fn outputs(&self) -> usize {
        self.dims.iter().product()
    }

    fn infer(&self, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
        let affine = Affine::new(&self.gamma, &self.beta);
        Self::kernels(self.dims, x.len() / self.outputs())?.forward_infer(x, affine, self.running.population(), y)
    }

    fn train(&mut self, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
        let affine = Affine::new(&self.gamma, &self.beta);
        self.batch.forward_train(x, affine, y, &mut self.saved)?;
        self.running.update(&self.saved)
    }

    fn backward(&mut self, rate: f32, x: &[f32], _y: &[f32], dy: &[f32], dx: Option<&mut [f32]>) -> Result<(), Error> {
        let gradients =
            Gradients { dx, dgamma: Some(&mut self.dgamma), dbeta: Some(&mut self.dbeta), ..Default::default() };
        self.batch.backward(x, dy, &self.saved, Affine::scale(&self.gamma), gradients)?;
        descend(&mut self.gamma, rate, &self.dgamma);
        descend(&mut self.beta, rate, &self.dbeta);
        Ok(())
    }
}

/// One learned number added to each channel: what stands where there is no `Norm`.
pub struct Bias {
    values: Vec<f32>,
    area: usize,
}

impl Bias {
    pub fn new([channels, height, width]: Dims) -> Self {
        Bias { values: vec![0.0; channels], area: height * width }
    }

    /// The length of the vector of all of them.
    #[cfg(feature = "whitening")]
    pub fn length(&self) -> f64 {
        self.values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
    }
}

impl Layer for Bias {
    fn outputs(&self) -> usize {
        self.values.len() * self.area
    }

    fn infer(&self, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
        let maps = x.chunks_exact(self.area);
        let maps = maps.zip(y.chunks_exact_mut(self.area));
        for ((x, y), bias) in maps.zip(self.values.iter().cycle()) {
            x.iter().zip(y).for_each(|(x, y)| *y = x + bias);
        }
        Ok(())
    }

    fn backward(&mut self, rate: f32, _x: &[f32], _y: &[f32], dy: &[f32], dx: Option<&mut [f32]>) -> Result<(), Error> {
        if let Some(dx) = dx {
            dx.copy_from_slice(dy);
        }
        for image in dy.chunks_exact(self.outputs()) {
            let maps = image.chunks_exact(self.area);
            for (bias, map) in self.values.iter_mut().zip(maps) {
                *bias -= rate * map.iter().sum::<f32>();
            }
        }
        Ok(())
    }
}

/// A function of each element, with its derivative in terms of the result.
pub struct Elementwise {
    size: usize,
    function: fn(f32) -> f32,
    derivative: fn(f32) -> f32,
}

impl Elementwise {
    pub fn sigmoid(size: usize) -> Self {
        Elementwise { size, function: |x| 1.0 / (1.0 + (-x).exp()), derivative: |y| y * (1.0 - y) }
    }

    pub fn relu(size: usize) -> Self {
        Elementwise { size, function: |x| x.max(0.0), derivative: |y| if y > 0.0 { 1.0 } else { 0.0 } }
    }
}

impl Layer for Elementwise {
    fn outputs(&self) -> usize {
        self.size
    }

    fn infer(&self, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
        x.iter().zip(y).for_each(|(x, y)| *y = (self.function)(*x));
        Ok(())
    }

    fn backward(&mut self, _rate: f32, _x: &[f32], y: &[f32], dy: &[f32], dx: Option<&mut [f32]>) -> Result<(), Error> {
        for ((dx, dy), y) in dx.into_iter().flatten().zip(dy).zip(y) {
            *dx = dy * (self.derivative)(*y);
        }
        Ok(())
    }
}

/// The mean of every 2 x 2 square; an odd last row or column is left out.
pub struct Pool {
    from: Dims,
}

impl Pool {
    pub fn new(from: Dims) -> Self {
        Pool { from }
    }

    pub fn dims(&self) -> Dims {
        let [channels, height, width] = self.from;
        [channels, height / 2, width / 2]
    }

    /// Calls `f(index of a pooled pixel, indices of its four)` for a batch of `pooled` pixels.
    fn squares(&self, pooled: usize, mut f: impl FnMut(usize, [usize; 4])) {
        let [_, height, width] = self.from;
        let [_, rows, cols] = self.dims();
        for i in 0..pooled {
            let (map, row, col) = (i / (rows * cols), i / cols % rows, i % cols);
            let corner = (map * height + 2 * row) * width + 2 * col;
            f(i, [corner, corner + 1, corner + width, corner + width + 1]);
        }
    }
}

impl Layer for Pool {
    fn outputs(&self) -> usize {
        self.dims().iter().product()
    }

    fn infer(&self, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
        self.squares(y.len(), |i, four| {
            y[i] = four.iter().map(|&j| x[j]).sum::<f32>() / 4.0;
        });
        Ok(())
    }

    fn backward(
        &mut self,
        _rate: f32,
        _x: &[f32],
        _y: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        if let Some(dx) = dx {
            dx.fill(0.0);
            self.squares(dy.len(), |i, four| {
                four.iter().for_each(|&j| dx[j] = dy[i] / 4.0);
            });
        }
        Ok(())
    }
}
