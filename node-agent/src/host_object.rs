//! The node's own `Host`: what it is, what it can do, and whether a reboot that it begins would wait long
//! enough for its guests' sessions.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use understudy_api::conditions::{self, Wanted, types};
use understudy_api::host::{CredentialProvider, HostRebootRequest, Inhibitor, KvmCapabilities};
use understudy_api::node_update::Origin;
use understudy_api::{HostStatus, NodeUpdate, Time};

use crate::agent::{AgentError, UNIT};
use crate::host;
use crate::node::Node;
use crate::power::{PowerState, Systemctl};
use crate::sessions::{Estimate, estimate};
use crate::store::Object;

/// How often it is written.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// How often what costs a process is asked.
const SELDOM: Duration = Duration::from_secs(60);

/// Why sessions are not safe, in one word.
mod safety {
    /// It waits long enough.
    pub const WAITS: &str = "HostWaits";
    /// It waits for a shorter time than a save takes.
    pub const TOO_SHORT: &str = "DelayTooShort";
    /// It does not wait at all.
    pub const NOT_HELD: &str = "NotHeld";
    /// No provider works.
    pub const NO_CREDENTIALS: &str = "NoCredentialProvider";
}

/// Keeps the Host fresh on a thread of its own, until the agent stops.
pub fn keep(node: &Arc<Node>) -> Result<(), AgentError> {
    let node = node.clone();
    std::thread::Builder::new()
        .name("host".into())
        .spawn(move || {
            let mut slow: Option<(Instant, Slow)> = None;
            let mut seen = 0;
            while !node.is_stopping() {
                if slow.as_ref().is_none_or(|(when, _)| when.elapsed() >= SELDOM) {
                    slow = Some((Instant::now(), Slow::look(&node)));
                }
                if let Some((_, slow)) = &slow {
                    let facts = Facts::look(&node, slow);
                    let told = node
                        .objects
                        .report_host(&node.name, &mut |status| facts.write(status, Timestamp::now()));
                    if let Err(error) = told {
                        tracing::error!(%error, "the Host could not be written");
                    }
                }
                // A shutdown is told at once.
                let deadline = Instant::now() + HEARTBEAT;
                let before = node.work.power_state();
                while Instant::now() < deadline && !node.is_stopping() {
                    seen = node.work.wait(seen, Duration::from_secs(1));
                    if node.work.power_state() != before {
                        break;
                    }
                }
            }
        })
        .map(drop)
        .map_err(|source| AgentError::Io {
            action: "starting the thread of the Host".to_owned(),
            source,
        })
}

/// What is asked seldom.
#[derive(Clone, Debug, Default)]
struct Slow {
    vmm_version: Option<String>,
    stop: Option<Duration>,
    providers: Vec<CredentialProvider>,
    kvm: KvmCapabilities,
}

impl Slow {
    fn look(node: &Node) -> Slow {
        if let Some(power) = node.work.power() {
            power.read_delay();
        }
        Slow {
            vmm_version: vmm_version(&node.config.vmm),
            stop: Systemctl::new(Path::new("systemctl")).stop_timeout(UNIT),
            providers: node
                .sessions
                .credentials
                .providers()
                .iter()
                .map(|provider| {
                    let ready = provider.ready();
                    CredentialProvider {
                        name: provider.name().to_owned(),
                        ready: ready.is_ok(),
                        message: ready.err().map(|error| error.to_string()),
                    }
                })
                .collect(),
            kvm: KvmCapabilities {
                available: File::options().read(true).write(true).open("/dev/kvm").is_ok(),
                cpu_model: cpu_model(),
                cpus: i64::try_from(host::cpus()).unwrap_or(0),
            },
        }
    }
}

/// What is known of the host.
struct Facts {
    slow: Slow,
    machine_id: String,
    boot_id: String,
    free_disk: Option<u64>,
    power: PowerState,
    save: Estimate,
    request: Option<NodeUpdate>,
}

