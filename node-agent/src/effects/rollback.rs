//! Effects of a rollback: from the clone, which owns the guest, back to the incarnation that is dormant.

use std::time::Duration;

use jiff::Timestamp;
use understudy_vmm_control::api::{Activate, Commit, Gates, VmState};

use super::World;
use super::after::{first_frame, retry};
use super::cutover::{hold, lapsed, release};
use super::errors::Side;
use crate::guest_agent::LinkError;
use crate::handover::effects::Dormancy;
use crate::handover::{EffectError, Effected, ErrorKind, Moment, Operation};

/// How long the guest agent may take to set the clock and announce the network.
const RESUMED: Duration = Duration::from_secs(10);

fn refused(message: impl Into<String>) -> EffectError {
    EffectError::new(ErrorKind::Refused, message)
}

impl World {
    pub(super) fn do_find_dormant(&mut self, operation: &Operation) -> Effected<Dormancy> {
        let (_, resolved) = self.resolved()?;
        let owner = self.owner(&resolved)?;
        let dormant = self.node.records.dormant(&resolved.uid).map_err(retry)?;
        let is_ours = |operation_uid: Option<&String>| operation_uid == Some(&operation.uid);
        let Some(dormant) = dormant.filter(|dormant| is_ours(dormant.operation.as_ref())) else {
            return Err(refused(
                "there is no dormant incarnation any more to go back to: retainDormantFor is over, the guest was started anew, or another reboot came after this one",
            ));
        };
        if dormant.deadline <= Timestamp::now() {
            return Err(refused(
                "retainDormantFor is over: the dormant incarnation is being removed",
            ));
        }
        if owner.layer != Some(operation.clone_layer) || owner.incarnation != operation.clone_incarnation() {
            return Err(refused(format!(
                "incarnation {} owns the guest by now, and not the one that this reboot made",
                owner.incarnation
            )));
        }
        let (_, clone) = self.clone_vmm(operation)?;
        let info = clone
            .client()
            .info()
            .map_err(|error| Side::Clone.vmm(&clone, &error))?;
        if !matches!(info.state, VmState::Running | VmState::Paused) {
            return Err(refused(format!(
                "incarnation {} does not run ({:?}), so that it cannot hand the guest back",
                clone.incarnation, info.state
            )));
        }
        let (_, guest) = self.guest_vmm(operation)?;
        let info = guest
            .client()
            .info()
            .map_err(|error| Side::Guest.vmm(&guest, &error))?;
        let damage = info.resume.as_ref().and_then(|resume| resume.error.as_ref());
        match (info.state, damage) {
            (VmState::Dormant, None) => Ok(Dormancy { epoch: owner.epoch }),
            (VmState::Dormant, Some(damage)) => Err(refused(format!(
                "the memory of the dormant incarnation is damaged: {damage}"
            ))),
            (state, _) => Err(refused(format!(
                "incarnation {} is {state:?} and not dormant",
                guest.incarnation
            ))),
        }
    }

    pub(super) fn do_hold_clone(&mut self, operation: &Operation, lease_ms: u64) -> Effected<u64> {
        let (_, instance) = self.clone_vmm(operation)?;
        let all = Gates {
            receive: true,
            transmit: true,
            write: true,
            vcpus: true,
        };
        let report = hold(Side::Clone, &instance, all, lease_ms)?;
        match report.gates == all {
            true => Ok(report.counters.block_writes),
            false => Err(lapsed()),
        }
    }

    pub(super) fn do_commit_back(&mut self, operation: &Operation) -> Effected<()> {
        let (_, instance) = self.clone_vmm(operation)?;
        let rollback = operation
            .rollback
            .as_ref()
            .ok_or_else(|| refused("no rollback was asked for"))?;
        let commit = Commit {
            epoch: rollback.epoch,
            incarnation: operation.guest_incarnation(),
            layer: operation.guest_layer,
            block_writes: rollback.block_writes,
        };
        instance
            .client()
            .commit(&commit)
            .map_err(|error| Side::Clone.vmm(&instance, &error))
    }

    pub(super) fn do_release_clone(&mut self, operation: &Operation) -> Effected<()> {
        let (_, instance) = self.clone_vmm(operation)?;
        release(Side::Clone, &instance)
    }

    pub(super) fn do_activate_guest(&mut self, operation: &Operation) -> Effected<()> {
        let (_, instance) = self.guest_vmm(operation)?;
        let request = Activate {
            epoch: operation.last_epoch(),
            open_taps: false,
        };
        let report = World::slow(&instance)
            .activate(&request)
            .map_err(|error| Side::Guest.vmm(&instance, &error))?;
        tracing::info!(
            guest = %self.guest,
            incarnation = instance.incarnation,
            taps_taken_back = report.taps_received,
            "rolled back: the incarnation before is the guest again"
        );
        Ok(())
    }

    pub(super) fn do_reinstate(&mut self, operation: &Operation) -> Effected<Option<Moment>> {
        let (_, instance) = self.guest_vmm(operation)?;
        match self.guest_agent(operation)?.resumed(RESUMED) {
            Ok(told) => tracing::info!(
                guest = %self.guest,
                stepped_us = told.stepped_us,
                announced = told.announced,
                "the guest agent knows that time has passed"
            ),
            Err(LinkError::TooOld(version)) => tracing::warn!(
                guest = %self.guest,
                version,
                "the guest agent is too old to set the guest's clock after a rollback; install a newer one"
            ),
            Err(error) => return Err(Side::Guest.agent(&error)),
        }
        Ok(first_frame(&instance))
    }
}
