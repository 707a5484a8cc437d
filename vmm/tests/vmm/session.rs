//! Saving a running guest and resuming it in another process. The host's boot is a parameter of the
//! requests, so that the tests can pretend another one.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;

use serde_json::{Value, json};
use understudy_vmm_control::api::{Gates, HoldRequest, VmState};
use understudy_vmm_control::client::ClientError;
use understudy_vmm_control::session::{
    CONSUMED, CancelSave, KeepSaved, MANIFEST, PauseForSave, REFUSED_EXIT_CODE, Refusal, SaveInfo,
    SaveRequest, SaveState,
};
use uuid::Uuid;

use crate::common::{Guest, Vmm, have_kvm, wait};
use crate::payload::{self, SECTORS, STRIDE, lines};

const LEASE_MS: u64 = 600_000;

/// A counting guest with two processors.
fn counting() -> (Guest, Value) {
    let guest = Guest::with_kernel(payload::code());
    let mut config = guest.config(1, "Active", "c");
    config["cpus"] = json!(2);
    (guest, config)
}

/// A request that writes into a directory of its own, in boot number `boot`.
pub fn request(guest: &Guest, boot: u32) -> SaveRequest {
    let checkpoint = Uuid::new_v4();
    let directory = guest.path(&format!("checkpoint-{checkpoint}"));
    fs::create_dir(&directory).unwrap();
    let key = guest.path(&format!("key-{checkpoint}"));
    let (high, low) = Uuid::new_v4().as_u64_pair();
    let bytes: Vec<u8> = [high, low, low, high]
        .iter()
        .flat_map(|n| n.to_le_bytes())
        .collect();
    fs::write(&key, bytes).unwrap();
    SaveRequest {
        checkpoint,
        directory,
        key,
        guest_uid: "guest-uid".to_owned(),
        host_boot_id: format!("boot-{boot}"),
        machine_id: "machine".to_owned(),
        target_pause_ms: 100,
        hold: false,
        lease_ms: LEASE_MS,
    }
}

/// The configuration that resumes what `request` has saved, one boot later.
pub fn resuming(config: &Value, request: &SaveRequest) -> Value {
    let mut config = config.clone();
    config["resume"] = json!({
        "checkpoint": request.checkpoint,
        "directory": request.directory,
        "key": request.key,
        "guestUid": request.guest_uid,
        "hostBootId": format!("after-{}", request.host_boot_id),
        "machineId": request.machine_id,
    });
    config
}

fn save(vmm: &Vmm, request: &SaveRequest) -> SaveInfo {
    vmm.client.begin_save(request).unwrap();
    let mut info = None;
    wait("the save ends", || {
        let now = vmm.client.save().unwrap();
        info = Some(now);
        info.as_ref().unwrap().state.has_ended()
    });
    info.unwrap()
}

pub fn saved(vmm: &Vmm, request: &SaveRequest) -> SaveInfo {
    let info = save(vmm, request);
    assert_eq!(info.state, SaveState::Saved, "{:?}", info.error);
    info
}

/// Waits until the guest has printed `more` lines beyond those it has; all are in sequence.
fn counts_on(vmm: &Vmm, more: usize) -> Vec<[u64; 3]> {
    let before = lines(&vmm.console()).len();
    wait("the guest counts on", || {
        lines(&vmm.console()).len() >= before + more
    });
    in_sequence(&vmm.console())
}

/// Every number is there once.
fn in_sequence(console: &str) -> Vec<[u64; 3]> {
    let lines = lines(console);
    for (index, line) in (1..).zip(&lines) {
        assert_eq!(line[0], index * STRIDE, "line {index} of {console}");
    }
    lines
}

