//! Merging the layers down into the source while the guest runs.
//!
//! Layers beneath the top do not change, so the lowest is copied into the source, the source is synced, and
//! the layer above is made to lie upon the source: one header, replaced atomically. The last layer, which
//! is the top, is drained: see [`super::chain`]. When it is empty, durably, `owner.json` names no layer any
//! more and its files are removed. It can stop, or crash, at any point, and goes on when asked again.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use understudy_vmm_control::api::{DiskInfo, MergeInfo};
use uuid::Uuid;

use super::BLOCK;
use super::disk::{Disk, read_owner};
use super::error::DiskError;
use super::layer;
use super::storage::Lock;

/// Blocks that are moved at a time: what a request of the guest may have to wait for.
const CHUNK: u64 = 64;

/// Blocks that are moved between two syncs.
const CHECKPOINT: u64 = (64 << 20) / BLOCK;

/// Progress of the merge of one disk.
#[derive(Default)]
pub(super) struct Merge {
    state: Mutex<Progress>,
    wake: Condvar,
}

#[derive(Default)]
struct Progress {
    thread: Option<JoinHandle<()>>,
    running: bool,
    stop: bool,
    total: u64,
    error: Option<String>,
}

impl Merge {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        // Plain fields, whole at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the control API: `None` unless a merge runs or has stopped by an error.
    pub(super) fn info(&self, remaining: u64) -> Option<MergeInfo> {
        let progress = self.lock();
        (progress.running || progress.error.is_some()).then(|| MergeInfo {
            total: progress.total.max(remaining),
            remaining,
            error: progress.error.clone(),
        })
    }
}

impl Disk {
    /// Begins to merge all layers into the source, or goes on. Refused while anybody else (a dormant
    /// incarnation, a clone) has the chain open.
    pub fn merge(self: &Arc<Self>) -> Result<DiskInfo, DiskError> {
        let mut control = self.control();
        if self.read_only {
            return Err(self.conflict("a read-only disk is not merged"));
        }
        if self.merge.lock().running {
            return Ok(self.info());
        }
        self.take_up()?;
        // Before the thread, so that whoever asks learns that it cannot be.
        Merger::new(self).acquire()?;
        self.forget_splits(&mut control)?;
        let total = self.chain().bytes_in_layers();
        if self.chain().layers.is_empty() {
            return Ok(self.info());
        }
        self.stop_merge();
        let mut progress = self.merge.lock();
        *progress = Progress {
            running: true,
            total,
            ..Progress::default()
        };
        let disk = self.clone();
        let thread = std::thread::Builder::new()
            .name("merge".into())
            .spawn(move || disk.merge_until_stopped())
            .map_err(DiskError::io(
                "starting a thread to merge",
                self.directory.source_path(),
            ));
        match thread {
            Ok(thread) => progress.thread = Some(thread),
            Err(error) => {
                progress.running = false;
                return Err(error);
            }
        }
        drop(progress);
        drop(control);
        Ok(self.info())
    }

    /// Whether a merge runs.
    pub fn is_merging(&self) -> bool {
        self.merge.lock().running
    }

