//! The last minutes, second by second: what sparklines are drawn from.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nvshare_core::{ClientId, GpuId};
use serde::{Deserialize, Serialize};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::{protocol::StatusReport, report::Desk};

/// How often the figures are taken.
const EVERY: Duration = Duration::from_secs(1);
/// How many are kept: two minutes.
const KEPT: usize = 120;

/// What one GPU went through, oldest first. The last entry is the last whole second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuHistory {
    /// Which one.
    pub gpu: GpuId,
    /// Share of the time in which faults were being served; absent if no sensor says.
    pub stall: Vec<Option<f64>>,
    /// Bytes per second that UVM brought to the GPU for all clients together.
    pub bytes_in: Vec<f64>,
    /// Bytes per second that it took away.
    pub bytes_out: Vec<f64>,
    /// Bytes per second that came back and would not have to if clients took turns.
    pub curable: Vec<f64>,
    /// Each client's rates in the last second.
    pub clients: BTreeMap<ClientId, Rates>,
}

/// Rates of one client on one GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Bytes per second brought in; absent if no sensor says.
    pub bytes_in: Option<f64>,
    /// Bytes per second taken out.
    pub bytes_out: Option<f64>,
}

/// The history of every GPU.
#[derive(Debug, Default)]
pub struct History {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    gpus: BTreeMap<GpuId, Track>,
    uptime_s: f64,
}

#[derive(Debug, Default)]
struct Track {
    stall: VecDeque<Option<f64>>,
    bytes_in: VecDeque<f64>,
    bytes_out: VecDeque<f64>,
    curable: VecDeque<f64>,
    curable_total: u64,
    clients: BTreeMap<ClientId, (Totals, Rates)>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    bytes_in: Option<u64>,
    bytes_out: Option<u64>,
}

fn push<T>(kept: &mut VecDeque<T>, value: T) {
    if kept.len() == KEPT {
        kept.pop_front();
    }
    kept.push_back(value);
}

impl History {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in the figures of a moment.
    pub fn note(&self, status: &StatusReport) {
        let mut state = self.state();
        let seconds = status.uptime_s - state.uptime_s;
        state.uptime_s = status.uptime_s;
        if seconds <= 0.0 {
            return;
        }
        state.gpus.retain(|gpu, _| status.gpus.iter().any(|report| report.gpu == *gpu));
        for gpu in &status.gpus {
            let is_new = !state.gpus.contains_key(&gpu.gpu);
            let track = state.gpus.entry(gpu.gpu).or_default();
            let rise = |before: u64, now: u64| now.saturating_sub(before) as f64 / seconds;
            let curable = if is_new { 0.0 } else { rise(track.curable_total, gpu.curable_refaulted_bytes) };
            track.curable_total = gpu.curable_refaulted_bytes;
            let mut clients = BTreeMap::new();
            for client in &gpu.clients {
                let totals = Totals {
                    bytes_in: client.seen.bytes_in.map(|bytes| bytes.0),
                    bytes_out: client.seen.bytes_out.map(|bytes| bytes.0),
                };
                // A client that is new began from nothing.
                let before = track.clients.get(&client.client).map(|(totals, _)| *totals).unwrap_or_default();
                let rate =
                    |before: Option<u64>, now: Option<u64>| now.map(|now| rise(before.unwrap_or(0), now));
                let rates = Rates {
                    bytes_in: rate(before.bytes_in, totals.bytes_in),
                    bytes_out: rate(before.bytes_out, totals.bytes_out),
                };
                clients.insert(client.client, (totals, rates));
            }
            track.clients = clients;
            let sum = |rate: fn(&Rates) -> Option<f64>| {
                track.clients.values().filter_map(|(_, rates)| rate(rates)).sum::<f64>()
            };
            let (bytes_in, bytes_out) = (sum(|rates| rates.bytes_in), sum(|rates| rates.bytes_out));
            push(&mut track.stall, gpu.stall);
            push(&mut track.bytes_in, bytes_in);
            push(&mut track.bytes_out, bytes_out);
            push(&mut track.curable, curable);
        }
    }

    /// Everything that is kept.
    pub fn all(&self) -> Vec<GpuHistory> {
        let state = self.state();
        let report = |(&gpu, track): (&GpuId, &Track)| GpuHistory {
            gpu,
            stall: track.stall.iter().copied().collect(),
            bytes_in: track.bytes_in.iter().copied().collect(),
            bytes_out: track.bytes_out.iter().copied().collect(),
            curable: track.curable.iter().copied().collect(),
            clients: track.clients.iter().map(|(&client, &(_, rates))| (client, rates)).collect(),
        };
        state.gpus.iter().map(report).collect()
    }
}

/// Keeps the history until cancelled.
pub async fn keep(desk: Arc<Desk>, shutdown: CancellationToken) {
    let mut tick = tokio::time::interval(EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = tick.tick() => {}
        }
        if let Ok(status) = desk.status().await {
            desk.history.note(&status);
        }
    }
}
