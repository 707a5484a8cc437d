//! Talking to the agents inside guests, over vsock, through their VMMs' Unix sockets. Everything that
//! comes from a guest is untrusted: bounded by the channel's frames, awaited with deadlines, and taken for
//! no more than what that guest says of itself.

mod link;
mod session;
mod transfer;

pub use link::{Link, NoticeSink};
pub use session::{AgentError, dial};
pub use transfer::{Counted, count, relay};
