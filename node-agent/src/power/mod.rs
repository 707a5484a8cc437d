//! The host's power: hearing that it goes down, holding that up until sessions are saved, and asking for a
//! reboot.
//!
//! Two nets, one behind the other. logind tells of a shutdown before anything is stopped, and waits for
//! whoever holds a *delay inhibitor*, at most `InhibitDelayMaxSec` ([`Power`]). Where it did not wait long
//! enough, or was not asked (`systemctl reboot -i`, no logind), the agent's own stop job is next: systemd
//! stops the agent before the VMMs, and waits for `TimeoutStopSec` ([`Systemctl::shutdown`]).

mod logind;
mod stop_job;
mod watch;

use std::time::Duration;

use crate::moment::Moment;

pub use logind::Logind;
pub use stop_job::Systemctl;
pub use watch::Power;

/// How the host goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// It comes back.
    Reboot,
    /// It is powered off or halted.
    PowerOff,
    /// It does not say: logind before systemd 255 tells only that it goes down.
    Unknown,
}

impl Shutdown {
    /// In the words that a user would type; for an unknown one, both.
    pub fn as_str(self) -> &'static str {
        match self {
            Shutdown::Reboot => "reboot",
            Shutdown::PowerOff => "poweroff",
            Shutdown::Unknown => "reboot or poweroff",
        }
    }
}

/// What is known of the host's power.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PowerState {
    /// Whether we hold a delay inhibitor.
    pub held: bool,
    /// How long logind waits for it (`InhibitDelayMaxUSec`), the effective value.
    pub delay: Option<Duration>,
    /// The host has begun to go down, and this is how.
    pub going_down: Option<Shutdown>,
    /// Since when that is known.
    pub since: Option<Moment>,
    /// Why logind cannot be heard.
    pub problem: Option<String>,
}

/// Why the host's power could not be asked or told.
#[derive(Debug, thiserror::Error)]
pub enum PowerError {
    /// D-Bus.
    #[error("{action} of logind: {source}; is systemd-logind running?")]
    Logind {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: Box<zbus::Error>,
    },
    /// No thread.
    #[error("no thread to hear logind: {0}")]
    Thread(std::io::Error),
}

#[cfg(test)]
mod power_test;
