//! Leases on files (`fcntl(2)`), as a question: the kernel grants one for reading only where nobody has the file
//! open for writing or mapped shared and writable.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Of asm-generic/fcntl.h; libc lacks it.
const F_SETSIG: libc::c_int = 10;

/// Whether anybody has this regular file open for writing. `fd` is open for reading only.
pub fn is_written(fd: impl AsFd) -> io::Result<bool> {
    let fd = fd.as_fd().as_raw_fd();
    // Who opens the file for writing while we hold the lease makes the kernel tell us: by a signal that means
    // nothing to a process that does not ask for it, instead of one that ends it.
    // SAFETY: F_SETSIG, F_SETLEASE take integers; no memory is passed.
    unsafe {
        if libc::fcntl(fd, F_SETSIG, libc::SIGURG) != 0 {
            return Err(io::Error::last_os_error());
        }
        if libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) != 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EAGAIN) => Ok(true),
                _ => Err(error),
            };
        }
        if libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, OpenOptions};

    #[test]
    fn a_file_that_somebody_writes_is_told_from_one_that_is_only_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = File::open(file.path()).unwrap();
        assert!(
            is_written(&read).unwrap(),
            "the temporary file itself is open for writing"
        );
        let path = file.into_temp_path();
        assert!(!is_written(&read).unwrap());
        let reader = File::open(&path).unwrap();
        assert!(!is_written(&read).unwrap());
        let writer = OpenOptions::new().append(true).open(&path).unwrap();
        assert!(is_written(&read).unwrap());
        drop(writer);
        assert!(!is_written(&read).unwrap());
        drop(reader);
    }
}
