//! The state machine: pure functions from one record to the next. What happens is in [`super::driver`].
//!
//! What concerns one session is in [`super::saving`] (up to the host's reboot) and [`super::resuming`]
//! (after it).

use understudy_api::NodeUpdatePhase;
use understudy_api::conditions::reasons;
use understudy_api::node_update::{HostBoot, Origin, SessionState};

use super::effects::{
    CheckpointFacts, CommandEnd, EffectError, Effected, ErrorKind, HostFacts, HostIntent, Preflight,
    Resumption, SaveProgress, Settling,
};
use super::quiesce::{InFlight, PATIENCE, Rules};
use super::record::{GoingDown, Session, Step, Trouble, Update, Verdict};
use super::{resuming, saving};
use crate::moment::Moment;

pub(super) const SECOND: i64 = 1_000_000;
/// How long a step of the host as a whole is tried again without success.
const STEP_PATIENCE: i64 = 60 * SECOND;
/// How long operations in flight are waited for after they were told to end.
const QUIESCE_PATIENCE: i64 = PATIENCE + 600 * SECOND;
/// Pause between two looks at operations in flight.
const QUIESCE_LOOK: i64 = SECOND / 5;
/// How old the knowledge may be that every session is saved, when the reboot is asked for.
const VERIFIED_FOR: i64 = 30 * SECOND;
/// First wait before something is tried again; doubles up to [`LAST_WAIT`].
const FIRST_WAIT: i64 = SECOND / 20;
const LAST_WAIT: i64 = 5 * SECOND;
/// Pause between two looks for an answer that is on its way: guests wait for it.
const AWAITED_LOOK: i64 = SECOND;

/// An effect to perform; with a number: for the session at that place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// [`super::Effects::inspect_host`].
    Inspect,
    /// [`super::Effects::run_command`].
    RunCommand,
    /// [`super::Effects::quiesce_operations`].
    Quiesce(Rules),
    /// [`super::Effects::preflight`].
    Preflight,
    /// [`super::Effects::register_key`].
    RegisterKey(usize),
    /// [`super::Effects::save`], with this lease in milliseconds.
    Save(usize, u64),
    /// [`super::Effects::pause_for_save`].
    Pause(usize),
    /// [`super::Effects::keep_saved`], with this lease in milliseconds.
    Keep(usize, u64),
    /// [`super::Effects::inspect_checkpoint`].
    InspectCheckpoint(usize),
    /// [`super::Effects::acknowledge`].
    Acknowledge,
    /// [`super::Effects::request_reboot`].
    Reboot,
    /// [`super::Effects::end_command`].
    EndCommand,
    /// [`super::Effects::call_off_reboot`].
    CallOff,
    /// [`super::Effects::cancel_save`].
    Cancel(usize),
    /// [`super::Effects::obtain_key`].
    ObtainKey(usize),
    /// [`super::Effects::resume`].
    Resume(usize),
    /// [`super::Effects::release_operations`].
    Release,
    /// [`super::Effects::look_after`].
    LookAfter(usize),
    /// [`super::Effects::destroy`].
    Destroy(usize),
}

impl Action {
    /// Whether it needs the record that calls for it to be durable: an agent or a host that dies within it
    /// must find what it was about to do. Without a record it is not done.
    ///
    /// Looking changes nothing. Undoing and resuming are done in any case: the VMM's own durable marks make
    /// them safe without a record, and guests wait.
    pub fn needs_record(self) -> bool {
        matches!(
            self,
            Action::RunCommand
                | Action::Quiesce(_)
                | Action::Preflight
                | Action::RegisterKey(_)
                | Action::Save(..)
                | Action::Acknowledge
                | Action::Reboot
        )
    }

    /// Whether it waits until a record can be written. What is destroyed after the reboot is not there to be
    /// found again: a record that still asks for it would call it missing. (In an undo guests run, and a full
    /// disk may need the room.)
    pub fn waits_for_record(self, update: &Update) -> bool {
        matches!(self, Action::Destroy(_)) && update.step == Step::Settle
    }

