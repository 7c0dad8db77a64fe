//! The drivers for planes: the values of a channel lie in runs, and threads take whole channels where there are enough.

use core::marker::PhantomData;
use core::ops::Range;

use super::{BATCH, Close, Each, Merged, Reduction, plain, transpose};
use crate::element::{Element, Real};
use crate::grid::{Band, Planar, Runs};
use crate::kernel::map::{Groups, Map, Planes, Target, over_planes};
use crate::kernel::sums::GROUP;
use crate::simd::{Compute, Dispatched, Isa, Kernel, Part, Storage, Vector, dispatch};
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
    /// Whether what the next blocks begin with is asked for.
    pub(super) from_memory: bool,
    pub(super) values: Values<'a, S>,
    pub(super) element: PhantomData<E>,
}

/// Where the values of blocks go.
#[derive(Clone, Copy)]
pub(super) enum Values<'a, const S: usize> {
    /// Those of all blocks of a channel, merged; given those of each batch if it is there.
    Merged(Option<Close<'a, (), S>>),
    /// Those of each block of a single channel, of the first one at the place given.
    Each(Disjoint<'a, [f64; S]>, usize),
}

/// The channels of a batch that are read, and what is known of them: of their blocks while these are read, and in all.
struct Batch<'r, 'a, I: Isa, E: Element, R: Reduction<E, S>, const S: usize> {
    reduce: &'r Reduce<'a, E, R, S>,
    read: Range<usize>,
    /// The number of the block that is read of each, and the runs of the first one.
    block: usize,
    runs: Runs,
    blocks: Each<R::Block<I>>,
    totals: Merged<S>,
}

impl<'r, 'a, I: Isa, E: Element, R: Reduction<E, S>, const S: usize> Batch<'r, 'a, I, E, R, S> {
    fn new(isa: I, reduce: &'r Reduce<'a, E, R, S>) -> Self {
        let (block, runs) = (0, reduce.planar.block(0, 0));
        let blocks = [reduce.reduction.blank(isa); BATCH];
        let mut batch = Self { reduce, read: 0..0, block, runs, blocks, totals: Merged::new() };
        batch.read = batch.after(reduce.channels.start);
        batch
    }

    /// The channels of a batch that starts there.
    fn after(&self, channel: usize) -> Range<usize> {
        channel..(channel + self.reduce.batch).min(self.reduce.channels.end)
    }

    /// Begins a block of each channel, whose bands are added next. Then comes [`Action::End`].
    #[inline(always)]
    fn start(&mut self, isa: I, block: usize) -> impl Iterator<Item = Band> + use<I, E, R, S> {
        if block == self.reduce.blocks.start {
            self.totals.count = 0;
        }
        self.block = block;
        // Else compilers make it again for each group of vectors, division and all.
        self.runs = core::hint::black_box(self.reduce.planar.block(self.read.start, block));
        isa.call(Step { batch: self, action: Action::Begin });
        self.runs.bands()
    }

    /// Adds a band of the first channel, and those of others of the batch.
    #[inline(always)]
    fn add(&mut self, isa: I, band: Band, channels: Range<usize>) {
        isa.call(Step { batch: self, action: Action::Add(band, channels) });
    }

    #[inline(always)]
    fn begin(&mut self, isa: I) {
        let Self { reduce: &Reduce { planar, base, reduction, ref channels, ref blocks, from_memory, .. }, .. } = *self;
        let (plane, Range { start, end }) = (planar.plane, self.read.clone());
        // SAFETY: the runs come from the grid.
        unsafe { reduction.begin(isa, base + start..base + end, (self.runs, plane), &mut self.blocks[..end - start]) };
        let next = self.block + 1;
        let (read, block) = if next < blocks.end { (self.read.clone(), next) } else { (self.after(end), blocks.start) };
        if from_memory && read.start < channels.end {
            reduction.foresee(isa, read.len(), (planar.block(read.start, block), plane));
        }
    }

    #[inline(always)]
    fn end(&mut self, isa: I) {
        let (reduce, blocks) = (self.reduce, &mut self.blocks[..self.read.len()]);
        // SAFETY: the runs come from the grid.
        let values = unsafe { reduce.reduction.end(isa, blocks, (self.runs, reduce.planar.plane)) };
        match reduce.values {
            Values::Merged(_) => {
                let weights = self.totals.weights(self.runs.size());
                self.totals.add::<E, R>(weights, &values);
            }
            Values::Each(out, at) => {
                // SAFETY: no other kernel has this block.
                let out = unsafe { out.slice(at + self.block..at + self.block + 1) };
                transpose(&values, out);
            }
        }
    }
}

/// What is done with a batch, compiled once for all that is done with its values.
enum Action {
    /// Begins the blocks.
    Begin,
    /// Adds to them, see [`Batch::add`].
    Add(Band, Range<usize>),
    /// Ends them.
    End,
}

struct Step<'b, 'r, 'a, I: Isa, E: Element, R: Reduction<E, S>, const S: usize> {
    batch: &'b mut Batch<'r, 'a, I, E, R, S>,
    action: Action,
}

