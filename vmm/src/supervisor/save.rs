//! Saving the guest's session into a checkpoint, and what becomes of it: kept, cancelled, or lapsed.
//!
//! Memory is written in rounds while the guest runs; the guest is paused for the rest. Which pages are to be
//! written again is what KVM logged, joined with what devices wrote, joined with what was collected before
//! and not written yet. A write that fails ends the save: nothing of it is used, and nothing is lost with
//! it. A saved guest runs on only after its checkpoint was made void: see [`Supervisor::void`].

use std::mem;
use std::path::Path;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use understudy_checkpoint::{CHUNK, Description, Identity, Key, SaveError, Saved, Writer};
use understudy_vmm_control::api::VmState;
use understudy_vmm_control::session::{
    CancelSave, KeepSaved, PauseForSave, SaveInfo, SaveRequest, SaveState,
};

use super::fence;
use super::operations::{OperationError, conflict, failed};
use super::precopy::{Source, pre_copy, runs, write};
use super::save_job::{Failure, Job, Stop};
use super::session::{Compatibility, SessionState, ram_ranges, saved_disk};
use super::{Inner, Supervisor};
use crate::block::Disk;
use crate::laps::Laps;
use crate::machine::dirty::{DirtyLog, PageSet};

/// Longest lease of a saved guest.
const MAX_LEASE_MS: u64 = 3_600_000;
/// After which time a lapsed lease is tried again whose checkpoint could not be made void.
const VOID_RETRY: Duration = Duration::from_secs(1);

/// A guest that is saved, and paused.
pub(super) struct SavedSession {
    job: Arc<Job>,
    /// `None` once it was made void, as far as the disk let us.
    checkpoint: Option<Saved>,
    /// The manifest may be there still.
    unsettled: bool,
    /// When it runs on.
    pub(super) lease: Instant,
    /// Disks whose merge was stopped.
    merging: Vec<Arc<Disk>>,
}

impl Supervisor {
    /// Begins to save the session, or tells how far the save is.
    pub fn begin_save(self: &Arc<Self>, request: SaveRequest) -> Result<SaveInfo, OperationError> {
        check_lease(request.lease_ms)?;
        for (field, path) in [("directory", &request.directory), ("key", &request.key)] {
            if !path.is_absolute() {
                return Err(OperationError::Bad(format!(
                    "{field}: {} is not an absolute path",
                    path.display()
                )));
            }
        }
        if let Some(job) = self.job(request.checkpoint) {
            return Ok(job.info().clone());
        }
        let mut inner = self.lock();
        // Two requests may have come at once.
        if let Some(job) = self.job(request.checkpoint) {
            return Ok(job.info().clone());
        }
        self.may_save(&inner)?;
        let job = Arc::new(Job::new(request, inner.ram.size()));
        let (supervisor, own) = (self.clone(), job.clone());
        thread::Builder::new()
            .name("save".to_owned())
            .spawn(move || supervisor.save(&own))
            .map_err(|error| failed(format!("save: starting a thread: {error}")))?;
        inner.saving = Some(job.clone());
        *self.last_save() = Some(job.clone());
        Ok(job.info().clone())
    }

    fn may_save(&self, inner: &Inner) -> Result<(), OperationError> {
        self.must_run(inner, "save")?;
        let gates = self.gates_report(inner);
        if inner.state != VmState::Running || gates.receive || gates.transmit || gates.write || gates.vcpus {
            return Err(conflict(format!(
                "save: a lease holds gates of this guest ({gates:?}); release them first"
            )));
        }
        if inner.ownership.is_none() {
            return Err(conflict(
                "save: this VMM is a clone that does not own the guest; discard it, or activate it first",
            ));
        }
        match inner.resumed.as_ref().map(|resumed| resumed.pending_bytes()) {
            None | Some(0) => Ok(()),
            Some(pending) => Err(conflict(format!(
                "save: {pending} bytes of memory are still to be read from the checkpoint that the guest was resumed from; ask again when resume.pendingBytes is 0"
            ))),
        }
    }

    /// How far the last save is.
    pub fn save_info(&self) -> Result<SaveInfo, OperationError> {
        match &*self.last_save() {
            Some(job) => Ok(job.info().clone()),
            None => Err(OperationError::NotFound("save: none was asked for".to_owned())),
        }
    }

    /// Lets a save that holds pause the guest, once what is left fits the pause.
    pub fn pause_for_save(&self, request: &PauseForSave) -> Result<SaveInfo, OperationError> {
        let job = self.job(request.checkpoint).ok_or_else(|| {
            OperationError::NotFound(format!(
                "save/pause: no save of checkpoint {} was asked for",
                request.checkpoint
            ))
        })?;
        job.let_pause();
        let info = job.info().clone();
        Ok(info)
    }

