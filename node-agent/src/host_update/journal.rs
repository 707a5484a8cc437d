//! The journal of host updates: one record each, in [`crate::records`].

use super::record::{RECORD_VERSION, Update};
use crate::records::Record;
pub use crate::records::{JournalError, decode, encode};

impl Record for Update {
    const MAGIC: &'static str = "understudy-host-update";
    const EXTENSION: &'static str = "update";
    const VERSION: u32 = RECORD_VERSION;
    const WHAT: &'static str = "a valid record of a host update";
    const ADVICE: &'static str = "guests whose sessions it names must not be started while their checkpoints are there: restore the file, or move it away to give those sessions up";

    fn uid(&self) -> &str {
        &self.uid
    }

    fn version(&self) -> u32 {
        self.version
    }
}

/// Where records are kept.
pub trait Journal {
    /// Replaces the update's record; when it returns the new one survives a power cut, when it fails the
    /// old one is whole.
    fn write(&mut self, update: &Update) -> Result<(), JournalError>;
}

/// A directory of records, `<uid>.update`.
pub type Directory = crate::records::Directory<Update>;

impl Journal for Directory {
    fn write(&mut self, update: &Update) -> Result<(), JournalError> {
        Directory::write(self, update)
    }
}
