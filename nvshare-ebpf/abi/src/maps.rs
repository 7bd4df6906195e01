//! Keys and values of the BPF maps, shared by the eBPF programs and the agent.
//!
//! A VA space is known by a number that the programs draw when it begins ([`Space`]): addresses of
//! `uvm_perf_va_space_events_t` are reused by the kernel, numbers are not. Counters only grow; the agent takes
//! differences, and deletes the entries of a space that has ended once it has read them.

use bytemuck::{Pod, Zeroable};

use crate::uvm::{EventLayout, MakeResidentCause};

/// Changes whenever a type in this module, or its meaning, changes. The object carries it; the agent refuses others.
pub const ABI_VERSION: u32 = 3;
/// The ELF section of the object that holds [`ABI_VERSION`] as a native u32.
pub const ABI_SECTION: &str = ".nvshare.abi";

/// Names of the maps in the object.
pub mod name {
    /// Array of one [`super::Config`].
    pub const CONFIG: &str = "CONFIG";
    /// Per-CPU array of one [`super::Health`].
    pub const HEALTH: &str = "HEALTH";
    /// Hash from the address of an events structure to [`super::SpaceId`].
    pub const EVENTS: &str = "EVENTS";
    /// Hash from [`super::SpaceId`] to [`super::Space`].
    pub const SPACES: &str = "SPACES";
    /// Per-CPU hash from [`super::CounterKey`] to [`super::Counters`].
    pub const COUNTERS: &str = "COUNTERS";
    /// Hash from thread id to [`super::Evictor`].
    pub const EVICTORS: &str = "EVICTORS";
    /// Hash from thread id to [`super::FaultThread`]; the agent puts the keys in.
    pub const FAULT_THREADS: &str = "FAULT_THREADS";
    /// Hash from [`super::EvictionKey`] to bytes.
    pub const EVICTIONS: &str = "EVICTIONS";
    /// Array of [`super::BlockFigures`], by [`super::figures_index`].
    pub const BLOCKS: &str = "BLOCKS";
    /// Array of [`super::Room`], by the same index; the agent writes it.
    pub const ROOM: &str = "ROOM";
    /// Ring buffer of [`super::XidRecord`].
    pub const XIDS: &str = "XIDS";
    /// Hash from process id to [`super::CudaCalls`].
    pub const CUDA_CALLS: &str = "CUDA_CALLS";
}

/// What the agent tells the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Config {
    /// 1 if `layout` is valid; 0 makes the programs leave event data alone.
    pub layout_known: u32,
    /// Explicit padding.
    pub reserved: u32,
    /// Where the fields of an event lie.
    pub layout: EventLayout,
}

/// How the programs fare.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Health {
    /// Notifications that were looked into: faults, migrations and impossible ids.
    pub notifications: u64,
    /// Of these, those whose fields made no sense (the layout is probably wrong); they are not counted elsewhere.
    pub insane: u64,
    /// Of these, those that could not be read; they are not counted elsewhere.
    pub unreadable: u64,
    /// Updates that a full map refused: what they would have counted is lost.
    pub lost: u64,
}

/// Number of a VA space, never reused while the programs are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(transparent)]
pub struct SpaceId(pub u64);

/// How a space's owner became known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Ownership {
    /// It is not: the space is older than the programs.
    Unknown = 0,
    /// From an event that normally happens in the owner's context (a debugger could have caused it, too).
    Probable = 1,
    /// From the beginning of the space, in the owner's context.
    Certain = 2,
}

impl Ownership {
    /// From the word in [`Space`].
    pub const fn from_value(value: u32) -> Option<Self> {
        Some(match value {
            0 => Self::Unknown,
            1 => Self::Probable,
            2 => Self::Certain,
            _ => return None,
        })
    }
}

/// A VA space: one process's view of managed memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Space {
    /// Address of its events structure.
    pub events: u64,
    /// Address of the VA space itself, 0 if unknown.
    pub va_space: u64,
    /// The owner's cgroup, 0 if unknown.
    pub cgroup: u64,
    /// CLOCK_BOOTTIME when it began or was first seen, in nanoseconds; a process that started later is not the owner.
    pub began_ns: u64,
    /// CLOCK_BOOTTIME when it ended, 0 while it lives.
    pub ended_ns: u64,
    /// The owner's process id in the initial namespace, 0 if unknown.
    pub tgid: u32,
    /// An [`Ownership`].
    pub ownership: u32,
    /// The name of the thread that began it, ends with zeros.
    pub comm: [u8; 16],
}

/// Whose counters, where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct CounterKey {
    /// The space.
    pub space: SpaceId,
    /// Processor id: 0 for CPU faults, else a GPU.
    pub processor: u32,
    /// Explicit padding.
    pub reserved: u32,
}

