//! What is a state rather than an event: filled in at the scrape, from what the engine and the sensors show.
//!
//! Counters among these are totals that others keep. All are emptied first, so that what belongs to a client or
//! GPU that has gone, or that no sensor says any more, is absent.

use std::collections::BTreeMap;

use nvshare_core::{
    ClientId, ClientView, GpuId, GpuView, Mode, ModeOrder, Nanos, Reason, output::ClientState,
};
use prometheus::{CounterVec, GaugeVec, IntCounterVec, IntGaugeVec};

use super::catalogue::Catalogue;
use crate::{
    clients::client::ClientTotals,
    driver::Seen,
    observe::source::{SensorName, SensorStatus},
};

/// Everything that a scrape shows beside what has been counted as it happened.
#[derive(Debug)]
pub struct Snapshot<'a> {
    /// The engine.
    pub seen: &'a Seen,
    /// Seconds from the epoch to the origin of the engine's clock.
    pub clock_origin_s: f64,
    /// The sensors.
    pub sensors: &'a [SensorStatus],
    /// What was seen of each client on each GPU.
    pub totals: &'a BTreeMap<(ClientId, GpuId), ClientTotals>,
}

/// The reasons of changes of plan, as labels.
const REASONS: [&str; 11] = [
    "thrash",
    "thrash_confirmed",
    "fits",
    "eviction_free",
    "working_sets_fit",
    "probe_held",
    "repacked",
    "set_misfit",
    "alone",
    "blind",
    "operator",
];
/// The changes of plan that there can be: the mode that follows, and its reasons.
pub(super) const CHANGES: &[(&str, &[&str])] = &[
    ("exclusive", &["thrash", "thrash_confirmed", "repacked", "set_misfit", "operator"]),
    ("sets", &["thrash", "thrash_confirmed", "repacked", "set_misfit", "operator"]),
    ("shared", &["fits", "eviction_free", "working_sets_fit", "probe_held", "alone", "blind", "operator"]),
];
const ORDERS: [(ModeOrder, &str); 3] =
    [(ModeOrder::Auto, "auto"), (ModeOrder::Shared, "shared"), (ModeOrder::Exclusive, "exclusive")];

/// A reason as a label.
pub(super) const fn reason(reason: &Reason) -> &'static str {
    match reason {
        Reason::Thrash { .. } => REASONS[0],
        Reason::ThrashConfirmed { .. } => REASONS[1],
        Reason::Fits { .. } => REASONS[2],
        Reason::EvictionFree { .. } => REASONS[3],
        Reason::WorkingSetsFit { .. } => REASONS[4],
        Reason::ProbeHeld { .. } => REASONS[5],
        Reason::Repacked { .. } => REASONS[6],
        Reason::SetMisfit { .. } => REASONS[7],
        Reason::Alone => REASONS[8],
        Reason::Blind => REASONS[9],
        Reason::Operator { .. } => REASONS[10],
    }
}

#[derive(Debug)]
pub(super) struct State {
    capacity: IntGaugeVec,
    committed: IntGaugeVec,
    working_sets: IntGaugeVec,
    refaulted: IntCounterVec,
    pressure: GaugeVec,
    pressure_seconds: CounterVec,
    score: GaugeVec,
    stall: GaugeVec,
    mode: IntGaugeVec,
    order: IntGaugeVec,
    reason: IntGaugeVec,
    changed: GaugeVec,
    reckoned: GaugeVec,
    sets: IntGaugeVec,
    effect_stall: GaugeVec,
    gain: GaugeVec,
    clients: IntGaugeVec,
    quantum: GaugeVec,
    handover_cost: GaugeVec,
    handover_expected: GaugeVec,
    handover_seconds: CounterVec,
    handover_bytes: IntCounterVec,
    client_states: IntGaugeVec,
    client_memory: IntGaugeVec,
    client_working_set: IntGaugeVec,
    client_interactive: IntGaugeVec,
    client_weight: GaugeVec,
    client_seconds: CounterVec,
    client_stalled: CounterVec,
    client_grants: IntCounterVec,
    client_calls: IntCounterVec,
    client_refaulted: IntCounterVec,
    client_faults: IntCounterVec,
    client_migrated: IntCounterVec,
    client_evicted: IntCounterVec,
    sensor_attached: IntGaugeVec,
    sensor_lost: IntCounterVec,
    sensor_runs: IntCounterVec,
    sensor_seconds: CounterVec,
}

