//! What a plan of any element type can do: the one implementation behind all functions.

use std::ffi::c_void;

use batchnorm::{Activation, Affine, BatchNorm, Element, Gradients, Population, Shape};

use crate::arguments::{Io, Raw, Region, Span, apart, io};
use crate::halves::{GradientSums, Moments};
use crate::plan::{Change, Plan};
use crate::saved::{Saved, Statistics};
use crate::status::{Failure, Result};

/// Gamma and beta as the caller gave them, and the plan's activation.
#[derive(Clone, Copy)]
pub(crate) struct Line {
    gamma: Raw,
    beta: Raw,
    activation: Activation,
}

/// Passes on raw arguments.
///
/// # Safety
/// Of all unsafe functions: as [`crate`].
pub(crate) trait Passes: std::fmt::Debug + Send + Sync {
    fn shape(&self) -> &Shape;
    fn scratch(&self) -> usize;
    fn reserve(&self, calls: usize) -> Result<()>;
    fn with(&self, change: Change) -> Result<Box<dyn Passes>>;
    fn saved(&self) -> Result<Box<dyn Statistics>>;
    unsafe fn set(&self, saved: &mut Saved, count: u64, mean: Raw, inv_std: Raw) -> Result<()>;
    unsafe fn freeze(&self, mean: Raw, var: Raw, saved: &mut Saved) -> Result<()>;

    unsafe fn forward_train(&self, x: Raw, line: Line, y: Raw, saved: &mut Saved) -> Result<()>;
    unsafe fn forward_infer(&self, x: Raw, line: Line, mean: Raw, var: Raw, y: Raw) -> Result<()>;
    /// Those of x, gamma and beta.
    unsafe fn backward(&self, x: Raw, dy: Raw, saved: &Saved, line: Line, gradients: [Raw; 3]) -> Result<()>;

    unsafe fn moments(&self, x: Raw, moments: Raw) -> Result<()>;
    unsafe fn finish(&self, moments: Raw, saved: &mut Saved) -> Result<()>;
    unsafe fn normalize(&self, x: Raw, line: Line, saved: &Saved, y: Raw) -> Result<()>;
    unsafe fn gradient_sums(&self, x: Raw, dy: Raw, saved: &Saved, line: Line, sums: Raw) -> Result<()>;
    unsafe fn input_gradient(&self, x: Raw, dy: Raw, saved: &Saved, line: Line, sums: Raw, dx: Raw) -> Result<()>;
    unsafe fn parameter_gradients(&self, saved: &Saved, sums: Raw, dgamma: Raw, dbeta: Raw) -> Result<()>;
}

impl Line {
    pub(crate) fn new(plan: &Plan, gamma: (*const c_void, usize), beta: (*const c_void, usize)) -> Self {
        let (gamma, beta) = (Raw::new("gamma", gamma.0, gamma.1), Raw::new("beta", beta.0, beta.1));
        Self { gamma, beta, activation: plan.activation }
    }

    /// Gamma and beta with their number checked.
    fn regions<P>(self, channels: usize) -> Result<[Region<P>; 2]> {
        Ok([self.gamma.optional(channels)?, self.beta.optional(channels)?])
    }

    /// # Safety
    /// As [`Region::read`].
    unsafe fn affine<'a, E: Element>(self, [gamma, beta]: [Region<E::Param>; 2]) -> Affine<'a, E> {
        // SAFETY: the caller's promise.
        unsafe { Affine::of(gamma.read(), beta.read()) }.with_activation(self.activation)
    }
}

fn spans<T>(regions: &[Region<T>; 2]) -> [Span; 2] {
    [regions[0].span(), regions[1].span()]
}

/// A slice without elements if the region is none: of an empty tensor.
///
/// # Safety
/// As [`Region::read`].
unsafe fn read<'a, T>(region: Region<T>) -> &'a [T] {
    // SAFETY: the caller's promise.
    unsafe { region.read() }.unwrap_or_default()
}

impl<E: Element> Passes for BatchNorm<E> {
    fn shape(&self) -> &Shape {
        self.shape()
    }

    fn scratch(&self) -> usize {
        self.scratch_len()
    }

    fn reserve(&self, calls: usize) -> Result<()> {
        // As many as plans share work among at most; more would be a mistake that takes all memory.
        self.reserve(calls.min(1024));
        Ok(())
    }

    fn with(&self, change: Change) -> Result<Box<dyn Passes>> {
        let bn = self.clone();
        Ok(Box::new(match change {
            Change::Batch(batch) => {
                let shape = *self.shape();
                bn.with_shape(Shape::new(shape.layout(), batch, shape.channels(), &[shape.spatial()])?)?
            }
            Change::Eps(eps) => bn.with_eps(eps)?,
            Change::Tier(tier) => bn.with_tier(tier)?,
            Change::Parallelism(parallelism) => bn.with_parallelism(parallelism),
            Change::Accumulation(accumulates) => bn.with_accumulation(accumulates),
            Change::FromOutput(from_output) => bn.with_backward_from_output(from_output),
        }))
    }

