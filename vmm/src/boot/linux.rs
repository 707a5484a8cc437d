//! Loading a bzImage and entering it by the 64-bit entry point of the Linux boot protocol
//! (Documentation/arch/x86/boot.rst).

use std::io::Cursor;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::Payload;
use crate::layout;
use crate::machine::memory;
use crate::machine::memory::GuestMemoryMmap;

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Not a kernel that we can boot.
    #[error(
        "{kernel} is not a 64-bit bzImage ({reason}); name a distribution kernel such as /boot/vmlinuz-*"
    )]
    NotAKernel {
        /// Where the kernel came from.
        kernel: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The guest's RAM is too small.
    #[error("{what} ({size} bytes) does not fit into the guest's RAM; give the guest more memory")]
    NoRoom {
        /// Kernel or initrd.
        what: String,
        /// Its size.
        size: u64,
    },
    /// The kernel's own limit on its command line.
    #[error("the command line has {length} bytes, but this kernel takes {maximum}")]
    CmdlineTooLong {
        /// Bytes given.
        length: usize,
        /// Bytes that the kernel takes.
        maximum: usize,
    },
    /// A fixed address lies outside of RAM.
    #[error("writing {what} into guest RAM: {source}")]
    Write {
        /// What was written.
        what: &'static str,
        /// Why it failed.
        source: vm_memory::GuestMemoryError,
    },
}

/// State of the boot CPU's registers that enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Instruction pointer.
    pub rip: u64,
    /// Address of the zero page.
    pub rsi: u64,
}

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const E820_ACPI: u32 = 3;
/// `XLF_KERNEL_64` in `xloadflags`: the kernel has a 64-bit entry point at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// Offset of the 64-bit entry point in the loaded kernel.
const ENTRY_64: u64 = 0x200;
/// `type_of_loader` without an assigned ID.
const LOADER_UNDEFINED: u8 = 0xff;
/// Offsets in the bzImage's setup header.
const HEADER_MAGIC: usize = 0x202;
const HEADER_XLOADFLAGS: usize = 0x236;

/// Loads kernel, initrd, command line, zero page, page tables and descriptor table.
pub fn load(ram: &GuestMemoryMmap, ram_size: u64, payload: &Payload, rsdp: u64) -> Result<Entry, LoadError> {
    check_header(payload)?;
    let low_ram = ram_size.min(layout::PCI_HOLE);
    let kernel_size = payload.kernel.len() as u64;
    let no_room = |what: &str, size: u64| LoadError::NoRoom {
        what: what.to_owned(),
        size,
    };
    if layout::HIGH_RAM + kernel_size > low_ram {
        return Err(no_room(&payload.kernel_name, kernel_size));
    }
    let loaded = BzImage::load(
        ram,
        Some(GuestAddress(layout::HIGH_RAM)),
        &mut Cursor::new(&payload.kernel),
        Some(GuestAddress(layout::HIGH_RAM)),
    )
    .map_err(|e| LoadError::NotAKernel {
        kernel: payload.kernel_name.clone(),
        reason: e.to_string(),
    })?;
    let mut params = boot_params::default();
    if let Some(header) = loaded.setup_header {
        params.hdr = header;
    }
    let header = &mut params.hdr;
    header.type_of_loader = LOADER_UNDEFINED;

    // The kernel decompresses itself in place or at its preferred address: leave it that room.
    let preferred = header.pref_address.max(layout::HIGH_RAM);
    let kernel_top = preferred
        .max(layout::HIGH_RAM + kernel_size)
        .saturating_add(u64::from(header.init_size));
    if let Some(initrd) = &payload.initrd {
        let size = initrd.len() as u64;
        let top = low_ram.min(u64::from(header.initrd_addr_max) + 1);
        let address = top
            .checked_sub(size)
            .map(|address| address & !0xfff)
            .filter(|address| *address >= kernel_top)
            .ok_or_else(|| no_room(&payload.initrd_name, size))?;
        write_slice(ram, "the initrd", initrd, address)?;
        header.ramdisk_image = address as u32;
        header.ramdisk_size = size as u32;
    } else if kernel_top > low_ram {
        return Err(no_room(&payload.kernel_name, u64::from(header.init_size)));
    }

    let maximum = (header.cmdline_size as usize).min(layout::CMDLINE_SIZE as usize - 1);
    let cmdline = payload.cmdline.as_bytes();
    if cmdline.len() > maximum {
        return Err(LoadError::CmdlineTooLong {
            length: cmdline.len(),
            maximum,
        });
    }
    write_slice(ram, "the command line", cmdline, layout::CMDLINE)?;
    write_slice(
        ram,
        "the command line",
        &[0],
        layout::CMDLINE + cmdline.len() as u64,
    )?;
    header.cmd_line_ptr = layout::CMDLINE as u32;

    params.acpi_rsdp_addr = rsdp;
    for (index, (start, end, kind)) in e820(ram_size).into_iter().enumerate() {
        params.e820_table[index] = boot_e820_entry {
            addr: start,
            size: end - start,
            r#type: kind,
        };
        params.e820_entries = index as u8 + 1;
    }
    write_slice(ram, "the zero page", params.as_slice(), layout::ZERO_PAGE)?;
    write_tables(ram)?;
    Ok(Entry {
        rip: layout::HIGH_RAM + ENTRY_64,
        rsi: layout::ZERO_PAGE,
    })
}

