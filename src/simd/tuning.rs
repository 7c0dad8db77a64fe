//! What CPUs of each tier were measured to be fastest with, where they differ: a Zen 3 for AVX2, which stands for the portable tier
//! too, and a Zen 5 for AVX-512. No bits depend on it. docs/performance.md has the figures.

use super::Tier;

/// See the module.
pub(crate) struct Tuning {
    /// Bytes that a reduction of a single tensor of short planes reads at least for the pass to go over it once; of several tensors, and
    /// of long planes, see the passes.
    pub(crate) fused_of_one: usize,
    /// Bytes of the shortest planes of tensors that wait in a third-level cache, of one whose results are stored through that and of
    /// several, over which a pass goes once.
    pub(crate) fused_in_caches: [usize; 2],
    /// Whether a lone thread reads four images from memory as fast as it could ask for them, since the CPU foresees these images.
    pub(crate) keeps_up: bool,
    /// Whether what comes from memory is summed beside what is written, rather than asked for and summed after that.
    pub(crate) beside_from_memory: bool,
    /// Bytes of several tensors of long planes from which on the next batch is asked for: of fewer, what some cache still has comes sooner.
    pub(crate) asked_of_several: usize,
    /// Bytes of the channels of a batch, where the next one is left alone: it may fill a second-level cache.
    pub(crate) left_batch: usize,
    /// The same where the next one is asked for while this one is mapped: both are to wait in a cache near by.
    pub(crate) asked_batch: usize,
    /// Bytes that are asked for ahead of the runs of all tensors that are summed at a time, from a third-level cache and from memory; if
    /// none, it depends on the tensors.
    pub(crate) ahead_of_runs: Option<[usize; 2]>,
    /// Bytes that are asked for ahead in a batch that is mapped, where the next one is not: it may wait in a third-level cache.
    pub(crate) ahead_of_mapped: usize,
    /// Bytes of each of several tensors, of long planes and of rows, from which on nothing is asked for ahead while they are mapped past
    /// the caches: CPUs foresee it sooner.
    pub(crate) foreseen: [usize; 2],
    /// Bytes of a tensor from which on hardly any of it is found in a cache: of the only one that a reduction reads, of each of several.
    pub(crate) from_memory: [usize; 2],
    /// Bytes of the longest rows, once widened, that are asked for in the order of their addresses while they are reduced, from memory,
    /// by one thread and by more: of a single tensor or of half floats, and of each of several tensors of others.
    pub(crate) in_order: [[usize; 2]; 2],
    /// Bytes, once widened, that these are asked for ahead.
    pub(crate) ahead_in_order: [usize; 2],
    /// The most that is asked for ahead in each of longer rows that are reduced at a time, of half a row.
    pub(crate) ahead_in_rows: [usize; 2],
    /// Bytes of the rows of two to four vectors, once widened, which are reduced one after the other.
    pub(crate) short_rows: &'static [usize],
    /// Bytes, once widened, that are asked for ahead in these, of one tensor and of several: in caches and, if there too, from memory.
    pub(crate) ahead_in_short_rows: [(usize, Option<usize>); 2],
    /// Whether other rows in caches are reduced in a loop of their own, without a look at what is left of them.
    pub(crate) near_rows_apart: bool,
    /// Whether a tensor is mapped from its end, which was read last, rather than in the order that the CPU foresees.
    pub(crate) maps_backwards: bool,
    /// Vectors of parameters that fit the registers beside what is made of them while rows are mapped; none if rows are no faster so.
    pub(crate) kept_params: usize,
    /// Whether longer rows are mapped in pairs that share the loads of their parameters, in the caches.
    pub(crate) pairs_rows: bool,
    /// Bytes of the parameters of a row that stay in a first-level cache beside the tensors.
    pub(crate) crowded: usize,
    /// Bytes of the parameters of the strips that rows with more are cut into.
    pub(crate) strip: usize,
    /// The fewest bytes of a row that are worth going to before the next row.
    pub(crate) least_strip: usize,
    /// Bytes that are asked for ahead of rows as long or longer which are mapped; if none, as many as of others.
    pub(crate) ahead_in_mapped_rows: Option<usize>,
}

impl Tier {
    /// What its CPUs are fastest with.
    pub(crate) const fn tuning(self) -> &'static Tuning {
        match self {
            Tier::Portable | Tier::Avx2 => &Tuning {
                fused_of_one: 8 << 20,
                fused_in_caches: [2 << 10; 2],
                keeps_up: true,
                beside_from_memory: true,
                asked_of_several: 0,
                left_batch: 1200 << 10,
                asked_batch: 600 << 10,
                ahead_of_runs: None,
                ahead_of_mapped: 1 << 10,
                foreseen: [usize::MAX; 2],
                from_memory: [16 << 20, 6 << 20],
                in_order: [[4 << 10, 4 << 10]; 2],
                ahead_in_order: [16 << 10, 16 << 10],
                ahead_in_rows: [512, 512],
                short_rows: &[],
                ahead_in_short_rows: [(0, None); 2],
                near_rows_apart: false,
                maps_backwards: true,
                kept_params: 0,
                pairs_rows: false,
                crowded: 16 << 10,
                strip: 16 << 10,
                least_strip: 4 << 10,
                ahead_in_mapped_rows: Some(1 << 10),
            },
            Tier::Avx512 => &Tuning {
                fused_of_one: 16 << 20,
                fused_in_caches: [usize::MAX, 4 << 10],
                keeps_up: false,
                beside_from_memory: false,
                asked_of_several: 128 << 20,
                left_batch: 400 << 10,
                asked_batch: 300 << 10,
                ahead_of_runs: Some([4 << 10, 12 << 10]),
                ahead_of_mapped: 2 << 10,
                foreseen: [20 << 20, 40 << 20],
                from_memory: [16 << 20, 8 << 20],
                in_order: [[2 << 10, 512], [2 << 10, 2 << 10]],
                ahead_in_order: [8 << 10, 4 << 10],
                ahead_in_rows: [2 << 10, 1 << 10],
                short_rows: &[128, 192, 256],
                ahead_in_short_rows: [(2 << 10, Some(12 << 10)), (3 << 10, None)],
                near_rows_apart: true,
                maps_backwards: false,
                kept_params: 24,
                pairs_rows: true,
                crowded: 24 << 10,
                strip: 12 << 10,
                least_strip: 2 << 10,
                ahead_in_mapped_rows: None,
            },
        }
    }
}
