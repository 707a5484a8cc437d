//! The threads that fill guest RAM, and what they share.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use understudy_checkpoint::{CHUNK, ChunkBuffer};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::plan::{self, BLOCK};
use super::userfault::Userfault;
use super::{ChunkSource, RestoreEvent};

/// Chunks that are read ahead by one request: a fault waits at most for what this takes.
const AHEAD: u64 = 16;

/// In the checkpoint alone.
const PENDING: u8 = 0;
/// A thread is reading it; it wakes who waits for it.
const BUSY: u8 = 1;
/// In guest RAM.
const THERE: u8 = 2;
/// It cannot be had.
const DAMAGED: u8 = 3;
/// Zero in the checkpoint: served on demand, and by the kernel once the registration ends.
const ZERO: u8 = 4;

/// A mapping of guest RAM.
#[derive(Clone, Copy)]
pub(super) struct Mapped {
    /// Where it is in this process.
    pub address: u64,
    /// Number of its first chunk.
    pub first: u64,
    /// Its length in chunks.
    pub chunks: u64,
}

/// Why who reads ahead stands back.
#[derive(Clone, Copy)]
struct Pace {
    /// The guest does not run yet: nobody is to wait for a disk that is busy with what may come later.
    held: bool,
    /// A fault waits to be served.
    urgent: bool,
}

pub(super) struct Shared {
    userfault: Arc<Userfault>,
    source: Arc<dyn ChunkSource>,
    mapped: Vec<Mapped>,
    /// What is registered: (address, length).
    registered: Vec<(u64, u64)>,
    chunks: Vec<AtomicU8>,
    /// Chunks that are pending, busy or damaged.
    pub pending: AtomicU64,
    /// The next chunk to read ahead.
    next: AtomicU64,
    /// Whether who reads ahead stands back.
    pace: Mutex<Pace>,
    calm: Condvar,
    /// The threads shall end.
    stopping: AtomicBool,
    /// All is there, and the registration is being ended.
    ending: AtomicBool,
    /// Nothing is registered any more.
    over: AtomicBool,
    /// Wakes the thread that serves faults.
    wake: EventFd,
    error: Mutex<Option<String>>,
    events: Box<dyn Fn(RestoreEvent) + Send + Sync>,
}

impl Shared {
    pub fn new(
        userfault: Userfault,
        source: Arc<dyn ChunkSource>,
        mapped: Vec<Mapped>,
        events: Box<dyn Fn(RestoreEvent) + Send + Sync>,
    ) -> io::Result<Shared> {
        let states: Vec<u8> = (0..source.chunks())
            .map(|chunk| if source.is_zero(chunk) { ZERO } else { PENDING })
            .collect();
        let pending = states.iter().filter(|state| **state == PENDING).count() as u64;
        let registered = mapped
            .iter()
            .flat_map(|range| {
                let is_zero = |chunk: u64| states.get(chunk as usize) == Some(&ZERO);
                plan::ranges(range.first, range.chunks, is_zero)
                    .into_iter()
                    .map(|(first, count)| (range.address_of(first), count * CHUNK as u64))
            })
            .collect();
        Ok(Shared {
            userfault: Arc::new(userfault),
            source,
            mapped,
            registered,
            chunks: states.into_iter().map(AtomicU8::new).collect(),
            pending: AtomicU64::new(pending),
            next: AtomicU64::new(0),
            pace: Mutex::new(Pace {
                held: true,
                urgent: false,
            }),
            calm: Condvar::new(),
            stopping: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            over: AtomicBool::new(false),
            wake: EventFd::new(EFD_NONBLOCK)?,
            error: Mutex::new(None),
            events,
        })
    }

