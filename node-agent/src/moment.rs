//! Time as the engines record it.

use serde::{Deserialize, Serialize};

/// A point in time, by two clocks: what people read, and what does not step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Moment {
    /// Microseconds since 1970, UTC.
    pub unix_us: i64,
    /// Microseconds of the host's `CLOCK_BOOTTIME`: survives the agent, starts anew with the host.
    pub boot_us: i64,
}

impl Moment {
    /// Microseconds from `earlier` to this moment, never negative. Uses the clock that does not step; where
    /// the host was rebooted in between (that clock went back) the other one.
    pub fn since(self, earlier: Moment) -> i64 {
        if self.boot_us >= earlier.boot_us {
            self.boot_us - earlier.boot_us
        } else {
            (self.unix_us - earlier.unix_us).max(0)
        }
    }

    /// This moment and `micros` later.
    pub fn plus(self, micros: i64) -> Moment {
        Moment {
            unix_us: self.unix_us.saturating_add(micros),
            boot_us: self.boot_us.saturating_add(micros),
        }
    }
}
