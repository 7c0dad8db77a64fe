//! The drivers: grid, then threads, then kernels. A pass reduces each channel to a few sums, closes them into
//! statistics, and applies a map with coefficients made of those; either half can run alone.

mod planar;
mod rows;

use core::marker::PhantomData;
use core::ops::Range;

use self::planar::{Reduce, Values};
use crate::element::{Element, Real};
use crate::forward::copy;
use crate::grid::{Band, Geometry, Planar, Rows, Runs, for_each_piece, pieces};
use crate::kernel::columns::{Asked, Columns, RowBlock};
use crate::kernel::map::{Map, Target};
use crate::kernel::sums::Beside;
use crate::moments::MergeWeights;
use crate::scratch::{Need, Scratch};
use crate::simd::{Dispatched, Isa, Kernel, MAX_LANES, Storage, Tuning, dispatch};
use crate::tensor::Disjoint;
use crate::view::{Pack, Packs, Views, room_for};

/// Parameters of the terms that a reduction of rows may have.
const TERM_PARAMS: usize = 4;
/// Elements that are mapped at a stretch, but no fewer than a few rows.
const MAP_STRETCH: usize = 16384;
/// The same where results are stored past the caches: what is asked for beyond the end of a stretch comes to nothing.
const STREAMED_STRETCH: usize = 1 << 18;
/// The most channels of a batch.
pub(crate) const BATCH: usize = 16;
/// The shortest plane that a pass goes over once, in bytes: of shorter ones a batch has too little in a row of each image.
const FUSED_PLANE: usize = 192;
/// The shortest of long planes, in bytes: CPUs foresee what follows in them, and a pass goes once over those of a single tensor that waits
/// in a third-level cache if its results go past that. For others there see [`Tuning::fused_in_caches`].
const LONG_PLANE: usize = 2 << 10;
/// Bytes that a reduction reads of long planes at least, on one thread and on more, for a pass that reads that cache once.
const FUSED: [usize; 2] = [4 << 20, 2 << 20];
/// Bytes of the channels that a thread reduces before it maps the first of them. The more of an image lies in a row, the faster it
/// comes from memory; but the next batch is to wait in a second-level cache beside this one. Where it does not, see [`Tuning`].
const BATCH_BYTES: usize = 600 << 10;
/// Bytes of a row of each image that a batch has at least, while no more than [`AHEAD_BATCH`] are in it.
const BATCH_ROW: usize = 4 << 10;
/// The most bytes of the images of a tensor's batch that are asked for while others are read: more would leave the cache again. This and
/// the next hold where [`Tuning::ahead_of_runs`] does not.
const AHEAD_IMAGES: usize = 128 << 10;
/// The same in each image, where those of several tensors would crowd the same few places of a first-level cache.
const AHEAD_IN_IMAGE: usize = 512;
/// The shortest planes of several tensors in a third-level cache, in bytes, of which more is asked for while they are reduced.
const AHEAD_PLANE: usize = 512;
/// Bytes that are read of those at least: fewer wait in second-level caches.
const AHEAD_IN_CACHES: usize = 4 << 20;
/// The most bytes of a batch that is asked for while another is written: it may wait in a third-level cache.
const AHEAD_BATCH: usize = 4 << 20;
/// The shortest plane that is written beside the sums of others, in bytes, by a thread that keeps up with memory anyway, see
/// [`Context::keeps_up`], and by others.
const BESIDE_PLANE: [usize; 2] = [2 << 10, 512];
/// Bytes, once widened, that are asked for ahead in each of the rows that are reduced at a time, in a cache: the CPU does not foresee them
/// well.
const AHEAD_IN_ROWS: usize = 512;
/// Elements of a tile that is packed: a few of them stay in a second-level cache.
const PACKED_TILE: usize = 65536;
/// Merges of one channel that are worth another thread.
const MERGES: usize = 65536;

/// A value of each of up to [`BATCH`] neighbouring channels. Channels are closed together: the roots and quotients of one
/// take as long as many of its elements.
pub(crate) type Each<T> = [T; BATCH];

/// The first half of a pass: `S` values in f64 per channel.
pub(crate) trait Reduction<E: Element, const S: usize>: Packs<E> + Sync {
    /// Tensors that are read.
    const TENSORS: usize;
    /// What is known of a block of a channel while its runs are read.
    type Block<I: Isa>: Copy;

    /// A block that was not started.
    fn blank<I: Isa>(&self, isa: I) -> Self::Block<I>;

    /// Starts a block of each of some neighbouring channels: the runs of the first one, and of each so many elements further on.
    ///
    /// # Safety
    /// The runs come from the grid of the tensors' shape.
    unsafe fn begin<I: Isa>(&self, isa: I, channels: Range<usize>, first: (Runs, usize), blocks: &mut [Self::Block<I>]);

