//! The life of a node VM.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::boot::{End, newest_kernel, note_power_cut};
use super::netns::run;
use super::{GATEWAY, Images, NetNs, Qmp, Ssh, cache_dir, lost, wait_until};

/// A node boots in 15 to 25 s on an idle machine; emulation beside a busy build takes longer.
const BOOT_LIMIT: Duration = Duration::from_secs(480);
/// After so long it is taken for hung, and reset once.
const HUNG_AFTER: Duration = Duration::from_secs(240);
const STOP_LIMIT: Duration = Duration::from_secs(90);
/// A node that has been up answers within seconds, within half a minute beside busy builds.
const SILENCE_LIMIT: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(200);
/// The emulated processor. Without cmpxchg16b, on which QEMU 7.2 double-faults with newer kernels. A page table
/// of four levels instead of five, twice so when nested, and no SMAP are sooner emulated.
const CPU: &str = "max,+svm,-cx16,-la57,-smap";

/// Last number of the first node's address.
const FIRST: u8 = 10;

/// Where Debian's packages put what a PC boots with, and no device but those that are named: ours is
/// built without the usual ones.
pub(super) const FIRMWARE: [&str; 7] = [
    "-nodefaults",
    "-L",
    "/usr/share/seabios",
    "-L",
    "/usr/share/qemu",
    "-L",
    "/usr/lib/ipxe/qemu",
];

/// What a node is made like.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Emulated processors.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Flushes of the node's disks reach the machine's disk. Not needed for power cuts (what QEMU
    /// has written survives its death in the page cache), only for those of the machine itself.
    pub durable: bool,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self {
            cpus: 2,
            memory_mib: 3072,
            durable: false,
        }
    }
}

/// What is known of a node without asking it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// No QEMU process.
    Down,
    /// A QEMU process, with its id.
    Up(u32),
}

/// A node VM: an instance directory, a network namespace and, while it is up, a QEMU process.
#[derive(Clone, Debug)]
pub struct Node {
    name: String,
    /// Of the nodes that share a network: 0 is the one whose network it is.
    number: u8,
    dir: PathBuf,
    netns: NetNs,
    ssh: Ssh,
}

impl Node {
    /// The node of this name in the cache. Creates nothing.
    pub fn named(name: &str) -> Result<Self> {
        if name.is_empty()
            || !name
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        {
            bail!("node name '{name}': only lower-case letters, digits and '-' are allowed");
        }
        let dir = cache_dir().join("nodes").join(name);
        let netns = NetNs::of(&dir);
        Ok(Self::numbered(name, 0, dir, netns))
    }

    /// Another node in the network of this one, which outlives it. Creates nothing.
    pub fn beside(&self) -> Self {
        let name = format!("{}-beside", self.name);
        let dir = cache_dir().join("nodes").join(&name);
        Self::numbered(&name, self.number + 1, dir, self.netns.clone())
    }

    fn numbered(name: &str, number: u8, dir: PathBuf, netns: NetNs) -> Self {
        let ssh = Ssh::new(&netns, &address(number), &cache_dir().join("ssh/id_ed25519"));
        Self {
            name: name.to_owned(),
            number,
            dir,
            netns,
            ssh,
        }
    }

