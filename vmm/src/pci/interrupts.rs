//! Interrupt routing: the wiring of a PC for legacy interrupts, and a global system interrupt (GSI) with
//! an irqfd for each MSI-X vector.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

/// First GSI that no pin of the I/O APIC uses.
const FIRST_MSI_GSI: u32 = 24;

/// A message that a vector sends (PCI 3.0, 6.8.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Address, both halves.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// The routing table of one virtual machine.
pub struct Router {
    vm: Arc<VmFd>,
    messages: Mutex<Messages>,
}

struct Messages {
    next: u32,
    routes: BTreeMap<u32, Message>,
}

impl Router {
    /// Wires the legacy interrupts.
    pub fn new(vm: Arc<VmFd>) -> Result<Arc<Router>, kvm_ioctls::Error> {
        let router = Router {
            vm,
            messages: Mutex::new(Messages {
                next: FIRST_MSI_GSI,
                routes: BTreeMap::new(),
            }),
        };
        router.apply(&BTreeMap::new())?;
        Ok(Arc::new(router))
    }

    /// A GSI with an irqfd that raises it once it is routed.
    pub fn allocate(self: &Arc<Self>) -> Result<MessageInterrupt, kvm_ioctls::Error> {
        let event = EventFd::new(libc::EFD_NONBLOCK).map_err(kvm_ioctls::Error::from)?;
        let gsi = {
            let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
            messages.next += 1;
            messages.next - 1
        };
        self.vm.register_irqfd(&event, gsi)?;
        Ok(MessageInterrupt {
            router: self.clone(),
            gsi,
            event,
        })
    }

    fn route(&self, gsi: u32, message: Message) -> Result<(), kvm_ioctls::Error> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        if messages.routes.insert(gsi, message) == Some(message) {
            return Ok(());
        }
        self.apply(&messages.routes)
    }

    fn apply(&self, routes: &BTreeMap<u32, Message>) -> Result<(), kvm_ioctls::Error> {
        let mut entries = legacy_routes();
        for (gsi, message) in routes {
            let mut entry = kvm_irq_routing_entry {
                gsi: *gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            entry.u.msi.address_lo = message.address as u32;
            entry.u.msi.address_hi = (message.address >> 32) as u32;
            entry.u.msi.data = message.data;
            entries.push(entry);
        }
        let routing =
            KvmIrqRouting::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
        self.vm.set_gsi_routing(&routing)
    }
}

/// Interrupts 0 to 15 reach the PICs and the I/O APIC, 16 to 23 the I/O APIC alone. The PIT is wired to
/// pin 2 of the I/O APIC, as the MADT says.
fn legacy_routes() -> Vec<kvm_irq_routing_entry> {
    let pin = |gsi: u32, chip: u32, pin: u32| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip.irqchip = chip;
        entry.u.irqchip.pin = pin;
        entry
    };
    let mut entries = Vec::new();
    for gsi in 0..24 {
        match gsi {
            0..8 => entries.push(pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
            8..16 => entries.push(pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
            _ => {}
        }
        match gsi {
            0 => entries.push(pin(0, KVM_IRQCHIP_IOAPIC, 2)),
            2 => {}
            _ => entries.push(pin(gsi, KVM_IRQCHIP_IOAPIC, gsi)),
        }
    }
    entries
}

/// One message-signalled interrupt.
pub struct MessageInterrupt {
    router: Arc<Router>,
    gsi: u32,
    event: EventFd,
}

impl MessageInterrupt {
    /// Sends `message` from now on.
    pub fn route(&self, message: Message) -> Result<(), kvm_ioctls::Error> {
        self.router.route(self.gsi, message)
    }

    /// Raises the interrupt.
    pub fn raise(&self) {
        // An eventfd refuses a write only when its counter is full: then KVM has yet to see the last one.
        let _ = self.event.write(1);
    }
}
