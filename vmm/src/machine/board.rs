//! The board of one boot: what vCPUs reach by ports and memory addresses. A reset builds a new one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

use crate::layout;
use crate::legacy::console::ConsoleLog;
use crate::legacy::power::{Power, PowerRequest, PowerState};
use crate::legacy::serial::{PortState, SerialPort};
use crate::pci::bus::{Bus, BusState};
use crate::persist::{Envelope, State, StateError};
use crate::virtio::device::DeviceError;

/// What a guest asks of the machine that it runs in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// Reset (ACPI reset register or keyboard controller).
    Reset,
    /// ACPI S5.
    PowerOff,
    /// It cannot go on, for this reason.
    Crashed(String),
}

/// What the supervisor's loop receives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// From the guest in boot number `boot`.
    Guest {
        /// Number of the boot: what an earlier one asked for is void.
        boot: u64,
        /// What it asks.
        event: GuestEvent,
    },
    /// All memory of the guest that was resumed as boot number `boot` is there.
    MemoryComplete {
        /// Number of the boot.
        boot: u64,
    },
    /// Memory of the guest that was resumed cannot be read.
    MemoryDamaged {
        /// Number of the boot.
        boot: u64,
        /// Why.
        message: String,
    },
    /// The process shall end.
    Stop,
}

/// An interrupt line by irqfd.
pub struct IrqLine(EventFd);

impl IrqLine {
    /// An edge-triggered line on `gsi`.
    pub fn new(vm: &VmFd, gsi: u32) -> Result<IrqLine, kvm_ioctls::Error> {
        let event = EventFd::new(libc::EFD_NONBLOCK).map_err(kvm_ioctls::Error::from)?;
        vm.register_irqfd(&event, gsi)?;
        Ok(IrqLine(event))
    }
}

impl Trigger for IrqLine {
    type E = std::io::Error;
    fn trigger(&self) -> Result<(), Self::E> {
        self.0.write(1)
    }
}

/// State of everything on the board, version 1. Each part has a version of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BoardState {
    /// [`PortState`].
    serial: Envelope,
    /// [`PowerState`].
    power: Envelope,
    /// [`BusState`], with the devices on it.
    bus: Envelope,
}

impl State for BoardState {
    const VERSION: u32 = 1;
}

/// What the board is called in errors.
const PART: &str = "board";

/// The board.
///
/// How its state is kept: with the vCPUs stopped, [`Board::suspend`], then [`Board::save`], then the vCPUs'
/// own state. After that [`Board::resume`] has this board go on; or, on a new one made from the same
/// configuration, [`Board::restore`] once the interrupt controllers have their state, then the vCPUs' state
/// (which holds their local APICs), then [`Board::resume`], then the first instruction.
pub struct Board {
    vm: Arc<VmFd>,
    /// PCI.
    pub pci: Mutex<Bus>,
    serial: Mutex<SerialPort>,
    power: Mutex<Power>,
    boot: u64,
    events: Sender<Event>,
    /// The guest has asked for something that ends this boot.
    asked: AtomicBool,
}

impl Board {
    /// A board whose guest's requests go to `events`, marked with the number of the boot.
    pub fn new(
        vm: Arc<VmFd>,
        console: ConsoleLog,
        boot: u64,
        events: Sender<Event>,
    ) -> Result<Board, kvm_ioctls::Error> {
        let line = IrqLine::new(&vm, layout::COM1_IRQ)?;
        Ok(Board {
            vm,
            pci: Mutex::default(),
            serial: Mutex::new(SerialPort::new(Arc::new(line), console)),
            power: Mutex::default(),
            boot,
            events,
            asked: AtomicBool::new(false),
        })
    }

    /// Stops all devices and waits for their requests in flight: guest RAM does not change any more once the
    /// vCPUs do not run either. Asked again it does nothing. Where it fails, [`Board::resume`] undoes it.
    pub fn suspend(&self) -> Result<(), DeviceError> {
        lock(&self.pci).suspend()
    }

    /// The state of the suspended board: what the guest can see of its devices, in a few KiB.
    pub fn save(&self) -> Result<Vec<u8>, StateError> {
        let state = BoardState {
            serial: Envelope::seal(PART, &lock(&self.serial).save())?,
            power: Envelope::seal(PART, &lock(&self.power).save())?,
            bus: Envelope::seal(PART, &lock(&self.pci).save()?)?,
        };
        Envelope::seal(PART, &state)?.to_bytes(PART)
    }

