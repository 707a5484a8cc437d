//! The handover engine's world: VMMs through their control sockets, guest agents through vsock, files.

mod after;
mod before;
mod cutover;
mod errors;
mod integrate;
mod probe;
mod rollback;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use understudy_api::Guest;
use understudy_vmm_control::api::VmState;
use understudy_vmm_control::client::Client;
use understudy_vmm_control::owner::Owner;

use crate::guest_agent::Link;
use crate::guests::{Resolved, resolve};
use crate::handover::approval::is_news;
use crate::handover::effects::{
    Activation, Answer, CloneBoot, Dormancy, Preflight, Round, Sealed, SplitOutcome,
};
use crate::handover::{Asked, EffectError, Effected, Effects, ErrorKind, Moment, Operation};
use crate::host;
use crate::node::Node;
use crate::store::{Key, Object};
use crate::vmm::{Instance, Layout};
use errors::Side;

/// Time limit of requests to a guest agent that are answered at once.
const AGENT: Duration = Duration::from_secs(30);
/// The same for those that sync or stop something.
const AGENT_SLOW: Duration = Duration::from_secs(60);
/// The longest wait at once, so that what changes without a bell is seen.
const LOOK: Duration = Duration::from_millis(100);

/// The world of one operation.
pub struct World {
    node: Arc<Node>,
    guest: Key,
    reboot: Key,
}

impl World {
    /// The world of an operation on `guest` that `reboot` asked for.
    pub fn new(node: Arc<Node>, guest: Key, reboot: Key) -> World {
        World { node, guest, reboot }
    }

    /// The Guest and what it means on this node.
    fn resolved(&self) -> Effected<(Guest, Resolved)> {
        let guest = self
            .node
            .objects
            .guest(&self.guest)
            .map_err(|error| EffectError::new(ErrorKind::Retry, error.to_string()))?
            .ok_or_else(|| {
                EffectError::new(
                    ErrorKind::Refused,
                    format!("there is no Guest {}; spec.guestName must name one", self.guest),
                )
                .because(understudy_api::conditions::reasons::GUEST_NOT_FOUND)
            })?;
        let resolved = resolve(&self.node.config, &guest, host::cpus(), host::total_memory_mib())
            .map_err(|error| EffectError::new(ErrorKind::Refused, error.to_string()))?;
        Ok((guest, resolved))
    }

    /// The record of an incarnation's VMM.
    fn instance(&self, incarnation: u64, side: Side) -> Effected<(Resolved, Instance)> {
        let (_, resolved) = self.resolved()?;
        match self.node.instances.get(&resolved.uid, incarnation) {
            Some(instance) if instance.is_alive() => Ok((resolved, instance)),
            _ => Err(side.gone(format!("the VMM of incarnation {incarnation} has ended"))),
        }
    }

    fn guest_vmm(&self, operation: &Operation) -> Effected<(Resolved, Instance)> {
        self.instance(operation.guest_incarnation(), Side::Guest)
    }

    fn clone_vmm(&self, operation: &Operation) -> Effected<(Resolved, Instance)> {
        self.instance(operation.clone_incarnation(), Side::Clone)
    }

    fn layout(&self, resolved: &Resolved, incarnation: u64) -> Layout {
        Layout::new(&self.node.config, &self.guest, &resolved.uid, incarnation)
    }

    /// vsock socket of an incarnation whose VMM runs.
    fn vsock(&self, incarnation: u64, side: Side) -> Effected<PathBuf> {
        let (resolved, _) = self.instance(incarnation, side)?;
        Ok(self.layout(&resolved, incarnation).vsock())
    }

    /// The link to an incarnation's guest agent, once it is connected (a session that broke is opened
    /// again within a moment).
    fn agent(&self, incarnation: u64, side: Side) -> Effected<Arc<Link>> {
        let socket = self.vsock(incarnation, side)?;
        let link = self.node.link(&socket).map_err(|error| {
            EffectError::new(ErrorKind::Retry, format!("no thread for the link: {error}"))
        })?;
        link.wait(Duration::from_secs(2), |heard| heard.connected);
        Ok(link)
    }

    fn guest_agent(&self, operation: &Operation) -> Effected<Arc<Link>> {
        self.agent(operation.guest_incarnation(), Side::Guest)
    }

    fn clone_agent(&self, operation: &Operation) -> Effected<Arc<Link>> {
        self.agent(operation.clone_incarnation(), Side::Clone)
    }

