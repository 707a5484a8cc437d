//! What the demo of a host update found: the table at its end, and the same as JSON.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::client;
use crate::counter;
use crate::demo::GUEST;
use crate::demo::table::{Table, ms, seconds};
use crate::machine::{COUNTER_PORT, LEDGER_PORT};
use crate::pair::{COUNTER, Seen};
use crate::updates::session;

/// Phases in which sessions may not break.
const UNBROKEN: [&str; 3] = ["quiet", "update", "after"];

/// How long a guest did not run, as the agent measured it, in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Interruption {
    /// From its last instruction before the reboot to its first after it.
    pub total_milliseconds: i64,
    /// From its last instruction until its session was durable.
    pub pause_milliseconds: i64,
    /// From then until the host's new kernel started.
    pub shutdown_milliseconds: i64,
    /// From the start of the new kernel to that of the agent.
    pub host_boot_milliseconds: i64,
    /// From the start of the agent until this session's turn came.
    pub agent_start_milliseconds: i64,
    /// From then to its first instruction.
    pub resume_milliseconds: i64,
}

/// What became of one guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GuestOutcome {
    /// Its name.
    pub name: String,
    /// Its memory in bytes.
    pub memory_bytes: i64,
    /// Bytes of memory written, all rounds together.
    pub written_bytes: i64,
    /// Bytes of the checkpoint on disk.
    pub saved_bytes: i64,
    /// Rounds of pre-copying.
    pub rounds: i64,
    /// How long it did not run, and on what the time went.
    pub interruption: Interruption,
    /// Longest time between two answers over the host update, as the clients saw it, in milliseconds.
    pub silence_ms: f64,
    /// The same over the ordinary reboot.
    pub ordinary_silence_ms: f64,
    /// Whether the one TCP connection of the counter's client went on, with no number left out or repeated.
    pub connection_kept: bool,
    /// Numbered lines that the counter answered over the host update.
    pub answered: u64,
}

/// What one run of the demo found.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// Where it ran.
    pub machine: String,
    /// The host's kernel before.
    pub kernel_before: String,
    /// The host's kernel after.
    pub kernel_after: String,
    /// Boot ID of the host before.
    pub boot_before: String,
    /// Boot ID of the host after.
    pub boot_after: String,
    /// The guests.
    pub guests: Vec<GuestOutcome>,
    /// Ledger lines that were acknowledged, over both reboots.
    pub acknowledged: u64,
    /// Those of them that were found at the end.
    pub found: u64,
    /// Ordinary silence divided by that of the host update, of the guest where this is least.
    pub ratio: f64,
    /// From the manifest to `Resumed`, the update of the host included, in seconds.
    pub update_seconds: f64,
    /// From the power button until both guests served again, in seconds.
    pub ordinary_seconds: f64,
    /// Duration of the whole run, set-up of the node left out, in seconds.
    pub total_seconds: f64,
    /// What the counters' clients saw, in the order of the guests.
    pub counters: Vec<counter::Report>,
    /// What the client of page and ledger saw.
    pub client: client::Report,
    /// The NodeUpdate's status at its end.
    pub status: Value,
}

impl Outcome {
    /// Joins what the agent and the clients say. `took`: the host update, the ordinary reboot, everything.
    pub fn new(machine: String, update: &Value, seen: Seen, took: [Duration; 3]) -> Result<Outcome> {
        let result = &update["status"]["result"];
        let text = |life: &str, field: &str| result[life][field].as_str().unwrap_or_default().to_owned();
        let mut guests = Vec::new();
        for (name, report) in [COUNTER, GUEST].into_iter().zip(&seen.counts) {
            let with_page = (name == GUEST).then_some(&seen.load);
            guests.push(GuestOutcome::new(
                session(update, name)?,
                name,
                report,
                with_page,
            )?);
        }
        let ratio = guests
            .iter()
            .map(|guest| guest.ordinary_silence_ms / guest.silence_ms.max(0.001))
            .fold(f64::INFINITY, f64::min);
        let [update_took, ordinary_took, total] = took.map(|took| took.as_secs_f64());
        Ok(Outcome {
            machine,
            kernel_before: text("before", "kernelRelease"),
            kernel_after: text("after", "kernelRelease"),
            boot_before: text("before", "bootID"),
            boot_after: text("after", "bootID"),
            guests,
            acknowledged: seen.load.acknowledged,
            found: seen.load.found,
            ratio,
            update_seconds: update_took,
            ordinary_seconds: ordinary_took,
            total_seconds: total,
            counters: seen.counts.to_vec(),
            client: seen.load,
            status: update["status"].clone(),
        })
    }

