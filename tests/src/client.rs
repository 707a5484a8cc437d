//! The client outside: asks for the page and appends a line to the ledger every 10 ms, open loop, and
//! tells what it saw.
//!
//! Open loop: a request is due at its tick whether or not the one before was answered, so that an
//! interruption cannot hide behind a client that politely waits. Requests go down one connection, one
//! behind the other; where it breaks they have failed and a new one is opened, as a load balancer does.
//! What cannot be answered in time has failed and is not tried again: a backlog would measure the guest's
//! throughput instead of its silence.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use serde::{Deserialize, Serialize};

use crate::outside::Watch;

/// Time between two requests to one service, unless told otherwise.
pub const TICK: Duration = Duration::from_millis(10);
/// An answer later than this after its tick is late.
pub const LATE: Duration = Duration::from_millis(100);
/// A request that is not answered this long after its tick has failed, and a connection on which nothing came
/// for so long while an answer was owed is given up.
const GIVE_UP: Duration = Duration::from_secs(2);
/// A connection that takes longer is given up for a new one: the kernel's own next try would wait a second.
pub(crate) const CONNECT_LIMIT: Duration = Duration::from_millis(500);
/// Pause after a connection was refused.
pub(crate) const CONNECT_PAUSE: Duration = Duration::from_millis(50);
/// Requests down one connection: a server may end it after a thousand, as nginx does.
const MAX_REQUESTS: u32 = 900;

/// What the client saw of one service in one phase of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Seen {
    /// Requests sent.
    pub sent: u64,
    /// Requests answered as they should be.
    pub answered: u64,
    /// Answered, but later than [`LATE`] after their tick.
    pub late: u64,
    /// Not answered: reset, refused, timed out, or a wrong answer.
    pub failed: u64,
    /// Longest time between two answers, in milliseconds: the interruption as the client sees it.
    pub interruption_ms: f64,
    /// Median time from tick to answer, in milliseconds.
    pub median_ms: f64,
}

/// What the client saw of both services in one phase of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Phase {
    /// The page.
    pub page: Seen,
    /// The ledger.
    pub ledger: Seen,
}

/// What a run saw.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// By the phase's name.
    pub phases: BTreeMap<String, Phase>,
    /// Ledger lines that were acknowledged.
    pub acknowledged: u64,
    /// Acknowledged lines that the ledger held at the end.
    pub found: u64,
    /// Acknowledged lines that it did not hold, at most 100 of them.
    pub lost: Vec<u64>,
}

impl Report {
    /// An error where an acknowledged line was not found, or none was ever acknowledged.
    pub fn ensure_nothing_lost(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.acknowledged > 0, "the ledger never acknowledged a line");
        anyhow::ensure!(
            self.lost.is_empty() && self.found == self.acknowledged,
            "of {} acknowledged ledger lines {} were found, lost are {:?}",
            self.acknowledged,
            self.found,
            self.lost
        );
        Ok(())
    }
}

/// Which service a load goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    Page,
    Ledger,
}

/// A request that waits for its answer.
#[derive(Clone, Copy)]
struct Due {
    tick: Instant,
    line: u64,
}

impl Due {
    fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.tick) > GIVE_UP
    }
}

struct Connection {
    stream: TcpStream,
    opened: Instant,
    /// Something was written to it: it is established.
    established: bool,
    /// Requests given to it so far.
    requests: u32,
    /// When something came, or the first request was given to it after all were answered.
    heard: Instant,
    /// Those that wait for their answers, oldest first.
    waiting: VecDeque<Due>,
    /// How many of them, from the oldest, have failed already and hold up nobody but those behind them.
    overdue: usize,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
}

/// The load on one service.
struct Load {
    service: Service,
    address: SocketAddr,
    run: String,
    every: Duration,
    next_tick: Instant,
    next_line: u64,
    queue: VecDeque<Due>,
    connections: BTreeMap<usize, Connection>,
    next_token: usize,
    not_before: Instant,
    acknowledged: BTreeSet<u64>,
    seen: Seen,
    delays_us: Vec<u64>,
    last_answer: Option<Instant>,
}

impl Load {
    fn new(service: Service, address: SocketAddr, run: &str, every: Duration, now: Instant) -> Load {
        Load {
            service,
            address,
            run: run.to_owned(),
            every,
            next_tick: now,
            next_line: 1,
            queue: VecDeque::new(),
            connections: BTreeMap::new(),
            next_token: if service == Service::Page { 0 } else { 1 },
            not_before: now,
            acknowledged: BTreeSet::new(),
            seen: Seen::default(),
            delays_us: Vec::new(),
            last_answer: None,
        }
    }

