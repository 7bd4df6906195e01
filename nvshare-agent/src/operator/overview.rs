//! The picture that `nvsharectl top` and the status page draw.

use serde::{Deserialize, Serialize};

use super::{
    history::{GpuHistory, Rates},
    protocol::{GpuClientReport, GpuReport, StatusReport},
};
use crate::{driver::PlanEvent, text::bytes};

/// The answer to `overview`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OverviewReport {
    /// The answer to `status`.
    #[serde(flatten)]
    pub status: StatusReport,
    /// When, in CLOCK_MONOTONIC milliseconds like the times of `changes`.
    pub t_ms: f64,
    /// The last changes of plan, oldest first.
    pub changes: Vec<PlanEvent>,
    /// What each GPU, and each client on it, went through lately.
    pub history: Vec<GpuHistory>,
}

impl OverviewReport {
    /// What a GPU went through lately.
    pub fn history(&self, gpu: &GpuReport) -> Option<&GpuHistory> {
        self.history.iter().find(|history| history.gpu == gpu.gpu)
    }

    /// For how many seconds a GPU has run in its mode; absent if it did ever since it was seen.
    pub fn in_mode_for(&self, gpu: &GpuReport) -> Option<f64> {
        let entered = |change: &&PlanEvent| change.gpu == gpu.gpu && change.from != change.to;
        self.changes.iter().rev().find(entered).map(|change| self.ago(change))
    }

    /// How many seconds ago a change was.
    pub fn ago(&self, change: &PlanEvent) -> f64 {
        (self.t_ms - change.t_ms).max(0.0) / 1e3
    }

    /// Clients of all GPUs, each counted once.
    pub fn clients(&self) -> usize {
        let ids = self.status.gpus.iter().flat_map(|gpu| gpu.clients.iter().map(|client| client.client));
        ids.collect::<std::collections::BTreeSet<_>>().len()
    }
}

impl GpuReport {
    /// Whether its clients take turns.
    pub fn takes_turns(&self) -> bool {
        self.mode != "shared"
    }

    /// Who may run now, where clients take turns.
    pub fn holders(&self) -> impl Iterator<Item = &GpuClientReport> {
        self.clients.iter().filter(|client| matches!(client.state.as_str(), "running" | "idle" | "draining"))
    }

    /// Managed memory by what there is; absent if nobody knows what there is.
    pub fn committed_ratio(&self) -> Option<f64> {
        let capacity = self.capacity_bytes.filter(|&capacity| capacity > 0)?;
        Some(self.committed_bytes as f64 / capacity as f64)
    }
}

impl GpuClientReport {
    /// What it uses of its managed memory, for people: a figure or its bounds, a dash where nothing is known.
    pub fn working_set(&self) -> String {
        let (low, high) = self.working_set_bytes;
        let (least, most) = (bytes(low as f64), bytes(high as f64));
        if low == 0 && high >= self.managed_bytes {
            "-".to_owned()
        } else if least == most {
            most
        } else if low == 0 {
            format!("≤ {most}")
        } else if high >= self.managed_bytes {
            format!("≥ {least}")
        } else {
            format!("{least} – {most}")
        }
    }
}

impl GpuHistory {
    /// What a client moves.
    pub fn rates(&self, client: &GpuClientReport) -> Rates {
        self.clients.get(&client.client).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use nvshare_core::ClientId;

    use super::*;
    use crate::{clients::client::ClientTotals, observe::fusion::Fused};

    #[test]
    fn a_working_set_is_shown_as_exactly_as_it_is_known() {
        let shown = |low: u64, high: u64| {
            let client = GpuClientReport {
                client: ClientId(1),
                name: String::new(),
                pid: 1,
                state: "idle".to_owned(),
                managed_bytes: 400 << 20,
                device_bytes: 0,
                weight_milli: 1000,
                priority: 0,
                limit_bytes: None,
                granted_s: 0.0,
                waited_s: 0.0,
                grants: 0,
                working_set_bytes: (low << 20, high << 20),
                refaulted_bytes: 0,
                seen: ClientTotals::default(),
                figures: Fused::default(),
            };
            client.working_set()
        };
        assert_eq!(shown(0, 400), "-");
        assert_eq!(shown(100, 100), "100 MiB");
        assert_eq!(shown(400, 400), "400 MiB");
        assert_eq!((shown(0, 100), shown(100, 400)), ("≤ 100 MiB".to_owned(), "≥ 100 MiB".to_owned()));
        assert_eq!(shown(100, 200), "100 MiB – 200 MiB");
    }
}