    /// Its fixed address.
    pub fn address(&self) -> String {
        address(self.number)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory of its disks and console log.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The network it is in.
    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    /// The way into it.
    pub fn ssh(&self) -> &Ssh {
        &self.ssh
    }

    /// What its serial console has printed, over all its boots.
    pub fn console_log(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// Whether its QEMU process lives.
    pub fn status(&self) -> Status {
        let pid = fs::read_to_string(self.pid_file())
            .ok()
            .and_then(|text| text.trim().parse().ok());
        match pid {
            Some(pid) if process_mentions(pid, &self.pid_file()) => Status::Up(pid),
            _ => Status::Down,
        }
    }

    /// Takes the node for oneself until the returned file is dropped; waits for whoever has it.
    pub fn lock(&self) -> Result<File> {
        fs::create_dir_all(&self.dir).with_context(|| format!("cannot create {}", self.dir.display()))?;
        let path = self.dir.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        if file.try_lock().is_err() {
            eprintln!(
                "node {}: waiting for another run to end (it holds {})",
                self.name,
                path.display()
            );
            file.lock()
                .with_context(|| format!("cannot lock {}", path.display()))?;
        }
        Ok(file)
    }

    /// Starts the node where it is not up and waits until commands can be run in it. Its disks are
    /// made anew when the node image has changed since, or when `fresh` asks for it. Returns whether
    /// it had to be started. One that has been lost is reset first: see [`Self::lost`].
    pub fn up(&self, images: &Images, options: &NodeOptions, fresh: bool) -> Result<bool> {
        fs::create_dir_all(&self.dir).with_context(|| format!("cannot create {}", self.dir.display()))?;
        let made_from = self.dir.join("image");
        let current = fs::read_to_string(&made_from).is_ok_and(|path| Path::new(path.trim()) == images.node);
        let fresh = fresh || !current;
        if let Status::Up(_) = self.status() {
            if !fresh && self.lost()?.is_none() {
                return Ok(false);
            }
            if fresh {
                eprintln!("node {}: up on other disks, is made anew", self.name);
            }
            self.kill()?;
        }
        if fresh {
            self.make_disks(images)?;
            fs::write(&made_from, images.node.as_os_str().as_encoded_bytes())?;
        }
        self.netns.up()?;
        self.netns.tap(&self.tap())?;
        self.boot(images, options)?;
        if let Err(error) = self.wait_for_ssh_within(HUNG_AFTER) {
            let kept = lost::keep(self, &format!("{error:#}"))?;
            eprintln!(
                "{error:#}; it is reset; what can be seen of it is in {}",
                kept.display()
            );
            self.kill()?;
            self.boot(images, options)?;
            self.wait_for_ssh()?;
        }
        Ok(true)
    }

    /// Starts the node with a new root disk, its data disk as it was: with the image's kernel, and none of what
    /// was installed since. What runs on it is lost.
    pub fn up_with_new_root(&self, images: &Images, options: &NodeOptions) -> Result<()> {
        if self.data_disk().exists() {
            self.kill()?;
            self.make_root_disk(images)?;
        }
        self.up(images, options, false)?;
        Ok(())
    }

    /// The boot ID of the node's kernel.
    pub fn boot_id(&self) -> Result<String> {
        let text = self.ssh.run("cat /proc/sys/kernel/random/boot_id")?;
        Ok(text.trim().to_owned())
    }

    /// Waits until commands can be run in another boot than `before`, which somebody asked for and a
    /// [`super::Firmware`] makes.
    pub fn wait_for_reboot(&self, before: &str, limit: Duration) -> Result<()> {
        wait_until(&format!("node {} to reboot", self.name), limit, POLL, || {
            self.ensure_not_lost()?;
            let now = self.boot_id().ok();
            Ok(now.filter(|now| now != before).map(|_| ()))
        })
        .with_context(|| format!("its console: {}", self.console_log().display()))
    }

    /// How its last boot ended, where it is not up.
    pub fn end(&self) -> End {
        End::of(&self.console_of_boot())
    }

    /// An error where it is down and stays down.
    pub fn ensure_not_lost(&self) -> Result<()> {
        // It may be on its way up between the two questions.
        if self.status() == Status::Down {
            let end = self.end();
            if end != End::Reset && self.status() == Status::Down {
                bail!("node {} is down ({end:?})", self.name);
            }
        }
        Ok(())
    }

    /// Whether the node is lost, where it should be up: its kernel died, or its emulator did or hangs. Of such a
    /// node what can be seen from outside is kept, in the file that is returned. Its power is as it was.
    pub fn lost(&self) -> Result<Option<PathBuf>> {
        let why = match self.status() {
            Status::Up(_) => match self.ssh.wait(SILENCE_LIMIT, || self.ensure_not_lost()) {
                Ok(()) => return Ok(None),
                Err(error) => format!("{error:#}"),
            },
            Status::Down if self.end() == End::Lost => "it is down, and nobody switched it off".to_owned(),
            Status::Down => return Ok(None),
        };
        let kept = lost::keep(self, &why)?;
        eprintln!(
            "node {} is lost: {why}; what can be seen of it is in {}",
            self.name,
            kept.display()
        );
        Ok(Some(kept))
    }

    /// What the console has printed since the node was last started.
    fn console_of_boot(&self) -> String {
        let offset = fs::read_to_string(self.boot_offset())
            .ok()
            .and_then(|text| text.trim().parse::<usize>().ok())
            .unwrap_or_default();
        let console = fs::read(self.console_log()).unwrap_or_default();
        let of_boot = console.get(offset..).unwrap_or_default();
        String::from_utf8_lossy(of_boot).into_owned()
    }

    /// Shuts the node down in order. Its disks stay.
    pub fn down(&self) -> Result<()> {
        if self.status() == Status::Down {
            return Ok(());
        }
        self.qmp()?.execute("system_powerdown", json!({}))?;
        self.wait_until_gone(STOP_LIMIT)
    }

    /// Cuts its power: QEMU dies at once, with nothing flushed.
    pub fn kill(&self) -> Result<()> {
        let Status::Up(pid) = self.status() else {
            return Ok(());
        };
        run(Command::new("kill").args(["-KILL", &pid.to_string()]))?;
        self.wait_until_gone(Duration::from_secs(10))?;
        note_power_cut(&self.console_log())
    }

    /// Removes the node: power off, disks, and the network that is its own.
    pub fn remove(&self) -> Result<()> {
        self.kill()?;
        if self.number == 0 {
            self.netns.down()?;
        }
        if self.dir.exists() {
            fs::remove_dir_all(&self.dir).with_context(|| format!("cannot remove {}", self.dir.display()))?;
        }
        Ok(())
    }

    /// A connection to its QEMU.
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.qmp_socket())
    }

