//! What the host has.

use std::fs;
use std::path::Path;

use crate::handover::Moment;
use crate::vmm::host_boot_id;

/// CPUs that this process may use.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Memory of the host in MiB (`MemTotal`).
pub fn total_memory_mib() -> u64 {
    meminfo("MemTotal:")
}

/// Memory that new processes can have without swapping, in MiB (`MemAvailable`, proc_meminfo(5)).
pub fn available_memory_mib() -> u64 {
    meminfo("MemAvailable:")
}

fn meminfo(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0)
        / 1024
}

/// Bytes that can still be written on the file system of `path`.
pub fn free_bytes(path: &Path) -> std::io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail * stat.f_frsize)
}

/// Which host this is, and in which of its boots: what saved sessions are bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostIdentity {
    /// machine-id(5); empty where it has none.
    pub machine_id: String,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

impl HostIdentity {
    /// This host, now.
    pub fn read() -> HostIdentity {
        HostIdentity {
            machine_id: fs::read_to_string("/etc/machine-id")
                .map(|id| id.trim().to_owned())
                .unwrap_or_default(),
            boot_id: host_boot_id(),
        }
    }
}

/// Kernel release (`uname -r`).
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// The host's name.
pub fn name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The time by both clocks.
pub fn moment() -> Moment {
    let micros = |clock| {
        let time = rustix::time::clock_gettime(clock);
        time.tv_sec * 1_000_000 + time.tv_nsec / 1_000
    };
    Moment {
        unix_us: micros(rustix::time::ClockId::Realtime),
        boot_us: micros(rustix::time::ClockId::Boottime),
    }
}
