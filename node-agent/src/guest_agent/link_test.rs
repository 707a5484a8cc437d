use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU32, Ordering};

use understudy_channel::{Hello, Refusal, Welcome};

use super::*;

fn description(boot: &str) -> Description {
    Description {
        agent: "test".into(),
        boot_id: boot.into(),
        kernel_release: "6.1.0".into(),
        clone: false,
        boot_complete: true,
        system_state: "running".into(),
        failed_units: Vec::new(),
        uptime_us: 1,
        reboot_required: None,
        interfaces: Vec::new(),
        filesystems: Vec::new(),
        capturing: None,
    }
}

/// What stands between the agent and a guest in these tests is the channel itself over a Unix socket; the
/// script decides what the guest answers.
struct Guest {
    dir: tempfile::TempDir,
}

impl Guest {
    fn new(script: impl FnMut(u32, &Request, &mut UnixStream) -> bool + Send + 'static) -> Guest {
        Guest::of_version(1, script)
    }

    fn of_version(
        version: u32,
        mut script: impl FnMut(u32, &Request, &mut UnixStream) -> bool + Send + 'static,
    ) -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("vsock")).unwrap();
        std::thread::spawn(move || {
            for (session, stream) in listener.incoming().enumerate() {
                let mut stream = stream.unwrap();
                let mut line = [0u8; 13];
                if stream.read_exact(&mut line).is_err() {
                    continue;
                }
                assert_eq!(&line, b"CONNECT 1024\n");
                stream.write_all(b"OK 1073741824\n").unwrap();
                let _: Hello = read_frame(&mut stream).unwrap();
                let welcome = Welcome::Accepted {
                    version,
                    agent: "test".into(),
                };
                write_frame(&mut stream, &welcome).unwrap();
                while let Ok(request) = read_frame::<Request>(&mut stream) {
                    if !script(session as u32, &request, &mut stream) {
                        break;
                    }
                }
            }
        });
        Guest { dir }
    }

    fn link(&self) -> Link {
        Link::open(&self.dir.path().join("vsock"), || {}).unwrap()
    }
}

const LONG: Duration = Duration::from_secs(20);

fn reply(stream: &mut UnixStream, reply: &Reply) -> bool {
    write_frame(stream, reply).is_ok()
}

#[test]
fn a_broken_session_is_opened_again_and_the_guest_described_anew() {
    let guest = Guest::new(|session, request, stream| match request {
        Request::Describe => reply(
            stream,
            &Reply::Description(Box::new(description(&format!("boot-{session}")))),
        ),
        _ => false,
    });
    let link = guest.link();
    let boot = |heard: &Heard| heard.description.as_ref().map(|d| d.boot_id.clone());
    link.wait(LONG, |heard| heard.connected);
    assert_eq!(boot(&link.heard()).as_deref(), Some("boot-0"));
    assert!(matches!(
        link.ask(&Request::Sync, LONG),
        Err(LinkError::Broken("Sync"))
    ));
    let heard = link.wait(LONG, |heard| boot(heard).as_deref() == Some("boot-1"));
    assert!(heard.connected);
}

#[test]
fn an_answer_that_comes_late_never_answers_another_question() {
    let asked = Arc::new(AtomicU32::new(0));
    let guest = Guest::new({
        let asked = asked.clone();
        move |_, request, stream| match request {
            Request::Describe => reply(stream, &Reply::Description(Box::new(description("b")))),
            // The first Sync is answered never.
            Request::Sync if asked.fetch_add(1, Ordering::SeqCst) == 0 => true,
            Request::Sync => reply(stream, &Reply::Done),
            _ => false,
        }
    });
    let link = guest.link();
    link.wait(LONG, |heard| heard.connected);
    let short = Duration::from_millis(50);
    assert!(matches!(
        link.ask(&Request::Sync, short),
        Err(LinkError::Broken(_))
    ));
    let deadline = Instant::now() + LONG;
    loop {
        match link.done(&Request::Sync, LONG) {
            Ok(()) => break,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        link.wait(LONG, |heard| heard.connected);
    }
}

#[test]
fn notices_are_heard_and_refusals_quoted() {
    let guest = Guest::new(|_, request, stream| match request {
        Request::Describe => {
            let asked = Notice::RebootRequested {
                id: "r1".into(),
                reason: "kernel".into(),
            };
            reply(stream, &Reply::Notice(asked))
                && reply(stream, &Reply::Description(Box::new(description("b"))))
        }
        _ => reply(
            stream,
            &Reply::Refused(Refusal {
                reason: "already capturing".into(),
            }),
        ),
    });
    let link = guest.link();
    let heard = link.wait(LONG, |heard| heard.connected);
    assert_eq!(heard.reboot_requested, Some(("r1".into(), "kernel".into())));
    let error = link.done(&Request::Sync, LONG).unwrap_err();
    assert!(error.to_string().contains("already capturing"));
    link.reboot_answered("r1");
    assert_eq!(link.heard().reboot_requested, None);
}

#[test]
fn a_resumed_guest_is_told_the_hosts_time() {
    let guest = Guest::of_version(RESUMED_VERSION, |_, request, stream| match request {
        Request::Describe => reply(stream, &Reply::Description(Box::new(description("b")))),
        Request::Resumed { real_us } => {
            let off = (crate::host::moment().unix_us - real_us).abs();
            reply(
                stream,
                &Reply::Resumed(Resumed {
                    stepped_us: i64::from(off > 60_000_000),
                    announced: 2,
                }),
            )
        }
        _ => false,
    });
    let link = guest.link();
    link.wait(LONG, |heard| heard.connected);
    let told = link.resumed(LONG).unwrap();
    assert_eq!((told.stepped_us, told.announced), (0, 2));
}

#[test]
fn a_guest_agent_that_is_too_old_for_a_request_is_not_asked() {
    let guest = Guest::of_version(1, |_, request, stream| match request {
        Request::Describe => reply(stream, &Reply::Description(Box::new(description("b")))),
        _ => false,
    });
    let link = guest.link();
    link.wait(LONG, |heard| heard.connected);
    assert!(matches!(link.resumed(LONG), Err(LinkError::TooOld(1))));
    let probe = Probe::Tcp { port: 80 };
    assert!(matches!(link.probe(probe, LONG), Err(LinkError::TooOld(1))));
    assert!(link.heard().connected, "its session goes on");
}

#[test]
fn a_guest_without_an_agent_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("vsock")).unwrap();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    let link = Link::open(&dir.path().join("vsock"), || {}).unwrap();
    let heard = link.wait(LONG, |heard| !heard.problem.is_empty());
    assert!(heard.problem.contains("no guest agent"), "{}", heard.problem);
    assert!(matches!(
        link.ask(&Request::Sync, LONG),
        Err(LinkError::NotConnected(_))
    ));
}
