//! systemd's journal files: the guest's active ones become archived ones on the clone, under the very name
//! that journald itself would give them, so that `journalctl` shows both lives.

use std::io;
use std::os::fd::OwnedFd;

// Offsets in the header, of systemd's journal-def.h.
const STATE: u64 = 16;
const SEQNUM_ID: usize = 72;
const N_ENTRIES: usize = 152;
const HEAD_ENTRY_SEQNUM: usize = 168;
const HEAD_ENTRY_REALTIME: usize = 184;
const HEADER: usize = 208;
const SIGNATURE: &[u8] = b"LPKSHHRH";
const STATE_ARCHIVED: u8 = 2;

/// Whether a path is that of a journal file that journald writes to: archived ones have an `@` in their name.
pub fn is_active(path: &[u8]) -> bool {
    !crate::view::split(path).1.contains(&b'@')
}

/// The name under which journald would archive the file `name`; `None` where nothing is in it.
pub fn archived_name(journal: &OwnedFd, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut header = [0u8; HEADER];
    let mut filled = 0;
    while filled < HEADER {
        match rustix::io::pread(journal, &mut header[filled..], filled as u64)? {
            0 => return Ok(None),
            count => filled += count,
        }
    }
    let number = |at: usize| header[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
    if !header.starts_with(SIGNATURE) || number(N_ENTRIES) == 0 {
        return Ok(None);
    }
    let stem = name.strip_suffix(b".journal").unwrap_or(name);
    let id: String = header[SEQNUM_ID..SEQNUM_ID + 16]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let rest = format!(
        "@{id}-{:016x}-{:016x}.journal",
        number(HEAD_ENTRY_SEQNUM),
        number(HEAD_ENTRY_REALTIME)
    );
    Ok(Some([stem, rest.as_bytes()].concat()))
}

/// Marks the file as archived: nobody writes to it any more.
pub fn archive(journal: &OwnedFd) -> io::Result<()> {
    rustix::io::pwrite(journal, &[STATE_ARCHIVED], STATE)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn an_active_journal_gets_the_name_that_journald_would_give_it() {
        let mut header = vec![0u8; HEADER];
        header[..8].copy_from_slice(SIGNATURE);
        header[SEQNUM_ID..SEQNUM_ID + 16].fill(0xab);
        header[N_ENTRIES] = 3;
        header[HEAD_ENTRY_SEQNUM] = 0x11;
        header[HEAD_ENTRY_REALTIME] = 0x22;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&header).unwrap();
        let fd: OwnedFd = file.into();
        let name = archived_name(&fd, b"user-1000.journal").unwrap().unwrap();
        let expected = format!(
            "user-1000@{}-{:016x}-{:016x}.journal",
            "ab".repeat(16),
            0x11,
            0x22
        );
        assert_eq!(String::from_utf8(name).unwrap(), expected);
        assert!(is_active(b"/var/log/journal/x/system.journal"));
        assert!(!is_active(expected.as_bytes()));
    }

    #[test]
    fn what_is_no_journal_has_no_archived_name() {
        let fd: OwnedFd = tempfile::tempfile().unwrap().into();
        assert_eq!(archived_name(&fd, b"system.journal").unwrap(), None);
    }
}