    /// Asks the caches for what [`Reduction::begin`] will read of so many channels.
    #[inline(always)]
    fn foresee<I: Isa>(&self, _: I, _: usize, _: (Runs, usize)) {}

    /// Adds a band to the block of the first channel, or what follows its first whole groups, and to each other what lies so many
    /// elements further on. The elements `ahead` of it are prefetched, none for 0.
    ///
    /// # Safety
    /// The bands lie inside the tensors.
    unsafe fn add<I: Isa>(&self, isa: I, blocks: &mut [Self::Block<I>], first: (Band, usize), ahead: usize);

    /// Adds whole groups of a band, see [`RunSums::add_beside`](crate::kernel::sums::RunSums::add_beside).
    ///
    /// # Safety
    /// As [`Reduction::add`].
    unsafe fn add_beside<I: Isa>(
        &self,
        isa: I,
        block: &mut Self::Block<I>,
        groups: (Band, usize),
        ahead: usize,
        beside: impl Beside,
    );

    /// The values of the blocks that [`Reduction::begin`] started, whose runs were all added. Value `k` of the `i`-th is `[k][i]`.
    ///
    /// # Safety
    /// As [`Reduction::begin`], for all.
    unsafe fn end<I: Isa>(&self, isa: I, blocks: &mut [Self::Block<I>], first: (Runs, usize)) -> [Each<f64>; S];

    /// The values of the channels of one block of rows; of channel `block.columns.0 + i` in `out[k][i]`.
    ///
    /// # Safety
    /// The block comes from the grid of the tensors' shape.
    unsafe fn rows<I: Isa>(&self, isa: I, block: RowBlock, columns: &mut Columns<'_, E::Param>, out: [&mut [f64]; S]);

    /// The values of two neighbouring sets.
    fn merge(weights: MergeWeights, a: [f64; S], b: [f64; S]) -> [f64; S];
}

/// What is made of the values of up to [`BATCH`] channels. It is called once for each channel, by any thread. Not generic, so
/// that reductions are not compiled again for each use.
type Close<'c, T, const S: usize> = &'c (dyn Fn(Range<usize>, &[Each<f64>; S]) -> T + Sync);

/// The coefficients of up to [`BATCH`] channels.
pub(crate) type Given<'c, P, const K: usize> = &'c (dyn Fn(Range<usize>) -> [Each<P>; K] + Sync);

/// The order in which a tensor is mapped, stretch by stretch.
#[derive(Clone, Copy)]
enum Order {
    Forwards,
    /// What a reduction read last may still be in a cache.
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

/// What is done about the next batch of channels while one is mapped.
#[derive(Clone, Copy, PartialEq)]
enum Next {
    /// None is mapped.
    None,
    /// Nothing.
    Left,
    /// It is asked for, since the read side of memory would be idle.
    Asked,
    /// It is read.
    Read,
}

/// How a pass runs.
#[derive(Clone, Copy)]
pub(crate) struct Context<'v> {
    pub(crate) geometry: Geometry,
    pub(crate) tier: Dispatched,
    pub(crate) workers: usize,
    /// Whether tensors come from memory: then it pays to ask for them ahead, and to read them once.
    pub(crate) large: bool,
    /// Where the elements lie, if not one after the other.
    pub(crate) views: Option<&'v Views>,
}

impl<'v> Context<'v> {
    /// Whether each thread has whole channels, rather than blocks of them.
    fn by_channel(&self, planar: Planar) -> bool {
        self.views.is_none() && (planar.channels >= 8 * self.workers || planar.channels.is_multiple_of(self.workers))
    }

    /// Whether both halves go over the tensor together: not where it stays in a cache near by, nor in short steps. `streaming` says whether
    /// results go past the caches.
    fn fuses<E: Element, R: Reduction<E, S>, const S: usize>(&self, planar: Planar, streaming: bool) -> bool {
        let plane = planar.plane * size_of::<E>();
        let read = bytes_read::<E, R, S>(planar);
        let long = match R::TENSORS {
            1 if streaming => LONG_PLANE,
            tensors => self.tuning().fused_in_caches[usize::from(tensors > 1)],
        };
        let is_long = plane >= long && planar.together() > 1;
        let is_large = self.large && (R::TENSORS > 1 || read >= self.tuning().fused_of_one);
        self.by_channel(planar)
            && (is_large && plane >= FUSED_PLANE || is_long && read >= FUSED[usize::from(self.workers > 1)])
    }

    /// Whether a lone thread reads four images at a time, and gets them sooner than it could ask for their lines.
    fn keeps_up(&self, planar: Planar) -> bool {
        self.workers == 1 && planar.together() > 1 && self.tuning().keeps_up
    }