    /// Queues what is due and sends what can be sent.
    fn tick(&mut self, poll: &Poll, now: Instant) {
        while self.next_tick <= now {
            self.queue.push_back(Due {
                tick: self.next_tick,
                line: self.next_line,
            });
            self.next_line += 1;
            self.next_tick += self.every;
            self.seen.sent += 1;
        }
        let hopeless: Vec<usize> = self
            .connections
            .iter()
            .filter(|(_, c)| {
                let silent = !c.waiting.is_empty() && now.duration_since(c.heard) > GIVE_UP;
                silent || !c.established && now.duration_since(c.opened) > CONNECT_LIMIT
            })
            .map(|(token, _)| *token)
            .collect();
        for token in hopeless {
            self.fail(token, now);
        }
        for connection in self.connections.values_mut() {
            let late = connection.waiting.iter().skip(connection.overdue);
            let late = late.take_while(|due| due.is_over(now)).count();
            connection.overdue += late;
            self.seen.failed += late as u64;
        }
        while self.queue.front().is_some_and(|due| due.is_over(now)) {
            self.queue.pop_front();
            self.seen.failed += 1;
        }
        if self.queue.is_empty() {
            return;
        }
        // The newest; older ones only wait for what they still owe.
        let newest = self.connections.iter().next_back();
        let token = match newest.filter(|(_, c)| c.requests < MAX_REQUESTS) {
            Some((token, _)) => *token,
            None if now < self.not_before => return,
            None => match self.connect(poll, now) {
                Ok(token) => token,
                Err(_) => {
                    self.not_before = now + CONNECT_PAUSE;
                    return;
                }
            },
        };
        self.drive(token, now);
        // Only an established connection gets requests, so that one that never comes costs none.
        if !self.connections.get(&token).is_some_and(|c| c.established) {
            return;
        }
        while let Some(due) = self.queue.pop_front() {
            let text = self.request(due);
            if let Some(connection) = self.connections.get_mut(&token) {
                connection.requests += 1;
                if connection.waiting.is_empty() {
                    connection.heard = now;
                }
                connection.waiting.push_back(due);
                connection.outgoing.extend_from_slice(&text);
            }
        }
        self.drive(token, now);
    }

    fn request(&self, due: Due) -> Vec<u8> {
        match self.service {
            Service::Page => b"GET / HTTP/1.1\r\nHost: guest\r\n\r\n".to_vec(),
            Service::Ledger => format!("{} {}\n", self.run, due.line).into_bytes(),
        }
    }

    fn connect(&mut self, poll: &Poll, now: Instant) -> io::Result<usize> {
        let mut stream = TcpStream::connect(self.address)?;
        let token = self.next_token;
        self.next_token += 2;
        poll.registry()
            .register(&mut stream, Token(token), Interest::READABLE | Interest::WRITABLE)?;
        let connection = Connection {
            stream,
            opened: now,
            established: false,
            requests: 0,
            heard: now,
            waiting: VecDeque::new(),
            overdue: 0,
            outgoing: Vec::new(),
            incoming: Vec::new(),
        };
        self.connections.insert(token, connection);
        Ok(token)
    }

    /// Ends a connection; the requests on it have failed.
    fn fail(&mut self, token: usize, now: Instant) {
        if let Some(connection) = self.connections.remove(&token) {
            self.seen.failed += (connection.waiting.len() - connection.overdue) as u64;
            if !connection.established {
                self.not_before = now + CONNECT_PAUSE;
            }
        }
    }

    /// Writes and reads what the connection can take and has.
    fn drive(&mut self, token: usize, now: Instant) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        let (answers, end) = exchange(connection, self.service);
        if answers > 0 {
            connection.heard = now;
        }
        let answered: Vec<Due> = connection.waiting.drain(..answers).collect();
        let overdue = connection.overdue.min(answers);
        connection.overdue -= overdue;
        let spent = connection.requests >= MAX_REQUESTS && connection.waiting.is_empty();
        for (place, due) in answered.into_iter().enumerate() {
            self.answered(due, now, place < overdue);
        }
        if end.is_err() {
            self.fail(token, now);
        } else if spent {
            self.connections.remove(&token);
        }
    }

    /// `overdue`: it has failed before, and is told as that; a line is on disk all the same.
    fn answered(&mut self, due: Due, now: Instant, overdue: bool) {
        let delay = now.duration_since(due.tick);
        if !overdue {
            self.seen.answered += 1;
            self.delays_us.push(delay.as_micros() as u64);
        }
        if delay > LATE && !overdue {
            self.seen.late += 1;
        }
        if let Some(last) = self.last_answer {
            let gap = now.duration_since(last).as_secs_f64() * 1000.0;
            self.seen.interruption_ms = self.seen.interruption_ms.max(gap);
        }
        self.last_answer = Some(now);
        if self.service == Service::Ledger {
            self.acknowledged.insert(due.line);
        }
    }

    /// Ends a phase: what was seen since the last call. A gap that is still open counts in it.
    fn take_seen(&mut self, now: Instant) -> Seen {
        let mut seen = std::mem::take(&mut self.seen);
        if let Some(last) = self.last_answer {
            let gap = now.duration_since(last).as_secs_f64() * 1000.0;
            seen.interruption_ms = seen.interruption_ms.max(gap);
        }
        self.delays_us.sort_unstable();
        seen.median_ms = self
            .delays_us
            .get(self.delays_us.len() / 2)
            .map_or(0.0, |us| *us as f64 / 1000.0);
        self.delays_us.clear();
        seen
    }
}