impl State {
    pub(super) fn new(c: &mut Catalogue) -> Result<Self, prometheus::Error> {
        Ok(Self {
            capacity: c.gauge("nvshare_gpu_capacity_bytes", "What managed memory can use: total less the driver's reserve and plain allocations.", &["gpu"])?,
            committed: c.gauge("nvshare_gpu_committed_bytes", "Managed memory allocated by all clients.", &["gpu"])?,
            working_sets: c.gauge("nvshare_gpu_working_set_bytes", "Managed memory that clients with work use, at least (low) and at most (high).", &["gpu", "bound"])?,
            refaulted: c.counter("nvshare_uvm_refaulted_bytes_total", "Bytes brought back, by whether taking turns would have avoided it (curable) or not (own).", &["gpu", "kind"])?,
            pressure: c.float("nvshare_gpu_memory_pressure_ratio", "Share of time in which some or all (full) clients with work waited for memory, averaged over a window: 10s, 60s or 300s.", &["gpu", "kind", "window"])?,
            pressure_seconds: c.seconds("nvshare_gpu_memory_pressure_seconds_total", "Time in which some or all (full) clients with work waited for memory.", &["gpu", "kind"])?,
            score: c.float("nvshare_thrash_score_ratio", "The detector's evidence for curable thrash; 1 is the threshold.", &["gpu"])?,
            stall: c.float("nvshare_fault_stall_ratio", "Share of the detector's window in which faults were being served.", &["gpu"])?,
            mode: c.gauge("nvshare_plan_mode", "1 for the mode in force: shared, sets or exclusive.", &["gpu", "mode"])?,
            order: c.gauge("nvshare_plan_order", "1 for what the operator ordered: auto, shared or exclusive.", &["gpu", "order"])?,
            reason: c.gauge("nvshare_plan_reason", "1 for the reason of the last change of plan: thrash, thrash_confirmed, fits, eviction_free, working_sets_fit, probe_held, repacked, set_misfit, alone, blind or operator.", &["gpu", "reason"])?,
            changed: c.float("nvshare_plan_last_change_timestamp_seconds", "When the plan last changed; absent before it did.", &["gpu"])?,
            reckoned: c.float("nvshare_plan_reckoned_useful_ratio", "Share of the time in which the GPU was last reckoned to be of use, side by side (shared) and in turns.", &["gpu", "plan"])?,
            sets: c.gauge("nvshare_plan_sets", "Sets of clients that run together; 1 while shared.", &["gpu"])?,
            effect_stall: c.float("nvshare_plan_effect_stall_ratio", "Share of time in which some client waited for memory, in the thrash before the last turns and during them; absent before there were any.", &["gpu", "when"])?,
            gain: c.float("nvshare_plan_effect_gain_ratio", "Progress of clients in the last turns that thrash led to, waiting included, as a multiple of that in the thrash; a lower bound.", &["gpu"])?,
            clients: c.gauge("nvshare_scheduler_clients", "Clients by state: running, idle, draining, waiting or parked.", &["gpu", "state"])?,
            quantum: c.float("nvshare_scheduler_quantum_seconds", "The quantum in force; absent while shared.", &["gpu"])?,
            handover_cost: c.float("nvshare_handover_cost_seconds", "Measured cost of a hand-over, of the client with the highest; absent before one was measured.", &["gpu"])?,
            handover_expected: c.float("nvshare_handover_expected_cost_seconds", "What a hand-over is taken to cost: as measured, or by the link's rate before that.", &["gpu"])?,
            handover_seconds: c.seconds("nvshare_handover_seconds_total", "Time of hand-overs, by phase: drain (work in flight ends; of all clients that are stopped) or refill (memory comes back).", &["gpu", "phase"])?,
            handover_bytes: c.counter("nvshare_handover_bytes_total", "Bytes that came back (in) or went out (out) while clients took turns.", &["gpu", "direction"])?,
            client_states: c.gauge("nvshare_client_state", "1 for the state of a client: running, idle, draining, waiting or parked.", &["gpu", "client", "state"])?,
            client_memory: c.gauge("nvshare_client_memory_bytes", "Memory of a client by kind: managed or device.", &["gpu", "client", "kind"])?,
            client_working_set: c.gauge("nvshare_client_working_set_bytes", "Managed memory that a client uses, at least (low) and at most (high).", &["gpu", "client", "bound"])?,
            client_interactive: c.gauge("nvshare_client_interactive", "1 for a client that uses the GPU shortly and seldom.", &["gpu", "client"])?,
            client_weight: c.float("nvshare_client_weight_ratio", "Share of a client as a multiple of the default.", &["gpu", "client"])?,
            client_seconds: c.seconds("nvshare_client_work_seconds_total", "Time in which a client had work, by whether it was granted the GPU or waited for its turn.", &["gpu", "client", "state"])?,
            client_stalled: c.seconds("nvshare_client_stalled_seconds_total", "Time in which a client waited for memory.", &["gpu", "client"])?,
            client_grants: c.counter("nvshare_client_grants_total", "Grants sent to a client.", &["gpu", "client"])?,
            client_calls: c.counter("nvshare_client_submitted_calls_total", "Work-submitting calls of a client: its progress.", &["gpu", "client"])?,
            client_refaulted: c.counter("nvshare_client_refaulted_bytes_total", "Bytes of a client brought back, by kind as in nvshare_uvm_refaulted_bytes_total.", &["gpu", "client", "kind"])?,
            client_faults: c.counter("nvshare_client_faults_total", "Faults of a client on managed memory; kind is gpu or cpu.", &["gpu", "client", "kind"])?,
            client_migrated: c.counter("nvshare_client_migrated_bytes_total", "Bytes of a client that UVM moved; direction is in (to the GPU) or out.", &["gpu", "client", "direction"])?,
            client_evicted: c.counter("nvshare_client_evicted_bytes_total", "Bytes of a client evicted to make room, for itself (own) or for other processes (others).", &["gpu", "client", "for"])?,
            sensor_attached: c.gauge("nvshare_sensor_attached", "1 if the sensor delivers, else 0.", &["sensor"])?,
            sensor_lost: c.counter("nvshare_sensor_lost_total", "Observations the sensor had to drop since it was attached.", &["sensor"])?,
            sensor_runs: c.counter("nvshare_sensor_runs_total", "How often the sensor ran since it was attached.", &["sensor"])?,
            sensor_seconds: c.seconds("nvshare_sensor_run_seconds_total", "Time the sensor spent running since it was attached; absent where the kernel does not account for it.", &["sensor"])?,
        })
    }

