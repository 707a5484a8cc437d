//! The counter: a program whose state is in its memory and in a TCP connection, and nowhere else.
//!
//! It stands for any program that no reboot can be hidden from. A client sends a numbered line every 50 ms; the
//! answer repeats the number, and tells how many lines the program has taken since it was started, its process
//! ID and the boot ID of its kernel. Whatever is lost or begun anew is seen in that: a line, an answer, the
//! connection, the process, the kernel.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use serde::{Deserialize, Serialize};

use crate::client::{CONNECT_LIMIT, CONNECT_PAUSE};
use crate::outside::Watch;

/// Time between two lines.
pub const TICK: Duration = Duration::from_millis(50);
/// How many of the things that went wrong are told in words.
const TOLD: usize = 20;

/// The program in the guest.
pub struct Counter {
    taken: AtomicU64,
    life: String,
}

impl Counter {
    /// One that names itself by its process ID and the kernel's boot ID.
    pub fn new() -> io::Result<Counter> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Ok(Counter::named(&format!("{} {}", std::process::id(), boot.trim())))
    }

    fn named(life: &str) -> Counter {
        Counter {
            taken: AtomicU64::new(0),
            life: life.to_owned(),
        }
    }

    /// Serves connections, a thread each, as long as the listener lives.
    pub fn serve(self, listener: &TcpListener) -> io::Result<()> {
        let counter = Arc::new(self);
        loop {
            let (stream, _) = listener.accept()?;
            let counter = counter.clone();
            // A client that goes away in the middle is its own affair.
            std::thread::spawn(move || counter.talk(&stream));
        }
    }

    fn talk(&self, stream: &std::net::TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        for line in BufReader::new(stream).lines() {
            let taken = self.taken.fetch_add(1, Ordering::Relaxed) + 1;
            (&*stream).write_all(format!("{} {taken} {}\n", line?, self.life).as_bytes())?;
        }
        Ok(())
    }
}

/// What the client saw in one phase of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Seen {
    /// Lines sent.
    pub sent: u64,
    /// Lines answered.
    pub answered: u64,
    /// Longest time between two answers, in milliseconds.
    pub silence_ms: f64,
    /// Connections that ended.
    pub disconnected: u64,
    /// Lines that were never answered, since their connection ended.
    pub lost: u64,
    /// Answers that did not follow from those before: a number or a count that was left out or came again.
    pub gaps: u64,
    /// Times that another process or another boot answered than before.
    pub restarts: u64,
}

impl Seen {
    /// Whether it was one session from beginning to end: no connection, line, count or process lost.
    pub fn is_unbroken(&self) -> bool {
        self.answered > 0 && [self.disconnected, self.lost, self.gaps, self.restarts] == [0; 4]
    }
}

/// What a run saw.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// By the phase's name.
    pub phases: BTreeMap<String, Seen>,
    /// The first of the things that went wrong, in words.
    pub faults: Vec<String>,
    /// `PID BOOT-ID` of who answered last.
    pub life: String,
}

struct Connection {
    stream: TcpStream,
    opened: Instant,
    established: bool,
    /// Numbers of the lines that wait for their answers, oldest first.
    waiting: VecDeque<u64>,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
}

/// The client outside. An established connection is never given up, however long it is silent: whether it goes
/// on is what is asked.
pub struct Watcher {
    poll: Poll,
    address: SocketAddr,
    every: Duration,
    next_tick: Instant,
    next_line: u64,
    connection: Option<Connection>,
    connections: usize,
    not_before: Instant,
    last_answer: Option<Instant>,
    /// The last answer of this process.
    last: Option<(u64, u64)>,
    life: String,
    seen: Seen,
    phase: String,
    report: Report,
}

impl Watcher {
    /// A client of the counter at `address`, `every` being the time between two lines.
    pub fn new(address: SocketAddr, every: Duration) -> io::Result<Watcher> {
        let now = Instant::now();
        Ok(Watcher {
            poll: Poll::new()?,
            address,
            every,
            next_tick: now,
            next_line: 1,
            connection: None,
            connections: 0,
            not_before: now,
            last_answer: None,
            last: None,
            life: String::new(),
            seen: Seen::default(),
            phase: "start".to_owned(),
            report: Report::default(),
        })
    }