    /// What must hold, whatever the machine: the host has rebooted into its new kernel, and no session, connection
    /// or acknowledged line was lost.
    pub fn check(&self, older: &str, newer: &str) -> Result<()> {
        ensure!(
            self.kernel_before == older && self.kernel_after == newer,
            "the host should have gone from {older} to {newer}; the NodeUpdate says from {} to {}",
            self.kernel_before,
            self.kernel_after
        );
        ensure!(
            !self.boot_after.is_empty() && self.boot_before != self.boot_after,
            "the host's boot ID is {} as before",
            self.boot_after
        );
        let counts: [counter::Report; 2] = self
            .counters
            .clone()
            .try_into()
            .ok()
            .context("there should be two counters")?;
        let seen = Seen {
            counts,
            load: self.client.clone(),
        };
        seen.ensure_unbroken(&UNBROKEN)
    }

    /// The table.
    pub fn table(&self) -> String {
        let mut table = Table::default();
        table.row("where", &self.machine);
        table.row("host kernel before", &self.kernel_before);
        table.row("host kernel after", &self.kernel_after);
        for guest in &self.guests {
            table.gap();
            guest.rows(&mut table);
        }
        table.gap();
        table.row(
            "ledger lines",
            format!("{} acknowledged, {} found", self.acknowledged, self.found),
        );
        table.row(
            "host update, all in all",
            format!("{:.0} s, guests served but for the above", self.update_seconds),
        );
        table.row(
            "ordinary reboot, all in all",
            format!("{:.0} s", self.ordinary_seconds),
        );
        table.row(
            "ordinary / with sessions",
            format!("{:.1} times shorter", self.ratio),
        );
        table.text()
    }
}

impl GuestOutcome {
    fn new(
        session: &Value,
        name: &str,
        counts: &counter::Report,
        load: Option<&client::Report>,
    ) -> Result<GuestOutcome> {
        let number = |field: &str| session[field].as_i64();
        let interruption = serde_json::from_value(session["interruption"].clone())
            .with_context(|| format!("the NodeUpdate tells no interruption of guest {name}: {session}"))?;
        // A silence is told where it ended, which may be in the phase that follows.
        let silence = |phases: [&str; 2]| {
            let of_counter = |phase: &&str| Some(counts.phases.get(*phase)?.silence_ms);
            let of_load = |phase: &&str| {
                let seen = load?.phases.get(*phase)?;
                Some(seen.page.interruption_ms.max(seen.ledger.interruption_ms))
            };
            let all = phases
                .iter()
                .filter_map(of_counter)
                .chain(phases.iter().filter_map(of_load));
            all.fold(0.0, f64::max)
        };
        let seen = |phase: &str| counts.phases.get(phase);
        Ok(GuestOutcome {
            name: name.to_owned(),
            memory_bytes: number("memoryBytes").unwrap_or_default(),
            written_bytes: number("writtenBytes").unwrap_or_default(),
            saved_bytes: number("savedBytes").context("the NodeUpdate tells no size of a checkpoint")?,
            rounds: number("rounds").unwrap_or_default(),
            interruption,
            silence_ms: silence(["update", "after"]),
            ordinary_silence_ms: silence(["ordinary", "last"]),
            connection_kept: UNBROKEN
                .iter()
                .all(|phase| seen(phase).is_some_and(counter::Seen::is_unbroken)),
            answered: seen("update").map_or(0, |seen| seen.answered),
        })
    }

