//! What a VMM process is told at its start: `understudy-vmm run --config FILE`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Configuration of one VMM process, that is: of one incarnation of one guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VmConfig {
    /// [`crate::API_VERSION`] of the writer.
    pub version: u32,
    /// `namespace/name` of the guest; appears in logs and errors only.
    pub guest: String,
    /// SMBIOS system UUID: the same in every incarnation of a guest.
    pub uuid: Uuid,
    /// Number of this incarnation, compared with `owner.json` before gates open.
    pub incarnation: u64,
    /// Whether this process starts as the owner of the guest or as a clone that waits for it.
    pub role: Role,
    /// Number of virtual CPUs, 1 to 64.
    pub cpus: u8,
    /// Guest RAM in MiB.
    pub memory_mib: u64,
    /// Where kernel, initrd and command line come from.
    pub boot: Boot,
    /// Disks in slot order; exactly one has [`DiskRole::Root`].
    pub disks: Vec<Disk>,
    /// Network interfaces in slot order.
    #[serde(default)]
    pub networks: Vec<Network>,
    /// The vsock device.
    pub vsock: Vsock,
    /// Strings for SMBIOS type 11 while the role is `Clone`, `io.systemd.credential:NAME=VALUE` each;
    /// systemd imports them before any unit starts. An activated VMM drops them at its next reset.
    #[serde(default)]
    pub clone_oem_strings: Vec<String>,
    /// Resume a saved session instead of booting; `role` is [`Role::Active`] then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<crate::session::Resume>,
    /// Paths that this process creates and owns.
    pub paths: Paths,
}

/// Role of an incarnation at the start of its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// The owner: takes `owner.lock`, must be named by `owner.json`, opens its gates at boot.
    Active,
    /// A clone: prepared, then booted by `PUT /v1/vm/boot` on its own layer; all its networks are
    /// isolated until `PUT /v1/activate`.
    Clone,
}

/// Where the guest's kernel comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Boot {
    /// The newest kernel with its initrd, and the command line, are found on the root disk's ext4 file
    /// system (partitioned or not) as Debian's GRUB does by default; read anew at every boot and reset.
    FromDisk {},
    /// Files on the host.
    #[serde(rename_all = "camelCase")]
    Files {
        /// bzImage.
        kernel: PathBuf,
        /// Initial RAM disk.
        initrd: Option<PathBuf>,
        /// Kernel command line.
        cmdline: String,
    },
}

/// One virtio-blk disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Disk {
    /// Name within the guest; also the virtio-blk serial (first 20 bytes).
    pub name: String,
    /// Whether the guest boots from it.
    pub role: DiskRole,
    /// The file the user named (raw). Its state directory is [`crate::owner::state_dir`] of it.
    pub source: PathBuf,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// The layer to open as the top of the chain, for a clone. `None`: what `owner.json` names.
    #[serde(default)]
    pub layer: Option<Uuid>,
}

/// What a disk is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskRole {
    /// Holds the guest's root file system; its state directory is the guest's fence.
    Root,
    /// Anything else.
    Data,
}

/// One virtio-net interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Network {
    /// MAC address, `aa:bb:cc:dd:ee:ff`: the same in every incarnation.
    pub mac: String,
    /// Name of the persistent tap device, made and bridged by the node agent. The owner opens it; a
    /// clone receives its descriptor at activation, and opens it by name only when the old owner is gone.
    pub tap: String,
    /// While isolated: frames are exchanged, one per datagram and without virtio-net header, with the
    /// Unix datagram socket at this path (the agent's responder). Frames are dropped while nobody listens.
    pub isolated_peer: Option<PathBuf>,
}

/// The vsock device, multiplexed to Unix sockets: a host program connects to `socket`, writes
/// `CONNECT <port>\n` and reads `OK <n>\n`; what the guest connects to on CID 2 port N goes to a
/// listener at `<socket>_<N>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Vsock {
    /// Context ID of the guest, 3 or above.
    pub cid: u64,
    /// Path of the listening Unix stream socket.
    pub socket: PathBuf,
}

/// Files and sockets of one VMM process; all are created by it, parent directories exist.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Paths {
    /// Unix socket of the control API.
    pub control: PathBuf,
    /// Unix socket on which a clone receives tap descriptors (`SCM_RIGHTS`) from the old owner.
    pub handover: PathBuf,
    /// Log of the serial console (append, bounded by rotation to `<path>.1`).
    pub console: PathBuf,
    /// Record of what a guest's platform looked like at its first boot: CPUID and PCI slots. Written
    /// when absent, obeyed when present, so that every incarnation sees the same machine.
    pub platform: PathBuf,
}
