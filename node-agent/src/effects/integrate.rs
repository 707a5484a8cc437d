//! Rounds of integration.

use std::time::{Duration, Instant};

use understudy_api::conditions::reasons;
use understudy_api::reboot::{Conflict, OnConflict, Remains};
use understudy_channel as channel;
use understudy_channel::{Export, Import, Purpose, Reply, Request};

use super::errors::{Side, relay as relay_error};
use super::{AGENT_SLOW, World};
use crate::guest_agent::{Session, connect, count, relay};
use crate::handover::effects::Round;
use crate::handover::{EffectError, Effected, ErrorKind, Moment, Operation};
use crate::host;

/// Time limit of opening a session.
const CONNECT: Duration = Duration::from_secs(10);
/// Most conflicts that a round names.
const MAX_CONFLICTS: usize = 100;
/// Most open files without a name that a status names.
const MAX_UNLINKED: usize = 100;

impl World {
    pub(super) fn do_integrate(
        &mut self,
        operation: &Operation,
        last: bool,
        deadline: Option<Moment>,
    ) -> Effected<Round> {
        self.check_capture(operation)?;
        let deadline = deadline.map(instant);
        let guest = self.export(operation, last, false, deadline)?;
        let socket = self.vsock(operation.clone_incarnation(), Side::Clone)?;
        let purpose = Purpose::Import(Import {
            operation: operation.uid.clone(),
            on_conflict: match operation.plan.on_conflict {
                OnConflict::PreferGuest => channel::OnConflict::PreferGuest,
                OnConflict::PreferClone => channel::OnConflict::PreferClone,
                OnConflict::Fail => channel::OnConflict::Fail,
            },
        });
        let clone =
            connect(&socket, purpose, limit(deadline)?).map_err(|error| Side::Clone.session(&error))?;
        let relayed = relay(&guest.stream, &clone.stream, deadline, |_, _| {}).map_err(|error| {
            // A VMM that has ended tells more than the session that broke with it.
            let gone = self
                .guest_vmm(operation)
                .and_then(|_| self.clone_vmm(operation))
                .err();
            gone.unwrap_or_else(|| relay_error(&error))
        })?;
        self.check_capture(operation)?;
        let applied = relayed.applied;
        if applied.round > relayed.end.round {
            return Err(EffectError::new(
                ErrorKind::Refused,
                format!(
                    "the clone says that it applied round {}, the guest sent {}",
                    applied.round, relayed.end.round
                ),
            )
            .because(reasons::INTEGRATION_FAILED));
        }
        // A clone that changed a file itself, of which only parts came, does not acknowledge the round: the
        // next export begins after what it names, and sends that file whole.
        let again = u64::from(applied.round < relayed.end.round);
        Ok(Round {
            round: applied.round,
            entries: applied.entries,
            bytes: applied.bytes,
            dirty: relayed.end.dirty + again,
            conflict_count: applied.conflicts.len() as u64,
            conflicts: applied
                .conflicts
                .into_iter()
                .take(MAX_CONFLICTS)
                .map(|conflict| Conflict {
                    path: conflict.path,
                    resolution: conflict.resolution,
                    kept: conflict.kept,
                })
                .collect(),
            remains: (!last).then(|| self.remains(operation)).transpose()?,
        })
    }

    /// What a cutover could not carry over, as of now.
    fn remains(&self, operation: &Operation) -> Effected<Remains> {
        let asked = self.guest_agent(operation)?.ask(&Request::Remains, AGENT_SLOW);
        match asked.map_err(|error| Side::Guest.agent(&error))? {
            Reply::Remains(remains) => Ok(Remains {
                unlinked_open_files: remains.unlinked_open.into_iter().take(MAX_UNLINKED).collect(),
                tcp_connections: i64::from(remains.tcp_connections),
                processes: i64::from(remains.processes),
            }),
            _ => Err(EffectError::new(
                ErrorKind::Refused,
                "the guest did not say what remains",
            )),
        }
    }

    pub(super) fn do_count_dirty(&mut self, operation: &Operation) -> Effected<u64> {
        self.check_capture(operation)?;
        let deadline = operation
            .held_at
            .map(|held| instant(held.plus(operation.plan.max_pause)));
        let guest = self.export(operation, true, true, deadline)?;
        let end = count(&guest.stream, deadline).map_err(|error| relay_error(&error))?;
        Ok(end.entries.max(end.dirty))
    }

    fn export(
        &self,
        operation: &Operation,
        last: bool,
        count_only: bool,
        deadline: Option<Instant>,
    ) -> Effected<Session> {
        let socket = self.vsock(operation.guest_incarnation(), Side::Guest)?;
        let purpose = Purpose::Export(Export {
            operation: operation.uid.clone(),
            applied: operation.applied,
            last,
            count_only,
        });
        connect(&socket, purpose, limit(deadline)?).map_err(|error| Side::Guest.session(&error))
    }

    /// A capture that was lost cannot be made good.
    fn check_capture(&self, operation: &Operation) -> Effected<()> {
        let socket = self.vsock(operation.guest_incarnation(), Side::Guest)?;
        let lost = self
            .node
            .link(&socket)
            .ok()
            .and_then(|link| link.heard().capture_lost);
        match lost {
            Some(reason) => Err(EffectError::new(
                ErrorKind::Refused,
                format!("the guest's filter lost changes: {reason}"),
            )
            .because(reasons::CAPTURE_LOST)),
            None => Ok(()),
        }
    }
}

fn instant(moment: Moment) -> Instant {
    let left = moment.boot_us - host::moment().boot_us;
    Instant::now() + Duration::from_micros(u64::try_from(left).unwrap_or(0))
}

fn limit(deadline: Option<Instant>) -> Effected<Duration> {
    let left = match deadline {
        Some(deadline) => deadline.saturating_duration_since(Instant::now()).min(CONNECT),
        None => CONNECT,
    };
    if left.is_zero() {
        return Err(EffectError::new(ErrorKind::Lapsed, "maxPause is over"));
    }
    Ok(left)
}
