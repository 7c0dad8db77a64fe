//! The drivers: grid, then threads, then kernels. A pass reduces each channel to a few sums, closes them into
//! statistics, and applies a map with coefficients made of those; either half can run alone.

use core::marker::PhantomData;
use core::ops::Range;

use crate::element::{Element, Real};
use crate::grid::{Band, Disjoint, Geometry, Planar, Rows, Runs, for_each_piece, pieces};
use crate::kernel::map::{self, Map, Periodic, Target};
use crate::kernel::sums::{Columns, RowBlock};
use crate::moments::MergeWeights;
use crate::scratch::{Need, Scratch};
use crate::simd::{Dispatched, Isa, Kernel, MAX_LANES, dispatch};

/// Parameters of the terms that a reduction of rows may have.
const TERM_PARAMS: usize = 4;
/// Elements that are mapped at a stretch, but no fewer than a few rows.
const MAP_STRETCH: usize = 16384;
/// The most channels of a batch.
pub(crate) const BATCH: usize = 16;
/// Elements that are read before as many are written.
const TURN: usize = 1024;
/// Bytes of one image of a batch above which the next image is not prefetched: it would leave the cache again.
const AHEAD: usize = 128 * 1024;
/// Bytes of a row from which on rows are prefetched.
const AHEAD_ROW: usize = 512;
/// The shortest plane, and the shortest run of the planes of a batch, that a pass goes over once; in bytes.
const FUSED_PLANE: usize = 512;
const FUSED_RUN: usize = 4096;
/// Merges of one channel that are worth another thread.
const MERGES: usize = 65536;

/// A value of each of up to [`BATCH`] neighbouring channels. Channels are closed together: the roots and quotients of one
/// take as long as many of its elements.
pub(crate) type Each<T> = [T; BATCH];

/// The first half of a pass: `S` values in f64 per channel.
pub(crate) trait Reduction<E: Element, const S: usize>: Sync {
    /// What the second half learns of the channels.
    type Closed;

    /// What is known of a block of a channel while its runs are read.
    type Block<I: Isa>: Copy;

    /// A block that was not started.
    fn blank<I: Isa>(&self, isa: I) -> Self::Block<I>;

    /// Starts a block.
    ///
    /// # Safety
    /// The runs come from the grid of the tensors' shape.
    unsafe fn begin<I: Isa>(&self, isa: I, channel: usize, runs: Runs) -> Self::Block<I>;

    /// Adds a band of the block, or a part of it of whole groups. The elements `ahead` of it are prefetched, none for 0.
    ///
    /// # Safety
    /// The band lies inside the tensors.
    unsafe fn add<I: Isa>(&self, isa: I, block: &mut Self::Block<I>, band: Band, ahead: usize);

    /// The values of a block whose runs were all added.
    ///
    /// # Safety
    /// As [`Reduction::begin`].
    unsafe fn end<I: Isa>(&self, isa: I, block: &Self::Block<I>, runs: Runs) -> [f64; S];

    /// The values of the channels of one block of rows; of channel `block.columns.0 + i` in `out[k][i]`.
    ///
    /// # Safety
    /// The block comes from the grid of the tensors' shape.
    unsafe fn rows<I: Isa>(&self, isa: I, block: RowBlock, columns: &mut Columns<'_, E::Param>, out: [&mut [f64]; S]);

    /// The values of two neighbouring sets.
    fn merge(weights: MergeWeights, a: [f64; S], b: [f64; S]) -> [f64; S];

    /// Records the values of up to [`BATCH`] channels.
    ///
    /// # Safety
    /// It is called once for each channel.
    unsafe fn close(&self, channels: Range<usize>, values: &[Each<f64>; S]) -> Self::Closed;
}

/// The second half of a pass: a map with `K` coefficients per channel.
pub(crate) trait Application<E: Element, const K: usize>: Sync {
    /// What the coefficients are made of.
    type Given;

    /// The coefficients of up to [`BATCH`] channels.
    fn coefficients(&self, channels: Range<usize>, given: &Self::Given) -> [Each<E::Param>; K];
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
    /// Whether tensors come from memory: then it pays to ask for them ahead, and to read them once.
    pub(crate) large: bool,
}

impl Context {
    /// Whether each thread has whole channels, rather than blocks of them.
    fn by_channel(&self, planar: Planar) -> bool {
        planar.channels >= 8 * self.workers || planar.channels.is_multiple_of(self.workers)
    }

