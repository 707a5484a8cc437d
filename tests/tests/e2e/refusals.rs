//! Bad input: a clear error on the thing itself, and no harm to anything else.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use understudy_tests::bed::wait_until;
use understudy_tests::e2e::Context;
use understudy_tests::machine::{Machine, condition_message};

use crate::guest::{GUEST, Guest};

const LIMIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(500);
const DISKS: &str = "/var/lib/understudy/disks/default";

/// A Guest that differs from a good one in one thing, and the words that its status has to say about it.
struct Bad {
    name: &'static str,
    source: &'static str,
    more: &'static str,
    words: &'static [&'static str],
}

const BAD_GUESTS: [Bad; 6] = [
    Bad {
        name: "no-disk",
        source: "absent.img",
        more: "cpus: 1\n  memory: 256Mi\n  boot: {fromDisk: {}}",
        words: &["spec.disks[0].source", "default/absent.img"],
    },
    Bad {
        name: "disk-in-use",
        source: "web.img",
        more: "cpus: 1\n  memory: 256Mi\n  boot: {fromDisk: {}}",
        words: &["web.img", "in use by guest default/web"],
    },
    Bad {
        name: "too-much-memory",
        source: "blank.img",
        more: "cpus: 1\n  memory: 512Gi\n  boot: {fromDisk: {}}",
        words: &["spec.memory", "ask for less"],
    },
    Bad {
        name: "too-many-cpus",
        source: "blank.img",
        more: "cpus: 64\n  memory: 256Mi\n  boot: {fromDisk: {}}",
        words: &["spec.cpus", "2"],
    },
    Bad {
        name: "no-kernel",
        source: "blank.img",
        more: "cpus: 1\n  memory: 256Mi\n  boot: {kernel: absent-vmlinuz}",
        words: &["spec.boot.kernel", "default/absent-vmlinuz"],
    },
    Bad {
        name: "no-file-system",
        source: "blank.img",
        more: "cpus: 1\n  memory: 256Mi\n  boot: {fromDisk: {}}",
        words: &["boot.fromDisk", "disk root"],
    },
];

fn manifest(bad: &Bad) -> String {
    format!(
        "apiVersion: understudy.dev/v1alpha1\nkind: Guest\nmetadata:\n  name: {}\nspec:\n  {}\n  disks:\n    - {{name: root, role: Root, source: {}}}\n",
        bad.name, bad.more, bad.source
    )
}

fn reboot(name: &str, guest: &str) -> String {
    format!(
        "apiVersion: understudy.dev/v1alpha1\nkind: SeamlessReboot\nmetadata:\n  name: {name}\nspec:\n  guestName: {guest}\n  reason: a test\n"
    )
}

/// Waits until `told` says all the words; what it says.
fn says(what: &str, words: &[&str], mut told: impl FnMut() -> Result<String>) -> Result<String> {
    let mut last = String::new();
    wait_until(what, LIMIT, POLL, || {
        last = told()?;
        Ok(words.iter().all(|word| last.contains(word)).then_some(()))
    })
    .with_context(|| format!("it should say {words:?} and says {last:?}"))?;
    Ok(last)
}

fn message(machine: &Machine, kind: &str, name: &str) -> Result<String> {
    Ok(match machine.object(kind, name)? {
        Some(object) if kind == "Guest" => condition_message(&object, "Ready"),
        Some(object) => format!(
            "{}: {}",
            object["status"]["reason"].as_str().unwrap_or_default(),
            object["status"]["message"].as_str().unwrap_or_default()
        ),
        None => String::new(),
    })
}

