//! Gates with their lease, and the change of owner.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use crate::common::{Guest, Vmm, have_kvm, wait};
use understudy_vmm_control::api::{Activate, Commit, Gates, HoldRequest, PrepareSplit, Split, VmState};
use understudy_vmm_control::client::{Client, ClientError};
use uuid::Uuid;

const ALL: Gates = Gates {
    receive: true,
    transmit: true,
    write: true,
    vcpus: true,
};

fn hold(client: &Client, lease_ms: u64) -> Result<u64, ClientError> {
    let report = client.hold(&HoldRequest { gates: ALL, lease_ms })?;
    assert_eq!(report.gates, ALL);
    Ok(report.counters.block_writes)
}

fn status(error: ClientError) -> u16 {
    match error {
        ClientError::Refused { status, .. } => status,
        other => panic!("{other}"),
    }
}

#[test]
fn held_vcpus_stand_still_until_they_are_released() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new();
    let vmm = guest.start(&guest.config(1, "Active", "l"));
    vmm.makes_progress();
    hold(&vmm.client, 60_000).unwrap();
    let before = vmm.client.console().unwrap().text;
    // Held again: idempotent.
    hold(&vmm.client, 60_000).unwrap();
    assert_eq!(vmm.client.console().unwrap().text, before);
    assert_eq!(vmm.info().state, VmState::Paused);
    let report = vmm.client.release().unwrap();
    assert_eq!(report.gates, Gates::default());
    vmm.makes_progress();
}

#[test]
fn a_lease_that_runs_out_lets_the_guest_go_on() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new();
    let vmm = guest.start(&guest.config(1, "Active", "l"));
    hold(&vmm.client, 1).unwrap();
    wait("the lease has run out", || vmm.info().gates == Gates::default());
    assert_eq!(vmm.info().state, VmState::Running);
    vmm.makes_progress();
    let commit = Commit {
        epoch: 2,
        incarnation: 2,
        layer: Uuid::new_v4(),
        block_writes: 0,
    };
    assert_eq!(status(vmm.client.commit(&commit).unwrap_err()), 409);
    assert_eq!(guest.owner().incarnation, 1);
}

/// A guest that was split, and its clone, booted on its own layer.
fn split_and_clone(guest: &Guest) -> (Vmm, Vmm, Uuid) {
    let old = guest.start(&guest.config(1, "Active", "l"));
    let (guest_layer, clone_layer) = (Uuid::new_v4(), Uuid::new_v4());
    let prepare = PrepareSplit {
        guest_layer,
        clone_layer,
    };
    old.client.prepare_split("root", &prepare).unwrap();
    old.client.prepare_split("root", &prepare).unwrap();
    assert_eq!(guest.owner().layer, Some(guest_layer));
    let mut config = guest.config(2, "Clone", "l");
    config["disks"][0]["layer"] = serde_json::json!(clone_layer);
    let new = guest.start(&config);
    assert_eq!(new.info().state, VmState::Prepared);
    assert_eq!(new.info().boots, 0);
    old.client.split("root", &Split { guest_layer }).unwrap();
    assert_eq!(old.info().disks[0].layers, vec![guest_layer]);
    new.client.vm("boot").unwrap();
    new.client.vm("boot").unwrap();
    assert_eq!(new.info().disks[0].layers, vec![clone_layer]);
    new.makes_progress();
    (old, new, clone_layer)
}

#[test]
fn a_commit_is_refused_unless_everything_holds_and_moves_the_guest_when_it_does() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new();
    let (mut old, mut new, clone_layer) = split_and_clone(&guest);
    let activate = Activate {
        epoch: 2,
        open_taps: false,
    };
    assert!(!new.info().owner);
    assert_eq!(status(new.client.activate(&activate).unwrap_err()), 409);

    let commit = Commit {
        epoch: 2,
        incarnation: 2,
        layer: clone_layer,
        block_writes: old.info().counters.block_writes,
    };
    assert_eq!(
        status(old.client.commit(&commit).unwrap_err()),
        409,
        "gates are open"
    );
    let written = hold(&old.client, 60_000).unwrap();
    for (wrong, expected) in [
        (
            Commit {
                epoch: 3,
                ..commit.clone()
            },
            409,
        ),
        (
            Commit {
                block_writes: written + 1,
                ..commit.clone()
            },
            409,
        ),
        (
            Commit {
                incarnation: 1,
                ..commit.clone()
            },
            400,
        ),
    ] {
        assert_eq!(status(old.client.commit(&wrong).unwrap_err()), expected);
    }
    assert_eq!(guest.owner().epoch, 1);

    old.client.commit(&commit).unwrap();
    old.client.commit(&commit).unwrap();
    let owner = guest.owner();
    assert_eq!((owner.epoch, owner.incarnation), (2, 2));
    assert_eq!(owner.layer, Some(clone_layer));
    assert_eq!(old.info().state, VmState::Dormant);
    assert!(!old.info().owner);
    assert_eq!(old.info().gates, ALL);
    assert_eq!(status(old.client.release().unwrap_err()), 409);
    assert_eq!(status(hold(&old.client, 1).unwrap_err()), 409);

    let report = new.client.activate(&activate).unwrap();
    assert_eq!(new.client.activate(&activate).unwrap(), report);
    assert!(new.info().owner);
    new.makes_progress();

    // The dormant goes, and the clone is a guest like any other: it restarts as the owner, and its layer
    // becomes the source file again.
    old.client.vm("stop").unwrap();
    assert!(old.end().success(), "{}", old.stderr());
    new.client.vm("stop").unwrap();
    assert!(new.end().success(), "{}", new.stderr());
    let again = guest.start(&guest.config(2, "Active", "l"));
    assert_eq!(again.info().disks[0].layers, vec![clone_layer]);
    again.client.merge("root").unwrap();
    wait("the layer is merged", || {
        again.info().disks[0].layers.is_empty() && guest.owner().layer.is_none()
    });
    assert_eq!(guest.owner().epoch, 2);
    again.makes_progress();
}