    /// Whether both halves go over the tensor together: not where it stays in a cache, nor in short steps.
    fn fused<E>(&self, planar: Planar) -> bool {
        let plane = planar.plane * size_of::<E>();
        let run = plane * self.batch.min(planar.channels);
        self.large && plane >= FUSED_PLANE && run >= FUSED_RUN && self.by_channel(planar)
    }

    /// Scratch for a reduction to `S` values and a map of `K` coefficients; either may be 0 for none.
    pub(crate) fn need<const S: usize, const K: usize>(&self) -> Need {
        match self.geometry {
            // A shape need not have been allocated to be asked about, so these products saturate.
            Geometry::Planar(planar) => Need {
                wide: if self.by_channel(planar) { 0 } else { planar.channels.saturating_mul(planar.blocks()) }
                    .saturating_mul(S),
                narrow: planar.channels.saturating_mul(K),
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
        let close = |channels: Range<usize>, values: &[Each<f64>; S]| {
            // SAFETY: each channel is closed once, by each of the arms below.
            plain(application.coefficients(channels.clone(), &unsafe { reduction.close(channels, values) }))
        };
        match self.geometry {
            Geometry::Planar(planar) if self.fused::<E>(planar) => {
                for_each_piece(self.workers, planar.channels, |_, channels| {
                    let reader = self.reader(planar, channels, reduction);
                    dispatch(self.tier, Fused::<E, R, A, _, S, K> { reader, application, close: &close });
                });
            }
            Geometry::Planar(planar) => {
                let coefficients: &mut [[E::Param; K]] = narrow.as_chunks_mut().0;
                let out = Disjoint::new(coefficients);
                self.reduce_planar(planar, reduction, wide, |channels, values| {
                    // SAFETY: each channel is closed once.
                    transpose(&close(channels.clone(), values), unsafe { out.slice(channels) });
                });
                self.apply_planar(planar, application, coefficients, Order::Backwards);
            }
            Geometry::Rows(rows) => {
                let (coefficients, work) = narrow.split_at_mut(K * rows.padded());
                let (out, lead) = (Disjoint::new(coefficients), application.target().lead());
                self.reduce_rows(rows, reduction, wide, work, |channels, values| {
                    let coefficients = close(channels.clone(), values);
                    // SAFETY: each channel is closed once.
                    unsafe { set_columns(rows, out, lead, channels, &coefficients) }
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
        let close = |channels: Range<usize>, values: &[Each<f64>; S]| {
            // SAFETY: each channel is closed once.
            unsafe { reduction.close(channels, values) };
        };
        match self.geometry {
            Geometry::Planar(planar) => self.reduce_planar(planar, reduction, wide, close),
            Geometry::Rows(rows) => self.reduce_rows(rows, reduction, wide, narrow, close),
        }
    }

    /// Applies, with what is `given` of each channel.
    ///
    /// # Safety
    /// As [`Context::run`], for the second half.
    pub(crate) unsafe fn apply<E, A, const K: usize>(
        self,
        application: &A,
        given: impl Fn(Range<usize>) -> A::Given,
        scratch: &mut Scratch<E::Param>,
    ) where
        E: Element,
        A: Application<E, K>,
    {
        let (_, narrow) = scratch.parts(self.need::<0, K>());
        match self.geometry {
            Geometry::Planar(planar) => {
                let coefficients: &mut [[E::Param; K]] = narrow.as_chunks_mut().0;
                for channels in batches(0..planar.channels) {
                    let values = plain(application.coefficients(channels.clone(), &given(channels.clone())));
                    transpose(&values, &mut coefficients[channels]);
                }
                self.apply_planar(planar, application, coefficients, Order::Forwards);
            }
            Geometry::Rows(rows) => {
                let (out, lead) = (Disjoint::new(narrow), application.target().lead());
                for channels in batches(0..rows.channels) {
                    let values = plain(application.coefficients(channels.clone(), &given(channels.clone())));
                    // SAFETY: no other thread knows the scratch yet.
                    unsafe { set_columns(rows, out, lead, channels, &values) }
                }
                self.apply_rows(rows, application, narrow, Order::Forwards);
            }
        }
    }

    fn reader<E, R>(self, planar: Planar, channels: Range<usize>, reduction: &R) -> Reader<'_, E, R> {
        Reader { planar, channels, reduction, batch: self.batch, prefetches: self.large, element: PhantomData }
    }

    fn reduce_planar<E: Element, R: Reduction<E, S>, const S: usize>(
        self,
        planar: Planar,
        reduction: &R,
        wide: &mut [f64],
        close: impl Fn(Range<usize>, &[Each<f64>; S]) + Sync,
    ) {
        if self.by_channel(planar) {
            return for_each_piece(self.workers, planar.channels, |_, channels| {
                dispatch(
                    self.tier,
                    Reduce::<E, R, _, S> { reader: self.reader(planar, channels, reduction), close: &close },
                );
            });
        }
        let values: &mut [[f64; S]] = wide.as_chunks_mut().0;
        let out = Disjoint::new(values);
        for_each_piece(self.workers, planar.channels * planar.blocks(), |_, blocks| {
            // SAFETY: the ranges of the pieces do not overlap.
            let out = unsafe { out.slice(blocks.clone()) };
            dispatch(self.tier, PlanarBlocks { planar, blocks, reduction, out, element: PhantomData::<E> });
        });
        for channels in batches(0..planar.channels) {
            let mut totals = Merged::new();
            for b in 0..planar.blocks() {
                let weights = totals.weights(planar.block(0, b).size());
                for (i, c) in channels.clone().enumerate() {
                    totals.add::<E, R>(i, weights, values[c * planar.blocks() + b]);
                }
            }
            close(channels, &totals.values);
        }
    }

    fn apply_planar<E: Element, A: Application<E, K>, const K: usize>(
        self,
        planar: Planar,
        application: &A,
        coefficients: &[[E::Param; K]],
        order: Order,
    ) {
        let len = planar.planes * planar.channels * planar.plane;
        let stretches = Stretches::new(len, MAP_STRETCH, application);
        for_each_piece(self.workers, stretches.count(), |_, piece| {
            for i in order.over(piece) {
                let elements = stretches.get(i);
                dispatch(self.tier, PlanarMap::<E, A, K> { planar, elements, application, coefficients });
            }
        });
    }

    fn reduce_rows<E: Element, R: Reduction<E, S>, const S: usize>(
        self,
        rows: Rows,
        reduction: &R,
        wide: &mut [f64],
        work: &mut [E::Param],
        close: impl Fn(Range<usize>, &[Each<f64>; S]) + Sync,
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
        let stretches = Stretches::new(rows.rows * rows.channels, MAP_STRETCH.max(8 * rows.period()), application);
        for_each_piece(self.workers, stretches.count(), |_, piece| {
            for i in order.over(piece) {
                let elements = stretches.get(i);
                dispatch(self.tier, RowsMap::<E, A, K> { rows, elements, application, coefficients });
            }
        });
    }
}

/// A tensor cut into stretches, between which stores are aligned.
struct Stretches {
    len: usize,
    each: usize,
    head: usize,
}

impl Stretches {
    fn new<E: Element, A: Application<E, K>, const K: usize>(len: usize, each: usize, application: &A) -> Self {
        Self { len, each, head: application.target().head() }
    }

    fn count(&self) -> usize {
        self.len.saturating_sub(self.head).div_ceil(self.each).max(self.len.min(1))
    }

    fn get(&self, i: usize) -> Range<usize> {
        let cut = |i: usize| (self.head + i * self.each).min(self.len);
        (if i == 0 { 0 } else { cut(i) })..cut(i + 1)
    }
}

/// Ranges of up to [`BATCH`] channels.
fn batches(channels: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    channels.clone().step_by(BATCH).map(move |from| from..(from + BATCH).min(channels.end))
}

/// The values, with one and the same NaN for all: the caller's may have any payload, see [`Isa::store_bf16`].
fn plain<P: Real, const K: usize>(values: [Each<P>; K]) -> [Each<P>; K] {
    values.map(|each| each.map(|value| if value.to_f64().is_nan() { P::from_f64(f64::NAN) } else { value }))
}

/// Values of each channel from the channels of each value.
fn transpose<T: Copy, const K: usize>(from: &[Each<T>; K], to: &mut [[T; K]]) {
    for (i, to) in to.iter_mut().enumerate() {
        *to = from.each_ref().map(|from| from[i]);
    }
}

/// Writes the coefficients of channels to their columns.
///
/// # Safety
/// No other access to the columns of the channels happens at the same time.
unsafe fn set_columns<P: Copy, const K: usize>(
    rows: Rows,
    out: Disjoint<'_, P>,
    lead: usize,
    channels: Range<usize>,
    values: &[Each<P>; K],
) {
    for (k, values) in values.iter().enumerate() {
        let put = |column: usize, values: &[P]| {
            let at = k * rows.padded() + lead + column;
            // SAFETY: columns of the channels.
            unsafe { out.slice(at..at + values.len()) }.copy_from_slice(values);
        };
        for joined in 0..rows.joined() {
            let column = joined * rows.channels + channels.start;
            put(column, &values[..channels.len()]);
            // The first columns stand once more after the last.
            if column < MAX_LANES {
                put(rows.period() + column, &values[..channels.len().min(MAX_LANES - column)]);
            }
        }
    }
}

/// Blocks of up to [`BATCH`] channels merged so far, as many of each channel.
struct Merged<const S: usize> {
    values: [Each<f64>; S],
    count: u64,
}

impl<const S: usize> Merged<S> {
    fn new() -> Self {
        Self { values: [[0.0; BATCH]; S], count: 0 }
    }

    /// The weights that blocks of `size` elements, one of each channel, are merged with; none for the first ones.
    #[inline(always)]
    fn weights(&mut self, size: usize) -> Option<MergeWeights> {
        let (before, size) = (self.count, size as u64);
        self.count += size;
        (before > 0).then(|| MergeWeights::new(before, size))
    }

    /// Merges a block of channel `i`.
    #[inline(always)]
    fn add<E: Element, R: Reduction<E, S>>(&mut self, i: usize, weights: Option<MergeWeights>, block: [f64; S]) {
        let merged = weights.map_or(block, |weights| R::merge(weights, self.values.map(|value| value[i]), block));
        for (value, merged) in self.values.iter_mut().zip(merged) {
            value[i] = merged;
        }
    }
}

/// Work that is done in turns with reading. Not a closure: one would not be compiled for the tier.
trait Turns {
    /// After `n` more elements were read.
    fn turn(&mut self, n: usize);
}

impl Turns for () {
    #[inline(always)]
    fn turn(&mut self, _: usize) {}
}

impl<I: Isa, M: Map<I, K>, const K: usize> Turns for map::Images<'_, I, M, K> {
    #[inline(always)]
    fn turn(&mut self, n: usize) {
        self.write(n);
    }
}

/// Reads a range of channels, batch after batch.
struct Reader<'a, E, R> {
    planar: Planar,
    channels: Range<usize>,
    reduction: &'a R,
    /// Channels of a batch.
    batch: usize,
    prefetches: bool,
    element: PhantomData<E>,
}

/// What is known of the channels of a batch: of their blocks while they are read, and in all.
struct Batch<B, const S: usize> {
    blocks: Each<B>,
    totals: Merged<S>,
}

impl<E: Element, R> Reader<'_, E, R> {
    fn batch_from(&self, start: usize) -> Range<usize> {
        start..(start + self.batch).min(self.channels.end)
    }

    /// Elements from one image to the next.
    fn pitch(&self) -> usize {
        self.planar.channels * self.planar.plane
    }

    /// Images that are prefetched while others are read; none where they would leave the cache again.
    fn images_ahead(&self) -> usize {
        let images = self.planar.block(self.channels.start, 0).together();
        let bytes = images * self.batch * self.planar.plane * size_of::<E>();
        if self.prefetches && bytes <= AHEAD { images } else { 0 }
    }

    #[inline(always)]
    fn start<I: Isa, const S: usize>(&self, isa: I) -> Batch<R::Block<I>, S>
    where
        R: Reduction<E, S>,
    {
        let block = self.reduction.blank(isa);
        Batch { blocks: [block; BATCH], totals: Merged::new() }
    }

    /// Reduces the channels of `read` to the totals of `batch`, in turns with `other`.
    #[inline(always)]
    fn read<I: Isa, const S: usize>(
        &self,
        isa: I,
        read: Range<usize>,
        batch: &mut Batch<R::Block<I>, S>,
        other: &mut impl Turns,
    ) where
        R: Reduction<E, S>,
    {
        let Self { planar, reduction, .. } = *self;
        let (plane, pitch) = (planar.plane, self.pitch());
        let prefetches = self.images_ahead() > 0;
        let (blocks, totals) = (&mut batch.blocks[..read.len()], &mut batch.totals);
        totals.count = 0;
        for b in 0..planar.blocks() {
            let first = planar.block(read.start, b);
            for (i, (c, block)) in read.clone().zip(&mut *blocks).enumerate() {
                // SAFETY: the runs come from the grid.
                *block = unsafe { reduction.begin(isa, c, first.shifted(i * plane)) };
            }
            for band in first.bands() {
                let ahead = match prefetches {
                    true if band.start + band.rows * pitch < planar.planes * pitch => band.rows * pitch,
                    // The next batch begins in the first image.
                    true if read.end < self.channels.end => (read.end * plane).wrapping_sub(band.start),
                    _ => 0,
                };
                for (i, block) in blocks.iter_mut().enumerate() {
                    let mut rest = band.shifted(i * plane);
                    while rest.len > 0 {
                        let part = rest.split(TURN);
                        // SAFETY: the runs come from the grid.
                        unsafe { reduction.add(isa, block, part, ahead) };
                        other.turn(part.len * part.rows);
                    }
                }
            }
            let weights = totals.weights(first.size());
            for (i, block) in blocks.iter().enumerate() {
                // SAFETY: the runs come from the grid.
                totals.add::<E, R>(i, weights, unsafe { reduction.end(isa, block, first.shifted(i * plane)) });
            }
        }
    }
}

/// The first half for whole channels.
struct Reduce<'a, E, R, F, const S: usize> {
    reader: Reader<'a, E, R>,
    close: &'a F,
}

impl<E, R, F, const S: usize> Kernel for Reduce<'_, E, R, F, S>
where
    E: Element,
    R: Reduction<E, S>,
    F: Fn(Range<usize>, &[Each<f64>; S]),
{
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let mut batch = self.reader.start(isa);
        let mut read = self.reader.batch_from(self.reader.channels.start);
        while !read.is_empty() {
            self.reader.read(isa, read.clone(), &mut batch, &mut ());
            (self.close)(read.clone(), &batch.totals.values);
            read = self.reader.batch_from(read.end);
        }
    }
}

/// Both halves for whole channels. While a batch of neighbouring channels is written from the cache, the next one is read
/// from memory, so that neither side of memory waits for the other.
struct Fused<'a, E, R, A, F, const S: usize, const K: usize> {
    reader: Reader<'a, E, R>,
    application: &'a A,
    close: &'a F,
}

