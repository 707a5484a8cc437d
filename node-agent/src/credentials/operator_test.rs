use std::os::unix::fs::MetadataExt;

use serde_json::json;
use understudy_api::node_update::{CredentialRefusal, CredentialRelease};
use uuid::Uuid;

use super::*;
use crate::cluster::Cluster;
use crate::store::{Mirrored, Store};
use crate::testing::access;

/// A node of a cluster, and the operator beyond it.
struct Bed {
    dir: tempfile::TempDir,
    run_dir: tempfile::TempDir,
    cluster: Arc<Cluster>,
    credential: PrivateKey,
}

const NAME: &str = "kernel-1";
const MACHINE: &str = "0123456789abcdef0123456789abcdef";

impl Bed {
    fn new() -> Bed {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let bed = Bed {
            cluster: Arc::new(Cluster::open(store, dir.path(), &access()).unwrap()),
            run_dir: tempfile::tempdir_in("/dev/shm").unwrap(),
            dir,
            credential: PrivateKey::generate().unwrap(),
        };
        let public_key = bed.credential.public().to_string();
        bed.put(Some(json!({"publicKey": public_key})));
        bed
    }

    /// A NodeUpdate as the operator has left it.
    fn put(&self, credential: Option<serde_json::Value>) {
        let update: NodeUpdate = serde_json::from_value(json!({
            "apiVersion": "understudy.dev/v1alpha1", "kind": "NodeUpdate", "metadata": {"name": NAME, "uid": "update-uid"},
            "spec": {"nodeName": "alpha", "origin": "HostUpdate", "sessions": {"credentialProvider": "operator"}},
            "status": {"nodeUID": "node-uid", "credential": credential},
        }))
        .unwrap();
        let mirrored = Mirrored::Object(Box::new(update.clone()));
        let store = self.cluster.store();
        store.mirror::<NodeUpdate>(&update.key(), |_| mirrored).unwrap();
    }

    /// The provider of an agent that is started in this boot.
    fn provider(&self, boot: &str) -> Operator {
        Operator::new(self.cluster.clone(), self.run_dir.path(), boot)
    }

    fn change(&self, change: impl FnOnce(&mut Credential, &CredentialRequest)) {
        let mut change = Some(change);
        self.cluster
            .report_node_update(NAME, "update-uid", true, &mut |status| {
                let request = status.credential_request.clone().expect("a request");
                if let Some(change) = change.take() {
                    change(status.credential.as_mut().unwrap(), &request);
                }
            })
            .unwrap();
    }

    /// The operator releases the credential, bound to this.
    fn release(&self, binding: impl FnOnce(&CredentialRequest) -> Binding) {
        self.change(|credential, request| {
            let public_key: PublicKey = request.public_key.parse().unwrap();
            credential.release = Some(CredentialRelease {
                boot_id: request.boot_id.clone(),
                public_key: request.public_key.clone(),
                sealed_credential: public_key
                    .seal(self.credential.bytes(), &binding(request))
                    .unwrap(),
                count: 1,
            });
        });
    }

    fn request(&self) -> CredentialRequest {
        let update = self.cluster.node_update(NAME).unwrap().unwrap();
        update.status.unwrap().credential_request.expect("a request")
    }
}

fn meant(request: &CredentialRequest) -> Binding {
    Binding::release("update-uid", "node-uid", MACHINE, &request.boot_id)
}

fn identity() -> Identity {
    Identity {
        guest_uid: Uuid::new_v4().to_string(),
        machine_id: MACHINE.into(),
        boot_id: "saving".into(),
        checkpoint: Uuid::new_v4(),
        node_update: NAME.into(),
    }
}

