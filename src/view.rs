//! Where the elements of a tensor lie, if not one after the other: strides, blocks of channels, masks.
//!
//! Kernels know dense tensors alone. A pass over views packs the elements of each of its blocks into a cache first, in
//! the order of the dense tensor that the view stands for, so its bits are those of that tensor; what it writes goes back the
//! same way. Memory is read and written as often as for a dense tensor, and no tensor is copied.

use core::ops::Range;

use crate::element::Element;
use crate::error::{Error, Result, check_len};
use crate::gates::Recorded;
use crate::grid::Runs;
use crate::shape::{Layout, Shape};
use crate::simd::Storage;
use crate::tensor::{Disjoint, Side, Source};

/// Where the elements of a tensor lie in a slice.
///
/// ```
/// use batchnorm::{Affine, BatchNorm, Population, Shape, View};
/// // The channels 8 to 24 of a tensor of 32 channels, normalized into a tensor of their own.
/// let big = vec![1f32; 4 * 32 * 9];
/// let shape = Shape::nchw(4, 16, 3, 3)?;
/// let slice = View::strided(&shape, &[4, 16, 3, 3], &[32 * 9, 9, 3, 1])?;
/// let bn = BatchNorm::<f32>::new(shape)?.with_views(slice, View::dense(&shape))?;
/// # let (mean, var) = ([0.0; 16], [1.0; 16]);
/// # let mut y = vec![0.0; shape.len()];
/// bn.forward_infer(&big[8 * 9..], Affine::none(), Population { mean: &mean, var: &var }, &mut y)?;
/// # Ok::<(), batchnorm::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    /// What it is a view of, and the dense tensor that it stands for.
    shape: Shape,
    logical: Shape,
    /// Elements that the slice must hold.
    len: usize,
    order: Order,
}

/// Number and stride of what repeats, from the outermost on.
type Dims = [(usize, usize); 4];

/// How the elements of the dense tensor are found.
#[derive(Debug, Clone, PartialEq)]
enum Order {
    /// Rows of `row` elements at the strides of the outer dimensions, each cut into runs of `run` elements that lie
    /// `run_stride` apart.
    Nested { outer: Dims, row: usize, run: usize, run_stride: usize },
    /// Runs that are listed, each from a place in a plane of `plane` elements to a place in memory; the next plane lies `stride`
    /// further on. And what lies between them.
    Listed { runs: Vec<Listed>, gaps: Vec<Range<usize>>, plane: usize, planes: usize, stride: usize },
}

#[derive(Debug, Clone, PartialEq)]
struct Listed {
    /// The first element in the plane.
    from: usize,
    len: usize,
    /// Its place in memory.
    at: usize,
}

impl View {
    /// One element after the other: what plans take without a view.
    pub fn dense(shape: &Shape) -> Self {
        let len = shape.len();
        let order = Order::Nested { outer: [(1, 0); 4], row: len, run: len, run_stride: 0 };
        Self { shape: *shape, logical: *shape, len, order }
    }

    /// Elements at strides: `sizes` and `strides`, in elements, in the order of the letters of the layout, the batch first. So a
    /// slice of the channels of a larger tensor, or a crop of its rows, is used where it lies; the slice that is passed begins
    /// with its first element. A last stride of 1 is what passes are fast with; over any other, elements are copied one by one.
    ///
    /// # Errors
    /// [`Error::View`] if the sizes are not the shape's, there are more than five, or elements share a place.
    pub fn strided(shape: &Shape, sizes: &[usize], strides: &[usize]) -> Result<Self> {
        let refuse = |expected: &str| {
            let reason = format!("expected {expected}, got the sizes {sizes:?} and the strides {strides:?}");
            Err(Error::View { reason: reason.into() })
        };
        if sizes.len() != strides.len() || sizes.len() < 2 || sizes.len() > 5 {
            return refuse("two to five sizes and as many strides");
        }
        let (batch, rest) = (sizes[0], &sizes[1..]);
        let (channels, spatial) = match shape.layout() {
            Layout::ChannelsFirst => (rest[0], &rest[1..]),
            Layout::ChannelsLast => (rest[rest.len() - 1], &rest[..rest.len() - 1]),
        };
        let size = spatial.iter().try_fold(1usize, |size, &dim| size.checked_mul(dim));
        if batch != shape.batch() || channels != shape.channels() || size != Some(shape.spatial()) {
            let (batch, channels, spatial) = (shape.batch(), shape.channels(), shape.spatial());
            let layout = shape.layout();
            return refuse(&format!("{batch} samples, {channels} channels and {spatial} positions as {layout:?}"));
        }
        // From the smallest stride on, each must pass over all that lies within it.
        let mut dims: Vec<_> = sizes.iter().copied().zip(strides.iter().copied()).filter(|dim| dim.0 > 1).collect();
        dims.sort_by_key(|dim| dim.1);
        let mut span = 1usize;
        for (size, stride) in dims {
            let next = stride.checked_mul(size - 1).and_then(|last| last.checked_add(span));
            match next {
                Some(next) if stride >= span && next <= isize::MAX as usize => span = next,
                _ => return refuse("strides that keep elements apart, within a slice"),
            }
        }
        let mut outer = [(1, 0); 4];
        let first = outer.len() - (sizes.len() - 1);
        for (outer, dim) in outer[first..].iter_mut().zip(sizes.iter().copied().zip(strides.iter().copied())) {
            // A stride that is never taken may be of any size.
            *outer = if dim.0 == 1 { (1, 0) } else { dim };
        }
        let mut row = sizes[sizes.len() - 1];
        let step = if row > 1 { strides[strides.len() - 1] } else { 1 };
        // Rows that follow each other are one.
        while outer != [(1, 0); 4] {
            let [.., (size, stride)] = outer;
            if size != 1 && stride != row * step {
                break;
            }
            row *= size;
            outer.rotate_right(1);
            outer[0] = (1, 0);
        }
        let (run, run_stride) = if step == 1 { (row, 0) } else { (1, step) };
        let order = Order::Nested { outer, row, run, run_stride };
        Ok(Self { shape: *shape, logical: *shape, len: if shape.is_empty() { 0 } else { span }, order })
    }

