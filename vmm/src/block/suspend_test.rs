use super::*;
use crate::virtio::testing::{Suspendable, TestState, suspendable_tests};

/// What was begun: head, address of the status, and for writes the sector.
struct Begun {
    head: u16,
    status: u64,
    sector: Option<u64>,
}

struct SuspendBench {
    bench: Bench,
    begun: Vec<Begun>,
    writes: u64,
}

impl SuspendBench {
    /// Waits until the device has seen all that was offered: what comes behind passes what waits.
    fn settle(&mut self) {
        self.bench.request(IN, 0, &[writable(DATA_AT + 0x8000, 512)]);
    }

    fn begin_write(&mut self) {
        self.writes += 1;
        let sector = 100 + self.writes;
        let at = DATA_AT + 512 * self.writes;
        self.bench.driver.write(at, &[self.writes as u8; 512]);
        let (head, status) = self.bench.offer(OUT, sector, &[readable(at, 512)]);
        let sector = Some(sector);
        self.begun.push(Begun { head, status, sector });
    }
}

impl Suspendable for SuspendBench {
    fn new() -> SuspendBench {
        SuspendBench {
            bench: Bench::new(false),
            begun: Vec::new(),
            writes: 0,
        }
    }

    fn parts(&mut self) -> (&mut dyn VirtioDevice, &mut TestDriver) {
        (&mut self.bench.device, &mut self.bench.driver)
    }

    fn renew(&mut self) {
        let bench = &mut self.bench;
        let disk = bench.device.disk.clone();
        bench.device = BlockDevice::new(disk, bench.gate.clone(), bench.counters.clone());
    }

    fn act(&mut self, choice: u8) {
        match choice % 6 {
            0 => self.begin_write(),
            1 => {
                let (head, status) = self.bench.offer(FLUSH, 0, &[]);
                let sector = None;
                self.begun.push(Begun { head, status, sector });
            }
            2 => self.bench.gate.close(),
            3 => self.finish(),
            4 => {
                // Nothing that could be answered.
                let head = self.bench.driver.queues[0].offer(&[readable(DATA_AT, 10)]);
                self.bench.driver.queues[0].wait_used(head);
            }
            _ => {
                self.bench.request(GET_ID, 0, &[writable(DATA_AT, 20)]);
            }
        }
        self.settle();
    }

    fn begin(&mut self) {
        // Some wait in the device, some in the ring.
        self.bench.gate.close();
        for _ in 0..3 {
            self.begin_write();
        }
    }

    fn finish(&mut self) {
        self.bench.gate.open();
        for begun in self.begun.drain(..) {
            self.bench.driver.queues[0].wait_used(begun.head);
            assert_eq!(self.bench.status(begun.status), VIRTIO_BLK_S_OK);
            if let Some(sector) = begun.sector {
                let file = fs::read(&self.bench.image).unwrap();
                let at = sector as usize * 512;
                assert_eq!(file[at..at + 512], [(sector - 100) as u8; 512]);
            }
        }
        assert_eq!(
            self.bench.counters.report().block_writes,
            self.writes,
            "each once"
        );
        let queue = &mut self.bench.driver.queues[0];
        assert_eq!(queue.returned(), queue.offered(), "each once");
    }
}

suspendable_tests!(SuspendBench);

#[test]
fn writes_that_wait_at_the_gate_are_saved_in_order_while_reads_have_passed_them() {
    let mut suspended = SuspendBench::new();
    suspended.begin();
    suspended.settle();
    let saved = TestState::of(&mut suspended.bench.device);
    let own: BlockState = saved.own.as_ref().unwrap().open("blk").unwrap();
    assert_eq!((own.waiting(), saved.queues[0].outstanding()), (3, 3));
    assert_eq!(saved.queues[0].next_used, 1, "the read");
    // While it is suspended nothing is written, though the gate opens.
    suspended.bench.gate.open();
    assert_eq!(suspended.bench.counters.report().block_writes, 0);
    suspended.bench.device.resume().unwrap();
    suspended.finish();
}

#[test]
fn waiting_writes_that_cannot_be_are_refused() {
    let mut suspended = SuspendBench::new();
    suspended.begin();
    suspended.settle();
    let saved = TestState::of(&mut suspended.bench.device);
    suspended.renew();
    let mut fewer = saved.clone();
    fewer.queues[0].next_avail -= 1;
    let error = TestDriver::restore(&mut suspended.bench.device, &fewer).unwrap_err();
    assert!(error.to_string().contains("3 writes wait"), "{error}");
    let mut none = saved.clone();
    none.own = None;
    let error = TestDriver::restore(&mut suspended.bench.device, &none).unwrap_err();
    assert!(error.to_string().contains("waiting writes"), "{error}");
    let mut newer = saved;
    newer.own = Some(Envelope::raw(9, Vec::new()));
    let error = TestDriver::restore(&mut suspended.bench.device, &newer).unwrap_err();
    assert!(error.to_string().contains("version 9"), "{error}");
}

#[test]
fn what_the_disk_writes_into_guest_ram_is_marked() {
    let mut bench = Bench::new(false);
    bench.driver.forget_writes();
    let (at, id) = (DATA_AT + 0x3ff0, DATA_AT + 0x8000);
    // Across a page, by preadv into guest RAM.
    let (head, status) = bench.offer(IN, 0, &[writable(at, 1024)]);
    bench.driver.queues[0].wait_used(head);
    bench.request(GET_ID, 0, &[writable(id, 20)]);
    bench.device.suspend().unwrap();
    assert!(bench.driver.is_marked(at, 1024) && bench.driver.is_marked(id, 20));
    assert!(bench.driver.is_marked(status, 1));
    assert!(bench.driver.queues[0].is_marked_used(&bench.driver));
    assert!(!bench.driver.is_marked(DATA_AT + 0x1_0000, 1));
}
