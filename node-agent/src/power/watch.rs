//! The inhibitor, held while the agent runs, and what logind says.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::host;
use crate::moment::Moment;

use super::{Logind, PowerError, PowerState, Shutdown};

/// Pause before logind is looked for again.
const AGAIN: Duration = Duration::from_secs(5);

/// The host's power, watched on a thread of its own until this is dropped.
pub struct Power {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    address: Option<String>,
    state: Mutex<State>,
    changed: Condvar,
    on_change: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct State {
    stop: bool,
    logind: Option<Logind>,
    inhibitor: Option<OwnedFd>,
    /// We let go of it on purpose, and do not take it again by ourselves.
    let_go: bool,
    delay: Option<Duration>,
    going_down: Option<Shutdown>,
    since: Option<Moment>,
    problem: Option<String>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.notify_all();
        (self.on_change)();
    }
}

impl Power {
    /// Watches logind on the system bus, or on the bus at `address`. `on_change` is called, on a thread of
    /// its own, whenever [`Power::state`] has changed. A host without logind is no error here: the state
    /// says so, and logind is looked for again.
    pub fn watch(
        address: Option<&str>,
        on_change: impl Fn() + Send + Sync + 'static,
    ) -> Result<Power, PowerError> {
        let shared = Arc::new(Shared {
            address: address.map(str::to_owned),
            state: Mutex::default(),
            changed: Condvar::new(),
            on_change: Box::new(on_change),
        });
        let thread = std::thread::Builder::new()
            .name("power".into())
            .spawn({
                let shared = shared.clone();
                move || keep(&shared)
            })
            .map_err(PowerError::Thread)?;
        Ok(Power {
            shared,
            thread: Some(thread),
        })
    }

    /// What is known now.
    pub fn state(&self) -> PowerState {
        let state = self.shared.state();
        PowerState {
            held: state.inhibitor.is_some(),
            delay: state.delay,
            going_down: state.going_down,
            since: state.since,
            problem: state.problem.clone(),
        }
    }

    /// Waits until the state satisfies `when`, at most for `limit`; the state then.
    pub fn wait(&self, limit: Duration, mut when: impl FnMut(&PowerState) -> bool) -> PowerState {
        let deadline = std::time::Instant::now() + limit;
        loop {
            let state = self.state();
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if when(&state) || left.is_zero() {
                return state;
            }
            let guard = self.shared.state();
            // What changed since it was looked at wakes nobody any more: so not for the whole time.
            drop(self.shared.changed.wait_timeout(guard, left.min(AGAIN / 50)));
        }
    }

    /// Lets go of the inhibitor: the host may go down as far as we are concerned.
    pub fn let_go(&self) {
        self.shared.change(|state| {
            state.let_go = true;
            state.inhibitor = None;
        });
    }

    /// Holds the inhibitor again after [`Power::let_go`].
    pub fn hold(&self) {
        let logind = {
            let mut state = self.shared.state();
            state.let_go = false;
            if state.inhibitor.is_some() {
                return;
            }
            state.logind.clone()
        };
        let Some(logind) = logind else { return };
        match logind.inhibit() {
            Ok(inhibitor) => self.shared.change(|state| state.inhibitor = Some(inhibitor)),
            Err(error) => self
                .shared
                .change(|state| state.problem = Some(error.to_string())),
        }
    }

    /// Reads again how long logind waits: its configuration may have been changed, and it tells nobody.
    pub fn read_delay(&self) {
        let logind = self.shared.state().logind.clone();
        if let Some(Ok(delay)) = logind.map(|logind| logind.delay()) {
            self.shared.state().delay = Some(delay);
        }
    }

    /// Whether logind has begun to take the host down, asked now; `None` where it cannot be asked.
    pub fn is_going_down(&self) -> Option<bool> {
        let logind = self.shared.state().logind.clone()?;
        logind.is_going_down().ok()
    }

    /// Asks logind for a reboot. The inhibitor is let go of first: what it was for is done.
    pub fn reboot(&self) -> Result<(), PowerError> {
        self.let_go();
        let logind = self.shared.state().logind.clone();
        match logind {
            Some(logind) => logind.reboot(),
            None => Logind::connect(self.shared.address.as_deref())?.reboot(),
        }
    }
}

impl Drop for Power {
    fn drop(&mut self) {
        let logind = {
            let mut state = self.shared.state();
            state.stop = true;
            state.logind.take()
        };
        self.shared.changed.notify_all();
        if let Some(logind) = logind {
            logind.close();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread: connects, holds, listens, and begins anew when the bus is gone.
fn keep(shared: &Shared) {
    loop {
        let end = session(shared);
        let mut state = shared.state();
        if state.stop {
            return;
        }
        state.logind = None;
        let problem = match end {
            Ok(()) => "the bus has gone away".to_owned(),
            Err(error) => error.to_string(),
        };
        if state.problem.as_ref() != Some(&problem) {
            tracing::warn!("{problem}; a reboot that the host begins may not wait for sessions to be saved");
        }
        // An inhibitor that logind gave outlives our connection, and logind itself: it is kept.
        state.problem = Some(problem);
        drop(state);
        shared.changed.notify_all();
        (shared.on_change)();
        let state = shared.state();
        let (state, _) = shared
            .changed
            .wait_timeout_while(state, AGAIN, |state| !state.stop)
            .unwrap_or_else(PoisonError::into_inner);
        if state.stop {
            return;
        }
    }
}

fn session(shared: &Shared) -> Result<(), PowerError> {
    let logind = Logind::connect(shared.address.as_deref())?;
    let delay = logind.delay()?;
    {
        let mut state = shared.state();
        if state.stop {
            return Ok(());
        }
        state.logind = Some(logind.clone());
        state.delay = Some(delay);
        state.problem = None;
    }
    let needs = |state: &State| state.inhibitor.is_none() && !state.let_go;
    if needs(&shared.state()) {
        let inhibitor = logind.inhibit()?;
        shared.change(|state| {
            if needs(state) {
                state.inhibitor = Some(inhibitor);
            }
        });
        tracing::info!(
            delay_s = delay.as_secs(),
            "holding a delay inhibitor against shutdown"
        );
    }
    logind.listen(|heard| {
        let called_off = {
            let state = shared.state();
            // The second signal of one event says more, or the same.
            let same = match (state.going_down, heard) {
                (Some(_), Some(Shutdown::Unknown)) => true,
                (before, now) => before == now,
            };
            if same {
                return;
            }
            heard.is_none()
        };
        if called_off {
            tracing::info!("the host does not go down after all");
            match logind.inhibit() {
                Ok(inhibitor) => shared.change(|state| {
                    state.going_down = None;
                    state.since = None;
                    state.let_go = false;
                    state.inhibitor.get_or_insert(inhibitor);
                }),
                Err(error) => shared.change(|state| {
                    state.going_down = None;
                    state.since = None;
                    state.problem = Some(error.to_string());
                }),
            }
        } else {
            tracing::warn!(how = heard.map(Shutdown::as_str), "the host goes down");
            shared.change(|state| {
                state.going_down = heard;
                state.since.get_or_insert_with(host::moment);
            });
        }
    })
}
