//! Host updates on this node: which one is begun when, a driver thread for each, and their recovery when the
//! agent starts.

mod assign;
mod driver;

use std::sync::Arc;

use jiff::Timestamp;
use understudy_api::conditions::{self, reasons, types};
use understudy_api::node_update::{Origin, SessionState};
use understudy_api::rollout::{Want, aborted, want};
use understudy_api::{NodeUpdate, NodeUpdatePhase};

use crate::host;
use crate::host_effects::is_unwanted;
use crate::host_update::effects::HostIntent;
use crate::host_update::{Plan, Update};
use crate::moment::Moment;
use crate::node::Node;
use crate::store::Object;

use driver::start;

/// NodeUpdates that stay of reboots which the host began.
const KEPT_OF_HOST: usize = 10;

/// Looks after all host updates of this node.
pub struct HostUpdates {
    node: Arc<Node>,
    agent_started: Moment,
    /// Whether a NodeUpdate was made for the shutdown that the host has begun.
    answered: bool,
}

impl HostUpdates {
    /// Loads what former agents left, so that guests and operations are held back by it: before anything is
    /// done with either. Nothing runs yet.
    pub fn load(node: &Arc<Node>, agent_started: Moment) -> HostUpdates {
        match node.updates.load() {
            Ok(records) => {
                for record in records {
                    match record {
                        Ok(update) => node.work.put(&update),
                        // Its guests have checkpoints that are found on disk: nobody boots past them.
                        Err(error) => tracing::error!(%error, "a host update cannot be taken up"),
                    }
                }
            }
            Err(error) => tracing::error!(%error, "the journal of host updates could not be read"),
        }
        node.sessions
            .sweep(&node.instances, |checkpoint| node.work.knows(checkpoint));
        HostUpdates {
            node: node.clone(),
            agent_started,
            answered: false,
        }
    }

    /// Takes up what was loaded.
    pub fn recover(&self) {
        for update in self.node.work.updates() {
            if update.is_over() {
                driver::finish(&self.node, &update);
                continue;
            }
            tracing::info!(update = update.name, step = ?update.step, "taking up a host update");
            start(&self.node, self.agent_started, update, true);
        }
    }

    /// One pass: begins what can be begun, tells what waits, removes what is over.
    pub fn pass(&mut self) {
        self.take_up_discarded();
        let goes_down = match self.node.work.intent() {
            HostIntent::GoesDown { reason, .. } => Some(reason),
            _ => {
                self.answered = false;
                None
            }
        };
        let is_free = self.node.work.current().is_none() && !self.node.is_stopping();
        if is_free {
            self.begin_next(goes_down.as_deref());
        }
        if goes_down.is_none() && self.node.objects.stands_alone() {
            self.assign();
        }
        self.expire();
    }

    /// Begins a NodeUpdate that was made and has no record yet; or makes one for a host that goes down.
    fn begin_next(&mut self, goes_down: Option<&str>) {
        let mut waiting: Vec<NodeUpdate> = self
            .node
            .objects
            .node_updates()
            .into_iter()
            .filter(|update| !phase(update).is_terminal())
            .filter(|update| !self.node.updates.has(&update.uid()))
            .filter(|update| self.may_begin(update))
            .collect();
        waiting.sort_by_key(|update| {
            let created = update.metadata.creation_timestamp.as_ref().map(|time| time.0);
            (created, update.key())
        });
        match goes_down {
            None => {
                if let Some(update) = waiting.first() {
                    self.begin(update);
                }
            }
            // Nothing else is begun by a host that goes down.
            Some(_) if self.answered => {}
            Some(reason) => {
                self.answered = true;
                let of_host = waiting
                    .into_iter()
                    .find(|update| update.spec.origin == Origin::Host);
                match of_host.map_or_else(|| self.make_of_host(reason), Some) {
                    Some(update) => self.begin(&update),
                    None => {
                        tracing::error!("no NodeUpdate could be made; sessions are lost with this reboot")
                    }
                }
            }
        }
    }

