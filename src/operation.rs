//! An operation whose arguments were checked, ready to run.
//!
//! It is generic over the element type alone, and run through [`Execute`], whose methods belong to concrete types: so
//! the kernels are compiled once, in this crate, and not again in every crate that calls them.

use core::ops::Range;

use crate::activation::{Activation, Bend};
use crate::backward::{FrozenGradientTo, GradientSumsOf, InputGradientTo, PassedTo};
use crate::element::{Element, Real};
use crate::forward::{ActivatedTo, MomentsOf, NormalizeTo, Statistics, each};
use crate::grid::{Disjoint, InOut, Source};
use crate::kernel::gradient::Gated;
use crate::moments::{AffineGradientsTo, GradientSums, MomentsTo, Recorder, Saved, SumsTo, inv_std};
use crate::pass::{BATCH, Context, Each};
use crate::plan::Affine;
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
    /// Reduce to gradient sums, record what is wanted, and write the gradients of the input and of the residual if they are.
    Backward {
        from: Upstreams<'a, E>,
        dx: Option<Disjoint<'a, E>>,
        dresidual: Option<Disjoint<'a, E>>,
        out: AffineGradientsTo<'a, E::Param>,
        streaming: bool,
    },
    /// Reduce to gradient sums.
    GradientSums { from: Upstreams<'a, E>, out: SumsTo<'a> },
    /// Write the input's gradient.
    InputGradient { from: Upstreams<'a, E>, dx: Disjoint<'a, E>, sums: &'a [GradientSums], streaming: bool },
}

impl<E: Element> Operation<'_, E> {
    /// The scratch to run with.
    pub(crate) fn need(&self, context: &Context) -> Need {
        match self {
            Self::Train { .. } => context.need::<3, 3>(),
            Self::Normalize { .. } => context.need::<0, 3>(),
            Self::Moments { .. } => context.need::<3, 0>(),
            Self::Backward { .. } => context.need::<2, 7>(),
            Self::GradientSums { .. } => context.need::<2, 0>(),
            Self::InputGradient { .. } => context.need::<0, 7>(),
        }
    }

    /// The most scratch that any operation needs.
    pub(crate) fn most(context: &Context) -> Need {
        let halves = context.need::<3, 0>().max(context.need::<0, 7>());
        halves.max(context.need::<3, 3>()).max(context.need::<2, 7>())
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
                unsafe {
                    match normalize.affine.is_last() {
                        true => context.run(&reduction, &normalize, scratch),
                        false => context.run(&reduction, &ActivatedTo(&normalize), scratch),
                    }
                }
            }
            Self::Normalize { normalize, origin } => {
                let given = |channels| origin.statistics(channels);
                // SAFETY: see above.
                unsafe {
                    match normalize.affine.is_last() {
                        true => context.apply(&normalize, given, scratch),
                        false => context.apply(&ActivatedTo(&normalize), given, scratch),
                    }
                }
            }
            // SAFETY: see above.
            Self::Moments { x, out } => unsafe { context.reduce(&MomentsOf { x, out }, scratch) },
            Self::Backward { from, dx, dresidual, out, streaming } => {
                let wanted = out.dgamma.is_some() || out.dbeta.is_some();
                // SAFETY: see above.
                unsafe {
                    if let Some(to) = dresidual {
                        context.apply(&from.passed_to(to, false, streaming), |_| (), scratch);
                    }
                    match (from.gated(), dx) {
                        (None, Some(to)) if from.saved.frozen => {
                            let (reduction, application) =
                                (from.sums::<_, _, 2>(from.dy, out), from.frozen_to(to, streaming));
                            match wanted {
                                true => context.run(&reduction, &application, scratch),
                                false => context.apply(&application, |_| NO_SUMS, scratch),
                            }
                        }
                        (Some(gated), Some(to)) if from.saved.frozen => {
                            if wanted {
                                context.reduce(&from.sums::<_, _, 4>(gated, out), scratch);
                            }
                            context.apply(&from.passed_to(to, true, streaming), |_| (), scratch);
                        }
                        (None, Some(to)) => {
                            let application = from.input_to::<_, 6>(from.dy, to, streaming);
                            context.run(&from.sums::<_, _, 2>(from.dy, out), &application, scratch);
                        }
                        (Some(gated), Some(to)) => {
                            let application = from.input_to::<_, 7>(gated, to, streaming);
                            context.run(&from.sums::<_, _, 4>(gated, out), &application, scratch);
                        }
                        (_, None) if !wanted => (),
                        (None, None) => context.reduce(&from.sums::<_, _, 2>(from.dy, out), scratch),
                        (Some(gated), None) => context.reduce(&from.sums::<_, _, 4>(gated, out), scratch),
                    }
                }
            }
            Self::GradientSums { from, out } => {
                // SAFETY: see above.
                unsafe {
                    match from.gated() {
                        None => context.reduce(&from.sums::<_, _, 2>(from.dy, out), scratch),
                        Some(gated) => context.reduce(&from.sums::<_, _, 4>(gated, out), scratch),
                    }
                }
            }
            Self::InputGradient { from, dx, sums, streaming } => {
                let given = |channels: Range<usize>| {
                    let mut given = NO_SUMS;
                    for (i, sums) in sums[channels].iter().enumerate() {
                        [given[0][i], given[1][i]] = [sums.dy, sums.dy_xhat];
                    }
                    given
                };
                // SAFETY: see above.
                unsafe {
                    match from.gated() {
                        None if from.saved.frozen => context.apply(&from.frozen_to(dx, streaming), given, scratch),
                        Some(_) if from.saved.frozen => {
                            context.apply(&from.passed_to(dx, true, streaming), |_| (), scratch);
                        }
                        None => context.apply(&from.input_to::<_, 6>(from.dy, dx, streaming), given, scratch),
                        Some(gated) => context.apply(&from.input_to::<_, 7>(gated, dx, streaming), given, scratch),
                    }
                }
            }
        }
    }
}

