//! Which agents speak.
//!
//! A heartbeat is a time on its node's clock, which may be wrong. What counts is when a *new* heartbeat was
//! seen, on the operator's own clock; only one that was there before the operator is judged by its age.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use crate::place::SILENT_AFTER;

#[derive(Clone, Copy, Debug)]
struct Heart {
    beat: Option<Timestamp>,
    /// When it was written, as near as it is known.
    at: Option<Instant>,
    /// Whether others were told that it is silent.
    told: Option<bool>,
}

impl Heart {
    fn is_silent(&self, now: Instant) -> bool {
        self.at
            .is_none_or(|at| now.saturating_duration_since(at) > SILENT_AFTER)
    }
}

/// When each host was heard of.
#[derive(Debug, Default)]
pub struct Liveness(Mutex<HashMap<String, Heart>>);

impl Liveness {
    /// A Host was seen with this heartbeat.
    pub fn heard(&self, host: &str, beat: Option<Timestamp>, wall: Timestamp, now: Instant) {
        let mut hearts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = hearts.get(host).copied();
        let at = match known {
            Some(heart) if heart.beat == beat => heart.at,
            Some(_) => beat.map(|_| now),
            None => beat.and_then(|beat| {
                let age = wall.duration_since(beat);
                let age = if age.is_positive() {
                    age.unsigned_abs()
                } else {
                    Duration::ZERO
                };
                now.checked_sub(age)
            }),
        };
        let told = known.and_then(|heart| heart.told);
        hearts.insert(host.to_owned(), Heart { beat, at, told });
    }

    /// Whether it speaks or is silent other than others were told; they are from now on.
    pub fn is_news(&self, host: &str, now: Instant) -> bool {
        let mut hearts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(heart) = hearts.get_mut(host) else {
            return false;
        };
        let is_silent = heart.is_silent(now);
        heart.told.replace(is_silent) != Some(is_silent)
    }

    /// A Host is gone.
    pub fn forget(&self, host: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(host);
    }

    /// Whether the agent of this host is silent, or was never heard of.
    pub fn is_silent(&self, host: &str, now: Instant) -> bool {
        let hearts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        hearts.get(host).is_none_or(|heart| heart.is_silent(now))
    }

    /// Hosts that have fallen silent since this was asked last.
    pub fn fallen_silent(&self, now: Instant) -> Vec<String> {
        let mut hearts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fallen = hearts
            .iter_mut()
            .filter(|(_, heart)| heart.told == Some(false) && heart.is_silent(now));
        fallen
            .map(|(host, heart)| {
                heart.told = Some(true);
                host.clone()
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wall(second: i64) -> Option<Timestamp> {
        Some(Timestamp::from_second(second).unwrap())
    }

    /// A clock of the operator's that has run for a while.
    fn clock() -> impl Fn(u64) -> Instant {
        let start = Instant::now() + Duration::from_secs(100_000);
        move |second| start + Duration::from_secs(second)
    }

    #[test]
    fn silence_is_told_once_and_so_is_its_end() {
        let (live, at) = (Liveness::default(), clock());
        let heard = |beat, second| {
            live.heard("a", wall(beat), wall(1000).unwrap(), at(second));
            live.is_news("a", at(second))
        };
        assert!(heard(1000, 0));
        assert!(!heard(1010, 30), "it spoke before, too");
        assert!(live.fallen_silent(at(70)).is_empty());
        assert_eq!(live.fallen_silent(at(71)), ["a"]);
        assert!(live.fallen_silent(at(71)).is_empty());
        assert!(live.is_silent("a", at(71)));
        assert!(heard(1020, 72));
        assert!(!live.is_silent("a", at(72)));
    }

    #[test]
    fn a_clock_that_is_wrong_makes_nobody_silent_who_speaks() {
        let (live, at) = (Liveness::default(), clock());
        let now = wall(100_000).unwrap();
        // An hour behind: judged by its age at first, by its beats from then on.
        live.heard("late", wall(96_400), now, at(0));
        assert!(live.is_silent("late", at(0)));
        live.heard("late", wall(96_410), now, at(10));
        assert!(!live.is_silent("late", at(10)));
        // An hour ahead, and dead: silent after the time that anybody gets.
        live.heard("early", wall(103_600), now, at(0));
        assert!(!live.is_silent("early", at(40)));
        assert!(live.is_silent("early", at(41)));
    }

    #[test]
    fn the_same_heartbeat_seen_again_is_no_new_one() {
        let (live, at) = (Liveness::default(), clock());
        live.heard("a", wall(1000), wall(1000).unwrap(), at(0));
        live.heard("a", wall(1000), wall(1000).unwrap(), at(41));
        assert!(live.is_silent("a", at(41)));
        assert!(live.is_silent("unknown", at(41)));
    }
}
