//! Effects after the commit point, and the ending of clones.

use jiff::Timestamp;
use understudy_api::reboot::{FailedUnit, StartedUnit};
use understudy_channel::{Reply, Request};
use understudy_vmm_control::api::{Activate, GiveNetwork};

use super::errors::Side;
use super::{AGENT_SLOW, World};
use crate::guests::maintenance::{discard_layer, end_process, remove_dormant};
use crate::guests::{Dormant, cold_boot};
use crate::handover::effects::Activation;
use crate::handover::{EffectError, Effected, ErrorKind, Moment, Operation};
use crate::host;
use crate::network::ensure_tap;
use crate::vmm::Instance;

pub(super) fn retry(error: impl std::fmt::Display) -> EffectError {
    EffectError::new(ErrorKind::Retry, error.to_string())
}

impl World {
    pub(super) fn do_hand_over_network(&mut self, operation: &Operation) -> Effected<()> {
        let (resolved, instance) = self.guest_vmm(operation)?;
        // The clone takes the taps only where it is there to take them.
        self.clone_vmm(operation)?;
        let request = GiveNetwork {
            socket: self.layout(&resolved, operation.clone_incarnation()).handover(),
        };
        instance
            .client()
            .give_network(&request)
            .map_err(|error| Side::Guest.vmm(&instance, &error))
    }

    pub(super) fn do_activate_clone(&mut self, operation: &Operation, open_taps: bool) -> Effected<()> {
        let (resolved, instance) = self.clone_vmm(operation)?;
        if open_taps {
            for nic in &resolved.networks {
                ensure_tap(&nic.tap, &nic.bridge).map_err(retry)?;
            }
        }
        let request = Activate {
            epoch: operation.commit_epoch(),
            open_taps,
        };
        let report = World::slow(&instance)
            .activate(&request)
            .map_err(|error| Side::Clone.vmm(&instance, &error))?;
        tracing::info!(
            guest = %self.guest,
            incarnation = instance.incarnation,
            taps_received = report.taps_received,
            taps_opened = report.taps_opened,
            "the clone is the guest"
        );
        Ok(())
    }

    pub(super) fn do_activate_agent(&mut self, operation: &Operation) -> Effected<Activation> {
        let request = Request::Activate {
            operation: operation.uid.clone(),
        };
        let reply = self
            .clone_agent(operation)?
            .ask(&request, AGENT_SLOW * 2)
            .map_err(|error| Side::Clone.agent(&error))?;
        let Reply::Activated(activated) = reply else {
            return Err(EffectError::new(
                ErrorKind::Refused,
                "the clone did not say what it started",
            ));
        };
        Ok(Activation {
            started: activated
                .started
                .into_iter()
                .take(256)
                .map(|(unit, micros)| StartedUnit {
                    unit,
                    milliseconds: i64::try_from(micros / 1000).unwrap_or(i64::MAX),
                })
                .collect(),
            failed: activated
                .failed
                .into_iter()
                .take(256)
                .map(|(unit, message)| FailedUnit { unit, message })
                .collect(),
            first_frame: self
                .clone_vmm(operation)
                .ok()
                .and_then(|(_, instance)| first_frame(&instance)),
        })
    }

    pub(super) fn do_kill_clone(&mut self, operation: &Operation) -> Effected<()> {
        let (_, resolved) = self.resolved()?;
        let Some(instance) = self.clone_record(operation, &resolved.uid) else {
            return Ok(());
        };
        // Whatever the record says: a clone that owns the guest is no clone any more.
        if self.owner(&resolved)?.incarnation == instance.incarnation {
            return Err(EffectError::new(
                ErrorKind::Refused,
                "the clone owns the guest; it is not ended",
            ));
        }
        end_process(&self.node, &resolved, &instance).map_err(retry)
    }

