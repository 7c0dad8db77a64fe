//! A process group: what the ranks agree on, and how they merge what each of them holds.

use core::mem::ManuallyDrop;

use batchnorm::{BatchNorm, Element};
use mpi::Rank;
use mpi::collective::{SystemOperation, UnsafeUserOperation};
use mpi::datatype::traits::Equivalence;
use mpi::request::{LocalScope, Request, Scope};
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives};

use crate::error::{Error, Result};
use crate::wire::{Wire, WireMoments, WireSums};

/// A communicator of its own, so that no other message is mistaken for one of these, and the operations.
pub(crate) struct Group {
    comm: ManuallyDrop<SimpleCommunicator>,
    pub(crate) moments: ManuallyDrop<UnsafeUserOperation>,
    pub(crate) sums: ManuallyDrop<UnsafeUserOperation>,
}

impl Drop for Group {
    fn drop(&mut self) {
        // With MPI gone, so are its objects.
        if !mpi::is_finalized() {
            // SAFETY: nothing uses them after this.
            unsafe {
                ManuallyDrop::drop(&mut self.moments);
                ManuallyDrop::drop(&mut self.sums);
                ManuallyDrop::drop(&mut self.comm);
            }
        }
    }
}

impl Group {
    /// The group of `comm`, if all of its ranks have the same in mind.
    pub(crate) fn agree<E: Element>(bn: &BatchNorm<E>, comm: &impl Communicator) -> Result<Self> {
        let channels = bn.shape().channels();
        // Adding 0 makes -0 a 0. Of numbers at least 0 the bits are ordered as they are.
        let mine = [channels as u64, u64::from(E::DIGITS), (bn.eps() + 0.0).to_bits()];
        // The most of the complements is the complement of the least.
        let both: [u64; 6] = core::array::from_fn(|i| if i < 3 { mine[i] } else { !mine[i - 3] });
        let mut most = [0; 6];
        comm.all_reduce_into(&both, &mut most, SystemOperation::max());
        let least = [!most[3], !most[4], !most[5]];
        if least[0] != most[0] {
            return Err(Error::Channels { least: least[0], most: most[0] });
        }
        if least[1] != most[1] {
            return Err(Error::ElementType { one: element_type(least[1]), other: element_type(most[1]) });
        }
        if least[2] != most[2] {
            return Err(Error::Eps { least: f64::from_bits(least[2]), most: f64::from_bits(most[2]) });
        }
        // One element more than channels.
        if channels >= i32::MAX as usize {
            return Err(Error::TooManyChannels { channels });
        }
        Ok(Self {
            comm: ManuallyDrop::new(comm.duplicate()),
            moments: ManuallyDrop::new(WireMoments::operation()),
            sums: ManuallyDrop::new(WireSums::operation()),
        })
    }

    pub(crate) fn size(&self) -> Rank {
        self.comm.size()
    }

    pub(crate) fn rank(&self) -> Rank {
        self.comm.rank()
    }

    /// The lowest rank for which `failed`. A collective.
    fn first(&self, failed: bool) -> Rank {
        let mine = if failed { self.rank() } else { self.size() };
        let mut first = mine;
        self.comm.all_reduce_into(&mine, &mut first, SystemOperation::min());
        first
    }
}

/// The name of the element type with that many digits.
fn element_type(digits: u64) -> &'static str {
    match digits {
        8 => "bf16",
        11 => "f16",
        24 => "f32",
        53 => "f64",
        _ => "an unknown type",
    }
}

/// How ranks wait for each other.
pub(crate) trait Meeting {
    /// What was done in the meantime.
    type Done;

    fn meet<W: Equivalence>(
        self,
        comm: &SimpleCommunicator,
        mine: &[W],
        merged: &mut [W],
        operation: &UnsafeUserOperation,
    ) -> Self::Done;
}

/// In the collective.
pub(crate) struct Blocking;

impl Meeting for Blocking {
    type Done = ();

