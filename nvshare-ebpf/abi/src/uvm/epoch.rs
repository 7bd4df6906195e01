//! Where the fields of a performance event lie, by driver version.
//!
//! `uvm_perf_event_data_t` and the fault entry hold only pointers and fixed-width integers, so their layout
//! depends on the driver version alone: not on the kernel's configuration, nor on the open or closed flavour.
//! Read from all 193 published tags from 515.43.04 to 595.45.04 and confirmed by the debug information of builds
//! of ten branches (x86-64).

use bytemuck::{Pod, Zeroable};

use super::DriverVersion;

/// The offset of a field that a layout does not have.
pub const ABSENT: u32 = u32::MAX;

/// A run of driver branches with one event layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Epoch {
    /// 515.43.04 to 525.
    E515,
    /// 530.30.02 to 545.
    E530,
    /// 550.40.07 to 560.
    E550,
    /// 565.57.01 to 575.
    E565,
    /// 580.65.06 to 595.
    E580,
}

impl Epoch {
    /// All, oldest first.
    pub const ALL: [Self; 5] = [Self::E515, Self::E530, Self::E550, Self::E565, Self::E580];

    /// The first published version of the epoch.
    pub const fn first(self) -> DriverVersion {
        match self {
            Self::E515 => DriverVersion::new(515, 43, 4),
            Self::E530 => DriverVersion::new(530, 30, 2),
            Self::E550 => DriverVersion::new(550, 40, 7),
            Self::E565 => DriverVersion::new(565, 57, 1),
            Self::E580 => DriverVersion::new(580, 65, 6),
        }
    }

    /// The last version that was checked. Later releases of its branch are taken to be the same.
    pub const fn last(self) -> DriverVersion {
        match self {
            Self::E515 => DriverVersion::new(525, 147, 5),
            Self::E530 => DriverVersion::new(545, 29, 6),
            Self::E550 => DriverVersion::new(560, 35, 3),
            Self::E565 => DriverVersion::new(575, 64, 5),
            Self::E580 => DriverVersion::new(595, 45, 4),
        }
    }

    /// The epoch of a driver, `None` for a branch that was never checked.
    pub fn of(version: DriverVersion) -> Option<Self> {
        Self::ALL.into_iter().find(|epoch| version >= epoch.first() && version.branch <= epoch.last().branch)
    }
}

/// Event ids and field offsets of one driver version. All offsets are in bytes, [`ABSENT`] where there is no field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[expect(missing_docs, reason = "each field is the offset of the driver's field of that name")]
pub struct EventLayout {
    /// The event id of a fault.
    pub fault_id: u32,
    /// The event id of a migration.
    pub migration_id: u32,
    /// The event id of a revocation.
    pub revocation_id: u32,
    /// Event ids are below this.
    pub event_count: u32,
    /// Size of the event data.
    pub data_size: u32,
    pub fault_proc_id: u32,
    pub fault_preferred: u32,
    pub fault_gpu_entry: u32,
    pub fault_gpu_batch_id: u32,
    pub fault_gpu_is_dup: u32,
    pub fault_cpu_va: u32,
    pub fault_cpu_num: u32,
    pub fault_cpu_is_write: u32,
    pub fault_cpu_pc: u32,
    pub migration_block: u32,
    pub migration_dst: u32,
    pub migration_src: u32,
    pub migration_dst_nid: u32,
    pub migration_src_nid: u32,
    pub migration_address: u32,
    pub migration_bytes: u32,
    pub migration_transfer_mode: u32,
    pub migration_access_counters_buffer: u32,
    pub migration_cause: u32,
    pub revocation_block: u32,
    pub revocation_proc_id: u32,
    pub revocation_address: u32,
    pub revocation_bytes: u32,
    pub entry_fault_address: u32,
    pub entry_timestamp: u32,
    pub entry_va_space: u32,
    pub entry_num_instances: u32,
}

