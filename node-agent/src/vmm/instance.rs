//! Records of VMM processes, one for each incarnation that has or had one, and where their files are.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use understudy_vmm_control::client::Client;
use understudy_vmm_control::config::Role;
use uuid::Uuid;

use super::process::Process;
use crate::config::Config;
use crate::durable::{self, DurableError};
use crate::store::Key;

/// How long a VMM may take to answer a request that it answers at once.
const ANSWER: Duration = Duration::from_secs(10);
/// Longest directory of sockets: `sun_path` has 108 bytes, the longest name in it and its ending less.
const MAX_SOCKET_DIR: usize = 80;

/// One VMM process: what it was started as, and how it is found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Instance {
    /// UID of the Guest.
    pub guest_uid: String,
    /// Incarnation.
    pub incarnation: u64,
    /// As what it was started.
    pub role: Role,
    /// Its configuration.
    pub config: PathBuf,
    /// Its control socket.
    pub control: PathBuf,
    /// Its stderr.
    pub log: PathBuf,
    /// A clone's own layer.
    pub layer: Option<Uuid>,
    /// UID of the SeamlessReboot that it was made for.
    pub operation: Option<String>,
    /// systemd unit, where it has one.
    pub unit: Option<String>,
    /// The process, once it was started.
    pub process: Option<Process>,
}

impl Instance {
    /// A client with a time limit that suits everything but freezing and merging.
    pub fn client(&self) -> Client {
        Client::new(&self.control, ANSWER)
    }

    /// Whether its process runs. A process that was started just before the agent died, so that it is not
    /// in the record, is found through its control socket.
    pub fn process(&self) -> Option<Process> {
        match &self.process {
            Some(process) => process.is_alive().then(|| process.clone()),
            None => self.client().info().ok().and_then(|info| Process::of(info.pid)),
        }
    }

    /// Whether its process runs.
    pub fn is_alive(&self) -> bool {
        self.process().is_some()
    }
}

/// The records: `<stateDir>/instances/<guest UID>/<incarnation>.json`.
#[derive(Clone, Debug)]
pub struct Instances {
    dir: PathBuf,
}

impl Instances {
    /// The records beneath `state_dir`.
    pub fn open(state_dir: &Path) -> Instances {
        Instances {
            dir: state_dir.join("instances"),
        }
    }

    /// Directory of a guest's records and configurations.
    pub fn dir(&self, guest_uid: &str) -> PathBuf {
        self.dir.join(guest_uid)
    }

    /// UIDs of all guests that have records.
    pub fn guests(&self) -> Vec<String> {
        match fs::read_dir(&self.dir) {
            Ok(entries) => entries
                .flatten()
                .filter_map(|entry| entry.file_name().into_string().ok())
                .collect(),
            Err(_) => Vec::new(),
        }
    }

    /// All records of a guest, oldest incarnation first. A damaged one is logged and left out.
    pub fn of(&self, guest_uid: &str) -> Vec<Instance> {
        let mut instances: Vec<Instance> = Vec::new();
        let Ok(entries) = fs::read_dir(self.dir(guest_uid)) else {
            return instances;
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            let is_record = path
                .file_name()
                .and_then(|name| name.to_str())
                .and_then(|name| name.strip_suffix(".json"))
                .is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()));
            if !is_record {
                continue;
            }
            match durable::read_json(&path) {
                Ok(instance) => instances.extend(instance),
                Err(error) => tracing::error!(%error, "a record of a VMM is left alone"),
            }
        }
        instances.sort_by_key(|instance| instance.incarnation);
        instances
    }

    /// The record of one incarnation.
    pub fn get(&self, guest_uid: &str, incarnation: u64) -> Option<Instance> {
        self.of(guest_uid)
            .into_iter()
            .find(|instance| instance.incarnation == incarnation)
    }

    /// Makes or replaces a record, durably.
    pub fn put(&self, instance: &Instance) -> Result<(), DurableError> {
        durable::make_dir(&self.dir(&instance.guest_uid))?;
        durable::write_json(&self.file(instance), instance)
    }

    /// Removes a record with its configuration and the directory of its sockets.
    pub fn remove(&self, instance: &Instance) -> Result<(), DurableError> {
        durable::remove(&instance.config)?;
        if let Some(sockets) = instance.control.parent() {
            let _ = fs::remove_dir_all(sockets);
        }
        durable::remove(&self.file(instance))?;
        // Fails while other incarnations have records there.
        let _ = fs::remove_dir(self.dir(&instance.guest_uid));
        Ok(())
    }

    fn file(&self, instance: &Instance) -> PathBuf {
        self.dir(&instance.guest_uid)
            .join(format!("{}.json", instance.incarnation))
    }
}

/// Where the files of one incarnation are.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Directory of its sockets.
    pub sockets: PathBuf,
    /// Directory of its logs.
    pub logs: PathBuf,
    incarnation: u64,
}

impl Layout {
    /// The layout for an incarnation of a guest.
    pub fn new(config: &Config, key: &Key, guest_uid: &str, incarnation: u64) -> Layout {
        let guests = config.run_dir.join("guests");
        let mut sockets = guests
            .join(&key.namespace)
            .join(&key.name)
            .join(incarnation.to_string());
        if sockets.as_os_str().len() > MAX_SOCKET_DIR {
            let short: String = guest_uid
                .chars()
                .filter(char::is_ascii_hexdigit)
                .take(16)
                .collect();
            sockets = guests.join("-").join(short).join(incarnation.to_string());
        }
        Layout {
            sockets,
            logs: config.log_dir(&key.namespace, &key.name),
            incarnation,
        }
    }

    /// Control socket.
    pub fn control(&self) -> PathBuf {
        self.sockets.join("control.sock")
    }

    /// vsock socket.
    pub fn vsock(&self) -> PathBuf {
        self.sockets.join("vsock.sock")
    }

    /// Handover socket.
    pub fn handover(&self) -> PathBuf {
        self.sockets.join("handover.sock")
    }

    /// Socket of the responder for an isolated interface.
    pub fn isolated(&self, index: usize) -> PathBuf {
        self.sockets.join(format!("net{index}.sock"))
    }

    /// Log of the serial console.
    pub fn console(&self) -> PathBuf {
        self.logs.join(format!("console-{}.log", self.incarnation))
    }

    /// The VMM's stderr.
    pub fn log(&self) -> PathBuf {
        self.logs.join(format!("vmm-{}.log", self.incarnation))
    }
}
