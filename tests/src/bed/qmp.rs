//! QEMU's machine protocol: one JSON object a line, over a unix socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// A connection to a QEMU process. QEMU serves one at a time.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    /// Connects and leaves the negotiation mode.
    pub fn connect(socket: &Path) -> Result<Self> {
        let writer =
            UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
        writer.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut qmp = Self {
            reader: BufReader::new(writer.try_clone()?),
            writer,
        };
        qmp.read().context("QEMU did not greet")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns its result; events that come in between are dropped.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.writer, "{line}").with_context(|| format!("cannot send {command} to QEMU"))?;
        loop {
            let mut answer = self
                .read()
                .with_context(|| format!("no answer to {command} from QEMU"))?;
            if let Some(error) = answer.get("error") {
                bail!(
                    "QEMU refused {line}: {}",
                    error
                        .get("desc")
                        .and_then(Value::as_str)
                        .unwrap_or("no reason given")
                );
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Waits for an event of this name.
    pub fn event(&mut self, name: &str) -> Result<Value> {
        loop {
            let message = self
                .read()
                .with_context(|| format!("no event {name} from QEMU"))?;
            if message.get("event").and_then(Value::as_str) == Some(name) {
                return Ok(message);
            }
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU closed the connection");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
