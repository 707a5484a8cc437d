//! The table at the end of a bench.

use std::fmt::Write as _;

use super::Findings;
use super::operator::OperatorFigures;
use super::statistics::{Sample, duration};
use crate::client::Seen;

/// Interruption as a part of that of an ordinary reboot: at most this, and this in the end.
const INTERRUPTION_NOW: f64 = 50.0;
const INTERRUPTION_GOAL: f64 = 200.0;
/// The guest's freeze against that of `fsfreeze -f; fsfreeze -u`: at most this.
const FREEZE: f64 = 2.0;

/// The pause of a save against the downtime that QEMU reports: at most this.
const DOWNTIME: f64 = 0.5;
/// The pause at 2 GiB against that at 256 MiB: at most this.
const PAUSES: f64 = 2.0;
/// The same against QEMU's save of the stopped guest: shorter by this at least.
const STOPPED: f64 = 10.0;
/// From a process's start to the resumed guest's first instruction, against QEMU: shorter by this at least.
const START: f64 = 5.0;

/// Memory of the operator with a large cluster: at most this.
const OPERATOR_MIB: f64 = 150.0;
/// From a reboot's creation to its assignment, of 99 in 100: at most this, in seconds.
const REACTION: f64 = 1.0;

struct Row {
    figure: String,
    measured: String,
    beside: String,
    verdict: String,
}

impl Findings {
    /// Where it ran, each figure with what it is compared with, and whether goals are reached.
    pub fn table(&self) -> String {
        let rows: Vec<Row> = [
            self.interruption(),
            self.disk_split(),
            self.freeze(),
            self.memory(),
            self.sessions(),
            self.operator.as_ref().map(operator).unwrap_or_default(),
        ]
        .into_iter()
        .flatten()
        .collect();
        let mut text = String::new();
        let _ = writeln!(text, "Bench of {}, commit {}", self.date, self.commit);
        let _ = writeln!(text, "  machine   {}", self.machine.describe());
        if let Some(node) = &self.node {
            let _ = writeln!(text, "  node VM   {}", node.describe());
        }
        let _ = writeln!(
            text,
            "  guest     {}: Debian 12, 1 vCPU, {} MiB, {} → {}",
            self.reboots.machine,
            self.memory.first().map_or(0, |m| m.guest_ram_size_kib >> 10),
            self.reboots.kernel_before,
            self.reboots.kernel_after
        );
        let _ = writeln!(
            text,
            "  medians   of {}, in brackets what the middle half of them fills",
            self.repetitions
        );
        text.push('\n');
        text.push_str(&layout(&rows));
        text
    }

    fn interruption(&self) -> Vec<Row> {
        let phase = |name: &str| self.reboots.client.phases.get(name);
        let (Some(seamless), Some(ordinary)) = (phase("seamless"), phase("ordinary")) else {
            return Vec::new();
        };
        let row = |name: &str, seamless: &Seen, ordinary: &Seen| {
            let times = ordinary.interruption_ms / seamless.interruption_ms.max(0.001);
            Row {
                figure: format!("interruption, {name}"),
                measured: format!("seamless {}", duration(seamless.interruption_ms * 1e3)),
                beside: format!("ordinary {}", duration(ordinary.interruption_ms * 1e3)),
                verdict: format!(
                    "1/{times:.0}  at most 1/{INTERRUPTION_NOW}: {}, goal 1/{INTERRUPTION_GOAL}: {}",
                    reached(times >= INTERRUPTION_NOW),
                    reached(times >= INTERRUPTION_GOAL)
                ),
            }
        };
        vec![
            row("page", &seamless.page, &ordinary.page),
            row("ledger", &seamless.ledger, &ordinary.ledger),
            Row {
                figure: "the same, by the agent".to_owned(),
                measured: format!(
                    "seamless {}",
                    duration(self.reboots.interruption_agent_ms as f64 * 1e3)
                ),
                beside: String::new(),
                verdict: String::new(),
            },
        ]
    }

    fn disk_split(&self) -> Vec<Row> {
        let [small, large] = &self.splits[..] else {
            return Vec::new();
        };
        let place = if self.splits_in_node {
            "in the node VM"
        } else {
            "on the machine"
        };
        let row = |what: &str, small: &Sample, large: &Sample| Row {
            figure: format!("disk split, {what}"),
            measured: format!("1 TiB {large}"),
            beside: format!("1 GiB {small}"),
            verdict: format!(
                "{}  the same within noise: {}, {place}",
                ratio(large.median_us, small.median_us),
                reached(large.same_within_noise(small))
            ),
        };
        let mut rows = vec![
            row("held", &small.held, &large.held),
            row("answered", &small.answered, &large.answered),
            row("prepared before", &small.prepared, &large.prepared),
        ];
        if let Some(held) = self.serving_split_held_us {
            rows.push(Row {
                figure: "disk split, serving guest".to_owned(),
                measured: format!("held {}", duration(held as f64)),
                beside: String::new(),
                verdict: String::new(),
            });
        }
        rows
    }

    fn freeze(&self) -> Vec<Row> {
        let Some(split) = self.reboots.split_freeze_us else {
            return Vec::new();
        };
        let split = split as f64;
        let commands = &self.bare_freeze.commands;
        let ioctls = &self.bare_freeze.ioctls;
        vec![
            Row {
                figure: "freeze for the split".to_owned(),
                measured: duration(split),
                beside: format!("fsfreeze -f; -u  {commands}"),
                verdict: format!(
                    "{}  at most {FREEZE}: {}",
                    ratio(split, commands.median_us),
                    reached(split <= FREEZE * commands.median_us)
                ),
            },
            Row {
                figure: "the same".to_owned(),
                measured: duration(split),
                beside: format!("its ioctls alone {ioctls}"),
                verdict: ratio(split, ioctls.median_us),
            },
        ]
    }

