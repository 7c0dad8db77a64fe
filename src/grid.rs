//! The fixed partition of a tensor into blocks, and the threads that walk it.
//!
//! Blocks are a function of the shape alone. Threads take whole blocks and results are merged in the order of the
//! blocks, so neither the number of threads nor their timing shows in the bits.

use core::ops::Range;

use crate::kernel::sums::GROUPS;
use crate::shape::{Layout, Shape};
use crate::simd::MAX_LANES;

/// Elements of one block of a channel: small enough for the cache, and for one shift to suit all its values.
const PLANAR_BLOCK: usize = 8192;
/// Runs that are summed together.
pub(crate) const BAND: usize = 4;
/// Elements of one block of rows, before the limits on its rows.
const ROWS_BLOCK: usize = 262144;
/// The most rows of a block, where rows are long and where they are short.
const ROWS_PER_BLOCK: (usize, usize) = (512, 4096);
/// Rows at most this long are joined until their length is a multiple of a vector.
const JOIN_BELOW: usize = 128;
/// Elements that maps treat as one row, where one has fewer.
const SPAN: usize = 64;
/// The fewest such rows for which the parameters of more columns are worth their while.
const SPANS: usize = 16;
/// The number of tiles of columns is chosen freely: columns do not share sums.
const TILE: usize = 4 * MAX_LANES;
/// Bytes of one tensor below which waking threads costs more than they bring, and those worth one more.
#[cfg(feature = "rayon")]
const WAKE: usize = 1 << 19;
#[cfg(feature = "rayon")]
const GRAIN: usize = 256 << 10;

/// How the elements of the channels lie.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Geometry {
    /// The values of a channel lie in planes.
    Planar(Planar),
    /// The channels of one position lie in a row.
    Rows(Rows),
}

impl Geometry {
    pub(crate) fn new(shape: &Shape) -> Self {
        let (batch, channels, spatial) = (shape.batch(), shape.channels(), shape.spatial());
        if channels == 1 {
            return Self::Planar(Planar { planes: 1, channels, plane: shape.len() });
        }
        match shape.layout() {
            Layout::ChannelsFirst if spatial > 1 => Self::Planar(Planar { planes: batch, channels, plane: spatial }),
            _ => Self::Rows(Rows { rows: shape.count(), channels }),
        }
    }
}

/// `(planes, channels, plane)`, the values of a plane contiguous.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Planar {
    pub(crate) planes: usize,
    pub(crate) channels: usize,
    pub(crate) plane: usize,
}

/// `count` runs of `len` contiguous elements, `stride` apart, the first at `start`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Runs {
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) count: usize,
    pub(crate) stride: usize,
}

/// Up to [`BAND`] runs of `len` elements, `stride` apart, the first at `start`.
#[derive(Clone, Copy)]
pub(crate) struct Band {
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) rows: usize,
    pub(crate) stride: usize,
    /// Whether vectors are added across the runs; else along the one run.
    pub(crate) across: bool,
}

impl Band {
    /// The band `by` elements further on.
    pub(crate) fn shifted(self, by: usize) -> Self {
        Self { start: self.start + by, ..self }
    }

    /// The band without the first elements of each run.
    pub(crate) fn after(self, by: usize) -> Self {
        Self { start: self.start + by, len: self.len - by, ..self }
    }
}

impl Runs {
    /// The number of elements.
    pub(crate) fn size(&self) -> usize {
        self.len * self.count
    }

    /// Where each run starts.
    pub(crate) fn starts(self) -> impl Iterator<Item = usize> {
        (0..self.count).map(move |run| self.start + run * self.stride)
    }

    /// The runs in the order in which they are summed: together if there are enough of them, else one by one.
    pub(crate) fn bands(self) -> impl Iterator<Item = Band> {
        let rows = self.together();
        (0..self.count).step_by(rows).map(move |run| Band {
            start: self.start + run * self.stride,
            len: self.len,
            rows: rows.min(self.count - run),
            stride: self.stride,
            across: rows > 1,
        })
    }

