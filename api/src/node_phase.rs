//! The phases of a NodeUpdate and the graph of what may follow what, as pure functions.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Phase of a NodeUpdate.
///
/// ```text
/// Pending → Notified → Saving → Acknowledged → Rebooting → LoggingOn → Resuming → Resumed
///                        └──── the host went down by itself ────▲            │ and again
///                                                               └────────────┘
/// anything before the host is rebooted → Failed | Aborted: every guest runs on
/// after it → Failed: what could not be resumed is kept, and named
/// ```
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub enum NodeUpdatePhase {
    /// It is looked at what holds already; nothing was changed.
    #[default]
    Pending,
    /// The pre-reboot notification has reached the agent: the host is updated, operations on guests come to
    /// their end, what saving needs is checked, keys are registered. All guests run.
    Notified,
    /// Sessions are saved: memory while guests run, the rest in a short pause of each.
    Saving,
    /// Every save is durable, and that is recorded: only now may the host be rebooted.
    Acknowledged,
    /// The reboot was asked for, in response to the acknowledgement.
    Rebooting,
    /// The host has booted anew; keys are obtained from the credential provider.
    LoggingOn,
    /// The post-reboot notification was given: sessions are resumed, in order of priority.
    Resuming,
    /// Every session goes on.
    Resumed,
    /// It did not work. Before the reboot: every guest runs on. After it: the status tells which session
    /// was not resumed, and why.
    Failed,
    /// It was taken back as asked; every guest runs on.
    Aborted,
}

impl NodeUpdatePhase {
    /// All phases, in order.
    pub const ALL: [NodeUpdatePhase; 10] = [
        NodeUpdatePhase::Pending,
        NodeUpdatePhase::Notified,
        NodeUpdatePhase::Saving,
        NodeUpdatePhase::Acknowledged,
        NodeUpdatePhase::Rebooting,
        NodeUpdatePhase::LoggingOn,
        NodeUpdatePhase::Resuming,
        NodeUpdatePhase::Resumed,
        NodeUpdatePhase::Failed,
        NodeUpdatePhase::Aborted,
    ];

    /// Its name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            NodeUpdatePhase::Pending => "Pending",
            NodeUpdatePhase::Notified => "Notified",
            NodeUpdatePhase::Saving => "Saving",
            NodeUpdatePhase::Acknowledged => "Acknowledged",
            NodeUpdatePhase::Rebooting => "Rebooting",
            NodeUpdatePhase::LoggingOn => "LoggingOn",
            NodeUpdatePhase::Resuming => "Resuming",
            NodeUpdatePhase::Resumed => "Resumed",
            NodeUpdatePhase::Failed => "Failed",
            NodeUpdatePhase::Aborted => "Aborted",
        }
    }

    /// Whether nothing follows.
    pub fn is_terminal(self) -> bool {
        matches!(
            self,
            NodeUpdatePhase::Resumed | NodeUpdatePhase::Failed | NodeUpdatePhase::Aborted
        )
    }

    /// Phases that may follow this one directly.
    ///
    /// `Pending → Resumed` is an update whose `expect` holds already. `Saving → LoggingOn` is a host that
    /// went down before it was told that it may: what was saved until then is resumed. `Resuming →
    /// LoggingOn` is a host that went down again meanwhile.
    pub fn successors(self) -> &'static [NodeUpdatePhase] {
        use NodeUpdatePhase::*;
        match self {
            Pending => &[Notified, Resumed, Failed, Aborted],
            Notified => &[Saving, Failed, Aborted],
            Saving => &[Acknowledged, LoggingOn, Failed, Aborted],
            Acknowledged => &[Rebooting, Failed, Aborted],
            Rebooting => &[LoggingOn, Failed, Aborted],
            LoggingOn => &[Resuming],
            Resuming => &[LoggingOn, Resumed, Failed],
            Resumed | Failed | Aborted => &[],
        }
    }

    /// Whether `next` may follow this phase directly. A phase does not follow itself.
    pub fn may_become(self, next: NodeUpdatePhase) -> bool {
        self.successors().contains(&next)
    }
}

impl std::fmt::Display for NodeUpdatePhase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_graph_is_exactly_that_of_the_design() {
        use NodeUpdatePhase::*;
        let allowed = [
            (Pending, Notified),
            (Pending, Resumed),
            (Notified, Saving),
            (Saving, Acknowledged),
            (Saving, LoggingOn),
            (Acknowledged, Rebooting),
            (Rebooting, LoggingOn),
            (LoggingOn, Resuming),
            (Resuming, LoggingOn),
            (Resuming, Resumed),
            (Resuming, Failed),
        ];
        let runs_on = [Pending, Notified, Saving, Acknowledged, Rebooting];
        for from in NodeUpdatePhase::ALL {
            for to in NodeUpdatePhase::ALL {
                let backs_out = runs_on.contains(&from) && matches!(to, Failed | Aborted);
                assert_eq!(
                    from.may_become(to),
                    allowed.contains(&(from, to)) || backs_out,
                    "{from} → {to}"
                );
            }
        }
    }

    #[test]
    fn the_host_is_rebooted_and_sessions_resumed_by_way_of_the_acknowledgement_or_of_a_loss() {
        // Every path to Rebooting leads through Acknowledged.
        let before: Vec<NodeUpdatePhase> = NodeUpdatePhase::ALL
            .into_iter()
            .filter(|phase| phase.may_become(NodeUpdatePhase::Rebooting))
            .collect();
        assert_eq!(before, [NodeUpdatePhase::Acknowledged]);
        let before: Vec<NodeUpdatePhase> = NodeUpdatePhase::ALL
            .into_iter()
            .filter(|phase| phase.may_become(NodeUpdatePhase::Resuming))
            .collect();
        assert_eq!(before, [NodeUpdatePhase::LoggingOn]);
    }

    #[test]
    fn every_phase_is_reached_and_every_path_ends() {
        let mut reached = vec![NodeUpdatePhase::Pending];
        let mut at = 0;
        while at < reached.len() {
            for next in reached[at].successors() {
                if !reached.contains(next) {
                    reached.push(*next);
                }
            }
            at += 1;
        }
        assert_eq!(reached.len(), NodeUpdatePhase::ALL.len());
        for phase in NodeUpdatePhase::ALL {
            assert_eq!(phase.successors().is_empty(), phase.is_terminal(), "{phase}");
        }
    }

    #[test]
    fn the_name_in_the_api_is_the_name_in_rust() {
        for phase in NodeUpdatePhase::ALL {
            assert_eq!(serde_json::to_value(phase).unwrap(), phase.as_str());
        }
    }
}
