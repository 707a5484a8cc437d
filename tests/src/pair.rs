//! Two stock guests on one node, as the demo and the tests of host reboots have them: one is watched through its
//! counter, the other through page and ledger; both through the lives of their kernels and programs.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::bed::Ssh;
use crate::client::Report;
use crate::counter;
use crate::demo::{GUEST, MAC, guest_manifest};
use crate::load::{Count, Load};
use crate::machine::Machine;

/// Name of the guest whose counter is watched.
pub const COUNTER: &str = "counter";
/// Its MAC address.
const COUNTER_MAC: &str = "52:54:00:77:01:02";
/// Two guests boot at once, under emulation; the rest is patience.
pub const BOOT_LIMIT: Duration = Duration::from_secs(600);
/// Time between two requests of the client of page and ledger: often enough to see what happens, seldom enough
/// that two emulated guests have time for something else.
pub const OFTEN: Duration = Duration::from_millis(50);

/// A guest of the pair.
pub struct Guest {
    /// Its name.
    pub name: &'static str,
    /// Its IPv4 address.
    pub address: String,
    /// A way into it.
    pub ssh: Ssh,
}

/// Kernel and programs of a guest: the same after a reboot of the host, other ones after the guest's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Life {
    /// Boot ID of its kernel.
    pub boot_id: String,
    /// Process IDs of its services.
    pub processes: String,
}

impl Guest {
    /// The guest's own word for who it is.
    pub fn life(&self) -> Result<Life> {
        let text = self.ssh.run(
            "cat /proc/sys/kernel/random/boot_id; systemctl show -P MainPID counter ledger nginx | xargs",
        )?;
        let (boot_id, processes) = text
            .trim()
            .split_once('\n')
            .with_context(|| format!("guest {} said {text:?}", self.name))?;
        Ok(Life {
            boot_id: boot_id.to_owned(),
            processes: processes.to_owned(),
        })
    }
}

/// The two guests.
pub struct Pair {
    /// [`COUNTER`], then [`GUEST`].
    pub guests: [Guest; 2],
}

impl Pair {
    /// Brings disks for both.
    pub fn place_disks(machine: &Machine) -> Result<()> {
        for (name, _, _) in Pair::members() {
            machine.place_disk(&format!("{name}.img"))?;
        }
        Ok(())
    }

    /// Declares both, with further YAML in their specs.
    pub fn declare(machine: &Machine, more: &str) -> Result<()> {
        for (name, mac, priority) in Pair::members() {
            let more = format!("  priority: {priority}\n{more}");
            machine.apply(&format!("guest-{name}.yaml"), &guest_manifest(name, mac, &more))?;
        }
        Ok(())
    }

    /// Waits until both run and can be logged into.
    pub fn reached(machine: &Machine) -> Result<Pair> {
        let [first, second] = Pair::members().map(|(name, _, _)| -> Result<Guest> {
            let address = machine.wait_for_guest(name, BOOT_LIMIT)?;
            let ssh = machine.guest(&address);
            ssh.wait(BOOT_LIMIT, || Ok(()))?;
            Ok(Guest { name, address, ssh })
        });
        Ok(Pair {
            guests: [first?, second?],
        })
    }

    /// Name, MAC address and priority.
    fn members() -> [(&'static str, &'static str, u32); 2] {
        [(COUNTER, COUNTER_MAC, 10), (GUEST, MAC, 0)]
    }

    /// The guest with the watched counter.
    pub fn counter(&self) -> &Guest {
        &self.guests[0]
    }

    /// The guest with page and ledger.
    pub fn web(&self) -> &Guest {
        &self.guests[1]
    }

    /// Who both are, once both can be logged into: a guest that was just resumed is slow while its memory comes.
    pub fn lives(&self) -> Result<[Life; 2]> {
        for guest in &self.guests {
            // A connection from before a reboot of the host may be waited for in vain.
            guest.ssh.forget();
            guest.ssh.wait(BOOT_LIMIT, || Ok(()))?;
        }
        Ok([self.guests[0].life()?, self.guests[1].life()?])
    }

    /// An error where one of them is not who it was.
    pub fn ensure_same(&self, before: &[Life; 2]) -> Result<()> {
        for ((guest, before), after) in self.guests.iter().zip(before).zip(&self.lives()?) {
            ensure!(
                before == after,
                "guest {} is {after:?} and was {before:?}",
                guest.name
            );
        }
        Ok(())
    }

    /// Starts the clients outside; `run` marks the lines in the ledger.
    pub fn watch(&self, machine: &Machine, run: &str) -> Result<Clients> {
        let run = format!("{run}-{}", std::process::id());
        Ok(Clients {
            counts: [
                Count::start(machine, &self.guests[0].address)?,
                Count::start(machine, &self.guests[1].address)?,
            ],
            load: Load::start(machine, &self.web().address, &run, OFTEN)?,
        })
    }
}

/// The clients outside: a counter's at each guest, and that of page and ledger.
pub struct Clients {
    counts: [Count; 2],
    load: Load,
}

/// What they saw.
#[derive(Clone, Debug)]
pub struct Seen {
    /// At each counter, in the pair's order.
    pub counts: [counter::Report; 2],
    /// At page and ledger.
    pub load: Report,
}

impl Clients {
    /// What comes from here on belongs to `phase`.
    pub fn mark(&mut self, phase: &str) -> Result<()> {
        for count in &mut self.counts {
            count.mark(phase)?;
        }
        self.load.mark(phase)
    }

    /// Ends them.
    pub fn finish(self) -> Result<Seen> {
        let load = self.load.finish()?;
        let [first, second] = self.counts;
        Ok(Seen {
            counts: [first.finish()?, second.finish()?],
            load,
        })
    }
}

impl Seen {
    /// An error where a session broke in one of these phases, or an acknowledged line is gone.
    pub fn ensure_unbroken(&self, phases: &[&str]) -> Result<()> {
        for (name, report) in [COUNTER, GUEST].iter().zip(&self.counts) {
            for phase in phases {
                let seen = report
                    .phases
                    .get(*phase)
                    .with_context(|| format!("no phase {phase} was watched"))?;
                ensure!(
                    seen.is_unbroken(),
                    "the connection to guest {name} did not go on in phase {phase}: {seen:?}; {:?}",
                    report.faults
                );
            }
        }
        self.load.ensure_nothing_lost()
    }
}
