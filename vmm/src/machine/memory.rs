//! Guest RAM: anonymous memory named `guest-ram`, so that `/proc/PID/smaps` tells it from the process's own.

use std::io;

use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::layout;

/// Why guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// More than the host has.
    #[error(
        "memoryMib: {requested} MiB of guest RAM asked for, but this host has {available} MiB; ask for less"
    )]
    TooMuch {
        /// MiB asked for.
        requested: u64,
        /// MiB that the host has.
        available: u64,
    },
    /// Too little to boot anything.
    #[error("memoryMib: {requested} MiB of guest RAM is too little; ask for {minimum} MiB or more")]
    TooLittle {
        /// MiB asked for.
        requested: u64,
        /// Smallest size.
        minimum: u64,
    },
    /// The operating system refused.
    #[error("{action} of {mib} MiB of guest RAM: {source}")]
    Os {
        /// What was tried.
        action: &'static str,
        /// Size.
        mib: u64,
        /// Why it failed.
        source: io::Error,
    },
}

/// Smallest guest: a kernel and its initrd need some room.
const MINIMUM_MIB: u64 = 16;
/// A huge page of x86-64.
const HUGE_PAGE: usize = 2 << 20;
const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Guest RAM.
pub struct GuestRam {
    /// The mappings, one a range.
    pub memory: GuestMemoryMmap,
    size: u64,
    /// What `memory` points into; unmapped after it.
    mappings: Vec<Mapping>,
}

impl GuestRam {
    /// Allocates `mib` MiB. Pages cost nothing until the guest touches them.
    pub fn new(mib: u64) -> Result<GuestRam, MemoryError> {
        let available = host_memory_mib()?;
        if mib > available {
            return Err(MemoryError::TooMuch {
                requested: mib,
                available,
            });
        }
        if mib < MINIMUM_MIB {
            return Err(MemoryError::TooLittle {
                requested: mib,
                minimum: MINIMUM_MIB,
            });
        }
        let os = |action| move |source| MemoryError::Os { action, mib, source };
        let size = mib << 20;
        let mut mappings = Vec::new();
        let mut regions = Vec::new();
        for (start, _, length) in ranges(size) {
            let mapping = Mapping::new(length as usize).map_err(os("mapping"))?;
            // SAFETY: the mapping is `length` bytes long, readable and writable, and outlives the region:
            // it is dropped after `memory`.
            let region = unsafe {
                MmapRegion::build_raw(
                    mapping.start,
                    length as usize,
                    PROTECTION,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                )
            }
            .map_err(|e| os("mapping")(io::Error::other(e)))?;
            let region = GuestRegionMmap::new(region, GuestAddress(start))
                .ok_or_else(|| os("placing")(io::ErrorKind::InvalidInput.into()))?;
            regions.push(region);
            mappings.push(mapping);
        }
        let memory =
            GuestMemoryMmap::from_regions(regions).map_err(|e| os("mapping")(io::Error::other(e)))?;
        Ok(GuestRam {
            memory,
            size,
            mappings,
        })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Its mappings in this process: (address, offset in RAM, length), in order. Addresses are aligned to huge
    /// pages.
    pub fn mapped(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        self.mappings.iter().scan(0, |end, mapping| {
            let offset = *end;
            *end += mapping.length as u64;
            Some((mapping.start as u64, offset, mapping.length as u64))
        })
    }

    /// Gives every page back to the host: the guest finds zeroes, as after power-on. No vCPU and no
    /// device may be using the memory, and memory that is restored lazily is discarded before
    /// ([`crate::memory_restore::LazyMemory::discard`]), or it would come from the checkpoint again.
    pub fn clear(&self) -> Result<(), MemoryError> {
        for mapping in &self.mappings {
            // SAFETY: the range is ours, and private anonymous memory reads as zeroes afterwards.
            let result = unsafe { libc::madvise(mapping.start.cast(), mapping.length, libc::MADV_DONTNEED) };
            if result < 0 {
                return Err(MemoryError::Os {
                    action: "clearing",
                    mib: self.size >> 20,
                    source: io::Error::last_os_error(),
                });
            }
        }
        Ok(())
    }
}

/// Private anonymous memory, aligned to huge pages.
///
/// Anonymous, because hosts give huge pages to it by default and to shared memory only when told so; and
/// aligned, because KVM maps a huge page only where guest-physical and host-virtual addresses agree in
/// their lower 21 bits. Each 4 KiB page that KVM maps is an exit: a booting guest takes tens of thousands.
struct Mapping {
    /// What was mapped, the margin for alignment included.
    reserved: *mut u8,
    reserved_length: usize,
    start: *mut u8,
    length: usize,
}

// SAFETY: a mapping is an address range; what is in it is accessed through `GuestMemoryMmap` alone.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(length: usize) -> io::Result<Mapping> {
        let reserved_length = length + HUGE_PAGE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let reserved = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                reserved_length,
                PROTECTION,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let reserved = reserved.cast::<u8>();
        let margin = reserved.align_offset(HUGE_PAGE);
        // SAFETY: the margin is below HUGE_PAGE, by which the mapping is longer than `length`.
        let start = unsafe { reserved.add(margin) };
        let mapping = Mapping {
            reserved,
            reserved_length,
            start,
            length,
        };
        // Neither is needed for correctness: a kernel without huge pages or names for anonymous memory
        // (Linux 5.17) refuses, and the guest is slower or its memory harder to tell in /proc/PID/smaps.
        // SAFETY: both take the range just mapped and a static C string.
        unsafe {
            libc::madvise(start.cast(), length, libc::MADV_HUGEPAGE);
            libc::prctl(
                libc::PR_SET_VMA,
                libc::PR_SET_VMA_ANON_NAME,
                start,
                length,
                c"guest-ram".as_ptr(),
            );
        }
        Ok(mapping)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and nobody points into it any more.
        unsafe { libc::munmap(self.reserved.cast(), self.reserved_length) };
    }
}

