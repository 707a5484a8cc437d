//! What must hold at the end of a run.

use understudy_api::NodeUpdatePhase;
use understudy_api::conditions::reasons;
use understudy_api::node_update::SessionState;

use super::super::record::{Session, Update};
use super::scenario::Scenario;
use super::world::*;

pub fn judge(scenario: &Scenario, world: &World, update: &Update) {
    let verdict = update.verdict.as_ref().expect("an end without a verdict");
    assert_eq!(update.phase(), verdict.phase);
    for pair in update.transitions.windows(2) {
        assert!(
            pair[0].phase.may_become(pair[1].phase),
            "{} → {}",
            pair[0].phase,
            pair[1].phase
        );
    }
    for (index, guest) in world.guests.iter().enumerate() {
        let session = update.sessions.iter().find(|session| session.uid == guest.uid);
        if world.boot == 1 {
            has_not_rebooted(index, guest, session);
        } else {
            has_rebooted(scenario, world, index, guest, session, update);
        }
        if let Some(session) = session.filter(|session| session.state == SessionState::Kept) {
            assert!(
                guest.vms.is_empty(),
                "guest {index} runs although its session is kept"
            );
            assert!(session.reason.is_some() && session.message.is_some());
        }
    }
    let all_resumed = update
        .sessions
        .iter()
        .all(|session| session.state == SessionState::Resumed);
    if verdict.phase == NodeUpdatePhase::Resumed {
        assert!(world.boot > 1, "it succeeded without a reboot");
        assert!(all_resumed, "it succeeded and sessions do not go on: {verdict:?}");
    }
    nothing_is_left(scenario, world, update);
    in_order(world);
    let mut boots: Vec<u32> = world.operator.releases.iter().map(|(boot, _)| *boot).collect();
    boots.dedup();
    assert_eq!(
        boots.len(),
        world.operator.releases.len(),
        "the credential was released twice in one boot"
    );
    let untouched = scenario.crash_at.is_empty()
        && scenario.faults.is_empty()
        && scenario.trouble == 0
        && scenario.save_fates.is_empty()
        && scenario.resume_fates.is_empty()
        && scenario.reboot_fate == RebootFate::Comes
        && scenario.command_fate == CommandFate::Good
        && scenario.operations.is_empty()
        && !scenario.provider_missing;
    if untouched && !scenario.slow_reboots && scenario.waits >= 30 * SECOND {
        assert_eq!(
            verdict.phase,
            NodeUpdatePhase::Resumed,
            "it failed without a reason: {verdict:?}"
        );
        assert_eq!(verdict.reason, reasons::SESSIONS_RESUMED);
    }
}

/// A failed or aborted update has cost no guest anything.
fn has_not_rebooted(index: usize, guest: &Guest, session: Option<&Session>) {
    if session.is_some_and(|session| session.state == SessionState::Kept) {
        assert!(
            guest.has_died && guest.good_checkpoint().is_some(),
            "guest {index} was kept, and nothing had happened to it"
        );
        return;
    }
    let [vm] = guest.vms.as_slice() else {
        panic!("guest {index} does not run");
    };
    assert!(!vm.is_paused(), "guest {index} is paused");
    let same = vm.life == u64::try_from(index).unwrap() + 1;
    assert!(same || guest.has_died, "guest {index} was booted anew");
}

