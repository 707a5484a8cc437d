//! Single runs that a reader can follow.

use understudy_api::NodeUpdatePhase;
use understudy_api::conditions::reasons;
use understudy_api::node_update::{NodeUpdateStatus, SessionState};
use understudy_vmm_control::session::Refusal;

use super::super::status;
use super::agent::{NEW_KERNEL, OLD_KERNEL, moment};
use super::scenario::{Ended, Scenario, play};
use super::world::*;

fn phases(ended: &Ended) -> Vec<NodeUpdatePhase> {
    ended.update.transitions.iter().map(|there| there.phase).collect()
}

fn shown(ended: &Ended) -> NodeUpdateStatus {
    let mut shown = NodeUpdateStatus::default();
    let now = moment(ended.world.now, ended.world.booted_at);
    status::update(&mut shown, &ended.update, 1, now);
    shown
}

fn states(ended: &Ended) -> Vec<SessionState> {
    ended
        .update
        .sessions
        .iter()
        .map(|session| session.state)
        .collect()
}

#[test]
fn the_order_of_the_patents_claims_is_kept() {
    let ended = play(&Scenario::quiet(1));
    assert_eq!(
        ended.verdict.phase,
        NodeUpdatePhase::Resumed,
        "{:?}",
        ended.verdict
    );
    let order = [
        // Claim 1: the pre-reboot notification.
        Event::NotificationRecorded,
        // The credential provider is registered before the reboot.
        Event::KeyRegistered,
        // The state of the session is saved.
        Event::GuestPaused,
        Event::Saved,
        // It is acknowledged when the save is complete, and the host reboots in response.
        Event::AcknowledgementRecorded,
        Event::Acknowledged,
        Event::RebootAsked,
        Event::HostWentDown,
        // Logon with the credential provider, post-reboot notification, the session resumes.
        Event::KeyObtained,
        Event::PostRebootRecorded,
        Event::Resumed,
    ];
    let at: Vec<usize> = order.iter().map(|event| ended.at(*event).unwrap()).collect();
    assert!(at.is_sorted(), "{:?}", ended.trace);
    assert_eq!(
        phases(&ended),
        [
            NodeUpdatePhase::Pending,
            NodeUpdatePhase::Notified,
            NodeUpdatePhase::Saving,
            NodeUpdatePhase::Acknowledged,
            NodeUpdatePhase::Rebooting,
            NodeUpdatePhase::LoggingOn,
            NodeUpdatePhase::Resuming,
            NodeUpdatePhase::Resumed
        ]
    );
    // Every guest was saved before the acknowledgement.
    let last_save = ended.trace.iter().rposition(|event| *event == Event::Saved);
    assert!(last_save < ended.at(Event::AcknowledgementRecorded));
}

#[test]
fn a_reboot_that_the_host_begins_goes_the_same_way_without_being_asked_for() {
    let ended = play(&Scenario::forced(2));
    assert_eq!(
        ended.verdict.phase,
        NodeUpdatePhase::Resumed,
        "{:?}",
        ended.verdict
    );
    assert_eq!(ended.at(Event::RebootAsked), None);
    assert!(ended.at(Event::Acknowledged) < ended.at(Event::HostWentDown));
    assert_eq!(phases(&ended).len(), 8);
}

#[test]
fn the_result_tells_what_was_measured() {
    let ended = play(&Scenario::quiet(2));
    let result = shown(&ended).result.unwrap();
    let (before, after) = (result.before.unwrap(), result.after.unwrap());
    assert_eq!(
        (before.kernel_release.as_str(), after.kernel_release.as_str()),
        (OLD_KERNEL, NEW_KERNEL)
    );
    assert_ne!(before.boot_id, after.boot_id);
    assert_eq!(result.sessions, result.resumed);
    for guest in &result.guests {
        assert!(guest.memory_bytes > 0 && guest.saved_bytes > Some(0) && guest.rounds > 0);
        assert_eq!(guest.written_bytes, guest.memory_bytes);
        let split = guest.interruption.unwrap();
        let parts = split.pause_milliseconds
            + split.shutdown_milliseconds
            + split.host_boot_milliseconds
            + split.agent_start_milliseconds
            + split.resume_milliseconds;
        assert!((split.total_milliseconds - parts).abs() <= 5, "{split:?}");
        assert!(split.shutdown_milliseconds >= 2000, "{split:?}");
    }
}

#[test]
fn no_guest_waits_for_the_save_of_another() {
    for seed in 0..40 {
        let ended = play(&Scenario::quiet(seed));
        let guests = shown(&ended).result.unwrap().guests;
        let from_pause_to_reboot = guests.iter().map(|guest| {
            let split = guest.interruption.unwrap();
            split.pause_milliseconds + split.shutdown_milliseconds
        });
        let (least, most) = (from_pause_to_reboot.clone().min(), from_pause_to_reboot.max());
        assert!(
            most.unwrap_or(0) - least.unwrap_or(0) < 1500,
            "seed {seed}: {guests:?}"
        );
    }
}