    /// Runs that are summed at a time.
    pub(crate) fn together(&self) -> usize {
        if self.count >= BAND { BAND } else { 1 }
    }

    /// The runs `by` elements further on.
    pub(crate) fn shifted(self, by: usize) -> Self {
        Self { start: self.start + by, ..self }
    }

    /// `K` places spread evenly over the elements, each followed by at least `width` elements of its run.
    pub(crate) fn spread<const K: usize>(&self, width: usize) -> [usize; K] {
        core::array::from_fn(|i| {
            let run = i * self.count / K;
            let at = i * self.size() / K - run * self.len;
            self.start + run * self.stride + at.min(self.len - width)
        })
    }
}

impl Planar {
    /// Runs of a block that are summed at a time, but for the last block.
    pub(crate) fn together(self) -> usize {
        self.block(0, 0).together()
    }

    /// Elements from one image to the next.
    pub(crate) fn pitch(&self) -> usize {
        self.channels * self.plane
    }

    /// Blocks of one channel. Small planes are put together, large ones cut.
    pub(crate) fn blocks(&self) -> usize {
        self.planes.div_ceil(self.planes_per_block()) * self.cuts()
    }

    /// Planes of a block: whole bands if there are enough, since runs that are read together come from memory sooner.
    fn planes_per_block(&self) -> usize {
        let planes = (PLANAR_BLOCK / self.plane.max(1)).max(1);
        if planes.max(self.planes) < BAND { planes } else { planes.max(BAND) / BAND * BAND }
    }

    /// Parts that each plane is cut into, so that a block has no more than [`PLANAR_BLOCK`] elements.
    fn cuts(&self) -> usize {
        (self.plane.saturating_mul(self.planes_per_block())).div_ceil(PLANAR_BLOCK).max(1)
    }

    pub(crate) fn block(&self, channel: usize, block: usize) -> Runs {
        let (planes, cuts, stride) = (self.planes_per_block(), self.cuts(), self.pitch());
        let (first, cut) = (block / cuts * planes, block % cuts);
        let alone = planes == 1;
        // Whole sets of groups. A plane is longer than all but one of the longest parts, so none is empty.
        let part = self.plane.div_ceil(cuts).next_multiple_of(if alone { BAND } else { 1 } * GROUPS * MAX_LANES);
        let from = cut * part;
        let (start, len) = (first * stride + channel * self.plane + from, part.min(self.plane - from));
        if alone && cuts > 1 && len.is_multiple_of(BAND * MAX_LANES) {
            // As many runs as are read together.
            let len = len / BAND;
            return Runs { start, len, count: BAND, stride: len };
        }
        Runs { start, len, count: planes.min(self.planes - first), stride }
    }
}

/// `(rows, channels)`, the values of a row contiguous.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) rows: usize,
    pub(crate) channels: usize,
}

impl Rows {
    /// The most rows of a block.
    pub(crate) fn most(&self) -> usize {
        (ROWS_BLOCK / self.channels).clamp(ROWS_PER_BLOCK.0, ROWS_PER_BLOCK.1)
    }

    /// Rows of the longest block at most: blocks begin at whole vectors of rows.
    pub(crate) fn longest(&self) -> usize {
        self.rows.min(self.most().next_multiple_of(MAX_LANES))
    }

    /// Blocks, of about the same size; one, or as many as a few threads share well.
    pub(crate) fn blocks(&self) -> usize {
        let most = self.most();
        if self.rows <= most { self.rows.min(1) } else { self.rows.div_ceil(most).next_multiple_of(4) }
    }

    /// The rows of a block.
    pub(crate) fn block(&self, block: usize) -> Range<usize> {
        let at = |i| (share(self.rows.div_ceil(MAX_LANES), i, self.blocks()) * MAX_LANES).min(self.rows);
        at(block)..at(block + 1)
    }

