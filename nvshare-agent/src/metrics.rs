//! The agent's metrics: one private registry, and the catalogue that `docs/metrics.md` is checked against.
//!
//! Base units throughout. Labels are bounded: a client's number appears only on gauges that are removed when the
//! client leaves; process ids and program names never.

mod catalogue;

use std::sync::{Mutex, PoisonError};

use nvshare_core::{ClientView, GpuId, Mode, View, output::ClientState};
use prometheus::{
    Encoder as _, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Registry, TextEncoder, exponential_buckets,
};

use crate::observe::source::{SensorName, SensorStatus};

use self::catalogue::Catalogue;
pub use self::catalogue::{Family, Kind};

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
    gpu_capacity: IntGaugeVec,
    gpu_committed: IntGaugeVec,
    /// Run time of the fault-service thread, by GPU.
    pub fault_service_seconds: prometheus::CounterVec,
    /// Faults, by GPU and kind.
    pub faults: IntCounterVec,
    /// Migrated bytes, by GPU and direction.
    pub migrated: IntCounterVec,
    /// Evicted bytes, by GPU and cause (`own`, `others`).
    pub evicted: IntCounterVec,
    refaulted: IntGaugeVec,
    score: GaugeVec,
    stall: GaugeVec,
    mode: IntGaugeVec,
    /// Changes of plan, by GPU and new mode.
    pub plan_changes: IntCounterVec,
    states: IntGaugeVec,
    /// Grants, by GPU.
    pub grants: IntCounterVec,
    /// Revocations, by GPU.
    pub revocations: IntCounterVec,
    /// Answers to revocations, by GPU and outcome.
    pub drains: IntCounterVec,
    /// Time of drains, by GPU.
    pub drain_seconds: HistogramVec,
    /// Time from a client's first waiting thread to its grant, by GPU.
    pub wait_seconds: HistogramVec,
    /// Clients that did not answer a revocation, by GPU.
    pub unresponsive: IntCounterVec,
    quantum: GaugeVec,
    handover: GaugeVec,
    client_memory: IntGaugeVec,
    /// Sessions that stand.
    pub sessions: IntGauge,
    /// Sessions ever.
    pub sessions_total: IntCounter,
    /// Sessions ended by the agent, by code.
    pub refused: IntCounterVec,
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
    sensor_attached: IntGaugeVec,
    sensor_lost: IntGaugeVec,
    sensor_runs: IntGaugeVec,
    sensor_seconds: GaugeVec,
    /// Windows over which two sensors differed, by sensor, the other, and figure.
    pub disagreements: IntCounterVec,
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
            gpu_capacity: c.gauge("nvshare_gpu_capacity_bytes", "What managed memory can use: total less the driver's reserve and plain allocations.", &["gpu"])?,
            gpu_committed: c.gauge("nvshare_gpu_committed_bytes", "Managed memory allocated by all clients.", &["gpu"])?,
            fault_service_seconds: c.seconds("nvshare_gpu_fault_service_seconds_total", "Time the driver's fault-service thread was awake.", &["gpu"])?,
            faults: c.counter("nvshare_uvm_faults_total", "Faults of clients on managed memory; kind is gpu (coalesced entries), gpu-raw (before coalescing) or cpu.", &["gpu", "kind"])?,
            migrated: c.counter("nvshare_uvm_migrated_bytes_total", "Bytes of clients that UVM moved; direction is in (to the GPU) or out.", &["gpu", "direction"])?,
            evicted: c.counter("nvshare_uvm_evicted_bytes_total", "Bytes of clients evicted to make room, for the client itself (own) or for other processes (others).", &["gpu", "for"])?,
            refaulted: c.gauge("nvshare_uvm_refaulted_bytes", "Bytes brought back since the agent started, by whether taking turns would have avoided it (curable) or not (own).", &["gpu", "kind"])?,
            score: c.float("nvshare_thrash_score_ratio", "The detector's evidence for curable thrash; 1 is the threshold.", &["gpu"])?,
            stall: c.float("nvshare_fault_stall_ratio", "Share of the detector's window in which faults were being served.", &["gpu"])?,
            mode: c.gauge("nvshare_plan_mode", "1 for the mode in force: shared, sets or exclusive.", &["gpu", "mode"])?,
            plan_changes: c.counter("nvshare_plan_changes_total", "Changes of mode, by the new mode.", &["gpu", "to"])?,
            states: c.gauge("nvshare_scheduler_clients", "Clients by state: running, idle, draining, waiting or parked.", &["gpu", "state"])?,
            grants: c.counter("nvshare_scheduler_grants_total", "Grants sent to clients.", &["gpu"])?,
            revocations: c.counter("nvshare_scheduler_revocations_total", "Revocations sent to clients.", &["gpu"])?,
            drains: c.counter("nvshare_scheduler_drains_total", "Answers to revocations: drained, timed_out or capturing.", &["gpu", "outcome"])?,
            drain_seconds: c.histogram("nvshare_scheduler_drain_seconds", "Time from a revocation to the end of the drain, as clients report it.", &["gpu"], times.clone())?,
            wait_seconds: c.histogram("nvshare_scheduler_wait_seconds", "Time from a gated client's first waiting thread to its grant.", &["gpu"], times)?,
            unresponsive: c.counter("nvshare_scheduler_unresponsive_total", "Revocations that were not answered in time.", &["gpu"])?,
            quantum: c.float("nvshare_scheduler_quantum_seconds", "The quantum in force; absent while shared.", &["gpu"])?,
            handover: c.float("nvshare_scheduler_handover_seconds", "Measured cost of a hand-over; absent before one was measured.", &["gpu"])?,
            client_memory: c.gauge("nvshare_client_memory_bytes", "Memory of a client by kind: managed or device. Removed when the client leaves.", &["gpu", "client", "kind"])?,
            sessions: c.plain_gauge("nvshare_sessions", "Clients with a session.")?,
            sessions_total: c.plain_counter("nvshare_sessions_total", "Sessions begun.")?,
            refused: c.counter("nvshare_sessions_refused_total", "Sessions ended by the agent, by reason.", &["code"])?,
            unknown_messages: c.plain_counter("nvshare_client_unknown_messages_total", "Frames of an unknown kind, skipped.")?,
            extra_descriptors: c.plain_counter("nvshare_client_extra_descriptors_total", "Descriptors that came with a message that carries none, closed.")?,
            rejected_descriptors: c.plain_counter("nvshare_client_rejected_descriptors_total", "Offered UVM descriptors that are not of the driver or hold no VA space, closed.")?,
            slow_readers: c.plain_counter("nvshare_client_slow_readers_total", "Sessions ended because the client did not read what it was sent.")?,
            control_requests: c.counter("nvshare_control_requests_total", "Requests on the control socket, by outcome: ok or error.", &["outcome"])?,
            sensor_attached: c.gauge("nvshare_sensor_attached", "1 if the sensor delivers, else 0.", &["sensor"])?,
            sensor_lost: c.gauge("nvshare_sensor_lost", "Observations the sensor had to drop since it was attached.", &["sensor"])?,
            sensor_runs: c.gauge("nvshare_sensor_runs", "How often the sensor ran since it was attached.", &["sensor"])?,
            sensor_seconds: c.float("nvshare_sensor_run_seconds", "Time the sensor spent running since it was attached; absent where the kernel does not account for it.", &["sensor"])?,
            disagreements: c.counter("nvshare_sensor_disagreements_total", "Windows of five seconds over which the sensor lastingly said something else than another one did of the same figure.", &["sensor", "other", "figure"])?,
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
        for outcome in ["ok", "error"] {
            metrics.control_requests.with_label_values(&[outcome]);
        }
        for sensor in SensorName::ALL {
            metrics.sensor_attached.with_label_values(&[sensor.as_str()]);
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
        for mode in Mode::ALL {
            self.plan_changes.with_label_values(&[gpu, mode.as_str()]);
        }
        for outcome in ["drained", "timed_out", "capturing"] {
            self.drains.with_label_values(&[gpu, outcome]);
        }
        for counter in [&self.grants, &self.revocations, &self.unresponsive] {
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

    /// The text of `/metrics`.
    pub fn render(&self, view: &View, sensors: &[SensorStatus]) -> Result<String, prometheus::Error> {
        let _scraping = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        self.fill_plan(view);
        for status in sensors {
            let labels = [status.sensor.as_str()];
            self.sensor_attached.with_label_values(&labels).set(status.state.is_attached().into());
            self.sensor_lost.with_label_values(&labels).set(status.lost as i64);
            self.sensor_runs.with_label_values(&labels).set(status.run_count as i64);
            if let Some(time) = status.run_time {
                self.sensor_seconds.with_label_values(&labels).set(time.as_secs_f64());
            }
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        String::from_utf8(text).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }

    fn fill_plan(&self, view: &View) {
        self.client_memory.reset();
        for gauge in [&self.quantum, &self.handover, &self.stall] {
            gauge.reset();
        }
        for gpu in &view.gpus {
            let id = gpu.gpu.to_string();
            let id = id.as_str();
            if gpu.capacity.0 < i64::MAX as u64 {
                self.gpu_capacity.with_label_values(&[id]).set(gpu.capacity.0 as i64);
            }
            self.gpu_committed.with_label_values(&[id]).set(gpu.committed.0 as i64);
            self.refaulted.with_label_values(&[id, "curable"]).set(gpu.curable_refaults.0 as i64);
            self.refaulted.with_label_values(&[id, "own"]).set(gpu.self_refaults.0 as i64);
            self.score.with_label_values(&[id]).set(f64::from(gpu.score_milli) / 1e3);
            if let Some(stall) = gpu.stall_milli {
                self.stall.with_label_values(&[id]).set(f64::from(stall) / 1e3);
            }
            for mode in Mode::ALL {
                self.mode.with_label_values(&[id, mode.as_str()]).set((mode == gpu.mode).into());
            }
            if let Some(quantum) = gpu.quantum {
                self.quantum.with_label_values(&[id]).set(quantum.as_secs_f64());
            }
            if let Some(cost) = gpu.handover_cost {
                self.handover.with_label_values(&[id]).set(cost.as_secs_f64());
            }
            for state in ClientState::ALL {
                let count = gpu.clients.iter().filter(|client| client.state == state).count();
                self.states.with_label_values(&[id, state.as_str()]).set(count as i64);
            }
            for ClientView { client, managed, device, .. } in &gpu.clients {
                let client = client.to_string();
                for (kind, bytes) in [("managed", managed), ("device", device)] {
                    self.client_memory.with_label_values(&[id, &client, kind]).set(bytes.0 as i64);
                }
            }
        }
    }
}
