//! The status of a Guest, from what was seen.

use std::borrow::Cow;

use jiff::Timestamp;
use understudy_api::conditions::{self, Wanted, reasons as api_reasons, types};
use understudy_api::guest::{Dormant as DormantStatus, GuestAgent, GuestPhase, SavedSession};
use understudy_api::{GuestStatus, Time};
use understudy_channel::Description;

use super::record::Dormant;
use crate::guest_agent::Heard;

/// Most failed units that a status names.
const MAX_UNITS: usize = 100;
/// Most addresses that a status names.
const MAX_ADDRESSES: usize = 64;

/// Reasons of a Guest's conditions.
pub mod reasons {
    /// It runs.
    pub const RUNNING: &str = "Running";
    /// Its VMM runs, the guest boots.
    pub const BOOTING: &str = "Booting";
    /// It runs, and nothing in it answers as guest agent.
    pub const AGENT_MISSING: &str = "AgentMissing";
    /// It is powered off as asked.
    pub const HALTED: &str = "Halted";
    /// It is being powered off.
    pub const STOPPING: &str = "Stopping";
    /// It cannot be run here as it is declared.
    pub const INVALID_SPEC: &str = "InvalidSpec";
    /// Another guest uses its disk.
    pub const DISK_IN_USE: &str = "DiskInUse";
    /// Not enough memory now.
    pub const INSUFFICIENT_MEMORY: &str = "InsufficientMemory";
    /// Its VMM did not start.
    pub const START_FAILED: &str = "StartFailed";
    /// It stopped by itself and is started again after a pause.
    pub const BACK_OFF: &str = "BackOff";
    /// It is not assigned to this node, and is not started.
    pub const NOT_ASSIGNED: &str = "NotAssigned";
    /// Its VMM runs and does not answer.
    pub const VMM_SILENT: &str = "VmmSilent";
    /// The guest agent answers.
    pub const CONNECTED: &str = "Connected";
    /// It does not.
    pub const NOT_CONNECTED: &str = "NotConnected";
    /// The guest says so.
    pub const GUEST_SAYS_SO: &str = "GuestSaysSo";
    /// The guest asks for nothing.
    pub const NOT_REQUIRED: &str = "NotRequired";
    /// The guest has not said.
    pub const UNKNOWN: &str = "Unknown";
}

/// What was seen of a guest in one pass.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Phase.
    pub phase: GuestPhase,
    /// Reason of Ready.
    pub reason: Cow<'static, str>,
    /// Message of Ready.
    pub message: String,
    /// Incarnation that owns the guest.
    pub incarnation: Option<u64>,
    /// What its agent said.
    pub heard: Heard,
    /// The incarnation before.
    pub dormant: Option<Dormant>,
    /// Its saved session.
    pub session: Option<SavedSession>,
}

