//! Conditions: all of them from the first visit, a reason always, transition times carried over.

use jiff::Timestamp;

use crate::{Condition, NodeUpdatePhase, Phase, Time};

/// Types of conditions.
pub mod types {
    /// It is as declared (kstatus).
    pub const READY: &str = "Ready";
    /// Work is under way (kstatus).
    pub const RECONCILING: &str = "Reconciling";
    /// It will not get further by itself (kstatus).
    pub const STALLED: &str = "Stalled";
    /// A SeamlessReboot or NodeUpdate has succeeded (as a Job's).
    pub const COMPLETE: &str = "Complete";
    /// A SeamlessReboot or NodeUpdate has failed or was aborted (as a Job's).
    pub const FAILED: &str = "Failed";
    /// The guest agent answers.
    pub const AGENT_CONNECTED: &str = "AgentConnected";
    /// The guest says that a newer kernel or library waits for a reboot.
    pub const REBOOT_REQUIRED: &str = "RebootRequired";
    /// The operator has assigned it to a node, or says why it cannot.
    pub const ACCEPTED: &str = "Accepted";
    /// The node's agent lives.
    pub const AGENT_AVAILABLE: &str = "AgentAvailable";
    /// Nothing of a deleted guest is left on its node, but for disks that are kept.
    pub const RELEASED: &str = "Released";
    /// No new Pods are scheduled to the node of a NodeUpdate.
    pub const CORDONED: &str = "Cordoned";
    /// The node's ordinary Pods are gone: its agent may begin the NodeUpdate.
    pub const DRAINED: &str = "Drained";
    /// Pods are scheduled to the node again, or it stays as its administrator had left it.
    pub const UNCORDONED: &str = "Uncordoned";
    /// The operator keeps the credential with which the sessions of a NodeUpdate are resumed.
    pub const CREDENTIAL_KEPT: &str = "CredentialKept";
    /// A reboot that the host begins would wait until all sessions are saved.
    pub const SESSIONS_SAFE: &str = "SessionsSafe";
    /// A Host has guests or operations that are not assigned to it.
    pub const ORPHANS: &str = "Orphans";

    /// Those that the operator writes on objects that are assigned to nodes; all others of them are the agent's.
    pub const OPERATORS: [&str; 6] = [
        ACCEPTED,
        AGENT_AVAILABLE,
        CORDONED,
        DRAINED,
        UNCORDONED,
        CREDENTIAL_KEPT,
    ];
}

