//! How a node boots: what is on its disk, as a boot loader would take it, and again after each reset.
//!
//! QEMU is told to end when the node resets its machine (`-no-reboot`), and is started again on the same
//! disks with the newest kernel that is found on them. A boot loader in the image would do the same from
//! within, but reads kernel and initrd through the firmware's emulated disk calls, costs the image a
//! partition table or block lists, and leaves nobody who can tell a reset from a fault of the emulator. For
//! what runs in the node there is no difference: its machine was reset, its memory is gone, and the kernel
//! that its package manager installed last is started.

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::Images;
use super::node::{Node, NodeOptions, Status};

/// How often it is looked whether the machine was reset.
const LOOK: Duration = Duration::from_millis(50);
/// What the node's kernel prints last before it resets its machine.
const RESET: &str = "reboot: Restarting system";
/// What it prints last before it switches it off.
const POWER_OFF: &str = "reboot: Power down";
/// What the bed writes into the console's log when it cuts the power.
const POWER_CUT: &str = "bed: power cut";

/// Kernel and initrd, taken out of a disk.
pub(super) struct BootFiles {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
}

/// How the last boot of a node ended, told from its console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Its kernel reset the machine: it boots again.
    Reset,
    /// Its kernel switched the machine off.
    PoweredOff,
    /// The bed cut its power.
    Cut,
    /// None of these: the emulator lost it, as it does after a triple fault.
    Lost,
}

impl End {
    /// What the console printed during one boot tells.
    pub(super) fn of(console: &str) -> End {
        if console.contains(POWER_CUT) {
            End::Cut
        } else if console.contains(RESET) {
            End::Reset
        } else if console.contains(POWER_OFF) {
            End::PoweredOff
        } else {
            End::Lost
        }
    }
}

/// Notes a power cut where [`End::of`] looks.
pub(super) fn note_power_cut(console: &Path) -> Result<()> {
    use std::io::Write;
    fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(console)
        .and_then(|mut log| writeln!(log, "\n{POWER_CUT}"))
        .with_context(|| format!("cannot write {}", console.display()))
}

/// Takes the newest kernel that has an initrd out of `/boot` of an ext4 disk, as `update-grub` would have
/// chosen it. The disk may not be in use; like a boot loader this does not replay its journal.
pub(super) fn newest_kernel(disk: &Path, into: &Path) -> Result<BootFiles> {
    let listing = debugfs(disk, "ls -p /boot")?;
    let names: Vec<&str> = listing
        .lines()
        // /inode/mode/user/group/name/size/
        .filter_map(|line| line.split('/').nth(5))
        .collect();
    let release = newest_release(&names)
        .with_context(|| format!("{} has no kernel with an initrd in /boot", disk.display()))?;
    fs::create_dir_all(into).with_context(|| format!("cannot create {}", into.display()))?;
    let take = |name: String| -> Result<PathBuf> {
        let to = into.join(&name);
        debugfs(disk, &format!("dump /boot/{name} {}", to.display()))?;
        // debugfs ends well whatever happens.
        let length = fs::metadata(&to).map(|file| file.len()).unwrap_or_default();
        ensure!(
            length > 0,
            "/boot/{name} could not be read from {}",
            disk.display()
        );
        Ok(to)
    };
    // What an earlier boot took is not needed any more.
    for entry in fs::read_dir(into)?.flatten() {
        fs::remove_file(entry.path())?;
    }
    Ok(BootFiles {
        kernel: take(format!("vmlinuz-{release}"))?,
        initrd: take(format!("initrd.img-{release}"))?,
    })
}

fn newest_release<'a>(names: &[&'a str]) -> Option<&'a str> {
    names
        .iter()
        .filter_map(|name| name.strip_prefix("vmlinuz-"))
        .filter(|release| names.contains(&format!("initrd.img-{release}").as_str()))
        .max_by(|a, b| compare(a, b))
}

/// Compares releases as `sort -V` does for what kernels are called: numbers by value, the rest by bytes.
fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        let (Some(first), Some(second)) = (a.chars().next(), b.chars().next()) else {
            return a.len().cmp(&b.len());
        };
        let order = if first.is_ascii_digit() && second.is_ascii_digit() {
            let (one, two) = (digits(&mut a), digits(&mut b));
            one.len().cmp(&two.len()).then_with(|| one.cmp(two))
        } else {
            a = &a[first.len_utf8()..];
            b = &b[second.len_utf8()..];
            first.cmp(&second)
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

/// Takes the number that a text begins with, without leading zeros.
fn digits<'a>(text: &mut &'a str) -> &'a str {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    *text = rest;
    number.trim_start_matches('0')
}

