//! The guest image on its own: booted by plain QEMU, so that a fault of the image is told from one of
//! the VMM.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::netns::run;
use super::node::FIRMWARE;
use super::{Images, NetNs, cache_dir, wait_until};

const MAC: &str = "52:54:00:77:00:99";
const TAP: &str = "guest0";
const BOOT_LIMIT: Duration = Duration::from_secs(480);
const POLL: Duration = Duration::from_millis(200);

/// A process that is ended when nobody looks after it any more.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to do.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots a copy of the guest image on its older kernel and asks for its lease, page, ledger and the state
/// of its units. Says on standard error what it finds.
pub fn check_guest(images: &Images) -> Result<()> {
    let dir = cache_dir().join("guest-check");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let (disk, console) = (dir.join("root.img"), dir.join("console.log"));
    run(Command::new("cp")
        .args(["--sparse=always", "--reflink=auto"])
        .arg(images.guest_disk())
        .arg(&disk))?;
    let _ = fs::remove_file(&console);
    let netns = NetNs::of(&dir);
    netns.up()?;
    netns.tap(TAP)?;
    let started = Instant::now();
    let say = |what: &str| {
        eprintln!(
            "  guest check: {what}, {:.1} s after its start",
            started.elapsed().as_secs_f64()
        )
    };
    let child = netns
        .command(&images.qemu)
        .args(FIRMWARE)
        .args([
            "-accel",
            "tcg,thread=multi,tb-size=128",
            "-cpu",
            "max",
            "-m",
            "512",
        ])
        .arg("-kernel")
        .arg(images.guest.join("vmlinuz"))
        .arg("-initrd")
        .arg(images.guest.join("initrd.img"))
        .args(["-append", "root=/dev/vda ro console=ttyS0 quiet"])
        .arg("-drive")
        .arg(format!(
            "if=virtio,format=raw,cache=unsafe,file={}",
            disk.display()
        ))
        .arg("-netdev")
        .arg(format!("tap,id=net,ifname={TAP},script=no,downscript=no"))
        .args(["-device", &format!("virtio-net-pci,netdev=net,mac={MAC}")])
        .args(["-display", "none", "-monitor", "none", "-serial"])
        .arg(format!("file:{}", console.display()))
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start QEMU")?;
    let mut qemu = Qemu(child);
    let result = (|| {
        wait_until("the guest's login prompt", BOOT_LIMIT, POLL, || {
            if let Some(status) = qemu.0.try_wait()? {
                bail!("QEMU has ended ({status})");
            }
            let text = fs::read(&console).unwrap_or_default();
            Ok(String::from_utf8_lossy(&text)
                .contains("guest login:")
                .then_some(()))
        })?;
        say("login prompt");
        let address = wait_until("the guest's lease", BOOT_LIMIT, POLL, || netns.lease(MAC))?;
        say(&format!("has the lease {address}"));
        let page = wait_until("the guest's page", BOOT_LIMIT, POLL, || {
            let output = netns
                .command("curl")
                .args(["-sf", "-m", "5", &format!("http://{address}/")])
                .output()?;
            Ok(output
                .status
                .success()
                .then(|| String::from_utf8_lossy(&output.stdout).into_owned()))
        })?;
        ensure!(page.contains("Understudy"), "the page is not ours: {page}");
        say("serves its page");
        if images.guest_has("understudy-ledger") {
            let script = format!(
                "exec 3<>/dev/tcp/{address}/7000; echo hello >&3; read -r -t 20 answer <&3; echo \"$answer\""
            );
            let output = netns.command("bash").args(["-c", &script]).output()?;
            let answer = String::from_utf8_lossy(&output.stdout).into_owned();
            ensure!(answer == "ok 1\n", "the ledger answered '{}'", answer.trim());
            say("its ledger acknowledges");
        }
        let ssh = super::Ssh::new(&netns, &address, &images.cache.join("ssh/id_ed25519"));
        ssh.wait(BOOT_LIMIT, || Ok(()))?;
        let failed = ssh.run("systemctl is-system-running --wait >/dev/null; systemctl --failed --plain --no-legend; uname -r; ls /var/cache/apt/archives/*.deb");
        ssh.forget();
        let failed = failed?;
        let lines: Vec<&str> = failed.lines().collect();
        ensure!(
            lines == [images.older_kernel.as_str(), images.newer_package.as_str()],
            "expected kernel {} with {} at hand and no failed units, found:\n{failed}",
            images.older_kernel,
            images.newer_package
        );
        say("no failed units, the newer kernel's package is at hand");
        Ok(())
    })();
    drop(qemu);
    netns.down()?;
    result.with_context(|| format!("the guest's console: {}", console.display()))
}