/// How many requests were answered as they should be, at most as many as wait; an error where the connection
/// is at its end or an answer is wrong.
fn exchange(connection: &mut Connection, service: Service) -> (usize, io::Result<()>) {
    let end = transfer(connection);
    let mut answers = 0;
    while answers < connection.waiting.len() {
        let (end, start): (_, &[u8]) = match service {
            Service::Page => (page_end(&connection.incoming), b"HTTP/1.1 200 "),
            Service::Ledger => {
                let newline = connection.incoming.iter().position(|b| *b == b'\n');
                (newline.map(|at| at + 1), b"ok ")
            }
        };
        let Some(end) = end else { break };
        if !connection.incoming.starts_with(start) {
            return (answers, Err(ErrorKind::InvalidData.into()));
        }
        connection.incoming.drain(..end);
        answers += 1;
    }
    (answers, end)
}

/// Writes and reads what can be written and read now.
fn transfer(connection: &mut Connection) -> io::Result<()> {
    if !connection.established {
        if let Some(error) = connection.stream.take_error()? {
            return Err(error);
        }
        match connection.stream.peer_addr() {
            Ok(_) => connection.established = true,
            Err(e) if e.kind() == ErrorKind::NotConnected => return Ok(()),
            Err(e) => return Err(e),
        }
        // Requests are small and shall not wait for each other.
        connection.stream.set_nodelay(true)?;
    }
    while !connection.outgoing.is_empty() {
        match connection.stream.write(&connection.outgoing) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => {
                connection.outgoing.drain(..n);
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => return Err(e),
        }
    }
    let mut buffer = [0u8; 4096];
    loop {
        match connection.stream.read(&mut buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => connection.incoming.extend_from_slice(&buffer[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e),
        }
        if connection.incoming.len() > 1 << 20 {
            return Err(ErrorKind::InvalidData.into());
        }
    }
}

/// End of a complete HTTP answer with a `Content-Length`.
fn page_end(bytes: &[u8]) -> Option<usize> {
    let head = bytes.windows(4).position(|w| w == b"\r\n\r\n")? + 4;
    let text = std::str::from_utf8(&bytes[..head]).ok()?;
    let length: usize = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0);
    (bytes.len() >= head + length).then_some(head + length)
}

/// The whole client: both loads, one event loop.
pub struct Client {
    poll: Poll,
    loads: [Load; 2],
    report: Report,
    phase: String,
    run: String,
}

impl Client {
    /// A client of `page` (HTTP) and `ledger`, `every` being the time between two requests to one of them; `run`
    /// marks its lines and has no white space.
    pub fn new(page: SocketAddr, ledger: SocketAddr, run: &str, every: Duration) -> io::Result<Client> {
        let now = Instant::now();
        Ok(Client {
            poll: Poll::new()?,
            loads: [
                Load::new(Service::Page, page, run, every, now),
                Load::new(Service::Ledger, ledger, run, every, now),
            ],
            report: Report::default(),
            phase: "start".to_owned(),
            run: run.to_owned(),
        })
    }

    /// Ends the run: reads the whole ledger back and looks for every acknowledged line.
    pub fn finish(mut self) -> io::Result<Report> {
        self.mark("end");
        let held = read_ledger(self.loads[1].address, &self.run)?;
        let acknowledged = &self.loads[1].acknowledged;
        self.report.acknowledged = acknowledged.len() as u64;
        self.report.found = acknowledged.intersection(&held).count() as u64;
        self.report.lost = acknowledged.difference(&held).take(100).copied().collect();
        Ok(self.report)
    }
}