#[test]
fn a_key_is_given_back_when_the_operator_has_released_the_credential_to_this_boot() {
    let bed = Bed::new();
    let (identity, key) = (identity(), Secret::generate().unwrap());
    let saving = bed.provider("saving");
    saving.ready().unwrap();
    saving.ready_for(NAME).unwrap();
    let wrapped = saving.wrap(&identity, &key).unwrap();
    assert!(
        !bed.run_dir.path().join("requests").exists(),
        "nothing secret is made before the reboot"
    );

    let awaited = bed.provider("next").unwrap(&identity, &wrapped);
    assert!(
        matches!(awaited, Err(CredentialError::Awaited { .. })),
        "{awaited:?}"
    );
    let request = bed.request();
    assert_eq!(request.boot_id, "next");
    // An agent that is started anew asks the same.
    assert!(bed.provider("next").unwrap(&identity, &wrapped).is_err());
    assert_eq!(bed.request(), request);
    bed.release(meant);
    for _ in 0..2 {
        let given = bed.provider("next").unwrap(&identity, &wrapped).unwrap();
        assert_eq!(given.bytes(), key.bytes());
    }
    let others = [
        Identity {
            guest_uid: "another".into(),
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
        let refused = bed.provider("next").unwrap(&other, &wrapped);
        assert!(
            matches!(refused, Err(CredentialError::Refused { .. })),
            "{refused:?} for {other:?}"
        );
    }
}

#[test]
fn what_was_released_for_another_node_machine_boot_or_update_is_not_opened() {
    for binding in [
        |request: &CredentialRequest| Binding::release("another", "node-uid", MACHINE, &request.boot_id),
        |request: &CredentialRequest| Binding::release("update-uid", "another", MACHINE, &request.boot_id),
        |request: &CredentialRequest| Binding::release("update-uid", "node-uid", "another", &request.boot_id),
        |_: &CredentialRequest| Binding::release("update-uid", "node-uid", MACHINE, "another"),
    ] {
        let bed = Bed::new();
        let (identity, provider) = (identity(), bed.provider("next"));
        let wrapped = provider.wrap(&identity, &Secret::generate().unwrap()).unwrap();
        assert!(provider.unwrap(&identity, &wrapped).is_err());
        bed.release(binding);
        let refused = provider.unwrap(&identity, &wrapped);
        assert!(
            matches!(refused, Err(CredentialError::Refused { .. })),
            "{refused:?}"
        );
    }
}

#[test]
fn what_was_released_in_a_boot_before_is_asked_for_anew() {
    let bed = Bed::new();
    let (identity, key) = (identity(), Secret::generate().unwrap());
    let wrapped = bed.provider("saving").wrap(&identity, &key).unwrap();
    assert!(bed.provider("first").unwrap(&identity, &wrapped).is_err());
    bed.release(meant);
    // What is in memory ends with the boot.
    fs::remove_dir_all(bed.run_dir.path().join("requests")).unwrap();
    let awaited = bed.provider("second").unwrap(&identity, &wrapped);
    assert!(
        matches!(awaited, Err(CredentialError::Awaited { .. })),
        "{awaited:?}"
    );
    assert_eq!(bed.request().boot_id, "second");
    bed.release(meant);
    let given = bed.provider("second").unwrap(&identity, &wrapped).unwrap();
    assert_eq!(given.bytes(), key.bytes());
}

#[test]
fn a_refusal_is_told_in_the_operators_words_and_the_next_try_asks_by_another_key() {
    let bed = Bed::new();
    let (identity, provider) = (identity(), bed.provider("next"));
    let wrapped = provider.wrap(&identity, &Secret::generate().unwrap()).unwrap();
    assert!(provider.unwrap(&identity, &wrapped).is_err());
    let first = bed.request();
    bed.change(|credential, request| {
        credential.refusal = Some(CredentialRefusal {
            boot_id: request.boot_id.clone(),
            public_key: request.public_key.clone(),
            message: "it was released to another key".into(),
        });
    });
    let refused = provider.unwrap(&identity, &wrapped).unwrap_err();
    assert!(
        matches!(&refused, CredentialError::Refused { why, .. } if why.contains("another key")),
        "{refused}"
    );
    let awaited = provider.unwrap(&identity, &wrapped);
    assert!(
        matches!(awaited, Err(CredentialError::Awaited { .. })),
        "{awaited:?}"
    );
    assert_ne!(bed.request().public_key, first.public_key);
}

#[test]
fn the_key_of_a_request_is_for_root_alone_in_memory_and_goes_with_the_update() {
    let bed = Bed::new();
    let (identity, provider) = (identity(), bed.provider("next"));
    let wrapped = provider.wrap(&identity, &Secret::generate().unwrap()).unwrap();
    assert!(provider.unwrap(&identity, &wrapped).is_err());
    let path = bed.run_dir.path().join("requests/update-uid");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    assert_eq!(
        fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777,
        0o700
    );
    provider.forget("update-uid");
    provider.forget("update-uid");
    assert!(!path.exists());

    // The sources lie on a disk, wherever temporary files are.
    let on_disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    if check_memory_only(on_disk.path()).is_ok() {
        eprintln!("skipped: the sources lie on a tmpfs");
        return;
    }
    let provider = Operator::new(bed.cluster.clone(), on_disk.path(), "next");
    let refused = provider.unwrap(&identity, &wrapped);
    assert!(
        matches!(refused, Err(CredentialError::NotInMemory { .. })),
        "{refused:?}"
    );
}

#[test]
fn it_says_what_it_lacks_before_any_guest_is_paused() {
    let bed = Bed::new();
    bed.put(None);
    let provider = bed.provider("saving");
    let error = provider.ready_for(NAME).unwrap_err().to_string();
    assert!(
        error.contains("has made no credential for NodeUpdate kernel-1"),
        "{error}"
    );
    assert!(provider.wrap(&identity(), &Secret::generate().unwrap()).is_err());

    fs::write(
        bed.dir.path().join("cluster/link.json"),
        r#"{"server": "https://api", "connected": false, "message": "no route"}"#,
    )
    .unwrap();
    let error = provider.ready().unwrap_err().to_string();
    assert!(error.contains("https://api does not answer: no route"), "{error}");
    let waits = bed.provider("next").unwrap(&identity(), "{").unwrap_err();
    assert!(matches!(waits, CredentialError::Refused { .. }), "{waits}");

    let alone = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(alone.path()).unwrap());
    let error = Operator::new(store, alone.path(), "boot")
        .ready()
        .unwrap_err()
        .to_string();
    assert!(error.contains("needs a cluster"), "{error}");
}

#[test]
fn an_api_server_that_is_away_is_waited_for_and_named() {
    let bed = Bed::new();
    let (identity, provider) = (identity(), bed.provider("next"));
    let wrapped = provider.wrap(&identity, &Secret::generate().unwrap()).unwrap();
    fs::create_dir_all(bed.dir.path().join("cluster")).unwrap();
    fs::write(
        bed.dir.path().join("cluster/link.json"),
        r#"{"server": "https://api", "connected": false, "message": "no route"}"#,
    )
    .unwrap();
    let waits = provider.unwrap(&identity, &wrapped).unwrap_err();
    assert!(
        matches!(&waits, CredentialError::Awaited { why, .. } if why.contains("no route")),
        "{waits}"
    );
}
