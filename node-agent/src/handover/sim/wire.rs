//! The way from the agent to VMMs and guest agents: what is sent is late, lost, or arrives after the agent died. With the
//! crash points before and after each.

use std::panic::resume_unwind;

use super::super::effects::{EffectError, Effected, ErrorKind};
use super::machines::{Answer, Command, No};
use super::world::*;

/// Thrown where the agent dies.
pub struct Crash;

pub fn retry<T>(message: &str) -> Effected<T> {
    Err(EffectError::new(ErrorKind::Retry, message))
}

pub fn clone_gone<T>() -> Effected<T> {
    Err(EffectError::new(
        ErrorKind::CloneGone,
        "the clone's VMM has ended",
    ))
}

impl Shared {
    /// Counts a crash point; true where the agent dies.
    pub fn is_end(&self) -> bool {
        self.crash_points.set(self.crash_points.get() + 1);
        self.power_lost.get() || self.crash_at.borrow().contains(&self.crash_points.get())
    }

    pub fn crash(&self) -> ! {
        self.power_lost.set(false);
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

    pub fn latency(&mut self) {
        let slow = self.now < self.calm_from && self.trouble > 0 && self.rng.chance(40);
        let micros = if slow {
            self.rng.range(10 * MS, 400 * MS)
        } else {
            self.rng.range(50, 2 * MS)
        };
        self.advance(micros);
    }

    pub fn in_trouble(&mut self) -> bool {
        self.now < self.calm_from && self.trouble > 0 && {
            let permille = self.trouble;
            self.rng.chance(permille)
        }
    }

    /// Sends one command and waits for its answer. The agent may die while it is on its way: it is lost,
    /// carried out, or carried out later; the same may happen without a crash, as a timeout.
    pub fn send(&mut self, command: Command) -> Effected<Answer> {
        if !is_for_vmm(&command) {
            // A new session with a guest agent takes the place of the older one.
            let late = std::mem::take(&mut self.late);
            for (at, old) in late {
                if is_for_vmm(&old) {
                    self.late.push((at, old));
                } else if self.rng.chance(500) {
                    let _ = self.execute(&old);
                }
            }
        }
        self.crash_point();
        self.latency();
        let fate = self.rng.below(3);
        let dies = self.shared.is_end();
        if dies || self.in_trouble() {
            match fate {
                0 => {}
                1 => {
                    let _ = self.execute(&command);
                }
                _ => {
                    let at = self.now + self.rng.range(MS, 900 * MS);
                    self.late.push((at, command));
                }
            }
            if dies {
                self.shared.crash();
            }
            self.advance(30 * MS);
            return retry("no answer in time");
        }
        let answer = self.execute(&command);
        self.crash_point();
        answer.or_else(|no| match no {
            No::Gone if is_for_clone(&command) => clone_gone(),
            No::Gone => Err(EffectError::new(
                ErrorKind::GuestGone,
                "the guest's VMM has ended",
            )),
            No::Silent => {
                self.advance(50 * MS);
                retry("the guest agent does not answer")
            }
            No::Conflict => Err(EffectError::new(
                ErrorKind::Refused,
                format!("{command:?} was refused"),
            )),
        })
    }
}

fn is_for_vmm(command: &Command) -> bool {
    matches!(
        command,
        Command::PrepareSplit
            | Command::Split
            | Command::Hold { .. }
            | Command::Release
            | Command::Commit { .. }
            | Command::GiveNetwork
            | Command::ActivateGuest { .. }
            | Command::BootClone
            | Command::ActivateClone { .. }
            | Command::HoldClone { .. }
            | Command::ReleaseClone
            | Command::CommitBack { .. }
    )
}

fn is_for_clone(command: &Command) -> bool {
    matches!(
        command,
        Command::BootClone
            | Command::ActivateClone { .. }
            | Command::ActivateAgent
            | Command::HoldClone { .. }
            | Command::ReleaseClone
            | Command::CommitBack { .. }
    )
}
