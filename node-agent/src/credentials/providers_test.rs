use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use super::*;

fn identity() -> Identity {
    Identity {
        guest_uid: Uuid::new_v4().to_string(),
        machine_id: "0123456789abcdef0123456789abcdef".into(),
        boot_id: Uuid::new_v4().to_string(),
        checkpoint: Uuid::new_v4(),
        node_update: "kernel-1".into(),
    }
}

fn key_file(dir: &Path, fill: u8) -> KeyFile {
    let path = dir.join(format!("key-{fill}"));
    fs::write(&path, [fill; 32]).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    KeyFile::new(&path)
}

/// The real systemd-creds with a host key in `dir`, or `None` (and a word of it) where it is not installed.
fn systemd(dir: &Path) -> Option<SystemdCreds> {
    let provider = SystemdCreds::with_host_key(Path::new("systemd-creds"), &dir.join("host.secret"));
    match std::process::Command::new("systemd-creds")
        .arg("--version")
        .output()
    {
        Ok(_) => Some(provider),
        Err(error) => {
            eprintln!("skipped: systemd-creds cannot be run: {error}");
            None
        }
    }
}

/// What every provider promises.
fn keeps_what_a_provider_promises(provider: &dyn CredentialProvider) {
    provider.ready().unwrap();
    let (identity, key) = (identity(), Secret::generate().unwrap());
    let wrapped = provider.wrap(&identity, &key).unwrap();
    assert!(!wrapped.contains(&secret::to_hex(key.bytes())));
    assert_eq!(provider.unwrap(&identity, &wrapped).unwrap().bytes(), key.bytes());
    let others = [
        Identity {
            guest_uid: "another".into(),
            ..identity.clone()
        },
        Identity {
            machine_id: "another".into(),
            ..identity.clone()
        },
        Identity {
            boot_id: "another".into(),
            ..identity.clone()
        },
        Identity {
            checkpoint: Uuid::new_v4(),
            ..identity.clone()
        },
    ];
    for other in others {
        let refused = provider.unwrap(&other, &wrapped);
        assert!(
            matches!(refused, Err(CredentialError::Refused { .. })),
            "{refused:?} for {other:?}"
        );
    }
    let mut damaged = wrapped.clone().into_bytes();
    let middle = damaged.len() / 2;
    damaged[middle] = if damaged[middle] == b'1' { b'2' } else { b'1' };
    let damaged = String::from_utf8(damaged).unwrap();
    assert!(provider.unwrap(&identity, &damaged).is_err());
}

#[test]
fn the_key_file_gives_a_key_back_for_the_same_identity_only() {
    let dir = tempfile::tempdir().unwrap();
    keeps_what_a_provider_promises(&key_file(dir.path(), 7));
    let (identity, key) = (identity(), Secret::generate().unwrap());
    let wrapped = key_file(dir.path(), 7).wrap(&identity, &key).unwrap();
    let error = key_file(dir.path(), 8).unwrap(&identity, &wrapped).unwrap_err();
    assert!(error.to_string().contains("another key file"), "{error}");
}

#[test]
fn systemd_creds_gives_a_key_back_for_the_same_identity_only() {
    let dir = tempfile::tempdir().unwrap();
    let Some(provider) = systemd(dir.path()) else {
        return;
    };
    keeps_what_a_provider_promises(&provider);
}

#[test]
fn another_hosts_systemd_creds_does_not_give_a_key_back() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (Some(provider), Some(other)) = (systemd(here.path()), systemd(there.path())) else {
        return;
    };
    let identity = identity();
    let wrapped = provider.wrap(&identity, &Secret::generate().unwrap()).unwrap();
    other.ready().unwrap();
    assert!(matches!(
        other.unwrap(&identity, &wrapped),
        Err(CredentialError::Refused { .. })
    ));
}

#[test]
fn a_provider_that_cannot_work_says_why_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let error = SystemdCreds::new(Path::new("/no/such/systemd-creds"))
        .ready()
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/no/such/systemd-creds") && error.contains("systemd 250"),
        "{error}"
    );

    let missing = KeyFile::new(&dir.path().join("missing"));
    let error = missing.ready().unwrap_err().to_string();
    assert!(
        error.contains("missing cannot be opened") && error.contains("/dev/urandom"),
        "{error}"
    );

    let path = dir.path().join("open");
    fs::write(&path, [1; 32]).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let error = KeyFile::new(&path).ready().unwrap_err().to_string();
    assert!(error.contains("may be read by others (mode 644"), "{error}");

    let path = dir.path().join("short");
    fs::write(&path, [1; 16]).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let error = KeyFile::new(&path).ready().unwrap_err().to_string();
    assert!(error.contains("16 bytes instead of 32"), "{error}");
}

#[test]
fn a_registered_key_is_found_again_in_another_boot_until_it_is_destroyed() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Registry::with(dir.path(), vec![Arc::new(key_file(dir.path(), 3))]);
    let (identity, key) = (identity(), Secret::generate().unwrap());
    let (checkpoint, guest, machine) = (
        identity.checkpoint,
        identity.guest_uid.as_str(),
        identity.machine_id.as_str(),
    );
    open().register(None, &identity, &key).unwrap();

    let registry = open();
    let again = registry.log_on(checkpoint, guest, machine, "next").unwrap();
    assert_eq!(again.bytes(), key.bytes());
    let saving = registry.log_on(checkpoint, guest, machine, &identity.boot_id);
    assert!(matches!(saving, Err(CredentialError::SameBoot(_))), "{saving:?}");
    for (guest, machine) in [("other", machine), (guest, "other")] {
        let foreign = registry.log_on(checkpoint, guest, machine, "next");
        assert!(
            matches!(foreign, Err(CredentialError::Foreign { .. })),
            "{foreign:?}"
        );
    }

    registry.destroy(checkpoint).unwrap();
    registry.destroy(checkpoint).unwrap();
    let gone = registry.log_on(checkpoint, guest, machine, "next");
    assert!(matches!(gone, Err(CredentialError::Missing(_))), "{gone:?}");
}

#[test]
fn a_provider_that_the_node_does_not_have_is_refused_with_those_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let objects = Arc::new(crate::store::Store::open(dir.path()).unwrap());
    let operator = Operator::new(objects, dir.path(), "boot");
    let registry = Registry::open(dir.path(), &crate::config::Credentials::default(), operator);
    let error = registry
        .register(Some("key-file"), &identity(), &Secret::generate().unwrap())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("\"key-file\"") && error.contains("systemd-creds, operator"),
        "{error}"
    );
    assert!(!dir.path().join("credentials").exists());
}
