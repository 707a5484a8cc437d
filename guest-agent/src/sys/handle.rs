//! File handles: names of inodes that outlive renames, and that mean the same in a copy of the file system
//! (`open_by_handle_at(2)`).

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// `MAX_HANDLE_SZ`
pub const MAX_HANDLE: usize = 128;

/// A file handle: unique within its file system, never reused for another inode.
#[derive(
    Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct Handle {
    /// Type, of meaning to the file system only.
    pub kind: i32,
    /// Bytes, at most [`MAX_HANDLE`].
    pub bytes: Vec<u8>,
}

#[repr(C)]
struct RawHandle {
    bytes: u32,
    kind: i32,
    data: [u8; MAX_HANDLE],
}

/// The handle of `name` in the directory `dir`, or of `dir` itself where the name is empty. A symbolic link
/// is not followed.
pub fn handle_of(dir: impl AsFd, name: &CStr) -> io::Result<Handle> {
    let mut raw = RawHandle {
        bytes: MAX_HANDLE as u32,
        kind: 0,
        data: [0; MAX_HANDLE],
    };
    let mut mount_id = 0;
    let flags = if name.is_empty() { libc::AT_EMPTY_PATH } else { 0 };
    // SAFETY: `raw` begins like the kernel's file_handle and has room for the bytes that it announces; the
    // name ends with NUL; all outlive the call.
    let result = unsafe {
        libc::name_to_handle_at(
            dir.as_fd().as_raw_fd(),
            name.as_ptr(),
            (&raw mut raw).cast(),
            &raw mut mount_id,
            flags,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let length = (raw.bytes as usize).min(MAX_HANDLE);
    Ok(Handle {
        kind: raw.kind,
        bytes: raw.data[..length].to_vec(),
    })
}

/// Opens the inode that `handle` names in the file system of `mount`. `ESTALE` where there is none.
pub fn open_by_handle(mount: impl AsFd, handle: &Handle, flags: i32) -> io::Result<OwnedFd> {
    if handle.bytes.len() > MAX_HANDLE {
        return Err(io::Error::from_raw_os_error(libc::ESTALE));
    }
    let mut raw = RawHandle {
        bytes: handle.bytes.len() as u32,
        kind: handle.kind,
        data: [0; MAX_HANDLE],
    };
    raw.data[..handle.bytes.len()].copy_from_slice(&handle.bytes);
    // SAFETY: `raw` begins like the kernel's file_handle, with as many bytes as it announces.
    let fd = unsafe {
        libc::open_by_handle_at(
            mount.as_fd().as_raw_fd(),
            (&raw mut raw).cast(),
            flags | libc::O_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Identity of the file system of `fd` (`statfs`), as fanotify events name it.
pub fn fsid_of(fd: impl AsFd) -> io::Result<[u8; 8]> {
    let stat = rustix::fs::fstatfs(fd)?;
    // SAFETY: fsid_t is exactly two 32-bit integers whose names differ between libraries, without padding;
    // any bytes are valid in the result.
    Ok(unsafe { std::mem::transmute::<rustix::fs::Fsid, [u8; 8]>(stat.f_fsid) })
}
