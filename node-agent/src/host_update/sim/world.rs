//! What there is, and how time passes in it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use understudy_api::Phase;
use understudy_api::node_update::SessionState;
use understudy_vmm_control::session::{Refusal, SaveState};
use uuid::Uuid;

use super::super::hold::hold;
use super::super::quiesce::InFlight;
use super::super::record::{Step, Update};
use super::mutations::Mutation;
use super::operator::Operator;
use crate::handover::sim::rng::Rng;

pub const MS: i64 = 1000;
pub const SECOND: i64 = 1_000_000;

/// What happened, in order: the patent's steps among it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    NotificationRecorded,
    KeyRegistered,
    GuestPaused,
    Saved,
    AcknowledgementRecorded,
    Acknowledged,
    RebootAsked,
    HostWentDown,
    KeyObtained,
    PostRebootRecorded,
    Resumed,
    RanOn,
    ColdBoot,
    AgentCrashed,
}

/// What befalls the world at some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    VmmDies(usize),
    /// Power is lost: everything but what is durable is gone.
    PowerLost,
    Abort,
    JournalFull(bool),
    AgentStops,
    ProviderSilent(bool),
    /// Somebody types `reboot` on the host, which waits for so long.
    HostBegins {
        waits: i64,
    },
    /// And thinks better of it.
    HostCallsOff,
}

/// What becomes of a guest's save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveFate {
    Good,
    /// The disk is full.
    Fails,
    /// It takes longer than anybody waits.
    Never,
}

/// What becomes of a guest's resume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResumeFate {
    Good,
    Refused(Refusal),
    /// Its VMM ends after the checkpoint was consumed.
    Dies,
    /// The provider has no such key.
    NoKey,
    /// Its manifest was removed by hand.
    Removed,
}

/// What becomes of the reboot that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RebootFate {
    Comes,
    Never,
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandFate {
    Good,
    Fails,
    Hangs,
}

/// A save within a VMM.
#[derive(Clone, Debug)]
pub struct Save {
    pub checkpoint: Uuid,
    pub key: u64,
    pub state: SaveState,
    pub began: i64,
    /// When it is ready.
    pub ready_at: i64,
    /// How long its pause is.
    pub pause: i64,
    /// Whether it may pause its guest.
    pub may_pause: bool,
    /// When its pause is over.
    pub ends_at: i64,
    pub lease_us: i64,
    pub lease_until: i64,
}

/// A running VMM.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Which session it runs: a cold boot begins another one.
    pub life: u64,
    /// How far that is.
    pub progress: i64,
    /// The write session that its disk had when it began.
    pub write_session: u64,
    /// The checkpoint that it came from.
    pub from: Option<Uuid>,
    /// When its memory is all loaded.
    pub loaded_at: i64,
    pub save: Option<Save>,
}

impl Vm {
    pub fn is_paused(&self) -> bool {
        self.save
            .as_ref()
            .is_some_and(|save| matches!(save.state, SaveState::Pausing | SaveState::Saved))
    }
}

/// A checkpoint's directory. Durable.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    pub has_manifest: bool,
    pub is_consumed: bool,
    pub life: u64,
    pub progress: i64,
    pub write_session: u64,
    pub boot: u32,
    pub key: u64,
}

pub struct Guest {
    pub guest: String,
    pub uid: String,
    pub priority: i32,
    pub memory: u64,
    /// More than one would be a defect.
    pub vms: Vec<Vm>,
    pub checkpoints: BTreeMap<Uuid, Checkpoint>,
    /// Counts what ran on the disk; fsynced before a VMM's first write.
    pub write_session: u64,
    /// The last write: life and progress.
    pub written: (u64, i64),
    pub save_fate: SaveFate,
    pub resume_fate: ResumeFate,
    /// Whether its VMM died by a fault, in any boot.
    pub has_died: bool,
    /// In which boot that was last.
    pub died_in: u32,
    /// The session that a good checkpoint held when the host went down last.
    pub saved_at_death: Option<(u64, i64)>,
    /// Whether that was acknowledged, durably.
    pub promised: bool,
}

impl Guest {
    pub fn vm(&mut self) -> Option<&mut Vm> {
        self.vms.first_mut()
    }

    /// The checkpoint from which its session would go on, were the host to reboot now.
    pub fn good_checkpoint(&self) -> Option<(Uuid, &Checkpoint)> {
        self.checkpoints
            .iter()
            .find(|(_, there)| {
                there.has_manifest && !there.is_consumed && there.write_session == self.write_session
            })
            .map(|(id, there)| (*id, there))
    }
}