    /// What failed, seen again: where a guest has crashed its VMM lives on, to tell why, and whatever is asked
    /// of it fails in one way or another. Trying again is no use then.
    fn unless_stopped<T>(&self, operation: &Operation, result: Effected<T>) -> Effected<T> {
        match result {
            Err(error) if matches!(error.kind, ErrorKind::Retry | ErrorKind::Refused) => {
                self.both_run(operation)?;
                Err(error)
            }
            other => other,
        }
    }

    /// That neither guest nor clone is known to have stopped.
    fn both_run(&self, operation: &Operation) -> Effected<()> {
        let sides = [
            (operation.guest_incarnation(), Side::Guest),
            (operation.clone_incarnation(), Side::Clone),
        ];
        for (incarnation, side) in sides {
            if let Ok((_, instance)) = self.instance(incarnation, side)
                && let Ok(info) = instance.client().info()
                && info.state == VmState::Exited
            {
                let why = info.exit_reason.unwrap_or_default();
                return Err(side.gone(format!("{} has stopped: {why}", side.name())));
            }
        }
        Ok(())
    }

    /// A client for requests that wait for requests in flight, flush or copy.
    fn slow(instance: &Instance) -> Client {
        Client::new(&instance.control, Duration::from_secs(60))
    }

    fn owner(&self, resolved: &Resolved) -> Effected<Owner> {
        match Owner::read(&resolved.state_dir()) {
            Ok(Some(owner)) => Ok(owner),
            Ok(None) => Err(EffectError::new(
                ErrorKind::Refused,
                format!("{} has no owner.json", resolved.state_dir().display()),
            )),
            Err(error) => Err(EffectError::new(ErrorKind::Retry, error.to_string())),
        }
    }
}

impl Effects for World {
    fn now(&mut self) -> Moment {
        host::moment()
    }