    /// Ends the run.
    pub fn finish(mut self) -> Report {
        self.mark("end");
        self.report.life = self.life;
        self.report
    }

    fn tick(&mut self, now: Instant) {
        let hopeless = |c: &Connection| !c.established && now.duration_since(c.opened) > CONNECT_LIMIT;
        if self.connection.as_ref().is_some_and(hopeless) {
            self.disconnect(now, "it was not established in time");
        }
        if self.connection.is_none() && now >= self.not_before && self.connect(now).is_err() {
            self.not_before = now + CONNECT_PAUSE;
        }
        while self.next_tick <= now {
            self.next_tick += self.every;
            // Without a connection there is nobody whom the number could be told.
            if let Some(connection) = self.connection.as_mut().filter(|c| c.established) {
                let line = format!("{}\n", self.next_line);
                connection.outgoing.extend_from_slice(line.as_bytes());
                connection.waiting.push_back(self.next_line);
                self.next_line += 1;
                self.seen.sent += 1;
            }
        }
        self.drive(now);
    }

    fn connect(&mut self, now: Instant) -> io::Result<()> {
        let mut stream = TcpStream::connect(self.address)?;
        self.connections += 1;
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll
            .registry()
            .register(&mut stream, Token(self.connections), interest)?;
        self.connection = Some(Connection {
            stream,
            opened: now,
            established: false,
            waiting: VecDeque::new(),
            outgoing: Vec::new(),
            incoming: Vec::new(),
        });
        Ok(())
    }

    fn disconnect(&mut self, now: Instant, why: &str) {
        let Some(connection) = self.connection.take() else {
            return;
        };
        self.not_before = now + CONNECT_PAUSE;
        if connection.established {
            self.seen.disconnected += 1;
            self.seen.lost += connection.waiting.len() as u64;
            let lost = connection.waiting.len();
            self.fault(format!("the connection ended ({why}), {lost} lines unanswered"));
        }
    }

    fn fault(&mut self, what: String) {
        if self.report.faults.len() < TOLD {
            self.report.faults.push(format!("{}: {what}", self.phase));
        }
    }

    /// Writes and reads what the connection can take and has.
    fn drive(&mut self, now: Instant) {
        let Some(connection) = self.connection.as_mut() else {
            return;
        };
        let end = transfer(connection);
        let mut answers = Vec::new();
        while let Some(at) = connection.incoming.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = connection.incoming.drain(..=at).collect();
            answers.push((connection.waiting.pop_front(), line));
        }
        for (asked, line) in answers {
            self.answered(asked, String::from_utf8_lossy(&line).trim(), now);
        }
        if let Err(error) = end {
            self.disconnect(now, &error.to_string());
        }
    }

    fn answered(&mut self, asked: Option<u64>, answer: &str, now: Instant) {
        if let Some(last) = self.last_answer.replace(now) {
            let silence = now.duration_since(last).as_secs_f64() * 1000.0;
            self.seen.silence_ms = self.seen.silence_ms.max(silence);
        }
        self.seen.answered += 1;
        let mut fields = answer.splitn(3, ' ');
        let mut number = || fields.next().and_then(|field| field.parse::<u64>().ok());
        let (Some(line), Some(count), Some(life)) = (number(), number(), fields.next()) else {
            self.seen.gaps += 1;
            return self.fault(format!("{answer:?} is no answer of a counter"));
        };
        if life != self.life {
            if !self.life.is_empty() {
                self.seen.restarts += 1;
                self.fault(format!("{life:?} answers where {:?} did", self.life));
            }
            self.life = life.to_owned();
            self.last = None;
        }
        let follows = self.last.is_none_or(|(_, before)| count == before + 1);
        if asked != Some(line) || !follows {
            self.seen.gaps += 1;
            let last = self.last;
            self.fault(format!(
                "line {asked:?} was answered by line {line}, count {count} after {last:?}"
            ));
        }
        self.last = Some((line, count));
    }
}

