//! The power is cut at every change of the file system.

use std::slice;

use understudy_vmm_control::session::{CONSUMED, Refusal};

use crate::sim::{self, Disk};
use crate::{CHUNK, SaveError, Writer};

const SEEDS: u64 = 24;

fn reads_back(disk: &Disk, memory: &[u8], state: &[u8]) -> Result<(), Refusal> {
    let reader = sim::open(disk).map_err(|refused| refused.refusal)?;
    assert_eq!(reader.state(), state);
    assert!(sim::read_all(&reader) == memory, "other memory than was saved");
    Ok(())
}

#[test]
fn a_save_cut_at_any_point_leaves_no_checkpoint_or_a_whole_one() {
    let memory = sim::memory(|chunk| [0, 1, 7][chunk % 3]);
    let state = vec![3; CHUNK + 100];
    let last = sim::saved(&memory, &state).steps();
    let (mut whole, mut missing) = (0, 0);
    for cut in 1..=last + 1 {
        let disk = Disk::default();
        disk.cut_at(cut);
        let save = || {
            let bytes = memory.len() as u64;
            let mut writer = Writer::begin(disk.directory(), &sim::key(), sim::saving_identity(), bytes)?;
            let fill = |chunk: u64, buffer: &mut [u8]| {
                let start = chunk as usize * CHUNK;
                buffer.copy_from_slice(&memory[start..start + buffer.len()]);
                Ok(())
            };
            writer.write(slice::from_ref(&(0..sim::CHUNKS as u64)), 1, fill)?;
            writer.settle()?;
            writer.write(slice::from_ref(&(1..3)), 1, fill)?;
            writer.finish(&state, sim::description(sim::CHUNKS))
        };
        let result = save().map(|_| ());
        let finished = result.is_ok();
        assert_eq!(finished, cut > last);
        for seed in 0..SEEDS {
            match reads_back(&disk.crashed(seed), &memory, &state) {
                Ok(()) => {
                    whole += 1;
                    assert!(
                        matches!(result, Ok(()) | Err(SaveError::Unsettled { .. })),
                        "cut at {cut}, seed {seed}: a checkpoint of which the VMM does not know"
                    );
                }
                Err(refusal) => {
                    assert_eq!(refusal, Refusal::CheckpointMissing, "cut at {cut}, seed {seed}");
                    assert!(!finished, "seed {seed}: a finished save is lost");
                    missing += 1;
                }
            }
        }
    }
    assert!(
        whole > SEEDS && missing > SEEDS,
        "{whole} whole, {missing} missing"
    );
}

#[test]
fn a_checkpoint_voided_up_to_any_point_is_whole_or_refused() {
    let memory = sim::memory(|_| 5);
    let save = || {
        let disk = Disk::default();
        let bytes = memory.len() as u64;
        let writer = Writer::begin(disk.directory(), &sim::key(), sim::saving_identity(), bytes).unwrap();
        sim::write(&writer, &memory, 0..sim::CHUNKS as u64);
        let saved = writer.finish(b"state", sim::description(sim::CHUNKS)).unwrap();
        (disk, saved)
    };
    let (disk, saved) = save();
    let first = disk.steps() + 1;
    saved.void().unwrap();
    assert_eq!(disk.file_names(), Vec::<String>::new());
    let last = disk.steps();
    for cut in first..=last + 1 {
        let (disk, saved) = save();
        disk.cut_at(cut);
        let settled = match saved.void() {
            Ok(()) | Err(SaveError::Io { .. }) => true,
            Err(error) => {
                assert!(matches!(error, SaveError::Unsettled { .. }), "{error}");
                false
            }
        };
        for seed in 0..SEEDS {
            let result = reads_back(&disk.crashed(seed), &memory, b"state");
            if settled {
                assert_eq!(result, Err(Refusal::CheckpointMissing));
            }
            assert!(
                matches!(result, Ok(()) | Err(Refusal::CheckpointMissing)),
                "{result:?}"
            );
        }
    }
}

#[test]
fn a_consumed_checkpoint_is_never_resumed_again_however_far_its_removal_got() {
    let memory = sim::memory(|_| 5);
    let disk = sim::saved(&memory, b"state");
    let first = disk.steps() + 1;
    let cycle = |disk: &Disk| {
        let reader = sim::open(disk).unwrap();
        let marked = reader.mark_consumed().is_ok();
        if marked {
            // The power may be cut on the way, which is the subject.
            let _ = reader.remove();
        }
        marked
    };
    let complete = disk.copy();
    assert!(cycle(&complete));
    assert_eq!(complete.file_names(), Vec::<String>::new());
    for cut in first..=complete.steps() + 1 {
        let disk = disk.copy();
        disk.cut_at(cut);
        let marked = cycle(&disk);
        for seed in 0..SEEDS {
            let result = reads_back(&disk.crashed(seed), &memory, b"state");
            match result {
                Ok(()) => assert!(!marked, "cut at {cut}, seed {seed}: resumed a second time"),
                Err(Refusal::CheckpointStale | Refusal::CheckpointMissing) => {}
                Err(other) => panic!("cut at {cut}, seed {seed}: {other}"),
            }
        }
    }
}

#[test]
fn a_mark_is_a_mark_whatever_it_holds() {
    let disk = sim::saved(&sim::memory(|_| 5), b"state");
    sim::open(&disk).unwrap().mark_consumed().unwrap();
    disk.replace(CONSUMED, Vec::new());
    assert_eq!(sim::open(&disk).err().unwrap().refusal, Refusal::CheckpointStale);
}

#[test]
fn a_full_disk_is_named_and_the_save_goes_on_when_there_is_room_or_leaves_nothing() {
    let memory = sim::memory(|_| 5);
    let begin = |disk: &Disk| {
        let bytes = memory.len() as u64;
        Writer::begin(disk.directory(), &sim::key(), sim::saving_identity(), bytes).unwrap()
    };
    let copy = |chunk: u64, buffer: &mut [u8]| {
        let start = chunk as usize * CHUNK;
        buffer.copy_from_slice(&memory[start..start + buffer.len()]);
        Ok(())
    };
    let all = slice::from_ref(&(0..sim::CHUNKS as u64));

    let disk = Disk::default();
    let writer = begin(&disk);
    disk.set_full(true);
    let error = writer.write(all, 2, copy).unwrap_err();
    assert!(matches!(error, SaveError::Full { .. }), "{error}");
    let message = error.to_string();
    assert!(
        message.contains("/checkpoint/memory") && message.contains("make room"),
        "{message}"
    );
    disk.set_full(false);
    writer.write(all, 2, copy).unwrap();
    writer.finish(b"state", sim::description(sim::CHUNKS)).unwrap();
    assert_eq!(reads_back(&disk, &memory, b"state"), Ok(()));

    let disk = Disk::default();
    let writer = begin(&disk);
    writer.write(all, 2, copy).unwrap();
    disk.set_full(true);
    let error = writer
        .finish(b"state", sim::description(sim::CHUNKS))
        .err()
        .unwrap();
    assert!(matches!(error, SaveError::Full { .. }), "{error}");
    assert_eq!(disk.file_names(), Vec::<String>::new());
}
