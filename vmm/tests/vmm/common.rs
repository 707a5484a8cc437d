//! The real binary on the real `/dev/kvm`, with a kernel of a few instructions.

use std::arch::global_asm;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use understudy_vmm_control::api::VmInfo;
use understudy_vmm_control::client::Client;
use understudy_vmm_control::owner::{self, OWNER_VERSION, Owner};

/// Generous: an interpreted guest on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(60);

// What the first letter of the command line asks for: `s` power-off, `r` reset, `t` triple fault, `l` a dot
// on the console from time to time, `b` power-off when the power button is pressed. All greet first.
global_asm!(
    ".global tiny_kernel_start, tiny_kernel_end",
    "tiny_kernel_start:",
    "  mov ebx, [rsi + 0x228]",
    "  lea rsi, [rip + 90f]",
    "  mov dx, 0x3f8",
    "1:",
    "  mov al, [rsi]",
    "  test al, al",
    "  jz 2f",
    "  out dx, al",
    "  inc rsi",
    "  jmp 1b",
    "2:",
    "  mov bl, [rbx]",
    "  cmp bl, 's'",
    "  je 10f",
    "  cmp bl, 'r'",
    "  je 20f",
    "  cmp bl, 't'",
    "  je 30f",
    "  cmp bl, 'b'",
    "  je 50f",
    // dots
    "40:",
    "  mov ecx, 20000",
    "41:",
    "  dec ecx",
    "  jnz 41b",
    "  mov dx, 0x3f8",
    "  mov al, '.'",
    "  out dx, al",
    "  jmp 40b",
    // power-off: SLP_TYP 5 and SLP_EN
    "10:",
    "  mov dx, 0x604",
    "  mov ax, 0x3400",
    "  out dx, ax",
    "  jmp 10b",
    // reset register
    "20:",
    "  mov dx, 0xcf9",
    "  mov al, 6",
    "  out dx, al",
    "21:",
    "  jmp 21b",
    // no descriptor table for exceptions, and an exception
    "30:",
    "  push 0",
    "  push 0",
    "  lidt [rsp]",
    "  ud2",
    // power button: enable it, wait for its status, power off
    "50:",
    "  mov dx, 0x602",
    "  mov ax, 0x100",
    "  out dx, ax",
    "  mov dx, 0x600",
    "51:",
    "  in ax, dx",
    "  test ax, 0x100",
    "  jz 51b",
    "  jmp 10b",
    "90:",
    "  .asciz \"tiny kernel\\n\"",
    "tiny_kernel_end:",
);

unsafe extern "C" {
    static tiny_kernel_start: u8;
    static tiny_kernel_end: u8;
}

fn tiny_kernel() -> &'static [u8] {
    let start = &raw const tiny_kernel_start;
    let end = &raw const tiny_kernel_end;
    // SAFETY: both symbols are in one block of assembly in this file, in this order.
    unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) }
}

/// A bzImage of `code`.
fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0u8; 0x400];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    image[0x236] = 1;
    image[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    image[0x258..0x260].copy_from_slice(&0x10_0000u64.to_le_bytes());
    image[0x260..0x264].copy_from_slice(&0x1_0000u32.to_le_bytes());
    // The 64-bit entry point is 0x200 into the loaded part.
    image.resize(0x400 + 0x200, 0);
    image.extend_from_slice(code);
    image
}

/// Whether tests that need `/dev/kvm` can run; says why not.
pub fn have_kvm() -> bool {
    let there = kvm_ioctls::Kvm::new().is_ok();
    if !there {
        eprintln!("SKIPPED: /dev/kvm cannot be opened");
    }
    there
}

/// A guest's files in a directory of their own.
pub struct Guest {
    pub dir: tempfile::TempDir,
}

impl Guest {
    /// A disk owned by incarnation 1, and the kernel.
    pub fn new() -> Guest {
        Guest::with_kernel(tiny_kernel())
    }

