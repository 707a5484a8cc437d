use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::process::Command;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::virtio::testing::{BUFFERS, MEMORY, Piece, SOON, TestDriver, readable, writable};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const RX_BUFFERS: u64 = BUFFERS + 0x20_0000;
const RX_BUFFER: u32 = 1536;

struct Bench {
    dir: TempDir,
    gates: Gates,
    counters: Arc<Counters>,
    device: NetDevice,
    driver: TestDriver,
    responder: UnixDatagram,
    offered: std::collections::VecDeque<(u16, u64)>,
}

fn network(dir: &TempDir, tap: &str) -> config::Network {
    config::Network {
        mac: "02:00:00:00:00:07".into(),
        tap: tap.into(),
        isolated_peer: Some(dir.path().join("peer")),
    }
}

impl Bench {
    /// An isolated interface whose driver has negotiated mergeable buffers, with buffers offered.
    fn isolated(tap: &str) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let responder = UnixDatagram::bind(dir.path().join("peer")).unwrap();
        responder.set_read_timeout(Some(SOON)).unwrap();
        let (gates, counters) = (Gates::default(), Arc::new(Counters::default()));
        let mut device = NetDevice::new(
            &network(&dir, tap),
            0,
            Role::Clone,
            gates.clone(),
            counters.clone(),
        )
        .unwrap();
        let driver = TestDriver::start(
            &mut device,
            1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_NET_F_GUEST_CSUM,
        );
        let mut bench = Bench {
            dir,
            gates,
            counters,
            device,
            driver,
            responder,
            offered: Default::default(),
        };
        for i in 0..64 {
            bench.offer_buffer(RX_BUFFERS + 2048 * i);
        }
        bench
    }

    fn offer_buffer(&mut self, at: u64) {
        let head = self.driver.queues[0].offer(&[writable(at, RX_BUFFER)]);
        self.offered.push_back((head, at));
    }

    fn transmit(&mut self, frame: &[u8]) -> u16 {
        self.driver.write(BUFFERS, &[0; 12]);
        self.driver.write(BUFFERS + 0x1000, frame);
        // Header and frame in pieces of their own.
        let pieces = [
            readable(BUFFERS, 12),
            readable(BUFFERS + 0x1000, frame.len() as u32),
        ];
        self.driver.queues[1].offer(&pieces)
    }

    /// The next frame for the guest, put together from its buffers.
    fn receive(&mut self) -> Vec<u8> {
        let (head, at) = self.offered.pop_front().unwrap();
        let len = self.driver.queues[0].wait_used(head) as usize;
        let first = self.driver.read(at, len);
        let buffers = u16::from_le_bytes([first[10], first[11]]);
        let mut frame = first[12..].to_vec();
        self.offer_buffer(at);
        for _ in 1..buffers {
            let (head, at) = self.offered.pop_front().unwrap();
            let len = self.driver.queues[0]
                .poll_used(head)
                .expect("all buffers of a frame come at once");
            frame.extend(self.driver.read(at, len as usize));
            self.offer_buffer(at);
        }
        frame
    }

    /// Sends a frame to the guest as the agent's responder does.
    fn respond(&self, frame: &[u8]) {
        self.responder
            .send_to(frame, self.dir.path().join("peer.vmm"))
            .unwrap();
    }
}

#[test]
fn isolated_frames_go_to_the_responder_and_back_without_header() {
    let mut bench = Bench::isolated("none");
    let frame: Vec<u8> = (0..60).collect();
    let head = bench.transmit(&frame);
    let mut bytes = [0; 100];
    let (len, from) = bench.responder.recv_from(&mut bytes).unwrap();
    assert_eq!(bytes[..len], frame);
    assert_eq!(from.as_pathname().unwrap(), bench.dir.path().join("peer.vmm"));
    bench.driver.queues[1].wait_used(head);
    // Longer than one buffer: it is merged from several.
    let long: Vec<u8> = (0..9000).map(|i| (i / 9) as u8).collect();
    bench.respond(&long);
    assert_eq!(bench.receive(), long);
    bench.respond(&frame);
    assert_eq!(bench.receive(), frame);
    let counters = bench.counters.report();
    assert_eq!((counters.frames_sent, counters.frames_received), (1, 2));
    let (first, last) = bench.device.handle().frames_sent_at().unwrap();
    assert!(first <= last && first > 1_600_000_000_000_000);
}

