//! One disk of a guest: its chain, shared by the block device, the control API and merging.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use understudy_vmm_control::api::DiskInfo;
use understudy_vmm_control::config::{self, Role};
use understudy_vmm_control::owner::{Owner, OwnerError};
use uuid::Uuid;

use super::chain::{Chain, FlushPlan};
use super::error::DiskError;
use super::layer::{self, Layer};
use super::map;
use super::merge::Merge;
use super::source::Source;
use super::split::Splits;
use super::storage::{Access, Directory, HostDirectory, Lock};
use crate::virtio::buffers::Buffers;

/// Most layers above a source; more would be a mistake.
const MAX_LAYERS: usize = 16;

/// A disk as one VMM has it open. Shared by the block device, the control API and merging.
pub struct Disk {
    pub(super) name: String,
    size: u64,
    pub(super) read_only: bool,
    full: AtomicBool,
    /// It is at the write session of a session that is being resumed: see [`Disk::open_as_left`].
    as_left: AtomicBool,
    pub(super) directory: Box<dyn Directory>,
    chain: Mutex<Chain>,
    /// One flush at a time: each page of the map has one write in flight at most, and whoever flushes waits
    /// for what another one has begun.
    flushing: Mutex<()>,
    /// Requests of the guest that wait for the chain; merging lets them go first.
    waiting: AtomicUsize,
    /// Held by whoever splits or merges.
    control: Mutex<Control>,
    pub(super) merge: Merge,
}

/// State of the control API's operations on a disk.
#[derive(Default)]
pub(super) struct Control {
    pub(super) splits: Splits,
}

impl Disk {
    /// Opens the disk of `config` with the chain whose top it names; where it names none, with the one that
    /// `owner.json` beside the source names. A writable disk is locked against other VMMs, and a write
    /// session begins.
    pub fn open(config: &config::Disk, role: Role) -> Result<Arc<Disk>, DiskError> {
        Self::open_in(config, role, Box::new(HostDirectory::new(&config.source)))
    }

    /// Opens the disk of a session that is resumed: the chain must be the one that it left, at the write
    /// session that it left, or the disk was written since. No write session begins, so that a resume that is
    /// given up leaves it as it is, and one that is not need not wait for it: [`Disk::take_up`], or the first
    /// write, begins it.
    pub fn open_as_left(
        config: &config::Disk,
        role: Role,
        layers: &[Uuid],
        session: u64,
    ) -> Result<Arc<Disk>, DiskError> {
        let directory = Box::new(HostDirectory::new(&config.source));
        let disk = Self::open_without_session(config, role, directory)?;
        let found = disk.info();
        if found.layers != layers || found.session != session {
            let chain = |layers: &[Uuid]| match layers {
                [] => "the file alone".to_owned(),
                [top, rest @ ..] => format!("layer {top} with {} below it", rest.len()),
            };
            return Err(DiskError::StaleRoot {
                path: disk.directory.source_path(),
                reason: format!(
                    "it is {} at write session {}, the saved session left {} at {session}: it was written since",
                    chain(&found.layers),
                    found.session,
                    chain(layers)
                ),
                advice: "boot the guest from its disk, which is newer; the saved session fits to it no more",
            });
        }
        disk.as_left.store(!disk.read_only, Ordering::Release);
        Ok(disk)
    }

    /// Begins the write session of a disk that is as the resumed session left it, durably, unless a write has
    /// done so.
    pub fn take_up(&self) -> Result<(), DiskError> {
        match self.as_left.load(Ordering::Acquire) {
            true => self.take_up_chain(&mut self.chain()),
            false => Ok(()),
        }
    }

    /// The same for who has the chain: before anything of it changes.
    fn take_up_chain(&self, chain: &mut Chain) -> Result<(), DiskError> {
        if self.as_left.load(Ordering::Acquire) {
            self.begin_session_of(chain)?;
        }
        Ok(())
    }

