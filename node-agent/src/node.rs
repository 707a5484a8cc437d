//! What all parts of the agent share.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use understudy_api::Phase;

use crate::config::Config;
use crate::durable::{self, DurableError};
use crate::guest_agent::Link;
use crate::guests::Records;
use crate::handover::journal::{Directory, JournalError};
use crate::host::HostIdentity;
use crate::host_effects::Commands;
use crate::host_update;
use crate::host_work::HostWork;
use crate::isolation::Responder;
use crate::sessions::Sessions;
use crate::store::{Key, Objects};
use crate::vmm::{Instances, Launcher};

/// The node, as the agent has it.
pub struct Node {
    /// Configuration.
    pub config: Config,
    /// Name of the node.
    pub name: String,
    /// Specs and status.
    pub objects: Arc<dyn Objects>,
    /// Records of VMMs.
    pub instances: Instances,
    /// Records of guests.
    pub records: Records,
    /// Starts VMMs.
    pub launcher: Launcher,
    /// Records of operations.
    pub journal: Directory,
    /// Records of host updates.
    pub updates: host_update::journal::Directory,
    /// Saved sessions.
    pub sessions: Sessions,
    /// What reboots of the host ask of everything else.
    pub work: HostWork,
    /// Commands of updates.
    pub commands: Commands,
    me: Weak<Node>,
    links: Mutex<HashMap<PathBuf, Arc<Link>>>,
    responders: Mutex<HashMap<(String, u64), Vec<Responder>>>,
    operations: Mutex<HashMap<Key, InFlight>>,
    turns: Mutex<HashMap<Key, Arc<Mutex<()>>>>,
    stopping: AtomicBool,
}

/// An operation that a driver runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InFlight {
    /// Name of the SeamlessReboot.
    pub reboot: Key,
    /// Its UID.
    pub uid: String,
    /// How far it is.
    pub phase: Phase,
}

/// Why the agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A directory could not be made.
    #[error(transparent)]
    File(#[from] DurableError),
    /// The journal could not be opened.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl Node {
    /// Opens the state of the node of this name, on a host in a boot.
    pub fn open(
        name: String,
        config: Config,
        objects: Arc<dyn Objects>,
        identity: HostIdentity,
    ) -> Result<Arc<Node>, NodeError> {
        for directory in [&config.state_dir, &config.run_dir] {
            durable::make_dir(directory)?;
        }
        let journal = Directory::open(config.state_dir.join("operations"))?;
        let updates = host_update::journal::Directory::open(config.state_dir.join("updates"))?;
        let sessions = Sessions::open(&config, identity, objects.clone());
        Ok(Arc::new_cyclic(|me| Node {
            name,
            instances: Instances::open(&config.state_dir),
            records: Records::open(&config.state_dir),
            launcher: Launcher::new(&config.vmm, config.supervisor),
            journal,
            updates,
            sessions,
            work: HostWork::default(),
            commands: Commands::default(),
            objects,
            me: me.clone(),
            links: Mutex::default(),
            responders: Mutex::default(),
            operations: Mutex::default(),
            turns: Mutex::default(),
            stopping: AtomicBool::new(false),
            config,
        }))
    }

    /// The link to the guest agent behind a VMM's vsock socket; opened at the first call.
    pub fn link(&self, socket: &Path) -> std::io::Result<Arc<Link>> {
        let mut links = lock(&self.links);
        if let Some(link) = links.get(socket) {
            return Ok(link.clone());
        }
        let me = self.me.clone();
        let link = Arc::new(Link::open(socket, move || {
            if let Some(node) = me.upgrade() {
                node.objects.wake();
            }
        })?);
        links.insert(socket.to_owned(), link.clone());
        Ok(link)
    }

    /// Closes the link to a VMM that is gone.
    pub fn unlink(&self, socket: &Path) {
        lock(&self.links).remove(socket);
    }

    /// Keeps the responders of an isolated clone; those of before end.
    pub fn set_responders(&self, guest_uid: &str, incarnation: u64, responders: Vec<Responder>) {
        let key = (guest_uid.to_owned(), incarnation);
        let before = lock(&self.responders).insert(key, responders);
        drop(before);
    }

    /// Whether the responders of an isolated clone run.
    pub fn has_responders(&self, guest_uid: &str, incarnation: u64) -> bool {
        lock(&self.responders).contains_key(&(guest_uid.to_owned(), incarnation))
    }

    /// Ends the responders of a clone.
    pub fn drop_responders(&self, guest_uid: &str, incarnation: u64) {
        let gone = lock(&self.responders).remove(&(guest_uid.to_owned(), incarnation));
        drop(gone);
    }

    /// The operation on a guest that a driver runs.
    pub fn in_flight(&self, guest: &Key) -> Option<InFlight> {
        lock(&self.operations).get(guest).cloned()
    }

    /// Whose turn it is with a guest: held by the guest's worker for a pass, and to begin an operation, so
    /// that no pass looks at a guest while an operation begins on it.
    pub fn turn(&self, guest: &Key) -> Arc<Mutex<()>> {
        lock(&self.turns).entry(guest.clone()).or_default().clone()
    }

    /// Begins an operation on a guest, unless there is one: which is returned then. Waits for the end of
    /// the guest's current pass.
    pub fn begin(&self, guest: &Key, operation: InFlight) -> Option<InFlight> {
        let turn = self.turn(guest);
        let _turn = lock(&turn);
        let mut operations = lock(&self.operations);
        if let Some(there) = operations.get(guest) {
            return Some(there.clone());
        }
        operations.insert(guest.clone(), operation);
        None
    }

    /// The operations that drivers run, with their guests.
    pub fn all_in_flight(&self) -> Vec<(Key, InFlight)> {
        lock(&self.operations)
            .iter()
            .map(|(guest, operation)| (guest.clone(), operation.clone()))
            .collect()
    }

    /// Whether a driver runs, or a record waits for one, for the SeamlessReboot or NodeUpdate of a UID.
    pub fn is_driven(&self, uid: &str) -> bool {
        let in_flight = lock(&self.operations)
            .values()
            .any(|operation| operation.uid == uid);
        in_flight
            || self.journal.has(uid)
            || self.updates.has(uid)
            || self.work.updates().iter().any(|update| update.uid == uid)
    }

    /// Notes how far the operation on a guest is.
    pub fn note_phase(&self, guest: &Key, phase: Phase) {
        if let Some(there) = lock(&self.operations).get_mut(guest) {
            there.phase = phase;
        }
    }

    /// The operation on a guest has ended.
    pub fn end(&self, guest: &Key) {
        lock(&self.operations).remove(guest);
        self.objects.wake();
    }

    /// Whether any driver runs.
    pub fn is_busy(&self) -> bool {
        !lock(&self.operations).is_empty()
    }

    /// Asks all threads to end.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.work.wake();
        self.objects.wake();
    }

    /// Whether the agent is being stopped.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
