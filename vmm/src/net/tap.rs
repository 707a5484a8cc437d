//! Tap devices: the host's side of a guest's interface.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::virtio::buffers::Buffers;

/// Length of the header before each frame (virtio 1.2, 5.1.6; with `num_buffers`).
pub const HEADER: usize = 12;

/// Largest frame with its header: what segmentation offload makes of 64 KiB.
pub const MAX_FRAME: usize = HEADER + 65535 + 18;

/// `_IOW('T', number, int)` of linux/if_tun.h.
const fn tun_write(number: libc::c_ulong) -> libc::c_ulong {
    0x4000_0000 | (size_of::<libc::c_int>() as libc::c_ulong) << 16 | (b'T' as libc::c_ulong) << 8 | number
}

const TUNSETIFF: libc::c_ulong = tun_write(202);
const TUNSETOFFLOAD: libc::c_ulong = tun_write(208);
const TUNSETVNETHDRSZ: libc::c_ulong = tun_write(216);
const _: () = assert!(TUNSETIFF == 0x4004_54ca);
const _: () = assert!(TUNSETOFFLOAD == 0x4004_54d0);
const _: () = assert!(TUNSETVNETHDRSZ == 0x4004_54d8);

/// Partial checksums are accepted in frames for the guest.
pub const TUN_F_CSUM: libc::c_uint = 1;
/// Segments of TCP over IPv4.
pub const TUN_F_TSO4: libc::c_uint = 2;
/// Segments of TCP over IPv6.
pub const TUN_F_TSO6: libc::c_uint = 4;

/// A tap by its descriptor. Frames that nobody reads wait in its queue.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Opens the tap of this name, which must exist: the node agent makes and bridges it.
    pub fn open(name: &str) -> io::Result<Tap> {
        let name = CString::new(name)?;
        // SAFETY: the name is a C string that lives for the call.
        if unsafe { libc::if_nametoindex(name.as_ptr()) } == 0 {
            // Opened all the same, the kernel would make a new one, bridged to nowhere.
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "no tap of this name exists; the node agent makes it (`ip tuntap add NAME mode tap vnet_hdr`)",
            ));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")?;
        // SAFETY: all-zero is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.as_bytes().len() >= request.ifr_name.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the name is too long",
            ));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
            *to = *from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which lives for the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
        if result < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::EBUSY) => io::Error::new(
                    error.kind(),
                    "another process has it open (is the guest's old VMM alive?)",
                ),
                _ => error,
            });
        }
        Ok(Tap { file })
    }

    /// Takes over a descriptor that another VMM has opened.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Tap> {
        let file = File::from(fd);
        // SAFETY: F_GETFL and F_SETFL take no pointers.
        let done = unsafe {
            let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
            flags >= 0 && libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) >= 0
        };
        if !done {
            return Err(io::Error::last_os_error());
        }
        Ok(Tap { file })
    }

    /// Another descriptor of the same tap.
    pub fn try_clone(&self) -> io::Result<OwnedFd> {
        self.file.try_clone().map(OwnedFd::from)
    }

    /// The descriptor, to be polled.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Sets the header's size and what the guest can take. These belong to the device, not to the
    /// descriptor, so they are set again whenever the tap changes hands.
    pub fn configure(&self, offloads: libc::c_uint) -> io::Result<()> {
        let size = HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which lives for the call.
        if unsafe { libc::ioctl(self.fd(), TUNSETVNETHDRSZ, &raw const size) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        if unsafe { libc::ioctl(self.fd(), TUNSETOFFLOAD, libc::c_ulong::from(offloads)) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Reads one frame with its header.
    pub fn receive(&self, buffers: &Buffers<'_>) -> io::Result<usize> {
        buffers.fill_with(|vectors| {
            // SAFETY: each vector covers memory that `buffers` keeps mapped for this call.
            unsafe { libc::readv(self.fd(), vectors.as_ptr(), vectors.len() as libc::c_int) }
        })
    }

    /// Sends one frame with its header.
    pub fn send(&self, buffers: &Buffers<'_>) -> io::Result<usize> {
        buffers.take_with(|vectors| {
            // SAFETY: as in `receive`; the kernel only reads from the vectors.
            unsafe { libc::writev(self.fd(), vectors.as_ptr(), vectors.len() as libc::c_int) }
        })
    }
}
