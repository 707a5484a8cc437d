//! What there is, and how time passes in it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use understudy_api::reboot::ActionType;
use understudy_vmm_control::owner::{OWNER_VERSION, Owner};
use uuid::Uuid;

use super::machines::Command;
use super::mutations::Mutation;
use super::rng::Rng;

/// Files of the guest. The first is written through a shared mapping: nobody hears of its changes.
pub const FILES: usize = 6;
pub const MAPPED: usize = 0;
pub type Content = [u64; FILES];

pub const MS: i64 = 1000;
pub const SECOND: i64 = 1_000_000;

/// The file that the user named.
pub const SOURCE: Uuid = Uuid::nil();
pub const GUEST_LAYER: Uuid = Uuid::from_u128(0xa);
pub const CLONE_LAYER: Uuid = Uuid::from_u128(0xb);

/// What happened, in order: the patent's steps among it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    CaptureBegan,
    ConfirmRecorded,
    CloneStarted,
    Split,
    CloneBooted,
    BootNotice,
    Integrated,
    Committed,
    CloneActivated,
    Retired,
    CommittedBack,
    GuestActivated,
    Reinstated,
    Released,
    AgentCrashed,
}

/// What befalls the world at some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    GuestDies,
    CloneDies,
    /// The guest reboots by itself: its filter forgets.
    GuestResets,
    /// Power is lost: everything but what is durable is gone.
    HostDies,
    Abort,
    /// The user changes `spec.action`.
    Ask(Option<ActionType>),
    JournalFull(bool),
    AgentStops,
}

pub struct Layer {
    pub parent: Option<Uuid>,
    pub blocks: [Option<u64>; FILES],
}

#[derive(Clone, Copy, Default)]
pub struct Gates {
    pub receive: bool,
    pub transmit: bool,
    pub write: bool,
    pub vcpus: bool,
}

/// The filter: what is dirty, and what was sent but not confirmed as applied.
#[derive(Default)]
pub struct Filter {
    pub pending: BTreeSet<usize>,
    pub sent: BTreeMap<u64, BTreeSet<usize>>,
    pub round: u64,
    /// Content of the mapped file as it was sent last.
    pub mapped: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Idle { until: i64 },
    Syncing { file: usize, value: u64 },
    Answering { file: usize, value: u64 },
}

pub struct Guest {
    pub alive: bool,
    pub dormant: bool,
    pub incarnation: u64,
    pub gates: Gates,
    pub lease: Option<i64>,
    pub top: Uuid,
    pub prepared: Option<Uuid>,
    pub block_writes: u64,
    pub cache: Content,
    pub filesystems_frozen: Option<i64>,
    pub filesystems_thawed_by_watchdog: bool,
    pub userland_frozen: Option<i64>,
    pub filter: Option<Filter>,
    pub programs: [Program; 2],
    /// When something that no freezer reaches writes next.
    pub straggler: i64,
}

impl Guest {
    pub fn boot(incarnation: u64, top: Uuid, cache: Content, now: i64) -> Guest {
        Guest {
            alive: true,
            dormant: false,
            incarnation,
            gates: Gates::default(),
            lease: None,
            top,
            prepared: None,
            block_writes: 0,
            cache,
            filesystems_frozen: None,
            filesystems_thawed_by_watchdog: false,
            userland_frozen: None,
            filter: None,
            programs: [Program::Idle { until: now + 3 * MS }; 2],
            straggler: now + 100 * MS,
        }
    }

    pub fn runs(&self) -> bool {
        self.alive && !self.dormant && !self.gates.vcpus
    }

    /// Whether a client gets answers.
    pub fn serves(&self) -> bool {
        self.runs() && !self.gates.receive && !self.gates.transmit && self.userland_frozen.is_none()
    }
}

/// Whether the clone answers its probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// It is not asked.
    Unasked,
    Ready,
    /// After two tries that fail.
    Late,
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootFate {
    Good,
    Hangs,
    Panics,
    FailsAUnit,
    EmergencyShell,
    OldKernel,
}

