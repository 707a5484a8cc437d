//! What is written is read, on a real file system.

use std::fs;

use proptest::prelude::*;
use understudy_vmm_control::session::{CONSUMED, MANIFEST, Refusal};

use crate::sim::{self, CHUNKS};
use crate::{CHUNK, ChunkBuffer, Reader, SaveError, Writer, most_bytes};

fn writer(directory: &std::path::Path) -> Result<Writer, SaveError> {
    Writer::open(
        directory,
        &sim::key(),
        sim::saving_identity(),
        (CHUNKS * CHUNK) as u64,
    )
}

fn reader(directory: &std::path::Path) -> Reader {
    Reader::open(directory, &sim::key(), &sim::resuming_identity()).unwrap()
}

/// One write of a round: (chunk, byte of all its bytes, one byte that differs, or none).
type Change = (usize, u8, Option<usize>);

fn changes() -> impl Strategy<Value = Vec<Vec<Change>>> {
    let change = (
        0..CHUNKS,
        prop_oneof![Just(0u8), any::<u8>()],
        prop::option::of(0..CHUNK),
    );
    prop::collection::vec(prop::collection::vec(change, 0..12), 0..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn memory_written_in_rounds_reads_back(rounds in changes(), state in prop::collection::vec(any::<u8>(), 0..3 * CHUNK),
                                           threads in 1usize..4, settled in prop::option::of(0usize..5)) {
        let dir = tempfile::tempdir().unwrap();
        let mut memory = vec![0; CHUNKS * CHUNK];
        let mut writer = writer(dir.path()).unwrap();
        writer.zero(0..CHUNKS as u64);
        for (number, round) in rounds.iter().enumerate() {
            if settled == Some(number) {
                writer.settle().unwrap();
            }
            let mut written = std::collections::BTreeSet::new();
            for (chunk, byte, odd) in round {
                let bytes = &mut memory[chunk * CHUNK..][..CHUNK];
                bytes.fill(*byte);
                if let Some(at) = odd {
                    bytes[*at] ^= 1;
                }
                written.insert(*chunk as u64);
            }
            let ranges: Vec<_> = written.iter().map(|chunk| *chunk..chunk + 1).collect();
            writer.write(&ranges, threads, |chunk, buffer| {
                let start = chunk as usize * CHUNK;
                buffer.copy_from_slice(&memory[start..start + buffer.len()]);
                Ok(())
            }).unwrap();
            writer.begin_round();
        }
        let saved = writer.finish(&state, sim::description(CHUNKS)).unwrap();
        prop_assert_eq!(saved.report().rounds as usize, rounds.len() + 1);
        let data = memory.chunks_exact(CHUNK).filter(|chunk| chunk.iter().any(|byte| *byte != 0)).count();
        prop_assert_eq!(saved.report().data_chunks as usize, data);
        prop_assert!(saved.report().disk_bytes <= most_bytes(memory.len() as u64, state.len() as u64));
        drop(saved);

        let reader = reader(dir.path());
        prop_assert_eq!(reader.state(), &state[..]);
        prop_assert!(sim::read_all(&reader) == memory);
        let mut buffer = ChunkBuffer::new(CHUNKS);
        prop_assert!(reader.read(0, CHUNKS, &mut buffer).unwrap() == memory);
        let manifest = reader.manifest();
        let wanted = sim::description(CHUNKS);
        prop_assert_eq!(&manifest.disks, &wanted.disks);
        prop_assert_eq!(&manifest.compatibility, &wanted.compatibility);
        prop_assert_eq!((manifest.incarnation, manifest.owner_epoch), (wanted.incarnation, wanted.owner_epoch));
        for chunk in 0..reader.chunks() {
            let bytes = &memory[chunk as usize * CHUNK..][..CHUNK];
            prop_assert_eq!(reader.is_zero(chunk), bytes.iter().all(|byte| *byte == 0));
        }
    }
}

#[test]
fn zero_memory_takes_no_room_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let memory_bytes = 256u64 << 20;
    let chunks = memory_bytes / CHUNK as u64;
    let writer = Writer::open(dir.path(), &sim::key(), sim::saving_identity(), memory_bytes).unwrap();
    writer
        .write(std::slice::from_ref(&(0..chunks)), 2, |_, buffer| {
            buffer.fill(0);
            Ok(())
        })
        .unwrap();
    let report = writer
        .finish(b"", sim::description(chunks as usize))
        .unwrap()
        .report();
    assert_eq!(
        (report.data_chunks, report.zero_chunks, report.written_bytes),
        (0, chunks, 0)
    );
    assert!(report.disk_bytes < 1 << 20, "{report:?}");
}

