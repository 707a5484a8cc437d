//! Log lines go to the kernel's ring (`/dev/kmsg`): no program that could be frozen stands between, and
//! journald picks them up once it runs. Bounded: what comes too fast is counted instead of written.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lines that may be written within [`WINDOW`].
const BURST: u32 = 30;
const WINDOW: Duration = Duration::from_secs(10);

struct Ring {
    kmsg: Option<File>,
    since: Instant,
    written: u32,
    dropped: u64,
}

static RING: Mutex<Option<Ring>> = Mutex::new(None);

/// Sends lines to the kernel's ring from now on, where it can be opened; before that, and in the commands
/// that a user types, they go to standard error.
pub fn use_kernel_ring() {
    let kmsg = OpenOptions::new().write(true).open("/dev/kmsg").ok();
    if let Ok(mut ring) = RING.lock() {
        *ring = Some(Ring {
            kmsg,
            since: Instant::now(),
            written: 0,
            dropped: 0,
        });
    }
}

/// Writes one line. Never blocks on user land; a line that cannot be written is lost.
pub fn line(priority: u8, text: fmt::Arguments<'_>) {
    let Ok(mut guard) = RING.lock() else { return };
    let Some(ring) = guard.as_mut() else {
        eprintln!("understudy-guest: {text}");
        return;
    };
    if ring.since.elapsed() > WINDOW {
        if ring.dropped > 0 {
            let dropped = ring.dropped;
            write(ring, 4, format_args!("{dropped} log lines dropped"));
        }
        ring.since = Instant::now();
        ring.written = 0;
        ring.dropped = 0;
    }
    if ring.written >= BURST {
        ring.dropped += 1;
        return;
    }
    ring.written += 1;
    write(ring, priority, text);
}

fn write(ring: &mut Ring, priority: u8, text: fmt::Arguments<'_>) {
    if let Some(kmsg) = ring.kmsg.as_mut() {
        let mut line = format!("<{priority}>understudy-guest: {text}").replace('\n', " ");
        // The kernel refuses records beyond about a kilobyte.
        if line.len() > 900 {
            let end = (0..=900).rev().find(|&i| line.is_char_boundary(i)).unwrap_or(0);
            line.truncate(end);
        }
        line.push('\n');
        // A line that the ring does not take has nowhere else to go.
        let _ = kmsg.write_all(line.as_bytes());
    }
}

/// Logs at level info.
#[macro_export]
macro_rules! info {
    ($($arg:tt)*) => { $crate::log::line(6, format_args!($($arg)*)) };
}

/// Logs at level warning.
#[macro_export]
macro_rules! warning {
    ($($arg:tt)*) => { $crate::log::line(4, format_args!($($arg)*)) };
}

/// How long the stages of something took, for one line of the log.
#[derive(Debug)]
pub struct Laps {
    last: Instant,
    text: String,
}

impl Laps {
    /// Begins the first stage.
    pub fn begin() -> Self {
        Self {
            last: Instant::now(),
            text: String::new(),
        }
    }

    /// Ends the stage `name` and begins the next one.
    pub fn lap(&mut self, name: &str) {
        let separator = if self.text.is_empty() { "" } else { ", " };
        self.text += &format!("{separator}{name} {} us", self.last.elapsed().as_micros());
        self.last = Instant::now();
    }
}

impl fmt::Display for Laps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
