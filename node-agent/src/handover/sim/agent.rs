//! The effects as this world has them: crash points within each.

use understudy_api::conditions::reasons;
use understudy_api::reboot::{FailedUnit, Remains, StartedUnit};
use understudy_vmm_control::owner::Owner;

use super::super::approval::is_news;
use super::super::effects::{
    Activation, Asked, CloneBoot, Dormancy, EffectError, Effected, Effects, ErrorKind, Preflight, Round,
    Sealed, SplitOutcome,
};
use super::super::readiness::current;
use super::super::record::{Moment, Operation};
use super::machines::{Answer, Command, GateSet};
use super::mutations::Mutation;
use super::scenario::WAVERING;
use super::wire::{clone_gone, retry};
use super::world::*;

pub const NEW_KERNEL: &str = "6.1.0-56";
pub const OLD_KERNEL: &str = "6.1.0-50";

pub fn moment(now: i64) -> Moment {
    Moment {
        unix_us: 1_700_000_000 * SECOND + now,
        boot_us: now,
    }
}

impl World {
    fn owns(&self, operation: &Operation) -> Effected<()> {
        if self.guest.alive && self.guest.incarnation == operation.guest_incarnation() {
            Ok(())
        } else {
            Err(EffectError::new(
                ErrorKind::GuestGone,
                "the guest's VMM is another one",
            ))
        }
    }

    fn hold(&mut self, gates: GateSet, lease_ms: u64) -> Effected<Answer> {
        let lease = i64::try_from(lease_ms).unwrap() * MS;
        self.send(Command::Hold { gates, lease }).map_err(|mut error| {
            // A VMM that is dormant holds nothing: the commit was made by an earlier try.
            if error.kind == ErrorKind::Refused {
                error.kind = ErrorKind::Lapsed;
            }
            error
        })
    }

    /// What an export would send now.
    fn dirty(&mut self, applied: u64, last: bool) -> Option<Vec<usize>> {
        let mapped = self.guest.cache[MAPPED];
        let filter = self.guest.filter.as_mut()?;
        filter.sent.retain(|round, _| *round > applied);
        let mut dirty = filter.pending.clone();
        dirty.extend(filter.sent.values().flatten());
        if last && filter.mapped != Some(mapped) {
            dirty.insert(MAPPED);
        }
        Some(dirty.into_iter().collect())
    }
}

impl Effects for World {
    fn now(&mut self) -> Moment {
        moment(self.now)
    }

    fn wait(&mut self, operation: &Operation, until: Moment) {
        self.crash_point();
        if self.calm {
            assert!(self.guest.serves(), "the guest is held while the engine waits");
        }
        while self.now < until.boot_us && !self.stop {
            let asked = self.asked(operation);
            if is_news(operation, &asked) {
                return;
            }
            self.advance_to(until.boot_us.min(self.now + 100 * MS));
        }
    }

    fn asked(&mut self, _: &Operation) -> Asked {
        Asked {
            abort: self.abort.then(|| "it was deleted".to_owned()),
            action: self.action,
        }
    }

    fn must_stop(&mut self) -> bool {
        self.stop
    }

    fn preflight(&mut self, _: &Operation) -> Effected<Preflight> {
        self.crash_point();
        self.latency();
        if !self.guest.alive {
            return Err(EffectError::new(ErrorKind::Refused, "the guest does not run"));
        }
        if self.in_trouble() {
            return retry("the guest agent is not connected");
        }
        Ok(Preflight {
            incarnation: self.owner.incarnation,
            epoch: self.owner.epoch,
            boot_id: "before".to_owned(),
            kernel_release: OLD_KERNEL.to_owned(),
            booted_at: 1,
            failed_units: vec!["known.service".to_owned()],
        })
    }

    fn confirm(&mut self, operation: &Operation) -> Effected<()> {
        self.owns(operation)?;
        self.send(Command::Confirm).map(|_| ())
    }

    fn prepare_split(&mut self, operation: &Operation) -> Effected<()> {
        self.owns(operation)?;
        self.send(Command::PrepareSplit).map(|_| ())
    }

    fn prepare_clone(&mut self, operation: &Operation) -> Effected<()> {
        self.crash_point();
        if self.clone.is_none() {
            self.clone = Some(Clone {
                incarnation: operation.clone_incarnation(),
                booted: None,
                ready_at: i64::MAX,
                cache: [0; FILES],
                active: false,
                agent_active: false,
                has_tap: false,
                held: None,
                dormant: false,
            });
            self.note(Event::CloneStarted);
        }
        self.crash_point();
        self.latency();
        if self.in_trouble() {
            return retry("the VMM's control socket does not answer");
        }
        Ok(())
    }