/// What a line says was written to the disk before is there, or what came later.
fn disk_is_consistent(guest: &Guest, lines: &[[u64; 3]]) {
    let disk = fs::File::open(guest.path("disk.raw")).unwrap();
    for [number, ..] in lines {
        let mut sector = [0; 8];
        disk.read_exact_at(&mut sector, number / STRIDE % SECTORS * 512)
            .unwrap();
        let found = u64::from_le_bytes(sector);
        assert!(
            found >= *number && (found - number) % (SECTORS * STRIDE) == 0,
            "{number} was written, {found} is there"
        );
    }
}

/// The last line of the log of a process that refuses.
fn refused(guest: &Guest, config: &Value, refusal: Refusal) -> String {
    let mut vmm = guest.start(config);
    assert_eq!(vmm.end().code(), Some(REFUSED_EXIT_CODE), "{}", vmm.stderr());
    let log = vmm.stderr();
    let (found, message) = Refusal::find(&log).unwrap();
    assert_eq!(found, refusal, "{message}");
    assert!(log.trim_end().ends_with(message), "it is the last line");
    message.to_owned()
}

fn status(error: ClientError) -> u16 {
    match error {
        ClientError::Refused { status, .. } => status,
        other => panic!("{other}"),
    }
}

#[test]
fn a_session_that_is_saved_under_load_goes_on_in_another_process_where_it_was() {
    if !have_kvm() {
        return;
    }
    let (guest, config) = counting();
    let mut vmm = guest.start(&config);
    counts_on(&vmm, 20);
    let request = request(&guest, 1);
    let info = saved(&vmm, &request);
    assert_eq!(info.memory_bytes, 32 << 20);
    assert!(info.pause_us.is_some() && info.remaining_bytes == 0 && info.checkpoint_bytes > 0);
    assert!(
        info.written_bytes < info.memory_bytes / 2,
        "pages that were never touched cost nothing: {info:?}"
    );
    assert_eq!(vmm.info().state, VmState::Saved);
    let before = in_sequence(&vmm.console());
    vmm.client.vm("stop").unwrap();
    assert!(vmm.end().success(), "{}", vmm.stderr());

    let again = guest.start(&resuming(&config, &request));
    let resume = again
        .info()
        .resume
        .unwrap_or_else(|| panic!("{}", again.stderr()));
    assert_eq!(resume.checkpoint, request.checkpoint);
    let after = counts_on(&again, 20);
    wait("all memory is there", || {
        again.info().resume.unwrap().pending_bytes == 0
    });
    let (last, first) = (before.last().unwrap(), after[before.len()]);
    assert!(
        first[1] >= last[1] && after.last().unwrap()[1] > first[1],
        "the timer ticks on"
    );
    assert!(
        first[2] >= last[2] && after.last().unwrap()[2] > first[2],
        "the other processor counts on"
    );
    again.client.vm("stop").unwrap();
    disk_is_consistent(&guest, &in_sequence(&again.console()));
}

#[test]
fn fifty_cycles_lose_and_repeat_nothing() {
    if !have_kvm() {
        return;
    }
    let (guest, config) = counting();
    let mut vmm = guest.start(&config);
    for cycle in 0..50 {
        counts_on(&vmm, 3);
        let request = request(&guest, cycle);
        saved(&vmm, &request);
        drop(vmm);
        vmm = guest.start(&resuming(&config, &request));
        assert_eq!(
            vmm.info()
                .resume
                .unwrap_or_else(|| panic!("{}", vmm.stderr()))
                .checkpoint,
            request.checkpoint
        );
        wait("all memory is there", || {
            vmm.info().resume.unwrap().pending_bytes == 0
        });
        fs::remove_dir_all(&request.directory).unwrap();
    }
    let lines = counts_on(&vmm, 3);
    assert!(lines.last().unwrap()[2] > 0, "the other processor runs");
    disk_is_consistent(&guest, &lines);
}