impl<E, R, A, F, const S: usize, const K: usize> Kernel for Fused<'_, E, R, A, F, S, K>
where
    E: Element,
    R: Reduction<E, S>,
    A: Application<E, K>,
    F: Fn(Range<usize>, &[Each<f64>; S]) -> [Each<E::Param>; K],
{
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { reader, application, close } = self;
        let Planar { planes, plane, .. } = reader.planar;
        let target = application.target();
        let map = application.map::<I>();
        let mut batch = reader.start(isa);
        let mut coefficients = [[E::Param::default(); K]; BATCH];
        let start = reader.channels.start;
        let (mut written, mut read) = (start..start, reader.batch_from(start));
        while !written.is_empty() || !read.is_empty() {
            // Of the batch that is read, from the place that is written.
            let images = 2 * reader.images_ahead();
            let far = if read.is_empty() || images == 0 { 0 } else { images * reader.pitch() + written.len() * plane };
            let params = &coefficients[..written.len()];
            let places = (written.start * plane, plane, reader.pitch(), planes);
            // SAFETY: these channels belong to this piece alone.
            let mut writer = unsafe { map::Images::new(isa, &map, params, places, target, (images, far)) };
            reader.read(isa, read.clone(), &mut batch, &mut writer);
            writer.finish();
            transpose(&close(read.clone(), &batch.totals.values), &mut coefficients);
            (written, read) = (read.clone(), reader.batch_from(read.end));
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
            let runs = self.planar.block(c, b);
            // SAFETY: the runs come from the grid.
            *out = unsafe {
                let mut block = self.reduction.begin(isa, c, runs);
                for band in runs.bands() {
                    let ahead = if runs.follow(band) { band.rows * band.stride } else { 0 };
                    self.reduction.add(isa, &mut block, band, ahead);
                }
                self.reduction.end(isa, &block, runs)
            };
        }
    }
}

/// The second half for a range of elements.
struct PlanarMap<'a, E: Element, A, const K: usize> {
    planar: Planar,
    elements: Range<usize>,
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
        let index = self.elements.start / plane;
        let end = self.elements.end;
        let places = (self.elements, index % channels, (index + 1) * plane);
        // SAFETY: a part of the tensor, and no other piece has it.
        unsafe { map::Planes::new(isa, &map, self.coefficients, plane, places, target) }.write_to(end);
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
    F: Fn(Range<usize>, &[Each<f64>; S]),
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
struct RowsMap<'a, E: Element, A, const K: usize> {
    rows: Rows,
    elements: Range<usize>,
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
        let column = self.elements.start % period;
        let params = Periodic { params: self.coefficients, period, padded, lead, column };
        let at = (self.elements.start, self.elements.len());
        // SAFETY: the rows come from the grid, and no other piece has them.
        unsafe { map::over_rows(isa, &map, params, at, target) };
        if target.streaming {
            isa.fence();
        }
    }
}
