//! The one task that owns the engine: facts in, decisions out to the clients.
//!
//! Everything that may change a decision comes through one channel and gets its time here, so the order of
//! inputs is the order of their times, and a recording of this task is a recording of the engine.

mod leases;
mod moves;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use nvshare_core::{
    ClientId, Config, Drain, Engine, GpuId, Input, Mode, ModeOrder, Nanos, Order, Output, PlanChange, Reason,
    View,
};
use nvshare_wire::{AgentMessage, Mover};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{broadcast, mpsc, oneshot},
    time::MissedTickBehavior,
};

use self::{leases::Leases, moves::Moves};
use crate::{
    clients::outbox::Outbox,
    clock,
    metrics::Metrics,
    observe::raw::RawBin,
    recording::{Head, Line, Recorder, Step, step},
};

/// Commands that may queue up; senders wait beyond that.
const QUEUE: usize = 1024;
/// Plan changes kept for `nvsharectl explain` and late followers.
const HISTORY: usize = 256;
/// Lines that a live recording may lag behind: half a minute of a busy host.
const TAP_QUEUE: usize = 16_384;
/// How often a gated client hears that the agent is still there.
const ALIVE_EVERY: Duration = Duration::from_secs(1);

/// What the task is asked to do.
#[derive(Debug)]
pub enum Command {
    /// A client has a session.
    Joined {
        /// Which.
        client: ClientId,
        /// The way to it.
        outbox: Outbox,
        /// The fact for the engine.
        input: Input,
    },
    /// A client says how it moves its memory.
    Moves(ClientId, Mover),
    /// A client's session ended.
    Left(ClientId),
    /// Facts that became known at the same time, in this order.
    Facts(Vec<Input>),
    /// One bin of the sampler: what the sensors said, and the facts that follow; answered when they are taken in.
    Bin(RawBin, Vec<Input>, oneshot::Sender<()>),
    /// Messages to clients that carry no decision.
    Tell(Vec<(ClientId, AgentMessage)>),
    /// An order of the operator; answered when it is carried out.
    Order(Order, oneshot::Sender<()>),
    /// What is to be seen.
    View(oneshot::Sender<Seen>),
    /// Everything that the engine is told and answers, from here on.
    Record(oneshot::Sender<Tapped>),
    /// Open every gate and end.
    Shutdown(oneshot::Sender<()>),
}

/// What is to be seen of the engine.
#[derive(Clone, Debug)]
pub struct Seen {
    /// When.
    pub at: Nanos,
    /// The engine.
    pub view: View,
    /// Changes of plan, oldest first.
    pub changes: Vec<PlanEvent>,
}

/// A change of plan as it is shown to operators.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanEvent {
    /// CLOCK_MONOTONIC milliseconds.
    pub t_ms: f64,
    /// Which GPU.
    pub gpu: GpuId,
    /// The mode before.
    pub from: String,
    /// The mode after.
    pub to: String,
    /// Why, for people.
    pub reason: String,
    /// When the first refault of the episode was seen, if refaults are the reason. Same clock as `t_ms`.
    pub first_refault_ms: Option<f64>,
    /// Whether this is a trial of exclusive mode.
    pub provisional: bool,
    /// The order that forced the change, if one did.
    pub order: Option<String>,
    /// The figures behind the reason.
    pub figures: Reason,
    /// The sets, in the order of their turns.
    pub sets: Vec<Vec<ClientId>>,
}

impl From<PlanChange> for PlanEvent {
    fn from(change: PlanChange) -> Self {
        let PlanChange { at, gpu, from, to, reason, sets } = change;
        let (first_refault_ms, provisional) = match &reason {
            Reason::Thrash { first_refault, provisional, .. } => (Some(millis(*first_refault)), *provisional),
            Reason::ThrashConfirmed { .. }
            | Reason::Fits { .. }
            | Reason::EvictionFree { .. }
            | Reason::WorkingSetsFit { .. }
            | Reason::ProbeHeld { .. }
            | Reason::Repacked { .. }
            | Reason::SetMisfit { .. }
            | Reason::Alone
            | Reason::Blind
            | Reason::Operator { .. } => (None, false),
        };
        let order = match &reason {
            Reason::Operator { mode } => Some(format!("{mode:?}").to_lowercase()),
            _ => None,
        };
        Self {
            t_ms: millis(at),
            gpu,
            from: from.to_string(),
            to: to.to_string(),
            reason: reason.to_string(),
            first_refault_ms,
            provisional,
            order,
            figures: reason,
            sets,
        }
    }
}

/// Milliseconds with a fraction, for JSON.
pub fn millis(at: Nanos) -> f64 {
    at.0 as f64 / 1e6
}

