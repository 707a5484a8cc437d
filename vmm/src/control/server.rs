//! Accepting connections on the control socket.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use understudy_vmm_control::api::ErrorBody;

use super::http::{Connection, ReadError};
use super::routes;
use crate::supervisor::Supervisor;

/// Connections at a time; beyond it a client is told to come back.
const MAX_CONNECTIONS: usize = 32;
/// How long a connection may be silent.
const SILENCE: Duration = Duration::from_secs(30);

/// Binds the control socket. A socket file that a dead process left behind is replaced; one on which
/// somebody listens is not.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    match UnixStream::connect(path) {
        Ok(_) => {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another process listens on it; is this guest running already?",
            ));
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
        Err(_) => {}
    }
    UnixListener::bind(path)
}

/// Serves `listener` on a thread of its own until the process ends.
pub fn serve(listener: UnixListener, supervisor: Arc<Supervisor>) -> io::Result<()> {
    let connections = Arc::new(AtomicUsize::new(0));
    thread::Builder::new().name("control".to_owned()).spawn(move || {
        loop {
            match listener.accept() {
                Ok((stream, _)) => accept(stream, &supervisor, &connections),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Out of descriptors or memory: others may free some.
                    tracing::error!(%error, "accepting a control connection");
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    })?;
    Ok(())
}

fn accept(stream: UnixStream, supervisor: &Arc<Supervisor>, connections: &Arc<AtomicUsize>) {
    let timeouts = stream
        .set_read_timeout(Some(SILENCE))
        .and_then(|()| stream.set_write_timeout(Some(SILENCE)));
    if let Err(error) = timeouts {
        tracing::error!(%error, "bounding a control connection");
        return;
    }
    if connections.fetch_add(1, Ordering::AcqRel) >= MAX_CONNECTIONS {
        connections.fetch_sub(1, Ordering::AcqRel);
        let body = error_body(&format!(
            "{MAX_CONNECTIONS} connections are open already; close one"
        ));
        // The client learns it or is gone.
        let _ = Connection::new(stream).answer(503, &body, false);
        return;
    }
    let (supervisor, counter) = (supervisor.clone(), connections.clone());
    let spawned = thread::Builder::new()
        .name("control-peer".to_owned())
        .spawn(move || {
            converse(stream, &supervisor);
            counter.fetch_sub(1, Ordering::AcqRel);
        });
    if let Err(error) = spawned {
        connections.fetch_sub(1, Ordering::AcqRel);
        tracing::error!(%error, "serving a control connection");
    }
}

fn converse(stream: UnixStream, supervisor: &Arc<Supervisor>) {
    let mut connection = Connection::new(stream);
    loop {
        let request = match connection.read() {
            Ok(request) => request,
            Err(ReadError::Bad(reason)) => {
                // The client learns it or is gone; either way the connection ends.
                let _ = connection.answer(400, &error_body(&reason), false);
                return;
            }
            Err(ReadError::Closed | ReadError::Io(_)) => return,
        };
        let (status, body) = routes::handle(supervisor, &request);
        if status >= 400 {
            tracing::warn!(
                method = request.method,
                path = request.path,
                status,
                answer = %String::from_utf8_lossy(&body),
                "control request refused"
            );
        }
        let answered = connection.answer(status, &body, request.keep_alive);
        supervisor.stop_if_asked();
        if answered.is_err() || !request.keep_alive {
            return;
        }
    }
}

/// JSON of an [`ErrorBody`].
pub fn error_body(message: &str) -> Vec<u8> {
    let body = ErrorBody {
        error: message.to_owned(),
    };
    // A struct of one string always has a JSON form.
    serde_json::to_vec(&body).unwrap_or_default()
}

/// Removes the socket files of this process when it ends.
pub struct Sockets(pub Vec<PathBuf>);

impl Drop for Sockets {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(error) = std::fs::remove_file(path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "removing a socket");
            }
        }
    }
}