impl Facts {
    fn look(node: &Node, slow: &Slow) -> Facts {
        let sessions = &node.sessions;
        let mut of_host: Vec<NodeUpdate> = node
            .objects
            .node_updates()
            .into_iter()
            .filter(|update| update.spec.origin == Origin::Host)
            .collect();
        of_host.sort_by_key(|update| update.metadata.creation_timestamp.as_ref().map(|time| time.0));
        Facts {
            slow: slow.clone(),
            machine_id: sessions.machine_id().to_owned(),
            boot_id: sessions.boot_id().to_owned(),
            free_disk: host::free_bytes(&node.config.state_dir).ok(),
            power: node.work.power_state(),
            save: estimate(node),
            request: of_host.pop(),
        }
    }

    fn write(&self, status: &mut HostStatus, now: Timestamp) {
        let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let bytes = |bytes: u64| i64::try_from(bytes).ok();
        let millis = |time: Duration| i64::try_from(time.as_millis()).ok();
        status.observed_generation = 1;
        status.machine_id = text(&self.machine_id);
        // Reckoned once for each boot: the clock may be stepped.
        if status.boot_id.as_deref() != Some(&self.boot_id) || status.booted_at.is_none() {
            let moment = host::moment();
            let booted = Timestamp::from_microsecond(moment.unix_us - moment.boot_us);
            status.booted_at = booted.ok().map(Time);
        }
        status.boot_id = text(&self.boot_id);
        status.kernel_release = Some(host::kernel_release());
        status.agent_version = Some(env!("CARGO_PKG_VERSION").to_owned());
        status.vmm_version = self.slow.vmm_version.clone();
        status.kvm = Some(self.slow.kvm.clone());
        status.free_memory_bytes = bytes(host::available_memory_mib() << 20);
        status.free_disk_bytes = self.free_disk.and_then(bytes);
        status.credential_providers = self.slow.providers.clone();
        status.inhibitor = Some(Inhibitor {
            held: self.power.held,
            delay_milliseconds: self.power.delay.and_then(millis),
            stop_milliseconds: self.slow.stop.and_then(millis),
            save_milliseconds: millis(self.save.time),
        });
        status.reboot_request = self.request.as_ref().map(|update| HostRebootRequest {
            reason: update.spec.reason.clone().unwrap_or_default(),
            requested_at: update.metadata.creation_timestamp.clone().unwrap_or(Time(now)),
            node_update: Some(update.key().name),
        });
        status.heartbeat = Some(Time(now));
        let ready = self.slow.kvm.available && !self.machine_id.is_empty();
        let (reason, message) = match (self.slow.kvm.available, self.machine_id.is_empty()) {
            (false, _) => ("NoKvm", "/dev/kvm cannot be opened: guests cannot run here"),
            (_, true) => (
                "NoMachineId",
                "/etc/machine-id is missing or empty: sessions cannot be saved",
            ),
            _ => ("Available", ""),
        };
        let (safe, why, detail) = self.safety();
        let wanted = |kind, status, reason, message| Wanted {
            kind,
            status: Some(status),
            reason,
            message,
        };
        conditions::set(
            &mut status.conditions,
            1,
            now,
            &[
                wanted(types::READY, ready, reason, message),
                wanted(types::RECONCILING, false, reason, message),
                wanted(types::STALLED, !ready, reason, message),
                wanted(types::SESSIONS_SAFE, safe, why, &detail),
            ],
        );
    }

