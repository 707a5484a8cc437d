//! One run from the manifest to the end.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::rc::Rc;

use understudy_api::host_update::{HostExpect, RebootMethod};
use understudy_api::node_update::Origin;
use understudy_api::{NodeUpdatePhase, Phase};
use understudy_vmm_control::session::Refusal;

use super::super::driver::{Run, run};
use super::super::effects::Report;
use super::super::journal::{Journal, JournalError, decode, encode};
use super::super::plan::Plan;
use super::super::record::{Update, Verdict};
use super::super::status;
use super::agent::{Crash, NEW_KERNEL, moment};
use super::judge::judge;
use super::mutations::Mutation;
use super::world::*;
use crate::handover::sim::rng::Rng;

/// What a run starts from. All else follows from the seed.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub seed: u64,
    pub origin: Origin,
    /// Crash points at which the agent dies.
    pub crash_at: Vec<u64>,
    /// The longest that the agent stays away after a crash.
    pub away: i64,
    /// Chance that a command fails, in a thousand.
    pub trouble: u64,
    pub faults: Vec<(i64, Fault)>,
    pub save_fates: Vec<SaveFate>,
    pub resume_fates: Vec<ResumeFate>,
    pub reboot_fate: RebootFate,
    pub slow_reboots: bool,
    pub command_fate: CommandFate,
    pub provider_missing: bool,
    /// Whether the operator is the credential provider.
    pub operator: bool,
    pub operations: Vec<(Phase, i64)>,
    /// How long a host that goes down by itself waits.
    pub waits: i64,
    pub mutation: Option<Mutation>,
}

impl Scenario {
    /// A run without trouble.
    pub fn quiet(seed: u64) -> Scenario {
        Scenario {
            seed,
            origin: Origin::HostUpdate,
            crash_at: Vec::new(),
            away: 700 * MS,
            trouble: 0,
            faults: Vec::new(),
            save_fates: Vec::new(),
            resume_fates: Vec::new(),
            reboot_fate: RebootFate::Comes,
            slow_reboots: false,
            command_fate: CommandFate::Good,
            provider_missing: false,
            operator: false,
            operations: Vec::new(),
            waits: 60 * SECOND,
            mutation: None,
        }
    }

    /// The host goes down by itself.
    pub fn forced(seed: u64) -> Scenario {
        let mut scenario = Scenario::quiet(seed);
        scenario.origin = Origin::Host;
        scenario
    }

    /// The operator keeps the credential.
    pub fn kept_by_operator(seed: u64) -> Scenario {
        let mut scenario = Scenario::quiet(seed);
        scenario.operator = true;
        scenario
    }

    /// A run in which anything may happen.
    pub fn wild(seed: u64) -> Scenario {
        let mut rng = Rng::new(seed.wrapping_mul(0x9e37_79b9));
        let mut scenario = Scenario::quiet(seed);
        if rng.chance(300) {
            scenario.origin = Origin::Host;
            scenario.waits = rng.range(2 * SECOND, 60 * SECOND);
        }
        scenario.trouble = [0, 0, 10, 40, 100][rng.below(5)];
        scenario.away = [SECOND, SECOND, 10 * SECOND, 300 * SECOND][rng.below(4)];
        for _ in 0..rng.below(5) {
            scenario.crash_at.push(u64::try_from(rng.range(1, 300)).unwrap());
        }
        for _ in 0..3 {
            scenario.save_fates.push(match rng.below(24) {
                0 => SaveFate::Fails,
                1 => SaveFate::Never,
                _ => SaveFate::Good,
            });
            scenario.resume_fates.push(match rng.below(24) {
                0 => ResumeFate::Refused(Refusal::CheckpointDamaged),
                1 => ResumeFate::Refused(Refusal::CheckpointIncompatible),
                2 => ResumeFate::Dies,
                3 => ResumeFate::NoKey,
                4 => ResumeFate::Removed,
                _ => ResumeFate::Good,
            });
        }
        scenario.slow_reboots = true;
        scenario.reboot_fate = match rng.below(12) {
            0 => RebootFate::Never,
            1 => RebootFate::Refused,
            _ => RebootFate::Comes,
        };
        scenario.command_fate = match rng.below(30) {
            0 => CommandFate::Fails,
            1 => CommandFate::Hangs,
            _ => CommandFate::Good,
        };
        scenario.provider_missing = rng.chance(30);
        // Apart from the other draws: seeds that were kept stay what they were, but for this.
        scenario.operator = scenario.origin == Origin::HostUpdate && seed.is_multiple_of(3);
        for _ in 0..rng.below(3) {
            let under_way = Phase::ALL.iter().position(|phase| phase.is_terminal());
            let phase = Phase::ALL[rng.below(under_way.unwrap_or_default())];
            scenario.operations.push((phase, rng.range(SECOND, 20 * SECOND)));
        }
        for _ in 0..rng.below(4) {
            let at = rng.range(0, 40 * SECOND);
            match rng.below(12) {
                0 => scenario.faults.push((at, Fault::VmmDies(rng.below(3)))),
                1..=3 => scenario.faults.push((at, Fault::PowerLost)),
                4 => scenario.faults.push((at, Fault::Abort)),
                5 => scenario.faults.push((at, Fault::AgentStops)),
                6 => {
                    scenario.faults.push((at, Fault::ProviderSilent(true)));
                    let until = at + rng.range(MS, 200 * SECOND);
                    scenario.faults.push((until, Fault::ProviderSilent(false)));
                }
                7 | 8 => {
                    let waits = rng.range(SECOND, 60 * SECOND);
                    scenario.faults.push((at, Fault::HostBegins { waits }));
                }
                9 => scenario.faults.push((at, Fault::HostCallsOff)),
                _ => {
                    scenario.faults.push((at, Fault::JournalFull(true)));
                    let until = at + rng.range(MS, 10 * SECOND);
                    scenario.faults.push((until, Fault::JournalFull(false)));
                }
            }
        }
        scenario
    }
}

