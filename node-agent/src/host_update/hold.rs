//! Which guests the guest manager leaves alone because of an update, and what it tells of them.

use understudy_api::conditions::reasons;
use understudy_api::guest::GuestPhase;
use understudy_api::node_update::SessionState;

use super::record::Update;

/// A guest whose VMM the engine alone starts and ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// Phase of the Guest.
    pub phase: GuestPhase,
    /// Reason of its `Ready` condition.
    pub reason: String,
    /// Message of its `Ready` condition.
    pub message: String,
}

/// Whether the guest manager must not start, stop or restart the guest with this UID, because its session
/// is being saved, is saved, or is kept. `None`: it is the guest manager's.
///
/// An agent that finds records when it starts asks this before it starts any guest: a guest that has a
/// checkpoint is never booted cold.
pub fn hold(update: &Update, uid: &str) -> Option<Hold> {
    let session = update.sessions.iter().find(|session| session.uid == uid)?;
    let say = |text: &str| format!("{text} (NodeUpdate {})", update.name);
    let (phase, reason, message) = match session.state {
        SessionState::Saving => (
            GuestPhase::Saving,
            reasons::HOST_UPDATING,
            say("its session is being saved for a reboot of the host"),
        ),
        SessionState::Saved => (
            GuestPhase::Saved,
            reasons::SESSION_SAVED,
            say("its session is saved and goes on when the host has rebooted"),
        ),
        SessionState::Resuming => (
            GuestPhase::Resuming,
            reasons::HOST_UPDATING,
            say("its session is being resumed"),
        ),
        SessionState::Kept => {
            let reason = session.reason.as_deref().unwrap_or(reasons::SESSION_REFUSED);
            let message = session.message.as_deref().unwrap_or_default();
            (
                GuestPhase::Saved,
                reason,
                say(&format!(
                    "its session is saved and was not resumed: {message}; the node agent tries again when it is restarted; to give the session up and boot the guest anew: understudy-node discard-session {}",
                    session.guest
                )),
            )
        }
        SessionState::Waiting | SessionState::RunsOn | SessionState::Resumed | SessionState::Lost => {
            return None;
        }
    };
    Some(Hold {
        phase,
        reason: reason.to_owned(),
        message,
    })
}

#[cfg(test)]
#[path = "hold_test.rs"]
mod tests;