/// Counts for one space on one processor (on one CPU: the map is per CPU).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Counters {
    /// GPU fault entries, after the driver merged those of one page.
    pub gpu_faults: u64,
    /// GPU fault instances, before merging.
    pub gpu_fault_instances: u64,
    /// CPU faults; only under processor 0.
    pub cpu_faults: u64,
    /// Of the bytes out by eviction, those that made room for another space.
    pub evicted_by_others: u64,
    /// Bytes that came to this GPU, by [`MakeResidentCause`].
    pub bytes_in: [u64; MakeResidentCause::COUNT],
    /// Bytes that left this GPU, by [`MakeResidentCause`].
    pub bytes_out: [u64; MakeResidentCause::COUNT],
    /// CLOCK_MONOTONIC of the first event, 0 if none.
    pub first_ns: u64,
    /// CLOCK_MONOTONIC of the last event.
    pub last_ns: u64,
}

/// For whom a fault-service thread is working.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Evictor {
    /// Events structure of the last GPU fault that this thread announced, 0 for none.
    pub events: u64,
    /// Its space.
    pub space: u64,
    /// How many spaces had begun or ended when the space was looked up; it is looked up again when that changes.
    pub generation: u64,
}

/// Time of one fault-service thread from waking to sleeping; preemption counts as busy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct FaultThread {
    /// Nanoseconds of finished busy periods.
    pub busy_ns: u64,
    /// CLOCK_MONOTONIC when the current busy period began, 0 while asleep.
    pub since_ns: u64,
    /// Finished busy periods.
    pub periods: u64,
}

/// Who evicted whom, from which GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct EvictionKey {
    /// The space whose bytes left.
    pub victim: SpaceId,
    /// A [`SpaceId`] or a process id, by `evictor_is_process`.
    pub evictor: u64,
    /// The GPU.
    pub processor: u32,
    /// 0 if a fault of a space was served, 1 if the process itself asked the driver for memory.
    pub evictor_is_process: u32,
}

/// Entries of the array of shadows: one for each evicted block, 512 GiB if none overwrites another.
pub const SHADOWS: u32 = 1 << SHADOW_BITS;
const SHADOW_BITS: u32 = 18;
/// Entries of the arrays of figures and of room.
pub const BLOCK_FIGURES: u32 = 1 << FIGURE_BITS;
const FIGURE_BITS: u32 = 12;

/// What remains of a block that was evicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Shadow {
    /// The owner's evicted bytes when it had left.
    pub evicted: u64,
    /// Tells it from other blocks of this entry.
    pub tag: u32,
    /// Pages of it that are still out.
    pub pages: u16,
    /// Where its owner's figures are.
    pub figures: u16,
}

/// What happened to the blocks of one space on one GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockFigures {
    /// Whose, 0 for nobody's.
    pub space: u64,
    /// Where.
    pub processor: u32,
    /// Explicit padding.
    pub reserved: u32,
    /// Evicted bytes.
    pub evicted: u64,
    /// Of these, the bytes that came back, for whatever cause, or of which nothing is remembered any more.
    pub returned: u64,
    /// Of the returned ones, those that faults brought back and that the owner would have kept alone.
    pub curable: u64,
    /// Those that it would have lost alone, too.
    pub own: u64,
    /// Those of which the agent did not say what there is room for.
    pub unjudged: u64,
}

/// What the GPU can hold, less what the owner of a space allocated there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Room {
    /// Of which space.
    pub space: u64,
    /// Bytes; negative if the owner alone does not fit.
    pub bytes: i64,
    /// 1 if `bytes` is known.
    pub known: u32,
    /// Explicit padding.
    pub reserved: u32,
}

