//! Whether a clone is ready to take over: the probes of `cutover.readiness`, one after the other. Pure.

use serde::{Deserialize, Serialize};
use understudy_api::conditions::reasons;
use understudy_api::readiness::{Probe, ProbeResult};

use super::effects::Answer;
use super::machine::begin_undo;
use super::record::{Moment, Operation, Step, Trouble, Verdict};

const SECOND: i64 = 1_000_000;

/// How far the probes are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Probing {
    /// Which of them is asked.
    pub index: usize,
    /// How often in a row it has succeeded.
    pub successes: i64,
    /// How often in a row it has failed.
    pub failures: i64,
}

/// Whether the clone must be asked before it may take over, or be called rehearsed.
pub(super) fn is_wanted(operation: &Operation) -> bool {
    !operation.ready && !operation.plan.readiness.is_empty()
}

/// The probe that is asked now.
pub fn current(operation: &Operation) -> Option<&Probe> {
    operation.plan.readiness.get(operation.probing?.index)
}

/// Begins with the first.
pub(super) fn begin(operation: &mut Operation, now: Moment) {
    operation.result.readiness = Vec::new();
    operation.step = Step::Probe;
    turn_to(operation, 0, now);
}

fn turn_to(operation: &mut Operation, index: usize, now: Moment) {
    operation.probing = Some(Probing {
        index,
        ..Probing::default()
    });
    let delay = current(operation).map_or(0, |probe| probe.initial_delay_seconds);
    wait(operation, now.plus(delay * SECOND), now);
}

fn wait(operation: &mut Operation, until: Moment, now: Moment) {
    operation.trouble = (until.since(now) > 0).then(|| Trouble {
        since: now,
        until,
        count: 0,
        reason: reasons::IN_PROGRESS.to_owned(),
        message: String::new(),
    });
}

/// One try was answered.
pub(super) fn answered(operation: &mut Operation, answer: Answer, started: Moment, now: Moment) {
    let (Some(probe), Some(mut probing)) = (current(operation).cloned(), operation.probing) else {
        return finish(operation, now);
    };
    let ready = answer.ready;
    (probing.successes, probing.failures) = match ready {
        true => (probing.successes + 1, 0),
        false => (0, probing.failures + 1),
    };
    let is_over = probing.successes >= probe.success_threshold || probing.failures >= probe.failure_threshold;
    tell(operation, &probe.name, answer.message, is_over.then_some(ready));
    operation.probing = Some(probing);
    if !is_over {
        wait(operation, started.plus(probe.period_seconds * SECOND), now);
    } else if probing.index + 1 < operation.plan.readiness.len() {
        // After one that has failed, too: a user wants to know of all at once.
        turn_to(operation, probing.index + 1, now);
    } else {
        finish(operation, now);
    }
}

fn tell(operation: &mut Operation, name: &str, message: String, ready: Option<bool>) {
    let results = &mut operation.result.readiness;
    let there = results.iter().position(|result| result.name == name);
    let tries = there.map_or(0, |there| results[there].tries) + 1;
    let result = ProbeResult {
        name: name.to_owned(),
        ready,
        tries,
        message,
    };
    match there {
        Some(there) => results[there] = result,
        None => results.push(result),
    }
}

fn finish(operation: &mut Operation, now: Moment) {
    operation.probing = None;
    operation.trouble = None;
    let results = &operation.result.readiness;
    let failed: Vec<String> = results
        .iter()
        .filter(|result| result.ready != Some(true))
        .map(|result| format!("{} ({})", result.name, result.message))
        .collect();
    if failed.is_empty() {
        operation.ready = true;
        // The guest has gone on meanwhile.
        super::approval::again(operation);
        return;
    }
    let message = format!("the clone is not ready: {}", failed.join(", "));
    begin_undo(operation, Verdict::failed(reasons::NOT_READY, message), now);
}

#[cfg(test)]
#[path = "readiness_test.rs"]
mod tests;
