use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use understudy_vmm_control::session::{CONSUMED, MANIFEST, Refusal, SaveRequest, SaveState};

use super::*;
use crate::testing::{Bed, FakeVmm};

const LEASE: Duration = Duration::from_secs(60);

/// A VMM that saves: what it was asked, and how far it says it is.
#[derive(Clone, Default)]
struct Saving {
    request: Arc<Mutex<Option<SaveRequest>>>,
    state: Arc<Mutex<Option<SaveState>>>,
    key: Arc<Mutex<Vec<u8>>>,
}

impl Saving {
    fn serve(&self, socket: &std::path::Path) -> FakeVmm {
        let saving = self.clone();
        FakeVmm::serve(socket, move |what, body| {
            if what == "PUT /v1/save" {
                let request: SaveRequest = serde_json::from_value(body).unwrap();
                *saving.key.lock().unwrap() = fs::read(&request.key).unwrap();
                *saving.request.lock().unwrap() = Some(request);
                saving.state.lock().unwrap().get_or_insert(SaveState::PreCopying);
            }
            if what == "PUT /v1/save/cancel" {
                let request = saving.request.lock().unwrap();
                let _ = fs::remove_file(request.as_ref().unwrap().directory.join(MANIFEST));
                *saving.state.lock().unwrap() = Some(SaveState::Cancelled);
            }
            if what == "GET /v1/vm" {
                return (200, FakeVmm::info(json!({})));
            }
            let Some(state) = *saving.state.lock().unwrap() else {
                return (404, json!({"error": "no save was asked for"}));
            };
            let request = saving.request.lock().unwrap();
            let written = if state == SaveState::PreCopying {
                0
            } else {
                1 << 20
            };
            (
                200,
                json!({
                    "checkpoint": request.as_ref().unwrap().checkpoint, "state": state, "rounds": 2,
                    "memoryBytes": 64 << 20, "writtenBytes": written, "remainingBytes": 0,
                    "checkpointBytes": 4096, "pauseUs": 1000, "error": null,
                }),
            )
        })
    }

    fn set(&self, state: SaveState) {
        *self.state.lock().unwrap() = Some(state);
    }
}

#[test]
fn a_save_has_a_registered_key_that_leaves_the_run_directory_once_the_vmm_has_it() {
    let bed = Bed::new("#!/bin/sh\nexit 1\n");
    let node = &bed.node;
    let (guest, instance) = bed.running_guest();
    let saving = Saving::default();
    let vmm = saving.serve(&instance.control);
    let (uid, checkpoint) = (guest.metadata.uid.clone().unwrap(), Uuid::new_v4());

    register_key(node, &guest, checkpoint, "kernel-1", None).unwrap();
    assert!(node.sessions.credentials.is_registered(checkpoint));
    let info = save(node, &uid, checkpoint, LEASE).unwrap();
    assert_eq!(info.state, SaveState::PreCopying);
    let request = saving.request.lock().unwrap().clone().unwrap();
    assert_eq!(request.guest_uid, uid);
    assert_eq!(request.host_boot_id, node.sessions.boot_id());
    assert_eq!(request.machine_id, node.sessions.machine_id());
    assert!(request.directory.is_dir());
    assert_eq!(saving.key.lock().unwrap().len(), 32);
    let other_boot = |boot| {
        let sessions = &node.sessions;
        sessions
            .credentials
            .log_on(checkpoint, &uid, sessions.machine_id(), boot)
    };
    let key = other_boot("the next boot").unwrap();
    assert_eq!(key.bytes().as_slice(), saving.key.lock().unwrap().as_slice());

    // Asked again it is not begun again.
    save(node, &uid, checkpoint, LEASE).unwrap();
    let begun = || {
        let asked = vmm.asked.lock().unwrap();
        asked.iter().filter(|what| *what == "PUT /v1/save").count()
    };
    assert_eq!(begun(), 1);
    assert!(
        node.sessions.keys.has(checkpoint),
        "the VMM may not have read it yet"
    );
    saving.set(SaveState::Saved);
    assert_eq!(save(node, &uid, checkpoint, LEASE).unwrap().rounds, 2);
    assert!(!node.sessions.keys.has(checkpoint));
    assert_eq!(
        keep(node, &uid, checkpoint, LEASE).unwrap().state,
        SaveState::Saved
    );
    assert_eq!(begun(), 1);
}

