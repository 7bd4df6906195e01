//! The GPUs of a node, as told to those who decide where programs go.

use serde::{Deserialize, Serialize};

use crate::{Bytes, GpuId, GpuView, Mode};

/// The detector's threshold, in thousandths.
const THRESHOLD: u32 = 1000;

/// Every GPU of a node. Fields that a reader does not know are for newer readers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Whether the driver has just listed its GPUs. If not, one that is missing here may be there all the same.
    pub complete: bool,
    /// Each GPU that answers.
    pub gpus: Vec<InventoryGpu>,
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InventoryGpu {
    /// Its UUID.
    pub uuid: GpuId,
    /// The product, if the driver says.
    #[serde(default)]
    pub name: Option<String>,
    /// What managed memory can use; absent if nobody knows.
    #[serde(default)]
    pub capacity_bytes: Option<u64>,
    /// Managed memory of its clients.
    #[serde(default)]
    pub committed_bytes: u64,
    /// Its clients.
    #[serde(default)]
    pub clients: u32,
    /// Whether its clients evict each other's memory, or take turns so that they do not.
    #[serde(default)]
    pub thrashing: bool,
}

impl InventoryGpu {
    /// A GPU as the engine sees it. `capacity` is `None` if nobody knows it.
    pub fn new(view: &GpuView, name: Option<String>, capacity: Option<Bytes>) -> Self {
        Self {
            uuid: view.gpu,
            name,
            capacity_bytes: capacity.map(|capacity| capacity.0),
            committed_bytes: view.committed.0,
            clients: view.clients.len() as u32,
            thrashing: view.mode != Mode::Shared || view.score_milli >= THRESHOLD,
        }
    }

    /// Managed memory in thousandths of what there is room for.
    pub fn committed_milli(&self) -> u64 {
        let room = u128::from(self.capacity_bytes.unwrap_or(u64::MAX).max(1));
        u64::try_from(u128::from(self.committed_bytes) * 1000 / room).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_a_newer_agent_is_read_for_what_is_known() {
        let text = r#"{"complete": true, "new": 1, "gpus": [
            {"uuid": "GPU-00000000-0000-0000-0000-000000000001", "new": [], "capacity_bytes": 1000, "committed_bytes": 2500}]}"#;
        let inventory: Inventory = serde_json::from_str(text).expect("an inventory");
        assert_eq!(inventory.gpus[0].committed_milli(), 2500);
        assert!(!inventory.gpus[0].thrashing);
    }

    #[test]
    fn an_unknown_capacity_counts_as_room() {
        let gpu = |capacity_bytes| InventoryGpu {
            uuid: GpuId([1; 16]),
            name: None,
            capacity_bytes,
            committed_bytes: 1 << 50,
            clients: 1,
            thrashing: false,
        };
        assert_eq!(gpu(None).committed_milli(), 0);
        assert_eq!(gpu(Some(0)).committed_milli(), (1 << 50) * 1000);
    }
}
