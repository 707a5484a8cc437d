//! The client of the guest agent: through the VMM's vsock socket, everything from the guest untrusted.

mod link;
mod relay;
mod session;

pub use link::{Heard, Link, LinkError};
pub use relay::{RelayError, Relayed, count, relay};
pub use session::{Session, SessionError, connect};