    /// Channels in blocks of `block`, as oneDNN stores them (nChw8c, nChw16c): `(batch, channels / block, spatial, block)`, the last
    /// block filled up with zeros. The shape's layout must be channels first; it is computed in the order of
    /// channels last, whose bits it has.
    ///
    /// # Errors
    /// [`Error::View`] for a block of zero, another layout, or a size that no slice has.
    pub fn blocked(shape: &Shape, block: usize) -> Result<Self> {
        let (batch, channels, spatial) = (shape.batch(), shape.channels(), shape.spatial());
        if shape.layout() != Layout::ChannelsFirst || block == 0 {
            let got = format!("got blocks of {block} and {:?}", shape.layout());
            let reason = format!("expected blocks of at least one channel, of a shape of channels first, {got}");
            return Err(Error::View { reason: reason.into() });
        }
        let sample = spatial.checked_mul(channels.div_ceil(block)).and_then(|size| size.checked_mul(block));
        let len = sample.and_then(|sample| sample.checked_mul(batch)).filter(|&len| len <= isize::MAX as usize / 8);
        let (Some(sample), Some(len)) = (sample, len) else {
            return Err(Error::View { reason: "expected padded channels that fit a slice".into() });
        };
        let outer = [(1, 0), (1, 0), (batch, sample), (spatial, block)];
        let order = Order::Nested { outer, row: channels, run: block, run_stride: spatial * block };
        Ok(Self { shape: *shape, logical: Shape::new(Layout::ChannelsLast, batch, channels, &[spatial])?, len, order })
    }

    /// The positions for which `valid`, in order; of a dense tensor.
    pub(crate) fn masked(shape: &Shape, valid: impl Iterator<Item = bool>) -> Result<Self> {
        let (channels, spatial) = (shape.channels(), shape.spatial());
        let (mut runs, mut gaps, mut count) = (Vec::<Listed>::new(), Vec::<Range<usize>>::new(), 0);
        // Of channels first a position lies in the planes of its sample, of channels last it is a row.
        let (each, first) = match shape.layout() {
            Layout::ChannelsFirst => (1, channels * spatial),
            Layout::ChannelsLast => (channels, channels * spatial),
        };
        for (position, valid) in valid.enumerate() {
            let at = position / spatial * first + position % spatial * each;
            match (valid, runs.last_mut(), gaps.last_mut()) {
                (true, Some(run), _) if run.at + run.len == at && run.from + run.len == count => run.len += each,
                (true, ..) => runs.push(Listed { from: count, len: each, at }),
                (false, _, Some(gap)) if gap.end == at => gap.end += each,
                (false, ..) => gaps.push(at..at + each),
            }
            count += if valid { each } else { 0 };
        }
        let logical = Shape::new(shape.layout(), 1, channels, &[count / each])?;
        let (planes, stride) = if each == 1 { (channels, spatial) } else { (1, 0) };
        Ok(Self {
            shape: *shape,
            logical,
            len: shape.len(),
            order: Order::Listed { runs, gaps, plane: count, planes, stride },
        })
    }

    /// The number of elements that a slice must hold at least.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the view shows no element.
    pub fn is_empty(&self) -> bool {
        self.logical.is_empty()
    }

