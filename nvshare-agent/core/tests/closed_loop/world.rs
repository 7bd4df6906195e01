//! A GPU in a few lines: 2 MiB blocks in one first-in-first-out list over all clients, one serial fault
//! service, byte counters per bin. It drives the real engine with what the agent would tell it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use nvshare_core::{
    Activity, Bytes, ClientId, ClientSample, Config, Drain, Engine, Epoch, GpuId, GpuSample, Input, JobId,
    Nanos, Output, PlanChange, Poll,
};

const STEP: Nanos = Nanos::millis(10);
const BIN: Nanos = Nanos::millis(100);
/// Resident blocks that one client alone touches in a step.
const TOUCHES: u64 = 200;
/// What the fault service spends on a block, in microseconds: first touch, return, and eviction for either.
const FILL_US: u64 = 100;
const FETCH_US: u64 = 300;
const EVICT_US: u64 = 150;
pub(crate) const CAPACITY_BLOCKS: u64 = 512;

/// What a client does with its memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Access {
    /// Sweeps over this many blocks again and again.
    Cyclic(u64),
    /// Touches every block once.
    Stream,
}

/// How a client meets revocations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Manner {
    Prompt,
    Silent,
    TimesOut,
}

#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) access: Access,
    pub(crate) allocated_blocks: u64,
    pub(crate) gpus: Vec<GpuId>,
    pub(crate) job: JobId,
    pub(crate) weight_milli: u32,
    pub(crate) manner: Manner,
    /// Has work to do.
    pub(crate) busy: bool,
    /// Blocks touched since the start.
    pub(crate) progress: u64,
    pub(crate) gates: BTreeMap<GpuId, (bool, Option<Epoch>)>,
}

impl Client {
    pub(crate) fn new(gpu: GpuId, access: Access, allocated_blocks: u64) -> Self {
        Self {
            access,
            allocated_blocks,
            gpus: vec![gpu],
            job: JobId(0),
            weight_milli: 1000,
            manner: Manner::Prompt,
            busy: true,
            progress: 0,
            gates: BTreeMap::new(),
        }
    }

    pub(crate) fn open(&self, gpu: GpuId) -> bool {
        self.gates.get(&gpu).is_some_and(|gate| gate.0)
    }

    /// A client on several GPUs computes only while it may on all of them.
    pub(crate) fn runs(&self) -> bool {
        self.busy && self.gpus.iter().all(|&gpu| self.open(gpu))
    }
}

#[derive(Debug, Default)]
struct Card {
    fifo: VecDeque<(ClientId, u64)>,
    resident: BTreeSet<(ClientId, u64)>,
    evicted: BTreeSet<(ClientId, u64)>,
    busy_us: u64,
    blocks_in: BTreeMap<ClientId, u64>,
    blocks_out: BTreeMap<ClientId, u64>,
    refault_at: Option<Nanos>,
}

pub(crate) struct World {
    pub(crate) now: Nanos,
    pub(crate) engine: Engine,
    pub(crate) clients: BTreeMap<ClientId, Client>,
    pub(crate) changes: Vec<PlanChange>,
    pub(crate) outputs: Vec<Output>,
    pub(crate) inputs: Vec<(Nanos, Input)>,
    cards: BTreeMap<GpuId, Card>,
    /// Which sensors there are.
    pub(crate) counters: bool,
    pub(crate) fault_thread: bool,
    deadline: Option<Nanos>,
    next_client: u64,
}

pub(crate) fn gpu(index: u8) -> GpuId {
    GpuId([index; 16])
}

impl World {
    pub(crate) fn new(gpus: u8) -> Self {
        let mut world = Self {
            now: Nanos::ZERO,
            engine: Engine::new(Config::default()),
            clients: BTreeMap::new(),
            changes: Vec::new(),
            outputs: Vec::new(),
            inputs: Vec::new(),
            cards: BTreeMap::new(),
            counters: true,
            fault_thread: true,
            deadline: None,
            next_client: 1,
        };
        for index in 0..gpus {
            world.cards.insert(gpu(index), Card::default());
            world.tell(Input::Gpu {
                gpu: gpu(index),
                capacity: Bytes(CAPACITY_BLOCKS * Bytes::BLOCK.0),
                link_rate: Bytes::gib(10),
            });
        }
        world
    }

