//! What is generated in the chart's folder: the copies of the CRDs (Helm reads nothing outside of it), the values'
//! schema, and the table of values in its README. Pure functions; `make chart` writes, and a test compares.

pub mod audit;
pub mod install;
pub mod values;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The chart, from the root of the repository.
pub const FOLDER: &str = "charts/understudy";
/// Between these two lines of the README stands the table.
const BEGIN: &str = "<!-- values: written by `make chart` -->";
const END: &str = "<!-- end of values -->";

/// Every generated file beneath `root`, with the content that it should have.
pub fn generated(root: &Path) -> Result<Vec<(PathBuf, String)>> {
    let chart = root.join(FOLDER);
    let mut files = Vec::new();
    for entry in fs::read_dir(root.join("crds")).context("reading crds/")? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            let name = path.file_name().context("a file without a name in crds/")?;
            files.push((chart.join("files/crds").join(name), read(&path)?));
        }
    }
    let values = values::read(&read(&chart.join("values.yaml"))?).context("values.yaml")?;
    let schema = serde_json::to_string_pretty(&values::schema(&values))?;
    files.push((chart.join("values.schema.json"), schema + "\n"));
    let readme = chart.join("README.md");
    files.push((
        readme.clone(),
        with_table(&read(&readme)?, &values::table(&values))?,
    ));
    files.sort();
    Ok(files)
}

/// Files in the chart's folder of CRDs that have none in `crds/`.
pub fn left_over(root: &Path) -> Result<Vec<PathBuf>> {
    let mut left = Vec::new();
    let copies = root.join(FOLDER).join("files/crds");
    for entry in fs::read_dir(&copies).with_context(|| copies.display().to_string())? {
        let entry = entry?;
        if !root.join("crds").join(entry.file_name()).exists() {
            left.push(entry.path());
        }
    }
    Ok(left)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

fn with_table(readme: &str, table: &str) -> Result<String> {
    let parts = readme
        .split_once(BEGIN)
        .and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let Some((before, after)) = parts else {
        bail!("README.md has no lines {BEGIN} and {END} for the table of values");
    };
    Ok(format!("{before}{BEGIN}\n\n{table}\n{END}{after}"))
}