fn debugfs(disk: &Path, request: &str) -> Result<String> {
    let output = Command::new("debugfs")
        // After a power cut allocation bitmaps and their checksums, and more of the kind, are of different moments
        // until the journal is replayed. A boot loader reads neither.
        .args(["-c", "-n", "-R", request])
        .arg(disk)
        .output()
        .context("cannot run debugfs (package e2fsprogs)")?;
    if !output.status.success() {
        bail!(
            "debugfs -R '{request}' {}: {}",
            disk.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Starts a node again whenever it resets its machine, until this is dropped; as any machine's firmware does.
/// A node whose power was cut, or that the emulator lost, stays down.
pub struct Firmware {
    stop: Arc<AtomicBool>,
    failure: Arc<Mutex<Option<String>>>,
    thread: Option<JoinHandle<()>>,
}

impl Firmware {
    /// Watches `node`.
    pub fn of(node: &Node, images: &Images, options: &NodeOptions) -> Firmware {
        let stop = Arc::new(AtomicBool::new(false));
        let failure = Arc::new(Mutex::new(None));
        let (node, images, options) = (node.clone(), images.clone(), options.clone());
        let (stopped, failed) = (stop.clone(), failure.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Atomic::Relaxed) {
                if node.status() == Status::Down
                    && node.end() == End::Reset
                    && let Err(error) = node.boot(&images, &options)
                {
                    *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("{error:#}"));
                    return;
                }
                std::thread::sleep(LOOK);
            }
        });
        Firmware {
            stop,
            failure,
            thread: Some(thread),
        }
    }

    /// An error where the node could not be started again.
    pub fn check(&self) -> Result<()> {
        match &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(failure) => bail!("the node was reset and could not be started again: {failure}"),
            None => Ok(()),
        }
    }
}

impl Drop for Firmware {
    fn drop(&mut self) {
        self.stop.store(true, Atomic::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Its failure is told by `check`.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_with_an_initrd_is_booted() {
        let names = [
            "vmlinuz-6.1.0-9-cloud-amd64",
            "initrd.img-6.1.0-9-cloud-amd64",
            "vmlinuz-6.1.0-56-cloud-amd64",
            "initrd.img-6.1.0-56-cloud-amd64",
            "vmlinuz-6.1.0-57-cloud-amd64",
            "config-6.1.0-58-cloud-amd64",
        ];
        assert_eq!(newest_release(&names), Some("6.1.0-56-cloud-amd64"));
        assert_eq!(newest_release(&names[5..]), None);
        assert_eq!(compare("6.1.0-9", "6.1.0-10"), Ordering::Less);
        assert_eq!(compare("6.10", "6.9"), Ordering::Greater);
        assert_eq!(compare("6.1", "6.1.1"), Ordering::Less);
        assert_eq!(compare("6.1-rt", "6.1-rt"), Ordering::Equal);
    }

    #[test]
    fn kernel_and_initrd_are_taken_out_of_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let boot = dir.path().join("root/boot");
        fs::create_dir_all(&boot).unwrap();
        for (name, content) in [
            ("vmlinuz-1-a", "old"),
            ("vmlinuz-2-a", "new"),
            ("initrd.img-2-a", "rd"),
        ] {
            fs::write(boot.join(name), content).unwrap();
        }
        let disk = dir.path().join("disk");
        let made = Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-d"])
            .arg(dir.path().join("root"))
            .arg(&disk)
            .arg("8M")
            .status();
        assert!(made.unwrap().success());
        let taken = || {
            let files = newest_kernel(&disk, &dir.path().join("taken")).unwrap();
            [files.kernel, files.initrd].map(|file| fs::read_to_string(file).unwrap())
        };
        assert_eq!(taken(), ["new", "rd"]);
        // As a power cut leaves it: a bitmap is written, and its checksum still in the journal.
        let cut = Command::new("debugfs")
            .args(["-w", "-R", "set_bg 0 inode_bitmap_csum 1"])
            .arg(&disk)
            .status();
        assert!(cut.unwrap().success());
        assert_eq!(taken(), ["new", "rd"]);
    }

    #[test]
    fn a_reset_is_told_from_a_power_cut_and_from_a_fault() {
        assert_eq!(End::of("[   99.1] reboot: Restarting system\n"), End::Reset);
        assert_eq!(End::of("[   99.1] reboot: Power down\n"), End::PoweredOff);
        assert_eq!(End::of("reboot: Restarting system\nbed: power cut\n"), End::Cut);
        assert_eq!(End::of("Debian GNU/Linux 12 node ttyS0\n"), End::Lost);
    }
}