    /// Stops a merge that runs; what it has moved stays where it is now.
    pub fn stop_merge(&self) {
        let thread = {
            let mut progress = self.merge.lock();
            progress.stop = true;
            self.merge.wake.notify_all();
            progress.thread.take()
        };
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!(disk = self.name, "the thread that merged has panicked");
        }
    }

    fn merge_until_stopped(&self) {
        let mut merger = Merger::new(self);
        let result = loop {
            let began = Instant::now();
            match merger.step() {
                Ok(Step::More) => {}
                Ok(Step::Done) => break Ok(()),
                Err(error) => break Err(error),
            }
            if self.rest(began.elapsed()) {
                break Ok(());
            }
        };
        merger.stop();
        let mut progress = self.merge.lock();
        progress.running = false;
        match result {
            Ok(()) => tracing::info!(disk = self.name, "merging has ended"),
            Err(error) => {
                tracing::warn!(disk = self.name, %error, "merging has stopped");
                progress.error = Some(error.to_string());
            }
        }
    }

    /// Rests as long as the last step took, so that merging takes half of the disk's time at most, and longer
    /// while requests of the guest wait. Whether to stop.
    fn rest(&self, worked: Duration) -> bool {
        let mut progress = self.merge.lock();
        let mut rest = worked;
        loop {
            if progress.stop {
                return true;
            }
            (progress, _) = self
                .merge
                .wake
                .wait_timeout(progress, rest)
                .unwrap_or_else(PoisonError::into_inner);
            if !self.guest_waits() {
                return progress.stop;
            }
            rest = Duration::from_micros(200);
        }
    }
}

/// Whether there is more to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    More,
    Done,
}

/// What is being done.
#[derive(Debug)]
enum Stage {
    /// To be found out.
    Next,
    /// The lowest of several layers is copied; up to this block it is.
    Lowest(u64),
    /// The top, alone above the source, is drained; up to this block it is.
    Top(u64),
}

/// A merge, step by step.
pub(super) struct Merger<'a> {
    disk: &'a Disk,
    stage: Stage,
    /// Blocks that were moved since the last sync.
    moved: Vec<Range<u64>>,
    moved_blocks: u64,
    /// Blocks that are moved between two syncs.
    pub(super) checkpoint: u64,
}

