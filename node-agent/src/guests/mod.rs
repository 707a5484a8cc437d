//! Guests: what a Guest asks for is compared with what runs, again and again, and the difference is
//! made up ([`worker`]). One thread per guest; what it needs to remember is on disk.

pub mod boot;
pub mod maintenance;
pub mod record;
pub mod requests;
pub mod resolve;
pub mod status;
pub mod worker;

pub use boot::{BootError, cold_boot};
pub use record::{Dormant, Records};
pub use resolve::{Resolved, SpecError, resolve};
