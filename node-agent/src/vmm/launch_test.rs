use understudy_vmm_control::config::{Boot, Disk, DiskRole, Paths, Role, Vsock};
use uuid::Uuid;

use super::super::instance::Layout;
use super::*;
use crate::config::Config;

struct Bed {
    dir: tempfile::TempDir,
    config: Config,
    instances: Instances,
}

fn bed() -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let config = Config {
        state_dir: dir.path().join("state"),
        run_dir: dir.path().join("run"),
        ..Config::default()
    };
    let instances = Instances::open(&config.state_dir);
    Bed {
        dir,
        config,
        instances,
    }
}

impl Bed {
    fn instance(&self) -> (Instance, VmConfig) {
        let key = Key::new("default", "web");
        let layout = Layout::new(&self.config, &key, "uid", 1);
        let instance = Instance {
            guest_uid: "uid".into(),
            incarnation: 1,
            role: Role::Active,
            config: self.instances.dir("uid").join("1.vmm.json"),
            control: layout.control(),
            log: layout.log(),
            layer: None,
            operation: None,
            unit: None,
            process: None,
        };
        let config = VmConfig {
            version: 1,
            guest: key.to_string(),
            uuid: Uuid::nil(),
            incarnation: 1,
            role: Role::Active,
            cpus: 1,
            memory_mib: 64,
            boot: Boot::FromDisk {},
            disks: vec![Disk {
                name: "root".into(),
                role: DiskRole::Root,
                source: "/nonexistent".into(),
                read_only: false,
                layer: None,
            }],
            networks: Vec::new(),
            vsock: Vsock {
                cid: 3,
                socket: layout.vsock(),
            },
            clone_oem_strings: Vec::new(),
            resume: None,
            paths: Paths {
                control: layout.control(),
                handover: layout.handover(),
                console: layout.console(),
                platform: layout.sockets.join("platform.json"),
            },
        };
        (instance, config)
    }

    fn program(&self, text: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = self.dir.path().join("vmm");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }
}

#[test]
fn a_vmm_that_ends_at_its_start_is_reported_in_its_own_words() {
    let bed = bed();
    let program = bed.program("#!/bin/sh\necho 'error: disk root: /nonexistent is missing' >&2\nexit 1\n");
    let (mut instance, config) = bed.instance();
    let launcher = Launcher::new(&program, Supervisor::Detached);
    let error = launcher
        .start(&bed.instances, &mut instance, &config)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/nonexistent is missing") && error.contains("vmm-1.log"),
        "{error}"
    );
    assert!(!instance.is_alive());
}

#[test]
fn a_missing_vmm_binary_is_named_with_its_setting() {
    let bed = bed();
    let (mut instance, config) = bed.instance();
    let launcher = Launcher::new(Path::new("/no/such/vmm"), Supervisor::Detached);
    let error = launcher
        .start(&bed.instances, &mut instance, &config)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/no/such/vmm") && error.contains("`vmm`"),
        "{error}"
    );
}

#[test]
fn a_long_name_still_fits_into_a_socket_address() {
    let bed = bed();
    let key = Key::new("n".repeat(63), "g".repeat(253));
    let layout = Layout::new(
        &bed.config,
        &key,
        "11111111-2222-3333-4444-555555555555",
        u64::MAX,
    );
    assert!(layout.handover().as_os_str().len() < 100 + bed.config.run_dir.as_os_str().len());
    let default = Layout::new(
        &Config::default(),
        &key,
        "11111111-2222-3333-4444-555555555555",
        u64::MAX,
    );
    assert!(
        default.vsock().as_os_str().len() < 101,
        "{}",
        default.vsock().display()
    );
}
