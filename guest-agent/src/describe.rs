//! The boot notice: what this guest is and how it does.

use std::cmp::Ordering;
use std::fs;
use std::path::Path;

use understudy_channel::{Description, Filesystem};

use crate::role::Role;
use crate::systemd::Systemd;
use crate::{mounts, network};

/// State of the guest as of now. What cannot be found out is left empty; a description is always possible.
pub fn describe(role: &Role, capturing: Option<String>) -> Description {
    let (system_state, failed_units) = system_state();
    let kernel_release = read("/proc/sys/kernel/osrelease");
    Description {
        agent: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id: read("/proc/sys/kernel/random/boot_id"),
        clone: role.is_waiting_clone(),
        boot_complete: is_boot_complete(&system_state),
        system_state,
        failed_units,
        uptime_us: uptime_us(),
        reboot_required: reboot_required(&kernel_release, Path::new("/")),
        kernel_release,
        interfaces: network::interfaces(),
        filesystems: filesystems(),
        capturing,
    }
}

/// Whether systemd has left `initializing` and `starting`. `offline` and `unknown` mean that nobody answered.
pub fn is_boot_complete(system_state: &str) -> bool {
    matches!(system_state, "running" | "degraded" | "maintenance" | "stopping")
}

fn system_state() -> (String, Vec<String>) {
    let asked = Systemd::connect().and_then(|mut systemd| {
        let state = systemd.state()?;
        let failed = systemd.units(&["failed"])?.into_iter().map(|u| u.name).collect();
        Ok((state, failed))
    });
    asked.unwrap_or_else(|_| ("offline".to_owned(), Vec::new()))
}

/// Time since boot, in microseconds.
pub fn uptime_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}

fn filesystems() -> Vec<Filesystem> {
    let Ok(mounts) = mounts::local_writable() else {
        return Vec::new();
    };
    mounts
        .into_iter()
        .map(|m| Filesystem {
            mount_point: m.mount_point.to_string_lossy().into_owned(),
            device: device_name(&m.source, &m.device),
            kind: m.kind,
        })
        .collect()
}

/// `/dev/root` and `/dev/disk/by-uuid/…` are told by their kernel name.
fn device_name(source: &str, number: &str) -> String {
    match fs::read_link(format!("/sys/dev/block/{number}")) {
        Ok(link) => match link.file_name() {
            Some(name) => format!("/dev/{}", name.to_string_lossy()),
            None => source.to_owned(),
        },
        Err(_) => source.to_owned(),
    }
}

/// Why a reboot is pending: the newest kernel release installed below `root`/boot where it is newer than
/// `running`; or what asked for one in `/run/reboot-required`.
pub fn reboot_required(running: &str, root: &Path) -> Option<String> {
    let newest = fs::read_dir(root.join("boot"))
        .ok()?
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter_map(|n| n.strip_prefix("vmlinuz-").map(str::to_owned))
        .filter(|r| !r.ends_with(".dpkg-tmp") && !r.ends_with(".dpkg-new") && !r.ends_with(".bak"))
        .max_by(|a, b| compare_versions(a, b));
    if let Some(newest) = newest
        && compare_versions(&newest, running) == Ordering::Greater
    {
        return Some(newest);
    }
    if !root.join("run/reboot-required").exists() {
        return None;
    }
    let packages = fs::read_to_string(root.join("run/reboot-required.pkgs")).unwrap_or_default();
    let mut names: Vec<&str> = packages
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    names.sort_unstable();
    names.dedup();
    let mut text = if names.is_empty() {
        "/run/reboot-required".to_owned()
    } else {
        format!("/run/reboot-required: {}", names.join(", "))
    };
    if let Some((end, _)) = text.char_indices().nth(500) {
        text.truncate(end);
    }
    Some(text)
}

/// Compares version strings as GNU `sort -V` does where kernel releases are concerned: runs of digits by
/// value, all else by its bytes.
pub fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        let (text_a, rest_a) = split(a, |c| !c.is_ascii_digit());
        let (text_b, rest_b) = split(b, |c| !c.is_ascii_digit());
        let (digits_a, next_a) = split(rest_a, u8::is_ascii_digit);
        let (digits_b, next_b) = split(rest_b, u8::is_ascii_digit);
        let order = text_a.cmp(text_b).then_with(|| {
            let (x, y) = (trim_zeros(digits_a), trim_zeros(digits_b));
            x.len().cmp(&y.len()).then_with(|| x.cmp(y))
        });
        if order != Ordering::Equal || (next_a.is_empty() && next_b.is_empty()) {
            return order;
        }
        (a, b) = (next_a, next_b);
    }
}

fn split(bytes: &[u8], keep: impl Fn(&u8) -> bool) -> (&[u8], &[u8]) {
    bytes.split_at(bytes.iter().position(|c| !keep(c)).unwrap_or(bytes.len()))
}

fn trim_zeros(digits: &[u8]) -> &[u8] {
    &digits[digits.iter().position(|&c| c != b'0').unwrap_or(digits.len())..]
}

fn read(path: &str) -> String {
    fs::read_to_string(path)
        .map(|t| t.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_ordered_by_their_numbers() {
        let ordered = [
            "6.1.0-9-cloud-amd64",
            "6.1.0-47-cloud-amd64",
            "6.1.0-50-cloud-amd64",
            "6.12.8+deb13-cloud-amd64",
        ];
        for pair in ordered.windows(2) {
            assert_eq!(compare_versions(pair[0], pair[1]), Ordering::Less, "{pair:?}");
        }
        assert_eq!(compare_versions("6.1", "6.1"), Ordering::Equal);
        assert_eq!(compare_versions("6.1", "6.1.1"), Ordering::Less);
    }

    #[test]
    fn a_newer_installed_kernel_or_a_package_asks_for_a_reboot() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("boot")).unwrap();
        fs::create_dir(root.path().join("run")).unwrap();
        fs::write(root.path().join("boot/vmlinuz-6.1.0-47-cloud-amd64"), "").unwrap();
        assert_eq!(reboot_required("6.1.0-47-cloud-amd64", root.path()), None);
        fs::write(root.path().join("run/reboot-required"), "").unwrap();
        fs::write(
            root.path().join("run/reboot-required.pkgs"),
            "libc6\nlibc6\ndbus\n",
        )
        .unwrap();
        assert_eq!(
            reboot_required("6.1.0-47-cloud-amd64", root.path()).unwrap(),
            "/run/reboot-required: dbus, libc6"
        );
        fs::write(root.path().join("boot/vmlinuz-6.1.0-50-cloud-amd64"), "").unwrap();
        let newest = reboot_required("6.1.0-47-cloud-amd64", root.path()).unwrap();
        assert_eq!(newest, "6.1.0-50-cloud-amd64");
    }

    #[test]
    fn a_description_is_possible_anywhere() {
        let description = describe(&Role::default(), None);
        assert!(!description.boot_id.is_empty() && !description.kernel_release.is_empty());
        assert!(description.uptime_us > 0);
    }
}
