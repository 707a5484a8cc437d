//! A VMM process without an agent, for what is measured of it alone.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use understudy_vmm_control::API_VERSION;
use understudy_vmm_control::api::VmState;
use understudy_vmm_control::client::Client;
use understudy_vmm_control::config::{Boot, Disk, DiskRole, Paths, Role, VmConfig, Vsock};
use understudy_vmm_control::owner::{OWNER_VERSION, Owner, state_dir};
use uuid::Uuid;

use crate::bed::wait_until;

/// A VMM starts and ends in a fraction of a second; the rest is patience.
const LIMIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(10);
/// Name of the guest's one disk.
pub const DISK: &str = "root";

/// A guest of one processor on this disk, with all files in `dir`; the disk gets its owner record.
pub fn config(dir: &Path, disk: &Path, boot: Boot, memory_mib: u64) -> Result<VmConfig> {
    let at = |name: &str| dir.join(name);
    let owner = state_dir(disk);
    fs::create_dir(&owner).with_context(|| format!("cannot create {}", owner.display()))?;
    Owner {
        version: OWNER_VERSION,
        epoch: 1,
        incarnation: 1,
        layer: None,
    }
    .replace(&owner)?;
    Ok(VmConfig {
        version: API_VERSION,
        guest: "bench/guest".to_owned(),
        uuid: Uuid::new_v4(),
        incarnation: 1,
        role: Role::Active,
        cpus: 1,
        memory_mib,
        boot,
        disks: vec![Disk {
            name: DISK.to_owned(),
            role: DiskRole::Root,
            source: disk.to_owned(),
            read_only: false,
            layer: None,
        }],
        networks: Vec::new(),
        vsock: Vsock {
            cid: 3,
            socket: at("vsock.sock"),
        },
        clone_oem_strings: Vec::new(),
        resume: None,
        paths: Paths {
            control: at("control.sock"),
            handover: at("handover.sock"),
            console: at("console.log"),
            platform: at("platform.json"),
        },
    })
}

/// A VMM process; killed when dropped.
pub struct Process {
    child: Child,
    /// Its control API.
    pub client: Client,
    log: PathBuf,
}

impl Process {
    /// Starts it and waits until its guest runs.
    pub fn start(vmm: &Path, dir: &Path, config: &VmConfig) -> Result<Process> {
        fs::write(dir.join("config.json"), serde_json::to_vec(config)?)?;
        let log = dir.join("vmm.log");
        let child = Command::new(vmm)
            .args(["run", "--config"])
            .arg(dir.join("config.json"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .with_context(|| format!("cannot start {}", vmm.display()))?;
        let mut process = Process {
            child,
            client: Client::new(config.paths.control.clone(), LIMIT),
            log,
        };
        wait_until("the VMM to run its guest", LIMIT, POLL, || {
            if let Some(status) = process.child.try_wait()? {
                let log = fs::read_to_string(&process.log).unwrap_or_default();
                bail!("the VMM ended ({status}): {log}");
            }
            let info = process.client.info();
            Ok(info
                .is_ok_and(|info| info.state == VmState::Running)
                .then_some(()))
        })?;
        Ok(process)
    }

    /// Stops the guest, and waits until the process has ended.
    pub fn stop(mut self) -> Result<()> {
        self.client.vm("stop")?;
        wait_until("the VMM to end", LIMIT, POLL, || {
            Ok(self.child.try_wait()?.map(drop))
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
