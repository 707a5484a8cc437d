//! The messages. Fields are added with `#[serde(default)]`; a meaning is never changed within a version.

use serde::{Deserialize, Serialize};

/// Largest content chunk of a [`Transfer::Data`], in bytes.
pub const MAX_DATA: usize = 256 * 1024;
/// Longest path, in bytes (Linux `PATH_MAX`).
pub const MAX_PATH: usize = 4096;
/// Most units, interfaces, conflicts or other items in one list.
pub const MAX_LIST: usize = 4096;

/// First message of the host on a new session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest version the host speaks.
    pub version_min: u32,
    /// Newest version the host speaks.
    pub version_max: u32,
    /// What the session is for.
    pub purpose: Purpose,
}

/// What a session is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// [`Request`]s by the host, each answered by one [`Reply`]; [`Reply::Notice`]s may come at any time
    /// between. A new control session takes the place of an older one.
    Control,
    /// One round of captured changes out of the guest: the guest sends [`Transfer`]s up to
    /// [`Transfer::RoundEnd`].
    Export(Export),
    /// One round into the clone: the host sends [`Transfer`]s up to [`Transfer::RoundEnd`], the clone
    /// answers [`Imported`] (or [`Refusal`]).
    Import(Import),
}

/// First message of the guest on a new session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Welcome {
    /// The session is open, in this version.
    Accepted {
        /// Highest version that both speak.
        version: u32,
        /// Version of the guest agent's package.
        agent: String,
    },
    /// The session is refused.
    Refused(Refusal),
}

/// A request that was not carried out, in the guest's words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// What was tried, what failed, and what would do.
    pub reason: String,
}

/// What the host asks in a control session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// State of the guest; answered by [`Reply::Description`].
    Describe,
    /// Confirms that the guest will be cloned (patent US10606632B2, step 2): the filter begins to capture
    /// before [`Reply::Done`] is sent. Idempotent per operation. `hold` are the units that the clone will
    /// not start before cutover.
    Confirm {
        /// UID of the SeamlessReboot.
        operation: String,
        /// Units held on the clone.
        hold: Vec<String>,
    },
    /// Ends capturing for this operation; idempotent, also when it never began.
    EndCapture {
        /// UID of the SeamlessReboot.
        operation: String,
    },
    /// `syncfs` of every local file system; no freeze.
    Sync,
    /// `FIFREEZE` of every local writable file system; thawed by [`Request::ThawFilesystems`] or by the
    /// guest's own watchdog after `watchdog_ms`. Answered by [`Reply::Frozen`] or undone and refused.
    FreezeFilesystems {
        /// Milliseconds until the guest thaws by itself.
        watchdog_ms: u32,
    },
    /// `FITHAW`; idempotent. [`Reply::Thawed`] says whether the watchdog had been faster.
    ThawFilesystems,
    /// Stops `stop` units and freezes the rest of user land (cgroup freezer; not PID 1, not this agent); the
    /// export that follows writes everything out. Thawed by [`Request::ThawUserland`] or the watchdog. The host
    /// renews by asking again.
    FreezeUserland {
        /// Milliseconds until the guest thaws by itself.
        watchdog_ms: u32,
        /// Units to stop cleanly instead of freezing.
        stop: Vec<String>,
    },
    /// Thaws user land and starts the units that were stopped; idempotent.
    ThawUserland,
    /// What cannot be carried over: answered by [`Reply::Remains`].
    Remains,
    /// Asked of the clone at cutover, after its VMM was activated: it announces its addresses, leaves the
    /// role of a clone, starts held units and those it stopped. Answered by [`Reply::Activated`];
    /// idempotent.
    Activate {
        /// UID of the SeamlessReboot.
        operation: String,
    },
    /// Answers a [`Notice::RebootRequested`].
    RebootAnswer {
        /// The notice's id.
        id: String,
        /// The operation that was made for it, or why none will be.
        answer: Result<String, String>,
    },
    /// The guest's session was resumed after a reboot of the host: its real time stood still meanwhile. The
    /// guest sets its clock and announces its addresses. Answered by [`Reply::Resumed`]; idempotent. From
    /// [`crate::RESUMED_VERSION`] on.
    Resumed {
        /// The host's real time (`CLOCK_REALTIME`) when this was sent, in microseconds since 1970.
        real_us: i64,
    },
    /// Asks the clone once whether it is ready. Answered by [`Reply::Probed`] at the latest a moment after
    /// `timeout_ms`. From [`crate::PROBE_VERSION`] on.
    Probe {
        /// What is asked.
        probe: Probe,
        /// Milliseconds that the answer may take.
        timeout_ms: u32,
    },
}

/// How a clone is asked whether it is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Probe {
    /// `GET` over HTTP, to a port of the loopback.
    Http {
        /// Port.
        port: u16,
        /// Path with its query: printable ASCII, from `/` on.
        path: String,
    },
    /// A TCP connection to a port of the loopback.
    Tcp {
        /// Port.
        port: u16,
    },
    /// A command, as root.
    Exec {
        /// Program with arguments.
        command: Vec<String>,
    },
}

