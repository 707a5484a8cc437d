//! SMBIOS 3 tables (DMTF DSP0134): who the machine is (type 1: UUID, the same in every incarnation) and
//! strings for systemd, which imports `io.systemd.credential:NAME=VALUE` from type 11 before any unit
//! starts.

use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout;
use crate::machine::memory::GuestMemoryMmap;

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum SmbiosError {
    /// A string cannot be carried.
    #[error("cloneOemStrings: string {index} {reason}")]
    BadString {
        /// Index in the list.
        index: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// All strings together are too long.
    #[error("cloneOemStrings: the SMBIOS tables take {size} bytes where {maximum} fit; shorten the strings")]
    TooLong {
        /// Size of the tables.
        size: usize,
        /// Room for them.
        maximum: usize,
    },
    /// Guest RAM lacks the addresses.
    #[error("writing SMBIOS tables into guest RAM: {0}")]
    Write(#[from] GuestMemoryError),
}

/// What the tables tell.
pub struct Identity<'a> {
    /// System UUID and, as text, system serial number.
    pub uuid: Uuid,
    /// Guest RAM in MiB.
    pub memory_mib: u64,
    /// Strings of type 11.
    pub oem_strings: &'a [String],
}

const MANUFACTURER: &str = "Understudy";
const PRODUCT: &str = "Understudy Virtual Machine";
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Entry point, rounded up to where tables may begin.
const ENTRY_POINT_SIZE: u64 = 32;

/// Writes entry point and tables.
pub fn write(ram: &GuestMemoryMmap, identity: &Identity<'_>) -> Result<(), SmbiosError> {
    let tables = tables(identity)?;
    let maximum = (layout::SMBIOS_SIZE - ENTRY_POINT_SIZE) as usize;
    if tables.len() > maximum {
        return Err(SmbiosError::TooLong {
            size: tables.len(),
            maximum,
        });
    }
    let address = layout::SMBIOS_TABLES + ENTRY_POINT_SIZE;
    ram.write_slice(&tables, GuestAddress(address))?;
    ram.write_slice(
        &entry_point(address, tables.len() as u32),
        GuestAddress(layout::SMBIOS_TABLES),
    )?;
    Ok(())
}

/// 64-bit entry point (DSP0134, 5.2.2).
fn entry_point(tables: u64, size: u32) -> [u8; 24] {
    let mut entry = [0u8; 24];
    entry[0..5].copy_from_slice(b"_SM3_");
    entry[6] = 24;
    entry[7] = 3;
    entry[8] = 2;
    entry[10] = 1;
    entry[12..16].copy_from_slice(&size.to_le_bytes());
    entry[16..24].copy_from_slice(&tables.to_le_bytes());
    entry[5] = entry.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    entry
}

fn tables(identity: &Identity<'_>) -> Result<Vec<u8>, SmbiosError> {
    for (index, string) in identity.oem_strings.iter().enumerate() {
        let bad = |reason| SmbiosError::BadString { index, reason };
        if string.is_empty() {
            return Err(bad("is empty, which would end the list"));
        }
        if string.contains('\0') {
            return Err(bad("contains a zero byte"));
        }
    }
    if identity.oem_strings.len() > usize::from(u8::MAX) {
        return Err(SmbiosError::BadString {
            index: usize::from(u8::MAX),
            reason: "is beyond the 255 strings of a table",
        });
    }
    let mut tables = Vec::new();
    let mut handle = 0u16;
    let mut add = |kind: u8, body: &[u8], strings: &[&str]| {
        tables.extend_from_slice(&[kind, 4 + body.len() as u8]);
        tables.extend_from_slice(&handle.to_le_bytes());
        tables.extend_from_slice(body);
        for string in strings {
            tables.extend_from_slice(string.as_bytes());
            tables.push(0);
        }
        if strings.is_empty() {
            tables.push(0);
        }
        tables.push(0);
        handle += 1;
    };

    // Type 0, firmware: it is a virtual machine (extension byte 2, bit 4), with ACPI (byte 1, bit 0).
    let mut firmware = [0u8; 0x16];
    firmware[0..2].copy_from_slice(&[1, 2]);
    firmware[4] = 3;
    firmware[6] = 1 << 3;
    firmware[14] = 1;
    firmware[15] = 1 << 4;
    firmware[18..20].copy_from_slice(&[0xff, 0xff]);
    add(0, &firmware, &[MANUFACTURER, VERSION, "01/01/2026"]);

    // Type 1, system. The first three fields of the UUID are little-endian (7.2.1).
    let mut system = [0u8; 0x17];
    system[0..4].copy_from_slice(&[1, 2, 3, 4]);
    system[4..20].copy_from_slice(&identity.uuid.to_bytes_le());
    const WAKE_UP_POWER_SWITCH: u8 = 6;
    system[20] = WAKE_UP_POWER_SWITCH;
    let serial = identity.uuid.to_string();
    add(1, &system, &[MANUFACTURER, PRODUCT, VERSION, &serial]);

    // Type 3, chassis: "other", states safe, security none.
    let mut chassis = [0u8; 0x12];
    chassis[0..2].copy_from_slice(&[1, 1]);
    chassis[5..9].copy_from_slice(&[3, 3, 3, 3]);
    add(3, &chassis, &[MANUFACTURER]);

    if !identity.oem_strings.is_empty() {
        let strings: Vec<&str> = identity.oem_strings.iter().map(String::as_str).collect();
        add(11, &[strings.len() as u8], &strings);
    }

    // Type 16 and 17, memory array and device: what dmidecode and inventory tools show.
    let mut array = [0u8; 0x13];
    const LOCATION_OTHER: u8 = 1;
    const USE_SYSTEM_MEMORY: u8 = 3;
    const ECC_UNKNOWN: u8 = 2;
    array[0..3].copy_from_slice(&[LOCATION_OTHER, USE_SYSTEM_MEMORY, ECC_UNKNOWN]);
    const USE_EXTENDED_CAPACITY: u32 = 0x8000_0000;
    array[3..7].copy_from_slice(&USE_EXTENDED_CAPACITY.to_le_bytes());
    const NO_ERROR_INFORMATION: u16 = 0xfffe;
    array[7..9].copy_from_slice(&NO_ERROR_INFORMATION.to_le_bytes());
    array[9..11].copy_from_slice(&1u16.to_le_bytes());
    array[11..19].copy_from_slice(&(identity.memory_mib << 20).to_le_bytes());
    add(16, &array, &[]);

    // Type 32, boot status: no errors.
    add(32, &[0; 7], &[]);
    add(127, &[], &[]);
    Ok(tables)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::memory::GuestRam;

    fn strings_of_type(kind: u8, mut tables: &[u8]) -> Option<Vec<String>> {
        while tables.len() >= 4 {
            let (found, formatted) = (tables[0], usize::from(tables[1]));
            let end = tables[formatted..]
                .windows(2)
                .position(|pair| pair == [0, 0])
                .unwrap()
                + formatted;
            if found == kind {
                let text = &tables[formatted..end];
                return Some(
                    text.split(|byte| *byte == 0)
                        .map(|s| String::from_utf8(s.to_vec()).unwrap())
                        .collect(),
                );
            }
            tables = &tables[end + 2..];
        }
        None
    }

    #[test]
    fn oem_strings_and_serial_are_where_a_kernel_looks_for_them() {
        let ram = GuestRam::new(16).unwrap();
        let uuid = Uuid::from_u128(0x00112233_4455_6677_8899_aabbccddeeff);
        let strings = vec!["io.systemd.credential:role=clone".to_owned()];
        write(
            &ram.memory,
            &Identity {
                uuid,
                memory_mib: 16,
                oem_strings: &strings,
            },
        )
        .unwrap();
        let mut entry = [0; 24];
        ram.memory
            .read_slice(&mut entry, GuestAddress(layout::SMBIOS_TABLES))
            .unwrap();
        assert_eq!(&entry[0..5], b"_SM3_");
        assert_eq!(entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let size = u32::from_le_bytes(entry[12..16].try_into().unwrap());
        let address = u64::from_le_bytes(entry[16..24].try_into().unwrap());
        let mut tables = vec![0; size as usize];
        ram.memory.read_slice(&mut tables, GuestAddress(address)).unwrap();
        assert_eq!(strings_of_type(11, &tables), Some(strings));
        assert_eq!(strings_of_type(1, &tables).unwrap()[3], uuid.to_string());
        assert!(strings_of_type(127, &tables).is_some());
    }

    #[test]
    fn strings_that_would_break_the_table_are_refused() {
        for bad in [String::new(), "a\0b".to_owned()] {
            let strings = vec!["fine".to_owned(), bad];
            let identity = Identity {
                uuid: Uuid::nil(),
                memory_mib: 16,
                oem_strings: &strings,
            };
            assert!(matches!(
                tables(&identity),
                Err(SmbiosError::BadString { index: 1, .. })
            ));
        }
        let ram = GuestRam::new(16).unwrap();
        let strings = vec!["x".repeat(70_000)];
        let identity = Identity {
            uuid: Uuid::nil(),
            memory_mib: 16,
            oem_strings: &strings,
        };
        assert!(matches!(
            write(&ram.memory, &identity),
            Err(SmbiosError::TooLong { .. })
        ));
    }
}