#[test]
fn frames_are_dropped_while_nobody_listens() {
    let mut bench = Bench::isolated("none");
    std::fs::remove_file(bench.dir.path().join("peer")).unwrap();
    let head = bench.transmit(&[1; 60]);
    bench.driver.queues[1].wait_used(head);
    assert_eq!(bench.counters.report().frames_sent, 0);
    assert_eq!(bench.device.handle().frames_sent_at(), None);
    let responder = UnixDatagram::bind(bench.dir.path().join("peer")).unwrap();
    responder.set_read_timeout(Some(SOON)).unwrap();
    bench.transmit(&[2; 60]);
    assert_eq!(responder.recv(&mut [0; 100]).unwrap(), 60);
}

#[test]
fn closed_gates_keep_frames_where_they_are() {
    let mut bench = Bench::isolated("none");
    bench.gates.receive.close();
    bench.gates.transmit.close();
    bench.gates.receive.drain(SOON).unwrap();
    bench.gates.transmit.drain(SOON).unwrap();
    let head = bench.transmit(&[1; 60]);
    bench.respond(&[2; 60]);
    bench.responder.set_nonblocking(true).unwrap();
    assert!(bench.responder.recv(&mut [0; 100]).is_err());
    assert_eq!(bench.driver.queues[1].poll_used(head), None);
    assert_eq!(bench.counters.report().frames_received, 0);
    bench.responder.set_nonblocking(false).unwrap();
    bench.gates.transmit.open();
    assert_eq!(bench.responder.recv(&mut [0; 100]).unwrap(), 60);
    bench.gates.receive.open();
    assert_eq!(bench.receive(), [2; 60]);
}

#[test]
fn suspending_gives_back_buffers_that_were_held_ready() {
    let mut bench = Bench::isolated("none");
    bench.respond(&[2; 60]);
    bench.receive();
    let queues = bench.device.suspend().unwrap();
    assert_eq!((queues[0].next_avail, queues[0].next_used), (1, 1));
}

#[test]
fn mac_addresses_are_read_strictly() {
    assert_eq!(parse_mac("02:00:00:00:00:07"), Some(MAC));
    for bad in [
        "",
        "02:00:00:00:00",
        "02:00:00:00:00:07:08",
        "01:00:00:00:00:07",
        "2:0:0:0:0:7",
        "gg:00:00:00:00:07",
    ] {
        assert_eq!(parse_mac(bad), None, "{bad}");
    }
    let dir = tempfile::tempdir().unwrap();
    let mut network = network(&dir, "none");
    network.mac = "xx".into();
    let made = NetDevice::new(&network, 3, Role::Clone, Gates::default(), Arc::default());
    assert!(made.err().unwrap().to_string().contains("net3"));
}

#[test]
fn a_missing_tap_is_an_error_and_no_tap_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let made = NetDevice::new(
        &network(&dir, "no-such-tap"),
        0,
        Role::Active,
        Gates::default(),
        Arc::default(),
    );
    let error = made.err().unwrap().to_string();
    assert!(
        error.contains("no-such-tap") && error.contains("node agent"),
        "{error}"
    );
}

#[test]
fn what_has_not_arrived_is_not_attached() {
    let bench = Bench::isolated("no-such-tap");
    let handover = Handover::listen(&bench.dir.path().join("handover")).unwrap();
    let handle = bench.device.handle();
    let error = attach_all(std::slice::from_ref(&handle), &handover, false).unwrap_err();
    assert!(error.to_string().contains("openTaps"), "{error}");
    let file: OwnedFd = File::open("/dev/null").unwrap().into();
    let given = handover::GivenTap {
        index: 0,
        mac: [2, 0, 0, 0, 0, 8],
        features: 0,
        fd: file,
    };
    assert!(handle.attach(given).is_err());
    assert!(handle.is_isolated());
}

/// Whether taps can be made here; says so where a test is skipped.
fn can_make_taps() -> bool {
    // SAFETY: geteuid takes no arguments and cannot fail.
    let can = unsafe { libc::geteuid() } == 0 && std::path::Path::new("/dev/net/tun").exists();
    if !can {
        eprintln!("skipped: taps need root and /dev/net/tun");
    }
    can
}

