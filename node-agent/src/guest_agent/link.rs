//! The control session of one incarnation: kept open by a thread, asked by everybody.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use understudy_channel::{Description, Notice, Purpose, Reply, Request, read_frame, write_frame};

use super::session::{AgentError, dial};

/// How long connecting, hello and welcome may take, each.
const DIAL_LIMIT: Duration = Duration::from_secs(5);
/// Pause between two attempts to connect; a guest that boots is asked this often.
const DIAL_PAUSE: Duration = Duration::from_millis(500);
/// How long a write of a request may take.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// What is done with notices. Called on the link's own thread, so it must not block.
pub type NoticeSink = Box<dyn Fn(Notice) + Send>;

/// The control session of one incarnation. Reconnects by itself until it is dropped.
pub struct Link {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    socket: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
    /// One question at a time.
    asking: Mutex<()>,
}

#[derive(Default)]
struct State {
    stop: bool,
    stream: Option<UnixStream>,
    /// Who waits for the next reply.
    waiting: Option<SyncSender<Reply>>,
    description: Option<Description>,
}

impl Link {
    /// Begins to connect to the guest agent behind the VMM's vsock `socket`.
    pub fn start(socket: PathBuf, notices: NoticeSink) -> std::io::Result<Link> {
        let shared = Arc::new(Shared {
            socket,
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            asking: Mutex::new(()),
        });
        let thread = std::thread::Builder::new().name("guest-agent".into()).spawn({
            let shared = shared.clone();
            move || shared.keep_open(&notices)
        })?;
        Ok(Link {
            shared,
            thread: Some(thread),
        })
    }

    /// Whether a session is open now.
    pub fn is_connected(&self) -> bool {
        lock(&self.shared.state).stream.is_some()
    }

    /// What the guest said of itself last; of an earlier session where none is open now.
    pub fn description(&self) -> Option<Description> {
        lock(&self.shared.state).description.clone()
    }

    /// Waits until a session is open and the guest has described itself, at most `limit`.
    pub fn wait_connected(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = lock(&self.shared.state);
        while state.stream.is_none() || state.description.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// Asks, and waits for the answer at most `limit`. A session that stays silent is closed: a late answer
    /// must not be taken for that of the next question.
    pub fn request(&self, request: &Request, limit: Duration) -> Result<Reply, AgentError> {
        let _one = lock(&self.shared.asking);
        let (sender, receiver) = mpsc::sync_channel(1);
        let stream = {
            let mut state = lock(&self.shared.state);
            let stream = state.stream.as_ref().and_then(|stream| stream.try_clone().ok());
            let stream = stream.ok_or(AgentError::NotConnected)?;
            state.waiting = Some(sender);
            stream
        };
        let answer = self.exchange(&stream, request, &receiver, limit);
        lock(&self.shared.state).waiting = None;
        match answer {
            Ok(Reply::Refused(refusal)) => Err(AgentError::Refused(refusal.reason)),
            Ok(reply) => Ok(reply),
            Err(error) => {
                let _ = stream.shutdown(Shutdown::Both);
                Err(error)
            }
        }
    }

    fn exchange(
        &self,
        mut stream: &UnixStream,
        request: &Request,
        receiver: &Receiver<Reply>,
        limit: Duration,
    ) -> Result<Reply, AgentError> {
        write_frame(&mut stream, request)?;
        receiver.recv_timeout(limit).map_err(|error| match error {
            mpsc::RecvTimeoutError::Timeout => AgentError::Silent {
                what: name(request),
                seconds: limit.as_secs(),
            },
            mpsc::RecvTimeoutError::Disconnected => AgentError::NotConnected,
        })
    }

    /// Asks what is answered by [`Reply::Done`].
    pub fn order(&self, request: &Request, limit: Duration) -> Result<(), AgentError> {
        match self.request(request, limit)? {
            Reply::Done => Ok(()),
            other => Err(unexpected(request, &other)),
        }
    }

    /// Asks for the guest's state anew.
    pub fn describe(&self, limit: Duration) -> Result<Description, AgentError> {
        match self.request(&Request::Describe, limit)? {
            Reply::Description(description) => {
                lock(&self.shared.state).description = Some((*description).clone());
                Ok(*description)
            }
            other => Err(unexpected(&Request::Describe, &other)),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        {
            let mut state = lock(&self.shared.state);
            state.stop = true;
            if let Some(stream) = &state.stream {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn keep_open(&self, notices: &NoticeSink) {
        loop {
            match dial(&self.socket, Purpose::Control, DIAL_LIMIT) {
                Ok(stream) => {
                    if let Err(error) = self.serve(stream, notices) {
                        tracing::debug!(socket = %self.socket.display(), %error, "control session ended");
                    }
                }
                Err(error) if error.is_refusal() => {
                    tracing::warn!(socket = %self.socket.display(), %error, "control session refused");
                }
                Err(error) => {
                    tracing::trace!(socket = %self.socket.display(), %error, "no control session yet");
                }
            }
            let mut state = lock(&self.state);
            state.stream = None;
            // Whoever waits for a reply of that session learns that there will be none.
            state.waiting = None;
            let deadline = Instant::now() + DIAL_PAUSE;
            while !state.stop {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                state = self
                    .changed
                    .wait_timeout(state, left)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
            if state.stop {
                return;
            }
        }
    }

    /// Reads one session to its end.
    fn serve(&self, mut stream: UnixStream, notices: &NoticeSink) -> Result<(), AgentError> {
        // Notices come when they come; a request's own deadline closes a session that has died.
        stream
            .set_read_timeout(None)
            .map_err(understudy_channel::FrameError::from)?;
        stream
            .set_write_timeout(Some(WRITE_LIMIT))
            .map_err(understudy_channel::FrameError::from)?;
        write_frame(&mut stream, &Request::Describe)?;
        loop {
            let reply: Reply = read_frame(&mut stream)?;
            if let Reply::Description(description) | Reply::Notice(Notice::BootComplete(description)) = &reply
            {
                let mut state = lock(&self.state);
                if state.stop {
                    return Ok(());
                }
                state.description = Some((**description).clone());
                if state.stream.is_none() {
                    // Open for questions once the first answer is in: none can be mistaken for another's.
                    let first = matches!(reply, Reply::Description(_));
                    if first {
                        state.stream =
                            Some(stream.try_clone().map_err(understudy_channel::FrameError::from)?);
                        self.changed.notify_all();
                        continue;
                    }
                }
            }
            match reply {
                Reply::Notice(notice) => notices(notice),
                reply => {
                    let waiting = lock(&self.state).waiting.take();
                    match waiting {
                        // Room for one, and one only is sent: never blocks.
                        Some(waiting) => {
                            let _ = waiting.try_send(reply);
                        }
                        None => {
                            return Err(AgentError::Unexpected {
                                what: "nothing".into(),
                                answer: shorten(&reply),
                            });
                        }
                    }
                }
            }
        }
    }
}

fn name(request: &Request) -> String {
    let text = format!("{request:?}");
    text.split([' ', '{', '(']).next().unwrap_or_default().to_owned()
}

/// An answer of the wrong kind.
pub(crate) fn unexpected(request: &Request, reply: &Reply) -> AgentError {
    AgentError::Unexpected {
        what: name(request),
        answer: shorten(reply),
    }
}

fn shorten(reply: &Reply) -> String {
    format!("{reply:?}").chars().take(80).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
