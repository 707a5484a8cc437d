//! Freezing and thawing of file systems, with a watchdog (DESIGN §5, step 4): when the host falls silent, the
//! guest thaws by itself.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::service::{lock, spawn};
use crate::sys::freeze;
use crate::systemd::micros;
use crate::view::View;
use crate::{mounts, warning};

/// Why file systems could not be frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The mounts could not be read or opened.
    #[error("the local file systems could not be opened: {0}")]
    Open(io::Error),
    /// One did not freeze; the others were thawed again.
    #[error("{mount_point} could not be frozen: {source}; everything is thawed again")]
    Freeze {
        /// Mount point.
        mount_point: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Frozen already, for something else.
    #[error("file systems are frozen already; thaw them first")]
    Already,
    /// The watchdog was faster.
    #[error("freezing took longer than the watchdog allows ({0} ms); everything is thawed again")]
    TooLate(u32),
}

/// How a freeze ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thawed {
    /// The watchdog had thawed.
    pub by_watchdog: bool,
    /// How long it was frozen, in microseconds.
    pub frozen_us: u64,
}

/// Something that ends by itself unless it is ended in time. Shared by both kinds of freezing.
#[derive(Debug)]
pub struct Watchdog<T> {
    state: Arc<(Mutex<State<T>>, Condvar)>,
}

#[derive(Debug)]
struct State<T> {
    held: Option<(T, Instant, Instant)>,
    last: Option<Thawed>,
}

impl<T> Default for Watchdog<T> {
    fn default() -> Self {
        Self {
            state: Arc::new((
                Mutex::new(State {
                    held: None,
                    last: None,
                }),
                Condvar::new(),
            )),
        }
    }
}

impl<T: Send + 'static> Watchdog<T> {
    /// Holds `value` until [`Self::release`], at most until `deadline`; then `undo` gets it.
    pub fn hold(&self, value: T, since: Instant, deadline: Instant, undo: impl FnOnce(T) + Send + 'static) {
        {
            let mut state = lock(&self.state.0);
            state.held = Some((value, since, deadline));
            state.last = None;
        }
        let shared = Arc::clone(&self.state);
        spawn("watchdog", move || {
            let mut state = lock(&shared.0);
            loop {
                let Some((_, since, deadline)) = &state.held else {
                    return;
                };
                let (since, left) = (*since, deadline.saturating_duration_since(Instant::now()));
                if left.is_zero() {
                    let Some((value, ..)) = state.held.take() else {
                        return;
                    };
                    // Under the lock: who releases now must not overtake the thawing.
                    undo(value);
                    state.last = Some(Thawed {
                        by_watchdog: true,
                        frozen_us: micros(since.elapsed()),
                    });
                    return;
                }
                state = shared
                    .1
                    .wait_timeout(state, left)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
        });
    }

    /// Sets a later deadline; false where nothing is held.
    pub fn renew(&self, deadline: Instant) -> bool {
        let mut state = lock(&self.state.0);
        match state.held.as_mut() {
            Some(held) => {
                held.2 = deadline;
                true
            }
            None => false,
        }
    }

    /// Whether something is held.
    pub fn is_held(&self) -> bool {
        lock(&self.state.0).held.is_some()
    }

    /// Ends the holding: `undo` gets what was held. Tells how the last holding ended where the watchdog was
    /// faster, and nothing where nothing was held.
    pub fn release(&self, undo: impl FnOnce(T)) -> Thawed {
        let mut state = lock(&self.state.0);
        match state.held.take() {
            Some((value, since, _)) => {
                undo(value);
                let thawed = Thawed {
                    by_watchdog: false,
                    frozen_us: micros(since.elapsed()),
                };
                self.state.1.notify_all();
                thawed
            }
            None => state.last.take().unwrap_or(Thawed {
                by_watchdog: false,
                frozen_us: 0,
            }),
        }
    }
}

/// Freezes the guest's file systems.
#[derive(Debug, Default)]
pub struct Filesystems {
    frozen: Watchdog<Vec<View>>,
}

impl Filesystems {
    /// Writes everything out (no freeze).
    pub fn sync() -> Result<(), FreezeError> {
        views()
            .map_err(FreezeError::Open)?
            .iter()
            .try_for_each(View::sync)
            .map_err(FreezeError::Open)
    }

    /// Freezes all writable local file systems; returns how long the freezing took, in microseconds.
    pub fn freeze(&self, watchdog_ms: u32) -> Result<u64, FreezeError> {
        self.freeze_these(views().map_err(FreezeError::Open)?, watchdog_ms)
    }

    /// Freezes these file systems.
    pub fn freeze_these(&self, views: Vec<View>, watchdog_ms: u32) -> Result<u64, FreezeError> {
        if self.frozen.is_held() {
            return Err(FreezeError::Already);
        }
        // Most of the writing happens before anybody has to wait.
        views.iter().try_for_each(View::sync).map_err(FreezeError::Open)?;
        let begin = Instant::now();
        let deadline = begin + Duration::from_millis(watchdog_ms.into());
        let mut done: Vec<View> = Vec::new();
        // The root last: what is mounted on it may need it to be written out.
        for view in views.into_iter().rev() {
            if let Err(source) = freeze::freeze(view.mounted()) {
                thaw(done);
                return Err(FreezeError::Freeze {
                    mount_point: view.mount_point,
                    source,
                });
            }
            done.push(view);
        }
        if Instant::now() >= deadline {
            thaw(done);
            return Err(FreezeError::TooLate(watchdog_ms));
        }
        let took = micros(begin.elapsed());
        self.frozen.hold(done, begin, deadline, thaw);
        Ok(took)
    }

    /// Thaws; idempotent.
    pub fn thaw(&self) -> Thawed {
        self.frozen.release(thaw)
    }
}

/// The root first: everything else leans on it.
fn thaw(views: Vec<View>) {
    for view in views.into_iter().rev() {
        if let Err(error) = freeze::thaw(view.mounted()) {
            warning!("{} could not be thawed: {error}", view.mount_point.display());
        }
    }
}

fn views() -> io::Result<Vec<View>> {
    mounts::local_writable()?
        .iter()
        .map(|m| View::open(&m.mount_point))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn what_is_released_in_time_is_undone_once_and_not_by_the_watchdog() {
        let watchdog = Watchdog::default();
        let undone = Arc::new(AtomicU32::new(0));
        let now = Instant::now();
        let by_dog = Arc::clone(&undone);
        watchdog.hold((), now, now + Duration::from_secs(60), move |()| {
            by_dog.fetch_add(10, Ordering::SeqCst);
        });
        assert!(watchdog.renew(now + Duration::from_secs(120)));
        let thawed = watchdog.release(|()| {
            undone.fetch_add(1, Ordering::SeqCst);
        });
        assert!(!thawed.by_watchdog);
        assert_eq!(undone.load(Ordering::SeqCst), 1);
        assert_eq!(
            watchdog.release(|()| panic!("undone twice")),
            Thawed {
                by_watchdog: false,
                frozen_us: 0
            }
        );
    }

    #[test]
    fn a_silent_host_is_waited_for_no_longer_than_the_watchdog_allows() {
        let watchdog = Watchdog::default();
        let (told, heard) = std::sync::mpsc::channel();
        let now = Instant::now();
        watchdog.hold((), now, now + Duration::from_millis(20), move |()| {
            told.send(()).unwrap()
        });
        heard.recv_timeout(Duration::from_secs(30)).unwrap();
        let thawed = watchdog.release(|()| panic!("undone twice"));
        assert!(thawed.by_watchdog && thawed.frozen_us >= 20_000);
    }
}