impl<I: Isa, E: Element, R: Reduction<E, S>, const S: usize> Part<I> for Step<'_, '_, '_, I, E, R, S> {
    type Output = ();
    #[inline(always)]
    fn run(self, isa: I) {
        let Self { batch, action } = self;
        match action {
            Action::Begin => batch.begin(isa),
            Action::Add(band, channels) => {
                let Reduce { planar: Planar { plane, .. }, reduction, ahead, .. } = *batch.reduce;
                let first = (band.shifted(channels.start * plane), plane);
                // SAFETY: the runs come from the grid.
                unsafe { reduction.add(isa, &mut batch.blocks[channels], first, ahead) };
            }
            Action::End => batch.end(isa),
        }
    }
}

/// Reads the channels of a batch, and does nothing beside.
struct Alone<'b, 'r, 'a, I: Isa, E: Element, R: Reduction<E, S>, const S: usize>(&'b mut Batch<'r, 'a, I, E, R, S>);

impl<I: Isa, E: Element, R: Reduction<E, S>, const S: usize> Part<I> for Alone<'_, '_, '_, I, E, R, S> {
    type Output = ();
    #[inline(always)]
    fn run(self, isa: I) {
        let Self(batch) = self;
        for block in batch.reduce.blocks.clone() {
            for band in batch.start(isa, block) {
                batch.add(isa, band, 0..batch.read.len());
            }
            isa.call(Step { batch, action: Action::End });
        }
    }
}

impl<E: Element, R: Reduction<E, S>, const S: usize> Kernel for Reduce<'_, E, R, S> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let mut batch = Batch::new(isa, &self);
        while !batch.read.is_empty() {
            isa.call(Alone(&mut batch));
            if let Values::Merged(Some(close)) = self.values {
                close(batch.read.clone(), &batch.totals.values);
            }
            batch.read = batch.after(batch.read.end);
        }
    }
}

/// Both halves for a range of channels, which no other kernel writes meanwhile, batch after batch.
pub(super) struct Both<'c, 'a, E: Element, R, M: Map<K>, const S: usize, const K: usize> {
    pub(super) reduce: Reduce<'c, E, R, S>,
    pub(super) close: Close<'c, [Each<E::Param>; K], S>,
    pub(super) map: M,
    pub(super) target: Target<'a, E>,
    /// Whether a batch is written while the next one is read; else before.
    pub(super) beside: bool,
    /// The elements ahead of what is written that are asked for where another batch follows, and where none does.
    pub(super) ahead: [usize; 2],
}

