//! Effects up to the clone's boot notice.

use std::time::Duration;

use understudy_api::conditions::reasons;
use understudy_channel::{Description, Interface, PROBE_VERSION, Reply, Request};
use understudy_vmm_control::api::{PrepareSplit, Split, VmState};
use understudy_vmm_control::config::Role;

use super::errors::Side;
use super::{AGENT, AGENT_SLOW, World};
use crate::durable;
use crate::guests::boot::{check_memory, vm_config};
use crate::guests::resolve::Resolved;
use crate::handover::effects::{CloneBoot, Preflight, SplitOutcome};
use crate::handover::{EffectError, Effected, ErrorKind, Operation};
use crate::host;
use crate::isolation::{Facts, Responder, parse_mac};
use crate::store::Object;
use crate::vmm::{Instance, log_end};

/// Room on the disk's file system that a clone must find: what guest and clone write until the layers are
/// merged goes there.
const FREE_BYTES: u64 = 256 << 20;
/// The guest thaws by itself after this long, should we fall silent between freeze and thaw.
const FREEZE_WATCHDOG_MS: u32 = 5_000;
/// How long one look for the clone's boot notice takes at most.
const LOOK: Duration = Duration::from_millis(500);

fn unfit(message: impl Into<String>) -> EffectError {
    EffectError::new(ErrorKind::Refused, message).because(reasons::PREFLIGHT_FAILED)
}

fn not_yet(message: impl Into<String>) -> EffectError {
    EffectError::new(ErrorKind::Retry, message).because(reasons::PREFLIGHT_FAILED)
}

impl World {
    pub(super) fn do_preflight(&mut self, operation: &Operation) -> Effected<Preflight> {
        let (guest, resolved) = self.resolved()?;
        if guest.is_deleting() {
            return Err(unfit(format!("Guest {} is being deleted", self.guest)));
        }
        if let Some(disk) = resolved
            .disks
            .iter()
            .find(|disk| disk.role == understudy_vmm_control::config::DiskRole::Data && !disk.read_only)
        {
            return Err(unfit(format!(
                "data disk {:?} is writable, and cannot be carried over yet; make it readOnly, or move its data to the root disk",
                disk.name
            )));
        }
        let owner = self.owner(&resolved).map_err(|error| not_yet(error.message))?;
        let instance = self
            .node
            .instances
            .get(&resolved.uid, owner.incarnation)
            .filter(Instance::is_alive)
            .ok_or_else(|| not_yet(format!("Guest {} does not run", self.guest)))?;
        let info = instance
            .client()
            .info()
            .map_err(|error| not_yet(format!("its VMM does not answer: {error}")))?;
        if info.state != VmState::Running || !info.owner {
            return Err(not_yet(format!("its VMM is {:?}", info.state)));
        }
        check_memory(&self.node, resolved.memory_mib).map_err(|error| {
            unfit(format!(
                "for the clone, which needs as much as the guest: {error}"
            ))
        })?;
        let directory = resolved.state_dir();
        match host::free_bytes(&directory) {
            Ok(free) if free < FREE_BYTES => {
                return Err(unfit(format!(
                    "{} has {} MiB free, the clone's disk needs at least {} MiB; make room there",
                    directory.display(),
                    free >> 20,
                    FREE_BYTES >> 20
                )));
            }
            Ok(_) => {}
            Err(error) => return Err(not_yet(format!("{}: {error}", directory.display()))),
        }
        let link = self.agent(owner.incarnation, Side::Guest)?;
        let description = link.describe(AGENT).map_err(|error| {
            not_yet(format!(
                "{error}; a guest is rebooted seamlessly with the help of its agent: `understudy-guest install`"
            ))
        })?;
        let version = link.heard().version;
        if version < PROBE_VERSION && !operation.plan.readiness.is_empty() {
            return Err(unfit(format!(
                "the guest's agent (protocol version {version}) is too old for cutover.readiness, which needs version {PROBE_VERSION}; `understudy-guest install` brings a newer one"
            )));
        }
        if !description.boot_complete {
            return Err(not_yet(format!(
                "the guest is still booting ({})",
                description.system_state
            )));
        }
        if let Some(other) = description
            .capturing
            .as_ref()
            .filter(|other| **other != operation.uid)
        {
            tracing::warn!(guest = %self.guest, other, "the guest still captures for another operation");
        }
        Ok(Preflight {
            incarnation: owner.incarnation,
            epoch: owner.epoch,
            booted_at: booted_at(&description),
            boot_id: description.boot_id,
            kernel_release: description.kernel_release,
            failed_units: description.failed_units,
        })
    }

    pub(super) fn do_confirm(&mut self, operation: &Operation) -> Effected<()> {
        let request = Request::Confirm {
            operation: operation.uid.clone(),
            hold: operation.plan.hold.clone(),
        };
        self.guest_agent(operation)?
            .done(&request, AGENT_SLOW)
            .map_err(|error| Side::Guest.agent(&error))
    }

