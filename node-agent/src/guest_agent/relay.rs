//! Carries one round from the guest's export into the clone's import. Both ends are untrusted: what goes
//! through is within the channel's bounds and in the channel's order, or the round ends.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use understudy_channel::{
    Applied, Entry, FrameError, Imported, MAX_DATA, MAX_LIST, MAX_PATH, Node, RoundEnd, Transfer, read_frame,
    write_frame,
};

/// The longest silence of either side within a round. Freezing, syncing and hashing are in it.
const SILENCE: Duration = Duration::from_secs(60);
/// Largest offset or size that a file system of ours can have (8 EiB).
const MAX_OFFSET: u64 = i64::MAX as u64;

/// Why a round did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The guest's side failed.
    #[error("reading the guest's changes: {0}")]
    Guest(FrameError),
    /// The clone's side failed.
    #[error("writing the changes into the clone: {0}")]
    Clone(FrameError),
    /// The guest sent something that is out of bounds or out of order.
    #[error("the guest's changes break the protocol: {0}")]
    Protocol(String),
    /// The guest cannot go on.
    #[error("the guest could not send its changes: {0}")]
    GuestRefused(String),
    /// The clone refused the round.
    #[error("the clone refused the changes: {0}")]
    CloneRefused(String),
    /// The deadline is over.
    #[error("the round was not finished in time")]
    Deadline,
}

/// A round that the clone has applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relayed {
    /// As the guest counted.
    pub end: RoundEnd,
    /// As the clone applied.
    pub applied: Applied,
}

/// Relays one round; gives up at `deadline`. `progress` is told entries and bytes after each entry.
pub fn relay(
    guest: &UnixStream,
    clone: &UnixStream,
    deadline: Option<Instant>,
    mut progress: impl FnMut(u64, u64),
) -> Result<Relayed, RelayError> {
    let mut bounds = Bounds::default();
    loop {
        limit(guest, deadline, false)?;
        let transfer: Transfer = read_frame(&mut &*guest).map_err(|e| guest_failed(e, deadline))?;
        if let Transfer::Failed(refusal) = &transfer {
            // The clone must not take silence for an end.
            let _ = write_frame(&mut &*clone, &transfer);
            return Err(RelayError::GuestRefused(refusal.reason.clone()));
        }
        let end = bounds.pass(&transfer)?;
        limit(clone, deadline, true)?;
        if let Err(error) = write_frame(&mut &*clone, &transfer) {
            return Err(refused_early(clone, error, deadline));
        }
        if matches!(transfer, Transfer::EntryEnd) {
            progress(bounds.entries, bounds.bytes);
        }
        if let Some(end) = end {
            limit(clone, deadline, false)?;
            return match read_frame(&mut &*clone).map_err(|e| clone_failed(e, deadline))? {
                Imported::Applied(applied) if applied.conflicts.len() <= MAX_LIST => {
                    Ok(Relayed { end, applied })
                }
                Imported::Applied(_) => Err(RelayError::Protocol("too many conflicts in one answer".into())),
                Imported::Refused(refusal) => Err(RelayError::CloneRefused(refusal.reason)),
            };
        }
    }
}

/// Reads an export that only counts.
pub fn count(guest: &UnixStream, deadline: Option<Instant>) -> Result<RoundEnd, RelayError> {
    limit(guest, deadline, false)?;
    match read_frame(&mut &*guest).map_err(|e| guest_failed(e, deadline))? {
        Transfer::RoundEnd(end) => Ok(end),
        Transfer::Failed(refusal) => Err(RelayError::GuestRefused(refusal.reason)),
        _ => Err(RelayError::Protocol(
            "it sends entries where it shall only count".into(),
        )),
    }
}

/// A clone that refuses answers and closes; its words are worth more than the broken pipe.
fn refused_early(clone: &UnixStream, error: FrameError, deadline: Option<Instant>) -> RelayError {
    let _ = clone.set_read_timeout(Some(Duration::from_secs(1)));
    match read_frame(&mut &*clone) {
        Ok(Imported::Refused(refusal)) => RelayError::CloneRefused(refusal.reason),
        _ => clone_failed(error, deadline),
    }
}

