//! What the agent's sensors say of the simulated machine, once a bin.

use serde::{Deserialize, Serialize};

use crate::{
    input::{Activity, ClientSample, GpuSample, Input},
    sim::{
        process::{Gate, Process, Seat, State, Tally},
        world::{World, client_id, gpu_id},
    },
    units::{Bytes, Nanos},
};

/// The length of a bin, as in the agent.
pub(crate) const BIN: Nanos = Nanos::millis(100);

/// How well the driver can be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sensors {
    /// Single blocks: probes in the driver, with a shadow table.
    Blocks,
    /// Byte counters of each client and the fault-service time, which work everywhere.
    Counters,
}

impl World {
    /// Closes a bin on every GPU.
    pub(crate) fn sample(&mut self, sensors: Sensors) {
        for gpu in 0..self.cards.len() {
            let mut sample = GpuSample {
                interval: BIN,
                fault_busy: Some(std::mem::take(&mut self.services[gpu].busy).min(BIN)),
                clients: Vec::new(),
            };
            for &index in &self.alive {
                let now = self.now;
                let process = &mut self.processes[index];
                if !process.spec.shim {
                    continue;
                }
                let Some(seat) = process.seats.iter().position(|seat| seat.gpu == gpu) else { continue };
                let activity = activity(process, &process.seats[seat], now);
                let client = client_id(index);
                self.news.push_back(Input::Activity { client, gpu: gpu_id(gpu), activity });
                sample.clients.push((client, figures(&mut process.seats[seat], sensors)));
            }
            self.news.push_back(Input::Sample { gpu: gpu_id(gpu), sample });
        }
        for &index in &self.alive {
            self.processes[index].sampled_work = self.processes[index].work;
        }
    }
}

fn activity(process: &Process, seat: &Seat, now: Nanos) -> Activity {
    let inside = matches!(process.state, State::Runs | State::Stalled);
    let worked = process.work > process.sampled_work;
    let gated = process.state == State::Gated && !matches!(seat.gate, Gate::Open | Gate::Draining { .. });
    Activity {
        managed: process.spec.allocated,
        device: Bytes::ZERO,
        calls: u64::from(inside || worked),
        waiting: u32::from(gated),
        busy_threads: u32::from(inside),
        idle_for: if inside { Nanos::ZERO } else { now.since(process.last_used) },
    }
}

fn figures(seat: &mut Seat, sensors: Sensors) -> ClientSample {
    let bytes = |blocks: u64| Some(Bytes(blocks * Bytes::BLOCK.0));
    let Tally { faults, came, went, evicted, evicted_by_others, curable, own } =
        std::mem::take(&mut seat.tally);
    let counters = ClientSample {
        gpu_faults: Some(faults),
        cpu_faults: Some(0),
        bytes_in: bytes(came),
        bytes_out: bytes(went),
        ..ClientSample::default()
    };
    match sensors {
        Sensors::Counters => counters,
        Sensors::Blocks => ClientSample {
            evicted: bytes(evicted),
            evicted_by_others: bytes(evicted_by_others),
            curable: bytes(curable),
            self_refaulted: bytes(own),
            resident: bytes(u64::from(seat.resident.count())),
            ..counters
        },
    }
}
