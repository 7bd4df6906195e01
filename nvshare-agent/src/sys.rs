//! System calls that need unsafe code: mappings shared with clients and the driver, bare ioctls, pidfds.

use std::{
    ffi::c_void,
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd as _, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use nvshare_wire::page::{PAGE_LEN, Page};
use rustix::mm::{MapFlags, ProtFlags};
use tokio::io::{Interest, unix::AsyncFd};

/// A client's page, mapped read-only. The client may write to it at any time.
#[derive(Debug)]
pub(crate) struct ClientPage {
    base: NonNull<Page>,
}

// SAFETY: the mapping is shared memory accessed through atomics only, from any thread.
unsafe impl Send for ClientPage {}
// SAFETY: as above.
unsafe impl Sync for ClientPage {}

impl ClientPage {
    /// Maps the first [`PAGE_LEN`] bytes of `fd`.
    ///
    /// The caller has checked that the file has that size and is sealed against shrinking; otherwise a client
    /// could make a later read fault.
    pub(crate) fn map(fd: impl AsFd) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address that the kernel chooses aliases nothing.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), PAGE_LEN, ProtFlags::READ, MapFlags::SHARED, fd, 0)?
        };
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap gave a null mapping"))?;
        Ok(Self { base })
    }

    /// The page. Its fields are atomics, every value of them is valid.
    pub(crate) fn get(&self) -> &Page {
        // SAFETY: the mapping is page-aligned, PAGE_LEN ≥ size_of::<Page>() bytes long, lives as long as `self`,
        // and any bit pattern is a valid Page.
        unsafe { self.base.as_ref() }
    }
}

impl Drop for ClientPage {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` and no reference outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), PAGE_LEN) };
    }
}

/// Memory that the driver writes into.
#[derive(Debug)]
pub struct DriverMemory {
    base: NonNull<c_void>,
    len: usize,
}

// SAFETY: the mapping is read and written through atomics only, from any thread.
unsafe impl Send for DriverMemory {}
// SAFETY: as above.
unsafe impl Sync for DriverMemory {}

impl DriverMemory {
    /// At least this many zeroed bytes, in whole pages.
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        const PAGE: usize = 4096;
        let len = len.max(1).next_multiple_of(PAGE);
        // SAFETY: a fresh anonymous mapping aliases nothing.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
            )?
        };
        NonNull::new(base)
            .map(|base| Self { base, len })
            .ok_or_else(|| io::Error::other("mmap gave a null mapping"))
    }

    /// The address to hand to the driver.
    pub(crate) fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// The `index`th u64, 0 beyond the end.
    pub(crate) fn u64(&self, index: usize) -> u64 {
        if index >= self.len / 8 {
            return 0;
        }
        // SAFETY: within the mapping, aligned, and only ever accessed atomically by this process.
        let word = unsafe { self.base.cast::<AtomicU64>().add(index).as_ref() };
        word.load(Ordering::Relaxed)
    }

    /// The `index`th u32, if there is one. What was written before its value is visible to who acquires it.
    pub(crate) fn u32(&self, index: usize) -> Option<&AtomicU32> {
        // SAFETY: within the mapping, aligned, and only ever accessed atomically by this process.
        (index < self.len / 4).then(|| unsafe { self.base.cast::<AtomicU32>().add(index).as_ref() })
    }
}

impl Drop for DriverMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and no reference outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr(), self.len) };
    }
}

/// An ioctl whose number is a bare integer and whose argument is a buffer that the driver reads and writes.
pub(crate) fn bare_ioctl(fd: impl AsFd, number: u32, buffer: &mut [u8]) -> io::Result<()> {
    // SAFETY: the buffer is writable for its whole length, and callers size it for the largest layout of this
    // number.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), number.into(), buffer.as_mut_ptr()) };
    match result {
        0 => Ok(()),
        ..0 => Err(io::Error::last_os_error()),
        1.. => Err(io::Error::other(format!("ioctl {number} returned {result}"))),
    }
}

/// A pidfd of the process at the other end of a unix socket, as the kernel recorded it at connect time.
///
/// Kernels before 6.5 do not know the option; the caller falls back to opening a pidfd by number.
pub(crate) fn peer_pidfd(socket: impl AsFd) -> io::Result<OwnedFd> {
    /// `SO_PEERPIDFD` of asm-generic/socket.h.
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut fd: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `fd` and `len` are valid for writes of the sizes announced.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    if fd < 0 {
        return Err(io::Error::other("the kernel gave no pidfd"));
    }
    // SAFETY: the kernel returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Registers a descriptor to be waited for until it is readable.
pub(crate) fn wait_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by the registration, which nothing replaces, so it is open for as long as
    // it is registered.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)
}
