//! Content of files in ranges: what was sent in an earlier round is not sent again, and holes stay holes.

use std::io::{self, Write};
use std::os::fd::OwnedFd;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use understudy_channel::{FrameError, Transfer, write_frame};

use crate::sys::handle::Handle;

/// Granularity of comparison, in bytes: what is sent for a line that was appended, against what has to be
/// remembered of a large file.
pub const BLOCK: u64 = 16 * 1024;

type Hash = [u8; 16];

/// What the clone has of a file, by what was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    /// The file that it was.
    pub handle: Handle,
    /// Blocks with data in them, by number, ascending.
    blocks: Vec<(u64, Hash)>,
}

impl Sent {
    /// How many blocks are remembered.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether it is all hole, or empty.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    fn hash(&self, block: u64) -> Option<&Hash> {
        let at = self.blocks.binary_search_by_key(&block, |b| b.0).ok()?;
        Some(&self.blocks[at].1)
    }

    /// Remembered blocks within `[from, to)` bytes.
    fn within(&self, from: u64, to: u64) -> impl Iterator<Item = u64> + '_ {
        let first = self.blocks.partition_point(|b| b.0 * BLOCK < from);
        self.blocks[first..]
            .iter()
            .map(|b| b.0)
            .take_while(move |b| b * BLOCK < to)
    }
}

/// A range of a file that is all data or all hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub start: u64,
    /// Byte after the last one.
    pub end: u64,
    /// Data, or hole.
    pub data: bool,
}

/// Walks the data and hole segments of the first `size` bytes of a file.
#[derive(Debug)]
pub struct Segments<'f> {
    fd: &'f OwnedFd,
    size: u64,
    at: u64,
}

impl<'f> Segments<'f> {
    /// Segments of `fd`, which is `size` bytes long.
    pub fn new(fd: &'f OwnedFd, size: u64) -> Self {
        Self { fd, size, at: 0 }
    }

    /// The next one.
    pub fn advance(&mut self) -> io::Result<Option<Segment>> {
        if self.at >= self.size {
            return Ok(None);
        }
        let start = self.at;
        let data_at = match rustix::fs::seek(self.fd, SeekFrom::Data(start)) {
            Ok(at) => at,
            Err(Errno::NXIO) => self.size,
            // No notion of holes: all of it is data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => start,
            Err(error) => return Err(error.into()),
        };
        let segment = if data_at > start {
            Segment {
                start,
                end: data_at.min(self.size),
                data: false,
            }
        } else {
            let end = match rustix::fs::seek(self.fd, SeekFrom::Hole(start)) {
                Ok(at) => at,
                Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => self.size,
                Err(error) => return Err(error.into()),
            };
            Segment {
                start,
                end: end.min(self.size),
                data: true,
            }
        };
        if segment.end <= segment.start {
            // The file shrank under our feet.
            return Ok(None);
        }
        self.at = segment.end;
        Ok(Some(segment))
    }
}

/// Sends content and remembers it.
#[derive(Debug)]
pub struct Sender<'a, W> {
    out: &'a mut W,
    known: Option<&'a Sent>,
    blocks: Vec<(u64, Hash)>,
    /// Content bytes sent.
    pub bytes: u64,
    /// Segments of the block that is being gathered, with their data in `buffer`.
    parts: Vec<Segment>,
    buffer: Vec<u8>,
}

impl<'a, W: Write> Sender<'a, W> {
    /// A sender to `out` for a file of which the clone has `known`; without it, everything is sent.
    pub fn new(out: &'a mut W, known: Option<&'a Sent>) -> Self {
        Self {
            out,
            known,
            blocks: Vec::new(),
            bytes: 0,
            parts: Vec::new(),
            buffer: Vec::new(),
        }
    }

