//! Records of checkpoints: `<stateDir>/sessions/<guest UID>/<checkpoint>.json`, and beside each the
//! directory `<checkpoint>/` with what the VMM wrote.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use understudy_vmm_control::config::VmConfig;
use understudy_vmm_control::session::{CONSUMED, MANIFEST};
use uuid::Uuid;

use crate::credentials::Identity;
use crate::durable::{self, DurableError};
use crate::vmm::{Instance, Instances};

/// Version of the record's format.
pub(super) const VERSION: u32 = 1;

/// One checkpoint of one guest. It is durable before anything of the checkpoint exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Record {
    /// Version of the format.
    pub version: u32,
    /// For what its key is registered.
    pub identity: Identity,
    /// `namespace/name` of the guest.
    pub guest: String,
    /// Name of the NodeUpdate for which it is saved.
    pub node_update: String,
    /// The credential provider that was asked for; `None`: the node's default.
    pub provider: Option<String>,
    /// The VMM that saves, as it was found: what [`Record::vmm`] goes by where its own record is gone.
    pub instance: Instance,
    /// What the saving VMM was started with: a session goes on in the same machine, whatever the Guest's
    /// spec asks of the next boot.
    pub config: VmConfig,
}

impl Record {
    /// The VMM of the session, that which saves or that which resumes, as its own record has it: that is
    /// durable before a process exists, so that a VMM is found which an agent started that was killed.
    pub fn vmm(&self, instances: &Instances) -> Instance {
        instances
            .get(&self.identity.guest_uid, self.instance.incarnation)
            .unwrap_or_else(|| self.instance.clone())
    }

    /// What the session's VMM does now.
    pub fn life(&self, instances: &Instances) -> Life {
        let vmm = self.vmm(instances);
        if !vmm.is_alive() {
            return Life::Ended;
        }
        match vmm.client().info() {
            Ok(info) => match info.resume {
                Some(resume) if resume.checkpoint == self.identity.checkpoint => Life::GoesOn,
                _ => Life::Otherwise,
            },
            Err(_) => Life::Silent,
        }
    }
}

/// What the VMM of a session does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It has ended.
    Ended,
    /// It runs, and goes on from the checkpoint.
    GoesOn,
    /// It runs, and not from the checkpoint: it has not ended since the save, or the guest was reset since.
    Otherwise,
    /// It runs, and does not answer.
    Silent,
}

/// What the files of a checkpoint say, whatever the record thinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// There is no manifest: it was never complete, or was made void.
    Incomplete,
    /// It is complete, and nobody has used it. The guest goes on from it and from nothing else.
    Saved,
    /// It was used.
    Consumed,
}

/// The records of all guests.
#[derive(Clone, Debug)]
pub struct Records {
    dir: PathBuf,
}

impl Records {
    /// The records beneath `state_dir`.
    pub fn open(state_dir: &Path) -> Records {
        Records {
            dir: state_dir.join("sessions"),
        }
    }

    /// Where the sessions of all guests are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the VMM writes a checkpoint.
    pub fn directory(&self, guest_uid: &str, checkpoint: Uuid) -> PathBuf {
        self.dir.join(guest_uid).join(checkpoint.to_string())
    }

    /// Makes or replaces a record, durably.
    pub fn put(&self, record: &Record) -> Result<(), DurableError> {
        let identity = &record.identity;
        let guest = self.dir.join(&identity.guest_uid);
        let is_new = !guest.exists();
        durable::make_dir(&guest)?;
        if is_new {
            durable::sync_dir(&self.dir)?;
        }
        durable::write_json(&self.file(&identity.guest_uid, identity.checkpoint), record)
    }

    /// One record.
    pub fn get(&self, guest_uid: &str, checkpoint: Uuid) -> Result<Option<Record>, DurableError> {
        let path = self.file(guest_uid, checkpoint);
        match durable::read_json::<Record>(&path)? {
            Some(record) if record.version != VERSION => Err(DurableError::Damaged {
                path,
                reason: format!("version {} where {VERSION} is known", record.version),
            }),
            record => Ok(record),
        }
    }

    /// All records of a guest. One that cannot be read is an error: what it stands for may be a session,
    /// and nobody boots past that.
    pub fn of(&self, guest_uid: &str) -> Result<Vec<Record>, DurableError> {
        let mut records = Vec::new();
        for path in entries(&self.dir.join(guest_uid)) {
            let checkpoint = path
                .file_name()
                .and_then(|name| name.to_str())
                .and_then(|name| name.strip_suffix(".json"))
                .and_then(|name| name.parse().ok());
            if let Some(checkpoint) = checkpoint {
                records.extend(self.get(guest_uid, checkpoint)?);
            }
        }
        Ok(records)
    }

    /// UIDs of guests that have records.
    pub fn guests(&self) -> Vec<String> {
        entries(&self.dir)
            .into_iter()
            .filter(|path| path.is_dir())
            .filter_map(|path| path.file_name()?.to_str().map(str::to_owned))
            .collect()
    }

    /// What the checkpoint's files say. An error is one of the disk, and says nothing about the checkpoint.
    pub fn standing(&self, record: &Record) -> Result<Standing, DurableError> {
        let directory = self.directory(&record.identity.guest_uid, record.identity.checkpoint);
        if exists(&directory.join(CONSUMED))? {
            return Ok(Standing::Consumed);
        }
        if exists(&directory.join(MANIFEST))? {
            return Ok(Standing::Saved);
        }
        Ok(Standing::Incomplete)
    }

    /// Removes a checkpoint with its files; fine when it is gone. The manifest goes first, so that what is
    /// left by a power cut is no checkpoint, and the record last.
    pub fn remove(&self, guest_uid: &str, checkpoint: Uuid) -> Result<(), DurableError> {
        let directory = self.directory(guest_uid, checkpoint);
        if directory.exists() {
            durable::remove(&directory.join(MANIFEST))?;
            fs::remove_dir_all(&directory).map_err(|source| DurableError::Io {
                action: "removing",
                path: directory.clone(),
                source,
            })?;
        }
        durable::remove(&self.discard_file(guest_uid, checkpoint))?;
        durable::remove(&self.file(guest_uid, checkpoint))?;
        // Fails while other checkpoints are there.
        let _ = fs::remove_dir(self.dir.join(guest_uid));
        Ok(())
    }

    /// Asks for a checkpoint to be discarded: the agent does so, now or when it is started.
    pub fn ask_to_discard(&self, guest_uid: &str, checkpoint: Uuid) -> Result<(), DurableError> {
        durable::replace(&self.discard_file(guest_uid, checkpoint), b"")
    }

    /// Whether that was asked for.
    pub fn is_to_be_discarded(&self, guest_uid: &str, checkpoint: Uuid) -> bool {
        self.discard_file(guest_uid, checkpoint).exists()
    }

    fn file(&self, guest_uid: &str, checkpoint: Uuid) -> PathBuf {
        self.dir.join(guest_uid).join(format!("{checkpoint}.json"))
    }

    fn discard_file(&self, guest_uid: &str, checkpoint: Uuid) -> PathBuf {
        self.dir.join(guest_uid).join(format!("{checkpoint}.discard"))
    }
}

/// Whether a file exists; an error of the disk is not taken for an absence.
fn exists(path: &Path) -> Result<bool, DurableError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(DurableError::Io {
            action: "looking for",
            path: path.to_owned(),
            source,
        }),
    }
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    match fs::read_dir(directory) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => Vec::new(),
    }
}
