//! What VMMs and guest agents do when they are told. All of it is idempotent, as their contracts say.

use super::mutations::Mutation;
use super::world::*;
use understudy_vmm_control::owner::OWNER_VERSION;

/// A command on its way to a VMM or a guest agent. It may arrive late, or after its sender has died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    // Guest agent of the guest.
    Confirm,
    EndCapture,
    Sync,
    FreezeFilesystems {
        watchdog: i64,
    },
    ThawFilesystems,
    FreezeUserland {
        watchdog: i64,
    },
    ThawUserland,
    // VMM of the guest.
    PrepareSplit,
    Split,
    Hold {
        gates: GateSet,
        lease: i64,
    },
    Release,
    Commit {
        block_writes: u64,
    },
    GiveNetwork,
    /// The way back: the dormant goes on.
    ActivateGuest {
        epoch: u64,
    },
    // The clone.
    BootClone,
    ActivateClone {
        open_taps: bool,
    },
    ActivateAgent,
    HoldClone {
        lease: i64,
    },
    ReleaseClone,
    CommitBack {
        epoch: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateSet {
    Receive,
    TransmitAndWrite,
    Vcpus,
}

/// Why a command was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum No {
    /// Nobody is there.
    Gone,
    /// Nobody answers now.
    Silent,
    /// Refused.
    Conflict,
}

/// What a command answers, where it says more than that it was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    pub by_watchdog: bool,
    pub block_writes: u64,
}

impl World {
    pub fn execute(&mut self, command: &Command) -> Result<Answer, No> {
        let answer = self.carry_out(command);
        self.settle();
        answer
    }

    fn carry_out(&mut self, command: &Command) -> Result<Answer, No> {
        match *command {
            Command::Confirm
            | Command::EndCapture
            | Command::Sync
            | Command::FreezeFilesystems { .. }
            | Command::ThawFilesystems
            | Command::FreezeUserland { .. }
            | Command::ThawUserland => self.guest_agent(command),
            Command::HoldClone { .. } | Command::ReleaseClone | Command::CommitBack { .. } => {
                self.active_clone(command)
            }
            Command::BootClone | Command::ActivateClone { .. } | Command::ActivateAgent => {
                self.clone_machine(command)
            }
            _ => self.guest_vmm(command),
        }
    }

    fn guest_agent(&mut self, command: &Command) -> Result<Answer, No> {
        if !self.guest.alive || self.guest.dormant {
            return Err(No::Gone);
        }
        if !self.guest.runs() {
            return Err(No::Silent);
        }
        let mut answer = Answer::default();
        match *command {
            Command::Confirm => {
                if self.guest.filter.is_none() && !self.is(Mutation::ConfirmWithoutCapture) {
                    self.guest.filter = Some(Filter::default());
                    self.note(Event::CaptureBegan);
                }
            }
            Command::EndCapture => self.guest.filter = None,
            Command::Sync => {
                for file in 0..FILES {
                    if !self.guest.gates.write && self.guest.filesystems_frozen.is_none() {
                        self.flush(file, self.guest.cache[file]);
                    }
                }
            }
            Command::FreezeFilesystems { watchdog } => {
                if self.guest.gates.write {
                    return Err(No::Silent);
                }
                for file in 0..FILES {
                    self.flush(file, self.guest.cache[file]);
                }
                self.guest.filesystems_frozen = Some(self.now + watchdog);
                self.guest.filesystems_thawed_by_watchdog = false;
            }
            Command::ThawFilesystems => {
                answer.by_watchdog = self.guest.filesystems_thawed_by_watchdog;
                self.guest.filesystems_frozen = None;
                self.guest.filesystems_thawed_by_watchdog = false;
            }
            Command::FreezeUserland { watchdog } => {
                self.guest.userland_frozen = Some(self.now + watchdog);
            }
            _ => self.guest.userland_frozen = None,
        }
        Ok(answer)
    }

    fn guest_vmm(&mut self, command: &Command) -> Result<Answer, No> {
        if !self.guest.alive {
            return Err(No::Gone);
        }
        if let Command::ActivateGuest { epoch } = *command {
            return self.activate_guest(epoch);
        }
        if self.guest.dormant {
            return match command {
                Command::GiveNetwork => {
                    let clone = self.clone.as_mut().ok_or(No::Conflict)?;
                    clone.has_tap = true;
                    Ok(Answer::default())
                }
                // Asked again after it was done.
                Command::Commit { .. } | Command::Release => Ok(Answer::default()),
                _ => Err(No::Conflict),
            };
        }
        match *command {
            Command::PrepareSplit => {
                if self.guest.top != GUEST_LAYER {
                    self.made_again = self.discarded;
                    for id in [GUEST_LAYER, CLONE_LAYER] {
                        let parent = Some(self.guest.top);
                        self.layers.entry(id).or_insert(Layer {
                            parent,
                            blocks: [None; FILES],
                        });
                    }
                    self.guest.prepared = Some(GUEST_LAYER);
                    self.owner.layer = Some(GUEST_LAYER);
                }
            }
            Command::Split => {
                if self.guest.top != GUEST_LAYER {
                    if self.guest.prepared != Some(GUEST_LAYER) {
                        return Err(No::Conflict);
                    }
                    self.guest.top = GUEST_LAYER;
                    self.split_while_frozen = self.guest.filesystems_frozen.is_some();
                    self.note(Event::Split);
                }
            }
            Command::Hold { gates, lease } => {
                match gates {
                    GateSet::Receive => self.guest.gates.receive = true,
                    GateSet::TransmitAndWrite => {
                        self.guest.gates.transmit = true;
                        self.guest.gates.write = true;
                    }
                    GateSet::Vcpus => self.guest.gates.vcpus = true,
                }
                self.guest.lease = Some(self.now + lease);
            }
            Command::Release => {
                self.guest.gates = Gates::default();
                self.guest.lease = None;
                self.note(Event::Released);
            }
            Command::Commit { block_writes } => return self.commit(block_writes),
            _ => return Err(No::Conflict),
        }
        Ok(Answer {
            block_writes: self.guest.block_writes,
            ..Answer::default()
        })
    }