impl Seen {
    /// A guest of which nothing runs.
    pub fn down(phase: GuestPhase, reason: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Seen {
        Seen {
            phase,
            reason: reason.into(),
            message: message.into(),
            incarnation: None,
            heard: Heard::default(),
            dormant: None,
            session: None,
        }
    }
}

/// Writes what was seen into a status. What the guest said last stays, for a guest that does not run, as
/// what was known of it; `guestAgent` and addresses do not.
pub fn update(status: &mut GuestStatus, seen: &Seen, node: &str, generation: i64, now: Timestamp) {
    status.observed_generation = generation;
    status.phase = Some(seen.phase);
    status.node_name = Some(node.to_owned());
    if let Some(incarnation) = seen.incarnation {
        status.incarnation = i64::try_from(incarnation).ok();
    }
    status.dormant = seen.dormant.as_ref().map(|dormant| DormantStatus {
        incarnation: i64::try_from(dormant.incarnation).unwrap_or(i64::MAX),
        deadline: Time(dormant.deadline),
    });
    status.session = seen.session.clone();
    let description = seen.heard.description.as_ref();
    match description {
        Some(description) => describe(status, description),
        None => {
            status.guest_agent = None;
            status.addresses.clear();
        }
    }
    let running = [GuestPhase::Running, GuestPhase::Saving].contains(&seen.phase);
    let ready = running && seen.reason != reasons::VMM_SILENT;
    // A session that was refused waits for the user.
    let refused = seen.phase == GuestPhase::Saved
        && ![api_reasons::SESSION_SAVED, api_reasons::HOST_UPDATING].contains(&&*seen.reason);
    let stalled = seen.phase == GuestPhase::Failed || refused;
    let halted = seen.phase == GuestPhase::Halted;
    let agent = match (seen.heard.connected, description) {
        (true, Some(description)) => (true, reasons::CONNECTED, format!("version {}", description.agent)),
        _ => (false, reasons::NOT_CONNECTED, seen.heard.problem.clone()),
    };
    let reboot = match description.map(|description| &description.reboot_required) {
        Some(Some(why)) => (Some(true), reasons::GUEST_SAYS_SO, shorten(why)),
        Some(None) => (Some(false), reasons::NOT_REQUIRED, String::new()),
        None => (None, reasons::UNKNOWN, String::new()),
    };
    let wanted = |kind, status, reason, message| Wanted {
        kind,
        status,
        reason,
        message,
    };
    let message = seen.message.as_str();
    conditions::set(
        &mut status.conditions,
        generation,
        now,
        &[
            wanted(types::READY, Some(ready || halted), &seen.reason, message),
            wanted(
                types::RECONCILING,
                Some(!ready && !halted && !stalled),
                &seen.reason,
                message,
            ),
            wanted(types::STALLED, Some(stalled), &seen.reason, message),
            wanted(types::AGENT_CONNECTED, Some(agent.0), agent.1, &agent.2),
            wanted(types::REBOOT_REQUIRED, reboot.0, reboot.1, &reboot.2),
        ],
    );
}

fn describe(status: &mut GuestStatus, description: &Description) {
    status.boot_id = Some(shorten(&description.boot_id));
    status.kernel_release = Some(shorten(&description.kernel_release));
    status.guest_agent = Some(GuestAgent {
        version: shorten(&description.agent),
        system_state: Some(shorten(&description.system_state)),
        failed_units: description
            .failed_units
            .iter()
            .take(MAX_UNITS)
            .map(|unit| shorten(unit))
            .collect(),
    });
    status.addresses = description
        .interfaces
        .iter()
        .flat_map(|interface| &interface.addresses)
        .filter_map(|text| text.split('/').next()?.parse::<std::net::IpAddr>().ok())
        // Link-local addresses lead nobody to the guest.
        .filter(|address| match address {
            std::net::IpAddr::V4(address) => !address.is_link_local(),
            std::net::IpAddr::V6(address) => address.segments()[0] & 0xffc0 != 0xfe80,
        })
        .take(MAX_ADDRESSES)
        .map(|address| address.to_string())
        .collect();
}

/// The guest chooses these strings; the status stays readable whatever it chooses.
fn shorten(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(256).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_channel::Interface;

    fn condition<'a>(status: &'a GuestStatus, kind: &str) -> &'a understudy_api::Condition {
        status.conditions.iter().find(|c| c.type_ == kind).unwrap()
    }

    fn description() -> Description {
        Description {
            agent: "0.1.0".into(),
            boot_id: "b\u{1b}[31m".into(),
            kernel_release: "6.1.0-50".into(),
            clone: false,
            boot_complete: true,
            system_state: "running".into(),
            failed_units: vec!["x.service".into(); 500],
            uptime_us: 1,
            reboot_required: Some("6.1.0-56 is installed".into()),
            interfaces: vec![Interface {
                name: "e".into(),
                mac: String::new(),
                addresses: vec!["10.0.0.5/24".into(), "fe80::1/64".into(), "junk".into()],
                gateways: Vec::new(),
                lease: None,
                dns: Vec::new(),
            }],
            filesystems: Vec::new(),
            capturing: None,
        }
    }

    #[test]
    fn a_running_guest_is_ready_and_what_it_says_is_bounded() {
        let mut seen = Seen::down(GuestPhase::Running, reasons::RUNNING, "");
        seen.incarnation = Some(3);
        seen.heard.connected = true;
        seen.heard.description = Some(description());
        let mut status = GuestStatus::default();
        update(&mut status, &seen, "node", 2, Timestamp::UNIX_EPOCH);
        assert_eq!(status.addresses, ["10.0.0.5"]);
        assert_eq!(status.boot_id.as_deref(), Some("b[31m"));
        assert_eq!(status.guest_agent.as_ref().unwrap().failed_units.len(), 100);
        assert_eq!(condition(&status, "Ready").status, "True");
        assert_eq!(condition(&status, "AgentConnected").status, "True");
        assert_eq!(condition(&status, "RebootRequired").status, "True");
        assert_eq!(status.incarnation, Some(3));
        assert_eq!(status.observed_generation, 2);
    }

    #[test]
    fn a_saved_session_is_waited_for_and_a_refused_one_is_the_users_business() {
        for (reason, stalled) in [("SessionSaved", "False"), ("CheckpointDamaged", "True")] {
            let seen = Seen::down(GuestPhase::Saved, reason, "…");
            let mut status = GuestStatus::default();
            update(&mut status, &seen, "node", 1, Timestamp::UNIX_EPOCH);
            assert_eq!(condition(&status, "Ready").status, "False");
            assert_eq!(condition(&status, "Ready").reason, reason);
            assert_eq!(condition(&status, "Stalled").status, stalled, "{reason}");
        }
    }

    #[test]
    fn a_guest_that_cannot_run_says_why_in_every_condition() {
        let seen = Seen::down(
            GuestPhase::Failed,
            reasons::INVALID_SPEC,
            "spec.disks[0].source: …",
        );
        let mut status = GuestStatus::default();
        update(&mut status, &seen, "node", 1, Timestamp::UNIX_EPOCH);
        assert_eq!(condition(&status, "Ready").status, "False");
        assert_eq!(condition(&status, "Stalled").status, "True");
        assert!(
            condition(&status, "Ready")
                .message
                .contains("spec.disks[0].source")
        );
        assert_eq!(condition(&status, "RebootRequired").status, "Unknown");
        assert_eq!(status.conditions.len(), 5);
    }
}
