//! Whether this host's `/dev/kvm` can run stock kernels: it exists, has what we use, and carries out
//! instructions that kernels need. A software KVM that interprets kernel code fails at some of them.

use std::arch::global_asm;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::boot::linux::{self, Entry};
use crate::layout;
use crate::machine::cpuid;
use crate::machine::memory::GuestRam;
use crate::machine::vcpu;

/// What is missing on a host.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// No `/dev/kvm`.
    #[error(
        "/dev/kvm cannot be opened: {0}; load the module kvm_amd or kvm_intel (and have virtualisation enabled in the firmware)"
    )]
    NoKvm(kvm_ioctls::Error),
    /// Not the API that everybody has.
    #[error("/dev/kvm has API version {0} where 12 is expected")]
    Version(i32),
    /// A capability is missing.
    #[error("/dev/kvm lacks {0:?}; a newer host kernel has it")]
    Capability(Cap),
    /// The trial could not be set up.
    #[error("trying kernel code on /dev/kvm: {0}")]
    SetUp(String),
    /// The trial failed.
    #[error(
        "/dev/kvm cannot run stock kernels: {exit} at {step}; it is probably a software KVM that interprets kernel code. Use a host with hardware virtualisation, or a virtual machine with nested virtualisation"
    )]
    Instruction {
        /// What was tried last.
        step: &'static str,
        /// How it ended.
        exit: String,
    },
}

const CAPABILITIES: [Cap; 11] = [
    Cap::Irqchip,
    Cap::Irqfd,
    Cap::Ioeventfd,
    Cap::IoeventfdNoLength,
    Cap::IrqRouting,
    Cap::Pit2,
    Cap::UserMemory,
    Cap::SetTssAddr,
    Cap::ExtCpuid,
    Cap::ImmediateExit,
    Cap::MpState,
];

/// Tells it on stdout.
pub fn report() -> Result<bool, Box<dyn Error>> {
    match check() {
        Ok(()) => {
            println!("ok: /dev/kvm can run stock kernels");
            Ok(true)
        }
        Err(error) => {
            println!("no: {error}");
            Ok(false)
        }
    }
}

/// Checks capabilities and tries instructions.
pub fn check() -> Result<(), CheckError> {
    let kvm = Kvm::new().map_err(CheckError::NoKvm)?;
    let version = kvm.get_api_version();
    if version != 12 {
        return Err(CheckError::Version(version));
    }
    for capability in CAPABILITIES {
        if !kvm.check_extension(capability) {
            return Err(CheckError::Capability(capability));
        }
    }
    try_instructions(&kvm)
}

/// Port to which the trial writes the number of each step that it has reached.
const STEP_PORT: u16 = 0xf4;
/// Steps as the trial numbers them.
const STEPS: [&str; 6] = [
    "entering 64-bit mode in ring 0",
    "a breakpoint (int3) through an interrupt gate",
    "cmpxchg16b",
    "saving and restoring extended registers (xsave, xrstor)",
    "a page fault in ring 0",
    "done",
];
const DONE: u8 = STEPS.len() as u8 - 1;
const RAM_MIB: u64 = 16;
/// A trial takes microseconds on hardware; an interpreter is given a generous time.
const TIME: Duration = Duration::from_secs(10);

// Interrupt gates for vectors 3 and 14 at 0x1000, scratch memory from 0x2000 on. The handlers count in
// r15, and that of the page fault returns behind the faulting instruction, whose length it knows.
global_asm!(
    ".global understudy_check_start, understudy_check_end",
    "understudy_check_start:",
    "  mov al, 1",
    "  out 0xf4, al",
    "  xor r15d, r15d",
    "  lea rax, [rip + 20f]",
    "  mov edi, 0x1030",
    "  call 30f",
    "  lea rax, [rip + 21f]",
    "  mov edi, 0x10e0",
    "  call 30f",
    "  sub rsp, 16",
    "  mov word ptr [rsp], 0xfff",
    "  mov qword ptr [rsp + 2], 0x1000",
    "  lidt [rsp]",
    "  int3",
    "  cmp r15d, 1",
    "  jne 40f",
    "  mov al, 2",
    "  out 0xf4, al",
    // cmpxchg16b, where the processor has it
    "  mov eax, 1",
    "  xor ecx, ecx",
    "  cpuid",
    "  mov r14d, ecx",
    "  bt r14d, 13",
    "  jnc 10f",
    "  mov edi, 0x2000",
    "  mov qword ptr [rdi], 0",
    "  mov qword ptr [rdi + 8], 0",
    "  xor eax, eax",
    "  xor edx, edx",
    "  mov ebx, 5",
    "  mov ecx, 6",
    "  lock cmpxchg16b [rdi]",
    "  cmp qword ptr [rdi + 8], 6",
    "  jne 40f",
    "10:",
    "  mov al, 3",
    "  out 0xf4, al",
    // xsave and xrstor of x87 and SSE state, where the processor has them
    "  bt r14d, 26",
    "  jnc 11f",
    "  mov rax, cr4",
    "  or eax, 0x40600",
    "  mov cr4, rax",
    "  xor ecx, ecx",
    "  xor edx, edx",
    "  mov eax, 3",
    "  xsetbv",
    "  mov edi, 0x3000",
    "  xor edx, edx",
    "  mov eax, 3",
    "  xsave [rdi]",
    "  mov eax, 3",
    "  xrstor [rdi]",
    "11:",
    "  mov al, 4",
    "  out 0xf4, al",
    // a read (48 a1 + 8 bytes of address: 10 bytes) at 256 GiB, which is not mapped
    "  .byte 0x48, 0xa1, 0, 0, 0, 0, 0x40, 0, 0, 0",
    "  cmp r15d, 3",
    "  jne 40f",
    "  mov al, 5",
    "  out 0xf4, al",
    "40:",
    "  hlt",
    "  jmp 40b",
    // breakpoint
    "20:",
    "  add r15d, 1",
    "  iretq",
    // page fault: drops the error code, skips the instruction
    "21:",
    "  add r15d, 2",
    "  add rsp, 8",
    "  add qword ptr [rsp], 10",
    "  iretq",
    // writes a gate to rax at rdi
    "30:",
    "  mov word ptr [rdi], ax",
    "  mov word ptr [rdi + 2], 0x10",
    "  mov word ptr [rdi + 4], 0x8e00",
    "  shr rax, 16",
    "  mov word ptr [rdi + 6], ax",
    "  shr rax, 16",
    "  mov dword ptr [rdi + 8], eax",
    "  mov dword ptr [rdi + 12], 0",
    "  ret",
    "understudy_check_end:",
);

