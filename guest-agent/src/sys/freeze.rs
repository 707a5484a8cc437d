//! `FIFREEZE` and `FITHAW` (`ioctl_fsfreeze`).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

// _IOWR('X', 119, int) and _IOWR('X', 120, int) of linux/fs.h.
const FIFREEZE: libc::c_ulong = 0xc004_5877;
const FITHAW: libc::c_ulong = 0xc004_5878;

/// Freezes the file system of `fd`: everything is written out, and writers wait until it thaws.
pub fn freeze(fd: impl AsFd) -> io::Result<()> {
    call(fd, FIFREEZE)
}

/// Thaws the file system of `fd`; `EINVAL` where it is not frozen.
pub fn thaw(fd: impl AsFd) -> io::Result<()> {
    call(fd, FITHAW)
}

fn call(fd: impl AsFd, request: libc::c_ulong) -> io::Result<()> {
    // SAFETY: both requests ignore their argument, and the kernel writes nothing to it.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request as _, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
