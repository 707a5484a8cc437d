//! What the kernel offers and no crate wraps: the only place of `unsafe` code in this agent.

pub mod netlink;
pub mod process;
pub mod vsock;
