//! The service as the host and the guest's users meet it: the real binary, its sockets, its commands.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use understudy_channel::{
    Hello, Import, Notice, OnConflict, Purpose, Reply, Request, VERSION_MAX, VERSION_MIN, Welcome,
    read_frame, read_message, write_frame,
};

const PATIENCE: Duration = Duration::from_secs(60);

struct Service {
    dir: tempfile::TempDir,
    child: Child,
}

impl Service {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_understudy-guest"))
            .args(["run", "--listen"])
            .arg(dir.path().join("host.sock"))
            .arg("--run-dir")
            .arg(dir.path())
            .spawn()
            .unwrap();
        let service = Self { dir, child };
        let until = Instant::now() + PATIENCE;
        while UnixStream::connect(service.socket()).is_err()
            || !service.dir.path().join("agent.sock").exists()
        {
            assert!(Instant::now() < until, "the service does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        service
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("host.sock")
    }

    fn hello(&self, version_min: u32, version_max: u32, purpose: Purpose) -> (UnixStream, Welcome) {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write_frame(
            &mut stream,
            &Hello {
                version_min,
                version_max,
                purpose,
            },
        )
        .unwrap();
        let welcome = read_message(&mut stream).unwrap();
        (stream, welcome)
    }

    fn control(&self) -> UnixStream {
        let (stream, welcome) = self.hello(VERSION_MIN, VERSION_MAX, Purpose::Control);
        assert!(matches!(welcome, Welcome::Accepted { .. }), "{welcome:?}");
        stream
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_understudy-guest"));
        command.args(arguments).arg("--run-dir").arg(self.dir.path());
        command
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ask(stream: &mut UnixStream, request: &Request) -> Reply {
    write_frame(stream, request).unwrap();
    loop {
        match read_message(stream).unwrap() {
            Reply::Notice(_) => {}
            reply => return reply,
        }
    }
}

#[test]
fn the_host_learns_what_the_guest_is() {
    let service = Service::start();
    let mut control = service.control();
    let Reply::Description(description) = ask(&mut control, &Request::Describe) else {
        panic!()
    };
    assert!(!description.boot_id.is_empty() && !description.clone && description.capturing.is_none());
    assert!(matches!(
        ask(&mut control, &Request::ThawUserland),
        Reply::Thawed {
            by_watchdog: false,
            frozen_us: 0
        }
    ));
    // What makes no sense here is refused in words, and the session goes on.
    let activate = Request::Activate {
        operation: "uid".into(),
    };
    let Reply::Refused(refusal) = ask(&mut control, &activate) else {
        panic!()
    };
    assert!(refusal.reason.contains("not a clone"), "{}", refusal.reason);
    assert!(matches!(
        ask(&mut control, &Request::Describe),
        Reply::Description(_)
    ));
}

#[test]
fn a_guest_whose_clock_is_right_says_so_after_a_resume() {
    let service = Service::start();
    let mut control = service.control();
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let real_us = i64::try_from(since.unwrap().as_micros()).unwrap();
    match ask(&mut control, &Request::Resumed { real_us }) {
        Reply::Resumed(resumed) => assert_eq!(resumed.stepped_us, 0),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_host_of_another_age_is_told_which_versions_are_spoken() {
    let service = Service::start();
    let (_, welcome) = service.hello(VERSION_MAX + 1, VERSION_MAX + 5, Purpose::Control);
    let Welcome::Refused(refusal) = welcome else {
        panic!("{welcome:?}")
    };
    assert!(refusal.reason.contains("update the older"), "{}", refusal.reason);
    let (_, welcome) = service.hello(VERSION_MIN, VERSION_MAX + 5, Purpose::Control);
    assert!(
        matches!(
            welcome,
            Welcome::Accepted {
                version: VERSION_MAX,
                ..
            }
        ),
        "{welcome:?}"
    );
}

#[test]
fn a_guest_that_is_no_clone_imports_nothing() {
    let service = Service::start();
    let import = Import {
        operation: "uid".into(),
        on_conflict: OnConflict::PreferGuest,
    };
    let (_, welcome) = service.hello(VERSION_MIN, VERSION_MAX, Purpose::Import(import));
    let Welcome::Refused(refusal) = welcome else {
        panic!("{welcome:?}")
    };
    assert!(refusal.reason.contains("not a clone"), "{}", refusal.reason);
}

#[test]
fn what_is_no_message_ends_its_session_and_nothing_else() {
    let service = Service::start();
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0, 0, 0, 0],
        &[3, 0, 0, 0, 0xff, 0xff, 0xff],
        &[0xff; 64],
    ] {
        let mut stream = UnixStream::connect(service.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(garbage).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(read_frame::<Welcome>(&mut stream).is_err());
    }
    assert!(matches!(
        ask(&mut service.control(), &Request::Describe),
        Reply::Description(_)
    ));
}

#[test]
fn a_newer_control_session_takes_the_place_of_an_older_one() {
    let service = Service::start();
    let mut older = service.control();
    let mut newer = service.control();
    assert!(matches!(
        ask(&mut newer, &Request::Describe),
        Reply::Description(_)
    ));
    assert!(
        read_frame::<Reply>(&mut older).is_err(),
        "the older session is closed"
    );
}

#[test]
fn a_request_to_stay_active_reaches_the_host_and_its_answer_the_user() {
    let service = Service::start();
    let mut asking = service.command(&["request-reboot", "--wait", "--reason", "new kernel"]);
    let child = asking
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let requested = |stream: &mut UnixStream| loop {
        if let Reply::Notice(Notice::RebootRequested { id, reason }) = read_message(stream).unwrap() {
            return (id, reason);
        }
    };
    // A host that goes away before it answered is told again.
    let (first, reason) = requested(&mut service.control());
    assert_eq!(reason, "new kernel");
    let mut control = service.control();
    let (id, _) = requested(&mut control);
    assert_eq!(id, first);
    let answer = Request::RebootAnswer {
        id,
        answer: Ok("reboot-web-1".into()),
    };
    assert_eq!(ask(&mut control, &answer), Reply::Done);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "confirmed: reboot-web-1\n"
    );
}

#[test]
fn a_refusal_reaches_the_user_in_the_hosts_words() {
    let service = Service::start();
    let mut asking = service.command(&["request-reboot", "--wait"]);
    let child = asking
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut control = service.control();
    let id = loop {
        if let Reply::Notice(Notice::RebootRequested { id, .. }) = read_message(&mut control).unwrap() {
            break id;
        }
    };
    let answer = Request::RebootAnswer {
        id,
        answer: Err("onGuestRequest is Deny".into()),
    };
    assert_eq!(ask(&mut control, &answer), Reply::Done);
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success());
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("onGuestRequest is Deny")
    );
}

#[test]
fn commands_say_what_to_do_where_no_service_runs() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_understudy-guest"))
        .args(["status", "--run-dir"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("is understudy-guest.service running")
    );
}
