//! One value per element, over the runs of a channel or over rows of channels.
//!
//! The values do not depend on where a vector begins, so vectors in the middle begin where stores are aligned, and
//! the first and the last one overlap them.

use super::sums::{Beside, GROUP};
use crate::simd::{Compute, Isa, Kernel, Lanes, MAX_LANES, Storage, Tuning, Vector, splats};
use crate::tensor::Disjoint;
use crate::view::Packs;

/// Bytes of a row from which on pairs of them are no faster.
const PAIRED: usize = 1 << 10;

/// Bytes that are asked for ahead in a cache.
const AHEAD: usize = 2 << 10;
/// The same from memory.
const AHEAD_STREAMED: usize = 8 << 10;

/// A value per element, made of `K` parameters of the channel.
pub(crate) trait Map<const K: usize>: Packs<Self::Element> + Sync {
    /// Tensors that are always read.
    const TENSORS: usize = 1;
    /// The type that is written.
    type Element: Storage;

    /// What the parameters make of the elements from `at`: of a whole vector if `FULL`, else of the first `n`. Lanes that belong to
    /// other channels are thrown away, so nothing is written.
    ///
    /// # Safety
    /// The elements lie inside the tensors that the map was made for.
    unsafe fn raw<I: Isa, const FULL: bool>(
        &self,
        isa: I,
        params: &[Compute<I, Self::Element>; K],
        at: usize,
        n: usize,
    ) -> Compute<I, Self::Element>;

    /// The values of these elements from what [`Map::raw`] made of them.
    ///
    /// # Safety
    /// As [`Map::raw`].
    #[inline(always)]
    unsafe fn finish<I: Isa, const FULL: bool>(
        &self,
        _: I,
        raw: Compute<I, Self::Element>,
        _: usize,
        _: usize,
    ) -> Compute<I, Self::Element> {
        raw
    }

    /// The values of these elements, all of one channel or with parameters of their own.
    ///
    /// # Safety
    /// As [`Map::raw`].
    #[inline(always)]
    unsafe fn at<I: Isa, const FULL: bool>(
        &self,
        isa: I,
        params: &[Compute<I, Self::Element>; K],
        at: usize,
        n: usize,
    ) -> Compute<I, Self::Element> {
        // SAFETY: the caller's promise.
        unsafe { self.finish::<I, FULL>(isa, self.raw::<I, FULL>(isa, params, at, n), at, n) }
    }

    /// What stands for zero in what is written, where a view shows nothing.
    fn zero(&self) -> Self::Element {
        Self::Element::default()
    }

    /// Asks the caches for the elements around `at`, which may lie anywhere.
    fn prefetch<I: Isa>(&self, isa: I, at: usize);
}

/// Where values go, and how.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a, E> {
    pub(crate) to: Disjoint<'a, E>,
    /// Past the caches; never in place.
    pub(crate) streaming: bool,
    /// Where each element has a bit: that of the first one. Vectors then begin where bytes of bits do, whatever the address.
    pub(crate) first_bit: Option<usize>,
}

impl<'a, E: Storage> Target<'a, E> {
    /// Lanes of a logical vector.
    const LANES: usize = MAX_LANES * size_of::<f32>() / size_of::<E::Compute>();

    /// With no bits.
    pub(crate) fn new(to: Disjoint<'a, E>, streaming: bool) -> Self {
        Self { to, streaming, first_bit: None }
    }

    /// How many elements ahead of what is written others are asked for.
    #[inline(always)]
    pub(crate) fn ahead(&self) -> usize {
        if self.streaming { AHEAD_STREAMED / size_of::<E>() } else { AHEAD / size_of::<E>() }
    }

    /// With a bit for each element, if `first_bit` is that of the first.
    pub(crate) fn with_bits(self, first_bit: Option<usize>) -> Self {
        let with_bits = Self { first_bit, ..self };
        let aligned = with_bits.unaligned(0, Self::LANES) == self.unaligned(0, Self::LANES);
        Self { streaming: self.streaming && aligned, ..with_bits }
    }

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
            let to = self.to.as_ptr().add(at);
            if STREAM { E::stream(isa, value, to) } else { E::store(isa, value, to) }
        }
    }

    /// How many elements from `at` come before the first one that begins a vector of `lanes`: at a multiple of its stored size,
    /// or of its bits; none where no element does.
    #[inline(always)]
    pub(crate) fn unaligned(&self, at: usize, lanes: usize) -> Option<usize> {
        if let Some(first) = self.first_bit {
            return Some((first + at).wrapping_neg() % lanes);
        }
        let address = self.to.as_ptr().wrapping_add(at) as usize;
        let bytes = address.wrapping_neg() % (lanes * size_of::<E>());
        bytes.is_multiple_of(size_of::<E>()).then_some(bytes / size_of::<E>())
    }
}