    pub(super) fn fill(&self, snapshot: &Snapshot) {
        self.empty();
        for gpu in &snapshot.seen.view.gpus {
            let id = gpu.gpu.to_string();
            self.fill_gpu(&id, gpu);
            self.fill_plan(&id, gpu, snapshot.clock_origin_s);
            for client in &gpu.clients {
                let name = client.client.to_string();
                self.fill_client([&id, &name], client);
                if let Some(totals) = snapshot.totals.get(&(client.client, gpu.gpu)) {
                    self.fill_totals([&id, &name], totals);
                }
            }
        }
        self.fill_sensors(snapshot.sensors);
    }

    fn fill_gpu(&self, id: &str, gpu: &GpuView) {
        let GpuView {
            gpu: _,
            mode: _,
            order: _,
            last_change: _,
            capacity,
            committed,
            quantum,
            handover_cost,
            score_milli,
            stall_milli,
            curable_refaults,
            self_refaults,
            expected_cost,
            sets: _,
            holders: _,
            working_sets,
            reckoned_milli: _,
            outlook: _,
            account,
            clients,
        } = gpu;
        if capacity.0 < i64::MAX as u64 {
            self.capacity.with_label_values(&[id]).set(capacity.0 as i64);
        }
        self.committed.with_label_values(&[id]).set(committed.0 as i64);
        for (bound, bytes) in [("low", working_sets.0), ("high", working_sets.1)] {
            self.working_sets.with_label_values(&[id, bound]).set(bytes.0 as i64);
        }
        self.refaulted.with_label_values(&[id, "curable"]).inc_by(curable_refaults.0);
        self.refaulted.with_label_values(&[id, "own"]).inc_by(self_refaults.0);
        self.score.with_label_values(&[id]).set(f64::from(*score_milli) / 1e3);
        set(&self.stall, &[id], stall_milli.map(|milli| f64::from(milli) / 1e3));
        set(&self.quantum, &[id], quantum.map(Nanos::as_secs_f64));
        set(&self.handover_cost, &[id], handover_cost.map(Nanos::as_secs_f64));
        set(&self.handover_expected, &[id], expected_cost.map(Nanos::as_secs_f64));
        for state in ClientState::ALL {
            let count = clients.iter().filter(|client| client.state == state).count();
            self.clients.with_label_values(&[id, state.as_str()]).set(count as i64);
        }
        if let Some(pressure) = &account.pressure {
            for (kind, line) in [("some", pressure.some), ("full", pressure.full)] {
                let windows = [("10s", line.avg10_ppm), ("60s", line.avg60_ppm), ("300s", line.avg300_ppm)];
                for (window, ppm) in windows {
                    self.pressure.with_label_values(&[id, kind, window]).set(f64::from(ppm) / 1e6);
                }
                self.pressure_seconds.with_label_values(&[id, kind]).inc_by(line.total.as_secs_f64());
            }
        }
        for (phase, time) in [("drain", account.drained), ("refill", account.refilled)] {
            self.handover_seconds.with_label_values(&[id, phase]).inc_by(time.as_secs_f64());
        }
        for (direction, bytes) in [("in", account.handed_in), ("out", account.handed_out)] {
            self.handover_bytes.with_label_values(&[id, direction]).inc_by(bytes.0);
        }
        if let Some(effect) = &account.effect {
            let shares = [("before", effect.before_stall_milli), ("during", effect.after_stall_milli)];
            for (when, milli) in shares {
                self.effect_stall.with_label_values(&[id, when]).set(f64::from(milli) / 1e3);
            }
            set(&self.gain, &[id], effect.gain_milli.map(|milli| f64::from(milli) / 1e3));
        }
    }

