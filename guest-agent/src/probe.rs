//! Probes of a clone before its cutover: does what runs on it answer?
//!
//! They are asked from inside, over the loopback: to the outside a clone is isolated.

use std::io::{ErrorKind, PipeReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use understudy_channel::{MAX_PROBED, Probe, Probed};

use crate::warning;

/// So much of an answer's first line is read.
const MAX_LINE: usize = 512;
/// So much of what a command writes is told.
const MAX_OUTPUT: usize = 512;
/// How long the end of a command's output is waited for once the command has ended.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// How often a command is asked whether it has ended.
const LOOK: Duration = Duration::from_millis(10);

/// Asks once.
pub fn probe(probe: &Probe, timeout: Duration) -> Probed {
    let deadline = Instant::now() + timeout;
    let answer = match probe {
        Probe::Http { port, path } => http(*port, path, deadline),
        Probe::Tcp { port } => connect(*port, deadline).map(|_| format!("port {port} accepts connections")),
        Probe::Exec { command } => exec(command, deadline),
    };
    let (ready, message) = match answer {
        Ok(message) => (true, message),
        Err(message) => (false, message),
    };
    Probed {
        ready,
        message: bounded(&message),
    }
}

/// Readable, and no longer than a message may be.
fn bounded(text: &str) -> String {
    let mut bounded = String::new();
    for c in text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if bounded.len() + c.len_utf8() > MAX_PROBED {
            break;
        }
        bounded.push(c);
    }
    bounded
}

fn left(deadline: Instant) -> Result<Duration, String> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err("it did not answer in time".to_owned()),
        left => Ok(left),
    }
}

/// What listens on one family of addresses only is found on either.
fn connect(port: u16, deadline: Instant) -> Result<TcpStream, String> {
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let mut first = None;
    for address in loopback {
        match TcpStream::connect_timeout(&SocketAddr::new(address, port), left(deadline)?) {
            Ok(stream) => return Ok(stream),
            Err(error) => first = first.or(Some(error)),
        }
    }
    let why = first.map(|error| error.to_string()).unwrap_or_default();
    Err(format!("connecting to port {port}: {why}"))
}

fn http(port: u16, path: &str, deadline: Instant) -> Result<String, String> {
    let mut stream = connect(port, deadline)?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\nUser-Agent: understudy-probe\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    );
    let failed = |what: &'static str| {
        move |error: std::io::Error| match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => "it did not answer in time".to_owned(),
            _ => format!("{what}: {error}"),
        }
    };
    stream
        .set_write_timeout(Some(left(deadline)?))
        .and_then(|()| stream.write_all(request.as_bytes()))
        .map_err(failed("sending the request"))?;
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") && line.len() < MAX_LINE {
        stream
            .set_read_timeout(Some(left(deadline)?))
            .map_err(failed("reading the answer"))?;
        match stream.read(&mut byte) {
            Ok(0) => break,
            Ok(_) => line.push(byte[0]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(failed("reading the answer")(error)),
        }
    }
    let line = String::from_utf8_lossy(&line).trim().to_owned();
    match status(&line) {
        Some(200..=399) => Ok(line),
        Some(_) => Err(line),
        None => Err(format!("it does not answer as HTTP does: {line:?}")),
    }
}

/// The status of an answer's first line.
fn status(line: &str) -> Option<u16> {
    let mut words = line.split(' ');
    let version = words.next()?;
    let status = words.next().filter(|word| word.len() == 3)?;
    version.starts_with("HTTP/1.").then(|| status.parse().ok())?
}

fn exec(command: &[String], deadline: Instant) -> Result<String, String> {
    let (program, arguments) = command.split_first().ok_or("there is no command")?;
    let failed = |error: std::io::Error| format!("running {program}: {error}");
    let (output, input) = std::io::pipe().map_err(failed)?;
    let mut child = Command::new(program)
        .args(arguments)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(input.try_clone().map_err(failed)?)
        .stderr(input)
        // A group of its own, so that what it starts ends with it.
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    let told = listen(output);
    let in_time = has_ended(&child, deadline);
    // Before it is reaped: until then its group's number is nobody else's.
    kill(&child);
    // It has ended, or will: nobody waits for a killed child longer than the kernel does.
    let ended = child.wait().map_err(failed)?;
    if !in_time {
        let told = told.recv_timeout(LAST_WORDS).unwrap_or_default();
        return Err(format!("it did not end in time: {told}"));
    }
    let told = told.recv_timeout(LAST_WORDS).unwrap_or_default();
    match (ended.code(), ended.signal()) {
        (Some(0), _) => Ok(format!("it exited with 0: {told}")),
        (Some(code), _) => Err(format!("it exited with {code}: {told}")),
        (None, signal) => Err(format!(
            "it was killed by signal {}: {told}",
            signal.unwrap_or_default()
        )),
    }
}

