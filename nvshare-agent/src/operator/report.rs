//! Puts together what operators are shown.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use nvshare_core::{Bytes, ClientId, ClientView, GpuView, Nanos};

use super::{
    history::History,
    overview::OverviewReport,
    protocol::{
        ClientReport, ClientsReport, DoctorReport, ExplainReport, GpuClientReport, GpuReport, GroundsReport,
        SensorAdvice, SettingsReport, StatusReport,
    },
};
use crate::{
    clients::{
        client::{Client, ClientTotals},
        session::Hub,
    },
    clock,
    driver::{Gone, Seen, millis},
    metrics::Snapshot,
    observe::{
        gaps::gaps,
        gpus::{Gpu, Gpus},
        sensors::Sensors,
        source::{SensorName, SensorState, SensorStatus},
    },
};

/// Changes of plan in an overview.
const CHANGES_SHOWN: usize = 32;

/// Everything that reports are made from.
#[derive(Debug)]
pub struct Desk {
    /// Clients, driver, GPUs.
    pub hub: Arc<Hub>,
    /// The sensors.
    pub sensors: Arc<Sensors>,
    /// When the agent started.
    pub started: Nanos,
    /// Where the HTTP server listens.
    pub metrics: Option<SocketAddr>,
    /// What came before.
    pub history: History,
}

impl Desk {
    /// The answer to `status`.
    pub async fn status(&self) -> Result<StatusReport, Gone> {
        Ok(self.status_of(&self.hub.driver.seen().await?))
    }

    /// The answer to `overview`.
    pub async fn overview(&self) -> Result<OverviewReport, Gone> {
        let seen = self.hub.driver.seen().await?;
        let changes = seen.changes.iter().rev().take(CHANGES_SHOWN).rev().cloned().collect();
        Ok(OverviewReport {
            status: self.status_of(&seen),
            t_ms: millis(seen.at),
            changes,
            history: self.history.all(),
        })
    }

    /// The answer to `settings`.
    pub fn settings(&self) -> SettingsReport {
        let settings = &self.hub.settings;
        let (in_force, persisted) = settings.overrides();
        let engine = settings.engine();
        SettingsReport {
            in_force,
            persisted,
            file: settings.file().map(ToOwned::to_owned),
            overhead: f64::from(engine.overhead) / 1e3,
            quantum_max_s: engine.quantum_max.as_secs_f64(),
        }
    }

    fn status_of(&self, seen: &Seen) -> StatusReport {
        let sensors = self.sensors.all();
        StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: seen.at.since(self.started).as_secs_f64(),
            metrics: self.metrics.map(|address| address.to_string()),
            gpus: self.gpus(seen),
            gaps: gaps(&sensors),
            sensors,
        }
    }

    /// The answer to `explain`.
    pub async fn explain(&self) -> Result<ExplainReport, Gone> {
        let seen = self.hub.driver.seen().await?;
        let gaps = gaps(&self.sensors.all());
        let grounds = seen.view.gpus.iter().map(grounds).collect();
        Ok(ExplainReport { gpus: self.gpus(&seen), grounds, changes: seen.changes, gaps })
    }

    /// The answer to `clients`.
    pub fn clients(&self) -> ClientsReport {
        let now = clock::now();
        let clients = self.hub.registry.all().iter().map(|client| client_report(client, now)).collect();
        ClientsReport { clients }
    }

    /// The answer to `doctor`.
    pub fn doctor(&self) -> DoctorReport {
        let sensors = self.sensors.all();
        let verdict = verdict(&sensors);
        let gaps = gaps(&sensors);
        let sensors = sensors
            .into_iter()
            .map(|status| SensorAdvice {
                sees: sees(status.sensor).to_owned(),
                advice: advice(&status),
                status,
            })
            .collect();
        DoctorReport {
            sensors,
            gaps,
            disagreements: self.sensors.disagreements(),
            verdict,
            hazards: self.hub.hazards.known(),
        }
    }

    /// The text of `/metrics`.
    pub fn metrics(&self, seen: &Seen) -> Result<String, prometheus::Error> {
        let clients = self.hub.registry.all();
        let on_gpus =
            clients.iter().flat_map(|client| client.gpus().into_iter().map(move |gpu| (client, gpu)));
        self.hub.metrics.render(&Snapshot {
            seen,
            clock_origin_s: clock::origin_s(),
            sensors: &self.sensors.all(),
            totals: &on_gpus.map(|(client, gpu)| ((client.id, gpu), client.totals(gpu))).collect(),
        })
    }

    fn gpus(&self, seen: &Seen) -> Vec<GpuReport> {
        let known = self.hub.gpus.all();
        let clients: BTreeMap<ClientId, Arc<Client>> =
            self.hub.registry.all().into_iter().map(|client| (client.id, client)).collect();
        let hanging = self.hub.hazards.hanging();
        let report = |view: &GpuView| GpuReport {
            hangs_s: hanging.get(&view.gpu).map(|since| seen.at.since(*since).as_secs_f64()),
            clients: view
                .clients
                .iter()
                .map(|on_gpu| {
                    let client = clients.get(&on_gpu.client).map(AsRef::as_ref);
                    let limit = client.and_then(|client| self.hub.settings.limit(client));
                    gpu_client_report(on_gpu, view, client, limit)
                })
                .collect(),
            ..gpu_report(view, known.get(&view.gpu))
        };
        seen.view.gpus.iter().map(report).collect()
    }
}

