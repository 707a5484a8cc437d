//! The lease of closed gates: an agent that dies between closing and committing costs a pause and no more.

use std::io;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Instant;

use super::Supervisor;

impl Supervisor {
    /// Starts the thread that opens all gates when the lease has run out.
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
            inner = match inner.lease {
                None => self
                    .lease_changed
                    .wait(inner)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        tracing::warn!("the lease has run out before a commit: all gates open, vCPUs run");
                        self.open_all(&mut inner);
                        continue;
                    }
                    self.lease_changed
                        .wait_timeout(inner, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }
}