/// Most arguments of a [`Probe::Exec`], the program included.
pub const MAX_ARGUMENTS: usize = 32;
/// Longest message of a [`Probed`], in bytes.
pub const MAX_PROBED: usize = 1024;

/// Answer to [`Request::Probe`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probed {
    /// Whether it is ready.
    pub ready: bool,
    /// What was seen, for people; at most [`MAX_PROBED`] bytes.
    pub message: String,
}

/// What the guest answers in a control session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To [`Request::Describe`].
    Description(Box<Description>),
    /// Carried out.
    Done,
    /// To [`Request::FreezeFilesystems`].
    Frozen {
        /// How long the freezing itself took, in microseconds.
        took_us: u64,
    },
    /// To [`Request::ThawFilesystems`] and [`Request::ThawUserland`].
    Thawed {
        /// The watchdog had thawed before: what was done in between must not be trusted.
        by_watchdog: bool,
        /// How long it was frozen, in microseconds.
        frozen_us: u64,
    },
    /// To [`Request::Remains`].
    Remains(Remains),
    /// To [`Request::Activate`].
    Activated(Activated),
    /// To [`Request::Resumed`].
    Resumed(Resumed),
    /// To [`Request::Probe`].
    Probed(Probed),
    /// Not carried out.
    Refused(Refusal),
    /// Unasked, between answers.
    Notice(Notice),
}

/// What the guest says unasked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Notice {
    /// Boot is complete (patent US10606632B2, step 4): systemd has left `starting`.
    BootComplete(Box<Description>),
    /// `understudy-guest request-reboot` (patent, step 1). Repeated on each new session until answered.
    RebootRequested {
        /// Made by the guest, at most 64 bytes.
        id: String,
        /// In the user's words, at most 1024 bytes.
        reason: String,
    },
    /// The filter lost events; the capture can no longer be trusted.
    CaptureLost {
        /// What happened.
        reason: String,
    },
}

/// State of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Version of the guest agent's package.
    pub agent: String,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// `uname -r`.
    pub kernel_release: String,
    /// Whether this is a clone that has not been activated.
    pub clone: bool,
    /// Whether systemd has left `initializing` and `starting`.
    pub boot_complete: bool,
    /// `systemctl is-system-running`: running, degraded, maintenance, …
    pub system_state: String,
    /// Failed units.
    pub failed_units: Vec<String>,
    /// Microseconds since boot (`CLOCK_BOOTTIME`).
    pub uptime_us: u64,
    /// Newest kernel release installed under /boot, where it is newer than the running one; or another
    /// reason why a reboot is pending (`/run/reboot-required`).
    pub reboot_required: Option<String>,
    /// Network interfaces but loopback.
    pub interfaces: Vec<Interface>,
    /// Writable local file systems on disks: mount point and backing device (`/dev/vda`).
    pub filesystems: Vec<Filesystem>,
    /// Operation that is being captured for, if any.
    pub capturing: Option<String>,
}

/// A network interface as the guest has it configured now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Kernel name.
    pub name: String,
    /// `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// Addresses with prefix length, `10.0.0.5/24` or `fe80::1/64`.
    pub addresses: Vec<String>,
    /// Default gateways with the MAC address from the neighbour table, where known.
    pub gateways: Vec<Gateway>,
    /// DHCP lease, where one is known: server identifier and remaining seconds.
    pub lease: Option<Lease>,
    /// Name servers.
    pub dns: Vec<String>,
}

/// A default gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gateway {
    /// IP address.
    pub address: String,
    /// MAC address in the neighbour table.
    pub mac: Option<String>,
}

/// A DHCPv4 lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Server identifier (option 54).
    pub server: String,
    /// Lease time in seconds.
    pub seconds: u32,
}

/// A writable local file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filesystem {
    /// First mount point.
    pub mount_point: String,
    /// Source device.
    pub device: String,
    /// Type, such as `ext4`.
    pub kind: String,
}

/// What a cutover cannot carry over (DESIGN §5, step 9).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remains {
    /// Files that are open but have no name, with their holder: `nginx[312] /var/tmp/x (deleted)`.
    pub unlinked_open: Vec<String>,
    /// Established TCP connections.
    pub tcp_connections: u32,
    /// Running processes outside PID 1, kernel and this agent.
    pub processes: u32,
}

/// Answer to [`Request::Activate`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activated {
    /// Units that were started, with the microseconds until systemd called them started.
    pub started: Vec<(String, u64)>,
    /// Units that did not start, with the reason.
    pub failed: Vec<(String, String)>,
}

/// Answer to [`Request::Resumed`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumed {
    /// By how much the guest's real time was stepped, in microseconds; 0 where it was right.
    pub stepped_us: i64,
    /// Addresses that were announced.
    pub announced: u32,
}

