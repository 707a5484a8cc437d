//! Before the reboot: preflight, keys, saves.

use std::fs;
use std::time::Duration;

use understudy_vmm_control::api::VmState;
use understudy_vmm_control::session::SaveInfo;
use uuid::Uuid;

use super::{HostWorld, errors};
use crate::host_update::effects::{FoundGuest, Preflight, SaveProgress};
use crate::host_update::{EffectError, Effected, ErrorKind, Session, Update};
use crate::sessions::{self, Cancelled, SessionError};
use crate::store::Object;
use crate::vmm::Process;

impl HostWorld {
    pub(super) fn do_preflight(&mut self, update: &Update) -> Effected<Preflight> {
        let node = &self.node;
        let mut found = Vec::new();
        for guest in node.objects.guests() {
            let Some(instance) = sessions::running(node, &guest) else {
                continue;
            };
            let mut problem = None;
            match instance.client().info() {
                Ok(info) if matches!(info.state, VmState::Exited | VmState::Dormant) => continue,
                Ok(_) => {}
                Err(error) => problem = Some(format!("its VMM does not answer: {error}")),
            }
            let memory = sessions::memory_bytes(&instance);
            if memory.is_none() {
                problem.get_or_insert_with(|| "the configuration of its VMM is gone".to_owned());
            }
            let memory_bytes = memory.unwrap_or(0);
            let resident = instance.process().and_then(|process| resident_bytes(&process));
            found.push(FoundGuest {
                guest: guest.key().to_string(),
                uid: guest.uid(),
                incarnation: instance.incarnation,
                checkpoint: Uuid::new_v4(),
                priority: guest.spec.priority,
                memory_bytes,
                expected_bytes: resident.unwrap_or(memory_bytes).min(memory_bytes),
                problem,
            });
        }
        let memory: Vec<u64> = found.iter().map(|guest| guest.expected_bytes).collect();
        let space = sessions::check_space(&node.sessions, &memory)
            .map_err(|error| EffectError::new(ErrorKind::Retry, error.to_string()))?;
        for (guest, missing) in found.iter_mut().zip(space) {
            guest.problem = guest.problem.take().or(missing);
        }
        Ok(Preflight {
            guests: found,
            provider_problem: self.provider_problem(update),
        })
    }

    fn provider_problem(&self, update: &Update) -> Option<String> {
        let sessions = &self.node.sessions;
        if sessions.machine_id().is_empty() {
            return Some(SessionError::NoMachineId.to_string());
        }
        let provider = update.plan.credential_provider.as_deref();
        let ready = sessions
            .credentials
            .provider(provider)
            .and_then(|provider| provider.ready_for(&update.name))
            .and_then(|()| sessions.keys.check());
        ready.err().map(|error| error.to_string())
    }

    pub(super) fn do_register_key(&mut self, update: &Update, session: &Session) -> Effected<()> {
        let Some(guest) = self.guest(session)? else {
            let message = format!("Guest {} was deleted", session.guest);
            return Err(EffectError::new(ErrorKind::Refused, message));
        };
        let provider = update.plan.credential_provider.as_deref();
        sessions::register_key(&self.node, &guest, session.checkpoint, &update.name, provider)
            .map_err(|error| errors::session(&error, self.is_alive(session)))
    }

    pub(super) fn do_save(
        &mut self,
        update: &Update,
        session: &Session,
        lease_ms: u64,
    ) -> Effected<SaveProgress> {
        let lease = Duration::from_millis(lease_ms);
        let result = sessions::save(&self.node, &session.uid, session.checkpoint, lease);
        let progress = self.told(session, result)?;
        if progress.state == understudy_vmm_control::session::SaveState::Saved {
            let took = crate::host::moment().since(update.phase_since());
            sessions::remember_rate(&self.node, progress.written_bytes, took);
        }
        Ok(progress)
    }

    pub(super) fn do_pause_for_save(&mut self, session: &Session) -> Effected<SaveProgress> {
        let result = sessions::pause(&self.node, &session.uid, session.checkpoint);
        self.told(session, result)
    }

    pub(super) fn do_keep_saved(&mut self, session: &Session, lease_ms: u64) -> Effected<SaveProgress> {
        let lease = Duration::from_millis(lease_ms);
        let result = sessions::keep(&self.node, &session.uid, session.checkpoint, lease);
        self.told(session, result)
    }

    pub(super) fn do_cancel_save(&mut self, session: &Session) -> Effected<()> {
        match sessions::cancel(&self.node, &session.uid, session.checkpoint) {
            Ok(Cancelled::RunsOn) => Ok(()),
            Ok(Cancelled::Gone) => Err(EffectError::new(
                ErrorKind::GuestGone,
                format!("the VMM of {} has ended", session.guest),
            )),
            Err(error) => Err(errors::session(&error, self.is_alive(session))),
        }
    }

    fn told(&self, session: &Session, result: Result<SaveInfo, SessionError>) -> Effected<SaveProgress> {
        let info = result.map_err(|error| errors::session(&error, self.is_alive(session)))?;
        Ok(SaveProgress {
            state: info.state,
            rounds: info.rounds,
            written_bytes: info.written_bytes,
            remaining_bytes: info.remaining_bytes,
            checkpoint_bytes: info.checkpoint_bytes,
            pause_us: info.pause_us.unwrap_or(0),
            error: info.error,
        })
    }

    /// Whether the VMM whose session it is runs.
    fn is_alive(&self, session: &Session) -> bool {
        self.node
            .instances
            .get(&session.uid, session.incarnation)
            .is_some_and(|instance| instance.is_alive())
    }
}

/// Memory of a process that is there: pages that were never touched are zero, and cost a save nothing.
fn resident_bytes(process: &Process) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{}/status", process.pid)).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_there_is_told_in_bytes() {
        let me = Process::of(std::process::id()).unwrap();
        let bytes = resident_bytes(&me).unwrap();
        assert!((1 << 20..1 << 40).contains(&bytes), "{bytes}");
    }
}
