//! The read-only view.
use super::{ConnectError, GpuInfo, ProcessInfo};

/// The simulated host's cards, read from the shared file; takes no part.
#[derive(Debug)]
pub struct Host {
    gpus: Vec<GpuInfo>,
}

impl Host {
    /// Opens the host that NVSHARE_SIM_DIR names.
    pub fn open() -> Result<Self, ConnectError> {
        Err(ConnectError::NoDirectory)
    }
    /// The cards, by index.
    pub fn gpus(&self) -> Vec<GpuInfo> {
        self.gpus.clone()
    }
    /// (free, total) bytes as the driver counts: plain allocations and populated managed memory are used.
    pub fn mem_info(&self, gpu: usize) -> (u64, u64) {
        let total = self.gpus[gpu].total_bytes;
        (total, total)
    }
    /// Processes that use the card.
    pub fn processes(&self, gpu: usize) -> Vec<ProcessInfo> {
        let _gpu = gpu;
        Vec::new()
    }
    /// Nanoseconds during which the card has computed since it was started; differences give its utilisation.
    pub fn busy_ns(&self, gpu: usize) -> u64 {
        let _gpu = gpu;
        0
    }
    /// Bytes moved over the link since the start: (in, out).
    pub fn link_bytes(&self, gpu: usize) -> (u64, u64) {
        let _gpu = gpu;
        (0, 0)
    }
    /// The driver version that the simulator plays, such as `580.126.20`.
    pub fn driver_version(&self) -> String {
        String::new()
    }
}
