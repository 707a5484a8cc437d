//! Fault injection for tests: the file `<stateDir>/halt-at` holds lines `STEP:before` or `STEP:after`, with
//! `Host` before the steps of host updates (`HostSave:after`).
//!
//! Where a line names the step at hand, the agent takes it out and kills itself (SIGKILL): before the step's
//! effect, or after it and before anything is recorded of it.

use std::fmt::Debug;
use std::path::{Path, PathBuf};

/// Looks at the file whenever a step is entered or left.
#[derive(Debug)]
pub struct HaltAt<S> {
    file: PathBuf,
    prefix: &'static str,
    current: S,
}

impl<S: Copy + PartialEq + Debug> HaltAt<S> {
    /// For the steps of one engine, which is at `current`.
    pub fn new(state_dir: &Path, prefix: &'static str, current: S) -> HaltAt<S> {
        HaltAt {
            file: state_dir.join("halt-at"),
            prefix,
            current,
        }
    }

    /// The step's effect comes next.
    pub fn entered(&mut self, step: S) {
        self.current = step;
        self.check(step, "before");
    }

    /// `next` is about to be recorded.
    pub fn left(&mut self, next: S) {
        if next != self.current {
            self.check(self.current, "after");
        }
    }

    fn check(&self, step: S, when: &str) {
        let Ok(text) = std::fs::read_to_string(&self.file) else {
            return;
        };
        let Some(rest) = self.taken_out(&text, step, when) else {
            return;
        };
        if let Err(error) = crate::durable::replace(&self.file, rest.as_bytes()) {
            // Not to be killed again and again by the same line.
            tracing::error!(%error, "not halting");
            return;
        }
        tracing::error!(?step, when, file = %self.file.display(), "halting, as the file asks");
        let me = rustix::process::getpid();
        let _ = rustix::process::kill_process(me, rustix::process::Signal::KILL);
    }

    /// The file's text without the line of this point; `None` where it has none.
    fn taken_out(&self, text: &str, step: S, when: &str) -> Option<String> {
        let point = format!("{}{step:?}:{when}", self.prefix);
        let (here, others): (Vec<&str>, Vec<&str>) = text.lines().partition(|line| line.trim() == point);
        (!here.is_empty()).then(|| others.iter().map(|line| format!("{line}\n")).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Step {
        Save,
    }

    #[test]
    fn a_line_names_a_step_of_one_engine_and_is_taken_out() {
        let (handover, host) = (
            HaltAt::new(Path::new("/x"), "", Step::Save),
            HaltAt::new(Path::new("/x"), "Host", Step::Save),
        );
        let text = "Save:after\nHostSave:before\n";
        assert_eq!(
            host.taken_out(text, Step::Save, "before").as_deref(),
            Some("Save:after\n")
        );
        assert_eq!(host.taken_out(text, Step::Save, "after"), None);
        assert_eq!(
            handover.taken_out(text, Step::Save, "after").as_deref(),
            Some("HostSave:before\n")
        );
        assert_eq!(handover.taken_out(text, Step::Save, "before"), None);
    }
}
