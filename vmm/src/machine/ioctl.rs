//! Requests to KVM that kvm-ioctls does not have. Their numbers are those of `linux/kvm.h`, made up from
//! direction, size and number, and compared at compile time with what the kernel's headers give.

use std::os::fd::AsRawFd;

use kvm_bindings::{kvm_clear_dirty_log, kvm_device_attr, kvm_sregs2};

const WRITE: u64 = 1;
const READ: u64 = 2;
const KVMIO: u64 = 0xae;

const fn request(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | KVMIO << 8 | number
}

/// `KVM_CLEAR_DIRTY_LOG` (KVM API, 4.117).
pub const KVM_CLEAR_DIRTY_LOG: u64 = request(READ | WRITE, 0xc0, size_of::<kvm_clear_dirty_log>());
/// `KVM_GET_SREGS2` (4.131).
pub const KVM_GET_SREGS2: u64 = request(READ, 0xcc, size_of::<kvm_sregs2>());
/// `KVM_SET_SREGS2` (4.132).
pub const KVM_SET_SREGS2: u64 = request(WRITE, 0xcd, size_of::<kvm_sregs2>());
/// `KVM_GET_DEVICE_ATTR` on a vCPU (4.80).
pub const KVM_GET_DEVICE_ATTR: u64 = request(WRITE, 0xe2, size_of::<kvm_device_attr>());

const _: () = {
    assert!(KVM_CLEAR_DIRTY_LOG == 0xc018_aec0);
    assert!(KVM_GET_SREGS2 == 0x8140_aecc);
    assert!(KVM_SET_SREGS2 == 0x4140_aecd);
    assert!(KVM_GET_DEVICE_ATTR == 0x4018_aee2);
};

/// Makes a request.
///
/// # Safety
///
/// `argument` is what `request` takes, and lives as long as the call.
pub unsafe fn call<T>(fd: &impl AsRawFd, request: u64, argument: *mut T) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the caller vouches for the argument; the descriptor is open as long as `fd`.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, argument) };
    if result < 0 {
        return Err(kvm_ioctls::Error::last());
    }
    Ok(())
}
