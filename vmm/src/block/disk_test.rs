//! Disks against a model, with crashes at any point.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use understudy_vmm_control::config::{self, DiskRole, Role};
use understudy_vmm_control::owner::{OWNER_VERSION, Owner};
use uuid::Uuid;

use super::disk::Disk;
use super::error::DiskError;
use super::map_format::BLOCKS_PER_PAGE;
use super::merge::{Merger, Step};
use super::sim::Sim;
use crate::virtio::buffers::Buffers;

/// Blocks that tests touch: the first, those around the border of two map pages, the last, cut off one.
const WINDOWS: [(u64, u64); 3] = [
    (0, 12 * 8),
    ((BLOCKS_PER_PAGE - 6) * 8, 12 * 8),
    ((BLOCKS_PER_PAGE + 200) * 8, 3 * 8 + 5),
];

/// Size of the disk in bytes.
const SIZE: u64 = ((BLOCKS_PER_PAGE + 200) * 8 + 3 * 8 + 5) * 512;

/// What a sector may hold: the value that was durable last, and all that was written since.
#[derive(Clone, Debug, Default)]
struct Cell {
    flushed: u64,
    written: Vec<u64>,
    /// A write failed, so that each of `written` may be there.
    uncertain: bool,
}

impl Cell {
    fn current(&self) -> u64 {
        self.written.last().copied().unwrap_or(self.flushed)
    }
}

struct World {
    sim: Sim,
    disk: Option<Arc<Disk>>,
    cells: BTreeMap<u64, Cell>,
    tag: u64,
    layers: u128,
    /// The clone's layer and what it must read.
    clone: Option<(Uuid, BTreeMap<u64, u64>)>,
}

fn disk_config(layer: Option<Uuid>) -> config::Disk {
    config::Disk {
        name: "root".into(),
        role: DiskRole::Root,
        source: "sim.raw".into(),
        read_only: false,
        layer,
    }
}

fn sectors() -> impl Iterator<Item = u64> {
    WINDOWS.into_iter().flat_map(|(start, len)| start..start + len)
}

fn content(tag: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&tag.to_le_bytes());
    }
    bytes
}

fn read_tag(disk: &Disk, sector: u64) -> u64 {
    let mut bytes = [0xee; 512];
    disk.read_at(&mut bytes, sector * 512).unwrap();
    let tag = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(
        bytes,
        content(tag),
        "sector {sector} is mixed from several writes"
    );
    tag
}

impl World {
    fn new(seed: u64) -> World {
        let mut world = World {
            sim: Sim::new(SIZE, seed),
            disk: None,
            cells: sectors().map(|sector| (sector, Cell::default())).collect(),
            tag: 0,
            layers: 0,
            clone: None,
        };
        world.own(None);
        world.open();
        world
    }

    /// Writes `owner.json` as the VMM does.
    fn own(&self, layer: Option<Uuid>) {
        let owner = Owner {
            version: OWNER_VERSION,
            epoch: 1,
            incarnation: 1,
            layer,
        };
        // Where the process has died this fails, and the old one stays.
        let _ = self.sim.directory().replace("owner.json", &owner.encode());
    }

    fn open(&mut self) {
        self.disk = Some(Disk::open_in(&disk_config(None), Role::Active, self.sim.directory()).unwrap());
    }

    fn disk(&self) -> Arc<Disk> {
        self.disk.clone().unwrap()
    }

    /// Loses power and opens the disk again: everything that was flushed is there, and nothing that was
    /// never written.
    fn crash(&mut self) {
        self.disk = None;
        self.sim.crash();
        self.open();
        let disk = self.disk();
        for (&sector, cell) in &mut self.cells {
            let tag = read_tag(&disk, sector);
            assert!(
                tag == cell.flushed || cell.written.contains(&tag),
                "sector {sector} reads {tag}: flushed {}, since then {:?}",
                cell.flushed,
                cell.written
            );
            *cell = Cell {
                flushed: tag,
                ..Cell::default()
            };
        }
        self.check_clone();
    }

    /// Everything reads as it was written.
    fn check(&mut self) {
        let disk = self.disk();
        for (&sector, cell) in &mut self.cells {
            let tag = read_tag(&disk, sector);
            if cell.uncertain {
                assert!(tag == cell.flushed || cell.written.contains(&tag));
                cell.written.push(tag);
                cell.uncertain = false;
            } else {
                assert_eq!(tag, cell.current(), "sector {sector}");
            }
        }
    }

