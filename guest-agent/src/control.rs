//! Control sessions: requests of the host and their answers, and notices between them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use understudy_channel::{FrameError, Notice, Refusal, Reply, Request, read_message, write_frame};

use crate::freeze::{Filesystems, Thawed};
use crate::service::{Agent, lock};
use crate::sys::vsock::Stream;
use crate::{info, remains, resumed, warning};

/// The control session that is open now, if any: a new one takes the place of an older one.
#[derive(Debug, Default)]
pub struct ControlSessions {
    current: Mutex<Option<(u64, Stream)>>,
    next: AtomicU64,
    boot_complete: AtomicBool,
}

impl ControlSessions {
    /// Sends a notice on the open session. Without one it is dropped: what matters is told again when the
    /// next session begins.
    pub fn notify(&self, notice: &Notice) {
        let mut current = lock(&self.current);
        if let Some((_, stream)) = current.as_mut()
            && let Err(error) = write_frame(stream, &Reply::Notice(notice.clone()))
        {
            info!("a notice could not be sent: {error}");
            stream.shutdown();
        }
    }

    /// Remembers that the boot is complete.
    pub fn boot_complete(&self) {
        self.boot_complete.store(true, Ordering::SeqCst);
    }

    fn open(&self, stream: Stream) -> u64 {
        let id = self.next.fetch_add(1, Ordering::SeqCst);
        if let Some((_, older)) = lock(&self.current).replace((id, stream)) {
            older.shutdown();
        }
        id
    }

    /// Answers on session `id`, unless it has been replaced.
    fn reply(&self, id: u64, reply: &Reply) -> Result<(), FrameError> {
        match lock(&self.current).as_mut() {
            Some((current, stream)) if *current == id => write_frame(stream, reply),
            _ => Err(FrameError::Closed),
        }
    }

    fn close(&self, id: u64) {
        let mut current = lock(&self.current);
        if current.as_ref().is_some_and(|(open, _)| *open == id) {
            *current = None;
        }
    }
}

/// Serves a control session until it ends.
pub fn serve(agent: &Arc<Agent>, mut stream: Stream) -> Result<(), FrameError> {
    let id = agent.sessions.open(stream.try_clone()?);
    let result = exchange(agent, id, &mut stream);
    agent.sessions.close(id);
    match result {
        Err(FrameError::Closed) => Ok(()),
        other => other,
    }
}

fn exchange(agent: &Arc<Agent>, id: u64, stream: &mut Stream) -> Result<(), FrameError> {
    // Standing notices come again on every session, so that a host that was away misses none.
    if agent.sessions.boot_complete.load(Ordering::SeqCst) {
        let notice = Notice::BootComplete(Box::new(agent.describe()));
        agent.sessions.reply(id, &Reply::Notice(notice))?;
    }
    if let Some(reason) = agent.lost_capture() {
        agent
            .sessions
            .reply(id, &Reply::Notice(Notice::CaptureLost { reason }))?;
    }
    for notice in agent.reboots.pending() {
        agent.sessions.reply(id, &Reply::Notice(notice))?;
    }
    loop {
        let request: Request = read_message(stream)?;
        let reply = answer(agent, request);
        if let Reply::Refused(refusal) = &reply {
            warning!("refused: {}", refusal.reason);
        }
        agent.sessions.reply(id, &reply)?;
    }
}

/// Carries out one request.
fn answer(agent: &Arc<Agent>, request: Request) -> Reply {
    let result = match request {
        Request::Describe => Ok(Reply::Description(Box::new(agent.describe()))),
        Request::Confirm { operation, hold: _ } => agent.confirm(&operation).map(|()| Reply::Done),
        Request::EndCapture { operation } => {
            agent.end_capture(&operation);
            Ok(Reply::Done)
        }
        Request::Sync => Filesystems::sync()
            .map(|()| Reply::Done)
            .map_err(|e| e.to_string()),
        Request::FreezeFilesystems { watchdog_ms } => agent
            .filesystems
            .freeze(watchdog_ms)
            .map(|took_us| Reply::Frozen { took_us })
            .map_err(|e| e.to_string()),
        Request::ThawFilesystems => Ok(thawed(agent.filesystems.thaw())),
        Request::FreezeUserland { watchdog_ms, stop } => agent
            .userland
            .freeze(watchdog_ms, &stop)
            .map(|()| Reply::Done)
            .map_err(|e| e.to_string()),
        Request::ThawUserland => Ok(thawed(agent.userland.thaw())),
        Request::Remains => Ok(Reply::Remains(remains::remains())),
        Request::Activate { operation } => agent.activate(&operation).map(Reply::Activated),
        Request::RebootAnswer { id, answer } => {
            agent.reboots.answer(&id, answer);
            Ok(Reply::Done)
        }
        Request::Resumed { real_us } => resumed::resumed(real_us).map(Reply::Resumed),
        Request::Probe { probe, timeout_ms } => {
            let timeout = Duration::from_millis(u64::from(timeout_ms));
            Ok(Reply::Probed(crate::probe::probe(&probe, timeout)))
        }
    };
    result.unwrap_or_else(|reason| Reply::Refused(Refusal { reason }))
}

fn thawed(thawed: Thawed) -> Reply {
    Reply::Thawed {
        by_watchdog: thawed.by_watchdog,
        frozen_us: thawed.frozen_us,
    }
}