/// The way to the task.
#[derive(Clone, Debug)]
pub struct DriverHandle {
    command_tx: mpsc::Sender<Command>,
    event_tx: broadcast::Sender<PlanEvent>,
    suspected: Arc<Mutex<BTreeSet<GpuId>>>,
}

/// The task has ended or does not answer.
#[derive(Debug, thiserror::Error)]
#[error("the agent is shutting down")]
pub struct Gone;

impl DriverHandle {
    /// Hands over a command. After the end of the task it is dropped.
    pub async fn send(&self, command: Command) {
        self.command_tx.send(command).await.ok();
    }

    /// The same from a thread outside the runtime.
    pub fn send_blocking(&self, command: Command) {
        self.command_tx.blocking_send(command).ok();
    }

    /// GPUs on which there is evidence of thrash, or turns are taken.
    pub fn suspected(&self) -> BTreeSet<GpuId> {
        self.suspected.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is to be seen.
    pub async fn seen(&self) -> Result<Seen, Gone> {
        let (seen_tx, seen_rx) = oneshot::channel();
        self.send(Command::View(seen_tx)).await;
        seen_rx.await.map_err(|_closed| Gone)
    }

    /// Carries out an order.
    pub async fn order(&self, order: Order) -> Result<(), Gone> {
        let (done_tx, done_rx) = oneshot::channel();
        self.send(Command::Order(order, done_tx)).await;
        done_rx.await.map_err(|_closed| Gone)
    }

    /// Everything that the engine is told and answers, from here on.
    pub async fn record(&self) -> Result<Tapped, Gone> {
        let (tapped_tx, tapped_rx) = oneshot::channel();
        self.send(Command::Record(tapped_tx)).await;
        tapped_rx.await.map_err(|_closed| Gone)
    }

    /// Changes of plan from here on.
    pub fn events(&self) -> broadcast::Receiver<PlanEvent> {
        self.event_tx.subscribe()
    }

    /// Opens every gate and ends the task.
    pub async fn shutdown(&self) {
        let (done_tx, done_rx) = oneshot::channel();
        self.send(Command::Shutdown(done_tx)).await;
        let _ = done_rx.await;
    }
}

/// Starts the task.
pub fn start(config: Config, metrics: Arc<Metrics>, recorder: Option<Recorder>) -> DriverHandle {
    let (command_tx, command_rx) = mpsc::channel(QUEUE);
    let (event_tx, _) = broadcast::channel(HISTORY);
    let suspected = Arc::default();
    let handle = DriverHandle { command_tx, event_tx: event_tx.clone(), suspected: Arc::clone(&suspected) };
    let driver = Driver {
        engine: Engine::new(config),
        metrics,
        recorder,
        clients: BTreeMap::new(),
        leases: Leases::default(),
        moves: Moves::default(),
        changes: VecDeque::new(),
        event_tx,
        suspected,
        deadline: None,
        latest: Nanos::ZERO,
        modes: BTreeMap::new(),
        gpus: BTreeSet::new(),
        taps: Vec::new(),
    };
    tokio::spawn(driver.run(command_rx));
    handle
}

struct Driver {
    engine: Engine,
    metrics: Arc<Metrics>,
    recorder: Option<Recorder>,
    clients: BTreeMap<ClientId, Outbox>,
    leases: Leases,
    moves: Moves,
    changes: VecDeque<PlanEvent>,
    event_tx: broadcast::Sender<PlanEvent>,
    suspected: Arc<Mutex<BTreeSet<GpuId>>>,
    deadline: Option<Nanos>,
    latest: Nanos,
    /// Modes ordered for single GPUs, also for those to come.
    modes: BTreeMap<GpuId, ModeOrder>,
    /// GPUs that the engine knows.
    gpus: BTreeSet<GpuId>,
    taps: Vec<Tap>,
}

/// Somebody who records live.
type Tap = mpsc::Sender<Line>;

/// What is needed to record from here on.
#[derive(Debug)]
pub struct Tapped {
    /// The first line.
    pub head: Head,
    /// What follows; ends early if it is not read fast enough.
    pub lines: mpsc::Receiver<Line>,
}

impl Driver {
    async fn run(mut self, mut command_rx: mpsc::Receiver<Command>) {
        let mut alive = tokio::time::interval(ALIVE_EVERY);
        alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                command = command_rx.recv() => match command {
                    None => return,
                    Some(Command::Shutdown(done_tx)) => {
                        self.open_all();
                        // Completes the file, which the end of the process would cut.
                        drop(self.recorder.take());
                        // Whoever asked may have gone; the gates are open all the same.
                        let _ = done_tx.send(());
                        return;
                    }
                    Some(command) => self.carry_out(command),
                },
                () = clock::sleep_until(self.deadline) => self.handle(Input::Tick),
                _ = alive.tick() => self.say_alive(),
            }
        }
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Joined { client, outbox, input } => {
                self.clients.insert(client, outbox);
                self.handle(input);
            }
            Command::Moves(client, by) => {
                tracing::debug!(%client, ?by, "how the client moves its memory");
                self.moves.said(client, by);
            }
            Command::Left(client) => {
                self.clients.remove(&client);
                self.leases.forget(client);
                self.moves.forget(client);
                self.handle(Input::ClientLeft { client });
            }
            Command::Facts(inputs) => {
                for input in inputs {
                    let news = self.note_gpu(&input);
                    self.handle(input);
                    if let Some(order) = news {
                        self.handle(Input::Order(order));
                    }
                }
            }
            Command::Bin(raw, inputs, done_tx) => {
                if self.is_recorded() {
                    self.record(Line::Bin(raw));
                }
                for input in inputs {
                    self.handle(input);
                }
                self.suspect();
                // The sampler may have been stopped.
                let _ = done_tx.send(());
            }
            Command::Tell(messages) => {
                for (client, message) in messages {
                    self.send(client, &message);
                }
            }
            Command::Order(order, done_tx) => {
                tracing::info!(?order, "the operator's order");
                match order {
                    Order::Mode { gpu: None, .. } => self.modes.clear(),
                    Order::Mode { gpu: Some(gpu), mode } => {
                        self.modes.insert(gpu, mode);
                    }
                    Order::Quantum { .. }
                    | Order::Weight { .. }
                    | Order::Priority { .. }
                    | Order::Overhead { .. }
                    | Order::QuantumMax { .. } => {}
                }
                self.handle(Input::Order(order));
                let _ = done_tx.send(());
            }
            Command::Record(tapped_tx) => {
                let (tap, lines) = mpsc::channel(TAP_QUEUE);
                // Serialised here: the state is the one before the next step.
                if let Ok(head) = Head::from_here(&self.engine)
                    && tapped_tx.send(Tapped { head, lines }).is_ok()
                {
                    self.taps.push(tap);
                }
            }
            Command::View(seen_tx) => {
                let at = clock::now();
                let changes = self.changes.iter().cloned().collect();
                seen_tx.send(Seen { at, view: self.engine.view(at), changes }).ok();
            }
            // Taken by `run`, which ends with it.
            Command::Shutdown(_) => {}
        }
    }

    /// The mode that was ordered for a GPU before it was there.
    fn note_gpu(&mut self, input: &Input) -> Option<Order> {
        match input {
            Input::Gpu { gpu, .. } if self.gpus.insert(*gpu) => {
                let mode = *self.modes.get(gpu)?;
                Some(Order::Mode { gpu: Some(*gpu), mode })
            }
            Input::GpuGone { gpu } => {
                self.gpus.remove(gpu);
                None
            }
            _ => None,
        }
    }

    fn handle(&mut self, input: Input) {
        let at = clock::now().max(self.latest);
        self.latest = at;
        self.note_input(at, &input);
        let recorded = self.is_recorded().then(|| input.clone());
        let (outputs, wait) = step(&mut self.engine, at, input);
        if let Some(input) = recorded {
            self.record(Line::Step(Step { at, input, outputs: outputs.clone(), wait }));
        }
        self.deadline = wait;
        for output in outputs {
            self.emit(at, output);
        }
    }

    fn is_recorded(&self) -> bool {
        self.recorder.is_some() || !self.taps.is_empty()
    }

    fn record(&mut self, line: Line) {
        // One that has gone, or does not keep up, is let go; its end of the channel says so.
        self.taps.retain(|tap| tap.try_send(line.clone()).is_ok());
        if let Some(recorder) = &self.recorder {
            recorder.record(line);
        }
    }

    /// Says where a closer look is worth its cost.
    fn suspect(&self) {
        let view = self.engine.view(self.latest);
        let suspected = view
            .gpus
            .iter()
            .filter(|gpu| gpu.score_milli > 0 || gpu.mode != Mode::Shared)
            .map(|gpu| gpu.gpu)
            .collect();
        *self.suspected.lock().unwrap_or_else(PoisonError::into_inner) = suspected;
    }

    /// Counts what clients answer.
    fn note_input(&mut self, at: Nanos, input: &Input) {
        match input {
            Input::Revoked { client, gpu, epoch: _, drain, moved } => {
                self.moves.answered(*client, *gpu, *moved);
                let label = gpu.to_string();
                let outcome = match drain {
                    Drain::Done { took } => {
                        self.metrics.drain_seconds.with_label_values(&[&label]).observe(took.as_secs_f64());
                        "drained"
                    }
                    Drain::TimedOut => "timed_out",
                    Drain::Capturing => "capturing",
                };
                self.metrics.drains.with_label_values(&[label.as_str(), outcome]).inc();
                tracing::debug!(%client, %gpu, outcome, "revocation answered");
            }
            Input::Activity { client, gpu, activity } => {
                self.leases.waits(*client, *gpu, activity.waiting > 0, at);
            }
            Input::Resumed { client, gpu, epoch: _, moved, took: _ } => {
                self.moves.answered(*client, *gpu, *moved);
            }
            Input::Moved { client, gpu, epoch: _, bytes_in, bytes_out, took } => {
                self.moves.moved(*client, *gpu, *bytes_in, *bytes_out);
                self.metrics.moved(*gpu, *bytes_in, *bytes_out, *took);
                tracing::debug!(%client, %gpu, %bytes_in, %bytes_out, %took, "memory moved");
            }
            Input::Sample { gpu, sample } => {
                for (client, figures) in &sample.clients {
                    if let Some(displaced) = self.moves.bin(*client, *gpu, figures) {
                        self.send(*client, &displaced);
                    }
                }
            }
            Input::Gpu { gpu, capacity, link_rate: _ } => {
                self.metrics.gpu_appeared(*gpu);
                tracing::info!(%gpu, %capacity, "usable memory");
            }
            Input::GpuGone { .. }
            | Input::ClientJoined { .. }
            | Input::ClientUses { .. }
            | Input::ClientLeft { .. }
            | Input::Yielded { .. }
            | Input::Order(_)
            | Input::Tick => {}
        }
    }

    fn emit(&mut self, at: Nanos, output: Output) {
        match output {
            Output::Grant { client, gpu, epoch, prefetch } => {
                if let Some(waited) = self.leases.granted(client, gpu, epoch, at) {
                    let label = gpu.to_string();
                    self.metrics.wait_seconds.with_label_values(&[&label]).observe(waited.as_secs_f64());
                }
                self.metrics.grants.with_label_values(&[&gpu.to_string()]).inc();
                if let Some(displaced) = self.moves.before_grant(client, gpu) {
                    self.send(client, &displaced);
                }
                let prefetch = self.moves.ordered(client, gpu, prefetch, false);
                tracing::debug!(%client, %gpu, epoch = epoch.0, %prefetch, "grant");
                self.send(client, &AgentMessage::Grant { gpu: gpu.0, epoch: epoch.0, prefetch: prefetch.0 });
            }
            Output::Revoke { client, gpu, epoch, drain_within, shortfall } => {
                self.leases.revoked(client, gpu, epoch);
                self.metrics.revocations.with_label_values(&[&gpu.to_string()]).inc();
                let shortfall = self.moves.ordered(client, gpu, shortfall, true);
                tracing::debug!(%client, %gpu, epoch = epoch.0, %shortfall, "revoke");
                let drain_ms = u32::try_from(drain_within.as_millis()).unwrap_or(u32::MAX);
                let revoke =
                    AgentMessage::Revoke { gpu: gpu.0, epoch: epoch.0, drain_ms, shortfall: shortfall.0 };
                self.send(client, &revoke);
            }
            Output::Plan(change) => {
                self.metrics.plan_changed(&change);
                let event = PlanEvent::from(change);
                tracing::info!(gpu = %event.gpu, from = event.from, to = event.to, reason = event.reason, "plan");
                if self.changes.len() == HISTORY {
                    self.changes.pop_front();
                }
                self.changes.push_back(event.clone());
                // Without a follower there is nobody to tell.
                self.event_tx.send(event).ok();
            }
            Output::Unresponsive { client, gpu, epoch } => {
                self.metrics.unresponsive.with_label_values(&[&gpu.to_string()]).inc();
                tracing::warn!(%client, %gpu, epoch = epoch.0, "client did not answer a revocation in time; others run");
            }
            Output::NotRevocable { client, gpu } => {
                self.metrics.not_revocable.with_label_values(&[&gpu.to_string()]).inc();
                tracing::warn!(%client, %gpu, "client cannot be stopped; it runs beside the others");
            }
        }
    }

    fn send(&self, client: ClientId, message: &AgentMessage) {
        if let Some(outbox) = self.clients.get(&client) {
            outbox.send(message);
        }
    }

    fn say_alive(&self) {
        for client in self.leases.gated() {
            self.send(client, &AgentMessage::Alive);
        }
    }

    /// Opens every closed gate, so that no program waits for an agent that is about to end.
    fn open_all(&mut self) {
        for (client, gpu, epoch) in self.leases.open_all() {
            self.send(client, &AgentMessage::Grant { gpu: gpu.0, epoch: epoch.0, prefetch: 0 });
        }
    }
}
