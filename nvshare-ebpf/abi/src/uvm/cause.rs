//! Why a migration happened. The driver has two enumerations with the same words and different values.

/// The cause in a performance event: why a block was made resident elsewhere. The same in every known driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum MakeResidentCause {
    /// A GPU fault that is replayed; the ordinary demand fault. CPU faults use it too.
    ReplayableFault = 0,
    /// A GPU fault of an engine that cannot replay.
    NonReplayableFault = 1,
    /// The GPU's access counters.
    AccessCounter = 2,
    /// The driver's own prefetcher, around a fault.
    Prefetch = 3,
    /// Room was needed for something else.
    Eviction = 4,
    /// A debugger or tool reads or writes.
    ApiTools = 5,
    /// The program asked: `cuMemPrefetchAsync`.
    ApiMigrate = 6,
    /// A range group was bound to a processor.
    ApiSetRangeGroup = 7,
    /// The program gave advice.
    ApiHint = 8,
}

impl MakeResidentCause {
    /// How many there are; values are below this.
    pub const COUNT: usize = 9;

    /// All of them, in the order of their values.
    pub const ALL: [Self; Self::COUNT] = [
        Self::ReplayableFault,
        Self::NonReplayableFault,
        Self::AccessCounter,
        Self::Prefetch,
        Self::Eviction,
        Self::ApiTools,
        Self::ApiMigrate,
        Self::ApiSetRangeGroup,
        Self::ApiHint,
    ];

    /// The cause with this value.
    pub fn from_value(value: u32) -> Option<Self> {
        Self::ALL.get(value as usize).copied()
    }

    /// The value in the event.
    pub const fn value(self) -> u32 {
        self as u32
    }

    /// What the driver's event queue calls it.
    pub const fn migration_cause(self) -> MigrationCause {
        match self {
            Self::ReplayableFault | Self::NonReplayableFault | Self::ApiSetRangeGroup => {
                MigrationCause::Coherence
            }
            Self::AccessCounter => MigrationCause::AccessCounters,
            Self::Prefetch => MigrationCause::Prefetch,
            Self::Eviction => MigrationCause::Eviction,
            Self::ApiTools => MigrationCause::Invalid,
            Self::ApiMigrate | Self::ApiHint => MigrationCause::User,
        }
    }
}

/// The cause in an entry of the tools event queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum MigrationCause {
    /// Tools.
    Invalid = 0,
    /// The program asked.
    User = 1,
    /// A fault.
    Coherence = 2,
    /// The driver's prefetcher.
    Prefetch = 3,
    /// Room was needed for something else.
    Eviction = 4,
    /// The GPU's access counters.
    AccessCounters = 5,
}

impl MigrationCause {
    /// The cause with this value.
    pub const fn from_value(value: u8) -> Option<Self> {
        Some(match value {
            0 => Self::Invalid,
            1 => Self::User,
            2 => Self::Coherence,
            3 => Self::Prefetch,
            4 => Self::Eviction,
            5 => Self::AccessCounters,
            _ => return None,
        })
    }

    /// The value in the queue entry.
    pub const fn value(self) -> u8 {
        self as u8
    }
}
