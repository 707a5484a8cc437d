//! The multiplexer between the device's rings and the host's Unix sockets: one thread, edge-triggered.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, Greeting, MAX_PACKET, Ports, Received};
use super::events::Events;
use super::packet::{
    HEADER, HOST_CID, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW,
    OP_SHUTDOWN, TYPE_STREAM,
};
use crate::virtio::buffers::Buffers;
use crate::virtio::device::QueueProgress;
use crate::virtio::ring::{Chain, Ring};
use crate::virtio::worker::{Stop, Work, drain, poll, poll_entry};

/// Most connections at a time. With 256 KiB of buffer each, the guest can make us keep 64 MiB at most.
pub(super) const MAX_CONNECTIONS: usize = 256;

/// Most resets that wait for the guest to offer buffers. A guest that provokes more misses some.
const MAX_RESETS: usize = 256;

/// Host ports of connections that the host began, so that they differ from well-known ones.
pub(super) const FIRST_HOST_PORT: u32 = 1 << 30;

/// How long accepting rests after it failed.
const ACCEPT_RETRY_MS: i32 = 1000;

const STOP: u64 = 0;
const RX: u64 = 1;
const TX: u64 = 2;
const LISTENER: u64 = 3;
const EVENT: u64 = 4;
const FIRST_CONNECTION: u64 = 16;

/// The running multiplexer.
pub(super) struct Mux {
    cid: u64,
    socket: PathBuf,
    listener: Arc<UnixListener>,
    listening: bool,
    /// Accepting failed (too many open files): tried again after a while.
    accept_failed: bool,
    epoll: Epoll,
    rx: Ring,
    tx: Ring,
    events: Events,
    connections: HashMap<u64, Connection>,
    by_ports: HashMap<Ports, u64>,
    /// Connections that have something for the guest, in turn.
    ready: VecDeque<u64>,
    resets: VecDeque<Header>,
    next_id: u64,
    next_port: u32,
}

impl Work for Mux {
    /// Connections stay as they are when it ends; dropping it ends them.
    fn run(&mut self, stop: &Stop) {
        if let Err(error) = self.work(stop) {
            tracing::error!(%error, "the vsock device stopped working");
        }
        // The next thread has a stop of its own; what was watched besides stays watched.
        if let Err(error) = self
            .epoll
            .ctl(ControlOperation::Delete, stop.as_raw_fd(), EpollEvent::default())
        {
            tracing::error!(%error, "the vsock device's old thread stays watched");
        }
    }
}

impl Mux {
    pub(super) fn new(
        cid: u64,
        socket: &Path,
        listener: Arc<UnixListener>,
        rx: Ring,
        tx: Ring,
        events: Events,
        next_port: u32,
    ) -> io::Result<Mux> {
        let mux = Mux {
            cid,
            socket: socket.to_owned(),
            listener,
            listening: false,
            accept_failed: false,
            epoll: Epoll::new()?,
            rx,
            tx,
            events,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_id: FIRST_CONNECTION,
            next_port,
        };
        mux.watch(mux.rx.event().as_raw_fd(), EventSet::IN, RX)?;
        mux.watch(mux.tx.event().as_raw_fd(), EventSet::IN, TX)?;
        mux.watch(mux.events.ring().event().as_raw_fd(), EventSet::IN, EVENT)?;
        Ok(mux)
    }

    /// How far the queues are.
    pub(super) fn progress(&self) -> Vec<QueueProgress> {
        [&self.rx, &self.tx, self.events.ring()]
            .map(Ring::progress)
            .into()
    }

    /// Host port of the next connection that the host begins.
    pub(super) fn next_port(&self) -> u32 {
        self.next_port
    }