#[test]
fn a_commit_back_lets_the_dormant_incarnation_go_on_and_the_clone_never_again() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new();
    let (old, mut new, clone_layer) = split_and_clone(&guest);
    let guest_layer = guest.owner().layer.unwrap();
    let commit = |vmm: &Vmm, epoch, incarnation, layer| {
        let block_writes = hold(&vmm.client, 60_000).unwrap();
        let commit = Commit {
            epoch,
            incarnation,
            layer,
            block_writes,
        };
        vmm.client.commit(&commit).unwrap();
        vmm.client.commit(&commit).unwrap();
    };
    let activate = |epoch| Activate {
        epoch,
        open_taps: false,
    };
    commit(&old, 2, 2, clone_layer);
    new.client.activate(&activate(2)).unwrap();
    new.makes_progress();
    // Nobody has committed to it: it stays dormant.
    for epoch in [1, 2, 3] {
        assert_eq!(status(old.client.activate(&activate(epoch)).unwrap_err()), 409);
    }
    assert_eq!(old.info().state, VmState::Dormant);
    let boots = old.info().boots;

    commit(&new, 3, 1, guest_layer);
    let owner = guest.owner();
    assert_eq!((owner.epoch, owner.incarnation), (3, 1));
    assert_eq!(owner.layer, Some(guest_layer));
    assert_eq!(new.info().state, VmState::Dormant);
    assert_eq!(status(old.client.activate(&activate(2)).unwrap_err()), 409);
    let report = old.client.activate(&activate(3)).unwrap();
    assert_eq!(old.client.activate(&activate(3)).unwrap(), report);
    let info = old.info();
    assert!(info.owner);
    assert_eq!((info.state, info.gates), (VmState::Running, Gates::default()));
    assert_eq!(info.boots, boots, "it goes on, and does not boot");
    old.makes_progress();
    // The clone's turn is over, whatever is asked of it.
    assert_eq!(status(new.client.activate(&activate(2)).unwrap_err()), 409);
    assert_eq!(status(new.client.release().unwrap_err()), 409);
    new.client.vm("stop").unwrap();
    assert!(new.end().success(), "{}", new.stderr());
    // It is a guest like any other again, and may be split and committed anew.
    let (again, next) = (Uuid::new_v4(), Uuid::new_v4());
    let prepare = PrepareSplit {
        guest_layer: again,
        clone_layer: next,
    };
    old.client.prepare_split("root", &prepare).unwrap();
    old.client.split("root", &Split { guest_layer: again }).unwrap();
    commit(&old, 4, 2, next);
    assert_eq!(guest.owner().epoch, 4);
}

#[test]
fn a_clone_whose_guest_was_not_committed_never_owns_it() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new();
    let (old, new, _) = split_and_clone(&guest);
    let activate = Activate {
        epoch: 1,
        open_taps: true,
    };
    assert_eq!(status(new.client.activate(&activate).unwrap_err()), 409);
    drop(old);
    // Even when the guest's VMM is dead: owner.json does not name the clone.
    assert_eq!(status(new.client.activate(&activate).unwrap_err()), 409);
    assert!(!new.info().owner);
    let disk = new.client.prepare_split(
        "root",
        &PrepareSplit {
            guest_layer: Uuid::new_v4(),
            clone_layer: Uuid::new_v4(),
        },
    );
    assert_eq!(status(disk.unwrap_err()), 409);
    // The guest starts again on its own layer.
    let again = guest.start(&guest.config(1, "Active", "l"));
    again.makes_progress();
}

#[test]
fn malformed_requests_are_answered_and_harm_nothing() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new();
    let vmm = guest.start(&guest.config(1, "Active", "l"));
    let exchange = |request: &str| {
        let mut stream = UnixStream::connect(vmm.client.socket()).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let put = |path: &str, body: &str| {
        exchange(&format!(
            "PUT {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
    };
    assert!(exchange("nonsense\r\n\r\n").starts_with("HTTP/1.1 400"));
    assert!(put("/v1/hold", "{").starts_with("HTTP/1.1 400"));
    assert!(put("/v1/hold", r#"{"gates":{},"leaseMs":0}"#).contains("leaseMs"));
    assert!(put("/v1/vm/stop", r#"{"now":true}"#).starts_with("HTTP/1.1 400"));
    assert!(put("/v1/nothing", "{}").starts_with("HTTP/1.1 404"));
    vmm.makes_progress();
}
