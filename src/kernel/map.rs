//! One value per element, over the runs of a channel or over rows of channels.
//!
//! The values do not depend on where a vector begins, so vectors in the middle begin where stores are aligned, and
//! the first and the last one overlap them.

use core::ops::Range;

use crate::element::Element;
use crate::simd::{Compute, Isa, Lanes, MAX_LANES, Storage, Vector};

/// Bytes of the parameters of a row that stay in a first-level cache beside the tensors.
const CROWDED: usize = 16 << 10;
/// The fewest bytes of a row that are worth going to before the next row.
const STRIP: usize = 4 << 10;

/// Bytes that rows are read ahead of streamed stores.
const AHEAD: usize = 8 << 10;

/// A value per element, made of `K` parameters of the channel.
pub(crate) trait Map<I: Isa, const K: usize> {
    /// The type that is written.
    type Element: Element;

    /// The values of the elements from `at`: of a whole vector if `FULL`, else of the first `n`.
    ///
    /// # Safety
    /// The elements lie inside the tensors that the map was made for.
    unsafe fn at<const FULL: bool>(
        &self,
        isa: I,
        params: &[Compute<I, Self::Element>; K],
        at: usize,
        n: usize,
    ) -> Compute<I, Self::Element>;

    /// Asks the caches for the elements around `at`, which may lie anywhere.
    fn prefetch(&self, isa: I, at: usize);
}

/// Where values go, and how.
#[derive(Clone, Copy)]
pub(crate) struct Target<E> {
    pub(crate) to: *mut E,
    /// Past the caches; never in place.
    pub(crate) streaming: bool,
}

impl<E: Element> Target<E> {
    /// Lanes of a logical vector.
    const LANES: usize = MAX_LANES * size_of::<f32>() / size_of::<E::Param>();

    /// Elements before the first aligned vector.
    pub(crate) fn head(&self) -> usize {
        self.unaligned(0, Self::LANES).unwrap_or(0)
    }

    /// Where arrays of parameters begin, so that they are aligned where the elements of a tensor are.
    pub(crate) fn lead(&self) -> usize {
        (Self::LANES - self.head()) % Self::LANES
    }

    /// Stores a vector from element `at` on.
    ///
    /// # Safety
    /// As [`Storage::store`], and as [`Storage::stream`] if `STREAM`.
    #[inline(always)]
    unsafe fn store<I: Isa, const STREAM: bool>(&self, isa: I, value: Compute<I, E>, at: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let to = self.to.add(at);
            if STREAM { E::stream(isa, value, to) } else { E::store(isa, value, to) }
        }
    }

    /// How many elements from `at` come before the first one at a multiple of a stored vector of `lanes`; none where no
    /// element is.
    #[inline(always)]
    fn unaligned(&self, at: usize, lanes: usize) -> Option<usize> {
        let address = self.to.wrapping_add(at) as usize;
        let bytes = address.wrapping_neg() % (lanes * size_of::<E>());
        bytes.is_multiple_of(size_of::<E>()).then_some(bytes / size_of::<E>())
    }
}

/// The parameters of the columns of rows: parameter `k` of column `c` is at `k * padded + lead + c` of `params`. The
/// columns repeat with `period`, at least a vector, and the first ones stand once more after the last, so that a vector
/// may begin anywhere.
#[derive(Clone, Copy)]
pub(crate) struct Periodic<'a, R> {
    pub(crate) params: &'a [R],
    pub(crate) padded: usize,
    pub(crate) lead: usize,
    pub(crate) period: usize,
    pub(crate) column: usize,
}

