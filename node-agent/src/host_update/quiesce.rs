//! What becomes of SeamlessReboots that are in flight when the host must go.

use understudy_api::Phase;

/// Microseconds that a host of which nobody is in a hurry waits for reboots that could be undone.
pub const PATIENCE: i64 = 300_000_000;

/// A SeamlessReboot in flight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InFlight {
    /// `namespace/name` of the SeamlessReboot.
    pub name: String,
    /// `namespace/name` of its guest.
    pub guest: String,
    /// How far it is.
    pub phase: Phase,
}

/// What is done about a SeamlessReboot in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ruling {
    /// Its driver stops, and goes on from the journal once operations are released: nothing was done yet.
    Suspend,
    /// It is waited for.
    Wait,
    /// It is aborted ([`understudy_api::conditions::reasons::HOST_UPDATING`]); its guest serves on.
    Abort,
}

/// The rules for one update at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Whether the host goes down by itself, so that there is no time to wait for what can be undone.
    pub is_urgent: bool,
    /// Microseconds since operations were quiesced.
    pub waited: i64,
}

impl Rules {
    /// What is done about a SeamlessReboot in this phase.
    ///
    /// One that has changed nothing is suspended. In the cutover the clone is about to take over: it is
    /// waited for, `maxPause` bounds that. In between it costs the guest nothing to undo it, but a user
    /// asked for it: it may finish, where the host has time, for [`PATIENCE`].
    pub fn ruling(&self, phase: Phase) -> Ruling {
        match phase {
            Phase::Pending => Ruling::Suspend,
            // Here a person is waited for, or a window: that may take a day.
            Phase::AwaitingCutover => Ruling::Abort,
            Phase::CuttingOver | Phase::Succeeded | Phase::RolledBack | Phase::Failed | Phase::Aborted => {
                Ruling::Wait
            }
            Phase::Confirmed | Phase::Cloning | Phase::Rebooting | Phase::Integrating => {
                if self.is_urgent || self.waited >= PATIENCE {
                    Ruling::Abort
                } else {
                    Ruling::Wait
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_phase_has_its_ruling() {
        for phase in Phase::ALL {
            let ruling = |is_urgent, waited| Rules { is_urgent, waited }.ruling(phase);
            match phase {
                // Nothing was done: it goes on afterwards, and nobody has lost anything.
                Phase::Pending => {
                    assert_eq!(ruling(true, 0), Ruling::Suspend);
                    assert_eq!(ruling(false, i64::MAX), Ruling::Suspend);
                }
                Phase::AwaitingCutover => assert_eq!(ruling(false, 0), Ruling::Abort),
                // Never is a cutover cut, nor a rollback.
                Phase::CuttingOver
                | Phase::Succeeded
                | Phase::RolledBack
                | Phase::Failed
                | Phase::Aborted => {
                    assert_eq!(ruling(true, i64::MAX), Ruling::Wait);
                }
                _ => {
                    assert_eq!(ruling(false, PATIENCE - 1), Ruling::Wait, "{phase}");
                    assert_eq!(ruling(false, PATIENCE), Ruling::Abort, "{phase}");
                    assert_eq!(ruling(true, 0), Ruling::Abort, "{phase}");
                }
            }
        }
    }
}
