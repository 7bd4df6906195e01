//! Other processes' memory and descriptors.

use std::{
    fs, io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use crate::server::pidfd_open;

/// The process that a thread belongs to.
pub(crate) fn process_of_thread(tid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}

/// Reads from a process's memory, all or nothing.
pub(crate) fn read(pid: u32, address: u64, into: &mut [u8]) -> io::Result<()> {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = libc::iovec { iov_base: address as usize as *mut libc::c_void, iov_len: into.len() };
    // SAFETY: the kernel checks the remote range; the local one is `into`.
    let done = unsafe { libc::process_vm_readv(pid as i32, &raw const local, 1, &raw const remote, 1, 0) };
    complete(done, into.len())
}

/// Writes into a process's memory.
pub(crate) fn write(pid: u32, address: u64, from: &[u8]) -> io::Result<()> {
    let local = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let remote = libc::iovec { iov_base: address as usize as *mut libc::c_void, iov_len: from.len() };
    // SAFETY: the kernel checks the remote range and only reads the local one.
    let done = unsafe { libc::process_vm_writev(pid as i32, &raw const local, 1, &raw const remote, 1, 0) };
    complete(done, from.len())
}

fn complete(done: isize, wanted: usize) -> io::Result<()> {
    match usize::try_from(done) {
        Ok(done) if done == wanted => Ok(()),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Err(_negative) => Err(io::Error::last_os_error()),
    }
}

/// A duplicate of another process's descriptor.
pub(crate) fn duplicate(pid: u32, descriptor: u32) -> io::Result<OwnedFd> {
    let process = pidfd_open(pid).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: takes numbers only.
    let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), descriptor, 0) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that the kernel has just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(copy as i32) })
}
