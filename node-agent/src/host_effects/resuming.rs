//! After the reboot: checkpoints, keys, resuming.

use understudy_api::conditions::reasons;
use understudy_vmm_control::api::VmState;

use super::{HostWorld, errors};
use crate::host_update::effects::{CheckpointFacts, Resumption, Settling};
use crate::host_update::{EffectError, Effected, ErrorKind, Session};
use crate::moment::Moment;
use crate::node::Node;
use crate::sessions::{self, Life, Record, ResumeError, SessionError, Standing};
use crate::store::{Key, Object};

/// Whether nobody wants a session any more: its Guest was deleted, or is another one of the same name, or
/// the user has discarded the session.
pub fn is_unwanted(node: &Node, session: &Session) -> Effected<bool> {
    if node
        .sessions
        .records
        .is_to_be_discarded(&session.uid, session.checkpoint)
    {
        return Ok(true);
    }
    let Some((namespace, name)) = session.guest.split_once('/') else {
        return Ok(true);
    };
    let guest = node
        .objects
        .guest(&Key::new(namespace, name))
        .map_err(|error| EffectError::new(ErrorKind::Retry, error.to_string()))?;
    Ok(guest.is_none_or(|guest| guest.uid() != session.uid || guest.is_deleting()))
}

impl HostWorld {
    pub(super) fn do_inspect_checkpoint(&mut self, session: &Session) -> Effected<CheckpointFacts> {
        let record = self.record(session)?;
        let life = record.as_ref().map(|record| record.life(&self.node.instances));
        match life {
            Some(Life::GoesOn) => return Ok(CheckpointFacts::Running),
            Some(Life::Silent) => {
                let message = format!("the VMM of {} does not answer", session.guest);
                return Err(EffectError::new(ErrorKind::Retry, message));
            }
            Some(Life::Otherwise) => return Ok(CheckpointFacts::Unwanted),
            Some(Life::Ended) | None => {}
        }
        // Of another incarnation: it was booted anew.
        let guest = self.guest(session)?;
        let runs = guest.and_then(|guest| sessions::running(&self.node, &guest));
        if runs.is_some() || is_unwanted(&self.node, session)? {
            return Ok(CheckpointFacts::Unwanted);
        }
        let Some(record) = record else {
            return Ok(CheckpointFacts::Missing);
        };
        let standing = self
            .node
            .sessions
            .records
            .standing(&record)
            .map_err(|error| EffectError::new(ErrorKind::Retry, error.to_string()))?;
        Ok(match standing {
            Standing::Incomplete => CheckpointFacts::Missing,
            Standing::Saved => CheckpointFacts::Complete,
            Standing::Consumed => CheckpointFacts::Consumed,
        })
    }

    pub(super) fn do_obtain_key(&mut self, session: &Session) -> Effected<()> {
        // A provider may be waited for as long as it takes: meanwhile the session may be given up.
        if is_unwanted(&self.node, session)? {
            let message = "nobody wants the session any more";
            return Err(EffectError::new(ErrorKind::Refused, message));
        }
        sessions::obtain_key(&self.node, &session.uid, session.checkpoint)
            .map_err(|error| errors::credential(&error))
    }

    pub(super) fn do_resume(&mut self, session: &Session) -> Effected<Resumption> {
        let Some(guest) = self.guest(session)? else {
            let message = format!("Guest {} was deleted", session.guest);
            return Err(EffectError::new(ErrorKind::Refused, message));
        };
        let resumed = sessions::resume(&self.node, &guest, session.checkpoint);
        match resumed {
            Ok(resumed) => {
                let now = crate::host::moment();
                let ago = now.unix_us - resumed.first_instruction_us;
                Ok(Resumption::Runs {
                    first_instruction: Moment {
                        unix_us: resumed.first_instruction_us,
                        boot_us: now.boot_us - ago,
                    },
                })
            }
            Err(ResumeError::Refused { refusal, message }) => Ok(Resumption::Refused { refusal, message }),
            Err(error) => {
                let message = error.to_string();
                Err(match &error {
                    ResumeError::Ended(_) => EffectError::new(ErrorKind::GuestGone, message),
                    ResumeError::Credential(error)
                    | ResumeError::Session(SessionError::Credential(error)) => errors::credential(error),
                    ResumeError::Spec(_) | ResumeError::Session(SessionError::Unknown { .. }) => {
                        EffectError::new(ErrorKind::Refused, message).because(reasons::SESSION_REFUSED)
                    }
                    _ => EffectError::new(ErrorKind::Retry, message),
                })
            }
        }
    }

    pub(super) fn do_look_after(&mut self, session: &Session) -> Effected<Settling> {
        let Some(record) = self.record(session)? else {
            return Ok(Settling::Gone);
        };
        let vmm = record.vmm(&self.node.instances);
        if !vmm.is_alive() {
            return Ok(Settling::Gone);
        }
        let info = vmm
            .client()
            .info()
            .map_err(|error| EffectError::new(ErrorKind::Retry, error.to_string()))?;
        if matches!(info.state, VmState::Exited | VmState::Dormant) {
            return Ok(Settling::Gone);
        }
        Ok(match info.resume {
            Some(resume) if resume.checkpoint == session.checkpoint => match resume.error {
                Some(message) => Settling::Damaged { message },
                None if resume.pending_bytes == 0 => Settling::Loaded,
                None => Settling::Loading,
            },
            // Reset since: nothing of the session is left in it.
            _ => Settling::Loaded,
        })
    }

    fn record(&self, session: &Session) -> Effected<Option<Record>> {
        self.node
            .sessions
            .records
            .get(&session.uid, session.checkpoint)
            .map_err(|error| EffectError::new(ErrorKind::Retry, error.to_string()))
    }
}
