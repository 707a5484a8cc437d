//! Memory that a block request reads from or writes to: guest RAM in pieces, or a host buffer.

use std::io;

use vm_memory::bitmap::{AtomicBitmap, Bitmap, RefSlice};
use vm_memory::{GuestAddress, GuestMemory, Permissions, VolatileSlice};

use crate::machine::memory::GuestMemoryMmap;

/// Most pieces that one request may have. Linux stays far below (`seg_max`); a driver that sends more
/// gets an error, so that no request costs unbounded memory.
pub const MAX_PIECES: usize = 1024;

/// One piece. Guest RAM has a bitmap of the pages that were written, a host buffer has none.
pub type Piece<'a> = VolatileSlice<'a, Option<RefSlice<'a, AtomicBitmap>>>;

/// An ordered list of memory pieces that is read or written as if it were one buffer.
#[derive(Clone, Default)]
pub struct Buffers<'a> {
    pieces: Vec<Piece<'a>>,
    len: u64,
}

impl<'a> Buffers<'a> {
    /// One host buffer.
    pub fn from_slice(buffer: &'a mut [u8]) -> Buffers<'a> {
        Buffers {
            len: buffer.len() as u64,
            pieces: vec![host_piece(buffer)],
        }
    }

    /// Guest RAM at the given addresses and lengths; `None` where an address is no RAM.
    pub fn from_guest(memory: &'a GuestMemoryMmap, ranges: &[(GuestAddress, u32)]) -> Option<Buffers<'a>> {
        let mut buffers = Buffers::default();
        for &(address, len) in ranges {
            for slice in memory
                .get_slices(address, len as usize, Permissions::ReadWrite)
                .ok()?
            {
                buffers.push(guest_piece(&slice.ok()?));
            }
        }
        Some(buffers)
    }

    fn push(&mut self, piece: Piece<'a>) {
        if !piece.is_empty() {
            self.len += piece.len() as u64;
            self.pieces.push(piece);
        }
    }

    /// Total length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Runs a system call that writes into the first [`MAX_PIECES`] pieces, such as readv, again while it is
    /// interrupted, and marks what it wrote. Returns how many bytes that were.
    pub fn fill_with(&self, call: impl FnMut(&mut [libc::iovec]) -> libc::ssize_t) -> io::Result<usize> {
        let result = self.run(call);
        match &result {
            Ok(written) => self.mark_written(*written),
            // Nothing was there to be written.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // What a call wrote before it failed is not known.
            Err(_) => self.mark_written(usize::MAX),
        }
        result
    }

    /// Runs a system call that reads the first [`MAX_PIECES`] pieces, such as writev, again while it is
    /// interrupted. Returns how many bytes it took.
    pub fn take_with(&self, call: impl FnMut(&mut [libc::iovec]) -> libc::ssize_t) -> io::Result<usize> {
        self.run(call)
    }

    fn run(&self, mut call: impl FnMut(&mut [libc::iovec]) -> libc::ssize_t) -> io::Result<usize> {
        let guards: Vec<_> = self
            .pieces
            .iter()
            .take(MAX_PIECES)
            .map(|piece| piece.ptr_guard_mut())
            .collect();
        let mut vectors: Vec<libc::iovec> = guards
            .iter()
            .map(|guard| libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            })
            .collect();
        loop {
            match usize::try_from(call(&mut vectors)) {
                Ok(n) => return Ok(n),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Marks the first `len` bytes as written. Only after they were: a page whose mark a save takes before
    /// the bytes arrive would be saved without them.
    fn mark_written(&self, len: usize) {
        let mut rest = len;
        for piece in &self.pieces {
            let take = rest.min(piece.len());
            piece.bitmap().mark_dirty(0, take);
            rest -= take;
            if rest == 0 {
                break;
            }
        }
    }

    /// The part of `len` bytes at `offset`; what lies beyond the end is left out.
    pub fn part(&self, offset: u64, len: u64) -> Buffers<'a> {
        let mut part = Buffers::default();
        let (mut skip, mut want) = (offset, len);
        for piece in &self.pieces {
            if want == 0 {
                break;
            }
            let size = piece.len() as u64;
            if skip >= size {
                skip -= size;
                continue;
            }
            let take = want.min(size - skip);
            // Both bounds were checked against the piece just above, so this never fails.
            if let Ok(slice) = piece.subslice(skip as usize, take as usize) {
                part.push(slice);
            }
            want -= take;
            skip = 0;
        }
        part
    }

    /// Copies out to `target`, as much as fits; returns the number of bytes copied.
    pub fn copy_to(&self, target: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in &self.pieces {
            if done == target.len() {
                break;
            }
            done += piece.copy_to(&mut target[done..]);
        }
        done
    }

    /// Copies in from `source`, as much as fits; returns the number of bytes copied.
    pub fn copy_from(&self, source: &[u8]) -> usize {
        let mut done = 0;
        for piece in &self.pieces {
            let take = piece.len().min(source.len() - done);
            piece.copy_from(&source[done..done + take]);
            done += take;
        }
        done
    }

    /// Fills everything with zeros.
    pub fn fill_zero(&self) {
        const ZEROS: [u8; 4096] = [0; 4096];
        for piece in &self.pieces {
            let mut offset = 0;
            while let Ok(rest) = piece.offset(offset) {
                if rest.is_empty() {
                    break;
                }
                let take = rest.len().min(ZEROS.len());
                rest.copy_from(&ZEROS[..take]);
                offset += take;
            }
        }
    }
}

fn host_piece(buffer: &mut [u8]) -> Piece<'_> {
    // SAFETY: the buffer is borrowed for the piece's lifetime, and its pieces are accessed as volatile alone.
    unsafe { VolatileSlice::with_bitmap(buffer.as_mut_ptr(), buffer.len(), None, None) }
}

fn guest_piece<'a>(slice: &VolatileSlice<'a, RefSlice<'a, AtomicBitmap>>) -> Piece<'a> {
    // SAFETY: the same memory for the same lifetime as the slice, which vm-memory made; its mappings are
    // plain, so that no `MmapInfo` is needed to reach them.
    unsafe {
        VolatileSlice::with_bitmap(
            slice.ptr_guard_mut().as_ptr(),
            slice.len(),
            Some(*slice.bitmap()),
            None,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split<'a>(bytes: &'a mut [u8], at: &[usize]) -> Buffers<'a> {
        let mut buffers = Buffers::default();
        let mut rest = bytes;
        for &len in at {
            let (head, tail) = rest.split_at_mut(len);
            buffers.push(host_piece(head));
            rest = tail;
        }
        buffers
    }

    #[test]
    fn a_part_crosses_pieces_and_stops_at_the_end() {
        let mut bytes: Vec<u8> = (0..100).collect();
        let buffers = split(&mut bytes, &[10, 0, 50, 40]);
        let mut out = vec![0; 100];
        assert_eq!(buffers.part(5, 60).copy_to(&mut out), 60);
        assert_eq!(out[..60], (5..65).collect::<Vec<u8>>()[..]);
        assert_eq!(buffers.part(95, 60).len(), 5);
        assert!(buffers.part(100, 1).is_empty());
        buffers.part(8, 4).fill_zero();
        buffers.part(50, 2).copy_from(&[7, 8, 9]);
        assert_eq!(bytes[7..13], [7, 0, 0, 0, 0, 12]);
        assert_eq!(bytes[49..53], [49, 7, 8, 52]);
    }
}