pub struct Clone {
    pub incarnation: u64,
    pub booted: Option<i64>,
    pub ready_at: i64,
    pub cache: Content,
    pub active: bool,
    pub agent_active: bool,
    pub has_tap: bool,
    /// All its gates are closed, until its lease ends.
    pub held: Option<i64>,
    pub dormant: bool,
}

impl Clone {
    /// Whether a client gets answers.
    pub fn serves(&self) -> bool {
        self.active && self.held.is_none() && !self.dormant
    }
}

/// What the agent's two sides, effects and journal, have in common.
#[derive(Default)]
pub struct Shared {
    pub crash_points: Cell<u64>,
    /// Crash points at which the agent dies.
    pub crash_at: RefCell<Vec<u64>>,
    pub journal_full: Cell<bool>,
    pub power_lost: Cell<bool>,
    pub trace: RefCell<Vec<Event>>,
}

pub struct World {
    pub shared: Rc<Shared>,
    pub rng: Rng,
    pub now: i64,
    pub mutation: Option<Mutation>,
    pub layers: BTreeMap<Uuid, Layer>,
    pub owner: Owner,
    pub guest: Guest,
    pub clone: Option<Clone>,
    pub boot_fate: BootFate,
    pub readiness: Readiness,
    /// How often the probe that may fail was asked.
    pub probed: u32,
    pub boot_time: i64,
    pub acknowledged: Content,
    pub serial: u64,
    /// The guest's files when verification found nothing dirty.
    pub verified: Option<Content>,
    pub late: Vec<(i64, Command)>,
    pub faults: Vec<(i64, Fault)>,
    pub abort: bool,
    pub action: Option<ActionType>,
    pub stop: bool,
    /// Effects fail with this chance, in a thousand, until `calm_from`.
    pub trouble: u64,
    pub calm_from: i64,
    /// The longest that the guest may stop serving, and since when it does not.
    pub longest_hold: i64,
    pub unserved_since: Option<i64>,
    pub retired: Option<i64>,
    /// The clone's layer was removed; and made again by a command that came late, which leaves it to the
    /// guest manager: it removes layers that no chain names.
    pub discarded: bool,
    pub made_again: bool,
    /// Nothing goes wrong in this run, so that every step finds what the one before it made.
    pub calm: bool,
    /// Whether file systems were frozen when the disk was split.
    pub split_while_frozen: bool,
    /// A run that is not over by then never ends.
    pub end: i64,
}

impl World {
    pub fn new(seed: u64) -> World {
        let mut rng = Rng::new(seed);
        let boot_time = rng.range(300 * MS, 3 * SECOND);
        let source = Layer {
            parent: None,
            blocks: [Some(0); FILES],
        };
        World {
            now: 1_000 * SECOND,
            mutation: None,
            layers: BTreeMap::from([(SOURCE, source)]),
            owner: Owner {
                version: OWNER_VERSION,
                epoch: 7,
                incarnation: 3,
                layer: Some(SOURCE),
            },
            guest: Guest::boot(3, SOURCE, [0; FILES], 1_000 * SECOND),
            clone: None,
            boot_fate: BootFate::Good,
            readiness: Readiness::Unasked,
            probed: 0,
            boot_time,
            acknowledged: [0; FILES],
            serial: 0,
            verified: None,
            late: Vec::new(),
            faults: Vec::new(),
            abort: false,
            action: None,
            stop: false,
            trouble: 0,
            calm_from: i64::MAX,
            longest_hold: i64::MAX,
            unserved_since: None,
            retired: None,
            calm: false,
            discarded: false,
            made_again: false,
            split_while_frozen: false,
            end: i64::MAX,
            shared: Rc::default(),
            rng,
        }
    }

    pub fn note(&self, event: Event) {
        self.shared.trace.borrow_mut().push(event);
    }

