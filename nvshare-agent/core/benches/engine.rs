//! How many inputs the engine takes in per second on one core, by the number of clients.
//!
//! A small world is played once to get the inputs; then they are replayed to a fresh engine, and only that is
//! timed. Run it with `cargo xtask bench engine [--json]`.
#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "measuring and reporting is what this program does"
)]

use std::time::{Duration, Instant};

use nvshare_core::{
    Activity, Bytes, ClientId, ClientSample, Config, Drain, Engine, Epoch, GpuId, GpuSample, Input, JobId,
    Nanos, Output, Poll,
};
use serde_json::json;

const GPUS: u64 = 16;
const BIN: Nanos = Nanos::millis(100);
const CAPACITY: Bytes = Bytes::gib(80);
/// What the engine is to reach with 1,000 clients.
const TARGET_PER_S: f64 = 1e6;
/// The best of as many replays is reported: everything else that runs on the machine only makes it slower.
const REPLAYS: usize = 5;

#[derive(Clone, Copy, Debug)]
enum Workload {
    /// Everybody works, everything fits, figures say the same bin after bin.
    Steady,
    /// Everything fits; one client in five begins or ends its work in every bin.
    Bursts,
    /// Nothing fits: clients take turns.
    Turns,
    /// Nothing fits, and one client in five begins or ends its work in every bin.
    Crowd,
}

#[derive(Clone, Copy)]
struct Client {
    open: bool,
    epoch: Epoch,
    answer: bool,
}

fn gpu(index: u64) -> GpuId {
    GpuId([index as u8; 16])
}

/// A cheap sequence without pattern.
fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b.wrapping_mul(0xd1b5_4a32_d192_ed03);
    x ^= x >> 29;
    x.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32
}

struct World {
    engine: Engine,
    now: Nanos,
    inputs: Vec<(Nanos, Input)>,
    clients: Vec<Client>,
}

impl World {
    fn tell(&mut self, input: Input) {
        self.inputs.push((self.now, input.clone()));
        self.engine.handle(self.now, input);
        let mut resumed = Vec::new();
        while let Poll::Emit(output) = self.engine.poll() {
            match output {
                Output::Grant { client, gpu, epoch, .. } => {
                    self.clients[client.0 as usize] = Client { open: true, epoch, answer: false };
                    resumed.push(Input::Resumed {
                        client,
                        gpu,
                        epoch,
                        moved: Bytes::ZERO,
                        took: Nanos::ZERO,
                    });
                }
                Output::Revoke { client, epoch, .. } => {
                    let client = &mut self.clients[client.0 as usize];
                    (client.epoch, client.answer) = (epoch, true);
                }
                Output::Plan(_) | Output::Unresponsive { .. } | Output::NotRevocable { .. } => {}
            }
        }
        for input in resumed {
            self.tell(input);
        }
    }
}

