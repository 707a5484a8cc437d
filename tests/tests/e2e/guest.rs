//! The guest that the tests of the node agent share.

use std::time::Duration;

use anyhow::{Context as _, Result};
use understudy_tests::bed::{Ssh, wait_until};
pub use understudy_tests::demo::GUEST;
use understudy_tests::demo::{MAC, guest_manifest};
use understudy_tests::e2e::Context;
use understudy_tests::machine::{Machine, condition_is};

/// A guest boots in 20 s under emulation, in more beside a busy machine.
const BOOT_LIMIT: Duration = Duration::from_secs(480);

/// A stock guest that serves, under the node agent.
pub struct Guest {
    /// Where it runs.
    pub machine: Machine,
    /// Its IPv4 address.
    pub address: String,
    /// A way into it.
    pub ssh: Ssh,
}

impl Guest {
    /// One from a new disk, on a machine from which all else was removed.
    pub fn fresh(context: &Context) -> Result<Guest> {
        let mut machine = Machine::in_node(context.stage, &context.binaries);
        machine.clear()?;
        machine.place_disk("web.img")?;
        machine.start_agent()?;
        machine.apply("guest.yaml", &guest_manifest(GUEST, MAC, ""))?;
        let guest = Guest::reached(machine)?;
        context.say("the guest serves");
        Ok(guest)
    }

    /// The one that an earlier test left running, else a fresh one.
    pub fn running(context: &Context) -> Result<Guest> {
        let mut machine = Machine::in_node(context.stage, &context.binaries);
        let serves = machine
            .object("Guest", GUEST)
            .ok()
            .flatten()
            .is_some_and(|guest| condition_is(&guest, "Ready", "True"));
        if !serves {
            return Guest::fresh(context);
        }
        machine.halt_at(&[])?;
        machine.forget_reboots()?;
        machine.start_agent()?;
        let guest = Guest::reached(machine)?;
        context.say("the guest of an earlier test serves on");
        Ok(guest)
    }

    fn reached(machine: Machine) -> Result<Guest> {
        let address = machine.wait_for_guest(GUEST, BOOT_LIMIT)?;
        let ssh = machine.guest(&address);
        wait_until("ssh into the guest", BOOT_LIMIT, Duration::from_secs(1), || {
            Ok(ssh.answers()?.then_some(()))
        })?;
        Ok(Guest {
            machine,
            address,
            ssh,
        })
    }

    /// A field of its status.
    pub fn status(&self, field: &str) -> Result<String> {
        let guest = self
            .machine
            .object("Guest", GUEST)?
            .context("the agent knows no guest")?;
        Ok(guest["status"][field].as_str().unwrap_or_default().to_owned())
    }
}
