//! A process's part in the simulated GPU.
use super::{ConnectError, Direction, EntryPoints, Host, Location, SimError, Work};

/// A process's connection; dropping it gives back all that the process holds.
#[derive(Debug)]
pub struct Session {
    host: Host,
}

impl Session {
    /// Joins the host that NVSHARE_SIM_DIR names.
    pub fn connect(entry: EntryPoints) -> Result<Self, ConnectError> {
        let _entry = entry;
        Ok(Self { host: Host::open()? })
    }
    /// The read-only view: cards and memory.
    pub fn host(&self) -> &Host {
        &self.host
    }
    /// Declares `[base, base + len)` managed. Nothing is resident yet.
    pub fn register_managed(&self, base: u64, len: u64) -> Result<(), SimError> {
        let _range = (base, len);
        Err(SimError::Gone)
    }
    /// Gives a managed range back, with the memory it occupies.
    pub fn unregister_managed(&self, base: u64, len: u64) {
        let _range = (base, len);
    }
    /// Takes plain memory, evicting managed memory (of any process) as the driver does.
    pub fn allocate_device(&self, gpu: usize, len: u64) -> Result<(), SimError> {
        let _what = (gpu, len);
        Err(SimError::Gone)
    }
    /// Gives plain memory back.
    pub fn free_device(&self, gpu: usize, len: u64) {
        let _what = (gpu, len);
    }
    /// Runs a kernel; blocks the calling thread until it has ended.
    pub fn run_kernel(&self, gpu: usize, work: &Work) -> Result<(), SimError> {
        let _what = (gpu, work);
        Err(SimError::Gone)
    }
    /// Waits for the link time of an explicit copy of plain memory.
    pub fn copy_engine(&self, gpu: usize, bytes: u64, direction: Direction) {
        let _what = (gpu, bytes, direction);
    }
    /// Moves managed memory (the driver's UVM_MIGRATE); runs in the caller.
    pub fn prefetch(&self, base: u64, len: u64, to: Location) -> Result<(), SimError> {
        let _what = (base, len, to);
        Err(SimError::Gone)
    }
    /// The CPU touches managed memory: what is on a card comes back, with CPU faults.
    pub fn touch_cpu(&self, base: u64, len: u64) -> Result<(), SimError> {
        let _what = (base, len);
        Err(SimError::Gone)
    }
}