/// Spreads the bits of a number over all bits.
const fn mixed(value: u64) -> u64 {
    let value = (value ^ (value >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (value ^ (value >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// Where the shadow of a block is, and its tag, which is not 0.
pub const fn shadow_index(space: SpaceId, block: u64) -> (u32, u32) {
    let mixed = mixed(space.0 ^ mixed(block));
    ((mixed >> (64 - SHADOW_BITS)) as u32, mixed as u32 | 1)
}

/// Where the figures of a space on a GPU are.
pub const fn figures_index(space: SpaceId, processor: u32) -> u32 {
    (mixed(space.0 ^ ((processor as u64) << 40)) >> (64 - FIGURE_BITS)) as u32
}

/// An Xid error, as the driver reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct XidRecord {
    /// CLOCK_MONOTONIC.
    pub at_ns: u64,
    /// The error code.
    pub code: u32,
    /// Explicit padding.
    pub reserved: u32,
    /// PCI address as text, ends with a zero.
    pub device: [u8; 32],
    /// The driver's text, cut to fit, ends with a zero.
    pub message: [u8; 256],
}

/// The rare libcuda calls that are counted. The value is the cookie of the probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum CudaCall {
    /// `cuInit`.
    Init = 1,
    /// `cuCtxCreate*`, `cuDevicePrimaryCtxRetain`.
    ContextBegin = 2,
    /// `cuCtxDestroy*`, `cuDevicePrimaryCtxRelease*`.
    ContextEnd = 3,
    /// `cuMemAllocManaged`.
    AllocateManaged = 4,
    /// `cuMemAlloc*`.
    AllocateDevice = 5,
    /// `cuMemFree*`.
    Free = 6,
}

impl CudaCall {
    /// The exported names and what they count as. Work-submitting calls are left out: a probe costs microseconds.
    pub const SYMBOLS: &[(&str, Self)] = &[
        ("cuInit", Self::Init),
        ("cuCtxCreate_v2", Self::ContextBegin),
        ("cuCtxCreate_v3", Self::ContextBegin),
        ("cuCtxCreate_v4", Self::ContextBegin),
        ("cuDevicePrimaryCtxRetain", Self::ContextBegin),
        ("cuCtxDestroy_v2", Self::ContextEnd),
        ("cuDevicePrimaryCtxRelease_v2", Self::ContextEnd),
        ("cuMemAllocManaged", Self::AllocateManaged),
        ("cuMemAlloc_v2", Self::AllocateDevice),
        ("cuMemFree_v2", Self::Free),
    ];

    /// From the cookie of a probe.
    pub const fn from_cookie(cookie: u64) -> Option<Self> {
        Some(match cookie {
            1 => Self::Init,
            2 => Self::ContextBegin,
            3 => Self::ContextEnd,
            4 => Self::AllocateManaged,
            5 => Self::AllocateDevice,
            6 => Self::Free,
            _ => return None,
        })
    }
}

/// The rare libcuda calls of one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct CudaCalls {
    /// `cuInit`.
    pub inits: u64,
    /// Contexts created, or primary contexts retained.
    pub contexts: u64,
    /// Contexts destroyed, or primary contexts released.
    pub contexts_ended: u64,
    /// `cuMemAllocManaged`.
    pub managed_allocations: u64,
    /// Bytes asked for by `cuMemAllocManaged`; the calls may have failed.
    pub managed_bytes: u64,
    /// `cuMemAlloc`.
    pub device_allocations: u64,
    /// Bytes asked for by `cuMemAlloc`; the calls may have failed.
    pub device_bytes: u64,
    /// `cuMemFree`.
    pub frees: u64,
    /// CLOCK_MONOTONIC of the first call.
    pub first_ns: u64,
    /// CLOCK_MONOTONIC of the last call.
    pub last_ns: u64,
    /// The name of the thread that called first, ends with zeros.
    pub comm: [u8; 16],
}

const _: () = {
    assert!(size_of::<Config>() == 136);
    assert!(size_of::<Health>() == 32);
    assert!(size_of::<Space>() == 64);
    assert!(size_of::<CounterKey>() == 16);
    assert!(size_of::<Counters>() == 192);
    assert!(size_of::<Evictor>() == 24);
    assert!(size_of::<FaultThread>() == 24);
    assert!(size_of::<EvictionKey>() == 24);
    assert!(size_of::<Shadow>() == 16);
    assert!(size_of::<BlockFigures>() == 56);
    assert!(size_of::<Room>() == 24);
    assert!(size_of::<XidRecord>() == 304);
    assert!(size_of::<CudaCalls>() == 96);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_and_spaces_spread_over_their_arrays() {
        // 32 GiB of neighbouring blocks of two spaces that began in the same microsecond, eight entries taken together.
        let mut taken = [0_u64; SHADOWS as usize / 64 / 8];
        let mut clashes = 0;
        for space in [SpaceId(1_000_000_000_000), SpaceId(1_000_000_000_700)] {
            for block in 0..8192 {
                let (index, tag) = shadow_index(space, (0x7f00_0000_0000 >> 21) + block);
                assert_ne!(tag, 0);
                let (word, bit) = (&mut taken[index as usize / 8 / 64], 1 << (index / 8 % 64));
                clashes += u32::from(*word & bit != 0);
                *word |= bit;
            }
        }
        // 16384 in 32768: 3491 are expected to meet another one.
        assert!((3200..3800).contains(&clashes), "{clashes}");
        let mut figures = [false; BLOCK_FIGURES as usize];
        let met = (0..200_u64)
            .filter(|&n| {
                let index = figures_index(SpaceId(1_000_000_000_000 + n * 1_000_003), 1 + (n % 3) as u32);
                core::mem::replace(&mut figures[index as usize], true)
            })
            .count();
        // 5 are expected.
        assert!(met < 20, "{met}");
    }
}
