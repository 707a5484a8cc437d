//! Bounds of decoded messages. Each side calls [`Validate::validate`] on whatever it reads: a frame's size
//! bounds memory, this bounds meaning, so that no path leads elsewhere and no list is longer than anybody can
//! want. [`read_message`] does both.

use std::io::Read;

use serde::de::DeserializeOwned;

use crate::frame::{FrameError, read_frame};
use crate::message::*;

/// Longest string that is not a path, in bytes: reasons, versions, states.
pub const MAX_TEXT: usize = 4096;
/// Longest name of a unit, operation or interface, in bytes.
pub const MAX_NAME: usize = 256;
/// Largest file handle, in bytes (Linux `MAX_HANDLE_SZ`).
pub const MAX_HANDLE: usize = 128;
/// Largest extended attribute value, in bytes (Linux `XATTR_SIZE_MAX`).
pub const MAX_XATTR_VALUE: usize = 65536;
/// Most bytes of extended attributes of one path, names and values.
pub const MAX_XATTRS: usize = 160 * 1024;
/// Longest time-out that may be asked for, in milliseconds.
pub const MAX_WATCHDOG_MS: u32 = 10 * 60 * 1000;

/// Why a message is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} {problem}")]
pub struct Invalid {
    /// The field.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

type Result = std::result::Result<(), Invalid>;

/// A message whose bounds can be checked.
pub trait Validate {
    /// Whether every field is within its bounds.
    fn validate(&self) -> Result;
}

/// Reads one frame and checks its bounds.
pub fn read_message<M: DeserializeOwned + Validate>(
    reader: &mut impl Read,
) -> std::result::Result<M, FrameError> {
    let message: M = read_frame(reader)?;
    message
        .validate()
        .map_err(|invalid| FrameError::Malformed(invalid.to_string()))?;
    Ok(message)
}

fn invalid(field: &'static str, problem: impl Into<String>) -> Result {
    Err(Invalid {
        field,
        problem: problem.into(),
    })
}

fn within(field: &'static str, length: usize, limit: usize) -> Result {
    if length <= limit {
        Ok(())
    } else {
        invalid(field, format!("is {length} long, beyond the limit of {limit}"))
    }
}

fn text(field: &'static str, value: &str) -> Result {
    within(field, value.len(), MAX_TEXT)
}

fn name(field: &'static str, value: &str) -> Result {
    within(field, value.len(), MAX_NAME)?;
    if value.contains('\0') {
        invalid(field, "has a NUL in it")
    } else {
        Ok(())
    }
}

/// A UID: it becomes part of paths on both sides.
fn operation(value: &str) -> Result {
    const FIELD: &str = "operation";
    if value.is_empty() {
        return invalid(FIELD, "is empty");
    }
    within(FIELD, value.len(), MAX_NAME)?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if !value.chars().all(plain) || value.starts_with('.') {
        return invalid(
            FIELD,
            "has characters other than letters, digits, '-', '_' and '.'",
        );
    }
    Ok(())
}

fn unit(field: &'static str, value: &str) -> Result {
    name(field, value)?;
    if value.is_empty() || value.contains('/') || value.chars().any(char::is_whitespace) {
        return invalid(field, format!("{value:?} is no name of a unit"));
    }
    Ok(())
}

fn list<T>(field: &'static str, items: &[T], each: impl Fn(&T) -> Result) -> Result {
    within(field, items.len(), MAX_LIST)?;
    items.iter().try_for_each(each)
}

/// An absolute path in plain form: no NUL, no empty, `.` or `..` component.
fn path(field: &'static str, value: &[u8]) -> Result {
    within(field, value.len(), MAX_PATH)?;
    let Some(inner) = value.strip_prefix(b"/") else {
        return invalid(field, "is not absolute");
    };
    if value.contains(&0) {
        return invalid(field, "has a NUL in it");
    }
    let plain = |c: &[u8]| !c.is_empty() && c != b"." && c != b"..";
    if !inner.is_empty() && !inner.split(|&b| b == b'/').all(plain) {
        return invalid(field, "has an empty component, '.' or '..' in it");
    }
    Ok(())
}

fn nanoseconds(field: &'static str, value: u32) -> Result {
    if value < 1_000_000_000 {
        Ok(())
    } else {
        invalid(field, "has a billion nanoseconds or more")
    }
}

impl Validate for Hello {
    fn validate(&self) -> Result {
        if self.version_min > self.version_max {
            return invalid("version_min", "is beyond version_max");
        }
        match &self.purpose {
            Purpose::Control => Ok(()),
            Purpose::Export(export) => operation(&export.operation),
            Purpose::Import(import) => operation(&import.operation),
        }
    }
}

impl Validate for Welcome {
    fn validate(&self) -> Result {
        match self {
            Self::Accepted { agent, .. } => name("agent", agent),
            Self::Refused(refusal) => refusal.validate(),
        }
    }
}

impl Validate for Refusal {
    fn validate(&self) -> Result {
        // A refused import names paths, so it may be as long as a frame.
        Ok(())
    }
}

impl Validate for Request {
    fn validate(&self) -> Result {
        match self {
            Self::Describe | Self::Sync | Self::ThawFilesystems | Self::ThawUserland | Self::Remains => {
                Ok(())
            }
            Self::Confirm { operation: uid, hold } => {
                operation(uid)?;
                list("hold", hold, |u| unit("hold", u))
            }
            Self::EndCapture { operation: uid } | Self::Activate { operation: uid } => operation(uid),
            Self::FreezeFilesystems { watchdog_ms } => watchdog(*watchdog_ms),
            Self::FreezeUserland { watchdog_ms, stop } => {
                watchdog(*watchdog_ms)?;
                list("stop", stop, |u| unit("stop", u))
            }
            Self::RebootAnswer { id, answer } => {
                name("id", id)?;
                match answer {
                    Ok(made) => text("answer", made),
                    Err(reason) => text("answer", reason),
                }
            }
            Self::Resumed { real_us } => real_time(*real_us),
            Self::Probe { probe, timeout_ms } => {
                probe.validate()?;
                bounded("timeout_ms", *timeout_ms)
            }
        }
    }
}

impl Validate for Probe {
    fn validate(&self) -> Result {
        match self {
            Self::Http { port, path } => {
                self::port(*port)?;
                within("path", path.len(), MAX_TEXT)?;
                // A blank or a line break would end the request's first line early.
                if !path.starts_with('/') || !path.bytes().all(|byte| byte.is_ascii_graphic()) {
                    return invalid("path", "is not printable ASCII from '/' on");
                }
                Ok(())
            }
            Self::Tcp { port } => self::port(*port),
            Self::Exec { command } => {
                within("command", command.len(), MAX_ARGUMENTS)?;
                if command.first().is_none_or(String::is_empty) {
                    return invalid("command", "names no program");
                }
                list("command", command, |argument| {
                    if argument.contains('\0') {
                        return invalid("command", "has a NUL in it");
                    }
                    text("command", argument)
                })
            }
        }
    }
}

fn port(port: u16) -> Result {
    match port {
        0 => invalid("port", "is 0"),
        _ => Ok(()),
    }
}

/// A time that a host may have: from 2020 to 2200. Any other would set a guest's clock to nonsense.
fn real_time(micros: i64) -> Result {
    const FROM: i64 = 1_577_836_800_000_000;
    const TO: i64 = 7_258_118_400_000_000;
    if (FROM..TO).contains(&micros) {
        Ok(())
    } else {
        invalid(
            "real_us",
            format!("is {micros}, not a time between 2020 and 2200"),
        )
    }
}

fn watchdog(milliseconds: u32) -> Result {
    bounded("watchdog_ms", milliseconds)
}

fn bounded(field: &'static str, milliseconds: u32) -> Result {
    if (1..=MAX_WATCHDOG_MS).contains(&milliseconds) {
        Ok(())
    } else {
        invalid(
            field,
            format!("is {milliseconds}, not between 1 and {MAX_WATCHDOG_MS}"),
        )
    }
}

impl Validate for Reply {
    fn validate(&self) -> Result {
        match self {
            Self::Description(description) => description.validate(),
            Self::Done | Self::Frozen { .. } | Self::Thawed { .. } | Self::Resumed(_) => Ok(()),
            Self::Remains(remains) => list("unlinked_open", &remains.unlinked_open, |t| {
                within("unlinked_open", t.len(), MAX_PATH + MAX_NAME)
            }),
            Self::Activated(activated) => {
                list("started", &activated.started, |(u, _)| unit("started", u))?;
                list("failed", &activated.failed, |(u, reason)| {
                    unit("failed", u)?;
                    text("failed", reason)
                })
            }
            Self::Probed(probed) => within("message", probed.message.len(), MAX_PROBED),
            Self::Refused(refusal) => refusal.validate(),
            Self::Notice(notice) => notice.validate(),
        }
    }
}

impl Validate for Notice {
    fn validate(&self) -> Result {
        match self {
            Self::BootComplete(description) => description.validate(),
            Self::RebootRequested { id, reason } => {
                within("id", id.len(), 64)?;
                within("reason", reason.len(), 1024)
            }
            Self::CaptureLost { reason } => text("reason", reason),
        }
    }
}

impl Validate for Description {
    fn validate(&self) -> Result {
        name("agent", &self.agent)?;
        name("boot_id", &self.boot_id)?;
        name("kernel_release", &self.kernel_release)?;
        name("system_state", &self.system_state)?;
        list("failed_units", &self.failed_units, |u| unit("failed_units", u))?;
        self.reboot_required
            .as_deref()
            .map_or(Ok(()), |r| text("reboot_required", r))?;
        list("interfaces", &self.interfaces, Validate::validate)?;
        list("filesystems", &self.filesystems, |f| {
            path("mount_point", f.mount_point.as_bytes())?;
            text("device", &f.device)?;
            name("kind", &f.kind)
        })?;
        self.capturing.as_deref().map_or(Ok(()), operation)
    }
}

impl Validate for Interface {
    fn validate(&self) -> Result {
        name("name", &self.name)?;
        name("mac", &self.mac)?;
        list("addresses", &self.addresses, |a| name("addresses", a))?;
        list("gateways", &self.gateways, |g| {
            name("gateways", &g.address)?;
            g.mac.as_deref().map_or(Ok(()), |m| name("gateways", m))
        })?;
        self.lease.as_ref().map_or(Ok(()), |l| name("lease", &l.server))?;
        list("dns", &self.dns, |d| name("dns", d))
    }
}

impl Validate for Transfer {
    fn validate(&self) -> Result {
        match self {
            Self::Entry(entry) => entry.validate(),
            Self::Data { offset, bytes } => {
                within("bytes", bytes.len(), MAX_DATA)?;
                range(*offset, bytes.len() as u64)
            }
            Self::Hole { offset, length } => range(*offset, *length),
            Self::EntryEnd | Self::RoundEnd(_) => Ok(()),
            Self::Failed(refusal) => refusal.validate(),
        }
    }
}

/// File offsets are signed in the kernel.
fn range(offset: u64, length: u64) -> Result {
    match offset.checked_add(length) {
        Some(end) if end <= i64::MAX as u64 && length > 0 => Ok(()),
        _ => invalid("offset", "and length do not name a range of a file"),
    }
}

impl Validate for Entry {
    fn validate(&self) -> Result {
        path("path", &self.path)?;
        if !self.filesystem.is_empty() {
            path("filesystem", &self.filesystem)?;
        }
        within("folder", self.folder.1.len(), MAX_HANDLE)?;
        match &self.node {
            Node::Gone if self.path == b"/" => invalid("path", "is the root, which cannot be gone"),
            Node::Gone => Ok(()),
            Node::Directory { meta } | Node::Special { meta, .. } => meta.validate(),
            Node::File { meta, size, .. } => {
                if *size > i64::MAX as u64 {
                    return invalid("size", "is beyond what a file can have");
                }
                meta.validate()
            }
            Node::Symlink { meta, target } => {
                within("target", target.len(), MAX_PATH)?;
                if target.is_empty() || target.contains(&0) {
                    return invalid("target", "is empty or has a NUL in it");
                }
                meta.validate()
            }
        }
    }
}

impl Validate for Meta {
    fn validate(&self) -> Result {
        if self.mode > 0o177_777 {
            return invalid("mode", "has bits beyond type and permissions");
        }
        nanoseconds("mtime", self.mtime.1)?;
        nanoseconds("atime", self.atime.1)?;
        within("handle", self.handle.1.len(), MAX_HANDLE)?;
        list("xattrs", &self.xattrs, |(key, value)| {
            within("xattrs", key.len(), MAX_NAME)?;
            if key.is_empty() || key.contains(&0) {
                return invalid("xattrs", "has a name that is empty or has a NUL in it");
            }
            within("xattrs", value.len(), MAX_XATTR_VALUE)
        })?;
        within(
            "xattrs",
            self.xattrs.iter().map(|(k, v)| k.len() + v.len()).sum(),
            MAX_XATTRS,
        )
    }
}

impl Validate for Imported {
    fn validate(&self) -> Result {
        match self {
            Self::Applied(applied) => {
                // Conflicts may be many: the frame bounds them.
                list("stopped_units", &applied.stopped_units, |u| {
                    unit("stopped_units", u)
                })
            }
            Self::Refused(refusal) => refusal.validate(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &[u8]) -> Entry {
        Entry {
            path: path.to_vec(),
            filesystem: Vec::new(),
            folder: (0, Vec::new()),
            node: Node::Directory {
                meta: Meta::default(),
            },
        }
    }

    #[test]
    fn only_plain_absolute_paths_pass() {
        for good in [&b"/"[..], b"/etc/hostname", b"/a b/\xff", b"/..."] {
            assert_eq!(entry(good).validate(), Ok(()), "{good:?}");
        }
        let long = [&b"/"[..], &[b'a'; MAX_PATH]].concat();
        for bad in [
            &b""[..],
            b"etc",
            b"/etc/../x",
            b"/etc/.",
            b"//etc",
            b"/etc/",
            b"/a\0b",
            &long,
        ] {
            assert!(entry(bad).validate().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_no_kernel_would_take_is_refused() {
        assert!(
            Transfer::Data {
                offset: u64::MAX,
                bytes: vec![1]
            }
            .validate()
            .is_err()
        );
        assert!(Transfer::Hole { offset: 0, length: 0 }.validate().is_err());
        assert!(
            Transfer::Data {
                offset: 0,
                bytes: vec![0; MAX_DATA + 1]
            }
            .validate()
            .is_err()
        );
        let gone = Entry {
            path: b"/".to_vec(),
            filesystem: Vec::new(),
            folder: (0, Vec::new()),
            node: Node::Gone,
        };
        assert!(gone.validate().is_err());
        let meta = Meta {
            mtime: (0, 1_000_000_000),
            ..Meta::default()
        };
        assert!(meta.validate().is_err());
    }

    #[test]
    fn an_operation_is_one_component_of_a_path() {
        let request = |operation: &str| Request::EndCapture {
            operation: operation.to_owned(),
        };
        assert_eq!(request("5c0c4b17-e5ea-468a").validate(), Ok(()));
        for bad in ["", "a/b", "..", ".hidden", "a b", "x\0"] {
            assert!(request(bad).validate().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_clock_is_not_set_to_nonsense() {
        let resumed = |real_us| Request::Resumed { real_us }.validate();
        assert!(resumed(1_764_000_000_000_000).is_ok());
        for nonsense in [0, -1, i64::MIN, i64::MAX, 1_764_000_000] {
            assert!(resumed(nonsense).is_err(), "{nonsense}");
        }
    }

    #[test]
    fn a_probe_asks_one_thing_and_cannot_be_made_to_ask_another() {
        let probe = |probe| Request::Probe {
            probe,
            timeout_ms: 1000,
        };
        let http = |port, path: &str| {
            probe(Probe::Http {
                port,
                path: path.to_owned(),
            })
        };
        let exec = |command: &[&str]| {
            probe(Probe::Exec {
                command: command.iter().map(|word| (*word).to_owned()).collect(),
            })
        };
        for good in [
            http(80, "/healthz?full=1"),
            exec(&["/bin/true", ""]),
            probe(Probe::Tcp { port: 1 }),
        ] {
            assert_eq!(good.validate(), Ok(()), "{good:?}");
        }
        for bad in [
            http(0, "/"),
            http(80, "healthz"),
            http(80, "/ HTTP/1.1\r\nHost: x"),
            exec(&[]),
            exec(&[""]),
            exec(&["a\0b"]),
            exec(&["x"; MAX_ARGUMENTS + 1]),
            probe(Probe::Tcp { port: 0 }),
        ] {
            assert!(bad.validate().is_err(), "{bad:?}");
        }
        let long = Reply::Probed(Probed {
            ready: true,
            message: "a".repeat(MAX_PROBED + 1),
        });
        assert!(long.validate().is_err());
    }
}
