use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use understudy_api::guest::GuestPhase;
use understudy_api::{Guest, HostUpdate};
use understudy_vmm_control::session::{CONSUMED, MANIFEST};

use super::*;
use crate::guests::worker;
use crate::host::HostIdentity;
use crate::power::{Power, Shutdown};
use crate::store::Key;
use crate::testing::{Bed, FakeVmm};
use crate::vmm::{Instance, Process};

/// A VMM that saves at once, as far as its answers tell, and writes a manifest.
#[derive(Default)]
struct Vm {
    save: Option<Value>,
    state: &'static str,
    fails: bool,
    resumed: Option<Value>,
}

fn serve(instance: &Instance, fails: bool) -> (FakeVmm, Arc<Mutex<Vm>>) {
    let vm = Arc::new(Mutex::new(Vm {
        state: "Running",
        fails,
        ..Vm::default()
    }));
    let shared = vm.clone();
    let fake = FakeVmm::serve(&instance.control, move |what, body| {
        let mut vm = shared.lock().unwrap();
        let directory = |vm: &Vm| PathBuf::from(vm.save.as_ref().unwrap()["directory"].as_str().unwrap());
        match what {
            "GET /v1/vm" => {
                let state = if vm.state == "Ready" { "Running" } else { vm.state };
                let mut info = FakeVmm::info(json!({"state": state}));
                if let Some(resumed) = &vm.resumed {
                    info["resume"] = resumed.clone();
                    // Before it is started nobody has its process ID.
                    info["pid"] = json!(u32::MAX);
                }
                return (200, info);
            }
            "PUT /v1/save" => {
                vm.save = Some(body);
                vm.state = if vm.fails { "Running" } else { "Ready" };
                if !vm.fails {
                    fs::write(directory(&vm).join("memory"), "pages").unwrap();
                }
            }
            "PUT /v1/save/pause" => {
                vm.state = "Saved";
                fs::write(directory(&vm).join(MANIFEST), "{}").unwrap();
            }
            "PUT /v1/save/cancel" => {
                vm.state = "Running";
                let _ = fs::remove_file(directory(&vm).join(MANIFEST));
            }
            _ => {}
        }
        let Some(save) = &vm.save else {
            return (404, json!({"error": "no save was asked for"}));
        };
        let (state, error) = match (vm.fails, vm.state) {
            (true, _) => ("Failed", json!("no space left on device")),
            (_, state @ ("Ready" | "Saved")) => (state, Value::Null),
            _ => ("Cancelled", Value::Null),
        };
        (
            200,
            json!({
                "checkpoint": save["checkpoint"], "state": state, "rounds": 2, "memoryBytes": 64 << 20,
                "writtenBytes": 1 << 20, "remainingBytes": 0, "checkpointBytes": 4096,
                "pauseUs": 1500, "error": error,
            }),
        )
    });
    (fake, vm)
}

fn host_update(command: &str) -> String {
    format!(
        "apiVersion: understudy.dev/v1alpha1\nkind: HostUpdate\nmetadata: {{name: kernel}}\nspec:\n  update: {{command: [sh, -c, {command:?}]}}\n  reboot: {{method: Command, command: [\"true\"]}}\n"
    )
}

/// A host that stays up, as far as anybody can tell.
fn stays_up(bed: &Bed) {
    let none = format!("unix:path={}/none", bed.node.config.run_dir.display());
    let power = Power::watch(Some(&none), || ()).unwrap();
    power.wait(Duration::from_secs(60), |state| state.problem.is_some());
    bed.node.work.watch(power);
}

/// Passes until the only NodeUpdate satisfies `when`.
fn pass_until(
    bed: &Bed,
    updates: &mut HostUpdates,
    what: &str,
    mut when: impl FnMut(&NodeUpdate) -> bool,
) -> NodeUpdate {
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut seen = 0;
    loop {
        updates.pass();
        let all = bed.store.list::<NodeUpdate>();
        assert!(all.len() <= 1, "{all:?}");
        if let Some(update) = all.into_iter().find(|update| when(update)) {
            return update;
        }
        let now = bed
            .store
            .list::<NodeUpdate>()
            .pop()
            .and_then(|update| update.status);
        assert!(Instant::now() < deadline, "gave up waiting for {what}: {now:?}");
        seen = bed.store.wait(seen, Duration::from_millis(50));
    }
}

fn is(phase_is: NodeUpdatePhase) -> impl FnMut(&NodeUpdate) -> bool {
    move |update| phase(update) == phase_is
}

