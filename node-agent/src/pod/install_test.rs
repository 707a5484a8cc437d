use std::sync::Mutex;

use super::*;

/// A host that notes what it is asked to run.
#[derive(Default)]
struct Asked {
    commands: Mutex<Vec<String>>,
    fails: Mutex<Option<&'static str>>,
    unit: PathBuf,
}

impl Host for Asked {
    fn run(&self, command: &[&str]) -> Result<String, HostError> {
        let command = command.join(" ");
        self.commands.lock().unwrap().push(command.clone());
        if command.contains(" install ") {
            fs::create_dir_all(self.unit.parent().unwrap()).unwrap();
            fs::write(&self.unit, format!("ExecStart={command}")).unwrap();
        }
        match *self.fails.lock().unwrap() {
            Some(word) if command.contains(word) => Err(HostError::Failed {
                command,
                message: "no".into(),
            }),
            _ => Ok(String::new()),
        }
    }

    fn follow(&self, _: &[&str]) -> Result<std::process::Child, HostError> {
        unreachable!()
    }
}

struct Bed {
    dir: tempfile::TempDir,
    asked: Asked,
}

impl Bed {
    fn new() -> Bed {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("image")).unwrap();
        fs::create_dir(dir.path().join("host")).unwrap();
        let asked = Asked {
            unit: dir.path().join("host/etc/systemd/system").join(UNIT),
            ..Asked::default()
        };
        let bed = Bed { dir, asked };
        bed.image("agent 1", "vmm 1");
        bed
    }

    fn image(&self, agent: &str, vmm: &str) {
        fs::write(self.dir.path().join("image").join(PROGRAM), agent).unwrap();
        fs::write(self.dir.path().join("image").join(VMM), vmm).unwrap();
    }

    fn settle(&self, version: &str, is_first: bool) -> Result<bool, InstallError> {
        Installer {
            host_root: &self.dir.path().join("host"),
            image_dir: &self.dir.path().join("image"),
            node_config: &self.dir.path().join("node.yaml"),
            version,
            host: &self.asked,
        }
        .settle(is_first)
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.asked.commands.lock().unwrap())
    }

    fn host(&self, path: &str) -> PathBuf {
        self.dir.path().join("host").join(path)
    }
}

#[test]
fn the_service_is_brought_and_restarted_only_when_something_of_it_changed() {
    let bed = Bed::new();
    assert!(bed.settle("0.1.0", true).unwrap());
    assert_eq!(
        bed.asked(),
        [
            "/opt/understudy/current/understudy-node install --config /etc/understudy/node.yaml --program /opt/understudy/current/understudy-node",
            "systemctl restart understudy-node.service",
        ]
    );
    assert_eq!(
        fs::read_to_string(bed.host("opt/understudy/current/understudy-node")).unwrap(),
        "agent 1"
    );
    let mode = fs::metadata(bed.host("opt/understudy/0.1.0/understudy-vmm"))
        .unwrap()
        .mode();
    assert_eq!(mode & 0o777, 0o755);
    // What the service reads is a configuration of a cluster.
    let config = Config::load(Some(&bed.host("etc/understudy/node.yaml"))).unwrap();
    assert_eq!(config.mode, Mode::Cluster);
    assert_eq!(config.vmm, Path::new("/opt/understudy/current/understudy-vmm"));

    // A Pod that starts again finds all of it.
    assert!(!bed.settle("0.1.0", true).unwrap());
    assert_eq!(bed.asked(), ["systemctl is-active understudy-node.service"]);

    // What the administrator stopped is not started behind his back.
    *bed.asked.fails.lock().unwrap() = Some("is-active");
    assert!(!bed.settle("0.1.0", false).unwrap());
    assert_eq!(bed.asked(), [""; 0]);
    assert!(bed.settle("0.1.0", true).unwrap());
    assert_eq!(
        bed.asked().last().unwrap(),
        "systemctl start understudy-node.service"
    );
    *bed.asked.fails.lock().unwrap() = None;

    // Another configuration.
    fs::write(bed.dir.path().join("node.yaml"), "reservedMemoryMib: 256\n").unwrap();
    assert!(bed.settle("0.1.0", false).unwrap());
    assert!(
        bed.asked()
            .contains(&"systemctl restart understudy-node.service".to_owned())
    );

    // A VMM alone needs no restart: it counts for guests that are started from now on.
    bed.image("agent 1", "vmm 2");
    assert!(!bed.settle("0.1.0", false).unwrap());
    assert_eq!(
        fs::read_to_string(bed.host("opt/understudy/current/understudy-vmm")).unwrap(),
        "vmm 2"
    );
}

