//! One guest's thread: looks at what is asked for and at what runs, makes up one difference, reports.

use std::borrow::Cow;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use understudy_api::conditions::reasons as api_reasons;
use understudy_api::guest::{DeletionPolicy, GuestPhase, RunStrategy};
use understudy_api::{Guest, Phase};
use understudy_vmm_control::api::{VmInfo, VmState};
use understudy_vmm_control::owner::{Owner, state_dir};
use uuid::Uuid;

use super::boot::{BootError, cold_boot};
use super::maintenance::{Maintenance, end_process};
use super::resolve::{Resolved, resolve};
use super::status::{self, Seen, reasons};
use super::{requests, resolve::SpecError};
use crate::guest_agent::{Heard, Link, LinkError};
use crate::host;
use crate::network::remove_tap;
use crate::node::Node;
use crate::sessions;
use crate::store::{Key, Object};
use crate::vmm::{Instance, Layout};

/// The longest pause between two passes; changes wake earlier.
const TICK: Duration = Duration::from_secs(1);
/// The shortest, so that a storm of changes does not make a storm of passes.
const REST: Duration = Duration::from_millis(50);
/// How often a guest is asked to describe itself.
const DESCRIBE: Duration = Duration::from_secs(5);
/// How long it may take for that.
const DESCRIBE_LIMIT: Duration = Duration::from_secs(30);
/// How long a guest may take from its power button to its end, and its VMM from `stop` to its own.
const POWER_OFF: Duration = Duration::from_secs(90);
const STOP: Duration = Duration::from_secs(20);
/// Pauses before a guest that stopped by itself is started again.
const FIRST_BACK_OFF: Duration = Duration::from_secs(1);
const LAST_BACK_OFF: Duration = Duration::from_secs(60);
/// A guest that ran this long has not failed at its start.
const STEADY: Duration = Duration::from_secs(60);
/// How long a guest agent may take to set the clock and announce the network.
const RESUMED_LIMIT: Duration = Duration::from_secs(30);
/// Memory of a resumed session proved bad: the guest is paused.
const SESSION_DAMAGED: &str = "CheckpointDamaged";
/// The records of sessions cannot be read.
const SESSION_UNREADABLE: &str = "SessionUnreadable";
/// A boot that takes this long without a word from the guest agent is told as one without it.
const AGENT_PATIENCE: Duration = Duration::from_secs(120);

/// Starts the thread of a guest; it ends when the guest's object is gone or the agent stops.
pub fn spawn(node: Arc<Node>, key: Key) -> std::io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new()
        .name(format!("guest {key}"))
        .spawn(move || Worker::new(node, key).run())
}

struct Worker {
    node: Arc<Node>,
    key: Key,
    maintenance: Maintenance,
    failures: u32,
    not_before: Option<Instant>,
    running_since: Option<Instant>,
    stopping_since: Option<Instant>,
    described: Option<Instant>,
    told: Option<(GuestPhase, String)>,
    told_resumed: Option<Uuid>,
    to_describe: Option<Arc<Link>>,
}

impl Worker {
    fn new(node: Arc<Node>, key: Key) -> Worker {
        Worker {
            node,
            key,
            maintenance: Maintenance::default(),
            failures: 0,
            not_before: None,
            running_since: None,
            stopping_since: None,
            described: None,
            told: None,
            told_resumed: None,
            to_describe: None,
        }
    }

    fn run(mut self) {
        let mut seen = 0;
        while !self.node.is_stopping() {
            match self.node.objects.guest(&self.key) {
                Ok(Some(guest)) => {
                    let turn = self.node.turn(&self.key);
                    let held = turn.lock().unwrap_or_else(PoisonError::into_inner);
                    if self.pass(&guest) {
                        return;
                    }
                    drop(held);
                    self.describe();
                }
                Ok(None) => return,
                Err(error) => tracing::error!(guest = %self.key, %error, "the guest is left alone"),
            }
            std::thread::sleep(REST);
            seen = self.node.objects.wait(seen, TICK);
        }
    }

    /// Has the guest describe itself, where that is due: outside of its turn, so that an agent that hangs
    /// holds up no operation and no reboot of the host.
    fn describe(&mut self) {
        let Some(link) = self.to_describe.take() else {
            return;
        };
        if let Err(error) = link.describe(DESCRIBE_LIMIT) {
            tracing::debug!(guest = %self.key, %error, "the guest did not describe itself");
        }
    }

