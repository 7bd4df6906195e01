//! The file that the simulator and all programs map: `SIM/state`.
//!
//! Approach: plain atomics only, written so that a process may die between any two stores. The simulator maps the file and
//! every program maps it at [`BASE`], so that the addresses of [`SpaceSlot`]s, which stand for the driver's `va_space*` and
//! `events*`, are unique over all processes. Bytes of the file are zero at first; sizes are bounds, not allocations.
//!
//! Invariants: the simulator never trusts what it reads here beyond its own bounds; programs only ever lose by writing
//! nonsense (their own faults, or wrong times).

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd as _,
    path::Path,
    sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
};

use crate::{client::BLOCK_BYTES, engine::EngineWord};

/// Where every process maps the file: far from program text (0x55…), heaps and libraries (0x7f…).
pub const BASE: usize = 0x2a00_0000_0000;
/// Cards at most.
pub const MAX_CARDS: usize = 8;
/// Programs connected at a time at most: bounded by the bits of [`EngineWord`].
pub const MAX_CLIENTS: usize = 56;
/// VA spaces at a time at most. More than clients: a dead program's space lives on while a tracker holds it.
pub const MAX_SPACES: usize = 256;
/// Blocks of managed memory at most: 1 TiB.
pub const MAX_BLOCKS: usize = 1 << 19;
/// Faults that one program can have outstanding.
pub const FAULT_SLOTS: usize = 64;

/// Changes with the layout; programs refuse another.
pub const MAGIC: u64 = 0x6e76_7367_7573_0005;

/// One card as programs see it.
#[repr(C)]
pub struct CardSlot {
    /// UUID, two native words.
    pub uuid: [AtomicU64; 2],
    /// Product name, ends with zeros.
    pub name: [AtomicU8; 64],
    /// Usable bytes.
    pub total: AtomicU64,
    /// Bytes used as the driver counts them.
    pub used: AtomicU64,
    /// Streaming multiprocessors.
    pub sms: AtomicU32,
    /// Compute capability: major · 16 + minor.
    pub capability: AtomicU32,
    /// PCI bus number.
    pub pci_bus: AtomicU32,
    /// The driver's processor id.
    pub processor: AtomicU32,
    /// Bumped when a fault is put into a slot: the service thread waits on it.
    pub doorbell: AtomicU32,
    /// Blocks on which one kernel faults at a time.
    pub fault_window: AtomicU32,
    /// Who computes.
    pub engine: EngineWord,
    /// When the slice of who computes ends, CLOCK_MONOTONIC.
    pub slice_end: AtomicU64,
    /// Length of a slice.
    pub slice_ns: AtomicU64,
    /// Nanoseconds computed.
    pub busy_ns: AtomicU64,
    /// Link rate, bytes per second.
    pub link_rate: AtomicU64,
    /// Until when the link is taken: in, out.
    pub link_until: [AtomicU64; 2],
    /// Bytes over the link: in, out.
    pub link_bytes: [AtomicU64; 2],
    /// Not 0: the card has fallen off the bus.
    pub lost: AtomicU32,
    /// Not 0: the fault-service thread spins and serves nothing.
    pub hangs: AtomicU32,
}

/// One connected program.
#[repr(C)]
pub struct ClientSlot {
    /// Its process id, 0 if the slot is free.
    pub pid: AtomicU32,
    /// Bumped when faults of it have been served.
    pub replay: AtomicU32,
    /// Bumped when it gets a card's compute engine.
    pub grant: [AtomicU32; MAX_CARDS],
    /// Outstanding faults: 0, or an [`encode_fault`].
    pub faults: [AtomicU64; FAULT_SLOTS],
    /// Plain bytes on each card.
    pub plain: [AtomicU64; MAX_CARDS],
}

/// What the driver's `va_space*` and `events*` point at. Only the addresses matter.
#[repr(C)]
pub struct SpaceSlot {
    va_space: [AtomicU64; 8],
    events: [AtomicU64; 8],
}

/// The whole file.
#[repr(C)]
pub struct State {
    /// [`MAGIC`] once everything else is filled in.
    pub magic: AtomicU64,
    /// Driver version, three numbers.
    pub driver: [AtomicU32; 3],
    /// Cards in use.
    pub cards_used: AtomicU32,
    /// The cards.
    pub cards: [CardSlot; MAX_CARDS],
    /// The programs.
    pub clients: [ClientSlot; MAX_CLIENTS],
    /// The VA spaces.
    pub spaces: [SpaceSlot; MAX_SPACES],
    /// For each block: 0, or 1 + the index of the card on which it is resident.
    pub resident: [AtomicU8; MAX_BLOCKS],
}

