//! What a VMM process costs in memory beyond its guest's RAM, by `/proc/PID/smaps`.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use understudy_vmm_control::api::{VmInfo, VmState};

use crate::machine::Machine;

/// Memory of one VMM process, in KiB. *Unique* is what ends with the process: `Private_Clean` and
/// `Private_Dirty`. What KVM keeps in the kernel for it is in no file of `/proc`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Footprint {
    /// When it was taken.
    pub when: String,
    /// Incarnation of the guest.
    pub incarnation: u64,
    /// What the process did then.
    pub state: VmState,
    /// Pages of its own beyond guest RAM that were written: heap, stacks, data.
    pub dirty_kib: u64,
    /// Pages of files (the program) that no other process had in use then; a second VMM shares them.
    pub clean_kib: u64,
    /// The kernel's memory for its page tables, guest RAM's included.
    pub page_tables_kib: u64,
    /// Guest RAM in use.
    pub guest_ram_kib: u64,
    /// Size of guest RAM.
    pub guest_ram_size_kib: u64,
}

impl Footprint {
    /// Unique memory beyond guest RAM.
    pub fn unique_kib(&self) -> u64 {
        self.dirty_kib + self.clean_kib
    }
}

/// Of every VMM process on the machine.
pub fn measure(machine: &Machine, when: &str) -> Result<Vec<Footprint>> {
    let answers = machine.sh(&format!(
        "for s in {}/guests/*/*/*/control.sock; do
             [ -S $s ] || continue
             curl -sSf -m 20 --unix-socket $s http://vmm/v1/vm && echo || true
         done",
        machine.run_dir()
    ))?;
    let found: Vec<Footprint> = answers
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| {
            let info: VmInfo =
                serde_json::from_str(line).with_context(|| format!("a VMM answered '{line}'"))?;
            let smaps = machine.sh(&format!(
                "cat /proc/{pid}/smaps; grep VmPTE /proc/{pid}/status",
                pid = info.pid
            ))?;
            read(&smaps, when, &info)
        })
        .collect::<Result<_>>()?;
    ensure!(
        found.iter().any(|footprint| footprint.state == VmState::Running),
        "no VMM runs a guest on the machine"
    );
    Ok(found)
}

/// One mapping in `smaps`, in KiB.
#[derive(Default)]
struct Mapping {
    named_guest_ram: bool,
    huge_pages_wanted: bool,
    size: u64,
    rss: u64,
    clean: u64,
    dirty: u64,
}

fn read(smaps: &str, when: &str, info: &VmInfo) -> Result<Footprint> {
    let mut mappings: Vec<Mapping> = Vec::new();
    let mut page_tables_kib = 0;
    for line in smaps.lines() {
        let (first, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        // Fields end in a colon; the head of a mapping begins with its addresses.
        let Some(field) = first.strip_suffix(':') else {
            if first.contains('-') {
                mappings.push(Mapping {
                    named_guest_ram: line.ends_with("guest-ram]"),
                    ..Mapping::default()
                });
            }
            continue;
        };
        let kib = || -> u64 {
            let number = rest.trim().trim_end_matches("kB").trim();
            number.parse().unwrap_or_default()
        };
        if field == "VmPTE" {
            page_tables_kib = kib();
        }
        let Some(mapping) = mappings.last_mut() else {
            continue;
        };
        match field {
            "Size" => mapping.size = kib(),
            "Rss" => mapping.rss = kib(),
            "Private_Clean" => mapping.clean = kib(),
            "Private_Dirty" => mapping.dirty = kib(),
            "VmFlags" => mapping.huge_pages_wanted = rest.split_whitespace().any(|flag| flag == "hg"),
            _ => {}
        }
    }
    // Anonymous memory has names since Linux 5.17, where the kernel was built with them. Nothing but guest
    // RAM asks for huge pages.
    let named = mappings.iter().any(|mapping| mapping.named_guest_ram);
    let is_ram = |mapping: &&Mapping| {
        if named {
            mapping.named_guest_ram
        } else {
            mapping.huge_pages_wanted
        }
    };
    let ram = |of: fn(&Mapping) -> u64| mappings.iter().filter(is_ram).map(of).sum();
    let other = |of: fn(&Mapping) -> u64| mappings.iter().filter(|m| !is_ram(m)).map(of).sum();
    let guest_ram_size_kib = ram(|mapping| mapping.size);
    ensure!(
        guest_ram_size_kib > 0,
        "guest RAM is not to be told from other memory in /proc/{}/smaps: no mapping is named guest-ram, none asks for huge pages",
        info.pid
    );
    Ok(Footprint {
        when: when.to_owned(),
        incarnation: info.incarnation,
        state: info.state,
        dirty_kib: other(|mapping| mapping.dirty),
        clean_kib: other(|mapping| mapping.clean),
        page_tables_kib,
        guest_ram_kib: ram(|mapping| mapping.rss),
        guest_ram_size_kib,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const PROGRAM: &str = "00400000-00500000 r-xp 00000000 08:01 123  /opt/x-y: z/understudy-vmm
Size:               1024 kB
Rss:                 900 kB
Private_Clean:       600 kB
Private_Dirty:         0 kB
VmFlags: rd ex mr mw me
00e00000-00f00000 rw-p 00000000 00:00 0  [heap]
Size:               1024 kB
Rss:                 300 kB
Private_Clean:         0 kB
Private_Dirty:       300 kB
VmFlags: rd wr mr mw me ac
";
    const RAM: &str = "Size:             524288 kB
Rss:              204800 kB
Private_Clean:         0 kB
Private_Dirty:    204800 kB
";

    fn info() -> VmInfo {
        serde_json::from_value(serde_json::json!({
            "apiVersion": 1, "vmmVersion": "0", "guest": "default/web", "incarnation": 2, "pid": 7,
            "state": "Running", "owner": true, "boots": 1, "kernel": null, "exitReason": null,
            "gates": {}, "counters": {"blockWrites": 0, "blockWritesHeld": 0, "framesReceived": 0,
            "framesSent": 0, "framesDropped": 0}, "disks": [],
        }))
        .unwrap()
    }

    #[test]
    fn guest_ram_is_told_from_the_process_by_its_name_and_else_by_its_wish_for_huge_pages() {
        let head = "7f0000000000-7f0020000000 rw-p 00000000 00:00 0";
        for ram in [
            format!("{head}  [anon:guest-ram]\n{RAM}VmFlags: rd wr mr mw me ac hg\n"),
            format!("{head}\n{RAM}VmFlags: rd wr mr mw me ac hg\n"),
        ] {
            let smaps = format!("{PROGRAM}{ram}VmPTE:\t     640 kB\n");
            let found = read(&smaps, "now", &info()).unwrap();
            assert_eq!((found.clean_kib, found.dirty_kib), (600, 300));
            assert_eq!(
                (found.guest_ram_kib, found.guest_ram_size_kib),
                (204_800, 524_288)
            );
            assert_eq!(found.page_tables_kib, 640);
        }
        assert!(read(PROGRAM, "now", &info()).is_err(), "no guest RAM");
    }
}
