//! The effects as this world has them: with latency, crash points before, within and after each.

use std::panic::resume_unwind;

use understudy_vmm_control::session::{Refusal, SaveState};

use super::super::effects::{
    CheckpointFacts, CommandEnd, EffectError, Effected, Effects, ErrorKind, FoundGuest, HostFacts,
    HostIntent, Preflight, Resumption, SaveProgress, Settling,
};
use super::super::quiesce::{InFlight, Rules, Ruling};
use super::super::record::{Session, Update};
use super::mutations::Mutation;
use super::world::*;
use crate::moment::Moment;

/// Thrown where the agent dies.
pub struct Crash;

pub const NEW_KERNEL: &str = "6.1.0-56-amd64";
pub const OLD_KERNEL: &str = "6.1.0-50-amd64";

pub fn moment(now: i64, booted_at: i64) -> Moment {
    Moment {
        unix_us: 1_700_000_000 * SECOND + now,
        boot_us: now - booted_at,
    }
}

fn retry<T>(message: &str) -> Effected<T> {
    Err(EffectError::new(ErrorKind::Retry, message))
}

fn gone<T>() -> Effected<T> {
    Err(EffectError::new(
        ErrorKind::GuestGone,
        "the guest's VMM has ended",
    ))
}

impl Shared {
    /// Counts a crash point; true where the agent dies.
    pub fn is_end(&self) -> bool {
        self.crash_points.set(self.crash_points.get() + 1);
        self.host_is_down.get() || self.crash_at.borrow().contains(&self.crash_points.get())
    }

    pub fn crash(&self) -> ! {
        self.host_is_down.set(false);
        self.trace.borrow_mut().push(Event::AgentCrashed);
        resume_unwind(Box::new(Crash))
    }
}

impl World {
    /// The agent dies here where the run says so.
    pub fn crash_point(&mut self) {
        if self.shared.is_end() {
            self.shared.crash();
        }
    }

    fn in_trouble(&mut self) -> bool {
        self.now < self.calm_from && self.trouble > 0 && {
            let permille = self.trouble;
            self.rng.chance(permille)
        }
    }

    /// Performs a command: the agent may die before, within or after it, and the answer may be lost with
    /// or without the command having been carried out.
    fn perform<T>(&mut self, command: impl FnOnce(&mut World) -> Effected<T>) -> Effected<T> {
        self.crash_point();
        let micros = self.rng.range(50, 3 * MS);
        self.advance(micros);
        // The host may have gone down while the command was on its way.
        if self.shared.host_is_down.get() {
            self.crash_point();
        }
        let dies = self.shared.is_end();
        if dies || self.in_trouble() {
            if self.rng.chance(500) {
                let _ = command(self);
                self.check();
            }
            if dies {
                self.shared.crash();
            }
            self.advance(30 * MS);
            self.crash_point();
            return retry("no answer in time");
        }
        let answer = command(self);
        self.check();
        self.crash_point();
        self.manage();
        answer
    }

    fn index(&self, session: &Session) -> usize {
        self.guests
            .iter()
            .position(|guest| guest.uid == session.uid)
            .unwrap()
    }

    /// What a VMM says of its save.
    fn told(&mut self, index: usize) -> SaveProgress {
        let (now, early) = (self.now, self.is(Mutation::SavedTooEarly));
        let memory = self.guests[index].memory;
        let vm = self.guests[index].vm().unwrap();
        let mut progress = World::progress(vm.save.as_ref().unwrap(), now, memory);
        if early && progress.state == SaveState::Pausing {
            progress.state = SaveState::Saved;
        }
        progress
    }

    fn progress(save: &Save, now: i64, memory: u64) -> SaveProgress {
        let span = u64::try_from((save.ready_at - save.began).max(1)).unwrap();
        let done = u64::try_from((now - save.began).max(0)).unwrap().min(span);
        let written = u64::try_from(u128::from(memory) * u128::from(done) / u128::from(span)).unwrap();
        let failed = save.state == SaveState::Failed;
        SaveProgress {
            state: save.state,
            rounds: 1 + u32::try_from(done * 4 / span).unwrap(),
            written_bytes: written,
            remaining_bytes: memory - written,
            checkpoint_bytes: memory,
            pause_us: u64::try_from(save.pause).unwrap(),
            error: failed.then(|| "no space left on device".to_owned()),
        }
    }
}

