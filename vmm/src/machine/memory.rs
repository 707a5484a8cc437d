//! Guest RAM: anonymous memory named `guest-ram`, so that `/proc/PID/smaps` tells it from the process's own.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, MmapRegion};

use super::dirty::{PAGE, PageSet};
use crate::layout;

/// Guest RAM as devices and loaders see it. Every write through it marks its page in the bitmap of its region
/// after it was made: KVM's dirty log knows of the guest's own writes alone, and a save joins the two.
///
/// System calls that are handed addresses in guest RAM pass by the bitmap; they go through
/// [`Buffers::fill_with`](crate::virtio::buffers::Buffers::fill_with), which marks what they wrote.
pub type GuestMemoryMmap = vm_memory::GuestMemoryMmap<AtomicBitmap>;

/// One range of [`GuestMemoryMmap`].
pub type GuestRegionMmap = vm_memory::GuestRegionMmap<AtomicBitmap>;

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

    /// Takes what device emulation has written since the last call, which KVM's log does not tell. Marks
    /// are made after the bytes are written, so that pages are copied after this, never before.
    pub fn take_device_writes(&self, set: &mut PageSet) {
        for ((_, offset, _), region) in ranges(self.size).into_iter().zip(self.memory.iter()) {
            // The inherent method of the mapping: the region's own gives a slice of the bitmap only.
            let words = MmapRegion::bitmap(region).get_and_reset();
            set.join_words(offset / PAGE, &words);
        }
    }

    /// Copies RAM from `offset`, counted through all ranges, into `buffer`. The guest may be writing.
    pub fn copy_out(&self, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        for (start, first, length) in ranges(self.size) {
            if offset < first || offset >= first + length || buffer.is_empty() {
                continue;
            }
            let count = buffer.len().min((first + length - offset) as usize);
            let (part, rest) = buffer.split_at_mut(count);
            self.memory
                .read_slice(part, GuestAddress(start + offset - first))
                .map_err(io::Error::other)?;
            offset += count as u64;
            buffer = rest;
        }
        match buffer.is_empty() {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Which chunks of `chunk` bytes the host holds anything for: those that the guest never touched read as
    /// zeroes, and reading them would make the host allocate them. What `/proc/self/pagemap` does not tell
    /// counts as touched.
    pub fn touched(&self, chunk: u64) -> io::Result<Vec<bool>> {
        /// In RAM or swapped out (bits 63 and 62 of an entry).
        const HELD: u64 = 3 << 62;
        let file = File::open("/proc/self/pagemap")?;
        let mut touched = vec![false; self.size.div_ceil(chunk) as usize];
        let mut entries = vec![0u8; 64 << 10];
        for (host, offset, length) in self.mapped() {
            let mut page = 0;
            while page < length / PAGE {
                let count = (length / PAGE - page).min(entries.len() as u64 / 8);
                let bytes = &mut entries[..count as usize * 8];
                file.read_exact_at(bytes, (host / PAGE + page) * 8)?;
                for (index, entry) in bytes.chunks_exact(8).enumerate() {
                    let mut word = [0; 8];
                    word.copy_from_slice(entry);
                    if u64::from_le_bytes(word) & HELD != 0 {
                        let at = offset + (page + index as u64) * PAGE;
                        touched[(at / chunk) as usize] = true;
                    }
                }
                page += count;
            }
        }
        Ok(touched)
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
    fn what_devices_write_is_taken_once_and_only_touched_chunks_are_held() {
        let ram = GuestRam::new(64).unwrap();
        let at = 33 << 20;
        ram.memory.write_obj(7u8, GuestAddress(at)).unwrap();
        let mut set = PageSet::empty(ram.size());
        ram.take_device_writes(&mut set);
        assert_eq!(set.chunks(PAGE), vec![at / PAGE]);
        let mut again = PageSet::empty(ram.size());
        ram.take_device_writes(&mut again);
        assert!(again.is_empty());

        let touched = ram.touched(4 << 20).unwrap();
        assert!(touched[8] && !touched[0]);
        let mut copy = vec![1u8; 8192];
        ram.copy_out(at - 4096, &mut copy).unwrap();
        assert_eq!((copy[0], copy[4096], copy[4097]), (0, 7, 0));
        assert!(ram.copy_out(ram.size() - 4096, &mut copy).is_err());
    }

    #[test]
    fn more_memory_than_the_host_has_is_refused_by_name_of_the_field() {
        let error = GuestRam::new(1 << 40).err().unwrap().to_string();
        assert!(error.contains("memoryMib"), "{error}");
    }
}
