//! Guest RAM: one memfd named `guest-ram`, mapped shared, so that `/proc/PID/smaps` tells it from the
//! process's own memory.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

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

/// Guest RAM and the file behind it.
pub struct GuestRam {
    /// The mappings, one a range.
    pub memory: GuestMemoryMmap,
    file: File,
    size: u64,
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
        // SAFETY: the name is a valid C string and the flags are known.
        let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(os("creating the memory file")(io::Error::last_os_error()));
        }
        // SAFETY: `fd` was just returned by memfd_create and nobody else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(size).map_err(os("sizing"))?;
        let mut mapped = Vec::new();
        for (start, offset, length) in ranges(size) {
            let clone = file.try_clone().map_err(os("opening the memory file"))?;
            mapped.push((
                GuestAddress(start),
                length as usize,
                Some(FileOffset::new(clone, offset)),
            ));
        }
        let memory = GuestMemoryMmap::from_ranges_with_files(mapped)
            .map_err(|e| os("mapping")(io::Error::other(e)))?;
        Ok(GuestRam { memory, file, size })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Gives every page back to the host: the guest finds zeroes, as after power-on. No vCPU and no
    /// device may be using the memory.
    pub fn clear(&self) -> Result<(), MemoryError> {
        // SAFETY: fallocate takes no pointers; the descriptor is ours.
        let result = unsafe {
            libc::fallocate(
                self.file.as_raw_fd(),
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                0,
                self.size as libc::off_t,
            )
        };
        if result < 0 {
            return Err(MemoryError::Os {
                action: "clearing",
                mib: self.size >> 20,
                source: io::Error::last_os_error(),
            });
        }
        Ok(())
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
