//! Passes over a tensor in blocks: a group of channels over some positions, as a matrix in f64 that stays in a cache.
//!
//! Blocks and the order in which they are merged follow from the shape alone.

use core::ops::Range;
use std::sync::OnceLock;

use faer::{Mat, MatMut, MatRef};

use super::statistics::{Crossed, Group, Moments};
use super::{Map, groups_of, matrix};
use crate::element::{Element, Real};
use crate::grid::for_each_piece;
use crate::shape::{Layout, Shape};
use crate::tensor::Disjoint;

/// Values of a block: two or three of them share a second-level cache.
const BLOCK: usize = 16 << 10;
/// The fewest positions of a block, so that products of matrices have something to do, and the most, beyond which those of
/// few channels take longer.
const POSITIONS: [usize; 2] = [128, 1024];
/// Parts that a group's statistics are made of at most, and values of all of them together.
const PARTS: usize = 64;
const PART_VALUES: usize = 4 << 20;
/// Sums that go on side by side.
const LANES: usize = 8;

/// The values of `work` for each of `0..items`, by any of the threads.
pub(super) fn each<T: Send + Sync>(workers: usize, items: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let slots: Vec<OnceLock<T>> = (0..items).map(|_| OnceLock::new()).collect();
    for_each_piece(workers, items, &|_, range| range.for_each(|i| drop(slots[i].set(work(i)))));
    slots.into_iter().map(|slot| slot.into_inner().expect("each item is worked on")).collect()
}

/// How a tensor is cut.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub(super) shape: Shape,
    pub(super) group: usize,
    pub(super) workers: usize,
}

/// Some positions of a group of channels.
struct Block {
    channels: Range<usize>,
    positions: Range<usize>,
}

impl Grid {
    fn groups(&self) -> Vec<Range<usize>> {
        groups_of(self.shape.channels(), self.group).collect()
    }

    /// Positions of a block.
    fn width(&self) -> usize {
        (BLOCK / self.group).clamp(POSITIONS[0], POSITIONS[1])
    }

    fn blocks(&self) -> usize {
        self.shape.count().div_ceil(self.width())
    }

    fn block(&self, channels: &Range<usize>, block: usize) -> Block {
        let (width, count) = (self.width(), self.shape.count());
        Block { channels: channels.clone(), positions: block * width..((block + 1) * width).min(count) }
    }

    /// Values of each group of channels, from its blocks: parts of neighbouring blocks are made by `part` and joined in order by
    /// `join`.
    fn reduce<T: Send + Sync>(
        &self,
        part: impl Fn(usize, &mut dyn Iterator<Item = Block>) -> T + Sync,
        join: impl Fn(&mut T, T),
    ) -> Vec<T> {
        let (groups, blocks) = (self.groups(), self.blocks());
        let room = PART_VALUES / groups.len().saturating_mul(self.group * self.group);
        let parts = (PARTS / groups.len()).min(room).clamp(1, blocks.max(1));
        let mut made = each(self.workers, groups.len() * parts, |i| {
            let (g, p) = (i / parts, i % parts);
            part(g, &mut (blocks * p / parts..blocks * (p + 1) / parts).map(|b| self.block(&groups[g], b)))
        })
        .into_iter();
        let mut values = Vec::with_capacity(groups.len());
        while let Some(mut value) = made.next() {
            made.by_ref().take(parts - 1).for_each(|next| join(&mut value, next));
            values.push(value);
        }
        values
    }

    /// Mean and covariance of each group.
    pub(super) fn statistics<E: Element>(&self, x: &[E]) -> Vec<Moments> {
        let groups = self.groups();
        self.reduce(
            |g, blocks| {
                let mut moments = Moments::new(groups[g].clone());
                let mut panel = Panel::new(self);
                for block in blocks {
                    panel.gather(self.shape, x, &block);
                    moments.merge(&panel.moments(block.channels));
                }
                moments
            },
            |all, part| all.merge(&part),
        )
    }

