//! The saved state of a disk's device.

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use crate::persist::{State, StateError, ensure};
use crate::virtio::buffers::MAX_PIECES;
use crate::virtio::device::QueueProgress;
use crate::virtio::ring::Chain;

/// What the device keeps beyond its queue's progress, version 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BlockState {
    /// Writes that were taken from the ring and wait at the closed gate or for room on the host, in order.
    /// Reads pass them, so that they cannot be put back into the ring.
    waiting: Vec<ChainState>,
}

/// A descriptor chain as it was taken from the ring. The driver must not change one that was not returned,
/// and may reuse its place in the available ring, so that the chain itself is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChainState {
    /// What is returned in the used ring.
    head: u16,
    /// Guest address and length of the device-readable pieces.
    readable: Vec<(u64, u32)>,
    /// Those of the device-writable pieces.
    writable: Vec<(u64, u32)>,
    /// Whether all readable pieces came before the writable ones.
    ordered: bool,
}

impl State for BlockState {
    const VERSION: u32 = 1;
}

impl BlockState {
    pub(super) fn of<'a>(chains: impl IntoIterator<Item = &'a Chain>) -> BlockState {
        let pieces = |pieces: &[(GuestAddress, u32)]| pieces.iter().map(|&(at, len)| (at.0, len)).collect();
        let waiting = chains.into_iter().map(|chain| ChainState {
            head: chain.head,
            readable: pieces(&chain.readable),
            writable: pieces(&chain.writable),
            ordered: chain.ordered,
        });
        BlockState {
            waiting: waiting.collect(),
        }
    }

    /// How many writes wait.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The chains, if they can have come from a queue that is so far. Where their pieces lie is checked as
    /// for every chain, when the request is carried out.
    pub(super) fn check(
        self,
        device: &str,
        queues: &[QueueProgress],
        queue_size: u16,
    ) -> Result<Vec<Chain>, StateError> {
        let outstanding: u16 = queues.iter().map(QueueProgress::outstanding).sum();
        ensure(self.waiting.len() <= usize::from(outstanding), device, || {
            format!(
                "{} writes wait, but only {outstanding} requests were not returned",
                self.waiting.len()
            )
        })?;
        for chain in &self.waiting {
            ensure(chain.head < queue_size, device, || {
                format!("the waiting write {} is beyond the queue", chain.head)
            })?;
            let count = chain.readable.len() + chain.writable.len();
            ensure(count <= MAX_PIECES + 2, device, || {
                format!("the waiting write {} has {count} pieces", chain.head)
            })?;
        }
        let pieces = |pieces: Vec<(u64, u32)>| {
            let pieces = pieces.into_iter();
            pieces.map(|(at, len)| (GuestAddress(at), len)).collect()
        };
        let chains = self.waiting.into_iter().map(|chain| Chain {
            head: chain.head,
            readable: pieces(chain.readable),
            writable: pieces(chain.writable),
            ordered: chain.ordered,
        });
        Ok(chains.collect())
    }
}
