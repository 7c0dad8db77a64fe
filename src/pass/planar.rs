//! The drivers for planes: the values of a channel lie in runs, and threads take whole channels where there are enough.

use core::marker::PhantomData;
use core::ops::Range;

use super::{BATCH, Close, Each, Merged, Reduction, plain, transpose};
use crate::element::Element;
use crate::grid::Planar;
use crate::kernel::map::{Map, Planes, Target};
use crate::simd::{Dispatched, Isa, Kernel, Storage, dispatch};

/// Elements that are read before as many are written.
const TURN: usize = 1024;
/// Bytes of one image of a batch above which the next image is not prefetched: it would leave the cache again.
const AHEAD: usize = 128 * 1024;

/// What happens to channels that were read, while others are. Not generic over the reduction or the tier: the kernels on
/// either side are compiled for themselves.
pub(super) trait Beside<const S: usize> {
    /// After `n` more elements were read.
    fn turn(&mut self, n: usize);
    /// After the channels of `read` were; others follow if `more`.
    fn close(&mut self, read: Range<usize>, values: &[Each<f64>; S], more: bool);
}

/// Nothing but what the caller makes of the values.
pub(super) struct Closing<'a, const S: usize>(pub(super) Close<'a, (), S>);

impl<const S: usize> Beside<S> for Closing<'_, S> {
    fn turn(&mut self, _: usize) {}

    fn close(&mut self, read: Range<usize>, values: &[Each<f64>; S], _: bool) {
        (self.0)(read, values);
    }
}

/// The second half of a pass: while a batch of neighbouring channels is written from the cache, the next one is read from
/// memory, so that neither side of memory waits for the other.
pub(super) struct Writing<'a, M: Map<K>, const S: usize, const K: usize> {
    tier: Dispatched,
    planar: Planar,
    /// Images that the reader prefetches.
    ahead: usize,
    map: M,
    target: Target<'a, M::Element>,
    close: Close<'a, [Each<<M::Element as Storage>::Compute>; K], S>,
    coefficients: [[<M::Element as Storage>::Compute; K]; BATCH],
    /// The channels that are written, and their planes in one image.
    written: usize,
    planes: Planes<'a, M, K>,
    /// Images after this one.
    left: usize,
    /// Elements that may be written.
    budget: usize,
    /// Images that follow for as long as the next batch is prefetched, and how far away that is.
    next: (usize, usize),
}

impl<'a, M: Map<K>, const S: usize, const K: usize> Writing<'a, M, S, K> {
    /// Beside `reader`.
    ///
    /// # Safety
    /// The channels of the reader lie inside the tensors that `map` was made for and the one of `target`, and nothing else
    /// accesses those of it while this lives.
    pub(super) unsafe fn new<E, R>(
        tier: Dispatched,
        reader: &Reader<'_, E, R>,
        map: M,
        target: Target<'a, M::Element>,
        close: Close<'a, [Each<<M::Element as Storage>::Compute>; K], S>,
    ) -> Self
    where
        E: Element,
    {
        Self {
            tier,
            planar: reader.planar,
            ahead: reader.images_ahead(),
            map,
            target,
            close,
            coefficients: [[Default::default(); K]; BATCH],
            written: 0,
            // SAFETY: no elements.
            planes: unsafe { Planes::new(map, 0, (0..0, 0, 0), target) },
            left: 0,
            budget: 0,
            next: (0, 0),
        }
    }

    fn image(&mut self, start: usize) {
        let Planar { plane, .. } = self.planar;
        let range = start..start + self.written * plane;
        // SAFETY: the promise of `new`.
        self.planes = unsafe { Planes::new(self.map, plane, (range, 0, start + plane), self.target) };
        self.planes.ahead = if self.left >= self.next.0 { self.next.1 } else { 0 };
        self.planes.to_ahead = if self.target.streaming || self.left == 0 { 0 } else { self.planar.pitch() };
    }

    /// Writes what is left.
    pub(super) fn finish(&mut self) {
        self.turn((self.left + 1) * self.written * self.planar.plane);
        self.budget = 0;
    }
}

impl<M: Map<K>, const S: usize, const K: usize> Beside<S> for Writing<'_, M, S, K> {
    fn turn(&mut self, n: usize) {
        self.budget += n;
        loop {
            let Self { planes, written, .. } = self;
            let (from, params) = (planes.at, &self.coefficients[..*written]);
            dispatch(self.tier, Write { to: (from + self.budget).min(planes.end), planes, params });
            // The first elements are written for nothing.
            self.budget = self.budget.saturating_sub(self.planes.at - from);
            if self.planes.at < self.planes.end || self.left == 0 {
                return;
            }
            self.left -= 1;
            self.image(self.planes.end - self.written * self.planar.plane + self.planar.pitch());
        }
    }

    fn close(&mut self, read: Range<usize>, values: &[Each<f64>; S], more: bool) {
        self.finish();
        transpose(&plain((self.close)(read.clone(), values)), &mut self.coefficients);
        let Planar { planes, plane, .. } = self.planar;
        (self.written, self.left) = (read.len(), planes - 1);
        let images = 2 * self.ahead;
        // Of the batch that is read next, from the place that is written.
        let far = if more && images > 0 { images * self.planar.pitch() + read.len() * plane } else { 0 };
        self.next = (images, far);
        self.image(read.start * plane);
    }
}

