//! An operation whose arguments were checked, ready to run.
//!
//! It is generic over the element type alone, and run through [`Execute`], whose methods belong to concrete types: so
//! the kernels are compiled once, in this crate, and not again in every crate that calls them.

use core::ops::Range;

use crate::activation::{Activation, Bend};
use crate::affine::{Affine, Trained};
use crate::backward::{Channels, Upstreams};
use crate::element::{Element, Real};
use crate::forward::{MomentsOf, Statistics, each, lines};
use crate::kernel::gradient::{Pair, Upstream};
use crate::kernel::map::Target;
use crate::kernel::normalize::{Activated, Normalize, Rectified};
use crate::moments::{AffineGradientsTo, GradientSums, Keep, MomentsTo, Recorder, Saved, SumsTo, inv_std, reach};
use crate::pass::{BATCH, Context, Each};
use crate::running::Population;
use crate::scratch::{Need, Scratch};
use crate::simd::{Isa, Kernel, dispatch};
use crate::tensor::{Side, Source};
use crate::variants::double_backward::Twice;

/// Whose statistics a tensor is normalized with.
pub(crate) enum Origin<'a, P> {
    Batch(&'a Saved<P>),
    Population { population: Population<'a, P>, eps: f64 },
}

impl<P: Real> Origin<'_, P> {
    #[inline(always)]
    fn statistics(&self, channels: Range<usize>) -> Statistics<P> {
        match self {
            Self::Batch(saved) => saved.statistics(channels),
            Self::Population { population: Population { mean, var }, eps } => Statistics {
                mean: each(Some(mean), channels.clone(), P::default()),
                residue: [P::default(); BATCH],
                inv_std: inv_stds(&each(Some(var), channels, P::default()), *eps),
                reach: reach(0),
                corrections: None,
            },
        }
    }
}

/// Coefficients of a forward pass from the moments of channels, whose statistics are recorded.
struct Recorded<'c, 'a, P> {
    trained: Trained<'a, P>,
    record: &'c Recorder<'a, P>,
    channels: Range<usize>,
    values: &'c [Each<f64>; 3],
}

impl<P: Real> Kernel for Recorded<'_, '_, P> {
    type Output = [Each<P>; 3];
    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> Self::Output {
        // SAFETY: each channel is closed once.
        lines(self.trained, self.channels.clone(), &unsafe { self.record.keep(self.channels, self.values) })
    }
}

/// Coefficients of a backward pass from the gradient sums of channels, which are recorded.
struct Differentiated<'c, 'a, P, const K: usize> {
    of: Channels<'a, P>,
    out: &'c AffineGradientsTo<'a, P>,
    channels: Range<usize>,
    values: &'c [Each<f64>; 2],
}

impl<P: Real, const K: usize> Kernel for Differentiated<'_, '_, P, K> {
    type Output = [Each<P>; K];
    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> Self::Output {
        let sums = self.of.complete(self.channels.clone(), self.values);
        // SAFETY: each channel is closed once.
        unsafe { self.out.keep(self.channels.clone(), &sums) };
        self.of.coefficients(self.channels, &sums)
    }
}

/// Coefficients of a forward pass from statistics given.
struct FromOrigin<'c, 'a, P> {
    trained: Trained<'a, P>,
    origin: &'c Origin<'a, P>,
    channels: Range<usize>,
}

impl<P: Real> Kernel for FromOrigin<'_, '_, P> {
    type Output = [Each<P>; 3];
    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> Self::Output {
        lines(self.trained, self.channels.clone(), &self.origin.statistics(self.channels))
    }
}

/// Coefficients of a backward pass from gradient sums given.
struct FromSums<'c, 'a, P, const K: usize> {
    of: Channels<'a, P>,
    channels: Range<usize>,
    sums: &'c [Each<f64>; 2],
}

impl<P: Real, const K: usize> Kernel for FromSums<'_, '_, P, K> {
    type Output = [Each<P>; K];
    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> Self::Output {
        self.of.coefficients(self.channels, self.sums)
    }
}

