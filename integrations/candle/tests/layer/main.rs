//! The layer beside candle-nn's, beside values of PyTorch, beside the kernels themselves, and where candle-nn's fails.

mod edges;
mod gradients;
mod kernels;
mod parity;
mod published;
mod support;
