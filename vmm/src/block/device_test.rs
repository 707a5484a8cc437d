use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;
use understudy_vmm_control::config::{self, DiskRole, Role};

use super::*;
use crate::block::sim::Sim;
use crate::virtio::testing::{BUFFERS, MEMORY, Piece, SOON, TestDriver, readable, writable};

const SIZE: u64 = 1 << 20;
const HEADER_AT: u64 = BUFFERS;
const STATUS_AT: u64 = BUFFERS + 0x100;
const DATA_AT: u64 = BUFFERS + 0x1000;

struct Bench {
    _dir: TempDir,
    image: PathBuf,
    gate: Arc<Gate>,
    counters: Arc<Counters>,
    device: BlockDevice,
    driver: TestDriver,
    tags: u64,
}

impl Bench {
    fn new(read_only: bool) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.raw");
        fs::write(&image, (0..SIZE).map(|i| (i / 512) as u8).collect::<Vec<_>>()).unwrap();
        let config = config::Disk {
            name: "root".into(),
            role: DiskRole::Root,
            source: image.clone(),
            read_only,
            layer: None,
        };
        let disk = Disk::open(&config, Role::Active).unwrap();
        let (gate, counters) = (Gate::new(), Arc::new(Counters::default()));
        let mut device = BlockDevice::new(disk, gate.clone(), counters.clone());
        let driver = TestDriver::start(&mut device, 0);
        Bench {
            _dir: dir,
            image,
            gate,
            counters,
            device,
            driver,
            tags: 0,
        }
    }

    /// Offers a request whose status byte is its own.
    fn offer(&mut self, kind: u32, sector: u64, data: &[Piece]) -> (u16, u64) {
        self.tags += 1;
        let (header, status) = (HEADER_AT + 16 * self.tags, STATUS_AT + 0x800 + self.tags);
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.write(header, &bytes);
        self.driver.write(status, &[0xff]);
        let mut pieces = vec![readable(header, 16)];
        pieces.extend_from_slice(data);
        pieces.push(writable(status, 1));
        (self.driver.queues[0].offer(&pieces), status)
    }

    fn status(&self, at: u64) -> u32 {
        u32::from(self.driver.read(at, 1)[0])
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[Piece]) -> u32 {
        let (head, status) = self.offer(kind, sector, data);
        self.driver.queues[0].wait_used(head);
        self.status(status)
    }
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

#[test]
fn what_is_written_is_in_the_file_and_is_read_back_in_pieces() {
    let mut bench = Bench::new(false);
    bench.driver.write(DATA_AT, &[0xaa; 1024]);
    assert_eq!(bench.request(OUT, 3, &[readable(DATA_AT, 1024)]), VIRTIO_BLK_S_OK);
    assert_eq!(bench.request(FLUSH, 0, &[]), VIRTIO_BLK_S_OK);
    let file = fs::read(&bench.image).unwrap();
    assert_eq!(file[3 * 512..5 * 512], [0xaa; 1024]);
    assert_eq!(file[5 * 512], 5);
    let pieces = [
        writable(DATA_AT + 0x2000, 512 + 100),
        writable(DATA_AT + 0x4000, 924),
    ];
    assert_eq!(bench.request(IN, 2, &pieces), VIRTIO_BLK_S_OK);
    assert_eq!(
        bench.driver.read(DATA_AT + 0x2000, 612),
        [vec![2; 512], vec![0xaa; 100]].concat()
    );
    assert_eq!(bench.driver.read(DATA_AT + 0x4000, 924), vec![0xaa; 924]);
    assert_eq!(bench.counters.report().block_writes, 1);
}

