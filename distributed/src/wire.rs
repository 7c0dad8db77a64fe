//! What crosses ranks: one element per channel, and the operations that MPI merges elements with.

use core::ffi::{c_int, c_void};

use batchnorm::{GradientSums, Moments};
use mpi::collective::UnsafeUserOperation;
use mpi::ffi::MPI_Datatype;
use mpi::traits::Equivalence;

use crate::group::Group;

/// One element of a message. The first of each message stands for no channel: merged, it counts the ranks that failed.
pub(crate) trait Wire: Equivalence + Copy + Default {
    /// What it carries.
    type Value: Copy + Default;

    fn pack(value: Self::Value) -> Self;
    fn unpack(self) -> Self::Value;
    /// This and what ranks above hold, in this order.
    fn merge(self, above: Self) -> Self;
    /// The first element of a rank that failed.
    fn failure() -> Self;
    /// How many did.
    fn failures(self) -> u64;
    /// What a group made of [`Wire::operation`].
    fn operation_of(group: &Group) -> &UnsafeUserOperation;

    /// The operation for MPI. Not commutative as far as MPI knows: then it keeps the order of ranks, and with it the bits.
    fn operation() -> UnsafeUserOperation {
        // SAFETY: `merge_all` reads and writes `len` elements of the type of this message, and that is what it is used for;
        // it does not panic.
        unsafe { UnsafeUserOperation::associative(merge_all::<Self>) }
    }
}

/// `above[i] = below[i] merged with above[i]`.
///
/// # Safety
/// `below` and `above` point to `len` elements of `W`, as MPI has it for a user function and the datatype of `W`.
unsafe extern "C" fn merge_all<W: Wire>(
    below: *mut c_void,
    above: *mut c_void,
    len: *mut c_int,
    _datatype: *mut MPI_Datatype,
) {
    let (below, above) = (below.cast::<W>(), above.cast::<W>());
    // SAFETY: the caller's promise. Unaligned accesses, because a library may merge in a buffer of its own.
    unsafe {
        for i in 0..usize::try_from(*len).unwrap_or(0) {
            let merged = below.add(i).read_unaligned().merge(above.add(i).read_unaligned());
            above.add(i).write_unaligned(merged);
        }
    }
}

/// [`Moments`] with a layout that is told to MPI.
#[derive(Clone, Copy, Default, Equivalence)]
#[repr(C)]
pub(crate) struct WireMoments {
    count: u64,
    mean: f64,
    residue: f64,
    m2: f64,
}

impl Wire for WireMoments {
    type Value = Moments;

    fn pack(Moments { count, mean, residue, m2 }: Moments) -> Self {
        Self { count, mean, residue, m2 }
    }

    fn unpack(self) -> Moments {
        let Self { count, mean, residue, m2 } = self;
        Moments { count, mean, residue, m2 }
    }

    fn merge(self, above: Self) -> Self {
        Self::pack(self.unpack().merge(above.unpack()))
    }

    fn failure() -> Self {
        Self { count: 1, ..Self::default() }
    }

    fn failures(self) -> u64 {
        self.count
    }

    fn operation_of(group: &Group) -> &UnsafeUserOperation {
        &group.moments
    }
}

/// [`GradientSums`] with a layout that is told to MPI.
#[derive(Clone, Copy, Default, Equivalence)]
#[repr(C)]
pub(crate) struct WireSums {
    dy: f64,
    dy_xhat: f64,
}

impl Wire for WireSums {
    type Value = GradientSums;

    fn pack(GradientSums { dy, dy_xhat }: GradientSums) -> Self {
        Self { dy, dy_xhat }
    }

    fn unpack(self) -> GradientSums {
        let Self { dy, dy_xhat } = self;
        GradientSums { dy, dy_xhat }
    }

    fn merge(self, above: Self) -> Self {
        Self::pack(self.unpack().merge(above.unpack()))
    }

    fn failure() -> Self {
        Self { dy: 1.0, ..Self::default() }
    }

    fn failures(self) -> u64 {
        // A small integer.
        self.dy as u64
    }

    fn operation_of(group: &Group) -> &UnsafeUserOperation {
        &group.sums
    }
}