/// The memory map that the kernel is told: (start, end, type).
fn e820(ram_size: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_RAM_END, E820_RAM),
        (
            layout::ACPI_TABLES,
            layout::ACPI_TABLES + layout::ACPI_SIZE,
            E820_ACPI,
        ),
        (
            layout::SMBIOS_TABLES,
            layout::SMBIOS_TABLES + layout::SMBIOS_SIZE,
            E820_RESERVED,
        ),
        // Linux uses the ECAM only where it is reserved.
        (layout::ECAM, layout::ECAM + layout::ECAM_SIZE, E820_RESERVED),
        (layout::KVM_IDENTITY_MAP, layout::KVM_TSS + 0x3000, E820_RESERVED),
    ];
    for (start, _, length) in memory::ranges(ram_size) {
        map.push((start.max(layout::HIGH_RAM), start + length, E820_RAM));
    }
    map.sort_unstable();
    map
}

fn check_header(payload: &Payload) -> Result<(), LoadError> {
    let wrong = |reason: &str| {
        Err(LoadError::NotAKernel {
            kernel: payload.kernel_name.clone(),
            reason: reason.to_owned(),
        })
    };
    let image = &payload.kernel;
    let Some(magic) = image.get(HEADER_MAGIC..HEADER_MAGIC + 4) else {
        return wrong("it is shorter than a kernel's header");
    };
    if magic != b"HdrS" {
        return wrong("its header lacks the magic \"HdrS\"");
    }
    let flags = image
        .get(HEADER_XLOADFLAGS..HEADER_XLOADFLAGS + 2)
        .map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
    if flags & XLF_KERNEL_64 == 0 {
        return wrong("it has no 64-bit entry point");
    }
    Ok(())
}

/// The first 4 GiB mapped by themselves with 2 MiB pages, and flat segments as `__BOOT_CS` (0x10) and
/// `__BOOT_DS` (0x18).
pub fn write_tables(ram: &GuestMemoryMmap) -> Result<(), LoadError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let pdpt = layout::BOOT_PAGE_TABLES + 0x1000;
    let directories = pdpt + 0x1000;
    let mut pages = vec![0u64; 6 * 512];
    pages[0] = pdpt | PRESENT_WRITABLE;
    for gib in 0..4u64 {
        pages[512 + gib as usize] = (directories + gib * 0x1000) | PRESENT_WRITABLE;
    }
    for (index, entry) in pages[1024..].iter_mut().enumerate() {
        *entry = ((index as u64) << 21) | PRESENT_WRITABLE | LARGE;
    }
    let bytes: Vec<u8> = pages.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    write_slice(ram, "page tables", &bytes, layout::BOOT_PAGE_TABLES)?;
    let gdt: [u64; 4] = [0, 0, CODE_DESCRIPTOR, DATA_DESCRIPTOR];
    let bytes: Vec<u8> = gdt.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    write_slice(ram, "the descriptor table", &bytes, layout::BOOT_GDT)
}