/// The parameters of the columns of rows, `K` for each of the `padded` columns of which `lead` come before the first. The columns repeat
/// with `period`, at least a vector, and the first ones stand once more after the last, so that a vector may begin anywhere.
#[derive(Clone, Copy)]
pub(crate) struct Periodic<'a, R> {
    pub(crate) params: &'a [R],
    /// Whether all parameters of a vector of columns stand together, and were [kept](Vector::keep) there, where whole vectors begin at
    /// multiples of their length; else those of all columns, one after the other. A CPU foresees one such stream sooner than `K`.
    pub(crate) woven: bool,
    pub(crate) padded: usize,
    pub(crate) lead: usize,
    pub(crate) period: usize,
    pub(crate) column: usize,
}

impl<R: Lanes> Periodic<'_, R> {
    /// The parameters of the vector that begins with the column; `WOVEN` or not.
    #[inline(always)]
    fn get<I: Isa, const K: usize, const WOVEN: bool>(&self, isa: I) -> [R::Vector<I>; K] {
        let at = self.lead + self.column;
        let (first, apart) = if WOVEN { (at * K, R::Vector::<I>::LANES) } else { (at, self.padded) };
        let mut vectors = [R::Vector::<I>::splat(isa, R::default()); K];
        for (k, vector) in vectors.iter_mut().enumerate() {
            // SAFETY: the column lies below the period, and a vector more lies below `padded`, see `over_rows`.
            *vector = unsafe { R::Vector::<I>::load_kept(isa, self.params.as_ptr().add(first + k * apart)) };
        }
        vectors
    }

    /// The same wherever that vector begins.
    #[inline(always)]
    fn anywhere<I: Isa, const K: usize>(&self, isa: I) -> [R::Vector<I>; K] {
        if !self.woven {
            return self.get::<I, K, false>(isa);
        }
        let lanes = R::Vector::<I>::LANES;
        let at = self.lead + self.column;
        let mut vectors = [R::Vector::<I>::splat(isa, R::default()); K];
        for (k, vector) in vectors.iter_mut().enumerate() {
            let mut two = [R::default(); 2 * MAX_LANES];
            // SAFETY: both lie below `padded`, a multiple of their length, as a vector from the column does.
            unsafe {
                for (i, from) in [at / lanes, at.div_ceil(lanes)].into_iter().enumerate() {
                    let kept = self.params.as_ptr().add((from * K + k) * lanes);
                    R::Vector::<I>::load_kept(isa, kept).store(two.as_mut_ptr().add(i * lanes));
                }
                *vector = R::Vector::<I>::load(isa, two.as_ptr().add(at % lanes));
            }
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

/// Consecutive planes, or a part of them: what [`over_planes`] writes.
#[derive(Clone, Copy)]
pub(crate) struct Planes {
    /// Elements of a plane.
    pub(crate) plane: usize,
    /// The first element to be written, its channel among the parameters, and the end of its plane.
    pub(crate) at: usize,
    pub(crate) channel: usize,
    pub(crate) plane_end: usize,
    /// The end of what is to be written.
    pub(crate) end: usize,
    /// How far from what is written elements are prefetched to be read.
    pub(crate) ahead: usize,
}

impl Planes {
    /// Elements that are left of the first plane.
    #[inline(always)]
    pub(crate) fn inside(&self) -> usize {
        self.plane_end.min(self.end) - self.at
    }

    /// Goes on by `n` elements, in planes of so many channels.
    #[inline(always)]
    pub(crate) fn go_on(&mut self, n: usize, channels: usize) {
        self.at += n;
        while self.plane_end <= self.at {
            self.channel = following(self.channel, channels);
            self.plane_end += self.plane;
        }
    }

    /// The same planes `by` elements further on.
    #[inline(always)]
    pub(crate) fn shifted(self, by: usize) -> Self {
        let by = |at: usize| at.wrapping_add(by);
        Self { at: by(self.at), plane_end: by(self.plane_end), end: by(self.end), ..self }
    }
}

/// The channel of the plane that follows, of so many channels.
#[inline(always)]
fn following(channel: usize, channels: usize) -> usize {
    if channel + 1 == channels { 0 } else { channel + 1 }
}

/// Of each channel; after the last one comes the first again.
type Params<'p, M, const K: usize> = &'p [[<<M as Map<K>>::Element as Storage>::Compute; K]];

/// Where a walk through planes is: the parameters of the plane that it is in, and where that ends.
struct Walk<'p, I: Isa, M: Map<K>, const K: usize> {
    plane: usize,
    channel: usize,
    plane_end: usize,
    params: Params<'p, M, K>,
    vectors: [Compute<I, M::Element>; K],
}

impl<I: Isa, M: Map<K>, const K: usize> Walk<'_, I, M, K> {
    /// The values of the `n` elements from `at`, up to a vector, which may lie in several planes. Goes on to the plane behind them.
    ///
    /// # Safety
    /// As [`Map::at`].
    #[inline(always)]
    unsafe fn over<const FULL: bool>(&mut self, isa: I, map: M, (at, n): (usize, usize)) -> Compute<I, M::Element> {
        // SAFETY: the caller's promise.
        unsafe {
            let mut raw = map.raw::<I, FULL>(isa, &self.vectors, at, n);
            while self.plane_end <= at + n {
                let done = self.plane_end - at;
                (self.channel, self.plane_end) =
                    (following(self.channel, self.params.len()), self.plane_end + self.plane);
                self.vectors = splats::<I, Compute<I, M::Element>, K>(isa, &self.params[self.channel]);
                // Values are mixed rather than parameters, which registers do not hold twice.
                if done < n {
                    raw = raw.first(done, map.raw::<I, FULL>(isa, &self.vectors, at, n));
                }
            }
            map.finish::<I, FULL>(isa, raw, at, n)
        }
    }
}

