//! On the kernel's own userfaultfd, with guest RAM as the VMM has it.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use understudy_checkpoint::{
    CHUNK, ChunkBuffer, ChunkError, Description, Identity, Key, RamRange, Reader, Writer,
};
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{ChunkSource, LazyMemory, RestoreError, RestoreEvent, Userfault};
use crate::machine::memory::{GuestRam, ranges};

const MIB: u64 = 64;
const CHUNKS: u64 = MIB << 20 >> 16;
/// Long enough for anything that happens at all.
const DEADLINE: Duration = Duration::from_secs(30);
/// Long enough to see that something does not happen.
const A_WHILE: Duration = Duration::from_millis(100);

/// A checkpoint whose content follows from the number of a chunk.
struct Source {
    chunks: u64,
    zero: fn(u64) -> bool,
    damaged: BTreeSet<u64>,
    /// Reading ahead (more than a chunk at a time) waits until this is open.
    open: Mutex<bool>,
    opened: Condvar,
    reads: AtomicU64,
}

impl Source {
    fn new(chunks: u64, zero: fn(u64) -> bool) -> Source {
        Source {
            chunks,
            zero,
            damaged: BTreeSet::new(),
            open: Mutex::new(true),
            opened: Condvar::new(),
            reads: AtomicU64::new(0),
        }
    }

    fn set_open(&self, open: bool) {
        *self.open.lock().unwrap() = open;
        self.opened.notify_all();
    }

    fn byte(&self, chunk: u64, at: usize) -> u8 {
        match (self.zero)(chunk) {
            true => 0,
            false => (chunk as u8).wrapping_add((at / 512) as u8) | 1,
        }
    }

    fn content(&self, chunk: u64) -> Vec<u8> {
        (0..CHUNK).map(|at| self.byte(chunk, at)).collect()
    }
}

impl ChunkSource for Source {
    fn chunks(&self) -> u64 {
        self.chunks
    }

    fn is_zero(&self, chunk: u64) -> bool {
        (self.zero)(chunk)
    }

    fn read<'a>(
        &self,
        first: u64,
        count: usize,
        buffer: &'a mut ChunkBuffer,
    ) -> Result<&'a [u8], ChunkError> {
        let mut open = self.open.lock().unwrap();
        while count > 1 && !*open {
            open = self.opened.wait(open).unwrap();
        }
        drop(open);
        self.reads.fetch_add(1, Ordering::SeqCst);
        for chunk in first..first + count as u64 {
            if self.damaged.contains(&chunk) {
                let path = PathBuf::from("/checkpoint/memory");
                return Err(ChunkError::Damaged { chunk, path });
            }
            let start = (chunk - first) as usize * CHUNK;
            buffer[start..start + CHUNK].copy_from_slice(&self.content(chunk));
        }
        Ok(&buffer[..count * CHUNK])
    }
}

struct Restore {
    /// Before `lazy`: fields are dropped in this order.
    _opens: Opens,
    ram: Arc<GuestRam>,
    source: Arc<Source>,
    lazy: LazyMemory,
    events: Receiver<RestoreEvent>,
}

/// Lets a test that fails end: the end of a restore waits for who reads ahead.
struct Opens(Arc<Source>);

impl Drop for Opens {
    fn drop(&mut self) {
        self.0.set_open(true);
    }
}

fn restore(mib: u64, source: Source) -> Restore {
    let ram = Arc::new(GuestRam::new(mib).unwrap());
    let source = Arc::new(source);
    let (sender, events) = mpsc::channel();
    let userfault = Userfault::open().unwrap();
    let lazy = LazyMemory::start(userfault, &ram, source.clone(), 2, move |event| {
        let _ = sender.send(event);
    })
    .unwrap();
    lazy.read_ahead();
    Restore {
        _opens: Opens(source.clone()),
        ram,
        source,
        lazy,
        events,
    }
}

/// Guest-physical address of a chunk.
fn address(ram: &GuestRam, chunk: u64) -> GuestAddress {
    let offset = chunk * CHUNK as u64;
    let (start, from, _) = ranges(ram.size())
        .into_iter()
        .find(|(_, from, length)| (*from..from + length).contains(&offset))
        .unwrap();
    GuestAddress(start + offset - from)
}

fn read(ram: &GuestRam, chunk: u64) -> Vec<u8> {
    let mut bytes = vec![0; CHUNK];
    ram.memory.read_slice(&mut bytes, address(ram, chunk)).unwrap();
    bytes
}

fn scattered_zeroes(chunk: u64) -> bool {
    // Some chunks alone, and some whole huge pages.
    chunk % 5 == 2 || (chunk / 32) % 3 == 1
}

