//! The event queue of a tools tracker: a ring that the driver fills and the observer empties.
//!
//! Problem: the ring has two layouts, its entries are written by another party, and a queue that is asked for in the wrong
//! version puts the count of dropped events somewhere else.
//!
//! Approach: [`QueueLayout`] says what a driver version fills and how it is asked; [`parse`] understands one entry. Both
//! are total: whatever the bytes, the answer is an event that makes sense or none.
//!
//! Sizes and offsets were compiled from the headers named in [`super`]. The second layout came with 550.40.53 by a field of
//! the first call's parameters, and with 565.57.01 by a call of its own; in branch 550 it has a longer control block.
//!
//! Invariants: one slot of the ring stays free. A full ring drops what is new and counts it under its type. Indices are
//! taken modulo the number of entries, which is a power of two.

use super::{INIT_EVENT_TRACKER, INIT_EVENT_TRACKER_V2};
use crate::uvm::{DriverVersion, MigrationCause, PAGE_BYTES, PROCESSORS};

/// Offset in the control block of the u32 up to which the observer has begun to read.
pub const GET_AHEAD: usize = 0;
/// Offset of the u32 up to which it has read; the driver may overwrite what is before.
pub const GET_BEHIND: usize = 4;
/// Offset of the u32 up to which the driver has begun to write.
pub const PUT_AHEAD: usize = 8;
/// Offset of the u32 up to which it has written.
pub const PUT_BEHIND: usize = 12;
/// Event types, and so the length of the array of u64 that counts dropped events.
pub const TYPES: usize = 64;
/// The largest control block of any version.
pub const CONTROL_BYTES_MAX: usize = 536;
/// The largest entry of any version.
pub const ENTRY_BYTES_MAX: usize = 72;

/// The type of a migration; its bit turns migrations on.
pub const MIGRATION: u8 = 2;
const CPU_FAULT: u8 = 1;
const GPU_FAULT: u8 = 3;

/// Which entries a queue has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum QueueVersion {
    /// Processors are numbers of parent GPUs, from 1; partitions are not told apart.
    V1 = 1,
    /// Processors are those of the driver's events.
    V2 = 2,
}

/// How a driver version is asked for a queue, and what it fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLayout {
    /// Which entries.
    pub version: QueueVersion,
    /// The number of the first call.
    pub init: u32,
    /// Offset in the control block of the counts of dropped events.
    pub dropped: usize,
    /// Bytes of the control block.
    pub control: usize,
}

impl QueueVersion {
    /// Bytes of an entry.
    pub const fn entry_bytes(self) -> usize {
        match self {
            Self::V1 => 64,
            Self::V2 => 72,
        }
    }

    /// Processor numbers in entries are below this.
    const fn processors(self) -> u32 {
        match self {
            Self::V1 => 33,
            Self::V2 => PROCESSORS,
        }
    }

    /// The name under `nvidia-uvm/gpus/` in procfs of the GPU that an entry calls `processor`; `None` for the CPU.
    pub const fn procfs_gpu(self, driver: DriverVersion, processor: u32) -> Option<u32> {
        match self {
            Self::V1 => DriverVersion::procfs_gpu_of_parent(processor),
            Self::V2 => driver.procfs_gpu(processor),
        }
    }
}

impl QueueLayout {
    /// The best queue that a driver offers; `None` for a branch that nobody has looked at.
    pub fn of(driver: DriverVersion) -> Option<Self> {
        super::TrackerLayout::of(driver)?;
        let second = |init| Self { version: QueueVersion::V2, init, dropped: 16, control: 528 };
        Some(if driver < DriverVersion::new(550, 40, 53) {
            Self { version: QueueVersion::V1, init: INIT_EVENT_TRACKER, dropped: 16, control: 528 }
        } else if driver.branch == 550 {
            Self { dropped: 24, control: 536, ..second(INIT_EVENT_TRACKER) }
        } else if driver.branch < 565 {
            second(INIT_EVENT_TRACKER)
        } else {
            second(INIT_EVENT_TRACKER_V2)
        })
    }
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueEvent {
    /// Memory moved.
    Migration(Migration),
    /// A CPU faulted on managed memory.
    CpuFault {
        /// Where.
        address: u64,
        /// The process.
        pid: u32,
    },
    /// A GPU faulted, before faults on one page are merged.
    GpuFault {
        /// Where.
        address: u64,
        /// On which processor, in the queue's own numbers.
        gpu: u32,
        /// The driver's batch.
        batch: u32,
    },
    /// Another type, which nobody here asks for.
    Other(u8),
}

/// Memory of one block moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Migration {
    /// Why.
    pub cause: MigrationCause,
    /// From which processor, in the queue's own numbers; 0 is the CPU.
    pub src: u32,
    /// To which.
    pub dst: u32,
    /// The first byte.
    pub address: u64,
    /// How many bytes.
    pub bytes: u64,
    /// The driver's clock when the copy was begun, in nanoseconds.
    pub begin_ns: u64,
    /// When it had ended.
    pub end_ns: u64,
}