/// What backward passes read.
#[derive(Clone, Copy)]
pub(crate) struct Upstreams<'a, E: Element> {
    pub(crate) x: Source<'a, E>,
    pub(crate) dy: Source<'a, E>,
    pub(crate) saved: &'a Saved<E::Param>,
    pub(crate) affine: Affine<'a, E>,
    /// The number of values behind the sums.
    pub(crate) count: u64,
}

impl<'a, E: Element> Upstreams<'a, E> {
    /// The gradient behind the activation.
    fn behind(&self) -> Gated<'a, E> {
        let Affine { residual, output, activation, .. } = self.affine;
        let [output, residual] = [output, residual].map(|tensor| tensor.map(Source::new));
        Gated { dy: self.dy, output, residual, bend: Bend::new(activation) }
    }

    /// The same, if there is one.
    fn gated(&self) -> Option<Gated<'a, E>> {
        (self.affine.activation != Activation::None).then(|| self.behind())
    }

    fn sums<U, O, const K: usize>(&self, upstream: U, out: O) -> GradientSumsOf<'a, E, U, O, K> {
        GradientSumsOf { x: self.x, upstream, affine: self.affine, saved: self.saved, out }
    }

    fn input_to<U, const K: usize>(
        &self,
        upstream: U,
        to: Disjoint<'a, E>,
        streaming: bool,
    ) -> InputGradientTo<'a, E, U, K> {
        let Self { x, saved, affine, count, .. } = *self;
        InputGradientTo { x, upstream, to, saved, affine, count, streaming }
    }

    fn frozen_to(&self, to: Disjoint<'a, E>, streaming: bool) -> FrozenGradientTo<'a, E> {
        FrozenGradientTo { io: InOut { from: self.dy, to }, saved: self.saved, affine: self.affine, streaming }
    }

    fn passed_to(&self, to: Disjoint<'a, E>, scaled: bool, streaming: bool) -> PassedTo<'a, E> {
        let Self { x, saved, affine, .. } = *self;
        PassedTo { x, upstream: self.behind(), scaled, to, saved, affine, streaming }
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