impl Effects for World {
    fn now(&mut self) -> Moment {
        moment(self.now, self.booted_at)
    }

    fn wait(&mut self, until: Moment) {
        self.crash_point();
        let until = until.boot_us + self.booted_at;
        // Something may change: it is looked at least every second.
        self.advance_to(until.min(self.now + SECOND).max(self.now + 1));
        if self.shared.host_is_down.get() {
            self.crash_point();
        }
        self.manage();
    }

    fn abort_requested(&mut self, _: &Update) -> Option<String> {
        self.abort.then(|| "it was deleted".to_owned())
    }

    fn host_intent(&mut self) -> HostIntent {
        if self.now < self.agent_started_at + 20 * MS {
            return HostIntent::Unknown;
        }
        match self.going_down {
            Some(going) => HostIntent::GoesDown {
                deadline: moment(going.at - SECOND, self.booted_at),
                reason: "reboot".to_owned(),
            },
            None => HostIntent::StaysUp,
        }
    }

    fn must_stop(&mut self) -> bool {
        self.stop
    }

    fn inspect_host(&mut self) -> Effected<HostFacts> {
        self.perform(|world| {
            Ok(HostFacts {
                boot_id: world.boot_id(),
                kernel_release: if world.boot == 1 { OLD_KERNEL } else { NEW_KERNEL }.to_owned(),
                booted_at: moment(world.booted_at, 0).unix_us,
                agent_started_at: moment(world.agent_started_at, 0).unix_us,
            })
        })
    }

    fn run_command(&mut self, _: &Update) -> Effected<Option<CommandEnd>> {
        self.perform(|world| {
            let ends = *world.command.get_or_insert(world.now + 3 * SECOND);
            world.advance(200 * MS);
            if world.now < ends || world.command_fate == CommandFate::Hangs {
                return Ok(None);
            }
            Ok(Some(CommandEnd {
                success: world.command_fate == CommandFate::Good,
                output: "exit status: 100".to_owned(),
            }))
        })
    }

    fn end_command(&mut self, _: &Update) -> Effected<()> {
        self.perform(|world| {
            world.command = None;
            Ok(())
        })
    }

    fn quiesce_operations(&mut self, _: &Update, rules: &Rules) -> Effected<Vec<InFlight>> {
        self.perform(|world| {
            world.quiesced = true;
            if world.is(Mutation::QuiesceIgnoresOperations) {
                return Ok(Vec::new());
            }
            world
                .operations
                .retain(|(flying, _)| rules.ruling(flying.phase) == Ruling::Wait);
            Ok(world
                .operations
                .iter()
                .map(|(flying, _)| flying.clone())
                .collect())
        })
    }

    fn release_operations(&mut self, _: &Update) -> Effected<()> {
        self.perform(|world| {
            world.quiesced = false;
            if !world.going_down.is_some_and(|going| going.is_ours) {
                world.let_host_go();
            }
            Ok(())
        })
    }

    fn preflight(&mut self, _: &Update) -> Effected<Preflight> {
        self.perform(|world| {
            let provider_problem = world
                .provider_missing
                .then(|| "there is no credential provider of that name".to_owned());
            let blind = world.is(Mutation::QuiesceIgnoresOperations);
            let guests = (0..world.guests.len())
                .filter(|index| !world.guests[*index].vms.is_empty())
                .map(|index| {
                    let number = world.rng.next();
                    let guest = &world.guests[index];
                    let busy = world
                        .operations
                        .iter()
                        .find(|(flying, _)| flying.guest == guest.guest && !blind);
                    FoundGuest {
                        guest: guest.guest.clone(),
                        uid: guest.uid.clone(),
                        incarnation: guest.write_session,
                        checkpoint: uuid::Uuid::from_u64_pair(number, index as u64),
                        priority: guest.priority,
                        memory_bytes: guest.memory,
                        expected_bytes: guest.memory,
                        problem: busy.map(|(flying, _)| format!("{} is in flight", flying.name)),
                    }
                })
                .collect();
            Ok(Preflight {
                guests,
                provider_problem,
            })
        })
    }

