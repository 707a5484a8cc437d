//! What `spec.action` asks of a SeamlessReboot that has come to its end: a rollback, or what comes too late. Before
//! its end the engine looks at it itself.

use std::sync::Arc;

use jiff::Timestamp;
use understudy_api::conditions;
use understudy_api::reboot::{ActionStatus, ActionType};
use understudy_api::{Phase, SeamlessReboot, SeamlessRebootStatus, Time};
use understudy_vmm_control::owner::Owner;

use crate::guests::resolve;
use crate::handover::effects::Preflight;
use crate::handover::record::Transition;
use crate::handover::{Moment, Operation, Plan, Verdict, rollback};
use crate::host;
use crate::node::Node;
use crate::operations::start;
use crate::store::{Key, Object};

/// One pass over a SeamlessReboot that has come to its end.
pub(crate) fn pass(node: &Arc<Node>, reboot: &SeamlessReboot) {
    let guest = Key::new(reboot.key().namespace, reboot.spec.guest_name.clone());
    if reboot.is_deleting() || node.in_flight(&guest).is_some() || node.is_driven(&reboot.uid()) {
        return;
    }
    let status = reboot.status.clone().unwrap_or_default();
    let known = status.action.as_ref().map(|action| action.kind);
    let asked = reboot.spec.action.as_ref().map(|action| action.kind);
    match asked.filter(|asked| Some(*asked) != known) {
        None => observe(node, reboot, &status),
        Some(ActionType::Rollback) if status.phase == Some(Phase::Succeeded) => {
            // It waits for the host, which ends what is dormant before it goes down.
            if node.work.holds_operations() {
                return;
            }
            match operation(node, reboot, &guest, &status) {
                Ok(operation) => {
                    let operation = rollback::begin(operation, host::moment());
                    start(node, guest, reboot.key(), operation, false);
                }
                Err(why) => refuse(node, reboot, ActionType::Rollback, &why),
            }
        }
        Some(kind) => {
            let why = match (kind, status.phase) {
                (ActionType::Abort, Some(Phase::Succeeded)) => {
                    "the reboot has succeeded; a Rollback goes back, as long as the old incarnation is dormant"
                        .to_owned()
                }
                (_, phase) => format!("the reboot is over: {}", phase.unwrap_or_default()),
            };
            refuse(node, reboot, kind, &why);
        }
    }
}

/// The operation as it was when it had succeeded, as far as a rollback needs it.
fn operation(
    node: &Node,
    reboot: &SeamlessReboot,
    guest_key: &Key,
    status: &SeamlessRebootStatus,
) -> Result<Operation, String> {
    const GONE: &str = "there is no dormant incarnation any more to go back to: retainDormantFor is over, the guest was started anew, or another reboot came after this one";
    let guest = node
        .objects
        .guest(guest_key)
        .map_err(|error| error.to_string())?
        .ok_or_else(|| format!("there is no Guest {guest_key} any more"))?;
    let resolved = resolve(&node.config, &guest, host::cpus(), host::total_memory_mib())
        .map_err(|error| error.to_string())?;
    let dormant = node
        .records
        .dormant(&resolved.uid)
        .map_err(|error| error.to_string())?
        .filter(|dormant| dormant.operation.as_ref() == Some(&reboot.uid()))
        .ok_or(GONE)?;
    let owner = Owner::read(&resolved.state_dir())
        .map_err(|error| error.to_string())?
        .ok_or(GONE)?;
    let clone_layer = owner.layer.ok_or(GONE)?;
    let plan = Plan::from_spec(&reboot.spec).map_err(|error| error.to_string())?;
    let mut operation = Operation::new(
        reboot.uid(),
        reboot.key().to_string(),
        guest_key.to_string(),
        plan,
        (dormant.layer, clone_layer),
        host::moment(),
    );
    operation.transitions = status
        .phase_transitions
        .iter()
        .map(|transition| Transition {
            phase: transition.phase,
            at: Moment {
                unix_us: transition.transition_time.0.as_microsecond(),
                boot_us: 0,
            },
        })
        .collect();
    operation.result = status.result.clone().unwrap_or_default();
    let before = operation.result.before.clone().unwrap_or_default();
    operation.before = Some(Preflight {
        incarnation: dormant.incarnation,
        epoch: owner.epoch.saturating_sub(1),
        boot_id: before.boot_id,
        kernel_release: before.kernel_release,
        booted_at: 0,
        failed_units: Vec::new(),
    });
    operation.verdict = Some(Verdict::succeeded(
        status.reason.as_deref().unwrap_or_default(),
        status.message.clone().unwrap_or_default(),
    ));
    Ok(operation)
}

/// Latches an action that is carried out.
pub(crate) fn latch(node: &Node, reboot: &SeamlessReboot, kind: ActionType) {
    tell(node, reboot, Some(taken(kind, None)));
}

/// Latches an action that is not carried out.
fn refuse(node: &Node, reboot: &SeamlessReboot, kind: ActionType, why: &str) {
    tracing::warn!(reboot = %reboot.key(), action = kind.as_str(), why, "refused");
    tell(node, reboot, Some(taken(kind, Some(why))));
}

fn taken(kind: ActionType, refused: Option<&str>) -> ActionStatus {
    ActionStatus {
        kind,
        time: Time(Timestamp::now()),
        refused: refused.map(str::to_owned),
    }
}

/// Tells that a change of the spec was seen: without that all who wait for it would wait for ever.
fn observe(node: &Node, reboot: &SeamlessReboot, status: &SeamlessRebootStatus) {
    if status.observed_generation != reboot.generation() {
        tell(node, reboot, None);
    }
}

fn tell(node: &Node, reboot: &SeamlessReboot, action: Option<ActionStatus>) {
    let generation = reboot.generation();
    let reported = node
        .objects
        .report_reboot(&reboot.key(), &reboot.uid(), true, &mut |status| {
            status.observed_generation = generation;
            if let Some(action) = &action {
                status.action = Some(action.clone());
            }
            let (reason, message) = (status.reason.clone(), status.message.clone());
            conditions::set_for_phase(
                &mut status.conditions,
                generation,
                Timestamp::now(),
                status.phase.unwrap_or_default(),
                &reason.unwrap_or_default(),
                &message.unwrap_or_default(),
            );
        });
    if let Err(error) = reported {
        tracing::error!(reboot = %reboot.key(), %error, "the status could not be written");
    }
}

#[cfg(test)]
#[path = "actions_test.rs"]
mod tests;
