use understudy_api::host_update::RebootMethod;
use understudy_api::node_update::Origin;
use uuid::Uuid;

use super::super::effects::FoundGuest;
use super::super::plan::Plan;
use super::super::record::{Session, Step};
use super::*;
use crate::moment::Moment;

fn update(state: SessionState) -> Update {
    let plan = Plan {
        origin: Origin::HostUpdate,
        reason: None,
        command: Vec::new(),
        command_timeout: 0,
        expect: None,
        reboot: RebootMethod::Systemd,
        reboot_command: Vec::new(),
        reboot_timeout: 1,
        credential_provider: None,
        save_timeout: 1,
    };
    let mut update = Update::new("u".to_owned(), "kernel-1".to_owned(), plan, Moment::default());
    let mut session = Session::new(FoundGuest {
        guest: "default/web".to_owned(),
        uid: "g".to_owned(),
        incarnation: 1,
        checkpoint: Uuid::nil(),
        priority: 0,
        memory_bytes: 1,
        expected_bytes: 1,
        problem: None,
    });
    session.state = state;
    update.sessions.push(session);
    update
}

#[test]
fn a_guest_with_a_session_on_disk_is_left_alone_and_every_other_one_is_not() {
    use SessionState::*;
    for (state, phase) in [
        (Waiting, None),
        (Saving, Some(GuestPhase::Saving)),
        (Saved, Some(GuestPhase::Saved)),
        (RunsOn, None),
        (Resuming, Some(GuestPhase::Resuming)),
        (Resumed, None),
        (Kept, Some(GuestPhase::Saved)),
        (Lost, None),
    ] {
        let update = update(state);
        assert_eq!(hold(&update, "g").map(|hold| hold.phase), phase, "{state:?}");
        assert_eq!(hold(&update, "another"), None);
    }
}

#[test]
fn a_kept_session_is_told_with_its_reason_and_the_way_out() {
    let mut update = update(SessionState::Kept);
    update.sessions[0].explain("CheckpointDamaged", "chunk 5 is torn");
    let hold = hold(&update, "g").unwrap();
    assert_eq!(hold.reason, "CheckpointDamaged");
    for words in ["chunk 5 is torn", "discard-session default/web", "kernel-1"] {
        assert!(hold.message.contains(words), "{}", hold.message);
    }
}

#[test]
fn guests_rest_from_quiescing_to_the_reboot_and_operations_until_they_are_released() {
    for step in Step::ALL {
        let mut update = update(SessionState::Waiting);
        update.step = step;
        let working = !matches!(step, Step::Inspect | Step::RunCommand | Step::Settle | Step::Done);
        assert_eq!(update.holds_operations(), working, "{step:?}");
        let rest = working && !matches!(step, Step::LogOn | Step::Resume | Step::Release);
        assert_eq!(update.holds_all_guests(), rest, "{step:?}");
    }
}
