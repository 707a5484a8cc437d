//! Guest RAM as KVM has it: a memory slot for each range.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use super::memory::{GuestRam, ranges};

/// One slot.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Its number.
    pub slot: u32,
    /// Guest-physical start.
    pub guest: u64,
    /// Place in the sequence of all RAM.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    host: u64,
}

/// The slots of `ram`. It outlives every machine that they are given to.
pub fn of(ram: &GuestRam) -> Vec<Slot> {
    ranges(ram.size())
        .into_iter()
        .zip(ram.mapped())
        .enumerate()
        .map(|(slot, ((guest, offset, length), (host, ..)))| Slot {
            slot: slot as u32,
            guest,
            offset,
            length,
            host,
        })
        .collect()
}

/// Gives a slot to the guest, or changes its flags (`KVM_MEM_*`).
pub fn set(vm: &VmFd, slot: &Slot, flags: u32) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: slot.slot,
        guest_phys_addr: slot.guest,
        memory_size: slot.length,
        userspace_addr: slot.host,
        flags,
    };
    // SAFETY: the mapping belongs to a `GuestRam`, which outlives every machine, and is used as guest RAM
    // through volatile accesses only.
    unsafe { vm.set_user_memory_region(region) }
}
