//! What every source said in one bin, as it is recorded, and the engine's samples that follow from it.

use nvshare_core::{Bytes, ClientId, GpuId, GpuSample, Nanos};
use serde::{Deserialize, Serialize};

use super::fusion::{Fused, Raw};

/// One bin.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawBin {
    /// When it ended.
    pub at: Nanos,
    /// Each GPU.
    pub gpus: Vec<RawGpu>,
}

/// One GPU in one bin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawGpu {
    /// Which.
    pub gpu: GpuId,
    /// How long the bin was.
    pub interval: Nanos,
    /// What the fault-service thread worked.
    pub fault_busy: Option<Nanos>,
    /// Each client on it.
    pub clients: Vec<RawClient>,
}

/// One client on one GPU in one bin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawClient {
    /// Which.
    pub client: ClientId,
    /// What the sources said.
    pub raw: Raw,
    /// What of its memory was known to lie on the host before this bin.
    pub spilled: Bytes,
}

impl RawClient {
    /// Every figure with its source and its bounds.
    pub fn fuse(&self) -> Fused {
        Fused::of(&self.raw, self.spilled)
    }
}

impl RawGpu {
    /// What the engine is told.
    pub fn sample(&self) -> GpuSample {
        GpuSample {
            interval: self.interval,
            fault_busy: self.fault_busy,
            clients: self.clients.iter().map(|client| (client.client, client.fuse().sample())).collect(),
        }
    }
}
