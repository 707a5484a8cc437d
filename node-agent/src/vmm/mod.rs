//! VMM processes as the agent keeps them: started so that they outlive it, found again by their records,
//! ended for sure.

mod instance;
mod launch;
mod process;

pub use instance::{Instance, Instances, Layout};
pub use launch::{LaunchError, Launcher};
pub(crate) use launch::{log_end, log_length, log_since};
pub use process::{Process, host_boot_id};

use understudy_vmm_control::client::ClientError;

/// Whether a VMM refused (in its own words), as opposed to not answering.
pub fn refused(error: &ClientError) -> bool {
    matches!(error, ClientError::Refused { .. })
}