    pub(super) fn do_prepare_split(&mut self, operation: &Operation) -> Effected<()> {
        let (resolved, instance) = self.guest_vmm(operation)?;
        let request = PrepareSplit {
            guest_layer: operation.guest_layer,
            clone_layer: operation.clone_layer,
        };
        World::slow(&instance)
            .prepare_split(&resolved.root().name, &request)
            .map_err(|error| Side::Guest.vmm(&instance, &error))
    }

    pub(super) fn do_prepare_clone(&mut self, operation: &Operation) -> Effected<()> {
        let (_, resolved) = self.resolved()?;
        let incarnation = operation.clone_incarnation();
        let layout = self.layout(&resolved, incarnation);
        let mut instance = match self.node.instances.get(&resolved.uid, incarnation) {
            Some(instance) if instance.operation.as_ref() == Some(&operation.uid) => instance,
            _ => Instance {
                guest_uid: resolved.uid.clone(),
                incarnation,
                role: Role::Clone,
                config: self
                    .node
                    .instances
                    .dir(&resolved.uid)
                    .join(format!("{incarnation}.vmm.json")),
                control: layout.control(),
                log: layout.log(),
                layer: Some(operation.clone_layer),
                operation: Some(operation.uid.clone()),
                unit: self.node.launcher.unit(&self.guest, incarnation),
                process: None,
            },
        };
        self.ensure_isolation(operation, &resolved)?;
        let mut strings = vec![
            "io.systemd.credential:understudy.role=clone".to_owned(),
            format!("io.systemd.credential:understudy.operation={}", operation.uid),
        ];
        if !operation.plan.hold.is_empty() {
            strings.push(format!(
                "io.systemd.credential:understudy.hold={}",
                operation.plan.hold.join(" ")
            ));
        }
        let config = vm_config(
            &resolved,
            &layout,
            incarnation,
            Role::Clone,
            Some(operation.clone_layer),
            strings,
        );
        self.node
            .launcher
            .start(&self.node.instances, &mut instance, &config)
            .map(drop)
            .map_err(|error| {
                EffectError::new(ErrorKind::Refused, error.to_string()).because(reasons::CLONE_DIED)
            })
    }

    /// Makes sure that the clone's isolated interfaces are answered. What the guest said of its network is
    /// kept beside the clone's record, for an agent that is started anew.
    pub(super) fn ensure_isolation(&self, operation: &Operation, resolved: &Resolved) -> Effected<()> {
        let incarnation = operation.clone_incarnation();
        if self.node.has_responders(&resolved.uid, incarnation) {
            return Ok(());
        }
        let retry = |error: &dyn std::fmt::Display| EffectError::new(ErrorKind::Retry, error.to_string());
        let file = self
            .node
            .instances
            .dir(&resolved.uid)
            .join(format!("{incarnation}.network"));
        let interfaces: Vec<Interface> = match durable::read_json(&file).map_err(|error| retry(&error))? {
            Some(interfaces) => interfaces,
            None => {
                let description = self
                    .guest_agent(operation)?
                    .describe(AGENT)
                    .map_err(|error| Side::Guest.agent(&error))?;
                durable::make_dir(&self.node.instances.dir(&resolved.uid)).map_err(|error| retry(&error))?;
                durable::write_json(&file, &description.interfaces).map_err(|error| retry(&error))?;
                description.interfaces
            }
        };
        let layout = self.layout(resolved, incarnation);
        durable::make_dir(&layout.sockets).map_err(|error| retry(&error))?;
        let mut responders = Vec::new();
        for (index, nic) in resolved.networks.iter().enumerate() {
            let Some(mac) = parse_mac(&nic.mac) else { continue };
            let interface = interfaces
                .iter()
                .find(|interface| parse_mac(&interface.mac) == Some(mac));
            let responder = Responder::start(&layout.isolated(index), Facts::of(mac, interface))
                .map_err(|error| retry(&error))?;
            responders.push(responder);
        }
        self.node.set_responders(&resolved.uid, incarnation, responders);
        Ok(())
    }

    pub(super) fn do_split(&mut self, operation: &Operation) -> Effected<SplitOutcome> {
        let (resolved, instance) = self.guest_vmm(operation)?;
        let client = World::slow(&instance);
        let root = &resolved.root().name;
        let info = client
            .info()
            .map_err(|error| Side::Guest.vmm(&instance, &error))?;
        let top = info
            .disks
            .iter()
            .find(|disk| disk.name == *root)
            .and_then(|disk| disk.layers.first());
        if top == Some(&operation.guest_layer) {
            return Ok(SplitOutcome::Unsure {
                message: "the disk was found split: an agent before this one had begun it".to_owned(),
            });
        }
        let agent = self.guest_agent(operation)?;
        let failed = |error: &_| Side::Guest.agent(error);
        agent
            .done(&Request::Sync, AGENT_SLOW)
            .map_err(|error| failed(&error))?;
        let freeze = Request::FreezeFilesystems {
            watchdog_ms: FREEZE_WATCHDOG_MS,
        };
        match agent.ask(&freeze, AGENT) {
            Ok(Reply::Frozen { .. }) => {}
            Ok(_) => {
                return Err(EffectError::new(
                    ErrorKind::Refused,
                    "the guest did not say that it froze",
                ));
            }
            Err(error) => {
                let _ = self.do_thaw_filesystems(operation);
                return Err(failed(&error));
            }
        }
        let request = Split {
            guest_layer: operation.guest_layer,
        };
        let split = client.split(root, &request);
        let thawed = self.do_thaw_filesystems(operation);
        let report = split.map_err(|error| Side::Guest.vmm(&instance, &error))?;
        tracing::info!(guest = %self.guest, held_us = report.held_us, "the disk is split");
        match thawed {
            Ok((false, frozen_us)) => Ok(SplitOutcome::Done { frozen_us }),
            Ok((true, _)) => Ok(SplitOutcome::Unsure {
                message: "the guest's watchdog had thawed its file systems before the split was over"
                    .to_owned(),
            }),
            Err(error) => Ok(SplitOutcome::Unsure {
                message: format!("the guest did not say whether it stayed frozen: {error}"),
            }),
        }
    }