/// Writes the elements of planes, one channel after another. Stores are whole vectors, aligned, but for the first and the last.
///
/// # Safety
/// The elements lie inside the tensors that `map` was made for and the one of `target`, and nothing else accesses those of it
/// meanwhile.
#[inline(always)]
pub(crate) unsafe fn over_planes<I: Isa, M: Map<K>, const K: usize>(
    isa: I,
    map: M,
    planes: Planes,
    params: Params<'_, M, K>,
    target: Target<'_, M::Element>,
) {
    let isa = M::Element::unordered(isa);
    // SAFETY: the caller's promise.
    unsafe {
        match I::STREAMS && target.streaming {
            true => write_planes::<_, M, K, true>(isa, map, planes, params, target),
            false => write_planes::<_, M, K, false>(isa, map, planes, params, target),
        }
    }
}

#[inline(always)]
unsafe fn write_planes<I: Isa, M: Map<K>, const K: usize, const STREAM: bool>(
    isa: I,
    map: M,
    Planes { plane, mut at, channel, plane_end, end, ahead }: Planes,
    params: Params<'_, M, K>,
    target: Target<'_, M::Element>,
) {
    let lanes = Compute::<I, M::Element>::LANES;
    let vectors = splats::<I, Compute<I, M::Element>, K>(isa, &params[channel]);
    let mut walk = Walk::<I, M, K> { plane, channel, plane_end, params, vectors };
    // Elements before the first aligned vector, then whole vectors, then what is left.
    let mut n = match target.unaligned(at, lanes).unwrap_or(0).min(end - at) {
        0 => lanes.min(end - at),
        head => head,
    };
    while n > 0 {
        // SAFETY: the elements lie before the end, up to which the caller promises.
        unsafe {
            if n == lanes {
                let value = walk.over::<true>(isa, map, (at, n));
                target.store::<I, STREAM>(isa, value, at);
            } else {
                let value = walk.over::<false>(isa, map, (at, n));
                M::Element::store_first(isa, value, target.to.as_ptr().add(at), n);
            }
            at += n;
            // Whole vectors of this plane.
            let to = walk.plane_end.min(end);
            while at + lanes <= to {
                map.prefetch(isa, at.wrapping_add(ahead));
                let value = map.at::<I, true>(isa, &walk.vectors, at, lanes);
                target.store::<I, STREAM>(isa, value, at);
                at += lanes;
            }
        }
        n = lanes.min(end - at);
    }
}