    /// In a cluster the operator drains the node first; what is deleted before that is told so.
    fn may_begin(&self, update: &NodeUpdate) -> bool {
        let is_drained = || {
            let mut conditions = update.status.iter().flat_map(|status| &status.conditions);
            conditions.any(|there| there.type_ == types::DRAINED && there.status == "True")
        };
        self.node.objects.stands_alone()
            || update.spec.origin == Origin::Host
            || update.is_deleting()
            || is_drained()
    }

    fn make_of_host(&self, reason: &str) -> Option<NodeUpdate> {
        let node = &self.node;
        tracing::warn!(reason, "the host goes down: sessions are saved first");
        for number in 0.. {
            let update = assign::of_host(&node.name, node.sessions.boot_id(), number, reason);
            match node.objects.make_node_update(&update) {
                Ok(Some(made)) if !phase(&made).is_terminal() => return Some(made),
                // Of a shutdown that was called off.
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(error) => {
                    tracing::error!(%error, "making a NodeUpdate");
                    return None;
                }
            }
        }
        None
    }

    fn begin(&self, object: &NodeUpdate) {
        let plan = match Plan::from_spec(&object.spec) {
            Ok(plan) => plan,
            Err(error) => {
                self.refuse(
                    object,
                    NodeUpdatePhase::Failed,
                    reasons::INVALID,
                    &error.to_string(),
                );
                return;
            }
        };
        if object.is_deleting() {
            self.refuse(
                object,
                NodeUpdatePhase::Aborted,
                reasons::ABORTED,
                "deleted before it began",
            );
            return;
        }
        let update = Update::new(object.uid(), object.key().name, plan, host::moment());
        tracing::info!(
            update = update.name,
            origin = object.spec.origin.as_str(),
            "beginning a host update"
        );
        self.node.work.put(&update);
        start(&self.node, self.agent_started, update, false);
    }

    /// Ends a NodeUpdate that no engine ever ran.
    fn refuse(&self, object: &NodeUpdate, phase: NodeUpdatePhase, reason: &str, message: &str) {
        let generation = object.generation();
        let told =
            self.node
                .objects
                .report_node_update(&object.key().name, &object.uid(), true, &mut |status| {
                    status.observed_generation = generation;
                    status.phase = Some(phase);
                    status.reason = Some(reason.to_owned());
                    status.message = Some(message.to_owned());
                    conditions::set_for_phase(
                        &mut status.conditions,
                        generation,
                        Timestamp::now(),
                        phase,
                        reason,
                        message,
                    );
                });
        if let Err(error) = told {
            tracing::error!(update = %object.key(), %error, "the status could not be written");
        }
    }

    /// What HostUpdates ask for.
    fn assign(&self) {
        let node = &self.node;
        let passes = node.objects.node_updates();
        let now = host::moment();
        let seen = assign::seen(&node.name, host::kernel_release(), now.unix_us - now.boot_us);
        for update in node.objects.host_updates() {
            let mut wanted = want(&update, &passes, &seen);
            if let Want::Pass(pass) = &wanted {
                // One at a time: the others see a host that was rebooted meanwhile.
                if let Some(other) = node.work.current() {
                    wanted = Want::Waits {
                        reason: reasons::PENDING,
                        message: format!("waits for NodeUpdate {}", other.name),
                    };
                } else if !node.is_stopping() {
                    match node.objects.make_node_update(pass) {
                        Ok(Some(made)) => {
                            self.begin(&made);
                            wanted = Want::Underway(Box::new(made));
                        }
                        Ok(None) => {}
                        Err(error) => {
                            tracing::error!(update = %update.key(), %error, "making its NodeUpdate");
                        }
                    }
                }
            }
            let aborted = aborted(&update);
            let told = node
                .objects
                .report_host_update(&update.key().name, &update.uid(), &mut |status| {
                    status.aborted = aborted.clone();
                    assign::report(status, &wanted, &node.name, update.generation(), Timestamp::now());
                });
            if let Err(error) = told {
                tracing::error!(update = %update.key(), %error, "the status could not be written");
            }
        }
    }

