//! Clock, precise sleep, and waiting on shared words.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

/// CLOCK_MONOTONIC, the same in every process.
pub fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec, which lives until the call returns.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Sleeps until that point of CLOCK_MONOTONIC; returns at once if it has passed.
pub fn sleep_until(deadline_ns: u64) {
    let time = libc::timespec {
        tv_sec: (deadline_ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (deadline_ns % 1_000_000_000) as libc::c_long,
    };
    loop {
        // SAFETY: reads one timespec; the remainder is not wanted for an absolute deadline.
        let result = unsafe {
            libc::clock_nanosleep(
                libc::CLOCK_MONOTONIC,
                libc::TIMER_ABSTIME,
                &raw const time,
                std::ptr::null_mut(),
            )
        };
        if result != libc::EINTR {
            return;
        }
    }
}

/// Uses the CPU until that point of CLOCK_MONOTONIC.
pub fn burn_until(deadline_ns: u64) {
    while now_ns() < deadline_ns {
        std::hint::spin_loop();
    }
}

/// Sleeps while `word` holds `seen`, at most `limit`. May return early.
pub fn wait_on(word: &AtomicU32, seen: u32, limit: Duration) {
    let time = libc::timespec {
        tv_sec: limit.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(limit.subsec_nanos()),
    };
    // SAFETY: FUTEX_WAIT reads the word, which the reference keeps alive, and the timespec. The word may lie in memory
    // shared between processes, so the private flag is not set.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, seen, &raw const time);
    }
}

/// Changes `word` and wakes all who wait on it, in any process.
pub fn advance(word: &AtomicU32) {
    word.fetch_add(1, Ordering::Release);
    // SAFETY: FUTEX_WAKE uses the address of the word only.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX);
    }
}