/// The inputs of `bins` bins with this many clients.
fn play(workload: Workload, count: u64, bins: u64) -> Vec<(Nanos, Input)> {
    let mut world = World {
        engine: Engine::new(Config::default()),
        now: Nanos::ZERO,
        inputs: Vec::new(),
        clients: vec![Client { open: true, epoch: Epoch(0), answer: false }; count as usize],
    };
    for index in 0..GPUS {
        world.tell(Input::Gpu { gpu: gpu(index), capacity: CAPACITY, link_rate: Bytes::gib(50) });
    }
    for id in 0..count {
        let client = ClientId(id);
        world.tell(Input::ClientJoined { client, job: JobId(id), weight_milli: 1000, priority: 0 });
        world.tell(Input::ClientUses { client, gpu: gpu(id % GPUS) });
    }
    let per_gpu = count.div_ceil(GPUS).max(1);
    let managed = match workload {
        Workload::Steady | Workload::Bursts => Bytes(CAPACITY.0 / per_gpu / 2),
        Workload::Turns | Workload::Crowd => Bytes(CAPACITY.0 * 3 / 4),
    };
    for bin in 0..bins {
        world.now = Nanos(BIN.0 * (bin + 1));
        for id in 0..count {
            let Client { open, epoch, answer } = world.clients[id as usize];
            let (client, on) = (ClientId(id), gpu(id % GPUS));
            if answer {
                let state = &mut world.clients[id as usize];
                (state.open, state.answer) = (false, false);
                let drain = Drain::Done { took: Nanos::MILLI };
                world.tell(Input::Revoked { client, gpu: on, epoch, drain, moved: Bytes::ZERO });
            }
            let busy = match workload {
                Workload::Bursts | Workload::Crowd => mix(id, (bin + id % 5) / 5).is_multiple_of(2),
                Workload::Steady | Workload::Turns => true,
            };
            let activity = Activity {
                managed,
                calls: u64::from(busy && open) * 100,
                waiting: u32::from(busy && !open),
                busy_threads: u32::from(busy && open),
                idle_for: if busy { Nanos::ZERO } else { Nanos::millis(300) },
                ..Activity::default()
            };
            world.tell(Input::Activity { client, gpu: on, activity });
        }
        for index in 0..GPUS {
            let clients: Vec<(ClientId, ClientSample)> = (index..count)
                .step_by(GPUS as usize)
                .map(|id| {
                    let open = world.clients[id as usize].open;
                    let moved = match workload {
                        Workload::Turns | Workload::Crowd if open => Bytes::mib(200),
                        _ => Bytes::ZERO,
                    };
                    let figures = ClientSample {
                        gpu_faults: Some(moved.0 >> 16),
                        cpu_faults: Some(0),
                        bytes_in: Some(moved),
                        bytes_out: Some(moved),
                        ..ClientSample::default()
                    };
                    (ClientId(id), figures)
                })
                .collect();
            let fault_busy = Some(if matches!(workload, Workload::Turns | Workload::Crowd) {
                Nanos::millis(80)
            } else {
                Nanos::ZERO
            });
            world.tell(Input::Sample {
                gpu: gpu(index),
                sample: GpuSample { interval: BIN, fault_busy, clients },
            });
        }
    }
    world.inputs
}

/// The time a fresh engine takes for the inputs, and how much it had to say.
fn replay(inputs: Vec<(Nanos, Input)>) -> (Duration, u64) {
    let mut engine = Engine::new(Config::default());
    let mut outputs = 0;
    let began = Instant::now();
    for (at, input) in inputs {
        engine.handle(at, input);
        while let Poll::Emit(_) = engine.poll() {
            outputs += 1;
        }
    }
    (began.elapsed(), outputs)
}

fn main() {
    let json = std::env::args().any(|argument| argument == "--json");
    let mut rows = Vec::new();
    let mut reached = true;
    if !json {
        println!("workload  clients     inputs  outputs  inputs/s    ns/input");
    }
    for workload in [Workload::Steady, Workload::Bursts, Workload::Turns, Workload::Crowd] {
        for count in [16, 100, 1000, 10_000] {
            let inputs = play(workload, count, (400_000 / count).clamp(30, 3000));
            let replays = (0..REPLAYS).map(|_| replay(inputs.clone()));
            let Some((took, outputs)) = replays.min() else { continue };
            let per_s = inputs.len() as f64 / took.as_secs_f64();
            let name = format!("{workload:?}").to_lowercase();
            if count == 1000 {
                reached &= per_s >= TARGET_PER_S;
            }
            if !json {
                println!(
                    "{name:<8}  {count:>7}  {:>9}  {outputs:>7}  {per_s:>8.0}  {:>10.0}",
                    inputs.len(),
                    1e9 / per_s
                );
            }
            rows.push(json!({
                "workload": name, "clients": count, "gpus": GPUS, "inputs": inputs.len(), "outputs": outputs,
                "inputs_per_s": per_s.round(), "ns_per_input": (1e9 / per_s).round(),
            }));
        }
    }
    if json {
        println!(
            "{}",
            json!({"bench": "engine", "target_inputs_per_s": TARGET_PER_S, "reached": reached, "rows": rows})
        );
    } else {
        println!(
            "with 1,000 clients on {GPUS} GPUs the target is {TARGET_PER_S:.0}/s: {}",
            if reached { "reached" } else { "missed" }
        );
    }
}