/// Each mistake is told where it was made, and the guest beside them notices nothing.
pub fn what_cannot_work_says_why(context: &Context) -> Result<()> {
    let guest = Guest::running(context)?;
    let machine = &guest.machine;
    let boot_id = guest.status("bootID")?;
    machine.sh(&format!("truncate -s 64M {DISKS}/blank.img"))?;

    for bad in &BAD_GUESTS {
        // One at a time: they share a disk.
        machine.apply("bad.yaml", &manifest(bad))?;
        let said = says(bad.name, bad.words, || message(machine, "Guest", bad.name))?;
        context.say(&format!("{}: {said}", bad.name));
        machine.sh("rm /etc/understudy/manifests/bad.yaml")?;
        machine.sh(&machine.agent_command(&format!("delete guest {}", bad.name)))?;
    }
    machine.sh(&format!("test -e {DISKS}/blank.img && test -e {DISKS}/web.img"))?;

    machine.apply("nobody.yaml", &reboot("nobody", "absent"))?;
    let said = says("a reboot of nobody", &["GuestNotFound", "absent"], || {
        message(machine, "SeamlessReboot", "nobody")
    })?;
    context.say(&said);

    machine.apply(
        "broken.yaml",
        "apiVersion: understudy.dev/v1alpha1\nkind: Guest\nmetadata: {name: broken}\nspec:\n  cpu: 1\n",
    )?;
    let said = says("a malformed manifest", &["broken.yaml", "cpu"], || {
        Ok(machine.status()?["problems"].to_string())
    })?;
    context.say(&said);
    machine.sh("rm /etc/understudy/manifests/broken.yaml")?;

    control_requests(context, machine)?;
    without_agent(context, &guest)?;
    without_room(context, machine)?;

    ensure!(guest.status("bootID")? == boot_id, "the guest was rebooted");
    let page = machine
        .netns()
        .command("curl")
        .args(["-sSf", "-m", "20", &format!("http://{}/", guest.address)])
        .output()
        .context("cannot run curl")?;
    ensure!(page.status.success(), "{}", String::from_utf8_lossy(&page.stderr));
    Ok(())
}

/// What the VMM's control socket is asked in the wrong way.
fn control_requests(context: &Context, machine: &Machine) -> Result<()> {
    let ask = |arguments: &str| -> Result<(String, Value)> {
        let text = machine.sh(&format!(
            "curl -sS -m 20 -w '\\n%{{http_code}}' --unix-socket $(ls -d /run/understudy/guests/default/{GUEST}/*/control.sock | tail -n 1) {arguments}"
        ))?;
        let (body, code) = text.rsplit_once('\n').context("curl printed no status")?;
        let body =
            serde_json::from_str(body).with_context(|| format!("{arguments}: {body:?} is not JSON"))?;
        Ok((code.to_owned(), body))
    };
    for (arguments, code, word) in [
        ("http://vmm/v1/nothing", "404", "nothing"),
        ("-X PUT -d '{' http://vmm/v1/hold", "400", "line 1"),
        (
            "-X PUT -d '{\"receive\":true}' http://vmm/v1/hold",
            "400",
            "leaseMs",
        ),
        ("-X PUT -d '{}' http://vmm/v1/disks/absent/merge", "404", "absent"),
    ] {
        let (got, body) = ask(arguments)?;
        let error = body["error"].as_str().unwrap_or_default();
        ensure!(
            got == code && error.contains(word),
            "{arguments}: {got} {body} instead of {code} and {word:?}"
        );
        context.say(&format!("{code}: {error}"));
    }
    Ok(())
}

/// A guest in which nobody answers cannot be rebooted seamlessly, and its owner learns what would do.
fn without_agent(context: &Context, guest: &Guest) -> Result<()> {
    let machine = &guest.machine;
    guest.ssh.run("systemctl stop understudy-guest.service")?;
    let said = machine
        .apply("agentless.yaml", &reboot("agentless", GUEST))
        .and_then(|()| {
            says("a reboot without agent", &["understudy-guest install"], || {
                message(machine, "SeamlessReboot", "agentless")
            })
        });
    guest.ssh.run("systemctl start understudy-guest.service")?;
    context.say(&said?);
    machine.sh("rm /etc/understudy/manifests/agentless.yaml")?;
    machine.sh(&machine.agent_command("delete seamlessreboot agentless"))?;
    Ok(())
}

/// A full disk: refused with how much is missing.
fn without_room(context: &Context, machine: &Machine) -> Result<()> {
    let fill = "/var/lib/understudy/fill";
    machine.sh(&format!(
        "fallocate -l $(($(df --output=avail -B1 /var/lib/understudy | tail -n 1) - (64 << 20))) {fill}"
    ))?;
    let said = machine.apply("full.yaml", &reboot("full", GUEST)).and_then(|()| {
        says("a reboot on a full disk", &["MiB free", "make room"], || {
            message(machine, "SeamlessReboot", "full")
        })
    });
    machine.sh(&format!("rm {fill}"))?;
    context.say(&said?);
    Ok(())
}
