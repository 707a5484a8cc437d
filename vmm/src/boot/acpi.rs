//! ACPI tables: RSDP, XSDT, FADT, FACS, MADT, MCFG and DSDT.
//!
//! The machine is a full ACPI machine with a PM1 event and control block, not a hardware-reduced one:
//! stock kernels then offer the fixed power button, S5 and the reset register with drivers that every
//! distribution loads, and keep PIC and PIT as they know them.

use acpi_tables::Aml;
use acpi_tables::aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout;
use crate::machine::memory::GuestMemoryMmap;

const OEM_ID: [u8; 6] = *b"UNDRST";
const TABLE_ID: [u8; 8] = *b"UNDRSTDY";
const REVISION: u32 = 1;
/// FADT 5.2.9.3, IA-PC boot architecture: there is neither VGA nor a CMOS real-time clock, and no 8042
/// controller to probe. Legacy devices (the serial port) exist.
const BOOT_ARCH: u16 = 1 | 1 << 2 | 1 << 5;
/// Sleep type of S5 in the PM1 control register.
pub const S5_SLEEP_TYPE: u8 = 5;
const FACS_SIZE: usize = 64;

/// Writes all tables and returns the address of the RSDP.
pub fn write(ram: &GuestMemoryMmap, cpus: u8) -> Result<u64, GuestMemoryError> {
    let rsdp_address = layout::ACPI_TABLES;
    let mut writer = Writer {
        ram,
        // The FACS comes first: it must be aligned to 64 bytes.
        next: rsdp_address + 64,
    };
    let facs = writer.write(&facs())?;
    let dsdt = writer.write(&dsdt())?;
    let tables = [fadt(facs, dsdt), madt(cpus), mcfg()];
    let mut xsdt = XSDT::new(OEM_ID, TABLE_ID, REVISION);
    for table in &tables {
        xsdt.add_entry(writer.write(table)?);
    }
    let xsdt = writer.write(&bytes(&xsdt))?;
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    ram.write_slice(&rsdp, GuestAddress(rsdp_address))?;
    Ok(rsdp_address)
}

struct Writer<'a> {
    ram: &'a GuestMemoryMmap,
    next: u64,
}

impl Writer<'_> {
    fn write(&mut self, table: &[u8]) -> Result<u64, GuestMemoryError> {
        let address = self.next;
        self.ram.write_slice(table, GuestAddress(address))?;
        self.next = (address + table.len() as u64).next_multiple_of(16);
        // The number of CPUs is bounded, and with 64 of them the tables take 3 KiB.
        debug_assert!(self.next < layout::ACPI_TABLES + layout::ACPI_SIZE);
        Ok(address)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn facs() -> Vec<u8> {
    let mut facs = vec![0u8; FACS_SIZE];
    facs[0..4].copy_from_slice(b"FACS");
    facs[4..8].copy_from_slice(&(FACS_SIZE as u32).to_le_bytes());
    facs[32] = 2;
    facs
}

fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    let port =
        |port: u16, bits: u8, access| GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM_ID, TABLE_ID, REVISION)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(facs as u32);
    fadt.dsdt = (dsdt as u32).into();
    fadt.sci_int = (layout::SCI_IRQ as u16).into();
    fadt.pm1a_evt_blk = u32::from(layout::PM1_EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(layout::PM1_CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_evt_blk = port(layout::PM1_EVENT_PORT, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(layout::PM1_CONTROL_PORT, 16, AccessSize::WordAccess);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(layout::RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = layout::RESET_VALUE;
    // C2 and C3 are not there (ACPI 5.2.9: latencies above 100 and 1000).
    fadt.p_lvl2_lat = 0xfff.into();
    fadt.p_lvl3_lat = 0xfff.into();
    bytes(&fadt.finalize())
}

/// MADT (5.2.12): a local APIC for each CPU, one I/O APIC, and the two overrides of a PC.
fn madt(cpus: u8) -> Vec<u8> {
    const PCAT_COMPATIBLE: u32 = 1;
    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM_ID, TABLE_ID, REVISION);
    madt.write_u32(36, layout::LOCAL_APIC as u32);
    madt.write_u32(40, PCAT_COMPATIBLE);
    for cpu in 0..cpus {
        // Processor local APIC: ACPI processor UID, APIC ID, enabled.
        madt.append_slice(&[0, 8, cpu, cpu, 1, 0, 0, 0]);
    }
    let mut io_apic = [1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    io_apic[4..8].copy_from_slice(&(layout::IO_APIC as u32).to_le_bytes());
    madt.append_slice(&io_apic);
    // ISA interrupt 0 (PIT) is wired to pin 2; SCI is level-triggered and active high.
    madt.append_slice(&[2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    const LEVEL_ACTIVE_HIGH: u8 = 0b1101;
    let sci = layout::SCI_IRQ as u8;
    madt.append_slice(&[2, 10, 0, sci, sci, 0, 0, 0, LEVEL_ACTIVE_HIGH, 0]);
    // NMI on LINT1 of all CPUs.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt.as_slice().to_vec()
}

fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, TABLE_ID, REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    bytes(&mcfg)
}

fn dsdt() -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, TABLE_ID, REVISION);
    dsdt.append_slice(&pci_host_bridge());
    dsdt.append_slice(&motherboard());
    dsdt.append_slice(&serial_port());
    dsdt.append_slice(&bytes(&aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&S5_SLEEP_TYPE, &S5_SLEEP_TYPE, &aml::ZERO, &aml::ZERO]),
    )));
    dsdt.as_slice().to_vec()
}