#[test]
fn an_upgrade_switches_the_link_and_keeps_a_version_of_which_something_runs() {
    let bed = Bed::new();
    bed.settle("0.1.0", true).unwrap();
    let by_hand = bed.host("opt/understudy/bin/understudy-node");
    fs::create_dir_all(by_hand.parent().unwrap()).unwrap();
    fs::write(&by_hand, "agent").unwrap();
    // A real program, so that it can run from there.
    let sleep = ["/usr/bin/sleep", "/bin/sleep"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .unwrap();
    let old = bed.host("opt/understudy/0.1.0/understudy-vmm");
    fs::remove_file(&old).unwrap();
    fs::copy(sleep, &old).unwrap();
    let mut guest = std::process::Command::new(&old).arg("600").spawn().unwrap();

    bed.image("agent 2", "vmm 2");
    assert!(bed.settle("0.2.0", true).unwrap());
    assert_eq!(
        fs::read_link(bed.host("opt/understudy/current")).unwrap(),
        Path::new("0.2.0")
    );
    assert!(old.exists(), "a guest runs by it");
    guest.kill().unwrap();
    guest.wait().unwrap();
    bed.image("agent 3", "vmm 3");
    assert!(bed.settle("0.3.0", true).unwrap());
    assert!(!bed.host("opt/understudy/0.1.0").exists());
    assert!(!bed.host("opt/understudy/0.2.0").exists());
    assert!(bed.host("opt/understudy/0.3.0/understudy-node").exists());
    assert!(by_hand.exists(), "no version of ours");
}

#[test]
fn a_service_that_was_installed_by_hand_meanwhile_is_made_anew() {
    let bed = Bed::new();
    bed.settle("0.1.0", true).unwrap();
    for (file, content) in [
        (
            bed.asked.unit.clone(),
            "ExecStart=/usr/local/bin/understudy-node run",
        ),
        (bed.host("etc/understudy/node.yaml"), "mode: Standalone"),
    ] {
        fs::write(&file, content).unwrap();
        *bed.asked.fails.lock().unwrap() = Some("restart");
        assert!(bed.settle("0.1.0", true).is_err());
        *bed.asked.fails.lock().unwrap() = None;
        assert!(bed.settle("0.1.0", true).unwrap(), "{}", file.display());
        assert_ne!(fs::read_to_string(&file).unwrap(), content);
        assert!(!bed.settle("0.1.0", true).unwrap());
    }
}

#[test]
fn what_failed_is_done_again_and_a_bad_configuration_changes_nothing() {
    let bed = Bed::new();
    *bed.asked.fails.lock().unwrap() = Some("restart");
    assert!(bed.settle("0.1.0", true).is_err());
    *bed.asked.fails.lock().unwrap() = None;
    bed.asked();
    assert!(
        bed.settle("0.1.0", false).unwrap(),
        "the restart is still to be done"
    );
    bed.asked();

    let there = fs::read(bed.host("etc/understudy/node.yaml")).unwrap();
    fs::write(bed.dir.path().join("node.yaml"), "reservedMemory: 256\n").unwrap();
    let error = bed.settle("0.1.0", false).unwrap_err().to_string();
    assert!(error.contains("reservedMemory"), "{error}");
    assert_eq!(bed.asked(), [""; 0]);
    assert_eq!(fs::read(bed.host("etc/understudy/node.yaml")).unwrap(), there);
}