impl<R: Lanes> Periodic<'_, R> {
    /// The parameters of the vector that begins with the column.
    #[inline(always)]
    fn get<I: Isa, const K: usize>(&self, isa: I) -> [R::Vector<I>; K] {
        let at = self.lead + self.column;
        let mut vectors = [R::Vector::<I>::splat(isa, R::default()); K];
        for (k, vector) in vectors.iter_mut().enumerate() {
            // SAFETY: the column lies below the period, and a vector more lies below `padded`, see `over_rows`.
            *vector = unsafe { R::Vector::<I>::load(isa, self.params.as_ptr().add(k * self.padded + at)) };
        }
        vectors
    }

    /// Goes on by `n` columns, at most a period.
    #[inline(always)]
    fn pass(&mut self, n: usize) {
        self.column += n;
        if self.column >= self.period {
            self.column -= self.period;
        }
    }
}

/// Writes the elements of consecutive planes, one channel after another, a part at a time. Stores are whole vectors,
/// aligned, but for the first and the last.
pub(crate) struct Planes<'a, I: Isa, M: Map<I, K>, const K: usize> {
    isa: I,
    map: &'a M,
    /// Of each channel; after the last one comes the first again.
    params: &'a [[<M::Element as Element>::Param; K]],
    plane: usize,
    target: Target<M::Element>,
    /// The next element to be written, its channel, and the end of its plane.
    at: usize,
    channel: usize,
    plane_end: usize,
    end: usize,
    /// How far from what is written elements are prefetched to be read, and to be written; 0 for none.
    ahead: usize,
    to_ahead: usize,
}

impl<'a, I: Isa, M: Map<I, K>, const K: usize> Planes<'a, I, M, K> {
    const LANES: usize = <Compute<I, M::Element> as Vector<I>>::LANES;

    /// The elements of `range`, the first in the plane that ends at `plane_end`, of the first channel of `params`.
    ///
    /// # Safety
    /// The range lies inside the tensors that `map` was made for and the one of `target`, and nothing else accesses those
    /// elements of it until all are written.
    #[inline(always)]
    pub(crate) unsafe fn new(
        isa: I,
        map: &'a M,
        params: &'a [[<M::Element as Element>::Param; K]],
        plane: usize,
        (range, channel, plane_end): (Range<usize>, usize, usize),
        target: Target<M::Element>,
    ) -> Self {
        let Range { start: at, end } = range;
        let mut planes = Self { isa, map, params, plane, target, at, channel, plane_end, end, ahead: 0, to_ahead: 0 };
        let head = target.unaligned(at, Self::LANES).unwrap_or(0).min(end - at);
        if head > 0 {
            // SAFETY: the elements lie inside the range.
            unsafe { planes.some::<false, false>(head) };
        }
        planes
    }

    #[inline(always)]
    fn params(&self, channel: usize) -> [Compute<I, M::Element>; K] {
        let mut vectors = [Compute::<I, M::Element>::splat(self.isa, Default::default()); K];
        for (vector, &param) in vectors.iter_mut().zip(&self.params[channel]) {
            *vector = Compute::<I, M::Element>::splat(self.isa, param);
        }
        vectors
    }

    /// Writes the vectors that end up to `to`, and at the end of the range what is left.
    #[inline(always)]
    pub(crate) fn write_to(&mut self, to: usize) {
        if self.target.streaming { self.write::<true>(to) } else { self.write::<false>(to) }
    }

    #[inline(always)]
    fn write<const STREAM: bool>(&mut self, to: usize) {
        let to = to.min(self.end);
        // SAFETY: the elements lie inside the range, whose end `to` does not pass; see `new`.
        unsafe {
            while self.at + Self::LANES <= to {
                if self.at + Self::LANES <= self.plane_end {
                    self.within_plane::<STREAM>(to.min(self.plane_end));
                } else {
                    self.some::<true, STREAM>(Self::LANES);
                }
            }
            if to == self.end && self.at < to {
                self.some::<false, STREAM>(to - self.at);
            }
        }
    }

