//! Variants of training that are more than an option of the plan.

pub(crate) mod double_backward;
pub(crate) mod ghost;
pub(crate) mod renorm;