/// What the agent's sides have in common.
#[derive(Default)]
pub struct Shared {
    pub crash_points: Cell<u64>,
    /// Crash points at which the agent dies.
    pub crash_at: RefCell<Vec<u64>>,
    pub journal_full: Cell<bool>,
    /// The host went down: whatever the agent does next it does not.
    pub host_is_down: Cell<bool>,
    pub trace: RefCell<Vec<Event>>,
    /// The update as the agent's other parts see it.
    pub update: RefCell<Option<Update>>,
    /// The same as it is on disk.
    pub recorded: RefCell<Option<Update>>,
}

/// The host goes down, because of us or by itself.
#[derive(Clone, Copy, Debug)]
pub struct GoingDown {
    /// When it does; of a host that waits for us: at the latest.
    pub at: i64,
    /// Whether it was asked to by us.
    pub is_ours: bool,
    /// From when on it cannot be called off.
    pub is_final_from: i64,
}

pub struct World {
    pub shared: Rc<Shared>,
    pub rng: Rng,
    pub now: i64,
    pub mutation: Option<Mutation>,
    pub boot: u32,
    pub booted_at: i64,
    pub agent_started_at: i64,
    pub guests: Vec<Guest>,
    pub lives: u64,
    /// The provider's keys, durable: of a checkpoint, with the boot that registered it.
    pub provider: BTreeMap<Uuid, u64>,
    pub provider_silent: bool,
    pub provider_missing: bool,
    /// The operator, which is the provider in some worlds.
    pub operator: Operator,
    /// The key by which this boot asks it, in `/run`; and the agent that made it.
    pub request_key: Option<(u64, i64)>,
    /// Keys in `/run`.
    pub run: BTreeMap<Uuid, u64>,
    pub keys: u64,
    pub going_down: Option<GoingDown>,
    pub command: Option<i64>,
    pub command_fate: CommandFate,
    pub reboot_fate: RebootFate,
    /// Whether the host may take longer to go down than anybody waits.
    pub slow_reboots: bool,
    pub operations: Vec<(InFlight, i64)>,
    pub quiesced: bool,
    pub faults: Vec<(i64, Fault)>,
    pub abort: bool,
    pub stop: bool,
    /// Effects fail with this chance, in a thousand, until `calm_from`.
    pub trouble: u64,
    pub calm_from: i64,
    pub end: i64,
    /// Sessions whose guests may run although the host is asked to reboot: none, unless it insists.
    pub insists: bool,
}

impl World {
    pub fn new(seed: u64) -> World {
        let mut rng = Rng::new(seed);
        let count = 1 + rng.below(3);
        let mut world = World {
            shared: Rc::default(),
            now: 100 * SECOND,
            mutation: None,
            boot: 1,
            booted_at: 10 * SECOND,
            agent_started_at: 20 * SECOND,
            guests: Vec::new(),
            lives: 0,
            provider: BTreeMap::new(),
            provider_silent: false,
            provider_missing: false,
            operator: Operator::default(),
            request_key: None,
            run: BTreeMap::new(),
            keys: 0,
            going_down: None,
            command: None,
            command_fate: CommandFate::Good,
            reboot_fate: RebootFate::Comes,
            slow_reboots: false,
            operations: Vec::new(),
            quiesced: false,
            faults: Vec::new(),
            abort: false,
            stop: false,
            trouble: 0,
            calm_from: 0,
            end: i64::MAX,
            insists: false,
            rng,
        };
        for index in 0..count {
            let memory = u64::try_from(world.rng.range(10, 400)).unwrap() << 20;
            let priority = i32::try_from(world.rng.range(-1, 1)).unwrap();
            world.guests.push(Guest {
                guest: format!("default/guest-{index}"),
                uid: format!("uid-{index}"),
                priority,
                memory,
                vms: Vec::new(),
                checkpoints: BTreeMap::new(),
                write_session: 0,
                written: (0, 0),
                save_fate: SaveFate::Good,
                resume_fate: ResumeFate::Good,
                has_died: false,
                died_in: 0,
                saved_at_death: None,
                promised: false,
            });
            world.cold_boot(index);
        }
        world.shared.trace.borrow_mut().clear();
        world
    }

    pub fn boot_id(&self) -> String {
        format!("boot-{}", self.boot)
    }

