//! What went wrong below, in the engine's terms.

use understudy_api::conditions::reasons;
use understudy_vmm_control::client::ClientError;

use crate::credentials::CredentialError;
use crate::host_update::{EffectError, ErrorKind};
use crate::sessions::SessionError;

/// A session's error. `alive`: whether the guest's VMM runs.
pub(super) fn session(error: &SessionError, alive: bool) -> EffectError {
    let message = error.to_string();
    match error {
        _ if !alive => EffectError::new(ErrorKind::GuestGone, message),
        SessionError::Credential(error) => credential(error),
        SessionError::Vmm {
            source: ClientError::Refused { .. },
            ..
        }
        | SessionError::OtherSave { .. }
        | SessionError::Unknown { .. }
        | SessionError::NoConfiguration(_)
        | SessionError::NoMachineId
        | SessionError::Space { .. } => EffectError::new(ErrorKind::Refused, message),
        SessionError::NotRunning(_) => EffectError::new(ErrorKind::GuestGone, message),
        SessionError::Vmm { .. } | SessionError::File(_) => EffectError::new(ErrorKind::Retry, message),
    }
}

/// A credential's error. What the provider refuses stays refused; what could not be read may be read later.
pub(super) fn credential(error: &CredentialError) -> EffectError {
    let kind = match error {
        CredentialError::Awaited { .. } => {
            return EffectError::new(ErrorKind::Awaited, error.to_string());
        }
        CredentialError::File(_)
        | CredentialError::Objects(_)
        | CredentialError::Hand { .. }
        | CredentialError::Random => ErrorKind::Retry,
        _ => ErrorKind::Refused,
    };
    EffectError::new(kind, error.to_string()).because(reasons::CREDENTIAL_UNAVAILABLE)
}