    /// Rows that the kernels treat as one, so that short rows fill whole vectors.
    pub(crate) fn joined(&self) -> usize {
        if self.channels < JOIN_BELOW {
            MAX_LANES >> self.channels.trailing_zeros().min(MAX_LANES.trailing_zeros())
        } else {
            1
        }
    }

    /// Elements of a joined row.
    pub(crate) fn period(&self) -> usize {
        self.joined() * self.channels
    }

    /// Elements of the periods that maps treat as one row, so that they are seldom at its end: one period if there are few rows.
    pub(crate) fn span(&self) -> usize {
        let repeats = (SPAN / self.period()).min(self.rows / (SPANS * self.joined()));
        repeats.max(1) * self.period()
    }

    /// The length of arrays with a value per column: the span, a vector more and a lead, up to whole vectors.
    pub(crate) fn padded(&self) -> usize {
        (self.span() + 2 * MAX_LANES).next_multiple_of(MAX_LANES)
    }

    /// Ranges of columns to give `tasks` tasks to threads where the blocks alone do not; columns are independent,
    /// so their number is free. The first of each range starts a vector.
    pub(crate) fn tiles(&self, tasks: usize) -> usize {
        if self.joined() > 1 || tasks <= self.blocks() {
            1
        } else {
            tasks.div_ceil(self.blocks().max(1)).min(self.channels.div_ceil(TILE))
        }
    }

    /// Ranges of columns of which blocks hold about so many elements, at least a vector wide.
    pub(crate) fn tiles_of(&self, elements: usize) -> usize {
        let width = (elements / self.most()).max(MAX_LANES) / MAX_LANES * MAX_LANES;
        self.channels.div_ceil(width)
    }

    /// The length of arrays with a value per column of a tile.
    pub(crate) fn tile_width(&self, tiles: usize) -> usize {
        match tiles {
            1 => self.period().next_multiple_of(MAX_LANES),
            _ => self.channels.div_ceil(MAX_LANES).div_ceil(tiles) * MAX_LANES,
        }
    }

    pub(crate) fn tile(&self, tile: usize, tiles: usize) -> Range<usize> {
        if tiles == 1 {
            return 0..self.period();
        }
        let vectors = self.channels.div_ceil(MAX_LANES);
        let at = |i: usize| (i * vectors / tiles * MAX_LANES).min(self.channels);
        at(tile)..at(tile + 1)
    }
}

/// How a plan uses threads. The bits of the results do not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Parallelism {
    /// The rayon pool that the caller is in, at most as many of its threads as the machine has physical cores,
    /// and only where the tensor is large enough. Without the feature `rayon`: sequential.
    #[default]
    Auto,
    /// The calling thread alone.
    Sequential,
    /// Work cut for this many threads whatever the size of the tensor, on the rayon pool that the caller is in.
    /// 0 and 1 are sequential, and 1024 is the most. Without the feature `rayon`: sequential.
    Threads(usize),
}

impl Parallelism {
    /// How many threads to cut the work on a tensor of `bytes` for.
    pub(crate) fn workers(self, bytes: usize) -> usize {
        #[cfg(feature = "rayon")]
        match self {
            Self::Sequential => 1,
            // More threads than machines have; memory for partial sums grows with them.
            Self::Threads(n) => n.clamp(1, 1024),
            Self::Auto if bytes < WAKE => 1,
            Self::Auto => rayon::current_num_threads().min(physical_cores()).min(bytes / GRAIN),
        }
        #[cfg(not(feature = "rayon"))]
        {
            let _ = bytes;
            1
        }
    }
}

/// Memory is the limit, and the threads of one core share it: more threads than cores bring nothing.
#[cfg(feature = "rayon")]
fn physical_cores() -> usize {
    static CORES: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    *CORES.get_or_init(|| num_cpus::get_physical().max(1))
}