    /// Brings a file system image into the node, holes kept, as `/var/lib/understudy/images/NAME`;
    /// returns that path. What is there under this name is not copied again, so a name must stand for
    /// its content (the images of the bed have their key in it).
    ///
    /// The way is a disk that is plugged in: several times faster than the emulated network.
    pub fn push_image(&self, image: &Path, name: &str) -> Result<String> {
        let target = format!("/var/lib/understudy/images/{name}");
        if self.ssh.output(&format!("test -e {target}"))?.status.success() {
            return Ok(target);
        }
        let carrier = self.dir.join("carrier.ext4");
        let content = self.dir.join("carrier");
        let _ = fs::remove_dir_all(&content);
        fs::create_dir_all(&content)?;
        fs::hard_link(image, content.join("image")).or_else(|_| {
            run(Command::new("cp")
                .arg("--sparse=always")
                .arg(image)
                .arg(content.join("image")))
        })?;
        let size = fs::metadata(image)
            .with_context(|| format!("cannot read {}", image.display()))?
            .len();
        let _ = fs::remove_file(&carrier);
        run(Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d"])
            .arg(&content)
            .arg(&carrier)
            .arg(format!("{}M", (size >> 20) * 105 / 100 + 32)))?;
        self.plug(&carrier, "carrier")?;
        let copied = self.ssh.run(&format!(
            "set -e; udevadm settle; mkdir -p /run/carrier /var/lib/understudy/images
             for i in $(seq 100); do [ -e /dev/disk/by-id/virtio-carrier ] && break; sleep 0.1; done
             mount -o ro /dev/disk/by-id/virtio-carrier /run/carrier
             trap 'umount /run/carrier' EXIT
             cp --sparse=always /run/carrier/image {target}.new && mv {target}.new {target}"
        ));
        self.unplug("carrier")?;
        fs::remove_file(&carrier)?;
        fs::remove_dir_all(&content)?;
        copied.with_context(|| format!("cannot bring {} into node {}", image.display(), self.name))?;
        Ok(target)
    }