/// The host's reboot: what ran is gone, and an agent in another boot opens the same state.
fn reboot(bed: &Bed, instance: &Instance, boot_id: &str) -> Arc<Node> {
    let gone = Process {
        pid: 1,
        start_time: 0,
        host_boot_id: "the boot before".into(),
    };
    let mut instance = instance.clone();
    instance.process = Some(gone);
    bed.node.instances.put(&instance).unwrap();
    bed.node.stop();
    bed.wait("the driver to end", |bed| {
        (!bed.node.work.is_busy()).then_some(())
    });
    let identity = HostIdentity {
        boot_id: boot_id.to_owned(),
        ..HostIdentity::read()
    };
    let config = bed.node.config.clone();
    Node::open(crate::host::name(), config, Arc::new(bed.store.clone()), identity).unwrap()
}

/// A VMM's script that is nothing but a process.
const PROCESS: &str = "#!/bin/sh\nexec sleep 600\n";

#[test]
fn a_host_update_saves_sessions_reboots_in_response_and_resumes_them_in_the_next_boot() {
    let bed = Bed::new(PROCESS);
    let (guest, instance) = bed.running_guest();
    let (vmm, vm) = serve(&instance, false);
    stays_up(&bed);
    let ran = bed.node.config.state_dir.join("ran");
    bed.apply(&host_update(&format!("echo once >> {}", ran.display())));
    let mut updates = HostUpdates::load(&bed.node, host::moment());
    let update = pass_until(&bed, &mut updates, "the reboot", is(NodeUpdatePhase::Rebooting));
    assert_eq!(update.spec.origin, Origin::HostUpdate);
    assert_eq!(fs::read_to_string(&ran).unwrap(), "once\n");
    assert_eq!(vm.lock().unwrap().state, "Saved");
    assert!(
        vmm.asked
            .lock()
            .unwrap()
            .contains(&"PUT /v1/save/keep".to_owned())
    );
    let phases: Vec<String> = update
        .status
        .as_ref()
        .unwrap()
        .phase_transitions
        .iter()
        .map(|transition| transition.phase.to_string())
        .collect();
    assert_eq!(
        phases,
        ["Pending", "Notified", "Saving", "Acknowledged", "Rebooting"]
    );
    let hold = bed.node.work.hold(&guest.uid()).unwrap();
    assert_eq!(hold.phase, GuestPhase::Saved);
    assert!(bed.node.work.session(&guest.uid()).is_some());

    // The next boot.
    let node = reboot(&bed, &instance, "the next boot");
    drop(vmm);
    let (_vmm, vm) = serve(&instance, false);
    let record = node.sessions.records.of(&guest.uid()).unwrap().remove(0);
    let checkpoint = record.identity.checkpoint;
    vm.lock().unwrap().resumed =
        Some(json!({"checkpoint": checkpoint, "pendingBytes": 0, "startUs": 900, "error": null}));
    let mut updates = HostUpdates::load(&node, host::moment());
    assert!(node.work.holds_all_guests(), "before anything was looked at");
    node.work
        .watch(Power::watch(Some("unix:path=/none"), || ()).unwrap());
    updates.recover();
    let update = pass_until(&bed, &mut updates, "the end", is(NodeUpdatePhase::Resumed));
    let result = update.status.unwrap().result.unwrap();
    assert_eq!((result.sessions, result.resumed), (1, 1));
    assert_eq!(result.guests[0].name, "web");
    assert_eq!(result.guests[0].state, SessionState::Resumed);
    assert_eq!(result.after.unwrap().boot_id, "the next boot");
    assert!(result.guests[0].interruption.is_some());
    assert_eq!(node.work.hold(&guest.uid()), None);
    let config: understudy_vmm_control::config::VmConfig =
        crate::durable::read_json(&instance.config).unwrap().unwrap();
    assert_eq!(config.resume.unwrap().checkpoint, checkpoint);
    // Re-applied from Git it is left alone.
    updates.pass();
    let status = bed
        .store
        .get::<HostUpdate>(&Key::new("", "kernel"))
        .unwrap()
        .unwrap()
        .status
        .unwrap();
    assert!(status.nodes[0].satisfied, "{status:?}");
    node.stop();
    let process = node.instances.get(&guest.uid(), 1).unwrap().process().unwrap();
    assert!(process.kill(Duration::from_secs(60)));
}

#[test]
fn a_save_that_fails_ends_the_update_names_the_guest_and_lets_it_run_on() {
    let bed = Bed::new(PROCESS);
    let (guest, instance) = bed.running_guest();
    let (_vmm, vm) = serve(&instance, true);
    stays_up(&bed);
    bed.apply(&host_update("true"));
    let mut updates = HostUpdates::load(&bed.node, host::moment());
    let update = pass_until(&bed, &mut updates, "the failure", is(NodeUpdatePhase::Failed));
    let status = update.status.unwrap();
    let message = status.message.unwrap();
    assert!(
        message.contains("default/web") && message.contains("no space left on device"),
        "{message}"
    );
    assert_eq!(vm.lock().unwrap().state, "Running");
    assert_eq!(status.result.unwrap().guests[0].state, SessionState::RunsOn);
    bed.wait("nothing to be left", |bed| {
        updates.pass();
        let records = bed.node.sessions.records.of(&guest.uid()).unwrap();
        (records.is_empty() && bed.node.updates.load().unwrap().is_empty()).then_some(())
    });
    assert_eq!(bed.node.work.hold(&guest.uid()), None);
    // No second pass for the same generation.
    updates.pass();
    assert_eq!(bed.store.list::<NodeUpdate>().len(), 1);
}

