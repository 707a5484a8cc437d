//! What the kernel offers and no crate wraps: the only place of `unsafe` code in this agent.

pub mod fanotify;
pub mod freeze;
pub mod handle;
pub mod lease;
pub mod netlink;
pub mod packet;
pub mod process;
pub mod vsock;
