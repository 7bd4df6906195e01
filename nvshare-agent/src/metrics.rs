//! The agent's metrics: one private registry, and the catalogue that `docs/metrics.md` is checked against.
//!
//! Base units throughout. Labels are bounded: a client's number appears only on series that are removed when the
//! client leaves; process ids and program names never.

mod catalogue;
mod state;

use std::sync::{Mutex, PoisonError};

use nvshare_core::{Bytes, GpuId, Nanos, PlanChange};
use prometheus::{
    Encoder as _, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry,
    TextEncoder, exponential_buckets,
};

use crate::clients::admission::Limit;

use self::{catalogue::Catalogue, state::State};
pub use self::{
    catalogue::{Family, Kind},
    state::Snapshot,
};

/// Every metric of the agent. Fields are updated where things happen; what is a state rather than an event is
/// filled in at the scrape.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Held while gauges are filled in, so that one scrape does not see another's half-filled ones.
    scrape: Mutex<()>,
    families: Vec<Family>,
    gpu_info: IntGaugeVec,
    gpu_memory: IntGaugeVec,
    /// Run time of the fault-service thread, by GPU.
    pub fault_service_seconds: prometheus::CounterVec,
    /// Faults, by GPU and kind.
    pub faults: IntCounterVec,
    /// Migrated bytes, by GPU and direction.
    pub migrated: IntCounterVec,
    /// Evicted bytes, by GPU and cause (`own`, `others`).
    pub evicted: IntCounterVec,
    state: State,
    plan_changes: IntCounterVec,
    /// Grants, by GPU.
    pub grants: IntCounterVec,
    /// Revocations, by GPU.
    pub revocations: IntCounterVec,
    /// Answers to revocations, by GPU and outcome.
    pub drains: IntCounterVec,
    /// Time of drains, by GPU.
    pub drain_seconds: HistogramVec,
    moved_bytes: IntCounterVec,
    moved_seconds: prometheus::CounterVec,
    /// Time from a client's first waiting thread to its grant, by GPU.
    pub wait_seconds: HistogramVec,
    /// Clients that did not answer a revocation, by GPU.
    pub unresponsive: IntCounterVec,
    /// Clients that cannot be stopped, by GPU.
    pub not_revocable: IntCounterVec,
    /// Sessions that stand.
    pub sessions: IntGauge,
    /// Sessions ever.
    pub sessions_total: IntCounter,
    /// Sessions ended by the agent, by code.
    pub refused: IntCounterVec,
    /// Connections and clients turned away by a limit, by which.
    pub limited: IntCounterVec,
    /// Frames of an unknown kind, skipped.
    pub unknown_messages: IntCounter,
    /// Descriptors that came unasked, closed.
    pub extra_descriptors: IntCounter,
    /// UVM descriptors that were not what they must be, closed.
    pub rejected_descriptors: IntCounter,
    /// Clients dropped because they did not read.
    pub slow_readers: IntCounter,
    /// Control requests, by outcome.
    pub control_requests: IntCounterVec,
    /// Windows over which two sensors differed, by sensor, the other, and figure.
    pub disagreements: IntCounterVec,
    /// Whether a GPU's driver hangs, by GPU.
    pub emergency: IntGaugeVec,
    /// Known hangs of the driver in use.
    pub hazards: IntGauge,
    /// Xid errors, by code.
    pub xids: IntCounterVec,
    /// Time of one round of the sampler.
    pub sampler_seconds: Histogram,
}