    /// Whether the record is written before it, where that can be done.
    pub fn is_recorded(self) -> bool {
        !matches!(
            self,
            Action::Inspect
                | Action::Pause(_)
                | Action::Keep(..)
                | Action::InspectCheckpoint(_)
                | Action::LookAfter(_)
        )
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Perform an effect.
    Perform(Action),
    /// Wait until then, unless something changes.
    Wait {
        /// When to ask again.
        until: Moment,
    },
    /// Nothing is left to do in this run of the agent.
    Finished,
}

/// What an effect brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The effect has no result.
    Done,
    /// Of [`Action::Inspect`].
    Host(HostFacts),
    /// Of [`Action::RunCommand`].
    Command(Option<CommandEnd>),
    /// Of [`Action::Quiesce`].
    InFlight(Vec<InFlight>),
    /// Of [`Action::Preflight`].
    Preflight(Preflight),
    /// Of [`Action::Save`], [`Action::Pause`] and [`Action::Keep`].
    Saved(SaveProgress),
    /// Of [`Action::InspectCheckpoint`].
    Checkpoint(CheckpointFacts),
    /// Of [`Action::Resume`].
    Resumption(Resumption),
    /// Of [`Action::LookAfter`].
    Settling(Settling),
}

/// What a restarted agent makes of a record that it finds, given the host as it is now.
pub fn resume(mut update: Update, host: &HostFacts, now: Moment) -> Update {
    if let Some(trouble) = &mut update.trouble {
        trouble.until = now;
    }
    for session in &mut update.sessions {
        if let Some(trouble) = &mut session.trouble {
            trouble.until = now;
        }
    }
    if update.before.is_some() && update.boot_known() != host.boot_id {
        resuming::rebooted(&mut update, host, now);
    } else {
        match update.step {
            // Leases may have run out while no agent was there: the host is not rebooted on old knowledge.
            Step::Acknowledge | Step::Reboot => verify_again(&mut update),
            Step::Release | Step::Settle | Step::Done => resuming::try_kept_again(&mut update, host, now),
            _ => {}
        }
    }
    update
}

/// Looks at the clock, at what the host is about to do and at whether an abort was asked for, before each
/// step.
pub fn interrupt(mut update: Update, abort: Option<String>, intent: HostIntent, now: Moment) -> Update {
    if update.undo.is_some() || update.step > Step::AwaitReboot {
        return update;
    }
    follow_host(&mut update, intent, now);
    if update.undo.is_some() {
        return update;
    }
    if let Some(why) = abort
        && !update.is_forced()
        && update.step.is_before_reboot()
    {
        begin_undo(&mut update, Verdict::aborted(reasons::ABORTED, why), now);
        return update;
    }
    match update.step {
        Step::RunCommand
            if !update.is_forced()
                && !update.plan.command.is_empty()
                && now.since(update.phase_since()) >= update.plan.command_timeout =>
        {
            let message = "update.command took longer than update.timeout; it was ended";
            begin_undo(&mut update, Verdict::failed(reasons::TIMED_OUT, message), now);
        }
        Step::AwaitReboot => await_reboot(&mut update, now),
        step if step < Step::Acknowledge => saving::watch_the_clock(&mut update, now),
        _ => {}
    }
    update
}

/// What the host does by itself decides how much time there is.
fn follow_host(update: &mut Update, intent: HostIntent, now: Moment) {
    let own_reboot = update.reboot_asked && update.going_down.is_none();
    match intent {
        HostIntent::GoesDown { .. } if own_reboot => {}
        HostIntent::GoesDown { deadline, reason } => {
            let since = update.going_down.as_ref().map_or(now, |going| going.since);
            update.going_down = Some(GoingDown {
                since,
                deadline,
                reason,
            });
            if update.step == Step::RunCommand {
                update.step = Step::Quiesce;
                update.trouble = None;
            }
            // As long as it says so it is not late.
            if update.step == Step::AwaitReboot {
                update.awaiting_since = Some(now);
            }
        }
        HostIntent::StaysUp if update.is_forced() => {
            let called_off = update.going_down.take();
            match update.plan.origin {
                Origin::Host => {
                    let what = called_off.map_or_else(|| "reboot".to_owned(), |going| going.reason);
                    let message = format!("the host has called off its {what}; every guest runs on");
                    begin_undo(update, Verdict::aborted(reasons::REBOOT_CALLED_OFF, message), now);
                }
                Origin::HostUpdate if update.sessions.iter().any(|session| session.given_up) => {
                    let message = "the host began to go down by itself, then stayed up; some sessions were given up meanwhile";
                    begin_undo(update, Verdict::failed(reasons::REBOOT_CALLED_OFF, message), now);
                }
                // It was acknowledged already, but the reboot is ours to ask for again.
                Origin::HostUpdate if update.step == Step::AwaitReboot => verify_again(update),
                Origin::HostUpdate => {}
            }
        }
        HostIntent::StaysUp | HostIntent::Unknown => {}
    }
}