    /// Plugs a raw file in as a read-only virtio disk with this serial.
    fn plug(&self, file: &Path, id: &str) -> Result<()> {
        let mut qmp = self.qmp()?;
        qmp.execute(
            "blockdev-add",
            json!({ "node-name": id, "driver": "raw", "read-only": true,
                    "file": { "driver": "file", "filename": file } }),
        )?;
        let device =
            json!({ "driver": "virtio-blk-pci", "id": format!("{id}-device"), "drive": id, "serial": id });
        qmp.execute("device_add", device)?;
        Ok(())
    }

    fn unplug(&self, id: &str) -> Result<()> {
        let mut qmp = self.qmp()?;
        qmp.execute("device_del", json!({ "id": format!("{id}-device") }))?;
        // The node's kernel has to agree first.
        qmp.event("DEVICE_DELETED")?;
        qmp.execute("blockdev-del", json!({ "node-name": id }))?;
        Ok(())
    }

    fn make_root_disk(&self, images: &Images) -> Result<()> {
        // A raw copy, not an overlay: what QEMU has written survives a power cut of the node, and no
        // image format keeps metadata of its own in memory.
        run(Command::new("cp")
            .args(["--sparse=always", "--reflink=auto"])
            .arg(images.node.join("root.ext4"))
            .arg(self.root_disk()))
    }

    fn make_disks(&self, images: &Images) -> Result<()> {
        self.make_root_disk(images)?;
        let data = self.data_disk();
        let _ = fs::remove_file(&data);
        File::create(&data)?
            .set_len(20 << 30)
            .with_context(|| format!("cannot make {}", data.display()))?;
        run(Command::new("mke2fs")
            .args([
                "-q",
                "-t",
                "ext4",
                "-L",
                "understudy",
                "-E",
                "lazy_itable_init=1,lazy_journal_init=1",
            ])
            .arg(&data))?;
        let _ = fs::remove_file(self.console_log());
        Ok(())
    }

