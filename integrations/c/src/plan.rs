//! The plan as a handle: made, changed, asked, freed.

use std::ffi::{c_char, c_void};

use batchnorm::{Activation, Affine, BatchNorm, Element, Parallelism, Population, Shape, Tier};
use half::{bf16, f16};

use crate::abi::BN_ABI_VERSION;
use crate::arguments::Raw;
use crate::options::{self, Dtype};
use crate::passes::Passes;
use crate::saved::{end, give, handle, handle_mut};
use crate::status::{Result, Status, guard};

/// A plan: the shape, the element type and the options of passes.
#[derive(Debug)]
pub struct Plan {
    pub(crate) passes: Box<dyn Passes>,
    pub(crate) activation: Activation,
}

/// What a plan can be told.
pub(crate) enum Change {
    Batch(usize),
    Eps(f64),
    Tier(Tier),
    Parallelism(Parallelism),
    Accumulation(bool),
    FromOutput(bool),
}

fn make<E: Element>(shape: Shape, eps: f64) -> Result<Box<dyn Passes>> {
    Ok(Box::new(BatchNorm::<E>::new(shape)?.with_eps(eps)?))
}

/// The version of the library, such as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn bn_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// The version of the binary interface of the library, to be compared with BN_ABI_VERSION.
#[unsafe(no_mangle)]
pub extern "C" fn bn_abi_version() -> u32 {
    BN_ABI_VERSION
}

/// Makes a plan for tensors of one shape. `dtype` is a bn_dtype, `layout` a bn_layout; `spatial` holds `spatial_len` spatial
/// sizes, such as height and width; NC has none, NULL and 0. `eps` is added to the variance; 0 is allowed.
///
/// On refusal `*plan` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_plan_new(
    dtype: i32,
    layout: i32,
    batch: usize,
    channels: usize,
    spatial: *const usize,
    spatial_len: usize,
    eps: f64,
    plan: *mut *mut Plan,
) -> Status {
    let make = || {
        let spatial = Raw::new("spatial", spatial, spatial_len).optional::<usize>(spatial_len)?;
        // SAFETY: the caller's promise.
        let spatial = unsafe { spatial.read() }.unwrap_or_default();
        let shape = Shape::new(options::layout(layout)?, batch, channels, spatial)?;
        let passes = match Dtype::new(dtype)? {
            Dtype::F32 => make::<f32>(shape, eps),
            Dtype::F64 => make::<f64>(shape, eps),
            Dtype::Bf16 => make::<bf16>(shape, eps),
            Dtype::F16 => make::<f16>(shape, eps),
        };
        Ok(Plan { passes: passes?, activation: Activation::None })
    };
    // SAFETY: the caller's promise.
    guard(|| unsafe { give("plan", plan, make) })
}

/// Makes a plan with the options of another for another number of samples, such as the last, smaller batch.
///
/// On refusal `*other` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_plan_with_batch(plan: *const Plan, batch: usize, other: *mut *mut Plan) -> Status {
    let make = || {
        // SAFETY: the caller's promise.
        let plan = unsafe { handle("plan", plan) }?;
        Ok(Plan { passes: plan.passes.with(Change::Batch(batch))?, activation: plan.activation })
    };
    // SAFETY: the caller's promise.
    guard(|| unsafe { give("other", other, make) })
}

/// Frees a plan; NULL is left alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_plan_free(plan: *mut Plan) {
    // SAFETY: the caller's promise.
    unsafe { end(plan) }
}

/// # Safety
/// As [`crate`].
unsafe fn change(plan: *mut Plan, change: impl FnOnce() -> Result<Change>) -> Status {
    guard(|| {
        // SAFETY: the caller's promise.
        let plan = unsafe { handle_mut("plan", plan) }?;
        plan.passes = plan.passes.with(change()?)?;
        Ok(())
    })
}

/// Sets the number that is added to the variance.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_plan_set_eps(plan: *mut Plan, eps: f64) -> Status {
    // SAFETY: the caller's promise.
    unsafe { change(plan, || Ok(Change::Eps(eps))) }
}

