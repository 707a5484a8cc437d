//! One stream between a guest's port and a Unix socket of the host: flow control by credit (virtio 1.2,
//! 5.10.6.3), half-close, and what is to be told to the guest next.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use super::packet::{
    Header, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_SHUTDOWN, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
};
use crate::virtio::buffers::Buffers;

/// Buffer space that the guest gets for each connection: what it may have sent beyond what the host's
/// program has taken.
pub const BUF_ALLOC: u32 = 256 << 10;

/// Most bytes of data in one packet; Linux uses the same.
pub const MAX_PACKET: u32 = 64 << 10;

/// Longest greeting: `CONNECT 4294967295\n` with room to spare.
const GREETING: usize = 32;

/// Ports of a connection: the host's, the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    pub host: u32,
    pub guest: u32,
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The host's program has not said yet where it wants to go.
    Greeting,
    /// The guest has been, or will be, asked to accept.
    Requested,
    /// Data flow.
    Established,
}

/// What the host's program said.
#[derive(Debug, PartialEq, Eq)]
pub enum Greeting {
    /// Nothing complete yet.
    Incomplete,
    /// It wants this port of the guest.
    Port(u32),
    /// Nothing sensible, or it left.
    Refused,
}

/// The connection is to be ended at once, with a reset to the guest.
#[derive(Debug, PartialEq, Eq)]
pub struct MustReset;

/// What happened to a packet's worth of data for the guest.
pub enum Received {
    /// So many bytes were read into the guest's buffer.
    Data(u32),
    /// Nothing for now, or never again.
    Nothing,
}

/// A connection.
pub struct Connection {
    pub ports: Ports,
    stream: UnixStream,
    phase: Phase,
    /// Edge-triggered readiness of the stream.
    readable: bool,
    writable: bool,

    /// From the guest, not yet taken by the host's program.
    out: VecDeque<u8>,
    received: u32,
    forwarded: u32,
    /// `forwarded` as the guest knows it.
    announced: u32,
    guest_shutdown: u32,

    /// To the guest.
    sent: u32,
    guest_alloc: u32,
    guest_forwarded: u32,
    /// What the host's program will do no more, and how much of it the guest was told.
    host_shutdown: u32,
    host_shutdown_told: u32,

    /// Control packets that are due.
    due_request: bool,
    due_response: bool,
    due_credit: bool,
    due_reset: bool,
    /// Whether it is in the multiplexer's queue of those that have something for the guest.
    pub queued: bool,
}

impl Connection {
    fn new(stream: UnixStream, ports: Ports, phase: Phase) -> Connection {
        Connection {
            ports,
            stream,
            phase,
            readable: false,
            writable: true,
            out: VecDeque::new(),
            received: 0,
            forwarded: 0,
            announced: 0,
            guest_shutdown: 0,
            sent: 0,
            guest_alloc: 0,
            guest_forwarded: 0,
            host_shutdown: 0,
            host_shutdown_told: 0,
            due_request: false,
            due_response: false,
            due_credit: false,
            due_reset: false,
            queued: false,
        }
    }

    /// A program of the host has connected; it has to say which port it wants.
    pub fn from_host(stream: UnixStream, host_port: u32) -> Connection {
        let ports = Ports {
            host: host_port,
            guest: 0,
        };
        Connection::new(stream, ports, Phase::Greeting)
    }

    /// The guest has connected to a listener on the host.
    pub fn from_guest(stream: UnixStream, ports: Ports) -> Connection {
        let mut connection = Connection::new(stream, ports, Phase::Established);
        connection.due_response = true;
        connection
    }

    /// The stream, to be watched.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether the guest's port is not known yet.
    pub fn is_greeting(&self) -> bool {
        self.phase == Phase::Greeting
    }

    /// Whether nothing but the guest's last word is outstanding, so that it may be forgotten.
    pub fn is_over(&self) -> bool {
        self.host_shutdown_told == SHUTDOWN_BOTH
    }

    /// Notes what the stream is ready for.
    pub fn note_ready(&mut self, readable: bool, writable: bool, hung_up: bool) {
        self.readable |= readable | hung_up;
        self.writable |= writable;
        if hung_up {
            self.host_shutdown |= SHUTDOWN_RECEIVE;
        }
    }

