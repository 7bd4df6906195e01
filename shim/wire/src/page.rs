//! The page that a client shares with the agent: what changes with every call, without a message.
//!
//! The client creates a memfd of [`PAGE_LEN`] bytes, seals it against shrinking and growing, and sends it
//! with `Hello`. Only the client writes, only its background thread (never the launch path), a few times a
//! second; the agent reads with relaxed loads and believes nothing: every value is a claim about the client
//! alone, used as its demand and checked against the driver's own figures where there are any.

use core::sync::atomic::{AtomicU32, AtomicU64};

/// Bytes of the shared memory.
pub const PAGE_LEN: usize = 4096;
/// First word of a page whose layout is this one.
pub const PAGE_MAGIC: u32 = u32::from_le_bytes(*b"NVP1");
/// GPUs one client can report.
pub const SLOTS: usize = 16;

/// The whole page.
#[repr(C)]
#[derive(Debug)]
pub struct Page {
    /// [`PAGE_MAGIC`].
    pub magic: AtomicU32,
    /// Slots in use, counted from the first.
    pub slots: AtomicU32,
    /// Increments with every publication, so that a reader sees whether the client's thread lives.
    pub beat: AtomicU64,
    /// Bytes of host memory the client pinned (`cuMemHostAlloc`, `cuMemHostRegister`).
    pub pinned_host: AtomicU64,
    reserved: [AtomicU64; 5],
    /// One slot for each GPU the client uses, in the order of its `UseGpu` messages.
    pub gpu: [GpuSlot; SLOTS],
}

/// What a client says of itself on one GPU.
#[repr(C)]
#[derive(Debug)]
pub struct GpuSlot {
    /// Calls that submitted work, since the session began.
    pub calls: AtomicU64,
    /// Threads inside such a call.
    pub inside: AtomicU32,
    /// Threads waiting at the closed gate.
    pub waiting: AtomicU32,
    /// Threads that wait in the driver for the GPU to finish (synchronisation, blocking copies).
    pub syncing: AtomicU32,
    /// Contexts on this GPU.
    pub contexts: AtomicU32,
    /// CLOCK_MONOTONIC nanoseconds of the last moment at which the client was seen using the GPU.
    pub active_ns: AtomicU64,
    /// Bytes of device allocations that are managed memory.
    pub managed: AtomicU64,
    /// Bytes of device allocations that stayed plain device memory (not evictable).
    pub device: AtomicU64,
    reserved: [AtomicU64; 1],
}

const _: () = assert!(size_of::<GpuSlot>() == 56);
const _: () = assert!(size_of::<Page>() <= PAGE_LEN);
const _: () = assert!(core::mem::offset_of!(Page, gpu) == 64);