#[test]
fn a_save_that_fails_names_the_guest_and_lets_every_guest_run_on() {
    let mut scenario = Scenario::quiet(4);
    scenario.save_fates = vec![SaveFate::Fails];
    let ended = play(&scenario);
    assert_eq!(ended.verdict.phase, NodeUpdatePhase::Failed);
    assert_eq!(ended.verdict.reason, reasons::SAVE_FAILED);
    let message = &ended.verdict.message;
    assert!(
        message.contains("default/guest-0") && message.contains("no space left"),
        "{message}"
    );
    assert_eq!(ended.at(Event::RebootAsked), None);
    assert!(states(&ended).iter().all(|state| *state == SessionState::RunsOn));
}

#[test]
fn a_missing_provider_is_told_before_any_guest_is_paused() {
    let mut scenario = Scenario::quiet(4);
    scenario.provider_missing = true;
    let ended = play(&scenario);
    assert_eq!(ended.verdict.reason, reasons::CREDENTIAL_UNAVAILABLE);
    assert_eq!(ended.at(Event::GuestPaused), None);
    assert_eq!(ended.at(Event::RebootAsked), None);
}

#[test]
fn an_operator_that_is_away_when_the_host_is_back_is_waited_for_however_long() {
    for seed in 0..10 {
        let mut scenario = Scenario::kept_by_operator(seed);
        let hours = 3 * 3600 * SECOND;
        scenario.faults = vec![
            (0, Fault::ProviderSilent(true)),
            (hours, Fault::ProviderSilent(false)),
        ];
        let ended = play(&scenario);
        assert_eq!(
            ended.verdict.phase,
            NodeUpdatePhase::Resumed,
            "{:?}",
            ended.verdict
        );
        assert!(ended.world.now > hours);
        assert_eq!(ended.world.operator.releases.len(), 1);
    }
}

#[test]
fn a_host_that_does_not_go_down_lets_its_guests_run_on() {
    for fate in [RebootFate::Never, RebootFate::Refused] {
        let mut scenario = Scenario::quiet(5);
        scenario.reboot_fate = fate;
        let ended = play(&scenario);
        assert_eq!(ended.verdict.phase, NodeUpdatePhase::Failed);
        let reason = match fate {
            RebootFate::Never => reasons::REBOOT_TIMED_OUT,
            _ => reasons::REBOOT_FAILED,
        };
        assert_eq!(ended.verdict.reason, reason);
    }
}

#[test]
fn a_refused_checkpoint_is_kept_and_named_and_the_others_go_on() {
    let mut seen = 0;
    for seed in 0..20 {
        let mut scenario = Scenario::quiet(seed);
        scenario.resume_fates = vec![ResumeFate::Refused(Refusal::CheckpointDamaged)];
        let ended = play(&scenario);
        assert_eq!(ended.verdict.phase, NodeUpdatePhase::Failed);
        assert_eq!(ended.verdict.reason, reasons::SESSION_REFUSED);
        assert!(
            ended.verdict.message.contains("default/guest-0")
                && ended.verdict.message.contains("CheckpointDamaged"),
            "{}",
            ended.verdict.message
        );
        let states = states(&ended);
        assert_eq!(states[0], SessionState::Kept);
        assert!(states[1..].iter().all(|state| *state == SessionState::Resumed));
        assert!(!ended.update.is_over(), "the record of a kept session is kept");
        seen += states.len();
    }
    assert!(seen > 20);
}

#[test]
fn a_host_in_a_hurry_loses_what_it_does_not_wait_for_and_says_so() {
    let mut scenario = Scenario::forced(6);
    scenario.save_fates = vec![SaveFate::Never];
    let ended = play(&scenario);
    assert_eq!(ended.verdict.phase, NodeUpdatePhase::Failed);
    assert_eq!(ended.verdict.reason, reasons::SESSION_LOST);
    let states = states(&ended);
    assert_eq!(states[0], SessionState::Lost);
    assert!(states[1..].iter().all(|state| *state == SessionState::Resumed));
    assert!(
        ended.verdict.message.contains("did not wait"),
        "{}",
        ended.verdict.message
    );
}

#[test]
fn a_reboot_that_the_host_calls_off_lets_its_guests_run_on() {
    let mut scenario = Scenario::forced(7);
    scenario.faults = vec![(2 * SECOND, Fault::HostCallsOff)];
    let ended = play(&scenario);
    assert_eq!(ended.verdict.phase, NodeUpdatePhase::Aborted);
    assert_eq!(ended.verdict.reason, reasons::REBOOT_CALLED_OFF);
}

#[test]
fn power_that_is_lost_while_saving_costs_only_what_was_not_saved() {
    let (mut resumed, mut lost) = (0, 0);
    for seed in 0..150 {
        let mut scenario = Scenario::quiet(seed);
        let at = 4 * SECOND + i64::try_from(seed).unwrap() * 40 * MS;
        scenario.faults = vec![(at, Fault::PowerLost)];
        let ended = play(&scenario);
        for state in states(&ended) {
            match state {
                SessionState::Resumed => resumed += 1,
                SessionState::Lost => lost += 1,
                state => panic!("{state:?}"),
            }
        }
    }
    assert!(resumed > 20 && lost > 20, "{resumed} resumed, {lost} lost");
}
