//! What is written is read back as an importer would: by the index, digest by digest.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::Path;

use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest, OciLayout};
use tar::Archive;

use super::*;
use crate::elf::tests::binary;
use crate::layer;

fn binaries(folder: &Path) {
    for image in Image::ALL {
        for name in image.binaries {
            let mut content = binary(1);
            content.extend_from_slice(name.as_bytes());
            fs::write(folder.join(name), content).unwrap();
        }
    }
}

fn both(folder: &Path, epoch: i64) -> Vec<u8> {
    let epoch = Timestamp::from_second(epoch).unwrap();
    let mut layout = Layout::new(epoch);
    for image in Image::ALL {
        let identity = Identity {
            reference: format!("understudy.dev/{}:1.2.3", image.name),
            version: "1.2.3".into(),
            revision: Some("5d3a".into()),
        };
        layout
            .add(image, layer::build(image, folder, epoch).unwrap(), &identity)
            .unwrap();
    }
    layout.tar().unwrap()
}

/// Path → kind, mode, owner, time and content.
type Entries = BTreeMap<String, (EntryType, u32, u64, u64, Vec<u8>)>;

fn entries(tar: &[u8]) -> Entries {
    let mut archive = Archive::new(tar);
    archive
        .entries()
        .unwrap()
        .map(|entry| {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            let header = entry.header();
            let facts = (
                header.entry_type(),
                header.mode().unwrap(),
                header.uid().unwrap() + header.gid().unwrap(),
                header.mtime().unwrap(),
                content,
            );
            (entry.path().unwrap().to_str().unwrap().to_owned(), facts)
        })
        .collect()
}

#[test]
fn the_same_binaries_give_the_same_bytes_whatever_their_times_and_modes() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    binaries(first.path());
    binaries(second.path());
    let node = second.path().join("understudy-node");
    fs::File::options()
        .write(true)
        .open(&node)
        .unwrap()
        .set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(77))
        .unwrap();
    fs::set_permissions(&node, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let one = both(first.path(), 0);
    // Maps of the types have another order in every run of them.
    for _ in 0..8 {
        assert!(one == both(second.path(), 0));
    }
    let other = both(first.path(), 1_700_000_000);
    assert!(one != other);
    assert!(
        entries(&other)
            .values()
            .all(|(_, _, _, time, _)| *time == 1_700_000_000)
    );
    fs::write(&node, binary(1)).unwrap();
    assert!(one != both(second.path(), 0));
}

#[test]
fn an_importer_finds_both_images_by_name_and_every_digest_and_size_agrees() {
    let folder = tempfile::tempdir().unwrap();
    binaries(folder.path());
    let entries = entries(&both(folder.path(), 0));
    let marker: OciLayout = serde_json::from_slice(&entries["oci-layout"].4).unwrap();
    assert_eq!(marker.image_layout_version(), "1.0.0");
    let blob = |descriptor: &Descriptor| -> Vec<u8> {
        let content = entries[&format!("blobs/sha256/{}", descriptor.digest().digest())]
            .4
            .clone();
        assert_eq!(content.len() as u64, descriptor.size());
        let digest: String = Sha256::digest(&content)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(digest, descriptor.digest().digest());
        content
    };
    let index: ImageIndex = serde_json::from_slice(&entries["index.json"].4).unwrap();
    let mut found = Vec::new();
    for described in index.manifests() {
        let names = described.annotations().clone().unwrap();
        assert_eq!(
            names["io.containerd.image.name"],
            names["org.opencontainers.image.ref.name"]
        );
        let manifest: ImageManifest = serde_json::from_slice(&blob(described)).unwrap();
        let config: ImageConfiguration = serde_json::from_slice(&blob(manifest.config())).unwrap();
        assert_eq!(config.rootfs().diff_ids().len(), manifest.layers().len());
        assert_eq!(
            config.rootfs().diff_ids()[0],
            manifest.layers()[0].digest().to_string()
        );
        let run = config.config().clone().unwrap();
        let layer = self::entries(&blob(&manifest.layers()[0]));
        let entrypoint = run.entrypoint().clone().unwrap();
        let program = &layer[entrypoint[0].trim_start_matches('/')];
        assert_eq!((program.0, program.1, program.2), (EntryType::Regular, 0o755, 0));
        let files: Vec<String> = layer
            .iter()
            .filter(|(_, entry)| entry.0 == EntryType::Regular)
            .map(|(path, _)| path.rsplit('/').next().unwrap().to_owned())
            .collect();
        found.push((
            names["io.containerd.image.name"].clone(),
            run.user().clone().unwrap(),
            files,
        ));
    }
    let expected = [
        (
            "understudy.dev/understudy-operator:1.2.3",
            "65532:65532",
            vec!["understudy"],
        ),
        (
            "understudy.dev/understudy-node:1.2.3",
            "0:0",
            vec!["understudy-node", "understudy-vmm"],
        ),
    ];
    assert_eq!(
        found,
        expected.map(|(name, user, files)| {
            (
                name.to_owned(),
                user.to_owned(),
                files.into_iter().map(str::to_owned).collect::<Vec<_>>(),
            )
        })
    );
}

#[test]
fn what_cannot_be_in_an_image_is_refused_by_name_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let build = || {
        layer::build(Image::OPERATOR, folder.path(), Timestamp::UNIX_EPOCH)
            .unwrap_err()
            .to_string()
    };
    let error = build();
    assert!(
        error.contains("understudy is missing") && error.contains("make image"),
        "{error}"
    );
    fs::write(folder.path().join("understudy"), binary(3)).unwrap();
    let error = build();
    assert!(
        error.contains("dynamic loader") && error.contains("crt-static"),
        "{error}"
    );
}
