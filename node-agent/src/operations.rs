//! Operations: a driver thread for each SeamlessReboot, one per guest at a time, and their recovery when the
//! agent starts.

use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use understudy_api::conditions::{self, reasons};
use understudy_api::reboot::ActionType;
use understudy_api::{Phase, SeamlessReboot};
use uuid::Uuid;

use crate::effects::World;
use crate::halt::HaltAt;
use crate::handover::journal::{Directory, Journal, JournalError};
use crate::handover::{Moment, Operation, Plan, Report, Run, Step, run, status};
use crate::host;
use crate::node::{InFlight, Node};
use crate::reporter::Reporter;
use crate::store::{Key, Object};

/// Takes up the operations that a former agent left, before anything else is done with their guests; unless
/// a reboot of the host holds them back, which then does so itself.
pub fn recover(node: &Arc<Node>) {
    if !node.work.holds_operations() {
        take_up(node);
    }
}

/// Takes up all operations in the journal that no driver runs: those of a former agent, and those that were
/// suspended for a reboot of the host.
pub fn take_up(node: &Arc<Node>) {
    let records = match node.journal.load() {
        Ok(records) => records,
        Err(error) => {
            tracing::error!(%error, "the journal of operations could not be read");
            return;
        }
    };
    for record in records {
        let operation = match record {
            Ok(operation) => operation,
            Err(error) => {
                tracing::error!(%error, "an operation cannot be taken up");
                continue;
            }
        };
        let (Some(guest), Some(reboot)) = (key(&operation.guest), key(&operation.name)) else {
            tracing::error!(uid = operation.uid, "an operation names no guest");
            continue;
        };
        if operation.is_finished() {
            finish(node, &operation);
            continue;
        }
        tracing::info!(reboot = %reboot, step = ?operation.step, "taking up an operation");
        start(node, guest, reboot, operation, true);
    }
}

/// One pass over all SeamlessReboots: starts what can be started, tells what waits, removes what is over.
pub fn pass(node: &Arc<Node>) {
    let mut reboots = node.objects.reboots();
    // First come, first served; the name decides where the time does not.
    reboots.sort_by_key(|reboot| {
        let created = reboot.metadata.creation_timestamp.as_ref().map(|time| time.0);
        (created, reboot.key())
    });
    for reboot in reboots {
        let phase = reboot.status.as_ref().and_then(|status| status.phase);
        if phase.is_some_and(Phase::is_terminal) {
            expire(node, &reboot);
            if !node.is_stopping() {
                crate::actions::pass(node, &reboot);
            }
        } else if !node.is_stopping() {
            begin(node, &reboot);
        }
    }
}

fn key(text: &str) -> Option<Key> {
    let (namespace, name) = text.split_once('/')?;
    Some(Key::new(namespace, name))
}

fn begin(node: &Arc<Node>, reboot: &SeamlessReboot) {
    let (reboot_key, uid) = (reboot.key(), reboot.uid());
    let guest_key = Key::new(reboot_key.namespace.clone(), reboot.spec.guest_name.clone());
    let there = node.in_flight(&guest_key);
    if there.as_ref().is_some_and(|there| there.uid == uid) {
        return;
    }
    if reboot.is_deleting() {
        // Nothing was begun for it.
        tell(
            node,
            reboot,
            Phase::Aborted,
            reasons::ABORTED,
            "deleted before it began",
        );
        return;
    }
    let asked = reboot.spec.action.as_ref().map(|action| action.kind);
    if let Some(kind @ (ActionType::Abort | ActionType::Rollback)) = asked
        && !node.journal.has(&uid)
    {
        crate::actions::latch(node, reboot, kind);
        tell(
            node,
            reboot,
            Phase::Aborted,
            reasons::ABORTED,
            "aborted by spec.action before it began",
        );
        return;
    }
    if let Some(there) = there {
        let message = format!("waits for SeamlessReboot {} of the same guest", there.reboot.name);
        tell(node, reboot, Phase::Pending, reasons::GUEST_BUSY, &message);
        return;
    }
    if node.work.holds_operations() {
        let message = "waits until the host, which is about to reboot, has done so";
        tell(node, reboot, Phase::Pending, reasons::HOST_UPDATING, message);
        return;
    }
    let plan = match Plan::from_spec(&reboot.spec) {
        Ok(plan) => plan,
        Err(error) => {
            tell(node, reboot, Phase::Failed, reasons::INVALID, &error.to_string());
            return;
        }
    };
    let operation = Operation::new(
        uid,
        reboot_key.to_string(),
        guest_key.to_string(),
        plan,
        (Uuid::new_v4(), Uuid::new_v4()),
        host::moment(),
    );
    start(node, guest_key, reboot_key, operation, false);
}