    /// Whether a reboot that the host begins would wait until all sessions are saved.
    fn safety(&self) -> (bool, &'static str, String) {
        let needed = self.save.time.as_secs_f64();
        if let Some(provider) = self.slow.providers.first().filter(|provider| !provider.ready) {
            let message = provider.message.clone().unwrap_or_default();
            return (false, safety::NO_CREDENTIALS, message);
        }
        let inhibitor = self.power.delay.filter(|_| self.power.held);
        let nets: Vec<Duration> = inhibitor.into_iter().chain(self.slow.stop).collect();
        let Some(longest) = nets.iter().max() else {
            let why = self.power.problem.clone().unwrap_or_default();
            let message = format!(
                "a reboot that the host begins does not wait for sessions: there is neither an inhibitor nor a stop job ({why}); run `understudy-node install` and start {UNIT}"
            );
            return (false, safety::NOT_HELD, message);
        };
        let waits = longest.as_secs_f64();
        let sessions = self.save.sessions;
        let message = format!(
            "the host waits {waits:.0} s, and saving {sessions} sessions is reckoned to take {needed:.0} s"
        );
        if *longest >= self.save.time {
            return (true, safety::WAITS, message);
        }
        let remedy = "; raise host.saveTimeoutSeconds and run `understudy-node install`; a drop-in in logind.conf.d or of the unit may have lowered it";
        (false, safety::TOO_SHORT, message + remedy)
    }
}

fn vmm_version(vmm: &Path) -> Option<String> {
    let output = Command::new(vmm).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_ascii_whitespace().last()?;
    output
        .status
        .success()
        .then(|| version.chars().take(64).collect())
}

fn cpu_model() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            slow: Slow {
                stop: Some(Duration::from_secs(720)),
                providers: vec![CredentialProvider {
                    name: "systemd-creds".into(),
                    ready: true,
                    message: None,
                }],
                kvm: KvmCapabilities {
                    available: true,
                    ..KvmCapabilities::default()
                },
                ..Slow::default()
            },
            machine_id: "m".into(),
            boot_id: "b".into(),
            free_disk: Some(1 << 30),
            power: PowerState {
                held: true,
                delay: Some(Duration::from_secs(5)),
                ..PowerState::default()
            },
            save: Estimate {
                sessions: 2,
                time: Duration::from_secs(60),
                ..Estimate::default()
            },
            request: None,
        }
    }

    fn condition(facts: &Facts, kind: &str) -> (String, String, String) {
        let mut status = HostStatus::default();
        facts.write(&mut status, Timestamp::UNIX_EPOCH);
        let found = status.conditions.into_iter().find(|there| there.type_ == kind);
        let found = found.unwrap();
        (found.status, found.reason, found.message)
    }

    #[test]
    fn sessions_are_safe_where_the_host_waits_as_long_as_saving_takes() {
        let mut facts = facts();
        let (status, reason, message) = condition(&facts, types::SESSIONS_SAFE);
        assert_eq!((status.as_str(), reason.as_str()), ("True", safety::WAITS));
        assert!(message.contains("720 s") && message.contains("60 s"), "{message}");
        facts.slow.stop = Some(Duration::from_secs(30));
        let (status, reason, message) = condition(&facts, types::SESSIONS_SAFE);
        assert_eq!((status.as_str(), reason.as_str()), ("False", safety::TOO_SHORT));
        assert!(message.contains("saveTimeoutSeconds"), "{message}");
        facts.slow.stop = None;
        facts.power.held = false;
        let (status, reason, message) = condition(&facts, types::SESSIONS_SAFE);
        assert_eq!((status.as_str(), reason.as_str()), ("False", safety::NOT_HELD));
        assert!(message.contains("understudy-node install"), "{message}");
    }

    #[test]
    fn sessions_are_not_safe_without_a_provider_for_their_keys() {
        let mut facts = facts();
        facts.slow.providers[0].ready = false;
        facts.slow.providers[0].message = Some("no host key".into());
        let (status, reason, message) = condition(&facts, types::SESSIONS_SAFE);
        assert_eq!(
            (status.as_str(), reason.as_str(), message.as_str()),
            ("False", safety::NO_CREDENTIALS, "no host key")
        );
        assert_eq!(condition(&facts, types::READY).0, "True");
    }

    #[test]
    fn a_host_without_kvm_or_identity_is_not_ready_and_says_what_is_missing() {
        let mut facts = facts();
        facts.slow.kvm.available = false;
        assert_eq!(condition(&facts, types::READY).1, "NoKvm");
        facts.slow.kvm.available = true;
        facts.machine_id.clear();
        assert_eq!(condition(&facts, types::READY).1, "NoMachineId");
    }
}