    /// The same with another kernel.
    pub fn with_kernel(code: &[u8]) -> Guest {
        let guest = Guest {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::write(guest.path("disk.raw"), vec![0u8; 1 << 20]).unwrap();
        fs::write(guest.path("vmlinuz"), bzimage(code)).unwrap();
        fs::create_dir(guest.state_dir()).unwrap();
        guest.own(1, 1);
        guest
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn state_dir(&self) -> PathBuf {
        owner::state_dir(&self.path("disk.raw"))
    }

    /// Writes `owner.json`.
    pub fn own(&self, epoch: u64, incarnation: u64) {
        Owner {
            version: OWNER_VERSION,
            epoch,
            incarnation,
            layer: None,
        }
        .replace(&self.state_dir())
        .unwrap();
    }

    /// Reads `owner.json`.
    pub fn owner(&self) -> Owner {
        Owner::read(&self.state_dir()).unwrap().unwrap()
    }

    /// The configuration of an incarnation.
    pub fn config(&self, incarnation: u64, role: &str, cmdline: &str) -> serde_json::Value {
        let at = |name: &str| self.path(&format!("{incarnation}-{name}")).display().to_string();
        json!({
            "version": 1,
            "guest": "default/tiny",
            "uuid": "00112233-4455-6677-8899-aabbccddeeff",
            "incarnation": incarnation,
            "role": role,
            "cpus": 1,
            "memoryMib": 32,
            "boot": { "files": { "kernel": self.path("vmlinuz"), "initrd": null, "cmdline": cmdline } },
            "disks": [{ "name": "root", "role": "Root", "source": self.path("disk.raw") }],
            "networks": [],
            "vsock": { "cid": 3, "socket": at("vsock.sock") },
            "paths": {
                "control": at("control.sock"),
                "handover": at("handover.sock"),
                "console": at("console.log"),
                "platform": self.path("platform.json"),
            },
        })
    }

    /// Starts a VMM and waits until it answers or ends.
    pub fn start(&self, config: &serde_json::Value) -> Vmm {
        let incarnation = config["incarnation"].as_u64().unwrap();
        // A process that was killed leaves its socket behind.
        let _ = fs::remove_file(config["paths"]["control"].as_str().unwrap());
        let file = self.path(&format!("{incarnation}-config.json"));
        fs::write(&file, config.to_string()).unwrap();
        let log = self.path(&format!("{incarnation}-stderr.log"));
        let child = Command::new(env!("CARGO_BIN_EXE_understudy-vmm"))
            .args(["run", "--config"])
            .arg(&file)
            .stdin(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let paths = &config["paths"];
        let mut vmm = Vmm {
            child,
            log,
            console: PathBuf::from(paths["console"].as_str().unwrap()),
            client: Client::new(paths["control"].as_str().unwrap(), DEADLINE),
        };
        wait("the VMM answers or ends", || {
            vmm.client.info().is_ok() || vmm.child.try_wait().unwrap().is_some()
        });
        vmm
    }
}

/// A running VMM, killed when dropped.
pub struct Vmm {
    child: Child,
    log: PathBuf,
    console: PathBuf,
    pub client: Client,
}

impl Vmm {
    /// Waits for the end of the process.
    pub fn end(&mut self) -> ExitStatus {
        let mut status = None;
        wait("the VMM ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    pub fn stderr(&self) -> String {
        read(&self.log)
    }

    pub fn console(&self) -> String {
        read(&self.console)
    }

    pub fn info(&self) -> VmInfo {
        self.client.info().unwrap()
    }

    /// Waits until the guest writes more to its console.
    pub fn makes_progress(&self) {
        let before = self.client.console().unwrap().text;
        wait("the guest makes progress", || {
            self.client.console().unwrap().text != before
        });
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("stderr of the VMM:\n{}", self.stderr());
        }
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// Waits until `condition` holds.
pub fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "timed out waiting until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