    /// Adds a client; job 0 means a job of its own.
    pub(crate) fn join(&mut self, mut client: Client) -> ClientId {
        let id = ClientId(self.next_client);
        self.next_client += 1;
        if client.job == JobId(0) {
            client.job = JobId(id.0);
        }
        let (job, weight_milli) = (client.job, client.weight_milli);
        let gpus = client.gpus.clone();
        client.gates = gpus.iter().map(|&gpu| (gpu, (true, None))).collect();
        self.clients.insert(id, client);
        self.tell(Input::ClientJoined { client: id, job, weight_milli, priority: 0 });
        for gpu in gpus {
            self.tell(Input::ClientUses { client: id, gpu });
        }
        id
    }

    pub(crate) fn leave(&mut self, id: ClientId) {
        self.clients.remove(&id);
        for card in self.cards.values_mut() {
            card.fifo.retain(|(client, _)| *client != id);
            card.resident.retain(|(client, _)| *client != id);
            card.evicted.retain(|(client, _)| *client != id);
            card.blocks_in.remove(&id);
            card.blocks_out.remove(&id);
        }
        self.tell(Input::ClientLeft { client: id });
    }

    /// When a block that had been evicted first came back.
    pub(crate) fn first_refault(&self, gpu: GpuId) -> Option<Nanos> {
        self.cards[&gpu].refault_at
    }

    pub(crate) fn tell(&mut self, input: Input) {
        self.inputs.push((self.now, input.clone()));
        self.engine.handle(self.now, input);
        let mut granted = Vec::new();
        loop {
            match self.engine.poll() {
                Poll::Wait(deadline) => {
                    assert!(deadline.is_none_or(|at| at > self.now), "a deadline that is past");
                    self.deadline = deadline;
                    break;
                }
                Poll::Emit(output) => {
                    self.outputs.push(output.clone());
                    match output {
                        Output::Grant { client, gpu, epoch, .. } => granted.push((client, gpu, epoch)),
                        Output::Revoke { client, gpu, epoch, .. } => {
                            if let Some(gate) =
                                self.clients.get_mut(&client).and_then(|c| c.gates.get_mut(&gpu))
                            {
                                gate.1 = Some(epoch);
                            }
                        }
                        Output::Plan(change) => self.changes.push(change),
                        Output::Unresponsive { .. } | Output::NotRevocable { .. } => {}
                    }
                }
            }
        }
        for (client, gpu, epoch) in granted {
            if let Some(gate) = self.clients.get_mut(&client).and_then(|c| c.gates.get_mut(&gpu)) {
                *gate = (true, None);
                self.tell(Input::Resumed { client, gpu, epoch, moved: Bytes::ZERO, took: Nanos::ZERO });
            }
        }
    }

    pub(crate) fn run_until(&mut self, end: Nanos, mut stop: impl FnMut(&mut Self) -> bool) {
        while self.now < end && !stop(self) {
            self.now += STEP;
            self.answer_revocations();
            let gpus: Vec<GpuId> = self.cards.keys().copied().collect();
            for gpu in gpus {
                self.compute(gpu);
            }
            if self.now.0.is_multiple_of(BIN.0) {
                self.close_bin();
            }
            if self.deadline.is_some_and(|at| at <= self.now) {
                self.tell(Input::Tick);
            }
        }
    }

    pub(crate) fn run_for(&mut self, time: Nanos) {
        self.run_until(self.now + time, |_| false);
    }

    fn answer_revocations(&mut self) {
        let mut answers = Vec::new();
        for (&id, client) in self.clients.iter_mut().filter(|(_, client)| client.manner != Manner::Silent) {
            for (&gpu, gate) in &mut client.gates {
                let Some(epoch) = gate.1.take() else { continue };
                gate.0 = client.manner == Manner::TimesOut;
                let drain = if gate.0 { Drain::TimedOut } else { Drain::Done { took: STEP } };
                answers.push(Input::Revoked { client: id, gpu, epoch, drain, moved: Bytes::ZERO });
            }
        }
        for answer in answers {
            self.tell(answer);
        }
    }

