//! One save, as its thread and the control API share it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use understudy_checkpoint::{KeyError, SaveError};
use understudy_vmm_control::session::{SaveInfo, SaveRequest, SaveState};

use super::fence::FenceError;
use super::operations::{OperationError, failed};
use super::session::CaptureError;
use crate::block::DiskError;
use crate::machine::dirty::DirtyLogError;
use crate::persist::StateError;
use crate::virtio::device::DeviceError;

/// How long a cancelled save may take to end.
const CANCEL_TIME: Duration = Duration::from_secs(60);

/// Why a save failed. The guest runs on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("the save was cancelled")]
    Cancelled,
    #[error("{0}")]
    Overtaken(String),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Write(#[from] SaveError),
    #[error(transparent)]
    Log(#[from] DirtyLogError),
    #[error("telling which memory the guest has touched: {0}")]
    Touched(io::Error),
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("stopping the devices: {0}")]
    Devices(#[from] DeviceError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("flushing the disks: {0}")]
    Flush(io::Error),
    #[error(transparent)]
    Fence(#[from] FenceError),
    #[error("describing the session: {0}")]
    Describe(serde_json::Error),
}

/// One save, shared by its thread and the control API.
pub(super) struct Job {
    pub(super) request: SaveRequest,
    info: Mutex<SaveInfo>,
    changed: Condvar,
    /// Whether the guest may be paused for the rest.
    may_pause: AtomicBool,
    /// Why it shall end early.
    stop: Mutex<Option<Stop>>,
}

/// Why a save ends early.
pub(super) enum Stop {
    Cancelled,
    Overtaken(&'static str),
}

impl Job {
    /// A save that begins.
    pub(super) fn new(request: SaveRequest, memory_bytes: u64) -> Job {
        let info = SaveInfo {
            checkpoint: request.checkpoint,
            state: SaveState::PreCopying,
            rounds: 0,
            memory_bytes,
            written_bytes: 0,
            remaining_bytes: memory_bytes,
            checkpoint_bytes: 0,
            pause_us: None,
            error: None,
        };
        Job {
            may_pause: AtomicBool::new(!request.hold),
            request,
            info: Mutex::new(info),
            changed: Condvar::new(),
            stop: Mutex::default(),
        }
    }

    /// How far it is.
    pub(super) fn info(&self) -> MutexGuard<'_, SaveInfo> {
        self.info.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes how far it is.
    pub(super) fn update(&self, change: impl FnOnce(&mut SaveInfo)) {
        change(&mut self.info());
        self.changed.notify_all();
    }

    /// Has it end as soon as it can, unless it was told so before.
    pub(super) fn ask_to_stop(&self, reason: Stop) {
        self.stop
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(reason);
        self.update(|_| {});
    }

    /// Lets it pause the guest.
    pub(super) fn let_pause(&self) {
        self.may_pause.store(true, Ordering::Release);
        self.update(|_| {});
    }

    /// Whether it may pause the guest.
    pub(super) fn may_pause(&self) -> bool {
        self.may_pause.load(Ordering::Acquire)
    }

    /// Waits until it may pause the guest, at most for `time`; fails when it shall end.
    pub(super) fn wait_to_pause(&self, time: Duration) -> Result<(), Failure> {
        let waits = |_: &mut SaveInfo| !self.may_pause() && self.check().is_ok();
        drop(
            self.changed
                .wait_timeout_while(self.info(), time, waits)
                .unwrap_or_else(PoisonError::into_inner),
        );
        self.check()
    }

    /// The guest's machine is not the one any more that is being saved.
    pub(super) fn overtaken(&self, by: &'static str) {
        self.ask_to_stop(Stop::Overtaken(by));
    }

    /// Fails when it shall end.
    pub(super) fn check(&self) -> Result<(), Failure> {
        match &*self.stop.lock().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(()),
            Some(Stop::Cancelled) => Err(Failure::Cancelled),
            Some(Stop::Overtaken(by)) => Err(Failure::Overtaken((*by).to_owned())),
        }
    }

    /// Waits until its thread has ended, and tells how.
    pub(super) fn wait(&self) -> Result<SaveState, OperationError> {
        let running = |info: &mut SaveInfo| !info.state.has_ended();
        let (info, _) = self
            .changed
            .wait_timeout_while(self.info(), CANCEL_TIME, running)
            .unwrap_or_else(PoisonError::into_inner);
        match info.state.has_ended() {
            true => Ok(info.state),
            false => Err(failed(
                "save/cancel: the save has not ended yet, the disk is slow to answer; ask again",
            )),
        }
    }
}
