//! The role that the host gave to this boot: a guest, or the clone of one.
//!
//! It comes in SMBIOS type 11 strings, `io.systemd.credential:understudy.role=clone` and its kin. PID 1 of
//! systemd 250 and later puts them below `/run/credentials/@system` before any unit or generator runs; where
//! it did not, they are read from the firmware tables directly.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Exists once a clone was activated; until then held units wait for it.
pub const ACTIVE: &str = "/run/understudy/active";

const PREFIX: &str = "io.systemd.credential:understudy.";

/// Units that a clone must not run before it took over, besides those that the operation names: they act at
/// times of their own, towards others, or on what the guest still changes.
pub const HELD_BY_DEFAULT: &[&str] = &[
    // Programs that users scheduled: the guest runs them until cutover.
    "cron.service",
    "crond.service",
    "anacron.service",
    "anacron.timer",
    "atd.service",
    // Package management: the guest's own package lock does not reach the clone.
    "apt-daily.timer",
    "apt-daily.service",
    "apt-daily-upgrade.timer",
    "apt-daily-upgrade.service",
    "unattended-upgrades.service",
    "dnf-makecache.timer",
    "packagekit.service",
    // Upkeep that rewrites what the guest is rewriting.
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "logrotate.timer",
    "man-db.timer",
    "sysstat-collect.timer",
    "sysstat-summary.timer",
    "systemd-tmpfiles-clean.timer",
    // Queues whose mail would be sent twice.
    "postfix.service",
    "postfix@-.service",
    "exim4.service",
    "sendmail.service",
    "opensmtpd.service",
    "nullmailer.service",
    "msmtpd.service",
];

/// What the host said about this boot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Role {
    /// Whether this boot is a clone.
    pub clone: bool,
    /// UID of the SeamlessReboot.
    pub operation: Option<String>,
    /// Units that the operation holds.
    pub hold: Vec<String>,
}

impl Role {
    /// Reads the role of this boot.
    pub fn read() -> Self {
        Self::read_from(
            Path::new("/run/credentials/@system"),
            Path::new("/sys/firmware/dmi/entries"),
        )
    }

    fn read_from(credentials: &Path, dmi: &Path) -> Self {
        let get = |name: &str| -> Option<String> {
            let text = fs::read_to_string(credentials.join(format!("understudy.{name}"))).ok();
            text.or_else(|| from_firmware(dmi, name))
                .map(|t| t.trim().to_owned())
        };
        let hold = get("hold").unwrap_or_default();
        Self {
            clone: get("role").as_deref() == Some("clone"),
            operation: get("operation").filter(|o| !o.is_empty()),
            hold: hold
                .split_whitespace()
                .filter(|u| is_unit_name(u))
                .map(str::to_owned)
                .collect(),
        }
    }

    /// Whether this is a clone that was not activated yet.
    pub fn is_waiting_clone(&self) -> bool {
        self.clone && !Path::new(ACTIVE).exists()
    }

    /// All units that wait for the cutover: those that the operation names and the default ones.
    pub fn held_units(&self) -> Vec<String> {
        let mut units = self.hold.clone();
        units.extend(HELD_BY_DEFAULT.iter().map(|u| (*u).to_owned()));
        units.sort();
        units.dedup();
        units
    }
}

/// Whether a string can be the name of a unit (`systemd.unit(5)`); nothing else may become a file name.
pub fn is_unit_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    const KINDS: [&str; 7] = ["service", "timer", "socket", "path", "target", "mount", "slice"];
    name.len() < 256
        && !name.starts_with('.')
        && name.chars().all(allowed)
        && name
            .rsplit_once('.')
            .is_some_and(|(stem, kind)| !stem.is_empty() && KINDS.contains(&kind))
}

fn from_firmware(dmi: &Path, name: &str) -> Option<String> {
    let key = format!("{PREFIX}{name}=");
    let mut entries: Vec<PathBuf> = fs::read_dir(dmi)
        .ok()?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| {
            p.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("11-"))
        })
        .collect();
    entries.sort();
    entries.iter().find_map(|entry| {
        let raw = fs::read(entry.join("raw")).ok()?;
        strings(&raw)
            .into_iter()
            .find_map(|s| s.strip_prefix(&key).map(str::to_owned))
    })
}

/// The strings of an SMBIOS structure: after its formatted part, whose length is its second byte.
fn strings(raw: &[u8]) -> Vec<String> {
    let formatted = raw.get(1).map_or(0, |&n| usize::from(n));
    let rest = raw.get(formatted..).unwrap_or_default();
    rest.split(|&b| b == 0)
        .take_while(|s| !s.is_empty())
        .map(|s| String::from_utf8_lossy(s).into_owned())
        .collect()
}

/// Takes the role of a clone off this boot: held units may start from now on.
pub fn mark_active() -> io::Result<()> {
    fs::create_dir_all("/run/understudy")?;
    fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(ACTIVE)
        .map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_role_is_read_from_credentials() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("understudy.role"), "clone").unwrap();
        fs::write(dir.path().join("understudy.operation"), "uid-1\n").unwrap();
        fs::write(
            dir.path().join("understudy.hold"),
            "a.service b.timer ../evil.service x",
        )
        .unwrap();
        let role = Role::read_from(dir.path(), Path::new("/nonexistent"));
        assert!(role.clone);
        assert_eq!(role.operation.as_deref(), Some("uid-1"));
        assert_eq!(role.hold, ["a.service", "b.timer"]);
        assert!(role.held_units().contains(&"cron.service".to_owned()));
    }

    #[test]
    fn the_role_is_read_from_firmware_where_systemd_did_not() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("11-0")).unwrap();
        let mut raw = vec![11u8, 5, 0, 0, 2];
        raw.extend_from_slice(b"unrelated\0io.systemd.credential:understudy.role=clone\0\0");
        fs::write(dir.path().join("11-0/raw"), raw).unwrap();
        let role = Role::read_from(Path::new("/nonexistent"), dir.path());
        assert!(role.clone);
        assert_eq!(role.operation, None);
    }

    #[test]
    fn without_a_role_the_boot_is_a_guest() {
        let role = Role::read_from(Path::new("/nonexistent"), Path::new("/nonexistent"));
        assert_eq!(role, Role::default());
        assert!(!role.is_waiting_clone());
    }
}
