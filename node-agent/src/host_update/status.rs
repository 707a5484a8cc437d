//! What an update looks like in the status of its NodeUpdate.

use jiff::Timestamp;
use understudy_api::conditions::{self, reasons};
use understudy_api::node_update::{
    GuestSession, Interruption, NodeUpdateProgress, NodeUpdateResult, NodeUpdateStatus, NodeUpdateTransition,
    SessionState,
};
use understudy_api::{NodeUpdatePhase, Time};

use super::record::{Session, Step, Update};
use crate::moment::Moment;

/// Writes an update into a status. Conditions keep their transition times.
pub fn update(status: &mut NodeUpdateStatus, update: &Update, generation: i64, now: Moment) {
    let phase = update.phase();
    let (reason, message) = explain(update);
    status.observed_generation = generation;
    status.phase = Some(phase);
    status.phase_transitions = update
        .transitions
        .iter()
        .map(|transition| NodeUpdateTransition {
            phase: transition.phase,
            transition_time: Time(time(transition.at)),
        })
        .collect();
    status.progress = (!phase.is_terminal()).then(|| progress(update));
    status.result = update.before.is_some().then(|| result(update));
    conditions::set_for_phase(
        &mut status.conditions,
        generation,
        time(now),
        phase,
        &reason,
        &message,
    );
    status.reason = Some(reason);
    status.message = Some(message);
}

/// Reason and message.
fn explain(update: &Update) -> (String, String) {
    if let Some(verdict) = &update.verdict {
        return (verdict.reason.clone(), verdict.message.clone());
    }
    if let Some(undo) = &update.undo {
        return (undo.reason.clone(), format!("being undone: {}", undo.message));
    }
    let of_sessions = update.sessions.iter().map(|session| {
        let guest = session.guest.as_str();
        session.trouble.as_ref().map(|trouble| (Some(guest), trouble))
    });
    let own = update.trouble.as_ref().map(|trouble| (None, trouble));
    if let Some((guest, trouble)) = of_sessions.chain([own]).flatten().next() {
        if trouble.reason == reasons::AWAITING_CREDENTIAL {
            return (trouble.reason.clone(), trouble.message.clone());
        }
        let times = trouble.count;
        let whose = guest.map(|guest| format!("{guest}: ")).unwrap_or_default();
        return (
            trouble.reason.clone(),
            format!("{whose}{} (tried {times} times, trying again)", trouble.message),
        );
    }
    let reason = match update.phase() {
        NodeUpdatePhase::Pending => reasons::PENDING,
        _ => reasons::IN_PROGRESS,
    };
    (reason.to_owned(), what(update))
}

/// What is being done, for people.
fn what(update: &Update) -> String {
    let all = update.sessions.len();
    let count = |states: &[SessionState]| {
        update
            .sessions
            .iter()
            .filter(|session| states.contains(&session.state))
            .count()
    };
    let text = match update.step {
        Step::Inspect => "looking at the host",
        Step::RunCommand => "update.command runs on the host; guests serve",
        Step::Quiesce => "waiting for operations on guests; guests serve",
        Step::Preflight => "checking what saving needs; guests serve",
        Step::RegisterKeys => "registering keys with the credential provider; guests serve",
        Step::Save => {
            let saved = count(&[SessionState::Saved]);
            return format!("saving sessions: {saved} of {all} saved");
        }
        Step::Verify | Step::Acknowledge => "every session is saved; acknowledging",
        Step::Reboot => "asking for the reboot",
        Step::AwaitReboot => "the host goes down; sessions are saved",
        Step::EndCommand => "ending update.command",
        Step::CallOff => "calling off the reboot",
        Step::Cancel => "letting guests run on",
        Step::Forget => "removing checkpoints and keys; guests serve",
        Step::LogOn => "obtaining keys from the credential provider",
        Step::Resume => {
            let resumed = count(&[SessionState::Resumed]);
            return format!("resuming sessions: {resumed} of {all} go on");
        }
        Step::Release => "operations on guests may begin again",
        Step::Settle => "removing checkpoints and keys once guests have run for a while",
        Step::Done => "finished",
    };
    text.to_owned()
}

/// Progress within the phase.
fn progress(update: &Update) -> NodeUpdateProgress {
    let saving = matches!(update.step, Step::Save | Step::Verify);
    let sum = |of: fn(&Session) -> u64| {
        let sum = update.sessions.iter().map(of).fold(0, u64::saturating_add);
        clamp(sum)
    };
    let expected = sum(|session| session.expected_bytes);
    let left = sum(left);
    NodeUpdateProgress {
        message: what(update),
        percent: (saving && expected > 0)
            .then(|| i32::try_from((expected - left).max(0).saturating_mul(100) / expected).unwrap_or(100)),
        written_bytes: saving.then(|| sum(|session| session.live.written_bytes)),
        remaining_bytes: saving.then_some(left),
    }
}

/// Bytes that a session's save has left, as far as is known.
fn left(session: &Session) -> u64 {
    match session.state {
        SessionState::Waiting => session.expected_bytes,
        SessionState::Saving if session.live.written_bytes == 0 => session.expected_bytes,
        SessionState::Saving => session.live.remaining_bytes.min(session.expected_bytes),
        _ => 0,
    }
}

fn result(update: &Update) -> NodeUpdateResult {
    let resumed = |session: &&Session| session.state == SessionState::Resumed;
    NodeUpdateResult {
        before: update.before.clone(),
        after: update.after.clone(),
        command_output: update.command_output.clone(),
        sessions: clamp(update.sessions.len() as u64),
        resumed: clamp(update.sessions.iter().filter(resumed).count() as u64),
        guests: update
            .sessions
            .iter()
            .map(|session| guest_session(update, session))
            .collect(),
    }
}

fn guest_session(update: &Update, session: &Session) -> GuestSession {
    let (namespace, name) = session.guest.split_once('/').unwrap_or(("", &session.guest));
    GuestSession {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        state: session.state,
        reason: session.reason.clone(),
        message: session.message.clone(),
        checkpoint: session.checkpoint.to_string(),
        memory_bytes: clamp(session.memory_bytes),
        written_bytes: clamp(session.written_bytes()),
        saved_bytes: session.saved_at.map(|_| clamp(session.checkpoint_bytes)),
        rounds: i64::from(session.rounds),
        interruption: interruption(update, session),
    }
}

/// How long a resumed guest did not run. Parts of different boots are compared by the clock of people: the
/// other one began anew.
fn interruption(update: &Update, session: &Session) -> Option<Interruption> {
    let paused = session.paused_at?.unix_us;
    let saved = session.saved_at?.unix_us;
    let began = session.resume_began?.unix_us;
    let first = session.first_instruction?.unix_us;
    let (booted, agent) = (update.after_booted_at, update.after_agent_at);
    let millis = |from: i64, to: i64| ((to - from) / 1000).max(0);
    Some(Interruption {
        total_milliseconds: millis(paused, first),
        pause_milliseconds: millis(paused, saved),
        shutdown_milliseconds: millis(saved, booted),
        host_boot_milliseconds: millis(booted, agent),
        // A retry, or an agent that was restarted, may have come in between.
        agent_start_milliseconds: millis(agent, began),
        resume_milliseconds: millis(began, first),
    })
}

fn clamp(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn time(moment: Moment) -> Timestamp {
    Timestamp::from_microsecond(moment.unix_us).unwrap_or(Timestamp::UNIX_EPOCH)
}