/// Waits until a command has ended, and leaves it to be reaped. False: it has not by then.
fn has_ended(child: &Child, deadline: Instant) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    let Some(pid) = pid(child) else { return false };
    loop {
        match waitid(WaitId::Pid(pid), options) {
            Ok(Some(_)) => return true,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(LOOK),
            Ok(None) => return false,
            Err(Errno::INTR) => {}
            Err(error) => {
                warning!("waiting for a probe's command: {error}");
                return false;
            }
        }
    }
}

fn pid(child: &Child) -> Option<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw)
}

/// Ends what is left of a command and of what it has started.
fn kill(child: &Child) {
    if let Some(group) = pid(child)
        && let Err(error) = kill_process_group(group, Signal::KILL)
        && error != Errno::SRCH
    {
        warning!("ending a probe's command: {error}");
    }
}

/// Hears what a command writes, and tells the beginning of it. The rest is read as well, so that the command is not
/// held up by a full pipe.
fn listen(mut output: PipeReader) -> mpsc::Receiver<String> {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let mut heard = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match output.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    let room = MAX_OUTPUT.saturating_sub(heard.len()).min(count);
                    heard.extend_from_slice(&buffer[..room]);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        // Nobody listens any more where the command's last words took too long.
        let _ = tell.send(String::from_utf8_lossy(&heard).trim().to_owned());
    });
    told
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const LONG: Duration = Duration::from_secs(30);
    const SHORT: Duration = Duration::from_millis(100);

    fn asked(what: Probe, timeout: Duration) -> (bool, String) {
        let Probed { ready, message } = probe(&what, timeout);
        (ready, message)
    }

    fn command(script: &str) -> Probe {
        Probe::Exec {
            command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        }
    }

    /// A server that answers one request in these words, or, with none, never.
    fn server(answer: Option<&'static str>) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let count = stream.read(&mut request).unwrap();
            assert!(request[..count].starts_with(b"GET /healthz HTTP/1.1\r\n"));
            match answer {
                Some(answer) => stream.write_all(answer.as_bytes()).unwrap(),
                // Until the other side has had enough.
                None => drop(stream.read(&mut request)),
            }
        });
        port
    }

    fn get(answer: Option<&'static str>, timeout: Duration) -> (bool, String) {
        let (port, path) = (server(answer), "/healthz".to_owned());
        asked(Probe::Http { port, path }, timeout)
    }

    #[test]
    fn an_answer_from_200_to_399_is_ready_and_any_other_is_told() {
        for ready in ["HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.0 301 Moved\r\n"] {
            assert_eq!(get(Some(ready), LONG), (true, ready.trim().to_owned()));
        }
        let (ready, told) = get(Some("HTTP/1.1 503 Service Unavailable\r\n\r\n"), LONG);
        assert!(!ready && told == "HTTP/1.1 503 Service Unavailable", "{told}");
        let (ready, told) = get(Some("220 mail\r\n"), LONG);
        assert!(!ready && told.contains("220 mail"), "{told}");
        let (ready, told) = get(None, SHORT);
        assert!(!ready && told.contains("in time"), "{told}");
    }

    #[test]
    fn a_port_is_ready_while_something_listens_there() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(asked(Probe::Tcp { port }, LONG).0);
        drop(listener);
        let (ready, told) = asked(Probe::Tcp { port }, LONG);
        assert!(!ready && told.contains("refused"), "{told}");
    }

    #[test]
    fn a_command_is_ready_by_its_exit_and_its_words_are_told() {
        assert_eq!(
            asked(command("echo fine"), LONG),
            (true, "it exited with 0: fine".to_owned())
        );
        assert_eq!(
            asked(command("echo no database >&2; exit 3"), LONG),
            (false, "it exited with 3: no database".to_owned())
        );
        let (ready, told) = asked(command("kill -9 $$"), LONG);
        assert!(!ready && told.contains("signal 9"), "{told}");
        let missing = Probe::Exec {
            command: vec!["/no/such/program".to_owned()],
        };
        let (ready, told) = asked(missing, LONG);
        assert!(!ready && told.contains("/no/such/program"), "{told}");
    }

    #[test]
    fn a_command_that_hangs_is_ended_with_all_that_it_started_and_one_that_talks_is_cut_short() {
        let dir = tempfile::tempdir().unwrap();
        let late = dir.path().join("late");
        let script = format!("echo begun; (sleep 2; touch {0}) & sleep 60", late.display());
        let began = Instant::now();
        let (ready, told) = asked(command(&script), Duration::from_millis(500));
        assert!(!ready && told.contains("in time: begun"), "{told}");
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        std::thread::sleep(Duration::from_secs(2));
        assert!(!late.exists(), "what it started goes on");
        let (ready, told) = asked(command("head -c 1000000 /dev/zero | tr '\\0' x"), LONG);
        assert!(ready && told.len() < MAX_PROBED, "{}", told.len());
    }
}
