//! Disks on real files: what the control API asks of them, and what they refuse.

use std::sync::Arc;

use understudy_vmm_control::config::{self, DiskRole, Role};
use understudy_vmm_control::owner::{OWNER_VERSION, Owner};
use uuid::Uuid;

use super::disk::Disk;
use super::error::DiskError;
use crate::virtio::buffers::Buffers;

/// A real disk of `size` bytes in a directory of its own, with an `owner.json`.
struct Real {
    _dir: tempfile::TempDir,
    config: config::Disk,
    state: std::path::PathBuf,
}

impl Real {
    fn new(size: u64) -> Real {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("disk.raw");
        std::fs::File::create(&source).unwrap().set_len(size).unwrap();
        let real = Real {
            config: config::Disk {
                name: "root".into(),
                role: DiskRole::Root,
                source: source.clone(),
                read_only: false,
                layer: None,
            },
            state: understudy_vmm_control::owner::state_dir(&source),
            _dir: dir,
        };
        std::fs::create_dir(&real.state).unwrap();
        real.own(None);
        real
    }

    fn own(&self, layer: Option<Uuid>) {
        let owner = Owner {
            version: OWNER_VERSION,
            epoch: 1,
            incarnation: 1,
            layer,
        };
        owner.replace(&self.state).unwrap();
    }

    fn open(&self) -> Result<Arc<Disk>, DiskError> {
        Disk::open(&self.config, Role::Active)
    }

    fn open_clone(&self, layer: Uuid) -> Result<Arc<Disk>, DiskError> {
        let config = config::Disk {
            layer: Some(layer),
            ..self.config.clone()
        };
        Disk::open(&config, Role::Clone)
    }

    /// Splits as the VMM does; returns the clone's layer.
    fn split(&self, disk: &Disk) -> Uuid {
        let (guest, clone) = (Uuid::new_v4(), Uuid::new_v4());
        disk.prepare_split(guest, clone).unwrap();
        self.own(Some(guest));
        disk.split(guest).unwrap();
        clone
    }
}

fn put(disk: &Disk, offset: u64, byte: u8, len: usize) {
    let mut bytes = vec![byte; len];
    disk.write(&Buffers::from_slice(&mut bytes), offset).unwrap();
}

fn at(disk: &Disk, offset: u64) -> u8 {
    let mut byte = [0];
    disk.read_at(&mut byte, offset).unwrap();
    byte[0]
}

fn wait_for_merge(disk: &Disk) {
    let deadline = std::time::Instant::now() + crate::virtio::testing::SOON;
    while let Some(merge) = disk.info().merge {
        assert_eq!(merge.error, None);
        assert!(std::time::Instant::now() < deadline, "{merge:?}");
        std::thread::yield_now();
    }
}

#[test]
fn guest_and_clone_part_at_the_split_and_a_merge_makes_the_file_the_disk_again() {
    let real = Real::new(64 << 20);
    let disk = real.open().unwrap();
    put(&disk, 0, 1, 100_000);
    let clone_layer = real.split(&disk);
    let clone = real.open_clone(clone_layer).unwrap();
    put(&disk, 50_000, 2, 512);
    put(&clone, 90_000 / 512 * 512, 3, 512);
    assert_eq!([at(&disk, 0), at(&disk, 50_000), at(&disk, 90_000)], [1, 2, 1]);
    assert_eq!([at(&clone, 0), at(&clone, 50_000), at(&clone, 90_000)], [1, 1, 3]);
    // While the clone is there nothing is merged beneath it.
    assert!(matches!(disk.merge(), Err(DiskError::InUse { .. })));
    drop(clone);
    // The guest writes on while its layer is merged.
    disk.merge().unwrap();
    for i in 0..2000u64 {
        put(&disk, (i * 7919) % 16000 * 4096, 4, 4096);
        if i % 64 == 0 {
            disk.flush().unwrap();
        }
    }
    wait_for_merge(&disk);
    assert_eq!(disk.info().layers, Vec::<Uuid>::new());
    assert_eq!(at(&disk, 50_000), 2);
    disk.flush().unwrap();
    let file = std::fs::read(&real.config.source).unwrap();
    for i in 0..2000u64 {
        assert_eq!(file[((i * 7919) % 16000 * 4096) as usize], 4);
    }
    drop(disk);
    assert_eq!(Owner::read(&real.state).unwrap().unwrap().layer, None);
    let left: Vec<_> = std::fs::read_dir(&real.state)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".layer") && !name.contains(&clone_layer.to_string()))
        .collect();
    assert_eq!(left, Vec::<String>::new());
    // The clone's layer was made upon what the file is no more.
    assert!(matches!(
        real.open_clone(clone_layer),
        Err(DiskError::StaleRoot { .. })
    ));
    assert_eq!(at(&real.open().unwrap(), 50_000), 2);
}