/// Reasons, in one word each. Part of the API: they are matched by scripts.
pub mod reasons {
    /// The first visit.
    pub const PENDING: &str = "Pending";
    /// Work is under way.
    pub const IN_PROGRESS: &str = "InProgress";
    /// The reboot has succeeded.
    pub const REBOOTED: &str = "Rebooted";
    /// What `expect` names held before anything was done.
    pub const ALREADY_SATISFIED: &str = "AlreadySatisfied";
    /// The clone does not satisfy `expect`.
    pub const EXPECTATION_NOT_MET: &str = "ExpectationNotMet";
    /// What the reboot needs is not there: guest agent, memory, disk, a capability.
    pub const PREFLIGHT_FAILED: &str = "PreflightFailed";
    /// No Guest of that name.
    pub const GUEST_NOT_FOUND: &str = "GuestNotFound";
    /// Another operation is in flight for this guest.
    pub const GUEST_BUSY: &str = "GuestBusy";
    /// The guest refused what was asked of it.
    pub const GUEST_REFUSED: &str = "GuestRefused";
    /// The guest's own VMM ended; the guest is booted anew.
    pub const GUEST_DIED: &str = "GuestDied";
    /// The clone's kernel panicked, or its VMM ended.
    pub const CLONE_DIED: &str = "CloneDied";
    /// The clone did not report its boot in time.
    pub const CLONE_SILENT: &str = "CloneSilent";
    /// Units fail on the clone that did not fail on the guest.
    pub const UNITS_FAILED: &str = "UnitsFailed";
    /// Files changed on both sides and `onConflict` is `Fail`, or the clone refused a round.
    pub const INTEGRATION_FAILED: &str = "IntegrationFailed";
    /// The filter lost changes.
    pub const CAPTURE_LOST: &str = "CaptureLost";
    /// No attempt to cut over fitted into `maxPause`.
    pub const MAX_PAUSE_EXCEEDED: &str = "MaxPauseExceeded";
    /// A phase took longer than its timeout.
    pub const TIMED_OUT: &str = "TimedOut";
    /// A step failed for another reason; the message tells it.
    pub const STEP_FAILED: &str = "StepFailed";
    /// It was aborted.
    pub const ABORTED: &str = "Aborted";
    /// The clone waits for `spec.action: Proceed`, as `cutover.mode: Manual` asks.
    pub const APPROVAL_REQUIRED: &str = "ApprovalRequired";
    /// A rehearsal has succeeded: the clone was discarded, and the guest was left alone.
    pub const REHEARSED: &str = "Rehearsed";
    /// The clone did not answer as `cutover.readiness` asks.
    pub const NOT_READY: &str = "NotReady";
    /// The incarnation before is the guest again.
    pub const ROLLED_BACK: &str = "RolledBack";
    /// The manifest is not valid.
    pub const INVALID: &str = "Invalid";
    /// It waits for a reboot of the host, or was undone for it.
    pub const HOST_UPDATING: &str = "HostUpdating";
    /// Every session goes on after the host's reboot.
    pub const SESSIONS_RESUMED: &str = "SessionsResumed";
    /// A guest's session was saved; it is resumed after the host's reboot.
    pub const SESSION_SAVED: &str = "SessionSaved";
    /// A guest's session could not be saved; it runs on.
    pub const SAVE_FAILED: &str = "SaveFailed";
    /// A saved session could not be resumed; it is kept.
    pub const SESSION_REFUSED: &str = "SessionRefused";
    /// A session ended with the host: it could not be saved in time, or the host went down by itself.
    pub const SESSION_LOST: &str = "SessionLost";
    /// The credential provider is missing, or it is not able to keep or to return a key.
    pub const CREDENTIAL_UNAVAILABLE: &str = "CredentialUnavailable";
    /// Sessions wait for the credential provider's answer.
    pub const AWAITING_CREDENTIAL: &str = "AwaitingCredential";
    /// The operator has made the credential, and has released it to nobody so far.
    pub const KEPT: &str = "Kept";
    /// The operator has released the credential to a boot of the host; it is kept until no session needs it.
    pub const RELEASED: &str = "Released";
    /// The operator has not released the credential to who asked for it.
    pub const CREDENTIAL_REFUSED: &str = "CredentialRefused";
    /// The operator has destroyed the credential: no session needs it any more.
    pub const DESTROYED: &str = "Destroyed";
    /// `update.command` failed.
    pub const UPDATE_COMMAND_FAILED: &str = "UpdateCommandFailed";
    /// The host did not go down in time.
    pub const REBOOT_TIMED_OUT: &str = "RebootTimedOut";
    /// The host could not be asked to reboot.
    pub const REBOOT_FAILED: &str = "RebootFailed";
    /// The host went down before sessions were being saved.
    pub const HOST_WENT_DOWN: &str = "HostWentDown";
    /// The host has called off the reboot that it had begun.
    pub const REBOOT_CALLED_OFF: &str = "RebootCalledOff";
    /// It was assigned to a node.
    pub const ASSIGNED: &str = "Assigned";
    /// A Guest in a cluster names its node in `spec.nodeName`.
    pub const NODE_REQUIRED: &str = "NodeRequired";
    /// No Node of that name.
    pub const NODE_NOT_FOUND: &str = "NodeNotFound";
    /// A node of that name is there, and it is another one than before.
    pub const NODE_REPLACED: &str = "NodeReplaced";
    /// The node's agent lives.
    pub const AGENT_LIVES: &str = "AgentLives";
    /// No agent has ever spoken from the node.
    pub const NO_AGENT: &str = "NoAgent";
    /// The node's agent has not spoken for some time.
    pub const AGENT_SILENT: &str = "AgentSilent";
    /// The Guest is not assigned to a node.
    pub const GUEST_NOT_ASSIGNED: &str = "GuestNotAssigned";
    /// The node is tainted `node.kubernetes.io/out-of-service`.
    pub const NODE_OUT_OF_SERVICE: &str = "NodeOutOfService";
    /// The host is back from its reboot, its kubelet is not, or the Node is not Ready yet.
    pub const NODE_NOT_READY: &str = "NodeNotReady";
    /// Another NodeUpdate of the node is under way, or another object of that name is in the way.
    pub const NODE_BUSY: &str = "NodeBusy";
    /// The operator has cordoned the node.
    pub const CORDONED: &str = "Cordoned";
    /// An administrator had cordoned the node; it stays so.
    pub const ALREADY_CORDONED: &str = "AlreadyCordoned";
    /// The operator has uncordoned the node.
    pub const UNCORDONED: &str = "Uncordoned";
    /// Ordinary Pods are being evicted.
    pub const DRAINING: &str = "Draining";
    /// No ordinary Pod is left on the node.
    pub const DRAINED: &str = "Drained";
    /// `drain.mode` is `None`: Pods stay until the host goes down.
    pub const NOT_ASKED_FOR: &str = "NotAskedFor";
    /// Pods were not gone within `drain.timeout`.
    pub const DRAIN_TIMED_OUT: &str = "DrainTimedOut";
    /// It waits until fewer than `maxUnavailable` nodes are under way.
    pub const MAX_UNAVAILABLE: &str = "MaxUnavailable";
    /// More than `maxFailures` nodes have failed.
    pub const NODES_FAILED: &str = "NodesFailed";
    /// The node did not come back within `returnTimeout`.
    pub const HOST_NOT_BACK: &str = "HostNotBack";
    /// The NodeUpdate was deleted before it came to its end.
    pub const NODE_UPDATE_GONE: &str = "NodeUpdateGone";
    /// `window` is closed; the message tells until when.
    pub const WINDOW_CLOSED: &str = "WindowClosed";
    /// `window` names no time zone or time that is known.
    pub const WINDOW_INVALID: &str = "WindowInvalid";
    /// A Pod that one of `blockers` names runs on the node, or an alert that it names fires.
    pub const BLOCKED: &str = "Blocked";
    /// No node is selected.
    pub const NOT_SELECTED: &str = "NotSelected";
    /// No new pass is begun while `paused` is true.
    pub const PAUSED: &str = "Paused";
}