    /// What is done about the next batch.
    fn next<E: Element, R: Reduction<E, S>, const S: usize>(&self, planar: Planar) -> Next {
        let (plane, keeps_up) = (planar.plane * size_of::<E>(), self.keeps_up(planar));
        let may = self.tuning().beside_from_memory || !self.reads_memory::<E, R, S>(planar.planes * planar.pitch());
        let beside = match keeps_up {
            true => R::TENSORS == 1 && plane >= BESIDE_PLANE[0],
            false => planar.together() > 1 && plane >= BESIDE_PLANE[1],
        };
        let few = bytes_read::<E, R, S>(planar) < self.tuning().asked_of_several;
        let is_near = R::TENSORS > 1 && plane >= LONG_PLANE && few;
        match self.tier.tier().streams() && planar::may_write_beside::<E>() && may && beside {
            true => Next::Read,
            false if keeps_up || is_near => Next::Left,
            false => Next::Asked,
        }
    }

    /// Whether hardly any of the tensors of so many elements that a reduction reads is found in a cache.
    fn reads_memory<E: Element, R: Reduction<E, S>, const S: usize>(&self, elements: usize) -> bool {
        elements * size_of::<E>() > self.tuning().from_memory[usize::from(R::TENSORS > 1)]
    }

    /// The order in which a tensor is mapped after a reduction.
    fn order(&self) -> Order {
        if self.tuning().maps_backwards { Order::Backwards } else { Order::Forwards }
    }

    fn tuning(&self) -> &'static Tuning {
        self.tier.tier().tuning()
    }

    /// `len` elements in rows so long, if there are any, cut into stretches that are mapped at a time.
    fn stretches<E: Storage>(&self, len: usize, row: usize, target: Target<'_, E>) -> Stretches {
        // A few for each thread.
        let long = (len / (4 * self.workers)).next_multiple_of(MAX_LANES).min(STREAMED_STRETCH);
        let least = if target.streaming { long } else { 0 };
        Stretches { len, each: stretch(row).max(least), head: self.head(target) }
    }

    /// Scratch for a reduction to `S` values and a map of `K` coefficients; either may be 0 for none.
    pub(crate) fn need<const S: usize, const K: usize>(&self) -> Need {
        match self.geometry {
            // A shape need not have been allocated to be asked about, so these products saturate.
            Geometry::Planar(planar) => Need {
                wide: if self.by_channel(planar) { 0 } else { planar.channels.saturating_mul(planar.blocks()) }
                    .saturating_mul(S),
                narrow: planar.channels.saturating_mul(K).saturating_add(self.room()),
            },
            Geometry::Rows(rows) => {
                let work = if S > 0 { self.row_pieces(rows).saturating_mul(self.row_width(rows)) } else { 0 };
                let values = rows.channels.saturating_mul(rows.blocks()).saturating_mul(S);
                Need {
                    wide: values.saturating_add(work.saturating_mul(2)),
                    narrow: rows
                        .padded()
                        .saturating_mul(2 * K)
                        .saturating_add(work.saturating_mul(TERM_PARAMS + 2))
                        .saturating_add(self.room()),
                }
            }
        }
    }

    fn row_width(&self, rows: Rows) -> usize {
        rows.tile_width(self.tiles(rows))
    }

    fn row_pieces(&self, rows: Rows) -> usize {
        pieces(self.workers, rows.blocks() * self.tiles(rows))
    }

    /// Into how many tiles of columns rows are cut: as many as keep threads busy, or as are packed into a cache.
    fn tiles(&self, rows: Rows) -> usize {
        match self.views {
            Some(_) if rows.joined() == 1 => rows.tiles_of(PACKED_TILE),
            Some(_) => 1,
            None => rows.tiles(self.workers),
        }
    }

    /// The most elements that are packed at once.
    fn packed(&self) -> usize {
        match self.geometry {
            Geometry::Planar(planar) => stretch(0).min(planar.planes * planar.pitch()),
            Geometry::Rows(rows) => {
                let tile = rows.longest().saturating_mul(self.row_width(rows).min(rows.channels));
                tile.max(stretch(rows.period()).min(rows.rows * rows.channels))
            }
        }
    }

    /// Scratch for packed elements, as many for each piece of either half.
    fn room(&self) -> usize {
        if self.views.is_none() {
            return 0;
        }
        let (blocks, stretches) = match self.geometry {
            Geometry::Planar(planar) => {
                (planar.channels.saturating_mul(planar.blocks()), (planar.planes * planar.pitch()).div_ceil(stretch(0)))
            }
            Geometry::Rows(rows) => (
                rows.blocks().saturating_mul(self.tiles(rows)),
                (rows.rows * rows.channels).div_ceil(stretch(rows.period())),
            ),
        };
        pieces(self.workers, blocks.max(stretches)).saturating_mul(room_for(self.packed()))
    }

