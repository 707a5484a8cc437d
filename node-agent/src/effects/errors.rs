//! From what went wrong to what the engine does about it.

use understudy_api::conditions::reasons;
use understudy_vmm_control::client::ClientError;

use crate::guest_agent::{LinkError, RelayError, SessionError};
use crate::handover::{EffectError, ErrorKind};
use crate::vmm::Instance;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The guest.
    Guest,
    /// Its clone.
    Clone,
}

impl Side {
    /// Its VMM has ended.
    pub(super) fn gone(self, message: String) -> EffectError {
        match self {
            Side::Guest => EffectError::new(ErrorKind::GuestGone, message).because(reasons::GUEST_DIED),
            Side::Clone => EffectError::new(ErrorKind::CloneGone, message).because(reasons::CLONE_DIED),
        }
    }

    /// A request to its VMM failed. A VMM that does not answer may have ended; then trying again is no use.
    pub(super) fn vmm(self, instance: &Instance, error: &ClientError) -> EffectError {
        match error {
            ClientError::Refused { .. } => EffectError::new(ErrorKind::Refused, error.to_string()),
            ClientError::Transport { .. } if !instance.is_alive() => {
                let log = crate::vmm::log_end(&instance.log);
                self.gone(format!(
                    "the VMM of incarnation {} has ended: {log}",
                    instance.incarnation
                ))
            }
            ClientError::Transport { .. } => EffectError::new(ErrorKind::Retry, error.to_string()),
        }
    }

    /// A request to its guest agent failed.
    pub(super) fn agent(self, error: &LinkError) -> EffectError {
        let message = format!("{}: {error}", self.name());
        match error {
            LinkError::NotConnected(_) | LinkError::Broken(_) => EffectError::new(ErrorKind::Retry, message),
            LinkError::Refused(_) | LinkError::Protocol(_) | LinkError::TooOld(_) => {
                EffectError::new(ErrorKind::Refused, message).because(reasons::GUEST_REFUSED)
            }
        }
    }

    /// A session with its guest agent could not be opened.
    pub(super) fn session(self, error: &SessionError) -> EffectError {
        let message = format!("{}: {error}", self.name());
        match error {
            SessionError::Connect { .. } | SessionError::Frame(_) => {
                EffectError::new(ErrorKind::Retry, message)
            }
            SessionError::Refused(_) | SessionError::Protocol(_) => {
                EffectError::new(ErrorKind::Refused, message).because(reasons::INTEGRATION_FAILED)
            }
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Side::Guest => "the guest",
            Side::Clone => "the clone",
        }
    }
}

/// A round did not come to its end.
pub(super) fn relay(error: &RelayError) -> EffectError {
    let kind = match error {
        RelayError::Guest(_) | RelayError::Clone(_) => ErrorKind::Retry,
        RelayError::Deadline => ErrorKind::Lapsed,
        RelayError::Protocol(_) | RelayError::GuestRefused(_) | RelayError::CloneRefused(_) => {
            ErrorKind::Refused
        }
    };
    EffectError::new(kind, error.to_string()).because(match kind {
        ErrorKind::Refused => reasons::INTEGRATION_FAILED,
        _ => "",
    })
}
