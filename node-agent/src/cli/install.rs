//! `understudy-node install`: the systemd unit, the directories it needs, and an example configuration.

use std::error::Error;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;

use crate::agent::UNIT;
use crate::config::Config;
use crate::durable;

/// What logind reads after all others' drop-ins: a kubelet writes `99-kubelet.conf`.
const LOGIND_DROP_IN: &str = "zz-understudy.conf";
/// What the agent's stop takes beside saving sessions: a guest that is held is taken through its cutover.
const STOP_BESIDE: u64 = 120;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Where units go
    #[arg(long, value_name = "DIR", default_value = "/etc/systemd/system")]
    unit_dir: PathBuf,
    /// Where logind's drop-ins go
    #[arg(long, value_name = "DIR", default_value = "/etc/systemd/logind.conf.d")]
    logind_dir: PathBuf,
    /// Path of the agent's binary in the unit, instead of that of this program
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Write files only; do not tell systemd
    #[arg(long)]
    no_reload: bool,
}

/// Why the agent is not installed.
#[derive(Debug, thiserror::Error)]
enum InstallError {
    #[error("{action} {path}: {source}; are you root?")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("`systemctl {arguments}` failed: {message}")]
    Systemctl { arguments: String, message: String },
}

pub(super) fn run(config: &Config, file: &Path, arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let program = match &arguments.program {
        Some(program) => program.clone(),
        None => std::env::current_exe().map_err(|source| InstallError::Io {
            action: "finding",
            path: "/proc/self/exe".into(),
            source,
        })?,
    };
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source| InstallError::Io { action, path, source }
    };
    for directory in [&config.state_dir, &config.manifests_dir, &config.disks_dir] {
        fs::create_dir_all(directory).map_err(failed("creating", directory))?;
    }
    if !file.exists() {
        if let Some(directory) = file.parent() {
            fs::create_dir_all(directory).map_err(failed("creating", directory))?;
        }
        durable::replace(file, EXAMPLE.as_bytes())?;
        println!("{} written", file.display());
    }
    fs::create_dir_all(&arguments.unit_dir).map_err(failed("creating", &arguments.unit_dir))?;
    let unit = arguments.unit_dir.join(UNIT);
    durable::replace(
        &unit,
        unit_text(&program, file, config.host.save_timeout_seconds).as_bytes(),
    )?;
    println!("{} written", unit.display());
    fs::create_dir_all(&arguments.logind_dir).map_err(failed("creating", &arguments.logind_dir))?;
    let drop_in = arguments.logind_dir.join(LOGIND_DROP_IN);
    durable::replace(&drop_in, logind_text(config.host.save_timeout_seconds).as_bytes())?;
    println!("{} written", drop_in.display());
    if arguments.no_reload {
        return Ok(());
    }
    systemctl(&["daemon-reload"])?;
    // logind reads its configuration again at SIGHUP; a restart would cost more than that.
    if let Err(error) = systemctl(&["kill", "--signal=HUP", "systemd-logind.service"]) {
        println!("logind was not told ({error}): its new delay counts from the next boot");
    }
    systemctl(&["enable", "--quiet", UNIT])?;
    println!("{UNIT} enabled; start it by: systemctl start {UNIT}");
    Ok(())
}

fn systemctl(arguments: &[&str]) -> Result<(), InstallError> {
    let failed = |message| InstallError::Systemctl {
        arguments: arguments.join(" "),
        message,
    };
    let output = Command::new("systemctl")
        .args(arguments)
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(())
}

fn unit_text(program: &Path, config: &Path, save_timeout: u64) -> String {
    let (program, config) = (program.display(), config.display());
    let stop = save_timeout + STOP_BESIDE;
    format!(
        "[Unit]
Description=Understudy node agent
# In this order they are started, and in the other one stopped: at a shutdown of the host the agent saves
# sessions while networks, file systems, D-Bus and logind are still there. VMMs are ordered before the agent,
# so that they are stopped after it.
After=local-fs.target remote-fs.target network.target dbus.service systemd-logind.service
# Whatever ends it, it comes back: operations in flight and guests wait for it.
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={program} run --config {config}
Restart=always
RestartSec=1
# VMMs are units of their own and outlive the agent; so do those that are not.
KillMode=process
# Where logind's inhibitor was not enough, sessions are saved in the stop job: host.saveTimeoutSeconds, and
# what a cutover under way takes. A plain restart saves nothing, and takes a moment.
TimeoutStopSec={stop}
OOMScoreAdjust=-900
LimitNOFILE=65536

[Install]
WantedBy=multi-user.target
"
    )
}

fn logind_text(save_timeout: u64) -> String {
    format!(
        "# Written by `understudy-node install`: how long a reboot or power-off that the host begins waits for
# sessions of guests to be saved (host.saveTimeoutSeconds). Nobody waits where there is nothing to save.
[Login]
InhibitDelayMaxSec={save_timeout}
"
    )
}

const EXAMPLE: &str = "\
# Configuration of understudy-node. Every field has a default; these are some of them.
#stateDir: /var/lib/understudy
#manifestsDir: /etc/understudy/manifests
#disksDir: /var/lib/understudy/disks
#vmm: /usr/local/bin/understudy-vmm

# What guests of a namespace may use beside files in disksDir/NAMESPACE. Default: nothing.
#namespaces:
#  default:
#    bridges: [br0]
#    paths: [/dev/vg0]

# What keeps the keys of saved sessions while the host reboots: systemd-creds (the host's key), or key-file.
#credentials:
#  provider: systemd-creds

# The longest that a reboot which the host begins is held up to save sessions. Run `install` again after a change.
#host:
#  saveTimeoutSeconds: 600
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_runs_this_program_and_the_example_is_a_valid_configuration() {
        let text = unit_text(
            Path::new("/opt/understudy-node"),
            Path::new("/etc/understudy/node.yaml"),
            600,
        );
        assert!(text.contains("ExecStart=/opt/understudy-node run --config /etc/understudy/node.yaml"));
        assert!(text.contains("KillMode=process"));
        assert!(text.contains("TimeoutStopSec=720\n"));
        assert!(text.contains("After=local-fs.target remote-fs.target network.target dbus.service"));
        assert!(logind_text(600).ends_with("[Login]\nInhibitDelayMaxSec=600\n"));
        assert!(LOGIND_DROP_IN > "99-kubelet.conf", "logind's last drop-in counts");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("node.yaml");
        let is_prose = |line: &&str| line.starts_with("# ") && line[2..].starts_with(char::is_uppercase);
        let settings = EXAMPLE.lines().filter(|line| !is_prose(line));
        let uncommented = settings
            .map(|line| line.replacen('#', "", 1) + "\n")
            .collect::<String>();
        for text in [EXAMPLE, uncommented.as_str()] {
            fs::write(&file, text).unwrap();
            Config::load(Some(&file)).unwrap();
        }
    }
}