/// One condition as it shall be now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted<'a> {
    /// One of [`types`].
    pub kind: &'a str,
    /// `True`, `False` or (`None`) `Unknown`.
    pub status: Option<bool>,
    /// One of [`reasons`]; never empty.
    pub reason: &'a str,
    /// For people.
    pub message: &'a str,
}

/// Sets the wanted conditions in `conditions`. A condition's transition time changes only with its status,
/// so that writing the same thing again changes nothing. Conditions of other types stay.
pub fn set(conditions: &mut Vec<Condition>, generation: i64, now: Timestamp, wanted: &[Wanted<'_>]) {
    for want in wanted {
        let status = match want.status {
            Some(true) => "True",
            Some(false) => "False",
            None => "Unknown",
        };
        let mut condition = Condition {
            type_: want.kind.to_owned(),
            status: status.to_owned(),
            reason: want.reason.to_owned(),
            message: want.message.to_owned(),
            observed_generation: Some(generation),
            last_transition_time: Time(now),
        };
        match conditions.iter_mut().find(|there| there.type_ == want.kind) {
            Some(there) => {
                if there.status == condition.status {
                    condition.last_transition_time = there.last_transition_time.clone();
                }
                *there = condition;
            }
            None => conditions.push(condition),
        }
    }
}

/// What a phase means to those who wait, whatever it is a phase of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Work is under way.
    Underway,
    /// It has come to a good end.
    Good,
    /// It has come to another end.
    Bad,
}

impl From<Phase> for Standing {
    fn from(phase: Phase) -> Standing {
        match phase {
            Phase::Succeeded => Standing::Good,
            Phase::RolledBack | Phase::Failed | Phase::Aborted => Standing::Bad,
            _ => Standing::Underway,
        }
    }
}

impl From<NodeUpdatePhase> for Standing {
    fn from(phase: NodeUpdatePhase) -> Standing {
        match phase {
            NodeUpdatePhase::Resumed => Standing::Good,
            NodeUpdatePhase::Failed | NodeUpdatePhase::Aborted => Standing::Bad,
            _ => Standing::Underway,
        }
    }
}

