//! The drivers: grid, then threads, then kernels. A pass reduces each channel to a few sums, closes them into
//! statistics, and applies a map with coefficients made of those; either half can run alone.

use core::marker::PhantomData;
use core::ops::Range;

use crate::element::Element;
use crate::grid::{Disjoint, Geometry, Planar, Rows, Runs, for_each_piece, pieces};
use crate::kernel::map::{self, Map, Periodic, Target};
use crate::kernel::sums::{Columns, RowBlock};
use crate::moments::MergeWeights;
use crate::scratch::{Need, Scratch};
use crate::simd::{Dispatched, Isa, Kernel, MAX_LANES, dispatch};

/// Parameters of the terms that a reduction of rows may have.
const TERM_PARAMS: usize = 2;
/// Elements of the rows that are mapped at a stretch.
const MAP_STRETCH: usize = 16384;
/// The most channels of a batch.
pub(crate) const BATCH: usize = 64;
/// Merges of one channel that are worth another thread.
const MERGES: usize = 65536;

/// The first half of a pass: `S` values in f64 per channel.
pub(crate) trait Reduction<E: Element, const S: usize>: Sync {
    /// What the second half learns of a channel.
    type Closed;

    /// The values of one block of a channel.
    ///
    /// # Safety
    /// The runs come from the grid of the tensors' shape.
    unsafe fn runs<I: Isa>(&self, isa: I, channel: usize, runs: Runs) -> [f64; S];

    /// The values of the channels of one block of rows; of channel `block.columns.0 + i` in `out[k][i]`.
    ///
    /// # Safety
    /// The block comes from the grid of the tensors' shape.
    unsafe fn rows<I: Isa>(&self, isa: I, block: RowBlock, columns: &mut Columns<'_, E::Param>, out: [&mut [f64]; S]);

    /// The values of two neighbouring sets.
    fn merge(weights: MergeWeights, a: [f64; S], b: [f64; S]) -> [f64; S];

    /// Records a channel's values.
    ///
    /// # Safety
    /// It is called once for each channel.
    unsafe fn close(&self, channel: usize, values: [f64; S]) -> Self::Closed;
}

/// The second half of a pass: a map with `K` coefficients per channel.
pub(crate) trait Application<E: Element, const K: usize>: Sync {
    /// What the coefficients are made of.
    type Given;

    /// The coefficients of a channel.
    fn coefficients(&self, channel: usize, given: Self::Given) -> [E::Param; K];
    /// The map.
    fn map<I: Isa>(&self) -> impl Map<I, K, Element = E>;
    /// Where its values go.
    fn target(&self) -> Target<E>;
}

/// The order in which a tensor is mapped, stretch by stretch.
#[derive(Clone, Copy)]
enum Order {
    Forwards,
    /// After a reduction: what it read last may still be in a cache.
    Backwards,
}

impl Order {
    fn over(self, stretches: Range<usize>) -> impl Iterator<Item = usize> {
        let Range { start, end } = stretches;
        (start..end).map(move |i| match self {
            Order::Forwards => i,
            Order::Backwards => start + end - 1 - i,
        })
    }
}

/// How a pass runs.
#[derive(Clone, Copy)]
pub(crate) struct Context {
    pub(crate) geometry: Geometry,
    pub(crate) tier: Dispatched,
    pub(crate) workers: usize,
    /// Channels that a thread takes at once, at most [`BATCH`].
    pub(crate) batch: usize,
}

impl Context {
    /// Whether a thread has whole channels, so that it can apply while a channel is in its cache.
    fn by_channel(&self, planar: Planar) -> bool {
        planar.channels >= 8 * self.workers || planar.channels.is_multiple_of(self.workers)
    }

    /// Scratch for a reduction to `S` values and a map of `K` coefficients; either may be 0 for none.
    pub(crate) fn need<const S: usize, const K: usize>(&self) -> Need {
        match self.geometry {
            Geometry::Planar(planar) if S > 0 && K > 0 && self.by_channel(planar) => Need::default(),
            // A shape need not have been allocated to be asked about, so these products saturate.
            Geometry::Planar(p) => Need {
                wide: p.channels.saturating_mul(p.blocks()).saturating_mul(S),
                narrow: p.channels.saturating_mul(K),
            },
            Geometry::Rows(rows) => {
                let work = if S > 0 { self.row_pieces(rows).saturating_mul(self.row_width(rows)) } else { 0 };
                let values = rows.channels.saturating_mul(rows.blocks()).saturating_mul(S);
                Need {
                    wide: values.saturating_add(work.saturating_mul(2)),
                    narrow: rows.padded().saturating_mul(K).saturating_add(work.saturating_mul(TERM_PARAMS + 2)),
                }
            }
        }
    }