    /// Renews the lease of a saved guest.
    pub fn keep_saved(&self, request: &KeepSaved) -> Result<SaveInfo, OperationError> {
        check_lease(request.lease_ms)?;
        let mut inner = self.lock();
        let saved = inner
            .saved
            .as_mut()
            .filter(|saved| saved.job.request.checkpoint == request.checkpoint)
            .ok_or_else(|| {
                conflict(format!(
                    "save/keep: checkpoint {} is not saved, or not any more",
                    request.checkpoint
                ))
            })?;
        saved.lease = Instant::now() + Duration::from_millis(request.lease_ms);
        let info = saved.job.info().clone();
        self.lease_changed.notify_all();
        Ok(info)
    }

    /// Ends a save, or undoes it.
    pub fn cancel_save(&self, request: &CancelSave) -> Result<SaveInfo, OperationError> {
        let job = self.job(request.checkpoint).ok_or_else(|| {
            OperationError::NotFound(format!(
                "save/cancel: no save of checkpoint {} was asked for",
                request.checkpoint
            ))
        })?;
        job.ask_to_stop(Stop::Cancelled);
        if job.wait()? == SaveState::Saved {
            let mut inner = self.lock();
            // The lease may have run out meanwhile.
            if inner.saved.is_some() {
                self.void(&mut inner)?;
            }
        }
        let info = job.info().clone();
        Ok(info)
    }

    fn last_save(&self) -> MutexGuard<'_, Option<Arc<Job>>> {
        self.last_save.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn job(&self, checkpoint: uuid::Uuid) -> Option<Arc<Job>> {
        self.last_save()
            .clone()
            .filter(|job| job.request.checkpoint == checkpoint)
    }

    /// Body of the save's thread.
    fn save(&self, job: &Arc<Job>) {
        tracing::info!(checkpoint = %job.request.checkpoint, "the session is being saved");
        let Err(failure) = self.try_save(job) else { return };
        let state = match failure {
            Failure::Cancelled => SaveState::Cancelled,
            _ => SaveState::Failed,
        };
        tracing::warn!(%failure, "the session is not saved; the guest runs on");
        let mut inner = self.lock();
        if inner
            .saving
            .as_ref()
            .is_some_and(|saving| Arc::ptr_eq(saving, job))
        {
            inner.saving = None;
        }
        drop(inner);
        job.update(|info| {
            info.state = state;
            info.error = Some(failure.to_string());
        });
    }

    fn try_save(&self, job: &Arc<Job>) -> Result<(), Failure> {
        let request = &job.request;
        let key = Key::read(&request.key)?;
        let source = self.begin_logging()?;
        let identity = Identity {
            checkpoint: request.checkpoint,
            guest_uid: request.guest_uid.clone(),
            machine_id: request.machine_id.clone(),
            host_boot_id: request.host_boot_id.clone(),
        };
        let writer = Writer::open(&request.directory, &key, identity, source.ram.size())?;
        drop(key);
        match pre_copy(job, &writer, &source) {
            Ok(left) => self.pause_for_the_rest(job, writer, source, left),
            Err(failure) => {
                give_up(writer, &request.directory);
                Err(failure)
            }
        }
    }

    fn begin_logging(&self) -> Result<Source, Failure> {
        let inner = self.lock();
        let (Some(assembly), Some(devices)) = (&inner.assembly, &inner.devices) else {
            return Err(Failure::Overtaken("the guest has stopped".to_owned()));
        };
        // What the checkpoint names must not grow any more.
        for disk in devices.disks() {
            disk.take_up()?;
        }
        Ok(Source {
            boots: inner.boots,
            log: DirtyLog::begin(&assembly.vm, &inner.ram)?,
            ram: inner.ram.clone(),
            disks: devices.disks().to_vec(),
        })
    }