/// A host that does not go down in time lets its guests run on.
fn await_reboot(update: &mut Update, now: Moment) {
    let since = update.awaiting_since.unwrap_or(now);
    if now.since(since) >= update.plan.reboot_timeout {
        let message = "the host did not go down within reboot.timeout; every guest runs on";
        let verdict = Verdict::failed(reasons::REBOOT_TIMED_OUT, message);
        begin_undo(update, verdict, now);
    }
}

/// Steps that are complete, or have nothing to do, lead to the next one.
pub fn advance(mut update: Update, now: Moment) -> Update {
    loop {
        let step = update.step;
        match step {
            Step::RunCommand if update.plan.command.is_empty() => update.step = Step::Quiesce,
            Step::Quiesce => update.quiesced_at = update.quiesced_at.or(Some(now)),
            Step::Reboot => {
                let verified = update.verified_at.map(|verified| now.since(verified));
                if verified.is_none_or(|age| age >= VERIFIED_FOR) {
                    verify_again(&mut update);
                } else {
                    update.reboot_asked = true;
                }
            }
            Step::RegisterKeys | Step::Save | Step::Verify | Step::Cancel | Step::Forget => {
                saving::advance(&mut update, now);
            }
            Step::LogOn | Step::Resume | Step::Settle => resuming::advance(&mut update, now),
            _ => {}
        }
        if update.step == step {
            return update;
        }
        update.look_at = None;
        update.trouble = None;
    }
}

/// What to do with a record that [`advance`] has seen.
pub fn next(update: &Update, now: Moment) -> Decision {
    let own_wait = update.trouble.as_ref().map(|trouble| trouble.until);
    for until in [own_wait, update.look_at].into_iter().flatten() {
        if until.since(now) > 0 {
            return Decision::Wait { until };
        }
    }
    Decision::Perform(match update.step {
        Step::Inspect => Action::Inspect,
        Step::RunCommand => Action::RunCommand,
        Step::Quiesce => Action::Quiesce(Rules {
            is_urgent: update.is_forced(),
            waited: update.quiesced_at.map_or(0, |since| now.since(since)),
        }),
        Step::Preflight => Action::Preflight,
        Step::Acknowledge => Action::Acknowledge,
        Step::Reboot => Action::Reboot,
        Step::EndCommand => Action::EndCommand,
        Step::CallOff => Action::CallOff,
        Step::Release => Action::Release,
        Step::RegisterKeys | Step::Save | Step::Verify | Step::AwaitReboot | Step::Cancel | Step::Forget => {
            return saving::next(update, now);
        }
        Step::LogOn | Step::Resume | Step::Settle => return resuming::next(update, now),
        Step::Done => return Decision::Finished,
    })
}

/// What a record becomes by an effect's result.
pub fn apply(mut update: Update, action: Action, result: Effected<Outcome>, now: Moment) -> Update {
    match action {
        Action::RegisterKey(index)
        | Action::Save(index, _)
        | Action::Pause(index)
        | Action::Keep(index, _)
        | Action::Cancel(index) => saving::apply(&mut update, action, index, result, now),
        Action::InspectCheckpoint(index) if !update.step.is_after_reboot() => {
            saving::apply(&mut update, action, index, result, now);
        }
        Action::InspectCheckpoint(index)
        | Action::ObtainKey(index)
        | Action::Resume(index)
        | Action::LookAfter(index)
        | Action::Destroy(index) => resuming::apply(&mut update, action, index, result, now),
        _ => match result {
            Ok(outcome) => {
                update.trouble = None;
                succeeded(&mut update, action, outcome, now);
            }
            Err(error) => failed(&mut update, action, &error, now),
        },
    }
    update
}