#[test]
fn a_cancelled_save_and_one_whose_lease_runs_out_let_the_guest_run_on_and_are_void() {
    if !have_kvm() {
        return;
    }
    let (guest, config) = counting();
    let vmm = guest.start(&config);
    counts_on(&vmm, 3);
    let session = vmm.info().disks[0].session;
    for (turn, lapses) in [(1, false), (2, true)] {
        let mut request = request(&guest, turn);
        saved(&vmm, &request);
        // A copy of the checkpoint, as a backup may have made one.
        let copy = guest.path(&format!("copy-{turn}"));
        fs::create_dir(&copy).unwrap();
        for entry in fs::read_dir(&request.directory).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
        }
        let checkpoint = request.checkpoint;
        if lapses {
            let keep = KeepSaved {
                checkpoint,
                lease_ms: 1,
            };
            vmm.client.keep_saved(&keep).unwrap();
            wait("the lease runs out", || {
                vmm.client.save().unwrap().state == SaveState::Cancelled
            });
        } else {
            let cancel = CancelSave { checkpoint };
            assert_eq!(
                vmm.client.cancel_save(&cancel).unwrap().state,
                SaveState::Cancelled
            );
            assert_eq!(
                vmm.client.cancel_save(&cancel).unwrap().state,
                SaveState::Cancelled
            );
        }
        assert!(!request.directory.join(MANIFEST).exists());
        assert_eq!(vmm.info().state, VmState::Running);
        assert_eq!(vmm.info().disks[0].session, session + u64::from(turn));
        counts_on(&vmm, 3);
        assert_eq!(
            status(
                vmm.client
                    .keep_saved(&KeepSaved {
                        checkpoint,
                        lease_ms: 1
                    })
                    .unwrap_err()
            ),
            409
        );
        request.directory = copy;
        if lapses {
            drop(vmm);
            refused(&guest, &resuming(&config, &request), Refusal::CheckpointStale);
            return;
        }
    }
}

#[test]
fn a_save_that_holds_lets_the_guest_run_until_it_is_told_to_pause() {
    if !have_kvm() {
        return;
    }
    let (guest, config) = counting();
    let vmm = guest.start(&config);
    counts_on(&vmm, 3);
    let ready = |checkpoint| {
        wait("the save is ready", || {
            let info = vmm.client.save().unwrap();
            assert!(!info.state.has_ended(), "{info:?}");
            info.checkpoint == checkpoint && info.state == SaveState::Ready
        });
    };
    let hold = |boot| SaveRequest {
        hold: true,
        ..request(&guest, boot)
    };
    // Taken back while it holds.
    let first = hold(1);
    let checkpoint = first.checkpoint;
    vmm.client.begin_save(&first).unwrap();
    ready(checkpoint);
    counts_on(&vmm, 3);
    let info = vmm.client.cancel_save(&CancelSave { checkpoint }).unwrap();
    assert_eq!(info.state, SaveState::Cancelled);
    let late = vmm.client.pause_for_save(&PauseForSave { checkpoint }).unwrap();
    assert_eq!(late.state, SaveState::Cancelled, "it is not begun anew");
    // What the guest writes meanwhile is written again, and what it wrote last is in the checkpoint.
    let second = hold(1);
    let checkpoint = second.checkpoint;
    vmm.client.begin_save(&second).unwrap();
    ready(checkpoint);
    let rounds = vmm.client.save().unwrap().rounds;
    wait("rounds go on", || vmm.client.save().unwrap().rounds > rounds);
    counts_on(&vmm, 3);
    assert_eq!(vmm.info().state, VmState::Running);
    vmm.client.pause_for_save(&PauseForSave { checkpoint }).unwrap();
    wait("the guest is saved", || {
        vmm.client.save().unwrap().state == SaveState::Saved
    });
    assert_eq!(vmm.info().state, VmState::Saved);
    let printed = in_sequence(&vmm.console()).len();
    drop(vmm);
    let vmm = guest.start(&resuming(&config, &second));
    counts_on(&vmm, 3);
    assert!(in_sequence(&vmm.console()).len() >= printed + 3);
}

