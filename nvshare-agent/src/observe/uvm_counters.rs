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
    fs::{File, OpenOptions},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use nvshare_abi::{
    tools::{self, Counter, EnableParams, TrackerLayout},
    uvm::{DriverVersion, Status},
};
use nvshare_core::{GpuId, Nanos};
use rustix::fs::{FileType, fstat, stat};

use super::source::{SensorName, SensorStatus};
use crate::{
    clock,
    config::DriverConfig,
    sys::{CounterPage, bare_ioctl},
};

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
    page: CounterPage,
}

/// What the driver counted since the tracker was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
        let of_gpu = |counter: Counter| self.of_gpu.page.read(counter as usize);
        CounterTotals {
            bytes_in: of_gpu(Counter::BytesIn),
            bytes_out: of_gpu(Counter::BytesOut),
            cpu_faults: self.of_cpu.page.read(Counter::CpuFaults as usize),
            gpu_faults: of_gpu(Counter::GpuFaults),
        }
    }
}

/// Why a tracker could not be opened.
#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error("{0}")]
    Driver(String),
    #[error("{what}: {source}")]
    System { what: String, source: std::io::Error },
    #[error("the driver answered {what} with status {status:#x}")]
    Refused { what: &'static str, status: u32 },
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
        let path = self.driver.uvm_device();
        let device = stat(&path).map_err(|error| format!("cannot look at {}: {error}", path.display()))?;
        let offered = fstat(descriptor).map_err(|error| format!("cannot look at the descriptor: {error}"))?;
        let kind = FileType::from_raw_mode(device.st_mode);
        // A container has a device node of its own; what makes it the driver's is the device number.
        let same = FileType::from_raw_mode(offered.st_mode) == kind
            && match kind {
                FileType::CharacterDevice => offered.st_rdev == device.st_rdev,
                _ => (offered.st_dev, offered.st_ino) == (device.st_dev, device.st_ino),
            };
        if same { Ok(()) } else { Err(format!("the descriptor is not one of {}", path.display())) }
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
        let layout = self.layout().map_err(OpenError::Driver)?;
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
        let path = self.driver.uvm_tools_device();
        let system = |what: &str| {
            let what = what.to_owned();
            move |source| OpenError::System { what, source }
        };
        let tools = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(system(&format!("opening {}", path.display())))?;
        let page = CounterPage::new().map_err(system("mapping a page for counters"))?;
        let mut init = [0_u8; tools::INIT_BYTES];
        put(&mut init, tools::CONTROL_BUFFER, &page.address().to_ne_bytes());
        match gpu {
            Some(gpu) => put(&mut init, tools::PROCESSOR_UUID, &gpu.0),
            None => put(&mut init, tools::ALL_PROCESSORS, &1_u32.to_ne_bytes()),
        }
        put(&mut init, tools::UVM_FD, &descriptor.as_raw_fd().to_ne_bytes());
        if let Some(version) = layout.version {
            put(&mut init, version, &1_u32.to_ne_bytes());
        }
        bare_ioctl(&tools, tools::INIT_EVENT_TRACKER, &mut init).map_err(system("initialising a tracker"))?;
        accepted("the tracker", status_at(&init, layout.status))?;
        let mut enable = [0_u8; size_of::<EnableParams>()];
        put(&mut enable, 0, &counters.to_ne_bytes());
        bare_ioctl(&tools, tools::ENABLE_COUNTERS, &mut enable).map_err(system("enabling counters"))?;
        accepted("the counters", status_at(&enable, 8))?;
        Ok(Counting { _tools: tools, page })
    }

    fn layout(&self) -> Result<TrackerLayout, String> {
        let path = self.driver.version_file();
        let text = std::fs::read_to_string(&path).map_err(|error| {
            format!(
                "nvidia-uvm is not loaded: {}: {error}; it is loaded by the first CUDA program",
                path.display()
            )
        })?;
        let version = DriverVersion::find_in(&text)
            .ok_or_else(|| format!("{} does not hold a driver version: {}", path.display(), text.trim()))?;
        TrackerLayout::of(version)
            .ok_or_else(|| format!("driver {version} is not known to this agent; a newer agent may know it"))
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
        if let Err(reason) = self.layout() {
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

fn put(buffer: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(room) = buffer.get_mut(at..at + bytes.len()) {
        room.copy_from_slice(bytes);
    }
}

fn status_at(buffer: &[u8], at: usize) -> u32 {
    // A status that cannot be read is not success.
    buffer.get(at..).and_then(|rest| rest.first_chunk()).map_or(u32::MAX, |bytes| u32::from_ne_bytes(*bytes))
}

fn accepted(what: &'static str, status: u32) -> Result<(), OpenError> {
    if Status(status) == Status::OK { Ok(()) } else { Err(OpenError::Refused { what, status }) }
}
