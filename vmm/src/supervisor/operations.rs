//! What the control API asks. Every operation is idempotent, refuses what does not fit the state, and
//! leaves the guest as it was when it fails.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use understudy_vmm_control::api::{
    Activate, ActivateReport, Commit, GiveNetwork, HoldReport, HoldRequest, VmState,
};
use understudy_vmm_control::config::Role;
use understudy_vmm_control::owner::{OWNER_VERSION, Owner};

use super::devices::Devices;
use super::fence::{self, Ownership};
use super::{Inner, Supervisor};
use crate::machine::board::Event;
use crate::machine::vm_state;

/// Longest lease.
const MAX_LEASE_MS: u64 = 600_000;
/// How long in-flight requests may take to end when a gate is closed.
const DRAIN: Duration = Duration::from_secs(10);

/// Why an operation was refused or failed. In every case the guest goes on as before.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// The request makes no sense.
    #[error("{0}")]
    Bad(String),
    /// Nothing of that name.
    #[error("{0}")]
    NotFound(String),
    /// Not in this state.
    #[error("{0}")]
    Conflict(String),
    /// It was tried and failed.
    #[error("{0}")]
    Failed(String),
}

pub(super) fn conflict(message: impl Into<String>) -> OperationError {
    OperationError::Conflict(message.into())
}

pub(super) fn failed(error: impl std::fmt::Display) -> OperationError {
    OperationError::Failed(error.to_string())
}

impl Supervisor {
    /// Runs a prepared clone.
    pub fn boot(&self) -> Result<(), OperationError> {
        let mut inner = self.lock();
        match inner.state {
            VmState::Prepared => {}
            VmState::Running | VmState::Paused => return Ok(()),
            state => return Err(conflict(format!("boot: the machine is {state:?}, not Prepared"))),
        }
        self.start_locked(&mut inner).map_err(|error| {
            // What a failed start had opened is closed again, so that the request can be repeated.
            inner.devices = None;
            inner.boots = 0;
            inner.kernel = None;
            failed(error)
        })
    }

    /// ACPI power button.
    pub fn power_button(&self) -> Result<(), OperationError> {
        let inner = self.lock();
        match (&inner.assembly, inner.state) {
            (Some(assembly), VmState::Running | VmState::Paused) => {
                assembly.board.press_power_button();
                Ok(())
            }
            (_, state) => Err(conflict(format!(
                "power-button: the machine is {state:?}, not Running"
            ))),
        }
    }

    /// As the guest's own reset.
    pub fn reset(&self) -> Result<(), OperationError> {
        let mut inner = self.lock();
        match inner.state {
            VmState::Running => {
                self.reset_locked(&mut inner);
                match &inner.exit_reason {
                    Some(reason) if inner.state == VmState::Exited => {
                        Err(OperationError::Failed(reason.clone()))
                    }
                    _ => Ok(()),
                }
            }
            state => Err(conflict(format!("reset: the machine is {state:?}, not Running"))),
        }
    }

    /// Has the process end once this is answered: see [`Supervisor::stop_if_asked`].
    pub fn stop(&self) -> Result<(), OperationError> {
        self.stop_asked.store(true, Ordering::Release);
        Ok(())
    }

    /// Ends the process if a stop was asked. Called after each answer, so that whoever asks learns that it
    /// was heard.
    pub fn stop_if_asked(&self) {
        if self.stop_asked.load(Ordering::Acquire) && self.events.send(Event::Stop).is_err() {
            tracing::debug!("the process is ending already");
        }
    }

    /// Closes gates for the time of a lease.
    pub fn hold(&self, request: &HoldRequest) -> Result<HoldReport, OperationError> {
        if request.lease_ms == 0 || request.lease_ms > MAX_LEASE_MS {
            return Err(OperationError::Bad(format!(
                "leaseMs: {} is not within 1 to {MAX_LEASE_MS}",
                request.lease_ms
            )));
        }
        let mut inner = self.lock();
        self.must_run(&inner, "hold")?;
        let newly: Vec<_> = [
            (request.gates.receive, &self.gates.receive),
            (request.gates.transmit, &self.gates.transmit),
            (request.gates.write, &self.gates.write),
        ]
        .into_iter()
        .filter(|(wanted, gate)| *wanted && !gate.is_closed())
        .map(|(_, gate)| gate)
        .collect();
        for gate in &newly {
            gate.close();
        }
        let deadline = Instant::now() + DRAIN;
        for gate in &newly {
            if let Err(error) = gate.drain(deadline.saturating_duration_since(Instant::now())) {
                for gate in &newly {
                    gate.open();
                }
                return Err(failed(format!("hold: {error}; the gates are open again")));
            }
        }
        if request.gates.vcpus && !inner.vcpus_closed {
            if let Some(assembly) = &inner.assembly {
                assembly.vcpus.pause();
            }
            inner.vcpus_closed = true;
            inner.state = VmState::Paused;
        }
        inner.lease = Some(Instant::now() + Duration::from_millis(request.lease_ms));
        self.lease_changed.notify_all();
        Ok(self.hold_report(&inner))
    }