impl<E: Element, R: Reduction<E, S>, M: Map<K, Element = E>, const S: usize, const K: usize> Kernel
    for Both<'_, '_, E, R, M, S, K>
{
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { ref reduce, close, map, target, beside, ahead } = self;
        let beside = beside && I::STREAMS && may_write_beside::<E>();
        let Planar { planes: images, plane, .. } = reduce.planar;
        let mut params = [[E::Param::default(); K]; BATCH];
        let mut batch = Batch::new(isa, reduce);
        isa.call(Alone(&mut batch));
        loop {
            let read = batch.read.clone();
            closed(close, read.clone(), &batch.totals.values, &mut params);
            batch.read = batch.after(read.end);
            let is_last = batch.read.is_empty();
            // From the last image backwards, which was read last.
            let image = (images - 1) * reduce.planar.pitch();
            let (at, end) = (image + read.start * plane, image + read.end * plane);
            let first =
                Planes { plane, at, channel: 0, plane_end: at + plane, end, ahead: ahead[usize::from(is_last)] };
            let (pitch, params) = (reduce.planar.pitch().wrapping_neg(), &params[..read.len()]);
            let mut write = Images { map, planes: first, first, images, pitch, params, target };
            if beside && !is_last {
                // No closures here: a compiler may leave them apart from the kernel, without its tier.
                for block in reduce.blocks.clone() {
                    for band in batch.start(isa, block) {
                        for i in 0..batch.read.len() {
                            add_beside(isa, &mut batch, (band, i), &mut write);
                        }
                    }
                    isa.call(Step { batch: &mut batch, action: Action::End });
                }
            }
            write.rest(isa);
            if is_last {
                return;
            }
            if !beside {
                isa.call(Alone(&mut batch));
            }
        }
    }
}

/// Whether elements of the type may be written beside sums: halves wait for their arithmetic, not for memory, so that nothing is won
/// and loops with fewer registers are lost. A constant, so that it is not compiled in vain.
pub(super) const fn may_write_beside<E>() -> bool {
    size_of::<E>() >= size_of::<f32>()
}

/// The coefficients of the channels of a batch. Not inlined, so that it is compiled once for many kernels.
#[inline(never)]
fn closed<P: Real, const S: usize, const K: usize>(
    close: Close<'_, [Each<P>; K], S>,
    channels: Range<usize>,
    values: &[Each<f64>; S],
    params: &mut [[P; K]; BATCH],
) {
    transpose(&plain(close(channels, values)), params);
}

/// Adds a band of the `i`-th channel of a batch, and beside it writes the next elements of others, as many or somewhat fewer: what one
/// waits for, the loads of the sums for memory and the stores for their turn, leaves the other its time.
#[inline(always)]
fn add_beside<I: Isa, E, R, M, const S: usize, const K: usize>(
    isa: I,
    batch: &mut Batch<'_, '_, I, E, R, S>,
    (band, i): (Band, usize),
    write: &mut Images<'_, '_, M, K>,
) where
    E: Element,
    R: Reduction<E, S>,
    M: Map<K, Element = E>,
{
    let Reduce { planar, reduction, ahead, .. } = *batch.reduce;
    let (lanes, by) = (Compute::<I, E>::LANES, i * planar.plane);
    let mut rest = band;
    while rest.rows == GROUP && rest.len >= lanes && write.images > 0 {
        let groups = (rest.len / lanes).min(write.groups::<I>());
        if groups == 0 {
            write.edges(isa);
            continue;
        }
        let (block, read) = (&mut batch.blocks[i], (rest.shifted(by), groups));
        // SAFETY: the runs come from the grid, and so many groups of vectors can be written.
        unsafe {
            if write.target.streaming {
                reduction.add_beside(isa, block, read, ahead, write.inside::<I, true>(isa));
            } else {
                reduction.add_beside(isa, block, read, ahead, write.inside::<I, false>(isa));
            }
        }
        write.go_on(isa, groups * GROUP * lanes);
        rest = rest.after(groups * lanes);
    }
    if rest.len > 0 {
        batch.add(isa, rest, i..i + 1);
    }
}

/// What is left to be written of planes that follow each other, and of as many of each further image, `pitch` from those of the one
/// before.
struct Images<'p, 'a, M: Map<K>, const K: usize> {
    map: M,
    /// What is left of the image, and all of it.
    planes: Planes,
    first: Planes,
    /// The image and those that follow.
    images: usize,
    pitch: usize,
    params: &'p [[<M::Element as Storage>::Compute; K]],
    target: Target<'a, M::Element>,
}