    /// Calls `with` the place in memory and the length of each piece of runs of the dense tensor, in order.
    fn pieces(&self, runs: Runs, mut with: impl FnMut(usize, usize)) {
        match &self.order {
            &Order::Nested { outer, row, run, run_stride } => {
                // The columns of a tile begin at the same place of each row.
                let (column, is_tile) = (runs.start % row, runs.stride == row);
                let (first, mut within) = (column / run * run_stride, column % run);
                let mut rows = Odometer::new(outer, runs.start / row);
                let (mut at, mut skipped) = (column, first);
                for k in 0..runs.count {
                    if k > 0 && is_tile {
                        rows.next();
                    } else if k > 0 {
                        let start = runs.start + k * runs.stride;
                        rows = Odometer::new(outer, start / row);
                        at = start % row;
                        (skipped, within) = (at / run * run_stride, at % run);
                    }
                    let (mut at, mut place, mut within) = (at, rows.at + skipped, within);
                    let mut left = runs.len;
                    loop {
                        let len = (run - within).min(row - at).min(left);
                        with(place + within, len);
                        left -= len;
                        if left == 0 {
                            break;
                        }
                        (at, within, place) = (at + len, 0, place + run_stride);
                        if at == row {
                            rows.next();
                            (at, place) = (0, rows.at);
                        }
                    }
                }
            }
            Order::Listed { runs: listed, plane, stride, .. } => {
                let mut next = 0;
                for start in runs.starts() {
                    let (mut i, end) = (start, start + runs.len);
                    while i < end {
                        let (first, mut from) = (i / plane * stride, i % plane);
                        // Often that of the run before.
                        if listed.get(next).is_none_or(|run| from < run.from || from >= run.from + run.len) {
                            next = listed.partition_point(|run| run.from + run.len <= from);
                        }
                        while i < end && from < *plane {
                            let run = &listed[next];
                            let len = (run.from + run.len - from).min(end - i);
                            with(first + run.at + from - run.from, len);
                            (i, from) = (i + len, from + len);
                            next += usize::from(from == run.from + run.len);
                        }
                    }
                }
            }
        }
    }

    /// Calls `with` each range of memory that belongs to the tensor and is not shown.
    fn padding(&self, mut with: impl FnMut(Range<usize>)) {
        match &self.order {
            &Order::Nested { outer, row, run, run_stride } => {
                let rest = row % run.max(1);
                let rows: usize = outer.iter().map(|dim| dim.0).product();
                if rest == 0 || rows == 0 {
                    return;
                }
                let mut at = Odometer::new(outer, 0);
                for _ in 0..rows {
                    let last = at.at + row / run * run_stride;
                    with(last + rest..last + run);
                    at.next();
                }
            }
            Order::Listed { gaps, planes, stride, .. } => {
                for p in 0..*planes {
                    gaps.iter().for_each(|gap| with(p * stride + gap.start..p * stride + gap.end));
                }
            }
        }
    }
}

/// The place of a row after another, without a division for each.
struct Odometer {
    outer: Dims,
    index: [usize; 4],
    at: usize,
}

impl Odometer {
    fn new(outer: Dims, mut row: usize) -> Self {
        let (mut index, mut at) = ([0; 4], 0);
        for (index, (size, stride)) in index.iter_mut().zip(outer).rev() {
            *index = row % size;
            at += *index * stride;
            row /= size;
        }
        Self { outer, index, at }
    }

    /// Goes on to the next row; from the last one to the first.
    #[inline]
    fn next(&mut self) {
        for (index, (size, stride)) in self.index.iter_mut().zip(self.outer).rev() {
            (*index, self.at) = (*index + 1, self.at + stride);
            if *index < size {
                return;
            }
            (*index, self.at) = (0, self.at - size * stride);
        }
    }
}

/// The views of a plan: of the input and its gradient, and of the output, its gradient and what is added to it.
#[derive(Debug, PartialEq)]
pub(crate) struct Views {
    x: View,
    y: View,
}

impl Views {
    pub(crate) fn new(shape: &Shape, x: View, y: View) -> Result<Self> {
        if x.shape != *shape || y.shape != *shape || x.logical != y.logical {
            return Err(Error::View { reason: "expected two views of the plan's shape, of the same order".into() });
        }
        Ok(Self { x, y })
    }

    /// Of valid positions, for all tensors.
    pub(crate) fn masked(shape: &Shape, valid: impl Iterator<Item = bool>) -> Result<Self> {
        let x = View::masked(shape, valid)?;
        Ok(Self { y: x.clone(), x })
    }

    /// The dense tensor that the kernels see.
    pub(crate) fn logical(&self) -> Shape {
        self.x.logical
    }

    fn of(&self, side: Side) -> &View {
        match side {
            Side::X => &self.x,
            Side::Y => &self.y,
        }
    }

    pub(crate) fn check(&self, side: Side, what: &'static str, got: usize) -> Result<()> {
        let expected = self.of(side).len;
        if got >= expected { Ok(()) } else { check_len(what, expected, got) }
    }

