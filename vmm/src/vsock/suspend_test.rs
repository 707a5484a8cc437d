use super::*;
use crate::virtio::testing::{Suspendable, TestState, suspendable_tests};

struct SuspendBench {
    guest: Guest,
    streams: Vec<UnixStream>,
    begun: Vec<u16>,
    next: u32,
    /// A driver without buffers for events is not waited for.
    patience: Duration,
}

impl SuspendBench {
    /// The guest asks for a listener that is not there.
    fn begin_request(&mut self) {
        self.next += 1;
        let bytes = Guest::header(98, self.next, OP_REQUEST).encode();
        let at = BUFFERS + 64 * u64::from(self.next);
        self.guest.driver.write(at, &bytes);
        let head = self.guest.driver.queues[1].offer(&[readable(at, HEADER as u32)]);
        self.begun.push(head);
    }
}

impl Suspendable for SuspendBench {
    fn new() -> SuspendBench {
        SuspendBench {
            guest: Guest::new(),
            streams: Vec::new(),
            begun: Vec::new(),
            next: 0,
            patience: Duration::ZERO,
        }
    }

    fn parts(&mut self) -> (&mut dyn VirtioDevice, &mut TestDriver) {
        (&mut self.guest.device, &mut self.guest.driver)
    }

    fn renew(&mut self) {
        let socket = self.guest.dir.path().join("vsock");
        self.guest.device = VsockDevice::new(&config::Vsock { cid: CID, socket }).unwrap();
        self.guest.device.patience = self.patience;
    }

    fn act(&mut self, choice: u8) {
        match choice % 3 {
            0 => self.streams.push(self.guest.established().0),
            1 => {
                let (mut stream, port) = self.guest.established();
                self.guest.send_data(port, 1024, &[choice; 100]);
                let mut bytes = [0; 100];
                stream.read_exact(&mut bytes).unwrap();
                assert_eq!(bytes, [choice; 100]);
                self.streams.push(stream);
            }
            _ => {
                self.begin_request();
                self.finish();
            }
        }
    }

    fn begin(&mut self) {
        for _ in 0..3 {
            self.begin_request();
        }
    }

    fn finish(&mut self) {
        let answered = self.next + 1 - self.begun.len() as u32..=self.next;
        for head in self.begun.drain(..) {
            self.guest.driver.queues[1].wait_used(head);
        }
        for port in answered {
            let reset = self.guest.expect(OP_RST);
            assert_eq!((reset.src_port, reset.dst_port), (98, port), "each once");
        }
        // What came next would be seen before this.
        self.streams.push(self.guest.established().0);
    }
}

suspendable_tests!(SuspendBench);

#[test]
fn streams_live_on_when_the_device_was_only_suspended() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.established();
    guest.device.suspend().unwrap();
    stream.write_all(b"meanwhile").unwrap();
    guest.device.resume().unwrap();
    let (header, data) = guest.receive();
    assert_eq!((header.op, data.as_slice()), (OP_RW, b"meanwhile".as_slice()));
    guest.send_data(port, 1024, b"still here");
    let mut bytes = [0; 10];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"still here");
}

#[test]
fn a_resumed_guest_is_told_that_its_streams_are_gone_before_new_ones_begin() {
    for early in [true, false] {
        let mut suspended = SuspendBench::new();
        suspended.patience = SOON;
        let at = BUFFERS + 0x40_0000;
        suspended.guest.driver.write(at, &[0xff; 8]);
        let offer = |guest: &mut Guest| guest.driver.queues[2].offer(&[writable(at, 8)]);
        let before = early.then(|| [offer(&mut suspended.guest), offer(&mut suspended.guest)]);
        let (mut stream, old_port) = suspended.guest.established();
        let saved = TestState::of(&mut suspended.guest.device);
        suspended.renew();
        assert_eq!(
            stream.read(&mut [0; 1]).unwrap(),
            0,
            "the host's end learns it, too"
        );
        TestDriver::restore(&mut suspended.guest.device, &saved).unwrap();
        let guest = &mut suspended.guest;
        // A program that is quick.
        let mut quick = guest.connect();
        quick.write_all(b"CONNECT 1024\n").unwrap();
        guest.driver.go_on(&mut guest.device, &saved);
        let head = before.map_or_else(|| offer(guest), |heads| heads[0]);
        assert_eq!(guest.driver.queues[2].wait_used(head), 4);
        assert_eq!(guest.driver.read(at, 8), [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        // Its packet waits while the driver has not read the event, though others are taken.
        guest.send(Guest::header(98, 1, OP_RST), &[]);
        guest.send(Guest::header(98, 1, OP_RST), &[]);
        let (packet, _) = guest.receiving[0];
        assert!(!guest.driver.queues[0].is_used(packet));
        let again = offer(guest);
        let request = guest.expect(OP_REQUEST);
        assert_ne!(
            request.src_port, old_port,
            "the guest may still hold the old stream"
        );
        let _later = guest.established();
        assert!(!guest.driver.queues[2].is_used(again), "told once");
    }
}

#[test]
fn a_driver_that_gives_no_buffers_for_events_is_not_waited_for_without_end() {
    let mut suspended = SuspendBench::new();
    suspended.patience = Duration::from_millis(50);
    let saved = TestState::of(&mut suspended.guest.device);
    suspended.renew();
    TestDriver::restore(&mut suspended.guest.device, &saved).unwrap();
    let guest = &mut suspended.guest;
    guest.driver.go_on(&mut guest.device, &saved);
    guest.established();
}

#[test]
fn a_guest_that_boots_is_told_of_no_reset() {
    let mut guest = Guest::new();
    let head = guest.driver.queues[2].offer(&[writable(BUFFERS + 0x40_0000, 8)]);
    let _stream = guest.established();
    assert!(!guest.driver.queues[2].is_used(head));
}

#[test]
fn a_port_that_no_connection_can_have_is_refused() {
    let mut suspended = SuspendBench::new();
    let mut saved = TestState::of(&mut suspended.guest.device);
    saved.own = Some(Envelope::seal(NAME, &VsockState { next_port: 22 }).unwrap());
    suspended.renew();
    let error = TestDriver::restore(&mut suspended.guest.device, &saved).unwrap_err();
    assert!(error.to_string().contains("port 22"), "{error}");
}

#[test]
fn packets_in_guest_ram_are_marked() {
    let mut guest = Guest::new();
    let (mut stream, _) = guest.established();
    guest.driver.forget_writes();
    stream.write_all(&[7; 3000]).unwrap();
    let at = guest.receiving[0].1;
    let (header, _) = guest.receive();
    guest.device.suspend().unwrap();
    assert!(guest.driver.is_marked(at, HEADER), "the header");
    assert!(
        guest.driver.is_marked(at + HEADER as u64, header.len as usize),
        "the data, by recvmsg into guest RAM"
    );
}
