//! A node in a temporary directory, for tests: real store, journal and threads; what runs as VMM is up to
//! the test.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use understudy_api::manifest::{Manifest, parse};

use crate::config::{Config, Supervisor};
use crate::node::Node;
use crate::store::{Key, Store};

/// How long anything may take here.
const LIMIT: Duration = Duration::from_secs(60);

pub(crate) struct Bed {
    _dir: tempfile::TempDir,
    pub(crate) store: Store,
    pub(crate) node: Arc<Node>,
}

impl Bed {
    /// A node whose VMM is the shell script `vmm`.
    pub(crate) fn new(vmm: &str) -> Bed {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let program: PathBuf = dir.path().join("vmm");
        fs::write(&program, vmm).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let config = Config {
            state_dir: dir.path().join("state"),
            run_dir: dir.path().join("run"),
            manifests_dir: dir.path().join("manifests"),
            disks_dir: dir.path().join("disks"),
            vmm: program,
            supervisor: Supervisor::Detached,
            ..Config::default()
        };
        fs::create_dir_all(config.disks_dir.join("default")).unwrap();
        let store = Store::open(&config.state_dir).unwrap();
        let node = Node::open(config, Arc::new(store.clone())).unwrap();
        Bed {
            _dir: dir,
            store,
            node,
        }
    }

    /// A raw disk image of the namespace `default`.
    pub(crate) fn disk(&self, name: &str) -> PathBuf {
        let path = self.node.config.disks_dir.join("default").join(name);
        fs::write(&path, [0u8; 4096]).unwrap();
        path
    }

    /// Applies manifests, as their file would.
    pub(crate) fn apply(&self, text: &str) {
        for manifest in parse(text).unwrap() {
            match manifest.unwrap() {
                Manifest::Guest(guest) => self.store.apply(&*guest, Timestamp::now()),
                Manifest::SeamlessReboot(reboot) => self.store.apply(&*reboot, Timestamp::now()),
                Manifest::HostUpdate(update) => self.store.apply(&*update, Timestamp::now()),
            }
            .unwrap();
        }
    }

    pub(crate) fn guest_manifest(name: &str, source: &str) -> String {
        format!(
            "apiVersion: understudy.dev/v1alpha1\nkind: Guest\nmetadata: {{name: {name}}}\nspec:\n  memory: 64Mi\n  disks: [{{name: root, role: Root, source: {source}}}]\n"
        )
    }

    pub(crate) fn reboot_manifest(name: &str, guest: &str) -> String {
        format!(
            "apiVersion: understudy.dev/v1alpha1\nkind: SeamlessReboot\nmetadata: {{name: {name}}}\nspec: {{guestName: {guest}}}\n"
        )
    }

    /// Waits until `look` finds something.
    pub(crate) fn wait<T>(&self, what: &str, mut look: impl FnMut(&Bed) -> Option<T>) -> T {
        let deadline = Instant::now() + LIMIT;
        let mut seen = 0;
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            assert!(Instant::now() < deadline, "gave up waiting for {what}");
            seen = self.store.wait(seen, Duration::from_millis(100));
        }
    }

    /// Message of a guest's Ready condition, once `reason` is its reason.
    pub(crate) fn ready_message(&self, name: &str, reason: &str) -> String {
        self.wait(&format!("guest {name}: {reason}"), |bed| {
            let guest: understudy_api::Guest = bed.store.get(&Key::new("default", name)).unwrap()?;
            let conditions = guest.status?.conditions;
            let ready = conditions
                .into_iter()
                .find(|condition| condition.type_ == "Ready")?;
            (ready.reason == reason).then_some(ready.message)
        })
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.node.stop();
    }
}
