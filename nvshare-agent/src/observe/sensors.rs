//! The state of all sensors, for the log, metrics, status and `nvsharectl doctor`.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    gaps::{Gap, gaps},
    nvml::NvmlSource,
    source::{SensorName, SensorState, SensorStatus},
    uvm_counters::UvmCounters,
};
use crate::clients::session::Hub;

/// Gathers what each source says of itself.
#[derive(Debug)]
pub struct Sensors {
    hub: Arc<Hub>,
    counters: Arc<UvmCounters>,
    nvml: NvmlSource,
    bpf: Mutex<Vec<SensorStatus>>,
    logged: Mutex<Logged>,
}

/// What the log was last told.
#[derive(Debug, Default)]
struct Logged {
    attached: BTreeMap<SensorName, bool>,
    gaps: Vec<Gap>,
}

impl Sensors {
    /// Of these sources. `bpf` is what the eBPF sensors said after attaching.
    pub fn new(hub: Arc<Hub>, nvml: NvmlSource, bpf: Vec<SensorStatus>) -> Self {
        let counters = Arc::clone(&hub.counters);
        Self { hub, counters, nvml, bpf: Mutex::new(bpf), logged: Mutex::default() }
    }

    /// What the eBPF sensors say; changes of any sensor go to the log.
    pub fn update(&self, bpf: Vec<SensorStatus>) {
        *self.bpf.lock().unwrap_or_else(PoisonError::into_inner) = bpf;
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let all = self.all();
        let missing = gaps(&all);
        for status in all {
            let attached = status.state.is_attached();
            if logged.attached.insert(status.sensor, attached) == Some(attached) {
                continue;
            }
            match &status.state {
                SensorState::Attached(detail) => {
                    tracing::info!(sensor = %status.sensor, detail, "sensor attached");
                }
                SensorState::Unavailable(reason) => {
                    tracing::warn!(sensor = %status.sensor, reason, "sensor unavailable");
                }
            }
        }
        for gap in missing.iter().filter(|gap| !logged.gaps.contains(gap)) {
            tracing::warn!(unknown = gap.unknown, instead = gap.instead, "not known on this host");
        }
        logged.gaps = missing;
    }

    /// Every sensor, best first.
    pub fn all(&self) -> Vec<SensorStatus> {
        let clients = self.hub.registry.all();
        let trackers = clients.iter().map(|client| client.trackers()).sum();
        let mut all = self.bpf.lock().unwrap_or_else(PoisonError::into_inner).clone();
        all.push(self.counters.status(trackers));
        all.push(self.nvml.status());
        all.push(SensorStatus::attached(SensorName::Shim, format!("{} clients", clients.len())));
        all.sort_by_key(|status| status.sensor);
        all
    }
}
