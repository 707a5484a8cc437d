//! The network of a clone that is not the guest yet: frames go to the agent's responder and nowhere
//! else, one per datagram, without virtio-net header.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use super::tap::{HEADER, MAX_FRAME};
use crate::virtio::buffers::Buffers;

/// Largest datagram.
const MAX_DATAGRAM: usize = 64 << 10;

/// A datagram socket at `<peer>.vmm`, whose peer is the responder.
#[derive(Debug)]
pub struct Isolated {
    socket: UnixDatagram,
    own: PathBuf,
    peer: Option<PathBuf>,
}

impl Isolated {
    /// A network with the responder at `peer`; without one, all frames are dropped.
    pub fn new(peer: Option<&Path>) -> io::Result<Isolated> {
        let mut own = PathBuf::new();
        let socket = match peer {
            Some(peer) => {
                let mut name = peer.as_os_str().to_owned();
                name.push(".vmm");
                own = PathBuf::from(name);
                match std::fs::remove_file(&own) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => UnixDatagram::bind(&own)?,
                }
            }
            None => UnixDatagram::unbound()?,
        };
        socket.set_nonblocking(true)?;
        Ok(Isolated {
            socket,
            own,
            peer: peer.map(Path::to_owned),
        })
    }

    /// The descriptor, to be polled.
    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Reads one frame and puts an empty header before it.
    pub fn receive(&self, buffers: &Buffers<'_>) -> io::Result<usize> {
        let room = buffers.part(HEADER as u64, MAX_DATAGRAM as u64);
        let len = room.fill_with(|vectors| {
            // SAFETY: each vector covers memory that `buffers` keeps mapped for this call.
            unsafe { libc::readv(self.fd(), vectors.as_ptr(), vectors.len() as libc::c_int) }
        })?;
        buffers.copy_from(&[0; HEADER]);
        Ok(HEADER + len)
    }

    /// Sends one frame; `false` when nobody listened, and it was dropped.
    pub fn send(&self, buffers: &Buffers<'_>) -> bool {
        let Some(peer) = &self.peer else { return false };
        let len = buffers.len() as usize;
        if len <= HEADER || len > MAX_FRAME.min(HEADER + MAX_DATAGRAM) {
            return false;
        }
        let mut frame = vec![0; len];
        buffers.copy_to(&mut frame);
        let (header, frame) = frame.split_at_mut(HEADER);
        complete_checksum(header, frame);
        self.socket.send_to(frame, peer).is_ok()
    }
}

impl Drop for Isolated {
    fn drop(&mut self) {
        if self.peer.is_some() {
            // Left behind, it would be replaced by the next one.
            let _ = std::fs::remove_file(&self.own);
        }
    }
}

/// Does what the guest left to the device (virtio 1.2, 5.1.6.2): the responder gets whole frames.
fn complete_checksum(header: &[u8], frame: &mut [u8]) {
    const NEEDS_CSUM: u8 = 1;
    if header[0] & NEEDS_CSUM == 0 {
        return;
    }
    let start = usize::from(u16::from_le_bytes([header[6], header[7]]));
    let at = start + usize::from(u16::from_le_bytes([header[8], header[9]]));
    if at + 2 > frame.len() {
        return;
    }
    let sum: u64 = frame[start..]
        .chunks(2)
        .map(|pair| u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
        .sum();
    let mut folded = sum;
    while folded > 0xffff {
        folded = (folded & 0xffff) + (folded >> 16);
    }
    let checksum = match !(folded as u16) {
        // UDP's zero means "none"; its other form is the same number (RFC 768).
        0 => 0xffff,
        checksum => checksum,
    };
    frame[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_checksum_is_completed_and_a_bad_offset_is_left_alone() {
        // A UDP datagram 1.2.3.4:1 -> 5.6.7.8:2 with the pseudo header's sum in its checksum.
        let mut frame = vec![0; 14 + 20];
        let pseudo: u32 = 0x0102 + 0x0304 + 0x0506 + 0x0708 + 17 + 10;
        frame.extend([0, 1, 0, 2, 0, 10]);
        frame.extend((pseudo as u16).to_be_bytes());
        frame.extend(*b"hi");
        let mut header = [0u8; HEADER];
        header[0] = 1;
        header[6] = 34;
        header[8] = 6;
        complete_checksum(&header, &mut frame);
        let total: u32 = frame[34..]
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum::<u32>()
            + pseudo;
        assert_eq!((total & 0xffff) + (total >> 16), 0xffff);
        header[6..10].fill(0xff);
        let before = frame.clone();
        complete_checksum(&header, &mut frame);
        assert_eq!(frame, before);
    }
}
