//! The eBPF sensors: `uvm-kprobe`, `fault-thread`, `xid` and `cuda-uprobe`. The one module that knows the BPF library.
//!
//! Problem: each program needs other things of the machine (privileges, kprobes, tracefs, a loaded driver, a
//! library), and any of them can be absent, come late or go away.
//!
//! Approach: one object is loaded, each sensor attaches on its own and says in plain words why it could not.
//! [`Bpf::refresh`], done about once a second, attaches what has come and lets go of what has gone.
//!
//! Invariants: nothing here fails as a whole or blocks for longer than attaching takes (tens of milliseconds when
//! something comes; a reading costs a few system calls per client and GPU). Dropping the value detaches everything.

mod cuda;
mod fault_thread;
mod maps;
mod object;
mod program;
mod reason;
#[cfg(test)]
mod tests;
mod tracefs;
mod uvm;
mod xid;

use std::{collections::BTreeMap, fmt, os::fd::OwnedFd};

use aya::{
    Ebpf,
    sys::{Stats, enable_stats},
};
use aya_log::EbpfLogger;
use nvshare_core::{GpuId, Nanos};

use self::{cuda::CudaProbes, fault_thread::FaultThreads, maps::Maps, uvm::UvmProbes, xid::XidProbe};
use super::source::{BpfOptions, BpfReading, SensorName, SensorState, SensorStatus};
use crate::clock;

const SENSORS: [SensorName; 4] =
    [SensorName::UvmKprobe, SensorName::FaultThread, SensorName::Xid, SensorName::CudaUprobe];

/// How often a reading first looks whether something has come or gone.
const REFRESH: Nanos = Nanos::SECOND;

/// The eBPF sensors of one agent.
pub struct Bpf {
    options: BpfOptions,
    loaded: Result<Loaded, String>,
    refreshed: Nanos,
}

impl fmt::Debug for Bpf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bpf").field("options", &self.options).finish_non_exhaustive()
    }
}

struct Loaded {
    ebpf: Ebpf,
    maps: Maps,
    log: Option<EbpfLogger<&'static dyn log::Log>>,
    /// Keeps the kernel's accounting of programs on.
    accounting: Option<OwnedFd>,
    uvm: Option<UvmProbes>,
    fault_threads: Option<FaultThreads>,
    xid: Option<XidProbe>,
    cuda: Option<CudaProbes>,
}

impl Bpf {
    /// Loads the programs and attaches what can be attached. What cannot be is told by [`Self::status`].
    pub fn attach(options: &BpfOptions) -> Self {
        let loaded = Loaded::open(options);
        let mut sensors = Self { options: options.clone(), loaded, refreshed: Nanos::ZERO };
        sensors.refresh();
        sensors
    }

    /// How many instructions the kernel's verifier looks at in each program of the object. Loads every program and
    /// attaches none.
    pub fn verified_instructions() -> Result<BTreeMap<String, u32>, String> {
        let mut ebpf = object::load()?;
        program::verified_instructions(&mut ebpf)
    }

    /// Attaches what has come, lets go of what has gone, and passes on the programs' messages.
    pub fn refresh(&mut self) {
        self.refreshed = clock::now();
        if let Ok(loaded) = &mut self.loaded {
            loaded.refresh(&self.options);
        }
    }

    /// What a GPU can hold less what a process allocated there, for each process of which that is known. With it, refaults
    /// of single blocks are judged.
    pub fn set_room(&mut self, room: BTreeMap<(u32, GpuId), i64>) {
        if let Ok(Loaded { uvm: Some(uvm), .. }) = &mut self.loaded {
            uvm.set_room(room);
        }
    }

    /// What the sensors counted. Refreshes first if that was not done for a second.
    pub fn read(&mut self) -> BpfReading {
        if clock::now().since(self.refreshed) >= REFRESH {
            self.refresh();
        }
        let Ok(loaded) = &mut self.loaded else {
            return BpfReading::default();
        };
        let Loaded { ebpf: _, maps, log, accounting: _, uvm, fault_threads, xid, cuda } = loaded;
        if let Some(log) = log {
            log.flush();
        }
        BpfReading {
            fault_busy: fault_threads.as_ref().map(|threads| threads.busy(maps)).unwrap_or_default(),
            uvm: uvm.as_mut().and_then(|uvm| uvm.read(maps, &self.options.driver)),
            xids: xid.as_ref().map(|_| XidProbe::read(maps)).unwrap_or_default(),
            cuda: cuda.as_ref().map(|_| CudaProbes::read(maps)).unwrap_or_default(),
        }
    }