    pub(super) fn do_discard_clone(&mut self, operation: &Operation) -> Effected<()> {
        let (_, resolved) = self.resolved()?;
        let owner = self.owner(&resolved)?;
        if operation.rollback.is_some() {
            self.node
                .records
                .set_dormant(&resolved.uid, None)
                .map_err(retry)?;
        }
        discard_layer(&resolved, Some(&owner), &[], operation.clone_layer)
            .map_err(|error| EffectError::new(ErrorKind::Refused, error.to_string()))?;
        if let Some(instance) = self.clone_record(operation, &resolved.uid) {
            self.node.instances.remove(&instance).map_err(retry)?;
        }
        self.remove_network_facts(operation, &resolved.uid);
        Ok(())
    }

    pub(super) fn do_cold_boot(&mut self, operation: &Operation) -> Effected<()> {
        let (_, resolved) = self.resolved()?;
        let owner = self.owner(&resolved)?;
        let beyond = owner.epoch > operation.last_epoch();
        if beyond
            && self
                .node
                .instances
                .get(&resolved.uid, owner.incarnation)
                .is_some_and(|instance| instance.is_alive())
        {
            return Ok(());
        }
        for instance in self.node.instances.of(&resolved.uid) {
            end_process(&self.node, &resolved, &instance).map_err(retry)?;
        }
        cold_boot(&self.node, &resolved).map(drop).map_err(retry)
    }

    pub(super) fn do_retire(&mut self, operation: &Operation, deadline: Moment) -> Effected<()> {
        let (_, resolved) = self.resolved()?;
        let owner = self.owner(&resolved)?;
        let uid = &resolved.uid;
        let before = self.node.records.dormant(uid).map_err(retry)?;
        // Nobody asks them any more since the clone has the true network.
        self.node.drop_responders(uid, operation.clone_incarnation());
        let incarnation = operation.guest_incarnation();
        if let Some(before) = before.filter(|before| before.incarnation != incarnation) {
            remove_dormant(&self.node, &resolved, Some(&owner), &before).map_err(retry)?;
        }
        let dormant = Dormant {
            incarnation,
            operation: Some(operation.uid.clone()),
            layer: operation.guest_layer,
            deadline: Timestamp::from_microsecond(deadline.unix_us).unwrap_or(Timestamp::UNIX_EPOCH),
        };
        self.node
            .records
            .set_dormant(uid, Some(dormant.clone()))
            .map_err(retry)?;
        let alive = self
            .node
            .instances
            .get(uid, incarnation)
            .is_some_and(|instance| instance.is_alive());
        if !alive || deadline.unix_us <= host::moment().unix_us {
            remove_dormant(&self.node, &resolved, Some(&owner), &dormant).map_err(retry)?;
        }
        // Nobody is home there any more.
        self.node.unlink(&self.layout(&resolved, incarnation).vsock());
        self.remove_network_facts(operation, uid);
        Ok(())
    }

    fn clone_record(&self, operation: &Operation, uid: &str) -> Option<Instance> {
        self.node
            .instances
            .get(uid, operation.clone_incarnation())
            .filter(|instance| instance.operation.as_ref() == Some(&operation.uid))
    }

    fn remove_network_facts(&self, operation: &Operation, uid: &str) {
        let file = self
            .node
            .instances
            .dir(uid)
            .join(format!("{}.network", operation.clone_incarnation()));
        if let Err(error) = crate::durable::remove(&file) {
            tracing::warn!(%error, "what the guest said of its network is left behind");
        }
    }
}

/// When the first frame went out to the taps, as the clone's VMM noted it: the end of the interruption.
pub(super) fn first_frame(instance: &Instance) -> Option<Moment> {
    let info = instance.client().info().ok()?;
    let sent = info
        .interfaces
        .iter()
        .filter(|interface| !interface.isolated)
        .filter_map(|interface| i64::try_from(interface.first_sent_us?).ok())
        .min()?;
    let now = host::moment();
    Some(now.plus(sent - now.unix_us))
}