    fn meet<W: Equivalence>(
        self,
        comm: &SimpleCommunicator,
        mine: &[W],
        merged: &mut [W],
        operation: &UnsafeUserOperation,
    ) {
        comm.all_reduce_into(mine, merged, operation);
    }
}

/// With other work.
pub(crate) struct During<F>(pub(crate) F);

impl<T, F: FnOnce(&mut Pending<'_>) -> T> Meeting for During<F> {
    type Done = T;

    fn meet<W: Equivalence>(
        self,
        comm: &SimpleCommunicator,
        mine: &[W],
        merged: &mut [W],
        operation: &UnsafeUserOperation,
    ) -> T {
        mpi::request::scope(|scope| {
            let mut waiting = Waiting(Some(comm.immediate_all_reduce_into(scope, mine, merged, operation)));
            (self.0)(&mut Pending(&mut || waiting.poll()))
        })
    }
}

/// A request that is waited for when it is dropped, also where the work beside it panics.
struct Waiting<'a, 's, W>(Option<Request<'a, [W], &'s LocalScope<'a>>>)
where
    &'s LocalScope<'a>: Scope<'a>;

impl<W> Waiting<'_, '_, W> {
    fn poll(&mut self) -> bool {
        self.0 = self.0.take().and_then(|request| request.test().err());
        self.0.is_none()
    }
}

impl<W> Drop for Waiting<'_, '_, W> {
    fn drop(&mut self) {
        if let Some(request) = self.0.take() {
            request.wait_without_status();
        }
    }
}

/// A collective that is under way.
pub struct Pending<'a>(&'a mut dyn FnMut() -> bool);

impl Pending<'_> {
    /// Whether the collective is complete on this rank; moves it on if not. MPI libraries that have no thread of their own, as
    /// Open MPI, move collectives on inside of calls alone: work that takes long should call this from time to time.
    pub fn poll(&mut self) -> bool {
        (self.0)()
    }
}

impl core::fmt::Debug for Pending<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Pending").finish_non_exhaustive()
    }
}

/// The values of this rank and those of all, by channel, with their messages. Kept between calls.
pub(crate) struct Exchange<W: Wire> {
    pub(crate) mine: Vec<W::Value>,
    pub(crate) merged: Vec<W::Value>,
    sent: Vec<W>,
    received: Vec<W>,
}

impl<W: Wire> Exchange<W> {
    pub(crate) fn new(channels: usize) -> Self {
        Self {
            mine: vec![W::Value::default(); channels],
            merged: vec![W::Value::default(); channels],
            sent: vec![W::default(); channels + 1],
            received: vec![W::default(); channels + 1],
        }
    }

    /// Merges `mine` of all ranks into `merged` on each of them, unless one has failed.
    pub(crate) fn merge<M: Meeting>(
        &mut self,
        group: &Group,
        own: batchnorm::Result<()>,
        meeting: M,
    ) -> Result<M::Done> {
        // What a rank that failed sends does not matter, as long as it sends it.
        self.sent[0] = if own.is_err() { W::failure() } else { W::default() };
        for (sent, mine) in self.sent[1..].iter_mut().zip(&self.mine) {
            *sent = W::pack(*mine);
        }
        let done = meeting.meet(&group.comm, &self.sent, &mut self.received, W::operation_of(group));
        if self.received[0].failures() > 0 {
            // Every rank comes here.
            let rank = group.first(own.is_err());
            own?;
            return Err(Error::Remote { rank });
        }
        for (merged, received) in self.merged.iter_mut().zip(&self.received[1..]) {
            *merged = received.unpack();
        }
        Ok(done)
    }

    /// Merges the values of a caller, one per channel, with those of all ranks.
    pub(crate) fn merge_given(&mut self, group: &Group, what: &'static str, values: &mut [W::Value]) -> Result<()> {
        let own = match (self.mine.len(), values.len()) {
            (expected, got) if expected != got => Err(batchnorm::Error::Length { what, expected, got }),
            _ => {
                self.mine.copy_from_slice(values);
                Ok(())
            }
        };
        self.merge(group, own, Blocking)?;
        values.copy_from_slice(&self.merged);
        Ok(())
    }
}
