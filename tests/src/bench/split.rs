//! How long a disk split takes, and that a disk's size has no part in it: a VMM process with the smallest
//! of guests on `/dev/kvm`, a fresh sparse disk, one split by its control API, over and over.
//!
//! The guest is a kernel of three bytes that halts, so that this runs on a software KVM as well.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use understudy_vmm_control::api::{PrepareSplit, Split, VmState};
use understudy_vmm_control::config::Boot;
use uuid::Uuid;

use super::statistics::Sample;
use super::vmm::{DISK, Process, config};

/// The sizes that are compared, in bytes.
pub const SIZES: [u64; 2] = [1 << 30, 1 << 40];

/// Splits of a disk of one size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Splits {
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// How long the guest's block requests had to wait, as the VMM tells.
    pub held: Sample,
    /// How long the control API took to answer the request to split.
    pub answered: Sample,
    /// How long it took to make the two layers, before the split and not in its way.
    pub prepared: Sample,
}

/// One split, in microseconds.
struct One {
    held: f64,
    answered: f64,
    prepared: f64,
}

/// Measures each of [`SIZES`], `repetitions` times, in turns: what slows the machine down for a while does
/// so for both, and what one leaves to be done behind it delays neither more often. Files go beneath `dir` and are removed again.
pub fn measure(vmm: &Path, dir: &Path, repetitions: usize) -> Result<Vec<Splits>> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let mut all: [Vec<One>; SIZES.len()] = Default::default();
    // The first one finds cold caches.
    for repetition in 0..=repetitions {
        let mut order: Vec<usize> = (0..SIZES.len()).collect();
        if repetition % 2 == 1 {
            order.reverse();
        }
        for index in order {
            let size = SIZES[index];
            let one =
                once(vmm, dir, size).with_context(|| format!("splitting a disk of {} GiB", size >> 30))?;
            if repetition > 0 {
                all[index].push(one);
            }
        }
    }
    SIZES
        .iter()
        .zip(&all)
        .map(|(size, seen)| {
            let sample = |of: fn(&One) -> f64| {
                let values: Vec<f64> = seen.iter().map(of).collect();
                Sample::of(&values).context("no repetition was asked for")
            };
            Ok(Splits {
                disk_bytes: *size,
                held: sample(|one| one.held)?,
                answered: sample(|one| one.answered)?,
                prepared: sample(|one| one.prepared)?,
            })
        })
        .collect()
}

fn once(vmm: &Path, dir: &Path, size: u64) -> Result<One> {
    let dir = tempfile::Builder::new()
        .prefix("split-")
        .tempdir_in(dir)
        .with_context(|| format!("cannot create a directory in {}", dir.display()))?;
    let guest = start(vmm, dir.path(), size)?;
    let (guest_layer, clone_layer) = (Uuid::new_v4(), Uuid::new_v4());
    let began = Instant::now();
    guest.client.prepare_split(
        DISK,
        &PrepareSplit {
            guest_layer,
            clone_layer,
        },
    )?;
    let prepared = began.elapsed();
    let began = Instant::now();
    let report = guest.client.split(DISK, &Split { guest_layer })?;
    let answered = began.elapsed();
    let info = guest.client.info()?;
    if info.state != VmState::Running || info.disks[0].layers.first() != Some(&guest_layer) {
        bail!("the VMM said that it had split the disk, and then: {info:?}");
    }
    guest.stop()?;
    let us = |duration: Duration| duration.as_secs_f64() * 1e6;
    Ok(One {
        held: report.held_us as f64,
        answered: us(answered),
        prepared: us(prepared),
    })
}

/// Starts the smallest of guests with a sparse disk of this size.
fn start(vmm: &Path, dir: &Path, size: u64) -> Result<Process> {
    let (disk, kernel) = (dir.join("disk.img"), dir.join("kernel"));
    File::create(&disk)
        .and_then(|file| file.set_len(size))
        .with_context(|| format!("cannot make a sparse file of {size} bytes at {}", disk.display()))?;
    fs::write(&kernel, halting_kernel())?;
    let boot = Boot::Files {
        kernel,
        initrd: None,
        cmdline: String::new(),
    };
    Process::start(vmm, dir, &config(dir, &disk, boot, 32)?)
}

/// A bzImage (Linux boot protocol 2.15, 64-bit entry) whose code is `hlt`, in a loop.
fn halting_kernel() -> Vec<u8> {
    const SETUP: usize = 0x400;
    const ENTRY: usize = 0x200;
    const CODE: [u8; 3] = [0xf4, 0xeb, 0xfd];
    let mut image = vec![0; SETUP + ENTRY];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes()); // version
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x214, &0x10_0000_u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x236, &[1]); // xloadflags: XLF_KERNEL_64
    put(0x238, &2047_u32.to_le_bytes()); // cmdline_size
    put(0x258, &0x10_0000_u64.to_le_bytes()); // pref_address
    put(0x260, &0x1_0000_u32.to_le_bytes()); // init_size
    image.extend_from_slice(&CODE);
    image
}
