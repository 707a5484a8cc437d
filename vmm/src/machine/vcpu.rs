//! Virtual CPUs: initial state, a thread for each, stopping and resuming them.

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::board::Board;
use crate::boot::linux::{Entry, GDT_LIMIT};
use crate::layout;

/// Why a vCPU could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused.
    #[error("vCPU {id}: {action}: {source}")]
    Kvm {
        /// Number of the vCPU.
        id: u8,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: kvm_ioctls::Error,
    },
    /// No thread.
    #[error("vCPU {id}: starting its thread: {source}")]
    Thread {
        /// Number of the vCPU.
        id: u8,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// Sets up CPUID and, where `entry` is given, the registers that enter a kernel in 64-bit mode. Other
/// vCPUs wait for their start-up interrupt.
pub fn set_up(vcpu: &VcpuFd, id: u8, cpuid: &CpuId, entry: Option<Entry>) -> Result<(), VcpuError> {
    let kvm = |action| move |source| VcpuError::Kvm { id, action, source };
    vcpu.set_cpuid2(cpuid).map_err(kvm("setting CPUID"))?;
    set_lint(vcpu).map_err(kvm("wiring its local APIC"))?;
    let Some(entry) = entry else { return Ok(()) };
    set_msrs(vcpu).map_err(kvm("setting MSRs"))?;
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(kvm("setting the FPU"))?;
    vcpu.set_regs(&kvm_regs {
        rflags: 2,
        rip: entry.rip,
        rsi: entry.rsi,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        ..Default::default()
    })
    .map_err(kvm("setting registers"))?;

    let mut sregs = vcpu.get_sregs().map_err(kvm("reading system registers"))?;
    let code = segment(0x10, 0xb, true);
    let data = segment(0x18, 0x3, false);
    sregs.cs = code;
    for register in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *register = data;
    }
    sregs.gdt.base = layout::BOOT_GDT;
    sregs.gdt.limit = GDT_LIMIT;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = layout::BOOT_PAGE_TABLES;
    const PAE: u64 = 1 << 5;
    const PROTECTED_AND_PAGING: u64 = 1 | 1 << 31;
    const LONG_MODE: u64 = 1 << 8 | 1 << 10;
    sregs.cr4 |= PAE;
    sregs.cr0 |= PROTECTED_AND_PAGING;
    sregs.efer |= LONG_MODE;
    vcpu.set_sregs(&sregs).map_err(kvm("setting system registers"))
}

/// A flat segment: `kind` as in its descriptor, 64-bit code or 32-bit data.
fn segment(selector: u16, kind: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// LINT0 takes the PIC's interrupt, LINT1 the NMI, as firmware leaves them.
fn set_lint(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_NMI: u32 = 4 << 8;
    const MODE_EXTINT: u32 = 7 << 8;
    const MODE_MASK: u32 = 7 << 8;
    let mut lapic = vcpu.get_lapic()?;
    for (register, mode) in [(LVT_LINT0, MODE_EXTINT), (LVT_LINT1, MODE_NMI)] {
        let mut bytes = [0u8; 4];
        for (byte, value) in bytes.iter_mut().zip(&lapic.regs[register..]) {
            *byte = *value as u8;
        }
        let value = u32::from_le_bytes(bytes) & !MODE_MASK | mode;
        for (value, byte) in lapic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
            *value = byte as _;
        }
    }
    vcpu.set_lapic(&lapic)
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    const MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRINGS: u64 = 1;
    const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
    const MTRR_ENABLE: u64 = 1 << 11;
    const WRITE_BACK: u64 = 6;
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    // MTRRs as firmware leaves them: all of RAM is write-back.
    let msrs = [
        entry(MISC_ENABLE, FAST_STRINGS),
        entry(MTRR_DEFAULT_TYPE, MTRR_ENABLE | WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&msrs).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
    let set = vcpu.set_msrs(&msrs)?;
    if set < 2 {
        // Some hosts have no IA32_MISC_ENABLE for the guest; a kernel works without.
        tracing::debug!(set, "not all boot MSRs could be set");
    }
    Ok(())
}

/// What all vCPU threads of a machine obey.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Pause,
    Run,
    End,
}

struct Shared {
    order: Mutex<Order>,
    changed: Condvar,
    /// Threads that are inside KVM or about to enter it.
    running: Mutex<usize>,
    stopped: Condvar,
}

