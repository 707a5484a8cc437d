//! What happens while nothing else does: the dormant incarnation is removed at its deadline, what nobody
//! needs any more is collected, and layers are merged into the source so that chains stay short.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use understudy_vmm_control::owner::Owner;
use uuid::Uuid;

use super::boot::remove_layer;
use super::record::Dormant;
use super::resolve::Resolved;
use crate::durable::DurableError;
use crate::node::Node;
use crate::vmm::{Instance, Layout};

/// How long a killed process may take to be gone.
const KILL: Duration = Duration::from_secs(30);
/// Pause before a merge that failed is tried again.
const MERGE_AGAIN: Duration = Duration::from_secs(60);

/// Why something could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// A file.
    #[error(transparent)]
    File(#[from] DurableError),
    /// The process does not end.
    #[error("the VMM of incarnation {incarnation} (process {pid}) does not end; look at it by hand")]
    Stuck {
        /// Incarnation.
        incarnation: u64,
        /// Process.
        pid: u32,
    },
    /// The layer is somebody's.
    #[error("layer {0} is in use by the guest; it is kept")]
    LayerInUse(Uuid),
}

/// Ends the process of an instance, for sure.
pub fn end_process(node: &Node, guest: &Resolved, instance: &Instance) -> Result<(), RemoveError> {
    let layout = Layout::new(&node.config, &guest.key, &guest.uid, instance.incarnation);
    if let Some(process) = instance.process()
        && !process.kill(KILL)
    {
        return Err(RemoveError::Stuck {
            incarnation: instance.incarnation,
            pid: process.pid,
        });
    }
    node.unlink(&layout.vsock());
    node.drop_responders(&guest.uid, instance.incarnation);
    Ok(())
}

/// Removes a layer that no incarnation owns. `owner` is what `owner.json` says.
pub fn discard_layer(
    guest: &Resolved,
    owner: Option<&Owner>,
    chain: &[Uuid],
    layer: Uuid,
) -> Result<(), RemoveError> {
    if owner.and_then(|owner| owner.layer) == Some(layer) || chain.contains(&layer) {
        return Err(RemoveError::LayerInUse(layer));
    }
    Ok(remove_layer(&guest.state_dir(), layer)?)
}

/// Removes the dormant incarnation now: its process, its layer, its records.
pub fn remove_dormant(
    node: &Node,
    guest: &Resolved,
    owner: Option<&Owner>,
    dormant: &Dormant,
) -> Result<(), RemoveError> {
    let is_owner =
        |owner: &Owner| owner.incarnation == dormant.incarnation || owner.layer == Some(dormant.layer);
    if owner.is_some_and(is_owner) {
        // A rollback made it the guest again: only the record is out of date.
        return Ok(node.records.set_dormant(&guest.uid, None)?);
    }
    tracing::info!(guest = %guest.key, incarnation = dormant.incarnation, "removing the dormant incarnation");
    let instance = node.instances.get(&guest.uid, dormant.incarnation);
    if let Some(instance) = &instance {
        end_process(node, guest, instance)?;
    }
    discard_layer(guest, owner, &[], dormant.layer)?;
    if let Some(instance) = &instance {
        node.instances.remove(instance)?;
    }
    node.records.set_dormant(&guest.uid, None)?;
    Ok(())
}

/// Maintenance of one guest, called in every pass while no operation is in flight for it.
#[derive(Debug, Default)]
pub struct Maintenance {
    merge_after: Option<Instant>,
}

impl Maintenance {
    /// One pass. `current` is the incarnation that owns the guest and runs, if any.
    pub fn pass(
        &mut self,
        node: &Node,
        guest: &Resolved,
        owner: Option<&Owner>,
        current: Option<&Instance>,
    ) -> Result<(), RemoveError> {
        let dormant = node.records.dormant(&guest.uid)?;
        if let Some(dormant) = &dormant
            && dormant.deadline <= Timestamp::now()
        {
            remove_dormant(node, guest, owner, dormant)?;
            return self.pass(node, guest, owner, current);
        }
        let dormant_incarnation = dormant.as_ref().map(|dormant| dormant.incarnation);
        self.collect(node, guest, owner, dormant_incarnation)?;
        if dormant.is_none()
            && let Some(current) = current
        {
            self.merge(guest, current);
        }
        Ok(())
    }

    /// Removes what our records name as ours and nothing needs: VMMs of neither the owner nor the dormant
    /// incarnation, with their own layers.
    fn collect(
        &self,
        node: &Node,
        guest: &Resolved,
        owner: Option<&Owner>,
        dormant: Option<u64>,
    ) -> Result<(), RemoveError> {
        // Without the fence nobody can tell whose anything is.
        let Some(owner) = owner else { return Ok(()) };
        for instance in node.instances.of(&guest.uid) {
            if instance.incarnation == owner.incarnation || Some(instance.incarnation) == dormant {
                continue;
            }
            tracing::info!(guest = %guest.key, incarnation = instance.incarnation, "collecting a VMM that nothing needs");
            end_process(node, guest, &instance)?;
            if let Some(layer) = instance.layer
                && instance.incarnation > owner.incarnation
                && owner.layer != Some(layer)
            {
                // A clone that never came to own the guest: nothing stands on its layer.
                remove_layer(&guest.state_dir(), layer)?;
            }
            node.instances.remove(&instance)?;
        }
        Ok(())
    }

    /// Asks the owner's VMM to merge its layers down, where it has any.
    fn merge(&mut self, guest: &Resolved, current: &Instance) {
        if self.merge_after.is_some_and(|after| Instant::now() < after) {
            return;
        }
        let client = current.client();
        let Ok(info) = client.info() else { return };
        let root = &guest.root().name;
        let Some(disk) = info.disks.iter().find(|disk| disk.name == *root) else {
            return;
        };
        if disk.layers.is_empty() {
            self.merge_after = None;
            return;
        }
        let failed = disk.merge.as_ref().and_then(|merge| merge.error.clone());
        if disk.merge.is_some() && failed.is_none() {
            return;
        }
        if let Some(error) = failed.filter(|_| self.merge_after.is_none()) {
            tracing::warn!(guest = %guest.key, %error, "merging the layers stopped; it is tried again");
            self.merge_after = Some(Instant::now() + MERGE_AGAIN);
            return;
        }
        match client.merge(root) {
            Ok(disk) => {
                tracing::info!(guest = %guest.key, layers = disk.layers.len(), "merging the layers into the source");
                self.merge_after = None;
            }
            Err(error) => {
                tracing::warn!(guest = %guest.key, %error, "merging the layers was refused; it is tried again");
                self.merge_after = Some(Instant::now() + MERGE_AGAIN);
            }
        }
    }
}
