//! Against a bus of our own (dbus-daemon) with a small logind on it.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use zbus::blocking::Connection;
use zbus::blocking::connection::Builder;
use zbus::object_server::SignalEmitter;
use zbus::zvariant::{OwnedFd as SentFd, Value};

use super::*;

const LIMIT: Duration = Duration::from_secs(60);
const PATH: &str = "/org/freedesktop/login1";

struct Bus {
    _dir: tempfile::TempDir,
    daemon: Child,
    address: String,
}

impl Bus {
    /// A bus, or `None` (and a word of it) where dbus-daemon is not installed.
    fn start() -> Option<Bus> {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("bus.conf");
        let text = format!(
            "<busconfig><listen>unix:dir={}</listen><policy context=\"default\"><allow send_destination=\"*\"/><allow own=\"*\"/><allow eavesdrop=\"false\"/></policy></busconfig>",
            dir.path().display()
        );
        fs::write(&config, text).unwrap();
        let daemon = Command::new("dbus-daemon")
            .arg(format!("--config-file={}", config.display()))
            .args(["--nofork", "--print-address"])
            .stdout(Stdio::piped())
            .spawn();
        let mut daemon = match daemon {
            Ok(daemon) => daemon,
            Err(error) => {
                eprintln!("skipped: dbus-daemon cannot be run: {error}");
                return None;
            }
        };
        let mut address = String::new();
        BufReader::new(daemon.stdout.take().unwrap())
            .read_line(&mut address)
            .unwrap();
        Some(Bus {
            _dir: dir,
            daemon,
            address: address.trim().to_owned(),
        })
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

#[derive(Clone, Default)]
struct Seen {
    /// Our ends of the inhibitors that were given.
    inhibitors: Arc<Mutex<Vec<UnixStream>>>,
    asked: Arc<Mutex<Vec<String>>>,
}

struct FakeLogind {
    seen: Seen,
    preparing: bool,
    /// Grows with each look, as if somebody had written a drop-in in between.
    delay: Mutex<u64>,
}

#[zbus::interface(name = "org.freedesktop.login1.Manager")]
impl FakeLogind {
    fn inhibit(&mut self, what: String, _who: String, _why: String, mode: String) -> SentFd {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.seen.inhibitors.lock().unwrap().push(ours);
        self.seen.asked.lock().unwrap().push(format!("{what} {mode}"));
        OwnedFd::from(theirs).into()
    }

    fn reboot(&mut self, _interactive: bool) {
        self.seen.asked.lock().unwrap().push("reboot".into());
    }

    #[zbus(property, name = "InhibitDelayMaxUSec")]
    fn inhibit_delay_max(&self) -> u64 {
        let mut delay = self.delay.lock().unwrap();
        *delay += 7_000_000;
        *delay
    }

    #[zbus(property)]
    fn preparing_for_shutdown(&self) -> bool {
        self.preparing
    }

    #[zbus(signal)]
    async fn prepare_for_shutdown(emitter: &SignalEmitter<'_>, start: bool) -> zbus::Result<()>;

    #[zbus(signal)]
    async fn prepare_for_shutdown_with_metadata(
        emitter: &SignalEmitter<'_>,
        start: bool,
        metadata: HashMap<String, Value<'_>>,
    ) -> zbus::Result<()>;
}

fn logind(bus: &Bus, preparing: bool) -> (Connection, Seen) {
    let seen = Seen::default();
    let fake = FakeLogind {
        seen: seen.clone(),
        preparing,
        delay: Mutex::default(),
    };
    let connection = Builder::address(bus.address.as_str())
        .unwrap()
        .name("org.freedesktop.login1")
        .unwrap()
        .serve_at(PATH, fake)
        .unwrap()
        .build()
        .unwrap();
    (connection, seen)
}

fn tell(connection: &Connection, start: bool) {
    connection
        .emit_signal(
            None::<&str>,
            PATH,
            "org.freedesktop.login1.Manager",
            "PrepareForShutdown",
            &start,
        )
        .unwrap();
}

/// Whether the inhibitor behind our end is closed.
fn is_closed(stream: &UnixStream) -> bool {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    matches!(std::io::Read::read(&mut &*stream, &mut [0]), Ok(0))
}

#[test]
fn the_inhibitor_is_held_until_it_is_let_go_of_and_the_effective_delay_is_read() {
    let Some(bus) = Bus::start() else { return };
    let (_connection, seen) = logind(&bus, false);
    let power = Power::watch(Some(&bus.address), || ()).unwrap();
    let state = power.wait(LIMIT, |state| state.held);
    assert!(state.held, "{state:?}");
    assert_eq!(state.delay, Some(Duration::from_secs(7)));
    assert_eq!(state.going_down, None);
    assert_eq!(*seen.asked.lock().unwrap(), ["shutdown delay"]);
    power.read_delay();
    assert_eq!(power.state().delay, Some(Duration::from_secs(14)));

    power.let_go();
    assert!(!power.state().held);
    assert!(is_closed(&seen.inhibitors.lock().unwrap()[0]));
    power.hold();
    assert!(power.state().held);
    assert_eq!(seen.inhibitors.lock().unwrap().len(), 2);
}

#[test]
fn a_shutdown_that_the_host_begins_is_heard_and_so_is_that_it_was_called_off() {
    let Some(bus) = Bus::start() else { return };
    let (connection, seen) = logind(&bus, false);
    let power = Power::watch(Some(&bus.address), || ()).unwrap();
    power.wait(LIMIT, |state| state.held);
    // The inhibitor is taken before signals are listened to: a signal may be too early to be heard.
    let state = power.wait(LIMIT, |state| {
        tell(&connection, true);
        state.going_down.is_some()
    });
    assert_eq!(state.going_down, Some(Shutdown::Unknown));
    assert!(state.held, "nobody was told that sessions are saved");

    let metadata = HashMap::from([("type", Value::from("reboot"))]);
    connection
        .emit_signal(
            None::<&str>,
            PATH,
            "org.freedesktop.login1.Manager",
            "PrepareForShutdownWithMetadata",
            &(true, metadata),
        )
        .unwrap();
    let state = power.wait(LIMIT, |state| state.going_down == Some(Shutdown::Reboot));
    assert_eq!(state.going_down, Some(Shutdown::Reboot));

    power.let_go();
    tell(&connection, false);
    let state = power.wait(LIMIT, |state| state.going_down.is_none() && state.held);
    assert_eq!(state.going_down, None);
    assert!(state.held, "the next shutdown is held up as well");
    assert!(seen.inhibitors.lock().unwrap().len() >= 2);
}

#[test]
fn a_shutdown_that_was_begun_before_the_agent_is_not_missed() {
    let Some(bus) = Bus::start() else { return };
    let (_connection, _seen) = logind(&bus, true);
    let power = Power::watch(Some(&bus.address), || ()).unwrap();
    let state = power.wait(LIMIT, |state| state.going_down.is_some());
    assert_eq!(state.going_down, Some(Shutdown::Unknown));
}

#[test]
fn a_reboot_is_asked_for_after_the_inhibitor_was_let_go_of() {
    let Some(bus) = Bus::start() else { return };
    let (_connection, seen) = logind(&bus, false);
    let power = Power::watch(Some(&bus.address), || ()).unwrap();
    power.wait(LIMIT, |state| state.held);
    power.reboot().unwrap();
    assert_eq!(*seen.asked.lock().unwrap(), ["shutdown delay", "reboot"]);
    assert!(is_closed(&seen.inhibitors.lock().unwrap()[0]));
    assert!(!power.state().held);
}

#[test]
fn a_host_without_logind_says_so_and_is_looked_at_again() {
    let dir = tempfile::tempdir().unwrap();
    let address = format!("unix:path={}/none", dir.path().display());
    let power = Power::watch(Some(&address), || ()).unwrap();
    let state = power.wait(LIMIT, |state| state.problem.is_some());
    assert!(!state.held);
    let problem = state.problem.unwrap();
    assert!(problem.contains("systemd-logind"), "{problem}");
    assert!(power.reboot().is_err());
}
