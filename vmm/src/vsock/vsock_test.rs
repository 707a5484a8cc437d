use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use proptest::prelude::*;
use tempfile::TempDir;

use super::connection::{BUF_ALLOC, MAX_PACKET};
use super::mux::MAX_CONNECTIONS;
use super::packet::*;
use super::*;
use crate::virtio::testing::{BUFFERS, MEMORY, SOON, TestDriver, readable, writable};

const CID: u64 = 7;
const GUEST_ALLOC: u32 = 64 << 10;
const RX_BUFFER: u32 = 8192;

/// A guest's driver that speaks packets.
struct Guest {
    dir: TempDir,
    device: VsockDevice,
    driver: TestDriver,
    receiving: std::collections::VecDeque<(u16, u64)>,
    features: u64,
}

impl Guest {
    fn new() -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let mut device = VsockDevice::new(&config::Vsock {
            cid: CID,
            socket: dir.path().join("vsock"),
        })
        .unwrap();
        let features = 1 << VIRTIO_RING_F_EVENT_IDX;
        let driver = TestDriver::start(&mut device, features);
        let mut guest = Guest {
            dir,
            device,
            driver,
            receiving: Default::default(),
            features,
        };
        for i in 0..32 {
            guest.offer_buffer(BUFFERS + 0x10000 + u64::from(i * RX_BUFFER));
        }
        guest
    }

    fn offer_buffer(&mut self, at: u64) {
        // Header and data apart, as Linux 6.1 does it.
        let pieces = [writable(at, 44), writable(at + 44, RX_BUFFER - 44)];
        let head = self.driver.queues[0].offer(&pieces);
        self.receiving.push_back((head, at));
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("vsock")).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream
    }

    fn header(host: u32, guest: u32, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            kind: TYPE_STREAM,
            op,
            buf_alloc: GUEST_ALLOC,
            ..Header::default()
        }
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let mut bytes = header.encode().to_vec();
        bytes.extend(data);
        self.driver.write(BUFFERS, &bytes);
        // Framed in one piece, as newer kernels do it.
        let head = self.driver.queues[1].offer(&[readable(BUFFERS, bytes.len() as u32)]);
        self.driver.queues[1].wait_used(head);
    }

    fn send_data(&mut self, host: u32, guest: u32, data: &[u8]) {
        let header = Header {
            len: data.len() as u32,
            ..Self::header(host, guest, OP_RW)
        };
        self.send(header, data);
    }

    /// The next packet, whose buffer is offered again.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let (head, at) = self.receiving.pop_front().unwrap();
        let len = self.driver.queues[0].wait_used(head);
        let bytes = self.driver.read(at, len as usize);
        self.offer_buffer(at);
        let header = Header::decode(bytes[..HEADER].try_into().unwrap());
        assert_eq!(bytes.len() - HEADER, header.len as usize);
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
        (header, bytes[HEADER..].to_vec())
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    /// A program of the host connects to the guest's port 1024, which accepts.
    fn established(&mut self) -> (UnixStream, u32) {
        let mut stream = self.connect();
        stream.write_all(b"CONNECT 1024\n").unwrap();
        let request = self.expect(OP_REQUEST);
        assert_eq!(request.dst_port, 1024);
        self.send(Self::header(request.src_port, 1024, OP_RESPONSE), &[]);
        let mut line = String::new();
        // Byte by byte: data may follow at once.
        let mut byte = [0; 1];
        while byte != *b"\n" {
            stream.read_exact(&mut byte).unwrap();
            line.push(byte[0] as char);
        }
        assert_eq!(line, format!("OK {}\n", request.src_port));
        (stream, request.src_port)
    }
}

#[test]
fn the_host_connects_and_data_flow_both_ways() {
    let mut guest = Guest::new();
    let mut stream = guest.connect();
    // Data that follow the greeting at once are not lost.
    stream.write_all(b"CONNECT 1024\nhello").unwrap();
    let request = guest.expect(OP_REQUEST);
    guest.send(Guest::header(request.src_port, 1024, OP_RESPONSE), &[]);
    let (header, data) = guest.receive();
    assert_eq!((header.op, data.as_slice()), (OP_RW, b"hello".as_slice()));
    guest.send_data(request.src_port, 1024, b"world\n");
    let mut lines = BufReader::new(stream).lines();
    assert_eq!(lines.next().unwrap().unwrap(), format!("OK {}", request.src_port));
    assert_eq!(lines.next().unwrap().unwrap(), "world");
}