/// Limit of the descriptor table that [`write_tables`] writes.
pub const GDT_LIMIT: u16 = 4 * 8 - 1;
const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;

fn write_slice(
    ram: &GuestMemoryMmap,
    what: &'static str,
    bytes: &[u8],
    address: u64,
) -> Result<(), LoadError> {
    ram.write_slice(bytes, GuestAddress(address))
        .map_err(|source| LoadError::Write { what, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::memory::GuestRam;

    fn payload(kernel: Vec<u8>) -> Payload {
        Payload {
            kernel,
            kernel_name: "/boot/vmlinuz-test".to_owned(),
            ..Payload::default()
        }
    }

    /// The smallest image that has all the fields the loader reads.
    fn bzimage() -> Vec<u8> {
        let mut image = vec![0u8; 0x4000];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
        image[0x211] = 1;
        image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        image[0x236] = 1;
        image[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
        image[0x258..0x260].copy_from_slice(&0x10_0000u64.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image
    }

    #[test]
    fn a_file_that_is_no_kernel_is_refused_by_name() {
        let ram = GuestRam::new(16).unwrap();
        for image in [vec![], vec![0; 0x4000]] {
            let error = load(&ram.memory, ram.size(), &payload(image), 0).unwrap_err();
            assert!(error.to_string().contains("/boot/vmlinuz-test"), "{error}");
        }
    }

    #[test]
    fn the_zero_page_names_initrd_command_line_and_rsdp() {
        let ram = GuestRam::new(32).unwrap();
        let mut payload = payload(bzimage());
        payload.initrd = Some(vec![0xab; 5000]);
        payload.cmdline = "console=ttyS0".to_owned();
        let entry = load(&ram.memory, ram.size(), &payload, layout::ACPI_TABLES).unwrap();
        assert_eq!(entry.rip, layout::HIGH_RAM + 0x200);
        let params: boot_params = ram.memory.read_obj(GuestAddress(entry.rsi)).unwrap();
        let (address, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!(size, 5000);
        assert!(u64::from(address) + 5000 <= 32 << 20);
        let byte: u8 = ram
            .memory
            .read_obj(GuestAddress(u64::from(address) + 4999))
            .unwrap();
        assert_eq!(byte, 0xab);
        let mut cmdline = [0; 14];
        let pointer = params.hdr.cmd_line_ptr;
        ram.memory
            .read_slice(&mut cmdline, GuestAddress(u64::from(pointer)))
            .unwrap();
        assert_eq!(&cmdline, b"console=ttyS0\0");
        assert_eq!({ params.acpi_rsdp_addr }, layout::ACPI_TABLES);
    }

    #[test]
    fn an_initrd_or_command_line_that_does_not_fit_is_refused() {
        let ram = GuestRam::new(16).unwrap();
        let mut large = payload(bzimage());
        large.initrd = Some(vec![0; 16 << 20]);
        large.initrd_name = "/boot/initrd.img-test".to_owned();
        let error = load(&ram.memory, ram.size(), &large, 0).unwrap_err();
        assert!(error.to_string().contains("initrd.img-test"), "{error}");
        let mut long = payload(bzimage());
        long.cmdline = "x".repeat(3000);
        assert!(matches!(
            load(&ram.memory, ram.size(), &long, 0),
            Err(LoadError::CmdlineTooLong { .. })
        ));
    }

    #[test]
    fn the_memory_map_has_no_overlap_and_covers_all_ram() {
        for mib in [128u64, 3072, 8192] {
            let map = e820(mib << 20);
            assert!(map.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{map:?}");
            let ram: u64 = map.iter().filter(|e| e.2 == E820_RAM).map(|e| e.1 - e.0).sum();
            assert_eq!(ram, (mib << 20) - (layout::HIGH_RAM - layout::LOW_RAM_END));
        }
    }
}