impl Metrics {
    /// A fresh registry with everything registered.
    pub fn new() -> Result<Self, prometheus::Error> {
        let mut c = Catalogue::default();
        let build = c.gauge("nvshare_build_info", "Always 1; the version is in the label.", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let times = exponential_buckets(0.001, 2.0, 16)?;
        let metrics = Self {
            gpu_info: c.gauge("nvshare_gpu_info", "Always 1; name and driver are in the labels.", &["gpu", "name", "driver"])?,
            gpu_memory: c.gauge("nvshare_gpu_memory_bytes", "Memory of the GPU by state, as NVML reports it.", &["gpu", "state"])?,
            fault_service_seconds: c.seconds("nvshare_gpu_fault_service_seconds_total", "Time the driver's fault-service thread was awake.", &["gpu"])?,
            faults: c.counter("nvshare_uvm_faults_total", "Faults of clients on managed memory; kind is gpu (coalesced entries), gpu-raw (before coalescing) or cpu.", &["gpu", "kind"])?,
            migrated: c.counter("nvshare_uvm_migrated_bytes_total", "Bytes of clients that UVM moved; direction is in (to the GPU) or out.", &["gpu", "direction"])?,
            evicted: c.counter("nvshare_uvm_evicted_bytes_total", "Bytes of clients evicted to make room, for the client itself (own) or for other processes (others).", &["gpu", "for"])?,
            state: State::new(&mut c)?,
            plan_changes: c.counter("nvshare_plan_changes_total", "Changes of plan, by the mode that follows and the reason; a trial that is confirmed keeps its mode.", &["gpu", "to", "reason"])?,
            grants: c.counter("nvshare_scheduler_grants_total", "Grants sent to clients.", &["gpu"])?,
            revocations: c.counter("nvshare_scheduler_revocations_total", "Revocations sent to clients.", &["gpu"])?,
            drains: c.counter("nvshare_scheduler_drains_total", "Answers to revocations: drained, timed_out or capturing.", &["gpu", "outcome"])?,
            drain_seconds: c.histogram("nvshare_scheduler_drain_seconds", "Time from a revocation to the end of the drain, as clients report it.", &["gpu"], times.clone())?,
            moved_bytes: c.counter("nvshare_handover_moved_bytes_total", "Bytes that clients moved themselves at hand-overs, to the GPU (in) or off it (out).", &["gpu", "direction"])?,
            moved_seconds: c.seconds("nvshare_handover_moved_seconds_total", "Time that clients took to move them, all clients together.", &["gpu", "direction"])?,
            wait_seconds: c.histogram("nvshare_scheduler_wait_seconds", "Time from a gated client's first waiting thread to its grant.", &["gpu"], times)?,
            unresponsive: c.counter("nvshare_scheduler_unresponsive_total", "Revocations that were not answered in time.", &["gpu"])?,
            not_revocable: c.counter("nvshare_scheduler_not_revocable_total", "Clients whose drains kept failing; they run beside the others.", &["gpu"])?,
            sessions: c.plain_gauge("nvshare_sessions", "Clients with a session.")?,
            sessions_total: c.plain_counter("nvshare_sessions_total", "Sessions begun.")?,
            refused: c.counter("nvshare_sessions_refused_total", "Sessions ended by the agent, by reason.", &["code"])?,
            limited: c.counter("nvshare_sessions_limited_total", "Connections and clients turned away by a limit: cgroup_rate, uid_rate, greeting, cgroup_clients, uid_clients, clients or emergency.", &["limit"])?,
            unknown_messages: c.plain_counter("nvshare_client_unknown_messages_total", "Frames of an unknown kind, skipped.")?,
            extra_descriptors: c.plain_counter("nvshare_client_extra_descriptors_total", "Descriptors that came with a message that carries none, closed.")?,
            rejected_descriptors: c.plain_counter("nvshare_client_rejected_descriptors_total", "Offered UVM descriptors that are not of the driver or hold no VA space, closed.")?,
            slow_readers: c.plain_counter("nvshare_client_slow_readers_total", "Sessions ended because the client did not read what it was sent.")?,
            control_requests: c.counter("nvshare_control_requests_total", "Requests on the control socket, by outcome: ok or error.", &["outcome"])?,
            disagreements: c.counter("nvshare_sensor_disagreements_total", "Windows of five seconds over which the sensor lastingly said something else than another one did of the same figure.", &["sensor", "other", "figure"])?,
            emergency: c.gauge("nvshare_emergency", "1 while the GPU's driver hangs: exclusive mode, nobody is admitted.", &["gpu"])?,
            hazards: c.plain_gauge("nvshare_driver_hazards", "Published hangs of the driver in use; nvsharectl doctor names them.")?,
            xids: c.counter("nvshare_xid_errors_total", "Xid errors, by code.", &["code"])?,
            sampler_seconds: c.plain_histogram("nvshare_sampler_seconds", "Time of one round of reading all sensors.", exponential_buckets(0.000_01, 4.0, 10)?)?,
            registry: Registry::new(),
            scrape: Mutex::new(()),
            families: Vec::new(),
        };
        let (registry, families) = c.finish()?;
        for code in ["version", "malformed", "order", "descriptor", "limit", "timeout"] {
            metrics.refused.with_label_values(&[code]);
        }
        for limit in Limit::LABELS {
            metrics.limited.with_label_values(&[limit]);
        }
        for outcome in ["ok", "error"] {
            metrics.control_requests.with_label_values(&[outcome]);
        }
        Ok(Self { registry, families, ..metrics })
    }

    /// Every metric there can be, in the order of `docs/metrics.md`.
    pub fn families(&self) -> &[Family] {
        &self.families
    }

    /// Makes every series of a GPU exist, at 0, that does not depend on a sensor.
    pub fn gpu_appeared(&self, gpu: GpuId) {
        let gpu = gpu.to_string();
        let gpu = gpu.as_str();
        for (to, reasons) in state::CHANGES {
            for reason in *reasons {
                self.plan_changes.with_label_values(&[gpu, to, reason]);
            }
        }
        for direction in ["in", "out"] {
            self.moved_bytes.with_label_values(&[gpu, direction]);
            self.moved_seconds.with_label_values(&[gpu, direction]);
        }
        for outcome in ["drained", "timed_out", "capturing"] {
            self.drains.with_label_values(&[gpu, outcome]);
        }
        self.emergency.with_label_values(&[gpu]);
        for counter in [&self.grants, &self.revocations, &self.unresponsive, &self.not_revocable] {
            counter.with_label_values(&[gpu]);
        }
        for histogram in [&self.drain_seconds, &self.wait_seconds] {
            histogram.with_label_values(&[gpu]);
        }
    }

    /// What NVML says of a GPU.
    pub fn gpu_described(&self, gpu: GpuId, name: &str, driver: &str) {
        let gpu = gpu.to_string();
        self.gpu_info.with_label_values(&[&gpu, name, driver]).set(1);
    }

    /// Memory as NVML sees it, in bytes.
    pub fn gpu_memory(&self, gpu: GpuId, total: u64, used: u64) {
        let gpu = gpu.to_string();
        for (state, bytes) in [("total", total), ("used", used), ("free", total.saturating_sub(used))] {
            self.gpu_memory.with_label_values(&[&gpu, state]).set(bytes as i64);
        }
    }

    /// A client moved memory itself.
    pub fn moved(&self, gpu: GpuId, bytes_in: Bytes, bytes_out: Bytes, took: Nanos) {
        let gpu = gpu.to_string();
        for (direction, bytes) in [("in", bytes_in), ("out", bytes_out)] {
            if bytes > Bytes::ZERO {
                self.moved_bytes.with_label_values(&[gpu.as_str(), direction]).inc_by(bytes.0);
                self.moved_seconds.with_label_values(&[gpu.as_str(), direction]).inc_by(took.as_secs_f64());
            }
        }
    }

    /// A change of plan.
    pub fn plan_changed(&self, change: &PlanChange) {
        let gpu = change.gpu.to_string();
        let labels = [gpu.as_str(), change.to.as_str(), state::reason(&change.reason)];
        self.plan_changes.with_label_values(&labels).inc();
    }

    /// The text of `/metrics`.
    pub fn render(&self, snapshot: &Snapshot) -> Result<String, prometheus::Error> {
        let _scraping = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        self.state.fill(snapshot);
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        String::from_utf8(text).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }
}