fn grounds(view: &GpuView) -> GroundsReport {
    let share = |milli: u32| f64::from(milli) / 1e3;
    GroundsReport {
        expected_handover_s: view.expected_cost.map(Nanos::as_secs_f64),
        sets: view.sets.clone(),
        holders: view.holders.clone(),
        working_set_bytes: (view.working_sets.0.0, view.working_sets.1.0),
        reckoned: view.reckoned_milli.map(|(shared, turns)| (share(shared), share(turns))),
        effect: view.account.effect.map(|effect| {
            let gain = effect.gain_milli.map(share);
            (share(effect.before_stall_milli), share(effect.after_stall_milli), gain)
        }),
        next: view.outlook.to_string(),
    }
}

/// A GPU without its clients.
fn gpu_report(view: &GpuView, known: Option<&Gpu>) -> GpuReport {
    let nvml = known.and_then(|gpu| gpu.nvml.as_ref());
    GpuReport {
        gpu: view.gpu,
        name: nvml.map(|nvml| nvml.name.clone()),
        mode: view.mode.to_string(),
        order: view.order,
        hangs_s: None,
        reason: view.last_change.as_ref().map(|change| change.reason.to_string()),
        total_bytes: nvml.map(|nvml| nvml.total.0),
        used_bytes: nvml.map(|nvml| nvml.used.0),
        capacity_bytes: (!Gpus::is_unknown(view.capacity)).then_some(view.capacity.0),
        committed_bytes: view.committed.0,
        quantum_s: view.quantum.map(Nanos::as_secs_f64),
        handover_s: view.handover_cost.map(Nanos::as_secs_f64),
        score: f64::from(view.score_milli) / 1e3,
        stall: view.stall_milli.map(|milli| f64::from(milli) / 1e3),
        curable_refaulted_bytes: view.curable_refaults.0,
        own_refaulted_bytes: view.self_refaults.0,
        clients: Vec::new(),
    }
}

fn gpu_client_report(
    view: &ClientView,
    gpu: &GpuView,
    client: Option<&Client>,
    limit: Option<Bytes>,
) -> GpuClientReport {
    GpuClientReport {
        client: view.client,
        name: client.map(|client| client.name.clone()).unwrap_or_default(),
        pid: client.map_or(0, |client| client.identity.pid),
        state: view.state.as_str().to_owned(),
        managed_bytes: view.managed.0,
        device_bytes: view.device.0,
        weight_milli: view.weight_milli,
        priority: view.priority,
        limit_bytes: limit.map(|limit| limit.0),
        granted_s: view.granted.as_secs_f64(),
        waited_s: view.waited.as_secs_f64(),
        grants: view.grants,
        working_set_bytes: (view.working_set_low.0, view.working_set_high.0),
        refaulted_bytes: view.curable_refaults.0,
        seen: client.map(|client| client.totals(gpu.gpu)).unwrap_or_default(),
        figures: client.map(|client| client.figures(gpu.gpu)).unwrap_or_default(),
    }
}