    fn split(&mut self, operation: &Operation) -> Effected<SplitOutcome> {
        self.owns(operation)?;
        let _ = self.send(Command::Sync)?;
        let _ = self.send(Command::FreezeFilesystems { watchdog: 100 * MS })?;
        // Looked at while frozen: a split that was on its way from before may have come until here.
        let was_split = self.guest.top == GUEST_LAYER;
        let split = if was_split {
            Ok(Answer::default())
        } else {
            self.send(Command::Split)
        };
        let thawed = self.send(Command::ThawFilesystems);
        let _ = split?;
        let by_watchdog = thawed?.by_watchdog;
        if (was_split || by_watchdog) && !self.is(Mutation::TrustAnySplit) {
            return Ok(SplitOutcome::Unsure {
                message: "file systems may not have been frozen".to_owned(),
            });
        }
        Ok(SplitOutcome::Done { frozen_us: 900 })
    }

    fn boot_clone(&mut self, _: &Operation) -> Effected<()> {
        self.send(Command::BootClone).map(|_| ())
    }

    fn await_clone_boot(&mut self, _: &Operation) -> Effected<Option<CloneBoot>> {
        self.crash_point();
        let Some(ready_at) = self.clone.as_ref().map(|clone| clone.ready_at) else {
            return clone_gone();
        };
        let slice = self.now + SECOND;
        let hangs = self.boot_fate == BootFate::Hangs;
        self.advance_to(if hangs { slice } else { ready_at.min(slice) });
        self.crash_point();
        if self.clone.is_none() {
            return clone_gone();
        }
        if ready_at > self.now || hangs {
            return Ok(None);
        }
        if self.boot_fate == BootFate::Panics {
            self.clone = None;
            return clone_gone();
        }
        self.note(Event::BootNotice);
        let old = self.boot_fate == BootFate::OldKernel;
        let mut failed_units = vec!["known.service".to_owned()];
        if self.boot_fate == BootFate::FailsAUnit {
            failed_units.push("web.service".to_owned());
        }
        Ok(Some(CloneBoot {
            boot_id: "after".to_owned(),
            kernel_release: if old { OLD_KERNEL } else { NEW_KERNEL }.to_owned(),
            booted_at: moment(self.now).unix_us,
            system_state: if self.boot_fate == BootFate::EmergencyShell {
                "maintenance".to_owned()
            } else {
                "degraded".to_owned()
            },
            failed_units,
        }))
    }

    fn integrate(&mut self, operation: &Operation, last: bool, deadline: Option<Moment>) -> Effected<Round> {
        self.owns(operation)?;
        let in_time = deadline.is_none_or(|deadline| self.now < deadline.boot_us - 2 * MS);
        if self.calm && in_time {
            let frozen = self.guest.userland_frozen.is_some();
            assert_eq!(
                frozen, last,
                "programs are frozen for the last round, and only then"
            );
        }
        if last && self.is(Mutation::NoFinalRound) {
            return Ok(Round::default());
        }
        let compare = last && !self.is(Mutation::FinalRoundLikeAnyOther);
        self.crash_point();
        self.latency();
        if !self.guest.runs() {
            return retry("the guest agent does not answer");
        }
        let Some(files) = self.dirty(operation.applied, compare) else {
            return Err(
                EffectError::new(ErrorKind::Refused, "nothing is captured for this operation")
                    .because(reasons::CAPTURE_LOST),
            );
        };
        let filter = self.guest.filter.as_mut().unwrap();
        filter.round += 1;
        let round = filter.round;
        filter.pending.clear();
        filter.sent.insert(round, files.iter().copied().collect());
        let mut sent = Vec::new();
        for file in files {
            self.latency();
            self.crash_point();
            if !self.guest.runs() {
                return retry("the export was cut");
            }
            let value = self.guest.cache[file];
            let Some(filter) = &mut self.guest.filter else {
                return retry("the export was cut");
            };
            if file == MAPPED {
                filter.mapped = Some(value);
            }
            sent.push((file, value));
            if self.in_trouble() {
                return retry("the session was cut");
            }
        }
        if deadline.is_some_and(|deadline| deadline.boot_us < self.now) {
            return Err(EffectError::new(ErrorKind::Lapsed, "maxPause is over"));
        }
        let Some(clone) = &mut self.clone else {
            return clone_gone();
        };
        for (file, value) in &sent {
            clone.cache[*file] = *value;
        }
        if last {
            let cache = clone.cache;
            self.layers.get_mut(&CLONE_LAYER).unwrap().blocks = cache.map(Some);
        }
        self.note(Event::Integrated);
        self.crash_point();
        if self.in_trouble() {
            return retry("the answer was lost");
        }
        let dirty = self
            .guest
            .filter
            .as_ref()
            .map_or(0, |filter| filter.pending.len());
        Ok(Round {
            round,
            entries: sent.len() as u64,
            bytes: 8 * sent.len() as u64,
            dirty: dirty as u64,
            conflicts: Vec::new(),
            conflict_count: 0,
            remains: (!last).then(Remains::default),
        })
    }

