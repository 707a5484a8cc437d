//! The system calls that the process may make, from its start on, in all threads.
//!
//! The list was made by reading what the process calls and by running it through boots, resets, handovers, splits
//! and merges, and from what the allocator and the standard library do at their own discretion. A call
//! that is not on it ends the process and is named on stderr: a change that needs a new call shows in the
//! first test that reaches it, and adds it here with its reason.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// Why the process could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The filter is wrong or the kernel has no seccomp.
    #[error("confining the process by seccomp: {0}; the host's kernel needs CONFIG_SECCOMP_FILTER")]
    Filter(String),
    /// The handler for violations.
    #[error("installing the handler of seccomp violations: {0}")]
    Handler(io::Error),
}

/// Calls that are allowed with any arguments.
const PLAIN: &[libc::c_long] = &[
    // Files: disks, layers, records, kernels, logs.
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_flock,
    libc::SYS_fcntl,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rmdir,
    libc::SYS_getdents64,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_chmod,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_umask,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    // Sockets: control API, vsock, taps, isolation.
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Waiting and waking.
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    // Memory; mmap and mprotect are below.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_memfd_create,
    // Threads and signals.
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_prlimit64,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Random numbers: virtio-rng, UUIDs, hash maps.
    libc::SYS_getrandom,
];

/// KVM's requests have this type in their second byte.
const KVM_TYPE: u64 = 0xae;
/// So have those of userfaultfd: filling guest RAM while it is restored. Descriptors are opened before.
const USERFAULT_TYPE: u64 = 0xaa;
/// Requests to a tap (`linux/if_tun.h`), and those of the standard library for descriptors.
const IOCTLS: &[u64] = &[
    0x4004_54ca, // TUNSETIFF
    0x8004_54cf, // TUNGETFEATURES
    0x4004_54d0, // TUNSETOFFLOAD
    0x8004_54d2, // TUNGETIFF
    0x4004_54d8, // TUNSETVNETHDRSZ
    0x8004_54d7, // TUNGETVNETHDRSZ
    0x8933,      // SIOCGIFINDEX: does the tap exist?
    0x5421,      // FIONBIO
    0x5451,      // FIOCLEX
    0x541b,      // FIONREAD
];

/// Confines the process: the filter holds for all threads, those that exist and those to come, and no
/// program that it might execute would have more rights.
pub fn confine() -> Result<(), SeccompError> {
    install_handler().map_err(SeccompError::Handler)?;
    let program = program().map_err(SeccompError::Filter)?;
    seccompiler::apply_filter_all_threads(&program).map_err(|e| SeccompError::Filter(e.to_string()))
}

fn program() -> Result<BpfProgram, String> {
    let text = |error: seccompiler::BackendError| error.to_string();
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = PLAIN.iter().map(|call| (*call, Vec::new())).collect();
    let rule = |argument, length, operation, value| {
        SeccompCondition::new(argument, length, operation, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
            .map_err(text)
    };
    let masked = |argument, mask, value| {
        rule(
            argument,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::MaskedEq(mask),
            value,
        )
    };
    let equal = |argument, value| rule(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value);

    // Nothing becomes executable.
    let executable = libc::PROT_EXEC as u64;
    rules.insert(libc::SYS_mmap, vec![masked(2, executable, 0)?]);
    rules.insert(libc::SYS_mprotect, vec![masked(2, executable, 0)?]);
    // Sockets of this host only.
    rules.insert(libc::SYS_socket, vec![equal(0, libc::AF_UNIX as u64)?]);
    rules.insert(libc::SYS_socketpair, vec![equal(0, libc::AF_UNIX as u64)?]);
    // Threads are named, and so is the guest's RAM.
    rules.insert(
        libc::SYS_prctl,
        vec![
            equal(0, libc::PR_SET_NAME as u64)?,
            equal(0, libc::PR_SET_VMA as u64)?,
        ],
    );
    let mut ioctls = vec![
        masked(1, 0xff00, KVM_TYPE << 8)?,
        masked(1, 0xff00, USERFAULT_TYPE << 8)?,
    ];
    for request in IOCTLS {
        ioctls.push(equal(1, *request)?);
    }
    rules.insert(libc::SYS_ioctl, ioctls);

    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
    .map_err(text)?;
    filter.try_into().map_err(text)
}

/// Says which call was refused and ends the process.
fn install_handler() -> io::Result<()> {
    // SAFETY: a zeroed sigaction is valid, and the handler is async-signal-safe.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_flags = libc::SA_SIGINFO;
        action.sa_sigaction = refused as extern "C" fn(libc::c_int, *const libc::siginfo_t, *mut libc::c_void)
            as libc::sighandler_t;
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut())
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Exit code of a process that made a forbidden call: 128 + SIGSYS, as a shell reports it.
const EXIT_CODE: libc::c_int = 128 + libc::SIGSYS;

extern "C" fn refused(_: libc::c_int, info: *const libc::siginfo_t, _: *mut libc::c_void) {
    // Offset of `si_syscall` in the SIGSYS form of siginfo_t on x86-64: header (16) and call address (8).
    const SYSCALL_OFFSET: usize = 24;
    // SAFETY: the kernel passes a siginfo_t of 128 bytes; the field is aligned to four.
    let call = unsafe { info.cast::<u8>().add(SYSCALL_OFFSET).cast::<i32>().read() };
    let mut text = *b"understudy-vmm: seccomp: system call       is not allowed (vmm/src/seccomp.rs); ending the process\n";
    const DIGITS_END: usize = 42;
    let mut rest = call.unsigned_abs();
    for place in (DIGITS_END - 5..DIGITS_END).rev() {
        text[place] = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    // SAFETY: both calls are async-signal-safe and allowed; the buffer is local.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
        libc::_exit(EXIT_CODE);
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const CHILD: &str = "UNDERSTUDY_SECCOMP_TEST_CHILD";

    /// The filter cannot be taken off again, so that each case runs in a process of its own: this test,
    /// executed again with the variable set.
    #[test]
    fn a_forbidden_system_call_ends_the_process_and_is_named() {
        if let Ok(case) = std::env::var(CHILD) {
            confine().unwrap();
            std::thread::spawn(move || match case.as_str() {
                "allowed" => drop(std::fs::read("/proc/self/stat").unwrap()),
                // SAFETY: the call has no preconditions; it is expected to end the process.
                "getppid" => unsafe {
                    libc::syscall(libc::SYS_getppid);
                },
                _ => drop(std::net::TcpListener::bind("127.0.0.1:0")),
            })
            .join()
            .unwrap();
            return;
        }
        for (case, call) in [
            ("allowed", None),
            ("getppid", Some(libc::SYS_getppid)),
            ("socket", Some(libc::SYS_socket)),
        ] {
            let output = Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "--nocapture",
                    "seccomp::tests::a_forbidden_system_call_ends_the_process_and_is_named",
                ])
                .env(CHILD, case)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            match call {
                None => assert!(output.status.success(), "{case}: {text}"),
                Some(call) => {
                    assert_eq!(output.status.code(), Some(EXIT_CODE), "{case}: {text}");
                    assert!(text.contains(&format!("system call {call:05} is not")), "{text}");
                }
            }
        }
    }
}
