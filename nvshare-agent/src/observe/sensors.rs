//! The state of all sensors, for the log, metrics, status and `nvsharectl doctor`.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    fusion::disagreement::Disagreement,
    gaps::{Gap, gaps},
    nvml::NvmlSource,
    source::{SensorName, SensorState, SensorStatus},
    uvm_counters::UvmCounters,
    uvm_events::UvmEvents,
};
use crate::clients::session::Hub;

/// Gathers what each source says of itself.
#[derive(Debug)]
pub struct Sensors {
    hub: Arc<Hub>,
    counters: Arc<UvmCounters>,
    events: Arc<UvmEvents>,
    nvml: NvmlSource,
    bpf: Mutex<Vec<SensorStatus>>,
    logged: Mutex<Logged>,
    disagreements: Mutex<Vec<Disagreement>>,
}

/// What the log was last told.
#[derive(Debug, Default)]
struct Logged {
    attached: BTreeMap<SensorName, bool>,
    gaps: Vec<Gap>,
}

impl Sensors {
    /// Of these sources. `bpf` is what the eBPF sensors said after attaching.
    pub fn new(hub: Arc<Hub>, events: Arc<UvmEvents>, nvml: NvmlSource, bpf: Vec<SensorStatus>) -> Self {
        let counters = Arc::clone(&hub.counters);
        Self {
            hub,
            counters,
            events,
            nvml,
            bpf: Mutex::new(bpf),
            logged: Mutex::default(),
            disagreements: Mutex::default(),
        }
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

    /// Sensors that say different things of the same; what is new or over goes to the log.
    pub fn disagree(&self, now: Vec<Disagreement>) {
        let same = |a: &Disagreement, b: &Disagreement| {
            (a.sensor, a.figure, a.client, a.gpu) == (b.sensor, b.figure, b.client, b.gpu)
        };
        let mut before = self.disagreements.lock().unwrap_or_else(PoisonError::into_inner);
        for new in now.iter().filter(|new| !before.iter().any(|old| same(old, new))) {
            let Disagreement { sensor, with, figure, client, gpu, says, other_says } = new;
            tracing::warn!(
                %sensor, %with, figure = figure.as_str(), %client, %gpu, says, other_says,
                "two sensors disagree; one of them is wrong on this driver"
            );
        }
        for old in before.iter().filter(|old| !now.iter().any(|new| same(old, new))) {
            tracing::info!(sensor = %old.sensor, with = %old.with, figure = old.figure.as_str(), client = %old.client, gpu = %old.gpu, "the sensors agree again");
        }
        *before = now;
    }

    /// The disagreements that last.
    pub fn disagreements(&self) -> Vec<Disagreement> {
        self.disagreements.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Every sensor, best first.
    pub fn all(&self) -> Vec<SensorStatus> {
        let clients = self.hub.registry.all();
        let trackers = clients.iter().map(|client| client.trackers()).sum();
        let mut all = self.bpf.lock().unwrap_or_else(PoisonError::into_inner).clone();
        all.push(self.counters.status(trackers));
        all.push(self.events.status());
        all.push(self.nvml.status());
        all.push(SensorStatus::attached(SensorName::Shim, format!("{} clients", clients.len())));
        all.sort_by_key(|status| status.sensor);
        all
    }
}