/// Where the fields of a migration lie.
struct MigrationFields {
    src: usize,
    dst: usize,
    /// Bytes of a processor's number.
    processor: usize,
    address: usize,
    bytes: usize,
    begin: usize,
    end: usize,
}

const fn migration_fields(version: QueueVersion) -> MigrationFields {
    match version {
        QueueVersion::V1 => {
            MigrationFields { src: 2, dst: 3, processor: 1, address: 8, bytes: 16, begin: 24, end: 32 }
        }
        QueueVersion::V2 => {
            MigrationFields { src: 4, dst: 6, processor: 2, address: 16, bytes: 24, begin: 32, end: 40 }
        }
    }
}

fn number(entry: &[u8], at: usize, bytes: usize) -> Option<u64> {
    let mut value = [0; 8];
    value.get_mut(..bytes)?.copy_from_slice(entry.get(at..at.checked_add(bytes)?)?);
    Some(u64::from_le_bytes(value))
}

/// What an entry says; `None` if it makes no sense.
pub fn parse(version: QueueVersion, entry: &[u8]) -> Option<QueueEvent> {
    let small = |at: usize, bytes: usize| Some(number(entry, at, bytes)? as u32);
    let kind = *entry.first()?;
    Some(match kind {
        CPU_FAULT => QueueEvent::CpuFault { address: number(entry, 8, 8)?, pid: small(24, 4)? },
        MIGRATION => {
            let at = migration_fields(version);
            let migration = Migration {
                cause: MigrationCause::from_value(*entry.get(1)?)?,
                src: small(at.src, at.processor)?,
                dst: small(at.dst, at.processor)?,
                address: number(entry, at.address, 8)?,
                bytes: number(entry, at.bytes, 8)?,
                begin_ns: number(entry, at.begin, 8)?,
                end_ns: number(entry, at.end, 8)?,
            };
            QueueEvent::Migration(migration.checked(version)?)
        }
        GPU_FAULT => {
            let gpu = match version {
                QueueVersion::V1 => small(3, 1)?,
                QueueVersion::V2 => small(2, 2)?,
            };
            if gpu == 0 || gpu >= version.processors() {
                return None;
            }
            QueueEvent::GpuFault { address: number(entry, 8, 8)?, gpu, batch: small(32, 4)? }
        }
        other if (other as usize) < TYPES && other != 0 => QueueEvent::Other(other),
        _ => return None,
    })
}

impl Migration {
    fn checked(self, version: QueueVersion) -> Option<Self> {
        let Self { cause: _, src, dst, address, bytes, begin_ns: _, end_ns: _ } = self;
        let sane = src < version.processors()
            && dst < version.processors()
            && bytes > 0
            && bytes.is_multiple_of(PAGE_BYTES)
            && address.is_multiple_of(PAGE_BYTES)
            && address.checked_add(bytes).is_some();
        sane.then_some(self)
    }

    /// The entry as the driver writes it; what a version has no room for is cut off.
    pub fn entry(&self, version: QueueVersion) -> [u8; ENTRY_BYTES_MAX] {
        let Self { cause, src, dst, address, bytes, begin_ns, end_ns } = *self;
        let at = migration_fields(version);
        let mut entry = [0; ENTRY_BYTES_MAX];
        let mut put = |offset: usize, value: u64, bytes: usize| {
            for (byte, of_value) in entry.iter_mut().skip(offset).take(bytes).zip(value.to_le_bytes()) {
                *byte = of_value;
            }
        };
        put(0, MIGRATION.into(), 1);
        put(1, cause.value().into(), 1);
        put(at.src, src.into(), at.processor);
        put(at.dst, dst.into(), at.processor);
        put(at.address, address, 8);
        put(at.bytes, bytes, 8);
        put(at.begin, begin_ns, 8);
        put(at.end, end_ns, 8);
        entry
    }
}