impl Shared {
    fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn running(&self) -> MutexGuard<'_, usize> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The vCPU threads of one machine. They are made paused; dropped, they end.
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<Thread>,
}

struct Thread {
    handle: Option<JoinHandle<()>>,
    /// Held by the thread while it runs guest code, and by whoever reads or sets the vCPU's state while it
    /// is paused.
    vcpu: Arc<Mutex<VcpuFd>>,
    /// The vCPU cannot go on; the board was told why.
    ended: Arc<AtomicBool>,
    /// `immediate_exit` of the vCPU's `kvm_run`; null once the thread has ended and the page is unmapped.
    immediate_exit: Arc<Mutex<AtomicPtr<u8>>>,
}

impl Vcpus {
    /// Starts a paused thread for each of `vcpus`.
    pub fn start(vcpus: Vec<VcpuFd>, board: &Arc<Board>) -> Result<Vcpus, VcpuError> {
        install_kick_handler();
        let shared = Arc::new(Shared {
            order: Mutex::new(Order::Pause),
            changed: Condvar::new(),
            running: Mutex::new(0),
            stopped: Condvar::new(),
        });
        let mut started = Vcpus {
            shared: shared.clone(),
            threads: Vec::new(),
        };
        for (id, mut vcpu) in vcpus.into_iter().enumerate() {
            let page: *mut u8 = &mut vcpu.get_kvm_run().immediate_exit;
            let immediate_exit = Arc::new(Mutex::new(AtomicPtr::new(page)));
            let (shared, board, exit) = (shared.clone(), board.clone(), immediate_exit.clone());
            let vcpu = Arc::new(Mutex::new(vcpu));
            let ended = Arc::new(AtomicBool::new(false));
            let (own, has_ended) = (vcpu.clone(), ended.clone());
            let handle = thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn(move || {
                    run(&own, &shared, &board, &has_ended);
                    // Nobody may touch the page any more when the vCPU's last owner unmaps it.
                    exit.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .store(std::ptr::null_mut(), Ordering::SeqCst);
                    drop(own);
                })
                .map_err(|source| VcpuError::Thread { id: id as u8, source })?;
            started.threads.push(Thread {
                handle: Some(handle),
                vcpu,
                ended,
                immediate_exit,
            });
        }
        Ok(started)
    }

    /// Lets all vCPUs run.
    pub fn resume(&self) {
        *self.shared.order() = Order::Run;
        self.shared.changed.notify_all();
    }

    /// As [`Vcpus::pause`], without waiting: a vCPU that waits for memory may not stop before it has it.
    pub fn ask_to_pause(&self) {
        self.give(Order::Pause);
    }