fn client_report(client: &Client, now: Nanos) -> ClientReport {
    let gpus = client.gpus();
    let (mut managed, mut device) = (Bytes::ZERO, Bytes::ZERO);
    let mut seen = ClientTotals::default();
    for &gpu in &gpus {
        if let Some(activity) = client.activity(gpu, now, false) {
            managed += activity.managed;
            device += activity.device;
        }
        seen = seen.plus(client.totals(gpu));
    }
    ClientReport {
        client: client.id,
        name: client.name.clone(),
        pid: client.identity.pid,
        uid: client.identity.uid,
        age_s: now.since(client.since).as_secs_f64(),
        gpus,
        managed_bytes: managed.0,
        device_bytes: device.0,
        seen,
    }
}

fn sees(sensor: SensorName) -> &'static str {
    match sensor {
        SensorName::UvmKprobe => "faults, migrations by cause, evictions and for whom, per client",
        SensorName::UvmCounters => "faults and bytes moved, per client",
        SensorName::UvmEvents => {
            "why memory moves and which blocks, per client, in samples while pressure is suspected"
        }
        SensorName::FaultThread => "share of time in which the driver serves faults, per GPU",
        SensorName::Xid => "GPU errors",
        SensorName::CudaUprobe => "processes that use CUDA without the shim",
        SensorName::Nvml => "the GPUs and their memory",
        SensorName::Shim => "demand, memory and hand-overs of programs under nvshare",
    }
}

fn advice(status: &SensorStatus) -> Option<String> {
    let reason = match &status.state {
        SensorState::Attached(_) => return None,
        SensorState::Unavailable(reason) => reason,
    };
    if reason.contains("switched off") {
        return Some("set it to true under [sensors] in the configuration and restart the agent".to_owned());
    }
    let advice = match status.sensor {
        SensorName::UvmKprobe => {
            "run the agent as root (or with CAP_BPF and CAP_PERFMON) on a kernel with CONFIG_KPROBES and a loaded nvidia_uvm"
        }
        SensorName::UvmCounters => {
            "start a program under nvshare: it hands over its descriptor; the agent must be able to open the driver's nvidia-uvm-tools device"
        }
        SensorName::UvmEvents => {
            "start a program under nvshare: it hands over its descriptor; the driver must be of a known version"
        }
        SensorName::FaultThread => {
            "run the agent as root (or with CAP_BPF and CAP_PERFMON); the thread appears with the first CUDA program"
        }
        SensorName::Xid => "run the agent as root; the driver must be 575 or newer with open kernel modules",
        SensorName::CudaUprobe => {
            "run the agent as root; set [driver] libcuda if the library is in an unusual place"
        }
        SensorName::Nvml => "install the NVIDIA driver's libnvidia-ml.so.1, or set [driver] nvml to its path",
        SensorName::Shim => return None,
    };
    Some(advice.to_owned())
}

fn verdict(sensors: &[SensorStatus]) -> String {
    let has = |name| sensors.iter().any(|status| status.sensor == name && status.state.is_attached());
    let verdict = if has(SensorName::UvmKprobe) || has(SensorName::UvmCounters) {
        if has(SensorName::FaultThread) {
            "thrash is detected per client and confirmed by the fault-service thread"
        } else {
            "thrash is detected per client, without confirmation by the fault-service thread"
        }
    } else if has(SensorName::FaultThread) {
        "only the share of time spent in faults is known; who causes them is not"
    } else {
        "no sensor sees what the driver does: the mode does not change by itself (`nvsharectl set mode` still works)"
    };
    verdict.to_owned()
}
