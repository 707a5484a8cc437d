//! On the real `/dev/kvm`; each test says where it is skipped.

use kvm_bindings::KVM_PIT_SPEAKER_DUMMY;
use kvm_bindings::kvm_pit_config;

use super::*;
use crate::machine::{cpuid, vm_state};

fn machine(cpus: u8) -> Option<(Kvm, VmFd, Vec<VcpuFd>, Vec<cpuid::Leaf>)> {
    let Ok(kvm) = Kvm::new() else {
        eprintln!("SKIPPED: /dev/kvm cannot be opened");
        return None;
    };
    let vm = kvm.create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    vm.create_pit2(kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    })
    .unwrap();
    let vcpus = (0..cpus).map(|id| vm.create_vcpu(id.into()).unwrap()).collect();
    let template = cpuid::template(&kvm).unwrap();
    Some((kvm, vm, vcpus, template))
}

/// A state with something in every part of it.
fn state(id: usize) -> Option<(VcpuState, Abilities)> {
    let (kvm, vm, vcpus, template) = machine(2)?;
    let abilities = Abilities::of(&kvm, &vm).unwrap();
    let vcpu = &vcpus[id];
    vcpu.set_cpuid2(&cpuid::for_vcpu(&template, id as u8, 2).unwrap())
        .unwrap();
    let mut state = save(vcpu, id, &abilities).unwrap();
    state.regs.rip = 0x1234;
    state.regs.r15 = 0x5678;
    // x87 control word, MXCSR, which XSAVE components are there, and a register of SSE.
    state.xsave[0] = 0x37f;
    state.xsave[6] = 0x1f80;
    state.xsave[40] = 0xfeed_beef;
    state.xsave[128] = 3;
    state.debug.db[0] = 0x1000;
    Some((state, abilities))
}

#[test]
fn a_vcpu_saved_restored_and_saved_again_has_the_same_state() {
    for id in 0..2 {
        let Some((first, _)) = state(id) else { return };
        let Some((kvm, vm, vcpus, template)) = machine(2) else {
            return;
        };
        let abilities = Abilities::of(&kvm, &vm).unwrap();
        let cpuid = cpuid::for_vcpu(&template, id as u8, 2).unwrap();
        let text = serde_json::to_vec(&first).unwrap();
        let read: VcpuState = serde_json::from_slice(&text).unwrap();
        assert_eq!(read, first);
        restore(&vcpus[id], id, &cpuid, &read, &abilities).unwrap();
        let mut second = save(&vcpus[id], id, &abilities).unwrap();
        // The TSC runs on, and never backwards.
        let (before, after) = (first.tsc().unwrap(), second.tsc().unwrap());
        assert!(after >= before && after - before < u64::from(first.tsc_khz) * 10_000);
        for msr in &mut second.msrs {
            if msr.index == TSC {
                msr.data = before;
            }
        }
        second.tsc_offset = first.tsc_offset;
        for (first, second) in first.msrs.iter().zip(&second.msrs) {
            assert_eq!(first, second);
        }
        assert_eq!(first, second);
    }
}

#[test]
fn the_deadline_is_the_last_msr_that_is_set_and_the_tsc_comes_before_it() {
    let Some((mut first, abilities)) = state(0) else {
        return;
    };
    // The timer of the local APIC in TSC-deadline mode: vector 0x40, masked, enabled by the spurious vector.
    first.lapic.regs[0xf0..0xf2].copy_from_slice(&[0xff_u8 as i8, 1]);
    first.lapic.regs[0x320..0x323].copy_from_slice(&[0x40, 0, 5]);
    let far = first.tsc().unwrap() + (1 << 50);
    let msr = |index| move |msr: &&mut Msr| msr.index == index;
    if let Some(deadline) = first.msrs.iter_mut().find(msr(TSC_DEADLINE)) {
        deadline.data = far;
    } else {
        eprintln!("SKIPPED: no TSC deadline timer");
        return;
    }
    let Some((_kvm, _vm, vcpus, template)) = machine(2) else {
        return;
    };
    let cpuid = cpuid::for_vcpu(&template, 0, 2).unwrap();
    restore(&vcpus[0], 0, &cpuid, &first, &abilities).unwrap();
    let again = read_msrs(&vcpus[0], &[TSC_DEADLINE]).unwrap();
    assert_eq!(again[0].data, far, "set before LAPIC or TSC it would be dropped");
}

#[test]
fn what_the_host_lacks_is_named() {
    let Some((first, abilities)) = state(0) else {
        return;
    };
    let mut foreign = first.clone();
    foreign.msrs.push(Msr {
        index: 0x1234_5678,
        data: 1,
    });
    let error = abilities.check(0, &foreign, first.tsc_khz).unwrap_err();
    assert!(
        error.is_incompatible() && error.to_string().contains("0x12345678"),
        "{error}"
    );
    let mut wide = first.clone();
    wide.xsave.resize(1 << 16, 0);
    let error = abilities.check(0, &wide, first.tsc_khz).unwrap_err();
    assert!(error.to_string().contains("extended registers"), "{error}");
    if !abilities.tsc_scaling {
        assert!(abilities.check(0, &first, first.tsc_khz * 2).is_err());
    }
    abilities.check(0, &first, first.tsc_khz).unwrap();
}

#[test]
fn an_msr_that_does_not_take_its_value_is_an_error_by_its_number() {
    let Some((_kvm, _vm, vcpus, _)) = machine(1) else {
        return;
    };
    let msr = Msr {
        index: 0x1234_5678,
        data: 7,
    };
    let error = write_msrs(&vcpus[0], 0, &[msr]).unwrap_err().to_string();
    assert!(error.contains("0x12345678"), "{error}");
}

#[test]
fn tscs_that_were_read_one_after_the_other_are_saved_for_one_instant() {
    let Some((first, _)) = state(0) else { return };
    let mut second = first.clone();
    for msr in &mut second.msrs {
        if msr.index == TSC {
            msr.data += 1_000_000;
        }
    }
    let mut states = [first.clone(), second];
    if first.tsc_offset.is_none() {
        eprintln!("SKIPPED: KVM does not tell the TSC's offset");
        return;
    }
    align_tscs(&mut states);
    assert_eq!(states[0].tsc(), states[1].tsc());
}

#[test]
fn interrupt_controllers_timer_and_clock_are_restored_and_time_goes_on() {
    let Some((_kvm, vm, _vcpus, _)) = machine(1) else {
        return;
    };
    let mut first = vm_state::save(&vm).unwrap();
    first.clock_ns = 123_456_789_000;
    let Some((_kvm, other, _vcpus, _)) = machine(1) else {
        return;
    };
    vm_state::restore(&other, &first).unwrap();
    vm_state::set_clock(&other, first.clock_ns).unwrap();
    let second = vm_state::save(&other).unwrap();
    let bytes = |state: &vm_state::ChipsetState| serde_json::to_vec(&state.controllers).unwrap();
    assert_eq!(bytes(&second), bytes(&first));
    let passed = second.clock_ns - first.clock_ns;
    assert!(
        passed < 10_000_000_000,
        "{passed} ns have passed: not the host's time"
    );
}