    fn fill_plan(&self, id: &str, gpu: &GpuView, clock_origin_s: f64) {
        for mode in Mode::ALL {
            self.mode.with_label_values(&[id, mode.as_str()]).set((mode == gpu.mode).into());
        }
        for (order, label) in ORDERS {
            self.order.with_label_values(&[id, label]).set((order == gpu.order).into());
        }
        let last = gpu.last_change.as_ref();
        for label in REASONS {
            let holds = last.is_some_and(|change| reason(&change.reason) == label);
            self.reason.with_label_values(&[id, label]).set(holds.into());
        }
        self.sets.with_label_values(&[id]).set(gpu.sets.len() as i64);
        if let Some((shared, turns)) = gpu.reckoned_milli {
            for (plan, milli) in [("shared", shared), ("turns", turns)] {
                self.reckoned.with_label_values(&[id, plan]).set(f64::from(milli) / 1e3);
            }
        }
        set(&self.changed, &[id], last.map(|change| clock_origin_s + change.at.as_secs_f64()));
    }

    fn fill_client(&self, [id, name]: [&str; 2], view: &ClientView) {
        let ClientView {
            client: _,
            priority: _,
            state,
            managed,
            device,
            weight_milli,
            granted,
            waited,
            grants,
            working_set_low,
            working_set_high,
            interactive,
            calls,
            stalled,
            curable_refaults,
            self_refaults,
        } = view;
        for known in ClientState::ALL {
            let holds = i64::from(known == *state);
            self.client_states.with_label_values(&[id, name, known.as_str()]).set(holds);
        }
        for (kind, bytes) in [("managed", managed), ("device", device)] {
            self.client_memory.with_label_values(&[id, name, kind]).set(bytes.0 as i64);
        }
        for (bound, bytes) in [("low", working_set_low), ("high", working_set_high)] {
            self.client_working_set.with_label_values(&[id, name, bound]).set(bytes.0 as i64);
        }
        self.client_interactive.with_label_values(&[id, name]).set((*interactive).into());
        self.client_weight.with_label_values(&[id, name]).set(f64::from(*weight_milli) / 1e3);
        for (state, time) in [("granted", granted), ("waiting", waited)] {
            self.client_seconds.with_label_values(&[id, name, state]).inc_by(time.as_secs_f64());
        }
        self.client_stalled.with_label_values(&[id, name]).inc_by(stalled.as_secs_f64());
        self.client_grants.with_label_values(&[id, name]).inc_by(*grants);
        self.client_calls.with_label_values(&[id, name]).inc_by(*calls);
        for (kind, bytes) in [("curable", curable_refaults), ("own", self_refaults)] {
            self.client_refaulted.with_label_values(&[id, name, kind]).inc_by(bytes.0);
        }
    }

