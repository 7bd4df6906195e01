//! One run: the world and who decides, from the first start to the last finish.

use crate::{
    input::Input,
    output::{Mode, Output},
    sim::{
        policy::{AllocationSum, Auto, Change, Nixie, Oracle, Policy, PolicyKind, Shared, Step, plan, stock},
        process::State,
        report::{Report, Switch},
        scenario::{Act, Event, Scenario},
        sensors::{BIN, Sensors},
        watch::{Bin, Felt},
        world::{Engine, World, gpu_of, process_of},
    },
    units::{Bytes, Nanos},
};

/// Simulated time after which a run is given up.
const LIMIT: Nanos = Nanos::seconds(40 * 86_400);
/// Steps between two calls of the progress function.
const PROGRESS_EVERY: u32 = 1 << 16;

/// How to run a scenario.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Who decides.
    pub policy: PolicyKind,
    /// How memory moves at a hand-over; `None`: as the policy's own product does.
    pub handover: Option<Engine>,
    /// What the sensors can see.
    pub sensors: Sensors,
    /// The seed of all chance.
    pub seed: u64,
}

impl Options {
    /// A policy with what belongs to it.
    pub fn new(policy: PolicyKind) -> Self {
        Self { policy, handover: None, sensors: Sensors::Blocks, seed: 1 }
    }

    fn engine(&self) -> Engine {
        self.handover.unwrap_or(match self.policy {
            PolicyKind::Exclusive(_) | PolicyKind::AllocationSum | PolicyKind::Shared => Engine::Demand,
            PolicyKind::Auto | PolicyKind::Nixie | PolicyKind::Oracle => Engine::Protected,
        })
    }
}

/// What starts or happens by the scenario's clock.
#[derive(Clone, Debug)]
enum Due {
    Start(usize),
    Act(Act),
}

pub(crate) struct Run<'a> {
    options: &'a Options,
    pub(crate) world: World,
    /// `None` while the agent is dead.
    pub(crate) policy: Option<Box<dyn Policy>>,
    agenda: Vec<(Nanos, Due)>,
    next_due: usize,
    next_bin: Nanos,
    deadline: Option<Nanos>,
    pub(crate) switches: Vec<Switch>,
    pub(crate) false_detections: u64,
    pub(crate) handover_blocks: u64,
    /// Blocks moved on each GPU when it last began to take turns.
    turns_began: Vec<Option<u64>>,
    /// Somebody looks at every bin.
    pub(crate) watched: bool,
    /// The bin that has just been closed, until it is looked at.
    pub(crate) bin: Option<Bin>,
}

/// Runs a scenario. `progress` is told the simulated time now and then.
pub fn run(scenario: &Scenario, options: &Options, progress: &mut dyn FnMut(Nanos)) -> Report {
    let mut run = Run::new(scenario, options);
    run.finish(progress);
    Report::of(&run, options)
}

impl<'a> Run<'a> {
    pub(crate) fn new(scenario: &Scenario, options: &'a Options) -> Self {
        let world = World::new(scenario, options.engine(), options.seed);
        let starts =
            scenario.clients.iter().enumerate().map(|(index, client)| (client.start, Due::Start(index)));
        let events = scenario.events.iter().map(|Event { at, act }| (*at, Due::Act(act.clone())));
        let mut agenda: Vec<(Nanos, Due)> = starts.chain(events).collect();
        agenda.sort_by_key(|(at, _)| *at);
        let gpus = scenario.gpus.len();
        let mut run = Self {
            options,
            world,
            policy: None,
            agenda,
            next_due: 0,
            next_bin: BIN,
            deadline: None,
            switches: Vec::new(),
            false_detections: 0,
            handover_blocks: 0,
            turns_began: vec![None; gpus],
            watched: false,
            bin: None,
        };
        run.start_agent();
        run
    }

    fn finish(&mut self, progress: &mut dyn FnMut(Nanos)) {
        let mut steps = 0u32;
        while self.step() {
            steps = steps.wrapping_add(1);
            if steps.is_multiple_of(PROGRESS_EVERY) {
                progress(self.world.now);
            }
        }
        self.close();
    }

    /// Books what is still under way.
    pub(crate) fn close(&mut self) {
        for gpu in 0..self.turns_began.len() {
            self.note_turns(gpu, false);
        }
    }

    /// Goes on to the next event; false once there is nothing left to wait for.
    pub(crate) fn step(&mut self) -> bool {
        self.do_due();
        self.tell();
        if self.world.now >= LIMIT || (self.world.alive.is_empty() && !self.more_to_start()) {
            return false;
        }
        let mut next = self.next_bin;
        if let Some((at, _)) = self.agenda.get(self.next_due) {
            next = next.min(*at);
        }
        for at in [self.world.next_event(), self.deadline].into_iter().flatten() {
            next = next.min(at);
        }
        // Nothing runs: the empty bins until the next start or event are skipped.
        if self.world.alive.is_empty()
            && let Some((at, _)) = self.agenda.get(self.next_due)
        {
            next = *at;
            self.next_bin = Nanos(at.0.div_ceil(BIN.0) * BIN.0).max(self.next_bin);
        }
        self.world.advance(next.max(self.world.now));
        self.world.settle();
        self.tell();
        if self.world.now >= self.next_bin {
            self.next_bin += BIN;
            let felt = self.watched.then(|| Felt::of(&self.world));
            self.world.sample(self.options.sensors);
            self.tell();
            self.bin = felt.map(|felt| Bin::new(self, felt));
        }
        if self.deadline.is_some_and(|at| at <= self.world.now) {
            self.deadline = None;
            if let Some(policy) = &mut self.policy {
                policy.handle(self.world.now, Input::Tick, &self.world);
                self.carry_out();
            }
        }
        true
    }

