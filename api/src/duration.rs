//! Durations in Go's syntax, as Kubernetes writes them: `300ms`, `30s`, `1h30m`.

use std::time::Duration;

/// Reads a duration. `None` for what Go would refuse, for negative ones, and for a number without unit.
pub fn parse(text: &str) -> Option<Duration> {
    if text.is_empty() {
        return None;
    }
    let parsed: kube::core::Duration = text.parse().ok()?;
    if parsed.is_negative() {
        return None;
    }
    Some(parsed.into())
}

/// Writes a duration so that [`parse`] reads it back; milliseconds are the smallest unit shown.
pub fn format(duration: Duration) -> String {
    let millis = duration.as_millis();
    if millis < 1000 {
        return format!("{millis}ms");
    }
    let seconds = millis / 1000;
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, millis % 60_000);
    let mut text = String::new();
    if hours > 0 {
        text.push_str(&format!("{hours}h"));
    }
    if minutes > 0 {
        text.push_str(&format!("{minutes}m"));
    }
    if rest > 0 {
        let (whole, part) = (rest / 1000, rest % 1000);
        if part == 0 {
            text.push_str(&format!("{whole}s"));
        } else {
            text.push_str(format!("{whole}.{part:03}").trim_end_matches('0'));
            text.push('s');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_go_writes_is_read_and_what_go_refuses_is_refused() {
        for (text, millis) in [
            ("300ms", 300),
            ("30s", 30_000),
            ("1h30m", 5_400_000),
            ("1.5s", 1500),
            ("0s", 0),
        ] {
            assert_eq!(parse(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "30", "s", "5 m", "-3s", "1d", "soon"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_written_duration_is_read_back() {
        for millis in [
            0, 1, 999, 1000, 1500, 60_000, 61_001, 3_600_000, 5_430_250, 86_400_000,
        ] {
            let duration = Duration::from_millis(millis);
            assert_eq!(parse(&format(duration)), Some(duration), "{}", format(duration));
        }
    }
}
