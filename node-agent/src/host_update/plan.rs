//! What was asked for, in the engine's own units.

use serde::{Deserialize, Serialize};
use understudy_api::duration;
use understudy_api::host_update::{HostExpect, RebootMethod};
use understudy_api::node_update::{NodeUpdateSpec, Origin};

/// Timeout that `update` has where it has no command.
const NO_COMMAND: i64 = 0;

/// The spec of a NodeUpdate, read. Durations are in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// Who began it.
    pub origin: Origin,
    /// In the words of whoever began it.
    pub reason: Option<String>,
    /// `update.command`; empty where there is none.
    pub command: Vec<String>,
    /// The longest that it may take.
    pub command_timeout: i64,
    /// What must hold after the reboot.
    pub expect: Option<HostExpect>,
    /// How the host is rebooted.
    pub reboot: RebootMethod,
    /// The command for [`RebootMethod::Command`]; else empty.
    pub reboot_command: Vec<String>,
    /// How long the host may take to go down.
    pub reboot_timeout: i64,
    /// Name of the credential provider; `None`: the node's first.
    pub credential_provider: Option<String>,
    /// The longest that saving may take.
    pub save_timeout: i64,
}

/// A duration that the rules of the API should have refused.
#[derive(Debug, thiserror::Error)]
#[error("spec.{field}: {value:?} must be a duration such as 500ms, 30s or 1h30m")]
pub struct PlanError {
    /// The field.
    pub field: &'static str,
    /// Its value.
    pub value: String,
}

impl Plan {
    /// Reads a spec that satisfies the API's rules.
    pub fn from_spec(spec: &NodeUpdateSpec) -> Result<Plan, PlanError> {
        let micros = |field, value: &str| {
            duration::parse(value)
                .and_then(|duration| i64::try_from(duration.as_micros()).ok())
                .ok_or_else(|| PlanError {
                    field,
                    value: value.to_owned(),
                })
        };
        let update = spec.update.as_ref();
        Ok(Plan {
            origin: spec.origin,
            reason: spec.reason.clone(),
            command: update.map_or_else(Vec::new, |update| update.command.clone()),
            command_timeout: match update {
                Some(update) => micros("update.timeout", &update.timeout)?,
                None => NO_COMMAND,
            },
            expect: spec.expect.clone(),
            reboot: spec.reboot.method,
            reboot_command: spec.reboot.command.clone().unwrap_or_default(),
            reboot_timeout: micros("reboot.timeout", &spec.reboot.timeout)?,
            credential_provider: spec.sessions.credential_provider.clone(),
            save_timeout: micros("sessions.timeout", &spec.sessions.timeout)?,
        })
    }
}