/// What a run came to.
pub struct Ended {
    pub update: Update,
    pub verdict: Verdict,
    pub trace: Vec<Event>,
    pub crash_points: u64,
    pub world: World,
}

impl Ended {
    pub fn at(&self, event: Event) -> Option<usize> {
        self.trace.iter().position(|there| *there == event)
    }
}

struct SimJournal {
    shared: Rc<Shared>,
    disk: Option<Vec<u8>>,
    mutation: Option<Mutation>,
}

impl Journal for SimJournal {
    fn write(&mut self, update: &Update) -> Result<(), JournalError> {
        let path = Path::new("journal");
        if self.shared.is_end() {
            self.shared.crash();
        }
        if self.shared.journal_full.get() {
            return Err(JournalError::Io {
                action: "writing",
                path: path.to_owned(),
                source: std::io::ErrorKind::StorageFull.into(),
            });
        }
        let entered = |phase| update.transitions.iter().any(|there| there.phase == phase);
        let forgets = match self.mutation {
            Some(Mutation::AcknowledgementIsNotRecorded) => entered(NodeUpdatePhase::Acknowledged),
            Some(Mutation::SavesAreNotRecorded) => entered(NodeUpdatePhase::Saving),
            _ => false,
        };
        if !forgets {
            self.disk = Some(encode(update).unwrap());
            *self.shared.recorded.borrow_mut() = Some(update.clone());
            let mut trace = self.shared.trace.borrow_mut();
            for (phase, event) in [
                (NodeUpdatePhase::Notified, Event::NotificationRecorded),
                (NodeUpdatePhase::Acknowledged, Event::AcknowledgementRecorded),
                (NodeUpdatePhase::Resuming, Event::PostRebootRecorded),
            ] {
                if entered(phase) && !trace.contains(&event) {
                    trace.push(event);
                }
            }
        }
        // Replaced by rename: a cut finds the old record (above) or the new one (here), never half of it.
        if self.shared.is_end() {
            self.shared.crash();
        }
        Ok(())
    }
}

/// What the agent's other parts learn.
struct Others {
    shared: Rc<Shared>,
    tells: bool,
}

impl Report for Others {
    fn progress(&mut self, update: &Update) {
        if self.tells {
            let states: Vec<_> = update.sessions.iter().map(|session| session.state).collect();
            let undo = update.undo.as_ref().map(|undo| &undo.message);
            println!("{} {:?} {states:?} {undo:?}", update.phase(), update.step);
        }
        *self.shared.update.borrow_mut() = Some(update.clone());
        let mut shown = Default::default();
        status::update(&mut shown, update, 1, update.created);
        assert_eq!(shown.phase, Some(update.phase()));
        assert!(shown.reason.is_some_and(|reason| !reason.is_empty()));
    }

