//! The machine: RAM, vCPUs, board, and what puts them together for each boot.

pub mod assembly;
pub mod board;
pub mod cpuid;
pub mod dirty;
mod ioctl;
pub mod memory;
pub mod platform;
pub mod slots;
pub mod vcpu;
pub mod vcpu_state;
pub mod vm_state;
