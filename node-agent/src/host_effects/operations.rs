//! SeamlessReboots and dormant incarnations when the host must go.

use understudy_vmm_control::owner::Owner;

use super::HostWorld;
use crate::guests::maintenance::remove_dormant;
use crate::guests::resolve;
use crate::host;
use crate::host_update::effects::HostIntent;
use crate::host_update::quiesce::{InFlight, Rules, Ruling};
use crate::host_update::{EffectError, Effected, ErrorKind, Update};
use crate::node::lock;
use crate::operations;
use crate::store::Object;

impl HostWorld {
    pub(super) fn do_quiesce(&mut self, update: &Update, rules: &Rules) -> Effected<Vec<InFlight>> {
        let node = &self.node;
        // From here on nothing is begun; what is being begun just now is waited for.
        node.work.put(update);
        for guest in node.objects.guests() {
            let turn = node.turn(&guest.key());
            drop(lock(&turn));
        }
        let in_flight = node.all_in_flight();
        let ruled = |ruling: Ruling| {
            in_flight
                .iter()
                .filter(move |(_, operation)| rules.ruling(operation.phase) == ruling)
                .map(|(guest, _)| guest.clone())
        };
        node.work.quiesce(ruled(Ruling::Suspend), ruled(Ruling::Abort));
        if in_flight.is_empty() {
            self.end_dormant()?;
        }
        Ok(in_flight
            .into_iter()
            .map(|(guest, operation)| InFlight {
                name: operation.reboot.to_string(),
                guest: guest.to_string(),
                phase: operation.phase,
            })
            .collect())
    }

    /// A dormant incarnation is paused in memory: it ends with the host, so it ends now, in order.
    fn end_dormant(&self) -> Effected<()> {
        let failed = |error: String| EffectError::new(ErrorKind::Retry, error);
        for guest in self.node.objects.guests() {
            let Ok(resolved) = resolve(&self.node.config, &guest, host::cpus(), host::total_memory_mib())
            else {
                continue;
            };
            let dormant = self
                .node
                .records
                .dormant(&resolved.uid)
                .map_err(|error| failed(error.to_string()))?;
            if let Some(dormant) = dormant {
                let owner = Owner::read(&resolved.state_dir()).map_err(|error| failed(error.to_string()))?;
                remove_dormant(&self.node, &resolved, owner.as_ref(), &dormant)
                    .map_err(|error| failed(error.to_string()))?;
            }
        }
        Ok(())
    }

    pub(super) fn do_release(&mut self) {
        self.node.work.release();
        if matches!(self.node.work.intent(), HostIntent::GoesDown { .. })
            && let Some(power) = self.node.work.power()
        {
            power.let_go();
        }
        // Those that were suspended go on from the journal, before any other may begin.
        operations::take_up(&self.node);
        self.node.objects.wake();
    }
}
