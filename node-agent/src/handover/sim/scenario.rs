//! One run from the manifest to the end, with what must hold then.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::rc::Rc;

use understudy_api::Phase;
use understudy_api::conditions::reasons;
use understudy_api::readiness::{Probe, TcpSocket};
use understudy_api::reboot::{ActionType, CutoverMode, OnConflict};

use super::super::driver::{Run, run};
use super::super::effects::Report;
use super::super::journal::{Journal, JournalError, decode, encode};
use super::super::plan::Plan;
use super::super::record::{Operation, Verdict};
use super::super::rollback;
use super::agent::{NEW_KERNEL, moment};
use super::mutations::Mutation;
use super::wire::Crash;
use super::world::*;

/// Seeds from here on have modes of cutover, actions and rollbacks as well; those below play as they always did.
pub const WITH_WAYS_BACK: u64 = 100_000;

/// What a run starts from. All else follows from the seed.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub seed: u64,
    /// Crash points at which the agent dies.
    pub crash_at: Vec<u64>,
    /// Chance that a command fails, in a thousand.
    pub trouble: u64,
    pub faults: Vec<(i64, Fault)>,
    pub boot_fate: BootFate,
    pub readiness: Readiness,
    pub max_pause: i64,
    pub expects: bool,
    pub mode: CutoverMode,
    /// After which time a reboot that has succeeded is to be rolled back.
    pub rollback: Option<i64>,
    pub mutation: Option<Mutation>,
}

impl Scenario {
    /// A run without trouble.
    pub fn quiet(seed: u64) -> Scenario {
        Scenario {
            seed,
            crash_at: Vec::new(),
            trouble: 0,
            faults: Vec::new(),
            boot_fate: BootFate::Good,
            readiness: Readiness::Unasked,
            max_pause: 300 * MS,
            expects: true,
            mode: CutoverMode::Automatic,
            rollback: None,
            mutation: None,
        }
    }

    /// A run without trouble whose `maxPause` is hard to keep.
    pub fn tight(seed: u64) -> Scenario {
        let mut scenario = Scenario::quiet(seed);
        scenario.max_pause = super::rng::Rng::new(seed).range(3, 40) * MS;
        scenario
    }

    /// A run in which anything may happen.
    pub fn wild(seed: u64) -> Scenario {
        let mut rng = super::rng::Rng::new(seed.wrapping_mul(0x9e37_79b9));
        let mut scenario = Scenario::quiet(seed);
        scenario.trouble = [0, 0, 10, 40, 100][rng.below(5)];
        scenario.max_pause = rng.range(8, 800) * MS;
        scenario.expects = rng.chance(500);
        for _ in 0..rng.below(5) {
            scenario.crash_at.push(u64::try_from(rng.range(1, 260)).unwrap());
        }
        scenario.boot_fate = match rng.below(20) {
            0 => BootFate::Hangs,
            1 => BootFate::Panics,
            2 => BootFate::FailsAUnit,
            3 => BootFate::OldKernel,
            _ => BootFate::Good,
        };
        for _ in 0..rng.below(3) {
            let at = rng.range(0, 6 * SECOND);
            match rng.below(10) {
                0 => scenario.faults.push((at, Fault::GuestDies)),
                1 | 2 => scenario.faults.push((at, Fault::CloneDies)),
                3 => scenario.faults.push((at, Fault::GuestResets)),
                4 => scenario.faults.push((at, Fault::HostDies)),
                5 | 6 => scenario.faults.push((at, Fault::Abort)),
                7 => scenario.faults.push((at, Fault::AgentStops)),
                _ => {
                    scenario.faults.push((at, Fault::JournalFull(true)));
                    let until = at + rng.range(MS, 3 * SECOND);
                    scenario.faults.push((until, Fault::JournalFull(false)));
                }
            }
        }
        if seed >= WITH_WAYS_BACK {
            scenario.find_ways_back(&mut rng);
        }
        scenario
    }

    fn find_ways_back(&mut self, rng: &mut super::rng::Rng) {
        self.mode = match rng.below(6) {
            0 | 1 => CutoverMode::Manual,
            2 => CutoverMode::Rehearse,
            _ => CutoverMode::Automatic,
        };
        if self.mode == CutoverMode::Manual && rng.chance(800) {
            let at = rng.range(0, 8 * SECOND);
            self.faults.push((at, Fault::Ask(Some(ActionType::Proceed))));
            if rng.chance(300) {
                self.faults.push((at + rng.range(1, SECOND), Fault::Ask(None)));
            }
        }
        if rng.chance(100) {
            let action = [ActionType::Abort, ActionType::Rollback][rng.below(2)];
            self.faults
                .push((rng.range(0, 8 * SECOND), Fault::Ask(Some(action))));
        }
        if rng.chance(600) {
            self.rollback = Some(rng.range(0, 4 * SECOND));
            for _ in 0..rng.below(4) {
                self.crash_at.push(u64::try_from(rng.range(100, 400)).unwrap());
            }
        }
        self.readiness = match rng.below(10) {
            0 => Readiness::Never,
            1 => Readiness::Late,
            2 | 3 => Readiness::Ready,
            _ => Readiness::Unasked,
        };
    }
}

