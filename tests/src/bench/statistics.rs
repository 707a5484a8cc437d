//! What repeated measurements say: median and quartiles, which a single stray value does not move.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A sample of durations, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sample {
    /// How many there were.
    pub count: usize,
    /// Shortest.
    pub least_us: f64,
    /// A quarter is below.
    pub lower_us: f64,
    /// Half is below.
    pub median_us: f64,
    /// Three quarters are below.
    pub upper_us: f64,
    /// Longest.
    pub most_us: f64,
}

impl Sample {
    /// Sums up microseconds; `None` of nothing.
    pub fn of(values: &[f64]) -> Option<Sample> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |part: f64| {
            // Between two values: in proportion.
            let place = part * (sorted.len().checked_sub(1)? as f64);
            let (below, above) = (
                sorted.get(place.floor() as usize)?,
                sorted.get(place.ceil() as usize)?,
            );
            Some(below + (above - below) * place.fract())
        };
        Some(Sample {
            count: sorted.len(),
            least_us: at(0.0)?,
            lower_us: at(0.25)?,
            median_us: at(0.5)?,
            upper_us: at(0.75)?,
            most_us: at(1.0)?,
        })
    }

    /// The range that the middle half of the values fills.
    pub fn spread_us(&self) -> f64 {
        self.upper_us - self.lower_us
    }

    /// Whether two medians differ by no more than the wider of both spreads. Durations are counted in whole
    /// microseconds, so that one of them is noise in any case.
    pub fn same_within_noise(&self, other: &Sample) -> bool {
        let noise = self.spread_us().max(other.spread_us()).max(1.0);
        (self.median_us - other.median_us).abs() <= noise
    }
}

/// The median, and in brackets what the middle half fills.
impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} [{} .. {}]",
            duration(self.median_us),
            duration(self.lower_us),
            duration(self.upper_us)
        )
    }
}

/// Microseconds as people read them.
pub fn duration(us: f64) -> String {
    match us {
        us if us >= 10_000_000.0 => format!("{:.1} s", us / 1e6),
        us if us >= 100_000.0 => format!("{:.0} ms", us / 1e3),
        us if us >= 1_000.0 => format!("{:.1} ms", us / 1e3),
        us => format!("{us:.0} µs"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_stray_value_moves_neither_median_nor_spread() {
        let calm = Sample::of(&[5.0, 1.0, 3.0, 2.0, 4.0]).unwrap();
        assert_eq!((calm.median_us, calm.spread_us()), (3.0, 2.0));
        let stray = Sample::of(&[500.0, 1.0, 3.0, 2.0, 4.0]).unwrap();
        assert_eq!((stray.median_us, stray.spread_us()), (3.0, 2.0));
        assert_eq!((stray.least_us, stray.most_us), (1.0, 500.0));
        assert_eq!(Sample::of(&[]), None);
    }

    #[test]
    fn samples_are_the_same_unless_their_medians_differ_by_more_than_they_spread() {
        let of = |shift: f64| Sample::of(&[10.0, 12.0, 14.0, 16.0, 18.0].map(|v| v + shift)).unwrap();
        assert!(of(0.0).same_within_noise(&of(4.0)));
        assert!(!of(0.0).same_within_noise(&of(5.0)));
    }
}
