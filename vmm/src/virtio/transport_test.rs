//! A driver's view of the transport, on a real KVM virtual machine: interrupts are seen as events.

use std::sync::Mutex;

use kvm_ioctls::Kvm;
use virtio_queue::QueueT;

use super::*;
use crate::machine::memory::GuestRam;

pub(super) const FEATURE: u64 = 1 << 5;

/// A device that only remembers what happened to it.
#[derive(Default)]
struct Probe {
    active: Arc<Mutex<Option<Activation>>>,
    fail: bool,
}

impl VirtioDevice for Probe {
    fn name(&self) -> &str {
        "probe"
    }
    fn device_type(&self) -> u32 {
        2
    }
    fn features(&self) -> u64 {
        VERSION_1 | FEATURE
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0x40u8.wrapping_add(offset as u8));
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if self.fail {
            return Err(DeviceError::Queues {
                device: "probe".to_owned(),
                got: 0,
                needed: 1,
            });
        }
        *self.active.lock().unwrap() = Some(activation);
        Ok(())
    }
    fn reset(&mut self) {
        *self.active.lock().unwrap() = None;
    }
    fn suspend(&mut self) -> Result<Vec<QueueProgress>, DeviceError> {
        let active = self.active.lock().unwrap();
        let queues = active.iter().flat_map(|activation| &activation.queues);
        Ok(queues
            .map(|queue| QueueProgress::of(queue.index, &queue.queue))
            .collect())
    }
    fn resume(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}

pub(super) struct Fixture {
    pub(super) transport: Transport,
    pub(super) active: Arc<Mutex<Option<Activation>>>,
    _ram: GuestRam,
}

impl Fixture {
    pub(super) fn new(fail: bool) -> Option<Fixture> {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("SKIPPED: /dev/kvm cannot be opened");
            return None;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        vm.create_irq_chip().unwrap();
        let router = Router::new(vm.clone()).unwrap();
        let ram = GuestRam::new(16).unwrap();
        let probe = Probe {
            fail,
            ..Probe::default()
        };
        let active = probe.active.clone();
        let device: SharedDevice = Arc::new(Mutex::new(Box::new(probe)));
        let transport = Transport::new(&vm, &router, &ram.memory, 5, &device).unwrap();
        Some(Fixture {
            transport,
            active,
            _ram: ram,
        })
    }

    pub(super) fn read(&mut self, offset: u64, size: usize) -> u64 {
        let mut bytes = [0; 8];
        self.transport.read_bar(offset, &mut bytes[..size]);
        u64::from_le_bytes(bytes)
    }

    pub(super) fn write(&mut self, offset: u64, size: usize, value: u64) {
        self.transport.write_bar(offset, &value.to_le_bytes()[..size]);
    }

    /// Goes as far as FEATURES_OK; returns the status as read back.
    pub(super) fn negotiate(&mut self, features: u64) -> u64 {
        for status in [0, 1, 3] {
            self.write(0x14, 1, status);
        }
        for half in 0..2 {
            self.write(0x08, 4, half);
            self.write(0x0c, 4, features >> (32 * half) & 0xffff_ffff);
        }
        self.write(0x14, 1, 0xb);
        self.read(0x14, 1)
    }

    pub(super) fn set_up_queue(&mut self, index: u64, size: u64, base: u64) {
        self.write(0x16, 2, index);
        self.write(0x18, 2, size);
        self.write(0x1a, 2, index + 1);
        self.write(0x20, 4, base);
        self.write(0x24, 4, 0);
        self.write(0x28, 8, base + 0x4000);
        self.write(0x30, 8, base + 0x8000);
        self.write(0x1c, 2, 1);
    }

    pub(super) fn enable_msix(&mut self, control: u16) {
        let at = self.transport.msix_capability + 2;
        self.transport.write_config(at, &control.to_le_bytes());
    }

    pub(super) fn pending(&mut self) -> u64 {
        self.read(PENDING, 8)
    }
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let Some(mut fixture) = Fixture::new(false) else {
        return;
    };
    assert_eq!(fixture.negotiate(VERSION_1 | FEATURE << 1) & 8, 0);
    assert_eq!(fixture.negotiate(FEATURE) & 8, 0, "without VERSION_1");
    assert_eq!(fixture.negotiate(VERSION_1 | FEATURE) & 8, 8);
}

