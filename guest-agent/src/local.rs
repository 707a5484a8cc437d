//! The local socket: how the commands inside the guest talk to the service.
//!
//! `request-reboot` is step 1 of patent US10606632B2: the guest asks to stay active through a reboot.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use understudy_channel::{Description, FrameError, Notice, read_frame, write_frame};

use crate::info;
use crate::service::{Agent, lock, spawn};
use crate::sys::vsock::{Listener, Stream};

/// Name of the socket in the run-time directory.
pub const SOCKET: &str = "agent.sock";
/// Longest reason that is passed on, in bytes.
const MAX_REASON: usize = 1024;
/// Answers that are kept for those who still wait for them.
const MAX_ANSWERS: usize = 64;

/// What a command asks of the service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Ask {
    /// The state of the guest.
    Status,
    /// To stay active through a reboot.
    RequestReboot {
        /// In the user's words.
        reason: String,
        /// How long to wait for the host, in seconds; for ever where absent.
        wait_seconds: Option<u64>,
    },
}

/// What the service answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// The state.
    Status(Box<Description>),
    /// The host confirmed: name of the operation.
    Confirmed(String),
    /// The host refused.
    Refused(String),
    /// The host has not answered in time; the request stands.
    Pending,
}

#[derive(Debug, Default)]
struct Requests {
    /// Asked and not answered: id and reason. One at a time: a guest reboots once.
    pending: Option<(String, String)>,
    answers: BTreeMap<String, Result<String, String>>,
    made: u64,
}

/// Requests of this guest's users for a reboot.
#[derive(Debug, Default)]
pub struct RebootRequests {
    requests: Mutex<Requests>,
    answered: Condvar,
}

impl RebootRequests {
    /// Notes a request and returns its notice. One that is still unanswered is joined.
    fn ask(&self, reason: &str) -> (String, Notice) {
        let mut requests = lock(&self.requests);
        if requests.pending.is_none() {
            requests.made += 1;
            let id = format!("{:x}-{}", crate::describe::uptime_us(), requests.made);
            let end = (0..=MAX_REASON.min(reason.len()))
                .rev()
                .find(|&i| reason.is_char_boundary(i));
            requests.pending = Some((id, reason[..end.unwrap_or(0)].to_owned()));
        }
        let (id, reason) = requests.pending.clone().unwrap_or_default();
        (id.clone(), Notice::RebootRequested { id, reason })
    }

    /// Notices of what is not answered yet.
    pub fn pending(&self) -> Vec<Notice> {
        let requests = lock(&self.requests);
        let notice = |(id, reason): &(String, String)| Notice::RebootRequested {
            id: id.clone(),
            reason: reason.clone(),
        };
        requests.pending.iter().map(notice).collect()
    }

    /// The host's answer: the operation, or why there will be none. One that nobody asked for is dropped.
    pub fn answer(&self, id: &str, answer: Result<String, String>) {
        let mut requests = lock(&self.requests);
        if requests.pending.as_ref().is_none_or(|(pending, _)| pending != id) {
            return;
        }
        requests.pending = None;
        if requests.answers.len() >= MAX_ANSWERS {
            requests.answers.pop_first();
        }
        requests.answers.insert(id.to_owned(), answer);
        drop(requests);
        self.answered.notify_all();
    }

    fn wait(&self, id: &str, wait: Option<Duration>) -> Option<Result<String, String>> {
        let deadline = wait.and_then(|w| Instant::now().checked_add(w));
        let mut requests = lock(&self.requests);
        loop {
            if let Some(answer) = requests.answers.get(id) {
                return Some(answer.clone());
            }
            let left = match deadline {
                None => Duration::from_secs(3600),
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
            };
            if left.is_zero() {
                return None;
            }
            requests = match self.answered.wait_timeout(requests, left) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

/// Serves the local socket.
pub fn serve(agent: &Arc<Agent>, listener: &Listener) {
    loop {
        match listener.accept() {
            Ok(stream) => {
                let agent = Arc::clone(agent);
                spawn("local-session", move || {
                    if let Err(error) = session(&agent, stream) {
                        info!("local session ended: {error}");
                    }
                });
            }
            Err(error) => {
                crate::warning!("the local socket failed: {error}");
                std::thread::sleep(Duration::from_millis(200));
            }
        }
    }
}

fn session(agent: &Arc<Agent>, mut stream: Stream) -> Result<(), FrameError> {
    let answer = match read_frame(&mut stream)? {
        Ask::Status => Answer::Status(Box::new(agent.describe())),
        Ask::RequestReboot { .. } if agent.config.role.is_waiting_clone() => Answer::Refused(
            "this is a clone that has not taken over yet; ask again after the cutover".to_owned(),
        ),
        Ask::RequestReboot { reason, wait_seconds } => {
            let (id, notice) = agent.reboots.ask(&reason);
            agent.sessions.notify(&notice);
            match agent.reboots.wait(&id, wait_seconds.map(Duration::from_secs)) {
                Some(Ok(operation)) => Answer::Confirmed(operation),
                Some(Err(reason)) => Answer::Refused(reason),
                None => Answer::Pending,
            }
        }
    };
    write_frame(&mut stream, &answer)
}

/// Asks the running service.
pub fn ask(run_dir: &Path, ask: &Ask) -> Result<Answer, FrameError> {
    let mut stream = UnixStream::connect(run_dir.join(SOCKET))?;
    write_frame(&mut stream, ask)?;
    read_frame(&mut stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_stands_until_it_is_answered_and_a_second_one_joins_it() {
        let requests = RebootRequests::default();
        let (id, _) = requests.ask("kernel");
        assert_eq!(requests.ask("again").0, id);
        assert_eq!(requests.pending().len(), 1);
        assert_eq!(requests.wait(&id, Some(Duration::ZERO)), None);
        requests.answer("other", Ok("x".into()));
        assert_eq!(requests.pending().len(), 1);
        requests.answer(&id, Ok("reboot-1".into()));
        assert_eq!(
            requests.wait(&id, Some(Duration::ZERO)),
            Some(Ok("reboot-1".into()))
        );
        assert!(requests.pending().is_empty());
        assert_ne!(requests.ask("later").0, id);
    }
}