    /// Whole vectors of one plane.
    #[inline(always)]
    unsafe fn within_plane<const STREAM: bool>(&mut self, to: usize) {
        let params = self.params(self.channel);
        let mut at = self.at;
        while at + Self::LANES <= to {
            if self.ahead != 0 {
                self.map.prefetch(self.isa, at.wrapping_add(self.ahead));
            }
            if self.to_ahead != 0 {
                self.isa.prefetch_write(self.target.to.wrapping_add(at + self.to_ahead).cast());
            }
            // SAFETY: the caller's promise.
            unsafe {
                let value = self.map.at::<true>(self.isa, &params, at, Self::LANES);
                self.target.store::<I, STREAM>(self.isa, value, at);
            }
            at += Self::LANES;
        }
        self.at = at;
        self.pass_planes();
    }

    /// The next `n` elements, a whole vector if `FULL`, in any number of planes.
    #[inline(always)]
    unsafe fn some<const FULL: bool, const STREAM: bool>(&mut self, n: usize) {
        let at = self.at;
        // SAFETY: the caller's promise, for all.
        let mut value = unsafe { self.map.at::<FULL>(self.isa, &self.params(self.channel), at, n) };
        self.at += n;
        while self.plane_end < self.at {
            let done = self.plane_end - at;
            self.plane_end += self.plane;
            self.channel = self.next_channel();
            // SAFETY: as above.
            let next = unsafe { self.map.at::<FULL>(self.isa, &self.params(self.channel), at, n) };
            value = value.first(done, next);
        }
        // SAFETY: as above.
        unsafe {
            if FULL {
                self.target.store::<I, STREAM>(self.isa, value, at);
            } else {
                M::Element::store_first(self.isa, value, self.target.to.add(at), n);
            }
        }
        self.pass_planes();
    }

    #[inline(always)]
    fn next_channel(&self) -> usize {
        if self.channel + 1 == self.params.len() { 0 } else { self.channel + 1 }
    }

    /// Goes on to the next plane at the end of one.
    #[inline(always)]
    fn pass_planes(&mut self) {
        if self.at == self.plane_end {
            self.plane_end += self.plane;
            self.channel = self.next_channel();
        }
    }
}

/// Writes the planes of neighbouring channels, image after image, in step with what else the caller does.
pub(crate) struct Images<'a, I: Isa, M: Map<I, K>, const K: usize> {
    planes: Planes<'a, I, M, K>,
    /// Elements from one image to the next, and of each.
    pitch: usize,
    len: usize,
    /// Images after this one.
    left: usize,
    /// Elements that may be written.
    budget: usize,
    /// Images that follow for as long as elements are prefetched, and how far away those are.
    ahead: (usize, usize),
}

impl<'a, I: Isa, M: Map<I, K>, const K: usize> Images<'a, I, M, K> {
    /// `params` has an entry for each channel, whose planes in the first image begin at `start`. While at least `ahead.0`
    /// images follow, the elements `ahead.1` further on are prefetched.
    ///
    /// # Safety
    /// As [`Planes::new`], for those of all `images`.
    #[inline(always)]
    pub(crate) unsafe fn new(
        isa: I,
        map: &'a M,
        params: &'a [[<M::Element as Element>::Param; K]],
        (start, plane, pitch, images): (usize, usize, usize, usize),
        target: Target<M::Element>,
        ahead: (usize, usize),
    ) -> Self {
        let len = params.len() * plane;
        // SAFETY: the caller's promise; the range is empty, and the first image is gone to by `write`.
        let planes = unsafe { Planes::new(isa, map, params, plane, (start..start, 0, start), target) };
        let mut images = Self { planes, pitch, len, left: images, budget: 0, ahead };
        if len > 0 {
            images.next_image(start);
        } else {
            images.left = 0;
        }
        images
    }

    #[inline(always)]
    fn next_image(&mut self, start: usize) {
        self.left -= 1;
        let Planes { isa, map, params, plane, target, .. } = self.planes;
        let places = (start..start + self.len, 0, start + plane);
        // SAFETY: the promise of `new`.
        self.planes = unsafe { Planes::new(isa, map, params, plane, places, target) };
        self.planes.ahead = if self.left >= self.ahead.0 { self.ahead.1 } else { 0 };
        self.planes.to_ahead = if target.streaming || self.left == 0 { 0 } else { self.pitch };
    }