    /// Sends what differs in the first `size` bytes of `fd`; with the number of bytes comes what the clone has
    /// then. Of a file that became shorter meanwhile nobody knows what the clone has beyond the new end: it
    /// is dirty again, and has to be sent whole.
    pub fn send(
        mut self,
        fd: &OwnedFd,
        size: u64,
        handle: Handle,
    ) -> Result<(Option<Sent>, u64), FrameError> {
        let mut segments = Segments::new(fd, size);
        let mut complete = true;
        'file: while let Some(segment) = segments.advance()? {
            let mut at = segment.start;
            while at < segment.end {
                let block_end = (at / BLOCK + 1) * BLOCK;
                let end = segment.end.min(block_end);
                if !segment.data && at.is_multiple_of(BLOCK) && segment.end >= block_end {
                    // A run of blocks without any data.
                    self.finish_block()?;
                    let run_end = segment.end / BLOCK * BLOCK;
                    self.hole_run(at, run_end)?;
                    at = run_end;
                    continue;
                }
                if self.parts.first().is_some_and(|p| p.start / BLOCK != at / BLOCK) {
                    self.finish_block()?;
                }
                if segment.data && !self.gather(fd, at, end)? {
                    complete = false;
                    break 'file;
                }
                self.parts.push(Segment {
                    start: at,
                    end,
                    data: segment.data,
                });
                at = end;
            }
        }
        self.finish_block()?;
        let blocks = self.blocks;
        let sent = (complete && segments.at >= size).then_some(Sent { handle, blocks });
        Ok((sent, self.bytes))
    }

    /// Reads data of the current block; false where the file ended early.
    fn gather(&mut self, fd: &OwnedFd, start: u64, end: u64) -> io::Result<bool> {
        let base = self.buffer.len();
        self.buffer.resize(base + (end - start) as usize, 0);
        let mut filled = base;
        while filled < self.buffer.len() {
            let at = start + (filled - base) as u64;
            match rustix::io::pread(fd, &mut self.buffer[filled..], at) {
                Ok(0) => {
                    self.buffer.truncate(base);
                    return Ok(false);
                }
                Ok(read) => filled += read,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// Sends the gathered block unless the clone has it.
    fn finish_block(&mut self) -> Result<(), FrameError> {
        let mut parts = std::mem::take(&mut self.parts);
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = self.block(&parts, &buffer);
        parts.clear();
        buffer.clear();
        (self.parts, self.buffer) = (parts, buffer);
        result
    }

    fn block(&mut self, parts: &[Segment], buffer: &[u8]) -> Result<(), FrameError> {
        let Some(first) = parts.first() else { return Ok(()) };
        let block = first.start / BLOCK;
        if !parts.iter().any(|p| p.data) {
            for part in parts {
                self.hole(part.start, part.end)?;
            }
            return Ok(());
        }
        let hash = hash(parts, buffer);
        self.blocks.push((block, hash));
        if self.known.and_then(|k| k.hash(block)) == Some(&hash) {
            return Ok(());
        }
        let mut rest = buffer;
        for part in parts {
            let length = (part.end - part.start) as usize;
            if part.data {
                let (bytes, after) = rest.split_at(length);
                rest = after;
                self.bytes += bytes.len() as u64;
                write_frame(
                    self.out,
                    &Transfer::Data {
                        offset: part.start,
                        bytes: bytes.to_vec(),
                    },
                )?;
            } else {
                self.hole(part.start, part.end)?;
            }
        }
        Ok(())
    }

    /// A run of whole blocks without data: where the clone has data there, it becomes a hole.
    fn hole_run(&mut self, start: u64, end: u64) -> Result<(), FrameError> {
        match self.known {
            None => self.hole(start, end),
            Some(known) => {
                for block in known.within(start, end) {
                    self.hole(block * BLOCK, (block + 1) * BLOCK)?;
                }
                Ok(())
            }
        }
    }

    fn hole(&mut self, start: u64, end: u64) -> Result<(), FrameError> {
        write_frame(
            self.out,
            &Transfer::Hole {
                offset: start,
                length: end - start,
            },
        )
    }
}

/// Hash of a block: of its data and of where its holes are.
fn hash(parts: &[Segment], data: &[u8]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&part.start.to_le_bytes());
        hasher.update(&part.end.to_le_bytes());
        hasher.update(&[part.data.into()]);
    }
    // Files that were allocated beforehand are zeros for the most part, which is seen faster than hashed.
    if is_zero(data) {
        hasher.update(b"zeros");
        hasher.update(&(data.len() as u64).to_le_bytes());
    } else {
        hasher.update(data);
    }
    let mut short = Hash::default();
    short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    short
}