    fn pause_for_the_rest(
        &self,
        job: &Arc<Job>,
        mut writer: Writer,
        source: Source,
        left: PageSet,
    ) -> Result<(), Failure> {
        // Most of what the pause would flush, and what would grow with memory.
        if let Err(failure) = settle(&mut writer, &source.disks) {
            give_up(writer, &job.request.directory);
            return Err(failure);
        }
        let mut inner = self.lock();
        if inner.state != VmState::Running || inner.boots != source.boots {
            give_up(writer, &job.request.directory);
            return Err(Failure::Overtaken(format!(
                "the machine has become {:?} while it was saved",
                inner.state
            )));
        }
        *self.before() = Some(self.describe(&inner));
        job.update(|info| info.state = SaveState::Pausing);
        let merging: Vec<_> = source
            .disks
            .iter()
            .filter(|disk| disk.is_merging())
            .cloned()
            .collect();
        let start = Instant::now();
        let mut laps = Laps::begun_at(start);
        let result = self.write_paused(job, &inner, writer, &source, left, &mut laps);
        let pause = start.elapsed();
        tracing::info!("stages of the pause, in us: {laps}");
        let result = match result {
            Ok(checkpoint) => {
                self.hold_saved(&mut inner, job, checkpoint, merging, pause);
                Ok(())
            }
            Err(failure) => {
                let unsettled = matches!(failure, Failure::Write(SaveError::Unsettled { .. }));
                self.undo_pause(&mut inner, job, unsettled, merging);
                Err(failure)
            }
        };
        *self.before() = None;
        drop(inner);
        // Switching the log off takes time that the guest need not wait for.
        drop(source);
        result
    }

    /// Pauses the guest and writes what is left. What fails leaves it paused.
    fn write_paused(
        &self,
        job: &Job,
        inner: &Inner,
        writer: Writer,
        source: &Source,
        mut left: PageSet,
        laps: &mut Laps,
    ) -> Result<Saved, Failure> {
        let (Some(assembly), Some(devices)) = (&inner.assembly, &inner.devices) else {
            return Err(Failure::Overtaken("the guest has stopped".to_owned()));
        };
        assembly.vcpus.pause();
        laps.lap("vCPUs");
        job.check()?;
        if assembly.vcpus.any_ended() || assembly.board.has_asked() {
            // It is not lost: the main loop carries it out once this lock is free.
            return Err(Failure::Overtaken(
                "the guest has just asked for a reset or power-off, or has crashed".to_owned(),
            ));
        }
        devices.stop_merges();
        assembly.board.suspend()?;
        self.console.write_out();
        laps.lap("devices");
        flush(&source.disks)?;
        laps.lap("disks");
        source.log.collect_last(&source.ram, &mut left)?;
        laps.lap("log");
        let chunks = left.chunks(CHUNK as u64);
        job.update(|info| info.remaining_bytes = (chunks.len() * CHUNK) as u64);
        let state =
            SessionState::capture(&inner.kvm, &assembly.vm, assembly, inner.kernel.clone())?.to_bytes()?;
        laps.lap("state");
        writer.begin_round();
        write(&writer, &runs(&chunks), &source.ram, || job.check())?;
        laps.lap("memory");
        let description = self.description(inner, source)?;
        let saved = writer.finish(&state, description)?;
        laps.lap("checkpoint");
        Ok(saved)
    }

