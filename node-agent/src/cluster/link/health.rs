//! Whether the API server answers: told when it changes and not each time, and kept in a file for who asks.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use understudy_api::Time;

use crate::durable;

/// How often the file is written where only its counters have changed.
const PACE: Duration = Duration::from_secs(10);

/// How the link to the API server is, as `<stateDir>/cluster/link.json` tells it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Health {
    /// URL of the API server.
    pub server: String,
    /// Whether it answers.
    pub connected: bool,
    /// Since when that is so.
    pub since: Option<Time>,
    /// Why it does not, in the words of the last try.
    pub message: Option<String>,
    /// Statuses written since the agent was started.
    pub writes: u64,
    /// Writes that somebody else's stood against.
    pub conflicts: u64,
    /// Writes that were refused.
    pub refused: u64,
    /// Events written.
    pub events: u64,
    /// Complete lists read.
    pub lists: u64,
}

/// Keeps a [`Health`].
#[derive(Debug)]
pub struct Keeper {
    path: PathBuf,
    state: Mutex<(Health, Option<Instant>)>,
}

/// Where it is.
pub fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("cluster").join("link.json")
}

impl Keeper {
    /// Nothing is known yet.
    pub fn new(state_dir: &Path) -> Keeper {
        Keeper {
            path: path(state_dir),
            state: Mutex::default(),
        }
    }

    /// How it is.
    pub fn get(&self) -> Health {
        self.lock().0.clone()
    }

    /// The API server answers.
    pub fn answers(&self, server: &str) {
        let mut state = self.lock();
        let health = &mut state.0;
        if !health.connected || health.server != server {
            match health.since.as_ref().filter(|_| !health.connected) {
                Some(since) => {
                    let away = Timestamp::now().as_second() - since.0.as_second();
                    tracing::info!(server, away_s = away, "the API server answers again");
                }
                None => tracing::info!(server, "the API server answers"),
            }
            health.since = Some(Time(Timestamp::now()));
        }
        health.connected = true;
        health.server = server.to_owned();
        health.message = None;
        self.write(&mut state, true);
    }

    /// It does not.
    pub fn is_away(&self, server: &str, why: &str) {
        let mut state = self.lock();
        let health = &mut state.0;
        let is_news = health.connected || health.since.is_none();
        if is_news {
            tracing::warn!(server, why, "the API server is away; guests and operations go on");
            health.since = Some(Time(Timestamp::now()));
        } else if health.message.as_deref() != Some(why) {
            tracing::debug!(server, why, "the API server is still away");
        }
        health.connected = false;
        health.server = server.to_owned();
        health.message = Some(why.to_owned());
        self.write(&mut state, is_news);
    }

    /// Counts.
    pub fn count(&self, count: impl FnOnce(&mut Health)) {
        let mut state = self.lock();
        count(&mut state.0);
        self.write(&mut state, false);
    }

    fn write(&self, state: &mut MutexGuard<'_, (Health, Option<Instant>)>, is_news: bool) {
        if !is_news && state.1.is_some_and(|then| then.elapsed() < PACE) {
            return;
        }
        state.1 = Some(Instant::now());
        if let Err(error) = durable::write_json_relaxed(&self.path, &state.0) {
            tracing::warn!(%error, "how the link to the API server is could not be noted");
        }
    }

    fn lock(&self) -> MutexGuard<'_, (Health, Option<Instant>)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
