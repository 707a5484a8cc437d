//! Messages between node agent and guest agent: versioned, bounded frames on a byte stream (vsock).
//!
//! The node agent connects, the guest agent listens on [`PORT`]. Each connection is a session of one
//! [`Purpose`], agreed on in its first exchange. Each side treats the other as untrusted: frames, strings
//! and lists are bounded, and what does not decode ends the session, never the process.
#![forbid(unsafe_code)]

pub mod frame;
pub mod message;
pub mod validate;

pub use frame::{FrameError, MAX_FRAME, read_frame, write_frame};
pub use message::*;
pub use validate::{Invalid, Validate, read_message};

/// vsock port on which the guest agent listens.
pub const PORT: u32 = 1024;
/// Oldest protocol version that this code speaks.
pub const VERSION_MIN: u32 = 1;
/// Newest protocol version that this code speaks.
pub const VERSION_MAX: u32 = 3;
/// First version that knows [`Request::Resumed`].
pub const RESUMED_VERSION: u32 = 2;
/// First version that knows [`Request::Probe`].
pub const PROBE_VERSION: u32 = 3;
