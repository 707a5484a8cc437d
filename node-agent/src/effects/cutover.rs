//! Effects between the holding of ingress and the commit point, and their taking back.

use std::time::Duration;

use understudy_channel::{Reply, Request};
use understudy_vmm_control::api::{Commit, Gates, HoldReport, HoldRequest, VmState};
use understudy_vmm_control::client::ClientError;

use super::errors::Side;
use super::{AGENT, AGENT_SLOW, World};
use crate::handover::effects::Sealed;
use crate::handover::{EffectError, Effected, ErrorKind, Operation};
use crate::host;
use crate::vmm::Instance;

impl World {
    fn hold(&self, operation: &Operation, gates: Gates, lease_ms: u64) -> Effected<HoldReport> {
        let (_, instance) = self.guest_vmm(operation)?;
        hold(Side::Guest, &instance, gates, lease_ms)
    }

    pub(super) fn do_hold_ingress(&mut self, operation: &Operation, lease_ms: u64) -> Effected<()> {
        let gates = Gates {
            receive: true,
            ..Gates::default()
        };
        self.hold(operation, gates, lease_ms).map(drop)
    }

    pub(super) fn do_freeze_userland(&mut self, operation: &Operation, lease_ms: u64) -> Effected<()> {
        let agent = self.guest_agent(operation)?;
        let freeze = Request::FreezeUserland {
            watchdog_ms: u32::try_from(lease_ms).unwrap_or(u32::MAX),
            stop: operation.plan.stop.clone(),
        };
        agent
            .done(&freeze, Duration::from_millis(lease_ms).min(AGENT_SLOW))
            .map_err(|error| Side::Guest.agent(&error))
    }

    pub(super) fn do_seal(&mut self, operation: &Operation, lease_ms: u64) -> Effected<Sealed> {
        let gates = Gates {
            transmit: true,
            write: true,
            ..Gates::default()
        };
        let at = host::moment();
        let report = self.hold(operation, gates, lease_ms)?;
        if !report.gates.receive {
            return Err(lapsed());
        }
        Ok(Sealed {
            block_writes: report.counters.block_writes,
            at,
        })
    }

    pub(super) fn do_pause(&mut self, operation: &Operation, lease_ms: u64) -> Effected<()> {
        let gates = Gates {
            vcpus: true,
            ..Gates::default()
        };
        let report = self.hold(operation, gates, lease_ms)?;
        let Gates {
            receive,
            transmit,
            write,
            vcpus,
        } = report.gates;
        if !(receive && transmit && write && vcpus) || report.counters.block_writes != operation.block_writes
        {
            return Err(lapsed());
        }
        Ok(())
    }

    pub(super) fn do_commit(&mut self, operation: &Operation) -> Effected<()> {
        let (_, instance) = self.guest_vmm(operation)?;
        let commit = Commit {
            epoch: operation.commit_epoch(),
            incarnation: operation.clone_incarnation(),
            layer: operation.clone_layer,
            block_writes: operation.block_writes,
        };
        instance
            .client()
            .commit(&commit)
            .map_err(|error| Side::Guest.vmm(&instance, &error))
    }

    pub(super) fn do_release(&mut self, operation: &Operation) -> Effected<()> {
        let (_, instance) = self.guest_vmm(operation)?;
        release(Side::Guest, &instance)
    }

    pub(super) fn do_thaw_userland(&mut self, operation: &Operation) -> Effected<()> {
        match self
            .guest_agent(operation)?
            .ask(&Request::ThawUserland, AGENT_SLOW)
            .map_err(|error| Side::Guest.agent(&error))?
        {
            Reply::Thawed { .. } | Reply::Done => Ok(()),
            _ => Err(EffectError::new(
                ErrorKind::Refused,
                "the guest did not say that it thawed",
            )),
        }
    }

    pub(super) fn do_end_capture(&mut self, operation: &Operation) -> Effected<()> {
        let request = Request::EndCapture {
            operation: operation.uid.clone(),
        };
        self.guest_agent(operation)?
            .done(&request, AGENT)
            .map_err(|error| Side::Guest.agent(&error))
    }
}

/// Closes gates of a VMM.
pub(super) fn hold(side: Side, instance: &Instance, gates: Gates, lease_ms: u64) -> Effected<HoldReport> {
    let request = HoldRequest {
        gates,
        lease_ms: lease_ms.clamp(1, 600_000),
    };
    instance
        .client()
        .hold(&request)
        .map_err(|error| side.vmm(instance, &error))
}

/// Opens all gates of a VMM, unless it is dormant.
pub(super) fn release(side: Side, instance: &Instance) -> Effected<()> {
    match instance.client().release() {
        Ok(_) => Ok(()),
        Err(error @ ClientError::Refused { .. }) => {
            let info = instance
                .client()
                .info()
                .map_err(|error| side.vmm(instance, &error))?;
            match info.state {
                VmState::Dormant => Ok(()),
                VmState::Exited => Err(side.gone(format!("{} has stopped", side.name()))),
                // Not expected; whoever refuses now may not refuse later.
                _ => Err(EffectError::new(ErrorKind::Retry, error.to_string())),
            }
        }
        Err(error) => Err(side.vmm(instance, &error)),
    }
}

pub(super) fn lapsed() -> EffectError {
    EffectError::new(
        ErrorKind::Lapsed,
        "the lease ran out before the next step, so the guest went on in between",
    )
}
