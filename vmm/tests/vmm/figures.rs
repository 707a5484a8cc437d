//! What saving and resuming cost, as a table: `cargo test -p understudy-vmm --test vmm figures -- --ignored
//! --nocapture`.

use std::fs;
use std::process::Command;
use std::time::Instant;

use serde_json::json;

use crate::common::{Guest, have_kvm, wait};
use crate::payload;
use crate::session::{request, resuming, saved};

#[test]
#[ignore = "measures; run it by hand on a machine with nothing else to do"]
fn figures_of_saving_and_resuming() {
    if !have_kvm() {
        return;
    }
    println!(
        "{:>8} {:>10} {:>10} {:>12} {:>12} {:>12} {:>12}",
        "RAM MiB", "pause ms", "save ms", "save MiB/s", "dd MiB/s", "resume ms", "all back ms"
    );
    for mib in [256u64, 2048] {
        let guest = Guest::with_kernel(payload::code());
        let mut config = guest.config(1, "Active", &format!("i{mib:x}"));
        config["memoryMib"] = json!(mib);
        let vmm = guest.start(&config);
        wait("the guest has touched its memory", || {
            vmm.console().contains("idle")
        });
        let request = request(&guest, 1);
        let begun = Instant::now();
        let info = saved(&vmm, &request);
        let save = begun.elapsed().as_secs_f64();
        drop(vmm);
        let begun = Instant::now();
        let again = guest.start(&resuming(&config, &request));
        wait("all memory is there", || {
            again.info().resume.unwrap().pending_bytes == 0
        });
        let back = begun.elapsed();
        let resume = again.info().resume.unwrap();
        again.makes_progress();
        drop(again);
        fs::remove_dir_all(&request.directory).unwrap();
        let plain = guest.path("plain");
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
            .arg(format!("of={}", plain.display()))
            .status()
            .unwrap();
        assert!(status.success());
        let dd = mib as f64 / begun.elapsed().as_secs_f64();
        println!(
            "{mib:>8} {:>10.1} {:>10.0} {:>12.0} {:>12.0} {:>12.1} {:>12.0}",
            info.pause_us.unwrap() as f64 / 1e3,
            save * 1e3,
            (info.written_bytes >> 20) as f64 / save,
            dd,
            resume.start_us as f64 / 1e3,
            back.as_secs_f64() * 1e3,
        );
    }
}