    /// `dY Xc^T` and the sums of `dY`, of each group.
    pub(super) fn crossed<E: Element>(&self, x: &[E], dy: &[E], groups: &[Group]) -> Vec<Crossed> {
        self.reduce(
            |g, blocks| {
                let mut crossed = Crossed::new(groups[g].channels.len());
                let mut panels = [Panel::new(self), Panel::new(self)];
                for block in blocks {
                    let [x_panel, dy_panel] = &mut panels;
                    x_panel.gather(self.shape, x, &block);
                    x_panel.add(&groups[g].mean, -1.0);
                    dy_panel.gather(self.shape, dy, &block);
                    let (product, sums) = (crossed.product.as_mut(), dy_panel.sums());
                    matrix::add_product(product, dy_panel.matrix(), x_panel.matrix().transpose(), 1.0);
                    crossed.sums.iter_mut().zip(sums).for_each(|(sum, part)| *sum += part);
                }
                crossed
            },
            Crossed::add,
        )
    }

    /// `to + matrix (x - from)` of each group, of `y` itself without an `x`.
    pub(super) fn project<E: Element>(&self, x: Option<&[E]>, maps: &[Map], y: Disjoint<'_, E>) {
        self.map(maps.len(), |g, block, [panel, out, _]| {
            let map = &maps[g];
            match x {
                Some(x) => panel.gather(self.shape, x, &block),
                // SAFETY: see `map`; what is read of a run is let go before the next one.
                None => panel.gather_with(self.shape, &block, |run| unsafe { y.slice(run) }),
            }
            panel.add(&map.from, -1.0);
            out.fit(&block);
            matrix::set_product(out.matrix_mut(), map.matrix.as_ref(), panel.matrix());
            out.add(&map.to, 1.0);
            // SAFETY: see `map`.
            unsafe { out.scatter(self.shape, y, &block) }
        });
    }

    /// The sum of two such maps, of `dy` and of `x`.
    pub(super) fn gradient<E: Element>(&self, x: &[E], dy: &[E], maps: &[[Map; 2]], dx: Disjoint<'_, E>) {
        self.map(maps.len(), |g, block, [x_panel, dy_panel, out]| {
            let [of_dy, of_x] = &maps[g];
            x_panel.gather(self.shape, x, &block);
            x_panel.add(&of_x.from, -1.0);
            dy_panel.gather(self.shape, dy, &block);
            dy_panel.add(&of_dy.from, -1.0);
            out.fit(&block);
            matrix::set_product(out.matrix_mut(), of_dy.matrix.as_ref(), dy_panel.matrix());
            matrix::add_product(out.matrix_mut(), of_x.matrix.as_ref(), x_panel.matrix(), 1.0);
            // SAFETY: see `map`.
            unsafe { out.scatter(self.shape, dx, &block) }
        });
    }

    /// Calls `work` for each block of each group once, so that what it writes of the block is its own, with panels that keep
    /// nothing.
    fn map(&self, groups: usize, work: impl Fn(usize, Block, &mut [Panel; 3]) + Sync) {
        let (channels, blocks) = (self.groups(), self.blocks());
        for_each_piece(self.workers, groups * blocks, &|_, range| {
            let mut panels = [(); 3].map(|()| Panel::new(self));
            for i in range {
                // Groups go together where a position holds all of them.
                let (g, b) = (i % groups, i / groups);
                work(g, self.block(&channels[g], b), &mut panels);
            }
        });
    }
}

/// A block as a matrix in f64, with a row for each channel, in the order of memory of the tensor's layout.
struct Panel {
    values: Vec<f64>,
    channels: usize,
    width: usize,
    layout: Layout,
}

impl Panel {
    fn new(grid: &Grid) -> Self {
        Self { values: Vec::new(), channels: 0, width: 0, layout: grid.shape.layout() }
    }

    fn fit(&mut self, block: &Block) {
        (self.channels, self.width) = (block.channels.len(), block.positions.len());
        self.values.resize(self.channels * self.width, 0.0);
    }

