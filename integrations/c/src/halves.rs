//! The halves of the passes, for statistics and gradients that are shared between shards of a batch.

use std::ffi::c_void;

use crate::arguments::{Raw, apart};
use crate::passes::Line;
use crate::plan::Plan;
use crate::saved::{Saved, handle, handle_mut};
use crate::status::{Result, Status, guard};

/// Count, mean and sum of squared deviations of the values of one channel.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[repr(C)]
pub struct Moments {
    /// The number of values.
    pub count: u64,
    /// The mean; 0 for no values.
    pub mean: f64,
    /// What the mean has beyond its rounded value; 0 where it is not known.
    pub residue: f64,
    /// The sum of squared deviations from the mean.
    pub m2: f64,
}

impl From<batchnorm::Moments> for Moments {
    fn from(batchnorm::Moments { count, mean, residue, m2 }: batchnorm::Moments) -> Self {
        Self { count, mean, residue, m2 }
    }
}

impl From<Moments> for batchnorm::Moments {
    fn from(Moments { count, mean, residue, m2 }: Moments) -> Self {
        Self { count, mean, residue, m2 }
    }
}

/// Sums over the values of one channel that the gradients are made of. Shards are joined by adding.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[repr(C)]
pub struct GradientSums {
    /// sum(dy), which is dbeta.
    pub dy: f64,
    /// sum(dy * xhat), which is dgamma.
    pub dy_xhat: f64,
}

impl From<batchnorm::GradientSums> for GradientSums {
    fn from(batchnorm::GradientSums { dy, dy_xhat }: batchnorm::GradientSums) -> Self {
        Self { dy, dy_xhat }
    }
}

impl From<GradientSums> for batchnorm::GradientSums {
    fn from(GradientSums { dy, dy_xhat }: GradientSums) -> Self {
        Self { dy, dy_xhat }
    }
}

/// Merges two arrays entry by entry, into the first.
///
/// # Safety
/// As [`crate`].
unsafe fn merge_all<T: Copy>(into: Raw, from: Raw, len: usize, merge: impl Fn(T, T) -> T) -> Result<()> {
    let (into, from) = (into.required::<T>(len)?, from.required::<T>(len)?);
    apart(&[into.span()], &[&[from.span()]])?;
    // SAFETY: the caller's promise, for arguments that are apart.
    let (into, from) = unsafe { (into.write().unwrap_or_default(), from.read().unwrap_or_default()) };
    into.iter_mut().zip(from).for_each(|(into, &from)| *into = merge(*into, from));
    Ok(())
}

/// The first half of a training forward pass: the moments of each channel of this shard.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_moments_of(
    plan: *const Plan,
    x: *const c_void,
    x_len: usize,
    moments: *mut Moments,
    moments_len: usize,
) -> Status {
    let (x, moments) = (Raw::new("x", x, x_len), Raw::new("moments", moments, moments_len));
    // SAFETY: the caller's promise.
    guard(|| unsafe { handle("plan", plan)?.passes.moments(x, moments) })
}

/// Adds the values behind `from` to those behind `into`, channel by channel, by Chan's form of Welford's update.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_moments_merge(
    into: *mut Moments,
    into_len: usize,
    from: *const Moments,
    from_len: usize,
) -> Status {
    let merge = |a: Moments, b: Moments| batchnorm::Moments::from(a).merge(b.into()).into();
    let (into, from) = (Raw::new("into", into, into_len), Raw::new("from", from, from_len));
    // SAFETY: the caller's promise.
    guard(|| unsafe { merge_all(into, from, into_len, merge) })
}

/// Turns moments, of this shard or of several merged, into the statistics to normalize with.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_finish(
    plan: *const Plan,
    moments: *const Moments,
    moments_len: usize,
    saved: *mut Saved,
) -> Status {
    let moments = Raw::new("moments", moments, moments_len);
    // SAFETY: the caller's promise.
    guard(|| unsafe { handle("plan", plan)?.passes.finish(moments, handle_mut("saved", saved)?) })
}