/// Goes on writing planes.
struct Write<'w, 'a, M: Map<K>, const K: usize> {
    planes: &'w mut Planes<'a, M, K>,
    params: &'w [[<M::Element as Storage>::Compute; K]],
    to: usize,
}

impl<M: Map<K>, const K: usize> Kernel for Write<'_, '_, M, K> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        // A copy can stay in registers.
        let mut planes = *self.planes;
        planes.write_to(isa, self.params, self.to);
        *self.planes = planes;
    }
}

/// Reads a range of channels, batch after batch.
pub(super) struct Reader<'a, E, R> {
    pub(super) planar: Planar,
    pub(super) channels: Range<usize>,
    pub(super) reduction: &'a R,
    /// Channels of a batch.
    pub(super) batch: usize,
    pub(super) prefetches: bool,
    pub(super) element: PhantomData<E>,
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

    /// Reduces the channels of `read` to the totals of `batch`, in turns with what is done `beside`.
    #[inline(always)]
    fn read<I: Isa, const S: usize>(
        &self,
        isa: I,
        read: Range<usize>,
        batch: &mut Batch<R::Block<I>, S>,
        beside: &mut dyn Beside<S>,
    ) where
        R: Reduction<E, S>,
    {
        let Self { planar, reduction, .. } = *self;
        let (plane, pitch) = (planar.plane, planar.pitch());
        let prefetches = self.images_ahead() > 0;
        let (blocks, totals) = (&mut batch.blocks[..read.len()], &mut batch.totals);
        totals.count = 0;
        // Read since the last turn. What is left at the end is written when the batch is closed.
        let mut done = 0;
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
                        done += part.len * part.rows;
                        if done >= TURN {
                            beside.turn(done);
                            done = 0;
                        }
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
pub(super) struct Reduce<'a, E, R, const S: usize> {
    pub(super) reader: Reader<'a, E, R>,
    pub(super) beside: &'a mut dyn Beside<S>,
}

impl<E: Element, R: Reduction<E, S>, const S: usize> Kernel for Reduce<'_, E, R, S> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { reader, beside } = self;
        let mut batch = reader.start(isa);
        let mut read = reader.batch_from(reader.channels.start);
        while !read.is_empty() {
            reader.read(isa, read.clone(), &mut batch, beside);
            beside.close(read.clone(), &batch.totals.values, read.end < reader.channels.end);
            read = reader.batch_from(read.end);
        }
    }
}

/// The first half for a range of the blocks of all channels, channel by channel.
pub(super) struct Blocks<'a, E, R, const S: usize> {
    pub(super) planar: Planar,
    /// The channel of the first plane.
    pub(super) first: usize,
    pub(super) blocks: Range<usize>,
    pub(super) reduction: &'a R,
    pub(super) out: &'a mut [[f64; S]],
    pub(super) element: PhantomData<E>,
}

impl<E: Element, R: Reduction<E, S>, const S: usize> Kernel for Blocks<'_, E, R, S> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let per_channel = self.planar.blocks();
        for (block, out) in self.blocks.zip(self.out) {
            let (c, b) = (block / per_channel, block % per_channel);
            let runs = self.planar.block(c, b);
            // SAFETY: the runs come from the grid.
            *out = unsafe {
                let mut block = self.reduction.begin(isa, self.first + c, runs);
                for band in runs.bands() {
                    let ahead = if runs.follow(band) { band.rows * band.stride } else { 0 };
                    self.reduction.add(isa, &mut block, band, ahead);
                }
                self.reduction.end(isa, &block, runs)
            };
        }
    }
}

/// The second half for a range of elements, which lie `origin` before their places in the dense tensor.
///
/// # Safety
/// The elements lie inside the tensors that `map` was made for and the one of `target`, and nothing else accesses those of it
/// meanwhile.
pub(super) unsafe fn map<M: Map<K>, const K: usize>(
    tier: Dispatched,
    planar: Planar,
    map: M,
    target: Target<'_, M::Element>,
    params: &[[<M::Element as Storage>::Compute; K]],
    elements: Range<usize>,
    origin: usize,
) {
    let Planar { plane, channels, .. } = planar;
    let (index, to) = (elements.start / plane, elements.end - origin);
    let places = (elements.start - origin..to, index % channels, (index + 1) * plane - origin);
    // SAFETY: the caller's promise.
    let mut planes = unsafe { Planes::new(map, plane, places, target) };
    dispatch(tier, Write { planes: &mut planes, params, to });
}
