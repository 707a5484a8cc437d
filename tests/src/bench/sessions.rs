//! Saving and resuming the session of a stock guest: by our VMM, and by QEMU's live migration into a file and out of it.
//! The same image, kernel and memory on the same KVM, in one run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use understudy_vmm_control::config::{Boot, VmConfig};
use understudy_vmm_control::session::{Resume, SaveRequest, SaveState};
use uuid::Uuid;

use super::statistics::Sample;
use super::vmm::{Process, config};
use crate::bed::{Qmp, wait_until};

/// The sizes that are compared, in MiB.
pub const SIZES: [u64; 2] = [256, 2048];
/// How often each guest is saved and resumed.
const CYCLES: usize = 5;
/// An emulated guest boots in half a minute.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
const LIMIT: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(2);
/// What a guest does at the end of its boot is over after this.
const QUIET: Duration = Duration::from_secs(15);
const CMDLINE: &str = "root=/dev/vda ro console=ttyS0 norandmaps quiet";
/// What the guest's console prints when it is up.
const UP: &str = "login:";
/// As the node agent asks for it. QEMU's own default for what it may take is ten times that.
const TARGET_PAUSE_MS: u64 = 30;

/// Sessions of a guest of one size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sessions {
    /// Its memory.
    pub memory_mib: u64,
    /// From the stopping of its vCPU until all was durable.
    pub pause: Sample,
    /// From the start of the process that resumes to the guest's first instruction.
    pub start: Sample,
    /// The `downtime` that QEMU reports for a live migration into a file. Nothing is durable then.
    pub qemu_downtime: Sample,
    /// From the start of a QEMU that takes the migration from that file until its guest runs.
    pub qemu_start: Sample,
    /// How long QEMU takes to write the session of a guest that is stopped.
    pub qemu_stopped: Sample,
}

/// What is needed on the machine: programs, and an image of a guest.
#[derive(Clone, Debug)]
pub struct Given<'a> {
    /// Our VMM.
    pub vmm: &'a Path,
    /// A directory with `qemu-system-x86_64`, its libraries in `lib`, its firmware in `firmware`.
    pub qemu: &'a Path,
    /// The guest's root disk; it is copied.
    pub image: &'a Path,
}

/// Measures each of [`SIZES`]. Files go beneath `dir` and are removed again.
pub fn measure(given: &Given, dir: &Path) -> Result<Vec<Sessions>> {
    let boot = dir.join("boot");
    fs::create_dir_all(&boot).with_context(|| format!("cannot create {}", boot.display()))?;
    let (kernel, initrd) = (boot.join("vmlinuz"), boot.join("initrd.img"));
    shell(&format!(
        "set -e; root=$(mktemp -d); mount -o loop,ro {image} $root
         cp $(ls -v $root/boot/vmlinuz-* | tail -n 1) {kernel}; cp $(ls -v $root/boot/initrd.img-* | tail -n 1) {initrd}
         umount $root; rmdir $root",
        image = given.image.display(),
        kernel = kernel.display(),
        initrd = initrd.display()
    ))?;
    let found = SIZES
        .iter()
        .map(|size| {
            let dir = tempfile::Builder::new().prefix("session-").tempdir_in(dir)?;
            let ours = ours(given, dir.path(), &kernel, &initrd, *size).context("our VMM")?;
            let theirs = theirs(given, dir.path(), &kernel, &initrd, *size).context("QEMU")?;
            let sample = |values: &[f64]| Sample::of(values).context("nothing was measured");
            Ok(Sessions {
                memory_mib: *size,
                pause: sample(&ours[0])?,
                start: sample(&ours[1])?,
                qemu_downtime: sample(&theirs[0])?,
                qemu_start: sample(&theirs[1])?,
                qemu_stopped: sample(&theirs[2])?,
            })
        })
        .collect();
    fs::remove_dir_all(&boot)?;
    found
}

