//! The leases of closed gates and of a saved session: an agent that dies between closing and committing, or
//! between a save and the host's reboot, costs a pause and no more.

use std::io;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Instant;

use super::Supervisor;

impl Supervisor {
    /// Starts the thread that opens all gates, or lets a saved guest run on, when the lease has run out.
    pub fn watch_lease(self: &Arc<Self>) -> io::Result<()> {
        let supervisor = self.clone();
        thread::Builder::new()
            .name("lease".to_owned())
            .spawn(move || supervisor.expire_leases())?;
        Ok(())
    }

    fn expire_leases(&self) -> ! {
        let mut inner = self.lock();
        loop {
            let gates = inner.lease;
            let saved = inner.saved.as_ref().map(|saved| saved.lease);
            let Some(deadline) = gates.into_iter().chain(saved).min() else {
                inner = self
                    .lease_changed
                    .wait(inner)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                inner = self
                    .lease_changed
                    .wait_timeout(inner, left)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            } else if saved == Some(deadline) {
                self.lapse(&mut inner);
            } else {
                tracing::warn!("the lease has run out before a commit: all gates open, vCPUs run");
                self.open_all(&mut inner);
            }
        }
    }
}
