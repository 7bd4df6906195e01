//! The ioctls of `/dev/nvidia-uvm-tools`, by driver version.
//!
//! Problem: the numbers are bare integers and stayed the same, but the parameters of the first call changed three
//! times between 515.43.04 and 595.45.04, and a wrong layout reads the status from the wrong place.
//!
//! Approach: callers always pass a zeroed buffer of [`INIT_BYTES`], which is as large as the largest layout, and
//! [`TrackerLayout`] says where the fields are. Numbers and offsets were read from every published tag and
//! compiled from the headers of 525.147.05, 535.288.01, 550.40.07, 550.163.01, 555.58.02, 560.35.03, 565.57.01,
//! 580.126.20 and 595.45.04.
//!
//! Invariants: success needs both a zero return of the ioctl and [`crate::uvm::Status`] zero at the status
//! offset. One open file holds one tracker. Buffers stay mapped until that file is closed.

pub mod queue;

use crate::uvm::DriverVersion;

/// Makes an open tools file a tracker of one VA space, for counters or events. Parameters: [`TrackerLayout`].
pub const INIT_EVENT_TRACKER: u32 = 56;
/// Sets at how many queued events a poll wakes up.
pub const SET_NOTIFICATION_THRESHOLD: u32 = 57;
/// Turns on event types: [`EnableParams`], bit = type.
pub const ENABLE_EVENTS: u32 = 58;
/// Turns off event types.
pub const DISABLE_EVENTS: u32 = 59;
/// Turns on counters: [`EnableParams`], bit = counter.
pub const ENABLE_COUNTERS: u32 = 60;
/// Turns off counters.
pub const DISABLE_COUNTERS: u32 = 61;
/// On the VA space itself: has the driver queue what it still holds back. Parameters: a u32 that it answers.
pub const FLUSH_EVENTS: u32 = 67;
/// [`INIT_EVENT_TRACKER`] for the second queue layout, from 565.57.01 on.
pub const INIT_EVENT_TRACKER_V2: u32 = 76;

/// Bytes of the buffer for [`INIT_EVENT_TRACKER`], zeroed: the largest layout of all versions.
pub const INIT_BYTES: usize = 64;
/// Offset of the u64 address of the event queue; unused for counters.
pub const QUEUE_BUFFER: usize = 0;
/// Offset of the u64 number of queue entries, a power of two; 0 asks for counters.
pub const QUEUE_ENTRIES: usize = 8;
/// Offset of the u64 address of the queue's control block, or of the counters.
pub const CONTROL_BUFFER: usize = 16;
/// Offset of the 16-byte processor UUID.
pub const PROCESSOR_UUID: usize = 24;
/// Offset of the u32 that, if not 0, asks for all processors and ignores the UUID.
pub const ALL_PROCESSORS: usize = 40;
/// Offset of the u32 descriptor, in the caller's table, of the VA space to be tracked.
pub const UVM_FD: usize = 44;

/// Where the version-dependent fields of [`INIT_EVENT_TRACKER`] lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackerLayout {
    /// Offset of the u32 status that the driver writes.
    pub status: usize,
    /// Offset of the u32 queue version that the caller sets; it must be 1 or 2 even for counters. `None`: the
    /// version has no such field.
    pub version: Option<usize>,
    /// Bytes of the structure.
    pub size: usize,
}

impl TrackerLayout {
    /// The layout of a driver version; `None` for a branch that nobody has looked at.
    pub fn of(version: DriverVersion) -> Option<Self> {
        /// First and last version of each layout, inclusive.
        const EPOCHS: [(DriverVersion, DriverVersion, TrackerLayout); 4] = [
            (
                DriverVersion::new(515, 43, 4),
                DriverVersion::new(550, 40, 7),
                TrackerLayout { status: 48, version: None, size: 56 },
            ),
            (
                DriverVersion::new(550, 40, 53),
                DriverVersion::new(555, u16::MAX, u16::MAX),
                TrackerLayout { status: 48, version: Some(52), size: 64 },
            ),
            (
                DriverVersion::new(560, 28, 3),
                DriverVersion::new(560, u16::MAX, u16::MAX),
                TrackerLayout { status: 52, version: Some(48), size: 56 },
            ),
            (
                DriverVersion::new(565, 57, 1),
                DriverVersion::new(595, u16::MAX, u16::MAX),
                TrackerLayout { status: 48, version: None, size: 56 },
            ),
        ];
        EPOCHS
            .iter()
            .find(|(first, last, _)| *first <= version && version <= *last)
            .map(|&(_, _, layout)| layout)
    }
}

/// Parameters of [`ENABLE_EVENTS`], [`DISABLE_EVENTS`], [`ENABLE_COUNTERS`] and [`DISABLE_COUNTERS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct EnableParams {
    /// One bit for each event type or counter.
    pub types: u64,
    /// The driver's answer.
    pub status: u32,
    /// Padding.
    pub reserved: u32,
}

/// Counters of one tracker; the buffer is an array of this many u64.
pub const COUNTERS: usize = 10;

/// What the driver counts for a VA space. The values are indices into the counter buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Counter {
    /// Bytes moved from host to device.
    BytesIn = 0,
    /// Bytes moved from device to host, evictions included.
    BytesOut = 1,
    /// CPU page faults.
    CpuFaults = 2,
    /// GPU fault entries after coalescing.
    GpuFaults = 9,
}

impl Counter {
    /// Every counter that the driver increments.
    pub const ALL: [Self; 4] = [Self::BytesIn, Self::BytesOut, Self::CpuFaults, Self::GpuFaults];

    /// The bit of this counter in [`EnableParams::types`].
    pub const fn bit(self) -> u64 {
        1 << self as usize
    }

    /// The bits of all counters that the driver increments.
    pub const fn all_bits() -> u64 {
        Self::BytesIn.bit() | Self::BytesOut.bit() | Self::CpuFaults.bit() | Self::GpuFaults.bit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(major: u16, minor: u16, patch: u16) -> Option<TrackerLayout> {
        TrackerLayout::of(DriverVersion::new(major, minor, patch))
    }

    #[test]
    fn each_driver_branch_has_its_own_tracker_layout() {
        assert_eq!(at(535, 288, 1).map(|l| (l.status, l.version)), Some((48, None)));
        assert_eq!(at(550, 40, 7).map(|l| (l.status, l.version)), Some((48, None)));
        assert_eq!(at(550, 163, 1).map(|l| (l.status, l.version)), Some((48, Some(52))));
        assert_eq!(at(560, 35, 3).map(|l| (l.status, l.version)), Some((52, Some(48))));
        assert_eq!(at(580, 126, 20).map(|l| (l.status, l.version)), Some((48, None)));
    }

    #[test]
    fn an_unknown_driver_has_no_tracker_layout() {
        assert_eq!(at(510, 1, 1), None);
        assert_eq!(at(600, 1, 1), None);
    }

    #[test]
    fn every_layout_fits_the_callers_buffer() {
        for version in [(535, 1, 1), (550, 163, 1), (560, 35, 3), (580, 1, 1)] {
            let layout = at(version.0, version.1, version.2).unwrap();
            assert!(layout.size <= INIT_BYTES);
            assert!(layout.status + 4 <= layout.size);
            assert!(layout.version.is_none_or(|offset| offset + 4 <= layout.size));
        }
    }
}