    fn more_to_start(&self) -> bool {
        self.agenda[self.next_due..].iter().any(|(_, due)| match due {
            Due::Start(index) => self.world.processes[*index].state == State::Absent,
            Due::Act(_) => false,
        })
    }

    fn do_due(&mut self) {
        while let Some((at, due)) = self.agenda.get(self.next_due)
            && *at <= self.world.now
        {
            let due = due.clone();
            self.next_due += 1;
            match due {
                Due::Start(index) => self.world.start(index),
                Due::Act(act) => self.act(&act),
            }
            self.world.settle();
            self.tell();
        }
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Kill(clients) => {
                for &index in clients {
                    self.world.end(index, State::Killed);
                }
            }
            Act::StopAgent => self.stop_agent(),
            Act::StartAgent => {
                if self.policy.is_none() {
                    self.start_agent();
                }
            }
            Act::SetWeight(clients, weight_milli) => {
                for &index in clients {
                    self.world.set_weight(index, *weight_milli);
                }
            }
        }
    }

    /// Clients fail open: without an agent every gate is.
    fn stop_agent(&mut self) {
        self.policy = None;
        self.deadline = None;
        self.close();
        for index in self.world.alive.clone() {
            for gpu in self.world.processes[index].spec.gpus.clone() {
                self.world.open(index, gpu);
            }
        }
    }

    /// A new agent, to which every client connects again.
    fn start_agent(&mut self) {
        let engine = self.options.engine();
        self.policy = Some(match self.options.policy {
            PolicyKind::Auto => Box::new(Auto::new(self.world.cards.len(), engine)),
            PolicyKind::Shared => Box::new(Shared),
            PolicyKind::Exclusive(quantum) => Box::new(stock(quantum, engine)),
            PolicyKind::AllocationSum => Box::new(AllocationSum::new(self.world.cards.len(), engine)),
            PolicyKind::Nixie => Box::new(Nixie::new()),
            PolicyKind::Oracle => Box::new(Oracle::new(self.agenda.iter().map(|(at, _)| *at).collect())),
        });
        self.world.news.clear();
        for gpu in 0..self.world.cards.len() {
            let told = self.world.describe_gpu(gpu);
            self.world.news.push_back(told);
        }
        for index in self.world.alive.clone() {
            let told = self.world.describe_client(index);
            self.world.news.extend(told);
        }
        self.tell();
    }

    /// Hands the news to whoever decides, and carries out what it says, until both are silent.
    fn tell(&mut self) {
        loop {
            let Some(input) = self.world.news.pop_front() else {
                let Some(index) = self.world.requests.pop() else { return };
                if let Some(policy) = &mut self.policy {
                    policy.requested(self.world.now, index, &self.world);
                    self.carry_out();
                }
                continue;
            };
            if let Some(policy) = &mut self.policy {
                policy.handle(self.world.now, input, &self.world);
                self.carry_out();
            }
        }
    }

    pub(crate) fn carry_out(&mut self) {
        loop {
            let Some(policy) = &mut self.policy else { return };
            match policy.poll(&self.world) {
                Step::Wait(deadline) => {
                    self.deadline = deadline;
                    return;
                }
                Step::Changed(change) => self.note_change(change),
                Step::Emit(Output::Grant { client, gpu, epoch, prefetch }) => {
                    self.world.grant(process_of(client), gpu_of(gpu), epoch, prefetch);
                }
                Step::Emit(Output::Revoke { client, gpu, epoch, drain_within, shortfall }) => {
                    self.world.revoke(process_of(client), gpu_of(gpu), epoch, drain_within, shortfall);
                }
                Step::Emit(_) => {}
            }
            for gpu in 0..self.turns_began.len() {
                let turns = self.policy.as_ref().is_some_and(|policy| policy.takes_turns(gpu));
                self.note_turns(gpu, turns);
            }
        }
    }

    fn note_change(&mut self, change: Change) {
        if change.confirmed && self.options.policy != PolicyKind::Oracle && change.to != Mode::Shared {
            let ahead = self.agenda.get(self.next_due).map(|(at, _)| *at);
            self.false_detections += u64::from(plan::best(&self.world, ahead).mode == Mode::Shared);
        }
        let onset = self.world.episodes.get(gpu_of(change.gpu)).and_then(|episode| episode.began);
        self.switches.push(Switch::new(self.world.now, change, onset));
    }

    /// Books what moved on a GPU while clients took turns there.
    fn note_turns(&mut self, gpu: usize, turns: bool) {
        let moved = self.world.cards[gpu].moved;
        match (self.turns_began[gpu], turns) {
            (None, true) => self.turns_began[gpu] = Some(moved),
            (Some(began), false) => {
                self.handover_blocks += moved - began;
                self.turns_began[gpu] = None;
            }
            _ => {}
        }
    }

    pub(crate) fn handover_bytes(&self) -> Bytes {
        Bytes(self.handover_blocks * Bytes::BLOCK.0)
    }
}
