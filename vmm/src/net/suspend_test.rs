use super::*;
use crate::virtio::testing::{Suspendable, TestState, suspendable_tests};

struct SuspendBench {
    bench: Bench,
    begun: Vec<(u16, Vec<u8>)>,
    frames: u8,
}

impl SuspendBench {
    fn begin_frame(&mut self) {
        self.frames += 1;
        let frame = vec![self.frames; 60];
        let at = BUFFERS + 0x1000 + 0x100 * u64::from(self.frames);
        self.bench.driver.write(BUFFERS, &[0; 12]);
        self.bench.driver.write(at, &frame);
        let head = self.bench.driver.queues[1].offer(&[readable(BUFFERS, 12), readable(at, 60)]);
        self.begun.push((head, frame));
    }
}

impl Suspendable for SuspendBench {
    fn new() -> SuspendBench {
        SuspendBench {
            bench: Bench::isolated("none"),
            begun: Vec::new(),
            frames: 0,
        }
    }

    fn parts(&mut self) -> (&mut dyn VirtioDevice, &mut TestDriver) {
        (&mut self.bench.device, &mut self.bench.driver)
    }

    fn renew(&mut self) {
        let bench = &mut self.bench;
        let (gates, counters) = (bench.gates.clone(), bench.counters.clone());
        let mut config = network(&bench.dir, "none");
        // The old one goes first, with its socket.
        let peer = config.isolated_peer.take();
        bench.device = NetDevice::new(&config, 0, Role::Clone, gates.clone(), counters.clone()).unwrap();
        config.isolated_peer = peer;
        bench.device = NetDevice::new(&config, 0, Role::Clone, gates, counters).unwrap();
    }

    fn act(&mut self, choice: u8) {
        match choice % 3 {
            0 => {
                self.begin_frame();
                self.finish();
            }
            1 => {
                self.bench.respond(&[choice; 60]);
                assert_eq!(self.bench.receive(), [choice; 60]);
            }
            _ => self.bench.offer_buffer(RX_BUFFERS + 0x10_0000),
        }
    }

    fn begin(&mut self) {
        for _ in 0..3 {
            self.begin_frame();
        }
    }

    fn finish(&mut self) {
        for (head, frame) in std::mem::take(&mut self.begun) {
            let mut bytes = [0; 100];
            let len = self.bench.responder.recv(&mut bytes).unwrap();
            assert_eq!(bytes[..len], frame);
            self.bench.driver.queues[1].wait_used(head);
        }
        self.bench.responder.set_nonblocking(true).unwrap();
        assert!(self.bench.responder.recv(&mut [0; 100]).is_err(), "each once");
        self.bench.responder.set_nonblocking(false).unwrap();
        self.bench.respond(&[0xcc; 60]);
        assert_eq!(self.bench.receive(), [0xcc; 60], "frames for the guest go on");
    }
}

suspendable_tests!(SuspendBench);

#[test]
fn frames_for_the_guest_wait_while_it_is_suspended() {
    let mut bench = Bench::isolated("none");
    bench.device.suspend().unwrap();
    bench.respond(&[3; 60]);
    bench.device.resume().unwrap();
    assert_eq!(bench.receive(), [3; 60]);
}

#[test]
fn negotiated_offloads_are_known_again_to_a_device_that_took_over() {
    let mut suspended = SuspendBench::new();
    let features = suspended.bench.device.shared.features.load(Ordering::Acquire);
    assert_ne!(features & 1 << VIRTIO_NET_F_GUEST_CSUM, 0);
    let saved = TestState::of(&mut suspended.bench.device);
    suspended.renew();
    assert_eq!(suspended.bench.device.shared.features.load(Ordering::Acquire), 0);
    TestDriver::restore(&mut suspended.bench.device, &saved).unwrap();
    suspended.bench.driver.go_on(&mut suspended.bench.device, &saved);
    assert_eq!(
        suspended.bench.device.shared.features.load(Ordering::Acquire),
        features
    );
}

#[test]
fn frames_in_guest_ram_are_marked() {
    let mut bench = Bench::isolated("none");
    bench.driver.forget_writes();
    bench.respond(&[4; 1400]);
    let at = bench.offered[0].1;
    bench.receive();
    bench.device.suspend().unwrap();
    assert!(bench.driver.is_marked(at, 12 + 1400), "by readv into guest RAM");
    assert!(bench.driver.queues[0].is_marked_used(&bench.driver));
    assert!(!bench.driver.is_marked(at + 0x10_0000, 1));
}