#[test]
fn the_guest_connects_to_a_listener_and_gets_a_reset_where_there_is_none() {
    let mut guest = Guest::new();
    guest.send(Guest::header(99, 5, OP_REQUEST), &[]);
    let reset = guest.expect(OP_RST);
    assert_eq!((reset.src_port, reset.dst_port), (99, 5));
    let listener = UnixListener::bind(guest.dir.path().join("vsock_99")).unwrap();
    guest.send(Guest::header(99, 5, OP_REQUEST), &[]);
    let response = guest.expect(OP_RESPONSE);
    assert_eq!(response.buf_alloc, BUF_ALLOC);
    let (mut stream, _) = listener.accept().unwrap();
    guest.send_data(99, 5, b"ping");
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"ping");
    stream.write_all(b"pong").unwrap();
    assert_eq!(guest.receive().1, b"pong");
}

#[test]
fn a_refused_connection_ends_the_hosts_stream() {
    let mut guest = Guest::new();
    let mut stream = guest.connect();
    stream.write_all(b"CONNECT 5\n").unwrap();
    let request = guest.expect(OP_REQUEST);
    guest.send(Guest::header(request.src_port, 5, OP_RST), &[]);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_greeting_that_makes_no_sense_ends_the_stream() {
    let guest = Guest::new();
    for greeting in [
        "GET / HTTP/1.1\r\n\r\n",
        "CONNECT x\n",
        "CONNECT 99999999999\n",
        &"x".repeat(100),
    ] {
        let mut stream = guest.connect();
        stream.write_all(greeting.as_bytes()).unwrap();
        // Unread bytes turn the end into an error, which is an end as well.
        assert!(!matches!(stream.read(&mut [0; 1]), Ok(1)), "{greeting}");
    }
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut guest = Guest::new();
    let (mut stream, host) = guest.established();
    let total = 5 * GUEST_ALLOC as usize + 17;
    let sent: Vec<u8> = (0..total).map(|i| (i / 7) as u8).collect();
    let copy = sent.clone();
    let writer = thread::spawn(move || {
        stream.write_all(&copy).unwrap();
        stream
    });
    let (mut got, mut allowed) = (Vec::new(), GUEST_ALLOC as usize);
    while got.len() < total {
        if got.len() == allowed {
            allowed += GUEST_ALLOC as usize;
            let update = Header {
                fwd_cnt: got.len() as u32,
                ..Guest::header(host, 1024, OP_CREDIT_UPDATE)
            };
            guest.send(update, &[]);
        }
        let (header, data) = guest.receive();
        assert_eq!(header.op, OP_RW);
        got.extend(data);
        assert!(got.len() <= allowed, "{} of {allowed}", got.len());
    }
    assert!(got == sent);
    drop(writer.join().unwrap());
}

#[test]
fn the_guest_learns_what_was_taken_and_is_reset_when_it_sends_more_than_it_may() {
    let mut guest = Guest::new();
    let (mut stream, host) = guest.established();
    let packet = vec![3; MAX_PACKET as usize];
    // The host's program reads nothing: its socket's buffer and ours fill up.
    let mut sent = 0u32;
    let mut known = 0u32;
    while sent - known + MAX_PACKET <= BUF_ALLOC {
        guest.send_data(host, 1024, &packet);
        sent += MAX_PACKET;
        while let Some(len) = {
            let (head, _) = guest.receiving[0];
            guest.driver.queues[0].poll_used(head)
        } {
            let (_, at) = guest.receiving.pop_front().unwrap();
            let bytes = guest.driver.read(at, len as usize);
            let header = Header::decode(bytes[..HEADER].try_into().unwrap());
            assert_eq!(header.op, OP_CREDIT_UPDATE);
            known = header.fwd_cnt;
            guest.offer_buffer(at);
        }
    }
    let mut all = vec![0; sent as usize];
    stream.read_exact(&mut all).unwrap();
    assert!(all.iter().all(|&byte| byte == 3));
    // Room again, and the guest is told.
    let header = guest.expect(OP_CREDIT_UPDATE);
    assert!(header.fwd_cnt > known);
    for _ in 0..=2 * BUF_ALLOC / MAX_PACKET + 8 {
        guest.send_data(host, 1024, &packet);
    }
    loop {
        let (header, _) = guest.receive();
        if header.op == OP_RST {
            break;
        }
    }
}

/// Several streams at a time through an echo of the host, in both directions at full speed, with credit
/// as a real driver gives and takes it: nothing stalls, and every byte comes back in order.
#[test]
fn bulk_data_flow_both_ways_on_many_streams_without_a_stall() {
    const STREAMS: usize = 4;
    const TOTAL: u32 = 1 << 20;
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.dir.path().join("vsock_99")).unwrap();
    let echo = thread::spawn(move || {
        let threads: Vec<_> = (0..STREAMS)
            .map(|_| {
                let (mut stream, _) = listener.accept().unwrap();
                thread::spawn(move || {
                    let mut bytes = vec![0; 50_000];
                    loop {
                        let n = stream.read(&mut bytes).unwrap();
                        if n == 0 {
                            return;
                        }
                        stream.write_all(&bytes[..n]).unwrap();
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
    #[derive(Clone, Copy, Default)]
    struct Stream {
        open: bool,
        sent: u32,
        got: u32,
        credit: u32,
        told: u32,
    }
    let byte = |stream: usize, at: u32| (at / 13) as u8 ^ stream as u8;
    let mut streams = [Stream::default(); STREAMS];
    for i in 0..STREAMS {
        guest.send(Guest::header(99, 1000 + i as u32, OP_REQUEST), &[]);
    }
    while streams.iter().any(|stream| stream.got < TOTAL) {
        let mut idle = true;
        for (i, stream) in streams.iter_mut().enumerate() {
            let room = stream.credit - stream.sent;
            let len = room.min(TOTAL - stream.sent).min(40_000);
            if stream.open && len > 0 {
                let data: Vec<u8> = (stream.sent..stream.sent + len).map(|at| byte(i, at)).collect();
                let header = Header {
                    len,
                    fwd_cnt: stream.got,
                    ..Guest::header(99, 1000 + i as u32, OP_RW)
                };
                guest.send(header, &data);
                (stream.sent, stream.told, idle) = (stream.sent + len, stream.got, false);
            }
        }
        // With nothing to send the guest waits, as a program that reads does; else it only looks.
        let head = guest.receiving[0].0;
        if !idle && !guest.driver.queues[0].is_used(head) {
            continue;
        }
        let (header, data) = guest.receive();
        let i = (header.dst_port - 1000) as usize;
        let stream = &mut streams[i];
        stream.open = true;
        stream.credit = header.fwd_cnt + header.buf_alloc;
        for (offset, &got) in data.iter().enumerate() {
            assert_eq!(got, byte(i, stream.got + offset as u32));
        }
        stream.got += data.len() as u32;
        if stream.got - stream.told > GUEST_ALLOC / 2 {
            stream.told = stream.got;
            let header = Header {
                fwd_cnt: stream.got,
                ..Guest::header(99, 1000 + i as u32, OP_CREDIT_UPDATE)
            };
            guest.send(header, &[]);
        }
    }
    for i in 0..STREAMS {
        let done = Header {
            flags: SHUTDOWN_BOTH,
            ..Guest::header(99, 1000 + i as u32, OP_SHUTDOWN)
        };
        guest.send(done, &[]);
    }
    echo.join().unwrap();
}

#[test]
fn half_closed_streams_carry_the_other_half_to_its_end() {
    let mut guest = Guest::new();
    let (mut stream, host) = guest.established();
    let done_sending = Header {
        flags: SHUTDOWN_SEND,
        ..Guest::header(host, 1024, OP_SHUTDOWN)
    };
    guest.send_data(host, 1024, b"question");
    guest.send(done_sending, &[]);
    let mut question = Vec::new();
    stream.read_to_end(&mut question).unwrap();
    assert_eq!(question, b"question");
    stream.write_all(b"answer").unwrap();
    drop(stream);
    assert_eq!(guest.receive().1, b"answer");
    let end = guest.expect(OP_SHUTDOWN);
    assert_ne!(end.flags & SHUTDOWN_SEND, 0);
    let done = Header {
        flags: SHUTDOWN_BOTH,
        ..Guest::header(host, 1024, OP_SHUTDOWN)
    };
    guest.send(done, &[]);
    loop {
        let (header, _) = guest.receive();
        if header.op == OP_RST {
            break;
        }
        assert_eq!(header.op, OP_SHUTDOWN);
    }
}

#[test]
fn a_reset_of_the_device_ends_all_streams_and_new_ones_work() {
    let mut guest = Guest::new();
    let (mut first, _) = guest.established();
    guest.device.reset();
    assert_eq!(first.read(&mut [0; 1]).unwrap(), 0);
    // Who gave up while there was no guest is not passed on.
    drop(guest.connect());
    guest.driver = TestDriver::start(&mut guest.device, guest.features);
    guest.receiving.clear();
    for i in 0..8 {
        guest.offer_buffer(BUFFERS + 0x10000 + u64::from(i * RX_BUFFER));
    }
    guest.established();
}

#[test]
fn many_streams_at_once_and_no_more_than_the_limit() {
    let mut guest = Guest::new();
    let mut streams: Vec<_> = (0..MAX_CONNECTIONS).map(|_| guest.established()).collect();
    for (i, (_, host)) in streams.iter().enumerate() {
        guest.send_data(*host, 1024, &(i as u32).to_le_bytes());
    }
    for (i, (stream, _)) in streams.iter_mut().enumerate() {
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!(u32::from_le_bytes(bytes), i as u32);
    }
    let _listener = UnixListener::bind(guest.dir.path().join("vsock_99")).unwrap();
    guest.send(Guest::header(99, 5, OP_REQUEST), &[]);
    guest.expect(OP_RST);
    // One that the host has closed makes room, whether or not the guest has closed it.
    drop(streams.pop());
    guest.expect(OP_SHUTDOWN);
    guest.send(Guest::header(99, 5, OP_REQUEST), &[]);
    let (first, _) = guest.receive();
    let (second, _) = guest.receive();
    let mut ops = [first.op, second.op];
    ops.sort_unstable();
    assert_eq!(ops, [OP_RESPONSE, OP_RST]);
}

#[test]
fn a_reserved_cid_or_an_impossible_path_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for cid in [0, 2, u64::from(u32::MAX)] {
        let socket = dir.path().join("vsock");
        assert!(matches!(
            VsockDevice::new(&config::Vsock { cid, socket }),
            Err(VsockError::Cid(_))
        ));
    }
    let socket = dir.path().join("missing/vsock");
    let error = VsockDevice::new(&config::Vsock { cid: 3, socket }).err().unwrap();
    assert!(error.to_string().contains("missing/vsock"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the guest sends, the device takes it, and a stream that is opened afterwards works.
    #[test]
    fn any_packets_are_taken(
        packets in prop::collection::vec(
            (0u16..10, any::<u32>(), prop_oneof![Just(0u32), 0u32..100, any::<u32>()], 0usize..3000, any::<bool>(), 0u32..4),
            0..40,
        ),
        address in prop_oneof![BUFFERS..MEMORY, any::<u64>()],
    ) {
        let mut guest = Guest::new();
        let listener = UnixListener::bind(guest.dir.path().join("vsock_99")).unwrap();
        for (op, fwd_cnt, len, data, known, flags) in packets {
            let header = Header {
                len,
                flags,
                fwd_cnt,
                ..Guest::header(if known { 99 } else { 98 }, 5, op)
            };
            guest.send(header, &vec![1; data]);
        }
        let head = guest.driver.queues[1].offer(&[readable(address, 44), readable(address, 5000)]);
        guest.driver.queues[1].wait_used(head);
        guest.driver.queues[1].offer(&[writable(address, 44)]);
        guest.driver.queues[0].offer(&[readable(address, 44)]);
        guest.receiving.clear();
        drop(listener);
        guest.device.reset();
        guest.driver = TestDriver::start(&mut guest.device, guest.features);
        for i in 0..8 {
            guest.offer_buffer(BUFFERS + 0x10000 + u64::from(i * RX_BUFFER));
        }
        guest.established();
    }
}

#[path = "suspend_test.rs"]
mod suspend;
