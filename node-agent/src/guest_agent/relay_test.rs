use std::thread;

use understudy_channel::{Meta, Refusal};

use super::*;

fn file(path: &str) -> Transfer {
    Transfer::Entry(Box::new(
        serde_json::from_value(serde_json::json!({
            "path": path.as_bytes(),
            "node": {"File": {"meta": serde_json::to_value(Meta::default()).unwrap(), "size": 5, "whole": true}},
        }))
        .unwrap(),
    ))
}

fn data(offset: u64, length: usize) -> Transfer {
    Transfer::Data {
        offset,
        bytes: vec![7; length],
    }
}

fn end(entries: u64, bytes: u64) -> Transfer {
    Transfer::RoundEnd(RoundEnd {
        round: 1,
        entries,
        bytes,
        ..RoundEnd::default()
    })
}

/// Sends `round` as the guest; answers as a clone that counts.
fn run(round: Vec<Transfer>, deadline: Option<Instant>) -> (Result<Relayed, RelayError>, Vec<Transfer>) {
    let (guest, ours) = UnixStream::pair().unwrap();
    let (clone, theirs) = UnixStream::pair().unwrap();
    let sender = thread::spawn(move || {
        for transfer in &round {
            if write_frame(&mut &guest, transfer).is_err() {
                break;
            }
        }
        guest
    });
    let receiver = thread::spawn(move || {
        let mut got = Vec::new();
        while let Ok(transfer) = read_frame::<Transfer>(&mut &clone) {
            let last = matches!(transfer, Transfer::RoundEnd(_));
            got.push(transfer);
            if last {
                let applied = Applied {
                    round: 1,
                    ..Applied::default()
                };
                write_frame(&mut &clone, &Imported::Applied(applied)).unwrap();
            }
        }
        got
    });
    let result = relay(&ours, &theirs, deadline, |_, _| {});
    drop((ours, theirs));
    drop(sender.join().unwrap());
    (result, receiver.join().unwrap())
}

#[test]
fn a_round_arrives_as_it_was_sent() {
    let round = vec![file("/etc/motd"), data(0, 5), Transfer::EntryEnd, end(1, 5)];
    let (result, got) = run(round.clone(), None);
    assert_eq!(result.unwrap().end.bytes, 5);
    assert_eq!(got, round);
}

#[test]
fn what_is_out_of_bounds_or_order_never_reaches_the_clone() {
    let bad = [
        vec![data(0, 5)],
        vec![file("relative")],
        vec![file("/a/../../etc/shadow")],
        vec![file("/nul\0")],
        vec![file(&format!("/{}", "x".repeat(MAX_PATH)))],
        vec![file("/a"), data(0, MAX_DATA + 1)],
        vec![file("/a"), data(u64::MAX - 2, 5)],
        vec![file("/a"), file("/b")],
        vec![Transfer::EntryEnd],
        vec![file("/a"), end(1, 0)],
        vec![file("/a"), data(0, 5), Transfer::EntryEnd, end(2, 5)],
    ];
    for round in bad {
        let last = round.last().cloned().unwrap();
        let (result, got) = run(round, None);
        assert!(
            matches!(result, Err(RelayError::Protocol(_))),
            "{last:?}: {result:?}"
        );
        assert!(!got.contains(&last), "{last:?} was let through");
    }
}

#[test]
fn a_guest_that_falls_silent_ends_the_round_at_its_deadline() {
    let deadline = Instant::now() + Duration::from_millis(200);
    let (result, _) = run(vec![file("/a")], Some(deadline));
    assert!(matches!(result, Err(RelayError::Deadline)), "{result:?}");
}

#[test]
fn a_guest_that_cannot_go_on_is_quoted_and_the_clone_is_told() {
    let failed = Transfer::Failed(Refusal {
        reason: "the filter lost events".into(),
    });
    let (result, got) = run(vec![failed.clone()], None);
    assert!(result.unwrap_err().to_string().contains("the filter lost events"));
    assert_eq!(got, [failed]);
}