    fn work(&mut self, stop: &Stop) -> io::Result<()> {
        self.watch(stop.as_raw_fd(), EventSet::IN, STOP)?;
        let mut events = vec![EpollEvent::default(); 64];
        loop {
            self.update_listening()?;
            let quiet = self.events.tell_transport_reset();
            self.take_from_guest();
            if quiet.is_none() {
                self.give_to_guest();
            }
            let timeout = match (quiet, self.accept_failed) {
                (Some(quiet), _) => quiet.as_millis().saturating_add(1).min(1000) as i32,
                (None, true) => ACCEPT_RETRY_MS,
                (None, false) => -1,
            };
            let waited = self.epoll.wait(timeout, &mut events);
            self.accept_failed = false;
            let n = match waited {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            for event in &events[..n] {
                match event.data() {
                    STOP => return Ok(()),
                    RX => drain(self.rx.event()),
                    TX => drain(self.tx.event()),
                    EVENT => drain(self.events.ring().event()),
                    LISTENER => self.accept(),
                    id => self.stream_ready(id, event.event_set()),
                }
            }
        }
    }

    fn watch(&self, fd: RawFd, events: EventSet, id: u64) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(events, id))
    }

    /// Accepts only while there is room: the rest waits in the listener's backlog.
    fn update_listening(&mut self) -> io::Result<()> {
        if self.connections.len() >= MAX_CONNECTIONS {
            self.forget_one();
        }
        let wanted = self.connections.len() < MAX_CONNECTIONS && !self.accept_failed;
        if wanted != self.listening {
            let operation = match wanted {
                true => ControlOperation::Add,
                false => ControlOperation::Delete,
            };
            let fd = self.listener.as_raw_fd();
            self.epoll
                .ctl(operation, fd, EpollEvent::new(EventSet::IN, LISTENER))?;
            self.listening = wanted;
        }
        Ok(())
    }

    /// Ends one connection that only the guest has not closed.
    fn forget_one(&mut self) {
        let over = self
            .connections
            .iter()
            .find(|(_, c)| c.is_over())
            .map(|(&id, _)| id);
        if let Some(id) = over {
            self.end(id, true);
        }
    }

    fn accept(&mut self) {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    self.accept_failed = true;
                    tracing::warn!(%error, socket = %self.socket.display(), "cannot accept a connection");
                }
                return;
            }
        };
        // Who connected before the guest was up, and gave up since, is not passed on to it.
        let mut fds = [poll_entry(stream.as_raw_fd(), libc::POLLRDHUP)];
        if poll(&mut fds, Some(std::time::Duration::ZERO)).is_err() || fds[0].revents != 0 {
            return;
        }
        let ports = Ports {
            host: self.free_port(),
            guest: 0,
        };
        self.add(Connection::from_host(stream, ports.host));
    }

    /// A host port that no connection uses.
    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = FIRST_HOST_PORT | (port.wrapping_add(1) % FIRST_HOST_PORT);
            if self.connections.values().all(|c| c.ports.host != port) {
                return port;
            }
        }
    }

    fn add(&mut self, connection: Connection) -> Option<u64> {
        let id = self.next_id;
        self.next_id += 1;
        let fd = connection.stream().as_raw_fd();
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if let Err(error) = connection
            .stream()
            .set_nonblocking(true)
            .and_then(|()| self.watch(fd, events, id))
        {
            tracing::warn!(%error, "cannot watch a connection");
            return None;
        }
        if !connection.is_greeting() {
            self.by_ports.insert(connection.ports, id);
        }
        self.connections.insert(id, connection);
        self.enqueue(id);
        Some(id)
    }

    /// Puts a connection among those that have something for the guest, if it has.
    fn enqueue(&mut self, id: u64) {
        if let Some(connection) = self.connections.get_mut(&id)
            && !connection.queued
            && connection.has_work()
        {
            connection.queued = true;
            self.ready.push_back(id);
        }
    }

    /// Ends a connection, telling the guest where it does not know.
    fn end(&mut self, id: u64, tell: bool) {
        let Some(connection) = self.connections.remove(&id) else {
            return;
        };
        if self.by_ports.get(&connection.ports) == Some(&id) {
            self.by_ports.remove(&connection.ports);
            if tell {
                self.reset(connection.ports);
            }
        }
    }

    fn reset(&mut self, ports: Ports) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(self.header(ports, OP_RST));
        }
    }

    fn header(&self, ports: Ports, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: TYPE_STREAM,
            op,
            ..Header::default()
        }
    }

    fn stream_ready(&mut self, id: u64, events: EventSet) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        connection.note_ready(
            events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::ERROR),
            events.contains(EventSet::OUT),
            events.contains(EventSet::HANG_UP),
        );
        if connection.is_greeting() {
            match connection.greet() {
                Ok(Greeting::Incomplete) => return,
                Ok(Greeting::Port(_)) => {
                    let ports = connection.ports;
                    self.by_ports.insert(ports, id);
                }
                Ok(Greeting::Refused) | Err(_) => return self.end(id, false),
            }
        } else if connection.flush().is_err() {
            return self.end(id, true);
        }
        self.enqueue(id);
    }

    /// Handles what the guest has sent, a ring full at most.
    fn take_from_guest(&mut self) {
        for _ in 0..self.tx.size() {
            let Some(chain) = self.tx.next_chain() else { break };
            self.packet(&chain);
            self.tx.complete(chain.head, 0);
        }
        self.tx.notify_driver();
        self.tx.await_more();
    }

    fn packet(&mut self, chain: &Chain) {
        let mut bytes = [0; HEADER];
        let memory = self.tx.memory().clone();
        let Some(packet) = Buffers::from_guest(&memory, &chain.readable) else {
            return;
        };
        if packet.copy_to(&mut bytes) < HEADER {
            return;
        }
        let header = Header::decode(&bytes);
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            return;
        }
        if header.kind != TYPE_STREAM {
            if header.op != OP_RST {
                self.reset(ports);
            }
            return;
        }
        let Some(&id) = self.by_ports.get(&ports) else {
            match header.op {
                OP_RST => {}
                OP_REQUEST => self.connect(&header, ports),
                _ => self.reset(ports),
            }
            return;
        };
        let data = packet.part(HEADER as u64, u64::from(header.len));
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        connection.note_credit(&header);
        let handled = match header.op {
            OP_RST => return self.end(id, false),
            OP_RESPONSE => connection.accepted(),
            OP_RW if data.len() == u64::from(header.len) && header.len <= MAX_PACKET => {
                connection.take_data(&data)
            }
            OP_SHUTDOWN => {
                connection.guest_shuts_down(header.flags);
                Ok(())
            }
            OP_CREDIT_UPDATE => Ok(()),
            OP_CREDIT_REQUEST => {
                connection.credit_requested();
                Ok(())
            }
            // A second request for the same ports, or nothing known.
            _ => Err(super::connection::MustReset),
        };
        match handled {
            Ok(()) => self.enqueue(id),
            Err(_) => self.end(id, true),
        }
    }

    /// The guest connects to a listener of the host.
    fn connect(&mut self, header: &Header, ports: Ports) {
        if self.connections.len() >= MAX_CONNECTIONS {
            self.forget_one();
        }
        if self.connections.len() >= MAX_CONNECTIONS {
            return self.reset(ports);
        }
        let mut path = self.socket.as_os_str().to_owned();
        path.push(format!("_{}", ports.host));
        let stream = match connect_at_once(Path::new(&path)) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(%error, path = %Path::new(&path).display(), "the guest connects to nobody");
                return self.reset(ports);
            }
        };
        let mut connection = Connection::from_guest(stream, ports);
        connection.note_credit(header);
        if self.add(connection).is_none() {
            self.reset(ports);
        }
    }

    /// Fills the guest's buffers while there are any and there is something for it.
    fn give_to_guest(&mut self) {
        let mut given = false;
        for _ in 0..self.rx.size() {
            if self.resets.is_empty() && self.ready.is_empty() {
                break;
            }
            let Some(chain) = self.rx.next_chain() else {
                // Only now, so that the driver is not asked to notify buffers that nobody needs.
                if self.rx.arm() {
                    continue;
                }
                break;
            };
            given |= self.fill(&chain);
        }
        if given {
            self.rx.notify_driver();
        }
        if !(self.resets.is_empty() && self.ready.is_empty()) {
            self.rx.await_more();
        }
    }

    /// Fills one buffer of the guest, or puts it back if there turns out to be nothing for it.
    fn fill(&mut self, chain: &Chain) -> bool {
        let memory = self.rx.memory().clone();
        let Some(buffer) =
            Buffers::from_guest(&memory, &chain.writable).filter(|buffer| buffer.len() > HEADER as u64)
        else {
            // Not a buffer that a packet fits into: the driver gets it back empty.
            self.rx.complete(chain.head, 0);
            return true;
        };
        let Some(header) = self.next_packet(&buffer) else {
            self.rx.put_back();
            return false;
        };
        buffer.copy_from(&header.encode());
        self.rx.complete(chain.head, HEADER as u32 + header.len);
        true
    }

    /// Finds the next packet for the guest; its data are in `buffer` behind the header then.
    fn next_packet(&mut self, buffer: &Buffers<'_>) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        let room = buffer.part(HEADER as u64, u64::from(MAX_PACKET));
        while let Some(id) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            connection.queued = false;
            let ports = connection.ports;
            let ends = connection.ends_next();
            let mut packet = connection.next_control().map(|(op, flags)| (op, flags, 0));
            if packet.is_none() && connection.may_receive() {
                match connection.receive(&room) {
                    Ok(Received::Data(len)) => packet = Some((OP_RW, 0, len)),
                    Ok(Received::Nothing) => {}
                    Err(_) => connection.reset(),
                }
            }
            let credit = packet.is_some().then(|| connection.announce());
            if ends {
                self.end(id, false);
            } else {
                self.enqueue(id);
            }
            if let (Some((op, flags, len)), Some((buf_alloc, fwd_cnt))) = (packet, credit) {
                return Some(Header {
                    len,
                    flags,
                    buf_alloc,
                    fwd_cnt,
                    ..self.header(ports, op)
                });
            }
        }
        None
    }
}

/// Connects without waiting: a listener whose backlog is full counts as none.
fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    use std::os::fd::{FromRawFd, OwnedFd};
    use std::os::unix::ffi::OsStrExt;

    // SAFETY: socket takes no pointers.
    let fd = unsafe {
        libc::socket(
            libc::AF_UNIX,
            libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            0,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the path of the socket is too long",
        ));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    // SAFETY: the address is a live sockaddr_un of the size given.
    let connected = unsafe {
        libc::connect(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_un>() as libc::socklen_t,
        )
    };
    if connected < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd.into())
}