/// The second half of a training forward pass: `y` with the statistics in `saved`. gamma and beta are optional. `y` may be `x`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_normalize(
    plan: *const Plan,
    x: *const c_void,
    x_len: usize,
    gamma: *const c_void,
    gamma_len: usize,
    beta: *const c_void,
    beta_len: usize,
    saved: *const Saved,
    y: *mut c_void,
    y_len: usize,
) -> Status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let plan = handle("plan", plan)?;
        let line = Line::new(plan, (gamma, gamma_len), (beta, beta_len));
        let saved = handle("saved", saved)?;
        plan.passes.normalize(Raw::new("x", x, x_len), line, saved, Raw::new("y", y, y_len))
    })
}

/// The first half of a backward pass: the sums of each channel of this shard.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_gradient_sums_of(
    plan: *const Plan,
    x: *const c_void,
    x_len: usize,
    dy: *const c_void,
    dy_len: usize,
    saved: *const Saved,
    gamma: *const c_void,
    gamma_len: usize,
    beta: *const c_void,
    beta_len: usize,
    sums: *mut GradientSums,
    sums_len: usize,
) -> Status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let plan = handle("plan", plan)?;
        let line = Line::new(plan, (gamma, gamma_len), (beta, beta_len));
        let (x, dy, sums) = (Raw::new("x", x, x_len), Raw::new("dy", dy, dy_len), Raw::new("sums", sums, sums_len));
        plan.passes.gradient_sums(x, dy, handle("saved", saved)?, line, sums)
    })
}

/// Adds the sums of `from` to those of `into`, channel by channel.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_gradient_sums_merge(
    into: *mut GradientSums,
    into_len: usize,
    from: *const GradientSums,
    from_len: usize,
) -> Status {
    let merge = |a: GradientSums, b: GradientSums| batchnorm::GradientSums::from(a).merge(b.into()).into();
    let (into, from) = (Raw::new("into", into, into_len), Raw::new("from", from, from_len));
    // SAFETY: the caller's promise.
    guard(|| unsafe { merge_all(into, from, into_len, merge) })
}

/// The second half of a backward pass: `dx` of this shard, from the sums of all shards. `dx` may be `dy`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_input_gradient(
    plan: *const Plan,
    x: *const c_void,
    x_len: usize,
    dy: *const c_void,
    dy_len: usize,
    saved: *const Saved,
    gamma: *const c_void,
    gamma_len: usize,
    beta: *const c_void,
    beta_len: usize,
    sums: *const GradientSums,
    sums_len: usize,
    dx: *mut c_void,
    dx_len: usize,
) -> Status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let plan = handle("plan", plan)?;
        let line = Line::new(plan, (gamma, gamma_len), (beta, beta_len));
        let (x, dy, sums) = (Raw::new("x", x, x_len), Raw::new("dy", dy, dy_len), Raw::new("sums", sums, sums_len));
        plan.passes.input_gradient(x, dy, handle("saved", saved)?, line, sums, Raw::new("dx", dx, dx_len))
    })
}

/// The gradients of gamma and beta from sums; each is optional.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_parameter_gradients(
    plan: *const Plan,
    saved: *const Saved,
    sums: *const GradientSums,
    sums_len: usize,
    dgamma: *mut c_void,
    dgamma_len: usize,
    dbeta: *mut c_void,
    dbeta_len: usize,
) -> Status {
    let (dgamma, dbeta) = (Raw::new("dgamma", dgamma, dgamma_len), Raw::new("dbeta", dbeta, dbeta_len));
    let sums = Raw::new("sums", sums, sums_len);
    // SAFETY: the caller's promise.
    guard(|| unsafe { handle("plan", plan)?.passes.parameter_gradients(handle("saved", saved)?, sums, dgamma, dbeta) })
}
