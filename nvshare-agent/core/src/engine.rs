//! The state machine. It routes each input to the GPU it concerns, and lets the plan and the schedule of the
//! GPUs that were touched draw their conclusions.
//!
//! **Invariants.** An input costs no more than the logarithm of the number of clients, unless it changes who
//! runs: figures that say the same as before touch nothing, waiting clients stand in indices, time is booked
//! when a state changes, and deadlines are kept per GPU. A change of turns looks at the clients of its GPU.

mod orders;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::{
    gpu::Gpu,
    id::{ClientId, Epoch, GpuId, JobId},
    input::{Activity, Drain, GpuSample, Input, ModeOrder},
    lease::Answered,
    member::{Changed, Member},
    output::{Mode, Output, PlanChange, Poll, View},
    quantum,
    reason::Reason,
    units::{Bytes, Nanos},
};

/// GPUs one client can use; more than any host has.
const USES_MAX: usize = 64;

/// What an administrator may set. The defaults are what most hosts want.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Share of GPU time that hand-overs may cost, in thousandths; the quantum is cost ÷ this.
    pub overhead_milli: u32,
    /// The longest quantum, also used before a hand-over was measured and its cost cannot be estimated.
    pub quantum_max: Nanos,
    /// How long a revoked client may take to answer before it is scheduled around.
    pub drain_within: Nanos,
    /// Who moves memory at a hand-over.
    pub handover: Handover,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            overhead_milli: 50,
            quantum_max: Nanos::seconds(30),
            drain_within: Nanos::seconds(5),
            handover: Handover::default(),
        }
    }
}

/// Who moves memory at a hand-over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Handover {
    /// The driver, on demand: nothing is asked of clients.
    Demand,
    /// The shim: whoever leaves moves out at most what those that come lack, and whoever comes brings back what
    /// it had when it was last revoked. Clients that cannot leave it to the driver.
    #[default]
    Shim,
}

/// A client, wherever it runs.
#[derive(Debug, Serialize, Deserialize)]
struct Client {
    job: JobId,
    weight_milli: u32,
    priority: i32,
    /// The GPUs it uses, with the last epoch of those that are gone or not known yet.
    uses: BTreeMap<GpuId, Epoch>,
}

/// The engine of all GPUs of one host.
#[derive(Debug, Serialize, Deserialize)]
pub struct Engine {
    pub(crate) config: Config,
    pub(crate) now: Nanos,
    pub(crate) gpus: BTreeMap<GpuId, Gpu>,
    /// The known GPUs of each job.
    pub(crate) jobs: BTreeMap<JobId, BTreeSet<GpuId>>,
    pub(crate) outbox: VecDeque<Output>,
    /// A quantum fixed by the operator.
    pub(crate) fixed_quantum: Option<Nanos>,
    /// GPUs whose schedule must be looked at.
    pub(crate) touched: BTreeSet<GpuId>,
    /// When GPUs must be looked at again, soonest first.
    pub(crate) wakes: BTreeSet<(Nanos, GpuId)>,
    clients: BTreeMap<ClientId, Client>,
    /// The mode ordered for every GPU, also those to come.
    default_order: ModeOrder,
}