/// A persistent tap in this test's own network namespace, which lives as long as the thread.
fn make_tap(name: &str) {
    // SAFETY: unshare takes no pointers; only this test's thread moves.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "root is needed");
    for command in [
        format!("tuntap add {name} mode tap vnet_hdr"),
        format!("link set {name} up"),
    ] {
        let status = Command::new("ip").args(command.split(' ')).status().unwrap();
        assert!(status.success(), "ip {command}");
    }
}

/// Waits until the kernel has a queue for the tap: that is activated some time after it was opened, and
/// frames are dropped until then.
fn wait_for_carrier(name: &str) {
    let deadline = std::time::Instant::now() + SOON;
    loop {
        let shown = Command::new("ip")
            .args(["-o", "link", "show", name])
            .output()
            .unwrap();
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        if shown.contains("state UP") {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{shown}");
        std::thread::yield_now();
    }
}

/// A raw socket on the host's side of the tap.
fn raw_socket(name: &str) -> OwnedFd {
    use std::os::fd::FromRawFd;
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: plain system calls on values that live long enough; a sockaddr_ll is all-zero valid.
    unsafe {
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW,
            i32::from((libc::ETH_P_ALL as u16).to_be()),
        );
        assert!(fd >= 0);
        let fd = OwnedFd::from_raw_fd(fd);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        let bound = libc::bind(
            std::os::fd::AsRawFd::as_raw_fd(&fd),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        );
        assert_eq!(bound, 0);
        fd
    }
}

