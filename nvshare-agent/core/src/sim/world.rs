//! The machine: GPUs and clients over simulated time, apart from who decides.
//!
//! **Approach.** Discrete events in integer nanoseconds. Between two events every client that computes gets an
//! equal share of each of its GPUs (the driver's round robin, in the limit of short slices); a client that
//! waits for memory takes no share. Events are: a client's next miss, end of burst or phase, a round of fault
//! service, a chunk of a hand-over, the end of a drain. What happened is told as the engine's inputs.
//!
//! **Invariants.** GPU time handed out never exceeds the time that passes; residency never exceeds capacity;
//! the same scenario and seed give the same run.

use std::collections::VecDeque;

use crate::{
    id::{ClientId, GpuId, JobId},
    input::{self, Input},
    sim::{
        access::Cursor,
        blocks::Blocks,
        card::Card,
        fault::FaultService,
        mover::Mover,
        process::{Gate, Process, Seat, State, Tally},
        rng::Rng,
        scenario::Scenario,
    },
    units::{Bytes, Nanos},
};

/// Refaults further apart than this do not belong to one episode.
const EPISODE_GAP: Nanos = Nanos::seconds(2);

/// How memory moves at a hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// By the driver, on demand.
    Demand,
    /// By `cuMemPrefetchAsync`.
    Prefetch,
    /// By `cuMemPrefetchAsync` while it is write-protected.
    Protected,
}

/// When curable refaults began, on one GPU.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Episode {
    pub(crate) began: Option<Nanos>,
    last: Nanos,
}

/// Everything but who decides.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) now: Nanos,
    pub(crate) cards: Vec<Card>,
    pub(crate) services: Vec<FaultService>,
    pub(crate) movers: Vec<Mover>,
    pub(crate) episodes: Vec<Episode>,
    pub(crate) processes: Vec<Process>,
    /// Who has started and not ended.
    pub(crate) alive: Vec<usize>,
    /// What happened, for whoever decides.
    pub(crate) news: VecDeque<Input>,
    /// Clients that came to a closed gate, began to idle, or entered another phase.
    pub(crate) requests: Vec<usize>,
    pub(crate) handover: Engine,
    pub(crate) rng: Rng,
    /// GPU work of all clients when the last one finished.
    pub(crate) work_at_last_finish: f64,
    pub(crate) last_finish: Option<Nanos>,
}

pub(crate) fn client_id(process: usize) -> ClientId {
    ClientId(process as u64 + 1)
}

/// UUIDs in the order of the indices.
pub(crate) fn gpu_id(gpu: usize) -> GpuId {
    let mut id = [0; 16];
    id[15] = gpu as u8 + 1;
    GpuId(id)
}

pub(crate) fn process_of(client: ClientId) -> usize {
    (client.0 as usize).wrapping_sub(1)
}

pub(crate) fn gpu_of(id: GpuId) -> usize {
    usize::from(id.0[15]).wrapping_sub(1)
}

impl World {
    pub(crate) fn new(scenario: &Scenario, handover: Engine, seed: u64) -> Self {
        let gpus = scenario.gpus.len();
        Self {
            now: Nanos::ZERO,
            cards: scenario.gpus.iter().cloned().map(Card::new).collect(),
            services: vec![FaultService::default(); gpus],
            movers: vec![Mover::default(); gpus],
            episodes: vec![Episode::default(); gpus],
            processes: scenario.clients.iter().cloned().map(Process::new).collect(),
            alive: Vec::new(),
            news: VecDeque::new(),
            requests: Vec::new(),
            handover,
            rng: Rng::new(seed),
            work_at_last_finish: 0.0,
            last_finish: None,
        }
    }

    /// What an agent learns of a GPU.
    pub(crate) fn describe_gpu(&self, gpu: usize) -> Input {
        let card = &self.cards[gpu];
        Input::Gpu {
            gpu: gpu_id(gpu),
            capacity: Bytes(u64::from(card.capacity()) * Bytes::BLOCK.0),
            link_rate: card.model.link,
        }
    }

    /// What an agent learns of a client that connects.
    pub(crate) fn describe_client(&self, index: usize) -> Vec<Input> {
        let process = &self.processes[index];
        if !process.spec.shim {
            return Vec::new();
        }
        let client = client_id(index);
        let (weight_milli, priority) = (process.weight_milli, process.spec.priority);
        let joined = Input::ClientJoined { client, job: JobId(client.0), weight_milli, priority };
        let uses = process.spec.gpus.iter().map(|&gpu| Input::ClientUses { client, gpu: gpu_id(gpu) });
        std::iter::once(joined).chain(uses).collect()
    }

    /// When the next thing happens by itself.
    pub(crate) fn next_event(&self) -> Option<Nanos> {
        let mut next = u64::MAX;
        for service in &self.services {
            next = next.min(service.due().map_or(u64::MAX, |at| at.0));
        }
        for mover in &self.movers {
            next = next.min(mover.due().map_or(u64::MAX, |at| at.0));
        }
        for &index in &self.alive {
            let process = &self.processes[index];
            match process.state {
                State::Cpu { until } => next = next.min(until.0),
                State::Runs => {
                    let left = (process.stop_at() - process.work).max(0.0) * self.sharing(process);
                    next = next.min(self.now.0.saturating_add(left.ceil() as u64));
                }
                _ => {}
            }
            for seat in &process.seats {
                if let Gate::Draining { deadline, .. } = seat.gate {
                    next = next.min(deadline.0);
                }
            }
        }
        (next != u64::MAX).then_some(Nanos(next))
    }

