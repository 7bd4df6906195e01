//! The driver's device files: what their ioctls do.
//!
//! A tracker watches one VA space for one observer: it counts, and writes its counters into the observer's memory after
//! each batch, as the driver does into the pages that it pins. An event queue ([`queue`]) holds migrations only, and nobody can
//! wait for it: its files are always readable.

mod queue;

use std::{
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{Mutex, atomic::AtomicU64, atomic::Ordering},
};

use bytemuck::Zeroable as _;
use nvshare_abi::{
    tools::{
        ALL_PROCESSORS, CONTROL_BUFFER, COUNTERS, Counter, DISABLE_COUNTERS, DISABLE_EVENTS, ENABLE_COUNTERS,
        ENABLE_EVENTS, EnableParams, FLUSH_EVENTS, INIT_BYTES, INIT_EVENT_TRACKER, INIT_EVENT_TRACKER_V2,
        PROCESSOR_UUID, QUEUE_BUFFER, QUEUE_ENTRIES, SET_NOTIFICATION_THRESHOLD, TrackerLayout, UVM_FD,
        queue::QueueVersion,
    },
    uvm::{DriverVersion, Status},
};
use nvshare_gpu_sim_model::ids::{CardId, SpaceId};

use crate::{
    remote,
    service::lock,
    world::{FileHandle, World},
};

pub(crate) use queue::Queue;

/// UVM_INITIALIZE, UVM_DEINITIALIZE and UVM_MM_INITIALIZE of the driver.
const UVM_INITIALIZE: u32 = 0x3000_0001;
const UVM_DEINITIALIZE: u32 = 0x3000_0002;
const UVM_MM_INITIALIZE: u32 = 75;
/// Ours: the simulator asks a duplicate of somebody's descriptor which open file it is.
const IDENTIFY: u32 = 0x4e56;

/// Which of the two device files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    /// `nvidia-uvm`.
    Uvm,
    /// `nvidia-uvm-tools`.
    Tools,
}

/// Who calls, on what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) device: Device,
    pub(crate) file: FileHandle,
    /// The calling process.
    pub(crate) pid: u32,
    pub(crate) number: u32,
    /// The parameters, in the caller's memory.
    pub(crate) argument: u64,
}

/// Counters of one VA space for one observer.
#[derive(Debug)]
pub(crate) struct Tracker {
    /// The observed space.
    pub(crate) space: Option<SpaceId>,
    /// `None`: all processors.
    card: Option<CardId>,
    observer: u32,
    counters_at: u64,
    enabled: u64,
    counters: [u64; COUNTERS],
    changed: bool,
}

impl Tracker {
    /// Adds to a counter if this tracker looks at it.
    pub(crate) fn count(&mut self, card: Option<CardId>, counter: Counter, amount: u64) {
        if amount == 0 || self.enabled & counter.bit() == 0 || (self.card.is_some() && self.card != card) {
            return;
        }
        self.counters[counter as usize] += amount;
        self.changed = true;
    }

    /// Writes the counters into the observer's memory if they have changed. An observer that has gone closes its file soon.
    pub(crate) fn flush(&mut self) {
        if std::mem::take(&mut self.changed) {
            drop(remote::write(self.observer, self.counters_at, bytemuck::bytes_of(&self.counters)));
        }
    }
}

/// Whether the call itself waits for another call on the same files, and so needs a thread of its own.
pub(crate) fn waits_for_files(call: &Call) -> bool {
    call.device == Device::Tools && matches!(call.number, INIT_EVENT_TRACKER | INIT_EVENT_TRACKER_V2)
}

/// Answers an ioctl: what the system call returns, 0 or a negative error number.
pub(crate) fn answer(world: &Mutex<World>, driver: DriverVersion, device: u64, call: &Call) -> i32 {
    let result = match (call.device, call.number) {
        (Device::Uvm, UVM_INITIALIZE) => status_at(call, 8, initialize(world, call)),
        (Device::Uvm, UVM_DEINITIALIZE) => Ok(()),
        (Device::Uvm, UVM_MM_INITIALIZE) => status_at(call, 4, Status::OK),
        (Device::Uvm, FLUSH_EVENTS) => status_at(call, 0, flush(world, call)),
        (Device::Uvm, IDENTIFY) if call.pid == std::process::id() => {
            remote::write(call.pid, call.argument, &call.file.0.to_ne_bytes())
        }
        (Device::Tools, INIT_EVENT_TRACKER | INIT_EVENT_TRACKER_V2) => {
            begin_tracker(world, driver, device, call)
        }
        (Device::Tools, SET_NOTIFICATION_THRESHOLD) => status_at(call, 4, Status::NOT_SUPPORTED),
        (Device::Tools, ENABLE_EVENTS | DISABLE_EVENTS | ENABLE_COUNTERS | DISABLE_COUNTERS) => {
            enable(world, call)
        }
        (Device::Uvm | Device::Tools, _) => return -libc::EINVAL,
    };
    match result {
        Ok(()) => 0,
        Err(error) => {
            warn_of_yama(&error);
            -error.raw_os_error().unwrap_or(libc::EFAULT)
        }
    }
}

