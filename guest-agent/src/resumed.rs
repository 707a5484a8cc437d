//! After the session was resumed (DESIGN §6, step 7): monotonic time goes on as if nothing had been, and real
//! time, which stood still with it, is set; neighbours are told where the addresses live.

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use understudy_channel::Resumed;

use crate::sys::packet;
use crate::{info, warning};

/// A clock that is off by less is left to whoever keeps it: a step would do more harm than good.
const TOLERANCE_US: i64 = 200_000;

/// Sets the clock to the host's time, and announces the network.
pub fn resumed(real_us: i64) -> Result<Resumed, String> {
    // First, for it shortens the interruption.
    let announced = match packet::announce() {
        Ok(count) => u32::try_from(count).unwrap_or(u32::MAX),
        Err(error) => {
            warning!("addresses could not be announced after the resume: {error}");
            0
        }
    };
    let stepped_us = step(now_us(), real_us);
    if stepped_us != 0 {
        clock_settime(ClockId::Realtime, timespec(real_us))
            .map_err(|error| format!("the clock could not be set after the resume: {error}"))?;
    }
    info!("resumed: clock stepped by {stepped_us} us, {announced} addresses announced");
    Ok(Resumed {
        stepped_us,
        announced,
    })
}

/// By how much a clock that shows `now_us` is stepped.
fn step(now_us: i64, real_us: i64) -> i64 {
    let off = real_us.saturating_sub(now_us);
    if off.unsigned_abs() < TOLERANCE_US.unsigned_abs() {
        return 0;
    }
    off
}

fn now_us() -> i64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec * 1_000_000 + now.tv_nsec / 1000
}

fn timespec(micros: i64) -> Timespec {
    Timespec {
        tv_sec: micros.div_euclid(1_000_000),
        tv_nsec: micros.rem_euclid(1_000_000) * 1000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_stood_still_is_stepped_and_one_that_is_right_is_left_alone() {
        let now = 1_764_000_000_000_000;
        assert_eq!(step(now, now + 60_000_000), 60_000_000);
        assert_eq!(step(now, now - 60_000_000), -60_000_000);
        assert_eq!(step(now, now + 150_000), 0);
        assert_eq!(step(now, now), 0);
    }

    #[test]
    fn a_time_is_split_into_seconds_and_nanoseconds() {
        let time = timespec(1_764_000_000_123_456);
        assert_eq!((time.tv_sec, time.tv_nsec), (1_764_000_000, 123_456_000));
    }

    #[test]
    fn a_clock_that_is_right_needs_no_right_to_be_set() {
        // The network may be empty here; what matters is that nothing is stepped.
        let told = resumed(now_us()).unwrap();
        assert_eq!(told.stepped_us, 0);
    }
}
