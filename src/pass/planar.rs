//! The drivers for planes: the values of a channel lie in runs, and threads take whole channels where there are enough.

use core::marker::PhantomData;
use core::ops::Range;

use super::{BATCH, Close, Each, Merged, Reduction, transpose};
use crate::element::Element;
use crate::grid::Planar;
use crate::kernel::map::{AHEAD_STREAMED, Map, Planes, Target, over_planes};
use crate::simd::{Dispatched, Isa, Kernel, Storage, dispatch};
use crate::tensor::Disjoint;

/// The first half for a range of channels, batch after batch.
pub(super) struct Reduce<'a, E, R, const S: usize> {
    pub(super) planar: Planar,
    pub(super) channels: Range<usize>,
    /// The blocks of each channel that are read.
    pub(super) blocks: Range<usize>,
    /// The channel that the first of the planes belongs to.
    pub(super) base: usize,
    pub(super) reduction: &'a R,
    /// Channels of a batch.
    pub(super) batch: usize,
    /// How many elements ahead of what is read others are asked for, 0 for none.
    pub(super) ahead: usize,
    pub(super) values: Values<'a, S>,
    pub(super) element: PhantomData<E>,
}

/// Where the values of blocks go.
#[derive(Clone, Copy)]
pub(super) enum Values<'a, const S: usize> {
    /// Those of all blocks of a channel, merged; called with each batch.
    Merged(Close<'a, (), S>),
    /// Those of each block of a single channel, of the first one at the place given.
    Each(Disjoint<'a, [f64; S]>, usize),
}

/// What is known of the channels of a batch: of their blocks while they are read, and in all.
struct Batch<B, const S: usize> {
    blocks: Each<B>,
    totals: Merged<S>,
}

impl<E: Element, R: Reduction<E, S>, const S: usize> Reduce<'_, E, R, S> {
    /// Reduces the channels of `read` to the totals of `batch`.
    #[inline(always)]
    fn read<I: Isa>(&self, isa: I, read: Range<usize>, batch: &mut Batch<R::Block<I>, S>) {
        let Self { planar, reduction, base, .. } = *self;
        let (plane, channels) = (planar.plane, base + read.start..base + read.end);
        let (blocks, totals) = (&mut batch.blocks[..read.len()], &mut batch.totals);
        totals.count = 0;
        for b in self.blocks.clone() {
            // Else compilers make it again for each group of vectors, division and all.
            let first = core::hint::black_box(planar.block(read.start, b));
            // SAFETY: the runs come from the grid.
            unsafe { reduction.begin(isa, channels.clone(), (first, plane), blocks) };
            for band in first.bands() {
                for (i, block) in blocks.iter_mut().enumerate() {
                    // SAFETY: the runs come from the grid.
                    unsafe { reduction.add(isa, block, band.shifted(i * plane), self.ahead) };
                }
            }
            // SAFETY: the runs come from the grid.
            let values = unsafe { reduction.end(isa, blocks, (first, plane)) };
            match self.values {
                Values::Merged(_) => {
                    let weights = totals.weights(first.size());
                    totals.add::<E, R>(weights, &values);
                }
                Values::Each(out, at) => {
                    // SAFETY: no other kernel has this block.
                    let out = unsafe { out.slice(at + b..at + b + 1) };
                    transpose(&values, out);
                }
            }
        }
    }
}

impl<E: Element, R: Reduction<E, S>, const S: usize> Kernel for Reduce<'_, E, R, S> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let mut batch = Batch { blocks: [self.reduction.blank(isa); BATCH], totals: Merged::new() };
        for start in self.channels.clone().step_by(self.batch) {
            let read = start..(start + self.batch).min(self.channels.end);
            self.read(isa, read.clone(), &mut batch);
            if let Values::Merged(close) = self.values {
                close(read, &batch.totals.values);
            }
        }
    }
}

/// The second half for planes that follow each other, and for as many of each further image, `pitch` from those of the one
/// before.
struct Write<'p, 'a, M: Map<K>, const K: usize> {
    map: M,
    planes: Planes,
    images: usize,
    pitch: usize,
    params: &'p [[<M::Element as Storage>::Compute; K]],
    target: Target<'a, M::Element>,
}

impl<M: Map<K>, const K: usize> Kernel for Write<'_, '_, M, K> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { map, mut planes, images, pitch, params, target } = self;
        for _ in 0..images {
            // SAFETY: the promise of who made this.
            unsafe { over_planes(isa, map, planes, params, target) };
            planes.at += pitch;
            planes.plane_end += pitch;
            planes.end += pitch;
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
    let (index, at, end) = (elements.start / plane, elements.start - origin, elements.end - origin);
    let (channel, plane_end) = (index % channels, (index + 1) * plane - origin);
    let ahead = if target.streaming { AHEAD_STREAMED / size_of::<M::Element>() } else { 0 };
    let planes = Planes { plane, at, channel, plane_end, end, ahead };
    dispatch(tier, Write { map, planes, images: 1, pitch: 0, params, target });
}

/// The second half for a batch of channels, image by image. The elements `ahead` of them are prefetched, none for 0.
///
/// # Safety
/// The channels lie inside the tensors that `map` was made for and the one of `target`, and nothing else accesses those of it
/// meanwhile.
pub(super) unsafe fn map_batch<M: Map<K>, const K: usize>(
    tier: Dispatched,
    planar: Planar,
    map: M,
    target: Target<'_, M::Element>,
    params: &[[<M::Element as Storage>::Compute; K]],
    channels: Range<usize>,
    ahead: usize,
) {
    let plane = planar.plane;
    let (at, end) = (channels.start * plane, channels.end * plane);
    let planes = Planes { plane, at, channel: 0, plane_end: at + plane, end, ahead };
    dispatch(tier, Write { map, planes, images: planar.planes, pitch: planar.pitch(), params, target });
}
