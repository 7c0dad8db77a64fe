//! The drivers for rows: the channels of one position lie in a row, and threads take blocks of rows.

use core::marker::PhantomData;
use core::ops::Range;

use super::{BATCH, Close, Reduction, batches};
use crate::element::Element;
use crate::forward::copy;
use crate::grid::{Rows, Runs};
use crate::kernel::columns::{Asked, Columns, RowBlock};
use crate::kernel::map::{self, Map, Periodic, Target};
use crate::moments::MergeWeights;
use crate::simd::{Compute, Isa, Kernel, Storage, Vector};
use crate::tensor::Disjoint;

/// A tile of a block of rows, as the kernels take it.
pub(super) fn block(rows: Rows, block: usize, tile: Range<usize>, (ahead, asked): (usize, Asked)) -> RowBlock {
    let range = rows.block(block);
    RowBlock {
        channels: rows.channels,
        start: range.start * rows.channels,
        len: range.len() * rows.channels,
        period: rows.period(),
        columns: (tile.start, tile.end),
        base: 0,
        ahead,
        asked,
    }
}

/// The runs of a tile, and the tile with its rows one after the other.
pub(super) fn packed(block: RowBlock) -> (Runs, RowBlock) {
    let (first, last) = block.columns;
    if last - first == block.period {
        let runs = Runs { start: block.start, len: block.len, count: 1, stride: 0 };
        return (runs, RowBlock { start: 0, ..block });
    }
    let (width, rows) = (last - first, block.len / block.channels);
    let runs = Runs { start: block.start + first, len: width, count: rows, stride: block.channels };
    let len = rows * width;
    let columns = (0, width);
    (runs, RowBlock { channels: width, start: 0, len, period: width, columns, base: first, ..block })
}

/// The first half for a tile of a block of rows.
pub(super) struct Block<'c, 'a, E: Element, R, const S: usize> {
    pub(super) block: RowBlock,
    pub(super) reduction: &'c R,
    pub(super) columns: &'c mut Columns<'a, E::Param>,
    pub(super) out: [&'c mut [f64]; S],
}

impl<E: Element, R: Reduction<E, S>, const S: usize> Kernel for Block<'_, '_, E, R, S> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        // SAFETY: the block comes from the grid.
        unsafe { self.reduction.rows(isa, self.block, self.columns, self.out) };
    }
}

/// Merges the blocks of a range of channels in order, and closes them.
pub(super) struct Merge<'a, E, R, const S: usize> {
    pub(super) rows: Rows,
    pub(super) channels: Range<usize>,
    pub(super) values: Disjoint<'a, f64>,
    pub(super) close: Close<'a, (), S>,
    pub(super) reduction: PhantomData<(E, R)>,
}

impl<E: Element, R: Reduction<E, S>, const S: usize> Kernel for Merge<'_, E, R, S> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let of_block = |b: usize| -> [&mut [f64]; S] {
            core::array::from_fn(|k| {
                let at = (b * S + k) * self.rows.channels;
                // SAFETY: no other piece has these channels, and each part is asked for once.
                unsafe { self.values.slice(at + self.channels.start..at + self.channels.end) }
            })
        };
        let width = self.channels.len();
        let mut total = of_block(0).map(|total| &mut total[..width]);
        let mut count = self.rows.block(0).len() as u64;
        for b in 1..self.rows.blocks() {
            let size = self.rows.block(b).len() as u64;
            let weights = MergeWeights::new(count, size);
            let block = of_block(b).map(|block| &block[..width]);
            for i in 0..width {
                let merged = R::merge(weights, total.each_ref().map(|total| total[i]), block.map(|block| block[i]));
                for (total, merged) in total.each_mut().into_iter().zip(merged) {
                    total[i] = merged;
                }
            }
            count += size;
        }
        for channels in batches(self.channels.clone()) {
            let from = channels.start - self.channels.start;
            let mut values = [[0.0; BATCH]; S];
            for (values, total) in values.iter_mut().zip(&total) {
                copy(&mut values[..channels.len()], &total[from..from + channels.len()]);
            }
            (self.close)(channels, &values);
        }
    }
}

/// Bytes of coefficients from which on they are worth weaving.
const WOVEN: usize = 8 << 10;

/// Weaves coefficients, `K` arrays as long, as [`Periodic`] takes them, where that is needed or worth it; whether it did.
pub(super) struct Weave<'a, E: Storage, const K: usize> {
    pub(super) from: &'a [E::Compute],
    pub(super) to: &'a mut [E::Compute],
}

impl<E: Storage, const K: usize> Kernel for Weave<'_, E, K> {
    type Output = bool;
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> bool {
        let isa = E::unordered(isa);
        if <E::Unordered<I> as Isa>::IN_ORDER && size_of_val(self.from) < WOVEN {
            return false;
        }
        let lanes = Compute::<E::Unordered<I>, E>::LANES;
        let padded = self.from.len() / K;
        for (i, to) in self.to.chunks_exact_mut(lanes).enumerate() {
            let from = &self.from[i % K * padded + i / K * lanes..][..lanes];
            // SAFETY: both are as long as a vector.
            unsafe { Compute::<E::Unordered<I>, E>::load(isa, from.as_ptr()).keep(to.as_mut_ptr()) };
        }
        true
    }
}

/// The second half for a range of elements of rows.
pub(super) struct Write<'a, E: Storage, M, const K: usize> {
    pub(super) rows: Rows,
    pub(super) elements: Range<usize>,
    /// The column of the first element.
    pub(super) column: usize,
    /// Where the arrays of parameters begin.
    pub(super) lead: usize,
    pub(super) map: M,
    /// How far from what is written elements are prefetched to be read.
    pub(super) ahead: usize,
    pub(super) target: Target<'a, E>,
    pub(super) coefficients: &'a [E::Compute],
    /// Whether they went through [`Weave`].
    pub(super) woven: bool,
}

impl<E: Storage, M: Map<K, Element = E>, const K: usize> Kernel for Write<'_, E, M, K> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { map, ahead, target, column, lead, woven, .. } = self;
        let (period, padded) = (self.rows.span(), self.rows.padded());
        let params = Periodic { params: self.coefficients, woven, padded, lead, period, column };
        let at = (self.elements.start, self.elements.len());
        // SAFETY: the rows come from the grid, and no other piece has them.
        unsafe {
            if woven || <E::Unordered<I> as Isa>::IN_ORDER {
                map::over_rows(E::unordered(isa), map, params, at, ahead, target);
            } else {
                map::over_rows(isa, map, params, at, ahead, target);
            }
        }
    }
}
