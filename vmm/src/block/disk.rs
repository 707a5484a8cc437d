//! One disk of a guest: reads, writes and flushes of the chain.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use understudy_vmm_control::api::DiskInfo;
use understudy_vmm_control::config::{self, Role};

use super::error::DiskError;
use super::source::Source;
use super::storage::{Access, Directory, HostDirectory, Lock};
use crate::virtio::buffers::Buffers;

/// A disk as one VMM has it open. Shared by the block device, the control API and merging.
pub struct Disk {
    name: String,
    size: u64,
    read_only: bool,
    full: AtomicBool,
    source: Mutex<Source>,
}

impl Disk {
    /// Opens the disk of `config`; a writable one is locked against other VMMs, and a write session
    /// begins.
    pub fn open(config: &config::Disk, _role: Role) -> Result<Arc<Disk>, DiskError> {
        Self::open_in(config, Box::new(HostDirectory::new(&config.source)))
    }

    fn open_in(config: &config::Disk, directory: Box<dyn Directory>) -> Result<Arc<Disk>, DiskError> {
        let directory = directory.as_ref();
        let (access, lock) = match config.read_only {
            true => (Access::Read, Lock::Shared),
            false => (Access::Write, Lock::Exclusive),
        };
        let mut source = Source::open(directory, access)?;
        source.lock(directory, lock)?;
        if !config.read_only {
            source.begin_session(directory, None, false)?;
        }
        Ok(Arc::new(Disk {
            name: config.name.clone(),
            size: source.size,
            read_only: config.read_only,
            full: AtomicBool::new(false),
            source: Mutex::new(source),
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
        DiskInfo {
            name: self.name.clone(),
            size: self.size,
            layers: Vec::new(),
            session: self.lock().record.session,
            merge: None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Source> {
        // No operation leaves the chain half changed, so a panic elsewhere does not spoil it.
        self.source.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.lock().storage.read(buffers, offset)
    }

    /// Fills `buffer` with what the guest sees at `offset` (a multiple of nothing in particular).
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(&Buffers::from_slice(buffer), offset)
    }

    /// Writes `buffers` at `offset`; durable after the next [`Disk::flush`].
    pub(crate) fn write(&self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        self.check_write(offset, buffers.len())?;
        self.lock().storage.write(buffers, offset)
    }

    /// Makes the range read as zeros and gives its space back; durable after the next [`Disk::flush`].
    pub(crate) fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_write(offset, len)?;
        self.lock().storage.zero(offset, len)
    }

    /// Makes completed writes durable.
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        let storage = self.lock().storage.clone();
        storage.sync()
    }

    /// Path of the source of a disk with this configuration, for messages.
    pub fn source_of(config: &config::Disk) -> &Path {
        &config.source
    }
}
