//! The serial console: a 16550 whose output goes to a log file, bounded by rotation, and to a tail in
//! memory for the control API.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

/// Size at which the log is renamed to `<path>.1`, replacing an older one.
const ROTATE_AT: u64 = 4 << 20;
/// Bytes of console output that the control API shows.
const TAIL: usize = 16 << 10;

/// How long an unfinished line, such as a login prompt, may wait for the rest of it before it is written.
const UNFINISHED_LINE: Duration = Duration::from_millis(50);

/// The log of a console. Clones write to the same log.
#[derive(Clone)]
pub struct ConsoleLog {
    shared: Arc<Shared>,
}

struct Shared {
    inner: Mutex<Inner>,
    /// Output has begun to wait, or the log is closed.
    waiting: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // What a panicking writer leaves behind is at worst a lost line.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Inner {
    path: PathBuf,
    file: File,
    size: u64,
    rotate_at: u64,
    tail: VecDeque<u8>,
    /// Output that is not in the file yet: the console comes by single bytes, the file gets lines.
    pending: Vec<u8>,
    failed: bool,
}

impl ConsoleLog {
    /// Opens the log at `path` for appending.
    pub fn open(path: &Path) -> io::Result<ConsoleLog> {
        ConsoleLog::with_limit(path, ROTATE_AT)
    }

    fn with_limit(path: &Path, rotate_at: u64) -> io::Result<ConsoleLog> {
        let file = append(path)?;
        let size = file.metadata()?.len();
        let shared = Arc::new(Shared {
            inner: Mutex::new(Inner {
                path: path.to_owned(),
                file,
                size,
                rotate_at,
                tail: VecDeque::with_capacity(TAIL),
                pending: Vec::new(),
                failed: false,
            }),
            waiting: Condvar::new(),
        });
        let weak = Arc::downgrade(&shared);
        thread::Builder::new()
            .name("console".to_owned())
            .spawn(move || flush_unfinished_lines(&weak))?;
        Ok(ConsoleLog { shared })
    }

    /// Writes output that waits for the end of its line, so that nothing the guest has said is lost with
    /// the process.
    pub fn write_out(&self) {
        self.shared.lock().flush_pending();
    }

    /// The last output, as text.
    pub fn tail(&self) -> String {
        let inner = self.shared.lock();
        let bytes: Vec<u8> = inner.tail.iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut inner = self.shared.lock();
        if inner.pending.is_empty() {
            self.shared.waiting.notify_one();
        }
        for byte in bytes {
            if inner.tail.len() == TAIL {
                inner.tail.pop_front();
            }
            inner.tail.push_back(*byte);
            inner.pending.push(*byte);
            if *byte == b'\n' || inner.pending.len() >= 256 {
                inner.flush_pending();
            }
        }
        Ok(bytes.len())
    }

    /// Called by the UART after every byte: nothing to do, lines are flushed as they end.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Ends when the last [`ConsoleLog`] is dropped.
fn flush_unfinished_lines(shared: &Weak<Shared>) {
    while let Some(shared) = shared.upgrade() {
        let inner = shared.lock();
        let inner = if inner.pending.is_empty() {
            let (inner, _) = shared
                .waiting
                .wait_timeout(inner, Duration::from_secs(1))
                .unwrap_or_else(PoisonError::into_inner);
            inner
        } else {
            inner
        };
        if inner.pending.is_empty() {
            continue;
        }
        drop(inner);
        thread::sleep(UNFINISHED_LINE);
        shared.lock().flush_pending();
    }
}

impl Inner {
    /// A guest must not stop because its log cannot be written: a failure is told once, and output goes
    /// to the tail alone from then on.
    fn flush_pending(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        if self.failed {
            return;
        }
        if let Err(error) = self.try_flush(&pending) {
            tracing::error!(path = %self.path.display(), %error, "console log cannot be written any more");
            self.failed = true;
        }
    }

    fn try_flush(&mut self, pending: &[u8]) -> io::Result<()> {
        if self.size + pending.len() as u64 > self.rotate_at {
            let mut old = self.path.as_os_str().to_owned();
            old.push(".1");
            fs::rename(&self.path, old)?;
            self.file = append(&self.path)?;
            self.size = 0;
        }
        self.file.write_all(pending)?;
        self.size += pending.len() as u64;
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.flush_pending();
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_bounded_and_keeps_the_newest_output() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = ConsoleLog::with_limit(&path, 1000).unwrap();
        for line in 0..200 {
            log.write_all(format!("line {line}\n").as_bytes()).unwrap();
        }
        let tail = log.tail();
        drop(log);
        assert!(fs::metadata(&path).unwrap().len() <= 1000);
        let old = dir.path().join("console.log.1");
        assert!(fs::metadata(old).unwrap().len() <= 1000);
        assert!(fs::read_to_string(&path).unwrap().ends_with("line 199\n"));
        assert!(tail.ends_with("line 199\n"));
    }

    #[test]
    fn a_new_process_appends_to_the_log_of_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        for text in ["first\n", "second\n"] {
            ConsoleLog::open(&path)
                .unwrap()
                .write_all(text.as_bytes())
                .unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "first\nsecond\n");
    }
}