    /// That of one piece, from the scratch of all.
    ///
    /// # Safety
    /// It is asked for once at a time.
    unsafe fn room_of<'r, E>(&self, piece: usize, room: Disjoint<'r, E>) -> &'r mut [E] {
        let each = room_for(self.packed());
        // SAFETY: pieces have parts of their own.
        unsafe { room.slice(piece * each..(piece + 1) * each) }
    }

    /// Maps packed elements, and puts the results where they belong.
    ///
    /// # Safety
    /// As [`Context::apply`], for the elements, with room of their own.
    unsafe fn map_packed<E: Storage, M: Map<K, Element = E>, const K: usize>(
        &self,
        views: &Views,
        (elements, room): (Range<usize>, &mut [E]),
        map: M,
        target: Target<'_, E>,
        write: impl FnOnce(M, Target<'_, E>),
    ) {
        let runs = Runs { start: elements.start, len: elements.len(), count: 1, stride: 0 };
        let mut pack = Pack::new(views, runs, room);
        // SAFETY: the caller's promise.
        let packed = unsafe { map.packed(&mut pack) };
        let out = pack.take();
        let first_bit = target.first_bit.map(|bit| bit + elements.start);
        write(packed, Target { to: Disjoint::new(out), streaming: false, first_bit });
        // SAFETY: the caller's promise.
        unsafe { views.unpack(out, elements, target.to) };
    }

    /// Reduces, makes coefficients of each channel's values, and maps.
    ///
    /// # Safety
    /// The tensors of both halves have the shape of the geometry, and nothing else writes them or what `close`
    /// records meanwhile.
    pub(crate) unsafe fn run<E, R, M, const S: usize, const K: usize>(
        self,
        reduction: &R,
        close: Close<'_, [Each<E::Param>; K], S>,
        map: M,
        target: Target<'_, E>,
        scratch: &mut Scratch<E::Param>,
    ) where
        E: Element,
        R: Reduction<E, S>,
        M: Map<K, Element = E>,
    {
        let (wide, narrow, room) = self.parts::<E, S, K>(scratch);
        match self.geometry {
            Geometry::Planar(planar) if self.fuses::<E, R, S>(planar, target.streaming) => {
                let next = self.next::<E, R, S>(planar);
                let batch = self.batch::<E, R, S>(planar, next);
                let waits = channel_bytes::<E, R, S>(planar) * batch <= AHEAD_BATCH;
                let (beside, mapped) = (next == Next::Read, self.tuning().ahead_of_mapped / size_of::<E>());
                let asked = if waits && next == Next::Asked { batch * planar.plane } else { mapped };
                for_each_piece(self.workers, planar.channels, &|_, channels| {
                    let reduce = self.whole(planar, channels, reduction, Values::Merged(None), next);
                    dispatch(self.tier, planar::Both { reduce, close, map, target, beside, ahead: [asked, mapped] });
                    self.fence(target);
                });
            }
            Geometry::Planar(planar) => {
                let coefficients: &mut [[E::Param; K]] = narrow.as_chunks_mut().0;
                let out = Disjoint::new(coefficients);
                self.reduce_planar(planar, reduction, (wide, room), &|channels, values| {
                    // SAFETY: each channel is closed once.
                    transpose(&plain(close(channels.clone(), values)), unsafe { out.slice(channels) });
                });
                self.map_planar(planar, map, target, (coefficients, room), self.order());
            }
            Geometry::Rows(rows) => {
                let (coefficients, work) = narrow.split_at_mut(2 * K * rows.padded());
                let (out, lead) = (Disjoint::new(coefficients), self.lead(target));
                self.reduce_rows(rows, reduction, (wide, work, room), &|channels, values| {
                    let coefficients = plain(close(channels.clone(), values));
                    // SAFETY: each channel is closed once.
                    unsafe { set_columns(rows, out, lead, channels, &coefficients) }
                });
                self.map_rows(rows, map, target, (coefficients, room), self.order());
            }
        }
    }

    /// Reduces and closes each channel.
    ///
    /// # Safety
    /// As [`Context::run`], for the first half.
    pub(crate) unsafe fn reduce<E, R, const S: usize>(
        self,
        reduction: &R,
        close: Close<'_, (), S>,
        scratch: &mut Scratch<E::Param>,
    ) where
        E: Element,
        R: Reduction<E, S>,
    {
        let (wide, narrow, room) = self.parts::<E, S, 0>(scratch);
        match self.geometry {
            Geometry::Planar(planar) => self.reduce_planar(planar, reduction, (wide, room), close),
            Geometry::Rows(rows) => self.reduce_rows(rows, reduction, (wide, narrow, room), close),
        }
    }

    /// Maps, with the coefficients given.
    ///
    /// # Safety
    /// As [`Context::run`], for the second half.
    pub(crate) unsafe fn apply<E, M, const K: usize>(
        self,
        map: M,
        given: Given<'_, E::Compute, K>,
        target: Target<'_, E>,
        scratch: &mut Scratch<E::Compute>,
    ) where
        E: Storage,
        M: Map<K, Element = E>,
    {
        let (_, narrow, room) = self.parts::<E, 0, K>(scratch);
        match self.geometry {
            Geometry::Planar(planar) => {
                let coefficients: &mut [[E::Compute; K]] = narrow.as_chunks_mut().0;
                for channels in batches(0..planar.channels) {
                    transpose(&plain(given(channels.clone())), &mut coefficients[channels]);
                }
                self.map_planar(planar, map, target, (coefficients, room), Order::Forwards);
            }
            Geometry::Rows(rows) => {
                let (out, lead) = (Disjoint::new(narrow), self.lead(target));
                for channels in batches(0..rows.channels) {
                    // SAFETY: no other thread knows the scratch yet.
                    unsafe { set_columns(rows, out, lead, channels.clone(), &plain(given(channels))) }
                }
                self.map_rows(rows, map, target, (narrow, room), Order::Forwards);
            }
        }
    }

    /// Makes streamed stores visible to other threads in order.
    fn fence<E>(self, target: Target<'_, E>) {
        if target.streaming {
            dispatch(self.tier, Fence);
        }
    }

    /// Elements before the first aligned store, which packed ones begin with.
    fn head<E: Storage>(&self, target: Target<'_, E>) -> usize {
        if self.views.is_some() { 0 } else { target.head() }
    }

    /// Where arrays of parameters begin, see [`Target::lead`].
    fn lead<E: Storage>(&self, target: Target<'_, E>) -> usize {
        if self.views.is_some() { 0 } else { target.lead() }
    }

    /// Writes zeros where views show nothing.
    fn clear<E: Storage>(&self, target: Target<'_, E>, zero: E) {
        if let Some(views) = self.views {
            // SAFETY: the pass alone writes the tensor, and has written all else.
            unsafe { views.clear(target.to, zero) };
        }
    }

    /// The parts of the scratch: for sums, for coefficients and columns, and for packed elements.
    fn parts<'s, E: Storage, const S: usize, const K: usize>(
        &self,
        scratch: &'s mut Scratch<E::Compute>,
    ) -> (&'s mut [f64], &'s mut [E::Compute], Disjoint<'s, E>) {
        let (wide, narrow) = scratch.parts(self.need::<S, K>());
        let (narrow, room) = narrow.split_at_mut(narrow.len() - self.room());
        (wide, narrow, Disjoint::elements(room))
    }

    /// The first half for whole channels, batch by batch.
    fn whole<'r, E: Element, R: Reduction<E, S>, const S: usize>(
        &self,
        planar: Planar,
        channels: Range<usize>,
        reduction: &'r R,
        values: Values<'r, S>,
        next: Next,
    ) -> Reduce<'r, E, R, S> {
        let (batch, from_memory) = (self.batch::<E, R, S>(planar, next), self.large);
        let ahead = self.ahead::<E, R, S>(planar, batch, next);
        let (blocks, base, element) = (0..planar.blocks(), 0, PhantomData);
        Reduce { planar, channels, blocks, base, reduction, batch, ahead, from_memory, values, element }
    }

    /// Channels that are reduced before the first of them is mapped.
    fn batch<E: Element, R: Reduction<E, S>, const S: usize>(&self, planar: Planar, next: Next) -> usize {
        let each = channel_bytes::<E, R, S>(planar);
        if !self.large {
            return (BATCH_BYTES / each).clamp(1, BATCH);
        }
        let bytes = match next {
            Next::None if self.keeps_up(planar) => self.tuning().left_batch,
            Next::Left => self.tuning().left_batch,
            Next::Asked => self.tuning().asked_batch,
            Next::None | Next::Read => BATCH_BYTES,
        };
        let row = BATCH_ROW.div_ceil(planar.plane * size_of::<E>()).min(AHEAD_BATCH / each);
        (bytes / each).max(row).clamp(1, BATCH)
    }

    /// How many elements ahead of a band others are asked for while `batch` channels are reduced, 0 for none.
    fn ahead<E: Element, R: Reduction<E, S>, const S: usize>(&self, planar: Planar, batch: usize, next: Next) -> usize {
        let (images, plane) = (planar.together(), planar.plane * size_of::<E>());
        let stay = (images * batch).saturating_mul(plane) <= AHEAD_IMAGES;
        let is_near = !self.large && next != Next::Read;
        let is_far =
            reads_several::<E>(R::TENSORS) && plane >= AHEAD_PLANE && bytes_read::<E, R, S>(planar) >= AHEAD_IN_CACHES;
        match self.tuning().ahead_of_runs {
            Some(bytes) if !is_near || is_far => {
                let from_memory = self.reads_memory::<E, R, S>(planar.planes * planar.pitch());
                bytes[usize::from(from_memory)] / (images * R::TENSORS * size_of::<E>())
            }
            _ if is_near => 0,
            None if R::TENSORS > 1 || next == Next::Read => AHEAD_IN_IMAGE / size_of::<E>(),
            None if stay => images * planar.pitch(),
            _ => 0,
        }
    }

    /// Whether CPUs foresee what a map reads of so many elements sooner than it can be asked for, if that is as many bytes at `least`.
    fn foreseen<E: Storage, M: Map<K>, const K: usize>(elements: usize, least: usize, target: Target<'_, E>) -> bool {
        reads_several::<E>(M::TENSORS) && target.streaming && elements * size_of::<E>() >= least
    }

    /// How many elements ahead of what is written others are asked for while planes are mapped, not batch by batch.
    fn ahead_in_mapped<E: Storage, M: Map<K>, const K: usize>(&self, planar: Planar, target: Target<'_, E>) -> usize {
        let is_long = planar.plane * size_of::<E>() >= LONG_PLANE;
        let foreseen = Self::foreseen::<E, M, K>(planar.planes * planar.pitch(), self.tuning().foreseen[0], target);
        if is_long && foreseen { 0 } else { target.ahead() }
    }

    /// The same while rows are mapped.
    fn ahead_in_mapped_rows<E: Storage, M: Map<K>, const K: usize>(&self, rows: Rows, target: Target<'_, E>) -> usize {
        let foreseen = Self::foreseen::<E, M, K>(rows.rows * rows.channels, self.tuning().foreseen[1], target);
        match self.tuning().ahead_in_mapped_rows.map(|bytes| bytes / size_of::<E>()) {
            _ if foreseen => 0,
            Some(ahead) if rows.span() >= ahead => ahead,
            _ => target.ahead(),
        }
    }

    /// How many elements ahead of rows others are asked for while they are reduced, and how.
    fn ahead_in_rows<E: Element, R: Reduction<E, S>, const S: usize>(&self, rows: Rows) -> (usize, Asked) {
        let from_memory = self.views.is_none() && self.reads_memory::<E, R, S>(rows.rows * rows.channels);
        let &Tuning { short_rows, ahead_in_short_rows, in_order, ahead_in_order, ahead_in_rows, .. } = self.tuning();
        let several = usize::from(reads_several::<E>(R::TENSORS));
        let (row, longest) = (rows.period() * size_of::<E::Param>(), in_order[usize::from(self.workers > 1)][several]);
        let (near, far) = ahead_in_short_rows[usize::from(R::TENSORS > 1)];
        let short = if from_memory { far } else { Some(near) }.filter(|_| short_rows.contains(&row));
        let (bytes, asked) = match (short, from_memory) {
            (Some(ahead), _) => (ahead, Asked::Short),
            (None, true) if row <= longest => (ahead_in_order[several], Asked::InOrder),
            (None, true) => (AHEAD_IN_ROWS.max(ahead_in_rows[several].min(row / 2)), Asked::Far),
            (None, false) => (AHEAD_IN_ROWS, Asked::Near),
        };
        (bytes / size_of::<E::Param>(), asked)
    }

    fn reduce_planar<E: Element, R: Reduction<E, S>, const S: usize>(
        self,
        planar: Planar,
        reduction: &R,
        (wide, room): (&mut [f64], Disjoint<'_, E>),
        close: Close<'_, (), S>,
    ) {
        if self.by_channel(planar) {
            return for_each_piece(self.workers, planar.channels, &|_, channels| {
                let values = Values::Merged(Some(close));
                dispatch(self.tier, self.whole::<E, R, S>(planar, channels, reduction, values, Next::None));
            });
        }
        let values: &mut [[f64; S]] = wide.as_chunks_mut().0;
        let out = Disjoint::new(values);
        let (of_each, batch) = (planar.blocks(), 1);
        let ahead = self.ahead::<E, R, S>(planar, batch, Next::None);
        for_each_piece(self.workers, planar.channels * of_each, &|piece, items| {
            for channel in items.start / of_each..items.end.div_ceil(of_each) {
                let block_of = |item: usize| item.saturating_sub(channel * of_each).min(of_each);
                let (blocks, at) = (block_of(items.start)..block_of(items.end), channel * of_each);
                let part = Reduce {
                    planar,
                    channels: channel..channel + 1,
                    blocks: blocks.clone(),
                    base: 0,
                    reduction,
                    batch,
                    ahead,
                    from_memory: false,
                    values: Values::Each(out, at),
                    element: PhantomData::<E>,
                };
                let Some(views) = self.views else {
                    dispatch(self.tier, part);
                    continue;
                };
                for block in blocks {
                    let runs = planar.block(channel, block);
                    // SAFETY: a block of the grid, and the room of this piece.
                    let packed = unsafe { reduction.packed(&mut Pack::new(views, runs, self.room_of(piece, room))) };
                    let planar = Planar { planes: runs.count, channels: 1, plane: runs.len };
                    let (channels, blocks, base, values) = (0..1, 0..1, channel, Values::Each(out, at + block));
                    let reduction = &packed;
                    dispatch(self.tier, Reduce { planar, channels, blocks, base, reduction, ahead: 0, values, ..part });
                }
            }
        });
        for channels in batches(0..planar.channels) {
            let mut totals = Merged::new();
            for b in 0..planar.blocks() {
                let weights = totals.weights(planar.block(0, b).size());
                let mut of_block = [[0.0; BATCH]; S];
                for (i, c) in channels.clone().enumerate() {
                    for (to, from) in of_block.iter_mut().zip(values[c * planar.blocks() + b]) {
                        to[i] = from;
                    }
                }
                totals.add::<E, R>(weights, &of_block);
            }
            close(channels, &totals.values);
        }
    }

    fn map_planar<E: Storage, M: Map<K, Element = E>, const K: usize>(
        self,
        planar: Planar,
        map: M,
        target: Target<'_, E>,
        (coefficients, room): (&[[E::Compute; K]], Disjoint<'_, E>),
        order: Order,
    ) {
        let len = planar.planes * planar.channels * planar.plane;
        let (stretches, ahead) = (self.stretches(len, 0, target), self.ahead_in_mapped::<E, M, K>(planar, target));
        for_each_piece(self.workers, stretches.count(), &|piece, range| {
            for elements in order.over(range).map(|i| stretches.get(i)) {
                let Some(views) = self.views else {
                    // SAFETY: a part of the tensor, and no other piece has it.
                    unsafe { planar::map(self.tier, planar, map, target, coefficients, (elements, 0), ahead) };
                    continue;
                };
                let (range, origin) = (elements.clone(), elements.start);
                // SAFETY: as above, and the room of this piece.
                unsafe {
                    let packed = (elements, self.room_of(piece, room));
                    self.map_packed(views, packed, map, target, |map, target| {
                        planar::map(self.tier, planar, map, target, coefficients, (range, origin), ahead);
                    });
                }
            }
            self.fence(target);
        });
        self.clear(target, map.zero());
    }

    fn reduce_rows<E: Element, R: Reduction<E, S>, const S: usize>(
        self,
        rows: Rows,
        reduction: &R,
        (wide, work, room): (&mut [f64], &mut [E::Param], Disjoint<'_, E>),
        close: Close<'_, (), S>,
    ) {
        let tiles = self.tiles(rows);
        let (values, wide) = wide.split_at_mut(rows.blocks() * S * rows.channels);
        let (out, wide, work) = (Disjoint::new(values), Disjoint::new(wide), Disjoint::new(work));
        let width = self.row_width(rows);
        let ahead = self.ahead_in_rows::<E, R, S>(rows);
        for_each_piece(self.workers, rows.blocks() * tiles, &|piece, items| {
            let part = |values: usize| piece * values * width..(piece + 1) * values * width;
            // SAFETY: each piece has its own part of the work memory.
            let (wide, narrow) = unsafe { (wide.slice(part(2)), work.slice(part(TERM_PARAMS + 2))) };
            let (wide_a, wide_b) = wide.split_at_mut(width);
            let (params, narrow) = narrow.split_at_mut(TERM_PARAMS * width);
            let (narrow_a, narrow_b) = narrow.split_at_mut(width);
            let mut columns = Columns { params, narrow: [narrow_a, narrow_b], wide: [wide_a, wide_b], enlarged: false };
            for item in items {
                let (b, tile) = (item / tiles, rows.tile(item % tiles, tiles));
                // SAFETY: no other piece has this tile of the block.
                let out: [&mut [f64]; S] = core::array::from_fn(|k| unsafe {
                    let at = (b * S + k) * rows.channels;
                    out.slice(at + tile.start..at + tile.end.min(rows.channels))
                });
                let (block, columns) = (rows::block(rows, b, tile, ahead), &mut columns);
                let Some(views) = self.views else {
                    dispatch(self.tier, rows::Block { block, reduction, columns, out });
                    continue;
                };
                let (runs, block) = rows::packed(block);
                // SAFETY: a block of the grid, and the room of this piece.
                let reduction = &unsafe { reduction.packed(&mut Pack::new(views, runs, self.room_of(piece, room))) };
                dispatch(self.tier, rows::Block { block, reduction, columns, out });
            }
        });
        let workers = self.workers.min(1 + rows.blocks() * rows.channels / MERGES);
        for_each_piece(workers, rows.channels, &|_, channels| {
            let reduction = PhantomData::<(E, R)>;
            dispatch(self.tier, rows::Merge { rows, channels, values: out, close, reduction });
        });
    }

    fn map_rows<E: Storage, M: Map<K, Element = E>, const K: usize>(
        self,
        rows: Rows,
        map: M,
        target: Target<'_, E>,
        (coefficients, room): (&mut [E::Compute], Disjoint<'_, E>),
        order: Order,
    ) {
        let (len, lead) = (rows.rows * rows.channels, self.lead(target));
        let (arrays, weft) = coefficients[..2 * K * rows.padded()].split_at_mut(K * rows.padded());
        // Only if each whole vector begins where one of the coefficients does.
        let may = self.views.is_none() && rows.span().is_multiple_of(MAX_LANES);
        let woven = may && dispatch(self.tier, rows::Weave::<E, K> { from: arrays, to: weft });
        let coefficients = if woven { &*weft } else { &*arrays };
        let ahead = self.ahead_in_mapped_rows::<E, M, K>(rows, target);
        let stretches = self.stretches(len, rows.period(), target);
        for_each_piece(self.workers, stretches.count(), &|piece, range| {
            for elements in order.over(range).map(|i| stretches.get(i)) {
                let (local, packed) = (0..elements.len(), elements.clone());
                let column = elements.start % rows.span();
                let part = rows::Write { rows, elements, column, lead, map, ahead, target, coefficients, woven };
                let Some(views) = self.views else {
                    dispatch(self.tier, part);
                    continue;
                };
                // SAFETY: a part of the tensor, and no other piece has it, nor its room.
                unsafe {
                    let packed = (packed, self.room_of(piece, room));
                    self.map_packed(views, packed, map, target, |map, target| {
                        dispatch(self.tier, rows::Write { elements: local, map, target, ..part });
                    });
                }
            }
            self.fence(target);
        });
        self.clear(target, map.zero());
    }
}

/// Elements of a stretch at least, in rows so long if there are any; whole vectors, so that the next one begins aligned too.
fn stretch(row: usize) -> usize {
    MAP_STRETCH.max(row.saturating_mul(8) / MAX_LANES * MAX_LANES)
}

/// A tensor cut into stretches, between which stores are aligned.
struct Stretches {
    len: usize,
    each: usize,
    head: usize,
}

impl Stretches {
    fn count(&self) -> usize {
        self.len.saturating_sub(self.head).div_ceil(self.each).max(self.len.min(1))
    }

    fn get(&self, i: usize) -> Range<usize> {
        let cut = |i: usize| (self.head + i * self.each).min(self.len);
        (if i == 0 { 0 } else { cut(i) })..cut(i + 1)
    }
}

/// Whether so many tensors are several that wait for memory: halves wait for their arithmetic.
const fn reads_several<E>(tensors: usize) -> bool {
    tensors > 1 && planar::may_write_beside::<E>()
}

/// Bytes of a channel of all tensors that a reduction reads.
fn channel_bytes<E: Element, R: Reduction<E, S>, const S: usize>(planar: Planar) -> usize {
    planar.planes * planar.plane * size_of::<E>() * R::TENSORS
}

/// The same of all channels.
fn bytes_read<E: Element, R: Reduction<E, S>, const S: usize>(planar: Planar) -> usize {
    channel_bytes::<E, R, S>(planar).saturating_mul(planar.channels)
}

/// Ranges of up to [`BATCH`] channels.
fn batches(channels: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    channels.clone().step_by(BATCH).map(move |from| from..(from + BATCH).min(channels.end))
}

/// The values, with one and the same NaN for all: the caller's may have any payload, see [`Isa::store_bf16`].
fn plain<P: Real, const K: usize>(mut values: [Each<P>; K]) -> [Each<P>; K] {
    for value in values.as_flattened_mut() {
        *value = if value.to_f64().is_nan() { P::from_f64(f64::NAN) } else { *value };
    }
    values
}

/// Values of each channel from the channels of each value.
fn transpose<T: Copy, const K: usize>(from: &[Each<T>; K], to: &mut [[T; K]]) {
    for (i, to) in to.iter_mut().enumerate() {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from[i];
        }
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
            copy(unsafe { out.slice(at..at + values.len()) }, values);
        };
        for column in (channels.start..rows.span()).step_by(rows.channels) {
            put(column, &values[..channels.len()]);
            // The first columns stand once more after the last.
            if column < MAX_LANES {
                put(rows.span() + column, &values[..channels.len().min(MAX_LANES - column)]);
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

    /// Merges a block of each channel.
    #[inline(always)]
    fn add<E: Element, R: Reduction<E, S>>(&mut self, weights: Option<MergeWeights>, blocks: &[Each<f64>; S]) {
        let Some(weights) = weights else { return self.values = *blocks };
        for i in 0..BATCH {
            let of = |values: &[Each<f64>; S]| values.each_ref().map(|each| each[i]);
            let merged = R::merge(weights, of(&self.values), of(blocks));
            for (value, merged) in self.values.iter_mut().zip(merged) {
                value[i] = merged;
            }
        }
    }
}

/// See [`Isa::fence`].
struct Fence;

impl Kernel for Fence {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        isa.fence();
    }
}
