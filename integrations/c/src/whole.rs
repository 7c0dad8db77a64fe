//! The whole passes.

use std::ffi::c_void;

use crate::arguments::Raw;
use crate::passes::Line;
use crate::plan::Plan;
use crate::saved::{Saved, handle, handle_mut};
use crate::status::{Status, guard};

/// Training forward pass: `y = act(gamma * (x - mean) * inv_std + beta)` with the mean and the biased variance of the batch,
/// which go to `saved`. gamma and beta are optional: ones and zeros. `y` may be `x`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_forward_train(
    plan: *const Plan,
    x: *const c_void,
    x_len: usize,
    gamma: *const c_void,
    gamma_len: usize,
    beta: *const c_void,
    beta_len: usize,
    y: *mut c_void,
    y_len: usize,
    saved: *mut Saved,
) -> Status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let plan = handle("plan", plan)?;
        let line = Line::new(plan, (gamma, gamma_len), (beta, beta_len));
        let saved = handle_mut("saved", saved)?;
        plan.passes.forward_train(Raw::new("x", x, x_len), line, Raw::new("y", y, y_len), saved)
    })
}

/// Inference: `y = act(gamma * (x - mean) / sqrt(var + eps) + beta)` with the mean and the variance of the population. gamma and
/// beta are optional. `y` may be `x`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_forward_infer(
    plan: *const Plan,
    x: *const c_void,
    x_len: usize,
    gamma: *const c_void,
    gamma_len: usize,
    beta: *const c_void,
    beta_len: usize,
    mean: *const c_void,
    mean_len: usize,
    var: *const c_void,
    var_len: usize,
    y: *mut c_void,
    y_len: usize,
) -> Status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let plan = handle("plan", plan)?;
        let line = Line::new(plan, (gamma, gamma_len), (beta, beta_len));
        let (mean, var) = (Raw::new("mean", mean, mean_len), Raw::new("var", var, var_len));
        plan.passes.forward_infer(Raw::new("x", x, x_len), line, mean, var, Raw::new("y", y, y_len))
    })
}

/// Backward pass. With m values per channel and `xhat = (x - mean) * inv_std`, `dbeta = sum(dy)`, `dgamma = sum(dy * xhat)` and
/// `dx = gamma * inv_std * (dy - dbeta/m - xhat * dgamma/m)`.
///
/// `x`, gamma, beta and `saved` are those of the forward pass; beta counts with an activation, and backward from the output.
/// Each gradient is optional: NULL if it is not wanted. `dx` may be `dy`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_backward(
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
    dx: *mut c_void,
    dx_len: usize,
    dgamma: *mut c_void,
    dgamma_len: usize,
    dbeta: *mut c_void,
    dbeta_len: usize,
) -> Status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let plan = handle("plan", plan)?;
        let line = Line::new(plan, (gamma, gamma_len), (beta, beta_len));
        let (x, dy, dx) = (Raw::new("x", x, x_len), Raw::new("dy", dy, dy_len), Raw::new("dx", dx, dx_len));
        let (dgamma, dbeta) = (Raw::new("dgamma", dgamma, dgamma_len), Raw::new("dbeta", dbeta, dbeta_len));
        plan.passes.backward(x, dy, handle("saved", saved)?, line, [dx, dgamma, dbeta])
    })
}
