//! Bus 0: which function answers to a configuration or memory access.

use crate::layout;

use super::config::{ConfigState, Identity};

/// Slots of bus 0.
pub const SLOTS: usize = 32;
/// Window of memory that each slot's BAR begins in: addresses are fixed by slot.
pub const BAR_STRIDE: u64 = 0x10_0000;

/// A function on the bus.
pub trait Function: Send {
    /// Reads configuration space.
    fn read_config(&mut self, offset: usize, data: &mut [u8]);
    /// Writes configuration space.
    fn write_config(&mut self, offset: usize, data: &[u8]);
    /// Where BAR 0 is decoded now, and its size.
    fn bar(&self) -> Option<(u64, u64)>;
    /// Reads BAR 0.
    fn read_bar(&mut self, offset: u64, data: &mut [u8]);
    /// Writes BAR 0.
    fn write_bar(&mut self, offset: u64, data: &[u8]);
}

/// Address that the machine gives to the BAR of the function in `slot`; the guest may move it.
pub fn bar_address(slot: u8) -> u32 {
    (layout::PCI_HOLE + u64::from(slot) * BAR_STRIDE) as u32
}

struct HostBridge(ConfigState);

impl Function for HostBridge {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.0.write(offset, data);
    }
    fn bar(&self) -> Option<(u64, u64)> {
        None
    }
    fn read_bar(&mut self, _offset: u64, _data: &mut [u8]) {}
    fn write_bar(&mut self, _offset: u64, _data: &[u8]) {}
}

/// Bus 0 with its host bridge in slot 0.
pub struct Bus {
    functions: [Option<Box<dyn Function>>; SLOTS],
    /// The last value written to port 0xCF8.
    address: u32,
}

const ADDRESS_ENABLE: u32 = 1 << 31;

impl Default for Bus {
    fn default() -> Bus {
        let mut bus = Bus {
            functions: Default::default(),
            address: 0,
        };
        // The generic PCI Express host bridge that several virtual machine monitors use.
        bus.functions[0] = Some(Box::new(HostBridge(ConfigState::new(Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        }))));
        bus
    }
}

impl Bus {
    /// Puts a function into a free slot.
    pub fn insert(&mut self, slot: u8, function: Box<dyn Function>) {
        debug_assert!(self.functions[usize::from(slot)].is_none());
        self.functions[usize::from(slot)] = Some(function);
    }

    /// Reads ports 0xCF8 to 0xCFF.
    pub fn read_port(&mut self, port: u16, data: &mut [u8]) {
        match port {
            0xcf8 if data.len() == 4 => data.copy_from_slice(&self.address.to_le_bytes()),
            0xcfc..=0xcff if self.address & ADDRESS_ENABLE != 0 => {
                let address = self.address;
                self.read_config(
                    (address >> 16 & 0xff) as u8,
                    (address >> 8 & 0xff) as u8,
                    (address & 0xfc) as usize + usize::from(port & 3),
                    data,
                );
            }
            _ => data.fill(0xff),
        }
    }

    /// Writes ports 0xCF8 to 0xCFF.
    pub fn write_port(&mut self, port: u16, data: &[u8]) {
        match (port, data) {
            (0xcf8, &[a, b, c, d]) => self.address = u32::from_le_bytes([a, b, c, d]),
            (0xcfc..=0xcff, data) if self.address & ADDRESS_ENABLE != 0 => {
                let address = self.address;
                self.write_config(
                    (address >> 16 & 0xff) as u8,
                    (address >> 8 & 0xff) as u8,
                    (address & 0xfc) as usize + usize::from(port & 3),
                    data,
                );
            }
            _ => {}
        }
    }

    /// Reads memory in the ECAM or in a BAR; `false` when nobody answers.
    pub fn read_memory(&mut self, address: u64, data: &mut [u8]) -> bool {
        if let Some(offset) = ecam_offset(address) {
            self.read_config(0, (offset >> 12) as u8, (offset & 0xfff) as usize, data);
            return true;
        }
        let Some((function, offset)) = self.find(address) else {
            return false;
        };
        function.read_bar(offset, data);
        true
    }

    /// Writes memory in the ECAM or in a BAR; `false` when nobody answers.
    pub fn write_memory(&mut self, address: u64, data: &[u8]) -> bool {
        if let Some(offset) = ecam_offset(address) {
            self.write_config(0, (offset >> 12) as u8, (offset & 0xfff) as usize, data);
            return true;
        }
        let Some((function, offset)) = self.find(address) else {
            return false;
        };
        function.write_bar(offset, data);
        true
    }

    fn find(&mut self, address: u64) -> Option<(&mut Box<dyn Function>, u64)> {
        self.functions.iter_mut().flatten().find_map(|function| {
            let (start, size) = function.bar()?;
            let offset = address.checked_sub(start)?;
            (offset < size).then_some((function, offset))
        })
    }

    fn function(&mut self, bus: u8, devfn: u8) -> Option<&mut Box<dyn Function>> {
        if bus != 0 || devfn & 7 != 0 {
            return None;
        }
        self.functions[usize::from(devfn >> 3)].as_mut()
    }

    fn read_config(&mut self, bus: u8, devfn: u8, offset: usize, data: &mut [u8]) {
        match self.function(bus, devfn) {
            Some(function) => function.read_config(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write_config(&mut self, bus: u8, devfn: u8, offset: usize, data: &[u8]) {
        if let Some(function) = self.function(bus, devfn) {
            function.write_config(offset, data);
        }
    }
}

fn ecam_offset(address: u64) -> Option<u64> {
    address
        .checked_sub(layout::ECAM)
        .filter(|offset| *offset < layout::ECAM_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_into_configuration_space_lead_to_the_same_function() {
        let mut bus = Bus::default();
        let mut through_memory = [0; 4];
        assert!(bus.read_memory(layout::ECAM, &mut through_memory));
        bus.write_port(0xcf8, &ADDRESS_ENABLE.to_le_bytes());
        let mut through_port = [0; 4];
        bus.read_port(0xcfc, &mut through_port);
        assert_eq!(through_memory, through_port);
        assert_eq!(u32::from_le_bytes(through_port), 0x0008_1b36);
    }

    #[test]
    fn empty_slots_and_foreign_addresses_answer_with_ones() {
        let mut bus = Bus::default();
        let mut data = [0; 4];
        assert!(bus.read_memory(layout::ECAM + (5 << 15), &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.read_memory(layout::PCI_HOLE, &mut data));
    }
}