    /// Refuses to write one tensor over another that lies differently.
    pub(crate) fn check_in_place(&self) -> Result<()> {
        match self.x == self.y {
            true => Ok(()),
            false => {
                Err(Error::View { reason: "expected the same view for a tensor and what is written over it".into() })
            }
        }
    }

    /// Writes `zero` where the tensor shows nothing.
    ///
    /// # Safety
    /// The tensor has the length of its view, and nothing else accesses it.
    pub(crate) unsafe fn clear<E: Storage>(&self, tensor: Disjoint<'_, E>, zero: E) {
        self.of(tensor.side()).padding(|range| {
            // SAFETY: inside the tensor.
            unsafe { tensor.slice(range) }.fill(zero);
        });
    }

    /// Copies elements of the dense tensor that lie one after the other to where they belong.
    ///
    /// # Safety
    /// The range lies inside the tensor; no other thread accesses its elements.
    pub(crate) unsafe fn unpack<E: Storage>(&self, from: &[E], range: Range<usize>, to: Disjoint<'_, E>) {
        assert_eq!(from.len(), range.len());
        let mut done = 0;
        let runs = Runs { start: range.start, len: range.len(), count: 1, stride: 0 };
        self.of(to.side()).pieces(runs, |at, len| {
            // SAFETY: `len` elements of the range lie at `at` in the tensor.
            unsafe { copy(from.as_ptr().add(done), to.as_ptr().add(at), len) };
            done += len;
        });
    }
}

/// Copies `len` elements, mostly those of a block of channels.
///
/// # Safety
/// They can be read and written, and do not overlap.
#[inline(always)]
unsafe fn copy<E: Copy>(from: *const E, to: *mut E, len: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match len {
            8 => core::ptr::copy_nonoverlapping(from, to, 8),
            16 => core::ptr::copy_nonoverlapping(from, to, 16),
            _ => core::ptr::copy_nonoverlapping(from, to, len),
        }
    }
}

/// The memory that the elements of a few runs are packed into, tensor after tensor.
pub(crate) struct Pack<'v, 'b, E> {
    views: &'v Views,
    runs: Runs,
    room: &'b mut [E],
}

/// Tensors that a pass packs at most, the one that is written included.
const PACKED: usize = 5;

/// Elements between tensors, so that each begins a line.
const LINE: usize = 64;

/// The room that the tensors of a pass take, of so many elements each.
pub(crate) fn room_for(elements: usize) -> usize {
    elements.next_multiple_of(LINE).saturating_mul(PACKED)
}

impl<'v, 'b, E: Storage> Pack<'v, 'b, E> {
    pub(crate) fn new(views: &'v Views, runs: Runs, room: &'b mut [E]) -> Self {
        Self { views, runs, room }
    }

    /// Room for the elements of one tensor.
    pub(crate) fn take(&mut self) -> &'b mut [E] {
        let room = core::mem::take(&mut self.room);
        let (taken, rest) = room.split_at_mut(self.runs.size().next_multiple_of(LINE));
        self.room = rest;
        &mut taken[..self.runs.size()]
    }

    /// The first element of the first run.
    pub(crate) fn start(&self) -> usize {
        self.runs.start
    }

    /// The elements of a tensor, one run after the other.
    ///
    /// # Safety
    /// The runs lie inside the tensor, and no thread writes their elements. The result is read no longer than the room lives.
    pub(crate) unsafe fn pack<'t>(&mut self, tensor: Source<'t, E>) -> Source<'t, E> {
        let packed = self.take();
        let (to, mut done) = (packed.as_mut_ptr(), 0);
        self.views.of(tensor.side()).pieces(self.runs, |at, len| {
            // SAFETY: `len` elements of the runs lie at `at` in the tensor, and there is room for all runs.
            unsafe { copy(tensor.as_ptr().add(at), to.add(done), len) };
            done += len;
        });
        tensor.moved_to(to)
    }
}

impl<E: Element> Pack<'_, '_, E> {
    /// A one for each element whose bit is set, zeros for the others.
    pub(crate) fn unfold(&mut self, gates: Recorded<'_>) -> *const E {
        let unfolded = self.take();
        let elements = self.runs.starts().flat_map(|start| start..start + self.runs.len);
        for (to, at) in unfolded.iter_mut().zip(elements) {
            *to = E::from_param(gates.sign(at));
        }
        unfolded.as_ptr()
    }
}

/// What reads tensors, and can read packed ones in their place.
pub(crate) trait Packs<E: Storage>: Copy {
    /// The same over packed tensors.
    ///
    /// # Safety
    /// As [`Pack::pack`], for all tensors; the result lives no longer than the room of `pack`.
    unsafe fn packed(self, pack: &mut Pack<'_, '_, E>) -> Self;
}
