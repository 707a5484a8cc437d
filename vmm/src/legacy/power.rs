//! ACPI fixed hardware (ACPI 4.8.4): PM1 event and control block, with power button and S5.

use serde::{Deserialize, Serialize};

use crate::boot::acpi::S5_SLEEP_TYPE;
use crate::persist::{State, StateError, ensure};

const POWER_BUTTON: u16 = 1 << 8;
const SCI_ENABLED: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;

/// State of the PM1 registers, version 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PowerState {
    status: u16,
    enable: u16,
    control: u16,
}

impl State for PowerState {
    const VERSION: u32 = 1;
}

/// What a write asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// The guest has entered S5.
    Off,
    /// It has entered a sleep state that the machine does not offer.
    UnknownSleep(u8),
}

/// The PM1 event and control block.
#[derive(Debug, Default)]
pub struct Power {
    state: PowerState,
}

impl Power {
    /// A copy of the registers.
    pub fn save(&self) -> PowerState {
        self.state
    }

    /// Takes over registers. The level of the interrupt is the board's to set.
    pub fn restore(&mut self, state: PowerState) -> Result<(), StateError> {
        // The button is all that raises a status, and SLP_EN is never kept.
        ensure(
            state.status & !POWER_BUTTON == 0 && state.control & SLEEP_ENABLE == 0,
            "acpi",
            || {
                format!(
                    "PM1 registers {:#x} and {:#x} have bits that are never set",
                    state.status, state.control
                )
            },
        )?;
        self.state = state;
        Ok(())
    }

    /// Presses the power button: the guest sees it at its next interrupt.
    pub fn press_button(&mut self) {
        self.state.status |= POWER_BUTTON;
    }

    /// Level of the system control interrupt.
    pub fn interrupt(&self) -> bool {
        self.state.status & self.state.enable != 0
    }

    /// Reads `data.len()` bytes at `offset` of the event block.
    pub fn read_event(&self, offset: u16, data: &mut [u8]) {
        let value = u32::from(self.state.status) | u32::from(self.state.enable) << 16;
        read(value, offset, data);
    }

    /// Writes to the event block. Bits of the status register are cleared by writing one.
    pub fn write_event(&mut self, offset: u16, data: &[u8]) {
        for (byte, offset) in data.iter().zip(offset..) {
            let value = u16::from(*byte);
            match offset {
                0 => self.state.status &= !value,
                1 => self.state.status &= !(value << 8),
                2 => self.state.enable = self.state.enable & 0xff00 | value,
                3 => self.state.enable = self.state.enable & 0x00ff | value << 8,
                _ => {}
            }
        }
    }

    /// Reads the control register.
    pub fn read_control(&self, offset: u16, data: &mut [u8]) {
        read(u32::from(self.state.control | SCI_ENABLED), offset, data);
    }

    /// Writes to the control register.
    pub fn write_control(&mut self, offset: u16, data: &[u8]) -> Option<PowerRequest> {
        let mut value = self.state.control;
        for (byte, offset) in data.iter().zip(offset..) {
            match offset {
                0 => value = value & 0xff00 | u16::from(*byte),
                1 => value = value & 0x00ff | u16::from(*byte) << 8,
                _ => {}
            }
        }
        // SLP_EN reads as zero.
        self.state.control = value & !SLEEP_ENABLE;
        if value & SLEEP_ENABLE == 0 {
            return None;
        }
        match (value >> 10 & 7) as u8 {
            S5_SLEEP_TYPE => Some(PowerRequest::Off),
            other => Some(PowerRequest::UnknownSleep(other)),
        }
    }
}

fn read(value: u32, offset: u16, data: &mut [u8]) {
    let bytes = value.to_le_bytes();
    for (byte, offset) in data.iter_mut().zip(usize::from(offset)..) {
        *byte = bytes.get(offset).copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_power_button_interrupts_an_enabled_guest_until_it_acknowledges() {
        let mut power = Power::default();
        power.press_button();
        assert!(!power.interrupt(), "not enabled yet");
        power.write_event(2, &POWER_BUTTON.to_le_bytes());
        assert!(power.interrupt());
        let mut status = [0; 2];
        power.read_event(0, &mut status);
        assert_eq!(u16::from_le_bytes(status), POWER_BUTTON);
        power.write_event(0, &POWER_BUTTON.to_le_bytes());
        assert!(!power.interrupt());
    }

    #[test]
    fn sleep_type_5_with_sleep_enable_powers_off() {
        let mut power = Power::default();
        let request = u16::from(S5_SLEEP_TYPE) << 10;
        assert_eq!(power.write_control(0, &request.to_le_bytes()), None);
        let request = request | SLEEP_ENABLE;
        assert_eq!(
            power.write_control(0, &request.to_le_bytes()),
            Some(PowerRequest::Off)
        );
        assert_eq!(
            power.write_control(0, &SLEEP_ENABLE.to_le_bytes()),
            Some(PowerRequest::UnknownSleep(0))
        );
    }
}
