//! An operation whose arguments were checked, ready to run.
//!
//! It is generic over the element type alone, and run through [`Execute`], whose methods belong to concrete types: so
//! the kernels are compiled once, in this crate, and not again in every crate that calls them.

use crate::backward::{GradientSumsOf, InputGradientTo};
use crate::element::{Element, Real};
use crate::forward::{MomentsOf, NormalizeTo, Statistics};
use crate::grid::{Disjoint, Source};
use crate::moments::{GradientSums, Moments, Recorder, Saved, inv_std};
use crate::pass::Context;
use crate::running::Population;
use crate::scratch::{Need, Scratch};

/// Whose statistics a tensor is normalized with.
pub(crate) enum Origin<'a, P> {
    Batch(&'a Saved<P>),
    Population { population: Population<'a, P>, eps: f64 },
}

impl<P: Real> Origin<'_, P> {
    fn statistics(&self, c: usize) -> Statistics<P> {
        match self {
            Self::Batch(saved) => saved.statistics(c),
            Self::Population { population: Population { mean, var }, eps } => {
                Statistics { mean: mean[c], residue: P::default(), inv_std: inv_std(var[c].to_f64(), *eps) }
            }
        }
    }
}

/// What a plan can do, with its arguments.
pub(crate) enum Operation<'a, E: Element> {
    /// Reduce to moments, record them and normalize.
    Train { normalize: NormalizeTo<'a, E>, record: Recorder<'a, E::Param>, count: u64, eps: f64 },
    /// Normalize.
    Normalize { normalize: NormalizeTo<'a, E>, origin: Origin<'a, E::Param> },
    /// Reduce to moments.
    Moments { x: Source<'a, E>, count: u64, out: Disjoint<'a, Moments> },
    /// Reduce to gradient sums, record what is wanted and write the input's gradient if it is.
    Backward {
        x: Source<'a, E>,
        dy: Source<'a, E>,
        saved: &'a Saved<E::Param>,
        input: Option<InputGradientTo<'a, E>>,
        dgamma: Option<Disjoint<'a, E::Param>>,
        dbeta: Option<Disjoint<'a, E::Param>>,
    },
    /// Reduce to gradient sums.
    GradientSums { x: Source<'a, E>, dy: Source<'a, E>, saved: &'a Saved<E::Param>, out: Disjoint<'a, GradientSums> },
    /// Write the input's gradient.
    InputGradient { input: InputGradientTo<'a, E>, sums: &'a [GradientSums] },
}

impl<E: Element> Operation<'_, E> {
    /// The scratch to run with.
    pub(crate) fn need(&self, context: &Context) -> Need {
        match self {
            Self::Train { .. } => context.need::<3, 3>(),
            Self::Normalize { .. } => context.need::<0, 3>(),
            Self::Moments { .. } => context.need::<3, 0>(),
            Self::Backward { input: None, .. } | Self::GradientSums { .. } => context.need::<2, 0>(),
            Self::Backward { .. } => context.need::<2, 6>(),
            Self::InputGradient { .. } => context.need::<0, 6>(),
        }
    }

    /// The most scratch that any operation needs.
    pub(crate) fn most(context: &Context) -> Need {
        let halves = context.need::<3, 0>().max(context.need::<0, 6>());
        halves.max(context.need::<3, 3>()).max(context.need::<2, 6>())
    }

    /// Runs.
    ///
    /// # Safety
    /// All tensors have the length of the context's shape, all arrays that of its channels, and those that are written
    /// are borrowed for this alone. There is scratch for [`Operation::need`].
    unsafe fn run(self, context: Context, scratch: &mut Scratch<E::Param>) {
        // SAFETY, for all arms: the caller's promise is the callee's, and each channel is closed once.
        match self {
            Self::Train { normalize, record, count, eps } => {
                // SAFETY: see above.
                let close = |c, moments: Moments| unsafe { record.set(c, &moments, eps) };
                let reduction = MomentsOf { x: normalize.io.from, count, close };
                // SAFETY: see above.
                unsafe { context.run(&reduction, &normalize, scratch) }
            }
            Self::Normalize { normalize, origin } => {
                // SAFETY: see above.
                unsafe { context.apply(&normalize, |c| origin.statistics(c), scratch) }
            }
            Self::Moments { x, count, out } => {
                // SAFETY: see above.
                let close = |c, moments| unsafe { out.set(c, moments) };
                // SAFETY: see above.
                unsafe { context.reduce(&MomentsOf { x, count, close }, scratch) }
            }
            Self::Backward { x, dy, saved, input, dgamma, dbeta } => {
                let close = |c, sums: GradientSums| {
                    for (out, sum) in [(dgamma, sums.dy_xhat), (dbeta, sums.dy)] {
                        if let Some(out) = out {
                            // SAFETY: see above.
                            unsafe { out.set(c, E::Param::from_f64(sum)) }
                        }
                    }
                    sums
                };
                let reduction = GradientSumsOf { x, dy, saved, close };
                // SAFETY: see above.
                unsafe {
                    match input {
                        Some(input) => context.run(&reduction, &input, scratch),
                        None => context.reduce(&reduction, scratch),
                    }
                }
            }
            Self::GradientSums { x, dy, saved, out } => {
                // SAFETY: see above.
                let close = |c, sums| unsafe { out.set(c, sums) };
                // SAFETY: see above.
                unsafe { context.reduce(&GradientSumsOf { x, dy, saved, close }, scratch) }
            }
            Self::InputGradient { input, sums } => {
                // SAFETY: see above.
                unsafe { context.apply(&input, |c| sums[c], scratch) }
            }
        }
    }
}

/// An operation with all that it runs on.
pub struct Job<'a, 's, E: Element> {
    pub(crate) operation: Operation<'a, E>,
    pub(crate) context: Context,
    pub(crate) scratch: &'s mut Scratch<E::Param>,
}

/// Runs operations on one element type.
pub trait Execute: Sized {
    /// Runs the operation of `job`.
    ///
    /// # Safety
    /// As [`Operation::run`].
    unsafe fn execute(job: Job<'_, '_, Self>)
    where
        Self: Element;
}

macro_rules! execute {
    ($($t:ty),*) => {$(
        impl Execute for $t {
            // Not inlined: this is where the kernels are compiled.
            #[inline(never)]
            unsafe fn execute(job: Job<'_, '_, $t>) {
                // SAFETY: the caller's promise is the callee's.
                unsafe { job.operation.run(job.context, job.scratch) }
            }
        }
    )*};
}

execute!(f32, f64);
#[cfg(feature = "half")]
execute!(half::bf16, half::f16);
