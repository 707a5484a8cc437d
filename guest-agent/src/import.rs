//! Import: a session that brings one round into the clone (DESIGN §5, step 6).

use std::collections::HashMap;
use std::io::{BufReader, Read};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use understudy_channel::{
    Applied, FrameError, Import, Imported, OnConflict, Refusal, Transfer, read_message,
};

use crate::apply::{Applier, ApplyError, Settings};
use crate::filter::{Collect, Filter, FilterError, Spot};
use crate::log::Laps;
use crate::memory::Memory;
use crate::rules::{Rule, rule};
use crate::service::lock;
use crate::units::{Owners, Trees};
use crate::view::View;
use crate::{filter, info, warning};

/// The importing side of a clone.
#[derive(Debug)]
pub struct Importer {
    touched: Arc<Filter>,
    run_dir: PathBuf,
    state_dir: PathBuf,
    since: (i64, u32),
    log_sizes: HashMap<Spot, (u64, u64)>,
    memory: Mutex<Option<Memory>>,
    trees: OnceLock<Trees>,
}

/// Why an import failed.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The session failed; the round will be sent again.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The clone could not apply it.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The clone's file systems could not be watched.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The guest could not go on.
    #[error("the guest could not send its changes: {0}")]
    Guest(String),
    /// What was remembered of earlier rounds could not be used.
    #[error("the memory of earlier rounds in {path}: {source}")]
    Memory {
        /// Directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl Importer {
    /// An importer into these file systems, or into all writable local ones. `since` is the time of the
    /// clone's boot: what changed later, the clone changed itself; it is watched from now on.
    pub fn new(
        only: Option<Vec<View>>,
        run_dir: PathBuf,
        state_dir: PathBuf,
        since: (i64, u32),
    ) -> Result<Self, FilterError> {
        let touched = Filter::begin(only, Collect::Inodes)?;
        let log_sizes = log_sizes(&touched.views());
        Ok(Self {
            touched,
            run_dir,
            state_dir,
            since,
            log_sizes,
            memory: Mutex::new(None),
            trees: OnceLock::new(),
        })
    }

    /// Applies one round from `stream`, and says what to answer. Only a session that breaks is an error.
    pub fn import(&self, request: &Import, stream: &mut impl Read) -> Result<Imported, FrameError> {
        match self.round(request, stream) {
            Ok(applied) => Ok(Imported::Applied(applied)),
            Err(ImportError::Frame(error)) => Err(error),
            Err(error) => {
                warning!("import refused: {error}");
                Ok(Imported::Refused(Refusal {
                    reason: error.to_string(),
                }))
            }
        }
    }

    /// Units that were stopped for the import of `operation`.
    pub fn stopped_units(&self, operation: &str) -> Vec<String> {
        let mut memory = lock(&self.memory);
        let memory = memory.get_or_insert_with(|| Memory::load(&self.run_dir, operation).unwrap_or_default());
        if memory.operation == operation {
            memory.stopped_units.clone()
        } else {
            Vec::new()
        }
    }

    /// Ends watching what the clone changes itself.
    pub fn end(&self) {
        self.touched.end();
    }

    fn round(&self, request: &Import, stream: &mut impl Read) -> Result<Applied, ImportError> {
        let mut guard = lock(&self.memory);
        if guard.as_ref().is_none_or(|m| m.operation != request.operation) {
            let path = self.run_dir.clone();
            let loaded = Memory::load(&self.run_dir, &request.operation);
            *guard = Some(loaded.map_err(|source| ImportError::Memory { path, source })?);
        }
        let memory = guard.get_or_insert_with(Memory::default);
        let settings = self.settings(request.on_conflict);
        let mut laps = Laps::begin();
        self.touched.catch_up()?;
        laps.lap("caught up");
        let owners = Owners::new(self.touched.views(), self.trees());
        laps.lap("owners");
        let mut applier = Applier::new(&settings, memory, &self.touched, owners);
        let mut reader = BufReader::with_capacity(128 * 1024, stream);
        let applied = loop {
            match read_message(&mut reader)? {
                Transfer::Entry(entry) => applier.entry(*entry)?,
                Transfer::Data { offset, bytes } => applier.data(offset, &bytes)?,
                Transfer::Hole { offset, length } => applier.hole(offset, length)?,
                Transfer::EntryEnd => applier.entry_end()?,
                Transfer::RoundEnd(end) => {
                    laps.lap("applied");
                    break applier.round_end(&end)?;
                }
                Transfer::Failed(refusal) => return Err(ImportError::Guest(refusal.reason)),
            }
        };
        laps.lap("synced");
        let path = self.run_dir.clone();
        memory
            .store(&self.run_dir)
            .map_err(|source| ImportError::Memory { path, source })?;
        laps.lap("stored");
        info!(
            "round {}: {} entries, {} bytes, {} conflicts ({laps})",
            applied.round,
            applied.entries,
            applied.bytes,
            applied.conflicts.len()
        );
        Ok(applied)
    }

    /// State directories of the clone's units, as of the first round.
    fn trees(&self) -> &Trees {
        self.trees.get_or_init(|| {
            Owners::trees().unwrap_or_else(|error| {
                warning!("the state directories of units are not known: {error}");
                Trees::new()
            })
        })
    }

    fn settings(&self, on_conflict: OnConflict) -> Settings {
        Settings {
            on_conflict,
            state_dir: self.state_dir.clone(),
            since: self.since,
            log_sizes: self.log_sizes.clone(),
        }
    }
}

/// When this system booted, by its present clock.
pub fn boot_time() -> (i64, u32) {
    use rustix::time::{ClockId, clock_gettime};
    let (now, up) = (clock_gettime(ClockId::Realtime), clock_gettime(ClockId::Boottime));
    let nanoseconds = (i128::from(now.tv_sec) - i128::from(up.tv_sec)) * 1_000_000_000
        + i128::from(now.tv_nsec)
        - i128::from(up.tv_nsec);
    (
        (nanoseconds.div_euclid(1_000_000_000)) as i64,
        (nanoseconds.rem_euclid(1_000_000_000)) as u32,
    )
}

/// Inode number and size of every log, as of now.
fn log_sizes(views: &[Arc<View>]) -> HashMap<Spot, (u64, u64)> {
    let mut sizes = HashMap::new();
    let Some((fs, top)) = crate::silent::locate(views, std::path::Path::new("/var/log")) else {
        return sizes;
    };
    let view = &views[fs];
    let mut logs = Vec::new();
    let walked = filter::walk(view, &top, &mut |path, _| {
        if rule(&view.outer(path)) == Rule::Log {
            logs.push(path.to_vec());
        }
    });
    if let Err(error) = walked
        && !crate::view::is_absent(&error)
    {
        warning!("the sizes of logs are not known: {error}");
    }
    for path in logs {
        if let Ok(Some(stat)) = view.stat(&path) {
            sizes.insert((fs, path), (stat.stx_ino, stat.stx_size));
        }
    }
    sizes
}
