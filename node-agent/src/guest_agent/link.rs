//! The control session that is kept open to a guest's agent, and opened again when it breaks.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use understudy_channel::{
    Description, Notice, PROBE_VERSION, Probe, Probed, Purpose, RESUMED_VERSION, Reply, Request, Resumed,
    read_frame, write_frame,
};

use super::session::{SessionError, connect};

/// Time limit of connecting, greeting and the first description. A guest that boots on a busy host, or whose
/// systemd is busy, takes its time.
const CONNECT: Duration = Duration::from_secs(30);
/// How much later than asked for the answer to a probe may come.
const PROBE: Duration = Duration::from_secs(30);
/// Pause between two attempts to connect.
const AGAIN: Duration = Duration::from_millis(250);
/// Notices that wait to be heard; beyond that the oldest matter no more than the newest, so the session is
/// ended and begins anew with what is still open.
const MAX_NOTICES: usize = 64;

/// Why a request was not carried out, as far as we know.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// There is no session.
    #[error("the guest agent is not connected: {0}")]
    NotConnected(String),
    /// The session broke, so that nobody knows whether the request was carried out.
    #[error("the session with the guest agent broke within {0}")]
    Broken(&'static str),
    /// The guest agent refused.
    #[error("the guest agent refused: {0}")]
    Refused(String),
    /// It speaks a version of the protocol that does not know the request.
    #[error("the guest agent speaks version {0} of the protocol, which does not know this request")]
    TooOld(u32),
    /// The answer belongs to another question.
    #[error("the guest agent broke the protocol: it answered {0} with something else")]
    Protocol(&'static str),
}

/// What is known of the guest.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// Whether a control session is open.
    pub connected: bool,
    /// Version of the protocol of the session, the last one where none is open.
    pub version: u32,
    /// Why not, in the words of the last attempt.
    pub problem: String,
    /// The last description, of this session or one before.
    pub description: Option<Description>,
    /// Whether the guest has told of a complete boot (in a notice or a description).
    pub boot_complete: bool,
    /// Why the filter can no longer be trusted.
    pub capture_lost: Option<String>,
    /// The reboot that the guest asks for: id and reason.
    pub reboot_requested: Option<(String, String)>,
}

/// A guest agent, connected whenever that is possible, until it is dropped.
#[derive(Debug)]
pub struct Link {
    shared: Arc<Shared>,
    /// One request at a time.
    turn: Mutex<()>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    socket: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
    on_change: Hook,
}

#[derive(Debug, Default)]
struct State {
    stop: bool,
    heard: Heard,
    session: Option<Open>,
    notices: usize,
}

struct Hook(Box<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook")
    }
}

#[derive(Debug)]
struct Open {
    stream: UnixStream,
    replies: Receiver<Reply>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    /// Keeps a session open through the vsock socket of a VMM. `on_change` is called, on the link's thread,
    /// whenever [`Heard`] has changed.
    pub fn open(socket: &Path, on_change: impl Fn() + Send + Sync + 'static) -> std::io::Result<Link> {
        let shared = Arc::new(Shared {
            socket: socket.to_owned(),
            state: Mutex::default(),
            changed: Condvar::new(),
            on_change: Hook(Box::new(on_change)),
        });
        let thread = std::thread::Builder::new().name("guest-agent".into()).spawn({
            let shared = shared.clone();
            move || keep(&shared)
        })?;
        Ok(Link {
            shared,
            turn: Mutex::default(),
            thread: Some(thread),
        })
    }

    /// The socket it goes through.
    pub fn socket(&self) -> &Path {
        &self.shared.socket
    }

    /// What is known now.
    pub fn heard(&self) -> Heard {
        self.shared.state().heard.clone()
    }

    /// Waits until what is known satisfies `enough`, at most for `limit`; returns what is known then.
    pub fn wait(&self, limit: Duration, mut enough: impl FnMut(&Heard) -> bool) -> Heard {
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(self.shared.state(), limit, |state| !enough(&state.heard))
            .unwrap_or_else(PoisonError::into_inner);
        state.heard.clone()
    }

