//! The journal of operations: one record each, in [`crate::records`].

use super::record::{Operation, RECORD_VERSION};
use crate::records::Record;
pub use crate::records::{JournalError, MAX_RECORD, decode, encode};

impl Record for Operation {
    const MAGIC: &'static str = "understudy-operation";
    const EXTENSION: &'static str = "operation";
    const VERSION: u32 = RECORD_VERSION;
    const WHAT: &'static str = "a valid record of an operation";
    const ADVICE: &'static str =
        "the guest it names keeps what owner.json says, so move the file away to give the operation up";

    fn uid(&self) -> &str {
        &self.uid
    }

    fn version(&self) -> u32 {
        self.version
    }
}

/// Where records are kept.
pub trait Journal {
    /// Replaces the operation's record; when it returns the new one survives a power cut, when it fails
    /// the old one is whole.
    fn write(&mut self, operation: &Operation) -> Result<(), JournalError>;
}

/// A directory of records, `<uid>.operation`.
pub type Directory = crate::records::Directory<Operation>;

impl Journal for Directory {
    fn write(&mut self, operation: &Operation) -> Result<(), JournalError> {
        Directory::write(self, operation)
    }
}

#[cfg(test)]
#[path = "journal_test.rs"]
mod tests;