#[test]
fn a_disk_goes_on_from_the_layer_that_owner_json_names_or_not_at_all() {
    let real = Real::new(1 << 20);
    let disk = real.open().unwrap();
    real.split(&disk);
    put(&disk, 0, 9, 512);
    disk.flush().unwrap();
    let session = disk.info().session;
    drop(disk);
    let disk = real.open().unwrap();
    assert_eq!((at(&disk, 0), disk.info().session), (9, session + 1));
    let layer = disk.info().layers[0];
    drop(disk);
    // Without owner.json nobody knows which layer is current.
    let owner = std::fs::read(real.state.join("owner.json")).unwrap();
    std::fs::remove_file(real.state.join("owner.json")).unwrap();
    assert!(matches!(real.open(), Err(DiskError::StaleRoot { .. })));
    std::fs::write(real.state.join("owner.json"), owner).unwrap();
    // A layer that is gone, and a source that has grown.
    let map = real.state.join(format!("{layer}.map"));
    std::fs::rename(&map, map.with_extension("hidden")).unwrap();
    assert!(matches!(real.open(), Err(DiskError::StaleRoot { .. })));
    std::fs::rename(map.with_extension("hidden"), &map).unwrap();
    let source = std::fs::OpenOptions::new()
        .write(true)
        .open(&real.config.source)
        .unwrap();
    source.set_len(2 << 20).unwrap();
    assert!(matches!(real.open(), Err(DiskError::StaleRoot { .. })));
    source.set_len(1 << 20).unwrap();
    // A source that somebody opened by itself: what lies above it is stale.
    let record = real.state.join("source.json");
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replace("\"session\": 1", "\"session\": 2")).unwrap();
    let error = real.open().err().unwrap();
    assert!(matches!(error, DiskError::StaleRoot { .. }), "{error}");
    std::fs::write(&record, text).unwrap();
    assert_eq!(at(&real.open().unwrap(), 0), 9);
}

#[test]
fn a_disk_of_a_resumed_session_is_as_it_was_left_until_it_is_taken_up_or_written() {
    let real = Real::new(1 << 20);
    for (layered, writes) in [(false, false), (false, true), (true, false), (true, true)] {
        let disk = real.open().unwrap();
        if layered && disk.info().layers.is_empty() {
            real.split(&disk);
        }
        let left = disk.info();
        drop(disk);
        let open = || Disk::open_as_left(&real.config, Role::Active, &left.layers, left.session);
        // A resume that is given up changes nothing, and reading does not either.
        let disk = open().unwrap();
        at(&disk, 0);
        assert_eq!(disk.info().session, left.session);
        drop(disk);
        let disk = open().unwrap();
        match writes {
            true => put(&disk, 512, 3, 512),
            false => disk.take_up().unwrap(),
        }
        assert_eq!(disk.info().session, left.session + 1);
        put(&disk, 512, 4, 512);
        disk.take_up().unwrap();
        assert_eq!(disk.info().session, left.session + 1, "once is enough");
        drop(disk);
        let error = open().err().unwrap();
        assert!(matches!(error, DiskError::StaleRoot { .. }), "{error}");
    }
}

