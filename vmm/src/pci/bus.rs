//! Bus 0: which function answers to a configuration or memory access.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::layout;
use crate::persist::{Envelope, State, StateError, ensure};
use crate::virtio::device::DeviceError;

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

    /// Name of its device, such as `blk-root`.
    fn name(&self) -> String;
    /// Stops what it does by itself. Asked again it does nothing.
    fn suspend(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
    /// Goes on after it was suspended or restored.
    fn resume(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
    /// State of a suspended function.
    fn save(&self) -> Result<Envelope, StateError>;
    /// Takes over a state, or nothing of it where it does not fit. It stays suspended.
    fn restore(&mut self, state: &Envelope) -> Result<(), StateError>;
}

/// State of a function that has nothing but a configuration space, version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeaderState {
    /// Its configuration space.
    #[serde(with = "serde_bytes")]
    config: Vec<u8>,
}

impl State for HeaderState {
    const VERSION: u32 = 1;
}

/// State of the bus with all that is on it, version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BusState {
    /// The last value written to port 0xCF8.
    pub address: u32,
    /// Functions by slot.
    pub functions: BTreeMap<u8, FunctionState>,
}

/// One function on the bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionState {
    /// Name of its device.
    pub name: String,
    /// Its state.
    pub state: Envelope,
}

impl State for BusState {
    const VERSION: u32 = 1;
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
    fn name(&self) -> String {
        HOST_BRIDGE.to_owned()
    }
    fn save(&self) -> Result<Envelope, StateError> {
        let config = self.0.save();
        Envelope::seal(HOST_BRIDGE, &HeaderState { config })
    }
    fn restore(&mut self, state: &Envelope) -> Result<(), StateError> {
        let state: HeaderState = state.open(HOST_BRIDGE)?;
        self.0.restore(HOST_BRIDGE, &state.config)
    }
}

const HOST_BRIDGE: &str = "host bridge";
/// What the bus is called in errors.
const PART: &str = "pci";

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

    /// Suspends all functions. Where one fails, those that were suspended stay so.
    pub fn suspend(&mut self) -> Result<(), DeviceError> {
        self.functions
            .iter_mut()
            .flatten()
            .try_for_each(|function| function.suspend())
    }

    /// Has all functions go on, whether or not one of them fails; the first failure is returned.
    pub fn resume(&mut self) -> Result<(), DeviceError> {
        self.functions
            .iter_mut()
            .flatten()
            .map(|function| function.resume())
            .fold(Ok(()), Result::and)
    }

    /// State of the bus and of all functions, which are suspended.
    pub fn save(&self) -> Result<BusState, StateError> {
        let mut functions = BTreeMap::new();
        for (slot, function) in (0u8..).zip(&self.functions) {
            if let Some(function) = function {
                let (name, state) = (function.name(), function.save()?);
                functions.insert(slot, FunctionState { name, state });
            }
        }
        Ok(BusState {
            address: self.address,
            functions,
        })
    }

    /// Takes over the state of a bus with the same devices in the same slots.
    pub fn restore(&mut self, state: &BusState) -> Result<(), StateError> {
        let mut saved = state.functions.iter();
        for (slot, function) in (0u8..).zip(&mut self.functions) {
            let Some(function) = function else { continue };
            let name = function.name();
            match saved.next() {
                Some((at, found)) if *at == slot && found.name == name => {}
                found => {
                    let reason = match found {
                        Some((at, found)) => format!("{} is in slot {at} where", found.name),
                        None => "nothing is there where".to_owned(),
                    };
                    let reason = format!("{reason} {name} in slot {slot} is expected");
                    return Err(StateError::unfit(PART, reason));
                }
            }
        }
        let left = saved.next();
        ensure(left.is_none(), PART, || {
            let name = left
                .map(|(_, function)| function.name.as_str())
                .unwrap_or_default();
            format!("{name} was saved, and the configuration does not have it")
        })?;
        for (slot, saved) in &state.functions {
            if let Some(function) = &mut self.functions[usize::from(*slot)] {
                function.restore(&saved.state)?;
            }
        }
        self.address = state.address;
        Ok(())
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