    /// Forgets a request for a reboot that was answered.
    pub fn reboot_answered(&self, id: &str) {
        let mut state = self.shared.state();
        if state
            .heard
            .reboot_requested
            .as_ref()
            .is_some_and(|(asked, _)| asked == id)
        {
            state.heard.reboot_requested = None;
        }
    }

    /// Asks, and waits for the answer at most for `limit`. A session whose answer does not come is closed:
    /// an answer that came later would be taken for that of another question.
    pub fn ask(&self, request: &Request, limit: Duration) -> Result<Reply, LinkError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let what = name_of(request);
        let Some(mut session) = self.shared.state().session.take() else {
            return Err(LinkError::NotConnected(self.shared.state().heard.problem.clone()));
        };
        // A reply that nobody asked for must not answer us.
        if session.replies.try_recv().is_ok() {
            let _ = session.stream.shutdown(Shutdown::Both);
            return Err(LinkError::Protocol(what));
        }
        let _ = session.stream.set_write_timeout(Some(limit));
        if write_frame(&mut session.stream, request).is_err() {
            let _ = session.stream.shutdown(Shutdown::Both);
            return Err(LinkError::Broken(what));
        }
        match session.replies.recv_timeout(limit) {
            Ok(reply) => {
                let mut state = self.shared.state();
                if let Reply::Description(description) = &reply {
                    state.heard.boot_complete |= description.boot_complete;
                    state.heard.description = Some((**description).clone());
                }
                // The session may have ended since: then the thread has marked it so.
                if state.heard.connected {
                    state.session = Some(session);
                }
                drop(state);
                match reply {
                    Reply::Refused(refusal) => Err(LinkError::Refused(refusal.reason)),
                    reply => Ok(reply),
                }
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                let _ = session.stream.shutdown(Shutdown::Both);
                Err(LinkError::Broken(what))
            }
        }
    }

    /// Asks for a fresh description.
    pub fn describe(&self, limit: Duration) -> Result<Description, LinkError> {
        match self.ask(&Request::Describe, limit)? {
            Reply::Description(description) => Ok(*description),
            _ => Err(LinkError::Protocol("Describe")),
        }
    }

    /// Tells that the session was resumed, and the time: the host's, when it is sent.
    pub fn resumed(&self, limit: Duration) -> Result<Resumed, LinkError> {
        let version = self.heard().version;
        if version < RESUMED_VERSION {
            return Err(LinkError::TooOld(version));
        }
        let real_us = crate::host::moment().unix_us;
        match self.ask(&Request::Resumed { real_us }, limit)? {
            Reply::Resumed(resumed) => Ok(resumed),
            _ => Err(LinkError::Protocol("Resumed")),
        }
    }

    /// Asks the clone once whether it is ready.
    pub fn probe(&self, probe: Probe, timeout: Duration) -> Result<Probed, LinkError> {
        let version = self.heard().version;
        if version < PROBE_VERSION {
            return Err(LinkError::TooOld(version));
        }
        let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        // The guest ends it in time; what comes on top is the way there and back.
        match self.ask(&Request::Probe { probe, timeout_ms }, timeout + PROBE)? {
            Reply::Probed(probed) => Ok(probed),
            _ => Err(LinkError::Protocol("Probe")),
        }
    }

    /// Asks for something whose answer is [`Reply::Done`].
    pub fn done(&self, request: &Request, limit: Duration) -> Result<(), LinkError> {
        match self.ask(request, limit)? {
            Reply::Done => Ok(()),
            _ => Err(LinkError::Protocol(name_of(request))),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        {
            let mut state = self.shared.state();
            state.stop = true;
            if let Some(session) = &state.session {
                let _ = session.stream.shutdown(Shutdown::Both);
            }
        }
        self.shared.changed.notify_all();
        // The thread is left to end by itself: it may be within an attempt to connect.
        drop(self.thread.take());
    }
}

