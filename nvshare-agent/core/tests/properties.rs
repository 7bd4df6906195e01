//! What holds whatever the clients, the sensors and the clock do.

use std::collections::BTreeMap;

use nvshare_core::{
    Activity, Bytes, ClientId, ClientSample, Config, Drain, Engine, Epoch, GpuId, GpuSample, Input, JobId,
    ModeOrder, Nanos, Order, Output, Poll,
};
use proptest::prelude::*;

const CLIENTS: u64 = 5;
const GPUS: u8 = 2;

fn gpu_id() -> impl Strategy<Value = GpuId> {
    (0..=GPUS).prop_map(|index| GpuId([index; 16]))
}

fn client_id() -> impl Strategy<Value = ClientId> {
    (0..=CLIENTS).prop_map(ClientId)
}

fn bytes() -> impl Strategy<Value = Bytes> {
    prop_oneof![Just(Bytes::ZERO), (0..4096u64).prop_map(Bytes::mib), any::<u64>().prop_map(Bytes)]
}

fn nanos() -> impl Strategy<Value = Nanos> {
    prop_oneof![Just(Nanos::ZERO), (0..5000u64).prop_map(Nanos::millis), any::<u64>().prop_map(Nanos)]
}

fn mode() -> impl Strategy<Value = ModeOrder> {
    prop_oneof![Just(ModeOrder::Auto), Just(ModeOrder::Shared), Just(ModeOrder::Exclusive)]
}

fn client_sample() -> impl Strategy<Value = ClientSample> {
    let maybe = || proptest::option::of(bytes());
    (proptest::option::of(0..2u64), maybe(), maybe(), maybe()).prop_map(
        |(cpu_faults, bytes_in, bytes_out, evicted)| ClientSample {
            cpu_faults,
            bytes_in,
            bytes_out,
            evicted,
            ..ClientSample::default()
        },
    )
}

fn input() -> impl Strategy<Value = Input> {
    let epoch = || prop_oneof![(0..8u64).prop_map(Epoch), any::<u64>().prop_map(Epoch)];
    let drain = prop_oneof![
        nanos().prop_map(|took| Drain::Done { took }),
        Just(Drain::TimedOut),
        Just(Drain::Capturing)
    ];
    prop_oneof![
        1 => (gpu_id(), bytes(), bytes()).prop_map(|(gpu, capacity, link_rate)| Input::Gpu { gpu, capacity, link_rate }),
        1 => gpu_id().prop_map(|gpu| Input::GpuGone { gpu }),
        2 => (client_id(), 0..3u64, any::<u32>(), any::<i32>()).prop_map(|(client, job, weight_milli, priority)| {
            Input::ClientJoined { client, job: JobId(job), weight_milli, priority }
        }),
        3 => (client_id(), gpu_id()).prop_map(|(client, gpu)| Input::ClientUses { client, gpu }),
        1 => client_id().prop_map(|client| Input::ClientLeft { client }),
        6 => (client_id(), gpu_id(), bytes(), 0..2u64, 0..2u32, 0..2u32, nanos()).prop_map(
            |(client, gpu, managed, calls, waiting, busy_threads, idle_for)| Input::Activity {
                client,
                gpu,
                activity: Activity { managed, device: Bytes::ZERO, calls, waiting, busy_threads, idle_for },
            }
        ),
        6 => (gpu_id(), nanos(), proptest::option::of(nanos()), proptest::collection::vec((client_id(), client_sample()), 0..4))
            .prop_map(|(gpu, interval, fault_busy, clients)| Input::Sample {
                gpu,
                sample: GpuSample { interval, fault_busy, clients },
            }),
        4 => (client_id(), gpu_id(), epoch(), drain, bytes())
            .prop_map(|(client, gpu, epoch, drain, moved)| Input::Revoked { client, gpu, epoch, drain, moved }),
        2 => (client_id(), gpu_id(), epoch(), bytes(), nanos())
            .prop_map(|(client, gpu, epoch, moved, took)| Input::Resumed { client, gpu, epoch, moved, took }),
        2 => (client_id(), gpu_id(), epoch(), bytes(), nanos())
            .prop_map(|(client, gpu, epoch, bytes_in, took)| Input::Moved {
                client, gpu, epoch, bytes_in, bytes_out: Bytes::ZERO, took
            }),
        1 => (client_id(), gpu_id(), epoch()).prop_map(|(client, gpu, epoch)| Input::Yielded { client, gpu, epoch }),
        2 => (proptest::option::of(gpu_id()), mode()).prop_map(|(gpu, mode)| Input::Order(Order::Mode { gpu, mode })),
        1 => proptest::option::of(nanos()).prop_map(|quantum| Input::Order(Order::Quantum { quantum })),
        1 => (client_id(), any::<u32>()).prop_map(|(client, weight_milli)| Input::Order(Order::Weight { client, weight_milli })),
        1 => (client_id(), any::<i32>()).prop_map(|(client, priority)| Input::Order(Order::Priority { client, priority })),
        1 => any::<u32>().prop_map(|milli| Input::Order(Order::Overhead { milli })),
        1 => nanos().prop_map(|quantum_max| Input::Order(Order::QuantumMax { quantum_max })),
        2 => Just(Input::Tick),
    ]
}

