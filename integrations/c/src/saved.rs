//! The statistics of a batch, and the running statistics that are moved towards them.

use std::any::Any;
use std::ffi::c_void;

use batchnorm::{Momentum, Real, Running, Variance};

use crate::arguments::{Raw, apart};
use crate::options::{self, Statistic};
use crate::plan::Plan;
use crate::status::{Failure, Result, Status, guard};

/// The statistics of a batch, which a training forward pass leaves for the backward pass and for running statistics.
#[derive(Debug)]
pub struct Saved(pub(crate) Box<dyn Statistics>);

/// What statistics of any parameter type can do.
pub(crate) trait Statistics: Any + std::fmt::Debug + Send + Sync {
    fn channels(&self) -> usize;
    fn count(&self) -> u64;
    /// # Safety
    /// As [`crate`].
    unsafe fn read(&self, statistic: Statistic, to: Raw) -> Result<()>;
    /// # Safety
    /// As [`crate`].
    unsafe fn move_towards(&self, by: (Momentum, Variance, u64), mean: Raw, var: Raw) -> Result<()>;
}

impl<P: Real> Statistics for batchnorm::Saved<P> {
    fn channels(&self) -> usize {
        self.channels()
    }

    fn count(&self) -> u64 {
        self.count()
    }

    unsafe fn read(&self, statistic: Statistic, to: Raw) -> Result<()> {
        let from = match statistic {
            Statistic::Mean => self.mean(),
            Statistic::Residue => self.residue(),
            Statistic::Var => self.var(),
            Statistic::InvStd => self.inv_std(),
        };
        // SAFETY: the caller's promise.
        unsafe { to.required::<P>(from.len())?.write() }.unwrap_or_default().copy_from_slice(from);
        Ok(())
    }

    unsafe fn move_towards(
        &self,
        (momentum, variance, batches): (Momentum, Variance, u64),
        mean: Raw,
        var: Raw,
    ) -> Result<()> {
        let (mean, var) = (mean.required::<P>(self.channels())?, var.required::<P>(self.channels())?);
        apart(&[mean.span(), var.span()], &[])?;
        // SAFETY: the caller's promise; the two do not overlap.
        let (mean, var) = unsafe { (mean.write().unwrap_or_default(), var.write().unwrap_or_default()) };
        let mut running = Running::from_parts(mean.to_vec(), var.to_vec(), batches, momentum, variance)?;
        running.update(self)?;
        mean.copy_from_slice(running.mean());
        var.copy_from_slice(running.var());
        Ok(())
    }
}

impl Saved {
    /// Those of one parameter type.
    pub(crate) fn of<P: Real>(&self) -> Result<&batchnorm::Saved<P>> {
        (&*self.0 as &dyn Any).downcast_ref().ok_or(Failure::Dtype { expected: std::any::type_name::<P>() })
    }

    pub(crate) fn of_mut<P: Real>(&mut self) -> Result<&mut batchnorm::Saved<P>> {
        (&mut *self.0 as &mut dyn Any).downcast_mut().ok_or(Failure::Dtype { expected: std::any::type_name::<P>() })
    }
}

/// The handle behind a pointer.
///
/// # Safety
/// As [`crate`].
pub(crate) unsafe fn handle<'a, T>(what: &'static str, at: *const T) -> Result<&'a T> {
    // SAFETY: the caller's promise.
    unsafe { at.as_ref() }.ok_or(Failure::Null { what })
}

/// The same for one that is written.
///
/// # Safety
/// As [`crate`].
pub(crate) unsafe fn handle_mut<'a, T>(what: &'static str, at: *mut T) -> Result<&'a mut T> {
    // SAFETY: the caller's promise.
    unsafe { at.as_mut() }.ok_or(Failure::Null { what })
}

/// Writes a new handle where the caller wants it, and null there if there is none.
///
/// # Safety
/// As [`crate`].
pub(crate) unsafe fn give<T>(what: &'static str, to: *mut *mut T, make: impl FnOnce() -> Result<T>) -> Result<()> {
    // SAFETY: the caller's promise.
    let to = unsafe { handle_mut(what, to) }?;
    *to = core::ptr::null_mut();
    *to = Box::into_raw(Box::new(make()?));
    Ok(())
}

/// Ends a handle.
///
/// # Safety
/// As [`crate`].
pub(crate) unsafe fn end<T>(handle: *mut T) {
    if !handle.is_null() {
        guard(|| {
            // SAFETY: `give` made it, and the caller promises that it was not freed.
            drop(unsafe { Box::from_raw(handle) });
            Ok(())
        });
    }
}

/// Makes room for the statistics of batches with the channels and the dtype of a plan. It serves all such plans, and batch after
/// batch.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_saved_new(plan: *const Plan, saved: *mut *mut Saved) -> Status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { give("saved", saved, || handle("plan", plan)?.passes.saved().map(Saved)) })
}

/// Frees statistics; NULL is left alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_saved_free(saved: *mut Saved) {
    // SAFETY: the caller's promise.
    unsafe { end(saved) }
}

/// The number of values per channel that were counted: 0 before the first batch, for frozen statistics, and for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_saved_count(saved: *const Saved) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { saved.as_ref() }.map_or(0, |saved| saved.0.count())
}

/// The number of channels, and 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_saved_channels(saved: *const Saved) -> usize {
    // SAFETY: the caller's promise.
    unsafe { saved.as_ref() }.map_or(0, |saved| saved.0.channels())
}

/// Copies one statistic (a bn_statistic) to `to`, one value per channel.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_saved_read(saved: *const Saved, statistic: i32, to: *mut c_void, to_len: usize) -> Status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { handle("saved", saved)?.0.read(Statistic::new(statistic)?, Raw::new("to", to, to_len)) })
}

/// Takes statistics that were kept elsewhere: mean and 1 / sqrt(var + eps) of `count` values per channel. What the mean had
/// beyond its rounded value is lost.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_saved_set(
    plan: *const Plan,
    saved: *mut Saved,
    count: u64,
    mean: *const c_void,
    mean_len: usize,
    inv_std: *const c_void,
    inv_std_len: usize,
) -> Status {
    let (mean, inv_std) = (Raw::new("mean", mean, mean_len), Raw::new("inv_std", inv_std, inv_std_len));
    // SAFETY: the caller's promise.
    guard(|| unsafe { handle("plan", plan)?.passes.set(handle_mut("saved", saved)?, count, mean, inv_std) })
}

/// Moves running statistics towards those of a batch: `running = keep * running + take * batch`.
///
/// `momentum` is a bn_momentum and says what `weight` is the weight of; `variance` is a bn_variance. `batches` is the number
/// of batches that entered the running statistics before this one; only a cumulative average asks for it. `mean` and `var` are
/// the caller's, one value per channel, and are usually begun with 0 and 1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bn_running_update(
    saved: *const Saved,
    momentum: i32,
    weight: f64,
    variance: i32,
    batches: u64,
    mean: *mut c_void,
    mean_len: usize,
    var: *mut c_void,
    var_len: usize,
) -> Status {
    let (mean, var) = (Raw::new("mean", mean, mean_len), Raw::new("var", var, var_len));
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let by = (options::momentum(momentum, weight)?, options::variance(variance)?, batches);
        handle("saved", saved)?.0.move_towards(by, mean, var)
    })
}