    /// Reads the greeting `CONNECT <port>\n` and not a byte more.
    pub fn greet(&mut self) -> io::Result<Greeting> {
        let mut bytes = [0; GREETING];
        let seen = match self.receive_into(&mut bytes, libc::MSG_PEEK) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Greeting::Incomplete),
            other => other?,
        };
        let Some(end) = bytes[..seen].iter().position(|&byte| byte == b'\n') else {
            return Ok(match seen {
                0 | GREETING => Greeting::Refused,
                _ => Greeting::Incomplete,
            });
        };
        let mut line = vec![0; end + 1];
        self.receive_into(&mut line, 0)?;
        let port = std::str::from_utf8(&line[..end])
            .ok()
            .and_then(|text| text.trim_end_matches('\r').strip_prefix("CONNECT "))
            .and_then(|port| port.trim().parse().ok());
        Ok(match port {
            Some(port) => {
                self.ports.guest = port;
                self.phase = Phase::Requested;
                self.due_request = true;
                // Data may have come along with the greeting, and no new edge tells of them.
                self.readable = true;
                Greeting::Port(port)
            }
            None => Greeting::Refused,
        })
    }

    fn receive_into(&self, bytes: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
        // SAFETY: the pointer and length describe a live, writable buffer; the descriptor is open.
        let n = unsafe {
            libc::recv(
                self.stream.as_raw_fd(),
                bytes.as_mut_ptr().cast(),
                bytes.len(),
                flags,
            )
        };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Takes over the guest's credit from any packet.
    pub fn note_credit(&mut self, header: &Header) {
        self.guest_alloc = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
    }

    /// The guest accepted.
    pub fn accepted(&mut self) -> Result<(), MustReset> {
        if self.phase != Phase::Requested || self.due_request {
            return Err(MustReset);
        }
        self.phase = Phase::Established;
        // The first bytes on a new stream, so they always fit its buffer.
        writeln!(&self.stream, "OK {}", self.ports.host).map_err(|_| MustReset)
    }

    /// The guest asks for our buffer space.
    pub fn credit_requested(&mut self) {
        self.due_credit = true;
    }

    /// The guest will not send or receive any more.
    pub fn guest_shuts_down(&mut self, flags: u32) {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            // The host's program learns it by its next write; a stream that is gone already is as good.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.close_when_drained();
    }

    fn close_when_drained(&mut self) {
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && self.out.is_empty() {
            let _ = self.stream.shutdown(Shutdown::Write);
            if self.guest_shutdown == SHUTDOWN_BOTH {
                self.due_reset = true;
            }
        }
    }

    /// Ends the connection at the next opportunity, with a reset to the guest.
    pub fn reset(&mut self) {
        self.due_reset = true;
    }

    /// Data from the guest.
    pub fn take_data(&mut self, data: &Buffers<'_>) -> Result<(), MustReset> {
        let len = data.len();
        let outstanding = u64::from(self.received.wrapping_sub(self.forwarded));
        if self.phase != Phase::Established
            || self.guest_shutdown & SHUTDOWN_SEND != 0
            || outstanding + len > u64::from(BUF_ALLOC)
        {
            return Err(MustReset);
        }
        self.received = self.received.wrapping_add(len as u32);
        let mut written = 0;
        if self.out.is_empty() {
            while self.writable && written < len {
                written += self.send(&data.part(written, len - written))? as u64;
            }
            self.forwarded = self.forwarded.wrapping_add(written as u32);
        }
        if written < len {
            let rest = data.part(written, len - written);
            let mut bytes = vec![0; rest.len() as usize];
            rest.copy_to(&mut bytes);
            self.out.extend(bytes);
        }
        Ok(())
    }

    /// Passes on what waited for the host's program.
    pub fn flush(&mut self) -> Result<(), MustReset> {
        while self.writable && !self.out.is_empty() {
            let (front, _) = self.out.as_slices();
            let mut front = front.to_vec();
            let n = self.send(&Buffers::from_slice(&mut front))?;
            self.out.drain(..n);
            self.forwarded = self.forwarded.wrapping_add(n as u32);
        }
        if self.out.is_empty() {
            // What was needed once need not be kept.
            self.out.shrink_to(MAX_PACKET as usize);
        }
        self.close_when_drained();
        Ok(())
    }

    /// Writes what the stream takes; 0 (and not writable any more) when it is full.
    fn send(&mut self, data: &Buffers<'_>) -> Result<usize, MustReset> {
        match data.take_with(|vectors| {
            let message = message(vectors);
            // SAFETY: the message's vectors cover memory that `data` keeps mapped for this call.
            unsafe { libc::sendmsg(self.stream.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) }
        }) {
            Ok(n) => Ok(n),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.writable = false;
                Ok(0)
            }
            Err(_) => Err(MustReset),
        }
    }

    /// How much the guest can take now.
    fn credit(&self) -> u32 {
        self.guest_alloc
            .saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Whether data may be there for the guest, which has room for them.
    pub fn may_receive(&self) -> bool {
        self.phase == Phase::Established
            && !self.due_response
            && self.readable
            && self.host_shutdown & SHUTDOWN_SEND == 0
            && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
            && self.credit() > 0
    }

    /// Reads data for the guest into its buffer.
    pub fn receive(&mut self, room: &Buffers<'_>) -> Result<Received, MustReset> {
        let want = room.part(0, u64::from(self.credit().min(MAX_PACKET)));
        match want.fill_with(|vectors| {
            let mut message = message(vectors);
            // SAFETY: the message's vectors cover memory that `want` keeps mapped for this call.
            unsafe { libc::recvmsg(self.stream.as_raw_fd(), &raw mut message, 0) }
        }) {
            Ok(0) => {
                self.host_shutdown |= SHUTDOWN_SEND;
                Ok(Received::Nothing)
            }
            Ok(n) => {
                self.sent = self.sent.wrapping_add(n as u32);
                Ok(Received::Data(n as u32))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(Received::Nothing)
            }
            Err(_) => Err(MustReset),
        }
    }

    /// Whether the guest should learn how much was taken: it thinks that less than half of our space is
    /// free, and would wait for ever once it thinks that none is.
    fn owes_credit(&self) -> bool {
        let known_free = BUF_ALLOC.saturating_sub(self.received.wrapping_sub(self.announced));
        self.phase == Phase::Established && self.announced != self.forwarded && known_free < BUF_ALLOC / 2
    }

    fn owes_shutdown(&self) -> bool {
        // Told only after all data: that the program hung up while data remain is told with their end.
        self.phase == Phase::Established
            && self.host_shutdown & SHUTDOWN_SEND != 0
            && self.host_shutdown != self.host_shutdown_told
    }

    /// Whether there is anything for the guest.
    pub fn has_work(&self) -> bool {
        self.due_request
            || self.due_response
            || self.due_credit
            || self.due_reset
            || self.owes_credit()
            || self.owes_shutdown()
            || self.may_receive()
    }

    /// Whether the next packet for the guest ends the connection.
    pub fn ends_next(&self) -> bool {
        self.due_reset
    }

    /// The next control packet for the guest: operation and flags.
    pub fn next_control(&mut self) -> Option<(u16, u32)> {
        if self.due_reset {
            Some((OP_RST, 0))
        } else if std::mem::take(&mut self.due_request) {
            Some((OP_REQUEST, 0))
        } else if std::mem::take(&mut self.due_response) {
            Some((OP_RESPONSE, 0))
        } else if std::mem::take(&mut self.due_credit) || self.owes_credit() {
            Some((OP_CREDIT_UPDATE, 0))
        } else if self.owes_shutdown() {
            self.host_shutdown_told = self.host_shutdown;
            Some((OP_SHUTDOWN, self.host_shutdown))
        } else {
            None
        }
    }

    /// Our side of the flow control, as every packet carries it; the guest knows it from now on.
    pub fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        (BUF_ALLOC, self.forwarded)
    }
}

/// A message of these pieces: no name, no control data.
fn message(vectors: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    message
}
