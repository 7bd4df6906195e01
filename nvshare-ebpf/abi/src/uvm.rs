//! Layouts that nvidia-uvm defines, by driver version.

mod cause;
mod epoch;
mod event;
mod status;
mod version;

pub use cause::{MakeResidentCause, MigrationCause};
pub use epoch::{ABSENT, Epoch, EventLayout};
pub use event::{
    EVENT_DATA_BYTES, Event, EventData, FAULT_ENTRY_BYTES, FaultEntry, FaultEntryData, Processor,
};
pub use status::Status;
pub use version::{DriverVersion, InvalidDriverVersion};

/// Pages that nvidia-uvm moves are of this size or a multiple of it.
pub const PAGE_BYTES: u64 = 4096;
/// A virtual address block, and a root chunk of GPU memory: the unit of eviction.
pub const BLOCK_BYTES: u64 = 2 << 20;
/// Processor ids are below this: the CPU, and up to 32 GPUs of 8 partitions each.
pub const PROCESSORS: u32 = 257;

/// The name of a GPU's fault-service kernel thread, before the parent id of the GPU (from 1).
pub const FAULT_THREAD_PREFIX: &str = "UVM GPU";
/// The end of the same name, after the number.
pub const FAULT_THREAD_SUFFIX: &str = " BH";

/// The functions that the programs attach to. The same names serve the module and a simulation of it.
pub mod symbol {
    /// `(events*, event id, data*)`: every fault and migration.
    pub const NOTIFY: &str = "uvm_perf_event_notify";
    /// `(va_space*, events*)`: a VA space begins, in its owner's context.
    pub const INIT: &str = "uvm_perf_init_va_space_events";
    /// `(events*)`: it ends, in any context.
    pub const DESTROY: &str = "uvm_perf_destroy_va_space_events";
    /// `(parent_gpu*)`: one round of fault service begins. From branch 560 on.
    pub const SERVICE: &str = "uvm_parent_gpu_service_replayable_faults";
    /// `(gpu*)`: the same up to branch 555.
    pub const SERVICE_TO_555: &str = "uvm_gpu_service_replayable_faults";
    /// `(void*)`: the thread that serves faults begins to serve a GPU's access counters instead.
    pub const ACCESS_COUNTERS: &str = "access_counters_isr_bottom_half_entry";
}
