//! The example repositories hold together: what they declare is valid, and what they name is there.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use understudy_api::API_VERSION;
use understudy_api::crd::Kind;
use understudy_api::validation::validate;

/// Every YAML file beneath the examples, with its content.
fn manifests() -> Vec<(PathBuf, Value)> {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/gitops")];
    let mut manifests = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a readable folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "yaml") {
                let text = fs::read_to_string(&path).expect("readable");
                let object = serde_saphyr::from_str(&text)
                    .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                manifests.push((path, object));
            }
        }
    }
    manifests
}

#[test]
fn every_object_of_ours_is_valid_and_each_kind_that_belongs_into_git_is_shown() {
    let mut shown = Vec::new();
    for (path, object) in manifests() {
        if object["apiVersion"] != API_VERSION {
            continue;
        }
        let kind = Kind::from_name(object["kind"].as_str().unwrap()).expect("a kind of ours");
        let errors = validate(kind, &object);
        assert!(errors.is_empty(), "{}: {errors:?}", path.display());
        assert!(
            object["spec"]["action"].is_null(),
            "{}: an action is not kept in Git",
            path.display()
        );
        assert!(
            object["spec"]["ttlSecondsAfterFinished"].is_null(),
            "{}: what it deletes, Git makes again",
            path.display()
        );
        shown.push(kind.name());
    }
    shown.sort_unstable();
    shown.dedup();
    assert_eq!(shown, ["Guest", "HostUpdate", "SeamlessReboot"]);
}

#[test]
fn what_kustomizations_and_applications_name_is_there() {
    for (path, object) in manifests() {
        let folder = path.parent().expect("a folder");
        for list in ["resources", "components"] {
            for name in object[list].as_array().into_iter().flatten() {
                let target = folder.join(name.as_str().unwrap());
                assert!(target.exists(), "{}: no {}", path.display(), target.display());
            }
        }
        // Paths within the repository that the layout stands for.
        let layout = folder
            .ancestors()
            .find(|folder| folder.parent().is_some_and(|up| up.ends_with("gitops")));
        let within = object["spec"]["path"]
            .as_str()
            .or(object["spec"]["source"]["path"].as_str());
        if let (Some(layout), Some(within)) = (layout, within) {
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
            assert!(
                layout.join(within).is_dir() || root.join(within).is_dir(),
                "{}: no folder {within}",
                path.display()
            );
        }
    }
}
