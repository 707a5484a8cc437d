//! What a guest can ask of its machine, and what a bad start says.

use crate::common::{Guest, have_kvm, wait};
use serde_json::json;
use understudy_vmm_control::api::VmState;

#[test]
fn a_guest_that_powers_itself_off_ends_the_process_with_success() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new();
    let mut vmm = guest.start(&guest.config(1, "Active", "s"));
    assert!(vmm.end().success(), "{}", vmm.stderr());
    assert_eq!(vmm.console(), "tiny kernel\n");
    assert!(!guest.path("1-control.sock").exists(), "the socket is removed");
}

#[test]
fn a_reset_boots_the_guest_again_in_the_same_process() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new();
    let vmm = guest.start(&guest.config(1, "Active", "r"));
    wait("the third boot", || vmm.info().boots >= 3);
    assert_eq!(vmm.info().state, VmState::Running);
    assert!(vmm.console().matches("tiny kernel").count() >= 2);
}

#[test]
fn a_reset_that_finds_no_kernel_any_more_says_so() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new();
    let mut vmm = guest.start(&guest.config(1, "Active", "l"));
    std::fs::remove_file(guest.path("vmlinuz")).unwrap();
    let error = vmm.client.vm("reset").unwrap_err().to_string();
    assert!(error.contains("vmlinuz"), "{error}");
    let info = vmm.info();
    assert_eq!(info.state, VmState::Exited);
    assert!(info.exit_reason.unwrap().contains("boot.files.kernel"));
    vmm.client.vm("stop").unwrap();
    assert_eq!(vmm.end().code(), Some(1));
}

#[test]
fn a_crash_is_reported_until_the_process_is_stopped() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new();
    let mut vmm = guest.start(&guest.config(1, "Active", "t"));
    wait("the crash is known", || vmm.info().state == VmState::Exited);
    assert!(vmm.info().exit_reason.is_some());
    assert!(vmm.client.console().unwrap().text.contains("tiny kernel"));
    vmm.client.vm("stop").unwrap();
    assert_eq!(vmm.end().code(), Some(1));
}

#[test]
fn the_power_button_reaches_the_guest() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new();
    let mut vmm = guest.start(&guest.config(1, "Active", "b"));
    wait("the guest runs", || vmm.console().contains("tiny kernel"));
    vmm.client.vm("power-button").unwrap();
    assert!(vmm.end().success(), "{}", vmm.stderr());
}

#[test]
fn the_guest_sees_the_same_slots_and_cpu_at_its_next_start() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new();
    let config = guest.config(1, "Active", "s");
    guest.start(&config).end();
    let first = std::fs::read(guest.path("platform.json")).unwrap();
    guest.start(&config).end();
    assert_eq!(std::fs::read(guest.path("platform.json")).unwrap(), first);
}

#[test]
fn a_disk_in_use_and_a_foreign_owner_are_refused_and_harm_nothing() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new();
    let first = guest.start(&guest.config(1, "Active", "l"));
    let mut config = guest.config(1, "Active", "l");
    config["paths"]["control"] = json!(guest.path("other.sock"));
    config["paths"]["console"] = json!(guest.path("other.log"));
    let mut second = guest.start(&config);
    assert_eq!(second.end().code(), Some(1));
    assert!(second.stderr().contains("in use"), "{}", second.stderr());
    first.makes_progress();
    drop(first);

    guest.own(2, 2);
    let mut stale = guest.start(&guest.config(1, "Active", "l"));
    assert_eq!(stale.end().code(), Some(1));
    assert!(
        stale.stderr().contains("names incarnation 2"),
        "{}",
        stale.stderr()
    );
}

#[test]
fn a_start_that_cannot_succeed_names_the_field() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new();
    let refused = |change: &dyn Fn(&mut serde_json::Value), names: &str| {
        let mut config = guest.config(1, "Active", "s");
        change(&mut config);
        let mut vmm = guest.start(&config);
        assert_eq!(vmm.end().code(), Some(1));
        assert!(vmm.stderr().contains(names), "{names}: {}", vmm.stderr());
    };
    refused(&|c| c["memoryMib"] = json!(1u64 << 40), "memoryMib");
    refused(
        &|c| c["boot"]["files"]["kernel"] = json!("/nonexistent"),
        "boot.files.kernel",
    );
    refused(&|c| c["boot"] = json!({ "fromDisk": {} }), "boot.fromDisk");
    let text = guest.path("text");
    std::fs::write(&text, "not a kernel").unwrap();
    refused(
        &|c| c["boot"]["files"]["kernel"] = json!(text),
        "not a 64-bit bzImage",
    );
}