#[test]
fn a_driver_starts_and_resets_the_device() {
    let Some(mut fixture) = Fixture::new(false) else {
        return;
    };
    fixture.negotiate(VERSION_1 | FEATURE);
    assert_eq!(fixture.read(0x12, 2), 2);
    fixture.set_up_queue(0, 128, 0x10_0000);
    // Sizes that are no power of two or too large are not taken, and enabled queues do not change.
    fixture.write(0x18, 2, 64);
    assert_eq!(fixture.read(0x18, 2), 128);
    fixture.write(0x16, 2, 1);
    fixture.write(0x18, 2, 65);
    fixture.write(0x18, 2, 128);
    assert_eq!(fixture.read(0x18, 2), 64);
    fixture.write(0x14, 1, 0xf);
    {
        let active = fixture.active.lock().unwrap();
        let active = active.as_ref().unwrap();
        assert_eq!(active.features, VERSION_1 | FEATURE);
        assert_eq!(active.queues.len(), 1, "one queue was enabled");
        let queue = &active.queues[0].queue;
        assert_eq!((queue.size(), queue.desc_table()), (128, 0x10_0000));
        assert_eq!((queue.avail_ring(), queue.used_ring()), (0x10_4000, 0x10_8000));
    }
    // A notification that KVM does not take reaches the queue's event all the same.
    fixture.write(NOTIFY, 2, 0);
    let raised = fixture.active.lock().unwrap().as_ref().unwrap().queues[0]
        .notify
        .read();
    assert_eq!(raised.unwrap(), 1);
    fixture.write(0x14, 1, 0);
    assert!(fixture.active.lock().unwrap().is_none());
    assert_eq!(fixture.read(0x14, 1), 0);
    fixture.write(0x16, 2, 0);
    assert_eq!((fixture.read(0x1c, 2), fixture.read(0x18, 2)), (0, 256));
}

#[test]
fn a_device_that_cannot_start_asks_for_a_reset() {
    let Some(mut fixture) = Fixture::new(true) else {
        return;
    };
    fixture.negotiate(VERSION_1);
    fixture.write(0x14, 1, 0xf);
    assert_eq!(
        fixture.read(0x14, 1) & u64::from(STATUS_NEEDS_RESET),
        u64::from(STATUS_NEEDS_RESET)
    );
    // Queues outside of RAM are refused before the device sees them.
    let Some(mut fixture) = Fixture::new(false) else {
        return;
    };
    fixture.negotiate(VERSION_1);
    fixture.set_up_queue(0, 128, 0xffff_0000);
    fixture.write(0x14, 1, 0xf);
    assert!(fixture.active.lock().unwrap().is_none());
    assert_eq!(
        fixture.read(0x14, 1) & u64::from(STATUS_NEEDS_RESET),
        u64::from(STATUS_NEEDS_RESET)
    );
}

#[test]
fn a_masked_vector_stays_pending_until_it_is_unmasked() {
    let Some(mut fixture) = Fixture::new(false) else {
        return;
    };
    fixture.negotiate(VERSION_1);
    fixture.set_up_queue(1, 64, 0x10_0000);
    fixture.write(0x14, 1, 0xf);
    let interrupt = fixture.active.lock().unwrap().as_ref().unwrap().interrupt.clone();
    interrupt.signal_queue(1);
    assert_eq!(fixture.pending(), 0, "MSI-X is off");
    fixture.enable_msix(0x8000);
    interrupt.signal_queue(1);
    interrupt.signal_queue(0);
    interrupt.signal_config();
    assert_eq!(
        fixture.pending(),
        1 << 2,
        "vectors that were not set are not raised"
    );
    // Message, then unmasked.
    fixture.write(TABLE + 2 * 16, 8, 0xfee0_0000);
    fixture.write(TABLE + 2 * 16 + 8, 4, 0x31);
    fixture.write(TABLE + 2 * 16 + 12, 4, 0);
    assert_eq!(fixture.pending(), 0);
    assert_eq!(fixture.read(TABLE + 2 * 16 + 8, 4), 0x31);
    fixture.enable_msix(0xc000);
    interrupt.signal_queue(1);
    assert_eq!(fixture.pending(), 1 << 2, "the function is masked");
    fixture.enable_msix(0x8000);
    assert_eq!(fixture.pending(), 0);
    assert_eq!(fixture.read(ISR, 1), 3, "queue and configuration");
    assert_eq!(fixture.read(ISR, 1), 0, "read clears");
}

#[test]
fn the_window_in_configuration_space_leads_into_the_bar() {
    let Some(mut fixture) = Fixture::new(false) else {
        return;
    };
    let window = fixture.transport.window;
    let set = |fixture: &mut Fixture, offset: u32, length: u32| {
        let transport = &mut fixture.transport;
        transport.write_config(window + WINDOW_BAR, &[0]);
        transport.write_config(window + WINDOW_OFFSET, &offset.to_le_bytes());
        transport.write_config(window + WINDOW_LENGTH, &length.to_le_bytes());
    };
    set(&mut fixture, DEVICE as u32 + 2, 1);
    let mut byte = [0];
    fixture.transport.read_config(window + WINDOW_DATA, &mut byte);
    assert_eq!(byte, [0x42]);
    set(&mut fixture, 0x14, 1);
    fixture.transport.write_config(window + WINDOW_DATA, &[1]);
    assert_eq!(fixture.read(0x14, 1), 1);
}

#[test]
fn no_access_makes_the_transport_panic() {
    let Some(mut fixture) = Fixture::new(false) else {
        return;
    };
    for offset in (0..u64::from(BAR_SIZE) + 16).step_by(2) {
        for size in [1, 2, 4, 8] {
            fixture.write(offset, size, 0xffff_ffff_ffff_fff5);
            fixture.read(offset, size);
        }
    }
    for offset in 0..0x1008 {
        let mut data = [0xff; 4];
        fixture.transport.write_config(offset, &data);
        fixture.transport.read_config(offset, &mut data);
    }
}
