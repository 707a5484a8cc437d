//! Keys and sealing: AES-256-GCM with counters for nonces.
//!
//! The key that is given for a checkpoint is never used itself: for every save a fresh random salt derives
//! (HKDF-SHA256) the key that seals, the key that authenticates the manifest, and a value by which a wrong key
//! is known. So a counter never meets the same sealing key twice, even where a save is tried again with the
//! same key in the same directory.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, Tag, UnboundKey};
use ring::error::Unspecified;
use ring::rand::{SecureRandom, SystemRandom};
use ring::{digest, hkdf, hmac};
use uuid::Uuid;
use zeroize::Zeroize;

use crate::manifest::FORMAT;

/// Length of a key, and of a salt.
pub(crate) const KEY: usize = 32;
/// Length of an authentication tag.
pub(crate) const TAG: usize = 16;
/// Length of the value that tells a wrong key.
pub(crate) const CHECK: usize = 16;

/// The key of one checkpoint: 32 fresh random bytes. Overwritten when dropped.
pub struct Key([u8; KEY]);

/// Why a key could not be read.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("reading the checkpoint's key {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// It does not hold a key.
    #[error("the checkpoint's key {path} is not 32 bytes long")]
    Length {
        /// The file.
        path: PathBuf,
    },
}

impl Key {
    /// A key from its bytes.
    pub fn new(bytes: [u8; KEY]) -> Key {
        Key(bytes)
    }

    /// Reads a file that holds the 32 bytes and nothing else.
    pub fn read(path: &Path) -> Result<Key, KeyError> {
        let io = |source| KeyError::Io {
            path: path.to_owned(),
            source,
        };
        // One byte more than a key, to see that the file ends.
        let mut bytes = [0; KEY + 1];
        let mut length = 0;
        let mut file = File::open(path).map_err(io)?;
        while length < bytes.len() {
            match file.read(&mut bytes[length..]) {
                Ok(0) => break,
                Ok(n) => length += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(io(error)),
            }
        }
        let key = match bytes.first_chunk::<KEY>() {
            Some(first) if length == KEY => Ok(Key(*first)),
            _ => Err(KeyError::Length {
                path: path.to_owned(),
            }),
        };
        bytes.zeroize();
        key
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

/// A fresh random salt.
pub(crate) fn fresh_salt() -> Result<[u8; KEY], Unspecified> {
    let mut salt = [0; KEY];
    SystemRandom::new().fill(&mut salt)?;
    Ok(salt)
}

/// What a sealed piece is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Part {
    Memory = 1,
    Index = 2,
    State = 3,
    Changes = 4,
}

/// Where a sealed piece belongs: it opens nowhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub part: Part,
    /// Number of the chunk or frame.
    pub number: u64,
    /// Length of the whole part, in bytes.
    pub total: u64,
}

/// The keys of one save.
pub(crate) struct Sealer {
    pieces: LessSafeKey,
    manifest: hmac::Key,
    check: [u8; CHECK],
    /// Digest of format version, checkpoint and guest, in the associated data of every piece.
    binding: [u8; 32],
}

/// A number of bytes to derive.
struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

impl Sealer {
    pub fn derive(
        key: &Key,
        salt: &[u8; KEY],
        checkpoint: Uuid,
        guest_uid: &str,
    ) -> Result<Sealer, Unspecified> {
        let binding = binding(checkpoint, guest_uid);
        let secret = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(&key.0);
        let info = |purpose: &'static [u8]| [purpose, &binding[..]];
        let pieces = UnboundKey::from(secret.expand(&info(b"pieces"), &AES_256_GCM)?);
        let manifest = hmac::Key::from(secret.expand(&info(b"manifest"), hmac::HMAC_SHA256)?);
        let mut check = [0; CHECK];
        secret
            .expand(&info(b"key check"), Length(CHECK))?
            .fill(&mut check)?;
        Ok(Sealer {
            pieces: LessSafeKey::new(pieces),
            manifest,
            check,
            binding,
        })
    }

    /// A value that depends on the key and tells nothing about it.
    pub fn check(&self) -> &[u8; CHECK] {
        &self.check
    }

    /// Encrypts in place.
    pub fn seal(&self, place: Place, counter: u64, data: &mut [u8]) -> Result<[u8; TAG], Unspecified> {
        let tag = self
            .pieces
            .seal_in_place_separate_tag(nonce(counter), self.associated(place), data)?;
        tag.as_ref().try_into().map_err(|_| Unspecified)
    }

