//! What the guest's boot CPU finds in RAM: kernel, initrd and command line, ACPI and SMBIOS tables.

pub mod acpi;
pub mod disk;
mod filesystem;
mod grub;
mod journal;
pub mod linux;
pub mod smbios;
mod version;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use understudy_vmm_control::config::Boot;

use crate::block::Disk;

pub use disk::DiskBootError;

/// What is booted.
#[derive(Clone, Debug, Default)]
pub struct Payload {
    /// The bzImage.
    pub kernel: Vec<u8>,
    /// Where the kernel came from, for messages and the control API.
    pub kernel_name: String,
    /// The initial RAM disk.
    pub initrd: Option<Vec<u8>>,
    /// Where the initrd came from.
    pub initrd_name: String,
    /// The kernel's command line.
    pub cmdline: String,
}

/// Why there is nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file of the host.
    #[error("{field}: reading {path}: {source}")]
    File {
        /// Field of the configuration.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The guest's own disk.
    #[error("boot.fromDisk: {0}")]
    Disk(#[from] DiskBootError),
}

/// Finds kernel, initrd and command line; reads them anew at each call.
pub fn find(boot: &Boot, root: &Arc<Disk>) -> Result<Payload, BootError> {
    match boot {
        Boot::FromDisk {} => Ok(disk::find(root)?),
        Boot::Files {
            kernel,
            initrd,
            cmdline,
        } => Ok(Payload {
            kernel: read("boot.files.kernel", kernel)?,
            kernel_name: kernel.display().to_string(),
            initrd: initrd
                .as_deref()
                .map(|initrd| read("boot.files.initrd", initrd))
                .transpose()?,
            initrd_name: initrd
                .as_ref()
                .map(|path| path.display().to_string())
                .unwrap_or_default(),
            cmdline: cmdline.clone(),
        }),
    }
}

fn read(field: &'static str, path: &Path) -> Result<Vec<u8>, BootError> {
    fs::read(path).map_err(|source| BootError::File {
        field,
        path: path.to_owned(),
        source,
    })
}
