//! Saved state: plain types apart from the live ones, each in an envelope with its version.
//!
//! The rules, so that a later VMM can read what an earlier one saved, and refuses what it cannot:
//!
//! - A state holds what the guest can observe and nothing else: no descriptor, no address of this process.
//! - Every change of a state type (a field more, less or of another meaning) raises its version. A version
//!   that is still understood is converted; any other is refused by number.
//! - A state comes from a file and is believed in nothing: it is bounded before it is decoded, and every
//!   field is checked against the configuration of the device that it is for before any of it is used.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest encoding of any state in bytes. A machine's takes a few KiB; a disk whose writes all wait, each in
/// the most pieces that a request may have, a few MiB.
pub const MAX_STATE: usize = 16 << 20;

/// Deepest nesting of any state.
const MAX_DEPTH: usize = 16;

/// Why a state could not be saved or is not taken over. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Written by another version.
    #[error(
        "{part}: its saved state has version {found}, and this VMM reads version {known}; resume with the VMM that saved it"
    )]
    Version {
        /// What it is the state of.
        part: String,
        /// Version found.
        found: u32,
        /// Version known.
        known: u32,
    },
    /// Not an encoded state.
    #[error("{part}: its saved state cannot be decoded: {reason}")]
    Malformed {
        /// What it is the state of.
        part: String,
        /// What is wrong.
        reason: String,
    },
    /// It does not fit to the device, or to itself.
    #[error("{part}: its saved state does not fit: {reason}")]
    Unfit {
        /// What it is the state of.
        part: String,
        /// What does not fit.
        reason: String,
    },
    /// The encoding failed.
    #[error("{part}: its state cannot be encoded: {reason}")]
    Encoding {
        /// What it is the state of.
        part: String,
        /// Why.
        reason: String,
    },
    /// Save was asked of something that runs.
    #[error("{part}: it runs; suspend it before its state is saved")]
    Running {
        /// What runs.
        part: String,
    },
    /// KVM or the operating system refused.
    #[error("{part}: {action}: {source}")]
    Os {
        /// What it is the state of.
        part: String,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl StateError {
    /// A field that does not fit.
    pub fn unfit(part: impl Into<String>, reason: impl Into<String>) -> StateError {
        StateError::Unfit {
            part: part.into(),
            reason: reason.into(),
        }
    }
}

/// Fails with [`StateError::Unfit`] where `holds` is false.
pub fn ensure(holds: bool, part: &str, reason: impl FnOnce() -> String) -> Result<(), StateError> {
    match holds {
        true => Ok(()),
        false => Err(StateError::unfit(part, reason())),
    }
}

/// A state type with its version.
pub trait State: Serialize + DeserializeOwned {
    /// Raised by every change of the type.
    const VERSION: u32;
}

/// An encoded state with its version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    version: u32,
    #[serde(with = "serde_bytes")]
    state: Vec<u8>,
}

impl Envelope {
    /// Encodes `state` of `part`.
    pub fn seal<T: State>(part: &str, state: &T) -> Result<Envelope, StateError> {
        Ok(Envelope {
            version: T::VERSION,
            state: encode(part, state)?,
        })
    }

    /// Decodes the state of `part`.
    pub fn open<T: State>(&self, part: &str) -> Result<T, StateError> {
        if self.version != T::VERSION {
            return Err(StateError::Version {
                part: part.to_owned(),
                found: self.version,
                known: T::VERSION,
            });
        }
        decode(part, &self.state)
    }

    /// An envelope with any content, for tests of what decoders refuse.
    #[cfg(test)]
    pub(crate) fn raw(version: u32, state: Vec<u8>) -> Envelope {
        Envelope { version, state }
    }

    /// The envelope as bytes.
    pub fn to_bytes(&self, part: &str) -> Result<Vec<u8>, StateError> {
        encode(part, self)
    }

    /// An envelope from bytes, which may be anything.
    pub fn from_bytes(part: &str, bytes: &[u8]) -> Result<Envelope, StateError> {
        decode(part, bytes)
    }
}

fn encode(part: &str, value: &impl Serialize) -> Result<Vec<u8>, StateError> {
    let failed = |reason: String| StateError::Encoding {
        part: part.to_owned(),
        reason,
    };
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).map_err(|error| failed(error.to_string()))?;
    if bytes.len() > MAX_STATE {
        return Err(failed(format!("{} bytes are more than {MAX_STATE}", bytes.len())));
    }
    Ok(bytes)
}

fn decode<T: DeserializeOwned>(part: &str, bytes: &[u8]) -> Result<T, StateError> {
    let malformed = |reason: String| StateError::Malformed {
        part: part.to_owned(),
        reason,
    };
    if bytes.len() > MAX_STATE {
        return Err(malformed(format!(
            "{} bytes are more than {MAX_STATE}",
            bytes.len()
        )));
    }
    let mut rest = bytes;
    let value = ciborium::de::from_reader_with_recursion_limit(&mut rest, MAX_DEPTH)
        .map_err(|error| malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(malformed(format!("{} bytes follow its end", rest.len())));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Old {
        number: u16,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct New {
        number: u16,
        more: Vec<u8>,
    }

    impl State for Old {
        const VERSION: u32 = 1;
    }

    impl State for New {
        const VERSION: u32 = 2;
    }

    #[test]
    fn a_state_is_read_back_by_its_version_alone() {
        let sealed = Envelope::seal("probe", &Old { number: 7 }).unwrap();
        let bytes = sealed.to_bytes("probe").unwrap();
        let found = Envelope::from_bytes("probe", &bytes).unwrap();
        assert_eq!(found.open::<Old>("probe").unwrap(), Old { number: 7 });
        let error = found.open::<New>("probe").unwrap_err().to_string();
        assert!(
            error.contains("version 1") && error.contains("version 2"),
            "{error}"
        );
    }

    #[test]
    fn truncated_and_prolonged_states_are_refused() {
        let sealed = Envelope::seal("probe", &Old { number: 7 }).unwrap();
        let mut bytes = sealed.to_bytes("probe").unwrap();
        for length in 0..bytes.len() {
            Envelope::from_bytes("probe", &bytes[..length]).unwrap_err();
        }
        bytes.push(0);
        let error = Envelope::from_bytes("probe", &bytes).unwrap_err().to_string();
        assert!(error.contains("follow its end"), "{error}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(envelope) = Envelope::from_bytes("probe", &bytes) {
                let _ = envelope.open::<Old>("probe");
            }
        }
    }
}