#[test]
fn a_save_that_is_cancelled_while_memory_is_written_leaves_the_guest_alone() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::with_kernel(payload::code());
    let mut config = guest.config(1, "Active", "i100");
    config["memoryMib"] = json!(300);
    let vmm = guest.start(&config);
    wait("the guest has touched its memory", || {
        vmm.console().contains("idle")
    });
    let request = request(&guest, 1);
    vmm.client.begin_save(&request).unwrap();
    let cancel = CancelSave {
        checkpoint: request.checkpoint,
    };
    let info = vmm.client.cancel_save(&cancel).unwrap();
    assert_eq!(info.state, SaveState::Cancelled);
    vmm.makes_progress();
    let other = CancelSave {
        checkpoint: Uuid::new_v4(),
    };
    assert_eq!(status(vmm.client.cancel_save(&other).unwrap_err()), 404);
}

#[test]
fn a_guest_that_is_reset_while_it_is_saved_boots_and_the_save_fails() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::with_kernel(payload::code());
    let mut config = guest.config(1, "Active", "i100");
    config["memoryMib"] = json!(300);
    let vmm = guest.start(&config);
    wait("the guest has touched its memory", || {
        vmm.console().contains("idle")
    });
    let request = request(&guest, 1);
    vmm.client.begin_save(&request).unwrap();
    vmm.client.vm("reset").unwrap();
    let info = save(&vmm, &request);
    assert_eq!(info.state, SaveState::Failed);
    assert!(info.error.as_ref().unwrap().contains("reset"), "{info:?}");
    assert!(!request.directory.join(MANIFEST).exists());
    wait("the guest boots again", || {
        vmm.console().matches("idle").count() == 2
    });
}

#[test]
fn a_save_that_fails_says_why_and_the_guest_runs_on() {
    if !have_kvm() {
        return;
    }
    let (guest, config) = counting();
    let vmm = guest.start(&config);
    counts_on(&vmm, 2);
    assert_eq!(status(vmm.client.save().unwrap_err()), 404);
    type Break = fn(&Guest, &mut SaveRequest);
    let cases: [(&str, Break); 4] = [
        ("key", |_, request| fs::remove_file(&request.key).unwrap()),
        ("32 bytes", |_, request| fs::write(&request.key, "short").unwrap()),
        ("foreign", |_, request| {
            fs::write(request.directory.join("foreign"), "").unwrap()
        }),
        ("nowhere", |guest, request| {
            request.directory = guest.path("nowhere")
        }),
    ];
    for (words, change) in cases {
        let mut request = request(&guest, 1);
        change(&guest, &mut request);
        let info = save(&vmm, &request);
        assert_eq!(info.state, SaveState::Failed);
        let error = info.error.unwrap();
        assert!(error.contains(words), "{words}: {error}");
        assert!(!request.directory.join(MANIFEST).exists());
        counts_on(&vmm, 2);
    }
    // After all of that it can be saved.
    saved(&vmm, &request(&guest, 1));
}

#[test]
fn a_save_on_a_full_disk_fails_and_the_guest_runs_on() {
    if !have_kvm() {
        return;
    }
    let (guest, config) = counting();
    let vmm = guest.start(&config);
    counts_on(&vmm, 2);
    let mut request = request(&guest, 1);
    let full = guest.path("full");
    fs::create_dir(&full).unwrap();
    let mount = |args: &[&str]| Command::new(args[0]).args(&args[1..]).arg(&full).status();
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs"]).is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: a small file system cannot be mounted");
        return;
    }
    request.directory = full.clone();
    let info = save(&vmm, &request);
    // Whatever it was: the mount must not be left behind.
    mount(&["umount", "--lazy"]).unwrap();
    assert_eq!(info.state, SaveState::Failed);
    assert!(info.error.as_ref().unwrap().contains("make room"), "{info:?}");
    counts_on(&vmm, 2);
}

