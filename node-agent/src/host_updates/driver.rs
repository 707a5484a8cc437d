//! The thread that runs one update.

use std::sync::{Arc, Mutex, PoisonError};

use crate::halt::HaltAt;
use crate::host;
use crate::host_effects::HostWorld;
use crate::host_update::journal::{Directory, Journal, JournalError};
use crate::host_update::{Report, Run, Step, Update, run, status};
use crate::moment::Moment;
use crate::node::Node;
use crate::reporter::Reporter;
use crate::store::Object;

/// Runs an update on a thread of its own, unless one runs it already.
pub(super) fn start(node: &Arc<Node>, agent_started: Moment, update: Update, recovered: bool) {
    if !node.work.drive(&update.uid) {
        return;
    }
    let (name, uid) = (update.name.clone(), update.uid.clone());
    let spawned = std::thread::Builder::new().name(format!("update {name}")).spawn({
        let node = node.clone();
        move || drive(&node, agent_started, update, recovered)
    });
    if let Err(error) = spawned {
        tracing::error!(update = name, %error, "no thread for the update; it is tried again");
        node.work.undrive(&uid);
    }
}

fn drive(node: &Arc<Node>, agent_started: Moment, update: Update, recovered: bool) {
    let uid = update.uid.clone();
    let reporter = Reporter::start(&update.name, Update::phase, {
        let node = node.clone();
        move |update, is_new_phase| {
            if let Err(error) = write_status(&node, update, is_new_phase) {
                tracing::error!(update = update.name, error, "the status could not be written");
            }
        }
    });
    let halt = Arc::new(Mutex::new(HaltAt::new(
        &node.config.state_dir,
        "Host",
        update.step,
    )));
    let mut journal = HaltingJournal {
        journal: node.updates.clone(),
        halt: halt.clone(),
    };
    let mut report = Reporting {
        node: node.clone(),
        reporter: reporter.clone(),
        halt,
        told: None,
    };
    let mut world = HostWorld::new(node.clone(), agent_started, &update);
    let end = run(update, recovered, &mut world, &mut journal, &mut report);
    reporter.finish();
    match end {
        Run::Finished(update) => {
            node.work.put(&update);
            if let Some(verdict) = &update.verdict {
                tracing::info!(
                    update = update.name,
                    phase = %verdict.phase,
                    reason = verdict.reason,
                    "{}",
                    verdict.message
                );
            }
            finish(node, &update);
        }
        Run::Stopped(update) => node.work.put(&update),
    }
    node.work.undrive(&uid);
    node.objects.wake();
}

/// Makes the end of an update durable in its object; then forgets its record, where no session is kept: an
/// agent that dies in between does both again.
pub(super) fn finish(node: &Node, update: &Update) {
    if let Err(error) = write_status(node, update, true) {
        tracing::error!(
            update = update.name,
            error,
            "the end of the update could not be told; its record stays"
        );
        return;
    }
    if !update.is_over() {
        return;
    }
    match node.updates.remove(&update.uid) {
        Ok(()) => {
            node.work.forget(&update.uid);
            node.sessions.credentials.forget(&update.uid);
        }
        Err(error) => tracing::error!(update = update.name, %error, "the record of the update stays"),
    }
}

fn write_status(node: &Node, update: &Update, durable: bool) -> Result<(), String> {
    let generation = match node.objects.node_update(&update.name) {
        Ok(Some(object)) => object.generation(),
        Ok(None) => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    node.objects
        .report_node_update(&update.name, &update.uid, durable, &mut |there| {
            status::update(there, update, generation, host::moment());
        })
        .map_err(|error| error.to_string())
}

struct Reporting {
    node: Arc<Node>,
    reporter: Reporter<Update>,
    halt: Arc<Mutex<HaltAt<Step>>>,
    told: Option<Step>,
}

impl Report for Reporting {
    fn progress(&mut self, update: &Update) {
        if self.told != Some(update.step) {
            tracing::info!(
                update = update.name,
                step = ?update.step,
                phase = %update.phase(),
                boot_us = host::moment().boot_us,
                "step"
            );
            self.told = Some(update.step);
        }
        // First of all: guests and operations are held back by it.
        self.node.work.put(update);
        self.reporter.put(update);
        let mut halt = self.halt.lock().unwrap_or_else(PoisonError::into_inner);
        halt.left(update.step);
        halt.entered(update.step);
    }

    fn journal_trouble(&mut self, update: &Update, error: &str) {
        tracing::error!(update = update.name, error, "the journal could not be written");
    }
}

struct HaltingJournal {
    journal: Directory,
    halt: Arc<Mutex<HaltAt<Step>>>,
}

impl Journal for HaltingJournal {
    fn write(&mut self, update: &Update) -> Result<(), JournalError> {
        self.halt
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .left(update.step);
        Journal::write(&mut self.journal, update)
    }
}