    fn register_key(&mut self, _: &Update, session: &Session) -> Effected<()> {
        let checkpoint = session.checkpoint;
        self.perform(move |world| {
            // Who seals to the operator's public key has it already.
            if world.provider_silent && !world.operator.is_provider {
                return retry("the provider does not answer");
            }
            world.keys += 1;
            world.run.insert(checkpoint, world.keys);
            if !world.is(Mutation::KeyIsNotRegistered) {
                world.provider.insert(checkpoint, world.keys);
            }
            world.note(Event::KeyRegistered);
            Ok(())
        })
    }

    fn save(&mut self, update: &Update, session: &Session, lease_ms: u64) -> Effected<SaveProgress> {
        let index = self.index(session);
        let checkpoint = session.checkpoint;
        let recorded = self.shared.recorded.borrow().clone();
        let in_record = recorded
            .and_then(|update| update.sessions.into_iter().find(|there| there.uid == session.uid))
            .is_some_and(|there| there.checkpoint == checkpoint);
        let guest = self.guests[index].guest.clone();
        let busy = self.operations.iter().any(|(flying, _)| flying.guest == guest);
        assert!(!busy, "a guest is saved while an operation on it is in flight");
        assert!(in_record, "a save is begun that nobody would know of");
        let _ = update;
        self.perform(move |world| {
            let (now, keys) = (world.now, world.run.get(&checkpoint).copied());
            let memory = world.guests[index].memory;
            let megabytes = i64::try_from(memory >> 20).unwrap();
            let pause = world.rng.range(20 * MS, 300 * MS);
            let guest = &mut world.guests[index];
            let fate = guest.save_fate;
            let Some(vm) = guest.vm() else {
                return gone();
            };
            if vm.save.as_ref().is_none_or(|save| save.checkpoint != checkpoint) {
                let Some(key) = keys else {
                    return Err(EffectError::new(ErrorKind::Refused, "the key's file is missing"));
                };
                let takes = if fate == SaveFate::Never {
                    10_000 * SECOND
                } else {
                    megabytes * 10 * MS
                };
                vm.save = Some(Save {
                    checkpoint,
                    key,
                    state: SaveState::PreCopying,
                    began: now,
                    ready_at: now + takes,
                    pause,
                    may_pause: false,
                    ends_at: i64::MAX,
                    lease_us: i64::try_from(lease_ms).unwrap() * MS,
                    lease_until: i64::MAX,
                });
            }
            Ok(world.told(index))
        })
    }

    fn pause_for_save(&mut self, _: &Update, session: &Session) -> Effected<SaveProgress> {
        let index = self.index(session);
        let checkpoint = session.checkpoint;
        self.perform(move |world| {
            let Some(vm) = world.guests[index].vm() else {
                return gone();
            };
            let Some(save) = vm.save.as_mut().filter(|save| save.checkpoint == checkpoint) else {
                return Err(EffectError::new(ErrorKind::Refused, "there is no such save"));
            };
            save.may_pause = true;
            world.let_save_proceed(index);
            Ok(world.told(index))
        })
    }

    fn keep_saved(&mut self, _: &Update, session: &Session, lease_ms: u64) -> Effected<SaveProgress> {
        let index = self.index(session);
        let checkpoint = session.checkpoint;
        self.perform(move |world| {
            let now = world.now;
            let Some(vm) = world.guests[index].vm() else {
                return gone();
            };
            let Some(save) = vm.save.as_mut().filter(|save| save.checkpoint == checkpoint) else {
                return Err(EffectError::new(ErrorKind::Refused, "there is no such save"));
            };
            if save.state == SaveState::Saved {
                save.lease_until = now + i64::try_from(lease_ms).unwrap() * MS;
            }
            Ok(world.told(index))
        })
    }