/// Pauses and starts, in microseconds.
fn ours(given: &Given, dir: &Path, kernel: &Path, initrd: &Path, size: u64) -> Result<[Vec<f64>; 2]> {
    let disk = copy(given.image, &dir.join("ours.img"))?;
    let boot = Boot::Files {
        kernel: kernel.to_owned(),
        initrd: Some(initrd.to_owned()),
        cmdline: CMDLINE.to_owned(),
    };
    let mut config = config(dir, &disk, boot, size)?;
    let mut vmm = Process::start(given.vmm, dir, &config)?;
    wait_for_boot(&config.paths.console)?;
    let (mut pauses, mut starts) = (Vec::new(), Vec::new());
    for cycle in 0..CYCLES {
        let request = request(dir, cycle)?;
        let pause = save(&vmm, &request)?;
        drop(vmm);
        config.resume = Some(resume(&request, cycle));
        vmm = Process::start(given.vmm, dir, &config)?;
        let start = vmm
            .client
            .info()?
            .resume
            .context("the VMM did not resume")?
            .start_us;
        pauses.push(pause as f64);
        starts.push(start as f64);
        wait_until("all memory to be there", LIMIT, POLL, || {
            let resume = vmm.client.info()?.resume;
            Ok(resume
                .is_some_and(|resume| resume.pending_bytes == 0)
                .then_some(()))
        })?;
        fs::remove_dir_all(&request.directory)?;
    }
    drop(vmm);
    remove_state(&config)?;
    Ok([pauses, starts])
}

fn request(dir: &Path, cycle: usize) -> Result<SaveRequest> {
    let checkpoint = Uuid::new_v4();
    let directory = dir.join(format!("checkpoint-{cycle}"));
    fs::create_dir(&directory)?;
    let key = dir.join(format!("key-{cycle}"));
    fs::write(
        &key,
        [Uuid::new_v4().into_bytes(), Uuid::new_v4().into_bytes()].concat(),
    )?;
    Ok(SaveRequest {
        checkpoint,
        directory,
        key,
        guest_uid: "bench".to_owned(),
        host_boot_id: format!("boot {cycle}"),
        machine_id: "bench".to_owned(),
        target_pause_ms: TARGET_PAUSE_MS,
        hold: false,
        lease_ms: 600_000,
    })
}

/// Saves, and tells how long the guest was paused for it, in microseconds.
fn save(vmm: &Process, request: &SaveRequest) -> Result<u64> {
    vmm.client.begin_save(request)?;
    let info = wait_until("the save to end", LIMIT, POLL, || {
        let info = vmm.client.save()?;
        Ok(info.state.has_ended().then_some(info))
    })?;
    ensure!(info.state == SaveState::Saved, "the save ended as {info:?}");
    info.pause_us
        .context("the VMM did not say how long the pause was")
}

fn resume(request: &SaveRequest, cycle: usize) -> Resume {
    Resume {
        checkpoint: request.checkpoint,
        directory: request.directory.clone(),
        key: request.key.clone(),
        guest_uid: request.guest_uid.clone(),
        // Of a later boot, as far as the VMM can tell.
        host_boot_id: format!("boot {}", cycle + 1),
        machine_id: request.machine_id.clone(),
    }
}

fn remove_state(config: &VmConfig) -> Result<()> {
    for disk in &config.disks {
        fs::remove_file(&disk.source)?;
        fs::remove_dir_all(understudy_vmm_control::owner::state_dir(&disk.source))?;
    }
    Ok(())
}

/// Downtimes, starts, and saves of the stopped guest, in microseconds.
fn theirs(given: &Given, dir: &Path, kernel: &Path, initrd: &Path, size: u64) -> Result<[Vec<f64>; 3]> {
    let disk = copy(given.image, &dir.join("qemu.img"))?;
    let machine = Machine {
        program: given.qemu,
        dir,
        disk: &disk,
        kernel,
        initrd,
        size,
    };
    let (mut qemu, _) = machine.start(None)?;
    wait_for_boot(&machine.console())?;
    let (mut downtimes, mut starts, mut stopped) = (Vec::new(), Vec::new(), Vec::new());
    let file = dir.join("qemu.session");
    for _ in 0..CYCLES {
        downtimes.push(qemu.migrate(&file)?["downtime"].as_f64().context("no downtime")? * 1e3);
        drop(qemu);
        let (next, took) = machine.start(Some(&file))?;
        qemu = next;
        starts.push(took.as_secs_f64() * 1e6);
        qemu.qmp.execute("stop", json!({}))?;
        let began = Instant::now();
        qemu.migrate(&file)?;
        stopped.push(began.elapsed().as_secs_f64() * 1e6);
        qemu.qmp.execute("cont", json!({}))?;
    }
    drop(qemu);
    fs::remove_file(&disk)?;
    Ok([downtimes, starts, stopped])
}