impl Watch for Watcher {
    fn run_until(&mut self, until: Instant) -> io::Result<()> {
        let mut events = Events::with_capacity(16);
        loop {
            let now = Instant::now();
            if now >= until {
                return Ok(());
            }
            self.tick(now);
            let wake = self.next_tick.min(until);
            let wait = wake.saturating_duration_since(Instant::now());
            match self.poll.poll(&mut events, Some(wait)) {
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                other => other?,
            }
            if !events.is_empty() {
                self.drive(Instant::now());
            }
        }
    }

    fn mark(&mut self, phase: &str) {
        let mut seen = std::mem::take(&mut self.seen);
        // A silence that is still going on counts in it.
        if let Some(last) = self.last_answer {
            seen.silence_ms = seen.silence_ms.max(last.elapsed().as_secs_f64() * 1000.0);
        }
        let before = std::mem::replace(&mut self.phase, phase.to_owned());
        self.report.phases.insert(before, seen);
    }
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
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A counter that answers as `answer` says, given the number of the answer; `None` ends the connection.
    fn serve(answer: impl Fn(u64, &str) -> Option<String> + Send + 'static) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let mut taken = 0;
            for stream in listener.incoming().flatten() {
                for line in BufReader::new(&stream).lines().map_while(Result::ok) {
                    taken += 1;
                    match answer(taken, &line) {
                        Some(text) => (&stream).write_all(text.as_bytes()).unwrap(),
                        None => break,
                    }
                }
            }
        });
        address
    }

    fn watch(address: SocketAddr) -> Report {
        let mut watcher = Watcher::new(address, Duration::from_millis(5)).unwrap();
        watcher
            .run_until(Instant::now() + Duration::from_millis(500))
            .unwrap();
        watcher.finish()
    }

    #[test]
    fn a_silence_breaks_no_session() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut watcher = Watcher::new(address, Duration::from_millis(5)).unwrap();
        let ms = Duration::from_millis;
        // Nobody takes its lines yet; the connection waits.
        watcher.run_until(Instant::now() + ms(200)).unwrap();
        watcher.mark("served");
        std::thread::spawn(move || Counter::new().unwrap().serve(&listener));
        watcher.run_until(Instant::now() + ms(300)).unwrap();
        watcher.mark("silent");
        std::thread::sleep(ms(150));
        watcher.run_until(Instant::now() + ms(150)).unwrap();
        let report = watcher.finish();
        let seen = &report.phases["served"];
        assert!(seen.is_unbroken() && seen.answered > seen.sent, "{report:?}");
        assert!(report.phases["silent"].is_unbroken(), "{report:?}");
        assert!(report.phases["silent"].silence_ms >= 150.0, "{report:?}");
        assert!(report.faults.is_empty());
        assert!(report.life.starts_with(&format!("{} ", std::process::id())));
    }

    #[test]
    fn a_lost_connection_is_seen_with_its_lines() {
        let report = watch(serve(|taken, line| {
            (taken != 10).then(|| format!("{line} {taken} 1 boot\n"))
        }));
        let seen = &report.phases["start"];
        assert!(
            seen.disconnected == 1 && seen.lost >= 1 && !seen.is_unbroken(),
            "{report:?}"
        );
        assert_eq!(seen.restarts, 0, "{report:?}");
        assert!(seen.answered > 20, "it goes on over a new connection: {report:?}");
    }

    #[test]
    fn a_new_process_a_repeated_count_and_a_skipped_line_are_seen() {
        let report = watch(serve(|taken, line| {
            Some(format!(
                "{line} {taken} {} boot\n",
                if taken < 10 { 1 } else { 2 }
            ))
        }));
        let seen = &report.phases["start"];
        assert_eq!(
            (seen.restarts, seen.gaps, seen.disconnected),
            (1, 0, 0),
            "{report:?}"
        );
        let report = watch(serve(|taken, line| {
            Some(format!("{line} {} 1 boot\n", if taken == 10 { 9 } else { taken }))
        }));
        assert_eq!(
            report.phases["start"].gaps, 2,
            "the count came again, then jumped"
        );
        let report = watch(serve(|taken, line| {
            let line = if taken == 10 { "11" } else { line };
            Some(format!("{line} {taken} 1 boot\n"))
        }));
        assert_eq!(report.phases["start"].gaps, 1, "{report:?}");
        assert!(report.faults[0].contains("line 11"), "{report:?}");
    }
}