/// What a run came to.
pub struct Ended {
    pub operation: Operation,
    pub verdict: Verdict,
    pub trace: Vec<Event>,
    pub crash_points: u64,
}

impl Ended {
    pub fn at(&self, event: Event) -> Option<usize> {
        self.trace.iter().position(|there| *there == event)
    }
}

struct SimJournal {
    shared: Rc<Shared>,
    disk: Option<Vec<u8>>,
}

impl Journal for SimJournal {
    fn write(&mut self, operation: &Operation) -> Result<(), JournalError> {
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
        self.disk = Some(encode(operation).unwrap());
        if operation.transitions.iter().any(|t| t.phase == Phase::Confirmed) {
            self.shared.trace.borrow_mut().push(Event::ConfirmRecorded);
        }
        // Replaced by rename: a cut finds the old record (above) or the new one (here), never half of it.
        if self.shared.is_end() {
            self.shared.crash();
        }
        Ok(())
    }
}

struct Nobody;

impl Report for Nobody {
    fn progress(&mut self, operation: &Operation) {
        if std::env::var("UNDERSTUDY_SIM_SEED").is_ok() {
            let trouble = operation.trouble.as_ref().map(|trouble| &trouble.message);
            let undo = operation.undo.as_ref().map(|undo| &undo.message);
            println!("{} {:?} {trouble:?} {undo:?}", operation.phase(), operation.step);
        }
        let mut status = Default::default();
        super::super::status::update(&mut status, operation, 1, operation.created);
        assert_eq!(status.phase, Some(operation.phase()));
        assert!(status.reason.is_some_and(|reason| !reason.is_empty()));
    }

    fn journal_trouble(&mut self, _: &Operation, _: &str) {}
}

/// Runs a scenario; panics where something that must hold does not.
pub fn play(scenario: &Scenario) -> Ended {
    let mut world = World::new(scenario.seed);
    world.mutation = scenario.mutation;
    world.trouble = scenario.trouble;
    world.boot_fate = scenario.boot_fate;
    world.readiness = scenario.readiness;
    world.calm = scenario.trouble == 0 && scenario.crash_at.is_empty() && scenario.faults.is_empty();
    world.calm_from = world.now + 20 * SECOND;
    world.end = world.now + 2000 * SECOND;
    // Commands that arrive late may hold a guest that was released just before; their leases end, too.
    world.longest_hold = 2 * scenario.max_pause + 3 * SECOND;
    if scenario.trouble == 0 && scenario.crash_at.is_empty() {
        world.longest_hold = scenario.max_pause + 100 * MS;
    }
    let start = world.now;
    world.faults = scenario
        .faults
        .iter()
        .map(|(at, fault)| (start + at, *fault))
        .collect();
    *world.shared.crash_at.borrow_mut() = scenario.crash_at.clone();
    let mut journal = SimJournal {
        shared: Rc::clone(&world.shared),
        disk: None,
    };
    let mut operation = drive(&mut world, &mut journal, |now| new_operation(scenario, now));
    let way_back = scenario
        .rollback
        .filter(|_| operation.phase() == Phase::Succeeded && operation.rollback.is_none());
    if let Some(after) = way_back {
        world.advance(after);
        // Its end was told, and its record is gone.
        journal.disk = None;
        let succeeded = operation.clone();
        operation = drive(&mut world, &mut journal, |now| {
            rollback::begin(succeeded.clone(), moment(now))
        });
    }
    // From now on the guest manager looks after the guest.
    let owner_runs = match (&world.clone, world.guest.alive && !world.guest.dormant) {
        (_, true) => true,
        (Some(clone), false) => clone.active && !clone.dormant,
        (None, false) => false,
    };
    if !owner_runs {
        world.boot_guest();
    }
    world.faults.clear();
    world.advance(5 * SECOND);
    judge(scenario, &world, &operation);
    let shared = Rc::clone(&world.shared);
    Ended {
        verdict: operation.verdict.clone().unwrap(),
        operation,
        trace: shared.trace.borrow().clone(),
        crash_points: shared.crash_points.get(),
    }
}

/// Runs an operation to its end, agent after agent.
fn drive(world: &mut World, journal: &mut SimJournal, begin: impl Fn(i64) -> Operation) -> Operation {
    loop {
        let (operation, recovered) = match &journal.disk {
            Some(record) => (decode(record, Path::new("journal")).unwrap(), true),
            None => (begin(world.now), false),
        };
        let result = catch_unwind(AssertUnwindSafe(|| {
            run(operation, recovered, world, journal, &mut Nobody)
        }));
        match result {
            Ok(Run::Finished(operation)) => return operation,
            Ok(Run::Stopped(_)) => world.stop = false,
            Err(payload) if payload.is::<Crash>() => {}
            Err(payload) => resume_unwind(payload),
        }
        let pause = world.rng.range(MS, 700 * MS);
        world.advance(pause);
    }
}

