//! The state of what KVM keeps for the machine as a whole: interrupt controllers, timer and clock.
//!
//! It is restored after the vCPUs and before devices: an I/O APIC that is set sends what is pending in it to
//! local APICs, which must have their state by then, and a device that raises its line again needs both.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

/// Interrupt controllers, timer and clock. Types of KVM's interface are kept as their bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChipsetState {
    /// Both PICs and the I/O APIC.
    pub controllers: Vec<kvm_irqchip>,
    /// Interval timer.
    pub pit: kvm_pit_state2,
    /// What kvm-clock shows, in nanoseconds.
    pub clock_ns: u64,
}

/// Why the state could not be saved or restored.
#[derive(Debug, thiserror::Error)]
#[error("{action}: {source}")]
pub struct ChipsetError {
    action: &'static str,
    source: kvm_ioctls::Error,
}

fn failed(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> ChipsetError {
    move |source| ChipsetError { action, source }
}

/// Reads the state. All vCPUs are stopped and all devices are still, so that no interrupt is on its way.
pub fn save(vm: &VmFd) -> Result<ChipsetState, ChipsetError> {
    // The clock first, and after the vCPUs were stopped: it is not before anything that the guest has read.
    let clock_ns = read_clock(vm)?;
    let controllers = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
    let controllers = controllers
        .into_iter()
        .map(|chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)?;
            Ok(chip)
        })
        .collect::<Result<_, _>>()
        .map_err(failed("reading an interrupt controller"))?;
    let pit = vm.get_pit2().map_err(failed("reading the interval timer"))?;
    Ok(ChipsetState {
        controllers,
        pit,
        clock_ns,
    })
}

/// Sets interrupt controllers and timer of a machine whose vCPUs have their state.
pub fn restore(vm: &VmFd, state: &ChipsetState) -> Result<(), ChipsetError> {
    for chip in &state.controllers {
        vm.set_irqchip(chip)
            .map_err(failed("setting an interrupt controller"))?;
    }
    vm.set_pit2(&state.pit)
        .map_err(failed("setting the interval timer"))
}

/// What kvm-clock shows, in nanoseconds. vCPUs are stopped.
pub fn read_clock(vm: &VmFd) -> Result<u64, ChipsetError> {
    let clock = vm.get_clock().map_err(failed("reading kvm-clock"))?;
    Ok(clock.clock)
}

/// Sets kvm-clock. It runs from then on, so that this is done just before the vCPUs run.
///
/// Without `KVM_CLOCK_REALTIME`, which would add the time that has passed since the save: to the guest it
/// did not pass. Its monotonic time goes on where it stopped, or its watchdogs would fire; its wall clock is
/// stepped by the guest agent.
pub fn set_clock(vm: &VmFd, clock_ns: u64) -> Result<(), ChipsetError> {
    let clock = kvm_clock_data {
        clock: clock_ns,
        flags: 0,
        ..Default::default()
    };
    vm.set_clock(&clock).map_err(failed("setting kvm-clock"))
}