    /// Opens all gates and lets the vCPUs run.
    pub fn release(&self) -> Result<HoldReport, OperationError> {
        let mut inner = self.lock();
        self.must_run(&inner, "release")?;
        self.open_all(&mut inner);
        Ok(self.hold_report(&inner))
    }

    pub(super) fn open_all(&self, inner: &mut Inner) {
        inner.lease = None;
        self.gates.write.open();
        self.gates.transmit.open();
        self.gates.receive.open();
        if std::mem::take(&mut inner.vcpus_closed)
            && let Some(assembly) = &inner.assembly
        {
            assembly.vcpus.resume();
            inner.state = VmState::Running;
        }
    }

    fn hold_report(&self, inner: &Inner) -> HoldReport {
        HoldReport {
            gates: self.gates_report(inner),
            counters: self.counters.report(),
        }
    }

    /// What changes disks or owner, or pauses the guest, must not come between the rounds of a save either.
    pub(super) fn must_run(&self, inner: &Inner, operation: &str) -> Result<(), OperationError> {
        match inner.state {
            VmState::Running | VmState::Paused if inner.saving.is_some() => Err(conflict(format!(
                "{operation}: the session is being saved; wait for it, or cancel the save first"
            ))),
            VmState::Running | VmState::Paused => {
                match inner.resumed.as_ref().and_then(|from| from.error()) {
                    None => Ok(()),
                    Some(error) => Err(conflict(format!(
                        "{operation}: the guest is paused because its memory is damaged ({error})"
                    ))),
                }
            }
            state => Err(conflict(format!(
                "{operation}: the machine is {state:?}, neither Running nor Paused"
            ))),
        }
    }

    /// The commit point: the guest goes over to another incarnation, and this one is dormant.
    pub fn commit(&self, commit: &Commit) -> Result<(), OperationError> {
        let mut inner = self.lock();
        if inner.state == VmState::Dormant {
            return self.commit_again(&inner, commit);
        }
        self.must_run(&inner, "commit")?;
        if let Some(devices) = &inner.devices {
            // A merge that ends replaces owner.json as well.
            devices.stop_merges();
        }
        let current = self.check_commit(&inner, commit)?;
        let next = Owner {
            version: OWNER_VERSION,
            epoch: commit.epoch,
            incarnation: commit.incarnation,
            layer: Some(commit.layer),
        };
        if let Err(error) = next.replace(&self.state_dir) {
            // A failure after the rename leaves the new record in place: then the guest is not ours any
            // more, whatever the error was, and its gates must never open again here.
            match Owner::read(&self.state_dir) {
                Ok(Some(owner)) if owner == current => return Err(failed(error)),
                _ => {
                    self.become_dormant(&mut inner, commit);
                    return Err(failed(format!(
                        "{error}; owner.json may be replaced already, so this VMM is dormant: repeat the commit, or read owner.json"
                    )));
                }
            }
        }
        self.become_dormant(&mut inner, commit);
        tracing::info!(
            epoch = commit.epoch,
            incarnation = commit.incarnation,
            "committed: this incarnation is dormant"
        );
        Ok(())
    }

    fn commit_again(&self, inner: &Inner, commit: &Commit) -> Result<(), OperationError> {
        if inner.committed.as_ref() != Some(commit) {
            return Err(conflict("commit: this VMM is dormant by another commit"));
        }
        let owner = fence::named(&self.state_dir, commit.incarnation).map_err(failed)?;
        // The first attempt may have failed between rename and sync.
        owner.replace(&self.state_dir).map_err(failed)
    }

    fn check_commit(&self, inner: &Inner, commit: &Commit) -> Result<Owner, OperationError> {
        if inner.ownership.is_none() {
            return Err(conflict("commit: this VMM does not own the guest"));
        }
        if inner.lease.is_none_or(|deadline| deadline <= Instant::now()) {
            return Err(conflict(
                "commit: no lease holds the gates; hold all of them first",
            ));
        }
        let gates = self.gates_report(inner);
        if !(gates.receive && gates.transmit && gates.write && gates.vcpus) {
            return Err(conflict(format!(
                "commit: gates are open ({gates:?}); hold receive, transmit, write and vcpus first"
            )));
        }
        let written = self.counters.report().block_writes;
        if written != commit.block_writes {
            return Err(conflict(format!(
                "commit: {written} blocks writes have completed where blockWrites says {}: something was written since",
                commit.block_writes
            )));
        }
        let current = fence::named(&self.state_dir, self.config.incarnation).map_err(failed)?;
        if commit.epoch != current.epoch + 1 {
            return Err(conflict(format!(
                "commit: epoch {} does not follow {}",
                commit.epoch, current.epoch
            )));
        }
        // A rollback goes back to an incarnation of before; the epoch grows in either direction.
        if commit.incarnation == self.config.incarnation {
            return Err(OperationError::Bad(format!(
                "incarnation: {} is this one",
                commit.incarnation
            )));
        }
        Ok(current)
    }

