//! The provider `key-file`: a file with a key of the administrator's, for hosts without systemd-creds, or
//! whose key is brought from elsewhere.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

use super::secret::{LENGTH, from_hex, to_hex};
use super::{CredentialError, CredentialProvider, Identity, Secret};

/// Wraps keys with AES-256-GCM under the 32 bytes of a file; the identity is authenticated with them.
#[derive(Clone, Debug)]
pub struct KeyFile {
    path: PathBuf,
}

impl KeyFile {
    /// Its name.
    pub const NAME: &str = "key-file";

    /// The provider on this file.
    pub fn new(path: &Path) -> KeyFile {
        KeyFile {
            path: path.to_owned(),
        }
    }

    fn not_ready(&self, why: String) -> CredentialError {
        let path = self.path.display();
        CredentialError::NotReady {
            provider: KeyFile::NAME,
            why: format!("{path} {why}"),
            remedy: format!(
                "the configuration's credentials.keyFile names it; make it by `(umask 077; head -c {LENGTH} /dev/urandom > {path})` on a file system that outlives the reboot"
            ),
        }
    }

    /// The wrapping key. The file is looked at anew each time, so that it may be on a medium that is put in
    /// when it is needed.
    fn key(&self) -> Result<LessSafeKey, CredentialError> {
        let mut file =
            File::open(&self.path).map_err(|error| self.not_ready(format!("cannot be opened: {error}")))?;
        let metadata = file
            .metadata()
            .map_err(|error| self.not_ready(format!("cannot be looked at: {error}")))?;
        if !metadata.is_file() {
            return Err(self.not_ready("is no regular file".to_owned()));
        }
        if metadata.mode() & 0o077 != 0 || metadata.uid() != rustix::process::geteuid().as_raw() {
            return Err(self.not_ready(format!(
                "may be read by others (mode {:o}, owner {})",
                metadata.mode() & 0o7777,
                metadata.uid()
            )));
        }
        let mut bytes = Zeroizing::new(Vec::with_capacity(LENGTH + 1));
        Read::by_ref(&mut file)
            .take(LENGTH as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| self.not_ready(format!("cannot be read: {error}")))?;
        if bytes.len() != LENGTH {
            return Err(self.not_ready(format!(
                "has {} bytes instead of {LENGTH}",
                match bytes.len() {
                    few @ ..LENGTH => few.to_string(),
                    _ => format!("more than {LENGTH}"),
                }
            )));
        }
        let key = UnboundKey::new(&AES_256_GCM, &bytes)
            .map_err(|_| self.not_ready("holds no usable key".to_owned()))?;
        Ok(LessSafeKey::new(key))
    }
}

impl CredentialProvider for KeyFile {
    fn name(&self) -> &'static str {
        KeyFile::NAME
    }

    fn ready(&self) -> Result<(), CredentialError> {
        self.key().map(drop)
    }

    fn wrap(&self, identity: &Identity, key: &Secret) -> Result<String, CredentialError> {
        let wrapping = self.key()?;
        // One key wraps few others, so that random nonces never meet (NIST SP 800-38D, 8.3: 2^32 of them).
        let mut nonce = [0u8; NONCE_LEN];
        SystemRandom::new()
            .fill(&mut nonce)
            .map_err(|_| CredentialError::Random)?;
        let mut sealed = key.bytes().to_vec();
        wrapping
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(identity.name().as_bytes()),
                &mut sealed,
            )
            .map_err(|_| CredentialError::Wrap {
                provider: KeyFile::NAME,
                why: "AES-256-GCM failed".to_owned(),
            })?;
        Ok(to_hex(&nonce) + &to_hex(&sealed))
    }

    fn unwrap(&self, identity: &Identity, wrapped: &str) -> Result<Secret, CredentialError> {
        let refused = |why: &str| CredentialError::Refused {
            provider: KeyFile::NAME,
            why: why.to_owned(),
        };
        let key = self.key()?;
        let bytes = from_hex(wrapped).ok_or_else(|| refused("the record is damaged"))?;
        let (nonce, sealed) = bytes
            .split_first_chunk::<NONCE_LEN>()
            .ok_or_else(|| refused("the record is damaged"))?;
        let mut opened = Zeroizing::new(sealed.to_vec());
        let opened = key
            .open_in_place(
                Nonce::assume_unique_for_key(*nonce),
                Aad::from(identity.name().as_bytes()),
                &mut opened,
            )
            .map_err(|_| {
                refused("it was registered under another key file, or for another guest, node, boot or checkpoint, or the record is damaged")
            })?;
        Secret::from_slice(opened).ok_or_else(|| refused("the record is damaged"))
    }
}
