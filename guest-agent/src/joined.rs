//! Joins logs that grew on both sides: what both had, then the guest's lines, then the clone's own boot, as an
//! ordinary reboot would have left them. In place, because the clone's programs have the file open.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::view::stat_fd;

/// Longest tail of the clone's own that is joined, in bytes: the log of one boot. What is longer is a
/// conflict like any other.
pub const MAX_TAIL: u64 = 16 * 1024 * 1024;
const CHUNK: usize = 64 * 1024;

/// Cuts a joined log back to the guest's version of it (`guest_size` bytes) and returns the clone's own tail;
/// `None` where that is too long to be handled so.
pub fn take_tail(log: &OwnedFd, guest_size: u64) -> io::Result<Option<Vec<u8>>> {
    let size = stat_fd(log)?.stx_size;
    let Some(length) = size.checked_sub(guest_size).filter(|l| *l <= MAX_TAIL) else {
        return Ok(None);
    };
    let tail = read(log, guest_size, length)?;
    rustix::fs::ftruncate(log, guest_size)?;
    Ok(Some(tail))
}

/// Ends the guest's version at `guest_size` and puts the clone's tail after it.
pub fn put_tail(log: &OwnedFd, guest_size: u64, tail: &[u8]) -> io::Result<()> {
    rustix::fs::ftruncate(log, guest_size)?;
    write(log, guest_size, tail)
}

/// Makes `own` what the guest has, followed by the clone's own tail. The tail begins at `at_start`, the size
/// that the log had when the clone booted, where that is known; else where the two begin to differ, for text
/// at the beginning of that line.
pub fn join(own: &OwnedFd, guest: &OwnedFd, at_start: Option<u64>, text: bool) -> io::Result<()> {
    let own_size = stat_fd(own)?.stx_size;
    let guest_size = stat_fd(guest)?.stx_size;
    let base = match at_start.filter(|s| *s <= own_size) {
        Some(size) => size,
        None => common_prefix(own, guest, own_size.min(guest_size), text)?,
    };
    // A tail beyond the limit is cut at its beginning: the newest lines are the ones that are looked for.
    let base = base.max(own_size.saturating_sub(MAX_TAIL));
    let mut tail = read(own, base, own_size - base)?;
    if text && guest_size > 0 && !tail.is_empty() && read(guest, guest_size - 1, 1)? != b"\n" {
        tail.insert(0, b'\n');
    }
    let mut at = 0;
    while at < guest_size {
        let chunk = read(guest, at, (guest_size - at).min(CHUNK as u64))?;
        if chunk.is_empty() {
            break;
        }
        write(own, at, &chunk)?;
        at += chunk.len() as u64;
    }
    put_tail(own, guest_size, &tail)
}

fn common_prefix(a: &OwnedFd, b: &OwnedFd, limit: u64, text: bool) -> io::Result<u64> {
    let mut at = 0;
    let mut line = 0;
    while at < limit {
        let length = (limit - at).min(CHUNK as u64);
        let (x, y) = (read(a, at, length)?, read(b, at, length)?);
        let same = x.iter().zip(&y).take_while(|(p, q)| p == q).count();
        if let Some(end) = x[..same].iter().rposition(|&c| c == b'\n') {
            line = at + end as u64 + 1;
        }
        at += same as u64;
        if (same as u64) < length {
            break;
        }
    }
    Ok(if text { line } else { at })
}

/// Reads up to `length` bytes; fewer where the file ends.
fn read(fd: &OwnedFd, at: u64, length: u64) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; length as usize];
    let mut filled = 0;
    while filled < buffer.len() {
        match rustix::io::pread(fd, &mut buffer[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    buffer.truncate(filled);
    Ok(buffer)
}

fn write(fd: &OwnedFd, at: u64, bytes: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pwrite(fd, &bytes[done..], at + done as u64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &str) -> OwnedFd {
        let fd: OwnedFd = tempfile::tempfile().unwrap().into();
        write(&fd, 0, content.as_bytes()).unwrap();
        fd
    }

    fn content(fd: &OwnedFd) -> String {
        String::from_utf8(read(fd, 0, stat_fd(fd).unwrap().stx_size).unwrap()).unwrap()
    }

    #[test]
    fn both_tails_are_kept_the_clones_last() {
        let own = file("base\nclone 1\nclone 2\n");
        join(&own, &file("base\nclone-like guest 1\nguest 2\n"), None, true).unwrap();
        assert_eq!(
            content(&own),
            "base\nclone-like guest 1\nguest 2\nclone 1\nclone 2\n"
        );
    }

    #[test]
    fn a_log_that_the_guest_rotated_keeps_only_the_clones_own_lines() {
        let own = file("old\nclone\n");
        join(&own, &file("new"), Some(4), true).unwrap();
        assert_eq!(content(&own), "new\nclone\n");
    }

    #[test]
    fn a_later_round_grows_the_guests_part_and_keeps_what_the_clone_appended() {
        let own = file("guest\nclone\n");
        let tail = take_tail(&own, 6).unwrap().unwrap();
        assert_eq!(content(&own), "guest\n");
        write(&own, 6, b"more\n").unwrap();
        put_tail(&own, 11, &tail).unwrap();
        assert_eq!(content(&own), "guest\nmore\nclone\n");
    }

    #[test]
    fn records_are_joined_byte_by_byte() {
        let own = file("AAAABBBB");
        join(&own, &file("AAAACCCC"), None, false).unwrap();
        assert_eq!(content(&own), "AAAACCCCBBBB");
    }
}
