//! The provider `systemd-creds`: keys are wrapped under the host's own key
//! (`/var/lib/systemd/credential.secret`), by systemd-creds(1).

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use zeroize::Zeroizing;

use super::{CredentialError, CredentialProvider, Identity, Secret};

/// Wraps keys by `systemd-creds encrypt --with-key=host`. The identity is the credential's name, which
/// systemd-creds authenticates with it and compares when it decrypts.
#[derive(Clone, Debug)]
pub struct SystemdCreds {
    program: PathBuf,
    /// Environment of the program beside our own: tests have a host key of theirs.
    environment: Vec<(String, String)>,
}

impl SystemdCreds {
    /// Its name.
    pub const NAME: &str = "systemd-creds";

    /// The provider with this program, a path or a name to be found in `$PATH`.
    pub fn new(program: &Path) -> SystemdCreds {
        SystemdCreds {
            program: program.to_owned(),
            environment: Vec::new(),
        }
    }

    /// As [`SystemdCreds::new`], with the host key at another place (`SYSTEMD_CREDENTIAL_SECRET`).
    #[cfg(test)]
    pub(super) fn with_host_key(program: &Path, secret: &Path) -> SystemdCreds {
        SystemdCreds {
            program: program.to_owned(),
            environment: vec![(
                "SYSTEMD_CREDENTIAL_SECRET".to_owned(),
                secret.display().to_string(),
            )],
        }
    }

    /// Runs the program with `input` on stdin; keys pass through pipes only.
    fn run(&self, arguments: &[&str], input: &[u8]) -> io::Result<Output> {
        let mut child = Command::new(&self.program)
            .args(arguments)
            .envs(self.environment.iter().cloned())
            // The service manager hears its main process only, and complains of others.
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // Less than a pipe holds, so that this does not wait for the program. One that ends before it
            // has read says why on stderr.
            match stdin.write_all(input) {
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
                _ => {}
            }
        }
        child.wait_with_output()
    }

    fn words(output: &Output) -> String {
        let text = String::from_utf8_lossy(&output.stderr);
        let text = text.trim();
        if text.is_empty() {
            return format!("it ended with {}", output.status);
        }
        text.lines().next_back().unwrap_or_default().to_owned()
    }
}

impl CredentialProvider for SystemdCreds {
    fn name(&self) -> &'static str {
        SystemdCreds::NAME
    }

    fn ready(&self) -> Result<(), CredentialError> {
        // The one thing that tells whether it will work is that it works.
        let identity = Identity {
            guest_uid: "probe".to_owned(),
            machine_id: String::new(),
            boot_id: String::new(),
            checkpoint: uuid::Uuid::nil(),
            node_update: String::new(),
        };
        let probe = Secret::generate()?;
        let not_ready = |why: String| {
            CredentialError::NotReady {
            provider: SystemdCreds::NAME,
            why,
            remedy: "it needs systemd 250 or newer and a writable /var/lib/systemd (`systemd-creds setup` makes the host's key); or let the HostUpdate name another credentialProvider".to_owned(),
        }
        };
        let wrapped = self
            .wrap(&identity, &probe)
            .map_err(|error| not_ready(error.to_string()))?;
        let again = self
            .unwrap(&identity, &wrapped)
            .map_err(|error| not_ready(error.to_string()))?;
        if again.bytes() != probe.bytes() {
            return Err(not_ready(
                "it gives back another key than it was given".to_owned(),
            ));
        }
        Ok(())
    }

    fn wrap(&self, identity: &Identity, key: &Secret) -> Result<String, CredentialError> {
        let failed = |why| CredentialError::Wrap {
            provider: SystemdCreds::NAME,
            why,
        };
        let name = format!("--name={}", identity.name());
        let output = self
            .run(&["encrypt", "--with-key=host", &name, "-", "-"], key.bytes())
            .map_err(|error| failed(format!("running {}: {error}", self.program.display())))?;
        if !output.status.success() {
            return Err(failed(SystemdCreds::words(&output)));
        }
        let text = String::from_utf8(output.stdout)
            .map_err(|_| failed("what it printed is not Base64".to_owned()))?;
        Ok(text.split_ascii_whitespace().collect())
    }

    fn unwrap(&self, identity: &Identity, wrapped: &str) -> Result<Secret, CredentialError> {
        let refused = |why| CredentialError::Refused {
            provider: SystemdCreds::NAME,
            why,
        };
        let name = format!("--name={}", identity.name());
        let output = self
            .run(&["decrypt", &name, "-", "-"], wrapped.as_bytes())
            .map_err(|error| refused(format!("running {}: {error}", self.program.display())))?;
        if !output.status.success() {
            return Err(refused(SystemdCreds::words(&output)));
        }
        let bytes = Zeroizing::new(output.stdout);
        Secret::from_slice(&bytes)
            .ok_or_else(|| refused(format!("it gave {} bytes instead of a key", bytes.len())))
    }
}
