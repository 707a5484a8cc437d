//! Requests of the block device's ring (virtio 1.2, 5.2.6). Everything in them comes from the guest.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Address, GuestAddress};

use super::SECTOR;
use crate::machine::memory::GuestMemoryMmap;
use crate::virtio::buffers::Buffers;
use crate::virtio::ring::Chain;

/// Length of a request's header: type, reserved, sector.
const HEADER: u64 = 16;

/// Length of one discard or write-zeroes segment: sector, number of sectors, flags.
const SEGMENT: u64 = 16;

/// Most segments in one discard or write-zeroes request.
pub(super) const MAX_SEGMENTS: u64 = 32;

/// Most sectors in one discard or write-zeroes segment: 1 GiB.
pub(super) const MAX_SEGMENT_SECTORS: u32 = 1 << 21;

/// Longest data of a read or write. Linux stays far below; more would keep the disk's worker for long.
const MAX_DATA: u64 = 64 << 20;

/// What the guest wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Read at the byte offset.
    Read(u64),
    /// Write at the byte offset.
    Write(u64),
    /// Make completed writes durable.
    Flush,
    /// Byte ranges (offset, length) to read as zeros: discard and write-zeroes alike.
    Zero(Vec<(u64, u64)>),
    /// The disk's serial.
    GetId,
    /// No type that was offered.
    Unsupported,
    /// Malformed.
    Invalid,
}

/// One request, with no borrow of guest memory, so that it can wait.
#[derive(Clone, Debug)]
pub(super) struct Request {
    /// Head of its descriptor chain: what is returned in the used ring.
    pub(super) head: u16,
    /// What the guest wants.
    pub(super) operation: Operation,
    /// Where data are, without header and status.
    pub(super) data: Vec<(GuestAddress, u32)>,
    /// Length of `data` in bytes.
    pub(super) data_len: u64,
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
}

impl Request {
    /// Parses a chain in whatever way the driver framed it (virtio 1.2, 2.7.4); `None` when there is no
    /// place for a status, so that nothing can be answered.
    pub(super) fn parse(memory: &GuestMemoryMmap, chain: &Chain) -> Option<Request> {
        let Chain {
            head,
            readable,
            mut writable,
            ordered,
        } = chain.clone();
        let status = split_last_byte(&mut writable)?;
        let mut request = Request {
            head,
            operation: Operation::Invalid,
            data: Vec::new(),
            data_len: 0,
            status,
        };
        let mut header = [0; HEADER as usize];
        let Some(payload) = split_front(memory, readable, &mut header) else {
            return Some(request);
        };
        if !ordered {
            return Some(request);
        }
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let kind = word(0) as u32;
        let offset = word(8).checked_mul(SECTOR);
        let (operation, data) = match (kind, offset) {
            (VIRTIO_BLK_T_IN, Some(offset)) => (Operation::Read(offset), writable),
            (VIRTIO_BLK_T_OUT, Some(offset)) => (Operation::Write(offset), payload),
            (VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT, None) => return Some(request),
            (VIRTIO_BLK_T_FLUSH, _) => (Operation::Flush, Vec::new()),
            (VIRTIO_BLK_T_GET_ID, _) => (Operation::GetId, writable),
            (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES, _) => {
                match parse_segments(memory, &payload, kind) {
                    Ok(ranges) => (Operation::Zero(ranges), Vec::new()),
                    Err(operation) => (operation, Vec::new()),
                }
            }
            _ => (Operation::Unsupported, Vec::new()),
        };
        let len: u64 = data.iter().map(|&(_, len)| u64::from(len)).sum();
        let valid = match operation {
            Operation::Read(_) | Operation::Write(_) => {
                len > 0 && len.is_multiple_of(SECTOR) && len <= MAX_DATA
            }
            Operation::GetId => len >= u64::from(VIRTIO_BLK_ID_BYTES),
            _ => true,
        };
        if valid {
            request.operation = operation;
            request.data = data;
            request.data_len = len;
        }
        Some(request)
    }

    /// Whether the request changes the disk or its durability, so that it stands behind the write gate.
    pub(super) fn is_write(&self) -> bool {
        matches!(
            self.operation,
            Operation::Write(_) | Operation::Zero(_) | Operation::Flush
        )
    }

    /// Whether it counts as a completed write.
    pub(super) fn is_counted(&self) -> bool {
        matches!(self.operation, Operation::Write(_) | Operation::Zero(_))
    }
}

/// Takes the last byte off the writable part.
fn split_last_byte(writable: &mut Vec<(GuestAddress, u32)>) -> Option<GuestAddress> {
    while let Some((address, len)) = writable.last_mut() {
        if *len == 0 {
            writable.pop();
            continue;
        }
        *len -= 1;
        return address.checked_add(u64::from(*len));
    }
    None
}

/// Copies the first bytes out into `front` and returns what is left; `None` when there are too few or
/// they are not in RAM.
fn split_front(
    memory: &GuestMemoryMmap,
    pieces: Vec<(GuestAddress, u32)>,
    front: &mut [u8],
) -> Option<Vec<(GuestAddress, u32)>> {
    let mut need = front.len() as u32;
    let mut first = Vec::new();
    let mut rest = Vec::with_capacity(pieces.len());
    for (address, len) in pieces {
        let take = need.min(len);
        if take > 0 {
            first.push((address, take));
            need -= take;
        }
        if len > take {
            rest.push((address.checked_add(u64::from(take))?, len - take));
        }
    }
    if need > 0 || Buffers::from_guest(memory, &first)?.copy_to(front) < front.len() {
        return None;
    }
    Some(rest)
}

/// Reads discard or write-zeroes segments (virtio 1.2, 5.2.6.2).
fn parse_segments(
    memory: &GuestMemoryMmap,
    payload: &[(GuestAddress, u32)],
    kind: u32,
) -> Result<Vec<(u64, u64)>, Operation> {
    let len: u64 = payload.iter().map(|&(_, len)| u64::from(len)).sum();
    if len == 0 || !len.is_multiple_of(SEGMENT) || len > MAX_SEGMENTS * SEGMENT {
        return Err(Operation::Invalid);
    }
    let mut bytes = vec![0; len as usize];
    let copied = Buffers::from_guest(memory, payload).map(|buffers| buffers.copy_to(&mut bytes));
    if copied != Some(bytes.len()) {
        return Err(Operation::Invalid);
    }
    let mut ranges = Vec::new();
    for segment in bytes.chunks_exact(SEGMENT as usize) {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| segment[at + i]));
        let sectors = word(8) as u32;
        let flags = (word(8) >> 32) as u32;
        // The unmap bit is for write-zeroes only; unknown bits are refused (virtio 1.2, 5.2.6.2).
        let allowed = if kind == VIRTIO_BLK_T_WRITE_ZEROES { 1 } else { 0 };
        if flags & !allowed != 0 {
            return Err(Operation::Unsupported);
        }
        let offset = word(0).checked_mul(SECTOR).ok_or(Operation::Invalid)?;
        if sectors > MAX_SEGMENT_SECTORS {
            return Err(Operation::Invalid);
        }
        ranges.push((offset, u64::from(sectors) * SECTOR));
    }
    Ok(ranges)
}
