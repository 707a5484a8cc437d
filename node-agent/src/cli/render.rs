//! Tables for people.

use jiff::Timestamp;
use understudy_api::conditions::types;
use understudy_api::{Condition, Guest, Phase, SeamlessReboot};

use super::hosts;
use super::list::List;
use crate::store::Object;

/// Width of a progress bar.
const BAR: usize = 20;

/// All tables of a list.
pub(super) fn tables(list: &List, wide: bool, now: Timestamp) -> String {
    let mut text = hosts::host_table(&list.hosts, wide, now);
    if !list.guests.is_empty() {
        if !text.is_empty() {
            text.push('\n');
        }
        let rows = list.guests.iter().map(|guest| guest_row(guest, wide, now));
        text.push_str(&table(guest_header(wide), rows.collect()));
    }
    if !list.reboots.is_empty() {
        if !text.is_empty() {
            text.push('\n');
        }
        let rows = list.reboots.iter().map(|reboot| reboot_row(reboot, wide, now));
        text.push_str(&table(reboot_header(wide), rows.collect()));
    }
    for part in [
        hosts::host_update_table(&list.host_updates, now),
        hosts::node_update_table(&list.node_updates, wide, now),
        hosts::session_table(&list.node_updates, wide),
    ] {
        if !part.is_empty() && !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&part);
    }
    text.push_str(&hosts::notes(list));
    for guest in &list.guests {
        let ready = condition(
            guest.status.as_ref().map(|status| &status.conditions),
            types::READY,
        );
        if let Some(ready) = ready.filter(|ready| ready.status != "True" && !ready.message.is_empty()) {
            text.push_str(&format!(
                "\nguest {}: {}: {}\n",
                guest.key(),
                ready.reason,
                ready.message
            ));
        }
    }
    for reboot in &list.reboots {
        let status = reboot.status.clone().unwrap_or_default();
        let bad = matches!(
            status.phase,
            Some(Phase::RolledBack | Phase::Failed | Phase::Aborted)
        );
        let waits = matches!(status.phase, Some(Phase::Pending | Phase::AwaitingCutover));
        if let Some(message) = status
            .message
            .filter(|message| (bad || waits) && !message.is_empty())
        {
            let reason = status.reason.unwrap_or_default();
            text.push_str(&format!("\nreboot {}: {reason}: {message}\n", reboot.key()));
        }
        if let Some(action) = status.action
            && let Some(refused) = action.refused
        {
            let kind = action.kind.as_str();
            text.push_str(&format!(
                "\nreboot {}: {kind} was refused: {refused}\n",
                reboot.key()
            ));
        }
    }
    for problem in &list.problems {
        text.push_str(&format!(
            "\nmanifest {}: {}\n",
            problem.file.display(),
            problem.message
        ));
    }
    if text.is_empty() {
        text.push_str("No guests found.\n");
    }
    text
}

fn guest_header(wide: bool) -> Vec<&'static str> {
    let mut header = vec![
        "NAMESPACE",
        "GUEST",
        "PHASE",
        "READY",
        "KERNEL",
        "REBOOT",
        "ADDRESSES",
        "AGE",
    ];
    if wide {
        header.extend(["INCARNATION", "DORMANT", "BOOT-ID"]);
    }
    header
}

fn guest_row(guest: &Guest, wide: bool, now: Timestamp) -> Vec<String> {
    let key = guest.key();
    let status = guest.status.clone().unwrap_or_default();
    let conditions = Some(&status.conditions);
    let state = |kind| condition(conditions, kind).map_or("Unknown".to_owned(), |c| c.status.clone());
    let mut row = vec![
        key.namespace,
        key.name,
        status
            .phase
            .map_or("Pending".to_owned(), |phase| format!("{phase:?}")),
        state(types::READY),
        dash(status.kernel_release.clone()),
        match state(types::REBOOT_REQUIRED).as_str() {
            "True" => "Required".to_owned(),
            "False" => "No".to_owned(),
            _ => "-".to_owned(),
        },
        dash((!status.addresses.is_empty()).then(|| status.addresses.join(","))),
        age(guest.metadata.creation_timestamp.as_ref().map(|time| time.0), now),
    ];
    if wide {
        row.push(dash(status.incarnation.map(|number| number.to_string())));
        row.push(dash(status.dormant.map(|dormant| {
            let left = dormant.deadline.0.as_second() - now.as_second();
            format!("{} ({})", dormant.incarnation, human(left.max(0)))
        })));
        row.push(dash(status.boot_id));
    }
    row
}

fn reboot_header(wide: bool) -> Vec<&'static str> {
    let mut header = vec![
        "NAMESPACE",
        "REBOOT",
        "GUEST",
        "PHASE",
        "PROGRESS",
        "INTERRUPTION",
        "AGE",
    ];
    if wide {
        header.extend(["KERNEL", "ROUNDS", "FILES", "BYTES", "CONFLICTS", "REASON"]);
    }
    header
}

