//! Secrets that pass through the API server, where others read along: sealed to a key, and bound to what they are
//! for.
//!
//! HPKE (RFC 9180) in its base mode: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305, one message for each
//! encapsulation. What a secret is for ([`Binding`]) goes in as `info`: opened for anything else it is refused. Who
//! has sealed is not authenticated by it; that is the API server's, whose admission tells agents apart.

#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hpke::aead::ChaCha20Poly1305;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable, single_shot_open, single_shot_seal};
use zeroize::Zeroizing;

/// Length of a private, a public and an encapsulated key of X25519.
const LENGTH: usize = 32;

/// Why something could not be sealed or opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The kernel gave none.
    #[error("the kernel gave no random numbers for a key")]
    Random,
    /// It is none of X25519, in Base64.
    #[error("it is no public key: 32 bytes of X25519 in Base64 are expected")]
    PublicKey,
    /// It was cut, or is something else.
    #[error("it is damaged: no sealed message, in Base64")]
    Damaged,
    /// Authentication failed.
    #[error("it was sealed to another key, or for something else, or it is damaged")]
    Refused,
}

/// What a secret is for. Sealed for one, it is opened for no other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding(Vec<u8>);

impl Binding {
    /// The key of one session (`identity`: guest, machine, saving boot and checkpoint), saved for the NodeUpdate of
    /// this UID.
    pub fn session_key(node_update: &str, identity: &str) -> Binding {
        Binding::of("session key", &[node_update, identity])
    }

    /// The credential of the NodeUpdate of this UID, released to a boot of a machine that is a Node.
    pub fn release(node_update: &str, node: &str, machine_id: &str, boot_id: &str) -> Binding {
        Binding::of("release", &[node_update, node, machine_id, boot_id])
    }

    /// Each part with its length, so that no two lists of parts are the same bytes.
    fn of(purpose: &str, parts: &[&str]) -> Binding {
        let mut bytes = b"understudy.dev/v1".to_vec();
        for part in std::iter::once(&purpose).chain(parts) {
            bytes.extend((part.len() as u64).to_be_bytes());
            bytes.extend(part.as_bytes());
        }
        Binding(bytes)
    }
}

/// The private half of a key pair, wiped from memory when it is dropped and never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct PrivateKey(Zeroizing<[u8; LENGTH]>);

impl PrivateKey {
    /// A fresh one from the kernel's generator.
    pub fn generate() -> Result<PrivateKey, SealError> {
        let mut bytes = Zeroizing::new([0u8; LENGTH]);
        getrandom::fill(bytes.as_mut()).map_err(|_| SealError::Random)?;
        Ok(PrivateKey(bytes))
    }

    /// The one of these bytes; `None` unless there are 32.
    pub fn from_slice(bytes: &[u8]) -> Option<PrivateKey> {
        Some(PrivateKey(Zeroizing::new(bytes.try_into().ok()?)))
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8; LENGTH] {
        &self.0
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        let mut bytes = [0u8; LENGTH];
        if let Ok(key) = self.key() {
            bytes.copy_from_slice(&X25519HkdfSha256::sk_to_pk(&key).to_bytes());
        }
        PublicKey(bytes)
    }

    /// What [`PublicKey::seal`] has sealed to the public half, for the same thing.
    pub fn open(&self, sealed: &str, binding: &Binding) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let bytes = STANDARD.decode(sealed).map_err(|_| SealError::Damaged)?;
        let (encapsulated, ciphertext) = bytes.split_at_checked(LENGTH).ok_or(SealError::Damaged)?;
        let encapsulated = <X25519HkdfSha256 as Kem>::EncappedKey::from_bytes(encapsulated)
            .map_err(|_| SealError::Damaged)?;
        single_shot_open::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
            &OpModeR::Base,
            &self.key()?,
            &encapsulated,
            &binding.0,
            ciphertext,
            &[],
        )
        .map(Zeroizing::new)
        .map_err(|_| SealError::Refused)
    }

    /// Any 32 bytes are one.
    fn key(&self) -> Result<<X25519HkdfSha256 as Kem>::PrivateKey, SealError> {
        <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(self.0.as_ref()).map_err(|_| SealError::Refused)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(…)")
    }
}

/// The public half of a key pair; in the API as Base64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublicKey([u8; LENGTH]);

