//! Logs: everything to stderr (the journal, under systemd) with UTC timestamps in microseconds, and what
//! concerns a guest also into that guest's folder, beside its VMMs' logs and consoles.

use std::fmt::{self, Write as _};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt as stderr};

/// A guest's log is moved to `agent.log.1` at this size.
const MAX_LOG: u64 = 4 << 20;

/// What is logged by default. What the client says of a failed connection our own lines say with what was tried.
const DEFAULT: &str = "info,kube_client::client::builder=off";

/// Begins logging; `RUST_LOG` selects, `info` is the default. With `state_dir`, events with a field
/// `guest` go into `<state_dir>/logs/<namespace>/<name>/agent.log` as well.
pub fn init(state_dir: Option<&Path>) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT));
    let guests = state_dir.map(|dir| GuestLogs {
        dir: dir.join("logs"),
        turn: Mutex::default(),
    });
    tracing_subscriber::registry()
        .with(filter)
        .with(
            stderr::layer()
                .with_writer(io::stderr)
                .with_ansi(false)
                .with_target(false),
        )
        .with(guests)
        .init();
}

struct GuestLogs {
    dir: PathBuf,
    turn: Mutex<()>,
}

impl<S: Subscriber> Layer<S> for GuestLogs {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let mut line = Line::default();
        event.record(&mut line);
        let Some((namespace, name)) = line.guest.as_ref().and_then(|guest| guest.split_once('/')) else {
            return;
        };
        let plain = |part: &str| !part.is_empty() && !part.contains('/') && !part.starts_with('.');
        if !plain(namespace) || !plain(name) {
            return;
        }
        let now = Timestamp::now();
        let text = format!(
            "{now:.6} {:>5} {}{}\n",
            event.metadata().level(),
            line.message,
            line.fields
        );
        let path = self.dir.join(namespace).join(name).join("agent.log");
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // A log that cannot be written has already been told to stderr; there is nobody else to tell.
        let _ = append(&path, &text);
    }
}

fn append(path: &Path, text: &str) -> io::Result<()> {
    if fs::metadata(path).is_ok_and(|metadata| metadata.len() > MAX_LOG) {
        fs::rename(path, path.with_extension("log.1"))?;
    }
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)?
        .write_all(text.as_bytes())
}

#[derive(Default)]
struct Line {
    guest: Option<String>,
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            "guest" => self.guest = Some(format!("{value:?}")),
            name => {
                let _ = write!(self.fields, " {name}={value:?}");
            }
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "guest" {
            self.guest = Some(value.to_owned());
        } else {
            let _ = write!(self.fields, " {}={value:?}", field.name());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_concerns_a_guest_is_in_that_guests_folder() {
        let dir = tempfile::tempdir().unwrap();
        let layer = GuestLogs {
            dir: dir.path().to_owned(),
            turn: Mutex::default(),
        };
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(guest = "default/web", incarnation = 2, "cold boot");
            tracing::info!("of no guest");
            tracing::info!(guest = "../etc", "of a bad name");
        });
        let log = fs::read_to_string(dir.path().join("default/web/agent.log")).unwrap();
        assert_eq!(log.lines().count(), 1);
        assert!(log.contains("cold boot incarnation=2"), "{log}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