    fn rows(&self, table: &mut Table) {
        let what = if self.name == GUEST {
            format!("page 80, ledger {LEDGER_PORT}, counter {COUNTER_PORT}")
        } else {
            format!("counter {COUNTER_PORT}")
        };
        let mib = |bytes: i64| format!("{} MiB", bytes >> 20);
        let split = &self.interruption;
        table.row(&format!("guest {}", self.name), what);
        table.row("  memory", mib(self.memory_bytes));
        table.row(
            "  saved",
            format!(
                "{} on disk; {} written in {} rounds",
                mib(self.saved_bytes),
                mib(self.written_bytes),
                self.rounds
            ),
        );
        table.row("  did not run", seconds(Some(split.total_milliseconds)));
        for (name, value) in [
            ("    pause", ms(Some(split.pause_milliseconds))),
            (
                "    shutdown of the host",
                seconds(Some(split.shutdown_milliseconds)),
            ),
            (
                "    boot of the host",
                seconds(Some(split.host_boot_milliseconds)),
            ),
            ("    start of the agent", ms(Some(split.agent_start_milliseconds))),
            ("    resume", ms(Some(split.resume_milliseconds))),
        ] {
            table.row(name, value);
        }
        table.row(
            "  longest silence, clients",
            format!("{:.1} s", self.silence_ms / 1000.0),
        );
        table.row(
            "  the same, ordinary reboot",
            format!("{:.1} s", self.ordinary_silence_ms / 1000.0),
        );
        table.row(
            "  TCP connection kept",
            if self.connection_kept {
                format!("yes, {} numbers without a gap", self.answered)
            } else {
                "no".to_owned()
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::collections::BTreeMap;

    fn outcome() -> Outcome {
        let guest = |name: &str| {
            json!({
                "name": name, "state": "Resumed", "memoryBytes": 512 << 20, "writtenBytes": 90 << 20,
                "savedBytes": 80 << 20, "rounds": 3,
                "interruption": {"totalMilliseconds": 60_000, "pauseMilliseconds": 200,
                    "shutdownMilliseconds": 20_000, "hostBootMilliseconds": 39_000,
                    "agentStartMilliseconds": 500, "resumeMilliseconds": 300},
            })
        };
        let update = json!({"status": {"phase": "Resumed", "result": {
            "before": {"bootID": "1", "kernelRelease": "old"}, "after": {"bootID": "2", "kernelRelease": "new"},
            "sessions": 2, "resumed": 2, "guests": [guest(COUNTER), guest(GUEST)],
        }}});
        let of = |silence_ms: f64, disconnected: u64| counter::Seen {
            sent: 10,
            answered: 10,
            silence_ms,
            disconnected,
            ..counter::Seen::default()
        };
        let counts = counter::Report {
            phases: BTreeMap::from([
                ("quiet".to_owned(), of(60.0, 0)),
                ("update".to_owned(), of(50_000.0, 0)),
                ("after".to_owned(), of(61_000.0, 0)),
                ("ordinary".to_owned(), of(122_000.0, 1)),
            ]),
            ..counter::Report::default()
        };
        let seen = Seen {
            counts: [counts.clone(), counts],
            load: client::Report {
                acknowledged: 5,
                found: 5,
                ..client::Report::default()
            },
        };
        Outcome::new("here".to_owned(), &update, seen, [Duration::from_secs(100); 3]).unwrap()
    }

    #[test]
    fn a_silence_that_ends_in_the_next_phase_is_not_shortened() {
        let outcome = outcome();
        assert_eq!(outcome.guests[0].silence_ms, 61_000.0);
        assert_eq!(outcome.ratio, 2.0);
        outcome.check("old", "new").unwrap();
        let table = outcome.table();
        for word in [
            "yes, 10 numbers without a gap",
            "80 MiB on disk",
            "5 acknowledged, 5 found",
            "2.0 times",
        ] {
            assert!(table.contains(word), "{word} is missing in\n{table}");
        }
    }

    #[test]
    fn a_lost_line_connection_or_reboot_makes_it_fail() {
        let fails = |change: fn(&mut Outcome), word: &str| {
            let mut outcome = outcome();
            change(&mut outcome);
            let error = outcome.check("old", "new").unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        fails(|outcome| outcome.client.found = 4, "4 were found");
        fails(
            |outcome| {
                if let Some(seen) = outcome.counters[1].phases.get_mut("update") {
                    seen.gaps = 1;
                }
            },
            "guest web did not go on in phase update",
        );
        fails(|outcome| outcome.boot_after = "1".to_owned(), "boot ID");
        fails(
            |outcome| outcome.kernel_after = "old".to_owned(),
            "from old to old",
        );
    }
}