    fn journal_trouble(&mut self, _: &Update, _: &str) {}
}

/// Runs a scenario; panics where something that must hold does not.
pub fn play(scenario: &Scenario) -> Ended {
    let mut world = World::new(scenario.seed);
    world.mutation = scenario.mutation;
    world.trouble = scenario.trouble;
    world.reboot_fate = scenario.reboot_fate;
    world.slow_reboots = scenario.slow_reboots;
    world.command_fate = scenario.command_fate;
    world.provider_missing = scenario.provider_missing;
    world.operator.is_provider = scenario.operator;
    for (index, guest) in world.guests.iter_mut().enumerate() {
        guest.save_fate = scenario.save_fates.get(index).copied().unwrap_or(SaveFate::Good);
        guest.resume_fate = scenario
            .resume_fates
            .get(index)
            .copied()
            .unwrap_or(ResumeFate::Good);
    }
    world.calm_from = world.now + 200 * SECOND;
    world.end = world.now + 40_000 * SECOND;
    world.fly(&scenario.operations);
    let start = world.now;
    world.faults = scenario
        .faults
        .iter()
        .map(|(at, fault)| (start + at, *fault))
        .collect();
    if scenario.origin == Origin::Host {
        world.insists = true;
        world.going_down = Some(GoingDown {
            at: start + scenario.waits,
            is_ours: false,
            is_final_from: start + scenario.waits,
        });
    }
    *world.shared.crash_at.borrow_mut() = scenario.crash_at.clone();
    let mut journal = SimJournal {
        shared: Rc::clone(&world.shared),
        disk: None,
        mutation: scenario.mutation,
    };
    let mut others = Others {
        shared: Rc::clone(&world.shared),
        tells: std::env::var("UNDERSTUDY_SIM_SEED").is_ok(),
    };
    let update = loop {
        let (update, recovered) = match &journal.disk {
            Some(record) => (decode::<Update>(record, Path::new("journal")).unwrap(), true),
            None => (new_update(scenario, &world), false),
        };
        *world.shared.update.borrow_mut() = recovered.then(|| update.clone());
        let result = catch_unwind(AssertUnwindSafe(|| {
            // Other parts of the agent start beside the driver: guests may be booted at once.
            world.manage();
            run(update, recovered, &mut world, &mut journal, &mut others)
        }));
        match result {
            Ok(Run::Finished(update)) => break update,
            Ok(Run::Stopped(_)) => world.stop = false,
            Err(payload) if payload.is::<Crash>() => {}
            Err(payload) => resume_unwind(payload),
        }
        let pause = world.rng.range(MS, scenario.away);
        world.advance(pause);
        world.shared.host_is_down.set(false);
        world.agent_started_at = world.now;
    };
    assert!(
        !(update.undo.is_some() && world.going_down.is_some_and(|going| going.is_ours)),
        "it was undone, and the reboot that was asked for is still to come"
    );
    world.faults.clear();
    world.going_down = None;
    world.manage();
    world.advance(5 * SECOND);
    let shared = Rc::clone(&world.shared);
    judge(scenario, &world, &update);
    Ended {
        verdict: update.verdict.clone().unwrap(),
        update,
        trace: shared.trace.borrow().clone(),
        crash_points: shared.crash_points.get(),
        world,
    }
}

pub fn new_update(scenario: &Scenario, world: &World) -> Update {
    let plan = Plan {
        origin: scenario.origin,
        reason: None,
        command: match scenario.origin {
            Origin::HostUpdate => vec!["/usr/bin/true".to_owned()],
            Origin::Host => Vec::new(),
        },
        command_timeout: 20 * SECOND,
        expect: (scenario.origin == Origin::HostUpdate).then(|| HostExpect {
            kernel_release: Some(NEW_KERNEL.to_owned()),
            booted_after: None,
        }),
        reboot: RebootMethod::Systemd,
        reboot_command: Vec::new(),
        reboot_timeout: 60 * SECOND,
        credential_provider: None,
        save_timeout: 120 * SECOND,
    };
    Update::new(
        "6f2c".to_owned(),
        "kernel-5d3a".to_owned(),
        plan,
        moment(world.now, world.booted_at),
    )
}
