//! `userfaultfd(2)`: the kernel asks us for pages that are missing.
//!
//! Constants and structures are those of `linux/userfaultfd.h`; no crate at hand has them without libclang.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Why userfaultfd cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum UserfaultError {
    /// Neither the system call nor the device gives a descriptor.
    #[error(
        "userfaultfd is refused ({call}; /dev/userfaultfd: {device}): resuming a guest needs a kernel with \
         CONFIG_USERFAULTFD and a process with CAP_SYS_PTRACE, or one that may open /dev/userfaultfd"
    )]
    Refused {
        /// Why the system call failed.
        call: io::Error,
        /// Why the device failed.
        device: io::Error,
    },
    /// The kernel's interface is another one.
    #[error("agreeing with the kernel on userfaultfd: {0}")]
    Api(io::Error),
}

/// A page of x86-64.
pub(super) const PAGE: usize = 4096;

const UFFD_API: u64 = 0xaa;
const REGISTER_MODE_MISSING: u64 = 1;
/// Request of `/dev/userfaultfd` for a new descriptor.
const USERFAULTFD_IOC_NEW: u64 = request(NONE, 0, 0);
const UFFDIO_API: u64 = request(READ | WRITE, 0x3f, size_of::<Api>());
const UFFDIO_REGISTER: u64 = request(READ | WRITE, 0x00, size_of::<Register>());
const UFFDIO_UNREGISTER: u64 = request(READ, 0x01, size_of::<Range>());
const UFFDIO_WAKE: u64 = request(READ, 0x02, size_of::<Range>());
const UFFDIO_COPY: u64 = request(READ | WRITE, 0x03, size_of::<Copy>());
const UFFDIO_ZEROPAGE: u64 = request(READ | WRITE, 0x04, size_of::<ZeroPage>());
const EVENT_PAGEFAULT: u8 = 0x12;

const NONE: u64 = 0;
const WRITE: u64 = 1;
const READ: u64 = 2;

/// `_IOC` of `asm-generic/ioctl.h`, with the type of userfaultfd.
const fn request(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | UFFD_API << 8 | number
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    length: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeroed: i64,
}

/// `struct uffd_msg` in the form of a page fault.
#[repr(C)]
#[derive(Clone)]
struct Message {
    event: u8,
    reserved1: u8,
    reserved2: u16,
    reserved3: u32,
    flags: u64,
    address: u64,
    thread: u64,
}

// The numbers as C programs on x86-64 see them.
const _: () = {
    assert!(USERFAULTFD_IOC_NEW == 0xaa00);
    assert!(UFFDIO_API == 0xc018_aa3f);
    assert!(UFFDIO_REGISTER == 0xc020_aa00);
    assert!(UFFDIO_UNREGISTER == 0x8010_aa01);
    assert!(UFFDIO_WAKE == 0x8010_aa02);
    assert!(UFFDIO_COPY == 0xc028_aa03);
    assert!(UFFDIO_ZEROPAGE == 0xc020_aa04);
    assert!(size_of::<Message>() == 32);
    assert!(std::mem::offset_of!(Message, address) == 16);
};

/// A descriptor of userfaultfd that serves faults of user and kernel: KVM's and those of system calls.
///
/// Closing it ends all registrations, after which missing memory reads as zeroes: see
/// [`super::LazyMemory`] for when that may happen.
pub struct Userfault(OwnedFd);