fn status_at(call: &Call, offset: u64, status: Status) -> std::io::Result<()> {
    remote::write(call.pid, call.argument + offset, &status.0.to_ne_bytes())
}

/// The file becomes the VA space of the program that calls; a program without a session gets an empty one.
fn initialize(world: &Mutex<World>, call: &Call) -> Status {
    let mut world = lock(world);
    if world.spaces.values().any(|space| space.file == Some(call.file)) {
        return Status::OK;
    }
    let own = world
        .spaces
        .iter()
        .find(|(_, space)| space.pid == call.pid && space.client.is_some() && space.file.is_none())
        .map(|(&id, _)| id);
    let space = match own {
        Some(space) => space,
        None => match world.create_space(call.pid) {
            Ok(space) => space,
            Err(error) => {
                eprintln!("nvshare-gpu-sim: process {} gets no VA space: {error}", call.pid);
                return Status::INVALID_ARGUMENT;
            }
        },
    };
    if let Some(space) = world.spaces.get_mut(&space) {
        space.file = Some(call.file);
    }
    Status::OK
}

fn begin_tracker(
    world: &Mutex<World>,
    driver: DriverVersion,
    device: u64,
    call: &Call,
) -> std::io::Result<()> {
    // A driver whose calls are unknown has no device files; the second number came with 565.
    let layout = TrackerLayout::of(driver).ok_or_else(|| std::io::Error::from_raw_os_error(libc::EINVAL))?;
    if call.number == INIT_EVENT_TRACKER_V2 && driver.branch < 565 {
        return Err(std::io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut parameters = [0; INIT_BYTES];
    remote::read(call.pid, call.argument, &mut parameters[..layout.size])?;
    let status = tracker_from(world, (driver, layout), device, call, &parameters)?;
    status_at(call, layout.status as u64, status)
}

fn tracker_from(
    world: &Mutex<World>,
    (driver, layout): (DriverVersion, TrackerLayout),
    device: u64,
    call: &Call,
    parameters: &[u8; INIT_BYTES],
) -> std::io::Result<Status> {
    let u32_at =
        |offset: usize| parameters.get(offset..offset + 4).map_or(0, bytemuck::pod_read_unaligned::<u32>);
    let u64_at =
        |offset: usize| parameters.get(offset..offset + 8).map_or(0, bytemuck::pod_read_unaligned::<u64>);
    let version = match (layout.version.map(u32_at), call.number) {
        (None, INIT_EVENT_TRACKER) | (Some(1), _) => QueueVersion::V1,
        (None | Some(2), _) => QueueVersion::V2,
        (Some(_), _) => return Ok(Status::INVALID_ARGUMENT),
    };
    let entries = u64_at(QUEUE_ENTRIES);
    if entries != 0 && !((2..=1 << 24).contains(&entries) && entries.is_power_of_two()) {
        return Ok(Status::INVALID_ARGUMENT);
    }
    let card = if u32_at(ALL_PROCESSORS) == 0 {
        let uuid = &parameters[PROCESSOR_UUID..PROCESSOR_UUID + 16];
        match lock(world).uuids.iter().position(|known| known == uuid) {
            Some(index) => Some(CardId(index)),
            None => return Ok(Status::INVALID_ARGUMENT),
        }
    } else {
        None
    };
    // The lock is free here: identifying the descriptor is a call that another thread answers.
    let Some(file) = identify(&remote::duplicate(call.pid, u32_at(UVM_FD))?, device) else {
        return Ok(Status::NOT_A_VA_SPACE);
    };
    if entries != 0 {
        let mut world = lock(world);
        let space = world.spaces.iter().find(|(_, space)| space.file == Some(file)).map(|(&id, _)| id);
        let Some(space) = space else { return Ok(Status::NOT_A_VA_SPACE) };
        if world.trackers.contains_key(&call.file) || world.queues.contains_key(&call.file) {
            return Ok(Status::INVALID_ARGUMENT);
        }
        let queue = Queue {
            space,
            observer: call.pid,
            version,
            ring: u64_at(QUEUE_BUFFER),
            entries: entries as u32,
            control: u64_at(CONTROL_BUFFER),
            dropped: queue::dropped_at(driver, version),
            enabled: 0,
            held: Vec::new(),
        };
        world.queues.insert(call.file, queue);
        return Ok(Status::OK);
    }
    let counters_at = u64_at(CONTROL_BUFFER);
    let mut counters = [0; COUNTERS];
    remote::read(call.pid, counters_at, bytemuck::bytes_of_mut(&mut counters))?;
    let mut world = lock(world);
    let space = world.spaces.iter().find(|(_, space)| space.file == Some(file)).map(|(&id, _)| id);
    if space.is_none() {
        return Ok(Status::NOT_A_VA_SPACE);
    }
    if world.trackers.contains_key(&call.file) {
        return Ok(Status::INVALID_ARGUMENT);
    }
    let tracker =
        Tracker { space, card, observer: call.pid, counters_at, enabled: 0, counters, changed: false };
    world.trackers.insert(call.file, tracker);
    Ok(Status::OK)
}

/// Which open file of ours a descriptor stands for; `None` if it is not one.
fn identify(descriptor: &OwnedFd, device: u64) -> Option<FileHandle> {
    // SAFETY: all zeros is a valid stat.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: writes one stat.
    let known = unsafe { libc::fstat(descriptor.as_raw_fd(), &raw mut stat) } == 0 && stat.st_dev == device;
    // Written by the thread that answers, through the kernel.
    let handle = AtomicU64::new(u64::MAX);
    // SAFETY: the file is one of ours, whose answer writes 8 bytes at the pointer.
    let asked = known
        && unsafe { libc::ioctl(descriptor.as_raw_fd(), libc::c_ulong::from(IDENTIFY), handle.as_ptr()) }
            == 0;
    asked.then(|| FileHandle(handle.load(Ordering::Acquire)))
}

fn enable(world: &Mutex<World>, call: &Call) -> std::io::Result<()> {
    let mut parameters = EnableParams::zeroed();
    remote::read(call.pid, call.argument, bytemuck::bytes_of_mut(&mut parameters))?;
    let mut world = lock(world);
    // An open file counts or queues, never both.
    let enabled = match call.number {
        ENABLE_COUNTERS | DISABLE_COUNTERS => {
            world.trackers.get_mut(&call.file).map(|tracker| &mut tracker.enabled)
        }
        _ => world.queues.get_mut(&call.file).map(|queue| &mut queue.enabled),
    };
    let status = match enabled {
        Some(enabled) if matches!(call.number, ENABLE_COUNTERS | ENABLE_EVENTS) => {
            *enabled |= parameters.types;
            Status::OK
        }
        Some(enabled) => {
            *enabled &= !parameters.types;
            Status::OK
        }
        None => Status::INVALID_ARGUMENT,
    };
    drop(world);
    status_at(call, 8, status)
}

/// Queues what is held back of the VA space behind this file.
fn flush(world: &Mutex<World>, call: &Call) -> Status {
    let mut world = lock(world);
    let space = world.spaces.iter().find(|(_, space)| space.file == Some(call.file)).map(|(&id, _)| id);
    let Some(space) = space else { return Status::NOT_A_VA_SPACE };
    world.queues.values_mut().filter(|queue| queue.space == space).for_each(Queue::flush);
    Status::OK
}

/// A file was closed by the last who had it open.
pub(crate) fn release(world: &Mutex<World>, device: Device, file: FileHandle) {
    let mut world = lock(world);
    let space = match device {
        Device::Tools => {
            let counted = world.trackers.remove(&file).and_then(|tracker| tracker.space);
            counted.or_else(|| world.queues.remove(&file).map(|queue| queue.space))
        }
        Device::Uvm => {
            world.spaces.iter_mut().find(|(_, space)| space.file == Some(file)).map(|(&id, space)| {
                space.file = None;
                id
            })
        }
    };
    if let Some(space) = space {
        world.end_if_unheld(space);
    }
}

fn warn_of_yama(error: &std::io::Error) {
    static SAID: std::sync::Once = std::sync::Once::new();
    if error.raw_os_error() == Some(libc::EPERM) {
        SAID.call_once(|| {
            eprintln!(
                "nvshare-gpu-sim: the kernel does not let the simulator read a program's memory or descriptors: \
                 run it as root, or start the programs from it, or set kernel.yama.ptrace_scope to 0"
            );
        });
    }
}