    /// What each sensor says of itself.
    pub fn status(&self) -> Vec<SensorStatus> {
        SENSORS.map(|sensor| self.status_of(sensor)).into()
    }

    fn status_of(&self, sensor: SensorName) -> SensorStatus {
        if !self.wants(sensor) {
            return SensorStatus::unavailable(sensor, "switched off in the configuration");
        }
        let loaded = match &self.loaded {
            Ok(loaded) => loaded,
            Err(reason) => return SensorStatus::unavailable(sensor, reason.clone()),
        };
        let (state, programs): (Option<&SensorState>, &[&str]) = match sensor {
            SensorName::UvmKprobe => (loaded.uvm.as_ref().map(UvmProbes::state), &uvm::PROGRAMS),
            SensorName::FaultThread => {
                (loaded.fault_threads.as_ref().map(FaultThreads::state), &fault_thread::PROGRAMS)
            }
            SensorName::Xid => (loaded.xid.as_ref().map(XidProbe::state), &xid::PROGRAMS),
            SensorName::CudaUprobe => (loaded.cuda.as_ref().map(CudaProbes::state), &cuda::PROGRAMS),
            SensorName::UvmCounters | SensorName::UvmEvents | SensorName::Nvml | SensorName::Shim => {
                (None, &[])
            }
        };
        let Some(state) = state else {
            return SensorStatus::unavailable(sensor, "not a BPF sensor");
        };
        let (run_count, run_time) = program::cost(&loaded.ebpf, programs);
        let lost = match (sensor, &loaded.uvm) {
            (SensorName::UvmKprobe, Some(uvm)) => uvm.lost(&loaded.maps),
            _ => 0,
        };
        SensorStatus {
            sensor,
            state: state.clone(),
            run_count,
            run_time: loaded.accounting.as_ref().map(|_| run_time),
            lost,
        }
    }

    fn wants(&self, sensor: SensorName) -> bool {
        let BpfOptions { driver: _, uvm_kprobe, fault_thread, xid, cuda_uprobe } = &self.options;
        match sensor {
            SensorName::UvmKprobe => *uvm_kprobe,
            SensorName::FaultThread => *fault_thread,
            SensorName::Xid => *xid,
            SensorName::CudaUprobe => *cuda_uprobe,
            SensorName::UvmCounters | SensorName::UvmEvents | SensorName::Nvml | SensorName::Shim => false,
        }
    }
}

impl Loaded {
    fn open(options: &BpfOptions) -> Result<Self, String> {
        let BpfOptions { driver, uvm_kprobe, fault_thread, xid, cuda_uprobe } = options;
        let mut ebpf = object::load()?;
        let maps = Maps::take(&mut ebpf)?;
        let log = EbpfLogger::init(&mut ebpf)
            .inspect_err(|error| tracing::warn!("messages of the BPF programs are not shown: {error}"))
            .ok();
        let accounting = enable_stats(Stats::RunTime)
            .inspect_err(|error| tracing::info!("the cost of the BPF programs is not known: {error}"))
            .ok();
        Ok(Self {
            uvm: uvm_kprobe.then(UvmProbes::new),
            fault_threads: fault_thread.then(|| FaultThreads::attach(&mut ebpf)),
            xid: xid.then(|| XidProbe::attach(&mut ebpf)),
            cuda: cuda_uprobe.then(|| CudaProbes::attach(&mut ebpf, driver)),
            ebpf,
            maps,
            log,
            accounting,
        })
    }

    fn refresh(&mut self, options: &BpfOptions) {
        let Self { ebpf, maps, log, accounting: _, uvm, fault_threads, xid, cuda } = self;
        if let Some(uvm) = uvm {
            uvm.refresh(ebpf, maps, &options.driver);
        }
        if let Some(threads) = fault_threads {
            threads.refresh(maps, &options.driver);
        }
        if let Some(xid) = xid {
            xid.refresh(ebpf);
        }
        if let Some(cuda) = cuda {
            cuda.refresh(ebpf, &options.driver);
        }
        if let Some(log) = log {
            log.flush();
        }
    }
}