/// Status of `Ready`, `Reconciling`, `Stalled`, `Complete` and `Failed` of a SeamlessReboot or NodeUpdate.
pub fn table(standing: Standing) -> [(&'static str, bool); 5] {
    let (ready, reconciling, stalled, complete, failed) = match standing {
        Standing::Good => (true, false, false, true, false),
        Standing::Bad => (false, false, true, false, true),
        Standing::Underway => (false, true, false, false, false),
    };
    [
        (types::READY, ready),
        (types::RECONCILING, reconciling),
        (types::STALLED, stalled),
        (types::COMPLETE, complete),
        (types::FAILED, failed),
    ]
}

/// Sets the conditions of a SeamlessReboot or NodeUpdate in a phase.
pub fn set_for_phase(
    conditions: &mut Vec<Condition>,
    generation: i64,
    now: Timestamp,
    phase: impl Into<Standing>,
    reason: &str,
    message: &str,
) {
    let wanted = table(phase.into()).map(|(kind, status)| Wanted {
        kind,
        status: Some(status),
        reason,
        message,
    });
    set(conditions, generation, now, &wanted);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn status(conditions: &[Condition], kind: &str) -> String {
        conditions
            .iter()
            .find(|c| c.type_ == kind)
            .unwrap()
            .status
            .clone()
    }

    /// kstatus: Stalled=True is Failed; Reconciling=True is InProgress; Ready=True is Current.
    fn kstatus(conditions: &[Condition]) -> &'static str {
        if status(conditions, types::STALLED) == "True" {
            "Failed"
        } else if status(conditions, types::RECONCILING) == "True" {
            "InProgress"
        } else if status(conditions, types::READY) == "True" {
            "Current"
        } else {
            "InProgress"
        }
    }

    #[test]
    fn kstatus_reads_every_phase_rightly_and_every_condition_has_a_reason() {
        for phase in Phase::ALL {
            let mut conditions = Vec::new();
            set_for_phase(&mut conditions, 1, at(1), phase, reasons::IN_PROGRESS, "");
            assert_eq!(conditions.len(), 5);
            assert!(conditions.iter().all(|c| !c.reason.is_empty()));
            let expected = match phase {
                Phase::Succeeded => "Current",
                Phase::RolledBack | Phase::Failed | Phase::Aborted => "Failed",
                _ => "InProgress",
            };
            assert_eq!(kstatus(&conditions), expected, "{phase}");
        }
        for phase in NodeUpdatePhase::ALL {
            let mut conditions = Vec::new();
            set_for_phase(&mut conditions, 1, at(1), phase, reasons::IN_PROGRESS, "");
            assert_eq!(
                kstatus(&conditions) != "InProgress",
                phase.is_terminal(),
                "{phase}"
            );
            assert_eq!(
                kstatus(&conditions) == "Current",
                phase == NodeUpdatePhase::Resumed,
                "{phase}"
            );
        }
    }

    #[test]
    fn a_transition_time_changes_with_the_status_and_with_nothing_else() {
        let mut conditions = Vec::new();
        set_for_phase(&mut conditions, 1, at(1), Phase::Pending, reasons::PENDING, "");
        set_for_phase(
            &mut conditions,
            2,
            at(2),
            Phase::Cloning,
            reasons::IN_PROGRESS,
            "splitting",
        );
        assert!(conditions.iter().all(|c| c.last_transition_time.0 == at(1)));
        assert!(
            conditions
                .iter()
                .all(|c| c.message == "splitting" && c.observed_generation == Some(2))
        );
        set_for_phase(&mut conditions, 2, at(3), Phase::Succeeded, reasons::REBOOTED, "");
        for condition in &conditions {
            let changed = ["Ready", "Reconciling", "Complete"].contains(&condition.type_.as_str());
            assert_eq!(
                condition.last_transition_time.0 == at(3),
                changed,
                "{}",
                condition.type_
            );
        }
    }

    #[test]
    fn conditions_of_another_writer_stay() {
        let mut conditions = Vec::new();
        let other = Wanted {
            kind: "Accepted",
            status: None,
            reason: "Waiting",
            message: "",
        };
        set(&mut conditions, 1, at(1), &[other]);
        set_for_phase(&mut conditions, 1, at(2), Phase::Pending, reasons::PENDING, "");
        assert_eq!(status(&conditions, "Accepted"), "Unknown");
    }
}