    /// One pass; `true` when the guest is gone for good.
    fn pass(&mut self, guest: &Guest) -> bool {
        let resolved = resolve(&self.node.config, guest, host::cpus(), host::total_memory_mib());
        let resolved = match resolved {
            Ok(resolved) => resolved,
            Err(error) => return self.unresolved(guest, &error),
        };
        let owner = match Owner::read(&resolved.state_dir()) {
            Ok(owner) => owner,
            Err(error) => {
                let seen = Seen::down(GuestPhase::Failed, reasons::INVALID_SPEC, error.to_string());
                self.report(guest, &seen);
                return false;
            }
        };
        let current = owner
            .as_ref()
            .and_then(|owner| self.node.instances.get(&resolved.uid, owner.incarnation));
        // While an operation is in flight, or the host is about to reboot, an engine alone starts and ends
        // VMMs of this guest.
        let in_flight = self.node.in_flight(&self.key);
        let hold = self.node.work.hold(&resolved.uid);
        let held = hold.is_some() || self.node.work.holds_all_guests();
        let busy = in_flight.is_some() || held;
        let running = current
            .filter(Instance::is_alive)
            .filter(|instance| busy || !self.reap(&resolved, instance));
        if !busy
            && let Err(error) = self
                .maintenance
                .pass(&self.node, &resolved, owner.as_ref(), running.as_ref())
        {
            tracing::error!(guest = %self.key, %error, "maintenance");
        }
        let wanted = guest.spec.run_strategy == RunStrategy::Always && !guest.is_deleting();
        let mut seen = match (&running, wanted) {
            (Some(instance), true) => {
                self.stopping_since = None;
                // One in flight that has succeeded is being rolled back.
                let quiet = in_flight.is_some_and(|operation| {
                    matches!(operation.phase, Phase::CuttingOver | Phase::Succeeded)
                });
                self.observe(guest, &resolved, instance, quiet)
            }
            (Some(instance), false) if !busy => self.stop(guest, &resolved, instance),
            (Some(instance), false) => self.observe(guest, &resolved, instance, true),
            (None, _) if held => {
                self.running_since = None;
                let hold = hold.clone().unwrap_or_else(|| self.node.work.held_down());
                Seen::down(hold.phase, hold.reason, hold.message)
            }
            (None, _) if busy => Seen::down(
                GuestPhase::Failed,
                reasons::START_FAILED,
                "its VMM has ended within an operation, which is being undone or finished",
            ),
            (None, true) if !self.node.objects.is_assigned(&self.key) => self.parked(),
            (None, true) => self.start(guest, &resolved),
            (None, false) => {
                self.stopping_since = None;
                if guest.is_deleting() {
                    return self.remove(guest, &resolved, owner.as_ref());
                }
                Seen::down(
                    GuestPhase::Halted,
                    reasons::HALTED,
                    "powered off, as runStrategy asks",
                )
            }
        };
        if let Some(hold) = hold.filter(|_| running.is_some()) {
            seen.phase = hold.phase;
            seen.reason = hold.reason.into();
            seen.message = hold.message;
        }
        seen.incarnation = owner.as_ref().map(|owner| owner.incarnation).or(seen.incarnation);
        seen.session = self.node.work.session(&resolved.uid);
        seen.dormant = self.node.records.dormant(&resolved.uid).ok().flatten();
        self.report(guest, &seen);
        false
    }

    /// A guest that cannot be run here as declared. What runs of it runs on.
    fn unresolved(&mut self, guest: &Guest, error: &SpecError) -> bool {
        let uid = guest.uid();
        let alive = self
            .node
            .instances
            .of(&uid)
            .into_iter()
            .any(|instance| instance.is_alive());
        if guest.is_deleting() && !alive && self.node.in_flight(&self.key).is_none() {
            // Nothing was ever started, or its disk is gone: there is nothing to take care of.
            return self.forget(guest);
        }
        let mut message = error.to_string();
        if alive {
            message.push_str(" (the guest runs on as it was started)");
        }
        self.report(
            guest,
            &Seen::down(GuestPhase::Failed, reasons::INVALID_SPEC, message),
        );
        false
    }

