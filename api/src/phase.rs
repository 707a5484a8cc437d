//! The phases of a SeamlessReboot and the graph of what may follow what, as pure functions.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Phase of a SeamlessReboot.
///
/// ```text
/// Pending → Confirmed → Cloning → Rebooting → Integrating → (AwaitingCutover) → CuttingOver → Succeeded → (RolledBack)
///                                                  ▲                                │ taken back
///                                                  └────────────────────────────────┘
/// anything before the commit point → Failed | Aborted
/// a rehearsal: Integrating → Succeeded, and the guest was left alone
/// ```
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub enum Phase {
    /// Preflight: what the reboot needs is checked; nothing was changed.
    #[default]
    Pending,
    /// The guest was told, and its filter captures changes.
    Confirmed,
    /// The disk is split and the clone's VMM is made.
    Cloning,
    /// The clone boots behind the curtain; the guest serves.
    Rebooting,
    /// What the guest changed is written into the clone, round by round; the guest serves.
    Integrating,
    /// The clone is ready, and waits for the approval of its cutover or for the window; the guest serves.
    AwaitingCutover,
    /// The guest is held, the rest is integrated, and the clone takes its place.
    CuttingOver,
    /// The clone is the guest; or the clone was rehearsed and discarded, as `cutover.mode` asked.
    Succeeded,
    /// The clone was the guest, and the incarnation before it is again: what was changed in between was
    /// discarded.
    RolledBack,
    /// It did not work; the guest has lost nothing and serves as before.
    Failed,
    /// It was taken back as asked; the guest has lost nothing and serves as before.
    Aborted,
}

impl Phase {
    /// All phases, in order.
    pub const ALL: [Phase; 11] = [
        Phase::Pending,
        Phase::Confirmed,
        Phase::Cloning,
        Phase::Rebooting,
        Phase::Integrating,
        Phase::AwaitingCutover,
        Phase::CuttingOver,
        Phase::Succeeded,
        Phase::RolledBack,
        Phase::Failed,
        Phase::Aborted,
    ];

    /// Its name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Pending => "Pending",
            Phase::Confirmed => "Confirmed",
            Phase::Cloning => "Cloning",
            Phase::Rebooting => "Rebooting",
            Phase::Integrating => "Integrating",
            Phase::AwaitingCutover => "AwaitingCutover",
            Phase::CuttingOver => "CuttingOver",
            Phase::Succeeded => "Succeeded",
            Phase::RolledBack => "RolledBack",
            Phase::Failed => "Failed",
            Phase::Aborted => "Aborted",
        }
    }

    /// Whether it is an end: nothing follows, unless somebody asks for a rollback.
    pub fn is_terminal(self) -> bool {
        matches!(
            self,
            Phase::Succeeded | Phase::RolledBack | Phase::Failed | Phase::Aborted
        )
    }

    /// Phases that may follow this one directly.
    ///
    /// `Pending → Succeeded` is a reboot whose `expect` holds already. `CuttingOver → Integrating` is a
    /// cutover that was taken back, `Integrating → Succeeded` the end of a rehearsal. `CuttingOver → Failed | Aborted` happens before the commit point only;
    /// that the commit point lies within this phase is the engine's to know.
    pub fn successors(self) -> &'static [Phase] {
        use Phase::*;
        match self {
            Pending => &[Confirmed, Succeeded, Failed, Aborted],
            Confirmed => &[Cloning, Failed, Aborted],
            Cloning => &[Rebooting, Failed, Aborted],
            Rebooting => &[Integrating, Failed, Aborted],
            Integrating => &[AwaitingCutover, CuttingOver, Succeeded, Failed, Aborted],
            AwaitingCutover => &[CuttingOver, Failed, Aborted],
            CuttingOver => &[Succeeded, Integrating, Failed, Aborted],
            Succeeded => &[RolledBack],
            RolledBack | Failed | Aborted => &[],
        }
    }

    /// Whether `next` may follow this phase directly. A phase does not follow itself.
    pub fn may_become(self, next: Phase) -> bool {
        self.successors().contains(&next)
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_graph_is_exactly_that_of_the_design() {
        use Phase::*;
        let allowed = [
            (Pending, Confirmed),
            (Pending, Succeeded),
            (Confirmed, Cloning),
            (Cloning, Rebooting),
            (Rebooting, Integrating),
            (Integrating, AwaitingCutover),
            (Integrating, CuttingOver),
            (Integrating, Succeeded),
            (AwaitingCutover, CuttingOver),
            (CuttingOver, Integrating),
            (CuttingOver, Succeeded),
            (Succeeded, RolledBack),
        ];
        for from in Phase::ALL {
            for to in Phase::ALL {
                let backs_out = !from.is_terminal() && matches!(to, Failed | Aborted);
                assert_eq!(
                    from.may_become(to),
                    allowed.contains(&(from, to)) || backs_out,
                    "{from} → {to}"
                );
            }
        }
    }

    #[test]
    fn every_phase_is_reached_and_every_path_ends() {
        let mut reached = vec![Phase::Pending];
        let mut at = 0;
        while at < reached.len() {
            for next in reached[at].successors() {
                if !reached.contains(next) {
                    reached.push(*next);
                }
            }
            at += 1;
        }
        assert_eq!(reached.len(), Phase::ALL.len());
        for phase in Phase::ALL {
            let ends = phase.is_terminal() && phase != Phase::Succeeded;
            assert_eq!(phase.successors().is_empty(), ends, "{phase}");
        }
    }

    #[test]
    fn the_name_in_the_api_is_the_name_in_rust() {
        for phase in Phase::ALL {
            assert_eq!(serde_json::to_value(phase).unwrap(), phase.as_str());
        }
    }
}
