//! The address space of GPU-visible memory: one sparse memory file, mapped twice.
//!
//! # Problem
//! Programs may change the protection of memory they got from the driver (nvshare write-protects it during a
//! hand-over), and on the hardware this does not touch the GPU's own page tables.
//!
//! # Approach
//! Two equally large reservations. A block at offset `o` of the file is mapped at `user + o`, the address the program
//! gets, and at `gpu + o`, which only the driver's workers use.
//!
//! # Invariants
//! Blocks are multiples of 2 MiB (the unit of UVM), never overlap, and are given to the parent only: as with the real
//! driver's mappings a forked child does not have them.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
    sync::Mutex,
};

use crate::registry::lock;

/// UVM's block size.
pub(crate) const BLOCK: u64 = 2 << 20;
/// Reserved, not committed: far above what any simulated card and its host spill need.
const RESERVED: u64 = 1 << 40;

pub(crate) struct Arena {
    file: OwnedFd,
    user: u64,
    gpu: u64,
    /// Free ranges of the file: offset → length.
    free: Mutex<BTreeMap<u64, u64>>,
}

impl Arena {
    pub(crate) fn reserve() -> io::Result<Self> {
        // SAFETY: a constant name; the descriptor is checked and owned from here on.
        let file = unsafe {
            let fd = libc::memfd_create(c"nvshare-sim-gpu".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: plain call on a descriptor we own.
        if unsafe { libc::ftruncate(file.as_raw_fd(), RESERVED.cast_signed()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            file,
            user: reserve_range()?,
            gpu: reserve_range()?,
            free: Mutex::new(BTreeMap::from([(0, RESERVED)])),
        })
    }

    /// Maps zeroed memory of `len` bytes (rounded up to blocks); gives the program's address.
    pub(crate) fn allocate(&self, len: u64) -> io::Result<u64> {
        let address = self.reserve_addresses(len)?;
        let len = len.next_multiple_of(BLOCK);
        self.show(address, len, address).inspect_err(|_| self.release(address, len))?;
        Ok(address)
    }

    /// Takes addresses (whole blocks) at which nothing can be read or written yet.
    pub(crate) fn reserve_addresses(&self, len: u64) -> io::Result<u64> {
        let len = len.checked_next_multiple_of(BLOCK).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut free = lock(&self.free);
        let (&offset, &room) =
            free.iter().find(|&(_, &room)| room >= len).ok_or(io::ErrorKind::OutOfMemory)?;
        free.remove(&offset);
        if room > len {
            free.insert(offset + len, room - len);
        }
        Ok(self.user + offset)
    }

    /// Shows the bytes that belong to `place` at `address`, in both views.
    pub(crate) fn show(&self, address: u64, len: u64, place: u64) -> io::Result<()> {
        for base in [self.user, self.gpu] {
            self.map(address - self.user + base, len, place - self.user)?;
        }
        Ok(())
    }

    /// Makes addresses inaccessible in both views; the bytes stay where they belong.
    pub(crate) fn hide(&self, address: u64, len: u64) {
        for base in [self.user, self.gpu] {
            // SAFETY: our own reservation; an inaccessible mapping takes the place of what was shown.
            unsafe {
                libc::mmap(
                    (address - self.user + base) as *mut libc::c_void,
                    len as usize,
                    libc::PROT_NONE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    -1,
                    0,
                );
            }
        }
    }

    fn map(&self, address: u64, len: u64, offset: u64) -> io::Result<()> {
        // SAFETY: replaces a part of our own reservation that the free list says is unused.
        unsafe {
            let mapped = libc::mmap(
                address as *mut libc::c_void,
                len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                self.file.as_raw_fd(),
                offset.cast_signed(),
            );
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            libc::madvise(mapped, len as usize, libc::MADV_DONTFORK);
        }
        Ok(())
    }

    /// Gives back what `allocate` gave, with the length that was asked for.
    pub(crate) fn release(&self, address: u64, len: u64) {
        let len = len.next_multiple_of(BLOCK);
        let offset = address - self.user;
        self.hide(address, len);
        // SAFETY: plain call on a descriptor we own; the hole reads as zeros when the offset is used again.
        unsafe {
            libc::fallocate(
                self.file.as_raw_fd(),
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                offset.cast_signed(),
                len.cast_signed(),
            );
        }
        let mut free = lock(&self.free);
        let mut start = offset;
        let mut length = len;
        if let Some((&before, &room)) = free.range(..offset).next_back()
            && before + room == offset
        {
            free.remove(&before);
            start = before;
            length += room;
        }
        if let Some(room) = free.remove(&(offset + len)) {
            length += room;
        }
        free.insert(start, length);
    }

    /// Where the GPU sees `address`; addresses outside the arena are the same for both.
    pub(crate) fn gpu_view(&self, address: u64) -> u64 {
        if (self.user..self.user + RESERVED).contains(&address) {
            address - self.user + self.gpu
        } else {
            address
        }
    }
}

fn reserve_range() -> io::Result<u64> {
    let len = (RESERVED + BLOCK) as usize;
    // SAFETY: a fresh inaccessible mapping at an address of the kernel's choice.
    let start = unsafe {
        libc::mmap(
            ptr::null_mut(),
            len,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok((start as u64).next_multiple_of(BLOCK))
}