impl PublicKey {
    /// Seals a secret, so that only the private half opens it, and only for this.
    pub fn seal(&self, secret: &[u8], binding: &Binding) -> Result<String, SealError> {
        let key =
            <X25519HkdfSha256 as Kem>::PublicKey::from_bytes(&self.0).map_err(|_| SealError::PublicKey)?;
        let (encapsulated, ciphertext) = single_shot_seal::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
            &OpModeS::Base,
            &key,
            &binding.0,
            secret,
            &[],
        )
        // Of a key that is no point of the curve's large group.
        .map_err(|_| SealError::PublicKey)?;
        let mut bytes = encapsulated.to_bytes().to_vec();
        bytes.extend(ciphertext);
        Ok(STANDARD.encode(bytes))
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl FromStr for PublicKey {
    type Err = SealError;

    fn from_str(text: &str) -> Result<PublicKey, SealError> {
        let bytes = STANDARD.decode(text).map_err(|_| SealError::PublicKey)?;
        Ok(PublicKey(bytes.try_into().map_err(|_| SealError::PublicKey)?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn release(parts: [&str; 4]) -> Binding {
        Binding::release(parts[0], parts[1], parts[2], parts[3])
    }

    #[test]
    fn what_is_sealed_to_a_key_is_opened_by_it_alone_and_for_the_same_node_boot_and_update_alone() {
        let (own, other) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        let meant = ["update", "node", "machine", "boot"];
        let sealed = own.public().seal(b"the credential", &release(meant)).unwrap();
        assert_eq!(*own.open(&sealed, &release(meant)).unwrap(), b"the credential");
        assert_eq!(other.open(&sealed, &release(meant)), Err(SealError::Refused));
        for index in 0..meant.len() {
            let mut another = meant;
            another[index] = "another";
            assert_eq!(
                own.open(&sealed, &release(another)),
                Err(SealError::Refused),
                "{another:?}"
            );
        }
        let key = Binding::session_key("update", "node");
        assert_eq!(own.open(&sealed, &key), Err(SealError::Refused));
        // The same secret never looks the same.
        assert_ne!(
            sealed,
            own.public().seal(b"the credential", &release(meant)).unwrap()
        );
    }

    #[test]
    fn no_two_bindings_are_the_same_bytes() {
        assert_ne!(release(["a", "b", "c", "d"]), release(["ab", "", "c", "d"]));
        assert_ne!(release(["a", "b", "c", "d"]), release(["a", "b", "", "cd"]));
        assert_ne!(Binding::session_key("a", "b"), Binding::session_key("", "ab"));
    }

    #[test]
    fn keys_go_through_the_api_as_text_and_what_is_none_is_refused() {
        let key = PrivateKey::generate().unwrap();
        assert_eq!(key.public().to_string().parse(), Ok(key.public()));
        assert_eq!(PrivateKey::from_slice(key.bytes()), Some(key.clone()));
        assert_eq!(PrivateKey::from_slice(&[0; 31]), None);
        assert_eq!(format!("{key:?}"), "PrivateKey(…)");
        for text in ["", "%", "AAAA"] {
            assert_eq!(text.parse::<PublicKey>(), Err(SealError::PublicKey));
        }
        // A point of small order would let anybody open what was sealed to it.
        let small = PublicKey([0; LENGTH]);
        assert_eq!(
            small.seal(b"x", &Binding::session_key("", "")),
            Err(SealError::PublicKey)
        );
    }

    proptest! {
        #[test]
        fn a_message_that_was_tampered_with_is_refused(at in 0usize..80, bit in 0u8..8) {
            let key = PrivateKey::generate().unwrap();
            let binding = Binding::session_key("update", "identity");
            let sealed = key.public().seal(&[7; 32], &binding).unwrap();
            let mut bytes = STANDARD.decode(&sealed).unwrap();
            prop_assert_eq!(bytes.len(), 80);
            bytes[at] ^= 1 << bit;
            // The highest bit of a point is not part of it (RFC 7748, 5); the exchange authenticates it all the same.
            prop_assert!(key.open(&STANDARD.encode(&bytes), &binding).is_err());
            let cut = STANDARD.encode(&bytes[..at]);
            prop_assert!(key.open(&cut, &binding).is_err());
        }
    }
}
