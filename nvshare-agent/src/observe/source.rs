//! What every source of observations has in common: a name, a state, a cost, and figures that only grow.
//!
//! **Problem.** Which sources exist depends on the kernel, the driver, the privileges and the clients, and any
//! of them can go away while the agent runs.
//!
//! **Approach.** Each source says of itself whether it is attached, why not if not, what it costs and what it
//! lost ([`SensorStatus`]). What it measures are cumulative counters; the sampler takes the differences.
//!
//! **Invariants.** A figure that a source cannot know is absent, never zero. A counter that is smaller than at
//! the last reading belongs to a new process or a new probe and counts from zero.

use std::{collections::BTreeMap, fmt};

use nvshare_core::{Bytes, GpuId, Nanos};
use serde::{Deserialize, Serialize};

use crate::config::DriverConfig;

/// Every source of observations, by the name that users see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SensorName {
    /// Probes on functions of nvidia-uvm: per client faults, migrations by cause, evictions and for whom.
    UvmKprobe,
    /// The driver's own counters on each client's VA space.
    UvmCounters,
    /// The driver's event queue on each client's VA space, in samples.
    UvmEvents,
    /// Run time of each GPU's fault-service thread.
    FaultThread,
    /// Xid errors.
    Xid,
    /// Rare calls of libcuda, for processes without the shim.
    CudaUprobe,
    /// The management library.
    Nvml,
    /// The shim's own page in each client.
    Shim,
}

impl SensorName {
    /// Every sensor, best first.
    pub const ALL: [Self; 8] = [
        Self::UvmKprobe,
        Self::UvmCounters,
        Self::UvmEvents,
        Self::FaultThread,
        Self::Xid,
        Self::CudaUprobe,
        Self::Nvml,
        Self::Shim,
    ];

    /// The name used in JSON, metrics, configuration and for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::UvmKprobe => "uvm-kprobe",
            Self::UvmCounters => "uvm-counters",
            Self::UvmEvents => "uvm-events",
            Self::FaultThread => "fault-thread",
            Self::Xid => "xid",
            Self::CudaUprobe => "cuda-uprobe",
            Self::Nvml => "nvml",
            Self::Shim => "shim",
        }
    }
}

impl fmt::Display for SensorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether a source delivers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SensorState {
    /// It delivers; the text says what it is attached to.
    Attached(String),
    /// It does not; the text says why and, where something can be done, what.
    Unavailable(String),
}

impl SensorState {
    /// Whether the source delivers.
    pub fn is_attached(&self) -> bool {
        match self {
            Self::Attached(_) => true,
            Self::Unavailable(_) => false,
        }
    }
}

/// What a source says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SensorStatus {
    /// Which source.
    pub sensor: SensorName,
    /// Whether it delivers.
    pub state: SensorState,
    /// How often it ran (program runs, reads) since it was attached.
    pub run_count: u64,
    /// Time it spent running; `None` where the kernel does not account for it.
    pub run_time: Option<Nanos>,
    /// Observations it had to drop.
    pub lost: u64,
}

impl SensorStatus {
    /// A source that delivers and has not run yet.
    pub fn attached(sensor: SensorName, detail: impl Into<String>) -> Self {
        Self { sensor, state: SensorState::Attached(detail.into()), run_count: 0, run_time: None, lost: 0 }
    }

    /// A source that does not deliver.
    pub fn unavailable(sensor: SensorName, reason: impl Into<String>) -> Self {
        Self { sensor, state: SensorState::Unavailable(reason.into()), run_count: 0, run_time: None, lost: 0 }
    }
}

/// What the eBPF sensors need to know to attach.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "one switch for each sensor")]
pub struct BpfOptions {
    /// Where the driver lives.
    pub driver: DriverConfig,
    /// Attach `uvm-kprobe`.
    pub uvm_kprobe: bool,
    /// Attach `fault-thread`.
    pub fault_thread: bool,
    /// Attach `xid`.
    pub xid: bool,
    /// Attach `cuda-uprobe`.
    pub cuda_uprobe: bool,
}

/// One reading of the eBPF sensors. All figures are totals since the probe was attached.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BpfReading {
    /// Run time of each physical GPU's fault-service thread; a GPU without a known thread is absent. A
    /// thread that runs at the moment of the reading counts up to that moment.
    pub fault_busy: BTreeMap<GpuId, Nanos>,
    /// What nvidia-uvm did for each process on each GPU. `None`: the probes are not attached.
    pub uvm: Option<UvmReading>,
    /// Xid errors since the last reading.
    pub xids: Vec<Xid>,
    /// Processes seen in libcuda, alive at the time of the reading, by thread-group id.
    pub cuda: BTreeMap<u32, CudaProcess>,
}

