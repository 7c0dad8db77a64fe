//! The kernels, each written once, generic over the tier, the element type and what is summed or mapped.
//!
//! [`sums`] and [`columns`] reduce pairs of terms, [`map`] writes one value per element; [`moments`], [`normalize`] and
//! [`gradient`] say which terms and which values. Pointers are offsets into whole tensors; that the offsets lie
//! inside is the promise of the drivers, which take them from the grid.

pub(crate) mod columns;
pub(crate) mod gradient;
pub(crate) mod map;
pub(crate) mod moments;
pub(crate) mod normalize;
pub(crate) mod sums;