/// Whole vectors of one plane, written by the group.
pub(crate) struct Groups<'a, I: Isa, M: Map<K>, const K: usize, const STREAM: bool> {
    isa: I,
    map: M,
    target: Target<'a, M::Element>,
    params: [Compute<I, M::Element>; K],
    at: usize,
}

impl<'a, I: Isa, M: Map<K>, const K: usize, const STREAM: bool> Groups<'a, I, M, K, STREAM> {
    /// Those from element `at`, with the parameters of their channel.
    #[inline(always)]
    pub(crate) fn new(
        isa: I,
        map: M,
        target: Target<'a, M::Element>,
        params: &[<M::Element as Storage>::Compute; K],
        at: usize,
    ) -> Self {
        Self { isa, map, target, params: splats::<I, Compute<I, M::Element>, K>(isa, params), at }
    }
}

impl<I: Isa, M: Map<K>, const K: usize, const STREAM: bool> Beside for Groups<'_, I, M, K, STREAM> {
    /// Writes the next one. Safe as [`over_planes`] is, for elements that begin where a stored vector is aligned if `STREAM`.
    #[inline(always)]
    unsafe fn step(&mut self) {
        let lanes = Compute::<I, M::Element>::LANES;
        for _ in 0..GROUP {
            // SAFETY: the caller's promise.
            unsafe {
                let value = self.map.at::<I, true>(self.isa, &self.params, self.at, lanes);
                self.target.store::<I, STREAM>(self.isa, value, self.at);
            }
            self.at += lanes;
        }
    }
}

/// Writes `len` elements from `start`, which belongs to the column of `params`. Stores are whole vectors, aligned, but for
/// the first and the last. The elements `ahead` of what is written are prefetched.
///
/// # Safety
/// The elements lie inside the tensors that `map` was made for and the one of `target`, and nothing else accesses those of it
/// meanwhile.
#[inline(always)]
pub(crate) unsafe fn over_rows<I: Isa, M: Map<K>, const K: usize>(
    isa: I,
    map: M,
    mut params: Periodic<'_, <M::Element as Storage>::Compute>,
    (start, len): (usize, usize),
    ahead: usize,
    target: Target<'_, M::Element>,
) {
    assert!(params.period >= MAX_LANES && params.lead + params.period + MAX_LANES <= params.padded);
    assert!(if params.woven { params.padded.is_multiple_of(MAX_LANES) } else { I::IN_ORDER });
    assert!(params.params.len() >= K * params.padded);
    let lanes = Compute::<I, M::Element>::LANES;
    let period = params.period;
    // Up to the first aligned vector, whole vectors, and what is left.
    let head = target.unaligned(start, lanes).unwrap_or(0).min(len);
    let mut i = head;
    // SAFETY: all elements lie inside the span, which is the caller's promise.
    unsafe {
        if head > 0 {
            isa.call(Partial { map, params, at: start, n: head, target });
            params.pass(head);
        }
        // Rows of whole vectors with more parameters than a first-level cache keeps are written strip by strip.
        let &Tuning { crowded, strip, least_strip, .. } = I::TIER.tuning();
        let of_column = K * size_of::<<M::Element as Storage>::Compute>();
        let columns = |bytes: usize| (bytes / of_column).max(least_strip / size_of::<M::Element>());
        let rows = (len - i) / period;
        if period > columns(crowded) && period.is_multiple_of(lanes) {
            let strip = period.div_ceil(period.div_ceil(columns(strip))).next_multiple_of(MAX_LANES);
            for from in (0..period).step_by(strip) {
                let (first, vectors) = (params, strip.min(period - from) / lanes);
                for row in 0..rows {
                    params = first;
                    let at = (start + i + row * period + from, vectors);
                    // Strips are too short for the CPU to foresee the next.
                    whole(isa, map, &mut params, at, 2 * period, target);
                }
            }
            i += rows * period;
        }
        let vectors = (len - i) / lanes;
        let at = (start + i, vectors);
        let rest = match period / lanes {
            3 => few::<I, M, K, 3>(isa, map, &params, at, ahead, target),
            4 => few::<I, M, K, 4>(isa, map, &params, at, ahead, target),
            6 => few::<I, M, K, 6>(isa, map, &params, at, ahead, target),
            8 => few::<I, M, K, 8>(isa, map, &params, at, ahead, target),
            _ => at,
        };
        whole(isa, map, &mut params, rest, ahead, target);
        i += vectors * lanes;
        if i < len {
            isa.call(Partial { map, params, at: start + i, n: len - i, target });
        }
    }
}

