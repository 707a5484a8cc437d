//! Taps: persistent, on the bridge that the Guest names, with a queue that holds what arrives while a
//! cutover holds ingress. The `ip` tool does the work; names are ours alone (`us…`).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use uuid::Uuid;

/// Frames that wait while ingress is held: 10 s at a thousand frames a second. The kernel's default is
/// 1000 (`txqueuelen`), at which a cutover would lose frames under load.
const QUEUE: &str = "10000";

/// Why a tap could not be made ready.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The bridge is missing.
    #[error(
        "bridge {0} does not exist on this node; make it, or name another one in the Guest's networks[].bridge"
    )]
    NoBridge(String),
    /// The device of that name is no bridge.
    #[error("{0} is not a bridge; name a bridge in the Guest's networks[].bridge")]
    NotBridge(String),
    /// `ip` could not be run.
    #[error("running ip(8) from iproute2: {0}")]
    NoTool(#[source] io::Error),
    /// `ip` failed.
    #[error("`ip {arguments}` failed: {message}")]
    Failed {
        /// What it was asked.
        arguments: String,
        /// What it said.
        message: String,
    },
}

/// Name of the tap of a guest's interface: stable, at most 15 bytes (`IFNAMSIZ`).
pub fn tap_name(guest_uid: &str, index: usize) -> String {
    let id = Uuid::new_v5(
        &Uuid::NAMESPACE_OID,
        format!("tap/{guest_uid}/{index}").as_bytes(),
    );
    format!("us{}", &id.simple().to_string()[..12])
}

/// MAC address of an interface whose Guest names none: stable, locally administered.
pub fn derived_mac(guest_uid: &str, index: usize) -> String {
    let id = Uuid::new_v5(
        &Uuid::NAMESPACE_OID,
        format!("mac/{guest_uid}/{index}").as_bytes(),
    );
    let bytes = id.as_bytes();
    format!(
        "52:55:{:02x}:{:02x}:{:02x}:{:02x}",
        bytes[0], bytes[1], bytes[2], bytes[3]
    )
}

/// Checks that `bridge` is one.
pub fn check_bridge(bridge: &str) -> Result<(), NetworkError> {
    let device = sys(bridge);
    if !device.exists() {
        return Err(NetworkError::NoBridge(bridge.to_owned()));
    }
    if !device.join("bridge").exists() {
        return Err(NetworkError::NotBridge(bridge.to_owned()));
    }
    Ok(())
}

/// Makes the tap where it is missing, raises its queue, attaches it to `bridge` and sets it up. Changes
/// nothing of a tap that is so already, because a running guest uses it.
pub fn ensure_tap(tap: &str, bridge: &str) -> Result<(), NetworkError> {
    check_bridge(bridge)?;
    let device = sys(tap);
    if !device.exists() {
        ip(&["tuntap", "add", "dev", tap, "mode", "tap"])?;
        // The host is no party on this link: no address of its own, no router advertisements taken.
        ip(&["link", "set", "dev", tap, "addrgenmode", "none"])?;
    }
    if read(&device.join("tx_queue_len")).as_deref() != Some(QUEUE) {
        ip(&["link", "set", "dev", tap, "txqueuelen", QUEUE])?;
    }
    if master(&device).as_deref() != Some(bridge) {
        ip(&["link", "set", "dev", tap, "master", bridge])?;
    }
    let flags = read(&device.join("flags"))
        .and_then(|flags| u32::from_str_radix(flags.trim_start_matches("0x"), 16).ok())
        .unwrap_or(0);
    const IFF_UP: u32 = 1;
    if flags & IFF_UP == 0 {
        ip(&["link", "set", "dev", tap, "up"])?;
    }
    Ok(())
}

/// Removes a tap; fine when it is gone.
pub fn remove_tap(tap: &str) -> Result<(), NetworkError> {
    if !sys(tap).exists() {
        return Ok(());
    }
    ip(&["tuntap", "del", "dev", tap, "mode", "tap"])
}

fn sys(device: &str) -> PathBuf {
    Path::new("/sys/class/net").join(device)
}

fn read(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn master(device: &Path) -> Option<String> {
    let target = fs::read_link(device.join("master")).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

fn ip(arguments: &[&str]) -> Result<(), NetworkError> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .map_err(NetworkError::NoTool)?;
    if output.status.success() {
        return Ok(());
    }
    Err(NetworkError::Failed {
        arguments: arguments.join(" "),
        message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_are_stable_distinct_and_short_enough() {
        let (a, b) = (tap_name("u1", 0), tap_name("u1", 1));
        assert_eq!(a, tap_name("u1", 0));
        assert_ne!(a, b);
        assert!(a.len() <= 15 && a.starts_with("us"), "{a}");
        let mac = derived_mac("u1", 0);
        assert!(crate::isolation::parse_mac(&mac).is_some(), "{mac}");
        assert_ne!(mac, derived_mac("u2", 0));
    }

    #[test]
    fn a_missing_bridge_is_named() {
        let error = check_bridge("nosuchbridge0").unwrap_err().to_string();
        assert!(error.contains("nosuchbridge0"), "{error}");
        assert!(matches!(check_bridge("lo"), Err(NetworkError::NotBridge(_))));
    }
}