#[test]
fn memory_is_what_was_saved_whoever_touches_it_and_when() {
    let Restore {
        ram,
        source,
        lazy,
        events,
        ..
    } = restore(MIB, Source::new(CHUNKS, scattered_zeroes));
    thread::scope(|scope| {
        for seed in 1..4 {
            let (ram, source) = (&ram, &source);
            scope.spawn(move || {
                for step in 0..CHUNKS {
                    let chunk = (step * (2 * seed + 3) * 7 + seed) % CHUNKS;
                    assert!(read(ram, chunk) == source.content(chunk), "chunk {chunk}");
                }
            });
        }
    });
    assert_eq!(events.recv_timeout(DEADLINE), Ok(RestoreEvent::Complete));
    assert_eq!((lazy.pending_bytes(), lazy.error()), (0, None));
    drop(lazy);
    for chunk in 0..CHUNKS {
        assert!(read(&ram, chunk) == source.content(chunk), "chunk {chunk}");
    }
}

#[test]
fn a_fault_is_served_while_reading_ahead_is_held_up() {
    let source = Source::new(CHUNKS, |_| false);
    source.set_open(false);
    let restore = restore(MIB, source);
    let chunk = CHUNKS - 3;
    assert!(read(&restore.ram, chunk) == restore.source.content(chunk));
    // Who waits for a chunk is woken before it is counted as had.
    let begin = Instant::now();
    while restore.lazy.pending_bytes() != (CHUNKS - 1) * CHUNK as u64 {
        assert!(
            begin.elapsed() < DEADLINE,
            "{} bytes pending",
            restore.lazy.pending_bytes()
        );
        thread::yield_now();
    }
    assert_eq!(restore.events.try_recv().ok(), None);
    restore.source.set_open(true);
    assert_eq!(restore.events.recv_timeout(DEADLINE), Ok(RestoreEvent::Complete));
    assert_eq!(restore.lazy.pending_bytes(), 0);
}

#[test]
fn faults_of_the_kernel_are_served_too() {
    let source = Source::new(CHUNKS, |_| false);
    source.set_open(false);
    let restore = restore(MIB, source);
    let chunk = CHUNKS - 1;
    let host = restore
        .ram
        .memory
        .get_host_address(address(&restore.ram, chunk))
        .unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();
    // SAFETY: the address is that of a chunk of guest memory, from which the kernel reads.
    let written = unsafe { libc::write(writer.as_raw_fd(), host.cast(), 4096) };
    assert_eq!(written, 4096, "{}", std::io::Error::last_os_error());
    let mut bytes = vec![0; 4096];
    reader.read_exact(&mut bytes).unwrap();
    assert!(bytes == restore.source.content(chunk)[..4096]);
    restore.source.set_open(true);
}

#[test]
fn what_the_guest_writes_meanwhile_stays() {
    let restore = restore(MIB, Source::new(CHUNKS, scattered_zeroes));
    for chunk in (0..CHUNKS).rev() {
        let place = address(&restore.ram, chunk).0 + 4096 * (chunk % 16) + 8;
        restore
            .ram
            .memory
            .write_obj(0x5a00_0000 | chunk, GuestAddress(place))
            .unwrap();
    }
    assert_eq!(restore.events.recv_timeout(DEADLINE), Ok(RestoreEvent::Complete));
    for chunk in 0..CHUNKS {
        let mut expected = restore.source.content(chunk);
        let at = (4096 * (chunk % 16) + 8) as usize;
        expected[at..at + 8].copy_from_slice(&(0x5a00_0000 | chunk).to_le_bytes());
        assert!(read(&restore.ram, chunk) == expected, "chunk {chunk}");
    }
}

#[test]
fn who_needs_a_damaged_chunk_waits_for_good_and_all_others_have_theirs() {
    let bad = 78;
    let mut source = Source::new(CHUNKS, scattered_zeroes);
    source.damaged.insert(bad);
    let Restore {
        ram,
        source,
        lazy,
        events,
        ..
    } = restore(MIB, source);
    let event = events.recv_timeout(DEADLINE).unwrap();
    assert!(
        matches!(&event, RestoreEvent::Damaged { message } if message.contains("chunk 78 of /checkpoint/memory")),
        "{event:?}"
    );
    for chunk in (0..CHUNKS).filter(|chunk| *chunk != bad) {
        assert!(read(&ram, chunk) == source.content(chunk), "chunk {chunk}");
    }
    let (sender, touched) = mpsc::channel();
    let guest = ram.clone();
    thread::spawn(move || sender.send(read(&guest, bad)));
    assert_eq!(touched.recv_timeout(A_WHILE), Err(RecvTimeoutError::Timeout));
    assert_eq!(lazy.pending_bytes(), CHUNK as u64);
    assert!(lazy.error().unwrap().contains("chunk 78"));
    // Nor does the end of the restore give it zeroes.
    drop(lazy);
    assert_eq!(touched.recv_timeout(A_WHILE), Err(RecvTimeoutError::Timeout));
    assert_eq!(
        events.try_iter().count(),
        0,
        "no second event, and never complete"
    );
}

