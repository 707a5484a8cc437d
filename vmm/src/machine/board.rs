//! The board of one boot: what vCPUs reach by ports and memory addresses. A reset builds a new one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::layout;
use crate::legacy::console::ConsoleLog;
use crate::legacy::power::{Power, PowerRequest};
use crate::pci::bus::Bus;

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

/// The board.
pub struct Board {
    vm: Arc<VmFd>,
    /// PCI.
    pub pci: Mutex<Bus>,
    serial: Mutex<Serial<IrqLine, NoEvents, ConsoleLog>>,
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
            serial: Mutex::new(Serial::new(line, console)),
            power: Mutex::default(),
            boot,
            events,
            asked: AtomicBool::new(false),
        })
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
                if let Err(error) = lock(&self.serial).write((port - COM1) as u8, byte) {
                    tracing::debug!(%error, "serial console");
                }
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