#[test]
fn what_does_not_fit_a_save_is_refused_with_words() {
    if !have_kvm() {
        return;
    }
    let (guest, config) = counting();
    let vmm = guest.start(&config);
    counts_on(&vmm, 2);
    let hold = HoldRequest {
        gates: Gates {
            write: true,
            ..Gates::default()
        },
        lease_ms: 60_000,
    };
    let request = request(&guest, 1);
    vmm.client.hold(&hold).unwrap();
    let error = vmm.client.begin_save(&request).unwrap_err();
    assert!(error.to_string().contains("release"), "{error}");
    assert_eq!(status(error), 409);
    vmm.client.release().unwrap();
    let mut forever = request.clone();
    forever.lease_ms = 0;
    assert_eq!(status(vmm.client.begin_save(&forever).unwrap_err()), 400);

    saved(&vmm, &request);
    assert_eq!(
        vmm.client.begin_save(&request).unwrap().state,
        SaveState::Saved,
        "asked again"
    );
    for error in [
        vmm.client.hold(&hold).unwrap_err(),
        vmm.client.release().unwrap_err(),
        vmm.client.merge("root").unwrap_err(),
        vmm.client.vm("reset").unwrap_err(),
        vmm.client.vm("power-button").unwrap_err(),
    ] {
        assert!(error.to_string().contains("Saved"), "{error}");
        assert_eq!(status(error), 409);
    }
}

#[test]
fn a_checkpoint_that_is_not_the_guests_latest_word_is_refused_and_kept() {
    if !have_kvm() {
        return;
    }
    let (guest, config) = counting();
    let vmm = guest.start(&config);
    counts_on(&vmm, 3);
    let request = request(&guest, 1);
    saved(&vmm, &request);
    drop(vmm);
    let good = resuming(&config, &request);
    let with = |change: &dyn Fn(&mut Value)| {
        let mut config = good.clone();
        change(&mut config);
        config
    };
    let other_key = guest.path("other-key");
    fs::write(&other_key, [7; 32]).unwrap();
    let cases: [(Refusal, Value); 7] = [
        (
            Refusal::CheckpointForeign,
            with(&|c| c["resume"]["guestUid"] = json!("another")),
        ),
        (
            Refusal::CheckpointForeign,
            with(&|c| c["resume"]["checkpoint"] = json!(Uuid::new_v4())),
        ),
        (
            Refusal::CheckpointForeign,
            with(&|c| c["resume"]["machineId"] = json!("another")),
        ),
        (
            Refusal::CheckpointSameBoot,
            with(&|c| c["resume"]["hostBootId"] = json!("boot-1")),
        ),
        (
            Refusal::CheckpointKey,
            with(&|c| c["resume"]["key"] = json!(other_key)),
        ),
        (
            Refusal::CheckpointMissing,
            with(&|c| c["resume"]["directory"] = json!(guest.path("nowhere"))),
        ),
        (Refusal::CheckpointIncompatible, with(&|c| c["cpus"] = json!(1))),
    ];
    for (refusal, config) in cases {
        refused(&guest, &config, refusal);
    }
    for name in [MANIFEST, "index", "changes", "state"] {
        let entry = fs::read_dir(&request.directory).unwrap().find_map(|entry| {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_str().unwrap().to_owned();
            file.starts_with(name).then_some(path)
        });
        let path = entry.unwrap_or_else(|| panic!("no file {name}"));
        let bytes = fs::read(&path).unwrap();
        if bytes.is_empty() {
            // A guest that had no turn in the pause has changed nothing.
            assert_eq!(name, "changes");
            fs::write(&path, [0]).unwrap();
            refused(&guest, &good, Refusal::CheckpointDamaged);
            fs::write(&path, bytes).unwrap();
            continue;
        }
        let mut flipped = bytes.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 1;
        fs::write(&path, flipped).unwrap();
        refused(&guest, &good, Refusal::CheckpointDamaged);
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        refused(&guest, &good, Refusal::CheckpointDamaged);
        fs::write(&path, bytes).unwrap();
    }
    guest.own(2, 1);
    refused(&guest, &good, Refusal::CheckpointStale);
    guest.own(1, 1);

    // None of that has changed anything: it is resumed, once.
    let again = guest.start(&good);
    counts_on(&again, 3);
    assert!(request.directory.join(CONSUMED).exists());
    drop(again);
    refused(&guest, &good, Refusal::CheckpointStale);
    fs::remove_file(request.directory.join(CONSUMED)).unwrap();
    let message = refused(&guest, &good, Refusal::CheckpointStale);
    assert!(message.contains("written since"), "{message}");
}

