use std::os::unix::fs::symlink;

use understudy_api::manifest::{Manifest, parse};

use super::*;
use crate::config::NamespacePolicy;

struct Bed {
    dir: tempfile::TempDir,
    config: Config,
}

fn bed() -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let disks = dir.path().join("disks");
    for namespace in ["default", "other"] {
        fs::create_dir_all(disks.join(namespace)).unwrap();
        fs::write(disks.join(namespace).join("web.img"), [0u8; 512]).unwrap();
    }
    let config = Config {
        disks_dir: disks,
        ..Config::default()
    };
    Bed { dir, config }
}

impl Bed {
    fn try_it(&self, change: impl FnOnce(&mut Guest)) -> Result<Resolved, String> {
        let text = "apiVersion: understudy.dev/v1alpha1\nkind: Guest\nmetadata: {name: web}\nspec:\n  memory: 512Mi\n  disks: [{name: root, role: Root, source: web.img}]\n";
        let Manifest::Guest(mut guest) = parse(text).unwrap().remove(0).unwrap() else {
            unreachable!()
        };
        guest.metadata.uid = Some("uid".into());
        change(&mut guest);
        resolve(&self.config, &guest, 2, 3000).map_err(|error| error.to_string())
    }

    fn refused(&self, change: impl FnOnce(&mut Guest), parts: &[&str]) {
        let error = self.try_it(change).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    }
}

#[test]
fn a_source_is_a_name_beneath_the_namespaces_own_directory() {
    let bed = bed();
    let resolved = bed.try_it(|_| {}).unwrap();
    assert!(resolved.root().source.ends_with("default/web.img"));
    assert!(resolved.state_dir().ends_with("default/web.img.understudy"));
    assert_eq!(resolved.uuid, bed.try_it(|_| {}).unwrap().uuid);
}

#[test]
fn a_missing_disk_is_named_with_field_and_path() {
    bed().refused(
        |guest| guest.spec.disks[0].source = "nosuch.img".into(),
        &["spec.disks[0].source", "default/nosuch.img", "put the file there"],
    );
}

#[test]
fn a_missing_kernel_is_named_with_field_and_path() {
    bed().refused(
        |guest| {
            guest.spec.boot.from_disk = None;
            guest.spec.boot.kernel = Some("vmlinuz".into());
        },
        &["spec.boot.kernel", "default/vmlinuz"],
    );
}

#[test]
fn no_namespace_names_the_file_of_another() {
    let bed = bed();
    for source in ["../other/web.img", "a/../../other/web.img"] {
        bed.refused(
            |guest| guest.spec.disks[0].source = source.into(),
            &["must not lead out of"],
        );
    }
    let disks = bed.config.disks_dir.clone();
    symlink(disks.join("other/web.img"), disks.join("default/link.img")).unwrap();
    bed.refused(
        |guest| guest.spec.disks[0].source = "link.img".into(),
        &["namespaces.default.paths", "outside of"],
    );
    let other = disks.join("other/web.img").display().to_string();
    bed.refused(
        |guest| guest.spec.disks[0].source = other.clone(),
        &["namespaces.default.paths"],
    );
}

#[test]
fn another_path_is_allowed_by_the_setting_that_the_error_names() {
    let mut bed = bed();
    let path = bed.dir.path().join("elsewhere.img");
    fs::write(&path, [0u8; 1024]).unwrap();
    let source = path.display().to_string();
    bed.refused(
        |guest| guest.spec.disks[0].source = source.clone(),
        &["namespaces.default.paths"],
    );
    let policy = NamespacePolicy {
        paths: vec![bed.dir.path().to_owned()],
        ..NamespacePolicy::default()
    };
    bed.config.namespaces.insert("default".into(), policy);
    bed.try_it(|guest| guest.spec.disks[0].source = source.clone())
        .unwrap();
}

#[test]
fn a_bridge_is_denied_by_default_with_the_setting_that_allows_it() {
    let mut bed = bed();
    let add = |guest: &mut Guest| {
        guest.spec.networks.push(understudy_api::guest::Network {
            bridge: "br0".into(),
            mac: None,
        });
    };
    bed.refused(
        add,
        &["spec.networks[0].bridge", "\"br0\"", "namespaces.default.bridges"],
    );
    let policy = NamespacePolicy {
        bridges: vec!["br0".into()],
        ..NamespacePolicy::default()
    };
    bed.config.namespaces.insert("default".into(), policy);
    let resolved = bed.try_it(add).unwrap();
    assert_eq!(resolved.networks[0].tap, tap_name("uid", 0));
}

#[test]
fn what_the_host_does_not_have_is_refused_with_how_much_it_has() {
    let bed = bed();
    bed.refused(
        |guest| guest.spec.cpus = 3,
        &["spec.cpus", "3 asked for", "has 2"],
    );
    bed.refused(
        |guest| guest.spec.memory = "4Gi".into(),
        &["spec.memory", "4096Mi asked for", "3000Mi"],
    );
}

#[test]
fn what_is_no_raw_image_is_refused() {
    let bed = bed();
    fs::write(bed.config.disks_dir.join("default/odd.img"), [0u8; 100]).unwrap();
    bed.refused(
        |guest| guest.spec.disks[0].source = "odd.img".into(),
        &["100 bytes"],
    );
    fs::create_dir(bed.config.disks_dir.join("default/dir")).unwrap();
    bed.refused(
        |guest| guest.spec.disks[0].source = "dir".into(),
        &["not a regular file"],
    );
}
