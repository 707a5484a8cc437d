//! How commands wait for the agent.

use std::time::{Duration, Instant};

use clap::Args;
use understudy_api::duration;

const LOOK: Duration = Duration::from_millis(200);

/// Whether a command waits, and for how long.
#[derive(Debug, Args)]
pub(super) struct Wait {
    /// Wait until the agent has done it
    #[arg(long, default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    wait: bool,
    /// The longest wait, such as 30s or 5m
    #[arg(long, default_value = "5m", value_parser = limit)]
    timeout: Duration,
}

/// What came of waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waited {
    /// It was not to be waited for.
    Not,
    /// It is done.
    Done,
    /// It was not done within so many seconds.
    InVain(u64),
}

impl Wait {
    /// As by default, but no longer than `timeout`.
    #[cfg(test)]
    pub(super) fn at_most(timeout: Duration) -> Wait {
        Wait { wait: true, timeout }
    }

    /// Looks again and again whether it is done.
    pub(super) fn until<E>(&self, mut is_done: impl FnMut() -> Result<bool, E>) -> Result<Waited, E> {
        if !self.wait {
            return Ok(Waited::Not);
        }
        let began = Instant::now();
        loop {
            if is_done()? {
                return Ok(Waited::Done);
            }
            if began.elapsed() > self.timeout {
                return Ok(Waited::InVain(began.elapsed().as_secs()));
            }
            std::thread::sleep(LOOK);
        }
    }
}

fn limit(text: &str) -> Result<Duration, String> {
    duration::parse(text).ok_or_else(|| format!("{text:?} is not a duration such as 30s or 5m"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_done_in_time_is_told_and_an_error_ends_it() {
        let wait = Wait::at_most(Duration::ZERO);
        let mut looks = 0;
        let waited = wait.until(|| {
            looks += 1;
            Ok::<_, ()>(looks == 1)
        });
        assert_eq!(waited, Ok(Waited::Done));
        assert_eq!(wait.until(|| Ok::<_, ()>(false)), Ok(Waited::InVain(0)));
        assert_eq!(wait.until(|| Err(())), Err(()));
        let not = Wait {
            wait: false,
            timeout: Duration::ZERO,
        };
        assert_eq!(not.until(|| Err(())), Ok(Waited::Not));
    }
}
