//! Export of the guest to import of the clone: frames are relayed as they are, checked for their bounds
//! and counted. The merge itself is the clone's agent's.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use understudy_channel::{
    Applied, Export, FrameError, Import, Imported, MAX_DATA, MAX_PATH, Purpose, RoundEnd, Transfer,
    read_frame, write_frame,
};

use super::session::{AgentError, dial, left};

/// How long either side may stay silent within a round that makes progress. A clone writes what it got to
/// its disk at the end of the last round, which takes the longest.
const SILENCE: Duration = Duration::from_secs(60);

/// What was relayed, as the host counts it; the agents' own numbers are told beside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Entries.
    pub entries: u64,
    /// Content bytes.
    pub bytes: u64,
}

/// Relays one round from the guest behind `guest` to the clone behind `clone`; until `deadline`, or as long
/// as it makes progress.
pub fn relay(
    guest: &Path,
    clone: &Path,
    export: Export,
    import: Import,
    deadline: Option<Instant>,
) -> Result<(RoundEnd, Applied, Counted), AgentError> {
    let limit = || deadline.map_or(SILENCE, left).min(SILENCE);
    let mut from = dial(guest, Purpose::Export(export), limit())?;
    let mut to = dial(clone, Purpose::Import(import), limit())?;
    let mut counted = Counted::default();
    let end = loop {
        set_timeouts(&from, limit())?;
        let transfer: Transfer = read_frame(&mut from)?;
        check(&transfer, &mut counted)?;
        set_timeouts(&to, limit())?;
        let sent = write_frame(&mut to, &transfer);
        if sent.is_err() {
            // The clone closed the session; it says why in its answer.
            return match read_frame::<Imported>(&mut to) {
                Ok(Imported::Refused(refusal)) => {
                    Err(AgentError::Refused(format!("clone: {}", refusal.reason)))
                }
                _ => Err(sent.err().map_or(AgentError::NotConnected, AgentError::Session)),
            };
        }
        match transfer {
            Transfer::RoundEnd(end) => break end,
            Transfer::Failed(refusal) => {
                return Err(AgentError::Refused(format!("guest: {}", refusal.reason)));
            }
            _ => {}
        }
    };
    set_timeouts(&to, limit())?;
    match read_frame(&mut to)? {
        Imported::Applied(applied) => Ok((end, applied, counted)),
        Imported::Refused(refusal) => Err(AgentError::Refused(format!("clone: {}", refusal.reason))),
    }
}

/// Asks the guest how much is dirty, without sending it.
pub fn count(guest: &Path, export: Export, deadline: Option<Instant>) -> Result<RoundEnd, AgentError> {
    let limit = deadline.map_or(SILENCE, left).min(SILENCE);
    let mut from = dial(guest, Purpose::Export(export), limit)?;
    match read_frame(&mut from)? {
        Transfer::RoundEnd(end) => Ok(end),
        Transfer::Failed(refusal) => Err(AgentError::Refused(format!("guest: {}", refusal.reason))),
        other => Err(AgentError::Unexpected {
            what: "a count".into(),
            answer: format!("{other:?}").chars().take(80).collect(),
        }),
    }
}

fn set_timeouts(stream: &UnixStream, limit: Duration) -> Result<(), AgentError> {
    stream.set_read_timeout(Some(limit)).map_err(FrameError::from)?;
    stream.set_write_timeout(Some(limit)).map_err(FrameError::from)?;
    Ok(())
}

/// Bounds that the frame's own limit does not imply.
fn check(transfer: &Transfer, counted: &mut Counted) -> Result<(), AgentError> {
    let malformed = |reason: &str| Err(AgentError::Session(FrameError::Malformed(reason.to_owned())));
    match transfer {
        Transfer::Entry(entry) => {
            if entry.path.len() > MAX_PATH || entry.path.first() != Some(&b'/') {
                return malformed("an entry's path is not absolute or too long");
            }
            counted.entries += 1;
        }
        Transfer::Data { bytes, .. } => {
            if bytes.len() > MAX_DATA {
                return malformed("a content chunk is too large");
            }
            counted.bytes += bytes.len() as u64;
        }
        _ => {}
    }
    Ok(())
}
