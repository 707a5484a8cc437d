//! Guest-physical addresses. RAM begins at 0 and has a hole below 4 GiB for devices; what does not fit
//! below the hole goes on at 4 GiB.

/// Zero page (`struct boot_params`) of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Global descriptor table that is loaded when the kernel is entered.
pub const BOOT_GDT: u64 = 0x500;
/// Page tables that are loaded when the kernel is entered: PML4, PDPT and four page directories.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Initial stack pointer.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Space for the kernel command line, its terminating zero included.
pub const CMDLINE_SIZE: u64 = 0x1_0000;
/// End of conventional memory.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// ACPI tables; the RSDP is the first of them.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Space for ACPI tables.
pub const ACPI_SIZE: u64 = 0x1_0000;
/// SMBIOS entry point and tables: where a kernel without EFI looks for them.
pub const SMBIOS_TABLES: u64 = 0xf_0000;
/// Space for SMBIOS.
pub const SMBIOS_SIZE: u64 = 0x1_0000;
/// Start of memory above 1 MiB; bzImages are loaded here.
pub const HIGH_RAM: u64 = 0x10_0000;
/// End of RAM below 4 GiB at most, and start of the window for PCI BARs.
pub const PCI_HOLE: u64 = 0xc000_0000;
/// Size of the window for PCI BARs.
pub const PCI_HOLE_SIZE: u64 = 0x2000_0000;
/// Memory-mapped PCI configuration space (ECAM) of bus 0.
pub const ECAM: u64 = 0xe000_0000;
/// Size of the ECAM: one bus.
pub const ECAM_SIZE: u64 = 0x10_0000;
/// I/O APIC (fixed by KVM).
pub const IO_APIC: u64 = 0xfec0_0000;
/// Local APIC (fixed by KVM).
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Page that KVM uses for identity mapping on Intel; followed by three for the TSS.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM uses for a TSS on Intel.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// Start of RAM above 4 GiB.
pub const RAM_ABOVE_4G: u64 = 0x1_0000_0000;

/// First serial port.
pub const COM1_PORT: u16 = 0x3f8;
/// Interrupt of the first serial port.
pub const COM1_IRQ: u32 = 4;
/// ACPI event block: status and enable register.
pub const PM1_EVENT_PORT: u16 = 0x600;
/// ACPI control register.
pub const PM1_CONTROL_PORT: u16 = 0x604;
/// ACPI system control interrupt.
pub const SCI_IRQ: u32 = 9;
/// ACPI reset register (the reset control register of PC chip sets).
pub const RESET_PORT: u16 = 0xcf9;
/// What is written to [`RESET_PORT`] for a reset.
pub const RESET_VALUE: u8 = 0x06;
