//! What reboots of the host ask of everything else on the node: which updates are under way, which guests
//! and operations they hold back, and what the host itself is about to do.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use understudy_api::conditions::reasons;
use understudy_api::guest::{GuestPhase, SavedSession};
use understudy_api::node_update::SessionState;
use understudy_api::{NodeUpdatePhase, Time};
use uuid::Uuid;

use crate::host;
use crate::host_update::effects::HostIntent;
use crate::host_update::hold::{Hold, hold};
use crate::host_update::{Session, Update};
use crate::moment::Moment;
use crate::power::{Power, PowerState, Shutdown, Systemctl};
use crate::store::Key;

/// The state, shared by the agent's threads.
#[derive(Default)]
pub struct HostWork {
    power: OnceLock<Power>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Updates by UID, as they stand: those that run, and those whose records stay in the journal.
    updates: BTreeMap<String, Update>,
    /// Those that a driver runs.
    driven: HashSet<String>,
    /// The service is being stopped because the host goes down.
    stop_job: Option<StopJob>,
    /// Guests whose SeamlessReboots stop, to go on later.
    suspended: HashSet<Key>,
    /// Guests whose SeamlessReboots are undone.
    aborted: HashSet<Key>,
    changes: u64,
}

#[derive(Clone, Copy, Debug)]
struct StopJob {
    how: Shutdown,
    deadline: Moment,
}

impl HostWork {
    /// Watches the host's power from now on. Without it the node hears of no shutdown.
    pub fn watch(&self, power: Power) {
        // Only an agent that is started twice in one process would find it set.
        let _ = self.power.set(power);
        self.wake();
    }

    /// The host's power, where it is watched.
    pub fn power(&self) -> Option<&Power> {
        self.power.get()
    }

    /// What is known of the host's power.
    pub fn power_state(&self) -> PowerState {
        self.power.get().map(Power::state).unwrap_or_default()
    }

    /// The service is being stopped because the host goes down; systemd waits until `deadline`.
    pub fn stop_job(&self, how: Shutdown, deadline: Moment) {
        self.state().stop_job = Some(StopJob { how, deadline });
        self.wake();
    }

    /// What the host itself is about to do.
    pub fn intent(&self) -> HostIntent {
        if let Some(job) = self.state().stop_job {
            return HostIntent::GoesDown {
                deadline: job.deadline,
                reason: job.how.as_str().to_owned(),
            };
        }
        let Some(power) = self.power.get() else {
            return HostIntent::Unknown;
        };
        let state = power.state();
        if let Some(how) = state.going_down {
            let since = state.since.unwrap_or_else(host::moment);
            let delay = i64::try_from(state.delay.unwrap_or_default().as_micros()).unwrap_or(i64::MAX);
            return HostIntent::GoesDown {
                deadline: since.plus(delay),
                reason: how.as_str().to_owned(),
            };
        }
        match state.problem {
            None if state.delay.is_some() => HostIntent::StaysUp,
            None => HostIntent::Unknown,
            // Without logind nobody announces a shutdown; systemd itself may be within one, and then nobody
            // knows how long it waits.
            Some(_) if Path::new("/run/systemd/system").is_dir() => {
                match Systemctl::new(Path::new("systemctl")).shutdown() {
                    Some(how) => {
                        let deadline = host::moment();
                        let job = *self.state().stop_job.get_or_insert(StopJob { how, deadline });
                        HostIntent::GoesDown {
                            deadline: job.deadline,
                            reason: how.as_str().to_owned(),
                        }
                    }
                    None => HostIntent::StaysUp,
                }
            }
            Some(_) => HostIntent::StaysUp,
        }
    }

    /// Notes how an update stands.
    pub fn put(&self, update: &Update) {
        let mut state = self.state();
        let same = state
            .updates
            .get(&update.uid)
            .is_some_and(|there| there.step == update.step && there.sessions == update.sessions);
        state.updates.insert(update.uid.clone(), update.clone());
        if !same {
            drop(state);
            self.wake();
        }
    }

    /// An update is over, and its record gone.
    pub fn forget(&self, uid: &str) {
        self.state().updates.remove(uid);
        self.wake();
    }

    /// A driver begins to run an update; `false` where one does already.
    pub fn drive(&self, uid: &str) -> bool {
        self.state().driven.insert(uid.to_owned())
    }