    fn row_width(&self, rows: Rows) -> usize {
        rows.tile_width(rows.tiles(self.workers))
    }

    fn row_pieces(&self, rows: Rows) -> usize {
        pieces(self.workers, rows.blocks() * rows.tiles(self.workers))
    }

    /// Reduces, closes each channel, and applies.
    ///
    /// # Safety
    /// The tensors of both halves have the shape of the geometry, and nothing else writes them or what `close`
    /// records meanwhile.
    pub(crate) unsafe fn run<E, R, A, const S: usize, const K: usize>(
        self,
        reduction: &R,
        application: &A,
        scratch: &mut Scratch<E::Param>,
    ) where
        E: Element,
        R: Reduction<E, S>,
        A: Application<E, K, Given = R::Closed>,
    {
        let (wide, narrow) = scratch.parts(self.need::<S, K>());
        // SAFETY: each channel is closed once, by each of the arms below.
        let close = |c, values| application.coefficients(c, unsafe { reduction.close(c, values) });
        match self.geometry {
            Geometry::Planar(planar) if self.by_channel(planar) => {
                for_each_piece(self.workers, planar.channels, |_, channels| {
                    let (close, element) = (&close, PhantomData);
                    let batch = self.batch;
                    dispatch(self.tier, Channels { planar, channels, reduction, application, close, batch, element });
                });
            }
            Geometry::Planar(planar) => {
                self.reduce_planar(planar, reduction, wide);
                let coefficients: &mut [[E::Param; K]] = narrow.as_chunks_mut().0;
                close_planar::<E, R, S>(planar, wide, |c, values| coefficients[c] = close(c, values));
                self.apply_planar(planar, application, coefficients, Order::Backwards);
            }
            Geometry::Rows(rows) => {
                let (coefficients, work) = narrow.split_at_mut(K * rows.padded());
                let (out, lead) = (Disjoint::new(coefficients), application.target().lead());
                self.reduce_rows(rows, reduction, wide, work, |c, values| {
                    let coefficients = close(c, values);
                    // SAFETY: each channel is closed once.
                    unsafe { set_columns(rows, out, lead, c, coefficients) }
                });
                self.apply_rows(rows, application, coefficients, Order::Backwards);
            }
        }
    }

    /// Reduces and closes each channel.
    ///
    /// # Safety
    /// As [`Context::run`], for the first half.
    pub(crate) unsafe fn reduce<E, R, const S: usize>(self, reduction: &R, scratch: &mut Scratch<E::Param>)
    where
        E: Element,
        R: Reduction<E, S>,
    {
        let (wide, narrow) = scratch.parts(self.need::<S, 0>());
        match self.geometry {
            Geometry::Planar(planar) => {
                self.reduce_planar(planar, reduction, wide);
                close_planar::<E, R, S>(planar, wide, |c, values| {
                    // SAFETY: each channel is closed once.
                    unsafe { reduction.close(c, values) };
                });
            }
            Geometry::Rows(rows) => self.reduce_rows(rows, reduction, wide, narrow, |c, values| {
                // SAFETY: each channel is closed once.
                unsafe { reduction.close(c, values) };
            }),
        }
    }

    /// Applies, with what is `given` of each channel.
    ///
    /// # Safety
    /// As [`Context::run`], for the second half.
    pub(crate) unsafe fn apply<E, A, const K: usize>(
        self,
        application: &A,
        given: impl Fn(usize) -> A::Given,
        scratch: &mut Scratch<E::Param>,
    ) where
        E: Element,
        A: Application<E, K>,
    {
        let (_, narrow) = scratch.parts(self.need::<0, K>());
        match self.geometry {
            Geometry::Planar(planar) => {
                let coefficients: &mut [[E::Param; K]] = narrow.as_chunks_mut().0;
                for (c, coefficients) in coefficients.iter_mut().enumerate() {
                    *coefficients = application.coefficients(c, given(c));
                }
                self.apply_planar(planar, application, coefficients, Order::Forwards);
            }
            Geometry::Rows(rows) => {
                let (out, lead) = (Disjoint::new(narrow), application.target().lead());
                for c in 0..rows.channels {
                    // SAFETY: no other thread knows the scratch yet.
                    unsafe { set_columns(rows, out, lead, c, application.coefficients(c, given(c))) }
                }
                self.apply_rows(rows, application, narrow, Order::Forwards);
            }
        }
    }

