//! What the cases share: ways to split a batch, and comparison between ranks.

use std::cell::Cell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use batchnorm::{Element, Real, Saved, Shape};
use mpi::collective::SystemOperation;
use mpi::topology::SimpleCommunicator;
use mpi::traits::*;

use crate::common::Bits;

/// How the samples of a batch are split.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Cut {
    Even,
    /// Shards of 1, 2, 3, ... parts.
    Ascending,
    /// One sample for each rank and the rest for the last.
    OneEach,
    /// None for the ranks 0, 2, 4, ..., unless one is the last.
    Gaps,
}

impl Cut {
    /// The samples of each rank.
    pub fn ranges(self, samples: usize, ranks: usize) -> Vec<Range<usize>> {
        let weight = |rank| match self {
            Cut::Even | Cut::OneEach => 1,
            Cut::Ascending => rank + 1,
            Cut::Gaps if rank % 2 == 0 && rank + 1 < ranks => 0,
            Cut::Gaps => 1,
        };
        let total: usize = (0..ranks).map(weight).sum();
        let end = |rank: usize| match self {
            Cut::OneEach if rank + 1 < ranks => (rank + 1).min(samples),
            _ => samples * (0..=rank).map(weight).sum::<usize>() / total,
        };
        let ranges: Vec<_> = (0..ranks).map(|rank| if rank == 0 { 0 } else { end(rank - 1) }..end(rank)).collect();
        assert_eq!(ranges.iter().map(Range::len).sum::<usize>(), samples);
        ranges
    }
}

/// The part of a batch that a rank has: samples lie one after the other in all layouts.
#[derive(Clone)]
pub struct Shard {
    pub shape: Shape,
    pub samples: Range<usize>,
    /// Of the tensor.
    pub elements: Range<usize>,
}

impl Shard {
    pub fn new(world: &SimpleCommunicator, joined: &Shape, cut: Cut) -> Self {
        let samples = cut.ranges(joined.batch(), world.size() as usize)[world.rank() as usize].clone();
        let sample = joined.len() / joined.batch();
        let shape = Shape::new(joined.layout(), samples.len(), joined.channels(), &[joined.spatial()]).unwrap();
        Self { shape, elements: samples.start * sample..samples.end * sample, samples }
    }
}

/// The tensor of which each rank has a part.
pub fn assemble<E: Element>(world: &SimpleCommunicator, len: usize, elements: &Range<usize>, part: &[E]) -> Vec<f64> {
    let (mut padded, mut joined) = (vec![0.0; len], vec![0.0; len]);
    padded[elements.clone()].copy_from_slice(&wide(part));
    world.all_reduce_into(&padded, &mut joined, SystemOperation::sum());
    joined
}

pub fn wide<E: Element>(values: &[E]) -> Vec<f64> {
    values.iter().map(|v| v.to_param().to_f64()).collect()
}

pub fn bits<T: Bits>(values: &[T]) -> Vec<u64> {
    values.iter().map(|v| v.bits()).collect()
}

pub fn bits_of_saved<P: Real + Bits>(saved: &Saved<P>) -> Vec<u64> {
    let fields = [saved.mean(), saved.residue(), saved.var(), saved.inv_std()];
    [vec![saved.count()], fields.map(bits).concat()].concat()
}

pub fn digest(bits: &[u64]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bits.hash(&mut hasher);
    hasher.finish()
}

pub fn gather(world: &SimpleCommunicator, value: u64) -> Vec<u64> {
    let mut all = vec![0; world.size() as usize];
    world.all_gather_into(&value, &mut all[..]);
    all
}

/// Asserts that all ranks hold the same.
#[track_caller]
pub fn assert_same(world: &SimpleCommunicator, what: &str, bits: &[u64]) {
    let all = gather(world, digest(bits));
    assert!(all.iter().all(|other| *other == all[0]), "{what} differs between ranks: {all:x?}");
}

thread_local!(static EXPECTED: Cell<bool> = const { Cell::new(false) });

/// Whether a panic is part of the case.
pub fn panics_are_expected() -> bool {
    EXPECTED.get()
}

/// Runs what is to panic.
pub fn catch(work: impl FnOnce()) {
    EXPECTED.set(true);
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).expect_err("a panic");
    EXPECTED.set(false);
}
