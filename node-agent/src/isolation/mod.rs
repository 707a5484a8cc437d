//! What an isolated clone finds on its network: its tap leads to a responder of ours instead of to the
//! bridge. Everything is answered at once, so that nothing in the clone hangs while it boots: DHCP with
//! the guest's own lease, ARP and neighbour discovery for the gateway with its real MAC address, and a
//! rejection for the rest. The clone is untrusted input, like any guest.
//!
//! [`answer()`] is a pure function of a frame; [`Responder`] is the thread that carries frames.

mod answer;
mod dhcp;
mod facts;
mod ipv6;
mod responder;

pub use answer::answer;
pub(crate) use facts::parse_mac;
pub use facts::{Facts, Neighbour};
pub use responder::{IsolationError, Responder};