    /// Begins a write session, durably: whoever knows the disk at the one before can tell that it may have
    /// been written since.
    pub fn begin_session(&self) -> Result<(), DiskError> {
        self.begin_session_of(&mut self.chain())
    }

    fn begin_session_of(&self, chain: &mut Chain) -> Result<(), DiskError> {
        let directory = self.directory.as_ref();
        match chain.layers.first_mut() {
            Some(top) => top.begin_session(directory)?,
            None => {
                let (merging, layered) = (chain.source.record.merging, chain.source.record.layered);
                chain.source.begin_session(directory, merging, layered)?;
            }
        }
        self.as_left.store(false, Ordering::Release);
        Ok(())
    }

    pub(super) fn open_in(
        config: &config::Disk,
        role: Role,
        directory: Box<dyn Directory>,
    ) -> Result<Arc<Disk>, DiskError> {
        let disk = Self::open_without_session(config, role, directory)?;
        if !disk.read_only {
            let mut chain = disk.chain();
            let chain = &mut *chain;
            let directory = disk.directory.as_ref();
            if role == Role::Active {
                remove_merged(directory, &mut chain.source, &chain.layers);
            }
            match chain.layers.first_mut() {
                Some(top) => top.begin_session(directory)?,
                None => chain.source.begin_session(directory, None, false)?,
            }
        }
        Ok(disk)
    }

    fn open_without_session(
        config: &config::Disk,
        role: Role,
        directory: Box<dyn Directory>,
    ) -> Result<Arc<Disk>, DiskError> {
        if role == Role::Clone && !config.read_only && config.layer.is_none() {
            return Err(DiskError::Conflict {
                disk: config.name.clone(),
                reason:
                    "a clone writes to a layer of its own; set `layer` to the one that prepare-split made"
                        .into(),
            });
        }
        let owner = read_owner(directory.as_ref())?;
        let top = match config.layer {
            Some(layer) => Some(layer),
            None => owner.as_ref().and_then(|owner| owner.layer),
        };
        let how = Opening {
            owned: owner.is_some(),
            read_only: config.read_only,
        };
        let chain = open_chain(directory.as_ref(), top, &how)?;
        Ok(Arc::new(Disk {
            name: config.name.clone(),
            size: chain.size,
            read_only: config.read_only,
            full: AtomicBool::new(false),
            as_left: AtomicBool::new(false),
            directory,
            chain: Mutex::new(chain),
            flushing: Mutex::new(()),
            waiting: AtomicUsize::new(0),
            control: Mutex::default(),
            merge: Merge::default(),
        }))
    }

