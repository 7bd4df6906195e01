//! An observer of another program's UVM counters, as the agent is one.

use std::{
    fs::{File, OpenOptions},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use nvshare_abi::{
    tools::{
        ALL_PROCESSORS, CONTROL_BUFFER, COUNTERS, Counter, DISABLE_EVENTS, ENABLE_COUNTERS, ENABLE_EVENTS,
        EnableParams, FLUSH_EVENTS, INIT_BYTES, INIT_EVENT_TRACKER, QUEUE_BUFFER, QUEUE_ENTRIES,
        TrackerLayout, UVM_FD,
        queue::{GET_BEHIND, MIGRATION, Migration, PUT_BEHIND, QueueEvent, QueueLayout, parse, waiting},
    },
    uvm::DriverVersion,
};

use crate::simulator::Simulator;

/// Where this driver version puts the status of the first call.
const STATUS: usize = 48;

pub(crate) struct Tracker {
    _file: File,
    counters: Box<[AtomicU64; COUNTERS]>,
}

/// The numbers of a program's descriptors of the device file.
pub(crate) fn device_descriptors(pid: u32) -> Vec<i32> {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
        .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|target| target.ends_with("nvidia-uvm")))
        .map(|entry| entry.file_name().to_str().unwrap().parse().unwrap())
        .collect()
}

fn duplicate(pid: u32, descriptor: i32) -> OwnedFd {
    // SAFETY: takes numbers; the results are checked and owned.
    unsafe {
        let process = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        assert!(process >= 0, "{}", std::io::Error::last_os_error());
        let process = OwnedFd::from_raw_fd(process as i32);
        let copy = libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), descriptor, 0);
        assert!(copy >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(copy as i32)
    }
}

impl Tracker {
    /// Observes a program, on whichever of its descriptors is the VA space.
    pub(crate) fn of(simulator: &Simulator, pid: u32) -> Self {
        device_descriptors(pid)
            .into_iter()
            .find_map(|descriptor| Self::attach(simulator, pid, descriptor).ok())
            .expect("none of its descriptors takes a tracker")
    }

    /// Observes one descriptor; the driver's status if it refuses.
    pub(crate) fn attach(simulator: &Simulator, pid: u32, descriptor: i32) -> Result<Self, u32> {
        let file = open(simulator);
        let target = duplicate(pid, descriptor);
        let counters: Box<[AtomicU64; COUNTERS]> = Box::default();
        let mut parameters = [0u8; INIT_BYTES];
        parameters[CONTROL_BUFFER..CONTROL_BUFFER + 8]
            .copy_from_slice(&(counters.as_ptr() as u64).to_ne_bytes());
        parameters[ALL_PROCESSORS..ALL_PROCESSORS + 4].copy_from_slice(&1u32.to_ne_bytes());
        parameters[UVM_FD..UVM_FD + 4].copy_from_slice(&target.as_raw_fd().to_ne_bytes());
        ioctl(&file, INIT_EVENT_TRACKER, parameters.as_mut_ptr().cast());
        let status = u32::from_ne_bytes(parameters[STATUS..STATUS + 4].try_into().unwrap());
        if status != 0 {
            return Err(status);
        }
        let mut enable = EnableParams { types: Counter::all_bits(), status: u32::MAX, reserved: 0 };
        ioctl(&file, ENABLE_COUNTERS, (&raw mut enable).cast());
        assert_eq!(enable.status, 0);
        Ok(Self { _file: file, counters })
    }

    pub(crate) fn counters(&self) -> [u64; COUNTERS] {
        std::array::from_fn(|index| self.counters[index].load(Ordering::Acquire))
    }
}

/// An observer of another program's event queue.
pub(crate) struct Queue {
    file: File,
    target: OwnedFd,
    layout: QueueLayout,
    entries: usize,
    control: Box<[AtomicU64]>,
    ring: Box<[AtomicU64]>,
}

