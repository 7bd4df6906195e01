//! What the simulated driver libraries use of the simulated GPU.
//!
//! [`Host`] looks on: cards, memory, processes (the simulated NVML). [`Session`] takes part: one per process, thread-safe,
//! cheap to share by reference (the simulated libcuda).

use std::ffi::c_void;

/// Granularity of residency and of eviction: nvidia-uvm's root chunk and largest block, in bytes.
pub const BLOCK_BYTES: u64 = 2 << 20;

/// `uvm_perf_init_va_space_events(va_space, events)`: called once in the program, when its VA space begins.
pub type InitVaSpaceEvents = unsafe extern "C" fn(va_space: *const c_void, events: *const c_void);

/// `uvm_perf_event_notify(events, event_id, data)`: called in the program for what the driver does in its context (CPU
/// faults, migrations by prefetch, evictions that its own allocations cause).
pub type EventNotify = unsafe extern "C" fn(events: *const c_void, event_id: u32, data: *const c_void);

/// The functions of nvidia-uvm that run in the program's own context. The simulated `libcuda` exports them under the
/// driver's names, never inlined, with bodies that do nothing: they exist to be probed.
#[derive(Clone, Copy, Debug)]
pub struct EntryPoints {
    /// Exported as `uvm_perf_init_va_space_events`.
    pub init_va_space_events: InitVaSpaceEvents,
    /// Exported as `uvm_perf_event_notify`.
    pub event_notify: EventNotify,
}

/// Why a program cannot reach the simulated GPU.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No simulated host was named.
    #[error(
        "no simulated host is named: start the simulator (`nvshare-gpu-sim run`) and set NVSHARE_SIM_DIR to its directory"
    )]
    NoDirectory,
    /// The directory holds no usable simulator.
    #[error(
        "the simulated GPU in {dir} cannot be reached ({what}: {error}): is `nvshare-gpu-sim run --dir {dir}` running?"
    )]
    Unreachable {
        /// NVSHARE_SIM_DIR.
        dir: String,
        /// The step that failed.
        what: &'static str,
        /// Why.
        error: std::io::Error,
    },
    /// The simulator answered with a refusal (version, number of clients).
    #[error("the simulated GPU refused this process: {0}")]
    Refused(String),
}

/// Why an operation on the simulated GPU failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SimError {
    /// The card's memory is taken by plain allocations.
    #[error("out of memory on GPU {gpu}: {wanted} bytes wanted, {free} bytes can be freed")]
    OutOfMemory {
        /// Index of the card.
        gpu: usize,
        /// Bytes asked for.
        wanted: u64,
        /// Bytes that are free or hold evictable managed memory.
        free: u64,
    },
    /// A bound of the simulator was reached, or the argument means nothing to it.
    #[error("the simulated GPU refused: {0}")]
    Refused(String),
    /// The card has fallen off the bus.
    #[error("GPU {0} is lost")]
    Lost(usize),
    /// The simulator ended: as if the card had fallen off the bus.
    #[error("the simulated GPU is gone: the simulator process ended")]
    Gone,
}

/// A card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// Index, as CUDA and NVML count.
    pub index: usize,
    /// 16 bytes; printed as `GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`.
    pub uuid: [u8; 16],
    /// Product name.
    pub name: String,
    /// Usable memory, bytes.
    pub total_bytes: u64,
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Compute capability (major, minor).
    pub capability: (u32, u32),
    /// PCI domain, bus, device.
    pub pci: (u32, u32, u32),
}

/// A process as NVML reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Its process id.
    pub pid: u32,
    /// Plain (not managed) bytes it holds on the card.
    pub plain_bytes: u64,
}

/// Where a range of managed memory shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// Host memory.
    Cpu,
    /// The card of that index.
    Gpu(usize),
}

/// Direction of an explicit copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Host to card.
    In,
    /// Card to host.
    Out,
}

/// Memory that a kernel sweeps once, in address order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// First byte.
    pub base: u64,
    /// Bytes.
    pub len: u64,
    /// Whether it writes.
    pub write: bool,
}

/// A kernel: what it touches, in order, and the GPU time it needs when all of it is resident.
#[derive(Clone, Debug, Default)]
pub struct Work {
    /// Managed memory touched; ranges that are not managed cost nothing.
    pub ranges: Vec<Access>,
    /// GPU time over the whole sweep, nanoseconds; spread evenly over the blocks touched.
    pub compute_ns: u64,
}

mod announce;
mod host;
mod kernel;
mod ranges;
mod session;
pub use host::Host;
pub use session::{Session, stats};