/// Writes so many whole vectors of rows from element `at`.
///
/// # Safety
/// As [`over_rows`], for these, and [`Target::store`].
#[inline(always)]
unsafe fn whole<I: Isa, M: Map<K>, const K: usize>(
    isa: I,
    map: M,
    params: &mut Periodic<'_, <M::Element as Storage>::Compute>,
    at: (usize, usize),
    ahead: usize,
    target: Target<'_, M::Element>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match (I::STREAMS && target.streaming, params.woven) {
            (true, true) => params.column = isa.call(Woven::<M, K, true> { map, params: *params, at, ahead, target }),
            (false, true) => params.column = isa.call(Woven::<M, K, false> { map, params: *params, at, ahead, target }),
            (true, false) => write_whole::<I, M, K, true, false>(isa, map, params, at, ahead, target),
            (false, false) => write_whole::<I, M, K, false, false>(isa, map, params, at, ahead, target),
        }
    }
}

/// Writes whole rows, if they have `N` vectors and the parameters of all fit the registers; where the rest begins, and its vectors.
///
/// # Safety
/// As [`whole`].
#[inline(always)]
unsafe fn few<I: Isa, M: Map<K>, const K: usize, const N: usize>(
    isa: I,
    map: M,
    params: &Periodic<'_, <M::Element as Storage>::Compute>,
    (at, vectors): (usize, usize),
    ahead: usize,
    target: Target<'_, M::Element>,
) -> (usize, usize) {
    let (lanes, rows) = (Compute::<I, M::Element>::LANES, vectors / N);
    let keeps = const { K * N <= I::TIER.tuning().kept_params };
    if !keeps || params.woven || params.period != N * lanes || rows == 0 {
        return (at, vectors);
    }
    // What is asked for ahead of several tensors, past the caches, comes sooner with more to do between the loads.
    if target.streaming && M::TENSORS > 1 && ahead > 0 {
        return (at, vectors);
    }
    let params = *params;
    if I::STREAMS && target.streaming {
        isa.call(Few::<M, K, N, true> { map, params, at: (at, rows), ahead, target });
    } else {
        isa.call(Few::<M, K, N, false> { map, params, at: (at, rows), ahead, target });
    }
    (at + rows * N * lanes, vectors - rows * N)
}

/// So many rows of `N` vectors, whose parameters stay in registers, from a place on; safe as [`write_whole`]. Compiled apart, so that
/// nothing else takes registers.
struct Few<'a, M: Map<K>, const K: usize, const N: usize, const STREAM: bool> {
    map: M,
    params: Periodic<'a, <M::Element as Storage>::Compute>,
    at: (usize, usize),
    ahead: usize,
    target: Target<'a, M::Element>,
}

impl<M: Map<K>, const K: usize, const N: usize, const STREAM: bool> Kernel for Few<'_, M, K, N, STREAM> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { map, mut params, at: (at, rows), ahead, target } = self;
        let lanes = Compute::<I, M::Element>::LANES;
        let mut of_columns = [[Compute::<I, M::Element>::splat(isa, Default::default()); K]; N];
        for of_column in &mut of_columns {
            *of_column = params.get::<I, K, false>(isa);
            params.pass(lanes);
        }
        for at in (at..at + rows * N * lanes).step_by(N * lanes) {
            for (j, of_column) in of_columns.iter().enumerate() {
                let at = at + j * lanes;
                map.prefetch(isa, at + ahead);
                // SAFETY: the promise of who made this.
                unsafe { target.store::<I, STREAM>(isa, map.at::<I, true>(isa, of_column, at, lanes), at) };
            }
        }
    }
}