    /// Registers all; on failure nothing is registered.
    pub fn register(&self) -> io::Result<()> {
        for (done, (address, length)) in self.registered.iter().enumerate() {
            if let Err(error) = self.userfault.register(*address, *length) {
                for (address, length) in &self.registered[..done] {
                    // The descriptor is closed next, which ends what this could not.
                    let _ = self.userfault.unregister(*address, *length);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn unregister(&self) -> io::Result<()> {
        self.registered
            .iter()
            .try_for_each(|(address, length)| self.userfault.unregister(*address, *length))
    }

    pub fn error(&self) -> Option<String> {
        lock(&self.error).clone()
    }

    /// Lets the threads end.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.set_urgent(false);
        self.wake_server();
    }

    fn wake_server(&self) {
        // A counter that is full has woken it already.
        let _ = self.wake.write(1);
    }

    /// Ends all registrations although memory is missing. The threads have ended.
    pub fn discard(&self) -> io::Result<()> {
        if !self.over.load(Ordering::Acquire) {
            self.unregister()?;
            self.over.store(true, Ordering::Release);
            self.pending.store(0, Ordering::Release);
        }
        Ok(())
    }

    /// Keeps the descriptor open until the process ends, where memory is missing: closing it would turn what
    /// is missing into zeroes.
    pub fn keep_missing_memory_missing(&self) {
        if !self.over.load(Ordering::Acquire) {
            std::mem::forget(self.userfault.clone());
        }
    }

    /// Serves faults until all memory is there.
    pub fn serve_faults(&self) {
        let mut buffer = ChunkBuffer::new(1);
        loop {
            if let Err(error) = self.wait_for_fault() {
                self.fail(format!("waiting for faults of guest memory: {error}"));
                return;
            }
            if self.stopping.load(Ordering::Acquire) || self.over.load(Ordering::Acquire) {
                return;
            }
            loop {
                match self.userfault.faults() {
                    Ok(faults) if faults.is_empty() => break,
                    Ok(faults) => {
                        self.set_urgent(true);
                        faults
                            .into_iter()
                            .for_each(|address| self.serve(address, &mut buffer));
                    }
                    Err(error) => {
                        self.fail(format!("reading faults of guest memory: {error}"));
                        return;
                    }
                }
            }
            self.set_urgent(false);
        }
    }

    fn wait_for_fault(&self) -> io::Result<()> {
        let entry = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut entries = [entry(self.userfault.as_raw_fd()), entry(self.wake.as_raw_fd())];
        // SAFETY: the array is as long as is said; both descriptors live as long as `self`.
        let result = unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, -1) };
        if result < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        Ok(())
    }

    fn serve(&self, address: u64, buffer: &mut ChunkBuffer) {
        let Some((chunk, start)) = self.find(address) else {
            tracing::error!(address, "a fault outside of guest memory");
            return;
        };
        match self.chunks[chunk as usize].load(Ordering::Acquire) {
            ZERO => {
                let result = self.userfault.zero(start, CHUNK);
                self.check_filled(chunk, result);
            }
            // It came between the fault and now. Who waits was woken by that, unless it began to wait in the
            // same instant.
            THERE => {
                let result = self.userfault.wake(start, CHUNK as u64);
                self.check_filled(chunk, result);
            }
            PENDING if self.claim(chunk) => self.fill_one(chunk, start, buffer),
            // Somebody reads it, and wakes who waits; or it is damaged, and they wait for good.
            _ => {}
        }
    }

    /// Reads ahead until all was begun.
    pub fn read_ahead(&self) {
        let mut buffer = ChunkBuffer::new(AHEAD as usize);
        while self.wait_for_calm() {
            if self.pending.load(Ordering::Acquire) == 0 {
                self.complete();
            }
            let first = self.next.fetch_add(AHEAD, Ordering::Relaxed);
            if first >= self.chunks.len() as u64 {
                return;
            }
            self.fill_ahead(first, &mut buffer);
        }
    }

    /// Fills what is pending of the chunks from `first` on, in runs as long as can be.
    fn fill_ahead(&self, first: u64, buffer: &mut ChunkBuffer) {
        let end = (first + AHEAD).min(self.chunks.len() as u64);
        let mut chunk = first;
        while chunk < end {
            let Some(range) = self.range_of(chunk) else { return };
            let limit = end.min(range.first + range.chunks);
            let run = (chunk..limit).take_while(|chunk| self.claim(*chunk)).count();
            if run == 0 {
                chunk += 1;
                continue;
            }
            let start = range.address_of(chunk);
            match self.source.read(chunk, run, buffer) {
                Ok(bytes) => {
                    let result = self.userfault.copy(start, bytes);
                    self.filled(chunk, run, result);
                }
                // One of them is bad; the others are not.
                Err(_) => {
                    for chunk in chunk..chunk + run as u64 {
                        self.fill_one(chunk, range.address_of(chunk), buffer);
                    }
                }
            }
            chunk += run as u64;
        }
    }

    /// Fills a chunk that this thread has claimed.
    fn fill_one(&self, chunk: u64, start: u64, buffer: &mut ChunkBuffer) {
        match self.source.read(chunk, 1, buffer) {
            Ok(bytes) => {
                let result = self.userfault.copy(start, bytes);
                self.filled(chunk, 1, result);
            }
            Err(error) => {
                self.chunks[chunk as usize].store(DAMAGED, Ordering::Release);
                self.fail(error.to_string());
            }
        }
    }

    /// Notes that claimed chunks are in guest RAM, or could not be put there.
    fn filled(&self, first: u64, count: usize, result: io::Result<()>) {
        let state = if result.is_ok() { THERE } else { DAMAGED };
        for chunk in first..first + count as u64 {
            self.chunks[chunk as usize].store(state, Ordering::Release);
        }
        if result.is_ok() {
            if self.pending.fetch_sub(count as u64, Ordering::AcqRel) == count as u64 {
                self.complete();
            }
        } else {
            self.check_filled(first, result);
        }
    }

    fn check_filled(&self, chunk: u64, result: io::Result<()>) {
        if let Err(error) = result
            // The registration ends meanwhile, and the kernel serves the fault.
            && !self.ending.load(Ordering::Acquire)
        {
            self.fail(format!(
                "giving chunk {chunk} of the checkpoint to the guest: {error}"
            ));
        }
    }

    /// All is there: ends the registration and then asks for huge pages.
    fn complete(&self) {
        if self.ending.swap(true, Ordering::AcqRel) {
            return;
        }
        match self.unregister() {
            Ok(()) => {
                self.over.store(true, Ordering::Release);
                self.wake_server();
            }
            // Zero memory of what is still registered is served as before.
            Err(error) => tracing::warn!(%error, "ending the registration of guest memory"),
        }
        (self.events)(RestoreEvent::Complete);
        self.collapse();
    }

    /// Asks for huge pages where all of one came from the checkpoint (elsewhere zeroes would begin to cost
    /// memory). Without them a guest takes an exit for each 4 KiB page.
    fn collapse(&self) {
        for range in &self.mapped {
            for first in (0..range.chunks / BLOCK).map(|block| range.first + block * BLOCK) {
                if self.stopping.load(Ordering::Acquire) {
                    return;
                }
                let is_there = |chunk: u64| self.chunks[chunk as usize].load(Ordering::Acquire) == THERE;
                if !(first..first + BLOCK).all(is_there) {
                    continue;
                }
                // SAFETY: the request changes how memory is mapped, never what it holds.
                let result = unsafe {
                    libc::madvise(
                        range.address_of(first) as *mut libc::c_void,
                        BLOCK as usize * CHUNK,
                        MADV_COLLAPSE,
                    )
                };
                // Linux before 6.1 does not know the request; a host without a free huge page has none to give.
                if result < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
                    return;
                }
            }
        }
    }