/// Reads frames of the tap until one satisfies `wanted` (the kernel sends some of its own).
fn sniff(socket: &OwnedFd, wanted: impl Fn(&[u8]) -> bool) {
    use std::os::fd::AsRawFd;
    let mut bytes = [0u8; 2000];
    loop {
        let mut fds = [crate::virtio::worker::poll_entry(
            socket.as_raw_fd(),
            libc::POLLIN,
        )];
        crate::virtio::worker::poll(&mut fds, Some(SOON)).unwrap();
        assert_ne!(fds[0].revents, 0, "the frame has not come");
        // SAFETY: the buffer lives for the call.
        let n = unsafe { libc::recv(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        if wanted(&bytes[..n as usize]) {
            return;
        }
    }
}

#[test]
fn a_clone_takes_over_the_tap_with_the_frames_that_wait_in_it() {
    if !can_make_taps() {
        return;
    }
    std::thread::spawn(|| {
        make_tap("ustap0");
        let socket = raw_socket("ustap0");
        // The old owner holds ingress, and a frame arrives for the guest.
        let dir = tempfile::tempdir().unwrap();
        let old_gates = Gates::default();
        let mut old = NetDevice::new(
            &network(&dir, "ustap0"),
            0,
            Role::Active,
            old_gates.clone(),
            Arc::default(),
        )
        .unwrap();
        let _old_driver = TestDriver::start(&mut old, 0);
        wait_for_carrier("ustap0");
        old_gates.receive.close();
        old_gates.receive.drain(SOON).unwrap();
        let late = [&MAC[..], &[2, 0, 0, 0, 0, 9, 0x88, 0xb5], &[7; 46]].concat();
        {
            use std::os::fd::AsRawFd;
            // SAFETY: the buffer lives for the call.
            let sent = unsafe { libc::send(socket.as_raw_fd(), late.as_ptr().cast(), late.len(), 0) };
            assert_eq!(sent, late.len() as isize);
        }
        let mut bench = Bench::isolated("ustap0");
        let path = bench.dir.path().join("handover");
        let handover = Handover::listen(&path).unwrap();
        let handle = bench.device.handle();
        // By name it cannot be had while the old owner has it.
        assert!(handle.open().is_err());
        give_all(&[old.handle()], &path).unwrap();
        give_all(&[old.handle()], &path).unwrap();
        let report = attach_all(std::slice::from_ref(&handle), &handover, false).unwrap();
        assert_eq!((report.taps_received, report.taps_opened), (1, 0));
        assert!(!handle.is_isolated());
        // Bridges learn the address from a broadcast, and the waiting frame is late, not lost.
        sniff(&socket, |frame| {
            frame[..6] == [0xff; 6] && frame[6..14] == [2, 0, 0, 0, 0, 7, 0x80, 0x35]
        });
        loop {
            let frame = bench.receive();
            if frame == late {
                break;
            }
        }
        let mut frame = [&[2, 0, 0, 0, 0, 9], &MAC[..], &[0x88, 0xb5], &[9; 46]].concat();
        bench.transmit(&frame);
        sniff(&socket, |seen| seen == frame);
        // Large frames of the guest and buffers of its own are no obstacle for the kernel's taps.
        frame.resize(1514, 3);
        bench.transmit(&frame);
        sniff(&socket, |seen| seen == frame);
        assert!(handle.frames_sent_at().is_some());
        // What was asked again is answered again.
        let report = attach_all(&[handle], &handover, false).unwrap();
        assert_eq!(report.taps_opened, 0);
    })
    .join()
    .unwrap();
}

/// Time that the thread of this name has spent, in hundredths of a second (proc(5), `stat`).
fn ticks_of_thread(name: &str) -> i64 {
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
        if let Some((head, rest)) = stat.split_once(") ")
            && head.ends_with(&format!("({name}"))
        {
            let fields: Vec<i64> = rest.split(' ').filter_map(|field| field.parse().ok()).collect();
            // utime and stime: the 14th and 15th field, of which three are before here and one is no number.
            return fields[10] + fields[11];
        }
    }
    panic!("no thread {name}");
}

#[test]
fn a_tap_that_is_deleted_costs_its_frames_and_no_busy_thread() {
    if !can_make_taps() {
        return;
    }
    std::thread::spawn(|| {
        make_tap("ustap2");
        let dir = tempfile::tempdir().unwrap();
        let mut device = NetDevice::new(
            &network(&dir, "ustap2"),
            41,
            Role::Active,
            Gates::default(),
            Arc::default(),
        )
        .unwrap();
        let mut driver = TestDriver::start(&mut device, 0);
        // More than the kernel's own frames use up.
        for _ in 0..64 {
            driver.queues[0].offer(&[writable(RX_BUFFERS, 2048)]);
        }
        wait_for_carrier("ustap2");
        assert!(
            Command::new("ip")
                .args(["link", "del", "ustap2"])
                .status()
                .unwrap()
                .success()
        );
        driver.write(BUFFERS, &[0; 72]);
        let head = driver.queues[1].offer(&[readable(BUFFERS, 72)]);
        driver.queues[1].wait_used(head);
        // A thread that spins would have spent most of this time.
        let before = ticks_of_thread("net41");
        std::thread::sleep(std::time::Duration::from_millis(500));
        assert!(ticks_of_thread("net41") - before < 20);
        device.reset();
    })
    .join()
    .unwrap();
}

#[test]
fn a_clone_opens_the_tap_by_name_when_the_old_owner_is_gone() {
    if !can_make_taps() {
        return;
    }
    std::thread::spawn(|| {
        make_tap("ustap1");
        let bench = Bench::isolated("ustap1");
        let handover = Handover::listen(&bench.dir.path().join("handover")).unwrap();
        let report = attach_all(&[bench.device.handle()], &handover, true).unwrap();
        assert_eq!((report.taps_received, report.taps_opened), (0, 1));
    })
    .join()
    .unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever a guest puts into its rings, it gets chains back and the device serves on.
    #[test]
    fn any_chains_are_taken(
        chains in prop::collection::vec(
            prop::collection::vec(
                (prop_oneof![BUFFERS..MEMORY, any::<u64>()], prop_oneof![0u32..3000, any::<u32>()], any::<bool>()),
                1..5,
            ),
            0..10,
        ),
        frame in prop::collection::vec(any::<u8>(), 0..3000),
    ) {
        let mut bench = Bench::isolated("none");
        for chain in chains {
            let pieces: Vec<Piece> = chain
                .into_iter()
                .map(|(address, len, writable)| Piece { address, len, writable })
                .collect();
            let head = bench.driver.queues[1].offer(&pieces);
            bench.driver.queues[1].wait_used(head);
            bench.driver.queues[0].offer(&pieces);
        }
        bench.responder.set_nonblocking(true).unwrap();
        while bench.responder.recv(&mut [0; 70000]).is_ok() {}
        bench.responder.set_nonblocking(false).unwrap();
        bench.transmit(&[9; 60]);
        let mut bytes = [0; 100];
        while bench.responder.recv(&mut bytes).unwrap() != 60 || bytes[..60] != [9; 60] {}
        bench.respond(&frame);
        prop_assert_eq!(bench.receive(), frame);
    }
}

#[path = "suspend_test.rs"]
mod suspend;
