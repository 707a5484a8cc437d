//! The few PC devices that stock kernels need: serial console, ACPI power management and resets.

pub mod console;
pub mod power;
pub mod serial;
