//! Why a call was refused, as a code and as a text, and the guard that keeps panics on this side.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use batchnorm::Error;

/// What became of a call. Later versions may add codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// A null pointer where one to something was expected.
    Null = 1,
    /// Another number of elements than the plan asks for.
    Length = 2,
    /// A pointer that is not aligned for its type.
    Alignment = 3,
    /// Arguments that share memory.
    Overlap = 4,
    /// A number that stands for no value of its enumeration.
    Choice = 5,
    /// Statistics of another element type than the plan's.
    Dtype = 6,
    /// A shape without channels, or with more elements than memory has.
    Shape = 7,
    /// No values to take statistics of.
    EmptyBatch = 8,
    /// `eps` is negative, infinite or NaN.
    Eps = 9,
    /// A weight of running statistics outside 0 to 1.
    Momentum = 10,
    /// A variance that is negative or NaN.
    Variance = 11,
    /// The unbiased variance of one value.
    UnbiasedFromOne = 12,
    /// Statistics that no batch has filled yet.
    MissingStatistics = 13,
    /// Statistics of another number of values.
    Count = 14,
    /// A slope of a leaky ReLU that is negative, infinite or NaN.
    Slope = 15,
    /// Backward from the output behind an activation that cannot be undone.
    NotInvertible = 16,
    /// Backward from the output with a gamma too close to zero.
    Gamma = 17,
    /// A SIMD tier that this CPU does not have.
    Tier = 18,
    /// Not enough memory for statistics.
    Memory = 19,
    /// Anything else that was refused.
    Refused = 20,
    /// A defect of this library. Outputs may have been written.
    Panic = 21,
}

/// What each code means, in their order.
const MEANINGS: [&CStr; 22] = [
    c"done",
    c"a null pointer",
    c"a wrong number of elements",
    c"a pointer that is not aligned for its type",
    c"arguments that share memory",
    c"a number that stands for no value of its enumeration",
    c"statistics of another element type than the plan's",
    c"a shape without channels, or too large",
    c"no values to take statistics of",
    c"an eps that is negative, infinite or NaN",
    c"a momentum weight outside 0 to 1",
    c"a variance that is negative or NaN",
    c"the unbiased variance of one value",
    c"statistics that no batch has filled yet",
    c"statistics of another number of values",
    c"a slope that is negative, infinite or NaN",
    c"an activation or residual that cannot be undone",
    c"a gamma too close to zero",
    c"a SIMD tier that is not available here",
    c"not enough memory",
    c"refused",
    c"a defect of this library",
];

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Refused(#[from] Error),
    #[error("`{what}` is null")]
    Null { what: &'static str },
    #[error("`{what}` is not aligned: expected a multiple of {expected}, got {got:#x}")]
    Alignment { what: &'static str, expected: usize, got: usize },
    #[error("`{written}` is written and shares memory with `{other}`")]
    Overlap { written: &'static str, other: &'static str },
    #[error("{got} is no {what}")]
    Choice { what: &'static str, got: i32 },
    #[error("the statistics are of another element type than the plan, which expects them in {expected}")]
    Dtype { expected: &'static str },
    #[error("no memory for the statistics of {channels} channels")]
    Memory { channels: usize },
    #[error("a defect of this library: {0}")]
    Panic(String),
}

pub(crate) type Result<T> = core::result::Result<T, Failure>;

impl Failure {
    fn status(&self) -> Status {
        match self {
            Self::Null { .. } => Status::Null,
            Self::Alignment { .. } => Status::Alignment,
            Self::Overlap { .. } => Status::Overlap,
            Self::Choice { .. } => Status::Choice,
            Self::Dtype { .. } => Status::Dtype,
            Self::Memory { .. } => Status::Memory,
            Self::Panic(_) => Status::Panic,
            Self::Refused(error) => match error {
                Error::Length { .. } => Status::Length,
                Error::ShapeOverflow { .. } | Error::ZeroChannels => Status::Shape,
                Error::EmptyBatch { .. } | Error::EmptyMoments => Status::EmptyBatch,
                Error::Eps { .. } => Status::Eps,
                Error::Momentum { .. } => Status::Momentum,
                Error::Variance { .. } => Status::Variance,
                Error::UnbiasedFromOne { .. } => Status::UnbiasedFromOne,
                Error::MissingStatistics | Error::FrozenStatistics => Status::MissingStatistics,
                Error::Count { .. } | Error::Shards { .. } => Status::Count,
                Error::Slope { .. } => Status::Slope,
                Error::NotInvertible => Status::NotInvertible,
                Error::Gamma { .. } => Status::Gamma,
                Error::TierUnavailable { .. } => Status::Tier,
                _ => Status::Refused,
            },
        }
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Runs the body of an exported function: a refusal becomes a code and the thread's last message, and so does a panic.
pub(crate) fn guard(body: impl FnOnce() -> Result<()>) -> Status {
    // What a panic leaves half done is results, and the pools of plans, which give up what a call had taken.
    let Err(failure) = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(Failure::Panic(text(&*panic))))
    else {
        return Status::Ok;
    };
    let message = CString::new(failure.to_string()).unwrap_or_default();
    // A thread that ends may have no message any more; the code is enough then.
    let _ = LAST.try_with(|last| last.replace(message));
    failure.status()
}

fn text(panic: &(dyn Any + Send)) -> String {
    let message = panic.downcast_ref::<&str>().map(|text| text.to_string());
    message.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}

/// What a status code means: a constant text, for any number.
#[unsafe(no_mangle)]
pub extern "C" fn bn_error_message(status: i32) -> *const c_char {
    usize::try_from(status).ok().and_then(|at| MEANINGS.get(at)).unwrap_or(&c"an unknown code").as_ptr()
}

/// What the last call on this thread that was refused expected and got; empty before the first one. It is overwritten by the
/// next refusal on this thread.
#[unsafe(no_mangle)]
pub extern "C" fn bn_last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last() -> String {
        // SAFETY: a text of this thread, which is copied at once.
        unsafe { CStr::from_ptr(bn_last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn panics_end_here() {
        assert_eq!(guard(|| panic!("by {}", "design")), Status::Panic);
        assert_eq!(last(), "a defect of this library: by design");
        assert_eq!(guard(|| Ok(())), Status::Ok);
    }

    #[test]
    fn each_thread_has_its_own_message() {
        assert_eq!(guard(|| Err(Failure::Null { what: "x" })), Status::Null);
        std::thread::spawn(|| assert_eq!(last(), "")).join().unwrap();
        assert_eq!(last(), "`x` is null");
    }

    #[test]
    fn each_code_has_a_meaning() {
        assert_eq!(MEANINGS.len(), Status::Panic as usize + 1);
        for beyond in [-1, MEANINGS.len() as i32, i32::MIN, i32::MAX] {
            // SAFETY: a constant text.
            assert_eq!(unsafe { CStr::from_ptr(bn_error_message(beyond)) }, c"an unknown code");
        }
    }
}