#[test]
fn memory_that_was_left_out_is_no_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let writer = writer(dir.path()).unwrap();
    writer.zero(0..CHUNKS as u64 - 1);
    let error = writer.finish(b"", sim::description(CHUNKS)).err().unwrap();
    assert!(matches!(error, SaveError::Absent { chunk: 15 }), "{error}");
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        0,
        "a failed save gives its room back"
    );
}

#[test]
fn a_chunk_whose_read_fails_keeps_what_it_was_and_the_save_can_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let writer = writer(dir.path()).unwrap();
    writer.zero(0..CHUNKS as u64);
    let mut lane = writer.lane();
    let error = lane
        .write(0, CHUNKS, |_, _| Err(std::io::Error::other("gone")))
        .unwrap_err();
    assert!(error.to_string().contains("chunk 0: gone"), "{error}");
    drop(lane);
    writer.finish(b"", sim::description(CHUNKS)).unwrap();
}

#[test]
fn a_description_that_does_not_fit_memory_is_no_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    for wrong in [
        sim::description(2 * CHUNKS),
        crate::Description {
            ram: Vec::new(),
            ..sim::description(CHUNKS)
        },
    ] {
        let writer = writer(dir.path()).unwrap();
        writer.zero(0..CHUNKS as u64);
        let error = writer.finish(b"", wrong).err().unwrap();
        assert!(matches!(error, SaveError::Invalid { .. }), "{error}");
    }
}

#[test]
fn a_directory_with_other_files_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("letters"), "dear").unwrap();
    let error = writer(dir.path()).err().unwrap();
    assert!(
        matches!(&error, SaveError::NotEmpty { name, .. } if name == "letters"),
        "{error}"
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("memory")).unwrap();
    assert!(matches!(
        writer(dir.path()).err(),
        Some(SaveError::NotEmpty { .. })
    ));
}

#[test]
fn a_complete_checkpoint_is_not_overwritten_and_a_failed_try_is() {
    let dir = tempfile::tempdir().unwrap();
    let first = writer(dir.path()).unwrap();
    sim::write(&first, &sim::memory(|_| 1), 0..CHUNKS as u64);
    drop(first);
    let second = writer(dir.path()).unwrap();
    sim::write(&second, &sim::memory(|_| 2), 0..CHUNKS as u64);
    drop(second.finish(b"", sim::description(CHUNKS)).unwrap());
    assert!(matches!(
        writer(dir.path()).err(),
        Some(SaveError::Complete { .. })
    ));
    assert!(sim::read_all(&reader(dir.path())) == sim::memory(|_| 2));
}

#[test]
fn a_directory_is_used_by_one_process_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let first = writer(dir.path()).unwrap();
    assert!(matches!(writer(dir.path()).err(), Some(SaveError::Locked { .. })));
    first.zero(0..CHUNKS as u64);
    let saved = first.finish(b"", sim::description(CHUNKS)).unwrap();
    let open = || Reader::open(dir.path(), &sim::key(), &sim::resuming_identity());
    let refused = open().err().unwrap();
    assert_eq!(
        refused.refusal,
        Refusal::CheckpointSameBoot,
        "the saved guest may run on"
    );
    drop(saved);
    let resumed = open().unwrap();
    assert_eq!(open().err().unwrap().refusal, Refusal::CheckpointSameBoot);
    drop(resumed);
    open().unwrap();
}

#[test]
fn a_void_or_aborted_checkpoint_leaves_an_empty_directory() {
    let dir = tempfile::tempdir().unwrap();
    let aborted = writer(dir.path()).unwrap();
    sim::write(&aborted, &sim::memory(|_| 1), 0..CHUNKS as u64);
    aborted.abort().unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

    let finished = writer(dir.path()).unwrap();
    finished.zero(0..CHUNKS as u64);
    let saved = finished.finish(b"", sim::description(CHUNKS)).unwrap();
    assert!(dir.path().join(MANIFEST).exists());
    saved.void().unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    let refused = Reader::open(dir.path(), &sim::key(), &sim::resuming_identity())
        .err()
        .unwrap();
    assert_eq!(refused.refusal, Refusal::CheckpointMissing);
}

#[test]
fn a_resumed_checkpoint_is_marked_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let finished = writer(dir.path()).unwrap();
    finished.zero(0..CHUNKS as u64);
    drop(finished.finish(b"", sim::description(CHUNKS)).unwrap());
    let resumed = reader(dir.path());
    resumed.mark_consumed().unwrap();
    assert!(dir.path().join(CONSUMED).exists());
    resumed.remove().unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_directory_that_is_not_there_is_missing() {
    let gone = tempfile::tempdir().unwrap().path().join("gone");
    let refused = Reader::open(&gone, &sim::key(), &sim::resuming_identity())
        .err()
        .unwrap();
    assert_eq!(refused.refusal, Refusal::CheckpointMissing);
    assert!(matches!(writer(&gone).err(), Some(SaveError::Io { .. })));
}
