//! Writes what is generated in the chart's folder: `make chart`.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use understudy_tests::chart;

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for (path, content) in chart::generated(&root)? {
        if fs::read_to_string(&path).is_ok_and(|there| there == content) {
            continue;
        }
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        println!("{} written", path.display());
    }
    for path in chart::left_over(&root)? {
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        println!("{} removed", path.display());
    }
    Ok(())
}
