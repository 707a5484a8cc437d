//! MSI-X (PCI 3.0, 6.8.2): a table of vectors, a pending bit for each, and two bits of control.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::interrupts::{Message, MessageInterrupt, Router};
use crate::persist::{StateError, ensure};

/// Size of a table entry.
pub const ENTRY_SIZE: u64 = 16;
/// Capability ID.
pub const CAPABILITY: u8 = 0x11;
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;
const VECTOR_MASK: u32 = 1;

/// One entry of the table as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Message to send.
    pub message: Message,
    /// Vector control.
    pub control: u32,
}

/// State of a function's MSI-X capability.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    /// Table.
    pub entries: Vec<Entry>,
    /// Pending bits.
    pub pending: Vec<bool>,
    /// Message control: enable and function mask.
    pub control: u16,
}

/// MSI-X of one function; shared by the transport, which the guest programs, and the device's threads.
pub struct Msix {
    state: Mutex<MsixState>,
    vectors: Vec<MessageInterrupt>,
}

impl Msix {
    /// `count` vectors, all masked.
    pub fn new(router: &Arc<Router>, count: u16) -> Result<Arc<Msix>, kvm_ioctls::Error> {
        let vectors = (0..count)
            .map(|_| router.allocate())
            .collect::<Result<Vec<_>, _>>()?;
        let entry = Entry {
            message: Message::default(),
            control: VECTOR_MASK,
        };
        Ok(Arc::new(Msix {
            state: Mutex::new(MsixState {
                entries: vec![entry; vectors.len()],
                pending: vec![false; vectors.len()],
                control: 0,
            }),
            vectors,
        }))
    }

    /// A copy of the state.
    pub fn save(&self) -> MsixState {
        self.lock().clone()
    }

    /// Whether a state can be that of this table, with the message control that configuration space shows.
    pub fn check(&self, part: &str, saved: &MsixState, control: u16) -> Result<(), StateError> {
        let count = self.vectors.len();
        ensure(
            saved.entries.len() == count && saved.pending.len() == count,
            part,
            || {
                format!(
                    "it has {} MSI-X vectors and {} pending bits where {count} of each are",
                    saved.entries.len(),
                    saved.pending.len()
                )
            },
        )?;
        ensure(saved.control == control & (ENABLE | FUNCTION_MASK), part, || {
            format!(
                "MSI-X control {:#x} is not what its capability says",
                saved.control
            )
        })?;
        let unknown = saved
            .entries
            .iter()
            .find(|entry| entry.control & !VECTOR_MASK != 0);
        ensure(unknown.is_none(), part, || {
            "an MSI-X vector has control bits that are reserved".to_owned()
        })
    }

    /// Takes over a state that was checked and routes its vectors. Nothing is sent.
    pub fn restore(&self, part: &str, saved: &MsixState) -> Result<(), StateError> {
        let mut state = self.lock();
        for (vector, entry) in self.vectors.iter().zip(&saved.entries) {
            let unmasked =
                (saved.control & (ENABLE | FUNCTION_MASK) == ENABLE) && entry.control & VECTOR_MASK == 0;
            if unmasked {
                vector.route(entry.message).map_err(|source| StateError::Os {
                    part: part.to_owned(),
                    action: "routing an MSI-X vector",
                    source: source.into(),
                })?;
            }
        }
        *state = saved.clone();
        Ok(())
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Sends the message of `vector`, or remembers it while it is masked. Vectors that do not exist, such
    /// as `VIRTIO_MSI_NO_VECTOR`, are ignored.
    pub fn raise(&self, vector: u16) {
        let mut state = self.lock();
        let index = usize::from(vector);
        if state.control & ENABLE == 0 || index >= self.vectors.len() {
            return;
        }
        if state.control & FUNCTION_MASK != 0 || state.entries[index].control & VECTOR_MASK != 0 {
            state.pending[index] = true;
        } else {
            self.vectors[index].raise();
        }
    }

    /// The guest has written message control.
    pub fn set_control(&self, control: u16) {
        let mut state = self.lock();
        state.control = control & (ENABLE | FUNCTION_MASK);
        for index in 0..self.vectors.len() {
            self.settle(&mut state, index);
        }
    }

    /// Reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (byte, offset) in data.iter_mut().zip(offset..) {
            *byte = state
                .entries
                .get((offset / ENTRY_SIZE) as usize)
                .map_or(0, |entry| entry_bytes(entry)[(offset % ENTRY_SIZE) as usize]);
        }
    }

    /// Writes the table.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        let index = (offset / ENTRY_SIZE) as usize;
        let start = (offset % ENTRY_SIZE) as usize;
        let Some(entry) = state.entries.get_mut(index) else {
            return;
        };
        let mut bytes = entry_bytes(entry);
        for (old, new) in bytes[start..].iter_mut().zip(data) {
            *old = *new;
        }
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        *entry = Entry {
            message: Message {
                address: u64::from(word(0)) | u64::from(word(4)) << 32,
                data: word(8),
            },
            control: word(12) & VECTOR_MASK,
        };
        self.settle(&mut state, index);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (byte, offset) in data.iter_mut().zip(offset as usize..) {
            *byte = (0..8)
                .filter(|bit| state.pending.get(offset * 8 + bit).copied().unwrap_or(false))
                .fold(0, |byte, bit| byte | 1 << bit);
        }
    }

    /// Routes an unmasked vector and sends what has waited for it.
    fn settle(&self, state: &mut MsixState, index: usize) {
        let entry = state.entries[index];
        if state.control & ENABLE == 0
            || state.control & FUNCTION_MASK != 0
            || entry.control & VECTOR_MASK != 0
        {
            return;
        }
        if let Err(error) = self.vectors[index].route(entry.message) {
            tracing::error!(%error, vector = index, "MSI-X vector could not be routed; its interrupts are lost");
        }
        if std::mem::take(&mut state.pending[index]) {
            self.vectors[index].raise();
        }
    }

    fn lock(&self) -> MutexGuard<'_, MsixState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn entry_bytes(entry: &Entry) -> [u8; ENTRY_SIZE as usize] {
    let mut bytes = [0; ENTRY_SIZE as usize];
    bytes[0..8].copy_from_slice(&entry.message.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&entry.message.data.to_le_bytes());
    bytes[12..16].copy_from_slice(&entry.control.to_le_bytes());
    bytes
}