#[test]
fn a_command_that_fails_ends_the_update_before_any_guest_is_paused() {
    let bed = Bed::new(PROCESS);
    let (_guest, instance) = bed.running_guest();
    let (vmm, _vm) = serve(&instance, false);
    stays_up(&bed);
    bed.apply(&host_update("echo 'E: broken packages'; exit 100"));
    let mut updates = HostUpdates::load(&bed.node, host::moment());
    let update = pass_until(&bed, &mut updates, "the failure", is(NodeUpdatePhase::Failed));
    let status = update.status.unwrap();
    assert_eq!(status.reason.as_deref(), Some(reasons::UPDATE_COMMAND_FAILED));
    let output = status.result.unwrap().command_output.unwrap();
    assert!(output.contains("E: broken packages"), "{output}");
    let asked = vmm.asked.lock().unwrap();
    assert!(
        !asked.iter().any(|what| what.starts_with("PUT /v1/save")),
        "{asked:?}"
    );
}

#[test]
fn a_provider_that_is_not_ready_fails_the_update_before_any_guest_is_paused() {
    let bed = Bed::new(PROCESS);
    let (_guest, instance) = bed.running_guest();
    let (vmm, _vm) = serve(&instance, false);
    stays_up(&bed);
    fs::remove_file(bed.node.config.credentials.key_file.as_ref().unwrap()).unwrap();
    bed.apply(&host_update("true"));
    let mut updates = HostUpdates::load(&bed.node, host::moment());
    let update = pass_until(&bed, &mut updates, "the failure", is(NodeUpdatePhase::Failed));
    let status = update.status.unwrap();
    assert_eq!(status.reason.as_deref(), Some(reasons::CREDENTIAL_UNAVAILABLE));
    assert!(status.message.unwrap().contains("/dev/urandom"));
    let asked = vmm.asked.lock().unwrap();
    assert!(
        !asked.iter().any(|what| what.starts_with("PUT /v1/save")),
        "{asked:?}"
    );
}

#[test]
fn a_reboot_that_the_host_begins_saves_sessions_and_the_stop_job_waits_for_that() {
    let bed = Bed::new(PROCESS);
    let (guest, instance) = bed.running_guest();
    let (_vmm, vm) = serve(&instance, false);
    let mut updates = HostUpdates::load(&bed.node, host::moment());
    updates.pass();
    assert!(
        bed.store.list::<NodeUpdate>().is_empty(),
        "a plain stop saves nothing"
    );
    bed.node
        .work
        .stop_job(Shutdown::Reboot, host::moment().plus(600_000_000));
    updates.pass();
    assert!(bed.node.work.stop_job_waits());
    let update = pass_until(&bed, &mut updates, "the acknowledgement", |update| {
        phase(update) == NodeUpdatePhase::Rebooting
    });
    assert!(!bed.node.work.stop_job_waits());
    assert_eq!(update.spec.origin, Origin::Host);
    assert_eq!(update.spec.reason.as_deref(), Some("reboot"));
    assert_eq!(vm.lock().unwrap().state, "Saved");
    assert!(
        bed.node.sessions.credentials.is_registered(
            bed.node.sessions.records.of(&guest.uid()).unwrap()[0]
                .identity
                .checkpoint
        )
    );
}