impl Queue {
    /// Observes a program, on whichever of its descriptors is the VA space; nothing is queued yet.
    pub(crate) fn of(simulator: &Simulator, driver: DriverVersion, pid: u32, entries: usize) -> Self {
        let layout = QueueLayout::of(driver).unwrap();
        let tracker = TrackerLayout::of(driver).unwrap();
        device_descriptors(pid)
            .into_iter()
            .find_map(|descriptor| {
                let file = open(simulator);
                let target = duplicate(pid, descriptor);
                let words = |bytes: usize| (0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect();
                let control: Box<[AtomicU64]> = words(layout.control);
                let ring: Box<[AtomicU64]> = words(entries * layout.version.entry_bytes());
                let mut parameters = [0u8; INIT_BYTES];
                let mut put = |at: usize, bytes: &[u8]| {
                    parameters[at..at + bytes.len()].copy_from_slice(bytes);
                };
                put(QUEUE_BUFFER, &(ring.as_ptr() as u64).to_ne_bytes());
                put(QUEUE_ENTRIES, &(entries as u64).to_ne_bytes());
                put(CONTROL_BUFFER, &(control.as_ptr() as u64).to_ne_bytes());
                put(ALL_PROCESSORS, &1u32.to_ne_bytes());
                put(UVM_FD, &target.as_raw_fd().to_ne_bytes());
                if let Some(version) = tracker.version {
                    put(version, &(layout.version as u32).to_ne_bytes());
                }
                ioctl(&file, layout.init, parameters.as_mut_ptr().cast());
                let status = tracker.status..tracker.status + 4;
                let status = u32::from_ne_bytes(parameters[status].try_into().unwrap());
                (status == 0).then_some(Self { file, target, layout, entries, control, ring })
            })
            .expect("none of its descriptors takes a queue")
    }

    pub(crate) fn switch(&self, on: bool) {
        let mut enable = EnableParams { types: 1 << MIGRATION, status: u32::MAX, reserved: 0 };
        let number = if on { ENABLE_EVENTS } else { DISABLE_EVENTS };
        ioctl(&self.file, number, (&raw mut enable).cast());
        assert_eq!(enable.status, 0);
    }

    pub(crate) fn flush(&self) {
        let mut status = [u32::MAX; 2];
        // SAFETY: the driver's structure for that number is one u32.
        let result = unsafe {
            libc::ioctl(self.target.as_raw_fd(), libc::c_ulong::from(FLUSH_EVENTS), status.as_mut_ptr())
        };
        assert_eq!((result, status[0]), (0, 0));
    }

    fn word(&self, offset: usize) -> u32 {
        let word = self.control[offset / 8].load(Ordering::Acquire);
        (word >> (offset % 8 * 8)) as u32
    }

    /// Takes out what waits.
    pub(crate) fn drain(&self) -> Vec<Migration> {
        let (get, put) = (self.word(GET_BEHIND), self.word(PUT_BEHIND));
        let bytes = self.layout.version.entry_bytes();
        let entries = waiting(get, put, self.entries as u32);
        let found = (0..entries as usize)
            .map(|index| {
                let at = (get as usize + index) % self.entries * bytes / 8;
                let entry: Vec<u8> = self.ring[at..at + bytes / 8]
                    .iter()
                    .flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes())
                    .collect();
                match parse(self.layout.version, &entry) {
                    Some(QueueEvent::Migration(migration)) => migration,
                    other => panic!("{other:?}"),
                }
            })
            .collect();
        self.control[0].store(u64::from(put) << 32 | u64::from(put), Ordering::Release);
        found
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.control[self.layout.dropped / 8 + usize::from(MIGRATION)].load(Ordering::Acquire)
    }
}

fn open(simulator: &Simulator) -> File {
    OpenOptions::new().read(true).write(true).open(simulator.dir().join("dev/nvidia-uvm-tools")).unwrap()
}

fn ioctl(file: &File, number: u32, parameters: *mut libc::c_void) {
    // SAFETY: the caller's buffer is as large as the driver's structure for that number.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::c_ulong::from(number), parameters) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}