/// Opens an export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// UID of the SeamlessReboot.
    pub operation: String,
    /// Last round that the clone has applied (0: none). What was sent in later rounds is sent again, so
    /// that a session or an agent that dies in between loses nothing.
    pub applied: u64,
    /// User land is frozen: files open for writing and shared mappings are compared by content, too.
    pub last: bool,
    /// Only count what is dirty, send no entries. User land is frozen, and was at the last export.
    pub count_only: bool,
}

/// Opens an import.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Import {
    /// UID of the SeamlessReboot.
    pub operation: String,
    /// What becomes of files that both sides changed.
    pub on_conflict: OnConflict,
}

/// What becomes of files that both sides changed. The losing version is kept under
/// `/var/lib/understudy/conflicts/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnConflict {
    /// The guest's version wins.
    PreferGuest,
    /// The clone's version wins.
    PreferClone,
    /// The import is refused with the paths.
    Fail,
}

/// Content of export and import: relayed by the host as they are, after their bounds were checked.
/// [`Transfer::Data`] and [`Transfer::Hole`] belong to the [`Transfer::Entry`] before them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Transfer {
    /// A path whose state is as told; for a file, content follows.
    Entry(Box<Entry>),
    /// Content at an offset.
    Data {
        /// Offset in the file.
        offset: u64,
        /// At most [`MAX_DATA`] bytes.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// A hole.
    Hole {
        /// Offset in the file.
        offset: u64,
        /// Length in bytes.
        length: u64,
    },
    /// All content of the entry before has been sent.
    EntryEnd,
    /// The round is complete.
    RoundEnd(RoundEnd),
    /// The sender cannot go on.
    Failed(Refusal),
}

/// End of a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundEnd {
    /// Number of the round, from 1.
    pub round: u64,
    /// Entries in it.
    pub entries: u64,
    /// Content bytes in it.
    pub bytes: u64,
    /// Entries that became dirty while it was being sent, or could not be told in it because they were on
    /// the move.
    pub dirty: u64,
    /// As in [`Export`]: nothing was on the move, so that what does not fit on the clone is an error. In
    /// earlier rounds it is not, and the clone does not acknowledge them.
    #[serde(default)]
    pub last: bool,
}

/// One path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Absolute path in the guest, raw bytes, at most [`MAX_PATH`].
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// Mount point of the file system on which it lies, where another one is mounted on top of it (then the
    /// path alone would lead there); else empty.
    #[serde(default, with = "serde_bytes")]
    pub filesystem: Vec<u8>,
    /// File handle of the directory that the entry's name is in: type and bytes. It counts more than the
    /// path does: while directories move in the guest, a path may lead to another one than was meant.
    /// Empty for the root of a file system, and where it is not known.
    #[serde(default)]
    pub folder: (i32, Vec<u8>),
    /// What is there.
    pub node: Node,
}

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Node {
    /// Nothing (any more).
    Gone,
    /// A directory; what is in it comes in entries of its own.
    Directory {
        /// Metadata.
        meta: Meta,
    },
    /// A regular file.
    File {
        /// Metadata.
        meta: Meta,
        /// Size in bytes after the content was applied.
        size: u64,
        /// Whether content follows for the whole file; else only for ranges that changed since the
        /// round before.
        whole: bool,
    },
    /// A symbolic link.
    Symlink {
        /// Metadata.
        meta: Meta,
        /// Target.
        #[serde(with = "serde_bytes")]
        target: Vec<u8>,
    },
    /// FIFO, socket, character or block device.
    Special {
        /// Metadata; the file type is in `mode`.
        meta: Meta,
        /// Device number.
        rdev: u64,
    },
}

/// Metadata of a path, as `statx` and `listxattr` tell it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Type and permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Access time.
    pub atime: (i64, u32),
    /// Number of links; above one, `handle` finds the others.
    pub nlink: u32,
    /// Inode number in the guest. The clone's file system began as a copy, so the same number names the
    /// same file there unless it was made after the split.
    pub ino: u64,
    /// File handle (`name_to_handle_at`): type and bytes; opens the same inode in the clone.
    pub handle: (i32, Vec<u8>),
    /// Extended attributes: ACLs, capabilities and labels among them.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Answer to a complete import.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Imported {
    /// Applied, and synced where the host asked for the last round.
    Applied(Applied),
    /// Not applied; nothing that matters was changed.
    Refused(Refusal),
}

/// What an import did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// Last round that was applied whole: this one; or an earlier one, and then the rounds after it have to
    /// be sent again.
    pub round: u64,
    /// Entries applied.
    pub entries: u64,
    /// Content bytes written.
    pub bytes: u64,
    /// Files that both sides had changed, with what became of them.
    pub conflicts: Vec<Conflict>,
    /// Paths that rules left alone.
    pub exempt: u64,
    /// Units stopped because the guest changed their state; they start again at activation.
    pub stopped_units: Vec<String>,
}

/// A file that both sides changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conflict {
    /// Path, lossily decoded.
    pub path: String,
    /// What became of it: `joined`, `guest`, `clone`.
    pub resolution: String,
    /// Where the losing version is kept.
    pub kept: Option<String>,
}