    fn cancel_save(&mut self, _: &Update, session: &Session) -> Effected<()> {
        let index = self.index(session);
        let checkpoint = session.checkpoint;
        self.perform(move |world| {
            if world.is(Mutation::CancelDoesNothing) {
                return Ok(());
            }
            let leaves = world.is(Mutation::CancelLeavesCheckpoint);
            let guest = &mut world.guests[index];
            if guest.vms.is_empty() {
                return gone();
            }
            let write_session = guest.write_session;
            let vm = guest.vm().unwrap();
            let Some(save) = vm.save.as_mut().filter(|save| save.checkpoint == checkpoint) else {
                return Ok(());
            };
            let was_saved = save.state == SaveState::Saved;
            if !matches!(save.state, SaveState::Failed | SaveState::Cancelled) {
                save.state = SaveState::Cancelled;
            }
            if was_saved && !leaves {
                vm.write_session = write_session + 1;
                guest.write_session += 1;
                if let Some(there) = guest.checkpoints.get_mut(&checkpoint) {
                    there.has_manifest = false;
                }
            }
            world.note(Event::RanOn);
            Ok(())
        })
    }

    fn acknowledge(&mut self, _: &Update) -> Effected<()> {
        self.perform(|world| {
            world.note(Event::Acknowledged);
            world.assert_saved("acknowledged");
            world.let_host_go();
            Ok(())
        })
    }

    fn request_reboot(&mut self, _: &Update) -> Effected<()> {
        self.perform(|world| {
            world.note(Event::RebootAsked);
            world.assert_saved("rebooted");
            // Some take longer than anybody waits.
            let slow = world.slow_reboots && world.rng.chance(250);
            let delay = match slow {
                true => world.rng.range(50 * SECOND, 250 * SECOND),
                false => world.rng.range(100 * MS, 20 * SECOND),
            };
            match world.reboot_fate {
                RebootFate::Refused => {
                    return Err(EffectError::new(ErrorKind::Refused, "systemd refused the reboot"));
                }
                RebootFate::Never => {}
                RebootFate::Comes if world.going_down.is_none() => {
                    world.going_down = Some(GoingDown {
                        at: world.now + delay,
                        is_ours: true,
                        is_final_from: world.now + delay / 2,
                    });
                }
                RebootFate::Comes => {}
            }
            Ok(())
        })
    }

    fn call_off_reboot(&mut self, _: &Update) -> Effected<()> {
        self.perform(|world| {
            if world
                .going_down
                .is_some_and(|going| !going.is_ours || going.is_final_from <= world.now)
            {
                return Err(EffectError::new(ErrorKind::Refused, "the host is going down"));
            }
            if !world.is(Mutation::RebootIsNotCalledOff) {
                world.going_down = None;
            }
            Ok(())
        })
    }

    fn inspect_checkpoint(&mut self, _: &Update, session: &Session) -> Effected<CheckpointFacts> {
        let index = self.index(session);
        let checkpoint = session.checkpoint;
        self.perform(move |world| {
            let guest = &world.guests[index];
            if guest.vms.iter().any(|vm| vm.from == Some(checkpoint)) {
                return Ok(CheckpointFacts::Running);
            }
            if world.boot > 1 && !guest.vms.is_empty() {
                return Ok(CheckpointFacts::Unwanted);
            }
            Ok(match guest.checkpoints.get(&checkpoint) {
                Some(there) if there.is_consumed => CheckpointFacts::Consumed,
                Some(there) if there.has_manifest => CheckpointFacts::Complete,
                _ => CheckpointFacts::Missing,
            })
        })
    }

    fn obtain_key(&mut self, _: &Update, session: &Session) -> Effected<()> {
        let index = self.index(session);
        let checkpoint = session.checkpoint;
        self.perform(move |world| {
            if world.operator.is_provider {
                world.ask_operator()?;
            } else if world.provider_silent {
                return retry("the provider does not answer");
            }
            match world.provider.get(&checkpoint).copied() {
                Some(key) if world.guests[index].resume_fate != ResumeFate::NoKey => {
                    world.run.insert(checkpoint, key);
                    world.note(Event::KeyObtained);
                    Ok(())
                }
                _ => Err(EffectError::new(
                    ErrorKind::Refused,
                    "the provider has no such key",
                )),
            }
        })
    }