/// How QEMU is started.
struct Machine<'a> {
    program: &'a Path,
    dir: &'a Path,
    disk: &'a Path,
    kernel: &'a Path,
    initrd: &'a Path,
    size: u64,
}

/// A QEMU process; killed when dropped.
struct Qemu {
    child: Child,
    qmp: Qmp,
}

impl Machine<'_> {
    fn console(&self) -> PathBuf {
        self.dir.join("qemu-console.log")
    }

    /// Starts it, with a session from this file or anew, and waits until its guest runs; tells how long that took.
    fn start(&self, from: Option<&Path>) -> Result<(Qemu, Duration)> {
        let socket = self.dir.join("qemu.sock");
        let _ = fs::remove_file(&socket);
        let mut command = Command::new(self.program.join("qemu-system-x86_64"));
        command
            .env("LD_LIBRARY_PATH", self.program.join("lib"))
            .args([
                "-nodefaults",
                "-display",
                "none",
                "-machine",
                "pc",
                "-accel",
                "kvm",
            ])
            .args(["-cpu", "host", "-smp", "1", "-m", &self.size.to_string()])
            .arg("-L")
            .arg(self.program.join("firmware"))
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initrd)
            .args(["-append", CMDLINE])
            .arg("-drive")
            .arg(format!("if=none,id=root,format=raw,file={}", self.disk.display()))
            .args(["-device", "virtio-blk-pci,drive=root"])
            .arg("-serial")
            .arg(format!("file:{}", self.console().display()))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()));
        if let Some(file) = from {
            command
                .arg("-incoming")
                .arg(format!("exec:cat {}", file.display()));
        }
        let log = self.dir.join("qemu.log");
        let began = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .spawn()
            .context("cannot start QEMU")?;
        let qmp = wait_until("QEMU to answer", LIMIT, POLL, || {
            if let Some(status) = child.try_wait()? {
                bail!(
                    "QEMU ended ({status}): {}",
                    fs::read_to_string(&log).unwrap_or_default()
                );
            }
            Ok(Qmp::connect(&socket).ok())
        })?;
        let mut qemu = Qemu { child, qmp };
        wait_until("QEMU's guest to run", LIMIT, POLL, || {
            Ok((qemu.qmp.execute("query-status", json!({}))?["running"] == true).then_some(()))
        })?;
        Ok((qemu, began.elapsed()))
    }
}

impl Qemu {
    /// Migrates into a file, to the end; what QEMU reports of it.
    fn migrate(&mut self, file: &Path) -> Result<Value> {
        // As fast as the disk is.
        self.qmp
            .execute("migrate-set-parameters", json!({ "max-bandwidth": 1u64 << 40 }))?;
        self.qmp.execute(
            "migrate",
            json!({ "uri": format!("exec:cat >{}", file.display()) }),
        )?;
        wait_until("QEMU's migration to end", LIMIT, POLL, || {
            let report = self.qmp.execute("query-migrate", json!({}))?;
            match report["status"].as_str() {
                Some("completed") => Ok(Some(report)),
                Some("failed" | "cancelled") => bail!("QEMU's migration failed: {report}"),
                _ => Ok(None),
            }
        })
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_for_boot(console: &Path) -> Result<()> {
    wait_until("the guest's login prompt", BOOT_LIMIT, POLL * 100, || {
        let text = fs::read(console).unwrap_or_default();
        Ok(text
            .windows(UP.len())
            .any(|there| there == UP.as_bytes())
            .then_some(()))
    })?;
    std::thread::sleep(QUIET);
    Ok(())
}

fn copy(image: &Path, to: &Path) -> Result<PathBuf> {
    shell(&format!(
        "cp --sparse=always {} {}",
        image.display(),
        to.display()
    ))?;
    Ok(to.to_owned())
}

fn shell(line: &str) -> Result<()> {
    let output = Command::new("sh")
        .args(["-c", line])
        .output()
        .context("cannot run sh")?;
    if !output.status.success() {
        bail!(
            "'{line}' failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
