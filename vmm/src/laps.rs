//! How long the stages of something took, for one line of the log.

use std::fmt;
use std::time::Instant;

/// Stages with their times, in microseconds.
#[derive(Debug)]
pub struct Laps {
    last: Instant,
    stages: Vec<(&'static str, u128)>,
}

impl Laps {
    /// Begins the first stage.
    pub fn begin() -> Laps {
        Laps::begun_at(Instant::now())
    }

    /// The first stage has begun at `start`.
    pub fn begun_at(start: Instant) -> Laps {
        Laps {
            last: start,
            stages: Vec::with_capacity(16),
        }
    }

    /// Ends the stage `name`, and begins the next one.
    pub fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.stages.push((name, (now - self.last).as_micros()));
        self.last = now;
    }
}

impl fmt::Display for Laps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (name, micros)) in self.stages.iter().enumerate() {
            let separator = if number == 0 { "" } else { ", " };
            write!(f, "{separator}{name} {micros}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_told_in_their_order() {
        let mut laps = Laps::begin();
        laps.lap("one");
        laps.lap("two");
        let text = laps.to_string();
        let names: Vec<&str> = text
            .split(", ")
            .filter_map(|stage| stage.split(' ').next())
            .collect();
        assert_eq!(names, ["one", "two"], "{text}");
    }
}