/// [`inv_std`] of each; unlike `map` it is inlined and vectorized.
#[inline(always)]
fn inv_stds<P: Real>(var: &Each<P>, eps: f64) -> Each<f64> {
    let mut inverse = [0.0; BATCH];
    for (inverse, var) in inverse.iter_mut().zip(var) {
        *inverse = inv_std(var.to_f64(), eps);
    }
    inverse
}

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
        dx: Option<Target<'a, E>>,
        dresidual: Option<Target<'a, E>>,
        out: AffineGradientsTo<'a, E::Param>,
    },
    /// Reduce to gradient sums.
    GradientSums { from: Upstreams<'a, E>, out: SumsTo<'a> },
    /// Write the input's gradient.
    InputGradient { from: Upstreams<'a, E>, dx: Target<'a, E>, sums: &'a [GradientSums] },
    /// The backward pass of the backward pass.
    Twice(Twice<'a, E>),
}

/// Normalization with what follows it.
#[derive(Clone, Copy)]
pub(crate) struct NormalizeTo<'a, E: Element> {
    pub(crate) x: Source<'a, E>,
    pub(crate) affine: Affine<'a, E>,
    pub(crate) y: Target<'a, E>,
}

/// What follows scale and offset.
enum Tail<'a, E: Element> {
    None,
    /// ReLU alone.
    Relu,
    /// Whatever else.
    Any(Activated<'a, E>),
}

impl<'a, E: Element> NormalizeTo<'a, E> {
    /// What follows scale and offset.
    fn tail(&self) -> Tail<'a, E> {
        let residual = self.affine.residual.map(|residual| Source::new(residual, Side::Y));
        match (self.affine.activation, residual, self.affine.recording()) {
            _ if self.affine.is_last() => Tail::None,
            (Activation::Relu, None, None) => Tail::Relu,
            (activation, residual, gates) => {
                Tail::Any(Activated { normalize: Normalize(self.x), residual, bend: Bend::new(activation), gates })
            }
        }
    }
}

impl<'a, E: Element> Operation<'a, E> {
    /// The scratch to run with.
    pub(crate) fn need(&self, context: &Context<'_>) -> Need {
        match self {
            Self::Train { .. } => context.need::<3, 3>(),
            Self::Normalize { .. } => context.need::<0, 3>(),
            Self::Moments { .. } => context.need::<3, 0>(),
            Self::Backward { .. } => context.need::<2, 7>(),
            Self::GradientSums { .. } => context.need::<2, 0>(),
            Self::InputGradient { .. } => context.need::<0, 7>(),
            Self::Twice(_) => context.need::<2, 6>(),
        }
    }