impl<'a, M: Map<K>, const K: usize> Images<'_, 'a, M, K> {
    /// Elements before the first vector of the image that is aligned, if none was written.
    #[inline(always)]
    fn head<I: Isa>(&self) -> usize {
        let at = self.planes.at;
        if at > self.first.at { 0 } else { self.target.unaligned(at, Compute::<I, M::Element>::LANES).unwrap_or(0) }
    }

    /// Groups of vectors that can be written before the next edge of a plane.
    #[inline(always)]
    fn groups<I: Isa>(&self) -> usize {
        if self.head::<I>() > 0 { 0 } else { self.planes.inside() / (GROUP * Compute::<I, M::Element>::LANES) }
    }

    #[inline(always)]
    fn inside<I: Isa, const STREAM: bool>(&self, isa: I) -> Groups<'a, I, M, K, STREAM> {
        Groups::new(isa, self.map, self.target, &self.params[self.planes.channel], self.planes.at)
    }

    /// Writes until groups of vectors can follow, or all is written: up to the first aligned vector, or up to the one at the edge of
    /// a plane and that one.
    #[inline(always)]
    fn edges<I: Isa>(&mut self, isa: I) {
        while self.images > 0 && self.groups::<I>() == 0 {
            let Planes { at, end, .. } = self.planes;
            let n = match self.head::<I>() {
                0 => (self.planes.inside() + 1).next_multiple_of(Compute::<I, M::Element>::LANES),
                head => head,
            };
            let planes = Planes { end: end.min(at + n), ahead: 0, ..self.planes };
            isa.call(Write { images: self, only: Some(planes) });
            self.go_on(isa, planes.end - at);
        }
    }

    /// Writes all that is left.
    #[inline(always)]
    fn rest<I: Isa>(&mut self, isa: I) {
        if self.images > 0 {
            isa.call(Write { images: self, only: None });
        }
    }

    /// Goes on by `n` elements.
    #[inline(always)]
    fn go_on<I: Isa>(&mut self, isa: I, n: usize) {
        self.planes.go_on(n, self.params.len());
        if self.planes.at == self.planes.end {
            self.next(isa);
        }
    }

    /// Goes on to the next image.
    #[inline(always)]
    fn next<I: Isa>(&mut self, isa: I) {
        self.images -= 1;
        self.first = self.first.shifted(self.pitch);
        self.planes = self.first;
        self.ask_for_ends(isa);
    }

    /// Asks for the lines that the next image begins and ends with. They are stored in part, through the caches, and all that is
    /// stored past them would wait.
    #[inline(always)]
    fn ask_for_ends<I: Isa>(&self, isa: I) {
        if self.target.streaming && self.images > 1 {
            let Planes { at, end, .. } = self.first.shifted(self.pitch);
            let to = self.target.to.as_ptr();
            isa.prefetch(to.wrapping_add(at).cast());
            isa.prefetch(to.wrapping_add(end.wrapping_sub(1)).cast());
        }
    }
}

/// The second half for some planes of an image `only`, or for all that is left, of one image at least. Compiled once for both.
struct Write<'w, 'p, 'a, M: Map<K>, const K: usize> {
    images: &'w mut Images<'p, 'a, M, K>,
    only: Option<Planes>,
}

impl<M: Map<K>, const K: usize> Kernel for Write<'_, '_, '_, M, K> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { images, only } = self;
        loop {
            let planes = only.unwrap_or(images.planes);
            // SAFETY: the promise of who made this.
            unsafe { over_planes(isa, images.map, planes, images.params, images.target) };
            if only.is_some() {
                return;
            }
            images.next(isa);
            if images.images == 0 {
                return;
            }
        }
    }
}

/// The second half for a range of elements, which lie `origin` before their places in the dense tensor. Those `ahead` of what is written
/// are prefetched.
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
    (elements, origin): (Range<usize>, usize),
    ahead: usize,
) {
    let Planar { plane, channels, .. } = planar;
    let (index, at, end) = (elements.start / plane, elements.start - origin, elements.end - origin);
    let (channel, plane_end) = (index % channels, (index + 1) * plane - origin);
    let planes = Planes { plane, at, channel, plane_end, end, ahead };
    let images = &mut Images { map, planes, first: planes, images: 1, pitch: 0, params, target };
    dispatch(tier, Write { images, only: None });
}
