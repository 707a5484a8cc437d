//! The VMM alone, without an agent: stock guests on real KVM.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use understudy_tests::bed::{NODE_BIN, Ssh, wait_until};
use understudy_tests::e2e::Context;
use understudy_vmm_control::API_VERSION;
use understudy_vmm_control::config::{Boot, Disk, DiskRole, Network, Paths, Role, VmConfig, Vsock};
use uuid::Uuid;

const MAC: &str = "52:54:00:77:02:01";
const TAP: &str = "e2evmm0";
const UNIT: &str = "e2e-vmm";
/// 25 s on an idle machine.
pub const BOOT_LIMIT: Duration = Duration::from_secs(480);
const STOP_LIMIT: Duration = Duration::from_secs(120);
pub const POLL: Duration = Duration::from_millis(500);

/// A VMM on the node, as a systemd unit; ended when dropped.
pub struct Vmm<'context> {
    context: &'context Context<'context>,
}

impl<'context> Vmm<'context> {
    /// Starts a VMM of this configuration.
    pub fn start(context: &'context Context, config: &VmConfig) -> Result<Self> {
        let vmm = Self { context };
        vmm.run(config)?;
        Ok(vmm)
    }

    /// Starts it in place of one that there may be.
    pub fn run(&self, config: &VmConfig) -> Result<()> {
        let context = self.context;
        let ssh = context.ssh();
        let file = format!("{}/vmm.json", context.dir);
        ssh.write(&file, &serde_json::to_string_pretty(config)?)?;
        ssh.run(&format!(
            "systemctl stop {UNIT} 2>/dev/null # of a run that was killed
             ip link show {TAP} >/dev/null 2>&1 || ip tuntap add {TAP} mode tap vnet_hdr
             ip link set {TAP} master br0 up
             systemctl reset-failed {UNIT} 2>/dev/null
             systemd-run --quiet --unit={UNIT} -p StandardError=file:{dir}/vmm.log -p StandardOutput=file:{dir}/vmm.log \
                 {NODE_BIN}/understudy-vmm run --config {file}",
            dir = context.dir,
        ))?;
        Ok(())
    }

    /// The answer of the control API to a `GET`.
    pub fn get(&self, route: &str) -> Result<Value> {
        self.curl(&format!("http://vmm{route}"))
    }

    /// The answer of the control API to a `PUT` of `body`.
    pub fn put(&self, route: &str, body: &Value) -> Result<Value> {
        self.curl(&format!("-X PUT -d '{body}' http://vmm{route}"))
    }

    /// Kills the process, as the end of its host would.
    pub fn kill(&self) -> Result<()> {
        let line = format!("systemctl kill --signal=KILL {UNIT}");
        self.context.ssh().run(&line)?;
        wait_until("the VMM to be gone", STOP_LIMIT, POLL, || {
            Ok((self.state()? != "active").then_some(()))
        })
    }

    fn curl(&self, arguments: &str) -> Result<Value> {
        let text = self.context.ssh().run(&format!(
            "curl -sS --fail-with-body -m 20 --unix-socket {}/control.sock {arguments}",
            self.context.dir
        ))?;
        serde_json::from_str(&text).with_context(|| format!("the control API answered '{text}'"))
    }

    /// Waits until the console has printed `text`.
    fn console(&self, text: &str) -> Result<()> {
        let line = format!("grep -q -e '{text}' {}/console.log", self.context.dir);
        wait_until(
            &format!("'{text}' on the guest's console"),
            BOOT_LIMIT,
            POLL,
            || {
                self.must_run()?;
                Ok(self.context.ssh().output(&line)?.status.success().then_some(()))
            },
        )
    }

    pub fn must_run(&self) -> Result<()> {
        if self.state()? != "active" {
            bail!(
                "the VMM has ended: {}",
                self.context
                    .ssh()
                    .run(&format!("tail -n 20 {}/vmm.log", self.context.dir))?
            );
        }
        Ok(())
    }

    fn state(&self) -> Result<String> {
        Ok(self
            .context
            .ssh()
            .output(&format!("systemctl is-active {UNIT}"))?
            .stdout
            .trim()
            .to_owned())
    }
}

impl Drop for Vmm<'_> {
    fn drop(&mut self) {
        // What cannot be ended here is ended by the next start.
        let _ = self
            .context
            .ssh()
            .output(&format!("systemctl stop {UNIT}; ip link del {TAP}"));
    }
}

