//! Performance events as values, and their bytes in the layout of a driver version.
//!
//! The eBPF programs read these bytes; the simulated driver and the tests write them. Fields that nobody reads
//! are left zero.

use super::{ABSENT, EventLayout, MakeResidentCause};

/// Room for the event data of every known version.
pub const EVENT_DATA_BYTES: usize = 72;
/// Room for the fields of a fault entry that are named here.
pub const FAULT_ENTRY_BYTES: usize = 128;

/// The bytes of a `uvm_perf_event_data_t`, aligned as the driver's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct EventData(pub [u8; EVENT_DATA_BYTES]);

/// The bytes of a fault entry, aligned as the driver's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct FaultEntryData(pub [u8; FAULT_ENTRY_BYTES]);

/// A processor id of nvidia-uvm: 0 is the CPU, others are GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Processor(pub u32);

impl Processor {
    /// The CPU.
    pub const CPU: Self = Self(0);
}

/// What a performance event says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A GPU fault entry (several instances may have been merged into it).
    GpuFault {
        /// The GPU that faulted, not the CPU.
        processor: Processor,
        /// Address of the fault entry.
        entry: u64,
        /// Which batch of the GPU.
        batch: u32,
        /// A second entry for the same page in the batch.
        duplicate: bool,
    },
    /// A CPU fault on managed memory, in the context of the thread that faulted.
    CpuFault {
        /// The address.
        address: u64,
        /// The CPU; not in every layout.
        cpu: u32,
        /// A write.
        write: bool,
        /// The instruction.
        pc: u64,
    },
    /// Bytes moved.
    Migration {
        /// Where to.
        dst: Processor,
        /// Where from.
        src: Processor,
        /// First byte.
        address: u64,
        /// How many, at most one block for managed memory.
        bytes: u64,
        /// A copy (read duplication) rather than a move.
        copy: bool,
        /// Why.
        cause: MakeResidentCause,
    },
}

/// The fields of a fault entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultEntry {
    /// The page that faulted.
    pub address: u64,
    /// GPU time, in nanoseconds.
    pub timestamp: u64,
    /// The VA space, an address.
    pub va_space: u64,
    /// Faults merged into this entry, at least 1.
    pub instances: u16,
}

impl Event {
    /// The event id, the second argument of the notification.
    pub const fn id(&self, layout: &EventLayout) -> u32 {
        match self {
            Self::GpuFault { .. } | Self::CpuFault { .. } => layout.fault_id,
            Self::Migration { .. } => layout.migration_id,
        }
    }

    /// The event data, the third argument.
    pub fn data(&self, layout: &EventLayout) -> EventData {
        let mut data = EventData([0; EVENT_DATA_BYTES]);
        let out = &mut data.0;
        match *self {
            Self::GpuFault { processor, entry, batch, duplicate } => {
                put(out, layout.fault_proc_id, &processor.0.to_ne_bytes());
                put(out, layout.fault_gpu_entry, &entry.to_ne_bytes());
                put(out, layout.fault_gpu_batch_id, &batch.to_ne_bytes());
                put(out, layout.fault_gpu_is_dup, &[u8::from(duplicate)]);
            }
            Self::CpuFault { address, cpu, write, pc } => {
                put(out, layout.fault_proc_id, &Processor::CPU.0.to_ne_bytes());
                put(out, layout.fault_cpu_va, &address.to_ne_bytes());
                put(out, layout.fault_cpu_num, &cpu.to_ne_bytes());
                put(out, layout.fault_cpu_is_write, &[u8::from(write)]);
                put(out, layout.fault_cpu_pc, &pc.to_ne_bytes());
            }
            Self::Migration { dst, src, address, bytes, copy, cause } => {
                put(out, layout.migration_dst, &dst.0.to_ne_bytes());
                put(out, layout.migration_src, &src.0.to_ne_bytes());
                put(out, layout.migration_address, &address.to_ne_bytes());
                put(out, layout.migration_bytes, &bytes.to_ne_bytes());
                put(out, layout.migration_transfer_mode, &(1 + u32::from(copy)).to_ne_bytes());
                put(out, layout.migration_cause, &cause.value().to_ne_bytes());
            }
        }
        data
    }
}

impl FaultEntry {
    /// The entry's bytes; a GPU fault event points at them.
    pub fn data(&self, layout: &EventLayout) -> FaultEntryData {
        let Self { address, timestamp, va_space, instances } = *self;
        let mut data = FaultEntryData([0; FAULT_ENTRY_BYTES]);
        let out = &mut data.0;
        put(out, layout.entry_fault_address, &address.to_ne_bytes());
        put(out, layout.entry_timestamp, &timestamp.to_ne_bytes());
        put(out, layout.entry_va_space, &va_space.to_ne_bytes());
        put(out, layout.entry_num_instances, &instances.to_ne_bytes());
        data
    }
}

/// Writes a field where the layout has it.
fn put(out: &mut [u8], offset: u32, bytes: &[u8]) {
    if offset == ABSENT {
        return;
    }
    let start = offset as usize;
    if let Some(field) = out.get_mut(start..start + bytes.len()) {
        field.copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Epoch, *};

    fn u32_at(data: &EventData, offset: usize) -> u32 {
        u32::from_ne_bytes(data.0[offset..offset + 4].try_into().unwrap())
    }

    fn u64_at(data: &EventData, offset: usize) -> u64 {
        u64::from_ne_bytes(data.0[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn a_migration_lies_where_each_driver_puts_it() {
        let event = Event::Migration {
            dst: Processor::CPU,
            src: Processor(9),
            address: 0x7000_0000,
            bytes: 2 << 20,
            copy: false,
            cause: MakeResidentCause::Eviction,
        };
        // (epoch, id, bytes, cause) as read from the driver's headers.
        let places = [
            (Epoch::E515, 6, 32, 44),
            (Epoch::E530, 7, 32, 44),
            (Epoch::E550, 7, 40, 52),
            (Epoch::E565, 7, 40, 52),
            (Epoch::E580, 7, 40, 56),
        ];
        for (epoch, id, bytes, cause) in places {
            let layout = EventLayout::of_epoch(epoch);
            let data = event.data(&layout);
            assert_eq!(event.id(&layout), id, "{epoch:?}");
            assert_eq!((u32_at(&data, 16), u32_at(&data, 20)), (0, 9), "{epoch:?}");
            assert_eq!(u64_at(&data, bytes), 2 << 20, "{epoch:?}");
            assert_eq!(u32_at(&data, cause), 4, "{epoch:?}");
        }
    }

    #[test]
    fn every_field_lies_inside_the_event() {
        for epoch in Epoch::ALL {
            let layout = EventLayout::of_epoch(epoch);
            for offset in [
                layout.fault_cpu_pc,
                layout.fault_gpu_entry,
                layout.migration_address,
                layout.migration_bytes,
            ] {
                assert!(offset + 8 <= layout.data_size, "{epoch:?}");
            }
            assert!(layout.migration_cause + 4 <= layout.data_size, "{epoch:?}");
            assert!(layout.data_size as usize <= EVENT_DATA_BYTES);
            assert!(layout.entry_num_instances as usize + 2 <= FAULT_ENTRY_BYTES);
        }
    }
}
