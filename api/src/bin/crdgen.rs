//! Writes the CRDs into `crds/`; with `--check` it only compares, and fails when they have drifted.
#![forbid(unsafe_code)]

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use understudy_api::crd::Kind;

const USAGE: &str = "usage: crdgen [--check] [DIR]   (DIR: crds/ of the repository)";

fn main() -> ExitCode {
    let mut check = false;
    let mut folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../crds"));
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--check" => check = true,
            "-h" | "--help" => {
                println!("{USAGE}");
                return ExitCode::SUCCESS;
            }
            other if other.starts_with('-') => {
                eprintln!("crdgen: unknown option {other}\n{USAGE}");
                return ExitCode::from(2);
            }
            other => folder = PathBuf::from(other),
        }
    }
    match run(&folder, check) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("crdgen: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(folder: &std::path::Path, check: bool) -> Result<bool, String> {
    let mut agrees = true;
    for kind in Kind::ALL {
        let path = folder.join(kind.file_name());
        let yaml = kind.yaml().map_err(|e| format!("{}: {e}", kind.name()))?;
        if check {
            if fs::read_to_string(&path).ok().as_deref() != Some(&yaml) {
                eprintln!("{} has drifted from the types; run crdgen", path.display());
                agrees = false;
            }
        } else {
            fs::create_dir_all(folder)
                .and_then(|()| fs::write(&path, yaml))
                .map_err(|e| format!("writing {}: {e}", path.display()))?;
            println!("{}", path.display());
        }
    }
    Ok(agrees)
}