#[test]
fn a_guest_that_resets_itself_after_it_was_resumed_boots_anew() {
    if !have_kvm() {
        return;
    }
    let (guest, config) = counting();
    let vmm = guest.start(&config);
    counts_on(&vmm, 3);
    let request = request(&guest, 1);
    saved(&vmm, &request);
    drop(vmm);
    let again = guest.start(&resuming(&config, &request));
    again.client.vm("reset").unwrap();
    // Memory of the session would make the new kernel's ring of pages BAD.
    wait("the guest counts from the start", || {
        let console = again.console();
        console.matches("session kernel").count() == 2 && lines(&console).len() > 10
    });
    let info = again.info();
    assert_eq!((info.state, info.resume), (VmState::Running, None));
}

#[test]
fn memory_that_proves_damaged_pauses_the_guest_and_keeps_everything() {
    if !have_kvm() {
        return;
    }
    let (guest, config) = counting();
    let vmm = guest.start(&config);
    counts_on(&vmm, 5);
    let request = request(&guest, 1);
    saved(&vmm, &request);
    drop(vmm);
    // The first page of the guest's ring.
    let memory = fs::File::options()
        .write(true)
        .open(request.directory.join("memory"))
        .unwrap();
    memory.write_all_at(&[0x5a; 16], 0x40_0000).unwrap();
    let mut again = guest.start(&resuming(&config, &request));
    wait("the damage is found", || {
        again.info().resume.unwrap().error.is_some()
    });
    wait("the guest is paused", || again.info().state == VmState::Paused);
    let resume = again.info().resume.unwrap();
    assert!(resume.pending_bytes > 0);
    let error = again.client.release().unwrap_err();
    assert!(error.to_string().contains("damaged"), "{error}");
    assert_eq!(status(error), 409);
    assert!(request.directory.join(MANIFEST).exists());
    in_sequence(&again.console());
    again.client.vm("stop").unwrap();
    again.end();
}

#[test]
fn a_process_that_is_killed_while_it_saves_leaves_a_whole_checkpoint_or_none() {
    if !have_kvm() {
        return;
    }
    let (guest, config) = counting();
    let mut whole = 0;
    for turn in 0..8 {
        let _ = fs::remove_file(guest.path("1-console.log"));
        let vmm = guest.start(&config);
        counts_on(&vmm, 2);
        let request = request(&guest, turn);
        vmm.client.begin_save(&request).unwrap();
        // Somewhere on its way: which point is hit does not matter, all must be good.
        std::thread::sleep(std::time::Duration::from_millis(u64::from(turn * turn) * 4));
        drop(vmm);
        let resume = resuming(&config, &request);
        let mut again = guest.start(&resume);
        if again.client.info().is_ok() {
            whole += 1;
            counts_on(&again, 2);
        } else {
            assert_eq!(again.end().code(), Some(REFUSED_EXIT_CODE), "{}", again.stderr());
            let log = again.stderr();
            assert_eq!(
                Refusal::find(&log).unwrap().0,
                Refusal::CheckpointMissing,
                "{log}"
            );
        }
    }
    eprintln!("{whole} of 8 were whole");
    // And the guest boots from its disk whatever was left.
    let _ = fs::remove_file(guest.path("1-console.log"));
    counts_on(&guest.start(&config), 2);
}
