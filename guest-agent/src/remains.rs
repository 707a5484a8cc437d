//! What a cutover cannot carry over (DESIGN §5, step 9).

use std::fs;

use understudy_channel::{MAX_LIST, Remains};

use crate::mounts;
use crate::silent::processes;
use crate::userland::established;

/// Looks for it as of now.
pub fn remains() -> Remains {
    let disks: Vec<String> = mounts::local_writable()
        .unwrap_or_default()
        .into_iter()
        .map(|m| m.device)
        .collect();
    let own = std::process::id() as i32;
    let mut remains = Remains {
        tcp_connections: count(established().count()),
        ..Remains::default()
    };
    for pid in processes().filter(|&p| p != own && p != 1) {
        // Kernel threads have no command line.
        if fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|c| !c.is_empty()) {
            remains.processes += 1;
            unlinked(pid, &disks, &mut remains.unlinked_open);
        }
    }
    remains.unlinked_open.sort();
    remains.unlinked_open.dedup();
    remains.unlinked_open.truncate(MAX_LIST);
    remains
}

fn unlinked(pid: i32, disks: &[String], found: &mut Vec<String>) {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let target = target.to_string_lossy();
        if !target.starts_with('/') || !target.ends_with(" (deleted)") {
            continue;
        }
        let Ok(stat) = rustix::fs::stat(entry.path()) else {
            continue;
        };
        let device = format!(
            "{}:{}",
            rustix::fs::major(stat.st_dev),
            rustix::fs::minor(stat.st_dev)
        );
        if disks.contains(&device) {
            found.push(format!("{}[{pid}] {target}", name.trim()));
        }
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
