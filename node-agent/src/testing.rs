//! A node in a temporary directory, for tests: real store, journal and threads; what runs as VMM is up to
//! the test. Its run directory lies on a tmpfs, and its credential provider is a key file.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use understudy_api::Guest;
use understudy_api::manifest::{Manifest, parse};
use understudy_vmm_control::config::Role;
use understudy_vmm_control::owner::{OWNER_VERSION, Owner, state_dir};
use understudy_vmm_control::session::MANIFEST;
use uuid::Uuid;

use crate::cluster::{Access, Cluster};
use crate::config::{Config, Credentials, ProviderName, Supervisor};
use crate::credentials::{Identity, Secret};
use crate::guests::boot::vm_config;
use crate::guests::resolve;
use crate::host::HostIdentity;
use crate::node::Node;
use crate::sessions::Record;
use crate::store::{Key, Object, Objects, Store};
use crate::vmm::{Instance, Layout, Process};

/// How long anything may take here.
const LIMIT: Duration = Duration::from_secs(60);

/// Access of the node `alpha` to an API server that does not answer.
pub(crate) fn access() -> Access {
    Access {
        server: "https://127.0.0.1:1".into(),
        ca_data: String::new(),
        token: String::new(),
        node_name: "alpha".into(),
        node_uid: "node-uid".into(),
        namespace: "understudy".into(),
    }
}

pub(crate) struct Bed {
    dir: tempfile::TempDir,
    _run_dir: tempfile::TempDir,
    pub(crate) store: Store,
    pub(crate) node: Arc<Node>,
}

impl Bed {
    /// A node whose VMM is the shell script `vmm`.
    pub(crate) fn new(vmm: &str) -> Bed {
        Bed::with(vmm, |store, _| Arc::new(store))
    }

    /// One of a cluster that has not answered yet.
    pub(crate) fn of_cluster(vmm: &str) -> (Bed, Arc<Cluster>) {
        let mut cluster = None;
        let bed = Bed::with(vmm, |store, state_dir| {
            let opened = Arc::new(Cluster::open(store, state_dir, &access()).unwrap());
            cluster = Some(opened.clone());
            opened
        });
        (bed, cluster.unwrap())
    }

    fn with(vmm: &str, objects: impl FnOnce(Store, &Path) -> Arc<dyn Objects>) -> Bed {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let run_dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let key_file = dir.path().join("key");
        fs::write(&key_file, [7; 32]).unwrap();
        fs::set_permissions(&key_file, fs::Permissions::from_mode(0o600)).unwrap();
        let program: PathBuf = dir.path().join("vmm");
        fs::write(&program, vmm).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let config = Config {
            state_dir: dir.path().join("state"),
            run_dir: run_dir.path().to_owned(),
            manifests_dir: dir.path().join("manifests"),
            disks_dir: dir.path().join("disks"),
            vmm: program,
            supervisor: Supervisor::Detached,
            credentials: Credentials {
                provider: ProviderName::KeyFile,
                key_file: Some(key_file),
                ..Credentials::default()
            },
            ..Config::default()
        };
        fs::create_dir_all(config.disks_dir.join("default")).unwrap();
        let store = Store::open(&config.state_dir).unwrap();
        let objects = objects(store.clone(), &config.state_dir);
        let node = Node::open(crate::host::name(), config, objects, HostIdentity::read()).unwrap();
        Bed {
            dir,
            _run_dir: run_dir,
            store,
            node,
        }
    }

