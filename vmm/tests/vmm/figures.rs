//! What saving and resuming cost, as a table: a part of `make bench`.

use std::fs;
use std::process::Command;
use std::time::Instant;

use serde_json::json;

use crate::common::{Guest, have_kvm, wait};
use crate::payload;
use crate::session::{request, resuming, saved};

/// The pause of a save at 2 GiB against that at 256 MiB: at most this.
const PAUSE: f64 = 2.0;
/// From the start of a process to the guest's first instruction: at most this, in milliseconds.
const START: f64 = 8.0;
/// What a save writes in a second against plain direct writes: at least this.
const THROUGHPUT: f64 = 0.8;

/// Cycles of saving and resuming for each size; the median counts.
const CYCLES: u32 = 5;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[test]
#[ignore = "measures: a part of `make bench`"]
fn figures_of_saving_and_resuming() {
    if !have_kvm() {
        return;
    }
    println!(
        "\n{:>8} {:>10} {:>10} {:>12} {:>12} {:>12} {:>12}",
        "RAM MiB", "pause ms", "save ms", "save MiB/s", "dd MiB/s", "resume ms", "all back ms"
    );
    let (mut found, mut details) = (Vec::new(), Vec::new());
    for mib in [256u64, 2048] {
        let guest = Guest::with_kernel(payload::code());
        let mut config = guest.config(1, "Active", &format!("i{mib:x}"));
        config["memoryMib"] = json!(mib);
        let mut vmm = guest.start(&config);
        wait("the guest has touched its memory", || {
            vmm.console().contains("idle")
        });
        let (mut pauses, mut saves, mut rates, mut plain, mut starts, mut backs) = Default::default();
        let add = |values: &mut Vec<f64>, value: f64| values.push(value);
        for cycle in 0..CYCLES {
            let request = request(&guest, cycle);
            let begun = Instant::now();
            let info = saved(&vmm, &request);
            let save = begun.elapsed().as_secs_f64();
            let pause = stages(&vmm.stderr());
            add(&mut pauses, info.pause_us.unwrap() as f64 / 1e3);
            add(&mut saves, save * 1e3);
            add(&mut rates, (info.written_bytes >> 20) as f64 / save);
            add(&mut plain, plain_writes(&guest, mib));
            drop(vmm);
            // After the host's reboot no file system has anything left to write either.
            assert!(Command::new("sync").status().unwrap().success());
            let begun = Instant::now();
            vmm = guest.start(&resuming(&config, &request));
            add(&mut starts, vmm.info().resume.unwrap().start_us as f64 / 1e3);
            wait("all memory is there", || {
                vmm.info().resume.unwrap().pending_bytes == 0
            });
            add(&mut backs, begun.elapsed().as_secs_f64() * 1e3);
            vmm.makes_progress();
            if cycle + 1 == CYCLES {
                details.push(format!("{mib} MiB: {pause}; {}", stages(&vmm.stderr())));
            }
            fs::remove_dir_all(&request.directory).unwrap();
        }
        drop(vmm);
        let (pause, rate, plain, start) = (median(pauses), median(rates), median(plain), median(starts));
        println!(
            "{mib:>8} {pause:>10.1} {:>10.0} {rate:>12.0} {plain:>12.0} {start:>12.1} {:>12.0}",
            median(saves),
            median(backs),
        );
        found.push((pause, rate / plain, start));
    }
    println!("\n{}", details.join("\n"));
    let [(small, ..), (large, ..)] = found[..] else {
        return;
    };
    let reached = |is: bool| if is { "reached" } else { "not reached" };
    println!(
        "\npause, 2 GiB / 256 MiB: {:.1}, at most {PAUSE}: {}",
        large / small,
        reached(large <= small * PAUSE)
    );
    for ((_, throughput, start), size) in found.iter().zip(["256 MiB", "2 GiB"]) {
        println!(
            "{size}: throughput of a save / plain direct writes {throughput:.2}, at least {THROUGHPUT}: {}; start {start:.1} ms, at most {START}: {}",
            reached(*throughput >= THROUGHPUT),
            reached(*start <= START)
        );
    }
}

/// What a VMM says last of the stages of something.
fn stages(log: &str) -> String {
    let said = log.lines().rev().find_map(|line| line.split_once("stages of "));
    said.map_or_else(String::new, |(_, stages)| stages.to_owned())
}

/// MiB a second that `dd` writes to the same file system past the page cache.
fn plain_writes(guest: &Guest, mib: u64) -> f64 {
    let begun = Instant::now();
    let status = Command::new("dd")
        .args([
            "if=/dev/zero",
            "bs=1M",
            "oflag=direct",
            "conv=fsync",
            "status=none",
        ])
        .arg(format!("count={mib}"))
        .arg(format!("of={}", guest.path("plain").display()))
        .status()
        .unwrap();
    assert!(status.success());
    mib as f64 / begun.elapsed().as_secs_f64()
}