fn is_zero(data: &[u8]) -> bool {
    // Each byte equals the one before it: one comparison of memory.
    data.split_first()
        .is_none_or(|(first, rest)| *first == 0 && rest == &data[..rest.len()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_channel::read_frame;

    fn send(file: &std::fs::File, known: Option<&Sent>) -> (Sent, Vec<Transfer>) {
        let mut out = Vec::new();
        let fd: OwnedFd = file.try_clone().unwrap().into();
        let size = file.metadata().unwrap().len();
        let (sent, _) = Sender::new(&mut out, known)
            .send(&fd, size, Handle::default())
            .unwrap();
        let sent = sent.unwrap();
        let mut frames = Vec::new();
        let mut rest = out.as_slice();
        while let Ok(frame) = read_frame(&mut rest) {
            frames.push(frame);
        }
        (sent, frames)
    }

    /// The file becomes shorter when its first block goes out.
    struct Cut<'a>(&'a std::fs::File);

    impl Write for Cut<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.set_len(100)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn of_a_file_that_became_shorter_while_it_was_sent_nothing_is_remembered() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().unwrap();
        let size = 3 * BLOCK;
        file.write_all_at(&vec![7; size as usize], 0).unwrap();
        let fd: OwnedFd = file.try_clone().unwrap().into();
        let (sent, bytes) = Sender::new(&mut Cut(&file), None)
            .send(&fd, size, Handle::default())
            .unwrap();
        assert!((1..size).contains(&bytes), "{bytes}");
        assert_eq!(sent, None);
    }

    #[test]
    fn only_blocks_that_changed_are_sent_again() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; 3 * BLOCK as usize + 100], 0).unwrap();
        let (sent, frames) = send(&file, None);
        assert_eq!(frames.len(), 4);
        let (again, frames) = send(&file, Some(&sent));
        assert_eq!((frames.len(), &again), (0, &sent));
        file.write_all_at(b"x", BLOCK + 5).unwrap();
        file.write_all_at(b"tail", 3 * BLOCK + 100).unwrap();
        let (_, frames) = send(&file, Some(&sent));
        let offsets: Vec<u64> = frames
            .iter()
            .map(|f| match f {
                Transfer::Data { offset, .. } => *offset,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(offsets, [BLOCK, 3 * BLOCK]);
    }

    #[test]
    fn zeros_are_seen_at_any_place_and_are_no_holes() {
        for length in [0, 1, 2, 4096] {
            let mut data = vec![0; length];
            assert!(is_zero(&data));
            for at in [0, length / 2, length.saturating_sub(1)] {
                if let Some(byte) = data.get_mut(at) {
                    *byte = 1;
                    assert!(!is_zero(&data), "{at} of {length}");
                    data[at] = 0;
                }
            }
        }
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[0; 2 * BLOCK as usize], 0).unwrap();
        let (sent, frames) = send(&file, None);
        assert_eq!((sent.len(), frames.len()), (2, 2));
        file.write_all_at(b"zeros", BLOCK).unwrap();
        let (_, frames) = send(&file, Some(&sent));
        assert!(matches!(frames[..], [Transfer::Data { offset: BLOCK, .. }]));
    }

    #[test]
    fn holes_are_told_once_and_again_where_data_became_one() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"end", 10 * BLOCK).unwrap();
        let (sent, frames) = send(&file, None);
        assert_eq!(
            frames[0],
            Transfer::Hole {
                offset: 0,
                length: 10 * BLOCK
            }
        );
        assert_eq!(sent.len(), 1);
        file.write_all_at(&[1; 2 * BLOCK as usize], 2 * BLOCK).unwrap();
        let (filled, frames) = send(&file, Some(&sent));
        assert_eq!(frames.len(), 2);
        rustix::fs::fallocate(
            &file,
            rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
            2 * BLOCK,
            BLOCK,
        )
        .unwrap();
        let (_, frames) = send(&file, Some(&filled));
        assert_eq!(
            frames,
            [Transfer::Hole {
                offset: 2 * BLOCK,
                length: BLOCK
            }]
        );
    }
}
