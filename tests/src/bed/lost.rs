//! What is kept of a node that its emulator lost, or whose kernel died: it can be asked nothing any more, so what is
//! around it has to tell.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::node::{Node, Status};

/// So much of the console tells how it ended.
const LAST_LINES: usize = 40;
/// Between two looks at the processors: whether they stand or turn in a circle.
const BETWEEN: Duration = Duration::from_secs(1);

/// Writes down what can be seen of a node that does not answer, and returns the file. What cannot be asked is named
/// in it, and no error.
pub(super) fn keep(node: &Node, why: &str) -> Result<PathBuf> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .context("the clock is before 1970")?;
    let file = node.dir().join(format!("lost-{}.log", now.as_secs()));
    let mut text = format!("node {}: {why}\n", node.name());
    if let Status::Up(pid) = node.status() {
        let mut look = |name: &str| {
            let _ = writeln!(text, "\n== {name}: processors\n{}", processors(node));
            let _ = writeln!(text, "== {name}: threads of the emulator\n{}", threads(pid));
        };
        look("first look");
        std::thread::sleep(BETWEEN);
        look("second look");
    }
    let console = fs::read(node.console_log()).unwrap_or_default();
    let console = String::from_utf8_lossy(&console);
    let lines: Vec<&str> = console.lines().collect();
    let last = lines
        .get(lines.len().saturating_sub(LAST_LINES)..)
        .unwrap_or_default();
    let _ = writeln!(text, "\n== end of its console\n{}", last.join("\n"));
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}

/// Registers of all processors, as QEMU's monitor prints them.
fn processors(node: &Node) -> String {
    let registers = node.qmp().and_then(|mut qmp| {
        qmp.execute(
            "human-monitor-command",
            json!({ "command-line": "info registers -a" }),
        )
    });
    match registers {
        Ok(Value::String(text)) => text,
        Ok(other) => other.to_string(),
        Err(error) => format!("QEMU does not tell: {error:#}"),
    }
}

/// Name, state, processor time in ticks and where in the kernel of each thread of a process.
fn threads(pid: u32) -> String {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return "it is gone".to_owned();
    };
    let mut text = String::new();
    for task in tasks.flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let stat = read("stat");
        // After the name, which may hold spaces: state, then 10 fields, then user and system time.
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        let field = |number: usize| fields.get(number).copied().unwrap_or("?");
        let _ = writeln!(
            text,
            "{:<20} {} {:>8} {:>8} {} {}",
            read("comm").trim(),
            field(0),
            field(11),
            field(12),
            read("wchan"),
            read("syscall").trim(),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_told_with_their_state_and_time_and_a_process_that_is_gone_is_said_to_be() {
        let this = threads(std::process::id());
        let line = this.lines().next().unwrap_or_default();
        let fields: Vec<&str> = line.split_whitespace().collect();
        let state = fields.iter().position(|field| ["R", "S", "D"].contains(field));
        let times = fields[state.unwrap() + 1..].iter().take(2);
        assert!(times.clone().count() == 2 && times.clone().all(|time| time.parse::<u64>().is_ok()));
        assert_eq!(threads(u32::MAX), "it is gone");
    }
}