    fn reduce_planar<E: Element, R: Reduction<E, S>, const S: usize>(
        self,
        planar: Planar,
        reduction: &R,
        wide: &mut [f64],
    ) {
        let out: &mut [[f64; S]] = wide.as_chunks_mut().0;
        let out = Disjoint::new(out);
        for_each_piece(self.workers, planar.channels * planar.blocks(), |_, blocks| {
            // SAFETY: the ranges of the pieces do not overlap.
            let out = unsafe { out.slice(blocks.clone()) };
            dispatch(self.tier, PlanarBlocks { planar, blocks, reduction, out, element: PhantomData::<E> });
        });
    }

    fn apply_planar<E: Element, A: Application<E, K>, const K: usize>(
        self,
        planar: Planar,
        application: &A,
        coefficients: &[[E::Param; K]],
        order: Order,
    ) {
        let cuts = planar.plane.div_ceil(MAP_STRETCH).max(1);
        let parts = planar.planes * planar.channels * cuts;
        let together = (MAP_STRETCH / planar.plane.max(1)).max(1);
        for_each_piece(self.workers, parts.div_ceil(together), |_, stretches| {
            for i in order.over(stretches) {
                let parts = i * together..((i + 1) * together).min(parts);
                dispatch(self.tier, PlanarMap::<E, A, K> { planar, cuts, parts, application, coefficients });
            }
        });
    }

    fn reduce_rows<E: Element, R: Reduction<E, S>, const S: usize>(
        self,
        rows: Rows,
        reduction: &R,
        wide: &mut [f64],
        work: &mut [E::Param],
        close: impl Fn(usize, [f64; S]) + Sync,
    ) {
        let tiles = rows.tiles(self.workers);
        let (values, wide) = wide.split_at_mut(rows.blocks() * S * rows.channels);
        let (out, wide, work) = (Disjoint::new(values), Disjoint::new(wide), Disjoint::new(work));
        let width = self.row_width(rows);
        for_each_piece(self.workers, rows.blocks() * tiles, |piece, items| {
            let part = |values: usize| piece * values * width..(piece + 1) * values * width;
            // SAFETY: each piece has its own part of the work memory.
            let (wide, narrow) = unsafe { (wide.slice(part(2)), work.slice(part(TERM_PARAMS + 2))) };
            let (wide_a, wide_b) = wide.split_at_mut(width);
            let (params, narrow) = narrow.split_at_mut(TERM_PARAMS * width);
            let (narrow_a, narrow_b) = narrow.split_at_mut(width);
            let columns = Columns { params, narrow: [narrow_a, narrow_b], wide: [wide_a, wide_b] };
            dispatch(self.tier, RowBlocks::<E, R, S> { rows, items, tiles, reduction, columns, out });
        });
        let workers = self.workers.min(1 + rows.blocks() * rows.channels / MERGES);
        for_each_piece(workers, rows.channels, |_, channels| {
            let reduction = PhantomData::<(E, R)>;
            dispatch(self.tier, RowMerge { rows, channels, values: out, close: &close, reduction });
        });
    }

