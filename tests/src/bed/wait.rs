//! Waiting for conditions, always with a deadline.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// A point in time after which waiting is given up.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    started: Instant,
    limit: Duration,
}

impl Deadline {
    /// A deadline `limit` from now.
    pub fn after(limit: Duration) -> Self {
        Self {
            started: Instant::now(),
            limit,
        }
    }

    /// True once it has passed.
    pub fn passed(&self) -> bool {
        self.started.elapsed() >= self.limit
    }

    /// Time since it was set.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

/// Asks `condition` every `interval` until it yields a value, and returns that value. `what` names
/// the condition in the error when `limit` passes first; an error of the condition ends the wait.
pub fn wait_until<T>(
    what: &str,
    limit: Duration,
    interval: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Deadline::after(limit);
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if deadline.passed() {
            bail!("gave up waiting for {what} after {} s", limit.as_secs());
        }
        std::thread::sleep(interval);
    }
}