/// What the probes on nvidia-uvm counted. Process ids are those of the initial namespace.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct UvmReading {
    /// By thread-group id of the owner of the VA space, and GPU.
    pub clients: BTreeMap<(u32, GpuId), UvmTotals>,
    /// What happened to single blocks, by the same keys; a space whose blocks could not be followed is absent.
    pub blocks: BTreeMap<(u32, GpuId), BlockTotals>,
    /// Bytes evicted, by (evictor, victim, GPU). A victim whose evictor is unknown is not listed.
    pub evictions: BTreeMap<(u32, u32, GpuId), Bytes>,
    /// Processes whose VA space was set up while the probes were attached. Of other processes nothing is
    /// known, which is not the same as nothing having happened.
    pub known: Vec<u32>,
}

impl UvmReading {
    /// What happened to the blocks of a process; `None` if they were not followed from the beginning.
    pub fn blocks_of(&self, pid: u32, gpu: GpuId) -> Option<BlockTotals> {
        if !self.known.contains(&pid) {
            return None;
        }
        let evicted = self.clients.get(&(pid, gpu)).is_some_and(|totals| totals.evicted > Bytes::ZERO);
        let seen = self.blocks.get(&(pid, gpu)).copied();
        // As long as nothing was evicted, there is nothing to follow.
        seen.or_else(|| (!evicted).then(BlockTotals::default))
    }
}

/// What happened to one process on one GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UvmTotals {
    /// GPU fault entries, each of which stands for all faults on a page in one batch.
    pub gpu_faults: u64,
    /// GPU faults before the driver merged those on one page.
    pub gpu_fault_instances: u64,
    /// Bytes brought onto the GPU, whatever the cause.
    pub bytes_in: Bytes,
    /// Bytes moved off the GPU, whatever the cause.
    pub bytes_out: Bytes,
    /// Of the bytes out, those evicted to make room.
    pub evicted: Bytes,
    /// Of the evicted bytes, those evicted on behalf of another process.
    pub evicted_by_others: Bytes,
    /// CPU faults on this process's managed memory. Not attributable to a GPU: counted on every GPU.
    pub cpu_faults: u64,
}

/// What happened to the blocks of one process on one GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockTotals {
    /// Bytes that had been evicted and came back by faults, which the process would have kept alone.
    pub curable: Bytes,
    /// The same that it would have lost alone, too.
    pub own: Bytes,
    /// The same of which that is not known, because nobody said what the process allocated or what the GPU can hold.
    pub unjudged: Bytes,
    /// Bytes that were evicted; less than all if the table of blocks had no room.
    pub evicted: Bytes,
    /// Of these, the bytes that came back, by whatever cause.
    pub returned: Bytes,
}

impl BlockTotals {
    /// Bytes that were evicted and have not come back.
    pub fn out(&self) -> Bytes {
        self.evicted.saturating_sub(self.returned)
    }

    /// What was added since `before`; totals that fell belong to a new table and count from zero.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        let rise = |now: Bytes, before: Bytes| Bytes(now.0.checked_sub(before.0).unwrap_or(now.0));
        Self {
            curable: rise(self.curable, before.curable),
            own: rise(self.own, before.own),
            unjudged: rise(self.unjudged, before.unjudged),
            evicted: rise(self.evicted, before.evicted),
            returned: rise(self.returned, before.returned),
        }
    }
}

/// One Xid error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xid {
    /// The device as the driver names it, a PCI address.
    pub device: String,
    /// The error code.
    pub code: u32,
    /// The driver's text.
    pub message: String,
}

/// A process seen in libcuda by its rare calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CudaProcess {
    /// Contexts created so far.
    pub contexts: u64,
    /// Allocation calls so far.
    pub allocations: u64,
    /// Bytes asked for so far.
    pub allocated: Bytes,
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPU: GpuId = GpuId([1; 16]);

    #[test]
    fn blocks_of_a_process_are_known_from_its_beginning_or_not_at_all() {
        let totals = |evicted| UvmTotals { evicted: Bytes::mib(evicted), ..UvmTotals::default() };
        let blocks =
            BlockTotals { evicted: Bytes::mib(7), returned: Bytes::mib(3), ..BlockTotals::default() };
        let reading = UvmReading {
            clients: BTreeMap::from([
                ((1, GPU), totals(7)),
                ((2, GPU), totals(0)),
                ((3, GPU), totals(7)),
                ((4, GPU), totals(7)),
            ]),
            blocks: BTreeMap::from([((1, GPU), blocks), ((4, GPU), blocks)]),
            known: vec![1, 2, 3, 5],
            ..UvmReading::default()
        };
        let out = |pid| reading.blocks_of(pid, GPU).map(|blocks| blocks.out());
        assert_eq!(out(1), Some(Bytes::mib(4)));
        assert_eq!(out(2), Some(Bytes::ZERO), "nothing was evicted yet");
        assert_eq!(out(5), Some(Bytes::ZERO), "nothing happened to it at all");
        assert_eq!(out(3), None, "there was no room to follow its blocks");
        assert_eq!(out(4), None, "it was there before the probes");
    }
}