    fn apply_rows<E: Element, A: Application<E, K>, const K: usize>(
        self,
        rows: Rows,
        application: &A,
        coefficients: &[E::Param],
        order: Order,
    ) {
        // Joined rows, so that each stretch begins with the first column.
        let stretch = (MAP_STRETCH / rows.period()).max(1) * rows.joined();
        for_each_piece(self.workers, rows.rows.div_ceil(stretch), |_, stretches| {
            for i in order.over(stretches) {
                let part = i * stretch..((i + 1) * stretch).min(rows.rows);
                dispatch(self.tier, RowsMap::<E, A, K> { rows, part, application, coefficients });
            }
        });
    }
}

/// Merges the blocks of each channel in order and passes the result on.
fn close_planar<E: Element, R: Reduction<E, S>, const S: usize>(
    planar: Planar,
    values: &[f64],
    mut close: impl FnMut(usize, [f64; S]),
) {
    let values: &[[f64; S]] = values.as_chunks().0;
    for (c, blocks) in values.chunks_exact(planar.blocks()).enumerate() {
        let mut total = Merged::<E, R, S>::new();
        for (b, &block) in blocks.iter().enumerate() {
            total.add(block, planar.block(c, b).size());
        }
        close(c, total.values);
    }
}

/// Writes the coefficients of a channel to its columns.
///
/// # Safety
/// No other access to the columns of the channel happens at the same time.
#[inline(always)]
unsafe fn set_columns<R: Copy, const K: usize>(
    rows: Rows,
    out: Disjoint<'_, R>,
    lead: usize,
    channel: usize,
    values: [R; K],
) {
    for (k, value) in values.into_iter().enumerate() {
        for joined in 0..rows.joined() {
            let column = joined * rows.channels + channel;
            // SAFETY: columns of the channel.
            unsafe {
                out.set(k * rows.padded() + lead + column, value);
                // The first columns stand once more after the last.
                if column < MAX_LANES {
                    out.set(k * rows.padded() + lead + rows.period() + column, value);
                }
            }
        }
    }
}

/// Blocks of one channel merged so far.
struct Merged<E, R, const S: usize> {
    values: [f64; S],
    count: u64,
    reduction: PhantomData<(E, R)>,
}

impl<E: Element, R: Reduction<E, S>, const S: usize> Merged<E, R, S> {
    fn new() -> Self {
        Self { values: [0.0; S], count: 0, reduction: PhantomData }
    }

    #[inline(always)]
    fn add(&mut self, block: [f64; S], size: usize) {
        let size = size as u64;
        self.values =
            if self.count == 0 { block } else { R::merge(MergeWeights::new(self.count, size), self.values, block) };
        self.count += size;
    }
}

/// Both halves for whole channels: the second one while the channel is in cache.
struct Channels<'a, E, R, A, F, const S: usize, const K: usize> {
    planar: Planar,
    channels: Range<usize>,
    reduction: &'a R,
    application: &'a A,
    close: &'a F,
    /// Channels that are reduced before the first of them is written: their latencies overlap.
    batch: usize,
    element: PhantomData<E>,
}

impl<E, R, A, F, const S: usize, const K: usize> Kernel for Channels<'_, E, R, A, F, S, K>
where
    E: Element,
    R: Reduction<E, S>,
    A: Application<E, K>,
    F: Fn(usize, [f64; S]) -> [E::Param; K],
{
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let target = self.application.target();
        let map = self.application.map::<I>();
        let end = self.channels.end;
        for first in self.channels.step_by(self.batch) {
            let last = (first + self.batch).min(end);
            let (mut totals, mut coefficients) = ([[0.0; S]; BATCH], [[E::Param::default(); K]; BATCH]);
            for (c, values) in (first..last).zip(&mut totals) {
                let mut total = Merged::<E, R, S>::new();
                for b in 0..self.planar.blocks() {
                    let runs = self.planar.block(c, b);
                    // SAFETY: the runs come from the grid.
                    total.add(unsafe { self.reduction.runs(isa, c, runs) }, runs.size());
                }
                *values = total.values;
            }
            for (c, (coefficients, values)) in (first..last).zip(coefficients.iter_mut().zip(totals)) {
                *coefficients = (self.close)(c, values);
            }
            // The next batch, whose planes follow those of this one, is fetched while this one is written.
            let plane = self.planar.plane;
            let ahead = if last < end { self.batch * plane } else { 0 };
            // Backwards: what was read last is still in the nearest cache.
            for b in (0..self.planar.blocks()).rev() {
                let runs = (self.planar.block(first, b), plane);
                // SAFETY: the runs come from the grid, and no other piece has these channels.
                unsafe { map::over_runs(isa, &map, &coefficients[..last - first], runs, target, ahead) };
            }
        }
        if target.streaming {
            isa.fence();
        }
    }
}

