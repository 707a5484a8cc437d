//! What was asked for, in the engine's own units.

use serde::{Deserialize, Serialize};
use understudy_api::duration;
use understudy_api::readiness::Probe;
use understudy_api::reboot::{CutoverMode, OnConflict, SeamlessRebootSpec};
use understudy_api::window::{Window, WindowError};

/// The spec of a SeamlessReboot, read. Durations are in microseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// In the words of whoever asked.
    pub reason: Option<String>,
    /// Kernel release that must run afterwards.
    pub expect_kernel: Option<String>,
    /// The guest must have been booted after this time: microseconds since 1970.
    pub expect_booted_after: Option<i64>,
    /// Units held on the clone.
    pub hold: Vec<String>,
    /// Units stopped on the guest instead of frozen.
    pub stop: Vec<String>,
    /// What becomes of files that both sides changed.
    pub on_conflict: OnConflict,
    /// The longest that the guest is held.
    pub max_pause: i64,
    /// Timeout of the phase Pending.
    pub pending: i64,
    /// Timeout of the phases Confirmed and Cloning.
    pub cloning: i64,
    /// Timeout of the phase Rebooting.
    pub rebooting: i64,
    /// Timeout of the phase Integrating, for each attempt.
    pub integrating: i64,
    /// How long the old incarnation is kept.
    pub retain_dormant: i64,
    /// Whether the clone takes over by itself. (Records of older agents lack this and what follows.)
    #[serde(default)]
    pub mode: CutoverMode,
    /// When the clone may take over.
    #[serde(default)]
    pub window: Option<Window>,
    /// What the clone must answer before it takes over.
    #[serde(default)]
    pub readiness: Vec<Probe>,
    /// Timeout of the phase AwaitingCutover.
    #[serde(default)]
    pub awaiting_cutover: i64,
}

/// What the rules of the API should have refused, or could not know.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// No duration.
    #[error("spec.{field}: {value:?} must be a duration such as 500ms, 30s or 1h30m")]
    NotADuration {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// A time zone that is not known.
    #[error("spec.cutover.window: {0}")]
    Window(#[from] WindowError),
}

impl Plan {
    /// Reads a spec that satisfies the API's rules.
    pub fn from_spec(spec: &SeamlessRebootSpec) -> Result<Plan, PlanError> {
        let micros = |field, value: &str| {
            duration::parse(value)
                .and_then(|duration| i64::try_from(duration.as_micros()).ok())
                .ok_or_else(|| PlanError::NotADuration {
                    field,
                    value: value.to_owned(),
                })
        };
        if let Some(window) = &spec.cutover.window {
            window.at(jiff::Timestamp::UNIX_EPOCH)?;
        }
        let expect = spec.expect.as_ref();
        Ok(Plan {
            reason: spec.reason.clone(),
            expect_kernel: expect.and_then(|expect| expect.kernel_release.clone()),
            expect_booted_after: expect
                .and_then(|expect| expect.booted_after.as_ref())
                .map(|time| time.0.as_microsecond()),
            hold: spec.services.hold.clone(),
            stop: spec.services.stop.clone(),
            on_conflict: spec.capture.on_conflict,
            max_pause: micros("cutover.maxPause", &spec.cutover.max_pause)?,
            pending: micros("timeouts.pending", &spec.timeouts.pending)?,
            cloning: micros("timeouts.cloning", &spec.timeouts.cloning)?,
            rebooting: micros("timeouts.rebooting", &spec.timeouts.rebooting)?,
            integrating: micros("timeouts.integrating", &spec.timeouts.integrating)?,
            retain_dormant: micros("retainDormantFor", &spec.retain_dormant_for)?,
            mode: spec.cutover.mode,
            window: spec.cutover.window.clone(),
            readiness: spec.cutover.readiness.clone(),
            awaiting_cutover: micros("timeouts.awaitingCutover", &spec.timeouts.awaiting_cutover)?,
        })
    }

    /// Whether a boot satisfies `expect`; `Err` says what it misses. True where nothing is expected.
    pub fn satisfied_by(&self, kernel_release: &str, booted_at: i64) -> Result<(), String> {
        if let Some(expected) = &self.expect_kernel
            && expected != kernel_release
        {
            return Err(format!(
                "kernel {kernel_release} runs where {expected} is expected"
            ));
        }
        if let Some(after) = self.expect_booted_after
            && booted_at <= after
        {
            return Err("it was booted before the expected time".to_owned());
        }
        Ok(())
    }

    /// Whether anything is expected.
    pub fn expects(&self) -> bool {
        self.expect_kernel.is_some() || self.expect_booted_after.is_some()
    }
}