    fn sessions(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for s in &self.sessions {
            let to_downtime = s.pause.median_us / s.qemu_downtime.median_us.max(1.0);
            let to_start = s.qemu_start.median_us / s.start.median_us.max(1.0);
            rows.push(Row {
                figure: format!("pause of a save, {} MiB", s.memory_mib),
                measured: s.pause.to_string(),
                beside: format!("QEMU's downtime {}", s.qemu_downtime),
                verdict: format!(
                    "x {to_downtime:.2}  at most {DOWNTIME}: {}",
                    reached(to_downtime <= DOWNTIME)
                ),
            });
            rows.push(Row {
                figure: format!("start to resumed guest, {} MiB", s.memory_mib),
                measured: s.start.to_string(),
                beside: format!("QEMU's -incoming {}", s.qemu_start),
                verdict: format!(
                    "1/{to_start:.0}  at most 1/{START}: {}",
                    reached(to_start >= START)
                ),
            });
        }
        if let [small, large] = &self.sessions[..] {
            let to_small = large.pause.median_us / small.pause.median_us.max(1.0);
            let to_stopped = large.qemu_stopped.median_us / large.pause.median_us.max(1.0);
            rows.push(Row {
                figure: "pause, large / small".to_owned(),
                measured: large.pause.to_string(),
                beside: small.pause.to_string(),
                verdict: format!(
                    "x {to_small:.2}  at most {PAUSES}: {}",
                    reached(to_small <= PAUSES)
                ),
            });
            rows.push(Row {
                figure: format!("pause, {} MiB", large.memory_mib),
                measured: large.pause.to_string(),
                beside: format!("QEMU's save of it stopped {}", large.qemu_stopped),
                verdict: format!(
                    "1/{to_stopped:.0}  at most 1/{STOPPED}: {}",
                    reached(to_stopped >= STOPPED)
                ),
            });
        }
        rows
    }

    fn memory(&self) -> Vec<Row> {
        let mib = |kib: u64| kib as f64 / 1024.0;
        self.memory
            .iter()
            .map(|m| Row {
                figure: format!("VMM {}, {:?}", m.incarnation, m.state),
                measured: format!("{:.1} MiB beyond guest RAM", mib(m.unique_kib())),
                beside: format!(
                    "written {:.1}, program {:.1}; page tables {:.1} more",
                    mib(m.dirty_kib),
                    mib(m.clean_kib),
                    mib(m.page_tables_kib)
                ),
                verdict: format!("guest RAM {:.0} MiB, {}", mib(m.guest_ram_kib), m.when),
            })
            .collect()
    }
}

impl OperatorFigures {
    /// The figures of the operator alone.
    pub fn table(&self) -> String {
        layout(&operator(self))
    }
}

fn operator(figures: &OperatorFigures) -> Vec<Row> {
    let mib = |kib: u64| kib as f64 / 1024.0;
    let (rss, late) = (mib(figures.rss_kib), figures.reaction_us(0.99));
    vec![
        Row {
            figure: "operator, memory".to_owned(),
            measured: format!("{rss:.1} MiB"),
            beside: format!("at most, ever {:.1} MiB", mib(figures.peak_kib)),
            verdict: format!(
                "{} guests, {} hosts  at most {OPERATOR_MIB} MiB: {}",
                figures.guests,
                figures.hosts,
                reached(rss <= OPERATOR_MIB)
            ),
        },
        Row {
            figure: "operator, apply to assignment".to_owned(),
            measured: format!("99 in 100 {}", duration(late)),
            beside: format!("median {}", duration(figures.reaction_us(0.5))),
            verdict: format!(
                "{} in flight  at most {REACTION} s: {}",
                figures.in_flight,
                reached(late <= REACTION * 1e6)
            ),
        },
        Row {
            figure: "operator, all asked at once".to_owned(),
            measured: format!("99 in 100 {}", duration(figures.burst_us(0.99))),
            beside: format!("median {}", duration(figures.burst_us(0.5))),
            verdict: format!("{} in one moment", figures.burst_us.len()),
        },
        Row {
            figure: "operator, steady state".to_owned(),
            measured: format!("{} writes", figures.quiet_writes),
            beside: format!("{} heartbeats", figures.quiet_heartbeats),
            verdict: format!("none: {}", reached(figures.quiet_writes == 0)),
        },
        Row {
            figure: "API writes of a reboot".to_owned(),
            measured: format!("operator {:.1}", figures.operator_writes),
            beside: format!("agent's part {:.1}", figures.agent_writes),
            verdict: String::new(),
        },
    ]
}

/// Rows in columns.
fn layout(rows: &[Row]) -> String {
    let width = |of: fn(&Row) -> &str| rows.iter().map(|row| of(row).chars().count()).max().unwrap_or(0);
    let (figure, measured, beside) = (
        width(|row| &row.figure),
        width(|row| &row.measured),
        width(|row| &row.beside),
    );
    let mut text = String::new();
    for row in rows {
        let line = format!(
            "  {:figure$}  {:measured$}  {:beside$}  {}",
            row.figure, row.measured, row.beside, row.verdict
        );
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

fn ratio(measured: f64, beside: f64) -> String {
    format!("x {:.2}", measured / beside.max(1.0))
}

fn reached(yes: bool) -> &'static str {
    if yes { "yes" } else { "NO" }
}
