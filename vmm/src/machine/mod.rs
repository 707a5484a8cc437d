//! The machine: RAM, vCPUs, board, and what puts them together for each boot.

pub mod assembly;
pub mod board;
pub mod cpuid;
pub mod memory;
pub mod platform;
pub mod vcpu;