/// [`write_whole`] with woven parameters, up to the column returned; safe as that. Their rows are long, so that it is compiled apart:
/// beside other loops, compilers lack registers for it.
struct Woven<'a, M: Map<K>, const K: usize, const STREAM: bool> {
    map: M,
    params: Periodic<'a, <M::Element as Storage>::Compute>,
    at: (usize, usize),
    ahead: usize,
    target: Target<'a, M::Element>,
}

impl<M: Map<K>, const K: usize, const STREAM: bool> Kernel for Woven<'_, M, K, STREAM> {
    type Output = usize;
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> usize {
        let Self { map, mut params, at, ahead, target } = self;
        // SAFETY: the promise of who made this.
        unsafe { write_whole::<I, M, K, STREAM, true>(isa, map, &mut params, at, ahead, target) };
        params.column
    }
}

#[inline(always)]
unsafe fn write_whole<I: Isa, M: Map<K>, const K: usize, const STREAM: bool, const WOVEN: bool>(
    isa: I,
    map: M,
    params: &mut Periodic<'_, <M::Element as Storage>::Compute>,
    (mut at, mut vectors): (usize, usize),
    ahead: usize,
    target: Target<'_, M::Element>,
) {
    let lanes = Compute::<I, M::Element>::LANES;
    // Vectors up to the end of the row.
    let left = |params: &Periodic<'_, _>| (params.period - params.column).div_ceil(lanes);
    let row = params.period / lanes;
    let pairs = I::TIER.tuning().pairs_rows && !WOVEN && !STREAM;
    let pairs = pairs && params.period.is_multiple_of(lanes) && params.period * size_of::<M::Element>() < PAIRED;
    // SAFETY: the caller's promise, for all.
    unsafe {
        while pairs && vectors >= 2 * row {
            let end = left(params);
            for (from, n) in [(0, end), (end, row - end)] {
                columns::<I, M, K, STREAM, WOVEN, 2>(isa, map, params, (at + from * lanes, n), ahead, target);
            }
            (at, vectors) = (at + 2 * row * lanes, vectors - 2 * row);
        }
        while vectors > 0 {
            let n = left(params).min(vectors);
            columns::<I, M, K, STREAM, WOVEN, 1>(isa, map, params, (at, n), ahead, target);
            (at, vectors) = (at + n * lanes, vectors - n);
        }
    }
}

/// Writes so many vectors from element `at`, up to the end of a row, and those of the same columns in the rows that follow: `ROWS` rows.
///
/// # Safety
/// As [`over_rows`], for these, and [`Target::store`].
#[inline(always)]
unsafe fn columns<I: Isa, M: Map<K>, const K: usize, const STREAM: bool, const WOVEN: bool, const ROWS: usize>(
    isa: I,
    map: M,
    params: &mut Periodic<'_, <M::Element as Storage>::Compute>,
    (at, vectors): (usize, usize),
    ahead: usize,
    target: Target<'_, M::Element>,
) {
    let lanes = Compute::<I, M::Element>::LANES;
    // Without a look at where the row ends.
    let first = *params;
    for v in 0..vectors {
        params.column = first.column + v * lanes;
        let of_columns = params.get::<I, K, WOVEN>(isa);
        for row in 0..ROWS {
            let at = at + v * lanes + row * params.period;
            map.prefetch(isa, at + ahead);
            // SAFETY: the caller's promise.
            unsafe {
                let value = map.at::<I, true>(isa, &of_columns, at, lanes);
                target.store::<I, STREAM>(isa, value, at);
            }
        }
    }
    *params = first;
    params.pass(vectors * lanes);
}

/// The first `n` elements of a vector from element `at`, which is all that is to be written there; safe as [`over_rows`]. There are two
/// of a stretch at most, so that it is compiled apart.
struct Partial<'a, M: Map<K>, const K: usize> {
    map: M,
    params: Periodic<'a, <M::Element as Storage>::Compute>,
    at: usize,
    n: usize,
    target: Target<'a, M::Element>,
}

impl<M: Map<K>, const K: usize> Kernel for Partial<'_, M, K> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { map, params, at, n, target } = self;
        // SAFETY: the promise of who made this.
        unsafe {
            let value = map.at::<I, false>(isa, &params.anywhere(isa), at, n);
            M::Element::store_first(isa, value, target.to.as_ptr().add(at), n);
        }
    }
}