/// Ranges of RAM of `size` bytes in all: (guest-physical start, offset in the file, length).
pub fn ranges(size: u64) -> Vec<(u64, u64, u64)> {
    let low = size.min(layout::PCI_HOLE);
    let mut ranges = vec![(0, 0, low)];
    if size > low {
        ranges.push((layout::RAM_ABOVE_4G, low, size - low));
    }
    ranges
}

/// RAM of the host in MiB.
fn host_memory_mib() -> Result<u64, MemoryError> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|source| MemoryError::Os {
        action: "reading /proc/meminfo",
        mib: 0,
        source,
    })?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok());
    kib.map(|kib| kib >> 10).ok_or_else(|| MemoryError::Os {
        action: "reading MemTotal in /proc/meminfo",
        mib: 0,
        source: io::ErrorKind::InvalidData.into(),
    })
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn ram_leaves_the_hole_below_4_gib_to_devices() {
        assert_eq!(ranges(1 << 30), vec![(0, 0, 1 << 30)]);
        assert_eq!(
            ranges(4 << 30),
            vec![(0, 0, 0xc000_0000), (1 << 32, 0xc000_0000, 1 << 30)]
        );
    }

    #[test]
    fn cleared_ram_reads_as_zeroes() {
        let ram = GuestRam::new(16).unwrap();
        ram.memory.write_obj(0x5au8, GuestAddress(0x1234)).unwrap();
        ram.clear().unwrap();
        assert_eq!(ram.memory.read_obj::<u8>(GuestAddress(0x1234)).unwrap(), 0);
    }

    #[test]
    fn more_memory_than_the_host_has_is_refused_by_name_of_the_field() {
        let error = GuestRam::new(1 << 40).err().unwrap().to_string();
        assert!(error.contains("memoryMib"), "{error}");
    }
}