impl<'a> Merger<'a> {
    pub(super) fn new(disk: &'a Disk) -> Merger<'a> {
        Merger {
            disk,
            stage: Stage::Next,
            moved: Vec::new(),
            moved_blocks: 0,
            checkpoint: CHECKPOINT,
        }
    }

    /// Takes the source for writing.
    fn acquire(&self) -> Result<(), DiskError> {
        let directory = self.disk.directory.as_ref();
        let chain = self.disk.chain();
        let result = chain.source.lock(directory, Lock::Exclusive);
        if result.is_err() {
            // The attempt has cost the lock that there was.
            chain.source.lock(directory, Lock::Shared)?;
        }
        result
    }

    /// Leaves everything as the guest needs it.
    pub(super) fn stop(&mut self) {
        let mut chain = self.disk.chain();
        chain.end_draining();
        if !chain.layers.is_empty()
            && let Err(error) = chain.source.lock(self.disk.directory.as_ref(), Lock::Shared)
        {
            tracing::error!(disk = self.disk.name, %error, "cannot share the lock of the source");
        }
    }

    /// Does a small part of the work.
    pub(super) fn step(&mut self) -> Result<Step, DiskError> {
        match self.stage {
            Stage::Next => self.begin(),
            Stage::Lowest(block) => self.copy_lowest(block),
            Stage::Top(block) => self.drain_top(block),
        }
    }

    fn io(&self, action: &'static str) -> impl FnOnce(std::io::Error) -> DiskError + use<> {
        DiskError::io(action, self.disk.directory.source_path())
    }

    fn begin(&mut self) -> Result<Step, DiskError> {
        self.acquire()?;
        let directory = self.disk.directory.as_ref();
        let mut chain = self.disk.chain();
        let Some(lowest) = chain.layers.last().map(|layer| layer.uuid()) else {
            return Ok(Step::Done);
        };
        // From here on the source makes sense only together with this layer, and with no other.
        chain.source.begin_session(directory, Some(lowest), true)?;
        if chain.layers.len() == 1 {
            chain.begin_draining();
            self.stage = Stage::Top(0);
        } else {
            self.stage = Stage::Lowest(0);
        }
        Ok(Step::More)
    }

    fn copy_lowest(&mut self, block: u64) -> Result<Step, DiskError> {
        let mut chain = self.disk.chain();
        let level = chain.layers.len() - 1;
        let run = chain
            .next_run(level, block, CHUNK)
            .map_err(self.io("reading a layer of"))?;
        let Some((blocks, state)) = run else {
            drop(chain);
            return self.finish_lowest(level);
        };
        chain
            .copy_to_source(level, &blocks, state)
            .map_err(self.io("merging a layer into"))?;
        self.stage = Stage::Lowest(blocks.end);
        Ok(Step::More)
    }

    /// Everything of the lowest layer is in the source: the one above lies upon the source now.
    fn finish_lowest(&mut self, level: usize) -> Result<Step, DiskError> {
        let directory = self.disk.directory.as_ref();
        let storage = self.disk.chain().source.storage.clone();
        storage.sync().map_err(self.io("syncing"))?;
        let mut chain = self.disk.chain();
        let session = chain.source.record.session;
        let (merged, above) = match chain.layers.split_at_mut_checked(level) {
            Some((above, [merged])) => (merged.uuid(), above.last_mut()),
            _ => return Ok(Step::Done),
        };
        if let Some(above) = above {
            above.set_parent_source(directory, session)?;
        }
        chain.layers.pop();
        self.forget(&mut chain, merged)?;
        self.stage = Stage::Next;
        Ok(Step::More)
    }

    /// Records that no layer is being merged, and removes the one that was.
    fn forget(&self, chain: &mut super::chain::Chain, merged: Uuid) -> Result<(), DiskError> {
        let directory = self.disk.directory.as_ref();
        let mut record = chain.source.record.clone();
        record.merging = None;
        record.layered = !chain.layers.is_empty();
        chain.source.store(directory, record)?;
        layer::remove(directory, merged)
    }

    fn drain_top(&mut self, block: u64) -> Result<Step, DiskError> {
        let mut chain = self.disk.chain();
        let run = chain
            .next_run(0, block, CHUNK)
            .map_err(self.io("reading a layer of"))?;
        let Some((blocks, state)) = run else {
            drop(chain);
            return self.finish_top();
        };
        chain
            .drain(&blocks, state)
            .map_err(self.io("merging a layer into"))?;
        drop(chain);
        self.stage = Stage::Top(blocks.end);
        self.moved_blocks += blocks.end - blocks.start;
        match self.moved.last_mut() {
            Some(last) if last.end == blocks.start => last.end = blocks.end,
            _ => self.moved.push(blocks),
        }
        if self.moved_blocks >= self.checkpoint {
            self.make_durable()?;
        }
        Ok(Step::More)
    }

    /// Makes what was moved durable, and gives its space back.
    fn make_durable(&mut self) -> Result<(), DiskError> {
        self.disk.flush().map_err(self.io("syncing"))?;
        self.moved_blocks = 0;
        for blocks in std::mem::take(&mut self.moved) {
            self.disk
                .chain()
                .reclaim(&blocks)
                .map_err(self.io("giving back the space of what was merged into"))?;
        }
        Ok(())
    }

    /// Nothing is left in the top: the source is the whole disk.
    fn finish_top(&mut self) -> Result<Step, DiskError> {
        self.make_durable()?;
        let directory = self.disk.directory.as_ref();
        let mut chain = self.disk.chain();
        let Some(top) = chain.layers.first() else {
            return Ok(Step::Done);
        };
        if top.map.present() > 0 {
            self.stage = Stage::Top(0);
            return Ok(Step::More);
        }
        let uuid = top.uuid();
        if let Some(mut owner) = read_owner(directory)?
            && owner.layer.is_some()
        {
            if owner.layer != Some(uuid) {
                return Err(self
                    .disk
                    .conflict(format!("owner.json does not name layer {uuid}, which was merged")));
            }
            owner.layer = None;
            directory
                .replace("owner.json", &owner.encode())
                .map_err(DiskError::io("replacing", directory.path("owner.json")))?;
        }
        chain.pop();
        self.forget(&mut chain, uuid)?;
        Ok(Step::Done)
    }
}