    /// The clone reads what there was at the split, or is told that it is stale.
    fn check_clone(&self) {
        let Some((layer, expected)) = &self.clone else {
            return;
        };
        let open = || Disk::open_in(&disk_config(Some(*layer)), Role::Clone, self.sim.directory());
        match self.sim.in_peace(open) {
            Ok(clone) => {
                for (&sector, &tag) in expected {
                    assert_eq!(read_tag(&clone, sector), tag, "sector {sector} of the clone");
                }
            }
            Err(DiskError::StaleRoot { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }

    /// After an operation that was refused or failed: was it the end of this life?
    fn survived(&mut self) -> bool {
        if self.sim.is_dead() {
            self.crash();
            return false;
        }
        true
    }

    fn write(&mut self, window: usize, start: u64, len: u64, zero: bool) {
        let (first, count) = WINDOWS[window];
        let start = first + start % count;
        let len = len.clamp(1, first + count - start);
        self.tag += 1;
        let tag = if zero { 0 } else { self.tag };
        let disk = self.disk();
        let result = if zero {
            disk.zero(start * 512, len * 512)
        } else {
            let mut bytes = content(tag).repeat(len as usize);
            disk.write(&Buffers::from_slice(&mut bytes), start * 512)
        };
        for sector in start..start + len {
            let cell = self.cells.get_mut(&sector).unwrap();
            let current = cell.current();
            if result.is_err() {
                cell.written.push(current);
                cell.uncertain = true;
            }
            cell.written.push(tag);
        }
        if result.is_err() {
            self.survived();
        }
    }

    fn flush(&mut self) {
        match self.disk().flush() {
            Ok(()) => self.note_flushed(),
            Err(_) => {
                self.survived();
            }
        }
    }

    fn note_flushed(&mut self) {
        for cell in self.cells.values_mut() {
            if cell.uncertain {
                continue;
            }
            *cell = Cell {
                flushed: cell.current(),
                ..Cell::default()
            };
        }
    }

    fn split(&mut self) {
        self.check();
        self.layers += 2;
        let (guest, clone) = (Uuid::from_u128(self.layers), Uuid::from_u128(self.layers + 1));
        let disk = self.disk();
        if disk.info().layers.len() > 6 {
            return;
        }
        // A clone of an earlier split that was given up is of no interest any more.
        self.clone = None;
        if disk.prepare_split(guest, clone).is_err() {
            self.survived();
            return;
        }
        disk.prepare_split(guest, clone).unwrap();
        self.own(Some(guest));
        if self.sim.is_dead() {
            return self.crash();
        }
        match disk.split(guest) {
            Ok(report) => {
                self.note_flushed();
                let expected = self.cells.iter().map(|(&sector, cell)| (sector, cell.current()));
                self.clone = Some((clone, expected.collect()));
                assert_eq!(disk.info().layers[0], guest);
                assert_eq!(disk.split(guest).unwrap(), report);
                self.check_clone();
            }
            Err(_) => {
                self.survived();
            }
        }
    }

    /// Merges for some steps, with a write or a flush (`None`) of the guest between any two.
    fn merge(&mut self, steps: u32, writes: &[Option<(usize, u64, u64, bool)>]) {
        let disk = self.disk();
        let mut merger = Merger::new(&disk);
        merger.checkpoint = 8;
        let mut writes = writes.iter();
        for _ in 0..steps {
            match merger.step() {
                Ok(Step::More) => {
                    match writes.next() {
                        Some(&Some((window, start, len, zero))) => self.write(window, start, len, zero),
                        Some(None) => self.flush(),
                        None => {}
                    }
                    if !Arc::ptr_eq(&disk, &self.disk()) {
                        return;
                    }
                }
                Ok(Step::Done) => {
                    assert!(disk.info().layers.is_empty());
                    let owner = Owner::parse(
                        "x".as_ref(),
                        &self.sim.directory().read("owner.json").unwrap().unwrap(),
                    );
                    assert_eq!(owner.unwrap().layer, None);
                    break;
                }
                Err(_) => {
                    if !self.survived() {
                        return;
                    }
                    break;
                }
            }
        }
        merger.stop();
        self.check();
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write(usize, u64, u64, bool),
    Flush,
    Split,
    Merge(u32, Vec<Option<(usize, u64, u64, bool)>>),
    Crash,
    Reopen,
    Fuse(u64),
    Full(u64),
    Check,
}

fn a_write() -> impl Strategy<Value = (usize, u64, u64, bool)> {
    let len = prop_oneof![3 => 1u64..20, 2 => (1u64..6).prop_map(|blocks| blocks * 8)];
    let start = prop_oneof![1 => 0u64..96, 1 => (0u64..12).prop_map(|block| block * 8)];
    (0usize..3, start, len, prop::bool::weighted(0.25))
}

fn an_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        10 => a_write().prop_map(|(window, start, len, zero)| Op::Write(window, start, len, zero)),
        4 => Just(Op::Flush),
        3 => Just(Op::Split),
        4 => (1u32..20, prop::collection::vec(prop::option::weighted(0.7, a_write()), 0..10)).prop_map(|(steps, writes)| Op::Merge(steps, writes)),
        1 => Just(Op::Crash),
        1 => Just(Op::Reopen),
        3 => (0u64..25).prop_map(Op::Fuse),
        1 => (0u64..10).prop_map(Op::Full),
        1 => Just(Op::Check),
    ]
}

fn cases() -> u32 {
    std::env::var("UNDERSTUDY_DISK_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(200)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    /// What was flushed is read back, whatever was written, split, merged, refused and cut short.
    #[test]
    fn no_flushed_data_are_lost_at_any_crash(
        seed in any::<u64>(),
        ops in prop::collection::vec(an_op(), 1..60),
    ) {
        let mut world = World::new(seed);
        for op in ops {
            match op {
                Op::Write(window, start, len, zero) => world.write(window, start, len, zero),
                Op::Flush => world.flush(),
                Op::Split => world.split(),
                Op::Merge(steps, writes) => world.merge(steps, &writes),
                Op::Crash => world.crash(),
                Op::Reopen => {
                    world.check();
                    world.flush();
                    world.disk = None;
                    world.crash();
                }
                Op::Fuse(operations) => world.sim.set_fuse(operations),
                Op::Full(writes) => world.sim.set_full_in(writes),
                Op::Check => world.check(),
            }
            if world.sim.is_dead() {
                world.crash();
            }
        }
        world.crash();
        world.merge(10_000, &[]);
        let disk = world.disk();
        prop_assert!(disk.info().layers.is_empty());
        world.check();
    }
}
