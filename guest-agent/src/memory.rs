//! What the clone remembers of an import between rounds.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::sys::handle::Handle;

/// Memory of one operation's import. Kept in the run-time directory: it outlives the agent, not the boot.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Memory {
    /// UID of the SeamlessReboot.
    pub operation: String,
    /// Last round that was applied completely.
    pub round: u64,
    /// The clone's inode for inodes that the guest made after the split: (file system, handle) to handle.
    identities: HashMap<(usize, Handle), Handle>,
    /// The clone's inodes in it: they stand for no other inode of the guest, not even for the one that had
    /// their number at the split.
    taken: HashSet<(usize, Handle)>,
    /// Sizes of the guest's versions of what the import wrote, by the clone's inode: in a joined log the
    /// clone's own tail begins there.
    pub sizes: HashMap<(usize, Handle), u64>,
    /// When inodes were last changed (ctime) as the import left them.
    #[serde(default)]
    pub settled: HashMap<(usize, Handle), (i64, u32)>,
    /// Where the guest's active journal files are kept: (file system, handle) to path.
    pub journals: HashMap<(usize, Handle), Vec<u8>>,
    /// Directories of the guest of which the clone has no copy, and which were asked for nevertheless.
    #[serde(default)]
    pub strangers: HashSet<(usize, Handle)>,
    /// Units that were stopped because the guest changed their state.
    pub stopped_units: Vec<String>,
}

impl Memory {
    /// Memory of `operation`: what was stored in `run_dir`, or an empty one.
    pub fn load(run_dir: &Path, operation: &str) -> io::Result<Self> {
        let fresh = Self {
            operation: operation.to_owned(),
            ..Self::default()
        };
        let file = match fs::File::open(path(run_dir)) {
            Ok(file) => io::BufReader::new(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(fresh),
            Err(error) => return Err(error),
        };
        let stored: Self = ciborium::from_reader(file).map_err(|e| io::Error::other(e.to_string()))?;
        Ok(if stored.operation == operation {
            stored
        } else {
            fresh
        })
    }

    /// Notes that the clone's inode `ours` is the guest's inode `guest`.
    pub fn identify(&mut self, fs: usize, guest: Handle, ours: Handle) {
        if guest != ours {
            self.taken.insert((fs, ours.clone()));
        }
        self.identities.insert((fs, guest), ours);
    }

    /// The clone's inode for the guest's one, where that was noted.
    pub fn identity(&self, fs: usize, guest: &Handle) -> Option<&Handle> {
        self.identities.get(&(fs, guest.clone()))
    }

    /// Whether an inode of the clone stands for one of the guest's with another handle.
    pub fn is_taken(&self, fs: usize, ours: &Handle) -> bool {
        self.taken.contains(&(fs, ours.clone()))
    }

    /// Stores it for an agent that may be started anew.
    pub fn store(&self, run_dir: &Path) -> io::Result<()> {
        fs::create_dir_all(run_dir)?;
        let temporary = run_dir.join("import.new");
        let mut file = io::BufWriter::new(fs::File::create(&temporary)?);
        ciborium::into_writer(self, &mut file).map_err(|e| io::Error::other(e.to_string()))?;
        io::Write::flush(&mut file)?;
        fs::rename(temporary, path(run_dir))
    }
}

fn path(run_dir: &Path) -> PathBuf {
    run_dir.join("import.cbor")
}