    fn saved(&self) -> Result<Box<dyn Statistics>> {
        // An empty shape may have any number of channels, and running out of memory ends the process: so ask first.
        let channels = self.shape().channels();
        let room = Vec::<[E::Param; 4]>::new().try_reserve_exact(channels);
        room.map_err(|_| Failure::Memory { channels })?;
        Ok(Box::new(self.saved()))
    }

    unsafe fn set(&self, saved: &mut Saved, count: u64, mean: Raw, inv_std: Raw) -> Result<()> {
        let channels = self.shape().channels();
        let (mean, inv_std) = (mean.required(channels)?, inv_std.required(channels)?);
        let saved = saved.of_mut::<E::Param>()?;
        // SAFETY: the caller's promise.
        let (mean, inv_std) = unsafe { (read(mean).to_vec(), read(inv_std).to_vec()) };
        *saved = batchnorm::Saved::from_parts(count, mean, inv_std, self.eps())?;
        Ok(())
    }

    unsafe fn freeze(&self, mean: Raw, var: Raw, saved: &mut Saved) -> Result<()> {
        let channels = self.shape().channels();
        let (mean, var) = (mean.required(channels)?, var.required(channels)?);
        // SAFETY: the caller's promise.
        let population = unsafe { Population { mean: read(mean), var: read(var) } };
        self.freeze(population, saved.of_mut()?).map_err(Failure::from)
    }

    unsafe fn forward_train(&self, x: Raw, line: Line, y: Raw, saved: &mut Saved) -> Result<()> {
        let (x, y) = (x.required(self.shape().len())?, y.required(self.shape().len())?);
        let parameters = line.regions(self.shape().channels())?;
        let saved = saved.of_mut()?;
        // SAFETY: the caller's promise, for arguments that `io` found apart.
        unsafe {
            let io = io(x, y, &[], &spans(&parameters))?;
            let affine = line.affine(parameters);
            let done = match io {
                Io::Apart(x, y) => self.forward_train(x, affine, y, saved),
                Io::Over(x) => self.forward_train_in_place(x, affine, saved),
            };
            done.map_err(Failure::from)
        }
    }

    unsafe fn forward_infer(&self, x: Raw, line: Line, mean: Raw, var: Raw, y: Raw) -> Result<()> {
        let channels = self.shape().channels();
        let (x, y) = (x.required(self.shape().len())?, y.required(self.shape().len())?);
        let parameters = line.regions(channels)?;
        let (mean, var) = (mean.required(channels)?, var.required(channels)?);
        let [gamma, beta] = spans(&parameters);
        // SAFETY: the caller's promise, for arguments that `io` found apart.
        unsafe {
            let io = io(x, y, &[], &[gamma, beta, mean.span(), var.span()])?;
            let affine = line.affine(parameters);
            let population = Population { mean: read(mean), var: read(var) };
            let done = match io {
                Io::Apart(x, y) => self.forward_infer(x, affine, population, y),
                Io::Over(x) => self.forward_infer_in_place(x, affine, population),
            };
            done.map_err(Failure::from)
        }
    }

    unsafe fn backward(&self, x: Raw, dy: Raw, saved: &Saved, line: Line, gradients: [Raw; 3]) -> Result<()> {
        let (len, channels) = (self.shape().len(), self.shape().channels());
        let [dx, dgamma, dbeta] = gradients;
        let (x, dy, dx) = (x.required::<E>(len)?, dy.required::<E>(len)?, dx.optional(len)?);
        let parameters = line.regions(channels)?;
        let wanted = [dgamma.optional(channels)?, dbeta.optional(channels)?];
        let saved = saved.of()?;
        let [gamma, beta] = spans(&parameters);
        let written = spans(&wanted);
        // SAFETY: the caller's promise, for arguments that `io` found apart.
        unsafe {
            // What is not written may be read twice: dy may be x.
            let reads = [gamma, beta, x.span(), dy.span()];
            let to = if dx.is_none() {
                apart(&written, &[&reads])?;
                None
            } else {
                Some(io(dy, dx, &written, &reads[..3])?)
            };
            let affine = line.affine(parameters);
            let [dgamma, dbeta] = wanted;
            let gradients = Gradients { dgamma: dgamma.write(), dbeta: dbeta.write(), ..Default::default() };
            let done = match to {
                None => self.backward(read(x), read(dy), saved, affine, gradients),
                Some(Io::Apart(dy, dx)) => {
                    self.backward(read(x), dy, saved, affine, Gradients { dx: Some(dx), ..gradients })
                }
                Some(Io::Over(dy)) => self.backward_in_place(read(x), dy, saved, affine, gradients),
            };
            done.map_err(Failure::from)
        }
    }

