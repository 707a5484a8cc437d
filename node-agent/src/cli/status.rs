//! `understudy-node status`.

use std::error::Error;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use clap::{Args, ValueEnum};
use jiff::Timestamp;

use super::list::{List, Selection};
use super::{Kind, kind, render};
use crate::config::Config;

/// How often a watched status is looked at.
const LOOK: Duration = Duration::from_millis(250);

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// guest, reboot, hostupdate, nodeupdate or host; all where absent
    #[arg(value_parser = kind)]
    kind: Option<Kind>,
    /// Name of one object
    name: Option<String>,
    /// Namespace; all where absent
    #[arg(long, short)]
    namespace: Option<String>,
    /// Output format
    #[arg(long, short, value_enum)]
    output: Option<Output>,
    /// Show changes as they come, with progress
    #[arg(long, short)]
    watch: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// All columns
    Wide,
    /// A List of objects; one object where it was named
    Json,
    /// The same as YAML
    Yaml,
}

/// The object that was named is not there.
#[derive(Debug, thiserror::Error)]
#[error("{kind} {name:?} not found")]
struct NotFound {
    kind: &'static str,
    name: String,
}

pub(super) fn run(config: &Config, arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let selection = Selection {
        namespace: arguments.namespace.clone(),
        kind: arguments.kind,
        name: arguments.name.clone(),
    };
    let mut shown = String::new();
    let terminal = io::stdout().is_terminal();
    loop {
        let list = List::read(config, &selection)?;
        if let (Some(kind), Some(name)) = (arguments.kind, &arguments.name)
            && list.only().is_none()
            && !arguments.watch
        {
            return Err(Box::new(NotFound {
                kind: kind.singular(),
                name: name.clone(),
            }));
        }
        let text = format(&list, arguments)?;
        if !arguments.watch {
            write(&text)?;
            return Ok(());
        }
        if text != shown {
            // On a terminal the picture is drawn anew; elsewhere each picture follows the one before.
            let clear = if terminal { "\x1b[H\x1b[2J" } else { "" };
            write(&format!("{clear}{text}{}", if terminal { "" } else { "\n" }))?;
            shown = text;
        }
        std::thread::sleep(LOOK);
    }
}

fn format(list: &List, arguments: &Arguments) -> Result<String, Box<dyn Error>> {
    let value = match &arguments.name {
        Some(_) => list.only().unwrap_or_else(|| list.to_json()),
        None => list.to_json(),
    };
    Ok(match arguments.output {
        None => render::tables(list, false, Timestamp::now()),
        Some(Output::Wide) => render::tables(list, true, Timestamp::now()),
        Some(Output::Json) => serde_json::to_string_pretty(&value)? + "\n",
        Some(Output::Yaml) => serde_saphyr::to_string(&value)?,
    })
}

/// A reader that went away (`| head`) is no error.
fn write(text: &str) -> io::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result,
    }
}