unsafe extern "C" {
    static understudy_check_start: u8;
    static understudy_check_end: u8;
}

fn trial_code() -> &'static [u8] {
    let start = &raw const understudy_check_start;
    let end = &raw const understudy_check_end;
    // SAFETY: both symbols are in one block of assembly in this file, in this order.
    unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) }
}

fn try_instructions(kvm: &Kvm) -> Result<(), CheckError> {
    let set_up = |error: &dyn std::fmt::Display| CheckError::SetUp(error.to_string());
    let ram = GuestRam::new(RAM_MIB).map_err(|e| set_up(&e))?;
    linux::write_tables(&ram.memory).map_err(|e| set_up(&e))?;
    ram.memory
        .write_slice(trial_code(), GuestAddress(layout::HIGH_RAM))
        .map_err(|e| set_up(&e))?;
    let vm = kvm.create_vm().map_err(|e| set_up(&e))?;
    vm.set_tss_address(layout::KVM_TSS as usize)
        .map_err(|e| set_up(&e))?;
    vm.create_irq_chip().map_err(|e| set_up(&e))?;
    let host = ram
        .memory
        .get_host_address(GuestAddress(0))
        .map_err(|e| set_up(&e))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0,
        memory_size: ram.size(),
        userspace_addr: host as u64,
        flags: 0,
    };
    // SAFETY: `ram` outlives the virtual machine, which ends with this function.
    unsafe { vm.set_user_memory_region(region) }.map_err(|e| set_up(&e))?;
    let mut vcpu = vm.create_vcpu(0).map_err(|e| set_up(&e))?;
    let template = cpuid::template(kvm).map_err(|e| set_up(&e))?;
    let cpuid = cpuid::for_vcpu(&template, 0, 1).map_err(|e| set_up(&e))?;
    let entry = Entry {
        rip: layout::HIGH_RAM,
        rsi: 0,
    };
    vcpu::set_up(&vcpu, 0, &cpuid, Some(entry)).map_err(|e| set_up(&e))?;
    run_trial(&mut vcpu)
}

fn run_trial(vcpu: &mut VcpuFd) -> Result<(), CheckError> {
    let _alarm = Alarm::start(TIME).map_err(|e| CheckError::SetUp(e.to_string()))?;
    let mut reached = 0u8;
    loop {
        let exit = match vcpu.run() {
            Ok(VcpuExit::IoOut(STEP_PORT, &[DONE])) => return Ok(()),
            Ok(VcpuExit::IoOut(STEP_PORT, &[step])) => {
                reached = step;
                continue;
            }
            Ok(other) => format!("the vCPU stopped ({other:?})"),
            Err(error) if error.errno() == libc::EINTR => {
                format!("nothing happened for {} s", TIME.as_secs())
            }
            Err(error) => format!("running it failed ({error})"),
        };
        let step = STEPS
            .get(usize::from(reached))
            .copied()
            .unwrap_or("an unknown step");
        return Err(CheckError::Instruction { step, exit });
    }
}

/// Interrupts the thread that started it when its time is over.
struct Alarm {
    cancelled: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Alarm {
    fn start(time: Duration) -> std::io::Result<Alarm> {
        vcpu::install_kick_handler();
        let cancelled = Arc::new(AtomicBool::new(false));
        let flag = cancelled.clone();
        // SAFETY: pthread_self has no preconditions; the thread outlives the alarm, which it joins.
        let target = unsafe { libc::pthread_self() };
        let thread = thread::Builder::new().name("alarm".to_owned()).spawn(move || {
            thread::park_timeout(time);
            while !flag.load(Ordering::Acquire) {
                // SAFETY: the target joins this thread before it ends.
                unsafe { libc::pthread_kill(target, vcpu::kick_signal()) };
                // The signal may have come just before KVM_RUN: repeat until it was seen.
                thread::park_timeout(Duration::from_millis(100));
            }
        })?;
        Ok(Alarm {
            cancelled,
            thread: Some(thread),
        })
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It does nothing that could panic.
            let _ = thread.join();
        }
    }
}