pub fn new_operation(scenario: &Scenario, now: i64) -> Operation {
    let plan = Plan {
        reason: None,
        expect_kernel: scenario.expects.then(|| NEW_KERNEL.to_owned()),
        expect_booted_after: None,
        hold: vec!["cron.service".to_owned()],
        stop: Vec::new(),
        on_conflict: OnConflict::PreferGuest,
        max_pause: scenario.max_pause,
        pending: 5 * SECOND,
        cloning: 10 * SECOND,
        rebooting: 8 * SECOND,
        integrating: 30 * SECOND,
        retain_dormant: 60 * SECOND,
        mode: scenario.mode,
        window: None,
        readiness: match scenario.readiness {
            Readiness::Unasked => Vec::new(),
            _ => vec![probe("page"), probe(WAVERING)],
        },
        awaiting_cutover: 40 * SECOND,
    };
    Operation::new(
        "6f2c".to_owned(),
        "default/web-new-kernel".to_owned(),
        "default/web".to_owned(),
        plan,
        (GUEST_LAYER, CLONE_LAYER),
        moment(now),
    )
}

/// The probe that answers as the scenario says; the other one is ready.
pub const WAVERING: &str = "ledger";

fn probe(name: &str) -> Probe {
    Probe {
        name: name.to_owned(),
        http_get: None,
        tcp_socket: Some(TcpSocket { port: 80 }),
        exec: None,
        initial_delay_seconds: 0,
        period_seconds: 1,
        timeout_seconds: 1,
        success_threshold: 1,
        failure_threshold: 3,
    }
}

/// What must hold at the end.
fn judge(scenario: &Scenario, world: &World, operation: &Operation) {
    let verdict = operation.verdict.as_ref().expect("an end without a verdict");
    assert_eq!(operation.phase(), verdict.phase);
    for pair in operation.transitions.windows(2) {
        assert!(
            pair[0].phase.may_become(pair[1].phase),
            "{} → {}",
            pair[0].phase,
            pair[1].phase
        );
    }
    let trace = world.shared.trace.borrow();
    let first = |event| trace.iter().position(|there| *there == event);
    let committed = first(Event::Committed).is_some();
    let committed_back = first(Event::CommittedBack).is_some();
    let rehearsed = verdict.reason == reasons::REHEARSED;
    assert_eq!(
        world.owner.layer == Some(CLONE_LAYER),
        committed && !committed_back,
        "owner.json is not what the commits say"
    );
    assert_eq!(
        verdict.phase == Phase::Succeeded,
        committed && !committed_back || rehearsed,
        "{verdict:?}"
    );
    assert_eq!(verdict.phase == Phase::RolledBack, committed_back, "{verdict:?}");
    assert!(!(rehearsed && committed), "a rehearsal has moved the guest");
    if scenario.readiness == Readiness::Never {
        assert!(
            !rehearsed && !committed,
            "a clone that is not ready has taken over"
        );
    }
    if verdict.phase == Phase::RolledBack {
        let action = operation.action.as_ref().unwrap();
        assert_eq!((action.kind, &action.refused), (ActionType::Rollback, &None));
    }
    if committed && !committed_back {
        assert!(
            first(Event::Retired).is_some(),
            "nobody put the old incarnation to rest"
        );
        assert_eq!(verdict.reason, reasons::REBOOTED);
        if let Some(clone) = &world.clone {
            assert!(clone.active && clone.agent_active, "the clone was not activated");
            assert!(clone.serves(), "the clone does not serve");
        }
    } else {
        assert!(world.clone.is_none(), "a clone was left behind");
        let left = world.layers.contains_key(&CLONE_LAYER);
        assert!(!left || world.made_again, "a layer was left behind");
        assert!(world.guest.alive, "the guest does not run");
        assert!(world.guest.serves(), "the guest does not serve");
        assert!(
            world.guest.filesystems_frozen.is_none(),
            "its file systems are frozen"
        );
        assert!(world.guest.filter.is_none(), "its filter still captures");
    }
    // The patent's order, as far as the run came.
    let order = [
        Event::CaptureBegan,
        Event::ConfirmRecorded,
        Event::CloneStarted,
        Event::Split,
        Event::CloneBooted,
        Event::BootNotice,
        Event::Integrated,
        Event::Committed,
        Event::Retired,
    ];
    for (earlier, later) in order.iter().zip(&order[1..]) {
        if let Some(later_at) = first(*later) {
            let earlier_at = first(*earlier);
            assert!(
                earlier_at.is_some_and(|at| at < later_at),
                "{later:?} came before {earlier:?}"
            );
        }
    }
    let untouched = scenario.crash_at.is_empty() && scenario.faults.is_empty() && scenario.trouble == 0;
    if untouched && scenario.boot_fate == BootFate::Good && scenario.max_pause >= 300 * MS {
        let wanted = match (scenario.mode, scenario.rollback) {
            _ if scenario.readiness == Readiness::Never => Phase::Failed,
            (CutoverMode::Automatic, Some(_)) => Phase::RolledBack,
            (CutoverMode::Automatic | CutoverMode::Rehearse, _) => Phase::Succeeded,
            // Nobody approves it.
            (CutoverMode::Manual, _) => Phase::Failed,
        };
        assert_eq!(verdict.phase, wanted, "it ended without a reason: {verdict:?}");
    }
}
