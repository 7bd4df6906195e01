//! The state machine. It books time, routes each input to the GPU it concerns, and lets the plan and the
//! schedule draw their conclusions.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::{
    gpu::Gpu,
    id::{ClientId, Epoch, GpuId, JobId},
    input::{Drain, Input, ModeOrder, Order},
    lease::Answered,
    member::Member,
    output::{Mode, Output, PlanChange, Poll, Reason, View},
    plan::Stage,
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
    #[default]
    Demand,
    /// The shim: whoever leaves moves out at most what those that come lack, and whoever comes brings back what
    /// it had when it was last revoked.
    Shim,
}

/// A client, wherever it runs.
#[derive(Debug)]
struct Client {
    job: JobId,
    weight_milli: u32,
    priority: i32,
    /// The GPUs it uses, with the last epoch of those that are gone or not known yet.
    uses: BTreeMap<GpuId, Epoch>,
}

/// The engine of all GPUs of one host.
#[derive(Debug)]
pub struct Engine {
    pub(crate) config: Config,
    pub(crate) now: Nanos,
    pub(crate) gpus: BTreeMap<GpuId, Gpu>,
    pub(crate) outbox: VecDeque<Output>,
    /// A quantum fixed by the operator.
    pub(crate) fixed_quantum: Option<Nanos>,
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
            outbox: VecDeque::new(),
            fixed_quantum: None,
            clients: BTreeMap::new(),
            default_order: ModeOrder::Auto,
        }
    }

    /// Takes in one fact that became known at `at`. Times must not run backwards; an earlier one counts as
    /// the latest seen. What names an unknown client or GPU, or answers an epoch that is not in force, is
    /// ignored.
    pub fn handle(&mut self, at: Nanos, input: Input) {
        debug_assert!(self.outbox.is_empty(), "poll() was not drained before the next input");
        let elapsed = at.since(self.now);
        self.now = self.now.max(at);
        for gpu in self.gpus.values_mut() {
            gpu.advance(elapsed);
        }
        self.take_in(input);
        self.relieve();
        self.schedule();
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Poll {
        self.outbox.pop_front().map_or_else(|| Poll::Wait(self.next_deadline()), Poll::Emit)
    }

    /// What is to be seen of the engine at `at`.
    pub fn view(&self, at: Nanos) -> View {
        let elapsed = at.since(self.now);
        let view =
            |(&id, gpu): (&GpuId, &Gpu)| gpu.view(id, gpu.quantum(&self.config, self.fixed_quantum), elapsed);
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
            Input::Activity { client, gpu, activity } => {
                let now = self.now;
                if let Some(member) = self.member_mut(client, gpu) {
                    member.activity(now, &activity);
                }
            }
            Input::Sample { gpu: id, sample } => {
                let Some(gpu) = self.gpus.get_mut(&id) else { return };
                gpu.sample(self.now, &sample);
                if gpu.order == ModeOrder::Auto
                    && !gpu.plan.takes_turns()
                    && let Some(reason) = gpu.thrash(self.now)
                {
                    gpu.plan.alarm(self.now);
                    self.began_turns(id, reason);
                }
            }
            Input::Revoked { client, gpu, epoch, drain, moved } => {
                self.revoked(client, gpu, epoch, drain, moved);
            }
            Input::Resumed { client, gpu: id, epoch, moved, took: _ } => {
                let Some(gpu) = self.gpus.get_mut(&id) else { return };
                let Some(member) = gpu.members.get_mut(&client) else { return };
                if member.lease.resumed(epoch) {
                    member.refaults.note_own_move_in(moved);
                    gpu.rotation.note_own_move(moved, Bytes::ZERO);
                }
            }
            Input::Yielded { client, gpu, epoch } => {
                let now = self.now;
                if let Some(member) = self.member_mut(client, gpu)
                    && member.lease.is_open()
                    && member.lease.epoch() == epoch
                {
                    member.give_away(now);
                }
            }
            Input::Order(order) => self.ordered(&order),
            Input::Tick => {}
        }
    }

    fn member_mut(&mut self, client: ClientId, gpu: GpuId) -> Option<&mut Member> {
        self.gpus.get_mut(&gpu)?.members.get_mut(&client)
    }

    fn gpu_found(&mut self, id: GpuId, capacity: Bytes, link_rate: Bytes) {
        if let Some(gpu) = self.gpus.get_mut(&id) {
            gpu.capacity = capacity;
            gpu.link_rate = link_rate;
            return;
        }
        let mut gpu = Gpu::new(self.now, capacity, link_rate, self.default_order);
        for (&id_of, client) in &self.clients {
            if let Some(&epoch) = client.uses.get(&id) {
                let Client { job, weight_milli, priority, .. } = *client;
                gpu.members.insert(id_of, Member::new(self.now, job, weight_milli, priority, epoch));
            }
        }
        self.gpus.insert(id, gpu);
        self.apply_order(id);
    }

    /// Whoever is held back gets an open gate, so that it meets the driver's error instead of waiting.
    fn gpu_gone(&mut self, id: GpuId) {
        let Some(mut gpu) = self.gpus.remove(&id) else { return };
        for (&client, member) in &mut gpu.members {
            if !member.lease.is_open() {
                let epoch = member.grant(self.now, Nanos::ZERO);
                self.outbox.push_back(Output::Grant { client, gpu: id, epoch, prefetch: Bytes::ZERO });
            }
            if let Some(client) = self.clients.get_mut(&client) {
                client.uses.insert(id, member.lease.epoch());
            }
        }
    }

    fn client_uses(&mut self, id: ClientId, gpu: GpuId) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if client.uses.contains_key(&gpu) || client.uses.len() >= USES_MAX {
            return;
        }
        client.uses.insert(gpu, Epoch::default());
        let Client { job, weight_milli, priority, .. } = *client;
        if let Some(gpu) = self.gpus.get_mut(&gpu) {
            gpu.members.insert(id, Member::new(self.now, job, weight_milli, priority, Epoch::default()));
        }
    }

    fn client_left(&mut self, id: ClientId) {
        let Some(client) = self.clients.remove(&id) else { return };
        for gpu in self.gpus.values_mut() {
            if gpu.members.remove(&id).is_some() && !gpu.has_job(client.job) {
                gpu.rotation.forget(client.job);
            }
        }
    }

    fn revoked(&mut self, client: ClientId, id: GpuId, epoch: Epoch, drain: Drain, moved: Bytes) {
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        let Some(member) = gpu.members.get_mut(&client) else { return };
        match member.lease.answer(self.now, epoch, drain) {
            Answered::Stale => {}
            Answered::Drained => {
                member.gated(self.now);
                let took = if let Drain::Done { took } = drain { took } else { Nanos::ZERO };
                // What a client says of its drain is believed up to what the drain may take.
                let took = took.min(self.config.drain_within);
                let job = member.job;
                gpu.last_drain = gpu.last_drain.max(took);
                gpu.rotation.charge(job, took);
                gpu.rotation.note_own_move(Bytes::ZERO, moved);
            }
            Answered::Failed { gave_up } => {
                if gave_up {
                    self.outbox.push_back(Output::NotRevocable { client, gpu: id });
                }
            }
        }
    }

    fn ordered(&mut self, order: &Order) {
        match *order {
            Order::Mode { gpu: Some(id), mode } => {
                if let Some(gpu) = self.gpus.get_mut(&id) {
                    gpu.order = mode;
                    self.apply_order(id);
                }
            }
            Order::Mode { gpu: None, mode } => {
                self.default_order = mode;
                let ids: Vec<GpuId> = self.gpus.keys().copied().collect();
                for id in ids {
                    if let Some(gpu) = self.gpus.get_mut(&id) {
                        gpu.order = mode;
                    }
                    self.apply_order(id);
                }
            }
            Order::Quantum { quantum } => self.fixed_quantum = quantum,
            Order::Weight { client: id, weight_milli } => {
                let Some(client) = self.clients.get_mut(&id) else { return };
                client.weight_milli = weight_milli.max(1);
                for gpu in self.gpus.values_mut() {
                    if let Some(member) = gpu.members.get_mut(&id) {
                        member.weight_milli = weight_milli.max(1);
                    }
                }
            }
        }
    }

    fn apply_order(&mut self, id: GpuId) {
        let now = self.now;
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        let reason = Reason::Operator { mode: gpu.order };
        match (gpu.order, gpu.plan.stage()) {
            (ModeOrder::Exclusive, None) => {
                gpu.plan.enter(now, Stage::Ordered);
                self.began_turns(id, reason);
            }
            (ModeOrder::Shared, Some(_)) => {
                gpu.plan.leave();
                self.ended_turns(id, reason);
            }
            (ModeOrder::Exclusive, Some(_)) => gpu.plan.enter(now, Stage::Ordered),
            // Whether turns are needed is not known: a trial finds out without provoking thrash.
            (ModeOrder::Auto, Some(Stage::Ordered)) => {
                gpu.plan.enter(now, Stage::Provisional);
                gpu.rotation.start_rotation();
            }
            (ModeOrder::Shared, None)
            | (ModeOrder::Auto, None | Some(Stage::Provisional | Stage::Confirmed)) => {}
        }
    }

    /// Ends turns that are certainly not needed.
    fn relieve(&mut self) {
        let now = self.now;
        let relieved: Vec<(GpuId, Reason)> = self
            .gpus
            .iter()
            .filter(|(_, gpu)| gpu.order == ModeOrder::Auto && gpu.plan.takes_turns())
            .filter_map(|(&id, gpu)| Some((id, gpu.relief(now)?)))
            .collect();
        for (id, reason) in relieved {
            if let Some(gpu) = self.gpus.get_mut(&id) {
                gpu.plan.leave();
            }
            self.ended_turns(id, reason);
        }
    }

    pub(crate) fn began_turns(&mut self, id: GpuId, reason: Reason) {
        if let Some(gpu) = self.gpus.get_mut(&id) {
            gpu.begin_turns();
        }
        self.announce(id, Mode::Shared, reason);
    }

    pub(crate) fn ended_turns(&mut self, id: GpuId, reason: Reason) {
        if let Some(gpu) = self.gpus.get_mut(&id) {
            gpu.end_turns();
        }
        self.announce(id, Mode::Exclusive, reason);
    }

    /// Tells of a change of plan that has been made.
    pub(crate) fn announce(&mut self, id: GpuId, from: Mode, reason: Reason) {
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        let change =
            PlanChange { at: self.now, gpu: id, from, to: gpu.plan.mode(), reason, sets: gpu.sets() };
        gpu.last_change = Some(change.clone());
        self.outbox.push_back(Output::Plan(change));
    }
}
