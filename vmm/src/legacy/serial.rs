//! The serial port of the console: vm-superio's 16550, and how its state is kept.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};

use super::console::ConsoleLog;
use crate::persist::{State, StateError};

/// Bit of the interrupt identification register: none is pending.
const NO_INTERRUPT: u8 = 1;

/// What it is called in errors.
const PART: &str = "serial";

/// Registers of the serial port, version 1. What it has put out is in the console's log already.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortState {
    /// Divisor latch, low byte first.
    pub divisor: [u8; 2],
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Received and not yet read by the guest.
    #[serde(with = "serde_bytes")]
    pub received: Vec<u8>,
}

impl State for PortState {
    const VERSION: u32 = 1;
}

/// The interrupt line of a port.
#[derive(Clone)]
struct Line(Arc<dyn Trigger<E = io::Error> + Send + Sync>);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> Result<(), io::Error> {
        self.0.trigger()
    }
}

/// The port, whose output goes to a [`ConsoleLog`].
pub struct SerialPort {
    line: Line,
    console: ConsoleLog,
    registers: Serial<Line, NoEvents, ConsoleLog>,
}

impl SerialPort {
    /// A port after power-on, whose interrupts are edges on `line`.
    pub fn new(line: Arc<dyn Trigger<E = io::Error> + Send + Sync>, console: ConsoleLog) -> SerialPort {
        let line = Line(line);
        SerialPort {
            registers: Serial::new(line.clone(), console.clone()),
            line,
            console,
        }
    }

    /// Reads a register.
    pub fn read(&mut self, offset: u8) -> u8 {
        self.registers.read(offset)
    }

    /// Writes a register.
    pub fn write(&mut self, offset: u8, value: u8) {
        if let Err(error) = self.registers.write(offset, value) {
            tracing::debug!(%error, "serial console");
        }
    }

    /// Its registers.
    pub fn save(&self) -> PortState {
        let state = self.registers.state();
        PortState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }

    /// Takes over registers; the log goes on where it is.
    pub fn restore(&mut self, state: &PortState) -> Result<(), StateError> {
        let state = SerialState {
            baud_divisor_low: state.divisor[0],
            baud_divisor_high: state.divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received.clone(),
        };
        self.registers = Serial::from_state(&state, self.line.clone(), NoEvents, self.console.clone())
            .map_err(|error| StateError::unfit(PART, error.to_string()))?;
        Ok(())
    }

    /// Raises again an interrupt that is pending: the edge may have been on its way when the state of the
    /// interrupt controllers was saved. One too many is found to be none by the driver.
    pub fn resume(&self) {
        let pending = self.registers.state().interrupt_identification & NO_INTERRUPT == 0;
        if pending && let Err(error) = self.line.trigger() {
            tracing::error!(%error, "the serial port's interrupt could not be raised");
        }
    }
}