/// How many entries wait between two positions of a ring, whatever the positions; `entries` is a power of two.
pub const fn waiting(get: u32, put: u32, entries: u32) -> u32 {
    put.wrapping_sub(get) & entries.wrapping_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOVE: Migration = Migration {
        cause: MigrationCause::Eviction,
        src: 9,
        dst: 0,
        address: 0x7f00_0020_0000,
        bytes: 2 << 20,
        begin_ns: 5,
        end_ns: 7,
    };

    #[test]
    fn each_driver_has_its_queue() {
        let of = |branch, minor, patch| {
            let layout = QueueLayout::of(DriverVersion::new(branch, minor, patch))?;
            Some((layout.version as u32, layout.init, layout.dropped, layout.control))
        };
        assert_eq!(of(535, 288, 1), Some((1, 56, 16, 528)));
        assert_eq!(of(550, 40, 7), Some((1, 56, 16, 528)));
        assert_eq!(of(550, 163, 1), Some((2, 56, 24, 536)));
        assert_eq!(of(555, 58, 2), Some((2, 56, 16, 528)));
        assert_eq!(of(560, 35, 3), Some((2, 56, 16, 528)));
        assert_eq!(of(580, 126, 20), Some((2, 76, 16, 528)));
        assert_eq!(of(600, 1, 1), None);
    }

    #[test]
    fn a_migration_is_read_back_as_it_was_written_in_both_layouts() {
        for version in [QueueVersion::V1, QueueVersion::V2] {
            let entry = MOVE.entry(version);
            let read = parse(version, &entry[..version.entry_bytes()]);
            assert_eq!(read, Some(QueueEvent::Migration(MOVE)), "{version:?}");
        }
        // The layouts differ: one read as the other is another event or none.
        let crossed = parse(QueueVersion::V1, &MOVE.entry(QueueVersion::V2));
        assert_ne!(crossed, Some(QueueEvent::Migration(MOVE)));
    }

    #[test]
    fn the_fields_lie_where_the_drivers_headers_put_them() {
        let first = MOVE.entry(QueueVersion::V1);
        assert_eq!((first[0], first[1], first[2], first[3]), (2, 4, 9, 0));
        assert_eq!(first[8..16], MOVE.address.to_le_bytes());
        assert_eq!(first[16..24], MOVE.bytes.to_le_bytes());
        let second = MOVE.entry(QueueVersion::V2);
        assert_eq!((second[0], second[1], second[4], second[6]), (2, 4, 9, 0));
        assert_eq!(second[16..24], MOVE.address.to_le_bytes());
        assert_eq!(second[24..32], MOVE.bytes.to_le_bytes());
    }

    #[test]
    fn migrations_that_make_no_sense_are_none() {
        let broken = [
            Migration { bytes: 0, ..MOVE },
            Migration { bytes: 4095, ..MOVE },
            Migration { address: 1, ..MOVE },
            Migration { address: u64::MAX - 4095, bytes: 8192, ..MOVE },
            Migration { src: 257, ..MOVE },
            Migration { dst: 65535, ..MOVE },
        ];
        for migration in broken {
            assert_eq!(parse(QueueVersion::V2, &migration.entry(QueueVersion::V2)), None, "{migration:?}");
        }
        let mut cause = MOVE.entry(QueueVersion::V1);
        cause[1] = 6;
        assert_eq!(parse(QueueVersion::V1, &cause), None);
    }

    #[test]
    fn no_bytes_of_any_length_are_too_much() {
        for version in [QueueVersion::V1, QueueVersion::V2] {
            for kind in 0..=255_u8 {
                for fill in [0, 1, 0x7f, 0xff] {
                    let mut entry = [fill; ENTRY_BYTES_MAX];
                    entry[0] = kind;
                    for length in 0..=ENTRY_BYTES_MAX {
                        let _event = parse(version, &entry[..length]);
                    }
                }
            }
            assert_eq!(parse(version, &MOVE.entry(version)[..16]), None, "cut short");
            assert_eq!(parse(version, &[]), None);
        }
    }

    #[test]
    fn a_ring_counts_what_waits_across_its_end() {
        assert_eq!((waiting(0, 0, 8), waiting(0, 7, 8), waiting(6, 2, 8)), (0, 7, 4));
        assert_eq!(waiting(u32::MAX, 0, 8), 1);
        assert_eq!(waiting(3, 0xffff_fff5, 8), 2, "hostile positions stay within the ring");
    }
}