impl EventLayout {
    /// The layout of a driver, `None` for a branch that was never checked.
    pub fn of(version: DriverVersion) -> Option<Self> {
        let mut layout = Self::of_epoch(Epoch::of(version)?);
        // The one field that moved inside an epoch.
        if version.branch >= 560 {
            layout.entry_num_instances = 92;
        }
        Some(layout)
    }

    /// The layout of the first version of an epoch.
    pub const fn of_epoch(epoch: Epoch) -> Self {
        match epoch {
            Epoch::E515 => E515,
            Epoch::E530 => E530,
            Epoch::E550 => E550,
            Epoch::E565 => E565,
            Epoch::E580 => E580,
        }
    }
}

const E530: EventLayout = EventLayout {
    fault_id: 6,
    migration_id: 7,
    revocation_id: 8,
    event_count: 9,
    data_size: 56,
    fault_proc_id: 16,
    fault_preferred: 20,
    fault_gpu_entry: 24,
    fault_gpu_batch_id: 32,
    fault_gpu_is_dup: 36,
    fault_cpu_va: 24,
    fault_cpu_num: ABSENT,
    fault_cpu_is_write: 32,
    fault_cpu_pc: 40,
    migration_block: 8,
    migration_dst: 16,
    migration_src: 20,
    migration_dst_nid: ABSENT,
    migration_src_nid: ABSENT,
    migration_address: 24,
    migration_bytes: 32,
    migration_transfer_mode: 40,
    migration_access_counters_buffer: ABSENT,
    migration_cause: 44,
    revocation_block: 0,
    revocation_proc_id: 8,
    revocation_address: 16,
    revocation_bytes: 24,
    entry_fault_address: 0,
    entry_timestamp: 8,
    entry_va_space: 48,
    entry_num_instances: 84,
};

const E515: EventLayout =
    EventLayout { fault_id: 5, migration_id: 6, revocation_id: 7, event_count: 8, ..E530 };

const E550: EventLayout = EventLayout {
    data_size: 64,
    migration_dst_nid: 24,
    migration_src_nid: 26,
    migration_address: 32,
    migration_bytes: 40,
    migration_transfer_mode: 48,
    migration_cause: 52,
    ..E530
};

const E565: EventLayout =
    EventLayout { fault_cpu_num: 32, fault_cpu_is_write: 36, entry_num_instances: 92, ..E550 };

const E580: EventLayout = EventLayout {
    data_size: 72,
    fault_proc_id: 8,
    fault_preferred: 12,
    fault_gpu_entry: 16,
    fault_gpu_batch_id: 24,
    fault_gpu_is_dup: 28,
    fault_cpu_va: 16,
    fault_cpu_num: 24,
    fault_cpu_is_write: 28,
    fault_cpu_pc: 32,
    migration_access_counters_buffer: 52,
    migration_cause: 56,
    ..E565
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_checked_version_has_its_epoch_and_no_other_has_one() {
        for epoch in Epoch::ALL {
            assert_eq!(Epoch::of(epoch.first()), Some(epoch));
            assert_eq!(Epoch::of(epoch.last()), Some(epoch));
        }
        // A later release of a checked branch.
        assert_eq!(Epoch::of(DriverVersion::new(580, 159, 4)), Some(Epoch::E580));
        for (branch, minor) in [(470, 57), (515, 42), (528, 1), (548, 0), (563, 1), (578, 0), (600, 1)] {
            assert_eq!(Epoch::of(DriverVersion::new(branch, minor, 0)), None, "{branch}.{minor}");
        }
    }

    #[test]
    fn the_instance_count_moves_at_branch_560() {
        let at = |branch, minor, patch| {
            EventLayout::of(DriverVersion::new(branch, minor, patch)).map(|layout| layout.entry_num_instances)
        };
        assert_eq!(at(555, 58, 2), Some(84));
        assert_eq!(at(560, 28, 3), Some(92));
        assert_eq!(at(525, 147, 5), Some(84));
        assert_eq!(at(595, 45, 4), Some(92));
    }
}
