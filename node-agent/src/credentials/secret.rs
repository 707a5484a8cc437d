//! The key of a session, kept out of logs and wiped from memory.

use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

use super::CredentialError;

/// Length of a session's key: AES-256.
pub(super) const LENGTH: usize = 32;

/// The 32 bytes of a session's key. They are wiped from memory when it is dropped, and are never printed.
#[derive(Clone)]
pub struct Secret(Zeroizing<[u8; LENGTH]>);

impl Secret {
    /// A fresh key from the kernel's generator.
    pub fn generate() -> Result<Secret, CredentialError> {
        let mut bytes = Zeroizing::new([0u8; LENGTH]);
        SystemRandom::new()
            .fill(bytes.as_mut())
            .map_err(|_| CredentialError::Random)?;
        Ok(Secret(bytes))
    }

    /// A key of these bytes; `None` unless there are 32.
    pub fn from_slice(bytes: &[u8]) -> Option<Secret> {
        Some(Secret(Zeroizing::new(bytes.try_into().ok()?)))
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8; LENGTH] {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Lower-case hexadecimal digits.
pub(super) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of [`to_hex`].
pub(super) fn from_hex(text: &str) -> Option<Vec<u8>> {
    let text = text.as_bytes();
    if !text.len().is_multiple_of(2) {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|d| u8::try_from(d).ok());
    text.chunks_exact(2)
        .map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_fresh_and_is_not_printed() {
        let (one, other) = (Secret::generate().unwrap(), Secret::generate().unwrap());
        assert_ne!(one.bytes(), other.bytes());
        assert_eq!(format!("{one:?}"), "Secret(…)");
        assert!(Secret::from_slice(&[0; 31]).is_none());
    }

    #[test]
    fn hexadecimal_digits_go_both_ways_and_others_are_refused() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&bytes)), Some(bytes));
        assert_eq!(from_hex("abc"), None);
        assert_eq!(from_hex("zz"), None);
    }
}