    /// Name within the guest.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether a write waits because the host's file system is full.
    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    pub(crate) fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
    }

    /// The disk for the control API.
    pub fn info(&self) -> DiskInfo {
        let chain = self.chain();
        DiskInfo {
            name: self.name.clone(),
            size: self.size,
            layers: chain.layers.iter().map(Layer::uuid).collect(),
            session: chain
                .layers
                .first()
                .map_or(chain.source.record.session, |top| top.header.session),
            merge: self.merge.info(chain.bytes_in_layers()),
            full: self.is_full(),
        }
    }

    /// The chain, for those who are not the guest.
    pub(super) fn chain(&self) -> MutexGuard<'_, Chain> {
        // No operation leaves the chain half changed, so a panic elsewhere does not spoil it.
        self.chain.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The chain for a request of the guest, which others let go first.
    fn guest_chain(&self) -> MutexGuard<'_, Chain> {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let chain = self.chain();
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        chain
    }

    /// The same for a request that changes the disk.
    fn chain_to_write(&self) -> io::Result<MutexGuard<'_, Chain>> {
        let mut chain = self.guest_chain();
        match self.take_up_chain(&mut chain) {
            Ok(()) => Ok(chain),
            // Where there is no room on the host it waits, as the write itself would.
            Err(DiskError::Io { source, .. }) => Err(source),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Whether a request of the guest waits for the chain.
    pub(super) fn guest_waits(&self) -> bool {
        self.waiting.load(Ordering::Acquire) > 0
    }

    pub(super) fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn conflict(&self, reason: impl Into<String>) -> DiskError {
        DiskError::Conflict {
            disk: self.name.clone(),
            reason: reason.into(),
        }
    }

    /// Refuses what lies beyond the end.
    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{len} bytes at {offset} are beyond the end of disk {} ({} bytes)",
                    self.name, self.size
                ),
            )),
        }
    }

    fn check_write(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.read_only {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("disk {} is read-only", self.name),
            ));
        }
        self.check(offset, len)
    }

    /// Fills `buffers` with what the guest sees at `offset`.
    pub(crate) fn read(&self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        self.check(offset, buffers.len())?;
        self.guest_chain().read(buffers, offset)
    }

    /// Fills `buffer` with what the guest sees at `offset`.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(&Buffers::from_slice(buffer), offset)
    }

    /// Writes `buffers` at `offset`; durable after the next [`Disk::flush`].
    pub(crate) fn write(&self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        self.check_write(offset, buffers.len())?;
        self.chain_to_write()?.write(buffers, offset)
    }

    /// Makes the range read as zeros and gives its space back; durable after the next [`Disk::flush`].
    pub(crate) fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_write(offset, len)?;
        self.chain_to_write()?.zero(offset, len)
    }

    /// Makes completed writes durable. Other requests go on meanwhile.
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        let _one_at_a_time = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = self.chain().flush_plan();
        let result = carry_out(&plan);
        self.chain().flushed(&plan, result.is_ok());
        result
    }

    /// As [`Disk::flush`], with all requests waiting, and then runs `then` before they go on.
    pub(super) fn flush_and(&self, then: impl FnOnce(&mut Chain)) -> io::Result<()> {
        let _one_at_a_time = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut chain = self.chain();
        let plan = chain.flush_plan();
        let result = carry_out(&plan);
        chain.flushed(&plan, result.is_ok());
        result.map(|()| then(&mut chain))
    }
}

/// Syncs and writes what a flush has to, in its order.
fn carry_out(plan: &FlushPlan) -> io::Result<()> {
    plan.data.iter().try_for_each(|data| data.sync())?;
    match &plan.map {
        Some((storage, uuid, pages)) => map::write_pages(storage.as_ref(), *uuid, pages),
        None => Ok(()),
    }
}

/// Reads `owner.json`.
pub(super) fn read_owner(directory: &dyn Directory) -> Result<Option<Owner>, DiskError> {
    let path = directory.path("owner.json");
    let text = directory
        .read("owner.json")
        .map_err(DiskError::io("reading", path.clone()))?;
    text.map(|text| Owner::parse(&path, &text))
        .transpose()
        .map_err(|error| match error {
            OwnerError::Io { action, path, source } => DiskError::Io { action, path, source },
            OwnerError::Damaged { path, reason } => DiskError::Damaged { path, reason },
        })
}

/// How a chain is opened.
struct Opening {
    /// There is an `owner.json`.
    owned: bool,
    read_only: bool,
}