fn limit(stream: &UnixStream, deadline: Option<Instant>, write: bool) -> Result<(), RelayError> {
    let left = match deadline {
        Some(deadline) => deadline.saturating_duration_since(Instant::now()).min(SILENCE),
        None => SILENCE,
    };
    if left.is_zero() {
        return Err(RelayError::Deadline);
    }
    let set = if write {
        stream.set_write_timeout(Some(left))
    } else {
        stream.set_read_timeout(Some(left))
    };
    set.map_err(|error| RelayError::Guest(error.into()))
}

fn is_late(error: &FrameError, deadline: Option<Instant>) -> bool {
    let timed_out = matches!(error, FrameError::Io(error)
        if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut));
    timed_out && deadline.is_some_and(|deadline| Instant::now() >= deadline)
}

fn guest_failed(error: FrameError, deadline: Option<Instant>) -> RelayError {
    if is_late(&error, deadline) {
        return RelayError::Deadline;
    }
    RelayError::Guest(error)
}

fn clone_failed(error: FrameError, deadline: Option<Instant>) -> RelayError {
    if is_late(&error, deadline) {
        return RelayError::Deadline;
    }
    RelayError::Clone(error)
}

/// What has passed in this round.
#[derive(Debug, Default)]
struct Bounds {
    entries: u64,
    bytes: u64,
    /// Whether an entry is open that content belongs to.
    open: bool,
}

impl Bounds {
    /// Lets a message pass, or says why not; the end of the round, if it is that.
    fn pass(&mut self, transfer: &Transfer) -> Result<Option<RoundEnd>, RelayError> {
        let broken = |what: &str| Err(RelayError::Protocol(what.to_owned()));
        match transfer {
            Transfer::Entry(entry) => {
                if self.open {
                    return broken("an entry begins within another");
                }
                check_entry(entry)?;
                self.open = true;
                self.entries += 1;
            }
            Transfer::Data { offset, bytes } => {
                if !self.open {
                    return broken("content without an entry");
                }
                if bytes.len() > MAX_DATA {
                    return broken("a chunk is too large");
                }
                check_range(*offset, bytes.len() as u64)?;
                self.bytes += bytes.len() as u64;
            }
            Transfer::Hole { offset, length } => {
                if !self.open {
                    return broken("a hole without an entry");
                }
                check_range(*offset, *length)?;
            }
            Transfer::EntryEnd => {
                if !self.open {
                    return broken("an entry ends that did not begin");
                }
                self.open = false;
            }
            Transfer::RoundEnd(end) => {
                if self.open {
                    return broken("the round ends within an entry");
                }
                if end.entries != self.entries || end.bytes != self.bytes {
                    return Err(RelayError::Protocol(format!(
                        "it counts {} entries and {} bytes where {} and {} came",
                        end.entries, end.bytes, self.entries, self.bytes
                    )));
                }
                return Ok(Some(*end));
            }
            Transfer::Failed(_) => {}
        }
        Ok(None)
    }
}

fn check_range(offset: u64, length: u64) -> Result<(), RelayError> {
    match offset.checked_add(length) {
        Some(end) if end <= MAX_OFFSET => Ok(()),
        _ => Err(RelayError::Protocol("content beyond the end of any file".into())),
    }
}

fn check_entry(entry: &Entry) -> Result<(), RelayError> {
    let broken = |what: &str| Err(RelayError::Protocol(what.to_owned()));
    let path = &entry.path;
    if path.len() > MAX_PATH || path.first() != Some(&b'/') || path.contains(&0) {
        return broken("a path is too long, not absolute or has a NUL in it");
    }
    if path.split(|byte| *byte == b'/').any(|part| part == b"..") {
        return broken("a path leads upwards");
    }
    let meta = match &entry.node {
        Node::Gone => return Ok(()),
        Node::Symlink { target, .. } if target.len() > MAX_PATH => {
            return broken("the target of a symbolic link is too long");
        }
        Node::File { size, .. } if *size > MAX_OFFSET => return broken("a file is larger than any can be"),
        Node::Directory { meta }
        | Node::File { meta, .. }
        | Node::Symlink { meta, .. }
        | Node::Special { meta, .. } => meta,
    };
    if meta.xattrs.len() > MAX_LIST || meta.handle.1.len() > 128 {
        return broken("metadata is out of bounds");
    }
    Ok(())
}

#[cfg(test)]
#[path = "relay_test.rs"]
mod tests;