impl Watch for Client {
    fn run_until(&mut self, until: Instant) -> io::Result<()> {
        let mut events = Events::with_capacity(256);
        loop {
            let now = Instant::now();
            if now >= until {
                return Ok(());
            }
            for load in &mut self.loads {
                load.tick(&self.poll, now);
            }
            let wake = self
                .loads
                .iter()
                .map(|l| l.next_tick)
                .min()
                .unwrap_or(until)
                .min(until);
            match self
                .poll
                .poll(&mut events, Some(wake.saturating_duration_since(Instant::now())))
            {
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                other => other?,
            }
            let now = Instant::now();
            for event in &events {
                let token = event.token().0;
                self.loads[token % 2].drive(token, now);
            }
        }
    }

    fn mark(&mut self, phase: &str) {
        let now = Instant::now();
        let seen = Phase {
            page: self.loads[0].take_seen(now),
            ledger: self.loads[1].take_seen(now),
        };
        self.report
            .phases
            .insert(std::mem::replace(&mut self.phase, phase.to_owned()), seen);
    }
}

/// The lines of `run` that the ledger holds.
fn read_ledger(address: SocketAddr, run: &str) -> io::Result<BTreeSet<u64>> {
    let mut stream = std::net::TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(b"dump\n")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(of, _)| *of == run)
        .filter_map(|(_, number)| number.parse().ok())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::sync::{Arc, Mutex};

    /// A page and a ledger that fall silent between two instants, and a ledger that loses one line.
    fn serve(silent: std::ops::Range<Duration>, lose: Option<u64>) -> (SocketAddr, SocketAddr) {
        let start = Instant::now();
        let wait = move || {
            let at = start.elapsed();
            if silent.contains(&at) {
                std::thread::sleep(silent.end - at);
            }
        };
        let page = TcpListener::bind("127.0.0.1:0").unwrap();
        let ledger = TcpListener::bind("127.0.0.1:0").unwrap();
        let addresses = (page.local_addr().unwrap(), ledger.local_addr().unwrap());
        let wait_page = wait.clone();
        std::thread::spawn(move || {
            for stream in page.incoming().flatten() {
                let wait = wait_page.clone();
                std::thread::spawn(move || {
                    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                    while let Some(Ok(line)) = lines.next() {
                        if line.is_empty() {
                            wait();
                            let _ = (&stream).write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
                        }
                    }
                });
            }
        });
        let held = Arc::new(Mutex::new(String::new()));
        std::thread::spawn(move || {
            for stream in ledger.incoming().flatten() {
                let (wait, held) = (wait.clone(), held.clone());
                std::thread::spawn(move || {
                    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                    while let Some(Ok(line)) = lines.next() {
                        if line == "dump" {
                            let _ = (&stream).write_all(held.lock().unwrap().as_bytes());
                            return;
                        }
                        wait();
                        let number: u64 = line.split(' ').nth(1).unwrap().parse().unwrap();
                        if Some(number) != lose {
                            held.lock().unwrap().push_str(&format!("{line}\n"));
                        }
                        let _ = (&stream).write_all(b"ok 1\n");
                    }
                });
            }
        });
        addresses
    }

    #[test]
    fn an_interruption_is_seen_and_every_line_is_found() {
        let ms = Duration::from_millis;
        let (page, ledger) = serve(ms(200)..ms(600), None);
        let mut client = Client::new(page, ledger, "run", TICK).unwrap();
        client.run_until(Instant::now() + ms(1000)).unwrap();
        client.mark("after");
        client.run_until(Instant::now() + ms(300)).unwrap();
        let report = client.finish().unwrap();
        let seen = &report.phases["start"];
        assert!(
            seen.page.interruption_ms > 300.0 && seen.ledger.interruption_ms > 300.0,
            "{seen:?}"
        );
        assert!(
            report.phases["after"].page.interruption_ms < seen.page.interruption_ms,
            "{report:?}"
        );
        assert!(seen.ledger.late > 0 && report.acknowledged > 50, "{report:?}");
        assert_eq!((report.found, report.lost.len()), (report.acknowledged, 0));
    }

    #[test]
    fn a_lost_line_is_named() {
        let (page, ledger) = serve(Duration::ZERO..Duration::ZERO, Some(7));
        let mut client = Client::new(page, ledger, "run", TICK).unwrap();
        client
            .run_until(Instant::now() + Duration::from_millis(300))
            .unwrap();
        let report = client.finish().unwrap();
        assert_eq!(report.lost, [7]);
        assert_eq!(report.found + 1, report.acknowledged);
    }
}
