//! This crate, as a contestant.

use anyhow::Result;
use batchnorm::{Affine, BatchNorm, Element, Gradients, Population, Saved, Shape};

use crate::contestant::{About, Call, InProcess, locked_version};
use crate::problem::{Dtype, EPS, Inputs, Outputs, Pass, Problem, Size, output_names};

pub const NAME: &str = "batchnorm";

pub fn new(layout: &'static str) -> InProcess {
    InProcess {
        about: About { peer: NAME, version: locked_version("batchnorm"), layout },
        implementation: String::new(),
        serves: |_| true,
        build: |about, problem, inputs| {
            Ok(match problem.dtype {
                Dtype::F32 => Box::new(Ours::<f32>::new(about.layout, problem, inputs)?),
                Dtype::Bf16 => Box::new(Ours::<half::bf16>::new(about.layout, problem, inputs)?),
            })
        },
        current: None,
    }
}

/// Every buffer that a pass may need, so that no call allocates.
struct Ours<E: Element> {
    pass: Pass,
    size: Size,
    channels_last: bool,
    bn: BatchNorm<E>,
    saved: Saved<f32>,
    x: Vec<E>,
    dy: Vec<E>,
    y: Vec<E>,
    dx: Vec<E>,
    gamma: Vec<f32>,
    beta: Vec<f32>,
    mean: Vec<f32>,
    var: Vec<f32>,
    dgamma: Vec<f32>,
    dbeta: Vec<f32>,
}

impl<E: Element<Param = f32>> Ours<E> {
    fn new(layout: &str, problem: &Problem, inputs: &Inputs) -> Result<Self> {
        let size = problem.size;
        let Size { n, c, h, w } = size;
        let channels_last = layout == "NHWC";
        let shape = if channels_last { Shape::nhwc(n, h, w, c) } else { Shape::nchw(n, c, h, w) }?;
        let tensor = |values: &[f32]| -> Vec<E> {
            let values = values.iter().map(|&v| E::from_param(v)).collect::<Vec<_>>();
            if channels_last { transposed(&values, n, c, h * w) } else { values }
        };
        let bn = BatchNorm::new(shape)?.with_eps(EPS)?;
        let mut ours = Self {
            pass: Pass::Forward,
            size,
            channels_last,
            saved: bn.saved(),
            bn,
            x: tensor(&inputs.x),
            dy: tensor(&inputs.dy),
            y: vec![E::default(); size.len()],
            dx: vec![E::default(); size.len()],
            gamma: inputs.gamma.clone(),
            beta: inputs.beta.clone(),
            mean: inputs.mean.clone(),
            var: inputs.var.clone(),
            dgamma: vec![0.0; c],
            dbeta: vec![0.0; c],
        };
        // The statistics that backward needs.
        ours.call()?;
        Ok(Self { pass: problem.pass, ..ours })
    }
}

impl<E: Element<Param = f32>> Call for Ours<E> {
    fn call(&mut self) -> Result<()> {
        let affine = Affine::new(&self.gamma, &self.beta);
        if self.pass == Pass::Inference {
            let population = Population { mean: &self.mean, var: &self.var };
            self.bn.forward_infer(&self.x, affine, population, &mut self.y)?;
        }
        if matches!(self.pass, Pass::Forward | Pass::Step) {
            self.bn.forward_train(&self.x, affine, &mut self.y, &mut self.saved)?;
        }
        if matches!(self.pass, Pass::Backward | Pass::Step) {
            let (dx, dgamma, dbeta) = (Some(&mut self.dx[..]), Some(&mut self.dgamma[..]), Some(&mut self.dbeta[..]));
            let gradients = Gradients { dx, dgamma, dbeta, ..Default::default() };
            self.bn.backward(&self.x, &self.dy, &self.saved, Affine::scale(&self.gamma), gradients)?;
        }
        Ok(())
    }

    fn outputs(&mut self) -> Result<Outputs> {
        self.call()?;
        let Size { n, c, h, w } = self.size;
        let tensor = |values: &[E]| -> Vec<f32> {
            let values = values.iter().map(|v| v.to_param()).collect::<Vec<_>>();
            if self.channels_last { transposed(&values, n, h * w, c) } else { values }
        };
        let named = |&name: &&'static str| {
            let values = match name {
                "y" => tensor(&self.y),
                "dx" => tensor(&self.dx),
                "dgamma" => self.dgamma.clone(),
                _ => self.dbeta.clone(),
            };
            (name, values)
        };
        Ok(output_names(self.pass).iter().map(named).collect())
    }
}

/// `n` matrices of `rows` by `columns`, each transposed.
fn transposed<T: Copy>(values: &[T], n: usize, rows: usize, columns: usize) -> Vec<T> {
    let at = |i: usize| {
        let (matrix, column, row) = (i / (rows * columns), i / rows % columns, i % rows);
        values[(matrix * rows + row) * columns + column]
    };
    (0..n * rows * columns).map(at).collect()
}