#[test]
fn the_serial_is_the_name_of_the_disk() {
    let mut bench = Bench::new(false);
    assert_eq!(
        bench.request(GET_ID, 0, &[writable(DATA_AT, 20)]),
        VIRTIO_BLK_S_OK
    );
    assert_eq!(bench.driver.read(DATA_AT, 6), b"root\0\0");
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros() {
    let mut bench = Bench::new(false);
    for (kind, sector) in [(DISCARD, 8u64), (WRITE_ZEROES, 33)] {
        let mut segment = sector.to_le_bytes().to_vec();
        segment.extend(8u64.to_le_bytes());
        bench.driver.write(DATA_AT, &segment);
        assert_eq!(bench.request(kind, 0, &[readable(DATA_AT, 16)]), VIRTIO_BLK_S_OK);
        let file = fs::read(&bench.image).unwrap();
        let at = sector as usize * 512;
        assert_eq!(file[at..at + 4096], [0; 4096]);
        assert_eq!(file[at - 1], sector as u8 - 1);
        assert_eq!(file[at + 4096], sector as u8 + 8);
    }
}

#[test]
fn requests_beyond_the_end_and_of_odd_length_fail_and_harm_nothing() {
    let mut bench = Bench::new(false);
    let before = fs::read(&bench.image).unwrap();
    let last = SIZE / 512 - 1;
    for (sector, len) in [
        (last, 1024),
        (u64::MAX / 512, 512),
        (u64::MAX, 512),
        (0, 100),
        (0, 0),
    ] {
        for (kind, piece) in [(OUT, readable(DATA_AT, len)), (IN, writable(DATA_AT, len))] {
            assert_eq!(
                bench.request(kind, sector, &[piece]),
                VIRTIO_BLK_S_IOERR,
                "{sector} {len}"
            );
        }
    }
    assert_eq!(
        bench.request(OUT, 0, &[readable(MEMORY, 512)]),
        VIRTIO_BLK_S_IOERR
    );
    assert_eq!(bench.request(77, 0, &[]), VIRTIO_BLK_S_UNSUPP);
    assert_eq!(fs::read(&bench.image).unwrap(), before);
    assert_eq!(
        bench.request(IN, last, &[writable(DATA_AT, 512)]),
        VIRTIO_BLK_S_OK
    );
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let mut bench = Bench::new(true);
    assert_ne!(bench.device.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(
        bench.request(OUT, 0, &[readable(DATA_AT, 512)]),
        VIRTIO_BLK_S_IOERR
    );
    assert_eq!(bench.request(IN, 0, &[writable(DATA_AT, 512)]), VIRTIO_BLK_S_OK);
    assert_eq!(bench.request(FLUSH, 0, &[]), VIRTIO_BLK_S_OK);
}

#[test]
fn at_a_closed_gate_writes_wait_in_order_while_reads_pass() {
    let mut bench = Bench::new(false);
    bench.gate.close();
    bench.gate.drain(SOON).unwrap();
    bench.driver.write(DATA_AT, &[1; 512]);
    bench.driver.write(DATA_AT + 512, &[2; 512]);
    let (first, _) = bench.offer(OUT, 9, &[readable(DATA_AT, 512)]);
    let (second, status) = bench.offer(OUT, 9, &[readable(DATA_AT + 512, 512)]);
    let (flush, _) = bench.offer(FLUSH, 0, &[]);
    assert_eq!(
        bench.request(IN, 9, &[writable(DATA_AT + 0x1000, 512)]),
        VIRTIO_BLK_S_OK
    );
    assert_eq!(bench.driver.read(DATA_AT + 0x1000, 512), [9; 512]);
    for head in [first, second, flush] {
        assert_eq!(bench.driver.queues[0].poll_used(head), None);
    }
    assert_eq!(bench.counters.report().block_writes, 0);
    assert_eq!(bench.counters.report().block_writes_held, 3);
    bench.gate.open();
    bench.driver.queues[0].wait_used(second);
    bench.driver.queues[0].wait_used(flush);
    assert_eq!(bench.status(status), VIRTIO_BLK_S_OK);
    assert_eq!(
        bench.request(IN, 9, &[writable(DATA_AT + 0x1000, 512)]),
        VIRTIO_BLK_S_OK
    );
    assert_eq!(bench.driver.read(DATA_AT + 0x1000, 512), [2; 512]);
    assert_eq!(bench.counters.report().block_writes, 2);
    assert_eq!(bench.counters.report().block_writes_held, 0);
}

#[test]
fn writes_wait_while_the_host_is_full_and_reads_go_on() {
    let mut bench = Bench::new(false);
    // The next write finds no room, as do those behind it for as long as that lasts.
    let sim = Sim::new(SIZE, 1);
    let config = config::Disk {
        name: "full".into(),
        role: DiskRole::Root,
        source: "sim.raw".into(),
        read_only: false,
        layer: None,
    };
    let disk = Disk::open_in(&config, Role::Active, sim.directory()).unwrap();
    bench.device.reset();
    bench.device = BlockDevice::new(disk.clone(), bench.gate.clone(), bench.counters.clone());
    bench.driver = TestDriver::start(&mut bench.device, 0);
    sim.set_full(true);
    let (head, status) = bench.offer(OUT, 9, &[readable(DATA_AT, 512)]);
    let (flush, _) = bench.offer(FLUSH, 0, &[]);
    assert_eq!(
        bench.request(IN, 9, &[writable(DATA_AT + 0x1000, 512)]),
        VIRTIO_BLK_S_OK
    );
    assert_eq!(bench.driver.queues[0].poll_used(head), None);
    assert!(disk.is_full() && disk.info().full);
    // A closed gate is drained all the same: nothing is in flight.
    bench.gate.close();
    bench.gate.drain(SOON).unwrap();
    bench.gate.open();
    sim.set_full(false);
    bench.driver.queues[0].wait_used(head);
    bench.driver.queues[0].wait_used(flush);
    assert_eq!(bench.status(status), VIRTIO_BLK_S_OK);
    assert!(!disk.is_full() && !disk.info().full);
    assert_eq!(bench.counters.report().block_writes, 1);
    // A reset ends the waiting, and what was reported of it.
    sim.set_full(true);
    bench.offer(OUT, 9, &[readable(DATA_AT, 512)]);
    assert_eq!(
        bench.request(IN, 9, &[writable(DATA_AT + 0x1000, 512)]),
        VIRTIO_BLK_S_OK
    );
    assert!(disk.is_full());
    bench.device.reset();
    assert!(!disk.is_full());
}

#[test]
fn a_broken_ring_stops_the_device_until_it_is_reset() {
    let mut bench = Bench::new(false);
    bench.driver.queues[0].set_available(20_000);
    bench.device.reset();
    bench.driver = TestDriver::start(&mut bench.device, 0);
    assert_eq!(bench.request(IN, 0, &[writable(DATA_AT, 512)]), VIRTIO_BLK_S_OK);
}

#[test]
fn suspending_tells_the_progress_of_the_queue() {
    let mut bench = Bench::new(false);
    for sector in 0..3 {
        assert_eq!(
            bench.request(IN, sector, &[writable(DATA_AT, 512)]),
            VIRTIO_BLK_S_OK
        );
    }
    let queues = bench.device.suspend().unwrap();
    assert_eq!((queues[0].next_avail, queues[0].next_used), (3, 3));
}

#[test]
fn an_image_that_is_in_use_or_has_no_sector_size_is_refused_with_advice() {
    let bench = Bench::new(false);
    let mut config = config::Disk {
        name: "root".into(),
        role: DiskRole::Root,
        source: bench.image.clone(),
        read_only: false,
        layer: None,
    };
    let error = Disk::open(&config, Role::Active).err().unwrap();
    assert!(matches!(error, crate::block::DiskError::InUse { .. }), "{error}");
    let odd = bench.image.with_extension("odd");
    fs::write(&odd, [0; 1000]).unwrap();
    config.source = odd;
    let error = Disk::open(&config, Role::Active).err().unwrap();
    assert!(error.to_string().contains("1000 bytes"), "{error}");
    config.source = bench.image.with_extension("none");
    let error = Disk::open(&config, Role::Active).err().unwrap();
    assert!(error.to_string().contains("disk.none"), "{error}");
}

#[path = "suspend_test.rs"]
mod suspend;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a guest puts into its descriptors, it gets every chain back, and the device serves on.
    #[test]
    fn any_chain_is_answered(
        kind in prop_oneof![0u32..16, any::<u32>()],
        sector in prop_oneof![0u64..3000, any::<u64>()],
        pieces in prop::collection::vec(
            (prop_oneof![BUFFERS..MEMORY, any::<u64>()], prop_oneof![0u32..5000, any::<u32>()], any::<bool>()),
            0..8,
        ),
        garbage in prop::collection::vec(any::<u8>(), 4096),
    ) {
        let mut bench = Bench::new(false);
        bench.driver.write(DATA_AT, &garbage);
        let pieces: Vec<Piece> = pieces
            .into_iter()
            .map(|(address, len, writable)| Piece { address, len, writable })
            .collect();
        let (head, _) = bench.offer(kind, sector, &pieces);
        bench.driver.queues[0].wait_used(head);
        if !pieces.is_empty() {
            let head = bench.driver.queues[0].offer(&pieces);
            bench.driver.queues[0].wait_used(head);
        }
        prop_assert_eq!(bench.request(IN, 0, &[writable(DATA_AT, 512)]), VIRTIO_BLK_S_OK);
    }
}