#[test]
fn a_save_that_was_taken_back_is_void_and_nothing_is_left_of_it() {
    let bed = Bed::new("#!/bin/sh\nexit 1\n");
    let node = &bed.node;
    let (guest, instance) = bed.running_guest();
    let saving = Saving::default();
    let _vmm = saving.serve(&instance.control);
    let (uid, checkpoint) = (guest.metadata.uid.clone().unwrap(), Uuid::new_v4());
    // Taken back before the VMM was asked, and when nothing was ever registered.
    assert_eq!(cancel(node, &uid, checkpoint).unwrap(), Cancelled::RunsOn);
    register_key(node, &guest, checkpoint, "kernel-1", None).unwrap();
    assert_eq!(cancel(node, &uid, checkpoint).unwrap(), Cancelled::RunsOn);

    save(node, &uid, checkpoint, LEASE).unwrap();
    saving.set(SaveState::Saved);
    let directory = node.sessions.records.directory(&uid, checkpoint);
    fs::write(directory.join(MANIFEST), "{}").unwrap();
    assert!(unused(node, &uid, |_| true).unwrap().is_some());
    assert_eq!(cancel(node, &uid, checkpoint).unwrap(), Cancelled::RunsOn);
    assert!(unused(node, &uid, |_| true).unwrap().is_none());
    node.sessions.destroy(&uid, checkpoint).unwrap();
    node.sessions.destroy(&uid, checkpoint).unwrap();
    assert!(!directory.exists());
    assert!(!node.sessions.credentials.is_registered(checkpoint));
    assert!(node.sessions.records.guests().is_empty());
}

#[test]
fn space_for_all_sessions_is_looked_for_and_what_is_missing_is_told() {
    let bed = Bed::new("#!/bin/sh\nexit 1\n");
    let sessions = &bed.node.sessions;
    let problems = check_space(sessions, &[1 << 20, 1 << 50, 1 << 20]).unwrap();
    assert_eq!(problems[0], None);
    let problem = problems[1].as_ref().unwrap();
    assert!(
        problem.contains("MiB are missing") && problem.contains("stateDir"),
        "{problem}"
    );
}

#[test]
fn a_refused_checkpoint_is_told_in_the_vmms_words_and_nothing_of_it_is_touched() {
    let bed = Bed::new(
        "#!/bin/sh\necho 'starting' >&2\necho 'CheckpointStale: disk root was written: session 4, saved at 3' >&2\nexit 3\n",
    );
    let node = &bed.node;
    let (guest, instance) = bed.running_guest();
    let record = bed.saved_session(&guest, &instance);
    let checkpoint = record.identity.checkpoint;
    for _ in 0..2 {
        obtain_key(node, &record.identity.guest_uid, checkpoint).unwrap();
        match resume(node, &guest, checkpoint).unwrap_err() {
            ResumeError::Refused { refusal, message } => {
                assert_eq!(refusal, Refusal::CheckpointStale);
                assert_eq!(message, "disk root was written: session 4, saved at 3");
            }
            other => panic!("{other}"),
        }
        assert!(!node.sessions.keys.has(checkpoint), "the key is in no file");
    }
    assert_eq!(node.sessions.records.standing(&record).unwrap(), Standing::Saved);
    assert!(node.sessions.credentials.is_registered(checkpoint));
    // A VMM that dies without a word later is not taken for the refusal before it.
    bed.set_vmm("#!/bin/sh\nexit 1\n");
    let error = resume(node, &guest, checkpoint).unwrap_err();
    assert!(matches!(error, ResumeError::Launch(_)), "{error}");
    // One that had used the checkpoint is.
    let directory = node
        .sessions
        .records
        .directory(&record.identity.guest_uid, checkpoint);
    bed.set_vmm(&format!(
        "#!/bin/sh\ntouch {}\nexit 1\n",
        directory.join(CONSUMED).display()
    ));
    let error = resume(node, &guest, checkpoint).unwrap_err();
    assert!(matches!(error, ResumeError::Ended(_)), "{error}");
}