    pub fn is(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    pub fn note(&self, event: Event) {
        self.shared.trace.borrow_mut().push(event);
    }

    /// A guest without a session begins a new life.
    pub fn cold_boot(&mut self, index: usize) {
        self.lives += 1;
        let life = self.lives;
        let guest = &mut self.guests[index];
        assert!(
            guest.good_checkpoint().is_none(),
            "guest {index} is booted cold although it has a checkpoint"
        );
        guest.write_session += 1;
        guest.vms.push(Vm {
            life,
            progress: 0,
            write_session: guest.write_session,
            from: None,
            loaded_at: 0,
            save: None,
        });
        self.note(Event::ColdBoot);
    }

    pub fn advance(&mut self, micros: i64) {
        self.advance_to(self.now + micros);
    }

    /// Lets time pass, event by event.
    pub fn advance_to(&mut self, until: i64) {
        assert!(self.now < self.end, "the run does not end");
        while self.now < until {
            let next = self.next_event().clamp(self.now + 1, until);
            let passed = next - self.now;
            self.now = next;
            for guest in &mut self.guests {
                for vm in guest.vms.iter_mut().filter(|vm| !vm.is_paused()) {
                    vm.progress += passed;
                    assert_eq!(
                        vm.write_session, guest.write_session,
                        "an older session writes to a newer disk"
                    );
                    guest.written = (vm.life, vm.progress);
                }
            }
            self.happen();
            self.check();
            self.let_operator_look();
        }
    }

    fn next_event(&self) -> i64 {
        let saves = self
            .guests
            .iter()
            .flat_map(|guest| &guest.vms)
            .filter_map(|vm| vm.save.as_ref())
            .map(|save| match save.state {
                SaveState::PreCopying => save.ready_at,
                SaveState::Pausing => save.ends_at,
                SaveState::Saved => save.lease_until,
                SaveState::Ready | SaveState::Failed | SaveState::Cancelled => i64::MAX,
            });
        let faults = self.faults.iter().map(|(at, _)| *at);
        let operations = self.operations.iter().map(|(_, at)| *at);
        let down = self.going_down.map(|going| going.at);
        saves
            .chain(faults)
            .chain(operations)
            .chain(down)
            .min()
            .unwrap_or(i64::MAX)
    }

    fn happen(&mut self) {
        let now = self.now;
        self.operations.retain(|(_, ends)| *ends > now);
        for index in 0..self.guests.len() {
            self.let_save_proceed(index);
        }
        while let Some(at) = self.faults.iter().position(|(at, _)| *at <= now) {
            let (_, fault) = self.faults.remove(at);
            self.befall(fault);
        }
        if let Some(going) = self.going_down.filter(|going| going.at <= now) {
            let update = self.shared.update.borrow();
            let called_off = update
                .as_ref()
                .is_some_and(|update| update.undo.is_some() && update.step > Step::CallOff);
            assert!(
                !(going.is_ours && called_off),
                "the host is rebooted although that was called off"
            );
            drop(update);
            self.host_reboots();
        }
    }

    pub fn let_save_proceed(&mut self, index: usize) {
        let (now, boot) = (self.now, self.boot);
        let void_is_left = self.is(Mutation::LeaseLeavesCheckpoint);
        let guest = &mut self.guests[index];
        let mut write_session = guest.write_session;
        let mut events = Vec::new();
        let fails = guest.save_fate == SaveFate::Fails;
        for vm in &mut guest.vms {
            let (life, progress) = (vm.life, vm.progress);
            let Some(save) = &mut vm.save else { continue };
            if save.state == SaveState::PreCopying && save.ready_at <= now {
                save.state = if fails {
                    SaveState::Failed
                } else {
                    SaveState::Ready
                };
            }
            if save.state == SaveState::Ready && save.may_pause {
                save.state = SaveState::Pausing;
                save.ends_at = now + save.pause;
                events.push(Event::GuestPaused);
            }
            if save.state == SaveState::Pausing && save.ends_at <= now {
                save.state = SaveState::Saved;
                save.lease_until = now + save.lease_us;
                let checkpoint = Checkpoint {
                    has_manifest: true,
                    is_consumed: false,
                    life,
                    progress,
                    write_session,
                    boot,
                    key: save.key,
                };
                guest.checkpoints.insert(save.checkpoint, checkpoint);
                events.push(Event::Saved);
            }
            if save.state == SaveState::Saved && save.lease_until <= now {
                save.state = SaveState::Cancelled;
                if !void_is_left {
                    if let Some(there) = guest.checkpoints.get_mut(&save.checkpoint) {
                        there.has_manifest = false;
                    }
                    write_session += 1;
                    vm.write_session = write_session;
                }
                events.push(Event::RanOn);
            }
        }
        guest.write_session = write_session;
        for event in events {
            self.note(event);
        }
    }

    fn befall(&mut self, fault: Fault) {
        match fault {
            Fault::VmmDies(index) => {
                let (count, boot) = (self.guests.len(), self.boot);
                let guest = &mut self.guests[index % count];
                guest.vms.clear();
                guest.has_died = true;
                guest.died_in = boot;
            }
            Fault::PowerLost => self.host_reboots(),
            Fault::Abort => self.abort = true,
            Fault::JournalFull(full) => self.shared.journal_full.set(full),
            Fault::AgentStops => self.stop = true,
            Fault::ProviderSilent(silent) => self.provider_silent = silent,
            Fault::HostBegins { waits } => {
                if self.going_down.is_none() {
                    self.insists = true;
                    self.going_down = Some(GoingDown {
                        at: self.now + waits,
                        is_ours: false,
                        is_final_from: self.now + waits,
                    });
                }
            }
            Fault::HostCallsOff => {
                if self.going_down.is_some_and(|going| !going.is_ours) {
                    self.going_down = None;
                }
            }
        }
    }

    /// The host is down and up again; whatever is not durable is gone.
    pub fn host_reboots(&mut self) {
        self.note(Event::HostWentDown);
        let recorded = self.shared.recorded.borrow().clone();
        for guest in &mut self.guests {
            let session = recorded
                .as_ref()
                .and_then(|update| update.sessions.iter().find(|there| there.uid == guest.uid));
            let good = guest
                .good_checkpoint()
                .map(|(id, there)| (id, there.life, there.progress));
            // One that no record names is nobody's.
            let named = good.filter(|(id, _, _)| session.is_some_and(|session| session.checkpoint == *id));
            guest.saved_at_death = named.map(|(_, life, progress)| (life, progress));
            guest.promised = named.is_some()
                && recorded.as_ref().is_some_and(|update| update.acknowledged)
                && session.is_some_and(|session| session.state == SessionState::Saved);
            guest.vms.clear();
            if guest.resume_fate == ResumeFate::Removed {
                for checkpoint in guest.checkpoints.values_mut() {
                    checkpoint.has_manifest = false;
                }
            }
        }
        self.run.clear();
        self.request_key = None;
        self.going_down = None;
        self.quiesced = false;
        self.operations.clear();
        self.command = None;
        self.boot += 1;
        self.now += self.rng.range(2 * SECOND, 40 * SECOND);
        self.booted_at = self.now;
        self.shared.host_is_down.set(true);
        // Meanwhile nothing befalls a host that is down, but what ends by itself has ended.
        let now = self.now;
        let (missed, to_come) = self.faults.iter().partition(|(at, _)| *at <= now);
        self.faults = to_come;
        let missed: Vec<(i64, Fault)> = missed;
        for (_, fault) in missed {
            if matches!(fault, Fault::JournalFull(false) | Fault::ProviderSilent(false)) {
                self.befall(fault);
            }
        }
    }

    /// The guest manager: boots what does not run and may.
    pub fn manage(&mut self) {
        let update = self.shared.update.borrow().clone();
        let ignores = self.is(Mutation::ManagerIgnoresHolds);
        let holds = |uid: &str| {
            if ignores {
                return false;
            }
            update
                .as_ref()
                .is_some_and(|update| update.holds_all_guests() || hold(update, uid).is_some())
        };
        let idle: Vec<usize> = (0..self.guests.len())
            .filter(|index| self.guests[*index].vms.is_empty() && !holds(&self.guests[*index].uid))
            .collect();
        for index in idle {
            self.cold_boot(index);
        }
    }

    /// What must hold at any time.
    pub fn check(&self) {
        for (index, guest) in self.guests.iter().enumerate() {
            assert!(guest.vms.len() <= 1, "guest {index} runs twice");
            // Whoever is paused for a save has a key that survives.
            for save in guest.vms.iter().filter_map(|vm| vm.save.as_ref()) {
                if save.state == SaveState::Pausing {
                    assert!(
                        self.provider.get(&save.checkpoint) == Some(&save.key),
                        "guest {index} is paused, and its key is not registered"
                    );
                }
            }
        }
    }

    /// Operations that a run may begin with.
    pub fn fly(&mut self, phases: &[(Phase, i64)]) {
        let mut seen = BTreeSet::new();
        for (index, (phase, lasts)) in phases.iter().enumerate() {
            if seen.insert(index % self.guests.len()) {
                let guest = self.guests[index % self.guests.len()].guest.clone();
                let flying = InFlight {
                    name: format!("default/reboot-{index}"),
                    guest,
                    phase: *phase,
                };
                self.operations.push((flying, self.now + lasts));
            }
        }
    }
}
