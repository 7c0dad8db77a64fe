//! Inference other than by a pass over the tensor's own type.

pub(crate) mod fold;
pub(crate) mod quantized;
