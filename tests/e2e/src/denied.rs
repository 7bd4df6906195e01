//! System calls that a program may not make, as in a sandbox or on an old kernel.
#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::thread;

use libc::{c_int, c_long, sock_filter, sock_fprog};

/// Runs `f` in a thread in which these system calls fail with `errno`, as they do in threads that it starts.
///
/// # Panics
/// If the kernel has no seccomp, or `f` panics.
pub fn denying<T: Send>(calls: &[c_long], errno: c_int, f: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let denied = scope.spawn(|| {
            deny(calls, errno, 0);
            f()
        });
        denied.join().unwrap()
    })
}

/// Makes these system calls fail with `errno` in all threads of the process, for good.
///
/// # Panics
/// If the kernel has no seccomp.
pub fn deny_everywhere(calls: &[c_long], errno: c_int) {
    deny(calls, errno, libc::SECCOMP_FILTER_FLAG_TSYNC);
}

fn deny(calls: &[c_long], errno: c_int, flags: libc::c_ulong) {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const ANSWER: u32 = libc::BPF_RET | libc::BPF_K;
    let step = |code: u32, jt, k| sock_filter { code: code as u16, jt, jf: 0, k };
    let mut filter = vec![step(LOAD, 0, 0)];
    // Each comparison that holds jumps over the rest and the permission.
    filter.extend(
        (1..=calls.len()).rev().zip(calls).map(|(over, &call)| step(IF_EQUAL, over as u8, call as u32)),
    );
    filter.push(step(ANSWER, 0, libc::SECCOMP_RET_ALLOW));
    filter.push(step(ANSWER, 0, libc::SECCOMP_RET_ERRNO | errno as u32));
    let program = sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the filter lives through the call, which copies it.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let code = libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program);
        assert_eq!(code, 0, "{}", std::io::Error::last_os_error());
    }
}
