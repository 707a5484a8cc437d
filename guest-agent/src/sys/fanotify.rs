//! fanotify (`fanotify(7)`): which names changed on whole file systems.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::handle::Handle;

const FAN_CLOSE_WRITE: u64 = 0x8;
const FAN_MODIFY: u64 = 0x2;
const FAN_ATTRIB: u64 = 0x4;
const FAN_CREATE: u64 = 0x100;
const FAN_DELETE: u64 = 0x200;
const FAN_Q_OVERFLOW: u64 = 0x4000;
const FAN_RENAME: u64 = 0x1000_0000;
const FAN_ONDIR: u64 = 0x4000_0000;

const FAN_CLOEXEC: u32 = 0x1;
const FAN_NONBLOCK: u32 = 0x2;
const FAN_CLASS_NOTIF: u32 = 0;
const FAN_UNLIMITED_QUEUE: u32 = 0x10;
const FAN_UNLIMITED_MARKS: u32 = 0x20;
/// `FAN_REPORT_DFID_NAME_TARGET`: directory, name, and the inode itself.
const FAN_REPORT_DFID_NAME_TARGET: u32 = 0x200 | 0x400 | 0x800 | 0x1000;

const FAN_MARK_ADD: u32 = 0x1;
const FAN_MARK_FILESYSTEM: u32 = 0x100;

const INFO_FID: u8 = 1;
const INFO_DFID_NAME: u8 = 2;
const INFO_DFID: u8 = 3;
const INFO_OLD_DFID_NAME: u8 = 10;
const INFO_NEW_DFID_NAME: u8 = 12;

const METADATA: usize = 24;
const METADATA_VERSION: u8 = 3;

/// A notification group.
#[derive(Debug)]
pub struct Group(OwnedFd);

/// A place that an event names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// File system (`statfs`).
    pub fsid: [u8; 8],
    /// The directory; or where there is no name, the inode itself.
    pub handle: Handle,
    /// Name in the directory. `.` and absent both mean the inode itself.
    pub name: Option<Vec<u8>>,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Process that did it; 0 where it was the kernel itself.
    pub pid: i32,
    /// The kernel dropped events.
    pub overflow: bool,
    /// A name came, went, or was renamed.
    pub structural: bool,
    /// It was a rename.
    pub renamed: bool,
    /// Names (directory and name) that changed.
    pub names: Vec<Place>,
    /// The inode that changed.
    pub inode: Option<Place>,
}

impl Group {
    /// A group with unlimited queue and marks; needs `CAP_SYS_ADMIN` and Linux 5.17.
    pub fn new() -> io::Result<Self> {
        let flags = FAN_CLASS_NOTIF
            | FAN_CLOEXEC
            | FAN_NONBLOCK
            | FAN_UNLIMITED_QUEUE
            | FAN_UNLIMITED_MARKS
            | FAN_REPORT_DFID_NAME_TARGET;
        let event_flags = (libc::O_RDONLY | libc::O_LARGEFILE) as u32;
        // SAFETY: fanotify_init has no memory arguments; the result is checked before it is owned.
        let fd = unsafe { libc::fanotify_init(flags, event_flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Watches the whole file system on which `directory` lies.
    pub fn mark(&self, directory: impl AsFd) -> io::Result<()> {
        let mask =
            FAN_CREATE | FAN_DELETE | FAN_RENAME | FAN_MODIFY | FAN_ATTRIB | FAN_CLOSE_WRITE | FAN_ONDIR;
        // SAFETY: a null path means the descriptor itself.
        let result = unsafe {
            libc::fanotify_mark(
                self.0.as_raw_fd(),
                FAN_MARK_ADD | FAN_MARK_FILESYSTEM,
                mask,
                directory.as_fd().as_raw_fd(),
                std::ptr::null(),
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Reads what is queued into `buffer`; an empty list when nothing is.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Vec<Event>> {
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut *buffer)) {
            Ok(length) => parse(&buffer[..length]),
            Err(rustix::io::Errno::AGAIN) => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> io::Result<[u8; N]> {
    bytes
        .get(at..at + N)
        .and_then(|b| b.try_into().ok())
        .ok_or_else(|| malformed("short fanotify record"))
}

fn parse(mut bytes: &[u8]) -> io::Result<Vec<Event>> {
    let mut events = Vec::new();
    while !bytes.is_empty() {
        let length = u32::from_ne_bytes(number(bytes, 0)?) as usize;
        if length < METADATA || length > bytes.len() || bytes[4] != METADATA_VERSION {
            return Err(malformed("fanotify metadata"));
        }
        let start = usize::from(u16::from_ne_bytes(number(bytes, 6)?));
        let mask = u64::from_ne_bytes(number(bytes, 8)?);
        let mut event = Event {
            pid: i32::from_ne_bytes(number(bytes, 20)?),
            overflow: mask & FAN_Q_OVERFLOW != 0,
            structural: mask & (FAN_CREATE | FAN_DELETE | FAN_RENAME) != 0,
            renamed: mask & FAN_RENAME != 0,
            names: Vec::new(),
            inode: None,
        };
        let mut records = bytes
            .get(start..length)
            .ok_or_else(|| malformed("fanotify metadata"))?;
        while records.len() >= 4 {
            let size = usize::from(u16::from_ne_bytes(number(records, 2)?));
            if size < 4 || size > records.len() {
                return Err(malformed("fanotify information record"));
            }
            let record = &records[..size];
            match record[0] {
                INFO_DFID_NAME | INFO_OLD_DFID_NAME | INFO_NEW_DFID_NAME | INFO_DFID => {
                    event.names.push(place(record)?);
                }
                INFO_FID => event.inode = Some(place(record)?),
                _ => {}
            }
            records = &records[size..];
        }
        events.push(event);
        bytes = &bytes[length..];
    }
    Ok(events)
}

fn place(record: &[u8]) -> io::Result<Place> {
    let fsid = number(record, 4)?;
    let length = u32::from_ne_bytes(number(record, 12)?) as usize;
    let kind = i32::from_ne_bytes(number(record, 16)?);
    let end = 20usize
        .checked_add(length)
        .ok_or_else(|| malformed("file handle"))?;
    let bytes = record
        .get(20..end)
        .ok_or_else(|| malformed("file handle"))?
        .to_vec();
    let rest = &record[end..];
    let name = match record[0] {
        INFO_FID | INFO_DFID => None,
        _ => rest
            .iter()
            .position(|&b| b == 0)
            .map(|n| rest[..n].to_vec())
            .filter(|n| n != b"."),
    };
    Ok(Place {
        fsid,
        handle: Handle { kind, bytes },
        name,
    })
}

#[cfg(test)]
mod tests {
    proptest::proptest! {
        #[test]
        fn arbitrary_records_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..120)) {
            let _ = super::parse(&bytes);
        }
    }
}
