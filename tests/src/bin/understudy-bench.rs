//! `make bench`: what it costs, measured in one run.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use understudy_tests::bed::{Stage, repository};
use understudy_tests::bench::sessions::{self, Given};
use understudy_tests::bench::{self, operator, split};
use understudy_tests::demo::Chosen;

/// Measures interruption, disk split, freeze, memory and sessions in one run, each beside what it is compared with.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Use the node VM of this name even where this machine's KVM would do.
    #[arg(long)]
    node: Option<String>,
    /// Where the findings are written as JSON; without it, a new file in target/bench.
    #[arg(long)]
    json: Option<PathBuf>,
    /// How often splits and bare freezes are repeated.
    #[arg(long, global = true, default_value_t = 25, value_parser = clap::value_parser!(u16).range(9..=1000))]
    repetitions: u16,
    #[command(subcommand)]
    only: Option<Only>,
}

#[derive(Subcommand)]
enum Only {
    /// Measure the disk splits alone, on this machine, and print them as JSON.
    Splits {
        /// Where the sparse disks are made.
        #[arg(long)]
        dir: Option<PathBuf>,
    },
    /// Measure sessions alone, on this machine, and print them as JSON.
    Sessions {
        /// Where disks and sessions are made.
        #[arg(long)]
        dir: PathBuf,
        /// A directory with QEMU, its libraries in lib and its firmware in firmware.
        #[arg(long)]
        qemu: PathBuf,
        /// Root disk of a guest.
        #[arg(long)]
        image: PathBuf,
    },
    /// Measure the operator with a large cluster alone, and print its figures.
    Operator,
    /// Print the table of an earlier run again.
    Show {
        /// What that run wrote.
        json: PathBuf,
    },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let binaries = Stage::binaries()?;
    match arguments.only {
        Some(Only::Splits { dir }) => {
            let dir = dir.unwrap_or_else(|| repository().join("target/bench"));
            let vmm = binaries.join("understudy-vmm");
            let splits = split::measure(&vmm, &dir, arguments.repetitions.into())?;
            println!("{}", serde_json::to_string_pretty(&splits)?);
            return Ok(());
        }
        Some(Only::Sessions { dir, qemu, image }) => {
            let given = Given {
                vmm: &binaries.join("understudy-vmm"),
                qemu: &qemu,
                image: &image,
            };
            println!(
                "{}",
                serde_json::to_string_pretty(&sessions::measure(&given, &dir)?)?
            );
            return Ok(());
        }
        Some(Only::Operator) => {
            let figures = operator::measure(&repository().join("target/bench/operator"))?;
            print!("{}", figures.table());
            return Ok(());
        }
        Some(Only::Show { json }) => {
            let text = std::fs::read(&json).with_context(|| format!("cannot read {}", json.display()))?;
            let findings: bench::Findings = serde_json::from_slice(&text)
                .with_context(|| format!("{} is not what a bench wrote", json.display()))?;
            print!("{}", findings.table());
            return Ok(());
        }
        None => {}
    }
    let dir = repository().join("target/bench");
    let mut chosen = Chosen::new(arguments.node.as_deref(), &binaries)?;
    let findings = bench::run(&mut chosen, arguments.repetitions.into(), &dir.join("logs"))?;
    let json = arguments.json.unwrap_or_else(|| {
        let when = findings.date.replace([' ', ':'], "-");
        dir.join(format!("{when}-{}.json", findings.commit))
    });
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    std::fs::write(&json, serde_json::to_vec_pretty(&findings)?)
        .with_context(|| format!("cannot write {}", json.display()))?;
    println!("\n{}\n  also as JSON: {}", findings.table(), json.display());
    Ok(())
}