impl Engine {
    /// An engine that knows no GPU and no client yet.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            now: Nanos::ZERO,
            gpus: BTreeMap::new(),
            jobs: BTreeMap::new(),
            outbox: VecDeque::new(),
            fixed_quantum: None,
            touched: BTreeSet::new(),
            wakes: BTreeSet::new(),
            clients: BTreeMap::new(),
            default_order: ModeOrder::Auto,
        }
    }

    /// Takes in one fact that became known at `at`. Times must not run backwards; an earlier one counts as
    /// the latest seen. What names an unknown client or GPU, or answers an epoch that is not in force, is
    /// ignored.
    pub fn handle(&mut self, at: Nanos, input: Input) {
        debug_assert!(self.outbox.is_empty(), "poll() was not drained before the next input");
        self.now = self.now.max(at);
        self.take_in(input);
        self.wake();
        self.schedule();
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Poll {
        self.outbox.pop_front().map_or_else(|| Poll::Wait(self.next_deadline()), Poll::Emit)
    }

    /// What is to be seen of the engine at `at`.
    pub fn view(&self, at: Nanos) -> View {
        let view = |(&id, gpu): (&GpuId, &Gpu)| gpu.view(id, at, &self.config, self.fixed_quantum);
        View { gpus: self.gpus.iter().map(view).collect() }
    }

    fn take_in(&mut self, input: Input) {
        match input {
            Input::Gpu { gpu, capacity, link_rate } => self.gpu_found(gpu, capacity, link_rate),
            Input::GpuGone { gpu } => self.gpu_gone(gpu),
            Input::ClientJoined { client, job, weight_milli, priority } => {
                let uses = BTreeMap::new();
                self.clients.entry(client).or_insert(Client { job, weight_milli, priority, uses });
            }
            Input::ClientUses { client, gpu } => self.client_uses(client, gpu),
            Input::ClientLeft { client } => self.client_left(client),
            Input::Activity { client, gpu, activity } => self.activity(client, gpu, &activity),
            Input::Sample { gpu, sample } => self.sample(gpu, &sample),
            Input::Revoked { client, gpu, epoch, drain, moved } => {
                self.revoked(client, gpu, epoch, drain, moved);
            }
            Input::Resumed { client, gpu: id, epoch, moved, took: _ } => {
                let Some(gpu) = self.gpus.get_mut(&id) else { return };
                let Some(member) = gpu.members.get_mut(&client) else { return };
                if member.lease.resumed(epoch) {
                    member.refaults.note_own_move_in(moved);
                    member.rhythm.restored(self.now);
                    gpu.rotation.note_own_move(moved, Bytes::ZERO);
                }
            }
            Input::Moved { client, gpu: id, epoch, bytes_in, bytes_out: _, took } => {
                let member = self.gpus.get_mut(&id).and_then(|gpu| gpu.members.get_mut(&client));
                if let Some(member) = member
                    && member.lease.epoch() == epoch
                    && bytes_in > Bytes::ZERO
                {
                    // Everybody's turns follow from what one client says here, so it must not make them longer than the longest.
                    member.cost.brought_back(self.now, took.min(quantum::dearest(self.config.quantum_max)));
                }
            }
            Input::Yielded { client, gpu: id, epoch } => {
                let now = self.now;
                let Some(gpu) = self.gpus.get_mut(&id) else { return };
                let Some(member) = gpu.members.get_mut(&client) else { return };
                if member.lease.is_open() && member.lease.epoch() == epoch {
                    member.give_away(now);
                    let job = member.job;
                    self.reindex(job);
                    self.touched.insert(id);
                }
            }
            Input::Order(order) => self.ordered(&order),
            Input::Tick => {}
        }
    }

    fn activity(&mut self, client: ClientId, id: GpuId, activity: &Activity) {
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        let Some(member) = gpu.members.get_mut(&client) else { return };
        let (job, before) = (member.job, (member.managed, member.footprint()));
        let Changed { demand, memory } = member.activity(self.now, activity);
        if memory {
            let now = (member.managed, member.footprint());
            gpu.memory_changed(job, before, now);
            self.touched.insert(id);
        }
        if demand {
            self.reindex(job);
        }
    }

    fn sample(&mut self, id: GpuId, sample: &GpuSample) {
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        gpu.sample(self.now, sample);
        if gpu.order != ModeOrder::Auto {
            return;
        }
        if !gpu.plan.takes_turns() {
            if let Some(reason) = gpu.thrash(self.now, &self.config) {
                gpu.plan.alarm(self.now);
                self.began_turns(id, reason);
            }
            return;
        }
        let moved = gpu.rotation.brought();
        if gpu.plan.telling(moved, gpu.capacity) {
            let from = gpu.plan.mode(gpu.has_sets());
            self.announce(id, from, Reason::ThrashConfirmed { moved });
            self.touched.insert(id);
        }
        self.press_again(id);
        self.watch_set(id);
    }

    fn gpu_found(&mut self, id: GpuId, capacity: Bytes, link_rate: Bytes) {
        self.touched.insert(id);
        if let Some(gpu) = self.gpus.get_mut(&id) {
            gpu.capacity = capacity;
            gpu.link_rate = link_rate;
            return;
        }
        let gpu = Gpu::new(self.now, capacity, link_rate, self.default_order, self.config.handover);
        self.gpus.insert(id, gpu);
        let users: Vec<ClientId> = self
            .clients
            .iter()
            .filter(|(_, client)| client.uses.contains_key(&id))
            .map(|(&id, _)| id)
            .collect();
        for client in users {
            self.add_member(client, id);
        }
        self.apply_order(id);
    }

    /// Whoever is held back gets an open gate, so that it meets the driver's error instead of waiting.
    fn gpu_gone(&mut self, id: GpuId) {
        let Some(mut gpu) = self.gpus.remove(&id) else { return };
        for client in gpu.gates.shut.clone() {
            if let Some(epoch) = gpu.grant(client, self.now, Nanos::ZERO, None) {
                self.outbox.push_back(Output::Grant { client, gpu: id, epoch, prefetch: Bytes::ZERO });
            }
        }
        for (client, member) in &gpu.members {
            if let Some(client) = self.clients.get_mut(client) {
                client.uses.insert(id, member.lease.epoch());
            }
        }
        if let Some(at) = gpu.wake {
            self.wakes.remove(&(at, id));
        }
        for &job in gpu.jobs.keys() {
            self.job_left(job, id);
        }
    }

    fn client_uses(&mut self, id: ClientId, gpu: GpuId) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if client.uses.contains_key(&gpu) || client.uses.len() >= USES_MAX {
            return;
        }
        client.uses.insert(gpu, Epoch::default());
        self.add_member(id, gpu);
    }

    /// Makes a client that uses a GPU one of its members, if the GPU is known.
    fn add_member(&mut self, id: ClientId, on: GpuId) {
        let Some(Client { job, weight_milli, priority, uses }) = self.clients.get(&id) else { return };
        let (job, several) = (*job, uses.len() > 1);
        let epoch = uses.get(&on).copied().unwrap_or_default();
        let Some(gpu) = self.gpus.get_mut(&on) else { return };
        let mut member = Member::new(self.now, job, *weight_milli, *priority, epoch);
        member.lease.set_newcomer(gpu.plan.takes_turns());
        gpu.add(id, member);
        if several {
            for used in uses.keys() {
                if let Some(member) = self.gpus.get_mut(used).and_then(|gpu| gpu.members.get_mut(&id)) {
                    member.several_gpus = true;
                }
            }
        }
        self.jobs.entry(job).or_default().insert(on);
        self.isolate_gang(job);
        self.touched.insert(on);
        self.reindex(job);
    }

    fn job_left(&mut self, job: JobId, gpu: GpuId) {
        if let Some(gpus) = self.jobs.get_mut(&job) {
            gpus.remove(&gpu);
            if gpus.is_empty() {
                self.jobs.remove(&job);
            }
        }
        self.reindex(job);
    }

    fn client_left(&mut self, id: ClientId) {
        let Some(client) = self.clients.remove(&id) else { return };
        for on in client.uses.keys() {
            let Some(gpu) = self.gpus.get_mut(on) else { continue };
            self.touched.insert(*on);
            if gpu.remove(id) {
                self.job_left(client.job, *on);
            }
        }
        self.reindex(client.job);
    }

    fn revoked(&mut self, client: ClientId, id: GpuId, epoch: Epoch, drain: Drain, moved: Bytes) {
        let within = self.config.drain_within;
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        let Some(job) = gpu.members.get(&client).map(|member| member.job) else { return };
        match gpu.answer(client, self.now, epoch, drain) {
            Answered::Stale => return,
            Answered::Drained => {
                let took = if let Drain::Done { took } = drain { took } else { Nanos::ZERO };
                // What a client says of its drain is believed up to what the drain may take.
                let took = took.min(within);
                gpu.last_drain = gpu.last_drain.max(took);
                gpu.account.drained(took);
                let weight = gpu.weight(job);
                gpu.rotation.charge(&[(job, weight)], took);
                gpu.rotation.note_own_move(Bytes::ZERO, moved);
                if let Some(member) = gpu.members.get_mut(&client) {
                    member.refaults.note_own_move_out(moved);
                }
            }
            Answered::Failed { gave_up } => {
                if gave_up {
                    self.outbox.push_back(Output::NotRevocable { client, gpu: id });
                }
            }
        }
        self.touched.insert(id);
        self.reindex(job);
    }

    pub(crate) fn began_turns(&mut self, id: GpuId, reason: Reason) {
        let now = self.now;
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        gpu.begin_turns(now);
        let first_refault =
            if let Reason::Thrash { first_refault, .. } = reason { Some(first_refault) } else { None };
        gpu.account.began_turns(first_refault);
        let jobs: Vec<JobId> = gpu.jobs.keys().copied().collect();
        for job in jobs {
            self.isolate_gang(job);
            self.reindex(job);
        }
        self.touched.insert(id);
        self.announce(id, Mode::Shared, reason);
    }

    pub(crate) fn ended_turns(&mut self, id: GpuId, from: Mode, reason: Reason) {
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        gpu.end_turns();
        gpu.account.ended_turns();
        let jobs: Vec<JobId> = gpu.jobs.keys().copied().collect();
        for job in jobs {
            self.reindex(job);
        }
        self.touched.insert(id);
        self.announce(id, from, reason);
    }

    /// Tells of a change of plan that has been made.
    pub(crate) fn announce(&mut self, id: GpuId, from: Mode, reason: Reason) {
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        let to = gpu.plan.mode(gpu.has_sets());
        let change = PlanChange { at: self.now, gpu: id, from, to, reason, sets: gpu.client_sets() };
        gpu.last_change = Some(change.clone());
        self.outbox.push_back(Output::Plan(change));
    }
}
