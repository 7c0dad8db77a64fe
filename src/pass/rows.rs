//! The drivers for rows: the channels of one position lie in a row, and threads take blocks of rows.

use core::marker::PhantomData;
use core::ops::Range;

use super::{BATCH, Close, Reduction, batches};
use crate::element::Element;
use crate::grid::Rows;
use crate::kernel::map::{self, Map, Periodic, Target};
use crate::kernel::sums::{Columns, RowBlock};
use crate::moments::MergeWeights;
use crate::simd::{Isa, Kernel};
use crate::tensor::Disjoint;

/// Bytes of a row from which on rows are prefetched.
const AHEAD_ROW: usize = 512;

/// The first half for a range of the blocks of rows, each cut into tiles of columns.
pub(super) struct Blocks<'a, E: Element, R, const S: usize> {
    pub(super) rows: Rows,
    pub(super) items: Range<usize>,
    pub(super) tiles: usize,
    pub(super) reduction: &'a R,
    pub(super) columns: Columns<'a, E::Param>,
    pub(super) out: Disjoint<'a, f64>,
}

impl<E: Element, R: Reduction<E, S>, const S: usize> Kernel for Blocks<'_, E, R, S> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let channels = self.rows.channels;
        for item in self.items {
            let (b, tile) = (item / self.tiles, self.rows.tile(item % self.tiles, self.tiles));
            let rows = self.rows.block(b);
            let block = RowBlock {
                channels,
                start: rows.start * channels,
                len: rows.len() * channels,
                period: self.rows.period(),
                columns: (tile.start, tile.end),
                prefetches: self.rows.period() * size_of::<E>() >= AHEAD_ROW,
            };
            // SAFETY: the block comes from the grid, and no other piece has this tile of it.
            unsafe {
                let out = core::array::from_fn(|k| {
                    let at = (b * S + k) * channels;
                    self.out.slice(at + tile.start..at + tile.end.min(channels))
                });
                self.reduction.rows(isa, block, &mut self.columns, out);
            }
        }
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
                values[..channels.len()].copy_from_slice(&total[from..from + channels.len()]);
            }
            (self.close)(channels, &values);
        }
    }
}

/// The second half for a range of elements of rows.
pub(super) struct Write<'a, E: Element, M, const K: usize> {
    pub(super) rows: Rows,
    pub(super) elements: Range<usize>,
    pub(super) map: M,
    pub(super) target: Target<'a, E>,
    pub(super) coefficients: &'a [E::Param],
}

impl<E: Element, M: Map<K, Element = E>, const K: usize> Kernel for Write<'_, E, M, K> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (map, target) = (self.map, self.target);
        let (period, padded, lead) = (self.rows.period(), self.rows.padded(), target.lead());
        let column = self.elements.start % period;
        let params = Periodic { params: self.coefficients, period, padded, lead, column };
        let at = (self.elements.start, self.elements.len());
        // SAFETY: the rows come from the grid, and no other piece has them.
        unsafe { map::over_rows(isa, map, params, at, target) };
    }
}