    fn compute(&mut self, gpu: GpuId) {
        let running: Vec<ClientId> = self
            .clients
            .iter()
            .filter(|(_, client)| client.gpus.contains(&gpu) && client.runs())
            .map(|(&id, _)| id)
            .collect();
        let share = TOUCHES / (running.len() as u64).max(1);
        let mut touches: BTreeMap<ClientId, u64> = running.iter().map(|&id| (id, share)).collect();
        let mut budget_us = STEP.0 / 1000;
        let Some(card) = self.cards.get_mut(&gpu) else { return };
        // Blocks of all clients in turn, as the fault buffer holds them.
        while !touches.is_empty() {
            touches.retain(|id, left| {
                let Some(client) = self.clients.get_mut(id) else { return false };
                let block = match client.access {
                    Access::Cyclic(blocks) => client.progress % blocks,
                    Access::Stream => client.progress,
                };
                if block >= client.allocated_blocks {
                    client.busy = false;
                    return false;
                }
                let key = (*id, block);
                if !card.resident.contains(&key) {
                    let back = card.evicted.contains(&key);
                    let full = card.resident.len() as u64 >= CAPACITY_BLOCKS;
                    let cost = if back { FETCH_US } else { FILL_US } + if full { EVICT_US } else { 0 };
                    let Some(rest) = budget_us.checked_sub(cost) else { return false };
                    budget_us = rest;
                    card.busy_us += cost;
                    if full && let Some(victim) = card.fifo.pop_front() {
                        card.resident.remove(&victim);
                        card.evicted.insert(victim);
                        *card.blocks_out.entry(victim.0).or_default() += 1;
                    }
                    if card.evicted.remove(&key) {
                        *card.blocks_in.entry(*id).or_default() += 1;
                        card.refault_at.get_or_insert(self.now);
                    }
                    card.resident.insert(key);
                    card.fifo.push_back(key);
                }
                client.progress += 1;
                *left -= 1;
                *left > 0
            });
        }
    }

    fn close_bin(&mut self) {
        let gpus: Vec<GpuId> = self.cards.keys().copied().collect();
        for gpu in gpus {
            let Some(card) = self.cards.get_mut(&gpu) else { continue };
            let mut take = |of: fn(&mut Card) -> &mut BTreeMap<ClientId, u64>| std::mem::take(of(card));
            let (ins, outs) = (take(|card| &mut card.blocks_in), take(|card| &mut card.blocks_out));
            let busy = Nanos(std::mem::take(&mut card.busy_us) * 1000);
            let counters = self.counters;
            let bytes = |of: &BTreeMap<ClientId, u64>, id: &ClientId| {
                counters.then(|| Bytes(of.get(id).copied().unwrap_or(0) * Bytes::BLOCK.0))
            };
            let mut sample = GpuSample {
                interval: BIN,
                fault_busy: self.fault_thread.then_some(busy),
                clients: Vec::new(),
            };
            let mut activities = Vec::new();
            for (&id, client) in self.clients.iter().filter(|(_, client)| client.gpus.contains(&gpu)) {
                let open = client.open(gpu);
                activities.push((
                    id,
                    Activity {
                        managed: Bytes(client.allocated_blocks * Bytes::BLOCK.0),
                        calls: u64::from(client.runs()),
                        waiting: u32::from(client.busy && !open),
                        busy_threads: u32::from(client.runs()),
                        idle_for: if client.runs() { Nanos::ZERO } else { Nanos::seconds(9) },
                        ..Activity::default()
                    },
                ));
                sample.clients.push((
                    id,
                    ClientSample {
                        bytes_in: bytes(&ins, &id),
                        bytes_out: bytes(&outs, &id),
                        cpu_faults: Some(0),
                        ..ClientSample::default()
                    },
                ));
            }
            for (client, activity) in activities {
                self.tell(Input::Activity { client, gpu, activity });
            }
            self.tell(Input::Sample { gpu, sample });
        }
    }
}
