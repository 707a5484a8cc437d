//! What a guest's worker does about its sessions in each pass: it boots nobody past a session, and destroys
//! what is used up.

use std::time::Duration;

use understudy_vmm_control::api::{VmInfo, VmState};
use uuid::Uuid;

use super::record::{Record, Refused, Standing};
use super::{SessionError, lock};
use crate::node::Node;

/// How long a resumed guest runs before its checkpoint is destroyed.
pub(super) const STEADY: Duration = Duration::from_secs(30);

/// What is left of a guest's sessions, and what follows from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Left {
    /// Nothing that matters: the guest may be booted.
    Nothing,
    /// A session waits. The guest is not booted.
    Waits(Box<Record>),
    /// A session was resumed, and its guest has ended since; or its saving was cut short by the end of the
    /// host. Told once; the guest may be booted.
    Lost {
        /// The checkpoint.
        checkpoint: Uuid,
        /// Why.
        message: String,
    },
    /// Memory of a resumed session could not be read: the guest is paused, all is kept.
    Damaged {
        /// The checkpoint.
        checkpoint: Uuid,
        /// In the VMM's words.
        message: String,
    },
}

/// Looks at a guest's sessions, and destroys those that are used up, void, or discarded by the user. `info`
/// is what its running VMM says, `None` where none runs; `steady`: how long the guest has run.
///
/// A failure of the disk is an error, and then nobody boots.
pub fn look(
    node: &Node,
    guest_uid: &str,
    info: Option<&VmInfo>,
    steady: Duration,
) -> Result<Left, SessionError> {
    let sessions = &node.sessions;
    let mut left = Left::Nothing;
    for record in sessions.records.of(guest_uid)? {
        let checkpoint = record.identity.checkpoint;
        let destroy = || sessions.destroy(guest_uid, checkpoint);
        let runs = info.is_some();
        let resumed = info.and_then(|info| info.resume.as_ref());
        let resumed = resumed.filter(|resume| resume.checkpoint == checkpoint);
        let discarded = sessions.records.is_to_be_discarded(&record);
        match sessions.records.standing(&record)? {
            Standing::Saved if discarded && !runs => {
                tracing::warn!(guest = record.guest, %checkpoint, "its session is discarded, as the user asked");
                destroy()?;
            }
            // Its VMM holds the guest paused; or it is being started from it.
            Standing::Saved if info.is_none_or(|info| info.state == VmState::Saved) => {
                left = Left::Waits(Box::new(record));
            }
            // It runs on: then its VMM has made the checkpoint void, or is about to.
            Standing::Saved => {}
            Standing::Consumed => match resumed {
                Some(resume) => {
                    if let Some(message) = &resume.error {
                        left = Left::Damaged {
                            checkpoint,
                            message: message.clone(),
                        };
                    } else if resume.pending_bytes == 0 && steady >= STEADY {
                        tracing::info!(guest = record.guest, %checkpoint, "its checkpoint and key are destroyed: the guest runs without them");
                        destroy()?;
                    }
                }
                // Reset since, so that nothing of the session is left in it: or another life of the guest.
                None if runs => destroy()?,
                None => {
                    left = lost(&record, "its VMM has ended after it was resumed");
                    destroy()?;
                }
            },
            Standing::Incomplete if runs => {
                // Being saved just now, unless the VMM says that it is not.
                if !lock(&sessions.handed).contains_key(&checkpoint) && is_over(&record) {
                    destroy()?;
                }
            }
            Standing::Incomplete => {
                left = lost(&record, "it was not saved when the host or its VMM ended");
                destroy()?;
            }
        }
    }
    Ok(left)
}

fn lost(record: &Record, why: &str) -> Left {
    let message = format!(
        "the session of {} is lost (checkpoint {}): {why}",
        record.guest, record.identity.checkpoint
    );
    tracing::error!(guest = record.guest, "SessionLost: {message}");
    Left::Lost {
        checkpoint: record.identity.checkpoint,
        message,
    }
}

/// Whether the VMM knows of no save, or of one that has ended without a checkpoint.
fn is_over(record: &Record) -> bool {
    use understudy_vmm_control::client::ClientError;
    use understudy_vmm_control::session::SaveState;
    match record.instance.client().save() {
        Ok(info) if info.checkpoint == record.identity.checkpoint => {
            matches!(info.state, SaveState::Failed | SaveState::Cancelled)
        }
        Ok(_) => true,
        Err(ClientError::Refused { status: 404, .. }) => true,
        Err(_) => false,
    }
}

impl Record {
    /// Why it waits, for the guest's status.
    pub fn waits_for(&self, boot_id: &str) -> Refused {
        self.refused.clone().unwrap_or_else(|| Refused {
            reason: understudy_api::conditions::reasons::SESSION_SAVED.to_owned(),
            message: if self.identity.boot_id == boot_id {
                "its session is saved; it goes on after the host's reboot".to_owned()
            } else {
                "its session is saved; it is resumed when its turn comes".to_owned()
            },
        })
    }
}