/// A fault as a program writes it: page address, card, flags. Never 0.
pub fn encode_fault(address: u64, card: usize, write: bool) -> u64 {
    (address & !0xfff) | (card as u64 & 0xff) << 2 | u64::from(write) << 1 | 1
}

/// (page address, card, write) of a fault word that is not 0.
pub fn decode_fault(word: u64) -> (u64, usize, bool) {
    (word & !0xfff, (word >> 2 & 0xff) as usize, word & 2 != 0)
}

/// The file, mapped at [`BASE`] until the process ends.
#[derive(Clone, Copy)]
pub struct Mapped(&'static State);

impl std::fmt::Debug for Mapped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Mapped").finish()
    }
}

impl std::ops::Deref for Mapped {
    type Target = State;

    fn deref(&self) -> &State {
        self.0
    }
}

impl Mapped {
    /// Makes the file anew and maps it. Every user may take part in the simulation.
    pub fn create(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
        file.set_len(size_of::<State>() as u64)?;
        Self::map(&file)
    }

    /// Maps an existing file. The same file may be mapped again in one process.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        if file.metadata()?.len() != size_of::<State>() as u64 {
            return Err(io::Error::other("its size is not that of this version of the simulator"));
        }
        let mapped = Self::map(&file)?;
        if mapped.magic.load(Ordering::Acquire) != MAGIC {
            return Err(io::Error::other("it was made by another version of the simulator"));
        }
        Ok(mapped)
    }

    fn map(file: &File) -> io::Result<Self> {
        // SAFETY: a new shared mapping that replaces nothing (MAP_FIXED_NOREPLACE fails where something is).
        let address = unsafe {
            libc::mmap(
                BASE as *mut libc::c_void,
                size_of::<State>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EEXIST) || !is_mapped_here(file)? {
                return Err(error);
            }
        } else if address as usize != BASE {
            // SAFETY: unmaps what was just mapped at a place that the kernel chose (kernels before 4.17).
            unsafe { libc::munmap(address, size_of::<State>()) };
            return Err(io::Error::other("the address of the shared state is not free in this process"));
        }
        // SAFETY: the file is at least as long as State and mapped at BASE for the rest of the process's life; State
        // consists of atomics only, for which every bit pattern is valid and which other processes may change.
        Ok(Self(unsafe { &*(BASE as *const State) }))
    }
}

/// Whether this very file is what is mapped at [`BASE`]: the simulated libcuda and NVML may share a process.
fn is_mapped_here(file: &File) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt as _;
    let inode = file.metadata()?.ino();
    let start = format!("{BASE:x}-");
    Ok(std::fs::read_to_string("/proc/self/maps")?
        .lines()
        .filter(|line| line.starts_with(&start))
        .any(|line| line.split_whitespace().nth(4) == Some(inode.to_string().as_str())))
}

impl CardSlot {
    /// Reserves the link for bytes in one direction; returns when they are through, CLOCK_MONOTONIC.
    pub fn reserve_link(&self, out: bool, bytes: u64, now: u64) -> u64 {
        let index = usize::from(out);
        let rate = self.link_rate.load(Ordering::Relaxed).max(1);
        let time = (u128::from(bytes) * 1_000_000_000 / u128::from(rate)) as u64;
        self.link_bytes[index].fetch_add(bytes, Ordering::Relaxed);
        let until = &self.link_until[index];
        let before = until
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |until| Some(until.max(now) + time))
            .unwrap_or(now);
        before.max(now) + time
    }

    /// Whether the card has fallen off the bus.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed) != 0
    }

    /// Bytes that are free as the driver counts.
    pub fn free(&self) -> u64 {
        self.total.load(Ordering::Relaxed).saturating_sub(self.used.load(Ordering::Relaxed))
    }
}

impl SpaceSlot {
    /// The `va_space*`.
    pub fn va_space(&self) -> *const std::ffi::c_void {
        self.va_space.as_ptr().cast()
    }

    /// The `events*`.
    pub fn events(&self) -> *const std::ffi::c_void {
        self.events.as_ptr().cast()
    }
}

const _: () = assert!(MAX_BLOCKS as u64 * BLOCK_BYTES == 1 << 40);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_survives_its_encoding() {
        for (address, card, write) in [(0x7fff_ffff_f000, 7, true), (0x1000, 0, false), (0, 0, false)] {
            let word = encode_fault(address, card, write);
            assert_ne!(word, 0);
            assert_eq!(decode_fault(word), (address, card, write));
        }
    }
}