    /// Lets time pass; nothing may be due before `to`.
    pub(crate) fn advance(&mut self, to: Nanos) {
        let elapsed = to.since(self.now);
        self.now = to;
        if elapsed == Nanos::ZERO {
            return;
        }
        for index in 0..self.alive.len() {
            let index = self.alive[index];
            match self.processes[index].state {
                State::Runs => {
                    let sharing = self.sharing(&self.processes[index]);
                    let process = &mut self.processes[index];
                    process.work += elapsed.0 as f64 / sharing;
                    process.last_used = to;
                }
                State::Stalled => {
                    self.processes[index].stalled += elapsed;
                    self.processes[index].last_used = to;
                }
                State::Gated => self.processes[index].waited += elapsed,
                _ => {}
            }
        }
        for service in &mut self.services {
            service.pass(elapsed);
        }
    }

    /// Does all that is due now.
    pub(crate) fn settle(&mut self) {
        for gpu in 0..self.cards.len() {
            self.settle_faults(gpu);
            self.settle_moves(gpu);
        }
        for at in 0..self.alive.len() {
            let index = self.alive[at];
            self.settle_deadlines(index);
            if let State::Cpu { until } = self.processes[index].state
                && until <= self.now
            {
                self.begin_gpu_work(index);
            }
            self.settle_work(index);
        }
        let processes = &self.processes;
        self.alive.retain(|&index| processes[index].alive());
    }

    /// How many share the GPU that the client shares with most.
    fn sharing(&self, process: &Process) -> f64 {
        let shares = process.seats.iter().map(|seat| self.cards[seat.gpu].running).max();
        f64::from(shares.unwrap_or(1).max(1))
    }

    pub(crate) fn set_state(&mut self, index: usize, state: State) {
        let process = &mut self.processes[index];
        let (was, is) = (process.state == State::Runs, state == State::Runs);
        if state == State::Gated && process.state != State::Gated {
            process.waiting_since = self.now;
            self.requests.push(index);
        }
        if process.state == State::Gated && state != State::Gated {
            process.waits.push(self.now.since(process.waiting_since));
        }
        if matches!(state, State::Cpu { .. }) {
            self.requests.push(index);
        }
        process.state = state;
        if was != is {
            for seat in &self.processes[index].seats {
                let running = &mut self.cards[seat.gpu].running;
                *running = if is { *running + 1 } else { *running - 1 };
            }
        }
    }

    /// A client starts.
    pub(crate) fn start(&mut self, index: usize) {
        if self.processes[index].state != State::Absent {
            return;
        }
        let (blocks, shim) = (self.processes[index].blocks(), self.processes[index].spec.shim);
        for gpu in self.processes[index].spec.gpus.clone() {
            let managed = if shim { blocks } else { 0 };
            let seat = Seat {
                gpu,
                base: self.cards[gpu].add_space(index as u32, managed),
                resident: Blocks::new(managed),
                populated: Blocks::new(managed),
                hosted: Blocks::new(managed),
                left: Vec::new(),
                cursor: Cursor::none(),
                gate: Gate::Open,
                tally: Tally::default(),
            };
            self.processes[index].seats.push(seat);
            if !shim {
                self.cards[gpu].plain += blocks;
                self.make_room(gpu, 0, None);
                let told = self.describe_gpu(gpu);
                self.news.push_back(told);
            }
        }
        self.processes[index].work_before = self.gpu_time();
        self.processes[index].last_used = self.now;
        self.alive.push(index);
        let told = self.describe_client(index);
        self.news.extend(told);
        self.enter_phase(index);
        self.begin_burst(index);
    }

    /// GPU time of all clients so far.
    pub(crate) fn gpu_time(&self) -> f64 {
        self.processes.iter().map(Process::gpu_time).sum()
    }

    /// The client is gone, and with it all it held.
    pub(crate) fn end(&mut self, index: usize, state: State) {
        if !self.processes[index].alive() {
            if self.processes[index].state == State::Absent {
                self.processes[index].state = state;
            }
            return;
        }
        self.set_state(index, state);
        let (blocks, shim) = (self.processes[index].blocks(), self.processes[index].spec.shim);
        for seat in std::mem::take(&mut self.processes[index].seats) {
            for block in seat.resident.iter() {
                self.cards[seat.gpu].remove(seat.base + block);
            }
            self.movers[seat.gpu].forget(index);
            if !shim {
                self.cards[seat.gpu].plain -= blocks;
                let told = self.describe_gpu(seat.gpu);
                self.news.push_back(told);
            }
        }
        if shim {
            self.news.push_back(Input::ClientLeft { client: client_id(index) });
        }
    }

    /// The operator gives a client another share.
    pub(crate) fn set_weight(&mut self, index: usize, weight_milli: u32) {
        self.processes[index].weight_milli = weight_milli;
        self.news.push_back(Input::Order(input::Order::Weight { client: client_id(index), weight_milli }));
    }

    /// Notes a refault that turns would have avoided.
    pub(crate) fn note_curable(&mut self, gpu: usize) {
        let sharers = self.alive.iter().filter(|&&index| {
            let process = &self.processes[index];
            process.spec.shim && process.seats.iter().any(|seat| seat.gpu == gpu)
        });
        if sharers.count() < 2 {
            return;
        }
        let episode = &mut self.episodes[gpu];
        if episode.began.is_none() || self.now.since(episode.last) > EPISODE_GAP {
            episode.began = Some(self.now);
        }
        episode.last = self.now;
    }
}