    /// A driver has ended.
    pub fn undrive(&self, uid: &str) {
        self.state().driven.remove(uid);
        self.wake();
    }

    /// Whether a driver runs this update.
    pub fn is_driven(&self, uid: &str) -> bool {
        self.state().driven.contains(uid)
    }

    /// Whether any driver runs.
    pub fn is_busy(&self) -> bool {
        !self.state().driven.is_empty()
    }

    /// All updates, as they stand.
    pub fn updates(&self) -> Vec<Update> {
        self.state().updates.values().cloned().collect()
    }

    /// The update that has not come to its end, if any: there is one at a time.
    pub fn current(&self) -> Option<Update> {
        self.state()
            .updates
            .values()
            .find(|update| !update.phase().is_terminal())
            .cloned()
    }

    /// Whether no SeamlessReboot may begin.
    pub fn holds_operations(&self) -> bool {
        self.state().updates.values().any(Update::holds_operations)
    }

    /// Whether the guest manager leaves a guest alone, and what it tells of it.
    pub fn hold(&self, guest_uid: &str) -> Option<Hold> {
        self.state()
            .updates
            .values()
            .find_map(|update| hold(update, guest_uid))
    }

    /// A guest's session, from when it is saved until it goes on.
    pub fn session(&self, guest_uid: &str) -> Option<SavedSession> {
        let state = self.state();
        let (update, session) = state.updates.values().find_map(|update| {
            let of_guest = |session: &&Session| {
                session.uid == guest_uid
                    && matches!(
                        session.state,
                        SessionState::Saved | SessionState::Resuming | SessionState::Kept
                    )
            };
            Some((update, update.sessions.iter().find(of_guest)?))
        })?;
        Some(SavedSession {
            checkpoint: session.checkpoint.to_string(),
            node_update: update.name.clone(),
            saved_at: Time(Timestamp::from_microsecond(session.saved_at?.unix_us).ok()?),
            saved_bytes: i64::try_from(session.checkpoint_bytes).unwrap_or(i64::MAX),
        })
    }

    /// Whether no guest is started, stopped or restarted.
    pub fn holds_all_guests(&self) -> bool {
        self.state().updates.values().any(Update::holds_all_guests)
    }

    /// What is told of a guest that does not run while all are held.
    pub fn held_down(&self) -> Hold {
        Hold {
            phase: GuestPhase::Pending,
            reason: reasons::HOST_UPDATING.to_owned(),
            message: "the host is about to reboot; the guest is started afterwards".to_owned(),
        }
    }

    /// Whether an update knows of a checkpoint.
    pub fn knows(&self, checkpoint: Uuid) -> bool {
        self.state().updates.values().any(|update| {
            update
                .sessions
                .iter()
                .any(|session| session.checkpoint == checkpoint)
        })
    }

    /// SeamlessReboots of these guests stop, or are undone.
    pub fn quiesce(&self, suspended: impl IntoIterator<Item = Key>, aborted: impl IntoIterator<Item = Key>) {
        let mut state = self.state();
        state.suspended.extend(suspended);
        state.aborted.extend(aborted);
        drop(state);
        self.wake();
    }

    /// SeamlessReboots may go on.
    pub fn release(&self) {
        let mut state = self.state();
        state.suspended.clear();
        state.aborted.clear();
        drop(state);
        self.wake();
    }

    /// Whether a guest's SeamlessReboot stops, to go on later.
    pub fn is_suspended(&self, guest: &Key) -> bool {
        self.state().suspended.contains(guest)
    }

    /// Whether a guest's SeamlessReboot is undone.
    pub fn is_aborted(&self, guest: &Key) -> bool {
        self.state().aborted.contains(guest)
    }

    /// Whether the service's stop job has to wait: the host goes down, and an update has not come to where
    /// it may.
    pub fn stop_job_waits(&self) -> bool {
        self.current().is_some_and(|update| {
            let phase = update.phase();
            phase != NodeUpdatePhase::Rebooting && !update.step.is_after_reboot()
        })
    }

    /// Waits until something changed, at most for `limit`; `seen` is what the last call returned.
    pub fn wait(&self, seen: u64, limit: Duration) -> u64 {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.state(), limit, |state| state.changes == seen)
            .unwrap_or_else(PoisonError::into_inner);
        state.changes
    }

    /// Wakes who waits.
    pub fn wake(&self) {
        self.state().changes += 1;
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