/// Drains the engine; the answer to its own questions is the caller's to give.
fn drain(engine: &mut Engine, now: Nanos) -> (Vec<Output>, Option<Nanos>) {
    let mut outputs = Vec::new();
    loop {
        match engine.poll() {
            Poll::Emit(output) => outputs.push(output),
            Poll::Wait(deadline) => {
                assert!(deadline.is_none_or(|at| at > now), "deadline {deadline:?} is not after {now}");
                return (outputs, deadline);
            }
        }
        assert!(outputs.len() < 1000, "the engine does not come to rest");
    }
}

/// What a client of the orderly world below does with a revocation.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Manner {
    Prompt,
    Silent,
    NeverDrains,
}

#[derive(Debug)]
struct Scripted {
    job: JobId,
    manner: Manner,
    gpus: Vec<GpuId>,
    /// Gate and last epoch, by GPU.
    gates: BTreeMap<GpuId, (bool, Epoch)>,
    /// Some drain failed or was not answered, so that others need not wait for it.
    excused: bool,
    last_ran: Nanos,
    busy: bool,
}

impl Scripted {
    fn runs(&self) -> bool {
        self.gpus.iter().all(|gpu| self.gates[gpu].0)
    }
}

proptest! {
    #[test]
    fn no_sequence_of_inputs_panics_loops_or_lowers_an_epoch(
        steps in proptest::collection::vec((nanos(), input()), 1..120)
    ) {
        let mut engine = Engine::new(Config::default());
        let mut epochs: BTreeMap<(ClientId, GpuId), Epoch> = BTreeMap::new();
        let mut latest = Nanos::ZERO;
        for (at, input) in steps {
            if let Input::ClientLeft { client } = input {
                epochs.retain(|(of, _), _| *of != client);
            }
            engine.handle(at, input);
            latest = latest.max(at);
            for output in drain(&mut engine, latest).0 {
                if let Output::Grant { client, gpu, epoch, .. } | Output::Revoke { client, gpu, epoch, .. } = output {
                    let before = epochs.insert((client, gpu), epoch);
                    prop_assert!(before.is_none_or(|before| before < epoch));
                }
            }
            let view = engine.view(latest);
            prop_assert!(view.gpus.is_sorted_by_key(|gpu| gpu.gpu));
        }
    }

    #[test]
    fn one_job_at_a_time_runs_and_everybody_who_waits_gets_a_turn(
        clients in proptest::collection::vec(
            (1..4u64, prop_oneof![6 => Just(Manner::Prompt), 1 => Just(Manner::Silent), 1 => Just(Manner::NeverDrains)],
             prop_oneof![Just(vec![0u8]), Just(vec![1u8]), Just(vec![0u8, 1u8])], 0..30u64),
            2..6
        ),
        departure in 0..5usize,
    ) {
        const QUANTUM: Nanos = Nanos::millis(500);
        let config = Config { drain_within: Nanos::millis(300), ..Config::default() };
        let mut engine = Engine::new(config);
        let mut world: BTreeMap<ClientId, Scripted> = BTreeMap::new();
        let mut now = Nanos::ZERO;
        let mut queue: Vec<Input> = (0..GPUS)
            .map(|index| Input::Gpu {
                gpu: GpuId([index; 16]), capacity: Bytes::gib(1), link_rate: Bytes::gib(10),
            })
            .collect();
        queue.push(Input::Order(Order::Mode { gpu: None, mode: ModeOrder::Exclusive }));
        queue.push(Input::Order(Order::Quantum { quantum: Some(QUANTUM) }));
        let mut deadline = None;
        for step in 0..400u64 {
            now = Nanos::millis(step * 100);
            for (index, (job, manner, gpus, joins)) in clients.iter().enumerate() {
                let id = ClientId(index as u64);
                if *joins == step {
                    let gpus: Vec<GpuId> = gpus.iter().map(|&gpu| GpuId([gpu; 16])).collect();
                    queue.push(Input::ClientJoined { client: id, job: JobId(*job), weight_milli: 1000, priority: 0 });
                    queue.extend(gpus.iter().map(|&gpu| Input::ClientUses { client: id, gpu }));
                    world.insert(id, Scripted {
                        job: JobId(*job),
                        manner: *manner,
                        gates: gpus.iter().map(|&gpu| (gpu, (true, Epoch(0)))).collect(),
                        gpus,
                        excused: false,
                        last_ran: now,
                        busy: true,
                    });
                }
                if index == departure && step == 200 && world.remove(&id).is_some() {
                    queue.push(Input::ClientLeft { client: id });
                }
            }
            for (&id, client) in &mut world {
                if client.runs() {
                    client.last_ran = now;
                }
                for (&gpu, &(open, _)) in &client.gates {
                    let work = client.busy;
                    queue.push(Input::Activity { client: id, gpu, activity: Activity {
                        managed: Bytes::mib(300),
                        waiting: u32::from(work && !open),
                        busy_threads: u32::from(work && open),
                        idle_for: Nanos::seconds(9),
                        ..Activity::default()
                    }});
                }
            }
            queue.push(Input::Tick);
            let mut answers = 0;
            while let Some(input) = (!queue.is_empty()).then(|| queue.remove(0)) {
                engine.handle(now, input);
                let (outputs, next) = drain(&mut engine, now);
                deadline = next;
                for output in outputs {
                    match output {
                        Output::Grant { client, gpu, epoch, .. } => {
                            if let Some(client) = world.get_mut(&client) {
                                client.gates.insert(gpu, (true, epoch));
                            }
                            queue.push(Input::Resumed { client, gpu, epoch, moved: Bytes::ZERO, took: Nanos::ZERO });
                        }
                        Output::Revoke { client, gpu, epoch, .. } => {
                            let Some(scripted) = world.get_mut(&client) else { continue };
                            let drain = match scripted.manner {
                                Manner::Prompt => {
                                    scripted.gates.insert(gpu, (false, epoch));
                                    Drain::Done { took: Nanos::MILLI }
                                }
                                Manner::NeverDrains => {
                                    scripted.excused = true;
                                    Drain::TimedOut
                                }
                                Manner::Silent => continue,
                            };
                            answers += 1;
                            queue.push(Input::Revoked { client, gpu, epoch, drain, moved: Bytes::ZERO });
                        }
                        Output::Unresponsive { client, .. } | Output::NotRevocable { client, .. } => {
                            if let Some(client) = world.get_mut(&client) {
                                client.excused = true;
                            }
                        }
                        Output::Plan(_) => {}
                    }
                }
                prop_assert!(answers < 200, "gates flap without time passing");
            }
            // A newcomer's gate is open until it has answered; everybody has by the end of a step.
            for index in 0..GPUS {
                let gpu = GpuId([index; 16]);
                let mut running: Vec<JobId> = world
                    .values()
                    .filter(|c| c.manner == Manner::Prompt && !c.excused)
                    .filter(|c| c.gates.get(&gpu).is_some_and(|gate| gate.0))
                    // A job with a member that cannot be stopped runs beside the others.
                    .filter(|c| !world.values().any(|peer| peer.job == c.job && peer.manner != Manner::Prompt))
                    .map(|c| c.job)
                    .collect();
                running.sort();
                running.dedup();
                prop_assert!(running.len() <= 1, "{running:?} run together on {gpu} at {now}");
            }
        }
        // A turn lasts at most a quantum, a hand-over at most what a silent client's deadline takes; a job on
        // two GPUs waits for both.
        let bound = Nanos((QUANTUM.0 + 1_000_000_000) * clients.len() as u64 * 3);
        for (id, client) in &world {
            let stuck = world.values().any(|peer| peer.job == client.job && peer.manner == Manner::Silent);
            if !stuck {
                prop_assert!(now.since(client.last_ran) <= bound, "{id} last ran at {} {world:#?} {deadline:?}", client.last_ran);
            }
        }
    }

    #[test]
    fn an_engine_restored_from_its_serialised_state_goes_on_as_the_first_one(
        steps in proptest::collection::vec((0..300u64, input()), 1..80),
        at in any::<prop::sample::Index>(),
    ) {
        let at = at.index(steps.len());
        let mut first = Engine::new(Config::default());
        let mut restored: Option<Engine> = None;
        let mut now = Nanos::ZERO;
        for (index, (pause, input)) in steps.into_iter().enumerate() {
            if index == at {
                let state = serde_json::to_string(&first).unwrap();
                restored = Some(serde_json::from_str(&state).unwrap());
            }
            now += Nanos::millis(pause);
            first.handle(now, input.clone());
            let decided = drain(&mut first, now);
            if let Some(restored) = &mut restored {
                restored.handle(now, input);
                prop_assert_eq!(drain(restored, now), decided);
                prop_assert_eq!(restored.view(now), first.view(now));
            }
        }
    }

    #[test]
    fn what_one_gpu_does_is_not_changed_by_another(
        steps in proptest::collection::vec((0..300u64, input()), 1..80)
    ) {
        // Orders to all, and clients on both, tie GPUs together on purpose.
        let other = GpuId([1; 16]);
        let concerns = |input: &Input| match input {
            Input::Gpu { gpu, .. } | Input::GpuGone { gpu } | Input::ClientUses { gpu, .. }
            | Input::Activity { gpu, .. } | Input::Sample { gpu, .. } | Input::Revoked { gpu, .. }
            | Input::Resumed { gpu, .. } | Input::Moved { gpu, .. } | Input::Yielded { gpu, .. }
            | Input::Order(Order::Mode { gpu: Some(gpu), .. }) => *gpu == other,
            Input::ClientJoined { .. } | Input::ClientLeft { .. } | Input::Order(_) | Input::Tick => false,
        };
        let own_clients = |input: &Input| match input {
            // Odd clients and jobs live on the other GPU only.
            Input::ClientJoined { client, job, weight_milli, priority } => Some(Input::ClientJoined {
                client: *client, job: JobId(job.0 * 2 + client.0 % 2), weight_milli: *weight_milli, priority: *priority,
            }),
            Input::ClientUses { client, gpu } if (client.0 % 2 == 1) != (*gpu == other) => None,
            input => Some(input.clone()),
        };
        let run = |with_other: bool| {
            let mut engine = Engine::new(Config::default());
            let mut now = Nanos::ZERO;
            let mut seen = Vec::new();
            for (pause, input) in &steps {
                now += Nanos::millis(*pause);
                let Some(input) = own_clients(input) else { continue };
                let input = if !with_other && concerns(&input) { Input::Tick } else { input };
                engine.handle(now, input);
                seen.extend(drain(&mut engine, now).0.into_iter().filter(|output| match output {
                    Output::Grant { gpu, .. } | Output::Revoke { gpu, .. }
                    | Output::Unresponsive { gpu, .. } | Output::NotRevocable { gpu, .. } => *gpu != other,
                    Output::Plan(change) => change.gpu != other,
                }));
            }
            seen
        };
        prop_assert_eq!(run(true), run(false));
    }
}
