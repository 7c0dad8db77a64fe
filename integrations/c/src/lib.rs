//! The C interface of [`batchnorm`]: `include/batchnorm.h`, made of this crate by cbindgen, says all that a caller needs.
//!
//! Functions take opaque handles, and pointers with lengths; each returns a code and leaves a text. Nothing here is generic over
//! element types at the border: a handle holds a `Passes`, one implementation for all of them.
//!
//! # Safety
//! What all functions ask of their caller: handles are null or come from the `..._new` functions and were not freed, and
//! a handle that is not const is used by no other thread; pointers to values are null or lead to as many elements of
//! their type as is said, which no other thread writes, or accesses at all where the function writes. All else is checked.

#![deny(missing_docs)]
#![allow(clippy::missing_safety_doc, reason = "it is the same for all functions, and stands above and in the header")]

mod abi;
mod arguments;
mod halves;
mod options;
mod passes;
mod plan;
mod saved;
mod status;
mod whole;

pub use abi::BN_ABI_VERSION;
pub use halves::*;
pub use options::{ActivationKind, Dtype, LayoutKind, MomentumKind, Statistic, TierKind, VarianceKind};
pub use plan::*;
pub use saved::*;
pub use status::{Status, bn_error_message, bn_last_error};
pub use whole::*;
