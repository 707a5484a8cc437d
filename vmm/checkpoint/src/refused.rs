//! Why a checkpoint is not resumed.

use std::fmt;

use understudy_vmm_control::session::Refusal;

/// A checkpoint that is refused, before anything was changed. Its text is the last line of the log of a VMM
/// that ends with [`understudy_vmm_control::session::REFUSED_EXIT_CODE`]: `<Refusal>: <message>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedCheckpoint {
    /// The reason, as a word.
    pub refusal: Refusal,
    /// What was found, where, and what can be done.
    pub message: String,
}

impl RefusedCheckpoint {
    /// Refuses for this reason.
    pub fn new(refusal: Refusal, message: impl Into<String>) -> RefusedCheckpoint {
        RefusedCheckpoint {
            refusal,
            message: message.into(),
        }
    }
}

impl fmt::Display for RefusedCheckpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.refusal, self.message)
    }
}

impl std::error::Error for RefusedCheckpoint {}
