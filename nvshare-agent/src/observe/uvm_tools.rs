//! Opening a tracker of another process's VA space through the driver's tools device: the calls that counters and event
//! queues have in common.
//!
//! **Invariants.** Memory that the driver writes into stays mapped until the tools file is closed. A descriptor that is
//! not of the driver's device file is never given to the driver.

use std::{
    fs::{File, OpenOptions},
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
};

use nvshare_abi::{
    tools::{self, EnableParams, TrackerLayout, queue::QueueLayout},
    uvm::{DriverVersion, Status},
};
use nvshare_core::GpuId;
use rustix::fs::{FileType, fstat, stat};

use crate::{
    config::DriverConfig,
    sys::{DriverMemory, bare_ioctl},
};

/// Why a tracker could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The driver is absent or unknown.
    #[error("{0}")]
    Driver(String),
    /// The system refused.
    #[error("{what}: {why}")]
    System {
        /// What was tried.
        what: String,
        /// Why not.
        why: std::io::Error,
    },
    /// The driver refused.
    #[error("the driver answered {what} with status {status:#x}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// The driver's answer.
        status: u32,
    },
}

/// What a tracker is to observe, and where the driver is to put it.
#[derive(Debug)]
pub enum Purpose<'a> {
    /// Counters, of one GPU or of all processors together.
    Count(Option<GpuId>, &'a DriverMemory),
    /// Events, in a ring of this many entries at this offset of the memory, behind the control block.
    Queue {
        /// How this driver is asked.
        layout: QueueLayout,
        /// The control block, and the ring.
        memory: &'a DriverMemory,
        /// Offset of the ring.
        ring: usize,
        /// A power of two.
        entries: u32,
    },
}

/// Which driver is loaded, and how it is asked.
pub fn driver_version(driver: &DriverConfig) -> Result<(DriverVersion, TrackerLayout), String> {
    let path = driver.version_file();
    let text = std::fs::read_to_string(&path).map_err(|error| {
        format!(
            "nvidia-uvm is not loaded: {}: {error}; it is loaded by the first CUDA program",
            path.display()
        )
    })?;
    let version = DriverVersion::find_in(&text)
        .ok_or_else(|| format!("{} does not hold a driver version: {}", path.display(), text.trim()))?;
    let layout = TrackerLayout::of(version)
        .ok_or_else(|| format!("driver {version} is not known to this agent; a newer agent may know it"))?;
    Ok((version, layout))
}

/// Checks that a descriptor is one of the driver's device file.
pub fn verify(driver: &DriverConfig, descriptor: &OwnedFd) -> Result<(), String> {
    let path = driver.uvm_device();
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

/// Opens a tools file that observes the VA space behind a descriptor. Nothing is switched on yet.
pub fn open_tracker(
    driver: &DriverConfig,
    layout: TrackerLayout,
    descriptor: &OwnedFd,
    purpose: &Purpose<'_>,
) -> Result<File, OpenError> {
    let path = driver.uvm_tools_device();
    let tools = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(system(&format!("opening {}", path.display())))?;
    let mut init = [0_u8; tools::INIT_BYTES];
    let (number, version) = match purpose {
        Purpose::Count(gpu, page) => {
            put(&mut init, tools::CONTROL_BUFFER, &page.address().to_ne_bytes());
            match gpu {
                Some(gpu) => put(&mut init, tools::PROCESSOR_UUID, &gpu.0),
                None => put(&mut init, tools::ALL_PROCESSORS, &1_u32.to_ne_bytes()),
            }
            (tools::INIT_EVENT_TRACKER, 1)
        }
        Purpose::Queue { layout, memory, ring, entries } => {
            put(&mut init, tools::CONTROL_BUFFER, &memory.address().to_ne_bytes());
            put(&mut init, tools::QUEUE_BUFFER, &(memory.address() + *ring as u64).to_ne_bytes());
            put(&mut init, tools::QUEUE_ENTRIES, &u64::from(*entries).to_ne_bytes());
            put(&mut init, tools::ALL_PROCESSORS, &1_u32.to_ne_bytes());
            (layout.init, layout.version as u32)
        }
    };
    put(&mut init, tools::UVM_FD, &descriptor.as_raw_fd().to_ne_bytes());
    if let Some(offset) = layout.version {
        put(&mut init, offset, &version.to_ne_bytes());
    }
    bare_ioctl(&tools, number, &mut init).map_err(system("initialising a tracker"))?;
    accepted("the tracker", status_at(&init, layout.status))?;
    Ok(tools)
}

/// Switches counters or event types on or off, by the number of the call.
pub fn switch(tools: &File, number: u32, bits: u64) -> Result<(), OpenError> {
    let mut parameters = [0_u8; size_of::<EnableParams>()];
    put(&mut parameters, 0, &bits.to_ne_bytes());
    bare_ioctl(tools, number, &mut parameters).map_err(system("switching a tracker"))?;
    accepted("the switch", status_at(&parameters, 8))
}

/// Has the driver queue what it holds back of a VA space.
pub fn flush(descriptor: impl AsFd) -> Result<(), OpenError> {
    let mut parameters = [0_u8; 8];
    bare_ioctl(descriptor, tools::FLUSH_EVENTS, &mut parameters).map_err(system("flushing events"))?;
    accepted("the flush", status_at(&parameters, 0))
}

/// Names what the system refused.
pub(super) fn system(what: &str) -> impl FnOnce(std::io::Error) -> OpenError {
    let what = what.to_owned();
    move |why| OpenError::System { what, why }
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