    /// Ends the VMM of a guest that has stopped by itself (a crash leaves the process, to tell why); `true`
    /// when it did.
    fn reap(&self, resolved: &Resolved, instance: &Instance) -> bool {
        let Ok(info) = instance.client().info() else {
            return false;
        };
        if info.state != VmState::Exited {
            return false;
        }
        let why = info.exit_reason.unwrap_or_default();
        tracing::warn!(guest = %self.key, incarnation = instance.incarnation, why, "the guest has stopped by itself");
        match end_process(&self.node, resolved, instance) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(guest = %self.key, %error, "ending its VMM");
                false
            }
        }
    }

    fn observe(&mut self, guest: &Guest, resolved: &Resolved, instance: &Instance, quiet: bool) -> Seen {
        let since = *self.running_since.get_or_insert_with(Instant::now);
        if since.elapsed() > STEADY {
            self.failures = 0;
            self.not_before = None;
        }
        let info = match instance.client().info() {
            Ok(info) => info,
            Err(error) => {
                return Seen::down(
                    GuestPhase::Running,
                    reasons::VMM_SILENT,
                    format!("its VMM runs and does not answer: {error}"),
                );
            }
        };
        let heard = self.hear(guest, resolved, instance, quiet);
        let seen = |phase, reason, message: String| Seen {
            phase,
            reason: Cow::Borrowed(reason),
            message,
            incarnation: Some(instance.incarnation),
            heard: heard.clone(),
            dormant: None,
            session: None,
        };
        if info.state == VmState::Exited {
            let why = info.exit_reason.unwrap_or_default();
            return seen(
                GuestPhase::Booting,
                reasons::BACK_OFF,
                format!("the guest has stopped: {why}"),
            );
        }
        if let Some(resume) = &info.resume {
            if let Some(error) = &resume.error {
                return seen(GuestPhase::Failed, SESSION_DAMAGED, error.clone());
            }
            self.tell_resumed(resolved, instance, resume.checkpoint);
        }
        // One that was resumed has booted before.
        if heard.boot_complete || info.resume.is_some() {
            let message = match heard.connected {
                true => String::new(),
                false => format!("the guest agent does not answer: {}", heard.problem),
            };
            return seen(GuestPhase::Running, reasons::RUNNING, message);
        }
        if since.elapsed() > AGENT_PATIENCE && heard.description.is_none() {
            return seen(
                GuestPhase::Booting,
                reasons::AGENT_MISSING,
                agent_missing(&info, &heard),
            );
        }
        seen(
            GuestPhase::Booting,
            reasons::BOOTING,
            "waiting for the guest agent's boot notice".to_owned(),
        )
    }

    /// What the guest agent says; `quiet`: nothing is asked of it now.
    fn hear(&mut self, guest: &Guest, resolved: &Resolved, instance: &Instance, quiet: bool) -> Heard {
        let layout = Layout::new(&self.node.config, &self.key, &resolved.uid, instance.incarnation);
        let link = match self.node.link(&layout.vsock()) {
            Ok(link) => link,
            Err(error) => {
                return Heard {
                    problem: format!("no thread for the guest agent: {error}"),
                    ..Heard::default()
                };
            }
        };
        if !quiet && link.heard().connected {
            // While an operation is in flight its engine asks; a slow answer to us would hold it up.
            let busy = self.node.in_flight(&self.key).is_some();
            let due = self.described.is_none_or(|then| then.elapsed() >= DESCRIBE);
            if due && !busy {
                self.described = Some(Instant::now());
                self.to_describe = Some(link.clone());
            }
            requests::pass(&self.node, guest, &link);
        }
        link.heard()
    }

    /// Tells the guest agent that its session was resumed, once it is connected: the time has stepped.
    fn tell_resumed(&mut self, resolved: &Resolved, instance: &Instance, checkpoint: Uuid) {
        if self.told_resumed == Some(checkpoint) {
            return;
        }
        let layout = Layout::new(&self.node.config, &self.key, &resolved.uid, instance.incarnation);
        let Ok(link) = self.node.link(&layout.vsock()) else {
            return;
        };
        if !link.heard().connected {
            return;
        }
        match link.resumed(RESUMED_LIMIT) {
            Ok(told) => {
                tracing::info!(
                    guest = %self.key,
                    stepped_us = told.stepped_us,
                    announced = told.announced,
                    "the guest agent knows that the session was resumed"
                );
                self.told_resumed = Some(checkpoint);
            }
            Err(LinkError::TooOld(version)) => {
                tracing::warn!(guest = %self.key, version, "the guest agent is too old to set the guest's clock after a resume; install a newer one");
                self.told_resumed = Some(checkpoint);
            }
            // It is told again in the next pass.
            Err(error) => tracing::warn!(guest = %self.key, %error, "telling the guest agent of the resume"),
        }
    }

    /// Why the guest is not booted: it has a session that nobody has used. Whoever made it, and whatever
    /// became of the update that did.
    fn session_waits(&self, resolved: &Resolved) -> Option<Seen> {
        let unused = sessions::unused(&self.node, &resolved.uid, |checkpoint| {
            self.node.work.knows(checkpoint)
        });
        match unused {
            Ok(None) => None,
            Ok(Some(record)) => Some(Seen::down(
                GuestPhase::Saved,
                api_reasons::SESSION_SAVED,
                format!(
                    "its session is saved (checkpoint {}, NodeUpdate {}), and no update that would resume it is under way; restart the agent to try again, or give the session up by `understudy-node discard-session {} --yes`",
                    record.identity.checkpoint, record.node_update, self.key
                ),
            )),
            Err(error) => Some(Seen::down(
                GuestPhase::Saved,
                SESSION_UNREADABLE,
                format!("whether it has a saved session cannot be told, so it is not booted: {error}"),
            )),
        }
    }

    /// Another node may have been given the guest, or nobody: its disks stay as they are.
    fn parked(&mut self) -> Seen {
        self.running_since = None;
        Seen::down(
            GuestPhase::Pending,
            reasons::NOT_ASSIGNED,
            format!(
                "it is not in the API server, or not assigned to this node, and is not started by guess; its disks are kept. Apply it again with this node's name, or end it by `understudy-node delete guest {} -n {}`",
                self.key.name, self.key.namespace
            ),
        )
    }

    fn start(&mut self, guest: &Guest, resolved: &Resolved) -> Seen {
        self.described = None;
        if let Some(seen) = self.session_waits(resolved) {
            self.running_since = None;
            return seen;
        }
        if self.running_since.take().is_some() {
            // It ran, and does not any more.
            self.failed();
        }
        if let Some(user) = self.disk_user(guest, resolved) {
            return Seen::down(GuestPhase::Failed, reasons::DISK_IN_USE, user);
        }
        if let Some(not_before) = self.not_before.filter(|then| Instant::now() < *then) {
            let left = not_before.saturating_duration_since(Instant::now()).as_secs() + 1;
            let last = self.last_words(resolved);
            let (phase, reason, message) = match self.told.take() {
                Some((phase @ (GuestPhase::Failed | GuestPhase::Pending), message)) => {
                    // Keep telling why the start failed.
                    self.told = Some((phase, message.clone()));
                    let reason = match phase {
                        GuestPhase::Pending => reasons::INSUFFICIENT_MEMORY,
                        _ => reasons::START_FAILED,
                    };
                    (phase, reason, message)
                }
                _ => (
                    GuestPhase::Pending,
                    reasons::BACK_OFF,
                    format!("the guest stopped by itself ({last}); started again in {left} s"),
                ),
            };
            return Seen::down(phase, reason, message);
        }
        if let Err(error) = self.release_from_dormant(resolved) {
            return Seen::down(GuestPhase::Failed, reasons::START_FAILED, error.to_string());
        }
        match cold_boot(&self.node, resolved) {
            Ok(instance) => {
                self.told = None;
                self.running_since = Some(Instant::now());
                let mut seen = Seen::down(GuestPhase::Booting, reasons::BOOTING, "its VMM was started");
                seen.incarnation = Some(instance.incarnation);
                seen
            }
            Err(error) => {
                self.failed();
                let (phase, reason) = match &error {
                    BootError::Memory { .. } => (GuestPhase::Pending, reasons::INSUFFICIENT_MEMORY),
                    BootError::InUse { .. } => (GuestPhase::Failed, reasons::DISK_IN_USE),
                    _ => (GuestPhase::Failed, reasons::START_FAILED),
                };
                let message = error.to_string();
                if self.told.as_ref().is_none_or(|(_, told)| *told != message) {
                    tracing::error!(guest = %self.key, "{message}");
                }
                self.told = Some((phase, message.clone()));
                Seen::down(phase, reason, message)
            }
        }
    }

    /// A dormant incarnation keeps the guest's tap, to give it back: a guest that is started anew needs it.
    fn release_from_dormant(&self, resolved: &Resolved) -> Result<(), Box<dyn std::error::Error>> {
        let Some(dormant) = self.node.records.dormant(&resolved.uid)? else {
            return Ok(());
        };
        let owner = Owner::read(&resolved.state_dir())?;
        super::maintenance::remove_dormant(&self.node, resolved, owner.as_ref(), &dormant)?;
        Ok(())
    }

    fn failed(&mut self) {
        let pause = FIRST_BACK_OFF
            .saturating_mul(1 << self.failures.min(6))
            .min(LAST_BACK_OFF);
        self.failures = self.failures.saturating_add(1);
        self.not_before = Some(Instant::now() + pause);
    }

    fn last_words(&self, resolved: &Resolved) -> String {
        match self.node.instances.of(&resolved.uid).last() {
            Some(instance) => crate::vmm::log_end(&instance.log),
            None => "no log".to_owned(),
        }
    }

    /// Another guest that uses a disk of this one. The older of two has it.
    fn disk_user(&self, guest: &Guest, resolved: &Resolved) -> Option<String> {
        let created = |guest: &Guest| guest.metadata.creation_timestamp.as_ref().map(|time| time.0);
        for other in self.node.objects.guests() {
            if other.uid() == guest.uid() {
                continue;
            }
            let Ok(theirs) = resolve(&self.node.config, &other, host::cpus(), host::total_memory_mib())
            else {
                continue;
            };
            let other_runs = self
                .node
                .instances
                .of(&other.uid())
                .iter()
                .any(Instance::is_alive);
            // Times are in whole seconds; names decide between guests of one manifest.
            let older = (created(&other), other.key()) < (created(guest), guest.key());
            if !other_runs && !older {
                continue;
            }
            for disk in &resolved.disks {
                let shared = theirs
                    .disks
                    .iter()
                    .any(|their| their.source == disk.source && !(their.read_only && disk.read_only));
                if shared {
                    return Some(format!(
                        "disk {} ({}) is in use by guest {}; name another disk, or delete that guest",
                        disk.name,
                        disk.source.display(),
                        other.key()
                    ));
                }
            }
        }
        None
    }

    /// Power button, then the VMM's own end, then the process's.
    fn stop(&mut self, guest: &Guest, resolved: &Resolved, instance: &Instance) -> Seen {
        let client = instance.client();
        let began = self.stopping_since.is_some();
        let since = *self.stopping_since.get_or_insert_with(Instant::now);
        let waited = since.elapsed();
        if !began {
            tracing::info!(guest = %self.key, incarnation = instance.incarnation, "pressing the power button");
            if let Err(error) = client.vm("power-button") {
                tracing::warn!(guest = %self.key, %error, "pressing the power button");
            }
        } else if waited > POWER_OFF + STOP {
            tracing::warn!(guest = %self.key, "the VMM does not stop; it is killed");
            if let Err(error) = end_process(&self.node, resolved, instance) {
                tracing::error!(guest = %self.key, %error, "killing the VMM");
            }
        } else if waited > POWER_OFF {
            tracing::warn!(guest = %self.key, "the guest does not power off; its VMM is stopped");
            if let Err(error) = client.vm("stop") {
                tracing::warn!(guest = %self.key, %error, "stopping the VMM");
            }
        }
        self.running_since = None;
        let mut seen = Seen::down(
            GuestPhase::Stopping,
            reasons::STOPPING,
            format!("powering off ({} s)", waited.as_secs()),
        );
        seen.heard = self.hear(guest, resolved, instance, true);
        seen
    }

    /// What a deleted guest leaves: its disks, unless they are to go as well.
    fn remove(&mut self, guest: &Guest, resolved: &Resolved, owner: Option<&Owner>) -> bool {
        for instance in self.node.instances.of(&resolved.uid) {
            if let Err(error) = end_process(&self.node, resolved, &instance) {
                tracing::error!(guest = %self.key, %error, "deleting the guest");
                return false;
            }
            let abandoned = instance.layer.filter(|layer| {
                owner.is_some_and(|o| o.layer != Some(*layer) && instance.incarnation > o.incarnation)
            });
            if let Some(layer) = abandoned {
                let _ = super::boot::remove_layer(&resolved.state_dir(), layer);
            }
        }
        if let Err(error) = self.destroy_sessions(&resolved.uid) {
            tracing::error!(guest = %self.key, %error, "deleting the guest's sessions");
            return false;
        }
        match self.node.records.dormant(&resolved.uid) {
            Ok(Some(dormant)) => {
                if let Err(error) = super::maintenance::remove_dormant(&self.node, resolved, owner, &dormant)
                {
                    tracing::error!(guest = %self.key, %error, "deleting the guest's dormant incarnation");
                }
            }
            Ok(None) => {}
            Err(error) => tracing::error!(guest = %self.key, %error, "deleting the guest"),
        }
        for nic in &resolved.networks {
            if let Err(error) = remove_tap(&nic.tap) {
                tracing::warn!(guest = %self.key, %error, "removing a tap");
            }
        }
        if guest.spec.deletion_policy == DeletionPolicy::Delete {
            for disk in resolved.disks.iter().filter(|disk| !disk.read_only) {
                tracing::info!(guest = %self.key, disk = %disk.source.display(), "deleting a disk, as deletionPolicy asks");
                delete_disk(&disk.source);
            }
        }
        self.forget(guest)
    }

    /// Nobody wants the sessions of a deleted guest.
    fn destroy_sessions(&self, uid: &str) -> Result<(), sessions::SessionError> {
        for record in self.node.sessions.records.of(uid)? {
            self.node.sessions.destroy(uid, record.identity.checkpoint)?;
        }
        Ok(())
    }

    fn forget(&mut self, guest: &Guest) -> bool {
        let uid = guest.uid();
        for instance in self.node.instances.of(&uid) {
            if let Err(error) = self.node.instances.remove(&instance) {
                tracing::warn!(guest = %self.key, %error, "removing a record");
            }
        }
        let gone = self
            .node
            .records
            .remove(&uid)
            .map_err(|error| error.to_string())
            .and_then(|()| {
                self.node
                    .objects
                    .guest_gone(&self.key, &uid)
                    .map_err(|error| error.to_string())
            });
        match gone {
            Ok(()) => {
                tracing::info!(guest = %self.key, "deleted");
                true
            }
            Err(error) => {
                tracing::error!(guest = %self.key, error, "deleting the guest");
                false
            }
        }
    }

    fn report(&mut self, guest: &Guest, seen: &Seen) {
        let before = guest.status.as_ref().and_then(|status| status.phase);
        let durable = before != Some(seen.phase);
        if durable {
            tracing::info!(guest = %self.key, phase = ?seen.phase, reason = %seen.reason, "{}", seen.message);
        }
        let reported = self
            .node
            .objects
            .report_guest(&self.key, &guest.uid(), durable, &mut |status| {
                status::update(
                    status,
                    seen,
                    &self.node.name,
                    guest.generation(),
                    Timestamp::now(),
                );
            });
        if let Err(error) = reported {
            tracing::error!(guest = %self.key, %error, "the status could not be written");
        }
    }
}

fn agent_missing(info: &VmInfo, heard: &Heard) -> String {
    format!(
        "the guest runs ({} boots) and nothing in it answers as guest agent ({}): install it by `understudy-guest install` inside, or `understudy-guest install --root DIR` into the image",
        info.boots, heard.problem
    )
}

fn delete_disk(source: &Path) {
    let state = state_dir(source);
    if state.is_dir()
        && let Err(error) = std::fs::remove_dir_all(&state)
    {
        tracing::error!(path = %state.display(), %error, "deleting a disk's state");
    }
    let is_file = std::fs::symlink_metadata(source).is_ok_and(|metadata| metadata.is_file());
    if is_file && let Err(error) = std::fs::remove_file(source) {
        tracing::error!(path = %source.display(), %error, "deleting a disk");
    }
}

#[cfg(test)]
#[path = "worker_test.rs"]
mod tests;