    /// Decrypts in place. On failure nothing of the plaintext is left in `data`.
    pub fn open(
        &self,
        place: Place,
        counter: u64,
        tag: [u8; TAG],
        data: &mut [u8],
    ) -> Result<(), Unspecified> {
        let opened = self
            .pieces
            .open_in_place_separate_tag(nonce(counter), self.associated(place), Tag::from(tag), data, 0..)
            .map(|_| ());
        if opened.is_err() {
            data.fill(0);
        }
        opened
    }

    /// Authenticates the manifest's text.
    pub fn sign(&self, text: &[u8]) -> [u8; 32] {
        let mut code = [0; 32];
        code.copy_from_slice(hmac::sign(&self.manifest, text).as_ref());
        code
    }

    /// Whether `code` was made by [`Sealer::sign`] for this text.
    pub fn is_signed(&self, text: &[u8], code: &[u8]) -> bool {
        hmac::verify(&self.manifest, text, code).is_ok()
    }

    fn associated(&self, place: Place) -> Aad<[u8; 49]> {
        let mut data = [0; 49];
        data[..32].copy_from_slice(&self.binding);
        data[32] = place.part as u8;
        data[33..41].copy_from_slice(&place.number.to_le_bytes());
        data[41..].copy_from_slice(&place.total.to_le_bytes());
        Aad::from(data)
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[NONCE_LEN - 8..].copy_from_slice(&counter.to_be_bytes());
    Nonce::assume_unique_for_key(nonce)
}

fn binding(checkpoint: Uuid, guest_uid: &str) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(b"understudy checkpoint\0");
    context.update(&FORMAT.to_le_bytes());
    context.update(checkpoint.as_bytes());
    // Last, so that its length needs no mark.
    context.update(guest_uid.as_bytes());
    let mut binding = [0; 32];
    binding.copy_from_slice(context.finish().as_ref());
    binding
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place {
        part: Part::Memory,
        number: 7,
        total: 1 << 20,
    };

    fn sealer(key: u8, salt: u8, guest: &str) -> Sealer {
        Sealer::derive(&Key::new([key; KEY]), &[salt; KEY], Uuid::from_u128(1), guest).unwrap()
    }

    #[test]
    fn a_piece_opens_in_its_place_with_its_key_and_nowhere_else() {
        let sealer_a = sealer(1, 1, "guest");
        let mut data = *b"attack at dawn";
        let tag = sealer_a.seal(PLACE, 3, &mut data).unwrap();
        assert_ne!(&data, b"attack at dawn");
        let open = |sealer: &Sealer, place, counter| {
            let mut data = data;
            sealer.open(place, counter, tag, &mut data).map(|()| data)
        };
        assert_eq!(open(&sealer_a, PLACE, 3).unwrap(), *b"attack at dawn");
        assert!(open(&sealer_a, PLACE, 4).is_err());
        assert!(open(&sealer_a, Place { number: 8, ..PLACE }, 3).is_err());
        assert!(open(&sealer_a, Place { total: 0, ..PLACE }, 3).is_err());
        let part = Part::State;
        assert!(open(&sealer_a, Place { part, ..PLACE }, 3).is_err());
        for other in [
            sealer(2, 1, "guest"),
            sealer(1, 2, "guest"),
            sealer(1, 1, "other"),
        ] {
            assert!(open(&other, PLACE, 3).is_err());
        }
    }

    #[test]
    fn what_does_not_open_leaves_no_bytes_behind() {
        let mut data = [0x5a; 64];
        assert!(sealer(1, 1, "guest").open(PLACE, 1, [0; TAG], &mut data).is_err());
        assert_eq!(data, [0; 64]);
    }

    #[test]
    fn a_key_file_holds_exactly_a_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        for (length, good) in [(0, false), (31, false), (32, true), (33, false), (4096, false)] {
            std::fs::write(&path, vec![9; length]).unwrap();
            assert_eq!(Key::read(&path).is_ok(), good, "{length}");
        }
        assert!(matches!(Key::read(dir.path()), Err(KeyError::Io { .. })));
        assert_eq!(format!("{:?}", Key::new([7; KEY])), "Key(..)");
    }
}