    fn fail(&self, message: String) {
        tracing::error!(%message, "CheckpointDamaged");
        lock(&self.error).get_or_insert_with(|| message.clone());
        (self.events)(RestoreEvent::Damaged { message });
    }

    /// Takes a pending chunk, so that nobody else reads it.
    fn claim(&self, chunk: u64) -> bool {
        self.chunks[chunk as usize]
            .compare_exchange(PENDING, BUSY, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Lets threads read ahead.
    pub fn release(&self) {
        lock(&self.pace).held = false;
        self.calm.notify_all();
    }

    fn set_urgent(&self, urgent: bool) {
        lock(&self.pace).urgent = urgent;
        if !urgent {
            self.calm.notify_all();
        }
    }

    /// Waits until the guest runs, and while a fault is served; `false`: the thread shall end.
    fn wait_for_calm(&self) -> bool {
        let mut pace = lock(&self.pace);
        while (pace.held || pace.urgent) && !self.stopping.load(Ordering::Acquire) {
            pace = self.calm.wait(pace).unwrap_or_else(PoisonError::into_inner);
        }
        !self.stopping.load(Ordering::Acquire)
    }

    fn range_of(&self, chunk: u64) -> Option<&Mapped> {
        self.mapped
            .iter()
            .find(|range| (range.first..range.first + range.chunks).contains(&chunk))
    }

    /// The chunk that holds an address, and where it begins.
    fn find(&self, address: u64) -> Option<(u64, u64)> {
        self.mapped.iter().find_map(|range| {
            let offset = address.checked_sub(range.address)? / CHUNK as u64;
            let chunk = range.first + offset;
            (offset < range.chunks).then(|| (chunk, range.address_of(chunk)))
        })
    }
}

/// `madvise(2)`: make huge pages of this range now (Linux 6.1).
const MADV_COLLAPSE: libc::c_int = 25;

impl Mapped {
    fn address_of(&self, chunk: u64) -> u64 {
        self.address + (chunk - self.first) * CHUNK as u64
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is one value, whole at any time.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
