//! Which paths are not merged like any other: the one table of exceptions.

/// How a path is merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The guest's change is applied; where both sides changed it, it is a conflict.
    Merge,
    /// The clone's own is right: never sent, never applied.
    Exempt,
    /// A log: where both sides appended, both tails are kept.
    Log,
    /// A journal file of systemd: the guest's is kept as an archived one beside the clone's.
    Journal,
}

/// Trees and files that belong to a boot and not to the guest's data.
const EXEMPT: &[&str] = &[
    // Our own state: what is kept of conflicts, files under way.
    "/var/lib/understudy",
    "/.understudy",
    // Emptied by every ordinary reboot, too; services' private ones carry the boot ID in their names.
    "/tmp",
    // Each boot draws its own.
    "/var/lib/systemd/random-seed",
    "/var/lib/urandom/random-seed",
    "/var/lib/misc/random-seed",
    "/boot/grub/grubenv",
    // The clone got its own lease, which is the guest's.
    "/var/lib/dhcp",
    "/var/lib/dhclient",
    // The clock file must never go back.
    "/var/lib/systemd/timesync/clock",
    "/var/lib/private/systemd/timesync/clock",
    // Caches of the boot's own device scan.
    "/run",
    "/dev",
    "/proc",
    "/sys",
    "/etc/mtab",
];

/// Prefixes of names: `systemd-private-<boot id>-…` directories below `/var/tmp`.
const EXEMPT_PREFIX: &[&str] = &["/var/tmp/systemd-private-"];

/// Logs of fixed-size records that are appended to.
const RECORD_LOGS: &[&str] = &["/var/log/wtmp", "/var/log/btmp"];

/// Where the guest's version is right and no tail can be joined: indexed by user id.
const NO_LOGS: &[&str] = &["/var/log/lastlog", "/var/log/faillog", "/var/log/tallylog"];

/// The rule for an absolute path of the guest.
pub fn rule(path: &[u8]) -> Rule {
    let within = |tree: &&str| {
        path.strip_prefix(tree.as_bytes())
            .is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
    };
    // A file system's own directory for files under way lies at its root, wherever that is mounted.
    let under_way = path.split(|&b| b == b'/').any(|c| c == b".understudy");
    let prefixed = EXEMPT_PREFIX.iter().any(|p| path.starts_with(p.as_bytes()));
    if under_way || prefixed || EXEMPT.iter().any(within) {
        return Rule::Exempt;
    }
    if within(&"/var/log/journal") && path.ends_with(b".journal") {
        return Rule::Journal;
    }
    let is = |list: &[&str]| list.iter().any(|p| p.as_bytes() == path);
    if is(RECORD_LOGS) {
        return Rule::Log;
    }
    let is_text_log = within(&"/var/log") || path.ends_with(b".log");
    if is_text_log && !is(NO_LOGS) && !is_packed(path) {
        Rule::Log
    } else {
        Rule::Merge
    }
}

/// Whether a log is joined at the ends of lines.
pub fn is_text(path: &[u8]) -> bool {
    !RECORD_LOGS.iter().any(|p| p.as_bytes() == path)
}

/// Rotated and compressed logs are whole files.
fn is_packed(path: &[u8]) -> bool {
    [".gz", ".xz", ".zst", ".bz2", ".journal~"]
        .iter()
        .any(|s| path.ends_with(s.as_bytes()))
}

/// Units that are never stopped on the clone because their files changed: without them there is no system,
/// and none of them keeps the guest's data.
pub fn never_stop(unit: &str) -> bool {
    const NEVER: &[&str] = &[
        "dbus.service",
        "understudy-guest.service",
        "rescue.service",
        "emergency.service",
    ];
    const PREFIXES: &[&str] = &[
        "systemd-",
        "user@",
        "user-runtime-dir@",
        "getty@",
        "serial-getty@",
        "session-",
        "init.scope",
    ];
    !unit.ends_with(".service") || NEVER.contains(&unit) || PREFIXES.iter().any(|p| unit.starts_with(p))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_is_merged_how() {
        for (path, expected) in [
            ("/srv/ledger", Rule::Merge),
            ("/etc/hostname", Rule::Merge),
            ("/tmp/x", Rule::Exempt),
            ("/tmpfiles", Rule::Merge),
            (
                "/var/tmp/systemd-private-1234-nginx.service-x/tmp/y",
                Rule::Exempt,
            ),
            ("/var/tmp/mine", Rule::Merge),
            ("/var/lib/understudy/conflicts/x", Rule::Exempt),
            ("/srv/.understudy/3", Rule::Exempt),
            ("/var/lib/systemd/random-seed", Rule::Exempt),
            ("/var/lib/systemd/timers/stamp-x", Rule::Merge),
            ("/var/log/journal/abc/system.journal", Rule::Journal),
            ("/var/log/nginx/access.log", Rule::Log),
            ("/var/log/syslog.2.gz", Rule::Merge),
            ("/var/log/wtmp", Rule::Log),
            ("/var/log/lastlog", Rule::Merge),
            ("/opt/app/app.log", Rule::Log),
        ] {
            assert_eq!(rule(path.as_bytes()), expected, "{path}");
        }
    }

    #[test]
    fn the_system_itself_is_never_stopped() {
        assert!(
            never_stop("systemd-journald.service") && never_stop("dbus.service") && never_stop("init.scope")
        );
        assert!(!never_stop("nginx.service"));
    }
}