#[test]
fn a_guest_that_is_reset_finds_zeroes_and_no_memory_of_the_checkpoint() {
    let source = Source::new(CHUNKS, |_| false);
    source.set_open(false);
    let restore = restore(MIB, source);
    assert!(read(&restore.ram, CHUNKS - 1) == restore.source.content(CHUNKS - 1));
    // Reading ahead is in the middle of a chunk when the reset comes.
    let discarded = thread::scope(|scope| {
        let discarding = scope.spawn(|| restore.lazy.discard());
        restore.source.set_open(true);
        discarding.join().unwrap()
    });
    discarded.unwrap();
    restore.ram.clear().unwrap();
    let reads = restore.source.reads.load(Ordering::SeqCst);
    for chunk in 0..CHUNKS {
        assert!(
            read(&restore.ram, chunk).iter().all(|byte| *byte == 0),
            "chunk {chunk}"
        );
    }
    assert_eq!(restore.source.reads.load(Ordering::SeqCst), reads);
    assert_eq!(restore.lazy.pending_bytes(), 0);
    // After the end as well, and again.
    restore.lazy.discard().unwrap();
    restore.ram.clear().unwrap();
}

#[test]
fn a_complete_restore_is_reset_like_any_memory() {
    let restore = restore(MIB, Source::new(CHUNKS, |_| false));
    assert_eq!(restore.events.recv_timeout(DEADLINE), Ok(RestoreEvent::Complete));
    restore.lazy.discard().unwrap();
    restore.ram.clear().unwrap();
    assert!(read(&restore.ram, 5).iter().all(|byte| *byte == 0));
}

#[test]
fn memory_above_the_pci_hole_is_restored_and_zero_memory_costs_nothing() {
    // In all, ten chunks on both sides of the hole.
    fn zero(chunk: u64) -> bool {
        !(49_147..49_157).contains(&chunk)
    }
    let mib = 3 * 1024 + 64;
    let restore = restore(mib, Source::new(mib << 20 >> 16, zero));
    assert_eq!(restore.events.recv_timeout(DEADLINE), Ok(RestoreEvent::Complete));
    for chunk in (49_140..49_160).chain([0, 1000]) {
        assert!(
            read(&restore.ram, chunk) == restore.source.content(chunk),
            "chunk {chunk}"
        );
    }
    assert!(restore.source.reads.load(Ordering::SeqCst) <= 10);
}

#[test]
fn an_empty_memory_is_complete_at_once() {
    let restore = restore(16, Source::new(16 << 4, |_| true));
    assert_eq!(restore.events.recv_timeout(DEADLINE), Ok(RestoreEvent::Complete));
    assert!(read(&restore.ram, 7).iter().all(|byte| *byte == 0));
}

#[test]
fn a_checkpoint_of_another_size_is_refused() {
    let ram = GuestRam::new(16).unwrap();
    let source = Arc::new(Source::new(CHUNKS, |_| true));
    let error = LazyMemory::start(Userfault::open().unwrap(), &ram, source, 1, |_| {}).err();
    assert!(matches!(error, Some(RestoreError::Size { .. })));
}

#[test]
fn memory_comes_back_from_a_checkpoint_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let model = Source::new(CHUNKS, scattered_zeroes);
    let identity = |boot: &str| Identity {
        checkpoint: Uuid::from_u128(5),
        guest_uid: "guest".into(),
        machine_id: "machine".into(),
        host_boot_id: boot.into(),
    };
    let writer = Writer::open(dir.path(), &Key::new([3; 32]), identity("one"), MIB << 20).unwrap();
    writer
        .write(std::slice::from_ref(&(0..CHUNKS)), 2, |first, buffer| {
            for (chunk, bytes) in (first..).zip(buffer.chunks_exact_mut(CHUNK)) {
                bytes.copy_from_slice(&model.content(chunk));
            }
            Ok(())
        })
        .unwrap();
    let description = Description {
        guest_name: "guest".into(),
        incarnation: 1,
        owner_epoch: 1,
        vmm_version: "0".into(),
        saved_at_ms: 0,
        cpus: 1,
        memory_mib: MIB,
        ram: ranges(MIB << 20)
            .into_iter()
            .map(|(start, offset, length)| RamRange {
                start,
                offset,
                length,
            })
            .collect(),
        disks: Vec::new(),
        compatibility: serde_json::Value::Null,
    };
    drop(writer.finish(b"state", description).unwrap());
    // A bit of a chunk is flipped on the disk.
    let bad = 3;
    let path = dir.path().join("memory");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[bad as usize * CHUNK + 99] ^= 4;
    std::fs::File::create(&path).unwrap().write_all(&bytes).unwrap();

    let reader = Reader::open(dir.path(), &Key::new([3; 32]), &identity("two")).unwrap();
    let ram = Arc::new(GuestRam::new(MIB).unwrap());
    let (sender, events) = mpsc::channel();
    let lazy = LazyMemory::start(
        Userfault::open().unwrap(),
        &ram,
        Arc::new(reader),
        1,
        move |event| {
            let _ = sender.send(event);
        },
    )
    .unwrap();
    lazy.read_ahead();
    let event = events.recv_timeout(DEADLINE).unwrap();
    assert!(matches!(event, RestoreEvent::Damaged { .. }), "{event:?}");
    for chunk in (0..CHUNKS).filter(|chunk| *chunk != bad) {
        assert!(read(&ram, chunk) == model.content(chunk), "chunk {chunk}");
    }
    assert_eq!(lazy.pending_bytes(), CHUNK as u64);
}
