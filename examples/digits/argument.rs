//! The paper's argument for differentiating through a normalization (Ioffe & Szegedy 2015, section 2): a bias that is
//! learned before it, by gradients that take mean and covariance as constants, grows without end and changes nothing.

use crate::Result;
use crate::data::Data;
use crate::experiment::Batches;
use crate::layers::{BATCH, Bias, Dense, Layer};
use crate::network::{CLASSES, softmax};
use batchnorm::whitening::{Running, Saved, Whitening};
use batchnorm::{Affine, Gradients, Momentum, Shape, Variance};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::io::Write;

const STEPS: usize = 1000;
const RATE: f32 = 0.1;

/// Prints the length of the bias and the loss; gives the lengths at each step, ignoring the statistics and not.
pub fn report(data: &Data, seed: u64, out: &mut impl Write) -> Result<Vec<(&'static str, Vec<f64>)>> {
    writeln!(
        out,
        "\nA linear layer that stays, a bias b that learns, whitening, ten classes: length of b, and loss\n"
    )?;
    let runs = [learn(data, seed, true)?, learn(data, seed, false)?];
    crate::row(out, "", ["ignoring", "", "through", ""])?;
    crate::row(out, "step", ["|b|", "loss", "|b|", "loss"])?;
    for step in (0..=5).map(|i| i * STEPS / 5) {
        crate::row(out, step, runs.iter().flatten().map(|run| format!("{:.3}", run[step])))?;
    }
    let [[ignoring, _], [through, _]] = runs;
    Ok(vec![("statistics as constants", ignoring), ("through the statistics", through)])
}

/// The length of the bias and the loss on one batch, before each step.
fn learn(data: &Data, seed: u64, ignores: bool) -> Result<[Vec<f64>; 2]> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let dense = Dense::new(data.train.size, CLASSES, 0.1, &mut rng);
    let mut bias = Bias::new([CLASSES, 1, 1]);
    let plan = Whitening::<f32>::new(Shape::nc(BATCH, CLASSES)?)?;
    let mut saved = plan.saved();
    let mut batches = Batches::new(&data.train);
    let (pixels, labels) = batches.next(&mut rng);
    let room = || vec![0f32; BATCH * CLASSES];
    let (mut u, mut x, mut scores, mut dx) = (room(), room(), room(), room());
    dense.infer(pixels, &mut u)?;
    let (mut lengths, mut losses) = (Vec::new(), Vec::new());
    for _ in 0..=STEPS {
        bias.infer(&u, &mut x)?;
        plan.forward_train(&x, Affine::none(), &mut scores, &mut saved)?;
        let mut loss = 0.0;
        for (scores, &label) in scores.chunks_exact_mut(CLASSES).zip(labels) {
            softmax(scores);
            loss -= f64::from(scores[usize::from(label)].ln()) / BATCH as f64;
            scores[usize::from(label)] -= 1.0;
            scores.iter_mut().for_each(|score| *score /= BATCH as f32);
        }
        if ignores {
            as_constants(&plan, &saved, &scores, &mut dx)?;
        } else {
            let gradients = Gradients { dx: Some(&mut dx), ..Default::default() };
            plan.backward(&x, &scores, &saved, Affine::none(), gradients)?;
        }
        lengths.push(bias.length());
        losses.push(loss);
        bias.backward(RATE, &u, &x, &dx, None)?;
    }
    Ok([lengths, losses])
}

/// `dx = W dy`, which would be the gradient if mean and covariance were constants: W is symmetric, so inference with the
/// covariance and no mean is just that.
fn as_constants(plan: &Whitening<f32>, saved: &Saved, dy: &[f32], dx: &mut [f32]) -> Result<()> {
    let mut constants: Running = plan.running(Momentum::WeightOfNew(1.0), Variance::Biased)?;
    constants.restore(&[0.0; CLASSES], &saved.covariances(), 1)?;
    Ok(plan.forward_infer(dy, &plan.projection(&constants, Affine::none())?, dx)?)
}