    pub fn is(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    pub fn read(&self, top: Uuid) -> Content {
        let mut content = [0; FILES];
        for (file, value) in content.iter_mut().enumerate() {
            let mut layer = Some(top);
            while let Some(id) = layer {
                let there = self
                    .layers
                    .get(&id)
                    .unwrap_or_else(|| panic!("layer {id} is gone"));
                if let Some(found) = there.blocks[file] {
                    *value = found;
                    break;
                }
                layer = there.parent;
            }
        }
        content
    }

    pub fn is_beneath(&self, layer: Uuid, top: Uuid) -> bool {
        let mut at = Some(top);
        while let Some(id) = at {
            if id == layer {
                return true;
            }
            at = self.layers.get(&id).and_then(|layer| layer.parent);
        }
        false
    }

    /// Lets time pass up to `until`, event by event.
    pub fn advance_to(&mut self, until: i64) {
        assert!(self.now < self.end, "the operation does not end");
        loop {
            let next = self.next_event();
            if next > until {
                break;
            }
            self.now = self.now.max(next);
            self.fire();
            self.settle();
        }
        self.now = self.now.max(until);
        self.settle();
    }

    pub fn advance(&mut self, micros: i64) {
        self.advance_to(self.now + micros);
    }

    fn next_event(&self) -> i64 {
        let guest = &self.guest;
        let mut next = i64::MAX;
        let mut at = |time: i64| next = next.min(time);
        if guest.alive {
            guest.lease.into_iter().for_each(&mut at);
        }
        if let Some(clone) = &self.clone {
            clone.held.into_iter().for_each(&mut at);
        }
        if guest.runs() {
            guest.filesystems_frozen.into_iter().for_each(&mut at);
            guest.userland_frozen.into_iter().for_each(&mut at);
            at(guest.straggler);
            if guest.userland_frozen.is_none() {
                for program in guest.programs {
                    if let Program::Idle { until } = program {
                        at(until);
                    }
                }
            }
        }
        self.late.iter().for_each(|(time, _)| at(*time));
        self.faults.iter().for_each(|(time, _)| at(*time));
        next
    }

    fn fire(&mut self) {
        let now = self.now;
        if let Some(index) = self.faults.iter().position(|(time, _)| *time <= now) {
            let (_, fault) = self.faults.remove(index);
            self.befall(fault);
            return;
        }
        if let Some(index) = self.late.iter().position(|(time, _)| *time <= now) {
            let (_, command) = self.late.remove(index);
            // Nobody waits for its answer any more.
            let _ = self.execute(&command);
            return;
        }
        if self.guest.alive && self.guest.lease.is_some_and(|lease| lease <= now) {
            self.guest.lease = None;
            if !self.guest.dormant {
                self.guest.gates = Gates::default();
            }
            return;
        }
        if let Some(clone) = &mut self.clone
            && clone.held.is_some_and(|lease| lease <= now)
        {
            // The lease of a dormant one is over, and its gates stay closed.
            clone.held = None;
            return;
        }
        if !self.guest.runs() {
            return;
        }
        if self
            .guest
            .filesystems_frozen
            .is_some_and(|watchdog| watchdog <= now)
        {
            self.guest.filesystems_frozen = None;
            self.guest.filesystems_thawed_by_watchdog = true;
        }
        if self.guest.userland_frozen.is_some_and(|watchdog| watchdog <= now) {
            self.guest.userland_frozen = None;
        }
        if self.guest.straggler <= now {
            self.guest.straggler = now + self.rng.range(20 * MS, 400 * MS);
            let file = 1 + self.rng.below(FILES - 1);
            self.write(file);
        }
        for index in 0..self.guest.programs.len() {
            if let Program::Idle { until } = self.guest.programs[index]
                && until <= now
                && self.guest.userland_frozen.is_none()
            {
                self.guest.programs[index] = self.act();
            }
        }
    }

    /// A program writes, and usually wants it durable.
    fn act(&mut self) -> Program {
        let file = self.rng.below(FILES);
        match self.write(file) {
            Some(value) if self.rng.chance(700) => Program::Syncing { file, value },
            _ => self.idle(),
        }
    }

    fn idle(&mut self) -> Program {
        Program::Idle {
            until: self.now + self.rng.range(MS / 2, 40 * MS),
        }
    }

    /// Changes a file in the guest's memory; frozen file systems let nobody.
    fn write(&mut self, file: usize) -> Option<u64> {
        if self.guest.filesystems_frozen.is_some() {
            return None;
        }
        self.serial += 1;
        self.guest.cache[file] = self.serial;
        if file != MAPPED
            && let Some(filter) = &mut self.guest.filter
        {
            filter.pending.insert(file);
        }
        Some(self.serial)
    }

    /// Writes a file of the guest to its disk, durably.
    pub fn flush(&mut self, file: usize, value: u64) {
        let top = self.guest.top;
        if let Some(clone) = &self.clone {
            assert!(
                clone.booted.is_none() || !self.is_beneath(top, CLONE_LAYER),
                "the guest writes to a layer that the clone reads"
            );
        }
        assert!(!self.guest.dormant, "a dormant guest writes");
        let layer = self.layers.get_mut(&top).unwrap();
        layer.blocks[file] = Some(value.max(layer.blocks[file].unwrap_or(0)));
        self.guest.block_writes += 1;
    }

    /// Lets everything happen that was only waiting for a gate or a thaw, then looks at what must hold.
    pub fn settle(&mut self) {
        for index in 0..self.guest.programs.len() {
            if !self.guest.runs() {
                break;
            }
            if let Program::Syncing { file, value } = self.guest.programs[index]
                && !self.guest.gates.write
                && self.guest.filesystems_frozen.is_none()
            {
                self.flush(file, value);
                self.guest.programs[index] = Program::Answering { file, value };
            }
            if let Program::Answering { file, value } = self.guest.programs[index]
                && self.guest.serves()
            {
                self.acknowledged[file] = self.acknowledged[file].max(value);
                self.guest.programs[index] = self.idle();
            }
        }
        self.check();
    }

    fn befall(&mut self, fault: Fault) {
        match fault {
            Fault::GuestDies => self.guest.alive = false,
            Fault::CloneDies => self.clone = None,
            Fault::GuestResets if self.guest.runs() => {
                let (incarnation, top, writes) =
                    (self.guest.incarnation, self.guest.top, self.guest.block_writes);
                let (gates, lease, prepared) = (self.guest.gates, self.guest.lease, self.guest.prepared);
                self.guest = Guest::boot(incarnation, top, self.read(top), self.now);
                (self.guest.gates, self.guest.lease) = (gates, lease);
                (self.guest.prepared, self.guest.block_writes) = (prepared, writes);
            }
            Fault::GuestResets => {}
            Fault::HostDies => {
                self.guest.alive = false;
                self.clone = None;
                self.late.clear();
                self.shared.power_lost.set(true);
            }
            Fault::Abort => self.abort = true,
            Fault::Ask(action) => self.action = action,
            Fault::JournalFull(full) => self.shared.journal_full.set(full),
            Fault::AgentStops => self.stop = true,
        }
    }

    /// The invariants of every instant.
    fn check(&mut self) {
        let guest = &self.guest;
        let owns = self.owner.layer == Some(CLONE_LAYER);
        let guest_answers = guest.runs() && !guest.gates.transmit;
        let clone_answers = self.clone.as_ref().is_some_and(Clone::serves);
        assert!(!(guest_answers && clone_answers), "two incarnations answer");
        if guest_answers {
            assert_eq!(
                self.owner.incarnation, guest.incarnation,
                "the guest answers and does not own itself"
            );
        }
        if clone_answers {
            assert!(owns, "the clone answers and does not own the guest");
        }
        let durable = self.read(self.owner.layer.unwrap());
        for (file, acknowledged) in self.acknowledged.iter().enumerate() {
            assert!(
                durable[file] >= *acknowledged,
                "file {file}: {acknowledged} was acknowledged, the owner has {}",
                durable[file]
            );
        }
        let clone_waits = self
            .clone
            .as_ref()
            .is_some_and(|clone| clone.held.is_some() && !clone.dormant);
        let waits = guest.alive && !guest.dormant && !guest.serves() && !owns || clone_waits && owns;
        if !waits {
            self.unserved_since = None;
        } else if let Some(since) = self.unserved_since {
            assert!(
                self.now - since <= self.longest_hold,
                "the guest has been held for {} ms",
                (self.now - since) / MS
            );
        } else {
            self.unserved_since = Some(self.now);
        }
    }
}