#[test]
fn a_kept_session_is_not_booted_past_until_the_user_discards_it() {
    let bed = Bed::new("#!/bin/sh\necho 'CheckpointDamaged: the index ends early' >&2\nexit 3\n");
    let (guest, instance) = bed.running_guest();
    let (vmm, _vm) = serve(&instance, false);
    stays_up(&bed);
    bed.apply(&host_update("true"));
    let mut updates = HostUpdates::load(&bed.node, host::moment());
    pass_until(&bed, &mut updates, "the reboot", is(NodeUpdatePhase::Rebooting));
    let node = reboot(&bed, &instance, "the next boot");
    drop(vmm);
    fs::remove_file(&instance.control).unwrap();
    let mut updates = HostUpdates::load(&node, host::moment());
    node.work
        .watch(Power::watch(Some("unix:path=/none"), || ()).unwrap());
    updates.recover();
    worker::spawn(node.clone(), Key::new("default", "web")).unwrap();
    let update = pass_until(&bed, &mut updates, "the refusal", |update| {
        phase(update).is_terminal()
    });
    let session = update.status.unwrap().result.unwrap().guests.remove(0);
    assert_eq!(session.state, SessionState::Kept);
    assert_eq!(session.reason.as_deref(), Some("CheckpointDamaged"));
    let message = bed.ready_message("web", "CheckpointDamaged");
    assert!(message.contains("the index ends early"), "{message}");
    let of_guest = |bed: &Bed| {
        bed.store
            .get::<Guest>(&guest.key())
            .unwrap()
            .unwrap()
            .status
            .unwrap()
    };
    assert_eq!(of_guest(&bed).phase, Some(GuestPhase::Saved));
    let record = node.sessions.records.of(&guest.uid()).unwrap().remove(0);
    let directory = node
        .sessions
        .records
        .directory(&guest.uid(), record.identity.checkpoint);
    assert!(directory.join(MANIFEST).exists() && !directory.join(CONSUMED).exists());

    bed.set_vmm("#!/bin/sh\necho 'error: booted anew' >&2\nexit 1\n");
    node.sessions
        .records
        .ask_to_discard(&guest.uid(), record.identity.checkpoint)
        .unwrap();
    bed.wait("the session to go", |_| {
        updates.pass();
        (!directory.exists()).then_some(())
    });
    let message = bed.ready_message("web", "StartFailed");
    assert!(message.contains("booted anew"), "{message}");
    node.stop();
}

#[test]
fn of_reboots_that_the_host_began_the_newest_stay() {
    let updates: Vec<NodeUpdate> = (0..KEPT_OF_HOST + 3)
        .map(|number| {
            let mut update = assign::of_host("alpha", "boot", number, "reboot");
            update.metadata.uid = Some(number.to_string());
            let created = Timestamp::from_second(i64::try_from(number).unwrap()).unwrap();
            update.metadata.creation_timestamp = Some(understudy_api::Time(created));
            // The oldest has not come to its end.
            let phase = match number {
                0 => NodeUpdatePhase::Resuming,
                _ => NodeUpdatePhase::Resumed,
            };
            update.status = Some(understudy_api::NodeUpdateStatus {
                phase: Some(phase),
                ..Default::default()
            });
            update
        })
        .collect();
    let mut gone = outdated(&updates);
    gone.sort();
    assert_eq!(gone, ["1", "2"]);
}

#[test]
fn in_a_cluster_an_update_waits_until_the_operator_has_drained_the_node() {
    let bed = Bed::new(PROCESS);
    stays_up(&bed);
    let access = crate::cluster::Access {
        server: String::new(),
        ca_data: String::new(),
        token: String::new(),
        node_name: "alpha".into(),
        node_uid: "node-uid".into(),
        namespace: "understudy".into(),
    };
    let config = bed.node.config.clone();
    let cluster = crate::cluster::Cluster::open(bed.store.clone(), &config.state_dir, &access).unwrap();
    let node = Node::open("alpha".into(), config, Arc::new(cluster), HostIdentity::read()).unwrap();
    let of_update = |name: &str| -> NodeUpdate {
        serde_json::from_value(json!({
            "apiVersion": "understudy.dev/v1alpha1", "kind": "NodeUpdate", "metadata": {"name": name, "uid": name},
            // It holds already: nothing is rebooted.
            "spec": {"nodeName": "alpha", "origin": "HostUpdate", "expect": {"kernelRelease": host::kernel_release()}},
        }))
        .unwrap()
    };
    let put = |update: &NodeUpdate| {
        let mirrored = crate::store::Mirrored::Object(Box::new(update.clone()));
        bed.store
            .mirror::<NodeUpdate>(&update.key(), |_| mirrored)
            .unwrap();
    };
    let mut update = of_update("kernel-1");
    put(&update);
    let mut updates = HostUpdates::load(&node, host::moment());
    for _ in 0..3 {
        updates.pass();
    }
    let there = bed.store.get::<NodeUpdate>(&update.key()).unwrap().unwrap();
    assert_eq!(there.status.and_then(|status| status.phase), None);
    assert!(node.work.updates().is_empty());

    let drained = conditions::Wanted {
        kind: types::DRAINED,
        status: Some(true),
        reason: "Drained",
        message: "",
    };
    let status = update.status.get_or_insert_default();
    conditions::set(&mut status.conditions, 1, Timestamp::now(), &[drained]);
    put(&update);
    pass_until(&bed, &mut updates, "its end", |update| {
        phase(update).is_terminal()
    });
    // It stays until the operator removes it, deleted or not.
    update.metadata.deletion_timestamp = Some(understudy_api::Time(Timestamp::now()));
    updates.pass();
    assert_eq!(bed.store.list::<NodeUpdate>().len(), 1);
}