    fn become_dormant(&self, inner: &mut Inner, commit: &Commit) {
        inner.state = VmState::Dormant;
        inner.committed = Some(commit.clone());
        // What it was activated for is over: only another commit to it can activate it again.
        inner.activated = None;
        inner.lease = None;
        // Only a way back needs it, which may never be gone.
        inner.stopped_at = inner.assembly.as_ref().and_then(|assembly| {
            vm_state::read_clock(&assembly.vm)
                .inspect_err(|error| tracing::warn!(%error, "the dormant guest would see its time jump"))
                .ok()
        });
        // The lock goes last: whoever takes it finds everything decided.
        inner.ownership = None;
    }

    /// Gives the taps to the new owner.
    pub fn give_network(&self, give: &GiveNetwork) -> Result<(), OperationError> {
        let inner = self.lock();
        match (inner.state, &inner.devices) {
            (VmState::Dormant, Some(devices)) => devices.give_taps(&give.socket).map_err(failed),
            (state, _) => Err(conflict(format!(
                "network/give: the machine is {state:?}, not Dormant"
            ))),
        }
    }

    /// Makes a clone the owner, or a dormant incarnation again.
    pub fn activate(&self, activate: &Activate) -> Result<ActivateReport, OperationError> {
        let mut inner = self.lock();
        if let Some((epoch, report)) = inner.activated
            && epoch == activate.epoch
        {
            return Ok(report);
        }
        if inner.state == VmState::Dormant {
            return self.reactivate(&mut inner, activate);
        }
        self.must_run(&inner, "activate")?;
        if inner.role == Role::Active {
            return Err(conflict("activate: this VMM owns the guest already"));
        }
        let (Some(devices), Some(handover)) = (&inner.devices, &inner.handover) else {
            return Err(conflict("activate: the clone has not booted"));
        };
        let ownership = self.take_ownership(devices, activate)?;
        let report = devices
            .attach_taps(handover, activate.open_taps)
            .map_err(failed)?;
        inner.ownership = Some(ownership);
        inner.role = Role::Active;
        inner.activated = Some((activate.epoch, report));
        self.open_all(&mut inner);
        tracing::info!(
            epoch = activate.epoch,
            ?report,
            "activated: this incarnation owns the guest"
        );
        Ok(report)
    }

    fn take_ownership(&self, devices: &Devices, activate: &Activate) -> Result<Ownership, OperationError> {
        let (ownership, owner) = Ownership::take(&self.state_dir, self.config.incarnation)
            .map_err(|error| conflict(error.to_string()))?;
        if owner.epoch != activate.epoch {
            return Err(conflict(format!(
                "activate: owner.json has epoch {} where {} was committed",
                owner.epoch, activate.epoch
            )));
        }
        // After a rollback the next clone has the number of the one that was rolled back: the layer tells them apart.
        let top = devices.root().info().layers.first().copied();
        if owner.layer != top {
            return Err(conflict(format!(
                "activate: owner.json names the layer {:?} and not {top:?}, on which this incarnation runs",
                owner.layer
            )));
        }
        Ok(ownership)
    }

    /// The way back: another incarnation has committed to this one, which goes on where it was paused.
    fn reactivate(&self, inner: &mut Inner, activate: &Activate) -> Result<ActivateReport, OperationError> {
        let (Some(devices), Some(assembly)) = (&inner.devices, &inner.assembly) else {
            return Err(conflict("activate: the guest has stopped"));
        };
        if let Some(error) = inner.resumed.as_ref().and_then(|from| from.error()) {
            return Err(conflict(format!(
                "activate: the memory of the dormant guest is damaged ({error})"
            )));
        }
        let ownership = self.take_ownership(devices, activate)?;
        // Those that were given away were kept for this; others were never let go of.
        let report = devices.take_taps_back(activate.open_taps).map_err(failed)?;
        if let Some(stopped_at) = inner.stopped_at.take()
            && let Err(error) = vm_state::set_clock(&assembly.vm, stopped_at)
        {
            tracing::warn!(%error, "the guest sees the time jump in which it was dormant");
        }
        let has_stopped = assembly.vcpus.any_ended() || assembly.board.has_asked();
        inner.ownership = Some(ownership);
        inner.role = Role::Active;
        inner.committed = None;
        inner.activated = Some((activate.epoch, report));
        inner.state = VmState::Paused;
        self.open_all(inner);
        tracing::info!(
            epoch = activate.epoch,
            ?report,
            "activated: this incarnation owns the guest again"
        );
        if has_stopped {
            // What it had asked for just before it was paused was not carried out.
            self.reset_locked(inner);
        }
        Ok(report)
    }
}