    fn description(&self, inner: &Inner, source: &Source) -> Result<Description, Failure> {
        let owner = fence::named(&self.state_dir, self.config.incarnation)?;
        let compatibility = Compatibility {
            platform: inner.platform.clone(),
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Ok(Description {
            guest_name: self.config.guest.clone(),
            incarnation: self.config.incarnation,
            owner_epoch: owner.epoch,
            vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
            saved_at_ms: now.unwrap_or_default().as_millis() as u64,
            cpus: self.config.cpus.into(),
            memory_mib: self.config.memory_mib,
            ram: ram_ranges(source.ram.size()),
            disks: source.disks.iter().map(|disk| saved_disk(disk.info())).collect(),
            compatibility: serde_json::to_value(compatibility).map_err(Failure::Describe)?,
        })
    }

    fn hold_saved(
        &self,
        inner: &mut Inner,
        job: &Arc<Job>,
        checkpoint: Saved,
        merging: Vec<Arc<Disk>>,
        pause: Duration,
    ) {
        let report = checkpoint.report();
        tracing::info!(
            checkpoint = %job.request.checkpoint,
            pause_us = pause.as_micros() as u64,
            rounds = report.rounds,
            written = report.written_bytes,
            "the session is saved; the guest is paused"
        );
        inner.state = VmState::Saved;
        inner.saving = None;
        inner.saved = Some(SavedSession {
            job: job.clone(),
            checkpoint: Some(checkpoint),
            unsettled: false,
            lease: Instant::now() + Duration::from_millis(job.request.lease_ms),
            merging,
        });
        job.update(|info| {
            info.state = SaveState::Saved;
            info.rounds = report.rounds.saturating_sub(1);
            info.written_bytes = report.written_bytes;
            info.remaining_bytes = 0;
            info.checkpoint_bytes = report.disk_bytes;
            info.pause_us = Some(pause.as_micros() as u64);
        });
        self.lease_changed.notify_all();
    }

    /// After a failure in the pause: the guest runs on, unless there may be a checkpoint all the same. Then it
    /// is made void first, as that of a lease that has run out.
    fn undo_pause(&self, inner: &mut Inner, job: &Arc<Job>, unsettled: bool, merging: Vec<Arc<Disk>>) {
        inner.saving = None;
        if unsettled {
            inner.state = VmState::Saved;
            inner.saved = Some(SavedSession {
                job: job.clone(),
                checkpoint: None,
                unsettled: true,
                lease: Instant::now(),
                merging,
            });
            self.lease_changed.notify_all();
        } else {
            self.run_on(inner, &merging);
        }
    }

    /// Makes the checkpoint of the saved guest void, durably, and then lets the guest run: its manifest is
    /// removed, and the write session of every disk that it may write grows, so that a copy of the checkpoint
    /// is refused as well. Where that fails the guest stays paused: it must not write what a checkpoint that
    /// could still be resumed takes for its own.
    pub(super) fn void(&self, inner: &mut Inner) -> Result<(), OperationError> {
        let (Some(saved), Some(devices)) = (&mut inner.saved, &inner.devices) else {
            return Err(conflict("save/cancel: the guest is not saved"));
        };
        if let Some(checkpoint) = saved.checkpoint.take()
            && let Err(error) = checkpoint.void()
        {
            tracing::warn!(%error, "removing the checkpoint");
            saved.unsettled = matches!(error, SaveError::Unsettled { .. });
        }
        let mut stale = false;
        for disk in devices.disks() {
            if disk.read_only() {
                continue;
            }
            disk.begin_session().map_err(|error| {
                failed(format!(
                    "save/cancel: the checkpoint could not be made void ({error}); the guest stays paused, ask again"
                ))
            })?;
            stale = true;
        }
        if saved.unsettled && !stale {
            return Err(failed(
                "save/cancel: the manifest could not be removed, and no disk tells that the guest ran on; it stays paused",
            ));
        }
        let job = saved.job.clone();
        let merging = mem::take(&mut saved.merging);
        inner.saved = None;
        self.run_on(inner, &merging);
        job.update(|info| {
            if info.state == SaveState::Saved {
                info.state = SaveState::Cancelled;
            }
        });
        tracing::info!(checkpoint = %job.request.checkpoint, "the checkpoint is void; the guest runs on");
        Ok(())
    }

    /// What happens when the lease of a saved guest has run out.
    pub(super) fn lapse(&self, inner: &mut Inner) {
        tracing::warn!("the lease of the saved guest has run out");
        if let Err(error) = self.void(inner) {
            tracing::error!(%error, "the saved guest cannot run on");
            if let Some(saved) = &mut inner.saved {
                saved.lease = Instant::now() + VOID_RETRY;
            }
        }
    }

    /// Devices and vCPUs go on where they were stopped.
    fn run_on(&self, inner: &mut Inner, merging: &[Arc<Disk>]) {
        let Some(assembly) = &inner.assembly else { return };
        if let Err(error) = assembly.board.resume() {
            tracing::error!(%error, "a device does not go on after a save");
            inner.exit_reason = Some(format!("after a save that was undone: {error}"));
            self.halt(inner);
            inner.state = VmState::Exited;
            return;
        }
        assembly.vcpus.resume();
        inner.state = VmState::Running;
        for disk in merging {
            if let Err(error) = disk.merge() {
                tracing::warn!(%error, "a merge does not go on");
            }
        }
    }
}

fn check_lease(lease_ms: u64) -> Result<(), OperationError> {
    match lease_ms {
        1..=MAX_LEASE_MS => Ok(()),
        _ => Err(OperationError::Bad(format!(
            "leaseMs: {lease_ms} is not within 1 to {MAX_LEASE_MS}"
        ))),
    }
}

fn flush(disks: &[Arc<Disk>]) -> Result<(), Failure> {
    disks
        .iter()
        .try_for_each(|disk| disk.flush())
        .map_err(Failure::Flush)
}

fn settle(writer: &mut Writer, disks: &[Arc<Disk>]) -> Result<(), Failure> {
    flush(disks)?;
    Ok(writer.settle()?)
}

fn give_up(writer: Writer, directory: &Path) {
    if let Err(error) = writer.abort() {
        // They are no checkpoint, and the next save there removes them.
        tracing::warn!(%error, directory = %directory.display(), "removing what was written");
    }
}