    fn resume(&mut self, _: &Update, session: &Session) -> Effected<Resumption> {
        let index = self.index(session);
        let checkpoint = session.checkpoint;
        self.perform(move |world| {
            let (now, boot, booted_at) = (world.now, world.boot, world.booted_at);
            let key = world.run.get(&checkpoint).copied();
            let loaded_at = now + world.rng.range(SECOND, 90 * SECOND);
            let no_mark = world.is(Mutation::ConsumedIsNotMarked);
            let guest = &mut world.guests[index];
            let runs = Resumption::Runs {
                first_instruction: moment(now, booted_at),
            };
            if guest.vms.iter().any(|vm| vm.from == Some(checkpoint)) {
                return Ok(runs);
            }
            let refused = |refusal| {
                Ok(Resumption::Refused {
                    refusal,
                    message: "as this world has it".to_owned(),
                })
            };
            let write_session = guest.write_session;
            let Some(there) = guest.checkpoints.get_mut(&checkpoint) else {
                return refused(Refusal::CheckpointMissing);
            };
            if there.is_consumed {
                return gone();
            }
            if !there.has_manifest {
                return refused(Refusal::CheckpointMissing);
            }
            if there.boot == boot {
                return refused(Refusal::CheckpointSameBoot);
            }
            if let ResumeFate::Refused(refusal) = guest.resume_fate {
                return refused(refusal);
            }
            if key != Some(there.key) {
                return refused(Refusal::CheckpointKey);
            }
            if there.write_session != write_session {
                return refused(Refusal::CheckpointStale);
            }
            if !no_mark {
                there.is_consumed = true;
            }
            let (life, progress) = (there.life, there.progress);
            if !no_mark {
                guest.write_session += 1;
            }
            if guest.resume_fate == ResumeFate::Dies {
                guest.has_died = true;
                guest.died_in = boot;
                return gone();
            }
            guest.vms.push(Vm {
                life,
                progress,
                write_session: guest.write_session,
                from: Some(checkpoint),
                loaded_at,
                save: None,
            });
            world.note(Event::Resumed);
            Ok(runs)
        })
    }

    fn look_after(&mut self, _: &Update, session: &Session) -> Effected<Settling> {
        let index = self.index(session);
        let checkpoint = session.checkpoint;
        self.perform(move |world| {
            let (now, early) = (world.now, world.is(Mutation::LoadedTooEarly));
            let vm = world.guests[index]
                .vms
                .iter()
                .find(|vm| vm.from == Some(checkpoint));
            Ok(match vm {
                None => Settling::Gone,
                Some(vm) if vm.loaded_at <= now || early => Settling::Loaded,
                Some(_) => Settling::Loading,
            })
        })
    }

    fn destroy(&mut self, _: &Update, session: &Session) -> Effected<()> {
        let index = self.index(session);
        let checkpoint = session.checkpoint;
        self.perform(move |world| {
            let now = world.now;
            let guest = &mut world.guests[index];
            if let Some(there) = guest.checkpoints.get(&checkpoint) {
                let good = guest.good_checkpoint().is_some_and(|(id, _)| id == checkpoint);
                assert!(!good, "a checkpoint is destroyed that nobody has resumed");
                let loading = guest
                    .vms
                    .iter()
                    .any(|vm| vm.from == Some(checkpoint) && vm.loaded_at > now);
                assert!(
                    !(there.is_consumed && loading),
                    "a checkpoint is destroyed whose memory is not loaded"
                );
                guest.checkpoints.remove(&checkpoint);
            }
            world.run.remove(&checkpoint);
            if !world.is(Mutation::KeyIsLeftBehind) {
                world.provider.remove(&checkpoint);
            }
            Ok(())
        })
    }
}

impl World {
    /// A host that waited for us waits no more.
    fn let_host_go(&mut self) {
        if let Some(going) = &mut self.going_down
            && !going.is_ours
        {
            going.at = going.at.min(self.now + 2 * SECOND);
        }
    }

    /// The host is not rebooted before every save is durable, and before that is recorded; unless it
    /// insists, or an agent that was cut did this before.
    fn assert_saved(&self, what: &str) {
        let recorded = self.shared.recorded.borrow();
        let recorded = recorded.as_ref().unwrap();
        assert!(recorded.acknowledged, "{what} before that was recorded");
        for guest in &self.guests {
            if self.insists {
                continue;
            }
            assert!(
                guest
                    .vms
                    .iter()
                    .all(|vm| vm.is_paused() && guest.good_checkpoint().is_some()),
                "{what} while {} is not saved",
                guest.guest
            );
        }
    }
}
