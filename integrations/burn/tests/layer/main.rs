//! The layer beside burn's own, on flex.

mod numbers;
mod parity;
mod records;
mod refusals;
mod support;
