//! PCI: bus 0 with a host bridge and one function a slot, reached through ports 0xCF8/0xCFC and the ECAM.

pub mod bus;
pub mod config;
pub mod interrupts;
pub mod msix;