    fn probe(&mut self, operation: &Operation) -> Effected<super::super::effects::Answer> {
        self.crash_point();
        self.latency();
        let Some(clone) = &self.clone else {
            return clone_gone();
        };
        assert!(clone.booted.is_some(), "a clone is asked that has not booted");
        if self.in_trouble() {
            return retry("the guest agent does not answer");
        }
        let wavers = current(operation).unwrap().name == WAVERING;
        self.probed += u32::from(wavers);
        let ready = match self.readiness {
            Readiness::Never => !wavers,
            Readiness::Late => !wavers || self.probed > 2,
            Readiness::Ready | Readiness::Unasked => true,
        };
        self.crash_point();
        Ok(super::super::effects::Answer {
            ready,
            message: "so it is".to_owned(),
        })
    }

    fn watch(&mut self, _: &Operation) -> Effected<()> {
        if !self.guest.alive {
            return Err(EffectError::new(
                ErrorKind::GuestGone,
                "the guest's VMM has ended",
            ));
        }
        match self.clone {
            Some(_) => Ok(()),
            None => Err(EffectError::new(
                ErrorKind::CloneGone,
                "the clone's VMM has ended",
            )),
        }
    }

    fn hold_ingress(&mut self, operation: &Operation, lease_ms: u64) -> Effected<()> {
        self.owns(operation)?;
        self.hold(GateSet::Receive, lease_ms).map(|_| ())
    }

    fn freeze_userland(&mut self, operation: &Operation, lease_ms: u64) -> Effected<()> {
        self.owns(operation)?;
        if self.is(Mutation::NoFreeze) {
            return Ok(());
        }
        let watchdog = i64::try_from(lease_ms).unwrap() * MS;
        self.send(Command::FreezeUserland { watchdog }).map(drop)
    }

    fn seal(&mut self, operation: &Operation, lease_ms: u64) -> Effected<Sealed> {
        self.owns(operation)?;
        let answer = self.hold(GateSet::TransmitAndWrite, lease_ms)?;
        let at = moment(self.now);
        Ok(Sealed {
            block_writes: answer.block_writes,
            at,
        })
    }

    fn count_dirty(&mut self, operation: &Operation) -> Effected<u64> {
        self.owns(operation)?;
        self.crash_point();
        self.latency();
        if !self.guest.runs() {
            return retry("the guest agent does not answer");
        }
        let Some(dirty) = self.dirty(operation.applied, true) else {
            return Err(EffectError::new(ErrorKind::Refused, "nothing is captured"));
        };
        if dirty.is_empty() || self.is(Mutation::NoVerify) {
            self.verified = Some(self.guest.cache);
            return Ok(0);
        }
        Ok(dirty.len() as u64)
    }

    fn pause(&mut self, operation: &Operation, lease_ms: u64) -> Effected<()> {
        self.owns(operation)?;
        self.hold(GateSet::Vcpus, lease_ms).map(|_| ())
    }

    fn commit(&mut self, operation: &Operation) -> Effected<()> {
        self.owns(operation)?;
        let block_writes = operation.block_writes;
        self.send(Command::Commit { block_writes }).map(|_| ())
    }

    fn release(&mut self, operation: &Operation) -> Effected<()> {
        self.owns(operation)?;
        if self.is(Mutation::NoRelease) {
            return Ok(());
        }
        self.send(Command::Release).map(|_| ())
    }

    fn read_owner(&mut self, _: &Operation) -> Effected<Owner> {
        self.crash_point();
        let mut owner = self.owner.clone();
        if self.is(Mutation::OwnerFromMemory) {
            owner.layer = Some(GUEST_LAYER);
        }
        Ok(owner)
    }

    fn thaw_userland(&mut self, operation: &Operation) -> Effected<()> {
        self.owns(operation)?;
        if self.is(Mutation::NoThaw) {
            return Ok(());
        }
        self.send(Command::ThawUserland).map(|_| ())
    }

    fn thaw_filesystems(&mut self, operation: &Operation) -> Effected<()> {
        self.owns(operation)?;
        self.send(Command::ThawFilesystems).map(|_| ())
    }

    fn end_capture(&mut self, operation: &Operation) -> Effected<()> {
        self.owns(operation)?;
        self.send(Command::EndCapture).map(|_| ())
    }

    fn kill_clone(&mut self, _: &Operation) -> Effected<()> {
        self.crash_point();
        assert_ne!(
            self.owner.layer,
            Some(CLONE_LAYER),
            "the owner's machine is ended"
        );
        if !self.is(Mutation::NoKill) {
            self.clone = None;
        }
        self.crash_point();
        Ok(())
    }

