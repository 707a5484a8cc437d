//! Whatever is done to the files, nobody gets other bytes than were saved.

use proptest::prelude::*;
use understudy_vmm_control::session::{MANIFEST, Refusal};
use uuid::Uuid;

use crate::files::{CHANGES, INDEX, MEMORY, STATE};
use crate::sim::{self, CHUNKS, Disk};
use crate::{CHUNK, ChunkBuffer, Identity, Key, Reader, Writer};

fn refusal(disk: &Disk) -> Option<Refusal> {
    sim::open(disk).err().map(|refused| refused.refusal)
}

fn saved() -> Disk {
    sim::saved(&sim::memory(|chunk| (chunk % 4) as u8), b"registers")
}

#[test]
fn every_flipped_bit_of_manifest_index_changes_and_state_is_refused() {
    let disk = saved();
    assert_eq!(refusal(&disk), None);
    for name in [MANIFEST, INDEX, CHANGES, STATE] {
        let content = disk.content(name);
        for bit in 0..content.len() * 8 {
            let mut flipped = content.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            disk.replace(name, flipped);
            assert_eq!(
                refusal(&disk),
                Some(Refusal::CheckpointDamaged),
                "{name}, bit {bit}"
            );
        }
        disk.replace(name, content);
    }
    assert_eq!(refusal(&disk), None);
}

#[test]
fn every_other_length_of_a_file_is_refused() {
    let disk = saved();
    for name in [MANIFEST, INDEX, CHANGES, STATE, MEMORY] {
        let content = disk.content(name);
        let step = content.len().div_ceil(2000);
        for length in (0..content.len()).step_by(step).chain([content.len() - 1]) {
            disk.replace(name, content[..length].to_vec());
            assert_eq!(
                refusal(&disk),
                Some(Refusal::CheckpointDamaged),
                "{name}, {length}"
            );
        }
        disk.replace(name, [&content[..], b"\0"].concat());
        assert_eq!(refusal(&disk), Some(Refusal::CheckpointDamaged), "{name}, longer");
        disk.replace(name, content);
    }
}

#[test]
fn a_missing_file_is_refused() {
    for name in [MANIFEST, INDEX, CHANGES, STATE, MEMORY] {
        let disk = saved();
        disk.directory().remove(name).unwrap();
        let expected = match name {
            MANIFEST => Refusal::CheckpointMissing,
            _ => Refusal::CheckpointDamaged,
        };
        assert_eq!(refusal(&disk), Some(expected), "{name}");
    }
}

#[test]
fn files_of_another_save_of_the_same_guest_with_the_same_key_are_refused() {
    let memory = sim::memory(|chunk| (chunk % 4) as u8);
    let (one, two) = (saved(), saved());
    for name in [INDEX, CHANGES, STATE] {
        let disk = one.copy();
        disk.replace(name, two.content(name));
        assert_eq!(refusal(&disk), Some(Refusal::CheckpointDamaged), "{name}");
    }
    let disk = one.copy();
    disk.replace(MANIFEST, two.content(MANIFEST));
    assert_eq!(refusal(&disk), Some(Refusal::CheckpointDamaged));
    let disk = one.copy();
    disk.replace(MEMORY, two.content(MEMORY));
    check_chunks(&disk, &memory, |chunk| chunk % 4 != 0);
}

/// Chunks for which `bad` holds are refused, all others read as saved.
fn check_chunks(disk: &Disk, memory: &[u8], bad: impl Fn(usize) -> bool) {
    let reader = sim::open(disk).unwrap();
    let mut buffer = ChunkBuffer::new(CHUNKS);
    for (number, saved) in memory.chunks_exact(CHUNK).enumerate() {
        match reader.read(number as u64, 1, &mut buffer) {
            Ok(read) => assert!(read == saved && !bad(number), "chunk {number}"),
            Err(error) => assert!(bad(number), "{error}"),
        }
    }
    if (0..CHUNKS).any(bad) {
        assert!(reader.read(0, CHUNKS, &mut buffer).is_err());
        assert!(
            buffer.iter().all(|byte| *byte == 0),
            "bytes that nobody vouches for"
        );
    }
}

#[test]
fn chunks_that_are_exchanged_are_refused() {
    let memory = sim::memory(|_| 1);
    let disk = sim::saved(&memory, b"");
    let mut content = disk.content(MEMORY);
    let (front, back) = content.split_at_mut(5 * CHUNK);
    front[..CHUNK].swap_with_slice(&mut back[..CHUNK]);
    disk.replace(MEMORY, content);
    check_chunks(&disk, &memory, |chunk| chunk == 0 || chunk == 5);
}

