//! The systemd generator (`systemd.generator(7)`): on a clone it gives every held unit a condition that only
//! activation fulfils. A drop-in and not a mask, so that it holds whatever `daemon-reload`, presets or package
//! scripts do, and so that the unit starts by the very same file later.

use std::fs;
use std::io;
use std::path::Path;

use crate::role::{ACTIVE, Role};

/// Name by which systemd runs the generator: a link to the agent's binary.
pub const NAME: &str = "understudy-guest-generator";

const DROP_IN: &str = "50-understudy-hold.conf";

/// Writes the drop-ins of a clone into `directory` (the generator's "early" one is not needed: drop-ins of all
/// directories are joined).
pub fn run(role: &Role, directory: &Path) -> io::Result<()> {
    if !role.clone {
        return Ok(());
    }
    for unit in role.held_units() {
        let folder = directory.join(format!("{unit}.d"));
        fs::create_dir_all(&folder)?;
        let text = format!(
            "# This boot is the clone of a guest that still runs: this unit waits until the clone takes over.\n\
             [Unit]\nConditionPathExists={ACTIVE}\n"
        );
        fs::write(folder.join(DROP_IN), text)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_units_of_a_clone_wait_for_activation_and_a_guest_gets_nothing() {
        let dir = tempfile::tempdir().unwrap();
        run(&Role::default(), dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let role = Role {
            clone: true,
            operation: None,
            hold: vec!["billing.service".into()],
        };
        run(&role, dir.path()).unwrap();
        for unit in ["billing.service", "cron.service", "apt-daily.timer"] {
            let text = fs::read_to_string(dir.path().join(format!("{unit}.d")).join(DROP_IN)).unwrap();
            assert!(
                text.contains("ConditionPathExists=/run/understudy/active"),
                "{unit}: {text}"
            );
        }
    }
}