impl Userfault {
    /// Opens it. Before the process is confined: the system call is not on the list of
    /// [`crate::seccomp`].
    pub fn open() -> Result<Userfault, UserfaultError> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call takes flags only. Without UFFD_USER_MODE_ONLY, so that the kernel's faults are
        // served too.
        let result = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let descriptor = match RawFd::try_from(result) {
            // SAFETY: a new descriptor that nobody else has.
            Ok(fd) if fd >= 0 => unsafe { OwnedFd::from_raw_fd(fd) },
            _ => {
                let call = io::Error::last_os_error();
                by_device(flags).map_err(|device| UserfaultError::Refused { call, device })?
            }
        };
        let userfault = Userfault(descriptor);
        let mut api = Api {
            api: UFFD_API,
            features: 0,
            ioctls: 0,
        };
        userfault
            .ioctl(UFFDIO_API, &mut api)
            .map_err(UserfaultError::Api)?;
        Ok(userfault)
    }

    /// Asks to be told of missing pages in this range of private anonymous memory.
    pub(super) fn register(&self, start: u64, length: u64) -> io::Result<()> {
        let mut register = Register {
            range: Range { start, length },
            mode: REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        self.ioctl(UFFDIO_REGISTER, &mut register)
    }

    /// Ends that, and wakes who waits for a page of the range: missing pages are zeroes from now on.
    pub(super) fn unregister(&self, start: u64, length: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_UNREGISTER, &mut Range { start, length })
    }

    /// Wakes who waits for a page of the range.
    pub(super) fn wake(&self, start: u64, length: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_WAKE, &mut Range { start, length })
    }

    /// Gives `bytes` to the missing pages from `start` on, and wakes who waits for them. A page that is there
    /// already stays as it is.
    pub(super) fn copy(&self, start: u64, bytes: &[u8]) -> io::Result<()> {
        self.fill(start, bytes.len(), |done| {
            let mut copy = Copy {
                to: start + done as u64,
                from: bytes[done..].as_ptr() as u64,
                length: (bytes.len() - done) as u64,
                mode: 0,
                copied: 0,
            };
            let result = self.ioctl(UFFDIO_COPY, &mut copy);
            (result, copy.copied)
        })
    }

    /// Gives zeroes to the missing pages from `start` on, and wakes who waits for them.
    pub(super) fn zero(&self, start: u64, length: usize) -> io::Result<()> {
        self.fill(start, length, |done| {
            let mut zero = ZeroPage {
                range: Range {
                    start: start + done as u64,
                    length: (length - done) as u64,
                },
                mode: 0,
                zeroed: 0,
            };
            let result = self.ioctl(UFFDIO_ZEROPAGE, &mut zero);
            (result, zero.zeroed)
        })
    }

    /// Repeats a request until it has been through all pages.
    fn fill(
        &self,
        start: u64,
        length: usize,
        mut request: impl FnMut(usize) -> (io::Result<()>, i64),
    ) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let (result, filled) = request(done);
            if let Ok(filled) = usize::try_from(filled) {
                done += filled;
            }
            match result {
                Ok(()) => {}
                Err(error) => match error.raw_os_error() {
                    // There already. Who waits for it was not woken by this request.
                    Some(libc::EEXIST) => {
                        self.wake(start + done as u64, PAGE as u64)?;
                        done += PAGE;
                    }
                    // Only a part was done, or the address space is changing.
                    Some(libc::EAGAIN) if filled > 0 => {}
                    Some(libc::EAGAIN | libc::EINTR) => std::thread::yield_now(),
                    _ => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// Addresses of faults that wait to be served; empty when there are none now.
    pub(super) fn faults(&self) -> io::Result<Vec<u64>> {
        const MOST: usize = 16;
        let empty = Message {
            event: 0,
            reserved1: 0,
            reserved2: 0,
            reserved3: 0,
            flags: 0,
            address: 0,
            thread: 0,
        };
        let mut messages = vec![empty; MOST];
        // SAFETY: the buffer is as long as is said and takes any bytes.
        let result = unsafe {
            libc::read(
                self.0.as_raw_fd(),
                messages.as_mut_ptr().cast(),
                MOST * size_of::<Message>(),
            )
        };
        let Ok(length) = usize::try_from(result) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(Vec::new()),
                _ => Err(error),
            };
        };
        messages.truncate(length / size_of::<Message>());
        Ok(messages
            .into_iter()
            // No other event was asked for.
            .filter(|message| message.event == EVENT_PAGEFAULT)
            .map(|message| message.address)
            .collect())
    }

    fn ioctl<T>(&self, request: u64, argument: &mut T) -> io::Result<()> {
        // SAFETY: every request is called with the structure from whose size its number was made. Those that
        // write guest memory write pages that are missing and registered here, which nobody has seen.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument as *mut T) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsRawFd for Userfault {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A descriptor from the device, whose permissions say who may have one (Linux 6.1).
fn by_device(flags: libc::c_int) -> io::Result<OwnedFd> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")?;
    // SAFETY: the request takes flags only.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}