    /// The tensor that a second half alone writes.
    pub(crate) fn target(&self) -> Option<Target<'a, E>> {
        match self {
            Self::Normalize { normalize, .. } => Some(normalize.y),
            Self::InputGradient { dx, .. } => Some(*dx),
            Self::Backward { dresidual, .. } => *dresidual,
            _ => None,
        }
    }

    /// The most scratch that any operation needs.
    pub(crate) fn most(context: &Context<'_>) -> Need {
        let halves = context.need::<3, 0>().max(context.need::<0, 7>());
        halves.max(context.need::<3, 3>()).max(context.need::<2, 7>())
    }

    /// Runs.
    ///
    /// # Safety
    /// All tensors have the length of the context's shape, all arrays that of its channels, and those that are written
    /// are borrowed for this alone. There is scratch for [`Operation::need`].
    unsafe fn run(self, context: Context<'_>, scratch: &mut Scratch<E::Param>) {
        // SAFETY, for all arms: the caller's promise is the callee's, and each channel is closed once.
        match self {
            Self::Train { normalize, record } => {
                let NormalizeTo { x, affine, y } = normalize;
                let close = |channels: Range<usize>, values: &_| {
                    dispatch(context.tier, Recorded { trained: affine.trained(), record: &record, channels, values })
                };
                // SAFETY: see above.
                unsafe {
                    match normalize.tail() {
                        Tail::None => context.run(&MomentsOf(x), &close, Normalize(x), y, scratch),
                        Tail::Relu => context.run(&MomentsOf(x), &close, Rectified(Normalize(x)), y, scratch),
                        Tail::Any(all) => context.run(&MomentsOf(x), &close, all, y, scratch),
                    }
                }
            }
            Self::Normalize { normalize, origin } => {
                let NormalizeTo { x, affine, y } = normalize;
                let trained = affine.trained();
                let coefficients = |channels| dispatch(context.tier, FromOrigin { trained, origin: &origin, channels });
                // SAFETY: see above.
                unsafe {
                    match normalize.tail() {
                        Tail::None => context.apply(Normalize(x), &coefficients, y, scratch),
                        Tail::Relu => context.apply(Rectified(Normalize(x)), &coefficients, y, scratch),
                        Tail::Any(all) => context.apply(all, &coefficients, y, scratch),
                    }
                }
            }
            Self::Moments { x, out } => {
                // SAFETY: see above.
                unsafe { context.reduce(&MomentsOf(x), &|channels, values| out.keep(channels, values), scratch) }
            }
            Self::Backward { from, dx, dresidual, out } => {
                // SAFETY: see above.
                unsafe {
                    if let Some(to) = dresidual {
                        context.apply(from.passed(false), &|channels| from.channels.lines(channels), to, scratch);
                    }
                    match from.gated() {
                        _ if from.channels.saved.frozen => frozen(from, dx, &out, context, scratch),
                        None => backward::<_, _, 2, 6>(from, from.dy, dx, &out, context, scratch),
                        Some(gated) if let Some(gated) = gated.rectified() => {
                            backward::<_, _, 4, 7>(from, gated, dx, &out, context, scratch)
                        }
                        Some(gated) => backward::<_, _, 4, 7>(from, gated, dx, &out, context, scratch),
                    }
                }
            }
            Self::GradientSums { from, out } => {
                // SAFETY: see above.
                unsafe {
                    match from.gated() {
                        None => gradient_sums::<_, _, 2>(from, from.dy, &out, context, scratch),
                        Some(gated) if let Some(gated) = gated.rectified() => {
                            gradient_sums::<_, _, 4>(from, gated, &out, context, scratch)
                        }
                        Some(gated) => gradient_sums::<_, _, 4>(from, gated, &out, context, scratch),
                    }
                }
            }
            // SAFETY: see above.
            Self::Twice(twice) => unsafe { twice.run(context, scratch) },
            Self::InputGradient { from, dx, sums } => {
                // SAFETY: see above.
                unsafe {
                    match from.gated() {
                        _ if from.channels.saved.frozen => {
                            context.apply(from.passed(true), &|channels| from.channels.lines(channels), dx, scratch);
                        }
                        None => input_gradient::<_, _, 6>(from, from.dy, dx, sums, context, scratch),
                        Some(gated) if let Some(gated) = gated.rectified() => {
                            input_gradient::<_, _, 7>(from, gated, dx, sums, context, scratch)
                        }
                        Some(gated) => input_gradient::<_, _, 7>(from, gated, dx, sums, context, scratch),
                    }
                }
            }
        }
    }
}

