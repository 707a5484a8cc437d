//! Makes a file's content durable while more is written, so that little is left for the final sync.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::files::Storage;

/// A thread that syncs one file when asked to. Requests that come while it syncs are served by one more.
pub(crate) struct Flusher {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    wanted: bool,
    stopping: bool,
    /// The first failure. The kernel reports one only once, so that it must not be lost.
    error: Option<io::Error>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock, and the state would be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flusher {
    pub fn start(file: Arc<dyn Storage>) -> io::Result<Flusher> {
        let shared = Arc::new(Shared::default());
        let thread = thread::Builder::new().name("flush-memory".into()).spawn({
            let shared = shared.clone();
            move || run(&shared, file.as_ref())
        })?;
        Ok(Flusher {
            shared,
            thread: Some(thread),
        })
    }

    /// Asks for a sync of what was written so far; returns at once.
    pub fn request(&self) {
        self.shared.lock().wanted = true;
        self.shared.wake.notify_one();
    }

    /// Waits for a sync that is under way and tells whether any has failed.
    pub fn stop(mut self) -> io::Result<()> {
        self.join();
        match self.shared.lock().error.take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn join(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            self.shared.lock().error = Some(io::Error::other("the syncing thread panicked"));
        }
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.join();
    }
}

fn run(shared: &Shared, file: &dyn Storage) {
    let mut state = shared.lock();
    loop {
        while !state.wanted && !state.stopping {
            state = shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.stopping {
            // The writer syncs once more anyway.
            return;
        }
        state.wanted = false;
        drop(state);
        let result = file.sync();
        state = shared.lock();
        if let Err(error) = result {
            state.error.get_or_insert(error);
        }
    }
}