    /// Writes about `n` elements more.
    #[inline(always)]
    pub(crate) fn write(&mut self, n: usize) {
        self.budget += n;
        loop {
            let from = self.planes.at;
            self.planes.write_to((from + self.budget).min(self.planes.end));
            self.budget -= self.planes.at - from;
            if self.planes.at < self.planes.end || self.left == 0 {
                return;
            }
            self.next_image(self.planes.end - self.len + self.pitch);
        }
    }

    /// Writes what is left.
    #[inline(always)]
    pub(crate) fn finish(mut self) {
        self.write((self.left + 1) * self.len);
    }
}

/// Writes `len` elements from `start`, which belongs to the column of `params`. Stores are whole vectors, aligned, but for
/// the first and the last.
///
/// # Safety
/// The elements lie inside the tensors that `map` was made for and the one of `target`, and nothing else accesses those of it
/// meanwhile.
#[inline(always)]
pub(crate) unsafe fn over_rows<I: Isa, M: Map<I, K>, const K: usize>(
    isa: I,
    map: &M,
    params: Periodic<'_, <M::Element as Element>::Param>,
    at: (usize, usize),
    target: Target<M::Element>,
) {
    assert!(params.period >= MAX_LANES && params.lead + params.period + MAX_LANES <= params.padded);
    assert!(params.params.len() >= K * params.padded);
    // SAFETY: the caller's promise.
    unsafe {
        if target.streaming {
            rows::<I, M, K, true>(isa, map, params, at, target);
        } else {
            rows::<I, M, K, false>(isa, map, params, at, target);
        }
    }
}

#[inline(always)]
unsafe fn rows<I: Isa, M: Map<I, K>, const K: usize, const STREAM: bool>(
    isa: I,
    map: &M,
    mut params: Periodic<'_, <M::Element as Element>::Param>,
    (start, len): (usize, usize),
    target: Target<M::Element>,
) {
    let lanes = Compute::<I, M::Element>::LANES;
    let period = params.period;
    // SAFETY: all elements lie inside the span, which is the caller's promise.
    unsafe {
        let to = target.to.add(start);
        let head = target.unaligned(start, lanes).unwrap_or(0).min(len);
        if head > 0 {
            let value = map.at::<false>(isa, &params.get(isa), start, head);
            M::Element::store_first(isa, value, to, head);
            params.pass(head);
        }
        let mut i = head;
        // Rows of whole vectors with more parameters than a first-level cache keeps are written strip by strip.
        let fit = CROWDED / (K * size_of::<<M::Element as Element>::Param>());
        let strips = period.div_ceil(fit.max(STRIP / size_of::<M::Element>()));
        let rows = (len - i) / period;
        if strips > 1 && period.is_multiple_of(lanes) {
            let strip = period.div_ceil(strips).next_multiple_of(MAX_LANES);
            for from in (0..period).step_by(strip) {
                let first = params;
                for row in 0..rows {
                    params = first;
                    for c in (from..(from + strip).min(period)).step_by(lanes) {
                        let at = start + i + row * period + c;
                        // Strips are too short for the CPU to foresee the next.
                        map.prefetch(isa, at + 2 * period);
                        let value = map.at::<true>(isa, &params.get(isa), at, lanes);
                        target.store::<I, STREAM>(isa, value, at);
                        params.pass(lanes);
                    }
                }
            }
            i += rows * period;
        }
        while i + lanes <= len {
            if STREAM {
                map.prefetch(isa, start + i + AHEAD / size_of::<M::Element>());
            }
            let value = map.at::<true>(isa, &params.get(isa), start + i, lanes);
            target.store::<I, STREAM>(isa, value, start + i);
            params.pass(lanes);
            i += lanes;
        }
        if i < len {
            let value = map.at::<false>(isa, &params.get(isa), start + i, len - i);
            M::Element::store_first(isa, value, to.add(i), len - i);
        }
    }
}
