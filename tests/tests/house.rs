//! The rules of the house: who may depend on whom, where `unsafe` may stand, how long a file may be, and
//! a test behind each promise that `tests/PROMISES.md` says is reached.

#![allow(clippy::expect_used)] // Helpers of tests: a failed expectation is a failed test.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ lies in the workspace")
        .to_path_buf()
}

/// The packages of the workspace, with the packages of the workspace that each depends on.
fn packages() -> BTreeMap<String, (PathBuf, Vec<String>, Vec<String>)> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let text = |value: &serde_json::Value| value.as_str().expect("a string").to_owned();
    metadata["packages"]
        .as_array()
        .expect("a list of packages")
        .iter()
        .map(|package| {
            let mut ours = Vec::new();
            let mut others = Vec::new();
            for dependency in package["dependencies"].as_array().expect("a list") {
                if dependency["kind"] == "dev" {
                    continue;
                }
                let list = if dependency["path"].is_string() {
                    &mut ours
                } else {
                    &mut others
                };
                list.push(text(&dependency["name"]));
            }
            let manifest = PathBuf::from(text(&package["manifest_path"]));
            let folder = manifest.parent().expect("a folder").to_path_buf();
            (text(&package["name"]), (folder, ours, others))
        })
        .collect()
}

/// Rust files of a package, those of packages nested in its folder left out.
fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).expect("a readable folder") {
            let path = entry.expect("a readable entry").path();
            if path.is_dir() {
                if !path.join("Cargo.toml").exists() && path.file_name().is_some_and(|n| n != "target") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path);
            }
        }
    }
    files
}

#[test]
fn dependencies_point_downwards_only() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("understudy", &["understudy-api", "understudy-sealing"][..]),
        ("understudy-api", &[][..]),
        ("understudy-channel", &[][..]),
        ("understudy-image", &[][..]),
        ("understudy-sealing", &[][..]),
        ("understudy-vmm-control", &[][..]),
        ("understudy-checkpoint", &["understudy-vmm-control"][..]),
        (
            "understudy-vmm",
            &["understudy-checkpoint", "understudy-vmm-control"][..],
        ),
        ("understudy-guest", &["understudy-channel"][..]),
        (
            "understudy-node",
            &[
                "understudy-api",
                "understudy-channel",
                "understudy-sealing",
                "understudy-vmm-control",
            ][..],
        ),
    ]);
    for (name, (_, ours, _)) in packages() {
        if name == "understudy-tests" {
            continue;
        }
        let may = allowed
            .get(name.as_str())
            .unwrap_or_else(|| panic!("{name} has no rule: add one here"));
        for dependency in ours {
            assert!(
                may.contains(&dependency.as_str()),
                "{name} may not depend on {dependency}"
            );
        }
    }
}

#[test]
fn no_kubernetes_type_reaches_vmm_channel_or_guest_agent() {
    for (name, (_, _, others)) in packages() {
        if [
            "understudy-vmm",
            "understudy-checkpoint",
            "understudy-vmm-control",
            "understudy-channel",
            "understudy-guest",
        ]
        .contains(&name.as_str())
        {
            for dependency in others {
                let kubernetes = dependency.starts_with("kube") || dependency.starts_with("k8s");
                assert!(!kubernetes, "{name} may not depend on {dependency}");
            }
        }
    }
}

#[test]
fn the_vmm_alone_reads_and_writes_checkpoints() {
    for (name, (_, ours, _)) in packages() {
        assert!(
            name == "understudy-vmm" || !ours.iter().any(|other| other == "understudy-checkpoint"),
            "{name} may not depend on understudy-checkpoint"
        );
    }
}

#[test]
fn unsafe_stands_in_vmm_and_guest_agent_only() {
    for (name, (folder, _, _)) in packages() {
        if ["understudy-vmm", "understudy-guest"].contains(&name.as_str()) {
            continue;
        }
        let roots: Vec<PathBuf> = rust_files(&folder)
            .into_iter()
            .filter(|file| {
                let inside = file.strip_prefix(&folder).expect("inside its package");
                inside == Path::new("src/lib.rs")
                    || inside == Path::new("src/main.rs")
                    || inside.parent() == Some(Path::new("src/bin"))
            })
            .collect();
        assert!(!roots.is_empty(), "{name} has no root file");
        for file in roots {
            let text = fs::read_to_string(&file).expect("readable");
            assert!(
                text.contains("#![forbid(unsafe_code)]"),
                "{} does not forbid unsafe code",
                file.display()
            );
        }
    }
}

#[test]
fn a_file_is_read_in_one_sitting() {
    const LONGEST: usize = 900;
    for (_, (folder, _, _)) in packages() {
        for file in rust_files(&folder) {
            let lines = fs::read_to_string(&file).expect("readable").lines().count();
            assert!(
                lines <= LONGEST,
                "{} has {lines} lines: it has two subjects, split it",
                file.display()
            );
        }
    }
}

#[test]
fn the_engines_know_no_kubernetes_client_no_process_and_no_socket() {
    let engines = ["node-agent/src/handover", "node-agent/src/host_update"];
    for file in engines.iter().flat_map(|engine| rust_files(&root().join(engine))) {
        let text = fs::read_to_string(&file).expect("readable");
        for word in [
            "kube::",
            "process::Command",
            "std::net",
            "unix::net",
            "control::client",
            "crate::store",
        ] {
            assert!(!text.contains(word), "{} knows {word}", file.display());
        }
    }
}

#[test]
fn each_promise_that_is_reached_names_tests_that_exist() {
    let promises = fs::read_to_string(root().join("tests/PROMISES.md")).expect("tests/PROMISES.md");
    let mut sources = String::new();
    for (_, (folder, _, _)) in packages() {
        for file in rust_files(&folder) {
            sources.push_str(&fs::read_to_string(&file).expect("readable"));
        }
    }
    let mut rows = 0;
    for line in promises
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| ---"))
    {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        if cells[0].parse::<u32>().is_err() {
            continue;
        }
        rows += 1;
        let tests: Vec<&str> = cells[2].split('`').skip(1).step_by(2).collect();
        assert!(
            !tests.is_empty() || cells[2].starts_with("not reached"),
            "promise {} names no test and does not say that it is not reached",
            cells[0]
        );
        for test in tests {
            let function = test.rsplit("::").next().unwrap_or(test);
            assert!(
                sources.contains(&format!("fn {function}(")),
                "promise {}: no test {test}",
                cells[0]
            );
        }
    }
    assert_eq!(rows, 8, "DESIGN has eight promises");
}

#[test]
fn nothing_binary_is_in_git() {
    let output = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root())
        .output()
        .expect("git ls-files runs");
    if !output.status.success() {
        // A source archive has no repository to look at.
        return;
    }
    for name in String::from_utf8_lossy(&output.stdout)
        .split('\0')
        .filter(|name| !name.is_empty())
    {
        let Ok(content) = fs::read(root().join(name)) else {
            continue;
        };
        assert!(
            !content.iter().take(8192).any(|byte| *byte == 0),
            "{name} is a binary file"
        );
    }
}