    fn fill_totals(&self, [id, name]: [&str; 2], totals: &ClientTotals) {
        let ClientTotals { gpu_faults, cpu_faults, bytes_in, bytes_out, evicted, evicted_by_others } =
            *totals;
        let count = |family: &IntCounterVec, label: &str, total: Option<u64>| {
            if let Some(total) = total {
                family.with_label_values(&[id, name, label]).inc_by(total);
            }
        };
        count(&self.client_faults, "gpu", gpu_faults);
        count(&self.client_faults, "cpu", cpu_faults);
        count(&self.client_migrated, "in", bytes_in.map(|bytes| bytes.0));
        count(&self.client_migrated, "out", bytes_out.map(|bytes| bytes.0));
        count(&self.client_evicted, "others", evicted_by_others.map(|bytes| bytes.0));
        let own = evicted.map(|bytes| bytes.saturating_sub(evicted_by_others.unwrap_or_default()).0);
        count(&self.client_evicted, "own", own);
    }

    fn fill_sensors(&self, sensors: &[SensorStatus]) {
        for sensor in SensorName::ALL {
            self.sensor_attached.with_label_values(&[sensor.as_str()]);
        }
        for status in sensors {
            let labels = [status.sensor.as_str()];
            self.sensor_attached.with_label_values(&labels).set(status.state.is_attached().into());
            self.sensor_lost.with_label_values(&labels).inc_by(status.lost);
            self.sensor_runs.with_label_values(&labels).inc_by(status.run_count);
            if let Some(time) = status.run_time {
                self.sensor_seconds.with_label_values(&labels).inc_by(time.as_secs_f64());
            }
        }
    }

    fn empty(&self) {
        let Self {
            capacity,
            committed,
            working_sets,
            refaulted,
            pressure,
            pressure_seconds,
            score,
            stall,
            mode,
            order,
            reason,
            changed,
            reckoned,
            sets,
            effect_stall,
            gain,
            clients,
            quantum,
            handover_cost,
            handover_expected,
            handover_seconds,
            handover_bytes,
            client_states,
            client_memory,
            client_working_set,
            client_interactive,
            client_weight,
            client_seconds,
            client_stalled,
            client_grants,
            client_calls,
            client_refaulted,
            client_faults,
            client_migrated,
            client_evicted,
            sensor_attached,
            sensor_lost,
            sensor_runs,
            sensor_seconds,
        } = self;
        for family in [
            capacity,
            committed,
            working_sets,
            mode,
            order,
            reason,
            sets,
            clients,
            client_states,
            client_memory,
            client_working_set,
            client_interactive,
            sensor_attached,
        ] {
            family.reset();
        }
        for family in [
            pressure,
            score,
            stall,
            changed,
            reckoned,
            effect_stall,
            gain,
            quantum,
            handover_cost,
            handover_expected,
            client_weight,
        ] {
            family.reset();
        }
        for family in [
            refaulted,
            handover_bytes,
            client_grants,
            client_calls,
            client_refaulted,
            client_faults,
            client_migrated,
            client_evicted,
            sensor_lost,
            sensor_runs,
        ] {
            family.reset();
        }
        for family in [pressure_seconds, handover_seconds, client_seconds, client_stalled, sensor_seconds] {
            family.reset();
        }
    }
}

fn set(family: &GaugeVec, labels: &[&str], value: Option<f64>) {
    if let Some(value) = value {
        family.with_label_values(labels).set(value);
    }
}