/// Sets the threads that a pass is shared among: 0 to choose by the size of the tensor, 1 for the calling thread alone, more
/// for so many threads of the pool. It changes the speed and no bit of the results.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_plan_set_threads(plan: *mut Plan, threads: usize) -> Status {
    let parallelism = match threads {
        0 => Parallelism::Auto,
        1 => Parallelism::Sequential,
        more => Parallelism::Threads(more),
    };
    // SAFETY: the caller's promise.
    unsafe { change(plan, || Ok(Change::Parallelism(parallelism))) }
}

/// Sets the SIMD instructions, a bn_tier. It changes the speed and no bit of the results.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_plan_set_tier(plan: *mut Plan, tier: i32) -> Status {
    // SAFETY: the caller's promise.
    unsafe { change(plan, || Ok(Change::Tier(options::tier(tier)?))) }
}

/// Sets whether backward passes add to dgamma and dbeta rather than overwriting them. dx is overwritten either way.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_plan_set_accumulation(plan: *mut Plan, accumulates: bool) -> Status {
    // SAFETY: the caller's promise.
    unsafe { change(plan, || Ok(Change::Accumulation(accumulates))) }
}

/// Sets whether backward passes are given the output in the place of the input, which a forward pass in place overwrote. The
/// activation must then be none or a leaky ReLU with a slope above 0, and no gamma close to zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_plan_set_backward_from_output(plan: *mut Plan, from_output: bool) -> Status {
    // SAFETY: the caller's promise.
    unsafe { change(plan, || Ok(Change::FromOutput(from_output))) }
}

/// Sets what is applied to the normalized values, a bn_activation, in forward passes, and counted in by backward passes. `slope`
/// is that of a leaky ReLU, and left alone for the others.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_plan_set_activation(plan: *mut Plan, activation: i32, slope: f64) -> Status {
    guard(|| {
        // SAFETY: the caller's promise.
        let plan = unsafe { handle_mut("plan", plan) }?;
        let activation = options::activation(activation, slope)?;
        // Passes check it; so this one, over nothing.
        let affine = Affine::none().with_activation(activation);
        let nothing = BatchNorm::<f32>::new(Shape::nc(0, 1)?)?;
        nothing.forward_infer(&[], affine, Population { mean: &[0.0], var: &[1.0] }, &mut [])?;
        plan.activation = activation;
        Ok(())
    })
}

/// The number of elements of a tensor of the plan, and 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_plan_len(plan: *const Plan) -> usize {
    // SAFETY: the caller's promise.
    unsafe { plan.as_ref() }.map_or(0, |plan| plan.passes.shape().len())
}

/// The number of channels, which is that of gamma, beta, mean and var; 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_plan_channels(plan: *const Plan) -> usize {
    // SAFETY: the caller's promise.
    unsafe { plan.as_ref() }.map_or(0, |plan| plan.passes.shape().channels())
}

/// Bytes of scratch that one call uses at most, and 0 for NULL. The first call allocates them, or `bn_plan_reserve`; the
/// plan keeps them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_plan_scratch(plan: *const Plan) -> usize {
    // SAFETY: the caller's promise.
    unsafe { plan.as_ref() }.map_or(0, |plan| plan.passes.scratch())
}

/// Allocates scratch for `calls` calls at the same time, so that not even the first ones allocate; more than 1024 count as 1024.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_plan_reserve(plan: *const Plan, calls: usize) -> Status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { handle("plan", plan)?.passes.reserve(calls) })
}

/// Takes the statistics of the population as constants, to train with them frozen: then `bn_normalize` is the forward pass,
/// and backward passes hold mean and variance constant.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_freeze(
    plan: *const Plan,
    mean: *const c_void,
    mean_len: usize,
    var: *const c_void,
    var_len: usize,
    saved: *mut crate::saved::Saved,
) -> Status {
    let (mean, var) = (Raw::new("mean", mean, mean_len), Raw::new("var", var, var_len));
    // SAFETY: the caller's promise.
    guard(|| unsafe { handle("plan", plan)?.passes.freeze(mean, var, handle_mut("saved", saved)?) })
}