    /// Runs an update with kept sessions again when nobody wants one of them any more.
    fn take_up_discarded(&self) {
        let node = &self.node;
        for update in node.work.updates() {
            if !update.is_finished() || node.work.is_driven(&update.uid) {
                continue;
            }
            let kept = update
                .sessions
                .iter()
                .filter(|session| session.state == SessionState::Kept);
            let unwanted = kept
                .filter(|session| match is_unwanted(node, session) {
                    Ok(unwanted) => unwanted,
                    Err(error) => {
                        tracing::error!(guest = session.guest, %error, "looking at its session");
                        false
                    }
                })
                .map(|session| session.guest.clone())
                .next();
            if let Some(guest) = unwanted {
                tracing::warn!(guest, update = update.name, "its session is discarded");
                start(node, self.agent_started, update, true);
            }
        }
    }

    /// Removes deleted objects that nothing runs for; in a cluster the operator does, but for those of reboots that
    /// the host began.
    fn expire(&self) {
        let objects = &self.node.objects;
        let stands_alone = objects.stands_alone();
        let known = self.node.work.updates();
        let passes = objects.node_updates();
        let is_known = |pass: &NodeUpdate| known.iter().any(|update| update.uid == pass.uid());
        let of_deleted: Vec<String> = objects
            .host_updates()
            .into_iter()
            .filter(Object::is_deleting)
            .map(|update| update.uid())
            .collect();
        let owner = |pass: &NodeUpdate| pass.spec.host_update.as_ref().map(|owner| owner.uid.clone());
        let mut busy: Vec<String> = Vec::new();
        let outdated = outdated(&passes);
        for pass in &passes {
            let owned = owner(pass).filter(|uid| of_deleted.contains(uid));
            let is_unwanted = stands_alone && (pass.is_deleting() || owned.is_some());
            if !is_unwanted && !outdated.contains(&pass.uid()) {
                continue;
            }
            if is_known(pass) || !phase(pass).is_terminal() {
                busy.extend(owned);
                continue;
            }
            tracing::info!(update = %pass.key(), "removed");
            if let Err(error) = objects.node_update_gone(&pass.key().name, &pass.uid()) {
                tracing::error!(update = %pass.key(), %error, "the NodeUpdate could not be removed");
            }
        }
        for update in objects.host_updates() {
            if !update.is_deleting() || busy.contains(&update.uid()) {
                continue;
            }
            tracing::info!(update = %update.key(), "removed");
            if let Err(error) = objects.host_update_gone(&update.key().name, &update.uid()) {
                tracing::error!(update = %update.key(), %error, "the HostUpdate could not be removed");
            }
        }
    }
}

/// UIDs of those that hosts began which nobody looks at any more: all but the newest.
fn outdated(updates: &[NodeUpdate]) -> Vec<String> {
    let mut of_hosts: Vec<&NodeUpdate> = updates
        .iter()
        .filter(|update| update.spec.origin == Origin::Host && phase(update).is_terminal())
        .collect();
    of_hosts.sort_by_key(|update| {
        let created = update.metadata.creation_timestamp.as_ref().map(|time| time.0);
        std::cmp::Reverse((created, update.key()))
    });
    of_hosts
        .iter()
        .skip(KEPT_OF_HOST)
        .map(|update| update.uid())
        .collect()
}

fn phase(update: &NodeUpdate) -> NodeUpdatePhase {
    update
        .status
        .as_ref()
        .and_then(|status| status.phase)
        .unwrap_or_default()
}

#[cfg(test)]
mod updates_test;