/// Opens and locks the chain from its top down, and checks that it belongs together.
fn open_chain(directory: &dyn Directory, top: Option<Uuid>, how: &Opening) -> Result<Chain, DiskError> {
    let (access, top_lock) = match how.read_only {
        true => (Access::Read, Lock::Shared),
        false => (Access::Write, Lock::Exclusive),
    };
    let mut layers: Vec<Layer> = Vec::new();
    let mut next = top;
    while let Some(uuid) = next {
        let above = layers.last();
        let layer = Layer::open(directory, uuid, access).map_err(|error| missing(error, directory, uuid))?;
        if layers.len() >= MAX_LAYERS || layers.iter().any(|layer| layer.uuid() == uuid) {
            return Err(stale(
                directory,
                uuid,
                "the chain of its layers has no end".into(),
            ));
        }
        match above {
            None => layer.lock(directory, top_lock)?,
            Some(above) => {
                layer.lock(directory, Lock::Shared)?;
                if layer.header.session != above.header.parent_session
                    || layer.header.size != above.header.size
                {
                    let reason = format!(
                        "layer {} was made upon session {} of it with {} bytes, and it is at session {} with {}",
                        above.uuid(),
                        above.header.parent_session,
                        above.header.size,
                        layer.header.session,
                        layer.header.size
                    );
                    return Err(stale(directory, uuid, reason));
                }
            }
        }
        next = layer.header.parent;
        layers.push(layer);
    }
    let source = Source::open(directory, access)?;
    let lock = if layers.is_empty() { top_lock } else { Lock::Shared };
    source.lock(directory, lock)?;
    check_source(directory, &source, layers.last(), how.owned)?;
    Ok(Chain::new(layers, source))
}

/// Whether the source is what the chain above it was made upon.
fn check_source(
    directory: &dyn Directory,
    source: &Source,
    lowest: Option<&Layer>,
    owned: bool,
) -> Result<(), DiskError> {
    let record = &source.record;
    let path = directory.source_path();
    match lowest {
        Some(layer) => {
            if layer.header.size != source.size {
                return Err(DiskError::StaleRoot {
                    path,
                    reason: format!(
                        "it has {} bytes, the layers above it {}",
                        source.size, layer.header.size
                    ),
                    advice: "give it back its size, and change it only when the layers are merged",
                });
            }
            if record.merging == Some(layer.uuid()) || record.session == layer.header.parent_session {
                return Ok(());
            }
            Err(DiskError::StaleRoot {
                path,
                reason: format!(
                    "layer {} was made upon session {} of it, and it is at session {}: it was written since",
                    layer.uuid(),
                    layer.header.parent_session,
                    record.session
                ),
                advice: "use the layer that owner.json names, or remove this one, which is of no use any more",
            })
        }
        None => {
            if let Some(merging) = record.merging
                && layer::holds_data(directory, merging)?
            {
                return Err(DiskError::StaleRoot {
                    path,
                    reason: format!("layer {merging} is partly merged into it"),
                    advice: "the guest's disk is that layer: restore owner.json, which names it",
                });
            }
            if record.layered && !owned {
                return Err(DiskError::StaleRoot {
                    path,
                    reason: "layers were made above it and there is no owner.json to tell which is current"
                        .into(),
                    advice: "restore owner.json in its state directory from a backup",
                });
            }
            Ok(())
        }
    }
}

fn stale(directory: &dyn Directory, uuid: Uuid, reason: String) -> DiskError {
    DiskError::StaleRoot {
        path: directory.path(&format!("{uuid}.layer")),
        reason,
        advice: "restore the state directory as a whole, or name the layer that owner.json names",
    }
}

/// A layer that is not there is a chain that is torn.
fn missing(error: DiskError, directory: &dyn Directory, uuid: Uuid) -> DiskError {
    match error {
        DiskError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => stale(
            directory,
            uuid,
            "it does not exist, and holds part of the disk".into(),
        ),
        error => error,
    }
}

/// Removes what is left of a layer whose merge was complete but for its removal.
fn remove_merged(directory: &dyn Directory, source: &mut Source, layers: &[Layer]) {
    let Some(merged) = source.record.merging else {
        return;
    };
    if layers.iter().any(|layer| layer.uuid() == merged) {
        return;
    }
    let mut record = source.record.clone();
    record.merging = None;
    record.layered = !layers.is_empty();
    let removed = layer::remove(directory, merged).and_then(|()| source.store(directory, record));
    if let Err(error) = removed {
        tracing::warn!(%error, "cannot remove a layer that was merged");
    }
}