/// Calls `work` on one of the threads that will share it, so that they are woken once for all its parts.
pub(crate) fn among(workers: usize, work: impl FnOnce() + Send) {
    #[cfg(feature = "rayon")]
    if workers > 1 {
        return rayon::scope(|_| work());
    }
    let _ = workers;
    work();
}

/// Into how many pieces `items` are cut for `workers` threads: a few for each, so that a late thread finds less to do.
pub(crate) fn pieces(workers: usize, items: usize) -> usize {
    if workers == 1 { items.min(1) } else { items.min(4 * workers) }
}

/// Calls `work` with each piece's number and its range of `0..items`, on `workers` threads.
pub(crate) fn for_each_piece(workers: usize, items: usize, work: &(dyn Fn(usize, Range<usize>) + Sync)) {
    let pieces = pieces(workers, items);
    let range = |i: usize| share(items, i, pieces)..share(items, i + 1, pieces);
    #[cfg(feature = "rayon")]
    if workers > 1 {
        use rayon::prelude::*;
        // A pool larger than `workers` is held back by joining the pieces of one worker.
        let least = if workers < rayon::current_num_threads() { pieces.div_ceil(workers) } else { 1 };
        (0..pieces).into_par_iter().with_min_len(least).for_each(|i| work(i, range(i)));
        return;
    }
    (0..pieces).for_each(|i| work(i, range(i)));
}

/// `items * i / pieces` without overflow.
fn share(items: usize, i: usize, pieces: usize) -> usize {
    items / pieces * i + items % pieces * i / pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shapes() -> impl Iterator<Item = (usize, usize, usize)> {
        let spatial = [1, 2, 49, 784, 2048, 2049, 2731, 8191, 8192, 8193, 20000, 67650];
        [1, 2, 3, 4, 5, 33].into_iter().flat_map(move |n| spatial.into_iter().map(move |s| (n, 5, s)))
    }

    #[test]
    fn planar_blocks_cover_each_element_once() {
        for (planes, channels, plane) in shapes() {
            let p = Planar { planes, channels, plane };
            let mut seen = vec![0u8; planes * channels * plane];
            for channel in 0..channels {
                for block in 0..p.blocks() {
                    let runs = p.block(channel, block);
                    assert!((1..=PLANAR_BLOCK).contains(&runs.size()), "{p:?} {runs:?}");
                    for i in 0..runs.size() {
                        let at = runs.start + i / runs.len * runs.stride + i % runs.len;
                        assert_eq!(at / plane % channels, channel);
                        seen[at] += 1;
                    }
                }
            }
            assert!(seen.iter().all(|&n| n == 1), "{p:?}");
        }
    }

    #[test]
    fn row_blocks_and_tiles_cover_each_element_once() {
        for (rows, channels) in [(1, 2), (127, 3), (4097, 3), (300, 128), (129, 1000), (1, 5000), (3492, 300)] {
            let r = Rows { rows, channels };
            assert_eq!((0..r.blocks()).flat_map(|b| r.block(b)).collect::<Vec<_>>(), (0..rows).collect::<Vec<_>>());
            assert!((0..r.blocks()).all(|b| r.block(b).len() <= r.longest()), "{r:?}");
            for tasks in [1, 2, 7, 100] {
                let tiles = r.tiles(tasks);
                let columns: Vec<_> = (0..tiles).flat_map(|t| r.tile(t, tiles)).collect();
                assert_eq!(columns, (0..r.period()).collect::<Vec<_>>(), "{r:?} {tasks}");
            }
        }
    }

    #[test]
    fn pieces_cover_all_items() {
        for (workers, items) in [(1, 0), (1, 5), (2, 0), (2, 3), (2, 100), (7, 29)] {
            let seen = std::sync::Mutex::new(vec![0; items]);
            for_each_piece(workers, items, &|_, range| range.for_each(|i| seen.lock().unwrap()[i] += 1));
            assert!(seen.into_inner().unwrap().iter().all(|&n| n == 1));
        }
    }
}
