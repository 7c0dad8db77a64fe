//! An operation whose arguments were checked, ready to run.
//!
//! It is generic over the element type alone, and run through [`Execute`], whose methods belong to concrete types: so
//! the kernels are compiled once, in this crate, and not again in every crate that calls them.

use core::ops::Range;

use crate::backward::{FrozenGradientTo, GradientSumsOf, InputGradientTo};
use crate::element::{Element, Real};
use crate::forward::{MomentsOf, NormalizeTo, Statistics, each};
use crate::grid::Source;
use crate::moments::{AffineGradientsTo, GradientSums, MomentsTo, Recorder, Saved, SumsTo, inv_std};
use crate::pass::{BATCH, Context, Each};
use crate::running::Population;
use crate::scratch::{Need, Scratch};

/// Whose statistics a tensor is normalized with.
pub(crate) enum Origin<'a, P> {
    Batch(&'a Saved<P>),
    Population { population: Population<'a, P>, eps: f64 },
}

impl<P: Real> Origin<'_, P> {
    fn statistics(&self, channels: Range<usize>) -> Statistics<P> {
        match self {
            Self::Batch(saved) => saved.statistics(channels),
            Self::Population { population: Population { mean, var }, eps } => Statistics {
                mean: each(Some(mean), channels.clone(), P::default()),
                residue: [P::default(); BATCH],
                inv_std: each(Some(var), channels, P::default()).map(|var| inv_std(var.to_f64(), *eps)),
                corrections: None,
            },
        }
    }
}

/// Gradient sums of up to [`BATCH`] channels where none are asked for.
const NO_SUMS: [Each<f64>; 2] = [[0.0; BATCH]; 2];

/// What a plan can do, with its arguments.
pub(crate) enum Operation<'a, E: Element> {
    /// Reduce to moments, record them and normalize.
    Train { normalize: NormalizeTo<'a, E>, record: Recorder<'a, E::Param> },
    /// Normalize.
    Normalize { normalize: NormalizeTo<'a, E>, origin: Origin<'a, E::Param> },
    /// Reduce to moments.
    Moments { x: Source<'a, E>, out: MomentsTo<'a> },
    /// Reduce to gradient sums, record what is wanted and write the input's gradient if it is.
    Backward {
        x: Source<'a, E>,
        dy: Source<'a, E>,
        saved: &'a Saved<E::Param>,
        input: Option<InputGradientTo<'a, E>>,
        out: AffineGradientsTo<'a, E::Param>,
    },
    /// Reduce to gradient sums.
    GradientSums { x: Source<'a, E>, dy: Source<'a, E>, saved: &'a Saved<E::Param>, out: SumsTo<'a> },
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
            Self::Train { normalize, record } => {
                let reduction = MomentsOf { x: normalize.io.from, out: record };
                // SAFETY: see above.
                unsafe { context.run(&reduction, &normalize, scratch) }
            }
            Self::Normalize { normalize, origin } => {
                // SAFETY: see above.
                unsafe { context.apply(&normalize, |channels| origin.statistics(channels), scratch) }
            }
            // SAFETY: see above.
            Self::Moments { x, out } => unsafe { context.reduce(&MomentsOf { x, out }, scratch) },
            Self::Backward { x, dy, saved, input, out } => {
                let wanted = out.dgamma.is_some() || out.dbeta.is_some();
                let reduction = GradientSumsOf { x, dy, saved, out };
                // SAFETY: see above.
                unsafe {
                    match input {
                        Some(input) if !saved.frozen => context.run(&reduction, &input, scratch),
                        Some(input) if wanted => context.run(&reduction, &FrozenGradientTo(input), scratch),
                        Some(input) => context.apply(&FrozenGradientTo(input), |_| NO_SUMS, scratch),
                        None => context.reduce(&reduction, scratch),
                    }
                }
            }
            Self::GradientSums { x, dy, saved, out } => {
                // SAFETY: see above.
                unsafe { context.reduce(&GradientSumsOf { x, dy, saved, out }, scratch) }
            }
            Self::InputGradient { input, sums } => {
                if input.saved.frozen {
                    // SAFETY: see above.
                    return unsafe { context.apply(&FrozenGradientTo(input), |_| NO_SUMS, scratch) };
                }
                let given = |channels: Range<usize>| {
                    let mut given = NO_SUMS;
                    for (i, sums) in sums[channels].iter().enumerate() {
                        [given[0][i], given[1][i]] = [sums.dy, sums.dy_xhat];
                    }
                    given
                };
                // SAFETY: see above.
                unsafe { context.apply(&input, given, scratch) }
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
