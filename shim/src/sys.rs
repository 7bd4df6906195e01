//! System calls that std does not offer.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::atomic::AtomicU32,
    time::Duration,
};

use libc::c_int;

/// CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Sleeps until woken, until `word` is no longer `expected`, or for `limit`.
pub(crate) fn futex_wait(word: &AtomicU32, expected: u32, limit: Duration) {
    let time = libc::timespec { tv_sec: limit.as_secs() as _, tv_nsec: limit.subsec_nanos().into() };
    // SAFETY: the word and the time outlive the call. Any error means "look again", which the caller does.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            expected,
            &raw const time,
        )
    };
}

/// Wakes everybody who sleeps on `word`.
pub(crate) fn futex_wake_all(word: &AtomicU32) {
    // SAFETY: the word outlives the call.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, c_int::MAX)
    };
}

/// `MEMBARRIER_CMD_PRIVATE_EXPEDITED`.
const MEMBARRIER_PRIVATE_EXPEDITED: c_int = 1 << 3;
/// `MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED`.
const MEMBARRIER_REGISTER: c_int = 1 << 4;

fn membarrier_command(command: c_int) -> bool {
    // SAFETY: the call takes no pointers.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}

/// Announces that this process uses [`membarrier`]; whether the kernel can.
pub(crate) fn register_membarrier() -> bool {
    membarrier_command(MEMBARRIER_REGISTER)
}

/// Returns after every thread of the process has passed a full memory barrier.
pub(crate) fn membarrier() -> bool {
    membarrier_command(MEMBARRIER_PRIVATE_EXPEDITED)
}

/// Whether the calling code runs in a signal handler on a stack of its own.
pub(crate) fn on_signal_stack() -> bool {
    // SAFETY: an all-zero structure is a valid place for the answer.
    unsafe {
        let mut stack: libc::stack_t = std::mem::zeroed();
        libc::sigaltstack(std::ptr::null(), &raw mut stack) == 0 && stack.ss_flags & libc::SS_ONSTACK != 0
    }
}

fn owned(fd: c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Two connected sockets that block nobody.
pub(crate) fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: two descriptors into a live local; on success both are fresh and nobody else's.
    unsafe {
        if libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])))
    }
}

/// Makes a poll on the other end of a socket pair return; without a signal if that end is gone.
pub(crate) fn signal(end: RawFd) {
    // SAFETY: one byte from a constant. A full socket is signalled already.
    let _ = unsafe { libc::send(end, c"!".as_ptr().cast(), 1, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
}

/// Takes all signals back.
pub(crate) fn clear(end: RawFd) {
    let mut bytes = [0u8; 256];
    // SAFETY: so many bytes into a live local.
    while unsafe { libc::recv(end, bytes.as_mut_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT) }
        == bytes.len() as isize
    {}
}

/// A memory file of `len` bytes whose size is fixed for good.
pub(crate) fn sealed_memory(len: usize) -> io::Result<OwnedFd> {
    // SAFETY: a valid name; the other calls take no pointers. C libraries before 2.27 have no wrapper of this call.
    unsafe {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        let fd = owned(libc::syscall(libc::SYS_memfd_create, c"nvshare-page".as_ptr(), flags) as c_int)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        if libc::ftruncate(fd.as_raw_fd(), len as libc::off_t) != 0
            || libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) != 0
        {
            return Err(io::Error::last_os_error());
        }
        Ok(fd)
    }
}

/// How often to look around where polling fails.
const BLIND: Duration = Duration::from_millis(50);

/// Waits until a descriptor can be read or has failed, or for `limit`; which of them can. Never returns at once in vain.
pub(crate) fn poll<const N: usize>(descriptors: [Option<RawFd>; N], limit: Duration) -> [bool; N] {
    // poll(2) skips negative descriptors.
    let mut set =
        descriptors.map(|fd| libc::pollfd { fd: fd.unwrap_or(-1), events: libc::POLLIN, revents: 0 });
    let ms = limit.as_nanos().div_ceil(1_000_000).min(c_int::MAX as u128) as c_int;
    // SAFETY: an array of N live entries.
    let ready = unsafe { libc::poll(set.as_mut_ptr(), N as libc::nfds_t, ms) };
    if ready < 0 {
        // Not allowed here (seccomp, limits): look around by time.
        std::thread::sleep(limit.min(BLIND));
    }
    set.map(|entry| ready > 0 && entry.revents != 0)
}

/// Runs `f` with all signals blocked, so that a thread which it starts never runs a handler of the program.
pub(crate) fn without_signals<T>(f: impl FnOnce() -> T) -> T {
    // SAFETY: both sets are live locals; the mask is put back before they end.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        let blocked = libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) == 0;
        let result = f();
        if blocked {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        }
        result
    }
}

/// Allows the process to write to whole pages of its memory, or only to read them; whether that could be done.
pub(crate) fn protect(address: u64, bytes: u64, writable: bool) -> bool {
    let access = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
    // SAFETY: changes no bytes; the caller only names memory whose bytes the process does not touch by itself.
    bytes == 0 || unsafe { libc::mprotect(address as *mut libc::c_void, bytes as usize, access) == 0 }
}

/// Whether the process may write to its memory at this address.
pub(crate) fn may_be_written(address: u64) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let of = |line: &&str| {
        let bounds = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
        let number = |text: &str| u64::from_str_radix(text, 16).ok();
        bounds.and_then(|(begin, end)| Some((number(begin)?..number(end)?).contains(&address))) == Some(true)
    };
    maps.lines()
        .find(of)
        .is_some_and(|line| line.split(' ').nth(1).is_some_and(|access| access.starts_with("rw")))
}

/// The calling thread's number.
pub(crate) fn thread_id() -> i32 {
    // SAFETY: takes nothing.
    unsafe { libc::syscall(libc::SYS_gettid) as i32 }
}

/// Whether a thread of this process is still there.
pub(crate) fn thread_lives(id: i32) -> bool {
    // SAFETY: takes numbers only; signal 0 is none.
    let gone = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), id, 0) != 0 };
    !gone || io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH)
}

/// Ends the calling thread, and nothing of it runs any more.
pub(crate) fn vanish() -> ! {
    // SAFETY: takes a number only, and does not return. What the thread holds stays as it is.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!("the thread has ended")
}

/// While it lives, the calling thread is not cancelled (`pthread_cancel`).
#[derive(Debug)]
pub(crate) struct Uncancelled {
    before: c_int,
    /// The state belongs to the thread.
    not_send: std::marker::PhantomData<*const ()>,
}

unsafe extern "C" {
    fn pthread_setcancelstate(state: c_int, before: *mut c_int) -> c_int;
}

/// `PTHREAD_CANCEL_DISABLE`.
const CANCEL_DISABLE: c_int = 1;

impl Uncancelled {
    /// From here on.
    pub(crate) fn begin() -> Self {
        let mut before = 0;
        // SAFETY: a live local; the call cannot fail with this state.
        unsafe { pthread_setcancelstate(CANCEL_DISABLE, &raw mut before) };
        Self { before, not_send: std::marker::PhantomData }
    }
}

impl Drop for Uncancelled {
    fn drop(&mut self) {
        let mut ignored = 0;
        // SAFETY: as above; the state is the one that was.
        unsafe { pthread_setcancelstate(self.before, &raw mut ignored) };
    }
}