/// What was saved goes on, or is kept with its reason.
fn has_rebooted(
    scenario: &Scenario,
    world: &World,
    index: usize,
    guest: &Guest,
    session: Option<&Session>,
    update: &Update,
) {
    let state = session.map(|session| session.state);
    let reason = session
        .and_then(|session| session.reason.as_deref())
        .unwrap_or_default();
    let told = format!("guest {index} is {state:?} ({reason}), {:?}", update.verdict);
    let Some((life, progress)) = guest.saved_at_death else {
        // There was nothing to go on from; it runs as it would after any loss of power.
        if state == Some(SessionState::Kept) {
            assert!(update.acknowledged, "{told}: there is nothing to keep");
        } else {
            assert_eq!(guest.vms.len(), 1, "{told}: it does not run");
        }
        return;
    };
    let goes_on = || {
        let [vm] = guest.vms.as_slice() else {
            panic!("{told}: it does not run");
        };
        assert!(
            vm.life == life && vm.progress > progress,
            "{told}: it is another session"
        );
    };
    match guest.resume_fate {
        ResumeFate::Good if state == Some(SessionState::Kept) => {
            // An operator that is away is waited for.
            let unavailable = !scenario.operator || scenario.trouble > 0;
            let excuses = [reasons::STEP_FAILED, reasons::CREDENTIAL_UNAVAILABLE];
            let excuses = &excuses[..1 + usize::from(unavailable)];
            let trouble = scenario.trouble > 0 || !scenario.faults.is_empty();
            assert!(trouble && excuses.contains(&reason), "{told}: it could go on");
            assert!(
                guest.good_checkpoint().is_some(),
                "{told}: its checkpoint is gone"
            );
        }
        ResumeFate::Good => {
            // What befell it after that is its own.
            if guest.died_in == world.boot {
                assert!(
                    matches!(state, Some(SessionState::Resumed | SessionState::Lost)),
                    "{told}"
                );
            } else {
                assert_eq!(state, Some(SessionState::Resumed), "{told}");
                goes_on();
            }
        }
        ResumeFate::Refused(_) | ResumeFate::NoKey => {
            assert_eq!(state, Some(SessionState::Kept), "{told}");
            assert!(
                guest.good_checkpoint().is_some(),
                "{told}: its checkpoint is gone"
            );
        }
        ResumeFate::Removed => {
            let expected = if guest.promised {
                SessionState::Kept
            } else {
                SessionState::Lost
            };
            let undone = update.undo.is_some();
            assert!(state == Some(expected) || undone, "{told}");
        }
        ResumeFate::Dies => {
            let unlucky = state == Some(SessionState::Kept) && !reason.is_empty();
            assert!(state == Some(SessionState::Lost) || unlucky, "{told}");
        }
    }
    let died_since = guest.resume_fate == ResumeFate::Dies || guest.died_in == world.boot;
    if guest.promised && !died_since && update.undo.is_none() {
        assert_ne!(state, Some(SessionState::Lost), "{told}: it was acknowledged");
    }
}

/// Keys and checkpoints are gone, but those that are kept.
fn nothing_is_left(scenario: &Scenario, world: &World, update: &Update) {
    if scenario.trouble > 0 {
        return;
    }
    for session in &update.sessions {
        if session.state == SessionState::Kept {
            continue;
        }
        let guest = world
            .guests
            .iter()
            .find(|guest| guest.uid == session.uid)
            .unwrap();
        assert!(
            !guest.checkpoints.contains_key(&session.checkpoint),
            "a checkpoint of {} is left behind",
            session.guest
        );
        assert!(
            !world.provider.contains_key(&session.checkpoint),
            "a key of {} is left behind",
            session.guest
        );
    }
}

/// The order of the patent's claims, as far as the run came.
fn in_order(world: &World) {
    let trace = world.shared.trace.borrow();
    let first = |event| trace.iter().position(|there| *there == event);
    for (earlier, later) in [
        (Event::NotificationRecorded, Event::KeyRegistered),
        (Event::KeyRegistered, Event::GuestPaused),
        (Event::GuestPaused, Event::Saved),
        (Event::NotificationRecorded, Event::AcknowledgementRecorded),
        (Event::AcknowledgementRecorded, Event::Acknowledged),
        (Event::Acknowledged, Event::RebootAsked),
        (Event::HostWentDown, Event::KeyObtained),
        (Event::KeyObtained, Event::Resumed),
        (Event::Saved, Event::Resumed),
    ] {
        if let Some(later_at) = first(later) {
            assert!(
                first(earlier).is_some_and(|at| at < later_at),
                "{later:?} came before {earlier:?}"
            );
        }
    }
}