/// The first half for a range of the blocks of all channels, channel by channel.
struct PlanarBlocks<'a, E, R, const S: usize> {
    planar: Planar,
    blocks: Range<usize>,
    reduction: &'a R,
    out: &'a mut [[f64; S]],
    element: PhantomData<E>,
}

impl<E: Element, R: Reduction<E, S>, const S: usize> Kernel for PlanarBlocks<'_, E, R, S> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let per_channel = self.planar.blocks();
        for (block, out) in self.blocks.zip(self.out) {
            let (c, b) = (block / per_channel, block % per_channel);
            // SAFETY: the runs come from the grid.
            *out = unsafe { self.reduction.runs(isa, c, self.planar.block(c, b)) };
        }
    }
}

/// The second half for a range of the planes in the order of memory, each cut into `cuts` parts.
struct PlanarMap<'a, E: Element, A, const K: usize> {
    planar: Planar,
    cuts: usize,
    parts: Range<usize>,
    application: &'a A,
    coefficients: &'a [[E::Param; K]],
}

impl<E: Element, A: Application<E, K>, const K: usize> Kernel for PlanarMap<'_, E, A, K> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let map = self.application.map::<I>();
        let target = self.application.target();
        let Planar { plane, channels, .. } = self.planar;
        for part in self.parts {
            let (index, from) = (part / self.cuts, part % self.cuts * MAP_STRETCH);
            let len = MAP_STRETCH.min(plane - from);
            let run = Runs { start: index * plane + from, len, count: 1, stride: 0 };
            // SAFETY: a part of a plane, and no other piece has it.
            unsafe { map::over_runs(isa, &map, &self.coefficients[index % channels..][..1], (run, plane), target, 0) };
        }
        if target.streaming {
            isa.fence();
        }
    }
}

/// The first half for a range of the blocks of rows, each cut into tiles of columns.
struct RowBlocks<'a, E: Element, R, const S: usize> {
    rows: Rows,
    items: Range<usize>,
    tiles: usize,
    reduction: &'a R,
    columns: Columns<'a, E::Param>,
    out: Disjoint<'a, f64>,
}

impl<E: Element, R: Reduction<E, S>, const S: usize> Kernel for RowBlocks<'_, E, R, S> {
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
struct RowMerge<'a, E, R, F, const S: usize> {
    rows: Rows,
    channels: Range<usize>,
    values: Disjoint<'a, f64>,
    close: &'a F,
    reduction: PhantomData<(E, R)>,
}

impl<E, R, F, const S: usize> Kernel for RowMerge<'_, E, R, F, S>
where
    E: Element,
    R: Reduction<E, S>,
    F: Fn(usize, [f64; S]),
{
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
        let total = of_block(0);
        let mut count = self.rows.block(0).len() as u64;
        for b in 1..self.rows.blocks() {
            let size = self.rows.block(b).len() as u64;
            let weights = MergeWeights::new(count, size);
            let block = of_block(b);
            for i in 0..self.channels.len() {
                let (mut x, mut y) = ([0.0; S], [0.0; S]);
                for k in 0..S {
                    (x[k], y[k]) = (total[k][i], block[k][i]);
                }
                let merged = R::merge(weights, x, y);
                for k in 0..S {
                    total[k][i] = merged[k];
                }
            }
            count += size;
        }
        for (i, c) in self.channels.clone().enumerate() {
            let mut values = [0.0; S];
            for k in 0..S {
                values[k] = total[k][i];
            }
            (self.close)(c, values);
        }
    }
}

/// The second half for a range of rows.
struct RowsMap<'a, E: Element, A, const K: usize> {
    rows: Rows,
    part: Range<usize>,
    application: &'a A,
    coefficients: &'a [E::Param],
}

impl<E: Element, A: Application<E, K>, const K: usize> Kernel for RowsMap<'_, E, A, K> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let map = self.application.map::<I>();
        let target = self.application.target();
        let (period, padded, lead) = (self.rows.period(), self.rows.padded(), target.lead());
        let params = Periodic { params: self.coefficients, period, padded, lead, column: 0 };
        let at = (self.part.start * self.rows.channels, self.part.len() * self.rows.channels);
        // SAFETY: the rows come from the grid, and no other piece has them.
        unsafe { map::over_rows(isa, &map, params, at, target) };
        if target.streaming {
            isa.fence();
        }
    }
}
