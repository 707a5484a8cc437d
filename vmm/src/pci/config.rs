//! PCI configuration space of a function with a type 0 header (PCI 3.0, 6.1).

use crate::persist::{StateError, ensure};

/// Size of the configuration space without PCI Express extensions, which our functions do not have.
pub const CONFIG_SIZE: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const COMMAND_MEMORY: u8 = 1 << 1;
/// Memory space, bus master, and interrupt disable: what drivers write.
const COMMAND_WRITABLE: u16 = 1 << 1 | 1 << 2 | 1 << 10;

/// Identity of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, subclass and programming interface, as in the register: `0xCCSSPP`.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// State of a configuration space: what the guest reads, and which bits it may write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigState {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    last_capability: usize,
    next_free: usize,
}

impl ConfigState {
    /// A function without BARs and capabilities.
    pub fn new(identity: Identity) -> ConfigState {
        let mut state = ConfigState {
            bytes: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            last_capability: 0,
            next_free: FIRST_CAPABILITY,
        };
        state.put(0x00, &identity.vendor.to_le_bytes());
        state.put(0x02, &identity.device.to_le_bytes());
        state.put(
            0x08,
            &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes(),
        );
        state.put(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        state.put(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        state.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        // Interrupt line: a scratch register for the operating system.
        state.writable[0x3c] = 0xff;
        state
    }

    /// Makes BAR 0 a 32-bit memory BAR of `size` bytes (a power of two, 4 KiB or more) at `address`.
    pub fn set_memory_bar(&mut self, address: u32, size: u32) {
        debug_assert!(size.is_power_of_two() && size >= 0x1000 && address.is_multiple_of(size));
        self.put(BAR0, &address.to_le_bytes());
        self.writable[BAR0..BAR0 + 4].copy_from_slice(&(!(size - 1)).to_le_bytes());
    }

    /// Adds a capability: `id`, then a pointer to the next one, then `body`. `writable` gives writable
    /// bits of `body` from its start. Returns the offset of the capability.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let offset = self.next_free;
        debug_assert!(offset + 2 + body.len() <= CONFIG_SIZE);
        if self.last_capability == 0 {
            self.bytes[CAPABILITIES] = offset as u8;
            self.bytes[STATUS] |= STATUS_CAPABILITIES;
        } else {
            self.bytes[self.last_capability + 1] = offset as u8;
        }
        self.put(offset, &[id, 0]);
        self.put(offset + 2, body);
        self.writable[offset + 2..offset + 2 + writable.len()].copy_from_slice(writable);
        self.last_capability = offset;
        self.next_free = (offset + 2 + body.len()).next_multiple_of(4);
        offset
    }

    /// Reads at `offset`; bytes beyond the end read as zero.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (byte, offset) in data.iter_mut().zip(offset..) {
            *byte = self.bytes.get(offset).copied().unwrap_or(0);
        }
    }

    /// Writes at `offset`, as far as the guest may.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (byte, offset) in data.iter().zip(offset..) {
            if let (Some(old), Some(mask)) = (self.bytes.get_mut(offset), self.writable.get(offset)) {
                *old = *old & !mask | byte & mask;
            }
        }
    }

    /// Address of BAR 0 while the function decodes memory.
    pub fn decoded_bar(&self) -> Option<u64> {
        let bar = u32::from_le_bytes([
            self.bytes[BAR0],
            self.bytes[BAR0 + 1],
            self.bytes[BAR0 + 2],
            self.bytes[BAR0 + 3],
        ]);
        (self.bytes[COMMAND] & COMMAND_MEMORY != 0 && bar != 0).then_some(u64::from(bar))
    }

    /// What the guest sees of the header and capabilities.
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes over what was saved of `part`, if it is of the same function: bits that the guest cannot write
    /// are the same.
    pub fn restore(&mut self, part: &str, saved: &[u8]) -> Result<(), StateError> {
        self.check(part, saved)?;
        self.bytes.copy_from_slice(saved);
        Ok(())
    }

    /// Whether [`ConfigState::restore`] would take it.
    pub fn check(&self, part: &str, saved: &[u8]) -> Result<(), StateError> {
        ensure(saved.len() == CONFIG_SIZE, part, || {
            format!(
                "its configuration space has {} bytes where {CONFIG_SIZE} are",
                saved.len()
            )
        })?;
        let offset = (0..CONFIG_SIZE).find(|&at| (saved[at] ^ self.bytes[at]) & !self.writable[at] != 0);
        ensure(offset.is_none(), part, || {
            format!(
                "its configuration space is that of another function (offset {:#x})",
                offset.unwrap_or_default()
            )
        })
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> ConfigState {
        ConfigState::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        })
    }

    fn read_u32(state: &ConfigState, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        state.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn a_guest_sizes_and_moves_a_bar() {
        let mut state = state();
        state.set_memory_bar(0xc000_0000, 0x8000);
        assert_eq!(state.decoded_bar(), None, "memory space is off");
        state.write(BAR0, &u32::MAX.to_le_bytes());
        assert_eq!(read_u32(&state, BAR0), 0xffff_8000);
        state.write(BAR0, &0xd000_1234u32.to_le_bytes());
        state.write(COMMAND, &[COMMAND_MEMORY]);
        assert_eq!(state.decoded_bar(), Some(0xd000_0000));
    }

    #[test]
    fn capabilities_are_linked_and_identity_is_read_only() {
        let mut state = state();
        let first = state.add_capability(9, &[1, 2, 3], &[]);
        let second = state.add_capability(0x11, &[0, 0], &[0, 0x80]);
        let mut byte = [0];
        state.read(CAPABILITIES, &mut byte);
        assert_eq!(usize::from(byte[0]), first);
        state.read(first + 1, &mut byte);
        assert_eq!(usize::from(byte[0]), second);
        state.write(0, &[0xff; 4]);
        assert_eq!(read_u32(&state, 0), 0x1042_1af4);
        state.write(second + 2, &[0xff, 0xff]);
        assert_eq!(read_u32(&state, second) >> 16, 0x8000);
        state.write(CONFIG_SIZE - 1, &[0, 0, 0, 0]);
    }
}