fn reboot_row(reboot: &SeamlessReboot, wide: bool, now: Timestamp) -> Vec<String> {
    let key = reboot.key();
    let status = reboot.status.clone().unwrap_or_default();
    let phase = status.phase.unwrap_or_default();
    let result = status.result.clone().unwrap_or_default();
    let since = status.phase_transitions.last().map(|last| last.transition_time.0);
    let progress = match &status.progress {
        _ if phase.is_terminal() => bar(Some(if phase == Phase::Succeeded { 100 } else { 0 }), phase),
        Some(progress) => {
            let mut text = bar(progress.percent, phase);
            if let Some(files) = progress.files {
                text.push_str(&format!(" {files} files"));
            }
            if let Some(since) = since {
                text.push_str(&format!(" {}", human(now.as_second() - since.as_second())));
            }
            text
        }
        None => bar(None, phase),
    };
    let mut row = vec![
        key.namespace,
        key.name,
        reboot.spec.guest_name.clone(),
        phase.to_string(),
        progress,
        dash(
            result
                .interruption_milliseconds
                .map(|millis| format!("{millis}ms")),
        ),
        age(
            reboot.metadata.creation_timestamp.as_ref().map(|time| time.0),
            now,
        ),
    ];
    if wide {
        row.push(dash(result.after.map(|after| after.kernel_release)));
        row.push(result.rounds.to_string());
        row.push(result.files.to_string());
        row.push(result.bytes.to_string());
        row.push(result.conflict_count.to_string());
        row.push(dash(status.reason));
    }
    row
}

/// How far a reboot is in all: the phases before, and what is known of this one.
fn bar(percent: Option<i32>, phase: Phase) -> String {
    // Where a run's time goes, roughly: most of it is the clone's boot.
    let (from, to) = match phase {
        Phase::Pending => (0, 2),
        Phase::Confirmed => (2, 5),
        Phase::Cloning => (5, 10),
        Phase::Rebooting => (10, 70),
        Phase::Integrating => (70, 92),
        Phase::AwaitingCutover => (92, 92),
        Phase::CuttingOver => (92, 99),
        Phase::Succeeded => (100, 100),
        Phase::RolledBack | Phase::Failed | Phase::Aborted => return "-".to_owned(),
    };
    let share = percent.unwrap_or(0).clamp(0, 100);
    let whole = (from + (to - from) * share / 100).clamp(0, 100);
    draw(whole)
}

/// A bar that is `percent` full.
pub(super) fn draw(percent: i32) -> String {
    let percent = percent.clamp(0, 100);
    let filled = usize::try_from(percent).unwrap_or(0) * BAR / 100;
    format!(
        "[{}{}] {percent:>3}%",
        "#".repeat(filled),
        "-".repeat(BAR - filled)
    )
}

pub(super) fn condition<'a>(conditions: Option<&'a Vec<Condition>>, kind: &str) -> Option<&'a Condition> {
    conditions?.iter().find(|condition| condition.type_ == kind)
}

pub(super) fn dash(text: Option<String>) -> String {
    text.filter(|text| !text.is_empty())
        .unwrap_or_else(|| "-".to_owned())
}

pub(super) fn age(created: Option<Timestamp>, now: Timestamp) -> String {
    match created {
        Some(created) => human((now.as_second() - created.as_second()).max(0)),
        None => "-".to_owned(),
    }
}

/// Seconds as kubectl writes ages.
pub(super) fn human(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{seconds}s"),
        120..600 if seconds % 60 != 0 => format!("{}m{}s", seconds / 60, seconds % 60),
        120..10_800 => format!("{}m", seconds / 60),
        10_800..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

pub(super) fn table(header: Vec<&str>, rows: Vec<Vec<String>>) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.len()).collect();
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: Vec<&str>| {
        let mut text = String::new();
        for (cell, width) in cells.iter().zip(&widths) {
            text.push_str(cell);
            text.push_str(&" ".repeat(width - cell.chars().count() + 3));
        }
        text.trim_end().to_owned() + "\n"
    };
    let mut text = line(header);
    for row in &rows {
        text.push_str(&line(row.iter().map(String::as_str).collect()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_api::SeamlessRebootStatus;
    use understudy_api::manifest::{Manifest, parse};

    fn list() -> List {
        let text = "apiVersion: understudy.dev/v1alpha1\nkind: Guest\nmetadata: {name: web}\nspec:\n  memory: 512Mi\n  disks: [{name: root, role: Root, source: web.img}]\n---\napiVersion: understudy.dev/v1alpha1\nkind: SeamlessReboot\nmetadata: {name: kernel}\nspec: {guestName: web}\n";
        let mut list = List::default();
        for manifest in parse(text).unwrap() {
            match manifest.unwrap() {
                Manifest::Guest(guest) => list.guests.push(*guest),
                Manifest::SeamlessReboot(reboot) => list.reboots.push(*reboot),
                Manifest::HostUpdate(_) => unreachable!(),
            }
        }
        list
    }

    #[test]
    fn tables_line_up_and_tell_what_is_wrong() {
        let mut list = list();
        list.reboots[0].status = Some(SeamlessRebootStatus {
            phase: Some(Phase::Failed),
            reason: Some("CloneDied".into()),
            message: Some("the clone's kernel panicked".into()),
            ..SeamlessRebootStatus::default()
        });
        list.problems.push(crate::store::Problem {
            file: "/etc/understudy/manifests/bad.yaml".into(),
            message: "document 1: spec.memory: is required".into(),
        });
        let text = tables(&list, true, Timestamp::now());
        for part in [
            "NAMESPACE",
            "web",
            "CloneDied: the clone's kernel panicked",
            "bad.yaml: document 1: spec.memory",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
        let column = |line: &str, word: &str| line.find(word);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(column(lines[0], "PHASE"), column(lines[1], "Pending"));
    }

    #[test]
    fn a_bar_grows_with_the_phases() {
        assert!(bar(Some(50), Phase::Rebooting).contains(" 40%"));
        assert!(bar(None, Phase::Succeeded).contains("100%"));
        assert_eq!(human(61), "61s");
        assert_eq!(human(7200), "120m");
    }
}
