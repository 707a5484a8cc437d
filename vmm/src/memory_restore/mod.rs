//! Resuming lazily: guest RAM is read from the checkpoint while the guest runs.
//!
//! RAM that the checkpoint has data for is registered with userfaultfd before anything touches it. One thread
//! serves faults, whoever makes them (a vCPU in KVM, a device, a system call on guest memory), by a chunk of
//! 64 KiB at a time; others walk through the rest in order and stand back while a fault is served. When all
//! is there, the registration ends and the guest's memory is like any other.
//!
//! What must be true:
//!
//! - *Pages that are there stay.* A page that is written before its chunk is copied would keep what was written:
//!   [`LazyMemory::start`] therefore begins with cleared RAM, and everything that is put into RAM afterwards
//!   faults first.
//! - *Memory that is given back must not come again.* After `MADV_DONTNEED` on registered memory the next touch
//!   would be served from the checkpoint. Before [`GuestRam::clear`](crate::machine::memory::GuestRam::clear)
//!   a reset calls [`LazyMemory::discard`]; nothing else gives guest memory back.
//! - *Nobody may read zeroes for memory that was not had.* A chunk that is damaged is never filled in: who waits
//!   for it goes on waiting. As closing the descriptor would wake them, it is left open until the process ends
//!   when memory is missing.
//! - A thread that waits cannot always be interrupted: a vCPU's `KVM_RUN` can from Linux 6.2 on, before that by
//!   the end of the process only. Who pauses a guest with damaged memory does not wait for all of its vCPUs.
//! - The process's own heap and stacks are never registered, so that the threads here never wait for themselves.
//! - Huge pages: the kernel makes none of registered memory (it asks for each missing page first, and
//!   khugepaged passes by), so that they are asked for at the end.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use understudy_checkpoint::{CHUNK, ChunkBuffer, ChunkError, Reader};

use self::shared::{Mapped, Shared};
pub use self::userfault::{Userfault, UserfaultError};
use crate::machine::memory::{GuestRam, MemoryError};

#[cfg(test)]
mod memory_restore_test;
mod plan;
mod shared;
mod userfault;

/// Where chunks of memory come from: a checkpoint's reader.
pub trait ChunkSource: Send + Sync {
    /// Chunks of 64 KiB.
    fn chunks(&self) -> u64;
    /// Whether a chunk is all zero; known without reading.
    fn is_zero(&self, chunk: u64) -> bool;
    /// Reads and verifies `count` chunks from `first` on.
    fn read<'a>(&self, first: u64, count: usize, buffer: &'a mut ChunkBuffer)
    -> Result<&'a [u8], ChunkError>;
}

impl ChunkSource for Reader {
    fn chunks(&self) -> u64 {
        self.chunks()
    }

    fn is_zero(&self, chunk: u64) -> bool {
        self.is_zero(chunk)
    }

    fn read<'a>(
        &self,
        first: u64,
        count: usize,
        buffer: &'a mut ChunkBuffer,
    ) -> Result<&'a [u8], ChunkError> {
        self.read(first, count, buffer)
    }
}

/// What becomes of memory that is restored lazily.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RestoreEvent {
    /// All memory is there; the checkpoint is needed no more.
    Complete,
    /// A chunk cannot be had. The guest must be paused at once: who touches the chunk waits for good.
    Damaged {
        /// Why, for [`understudy_vmm_control::session::ResumeInfo::error`].
        message: String,
    },
}

/// Why lazy restore could not begin.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The checkpoint is of another size.
    #[error("the checkpoint holds {checkpoint} bytes of memory, the guest has {ram}")]
    Size {
        /// Bytes of memory in the checkpoint.
        checkpoint: u64,
        /// Bytes of guest RAM.
        ram: u64,
    },
    /// RAM could not be cleared.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The operating system refused.
    #[error("{action} guest RAM for lazy restore: {source}")]
    Os {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// Guest RAM that is being restored. See the module's text for what must be true.
///
/// Dropped before all is there, what is missing stays missing: threads that touch it wait until the process
/// ends.
pub struct LazyMemory {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl LazyMemory {
    /// Begins: clears `ram`, registers what the checkpoint has data for, and starts a thread that serves
    /// faults and `prefetchers` threads that read ahead once they may ([`LazyMemory::read_ahead`]). Nobody uses
    /// the memory before this returns.
    ///
    /// `events` is called from these threads, once for [`RestoreEvent::Complete`] and for each damaged chunk.
    /// It does not block, touches no guest memory, and neither discards nor drops the `LazyMemory`.
    ///
    /// # Errors
    /// When sizes differ or the kernel refuses. Then nothing is registered.
    pub fn start(
        userfault: Userfault,
        ram: &GuestRam,
        source: Arc<dyn ChunkSource>,
        prefetchers: usize,
        events: impl Fn(RestoreEvent) + Send + Sync + 'static,
    ) -> Result<LazyMemory, RestoreError> {
        let checkpoint = source.chunks() * CHUNK as u64;
        if checkpoint != ram.size() {
            return Err(RestoreError::Size {
                checkpoint,
                ram: ram.size(),
            });
        }
        let os = |action| move |source| RestoreError::Os { action, source };
        ram.clear()?;
        let mapped = ram.mapped().map(|(address, offset, length)| Mapped {
            address,
            first: offset / CHUNK as u64,
            chunks: length / CHUNK as u64,
        });
        let shared = Arc::new(
            Shared::new(userfault, source, mapped.collect(), Box::new(events)).map_err(os("preparing"))?,
        );
        shared.register().map_err(os("registering"))?;
        let lazy = LazyMemory {
            shared,
            threads: Mutex::new(Vec::new()),
        };
        let started = lazy.spawn("memory-faults", Shared::serve_faults).and_then(|()| {
            (0..prefetchers.max(1)).try_for_each(|_| lazy.spawn("memory-ahead", Shared::read_ahead))
        });
        if let Err(source) = started {
            // Nobody has used the memory: it is zero again, whatever was filled in.
            lazy.discard()?;
            ram.clear()?;
            return Err(os("starting a thread to fill")(source));
        }
        Ok(lazy)
    }

    /// Lets the threads read ahead: the guest runs.
    pub fn read_ahead(&self) {
        self.shared.release();
    }

    fn spawn(&self, name: &str, work: fn(&Shared)) -> io::Result<()> {
        let shared = self.shared.clone();
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || work(&shared))?;
        self.threads().push(thread);
        Ok(())
    }

    fn threads(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of memory that are in the checkpoint alone. At 0 the checkpoint is needed no more.
    pub fn pending_bytes(&self) -> u64 {
        self.shared.pending.load(Ordering::Acquire) * CHUNK as u64
    }

    /// Why memory could not be read: the first damage that was found.
    pub fn error(&self) -> Option<String> {
        self.shared.error()
    }

    /// Gives up what is not there yet, for a guest that is reset: missing memory reads as zeroes from now on.
    /// Before RAM is cleared, with all vCPUs and devices stopped.
    ///
    /// # Errors
    /// When the kernel refuses to end a registration; the memory must not be used then.
    pub fn discard(&self) -> Result<(), RestoreError> {
        self.stop();
        self.shared.discard().map_err(|source| RestoreError::Os {
            action: "taking back",
            source,
        })
    }

    /// Ends the threads, and waits for them.
    fn stop(&self) {
        self.shared.stop();
        for thread in self.threads().drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that restores memory panicked");
            }
        }
    }
}

impl Drop for LazyMemory {
    fn drop(&mut self) {
        self.stop();
        self.shared.keep_missing_memory_missing();
    }
}
