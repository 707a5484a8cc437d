//! What the demo found: the table at its end, and the same as JSON.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::{Table, ms};
use crate::client::{Phase, Report};
use crate::machine::Machine;

/// What one run of the demo found.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// Where it ran.
    pub machine: String,
    /// Kernel before.
    pub kernel_before: String,
    /// Kernel after the seamless reboot.
    pub kernel_after: String,
    /// Files and other paths integrated, in all rounds.
    pub files: i64,
    /// Bytes of content integrated.
    pub bytes: i64,
    /// Rounds of integration.
    pub rounds: i64,
    /// Files that both sides had changed.
    pub conflicts: i64,
    /// Interruption as the agent measured it, in milliseconds.
    pub interruption_agent_ms: i64,
    /// From holding ingress to the commit point, in milliseconds.
    pub pause_ms: Option<i64>,
    /// How long the file systems were frozen for the split, in microseconds.
    pub split_freeze_us: Option<i64>,
    /// How long the clone took to boot, in milliseconds.
    pub clone_boot_ms: Option<i64>,
    /// What the client saw, phase by phase, and what became of its lines.
    pub client: Report,
    /// The larger of page and ledger: ordinary interruption divided by seamless interruption.
    pub ratio: f64,
    /// Duration of the seamless reboot from manifest to `Succeeded`, in seconds.
    pub seamless_seconds: f64,
    /// Duration of the ordinary reboot until it answered again, in seconds.
    pub ordinary_seconds: f64,
    /// Duration of the whole run, set-up left out, in seconds.
    pub total_seconds: f64,
    /// The SeamlessReboot's status at its end.
    pub status: Value,
}

impl Outcome {
    /// Joins what the agent and the client say.
    #[allow(clippy::too_many_arguments)] // One value per row of the table.
    pub fn new(
        machine: &Machine,
        older: &str,
        newer: &str,
        object: &Value,
        client: Report,
        seamless: Duration,
        ordinary: Duration,
        total: Duration,
    ) -> Result<Outcome> {
        let result = &object["status"]["result"];
        let number = |field: &str| result[field].as_i64();
        let worst = |phase: &str| -> Result<f64> {
            let seen: &Phase = client
                .phases
                .get(phase)
                .with_context(|| format!("no phase {phase}"))?;
            Ok(seen.page.interruption_ms.max(seen.ledger.interruption_ms))
        };
        Ok(Outcome {
            machine: machine.describe(),
            kernel_before: older.to_owned(),
            kernel_after: newer.to_owned(),
            files: number("files").unwrap_or_default(),
            bytes: number("bytes").unwrap_or_default(),
            rounds: number("rounds").unwrap_or_default(),
            conflicts: number("conflictCount").unwrap_or_default(),
            interruption_agent_ms: number("interruptionMilliseconds")
                .context("the agent's status tells no interruption")?,
            pause_ms: number("pauseMilliseconds"),
            split_freeze_us: number("splitFreezeMicroseconds"),
            clone_boot_ms: number("cloneBootMilliseconds"),
            ratio: worst("ordinary")? / worst("seamless")?.max(0.001),
            client,
            seamless_seconds: seamless.as_secs_f64(),
            ordinary_seconds: ordinary.as_secs_f64(),
            total_seconds: total.as_secs_f64(),
            status: object["status"].clone(),
        })
    }

    /// What must hold, whatever the machine: nothing that was acknowledged is lost.
    pub fn check(&self) -> Result<()> {
        self.client.ensure_nothing_lost()
    }

    /// The table.
    pub fn table(&self) -> String {
        let mut table = Table::default();
        let mut row = |name: &str, value: String| table.row(name, value);
        row("where", self.machine.clone());
        row("kernel before", self.kernel_before.clone());
        row("kernel after", self.kernel_after.clone());
        row(
            "integrated",
            format!(
                "{} files, {} bytes, {} rounds",
                self.files, self.bytes, self.rounds
            ),
        );
        row("conflicts", self.conflicts.to_string());
        row("clone boot, behind the curtain", ms(self.clone_boot_ms));
        row(
            "freeze for the split",
            ms(self.split_freeze_us.map(|us| us / 1000)),
        );
        row("pause until the commit point", ms(self.pause_ms));
        row("interruption, agent", ms(Some(self.interruption_agent_ms)));
        for (phase, what) in [
            ("quiet", "nothing"),
            ("seamless", "seamless"),
            ("ordinary", "ordinary reboot"),
        ] {
            if let Some(seen) = self.client.phases.get(phase) {
                row(
                    &format!("longest silence, client, {what}"),
                    format!(
                        "page {:.0} ms, ledger {:.0} ms",
                        seen.page.interruption_ms, seen.ledger.interruption_ms
                    ),
                );
            }
        }
        for (phase, what) in [("seamless", "seamless"), ("ordinary", "ordinary")] {
            if let Some(seen) = self.client.phases.get(phase) {
                for (name, s) in [("page", &seen.page), ("ledger", &seen.ledger)] {
                    row(
                        &format!("requests, {what}, {name}"),
                        format!("{} sent, {} late, {} failed", s.sent, s.late, s.failed),
                    );
                }
            }
        }
        row(
            "ledger lines",
            format!(
                "{} acknowledged, {} found",
                self.client.acknowledged, self.client.found
            ),
        );
        row("ordinary / seamless", format!("{:.0} times shorter", self.ratio));
        table.text()
    }
}