    /// Stops all vCPUs; when this returns none runs guest code, and what their last exits asked of devices
    /// is complete in the registers too: see [`run_until_ordered`].
    pub fn pause(&self) {
        self.give(Order::Pause);
        let mut running = self.shared.running();
        while *running > 0 {
            running = self
                .shared
                .stopped
                .wait(running)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether a vCPU has met something after which it cannot go on: there is no state of it to be saved.
    pub fn any_ended(&self) -> bool {
        self.threads
            .iter()
            .any(|thread| thread.ended.load(Ordering::Acquire))
    }

    /// Has `read` look at each vCPU; all are paused.
    pub fn each<T, E>(&self, mut read: impl FnMut(usize, &VcpuFd) -> Result<T, E>) -> Result<Vec<T>, E> {
        self.threads
            .iter()
            .enumerate()
            .map(|(id, thread)| read(id, &lock(&thread.vcpu)))
            .collect()
    }

    fn give(&self, order: Order) {
        *self.shared.order() = order;
        self.shared.changed.notify_all();
        for thread in &self.threads {
            thread.kick();
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.give(Order::End);
        for thread in &mut self.threads {
            if let Some(handle) = thread.handle.take()
                && handle.join().is_err()
            {
                tracing::error!("a vCPU thread has panicked");
            }
        }
    }
}

impl Thread {
    /// Makes the vCPU leave KVM_RUN now, or return from its next one at once.
    fn kick(&self) {
        let exit = self.immediate_exit.lock().unwrap_or_else(PoisonError::into_inner);
        let page = exit.load(Ordering::SeqCst);
        if page.is_null() {
            return;
        }
        // SAFETY: the page is mapped as long as the pointer is not null, which the lock keeps so; a single
        // byte cannot be torn, and the kernel reads it afresh at each KVM_RUN.
        unsafe { page.write_volatile(1) };
        fence(Ordering::SeqCst);
        if let Some(handle) = &self.handle {
            // SAFETY: the thread has not been joined, so that its handle is valid; the signal's handler
            // does nothing.
            unsafe { libc::pthread_kill(handle.as_pthread_t(), kick_signal()) };
        }
    }
}

/// The signal that makes a thread leave KVM_RUN.
pub fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// The signal only has to interrupt KVM_RUN: without SA_RESTART and with a handler that does nothing.
pub fn install_kick_handler() {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: a zeroed sigaction is valid, and the handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        libc::sigaction(kick_signal(), &action, std::ptr::null_mut());
    }
}

/// Body of a vCPU's thread.
fn run(vcpu: &Mutex<VcpuFd>, shared: &Shared, board: &Board, has_ended: &AtomicBool) {
    loop {
        // Cleared before the order is read: an order given later sets it again.
        lock(vcpu).set_kvm_immediate_exit(0);
        fence(Ordering::SeqCst);
        let mut order = shared.order();
        let waited = *order != Order::Run;
        while *order == Order::Pause {
            order = shared.changed.wait(order).unwrap_or_else(PoisonError::into_inner);
        }
        if *order == Order::End {
            return;
        }
        // Counted while the order is held, so that whoever pauses sees it.
        *shared.running() += 1;
        drop(order);
        let mut own = lock(vcpu);
        if waited {
            // Tells the guest's watchdogs that it was stopped; a guest without kvm-clock refuses it.
            let _ = own.kvmclock_ctrl();
        }
        let ended = run_until_ordered(&mut own, board);
        drop(own);
        if ended {
            has_ended.store(true, Ordering::Release);
        }
        let mut running = shared.running();
        *running -= 1;
        shared.stopped.notify_all();
        drop(running);
        if ended {
            // The machine is told; what comes next is ordered by it.
            let mut order = shared.order();
            while *order != Order::End {
                order = shared.changed.wait(order).unwrap_or_else(PoisonError::into_inner);
            }
            return;
        }
    }
}

fn lock(vcpu: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs guest code until an order interrupts it (`false`) or it cannot go on (`true`).
///
/// An exit for port or memory I/O leaves an instruction half done: KVM puts what was read into registers and
/// moves on only when it is entered again (KVM API, 5, `KVM_EXIT_IO` and `KVM_EXIT_MMIO`). So there is one
/// way out on an order: an entry that returns because of `immediate_exit`, after it has completed what the
/// exit before it left.
fn run_until_ordered(vcpu: &mut VcpuFd, board: &Board) -> bool {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => board.read_port(port, data),
            Ok(VcpuExit::IoOut(port, data)) => board.write_port(port, data),
            Ok(VcpuExit::MmioRead(address, data)) => board.read_memory(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => board.write_memory(address, data),
            // With an in-kernel APIC a halted vCPU sleeps in the kernel.
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
            Ok(VcpuExit::Shutdown) => {
                board.crashed(&format!("a vCPU shut down (triple fault) at {}", position(vcpu)));
                return true;
            }
            Ok(VcpuExit::SystemEvent(kind, data)) => {
                board.crashed(&format!("KVM system event {kind} {data:?}"));
                return true;
            }
            Ok(VcpuExit::InternalError) => {
                board.crashed(&format!(
                    "KVM could not emulate an instruction of the guest (KVM_EXIT_INTERNAL_ERROR) at {}; `understudy-vmm check` tells whether this host can run stock kernels",
                    position(vcpu)
                ));
                return true;
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                board.crashed(&format!(
                    "the processor refused to enter the guest (reason {reason:#x} on CPU {cpu})"
                ));
                return true;
            }
            Ok(other) => {
                board.crashed(&format!("KVM exit that is not handled: {other:?}"));
                return true;
            }
            Err(error) if error.errno() == libc::EINTR => return false,
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(error) => {
                board.crashed(&format!("running a vCPU: {error}"));
                return true;
            }
        }
    }
}

/// Where a vCPU stopped, for the exit reason.
fn position(vcpu: &VcpuFd) -> String {
    match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => format!(
            "rip {:#x}, rsp {:#x}, cr0 {:#x}, cr2 {:#x}, cr3 {:#x}, cr4 {:#x}",
            regs.rip, regs.rsp, sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4
        ),
        (Err(error), _) | (_, Err(error)) => format!("an unknown place ({error})"),
    }
}