#[test]
fn a_session_goes_on_in_a_vmm_that_gets_its_checkpoint_and_key_and_its_own_machine() {
    let bed = Bed::new("#!/bin/sh\nexec sleep 600\n");
    let node = &bed.node;
    let (guest, instance) = bed.running_guest();
    let mut record = bed.saved_session(&guest, &instance);
    // Whatever the spec says now: a session goes on in the machine that it was saved in.
    record.config.memory_mib = 96;
    record.config.clone_oem_strings = vec!["a clone's".into()];
    node.sessions.records.put(&record).unwrap();
    let checkpoint = record.identity.checkpoint;
    let _vmm = FakeVmm::serve(&instance.control, move |_, _| {
        let resume = json!({"checkpoint": checkpoint, "pendingBytes": 4096, "startUs": 5000, "error": null});
        // Before it is started nobody has its process ID.
        (200, FakeVmm::info(json!({"resume": resume, "pid": u32::MAX})))
    });
    let before = crate::host::moment().unix_us;
    let resumed = resume(node, &guest, checkpoint).unwrap();
    assert!(resumed.first_instruction_us >= before + 5000);
    assert_eq!(resumed.info.pending_bytes, 4096);

    let config: understudy_vmm_control::config::VmConfig =
        crate::durable::read_json(&instance.config).unwrap().unwrap();
    assert_eq!(config.memory_mib, 96);
    assert!(config.clone_oem_strings.is_empty());
    let asked = config.resume.unwrap();
    assert_eq!(asked.checkpoint, checkpoint);
    assert_eq!(asked.guest_uid, record.identity.guest_uid);
    assert_eq!(asked.host_boot_id, node.sessions.boot_id());
    assert_eq!(asked.key, node.sessions.keys.path(checkpoint));
    assert!(!asked.key.exists(), "taken away again");

    // Found again by an agent that knows nothing of it.
    let again = resume(node, &guest, checkpoint).unwrap();
    assert_eq!(again.info, resumed.info);
    assert_eq!(record.life(&node.instances), Life::GoesOn);
    let process = record.vmm(&node.instances).process().unwrap();
    assert!(process.kill(Duration::from_secs(60)));
}

#[test]
fn a_used_or_torn_checkpoint_that_no_update_knows_is_swept_and_a_complete_one_never() {
    let bed = Bed::new("#!/bin/sh\nexit 1\n");
    let sessions = &bed.node.sessions;
    let (guest, instance) = bed.running_guest();
    let (saved, used, torn, known) = (
        bed.saved_session(&guest, &instance),
        bed.saved_session(&guest, &instance),
        bed.saved_session(&guest, &instance),
        bed.saved_session(&guest, &instance),
    );
    let uid = &saved.identity.guest_uid;
    let directory = |record: &Record| sessions.records.directory(uid, record.identity.checkpoint);
    fs::write(directory(&used).join(CONSUMED), "").unwrap();
    fs::remove_file(directory(&torn).join(MANIFEST)).unwrap();
    fs::remove_file(directory(&known).join(MANIFEST)).unwrap();
    sessions.sweep(&bed.node.instances, |checkpoint| {
        checkpoint == known.identity.checkpoint
    });
    assert!(directory(&saved).join(MANIFEST).exists());
    assert!(directory(&known).exists());
    for gone in [&used, &torn] {
        assert!(!directory(gone).exists());
        assert!(!sessions.credentials.is_registered(gone.identity.checkpoint));
    }
    assert_eq!(sessions.records.of(uid).unwrap().len(), 2);
}

#[test]
fn a_discarded_session_goes_where_no_update_cares_for_it() {
    let bed = Bed::new("#!/bin/sh\nexit 1\n");
    let node = &bed.node;
    let (guest, instance) = bed.running_guest();
    let record = bed.saved_session(&guest, &instance);
    let (uid, checkpoint) = (&record.identity.guest_uid, record.identity.checkpoint);
    assert_eq!(unused(node, uid, |_| false).unwrap(), Some(record.clone()));
    node.sessions.records.ask_to_discard(uid, checkpoint).unwrap();
    // An update that knows it discards it itself.
    assert!(unused(node, uid, |_| true).unwrap().is_some());
    assert_eq!(unused(node, uid, |_| false).unwrap(), None);
    assert!(node.sessions.records.of(uid).unwrap().is_empty());
}

#[test]
fn a_record_that_cannot_be_read_is_an_error_and_no_absence() {
    let bed = Bed::new("#!/bin/sh\nexit 1\n");
    let (guest, instance) = bed.running_guest();
    let record = bed.saved_session(&guest, &instance);
    let uid = &record.identity.guest_uid;
    let path = bed
        .node
        .sessions
        .records
        .directory(uid, record.identity.checkpoint)
        .with_extension("json");
    fs::write(&path, "{").unwrap();
    let error = unused(&bed.node, uid, |_| false).unwrap_err().to_string();
    assert!(error.contains("is damaged"), "{error}");
}