    /// The commit point, as the guest's own VMM sees it.
    fn commit(&mut self, block_writes: u64) -> Result<Answer, No> {
        let gates = self.guest.gates;
        let sealed = gates.receive && gates.transmit && gates.write && gates.vcpus;
        let unchanged = self.guest.block_writes == block_writes;
        let careless = self.is(Mutation::CommitIgnoresLease);
        if !careless && (!sealed || !unchanged || self.guest.lease.is_none()) {
            return Err(No::Conflict);
        }
        assert!(
            self.split_while_frozen,
            "the clone began on file systems that were not frozen"
        );
        // Promise 4: what was verified is what the clone has, durably.
        let verified = self.verified.expect("a commit without verification");
        assert_eq!(
            self.read(CLONE_LAYER),
            verified,
            "the clone differs from the guest"
        );
        self.owner.epoch += 1;
        self.owner.incarnation = self.guest.incarnation + 1;
        self.owner.layer = Some(CLONE_LAYER);
        self.owner.version = OWNER_VERSION;
        self.guest.dormant = true;
        self.guest.lease = None;
        self.note(Event::Committed);
        Ok(Answer::default())
    }

    /// The dormant incarnation, to which the clone has committed.
    fn activate_guest(&mut self, epoch: u64) -> Result<Answer, No> {
        if !self.guest.dormant {
            return Ok(Answer::default());
        }
        let named = self.owner.incarnation == self.guest.incarnation && self.owner.epoch == epoch;
        let lock_is_free = self.clone.as_ref().is_none_or(|clone| clone.dormant);
        if !named || !lock_is_free {
            return Err(No::Conflict);
        }
        self.guest.dormant = false;
        self.guest.gates = Gates::default();
        self.note(Event::GuestActivated);
        Ok(Answer::default())
    }

    /// The clone's VMM, once the clone owns the guest.
    fn active_clone(&mut self, command: &Command) -> Result<Answer, No> {
        let now = self.now;
        let careless = self.is(Mutation::CommitIgnoresLease);
        let guest = self.guest.incarnation;
        let clone = self.clone.as_mut().ok_or(No::Gone)?;
        if clone.dormant {
            return match command {
                Command::HoldClone { .. } => Err(No::Conflict),
                // Asked again after it was done; nothing is held.
                _ => Ok(Answer::default()),
            };
        }
        if !clone.active {
            return Err(No::Conflict);
        }
        match *command {
            Command::HoldClone { lease } => clone.held = Some(now + lease),
            Command::ReleaseClone => clone.held = None,
            Command::CommitBack { epoch } => {
                if clone.held.is_none() && !careless || self.owner.epoch + 1 != epoch {
                    return Err(No::Conflict);
                }
                clone.dormant = true;
                clone.held = None;
                self.owner.epoch = epoch;
                self.owner.incarnation = guest;
                self.owner.layer = Some(GUEST_LAYER);
                self.note(Event::CommittedBack);
            }
            _ => return Err(No::Conflict),
        }
        Ok(Answer::default())
    }

    fn clone_machine(&mut self, command: &Command) -> Result<Answer, No> {
        let content = self
            .clone
            .is_some()
            .then(|| self.layers.contains_key(&CLONE_LAYER));
        if content != Some(true) {
            return Err(No::Gone);
        }
        let content = self.read(CLONE_LAYER);
        let shared = self.guest.alive && self.is_beneath(self.guest.top, CLONE_LAYER);
        let (now, boot_time) = (self.now, self.boot_time);
        let owner = self.owner.clone();
        let guest_holds_tap = self.guest.alive;
        let clone = self.clone.as_mut().ok_or(No::Gone)?;
        match *command {
            Command::BootClone => {
                if clone.booted.is_none() {
                    assert!(!shared, "the clone boots on a disk that the guest still writes");
                    clone.booted = Some(now);
                    clone.ready_at = now + boot_time;
                    clone.cache = content;
                    self.note(Event::CloneBooted);
                }
            }
            Command::ActivateClone { open_taps } => {
                if owner.layer != Some(CLONE_LAYER) || owner.incarnation != clone.incarnation {
                    return Err(No::Conflict);
                }
                if clone.dormant {
                    return Err(No::Conflict);
                }
                if !clone.has_tap && (!open_taps || guest_holds_tap) {
                    return Err(No::Conflict);
                }
                clone.has_tap = true;
                if !clone.active {
                    clone.active = true;
                    self.note(Event::CloneActivated);
                }
            }
            _ => {
                if !clone.active {
                    return Err(No::Conflict);
                }
                clone.agent_active = true;
            }
        }
        Ok(Answer::default())
    }
}