#[test]
fn a_chunk_of_an_earlier_round_is_refused() {
    let disk = Disk::default();
    let memory = sim::memory(|_| 1);
    let bytes = memory.len() as u64;
    let writer = Writer::begin(disk.directory(), &sim::key(), sim::saving_identity(), bytes).unwrap();
    sim::write(&writer, &sim::memory(|_| 9), 0..CHUNKS as u64);
    let earlier = disk.content(MEMORY);
    writer.begin_round();
    sim::write(&writer, &memory, 0..CHUNKS as u64);
    writer.finish(b"", sim::description(CHUNKS)).unwrap();
    let mut content = disk.content(MEMORY);
    content[3 * CHUNK..4 * CHUNK].copy_from_slice(&earlier[3 * CHUNK..4 * CHUNK]);
    disk.replace(MEMORY, content);
    check_chunks(&disk, &memory, |chunk| chunk == 3);
}

#[test]
fn the_same_memory_saved_twice_with_the_same_key_shares_no_sealed_chunk() {
    let (one, two) = (saved().content(MEMORY), saved().content(MEMORY));
    let plain = sim::memory(|chunk| (chunk % 4) as u8);
    for chunk in (0..CHUNKS).filter(|chunk| chunk % 4 != 0) {
        let place = chunk * CHUNK..(chunk + 1) * CHUNK;
        assert_ne!(one[place.clone()], two[place.clone()]);
        assert_ne!(one[place.clone()], plain[place]);
    }
}

#[test]
fn a_checkpoint_is_refused_by_name_of_what_does_not_match() {
    let disk = saved();
    let open = |key: &Key, identity: &Identity| {
        Reader::begin(disk.directory(), key, identity)
            .err()
            .map(|refused| (refused.refusal, refused.to_string()))
    };
    let right = sim::resuming_identity();
    assert_eq!(open(&sim::key(), &right), None);

    let (refusal, message) = open(&Key::new([0x43; 32]), &right).unwrap();
    assert_eq!(refusal, Refusal::CheckpointKey);
    assert!(
        message.starts_with("CheckpointKey: /checkpoint/manifest.json"),
        "{message}"
    );

    let others = [
        Identity {
            checkpoint: Uuid::from_u128(99),
            ..right.clone()
        },
        Identity {
            guest_uid: "another".into(),
            ..right.clone()
        },
        Identity {
            machine_id: "another".into(),
            ..right.clone()
        },
    ];
    for other in others {
        // With the other's own key as well: it is the guest that is wrong.
        for key in [sim::key(), Key::new([1; 32])] {
            let (refusal, message) = open(&key, &other).unwrap();
            assert_eq!(refusal, Refusal::CheckpointForeign, "{message}");
        }
    }
    let (refusal, _) = open(&sim::key(), &sim::saving_identity()).unwrap();
    assert_eq!(refusal, Refusal::CheckpointSameBoot);
}

#[test]
fn a_consumed_checkpoint_is_refused_and_cannot_be_consumed_twice() {
    let disk = saved();
    let (one, two) = (sim::open(&disk).unwrap(), sim::open(&disk).unwrap());
    one.mark_consumed().unwrap();
    assert_eq!(
        two.mark_consumed().err().unwrap().refusal,
        Refusal::CheckpointStale
    );
    assert_eq!(refusal(&disk), Some(Refusal::CheckpointStale));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_flipped_bit_of_memory_is_found_in_its_chunk(bit in 0..CHUNKS * CHUNK * 8) {
        let memory = sim::memory(|chunk| (chunk % 4) as u8);
        let disk = sim::saved(&memory, b"");
        let mut content = disk.content(MEMORY);
        content[bit / 8] ^= 1 << (bit % 8);
        disk.replace(MEMORY, content);
        // Behind a zero chunk lies nothing that anybody reads.
        let flipped = bit / 8 / CHUNK;
        check_chunks(&disk, &memory, |chunk| chunk == flipped && chunk % 4 != 0);
    }

    #[test]
    fn garbage_in_any_file_is_refused(name in prop::sample::select(vec![MANIFEST, INDEX, CHANGES, STATE]),
                                      garbage in prop::collection::vec(any::<u8>(), 0..600)) {
        let disk = saved();
        disk.replace(name, garbage);
        prop_assert_eq!(refusal(&disk), Some(Refusal::CheckpointDamaged));
    }
}