fn succeeded(update: &mut Update, action: Action, outcome: Outcome, now: Moment) {
    match (action, outcome) {
        (Action::Inspect, Outcome::Host(host)) => inspected(update, &host, now),
        (Action::RunCommand, Outcome::Command(Some(end))) => {
            if end.success {
                update.step = Step::Quiesce;
            } else {
                let message = format!(
                    "update.command failed, so the host is not rebooted: {}",
                    end.output
                );
                update.command_output = Some(end.output);
                begin_undo(
                    update,
                    Verdict::failed(reasons::UPDATE_COMMAND_FAILED, message),
                    now,
                );
            }
        }
        // Not yet: asked again.
        (Action::RunCommand, _) => {}
        (Action::Quiesce(rules), Outcome::InFlight(in_flight)) => quiesced(update, &in_flight, rules, now),
        (Action::Preflight, Outcome::Preflight(found)) => saving::preflighted(update, found, now),
        (Action::Acknowledge, _) => {
            if update.is_forced() {
                expect_the_end(update, now);
            } else {
                update.step = Step::Reboot;
            }
        }
        (Action::Reboot, _) => expect_the_end(update, now),
        (Action::EndCommand | Action::CallOff, _) => update.step = Step::Cancel,
        (Action::Release, _) => released(update, now),
        (action, outcome) => {
            let message = format!("{action:?} brought {outcome:?}, which is a defect of the node agent");
            failed(
                update,
                action,
                &EffectError::new(ErrorKind::Refused, message),
                now,
            );
        }
    }
}

fn failed(update: &mut Update, action: Action, error: &EffectError, now: Moment) {
    let lasted = try_again(&mut update.trouble, error, reasons::STEP_FAILED, now);
    let is_hopeless = error.kind != ErrorKind::Retry || lasted >= STEP_PATIENCE;
    let reason = |usual| match error.reason {
        "" => usual,
        reason => reason,
    };
    match action {
        // The host goes down in any case: what can be saved is.
        Action::Inspect | Action::RunCommand | Action::Quiesce(_) | Action::Preflight
            if update.is_forced() => {}
        Action::Inspect | Action::RunCommand | Action::Quiesce(_) if is_hopeless => {
            begin_undo(
                update,
                Verdict::failed(reason(reasons::STEP_FAILED), &*error.message),
                now,
            );
        }
        Action::Preflight if is_hopeless => {
            begin_undo(
                update,
                Verdict::failed(reason(reasons::PREFLIGHT_FAILED), &*error.message),
                now,
            );
        }
        Action::Acknowledge | Action::Reboot if is_hopeless && !update.is_forced() => {
            begin_undo(
                update,
                Verdict::failed(reason(reasons::REBOOT_FAILED), &*error.message),
                now,
            );
        }
        Action::EndCommand if is_hopeless => update.step = Step::Cancel,
        Action::CallOff if error.kind == ErrorKind::Refused => {
            // It goes down: to let guests run now would lose their sessions.
            update.undo = None;
            update.acknowledged = true;
            update.awaiting_since = Some(now);
            update.step = Step::AwaitReboot;
        }
        Action::CallOff if is_hopeless => update.step = Step::Cancel,
        Action::Release if is_hopeless => released(update, now),
        _ => {}
    }
}

/// Notes that something failed, and when it is tried again; returns for how long it has failed already.
pub(super) fn try_again(
    trouble: &mut Option<Trouble>,
    error: &EffectError,
    usual_reason: &str,
    now: Moment,
) -> i64 {
    // Who has waited for an answer has not failed meanwhile.
    let waited = |trouble: &Trouble| trouble.reason == reasons::AWAITING_CREDENTIAL;
    let earlier = (trouble.take()).filter(|trouble| error.kind == ErrorKind::Awaited || !waited(trouble));
    let count = earlier
        .as_ref()
        .map_or(0, |trouble| trouble.count)
        .saturating_add(1);
    let last = match error.kind {
        ErrorKind::Awaited => AWAITED_LOOK,
        _ => LAST_WAIT,
    };
    let wait = FIRST_WAIT
        .saturating_mul(1 << count.min(16).saturating_sub(1))
        .min(last);
    let since = earlier.map_or(now, |trouble| trouble.since);
    *trouble = Some(Trouble {
        since,
        until: now.plus(wait),
        count,
        reason: match (error.kind, error.reason) {
            (ErrorKind::Awaited, _) => reasons::AWAITING_CREDENTIAL.to_owned(),
            (_, "") => usual_reason.to_owned(),
            (_, reason) => reason.to_owned(),
        },
        message: error.message.clone(),
    });
    now.since(since)
}