    unsafe fn moments(&self, x: Raw, moments: Raw) -> Result<()> {
        let (x, moments) = (x.required(self.shape().len())?, moments.required::<Moments>(self.shape().channels())?);
        apart(&[moments.span()], &[&[x.span()]])?;
        let mut found = vec![batchnorm::Moments::default(); self.shape().channels()];
        // SAFETY: the caller's promise.
        unsafe {
            self.moments(read(x), &mut found)?;
            moments.write().unwrap_or_default().iter_mut().zip(found).for_each(|(to, found)| *to = found.into());
        }
        Ok(())
    }

    unsafe fn finish(&self, moments: Raw, saved: &mut Saved) -> Result<()> {
        // SAFETY: the caller's promise.
        let moments = unsafe { read(moments.required::<Moments>(self.shape().channels())?) };
        let moments: Vec<_> = moments.iter().map(|&moments| moments.into()).collect();
        self.finish(&moments, saved.of_mut()?).map_err(Failure::from)
    }

    unsafe fn normalize(&self, x: Raw, line: Line, saved: &Saved, y: Raw) -> Result<()> {
        let (x, y) = (x.required(self.shape().len())?, y.required(self.shape().len())?);
        let parameters = line.regions(self.shape().channels())?;
        let saved = saved.of()?;
        // SAFETY: the caller's promise, for arguments that `io` found apart.
        unsafe {
            let io = io(x, y, &[], &spans(&parameters))?;
            let affine = line.affine(parameters);
            let done = match io {
                Io::Apart(x, y) => self.normalize(x, affine, saved, y),
                Io::Over(x) => self.normalize_in_place(x, affine, saved),
            };
            done.map_err(Failure::from)
        }
    }

    unsafe fn gradient_sums(&self, x: Raw, dy: Raw, saved: &Saved, line: Line, sums: Raw) -> Result<()> {
        let (len, channels) = (self.shape().len(), self.shape().channels());
        let (x, dy, sums) = (x.required(len)?, dy.required(len)?, sums.required::<GradientSums>(channels)?);
        let parameters = line.regions(channels)?;
        apart(&[sums.span()], &[&[x.span(), dy.span()], &spans(&parameters)])?;
        let mut found = vec![batchnorm::GradientSums::default(); channels];
        // SAFETY: the caller's promise.
        unsafe {
            self.gradient_sums(read(x), read(dy), saved.of()?, line.affine(parameters), &mut found)?;
            sums.write().unwrap_or_default().iter_mut().zip(found).for_each(|(to, found)| *to = found.into());
        }
        Ok(())
    }

    unsafe fn input_gradient(&self, x: Raw, dy: Raw, saved: &Saved, line: Line, sums: Raw, dx: Raw) -> Result<()> {
        let (len, channels) = (self.shape().len(), self.shape().channels());
        let (x, dy, dx) = (x.required(len)?, dy.required(len)?, dx.required(len)?);
        let (parameters, sums) = (line.regions(channels)?, sums.required::<GradientSums>(channels)?);
        let saved = saved.of()?;
        let [gamma, beta] = spans(&parameters);
        // SAFETY: the caller's promise, for arguments that `io` found apart.
        unsafe {
            let io = io(dy, dx, &[], &[gamma, beta, x.span(), sums.span()])?;
            let affine = line.affine(parameters);
            let sums: Vec<_> = read(sums).iter().map(|&sums| sums.into()).collect();
            let done = match io {
                Io::Apart(dy, dx) => self.input_gradient(read(x), dy, saved, affine, &sums, dx),
                Io::Over(dy) => self.input_gradient_in_place(read(x), dy, saved, affine, &sums),
            };
            done.map_err(Failure::from)
        }
    }

    unsafe fn parameter_gradients(&self, saved: &Saved, sums: Raw, dgamma: Raw, dbeta: Raw) -> Result<()> {
        let channels = self.shape().channels();
        let sums = sums.required::<GradientSums>(channels)?;
        let wanted = [dgamma.optional(channels)?, dbeta.optional(channels)?];
        apart(&spans(&wanted), &[&[sums.span()]])?;
        let [dgamma, dbeta] = wanted;
        // SAFETY: the caller's promise, for arguments that are apart.
        unsafe {
            let sums: Vec<_> = read(sums).iter().map(|&sums| sums.into()).collect();
            self.parameter_gradients(saved.of()?, &sums, dgamma.write(), dbeta.write()).map_err(Failure::from)
        }
    }
}
