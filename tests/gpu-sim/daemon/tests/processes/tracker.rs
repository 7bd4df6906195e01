//! An observer of another program's UVM counters, as the agent is one.

use std::{
    fs::{File, OpenOptions},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use nvshare_abi::tools::{
    ALL_PROCESSORS, CONTROL_BUFFER, COUNTERS, Counter, ENABLE_COUNTERS, EnableParams, INIT_BYTES,
    INIT_EVENT_TRACKER, UVM_FD,
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
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(simulator.dir().join("dev/nvidia-uvm-tools"))
            .unwrap();
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

fn ioctl(file: &File, number: u32, parameters: *mut libc::c_void) {
    // SAFETY: the caller's buffer is as large as the driver's structure for that number.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::c_ulong::from(number), parameters) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}