/// Connects, listens, and connects again.
fn keep(shared: &Shared) {
    loop {
        if shared.state().stop {
            return;
        }
        match connect(&shared.socket, Purpose::Control, CONNECT) {
            Ok(session) => {
                shared.state().heard.version = session.version;
                let problem = match listen(shared, session.stream) {
                    Ok(()) => "the guest agent closed the session".to_owned(),
                    Err(error) => error.to_string(),
                };
                let mut state = shared.state();
                state.session = None;
                state.heard.connected = false;
                state.heard.problem = problem;
            }
            Err(error) => {
                let mut state = shared.state();
                let problem = error.to_string();
                if state.heard.problem == problem {
                    let pause = shared
                        .changed
                        .wait_timeout_while(state, AGAIN, |state| !state.stop);
                    drop(pause);
                    continue;
                }
                state.heard.problem = problem;
            }
        }
        tell(shared);
        let pause = shared
            .changed
            .wait_timeout_while(shared.state(), AGAIN, |state| !state.stop);
        drop(pause);
    }
}

fn tell(shared: &Shared) {
    shared.changed.notify_all();
    (shared.on_change.0)();
}

/// Reads until the session ends. The first reply is to the description that is asked for here, so that the
/// state of the guest is known as soon as the session is there.
fn listen(shared: &Shared, stream: UnixStream) -> Result<(), SessionError> {
    let io = |error: std::io::Error| SessionError::Frame(error.into());
    let mut reader = stream.try_clone().map_err(io)?;
    let mut writer = stream.try_clone().map_err(io)?;
    write_frame(&mut writer, &Request::Describe)?;
    let began = Instant::now();
    let mut replies: Option<Sender<Reply>> = None;
    let mut opening = Some(stream);
    loop {
        match read_frame::<Reply>(&mut reader)? {
            Reply::Notice(notice) => {
                let mut state = shared.state();
                state.notices += 1;
                hear(&mut state, notice);
                if state.notices > MAX_NOTICES && replies.is_none() {
                    return Err(SessionError::Protocol("it sends notices only".to_owned()));
                }
                drop(state);
                tell(shared);
            }
            reply => match (&replies, opening.take(), reply) {
                (None, Some(stream), Reply::Description(description)) => {
                    let (sender, receiver) = channel();
                    replies = Some(sender);
                    // From here on silence is normal; a question brings its own time limit.
                    reader.set_read_timeout(None).map_err(io)?;
                    let mut state = shared.state();
                    if state.stop {
                        return Ok(());
                    }
                    state.notices = 0;
                    state.heard.connected = true;
                    state.heard.problem.clear();
                    state.heard.boot_complete = description.boot_complete;
                    state.heard.description = Some(*description);
                    state.session = Some(Open {
                        stream,
                        replies: receiver,
                    });
                    drop(state);
                    tracing::debug!(socket = %shared.socket.display(), took = ?began.elapsed(), "guest agent connected");
                    tell(shared);
                }
                (Some(sender), _, reply) => {
                    // Nobody listens any more: the one who asked has given the session up.
                    if sender.send(reply).is_err() {
                        return Ok(());
                    }
                }
                (None, _, _) => {
                    return Err(SessionError::Protocol("it did not describe itself".to_owned()));
                }
            },
        }
    }
}

fn hear(state: &mut State, notice: Notice) {
    match notice {
        Notice::BootComplete(description) => {
            state.heard.boot_complete = true;
            state.heard.description = Some(*description);
        }
        Notice::RebootRequested { id, reason } => {
            let id: String = id.chars().take(64).collect();
            state.heard.reboot_requested = Some((id, reason.chars().take(1024).collect()));
        }
        Notice::CaptureLost { reason } => {
            state.heard.capture_lost = Some(reason.chars().take(1024).collect());
        }
    }
}

fn name_of(request: &Request) -> &'static str {
    match request {
        Request::Describe => "Describe",
        Request::Confirm { .. } => "Confirm",
        Request::EndCapture { .. } => "EndCapture",
        Request::Sync => "Sync",
        Request::FreezeFilesystems { .. } => "FreezeFilesystems",
        Request::ThawFilesystems => "ThawFilesystems",
        Request::FreezeUserland { .. } => "FreezeUserland",
        Request::ThawUserland => "ThawUserland",
        Request::Remains => "Remains",
        Request::Activate { .. } => "Activate",
        Request::RebootAnswer { .. } => "RebootAnswer",
        Request::Resumed { .. } => "Resumed",
        Request::Probe { .. } => "Probe",
    }
}

#[cfg(test)]
#[path = "link_test.rs"]
mod tests;
