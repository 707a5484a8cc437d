//! Writes status on a thread of its own, so that no engine waits for it: the newest state counts, phases at
//! once, progress now and then.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Progress is written at most this often; a phase at once.
const PROGRESS: Duration = Duration::from_millis(500);

/// Takes states of type `T` and has them written.
pub struct Reporter<T> {
    latest: Arc<Latest<T>>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl<T> Clone for Reporter<T> {
    fn clone(&self) -> Reporter<T> {
        Reporter {
            latest: self.latest.clone(),
            thread: self.thread.clone(),
        }
    }
}

struct Latest<T> {
    /// The newest state that was not written, and whether no more will come.
    state: Mutex<(Option<T>, bool)>,
    changed: Condvar,
}

impl<T: Clone + Send + 'static> Reporter<T> {
    /// Starts a thread that calls `write` with the newest state, and with whether its phase is another than
    /// that of the state written before.
    pub fn start<P: Copy + PartialEq + Send + 'static>(
        name: &str,
        phase: impl Fn(&T) -> P + Send + 'static,
        write: impl FnMut(&T, bool) + Send + 'static,
    ) -> Reporter<T> {
        let latest = Arc::new(Latest {
            state: Mutex::new((None, false)),
            changed: Condvar::new(),
        });
        let thread = std::thread::Builder::new().name(format!("report {name}")).spawn({
            let latest = latest.clone();
            move || latest.write(phase, write)
        });
        if let Err(error) = &thread {
            tracing::error!(name, %error, "no thread for the status; only the end is told");
        }
        Reporter {
            latest,
            thread: Arc::new(Mutex::new(thread.ok())),
        }
    }

    /// Has a state written, unless a newer one comes first.
    pub fn put(&self, state: &T) {
        let mut latest = self.latest.state.lock().unwrap_or_else(PoisonError::into_inner);
        latest.0 = Some(state.clone());
        self.latest.changed.notify_one();
    }

    /// Waits until the last state was written; the thread ends.
    pub fn finish(&self) {
        self.latest.state.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.latest.changed.notify_one();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

impl<T> Latest<T> {
    fn write<P: Copy + PartialEq>(&self, phase: impl Fn(&T) -> P, mut write: impl FnMut(&T, bool)) {
        let mut written: Option<(P, Instant)> = None;
        loop {
            let (state, finished) = {
                let latest = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                let mut latest = self
                    .changed
                    .wait_while(latest, |(state, finished)| state.is_none() && !*finished)
                    .unwrap_or_else(PoisonError::into_inner);
                // What changed within a phase may wait for more of it.
                let same_phase =
                    |state: &Option<T>| state.as_ref().map(&phase) == written.map(|(before, _)| before);
                if let Some((_, when)) = written.filter(|_| same_phase(&latest.0)) {
                    let left = PROGRESS.saturating_sub(when.elapsed());
                    (latest, _) = self
                        .changed
                        .wait_timeout_while(latest, left, |(state, finished)| same_phase(state) && !*finished)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                (latest.0.take(), latest.1)
            };
            if let Some(state) = state {
                let now = phase(&state);
                write(&state, written.is_none_or(|(before, _)| before != now));
                written = Some((now, Instant::now()));
            } else if finished {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_and_the_last_state_are_written() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let reporter = Reporter::start("test", |state: &(u8, u32)| state.0, {
            let seen = seen.clone();
            move |state: &(u8, u32), is_new_phase| seen.lock().unwrap().push((*state, is_new_phase))
        });
        reporter.put(&(1, 0));
        while seen.lock().unwrap().is_empty() {
            std::thread::yield_now();
        }
        for progress in 1..1000 {
            reporter.put(&(1, progress));
        }
        reporter.put(&(2, 0));
        reporter.finish();
        let seen = seen.lock().unwrap();
        assert_eq!(seen.first(), Some(&((1, 0), true)));
        assert_eq!(seen.last(), Some(&((2, 0), true)));
        assert!(seen.len() < 10, "progress is not written each time");
    }
}
