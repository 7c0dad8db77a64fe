//! burn on flex, the CPU backend that it recommends.

use anyhow::{Context, Result, anyhow};
use burn::module::Param;
use burn::nn::{BatchNorm, BatchNormConfig};
use burn::tensor::{Device, Tensor, TensorData};

use crate::contestant::{About, Call, InProcess, locked_version};
use crate::problem::{Dtype, EPS, Inputs, Outputs, Pass, Problem, Size};

pub fn new() -> InProcess {
    InProcess {
        about: About { peer: "burn", version: locked_version("burn"), layout: "NCHW" },
        implementation: "flex".into(),
        serves: |problem| matches!(problem.pass, Pass::Forward | Pass::Step) && problem.dtype == Dtype::F32,
        build: |_, problem, inputs| Ok(Box::new(Burn::new(problem, inputs))),
        current: None,
    }
}

struct Burn {
    pass: Pass,
    bn: BatchNorm,
    x: Tensor<4>,
    dy: Tensor<4>,
}

/// dx; dgamma and dbeta.
type Differentials = (Tensor<4>, [Tensor<1>; 2]);

impl Burn {
    fn new(problem: &Problem, inputs: &Inputs) -> Self {
        // Training is what burn does on a device that differentiates.
        let device = Device::flex().autodiff();
        let Size { n, c, h, w } = problem.size;
        let tensor = |values: &[f32]| Tensor::from_data(TensorData::new(values.to_vec(), [n, c, h, w]), &device);
        let parameter =
            |values: &[f32]| Param::from_tensor(Tensor::from_data(TensorData::new(values.to_vec(), [c]), &device));
        let mut bn = BatchNormConfig::new(c).with_epsilon(EPS).init(&device);
        bn.gamma = parameter(&inputs.gamma);
        bn.beta = parameter(&inputs.beta);
        Self { pass: problem.pass, bn, x: tensor(&inputs.x).require_grad(), dy: tensor(&inputs.dy) }
    }

    fn run(&self) -> Result<(Tensor<4>, Option<Differentials>)> {
        let y = self.bn.forward(self.x.clone());
        if self.pass == Pass::Forward {
            return Ok((y, None));
        }
        let mut gradients = (y.clone() * self.dy.clone()).sum().backward();
        let dx = self.x.grad_remove(&mut gradients).context("dx is missing")?;
        let mut of = |p: &Param<Tensor<1>>| p.val().grad_remove(&mut gradients).context("a gradient is missing");
        let channels = [of(&self.bn.gamma)?, of(&self.bn.beta)?];
        Ok((y, Some((dx, channels))))
    }
}

impl Call for Burn {
    fn call(&mut self) -> Result<()> {
        self.run().map(drop)
    }

    fn outputs(&mut self) -> Result<Outputs> {
        let values = |data: TensorData| data.try_to_vec().map_err(|e| anyhow!("{e:?}"));
        let (y, gradients) = self.run()?;
        let mut outputs = vec![("y", values(y.into_data())?)];
        if let Some((dx, [dgamma, dbeta])) = gradients {
            outputs.push(("dx", values(dx.into_data())?));
            outputs.push(("dgamma", values(dgamma.into_data())?));
            outputs.push(("dbeta", values(dbeta.into_data())?));
        }
        Ok(outputs)
    }
}