fn inspected(update: &mut Update, host: &HostFacts, now: Moment) {
    update.before = Some(boot_of(host));
    if update.plan.origin == Origin::HostUpdate
        && let Some(expect) = &update.plan.expect
        && expect.satisfied_by(&host.kernel_release, host.booted_at).is_ok()
    {
        let message = "what spec.expect names holds already; nothing was done";
        update.decide(Verdict::resumed(reasons::ALREADY_SATISFIED, message), now);
        update.step = Step::Done;
        return;
    }
    // The pre-reboot notification: recorded before anything is done because of it.
    update.enter(NodeUpdatePhase::Notified, now);
    update.step = if update.is_forced() {
        Step::Quiesce
    } else {
        Step::RunCommand
    };
}

pub(super) fn boot_of(host: &HostFacts) -> HostBoot {
    HostBoot {
        boot_id: host.boot_id.clone(),
        kernel_release: host.kernel_release.clone(),
    }
}

fn quiesced(update: &mut Update, in_flight: &[InFlight], rules: Rules, now: Moment) {
    // A host in a hurry waits half of its time for a cutover; whose operation is in flight still has its
    // session given up by preflight.
    let no_time = update.going_down.as_ref().is_some_and(|going| {
        let time = going.deadline.since(going.since);
        now.since(going.since) >= time / 2
    });
    if in_flight.is_empty() || no_time {
        update.step = Step::Preflight;
        return;
    }
    let names: Vec<&str> = in_flight.iter().map(|flying| flying.name.as_str()).collect();
    if rules.waited >= QUIESCE_PATIENCE && !update.is_forced() {
        let message = format!(
            "these SeamlessReboots did not come to an end in time: {}",
            names.join(", ")
        );
        begin_undo(update, Verdict::failed(reasons::GUEST_BUSY, message), now);
        return;
    }
    update.look_at = Some(now.plus(QUIESCE_LOOK));
}

/// The reboot was asked for, or the host needs no asking.
fn expect_the_end(update: &mut Update, now: Moment) {
    update.enter(NodeUpdatePhase::Rebooting, now);
    update.awaiting_since = Some(now);
    update.step = Step::AwaitReboot;
}

/// Asks every guest again whether it is saved, before anything is done because of that.
pub(super) fn verify_again(update: &mut Update) {
    for session in &mut update.sessions {
        session.live.is_verified = false;
        session.live.look_at = None;
    }
    update.verified_at = None;
    update.trouble = None;
    update.step = Step::Verify;
}

/// Starts to undo the update: every guest runs on. What was never begun needs no undoing.
pub(super) fn begin_undo(update: &mut Update, verdict: Verdict, now: Moment) {
    update.trouble = None;
    update.look_at = None;
    for session in &mut update.sessions {
        session.live.look_at = None;
        session.trouble = None;
    }
    if update.step == Step::Inspect {
        update.decide(verdict, now);
        update.step = Step::Done;
        return;
    }
    update.undo = Some(verdict);
    update.acknowledged = false;
    update.step = match update.step {
        Step::RunCommand => Step::EndCommand,
        _ if update.reboot_asked => Step::CallOff,
        _ => Step::Cancel,
    };
}

fn released(update: &mut Update, now: Moment) {
    update.trouble = None;
    if update.verdict.is_none() {
        let verdict = update
            .undo
            .clone()
            .unwrap_or_else(|| Verdict::failed(reasons::STEP_FAILED, "it was undone"));
        update.decide(verdict, now);
    }
    update.step = Step::Settle;
}

/// Names of guests, for messages.
pub(super) fn names<'a>(sessions: impl Iterator<Item = &'a Session>) -> String {
    sessions
        .map(|session| session.guest.as_str())
        .collect::<Vec<_>>()
        .join(", ")
}

/// Whether a session's fate is settled: nothing more is done towards resuming or undoing it.
pub(super) fn is_decided(state: SessionState) -> bool {
    matches!(
        state,
        SessionState::RunsOn | SessionState::Resumed | SessionState::Kept | SessionState::Lost
    )
}

#[cfg(test)]
#[path = "machine_test.rs"]
mod tests;