/// The gradients that are wanted, with `S` parameters of the sums and `K` of the input's gradient.
///
/// # Safety
/// As [`Operation::run`].
unsafe fn backward<E: Element, U: Upstream<E>, const S: usize, const K: usize>(
    from: Upstreams<'_, E>,
    upstream: U,
    dx: Option<Target<'_, E>>,
    out: &AffineGradientsTo<'_, E::Param>,
    context: Context<'_>,
    scratch: &mut Scratch<E::Param>,
) {
    let Some(dx) = dx else {
        if out.is_wanted() {
            // SAFETY: the caller's promise.
            unsafe { gradient_sums::<_, _, S>(from, upstream, out, context, scratch) };
        }
        return;
    };
    let close = |channels, values: &_| {
        dispatch(context.tier, Differentiated::<_, K> { of: from.channels, out, channels, values })
    };
    let (sums, pair) = (from.sums::<_, S>(from.x, upstream), Pair { x: from.x, upstream });
    // SAFETY: the caller's promise.
    unsafe { context.run::<_, _, _, 2, K>(&sums, &close, pair, dx, scratch) };
}

/// [`backward`] with the statistics as constants. Rare, so compiled once for all gates and none.
///
/// # Safety
/// As [`Operation::run`].
unsafe fn frozen<E: Element>(
    from: Upstreams<'_, E>,
    dx: Option<Target<'_, E>>,
    out: &AffineGradientsTo<'_, E::Param>,
    context: Context<'_>,
    scratch: &mut Scratch<E::Param>,
) {
    let passed = from.passed(true);
    // SAFETY: the caller's promise.
    unsafe {
        match dx {
            Some(dx) if out.is_wanted() => {
                let close = |channels: Range<usize>, values: &_| {
                    out.keep(channels.clone(), &from.channels.complete(channels.clone(), values));
                    from.channels.lines(channels)
                };
                context.run(&from.sums::<_, 4>(from.x, passed.upstream), &close, passed, dx, scratch);
            }
            Some(dx) => context.apply(passed, &|channels| from.channels.lines(channels), dx, scratch),
            None if out.is_wanted() => gradient_sums::<_, _, 4>(from, passed.upstream, out, context, scratch),
            None => (),
        }
    }
}

/// The sums alone, see [`backward`].
///
/// # Safety
/// As [`Operation::run`].
unsafe fn gradient_sums<E: Element, U: Upstream<E>, const S: usize>(
    from: Upstreams<'_, E>,
    upstream: U,
    out: &impl Keep<2, Kept = ()>,
    context: Context<'_>,
    scratch: &mut Scratch<E::Param>,
) {
    let sums = from.sums::<_, S>(from.x, upstream);
    // SAFETY: the caller's promise; each channel is closed once.
    unsafe {
        let close =
            |channels: Range<usize>, values: &_| out.keep(channels.clone(), &from.channels.complete(channels, values));
        context.reduce(&sums, &close, scratch);
    }
}

/// The input's gradient from sums given, see [`backward`].
///
/// # Safety
/// As [`Operation::run`].
unsafe fn input_gradient<E: Element, U: Upstream<E>, const K: usize>(
    from: Upstreams<'_, E>,
    upstream: U,
    dx: Target<'_, E>,
    sums: &[GradientSums],
    context: Context<'_>,
    scratch: &mut Scratch<E::Param>,
) {
    let coefficients = |channels: Range<usize>| {
        let mut given = [[0.0; BATCH]; 2];
        for (i, sums) in sums[channels.clone()].iter().enumerate() {
            [given[0][i], given[1][i]] = [sums.dy, sums.dy_xhat];
        }
        dispatch(context.tier, FromSums { of: from.channels, channels, sums: &given })
    };
    // SAFETY: the caller's promise.
    unsafe { context.apply::<_, _, K>(Pair { x: from.x, upstream }, &coefficients, dx, scratch) }
}

/// An operation with all that it runs on.
pub struct Job<'a, 's, E: Element> {
    pub(crate) operation: Operation<'a, E>,
    pub(crate) context: Context<'a>,
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
                // So that none are compiled for them, which takes most of the time.
                assert!(!cfg!(test), "unit tests run no kernels");
                // SAFETY: the caller's promise is the callee's.
                unsafe { job.operation.run(job.context, job.scratch) }
            }
        }
    )*};
}

execute!(f32, f64);
#[cfg(feature = "half")]
execute!(half::bf16, half::f16);