    /// What the VMM's script is from now on.
    pub(crate) fn set_vmm(&self, text: &str) {
        fs::write(self.dir.path().join("vmm"), text).unwrap();
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

/// A VMM's control socket, answered by a thread of the test: `answer` gets method, path and body and gives
/// status and body.
pub(crate) struct FakeVmm {
    pub(crate) asked: Arc<Mutex<Vec<String>>>,
}

impl FakeVmm {
    pub(crate) fn serve(
        socket: &Path,
        mut answer: impl FnMut(&str, serde_json::Value) -> (u16, serde_json::Value) + Send + 'static,
    ) -> FakeVmm {
        fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let _ = fs::remove_file(socket);
        let listener = UnixListener::bind(socket).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                let mut reader = BufReader::new(&stream);
                let (mut line, mut length) = (String::new(), 0usize);
                reader.read_line(&mut line).unwrap();
                let what = line.rsplit_once(' ').unwrap().0.to_owned();
                loop {
                    line.clear();
                    reader.read_line(&mut line).unwrap();
                    if let Some(value) = line.strip_prefix("Content-Length: ") {
                        length = value.trim().parse().unwrap();
                    }
                    if line.trim().is_empty() {
                        break;
                    }
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                let body = serde_json::from_slice(&body).unwrap_or_default();
                log.lock().unwrap().push(what.clone());
                let (status, body) = answer(&what, body);
                let body = body.to_string();
                let text = format!(
                    "HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                );
                let _ = (&stream).write_all(text.as_bytes());
            }
        });
        FakeVmm { asked }
    }

    /// What a VMM says of itself, with `more` in it.
    pub(crate) fn info(more: serde_json::Value) -> serde_json::Value {
        let mut info = serde_json::json!({
            "apiVersion": 1, "vmmVersion": "0", "guest": "default/web", "incarnation": 1,
            "pid": std::process::id(), "state": "Running", "owner": true, "boots": 1,
            "kernel": null, "exitReason": null, "gates": {},
            "counters": {"blockWrites": 0, "blockWritesHeld": 0, "framesReceived": 0,
                "framesSent": 0, "framesDropped": 0},
            "disks": [],
        });
        for (name, value) in more.as_object().cloned().unwrap_or_default() {
            info[name] = value;
        }
        info
    }
}

impl Bed {
    /// A guest `web` that runs, as far as its records tell: its process is this one, and its control socket
    /// is for the test to serve.
    pub(crate) fn running_guest(&self) -> (Guest, Instance) {
        let root = self.disk("web.img");
        self.apply(&Bed::guest_manifest("web", "web.img"));
        let guest: Guest = self.store.get(&Key::new("default", "web")).unwrap().unwrap();
        let resolved = resolve(&self.node.config, &guest, 64, 1 << 20).unwrap();
        fs::create_dir_all(state_dir(&root)).unwrap();
        Owner {
            version: OWNER_VERSION,
            epoch: 1,
            incarnation: 1,
            layer: None,
        }
        .replace(&state_dir(&root))
        .unwrap();
        let layout = Layout::new(&self.node.config, &resolved.key, &resolved.uid, 1);
        let instance = Instance {
            guest_uid: resolved.uid.clone(),
            incarnation: 1,
            role: Role::Active,
            config: self.node.instances.dir(&resolved.uid).join("1.vmm.json"),
            control: layout.control(),
            log: layout.log(),
            layer: None,
            operation: None,
            unit: None,
            process: Process::of(std::process::id()),
        };
        self.node.instances.put(&instance).unwrap();
        let config = vm_config(&resolved, &layout, 1, Role::Active, None, Vec::new());
        crate::durable::write_json(&instance.config, &config).unwrap();
        (guest, instance)
    }

    /// A complete checkpoint of that guest, as it is found after the host's reboot: saved in another boot.
    pub(crate) fn saved_session(&self, guest: &Guest, instance: &Instance) -> Record {
        let sessions = &self.node.sessions;
        let identity = Identity {
            guest_uid: guest.uid(),
            machine_id: sessions.machine_id().to_owned(),
            boot_id: "the boot before".into(),
            checkpoint: Uuid::new_v4(),
            node_update: "kernel-1".into(),
        };
        let mut instance = instance.clone();
        instance.process = None;
        self.node.instances.put(&instance).unwrap();
        let record = Record {
            version: 1,
            identity: identity.clone(),
            guest: guest.key().to_string(),
            node_update: "kernel-1".into(),
            provider: None,
            config: crate::durable::read_json(&instance.config).unwrap().unwrap(),
            instance,
        };
        sessions.records.put(&record).unwrap();
        let directory = sessions.records.directory(&guest.uid(), identity.checkpoint);
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("memory"), "pages").unwrap();
        fs::write(directory.join(MANIFEST), "{}").unwrap();
        let key = Secret::generate().unwrap();
        sessions.credentials.register(None, &identity, &key).unwrap();
        record
    }
}
