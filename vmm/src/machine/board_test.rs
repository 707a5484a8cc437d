use std::sync::mpsc::channel;

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip};
use kvm_ioctls::Kvm;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::machine::memory::GuestRam;
use crate::pci::bus::bar_address;
use crate::pci::interrupts::Router;
use crate::virtio::rng::RngDevice;
use crate::virtio::transport::{SharedDevice, Transport};

/// A board with an entropy device in each of the slots.
struct Fixture {
    board: Board,
    vm: Arc<VmFd>,
    _ram: GuestRam,
    _dir: TempDir,
}

impl Fixture {
    fn new(slots: &[u8]) -> Option<Fixture> {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("SKIPPED: /dev/kvm cannot be opened");
            return None;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        vm.create_irq_chip().unwrap();
        let router = Router::new(vm.clone()).unwrap();
        let ram = GuestRam::new(16).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let console = ConsoleLog::open(&dir.path().join("console.log")).unwrap();
        let board = Board::new(vm.clone(), console, 1, channel().0).unwrap();
        for slot in slots {
            let device: SharedDevice = Arc::new(Mutex::new(Box::new(RngDevice::new())));
            let transport = Transport::new(&vm, &router, &ram.memory, *slot, &device).unwrap();
            lock(&board.pci).insert(*slot, Box::new(transport));
        }
        Some(Fixture {
            board,
            vm,
            _ram: ram,
            _dir: dir,
        })
    }

    fn saved(&self) -> Vec<u8> {
        self.board.suspend().unwrap();
        self.board.save().unwrap()
    }

    /// Whether the I/O APIC sees the ACPI interrupt.
    fn sci(&self) -> bool {
        let mut chip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        self.vm.get_irqchip(&mut chip).unwrap();
        // SAFETY: the chip that was asked for is an I/O APIC.
        let apic = unsafe { chip.chip.ioapic };
        apic.irr & 1 << layout::SCI_IRQ != 0
    }
}

/// Any access of a guest to the board.
fn access(board: &Board, (kind, at, value): (u8, u16, u32)) {
    let bytes = value.to_le_bytes();
    match kind % 7 {
        0 => board.write_port(COM1 + at % 8, &bytes[..1]),
        1 => board.read_port(COM1 + at % 8, &mut [0]),
        2 => board.write_port(PM1_EVENT + at % 4, &bytes[..2]),
        3 => board.press_power_button(),
        4 => board.write_port(
            PCI_CONFIG,
            &(0x8000_0000 | u32::from(at % 64) << 8 | value & 0xfc).to_le_bytes(),
        ),
        5 => board.write_port(0xcfc, &bytes),
        _ => board.write_memory(u64::from(bar_address(1)) + u64::from(at % 0x40), &bytes),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn saved_restored_and_saved_again_the_board_is_the_same(
        accesses in prop::collection::vec(any::<(u8, u16, u32)>(), 0..60)
    ) {
        let Some(fixture) = Fixture::new(&[1]) else { return Ok(()) };
        for one in accesses {
            access(&fixture.board, one);
        }
        let saved = fixture.saved();
        let Some(fresh) = Fixture::new(&[1]) else { return Ok(()) };
        fresh.board.restore(&saved).unwrap();
        prop_assert_eq!(fresh.saved(), saved.clone());
        fresh.board.resume().unwrap();
        prop_assert_eq!(fresh.saved(), saved, "resumed and suspended");
    }

    #[test]
    fn no_bytes_make_the_board_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        flips in prop::collection::vec((any::<u16>(), any::<u8>()), 1..4),
        cut in any::<u16>(),
    ) {
        let Some(fixture) = Fixture::new(&[1]) else { return Ok(()) };
        let saved = fixture.saved();
        prop_assert!(fixture.board.restore(&bytes).is_err());
        prop_assert!(fixture.board.restore(&saved[..usize::from(cut) % saved.len()]).is_err());
        let mut damaged = saved;
        for (at, value) in flips {
            let at = usize::from(at) % damaged.len();
            damaged[at] = value;
        }
        if fixture.board.restore(&damaged).is_ok() {
            fixture.board.save().unwrap();
        }
    }
}

#[test]
fn other_devices_or_slots_than_were_saved_are_refused_by_name() {
    let (Some(saved), Some(more), Some(moved), Some(fewer)) = (
        Fixture::new(&[1]),
        Fixture::new(&[1, 2]),
        Fixture::new(&[3]),
        Fixture::new(&[]),
    ) else {
        return;
    };
    let saved = saved.saved();
    for (board, reason) in [
        (more, "nothing is there where rng in slot 2 is expected"),
        (moved, "rng is in slot 1 where rng in slot 3 is expected"),
        (fewer, "rng was saved, and the configuration does not have it"),
    ] {
        let error = board.board.restore(&saved).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn a_pressed_power_button_still_interrupts_after_a_restore() {
    let Some(fixture) = Fixture::new(&[]) else { return };
    fixture.board.write_port(PM1_EVENT + 2, &0x100u16.to_le_bytes());
    fixture.board.press_power_button();
    assert!(fixture.sci());
    let saved = fixture.saved();
    let Some(fresh) = Fixture::new(&[]) else { return };
    fresh.board.restore(&saved).unwrap();
    assert!(
        !fresh.sci(),
        "the interrupt controllers may still get their state"
    );
    fresh.board.resume().unwrap();
    assert!(fresh.sci());
    fresh.board.write_port(PM1_EVENT, &0x100u16.to_le_bytes());
    assert!(!fresh.sci());
}

#[test]
fn the_console_goes_on_with_the_registers_that_its_driver_has_set() {
    let (Some(fixture), Some(fresh)) = (Fixture::new(&[]), Fixture::new(&[])) else {
        return;
    };
    // Divisor latch, line control, scratch.
    for (register, value) in [(3, 0x83), (0, 1), (1, 0), (3, 0x03), (7, 0x5a)] {
        fixture.board.write_port(COM1 + register, &[value]);
    }
    fresh.board.restore(&fixture.saved()).unwrap();
    fresh.board.resume().unwrap();
    for (register, value) in [(3, 0x03), (7, 0x5a)] {
        let mut byte = [0];
        fresh.board.read_port(COM1 + register, &mut byte);
        assert_eq!(byte, [value]);
    }
    fresh.board.write_port(COM1, b"x");
}