/// A guest on a fresh copy of the image, which this VMM owns.
pub fn config(context: &Context, cpus: u8) -> Result<VmConfig> {
    let dir = &context.dir;
    let path = |name: &str| PathBuf::from(format!("{dir}/{name}"));
    context.ssh().run(&format!(
        "cp --sparse=always {} {dir}/web.img; mkdir -p {dir}/web.img.understudy
         echo '{{\"version\":1,\"epoch\":1,\"incarnation\":1,\"layer\":null}}' >{dir}/web.img.understudy/owner.json",
        context.stage.guest_image
    ))?;
    Ok(VmConfig {
        version: API_VERSION,
        guest: "default/web".to_owned(),
        uuid: Uuid::new_v4(),
        incarnation: 1,
        role: Role::Active,
        cpus,
        memory_mib: 512,
        boot: Boot::FromDisk {},
        disks: vec![Disk {
            name: "root".to_owned(),
            role: DiskRole::Root,
            source: path("web.img"),
            read_only: false,
            layer: None,
        }],
        networks: vec![Network {
            mac: MAC.to_owned(),
            tap: TAP.to_owned(),
            isolated_peer: None,
        }],
        vsock: Vsock {
            cid: 3,
            socket: path("vsock.sock"),
        },
        clone_oem_strings: Vec::new(),
        resume: None,
        paths: Paths {
            control: path("control.sock"),
            handover: path("handover.sock"),
            console: path("console.log"),
            platform: path("platform.json"),
        },
    })
}

/// The guest's address, once it has one.
pub fn address(context: &Context) -> Result<String> {
    wait_until("the guest's lease", BOOT_LIMIT, POLL, || {
        context.node().netns().lease(MAC)
    })
}

/// Commands in the guest, once it takes them.
pub fn shell(vmm: &Vmm, address: &str) -> Result<Ssh> {
    let context = vmm.context;
    let key = context.stage.images.cache.join("ssh/id_ed25519");
    let guest = Ssh::new(context.node().netns(), address, &key);
    guest.forget();
    guest.wait(BOOT_LIMIT, || vmm.must_run())?;
    Ok(guest)
}

pub fn vmm_boots_stock_debian(context: &Context) -> Result<()> {
    let config = config(context, 2)?;
    let uuid = config.uuid;
    let vmm = Vmm::start(context, &config)?;
    vmm.console("guest login:")?;
    context.say("login prompt");

    let node = context.node();
    let address = address(context)?;
    let page = wait_until("the guest's page", BOOT_LIMIT, POLL, || {
        let output = node
            .netns()
            .command("curl")
            .args(["-sf", "-m", "5", &format!("http://{address}/")])
            .output()?;
        Ok(output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).into_owned()))
    })?;
    ensure!(page.contains("Understudy"), "the page is not the guest's: {page}");
    context.say("serves its page outside");

    let guest = shell(&vmm, &address)?;
    let facts = guest.run(
        "uname -r; nproc; cat /sys/class/dmi/id/product_uuid; cat /sys/class/misc/hw_random/rng_current
         for device in /sys/bus/virtio/drivers/*; do ls $device | grep -q ^virtio && basename $device; done | sort | tr '\\n' ' '
         echo; systemctl is-system-running --wait; systemctl --failed --plain --no-legend",
    )?;
    let facts: Vec<&str> = facts.lines().map(str::trim).collect();
    let expected = [
        context.stage.images.older_kernel.as_str(),
        "2",
        &uuid.to_string(),
        "virtio_rng.0",
        "virtio_blk virtio_net virtio_rng vmw_vsock_virtio_transport",
        "running",
    ];
    ensure!(
        facts == expected,
        "the guest should be {expected:?} and is {facts:?}"
    );
    context.say("kernel, processors, identity and devices are as configured");

    let info = vmm.get("/v1/vm")?;
    ensure!(
        info["state"] == "Running" && info["owner"] == true && info["boots"] == 1,
        "the VMM says {info}"
    );
    guest.forget();
    vmm.put("/v1/vm/power-button", &json!({}))?;
    wait_until("the guest to power itself off", STOP_LIMIT, POLL, || {
        Ok((vmm.state()? != "active").then_some(()))
    })?;
    let state = vmm.state()?;
    ensure!(
        state == "inactive",
        "the VMM should end in order, but its unit is {state}"
    );
    let checked = context.ssh().run(&format!("e2fsck -fn {}/web.img", context.dir));
    checked.context("the disk should be clean after an orderly power-off")?;
    Ok(())
}
