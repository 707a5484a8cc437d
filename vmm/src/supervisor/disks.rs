//! Splitting and merging the guest's disks. `owner.json` is written here, by the disk's merge, and by a
//! commit: never two of them at a time, because all begin under the supervisor's lock, and a split and a
//! commit stop a merge that runs.

use std::sync::Arc;

use understudy_vmm_control::api::{DiskInfo, PrepareSplit, Split, SplitReport};
use understudy_vmm_control::config::DiskRole;
use understudy_vmm_control::owner::Owner;

use super::operations::{OperationError, conflict, failed};
use super::{Inner, Supervisor, fence};
use crate::block::{Disk, DiskError};

impl From<DiskError> for OperationError {
    fn from(error: DiskError) -> OperationError {
        match error.is_conflict() {
            true => OperationError::Conflict(error.to_string()),
            false => OperationError::Failed(error.to_string()),
        }
    }
}

impl Supervisor {
    /// Makes the layers of a split and names the guest's in `owner.json`.
    pub fn prepare_split(&self, name: &str, request: &PrepareSplit) -> Result<(), OperationError> {
        let inner = self.lock();
        let disk = self.own_disk(&inner, name, "prepare-split")?;
        let role = self.config.disks.iter().find(|disk| disk.name == name);
        if role.is_none_or(|disk| disk.role != DiskRole::Root) {
            return Err(conflict(format!(
                "prepare-split: disk {name} has not the role Root; only the root disk is split"
            )));
        }
        disk.prepare_split(request.guest_layer, request.clone_layer)?;
        let current = fence::named(&self.state_dir, self.config.incarnation).map_err(failed)?;
        if current.layer == Some(request.guest_layer) {
            return Ok(());
        }
        Owner {
            layer: Some(request.guest_layer),
            ..current
        }
        .replace(&self.state_dir)
        .map_err(failed)
    }

    /// Switches the guest's writes to the prepared layer.
    pub fn split(&self, name: &str, request: &Split) -> Result<SplitReport, OperationError> {
        let inner = self.lock();
        let disk = self.own_disk(&inner, name, "split")?;
        Ok(disk.split(request.guest_layer)?)
    }

    /// Begins or continues merging a disk's layers into its source.
    pub fn merge(&self, name: &str) -> Result<DiskInfo, OperationError> {
        let inner = self.lock();
        let disk = self.own_disk(&inner, name, "merge")?;
        Ok(disk.merge()?)
    }

    /// A disk that this VMM may change.
    fn own_disk(&self, inner: &Inner, name: &str, operation: &str) -> Result<Arc<Disk>, OperationError> {
        let known = self.config.disks.iter().any(|disk| disk.name == name);
        if !known {
            return Err(OperationError::NotFound(format!(
                "{operation}: this guest has no disk {name:?}"
            )));
        }
        self.must_run(inner, operation)?;
        if inner.ownership.is_none() {
            return Err(conflict(format!("{operation}: this VMM does not own the guest")));
        }
        inner
            .devices
            .as_ref()
            .and_then(|devices| devices.disk(name))
            .cloned()
            .ok_or_else(|| conflict(format!("{operation}: disk {name} is not open")))
    }
}
