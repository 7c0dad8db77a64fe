//! candle-nn on its CPU device.

use anyhow::{Context, Result};
use candle_core::{Device, Tensor, Var};
use candle_nn::BatchNorm;

use crate::contestant::{About, Call, InProcess, locked_version};
use crate::problem::{Dtype, EPS, Inputs, Outputs, Pass, Problem, Size};

pub fn new() -> InProcess {
    InProcess {
        about: About { peer: "candle", version: locked_version("candle-nn"), layout: "NCHW" },
        implementation: "cpu".into(),
        serves: |problem| matches!(problem.pass, Pass::Forward | Pass::Step) && problem.dtype == Dtype::F32,
        build: |_, problem, inputs| Ok(Box::new(Candle::new(problem, inputs)?)),
        current: None,
    }
}

struct Candle {
    pass: Pass,
    bn: BatchNorm,
    x: Var,
    gamma: Var,
    beta: Var,
    dy: Tensor,
}

impl Candle {
    fn new(problem: &Problem, inputs: &Inputs) -> Result<Self> {
        let Size { n, c, h, w } = problem.size;
        let tensor = |values: &[f32]| Tensor::from_slice(values, (n, c, h, w), &Device::Cpu);
        let channels = |values: &[f32]| Tensor::from_slice(values, c, &Device::Cpu);
        let (gamma, beta) = (Var::from_tensor(&channels(&inputs.gamma)?)?, Var::from_tensor(&channels(&inputs.beta)?)?);
        let (mean, var) = (channels(&inputs.mean)?, channels(&inputs.var)?);
        Ok(Self {
            pass: problem.pass,
            bn: BatchNorm::new(c, mean, var, gamma.as_tensor().clone(), beta.as_tensor().clone(), EPS)?,
            x: Var::from_tensor(&tensor(&inputs.x)?)?,
            gamma,
            beta,
            dy: tensor(&inputs.dy)?,
        })
    }

    /// y; dx, dgamma, dbeta.
    fn run(&self) -> Result<(Tensor, Option<[Tensor; 3]>)> {
        let y = self.bn.forward_train(&self.x)?;
        if self.pass == Pass::Forward {
            return Ok((y, None));
        }
        let mut gradients = (&y * &self.dy)?.sum_all()?.backward()?;
        let mut of = |var: &Var| gradients.remove(var).context("a gradient is missing");
        let gradients = [of(&self.x)?, of(&self.gamma)?, of(&self.beta)?];
        Ok((y, Some(gradients)))
    }
}

impl Call for Candle {
    fn call(&mut self) -> Result<()> {
        self.run().map(drop)
    }

    fn outputs(&mut self) -> Result<Outputs> {
        let (y, gradients) = self.run()?;
        let tensors = [y].into_iter().chain(gradients.into_iter().flatten());
        let named = |(name, tensor): (_, Tensor)| Ok((name, tensor.flatten_all()?.to_vec1()?));
        ["y", "dx", "dgamma", "dbeta"].into_iter().zip(tensors).map(named).collect()
    }
}