    fn discard_clone(&mut self, _: &Operation) -> Effected<()> {
        self.crash_point();
        assert!(
            self.clone.is_none() || self.is(Mutation::NoKill),
            "the layer of a running clone is removed"
        );
        assert_ne!(
            self.owner.layer,
            Some(CLONE_LAYER),
            "the owner's layer is removed"
        );
        self.layers.remove(&CLONE_LAYER);
        self.discarded = true;
        self.crash_point();
        Ok(())
    }

    fn hand_over_network(&mut self, operation: &Operation) -> Effected<()> {
        self.owns(operation)?;
        self.send(Command::GiveNetwork).map(|_| ())
    }

    fn activate_clone(&mut self, _: &Operation, open_taps: bool) -> Effected<()> {
        self.send(Command::ActivateClone { open_taps }).map(|_| ())
    }

    fn activate_agent(&mut self, _: &Operation) -> Effected<Activation> {
        self.send(Command::ActivateAgent)?;
        Ok(Activation {
            started: vec![StartedUnit {
                unit: "cron.service".to_owned(),
                milliseconds: 12,
            }],
            failed: vec![FailedUnit {
                unit: "mail.service".to_owned(),
                message: "exit code 1".to_owned(),
            }],
            first_frame: Some(moment(self.now)),
        })
    }

    fn cold_boot(&mut self, operation: &Operation) -> Effected<()> {
        self.crash_point();
        let done =
            self.guest.alive && !self.guest.dormant && self.owner.incarnation == self.guest.incarnation;
        if !done {
            assert!(
                operation.is_owned_by_clone(&self.owner) || operation.is_rolled_back(&self.owner),
                "a cold boot of what it does not own"
            );
            self.boot_guest();
        }
        self.crash_point();
        Ok(())
    }

    fn retire(&mut self, operation: &Operation, deadline: Moment) -> Effected<()> {
        self.crash_point();
        assert_eq!(
            deadline,
            operation
                .committed_at
                .unwrap()
                .plus(operation.plan.retain_dormant)
        );
        self.retired = Some(deadline.boot_us);
        self.note(Event::Retired);
        self.crash_point();
        Ok(())
    }

    fn find_dormant(&mut self, operation: &Operation) -> Effected<Dormancy> {
        self.crash_point();
        self.latency();
        if self.in_trouble() {
            return retry("the VMM's control socket does not answer");
        }
        let clone_serves = self.clone.as_ref().is_some_and(|clone| clone.active);
        let is_dormant = self.guest.alive && self.guest.dormant;
        if !operation.is_owned_by_clone(&self.owner)
            || !clone_serves
            || !is_dormant
            || self.retired.is_none()
            || self.guest.incarnation != operation.guest_incarnation()
        {
            return Err(EffectError::new(ErrorKind::Refused, "nothing is dormant"));
        }
        let epoch = self.owner.epoch;
        Ok(Dormancy { epoch })
    }

    fn hold_clone(&mut self, _: &Operation, lease_ms: u64) -> Effected<u64> {
        let lease = i64::try_from(lease_ms).unwrap() * MS;
        self.send(Command::HoldClone { lease }).map(|_| 0)
    }

    fn commit_back(&mut self, operation: &Operation) -> Effected<()> {
        let epoch = operation.rollback.as_ref().unwrap().epoch;
        self.send(Command::CommitBack { epoch }).map(|_| ())
    }

    fn release_clone(&mut self, _: &Operation) -> Effected<()> {
        if self.is(Mutation::NoReleaseOfClone) {
            return Ok(());
        }
        self.send(Command::ReleaseClone).map(|_| ())
    }

    fn activate_guest(&mut self, operation: &Operation) -> Effected<()> {
        self.owns(operation)?;
        let epoch = operation.rollback.as_ref().unwrap().epoch;
        self.send(Command::ActivateGuest { epoch }).map(|_| ())
    }

    fn reinstate(&mut self, operation: &Operation) -> Effected<Option<Moment>> {
        self.owns(operation)?;
        self.crash_point();
        self.retired = None;
        self.note(Event::Reinstated);
        self.crash_point();
        if self.in_trouble() {
            return retry("the guest agent does not answer");
        }
        Ok(Some(moment(self.now)))
    }
}

impl World {
    /// A cold boot of what `owner.json` names, as the guest manager does it.
    pub fn boot_guest(&mut self) {
        self.clone = None;
        // Every incarnation has sockets of its own.
        self.late.clear();
        let top = self.owner.layer.unwrap();
        self.owner.epoch += 1;
        self.owner.incarnation += 1;
        self.guest = Guest::boot(self.owner.incarnation, top, self.read(top), self.now);
        self.settle();
    }
}
