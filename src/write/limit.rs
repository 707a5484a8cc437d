//! The longest stretch of writes and their rate.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// Lets so many pass a second, and a burst of them at once; the others wait their turn.
pub struct Limit {
    interval: Duration,
    burst: u32,
    /// When the next one would be due if nobody might be early.
    due: Mutex<Instant>,
}

impl Limit {
    /// `rate` a second, at least one; `burst` at once.
    pub fn new(rate: u32, burst: u32) -> Limit {
        Limit {
            interval: Duration::from_secs(1) / rate.max(1),
            burst,
            due: Mutex::new(Instant::now()),
        }
    }

    /// Returns when it is the caller's turn.
    pub async fn pass(&self) {
        sleep_until(self.turn(Instant::now())).await;
    }

    /// When it is the turn of one who comes now.
    fn turn(&self, now: Instant) -> Instant {
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        *due = (*due).max(now) + self.interval;
        due.checked_sub(self.interval * self.burst)
            .unwrap_or(now)
            .max(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_at_once_and_the_rest_at_the_rate() {
        let limit = Limit::new(10, 5);
        let now = Instant::now() + Duration::from_secs(1);
        let waits = |now: Instant, count: usize| -> Vec<u128> {
            (0..count).map(|_| (limit.turn(now) - now).as_millis()).collect()
        };
        assert_eq!(waits(now, 8), [0, 0, 0, 0, 0, 100, 200, 300]);
        // Idle time fills the burst, and no more than it.
        let later = now + Duration::from_secs(60);
        assert_eq!(waits(later, 7), [0, 0, 0, 0, 0, 100, 200]);
    }
}