fn pci_host_bridge() -> Vec<u8> {
    const CONFIG_PORTS: u16 = 0xcf8;
    bytes(&aml::Device::new(
        "_SB_.PCI0".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A08")),
            &aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_SEG".into(), &aml::ZERO),
            &aml::Name::new("_BBN".into(), &aml::ZERO),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::AddressSpace::new_bus_number(0u16, 0u16),
                    &aml::IO::new(CONFIG_PORTS, CONFIG_PORTS, 1, 8),
                    &aml::AddressSpace::new_memory(
                        aml::AddressSpaceCacheable::NotCacheable,
                        true,
                        layout::PCI_HOLE as u32,
                        (layout::PCI_HOLE + layout::PCI_HOLE_SIZE - 1) as u32,
                        None,
                    ),
                ]),
            ),
        ],
    ))
}

/// Reserves the ECAM: Linux uses it only where it is reserved.
fn motherboard() -> Vec<u8> {
    bytes(&aml::Device::new(
        "_SB_.MBRD".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C02")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::Memory32Fixed::new(
                    true,
                    layout::ECAM as u32,
                    layout::ECAM_SIZE as u32,
                )]),
            ),
        ],
    ))
}

fn serial_port() -> Vec<u8> {
    bytes(&aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::IO::new(layout::COM1_PORT, layout::COM1_PORT, 1, 8),
                    &aml::Interrupt::new(true, true, false, false, layout::COM1_IRQ),
                ]),
            ),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::memory::GuestRam;

    fn read_table(ram: &GuestMemoryMmap, address: u64) -> Vec<u8> {
        let length: u32 = ram.read_obj(GuestAddress(address + 4)).unwrap();
        let mut table = vec![0; length as usize];
        ram.read_slice(&mut table, GuestAddress(address)).unwrap();
        table
    }

    #[test]
    fn the_rsdp_leads_to_every_table_and_all_checksums_hold() {
        let ram = GuestRam::new(16).unwrap();
        let rsdp = write(&ram.memory, 64).unwrap();
        let mut signature = [0; 8];
        ram.memory.read_slice(&mut signature, GuestAddress(rsdp)).unwrap();
        assert_eq!(&signature, b"RSD PTR ");
        let xsdt: u64 = ram.memory.read_obj(GuestAddress(rsdp + 24)).unwrap();
        let xsdt = read_table(&ram.memory, xsdt);
        let mut names = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let address = u64::from_le_bytes(entry.try_into().unwrap());
            let table = read_table(&ram.memory, address);
            assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            names.push(String::from_utf8_lossy(&table[0..4]).into_owned());
            if &table[0..4] == b"FACP" {
                let dsdt = u64::from_le_bytes(table[140..148].try_into().unwrap());
                let dsdt = read_table(&ram.memory, dsdt);
                assert_eq!(&dsdt[0..4], b"DSDT");
                assert_eq!(dsdt.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            }
        }
        assert_eq!(names, ["FACP", "APIC", "MCFG"]);
    }
}