    /// Thaws; whether the watchdog was faster, and how long it was frozen.
    pub(super) fn do_thaw_filesystems(&mut self, operation: &Operation) -> Effected<(bool, u64)> {
        let reply = self
            .guest_agent(operation)?
            .ask(&Request::ThawFilesystems, AGENT)
            .map_err(|error| Side::Guest.agent(&error))?;
        match reply {
            Reply::Thawed {
                by_watchdog,
                frozen_us,
            } => Ok((by_watchdog, frozen_us)),
            _ => Err(EffectError::new(
                ErrorKind::Refused,
                "the guest did not say that it thawed",
            )),
        }
    }

    pub(super) fn do_boot_clone(&mut self, operation: &Operation) -> Effected<()> {
        let (resolved, instance) = self.clone_vmm(operation)?;
        self.ensure_isolation(operation, &resolved)?;
        World::slow(&instance)
            .vm("boot")
            .map_err(|error| Side::Clone.vmm(&instance, &error))
    }

    pub(super) fn do_await_clone_boot(&mut self, operation: &Operation) -> Effected<Option<CloneBoot>> {
        let incarnation = operation.clone_incarnation();
        let (_, resolved) = self.resolved()?;
        let layout = self.layout(&resolved, incarnation);
        let console = || log_end(&layout.console());
        let (_, instance) = self.clone_vmm(operation).map_err(|error| {
            let log = log_end(&layout.log());
            EffectError {
                message: format!(
                    "{}; its log ends: {log}; its console ends: {}",
                    error.message,
                    console()
                ),
                ..error
            }
        })?;
        self.ensure_isolation(operation, &resolved)?;
        let info = instance
            .client()
            .info()
            .map_err(|error| Side::Clone.vmm(&instance, &error))?;
        if info.state == VmState::Exited {
            let why = info.exit_reason.unwrap_or_default();
            return Err(Side::Clone.gone(format!(
                "the clone stopped: {why}; its console ends: {}",
                console()
            )));
        }
        // Of this process only: the log may hold the end of an earlier clone with the same number.
        let console_text = instance
            .client()
            .console()
            .map(|tail| tail.text)
            .unwrap_or_default();
        if let Some(panic) = panic_in(&console_text) {
            return Err(Side::Clone.gone(format!("the clone's kernel panicked: {panic}")));
        }
        let link = self
            .node
            .link(&layout.vsock())
            .map_err(|error| EffectError::new(ErrorKind::Retry, error.to_string()))?;
        let heard = link.wait(LOOK, |heard| heard.connected && heard.boot_complete);
        let Some(description) = heard
            .description
            .filter(|description| heard.connected && heard.boot_complete && description.boot_complete)
        else {
            return Ok(None);
        };
        if !description.clone {
            return Err(EffectError::new(
                ErrorKind::Refused,
                "the clone booted without knowing that it is one (its systemd is older than 250, or reads no SMBIOS); it is discarded",
            )
            .because(reasons::CLONE_SILENT));
        }
        Ok(Some(CloneBoot {
            booted_at: booted_at(&description),
            boot_id: description.boot_id,
            kernel_release: description.kernel_release,
            system_state: description.system_state,
            failed_units: description.failed_units,
        }))
    }
}

/// When the guest was booted, by the host's clock.
fn booted_at(description: &Description) -> i64 {
    let uptime = i64::try_from(description.uptime_us).unwrap_or(i64::MAX);
    host::moment().unix_us.saturating_sub(uptime)
}

/// What a console tells of a kernel panic.
fn panic_in(console: &str) -> Option<String> {
    let at = console.find("Kernel panic - not syncing")?;
    let readable = |c: char| if c.is_control() { ' ' } else { c };
    Some(console[at..].chars().take(300).map(readable).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_panic_is_quoted_and_an_ordinary_boot_is_none() {
        let console =
            "[    1.2] Run /init\r\n[    1.3] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n";
        let panic = panic_in(console).unwrap();
        assert!(panic.contains("Unable to mount root fs"), "{panic}");
        assert!(!panic.contains('\r'));
        assert_eq!(panic_in("Debian GNU/Linux 12 web ttyS0"), None);
    }
}
