//! The driver's own counters on each client's VA space: faults and bytes, per client and GPU.
//!
//! **Problem.** The counters are exact and work on every kernel, but a tracker holds the client's VA space, and
//! with it the GPU memory of a client that has died.
//!
//! **Approach.** The client hands over its descriptor of the driver's device file. One tracker is two open
//! tools files, each with one page that the driver writes into: for the GPU, and for CPU faults, which the counters of
//! a GPU leave out. The session that owns the client drops its trackers and descriptors as soon as the process ends.
//!
//! **Invariants.** A page stays mapped until the tools file is closed. A descriptor that is not of the driver's
//! device file is never given to the driver.

use std::{
    fs::File,
    os::fd::OwnedFd,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use nvshare_abi::tools::{self, Counter, TrackerLayout};
use nvshare_core::{GpuId, Nanos};
use serde::{Deserialize, Serialize};

use super::{
    source::{SensorName, SensorStatus},
    uvm_tools::{self, OpenError, Purpose, open_tracker, switch, system},
};
use crate::{clock, config::DriverConfig, sys::DriverMemory};

/// Bytes of what the driver writes counters into.
const PAGE: usize = 4096;

/// An open tracker.
#[derive(Debug)]
pub struct Tracker {
    of_gpu: Counting,
    of_cpu: Counting,
}

/// One open tools file and what the driver counts for it. The fields are dropped in this order, which the driver
/// requires.
#[derive(Debug)]
struct Counting {
    _tools: File,
    page: DriverMemory,
}

/// What the driver counted since the tracker was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CounterTotals {
    /// Bytes from host to device.
    pub bytes_in: u64,
    /// Bytes from device to host.
    pub bytes_out: u64,
    /// CPU page faults, whichever GPU they concern.
    pub cpu_faults: u64,
    /// GPU fault entries after coalescing.
    pub gpu_faults: u64,
}

impl Tracker {
    /// The counters since the tracker was opened: its pages were zero, and the driver only adds.
    pub fn read(&self) -> CounterTotals {
        let of_gpu = |counter: Counter| self.of_gpu.page.u64(counter as usize);
        CounterTotals {
            bytes_in: of_gpu(Counter::BytesIn),
            bytes_out: of_gpu(Counter::BytesOut),
            cpu_faults: self.of_cpu.page.u64(Counter::CpuFaults as usize),
            gpu_faults: of_gpu(Counter::GpuFaults),
        }
    }
}

/// The source.
#[derive(Debug)]
pub struct UvmCounters {
    driver: DriverConfig,
    enabled: bool,
    opened: AtomicU64,
    failed: AtomicU64,
    reads: AtomicU64,
    read_nanos: AtomicU64,
    last_error: Mutex<Option<String>>,
}

impl UvmCounters {
    /// The source for the driver at these paths.
    pub fn new(driver: DriverConfig, enabled: bool) -> Self {
        Self {
            driver,
            enabled,
            opened: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            read_nanos: AtomicU64::new(0),
            last_error: Mutex::new(None),
        }
    }

    /// Checks that a descriptor is one of the driver's device file.
    pub fn verify(&self, descriptor: &OwnedFd) -> Result<(), String> {
        uvm_tools::verify(&self.driver, descriptor)
    }

    /// Opens a tracker for one GPU on a VA space, if the driver accepts it.
    pub fn open(&self, descriptor: &OwnedFd, gpu: GpuId) -> Option<Tracker> {
        if !self.enabled {
            return None;
        }
        match self.try_open(descriptor, gpu) {
            Ok(tracker) => {
                self.opened.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(%gpu, "counters opened");
                Some(tracker)
            }
            Err(error) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                tracing::info!(%gpu, %error, "no counters on this descriptor");
                *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
                None
            }
        }
    }

    fn try_open(&self, descriptor: &OwnedFd, gpu: GpuId) -> Result<Tracker, OpenError> {
        let (_, layout) = uvm_tools::driver_version(&self.driver).map_err(OpenError::Driver)?;
        Ok(Tracker {
            of_gpu: self.count(
                layout,
                descriptor,
                Some(gpu),
                Counter::all_bits() & !Counter::CpuFaults.bit(),
            )?,
            of_cpu: self.count(layout, descriptor, None, Counter::CpuFaults.bit())?,
        })
    }

    /// Has the driver count for one GPU, or for all processors together.
    fn count(
        &self,
        layout: TrackerLayout,
        descriptor: &OwnedFd,
        gpu: Option<GpuId>,
        counters: u64,
    ) -> Result<Counting, OpenError> {
        let page = DriverMemory::new(PAGE).map_err(system("mapping a page for counters"))?;
        let tools = open_tracker(&self.driver, layout, descriptor, &Purpose::Count(gpu, &page))?;
        switch(&tools, tools::ENABLE_COUNTERS, counters)?;
        Ok(Counting { _tools: tools, page })
    }

    /// Counts the cost of reading.
    pub fn note_read(&self, took: Nanos) {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.read_nanos.fetch_add(took.0, Ordering::Relaxed);
    }

    /// The state of the source. `open_now` is the number of trackers that clients hold.
    pub fn status(&self, open_now: usize) -> SensorStatus {
        let name = SensorName::UvmCounters;
        if !self.enabled {
            return SensorStatus::unavailable(
                name,
                "switched off in the configuration ([sensors] uvm-counters)",
            );
        }
        let tools = self.driver.uvm_tools_device();
        if let Err(error) = std::fs::metadata(&tools) {
            return SensorStatus::unavailable(
                name,
                format!("{}: {error}; is the NVIDIA driver loaded?", tools.display()),
            );
        }
        if let Err(reason) = uvm_tools::driver_version(&self.driver) {
            return SensorStatus::unavailable(name, reason);
        }
        let (opened, failed) = (self.opened.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed));
        if opened == 0 && failed > 0 {
            let last =
                self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default();
            return SensorStatus::unavailable(
                name,
                format!("no client's descriptor was accepted; last: {last}"),
            );
        }
        SensorStatus {
            run_count: self.reads.load(Ordering::Relaxed),
            run_time: Some(Nanos(self.read_nanos.load(Ordering::Relaxed))),
            ..SensorStatus::attached(name, format!("{open_now} trackers open through {}", tools.display()))
        }
    }

    /// Runs one reading and counts its cost.
    pub fn timed<T>(&self, read: impl FnOnce() -> T) -> T {
        let begin = clock::now();
        let result = read();
        self.note_read(clock::now().since(begin));
        result
    }
}