    /// Takes over a state that [`Board::save`] gave, on a board that nothing has run on yet, made from the
    /// same configuration. Where the state does not fit, the board is of no use any more.
    ///
    /// No device is started and no guest RAM is read: all of it may still be missing.
    pub fn restore(&self, state: &[u8]) -> Result<(), StateError> {
        let state: BoardState = Envelope::from_bytes(PART, state)?.open(PART)?;
        let serial: PortState = state.serial.open("serial")?;
        let power: PowerState = state.power.open("acpi")?;
        let bus: BusState = state.bus.open("pci")?;
        lock(&self.serial).restore(&serial)?;
        lock(&self.power).restore(power)?;
        lock(&self.pci).restore(&bus)
    }

    /// Has the board go on after [`Board::suspend`] or [`Board::restore`], before the first instruction.
    ///
    /// No interrupt is lost. A message goes from a device's thread through an irqfd to a local APIC, and may
    /// have been on this way when the vCPUs' state was saved; so every queue that a driver uses is notified
    /// and raises its vector once, as do the serial port and the ACPI block, whose lines are set again. What
    /// was masked is kept in the pending bits. A driver that finds nothing new ignores such an interrupt.
    pub fn resume(&self) -> Result<(), DeviceError> {
        lock(&self.serial).resume();
        self.set_sci(&lock(&self.power));
        lock(&self.pci).resume()
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        let mut power = lock(&self.power);
        power.press_button();
        self.set_sci(&power);
    }

    /// Reports that the guest cannot go on.
    pub fn crashed(&self, reason: &str) {
        self.send(GuestEvent::Crashed(reason.to_owned()));
    }

    /// Port input.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        match port {
            COM1..=COM1_END => {
                data.fill(0xff);
                if let Some(byte) = data.first_mut() {
                    *byte = lock(&self.serial).read((port - COM1) as u8);
                }
            }
            PM1_EVENT..=PM1_EVENT_END => lock(&self.power).read_event(port - PM1_EVENT, data),
            PM1_CONTROL..=PM1_CONTROL_END => lock(&self.power).read_control(port - PM1_CONTROL, data),
            PCI_CONFIG..=PCI_CONFIG_END => lock(&self.pci).read_port(port, data),
            // A keyboard controller with nothing to say: neither input nor output waits.
            KEYBOARD_STATUS => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    /// Port output.
    pub fn write_port(&self, port: u16, data: &[u8]) {
        match (port, data) {
            (COM1..=COM1_END, &[byte, ..]) => {
                lock(&self.serial).write((port - COM1) as u8, byte);
            }
            (PM1_EVENT..=PM1_EVENT_END, data) => {
                let mut power = lock(&self.power);
                power.write_event(port - PM1_EVENT, data);
                self.set_sci(&power);
            }
            (PM1_CONTROL..=PM1_CONTROL_END, data) => {
                let request = lock(&self.power).write_control(port - PM1_CONTROL, data);
                match request {
                    Some(PowerRequest::Off) => self.send(GuestEvent::PowerOff),
                    Some(PowerRequest::UnknownSleep(kind)) => {
                        tracing::warn!(kind, "the guest asked for a sleep state that is not there");
                    }
                    None => {}
                }
            }
            (layout::RESET_PORT, &[layout::RESET_VALUE | 0x0e]) | (KEYBOARD_STATUS, &[KEYBOARD_RESET]) => {
                self.send(GuestEvent::Reset);
            }
            (PCI_CONFIG..=PCI_CONFIG_END, data) => lock(&self.pci).write_port(port, data),
            _ => {}
        }
    }

    /// Memory read outside of RAM.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        if !lock(&self.pci).read_memory(address, data) {
            data.fill(0xff);
        }
    }

    /// Memory write outside of RAM.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        lock(&self.pci).write_memory(address, data);
    }

    fn set_sci(&self, power: &Power) {
        if let Err(error) = self.vm.set_irq_line(layout::SCI_IRQ, power.interrupt()) {
            tracing::error!(%error, "the ACPI interrupt could not be raised");
        }
    }

    /// Whether the guest has asked for a reset or power-off, or has crashed: this boot is about to end, and
    /// there is no session to be saved.
    pub fn has_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    fn send(&self, event: GuestEvent) {
        self.asked.store(true, Ordering::Release);
        // The receiver is gone only while the process ends.
        let boot = self.boot;
        let _ = self.events.send(Event::Guest { boot, event });
    }
}

const COM1: u16 = layout::COM1_PORT;
const COM1_END: u16 = COM1 + 7;
const PM1_EVENT: u16 = layout::PM1_EVENT_PORT;
const PM1_EVENT_END: u16 = PM1_EVENT + 3;
const PM1_CONTROL: u16 = layout::PM1_CONTROL_PORT;
const PM1_CONTROL_END: u16 = PM1_CONTROL + 1;
const PCI_CONFIG: u16 = 0xcf8;
const PCI_CONFIG_END: u16 = 0xcff;
const KEYBOARD_STATUS: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Registers are changed one by one: a panic of one vCPU's thread leaves them whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "board_test.rs"]
mod tests;