    fn matrix(&self) -> MatRef<'_, f64> {
        match self.layout {
            Layout::ChannelsFirst => MatRef::from_row_major_slice(&self.values, self.channels, self.width),
            Layout::ChannelsLast => MatRef::from_column_major_slice(&self.values, self.channels, self.width),
        }
    }

    fn matrix_mut(&mut self) -> MatMut<'_, f64> {
        match self.layout {
            Layout::ChannelsFirst => MatMut::from_row_major_slice_mut(&mut self.values, self.channels, self.width),
            Layout::ChannelsLast => MatMut::from_column_major_slice_mut(&mut self.values, self.channels, self.width),
        }
    }

    /// Reads a block.
    fn gather<E: Element>(&mut self, shape: Shape, x: &[E], block: &Block) {
        self.gather_with(shape, block, |run| &x[run]);
    }

    /// Reads a block of a tensor whose runs `read` gives.
    fn gather_with<'x, E: Element>(&mut self, shape: Shape, block: &Block, read: impl Fn(Range<usize>) -> &'x [E]) {
        self.fit(block);
        for (from, to, len) in runs(shape, block) {
            for (value, x) in self.values[to..to + len].iter_mut().zip(read(from..from + len)) {
                *value = x.to_param().to_f64();
            }
        }
    }

    /// Writes a block.
    ///
    /// # Safety
    /// No other thread accesses the block meanwhile.
    unsafe fn scatter<E: Element>(&self, shape: Shape, y: Disjoint<'_, E>, block: &Block) {
        for (to, from, len) in runs(shape, block) {
            // SAFETY: the run belongs to the block.
            let y = unsafe { y.slice(to..to + len) };
            for (y, &value) in y.iter_mut().zip(&self.values[from..from + len]) {
                *y = E::from_param(E::Param::from_f64(value));
            }
        }
    }

    /// Adds a multiple of `by` to each position.
    fn add(&mut self, by: &[f64], times: f64) {
        match self.layout {
            Layout::ChannelsFirst => {
                for (row, by) in self.values.chunks_exact_mut(self.width).zip(by) {
                    row.iter_mut().for_each(|value| *value += by * times);
                }
            }
            Layout::ChannelsLast => {
                for column in self.values.chunks_exact_mut(self.channels) {
                    column.iter_mut().zip(by).for_each(|(value, by)| *value += by * times);
                }
            }
        }
    }

    /// The sum of each channel.
    fn sums(&self) -> Vec<f64> {
        match self.layout {
            Layout::ChannelsFirst => self.values.chunks_exact(self.width).map(sum).collect(),
            Layout::ChannelsLast => {
                let mut sums = vec![0.0; self.channels];
                for column in self.values.chunks_exact(self.channels) {
                    sums.iter_mut().zip(column).for_each(|(sum, value)| *sum += value);
                }
                sums
            }
        }
    }

    /// Mean and squared deviations of the block, whose values become the deviations.
    fn moments(&mut self, channels: Range<usize>) -> Moments {
        // Sums of what is left of a value of each channel round less.
        let first: Vec<f64> = self.matrix().col(0).iter().copied().collect();
        self.add(&first, -1.0);
        let rest: Vec<f64> = self.sums().iter().map(|sum| sum / self.width as f64).collect();
        self.add(&rest, -1.0);
        let mut squares = Mat::zeros(channels.len(), channels.len());
        matrix::add_square(squares.as_mut(), self.matrix());
        let mean = first.iter().zip(&rest).map(|(first, rest)| first + rest).collect();
        Moments { channels, count: self.width as u64, mean, squares }
    }
}

fn sum(values: &[f64]) -> f64 {
    let (lanes, rest) = values.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for values in lanes {
        sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
    sums.iter().chain(rest).sum()
}

/// The runs of a block: where each begins in the tensor and in the panel, and its length.
fn runs(shape: Shape, block: &Block) -> impl Iterator<Item = (usize, usize, usize)> {
    let (channels, first, group) = (shape.channels(), block.channels.start, block.channels.len());
    let (start, end, width) = (block.positions.start, block.positions.end, block.positions.len());
    // Where channels are last, each position is a plane of its own with a single row, of all the group's channels.
    let (plane, rows, at_a_position) = match shape.layout() {
        Layout::ChannelsFirst => (shape.spatial(), group, 1),
        Layout::ChannelsLast => (1, 1, group),
    };
    (start / plane..end.div_ceil(plane)).flat_map(move |n| {
        let (from, to) = ((n * plane).max(start), ((n + 1) * plane).min(end));
        (0..rows).map(move |row| {
            let in_tensor = (n * channels + first + row) * plane + (from - n * plane);
            (in_tensor, row * width + (from - start) * at_a_position, (to - from) * at_a_position)
        })
    })
}