    fn wait(&mut self, operation: &Operation, until: Moment) {
        let micros = until.boot_us - host::moment().boot_us;
        let Ok(micros) = u64::try_from(micros) else { return };
        let deadline = Instant::now() + Duration::from_micros(micros);
        while !self.must_stop() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || is_news(operation, &self.what_is_asked()) {
                return;
            }
            std::thread::sleep(left.min(LOOK));
        }
    }

    fn asked(&mut self, _operation: &Operation) -> Asked {
        self.what_is_asked()
    }

    fn must_stop(&mut self) -> bool {
        self.node.is_stopping() || self.node.work.is_suspended(&self.guest)
    }

    fn preflight(&mut self, operation: &Operation) -> Effected<Preflight> {
        self.do_preflight(operation)
    }

    fn confirm(&mut self, operation: &Operation) -> Effected<()> {
        let result = self.do_confirm(operation);
        self.unless_stopped(operation, result)
    }

    fn prepare_split(&mut self, operation: &Operation) -> Effected<()> {
        let result = self.do_prepare_split(operation);
        self.unless_stopped(operation, result)
    }

    fn prepare_clone(&mut self, operation: &Operation) -> Effected<()> {
        self.do_prepare_clone(operation)
    }

    fn split(&mut self, operation: &Operation) -> Effected<SplitOutcome> {
        let result = self.do_split(operation);
        self.unless_stopped(operation, result)
    }

    fn boot_clone(&mut self, operation: &Operation) -> Effected<()> {
        let result = self.do_boot_clone(operation);
        self.unless_stopped(operation, result)
    }

    fn await_clone_boot(&mut self, operation: &Operation) -> Effected<Option<CloneBoot>> {
        self.do_await_clone_boot(operation)
    }

    fn integrate(&mut self, operation: &Operation, last: bool, deadline: Option<Moment>) -> Effected<Round> {
        let result = self.do_integrate(operation, last, deadline);
        self.unless_stopped(operation, result)
    }

    fn probe(&mut self, operation: &Operation) -> Effected<Answer> {
        let result = self.do_probe(operation);
        self.unless_stopped(operation, result)
    }

    fn watch(&mut self, operation: &Operation) -> Effected<()> {
        let gone = |result: Effected<()>| match result {
            Err(error) if matches!(error.kind, ErrorKind::GuestGone | ErrorKind::CloneGone) => Err(error),
            _ => Ok(()),
        };
        gone(self.guest_vmm(operation).map(drop))?;
        gone(self.clone_vmm(operation).map(drop))?;
        self.both_run(operation)
    }

    fn hold_ingress(&mut self, operation: &Operation, lease_ms: u64) -> Effected<()> {
        let result = self.do_hold_ingress(operation, lease_ms);
        self.unless_stopped(operation, result)
    }

    fn freeze_userland(&mut self, operation: &Operation, lease_ms: u64) -> Effected<()> {
        let result = self.do_freeze_userland(operation, lease_ms);
        self.unless_stopped(operation, result)
    }

    fn seal(&mut self, operation: &Operation, lease_ms: u64) -> Effected<Sealed> {
        let result = self.do_seal(operation, lease_ms);
        self.unless_stopped(operation, result)
    }

    fn count_dirty(&mut self, operation: &Operation) -> Effected<u64> {
        let result = self.do_count_dirty(operation);
        self.unless_stopped(operation, result)
    }

    fn pause(&mut self, operation: &Operation, lease_ms: u64) -> Effected<()> {
        let result = self.do_pause(operation, lease_ms);
        self.unless_stopped(operation, result)
    }

    fn commit(&mut self, operation: &Operation) -> Effected<()> {
        self.do_commit(operation)
    }

    fn release(&mut self, operation: &Operation) -> Effected<()> {
        self.do_release(operation)
    }

    fn read_owner(&mut self, _operation: &Operation) -> Effected<Owner> {
        let (_, resolved) = self.resolved()?;
        self.owner(&resolved)
    }

    fn thaw_userland(&mut self, operation: &Operation) -> Effected<()> {
        self.do_thaw_userland(operation)
    }

    fn thaw_filesystems(&mut self, operation: &Operation) -> Effected<()> {
        self.do_thaw_filesystems(operation).map(drop)
    }

    fn end_capture(&mut self, operation: &Operation) -> Effected<()> {
        self.do_end_capture(operation)
    }

    fn kill_clone(&mut self, operation: &Operation) -> Effected<()> {
        self.do_kill_clone(operation)
    }

    fn discard_clone(&mut self, operation: &Operation) -> Effected<()> {
        self.do_discard_clone(operation)
    }

    fn hand_over_network(&mut self, operation: &Operation) -> Effected<()> {
        self.do_hand_over_network(operation)
    }

    fn activate_clone(&mut self, operation: &Operation, open_taps: bool) -> Effected<()> {
        self.do_activate_clone(operation, open_taps)
    }

    fn activate_agent(&mut self, operation: &Operation) -> Effected<Activation> {
        self.do_activate_agent(operation)
    }

    fn cold_boot(&mut self, operation: &Operation) -> Effected<()> {
        self.do_cold_boot(operation)
    }

    fn retire(&mut self, operation: &Operation, deadline: Moment) -> Effected<()> {
        self.do_retire(operation, deadline)
    }

    fn find_dormant(&mut self, operation: &Operation) -> Effected<Dormancy> {
        self.do_find_dormant(operation)
    }

    fn hold_clone(&mut self, operation: &Operation, lease_ms: u64) -> Effected<u64> {
        self.do_hold_clone(operation, lease_ms)
    }

    fn commit_back(&mut self, operation: &Operation) -> Effected<()> {
        self.do_commit_back(operation)
    }

    fn release_clone(&mut self, operation: &Operation) -> Effected<()> {
        self.do_release_clone(operation)
    }

    fn activate_guest(&mut self, operation: &Operation) -> Effected<()> {
        self.do_activate_guest(operation)
    }

    fn reinstate(&mut self, operation: &Operation) -> Effected<Option<Moment>> {
        self.do_reinstate(operation)
    }
}

impl World {
    fn what_is_asked(&self) -> Asked {
        let reboot = self.node.objects.reboot(&self.reboot).ok().flatten();
        let guest = || self.node.objects.guest(&self.guest).ok().flatten();
        let abort = if self.node.work.is_aborted(&self.guest) {
            Some("the host is about to reboot")
        } else if reboot.as_ref().is_some_and(Object::is_deleting) {
            Some("the SeamlessReboot was deleted")
        } else if guest().as_ref().is_some_and(Object::is_deleting) {
            Some("the Guest is being deleted")
        } else {
            None
        };
        Asked {
            abort: abort.map(str::to_owned),
            action: reboot
                .and_then(|reboot| reboot.spec.action)
                .map(|action| action.kind),
        }
    }
}
