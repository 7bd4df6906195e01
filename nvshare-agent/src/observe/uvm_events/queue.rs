//! One open event queue: the ring that the driver fills, emptied.

use std::{fs::File, os::fd::OwnedFd, sync::atomic::Ordering};

use nvshare_abi::{
    tools::{
        DISABLE_EVENTS, ENABLE_EVENTS,
        queue::{
            ENTRY_BYTES_MAX, GET_AHEAD, GET_BEHIND, MIGRATION, Migration, PUT_BEHIND, QueueEvent,
            QueueLayout, TYPES, parse, waiting,
        },
    },
    uvm::DriverVersion,
};

use crate::{
    config::DriverConfig,
    observe::uvm_tools::{self, OpenError, Purpose, open_tracker, switch, system},
    sys::DriverMemory,
};

/// Entries of a ring: more than a fault-bound program's migrations in two bins.
const ENTRIES: u32 = 1 << 14;
/// Where the ring begins, behind the control block; the driver wants whole pages.
const RING: usize = 4096;

/// A queue on one VA space. The fields are dropped in this order, which the driver requires.
#[derive(Debug)]
pub struct EventQueue {
    tools: File,
    memory: DriverMemory,
    layout: QueueLayout,
    driver: DriverVersion,
    entries: u32,
    get: u32,
    dropped: u64,
}

/// What a queue held.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// In the order in which they ended.
    pub migrations: Vec<Migration>,
    /// Events that the driver dropped because the ring was full.
    pub dropped: u64,
    /// Entries that made no sense.
    pub nonsense: u64,
}

impl EventQueue {
    /// Opens a queue on a VA space; nothing is queued yet.
    pub fn open(driver: &DriverConfig, descriptor: &OwnedFd) -> Result<Self, OpenError> {
        Self::open_with(driver, descriptor, ENTRIES)
    }

    /// The same with a ring of this many entries, a power of two.
    pub fn open_with(driver: &DriverConfig, descriptor: &OwnedFd, entries: u32) -> Result<Self, OpenError> {
        let (version, tracker) = uvm_tools::driver_version(driver).map_err(OpenError::Driver)?;
        let layout = QueueLayout::of(version)
            .ok_or_else(|| OpenError::Driver(format!("the event queue of driver {version} is not known")))?;
        let ring_bytes = entries as usize * layout.version.entry_bytes();
        let memory = DriverMemory::new(RING + ring_bytes).map_err(system("mapping a ring for events"))?;
        let purpose = Purpose::Queue { layout, memory: &memory, ring: RING, entries };
        let tools = open_tracker(driver, tracker, descriptor, &purpose)?;
        Ok(Self { tools, memory, layout, driver: version, entries, get: 0, dropped: 0 })
    }

    /// Switches the queue on or off.
    pub fn switch(&self, on: bool) -> Result<(), OpenError> {
        switch(&self.tools, if on { ENABLE_EVENTS } else { DISABLE_EVENTS }, 1 << MIGRATION)
    }

    /// Takes out all that waits.
    pub fn drain(&mut self) -> Drained {
        let mut drained = Drained::default();
        let position = |offset: usize| self.memory.u32(offset / 4);
        let put = position(PUT_BEHIND).map_or(self.get, |put| put.load(Ordering::Acquire));
        let bytes = self.layout.version.entry_bytes();
        let mut entry = [0; ENTRY_BYTES_MAX];
        for _ in 0..waiting(self.get, put, self.entries) {
            let first = (RING + self.get as usize * bytes) / 8;
            for (word, index) in entry.chunks_exact_mut(8).zip(first..first + bytes / 8) {
                word.copy_from_slice(&self.memory.u64(index).to_le_bytes());
            }
            match parse(self.layout.version, entry.get(..bytes).unwrap_or_default()) {
                Some(QueueEvent::Migration(migration)) => drained.migrations.push(migration),
                // Not asked for.
                Some(QueueEvent::CpuFault { .. } | QueueEvent::GpuFault { .. } | QueueEvent::Other(_)) => {}
                None => drained.nonsense += 1,
            }
            self.get = (self.get + 1) & (self.entries - 1);
        }
        for offset in [GET_AHEAD, GET_BEHIND] {
            if let Some(get) = position(offset) {
                get.store(self.get, Ordering::Release);
            }
        }
        let dropped = (0..TYPES).map(|kind| self.memory.u64(self.layout.dropped / 8 + kind));
        let dropped = dropped.fold(0_u64, u64::saturating_add);
        drained.dropped = dropped.saturating_sub(std::mem::replace(&mut self.dropped, dropped));
        drained
    }

    /// The name under `nvidia-uvm/gpus/` in procfs of the GPU that an event calls `processor`; `None` for the CPU.
    pub fn procfs_gpu(&self, processor: u32) -> Option<u32> {
        self.layout.version.procfs_gpu(self.driver, processor)
    }
}