/// Writes a status that no engine writes.
fn tell(node: &Node, reboot: &SeamlessReboot, phase: Phase, reason: &str, message: &str) {
    let generation = reboot.generation();
    let reported = node
        .objects
        .report_reboot(&reboot.key(), &reboot.uid(), true, &mut |status| {
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
    if let Err(error) = reported {
        tracing::error!(reboot = %reboot.key(), %error, "the status could not be written");
    }
}

/// Removes a finished reboot that was deleted, or whose time to live is over; in a cluster the operator does.
fn expire(node: &Node, reboot: &SeamlessReboot) {
    if !node.objects.stands_alone() {
        return;
    }
    let finished = reboot
        .status
        .as_ref()
        .and_then(|status| status.phase_transitions.last())
        .map(|transition| transition.transition_time.0);
    let over = match (reboot.spec.ttl_seconds_after_finished, finished) {
        (Some(ttl), Some(finished)) => Timestamp::now().as_second() - finished.as_second() >= ttl,
        _ => false,
    };
    let guest = Key::new(reboot.key().namespace, reboot.spec.guest_name.clone());
    let driven = node
        .in_flight(&guest)
        .is_some_and(|there| there.uid == reboot.uid());
    if (over || reboot.is_deleting()) && !driven {
        tracing::info!(reboot = %reboot.key(), "removed");
        if let Err(error) = node.objects.reboot_gone(&reboot.key(), &reboot.uid()) {
            tracing::error!(reboot = %reboot.key(), %error, "the reboot could not be removed");
        }
    }
}

/// Has a driver run an operation.
pub(crate) fn start(node: &Arc<Node>, guest: Key, reboot: Key, operation: Operation, recovered: bool) {
    let in_flight = InFlight {
        reboot: reboot.clone(),
        uid: operation.uid.clone(),
        phase: operation.phase(),
    };
    if let Some(there) = node.begin(&guest, in_flight) {
        tracing::warn!(reboot = %reboot, other = %there.reboot, "two operations on one guest; this one waits");
        return;
    }
    let driver = Driver {
        node: node.clone(),
        guest: guest.clone(),
        reboot: reboot.clone(),
    };
    let spawned = std::thread::Builder::new()
        .name(format!("reboot {reboot}"))
        .spawn(move || driver.run(operation, recovered));
    if let Err(error) = spawned {
        tracing::error!(reboot = %reboot, %error, "no thread for the operation; it is tried again");
        node.end(&guest);
    }
}

struct Driver {
    node: Arc<Node>,
    guest: Key,
    reboot: Key,
}

impl Driver {
    fn run(self, operation: Operation, recovered: bool) {
        let reporter = Reporter::start(&self.reboot.to_string(), Operation::phase, {
            let (node, reboot) = (self.node.clone(), self.reboot.clone());
            move |operation, is_new_phase| {
                // Nothing is waited for while the guest is held.
                let durable = is_new_phase && !operation.step.is_held();
                if let Err(error) = write_status(&node, &reboot, operation, durable) {
                    tracing::error!(reboot = %reboot, error, "the status could not be written");
                }
            }
        });
        let halt = Arc::new(Mutex::new(HaltAt::new(
            &self.node.config.state_dir,
            "",
            operation.step,
        )));
        let mut journal = HaltingJournal {
            journal: self.node.journal.clone(),
            halt: halt.clone(),
        };
        let mut report = Reporting {
            reporter: reporter.clone(),
            node: self.node.clone(),
            guest: self.guest.clone(),
            halt,
            step: None,
            troubles: 0,
        };
        let mut world = World::new(self.node.clone(), self.guest.clone(), self.reboot.clone());
        let end = run(operation, recovered, &mut world, &mut journal, &mut report);
        reporter.finish();
        if let Run::Finished(operation) = end {
            if let Some(verdict) = &operation.verdict {
                tracing::info!(
                    guest = %self.guest,
                    reboot = %self.reboot,
                    phase = %verdict.phase,
                    reason = verdict.reason,
                    interruption_ms = operation.result.interruption_milliseconds,
                    "{}",
                    verdict.message
                );
            }
            finish(&self.node, &operation);
        }
        self.node.end(&self.guest);
    }
}

/// Makes the end of an operation durable in its object, then forgets its record: an agent that dies in
/// between does both again.
fn finish(node: &Node, operation: &Operation) {
    let Some(reboot) = key(&operation.name) else {
        return;
    };
    if let Err(error) = write_status(node, &reboot, operation, true) {
        tracing::error!(reboot = %reboot, error, "the end of the operation could not be told; its record stays");
        return;
    }
    if let Err(error) = node.journal.remove(&operation.uid) {
        tracing::error!(reboot = %reboot, %error, "the record of the operation stays");
    }
}

fn write_status(node: &Node, reboot: &Key, operation: &Operation, durable: bool) -> Result<(), String> {
    let generation = match node.objects.reboot(reboot) {
        Ok(Some(object)) => object.generation(),
        Ok(None) => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    node.objects
        .report_reboot(reboot, &operation.uid, durable, &mut |status| {
            status::update(status, operation, generation, host::moment());
        })
        .map_err(|error| error.to_string())
}

struct Reporting {
    /// So that no write is on the path of a cutover.
    reporter: Reporter<Operation>,
    node: Arc<Node>,
    guest: Key,
    halt: Arc<Mutex<HaltAt<Step>>>,
    step: Option<Step>,
    /// How often the step had failed when that was told last.
    troubles: u32,
}

impl Report for Reporting {
    fn progress(&mut self, operation: &Operation) {
        if self.step != Some(operation.step) {
            let Moment { boot_us, .. } = host::moment();
            tracing::info!(
                guest = operation.guest,
                reboot = operation.name,
                step = ?operation.step,
                phase = %operation.phase(),
                boot_us,
                "step"
            );
            self.step = Some(operation.step);
        }
        let count = operation.trouble.as_ref().map_or(0, |trouble| trouble.count);
        let told = std::mem::replace(&mut self.troubles, count);
        if let Some(trouble) = operation.trouble.as_ref().filter(|_| told != count) {
            tracing::warn!(guest = operation.guest, reboot = operation.name, step = ?operation.step, count = trouble.count, "{}", trouble.message);
        }
        self.node.note_phase(&self.guest, operation.phase());
        self.reporter.put(operation);
        let mut halt = self.halt.lock().unwrap_or_else(PoisonError::into_inner);
        halt.left(operation.step);
        halt.entered(operation.step);
    }

    fn journal_trouble(&mut self, operation: &Operation, error: &str) {
        tracing::error!(
            guest = operation.guest,
            reboot = operation.name,
            error,
            "the journal could not be written"
        );
    }
}

struct HaltingJournal {
    journal: Directory,
    halt: Arc<Mutex<HaltAt<Step>>>,
}

impl Journal for HaltingJournal {
    fn write(&mut self, operation: &Operation) -> Result<(), JournalError> {
        self.halt
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .left(operation.step);
        self.journal.write(operation)
    }
}

#[cfg(test)]
#[path = "operations_test.rs"]
mod tests;