    /// Starts QEMU with what the node's disk has to boot. It ends when the node resets its machine: see
    /// [`super::boot`].
    pub(super) fn boot(&self, images: &Images, options: &NodeOptions) -> Result<()> {
        self.ssh.forget();
        let _ = fs::remove_file(self.pid_file());
        let files = newest_kernel(&self.root_disk(), &self.dir.join("boot"))?;
        let printed = fs::metadata(self.console_log()).map_or(0, |log| log.len());
        fs::write(self.boot_offset(), printed.to_string())?;
        let cache = if options.durable { "writeback" } else { "unsafe" };
        let drive = |file: &Path, id: &str| {
            format!(
                "if=none,id={id},file={},format=raw,cache={cache},discard=unmap,aio=threads",
                file.display()
            )
        };
        // QEMU keeps what it translated by virtual address: with randomised ones each exec is translated
        // anew, which costs two thirds of the time. A kernel that dies ends QEMU, so that it is noticed at once.
        let mut cmdline = format!(
            "root=/dev/vda rw console=ttyS0 quiet loglevel=5 norandmaps mitigations=off oops=panic panic=1 systemd.hostname=node ip={}::{GATEWAY}:255.255.255.0::br0:off",
            self.address()
        );
        if self.number > 0 {
            // The image's is the first one's; the address of a node's bridge follows from it, for one.
            cmdline.push_str(&format!(" systemd.machine_id={:032x}", self.number));
        }
        run(self
            .netns
            .command(&images.qemu)
            .args(FIRMWARE)
            .args(["-name", &format!("understudy-{}", self.name), "-machine", "pc"])
            .args(["-accel", "tcg,thread=multi,tb-size=512", "-cpu", CPU])
            .args([
                "-smp",
                &options.cpus.to_string(),
                "-m",
                &options.memory_mib.to_string(),
            ])
            .arg("-no-reboot")
            .arg("-kernel")
            .arg(files.kernel)
            .arg("-initrd")
            .arg(files.initrd)
            .args(["-append", &cmdline])
            .args([
                "-drive",
                &drive(&self.root_disk(), "root"),
                "-device",
                "virtio-blk-pci,drive=root,serial=root",
            ])
            .args([
                "-drive",
                &drive(&self.data_disk(), "data"),
                "-device",
                "virtio-blk-pci,drive=data,serial=data",
            ])
            .args([
                "-netdev",
                &format!("tap,id=net,ifname={},script=no,downscript=no", self.tap()),
            ])
            .args([
                "-device",
                // Decimal digits of the address are the hexadecimal ones here.
                &format!(
                    "virtio-net-pci,netdev=net,mac=52:54:00:77:00:{}",
                    FIRST + self.number
                ),
            ])
            .args(["-device", "virtio-rng-pci"])
            .args([
                "-chardev",
                &format!(
                    "socket,id=console,path={},server=on,wait=off,logfile={},logappend=on",
                    self.socket("console").display(),
                    self.console_log().display()
                ),
            ])
            .args([
                "-serial",
                "chardev:console",
                "-display",
                "none",
                "-monitor",
                "none",
            ])
            .args([
                "-qmp",
                &format!("unix:{},server=on,wait=off", self.qmp_socket().display()),
            ])
            .arg("-pidfile")
            .arg(self.pid_file())
            .arg("-daemonize"))
    }

    pub(super) fn wait_for_ssh(&self) -> Result<()> {
        self.wait_for_ssh_within(BOOT_LIMIT)
    }

    fn wait_for_ssh_within(&self, limit: Duration) -> Result<()> {
        let waited = self.ssh.wait(limit, || match self.status() {
            Status::Up(_) => Ok(()),
            Status::Down => self.ensure_not_lost(),
        });
        waited.with_context(|| {
            format!(
                "node {} did not come up; its console: {}",
                self.name,
                self.console_log().display()
            )
        })
    }

    fn wait_until_gone(&self, limit: Duration) -> Result<()> {
        wait_until(&format!("node {} to stop", self.name), limit, POLL, || {
            Ok((self.status() == Status::Down).then_some(()))
        })?;
        self.ssh.forget();
        Ok(())
    }

    fn root_disk(&self) -> PathBuf {
        self.dir.join("root.img")
    }

    fn data_disk(&self) -> PathBuf {
        self.dir.join("data.img")
    }

    /// Length of the console's log when the node was last started.
    fn boot_offset(&self) -> PathBuf {
        self.dir.join("boot-offset")
    }

    fn pid_file(&self) -> PathBuf {
        self.dir.join("qemu.pid")
    }

    fn qmp_socket(&self) -> PathBuf {
        self.socket("qmp")
    }

    fn socket(&self, name: &str) -> PathBuf {
        let name = match self.number {
            0 => format!("{name}.sock"),
            number => format!("{name}-{number}.sock"),
        };
        self.netns.run_dir().join(name)
    }

    fn tap(&self) -> String {
        format!("node{}", self.number)
    }
}

/// The fixed address of a node in its network.
fn address(number: u8) -> String {
    format!("10.77.0.{}", FIRST + number)
}

/// True when the process lives and its command line names `path`: a pid file alone may be stale,
/// and its number somebody else's.
pub(crate) fn process_mentions(pid: u32, path: &Path) -> bool {
    let Ok(cmdline) = fs::read(format!("/proc/{pid}/cmdline")) else {
        return false;
    };
    let path = path.as_os_str().as_encoded_bytes();
    cmdline.windows(path.len()).any(|window| window == path)
}