#[test]
fn damaged_truncated_and_newer_maps_are_refused() {
    let real = Real::new(1 << 20);
    let disk = real.open().unwrap();
    real.split(&disk);
    put(&disk, 0, 9, 512);
    disk.flush().unwrap();
    let layer = disk.info().layers[0];
    drop(disk);
    let map = real.state.join(format!("{layer}.map"));
    let good = std::fs::read(&map).unwrap();
    for (offset, byte) in [(0, 1), (24, 1), (8192 + 5, 1), (8192 + 4000, 1)] {
        let mut bad = good.clone();
        bad[offset] ^= byte;
        std::fs::write(&map, bad).unwrap();
        let error = real.open().err().unwrap();
        assert!(matches!(error, DiskError::Damaged { .. }), "{offset}: {error}");
    }
    std::fs::write(&map, &good[..good.len() - 512]).unwrap();
    assert!(matches!(real.open(), Err(DiskError::Damaged { .. })));
    let mut newer = good.clone();
    newer[8] = 7;
    newer[4096 + 8] = 7;
    std::fs::write(&map, newer).unwrap();
    assert!(matches!(real.open(), Err(DiskError::Version { found: 7, .. })));
    std::fs::write(&map, &good).unwrap();
    assert_eq!(at(&real.open().unwrap(), 0), 9);
}

#[test]
fn operations_out_of_turn_are_refused_and_repeated_ones_answered_again() {
    let real = Real::new(1 << 20);
    let disk = real.open().unwrap();
    let ids: Vec<Uuid> = (0..4).map(|_| Uuid::new_v4()).collect();
    assert!(matches!(disk.split(ids[0]), Err(DiskError::Conflict { .. })));
    assert!(matches!(
        disk.prepare_split(ids[0], ids[0]),
        Err(DiskError::Conflict { .. })
    ));
    disk.prepare_split(ids[0], ids[1]).unwrap();
    // The agent gave up and tries another pair.
    disk.prepare_split(ids[2], ids[3]).unwrap();
    assert!(matches!(disk.split(ids[0]), Err(DiskError::Conflict { .. })));
    let report = disk.split(ids[2]).unwrap();
    assert_eq!(disk.split(ids[2]).unwrap(), report);
    disk.prepare_split(ids[2], ids[3]).unwrap();
    put(&disk, 0, 1, 512);
    // A layer with data, and one of the chain, is not made anew.
    assert!(matches!(
        disk.prepare_split(ids[2], ids[0]),
        Err(DiskError::Conflict { .. })
    ));
    assert_eq!(disk.info().layers, [ids[2]]);
    // A clone writes to no other disk than its own layer.
    assert!(matches!(
        Disk::open(&real.config, Role::Clone),
        Err(DiskError::Conflict { .. })
    ));
    // Nothing to merge is no error.
    let plain = Real::new(1 << 20);
    assert_eq!(plain.open().unwrap().merge().unwrap().merge, None);
}

#[test]
fn a_split_that_was_given_up_does_not_keep_the_layer_before_from_being_merged() {
    let real = Real::new(1 << 20);
    let disk = real.open().unwrap();
    real.split(&disk);
    put(&disk, 0, 1, 512);
    // Prepared and named by owner.json, and then the reboot was aborted.
    let given_up = Uuid::new_v4();
    disk.prepare_split(given_up, Uuid::new_v4()).unwrap();
    real.own(Some(given_up));
    put(&disk, 512, 2, 512);
    disk.merge().unwrap();
    wait_for_merge(&disk);
    assert_eq!(disk.info().layers, Vec::<Uuid>::new());
    drop(disk);
    assert_eq!(Owner::read(&real.state).unwrap().unwrap().layer, None);
    let disk = real.open().unwrap();
    assert_eq!([at(&disk, 0), at(&disk, 512)], [1, 2]);
    // A split after a merge is a new one.
    real.split(&disk);
    put(&disk, 0, 3, 512);
    assert_eq!(disk.info().layers.len(), 1);
}

#[test]
fn a_sparse_disk_of_a_tebibyte_costs_what_is_touched() {
    let real = Real::new(1 << 40);
    let disk = real.open().unwrap();
    real.split(&disk);
    for gib in 0..64u64 {
        put(&disk, gib << 34, 5, 4096);
    }
    disk.flush().unwrap();
    assert_eq!(at(&disk, 3 << 34), 5);
    assert_eq!(at(&disk, 1 << 33), 0);
    let blocks = |name: std::path::PathBuf| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(name).unwrap().blocks() * 512
    };
    let layer = disk.info().layers[0];
    assert!(blocks(real.state.join(format!("{layer}.map"))) < 2 << 20);
    assert!(blocks(real.state.join(format!("{layer}.layer"))) < 2 << 20);
    // Discarding nearly everything is remembered, not written.
    disk.zero(1 << 30, (1 << 40) - (1 << 31)).unwrap();
    assert_eq!(at(&disk, 3 << 34), 0);
}
