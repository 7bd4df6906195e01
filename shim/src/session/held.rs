//! Descriptors of ours in a process that does with descriptors what it likes.
//!
//! **Problem.** Programs that turn into daemons close every descriptor there is, and their next `open` gets the numbers that
//! were ours. What we then wrote, read or closed under such a number would be theirs. And a program that was started
//! without standard input expects its first `open` to give 0.
//!
//! **Approach.** Our descriptors live at high numbers, out of the way of `open`, which takes the lowest that is free. Each is
//! remembered with the identity of its file, and checked against it before every use. Each socket has an identity of its
//! own, unlike an eventfd, and none of ours raises SIGPIPE, unlike a pipe. Between check and use a moment remains; the high number makes it harmless
//! in practice.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicI32, AtomicU64, Ordering},
};

/// Where our numbers begin, if the process may have so many.
const HIGH: RawFd = 800;
/// Numbers below are standard input, output and error.
const LOW: RawFd = 3;

/// Which file a descriptor is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

fn identity(fd: RawFd) -> io::Result<Identity> {
    // SAFETY: an all-zero structure is a valid place for the answer.
    unsafe {
        let mut status: libc::stat64 = std::mem::zeroed();
        if libc::fstat64(fd, &raw mut status) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Identity { device: status.st_dev as u64, inode: status.st_ino as u64 })
    }
}

/// A descriptor of ours.
#[derive(Debug)]
pub(super) struct Held {
    number: RawFd,
    identity: Identity,
}

impl Held {
    /// Moves a fresh descriptor out of the program's way.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: the call takes no pointers.
        let move_to = |least: RawFd| unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, least) };
        let moved = [HIGH, LOW].into_iter().map(move_to).find(|&number| number >= 0);
        let Some(number) = moved else { return Err(io::Error::last_os_error()) };
        // SAFETY: a fresh descriptor that nobody else owns.
        let moved = unsafe { OwnedFd::from_raw_fd(number) };
        drop(fd);
        let identity = identity(number)?;
        // Closed by `Drop`, if it is still ours then.
        std::mem::forget(moved);
        Ok(Self { number, identity })
    }

    /// The number, if it still is this file's.
    pub(super) fn number(&self) -> Option<RawFd> {
        identity(self.number).is_ok_and(|identity| identity == self.identity).then_some(self.number)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(number) = self.number() {
            // SAFETY: ours, and not used after this.
            unsafe { libc::close(number) };
        }
    }
}

/// What other threads, and a forked child, know of a descriptor that the session's thread holds.
#[derive(Debug)]
pub(super) struct Shown {
    number: AtomicI32,
    device: AtomicU64,
    inode: AtomicU64,
}

impl Default for Shown {
    fn default() -> Self {
        Self { number: AtomicI32::new(-1), device: AtomicU64::new(0), inode: AtomicU64::new(0) }
    }
}

impl Shown {
    /// Shows this descriptor, in place of another or none.
    pub(super) fn show(&self, held: Option<&Held>) {
        self.number.store(-1, Ordering::SeqCst);
        if let Some(held) = held {
            self.device.store(held.identity.device, Ordering::SeqCst);
            self.inode.store(held.identity.inode, Ordering::SeqCst);
            self.number.store(held.number, Ordering::SeqCst);
        }
    }

    /// The number, if it still is the file's that was shown. What is read while another is being shown fits no file.
    pub(super) fn number(&self) -> Option<RawFd> {
        let number = self.number.load(Ordering::SeqCst);
        let shown =
            Identity { device: self.device.load(Ordering::SeqCst), inode: self.inode.load(Ordering::SeqCst) };
        (number >= 0 && identity(number).is_ok_and(|identity| identity == shown)).then_some(number)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;
    use crate::sys;

    #[test]
    fn a_number_that_has_become_somebody_elses_is_neither_used_nor_closed() {
        let (read, _write) = sys::socket_pair().unwrap();
        let held = Held::new(read).unwrap();
        let shown = Shown::default();
        assert_eq!(shown.number(), None);
        shown.show(Some(&held));
        let number = held.number().unwrap();
        assert_eq!(shown.number(), Some(number));
        assert!(number >= HIGH, "{number} is in the way of the program");

        let (other, _write) = sys::socket_pair().unwrap();
        // SAFETY: both are open; the first is ours to give away.
        assert_eq!(unsafe { libc::dup2(other.into_raw_fd(), number) }, number);
        assert_eq!((held.number(), shown.number()), (None, None));
        drop(held);
        assert!(identity(number).is_ok(), "the program's descriptor was closed");
    }
}
