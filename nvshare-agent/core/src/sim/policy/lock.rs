//! A lock on GPUs with a quantum, first come, first served: what the policies that take turns by rule share.
//!
//! Clients form groups; a group holds all GPUs of its members or none, and its members run together. It is
//! asked to give them back only when somebody waits for one of them.

use std::collections::{BTreeMap, VecDeque};

use crate::{
    id::Epoch,
    input::{Drain, Input},
    output::Output,
    sim::{
        process::{Gate, Process, State},
        world::{World, client_id, gpu_id, gpu_of, process_of},
    },
    units::{Bytes, Nanos},
};

/// How long a client may take to drain.
const DRAIN_WITHIN: Nanos = Nanos::seconds(5);
/// A client that did not drain in time is asked again after this long.
const RETRY: Nanos = Nanos::SECOND;

/// When an idle holder gives the GPU away before its time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Release {
    /// Looked at every so often since the grant: it has done nothing since the last look.
    Polled(Nanos),
    /// Idle for this long.
    Idle(Nanos),
    /// As soon as it idles, if it is known that it will for longer than this.
    Known(Nanos),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Hold {
    None,
    Holding { since: Nanos },
    Returning { ask_again: Nanos },
}

#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) members: Vec<usize>,
    pub(crate) quantum: Nanos,
    /// Lower ranks go first.
    rank: u32,
    hold: Hold,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Seen {
    Open,
    Draining,
    Closed,
}

#[derive(Clone, Debug)]
pub(crate) struct Lock {
    pub(crate) groups: Vec<Group>,
    pub(crate) release: Release,
    /// Hand-overs are not left to the driver.
    moves: bool,
    /// Groups that wait, by when they came.
    queue: VecDeque<usize>,
    gates: BTreeMap<(usize, usize), (Seen, Epoch)>,
    outbox: VecDeque<Output>,
    /// The group whose quantum ended last.
    pub(crate) expired: Option<usize>,
}

impl Lock {
    pub(crate) fn new(release: Release, moves: bool) -> Self {
        Self {
            groups: Vec::new(),
            release,
            moves,
            queue: VecDeque::new(),
            gates: BTreeMap::new(),
            outbox: VecDeque::new(),
            expired: None,
        }
    }

    /// One that takes over the gates as they are.
    pub(crate) fn observing(world: &World, release: Release, moves: bool) -> Self {
        let mut lock = Self::new(release, moves);
        for &index in world.alive.iter().filter(|&&index| world.processes[index].spec.shim) {
            for seat in &world.processes[index].seats {
                let gate = match seat.gate {
                    Gate::Open => (Seen::Open, Epoch::default()),
                    Gate::Opening { epoch, .. } => (Seen::Open, epoch),
                    Gate::Draining { epoch, .. } => (Seen::Draining, epoch),
                    Gate::Closed => (Seen::Closed, Epoch::default()),
                };
                lock.gates.insert((index, seat.gpu), gate);
            }
        }
        lock
    }

    /// The group stands elsewhere among the others from now on.
    pub(crate) fn rank(&mut self, index: usize, rank: u32, quantum: Nanos) {
        self.groups[index].rank = rank;
        self.groups[index].quantum = quantum;
        if let Some(at) = self.queue.iter().position(|&waiting| waiting == index) {
            self.queue.remove(at);
            self.enqueue(index);
        }
    }

    fn enqueue(&mut self, index: usize) {
        let rank = self.groups[index].rank;
        let at = self.queue.iter().position(|&other| self.groups[other].rank > rank);
        self.queue.insert(at.unwrap_or(self.queue.len()), index);
    }

    /// The groups are other ones from now on. Who holds a GPU keeps its gates until its group's turn is over.
    pub(crate) fn regroup(&mut self, now: Nanos, groups: Vec<(Vec<usize>, Nanos)>, world: &World) {
        self.queue.clear();
        self.groups = groups
            .into_iter()
            .map(|(members, quantum)| Group { members, quantum, rank: 0, hold: Hold::None })
            .collect();
        // The first group that runs is the holder of its GPUs; the others give theirs back.
        let mut taken: Vec<usize> = Vec::new();
        for index in 0..self.groups.len() {
            let gpus = self.gpus(index, world);
            if !self.has_running(index) {
                continue;
            }
            if gpus.iter().any(|gpu| taken.contains(gpu)) {
                self.give_back(index, now, world);
            } else {
                taken.extend(gpus);
                self.groups[index].hold = Hold::Holding { since: now };
                self.open_all(index);
            }
        }
        for index in 0..self.groups.len() {
            self.request(index, world);
        }
        self.schedule(now, world);
    }

    pub(crate) fn group_of(&self, process: usize) -> Option<usize> {
        self.groups.iter().position(|group| group.members.contains(&process))
    }

    /// A client is there; its gates are open.
    pub(crate) fn joined(&mut self, process: usize, quantum: Nanos, now: Nanos, world: &World) {
        self.note_gates(process, world);
        self.groups.push(Group { members: vec![process], quantum, rank: 0, hold: Hold::None });
        let index = self.groups.len() - 1;
        if self.queue.is_empty() && self.free(index, world) {
            self.groups[index].hold = Hold::Holding { since: now };
        } else {
            self.give_back(index, now, world);
        }
        self.schedule(now, world);
    }

    /// Remembers a new client's gates, which are open.
    pub(crate) fn note_gates(&mut self, process: usize, world: &World) {
        for &gpu in &world.processes[process].spec.gpus {
            self.gates.entry((process, gpu)).or_insert((Seen::Open, Epoch::default()));
        }
    }

    pub(crate) fn left(&mut self, process: usize, now: Nanos, world: &World) {
        self.gates.retain(|&(of, _), _| of != process);
        for index in 0..self.groups.len() {
            self.groups[index].members.retain(|&member| member != process);
            if self.groups[index].members.is_empty() {
                self.groups[index].hold = Hold::None;
                self.queue.retain(|&waiting| waiting != index);
            }
            self.settle_return(index, world);
        }
        self.schedule(now, world);
    }

    /// The answers of clients.
    pub(crate) fn answered(&mut self, now: Nanos, input: &Input, world: &World) {
        let Input::Revoked { client, gpu, epoch, drain, .. } = *input else { return };
        let process = process_of(client);
        let Some(gate) = self.gates.get_mut(&(process, gpu_of(gpu))) else { return };
        if gate.1 != epoch || gate.0 != Seen::Draining {
            return;
        }
        let done = matches!(drain, Drain::Done { .. });
        gate.0 = if done { Seen::Closed } else { Seen::Open };
        if let Some(index) = self.group_of(process) {
            if !done && let Hold::Returning { ask_again } = &mut self.groups[index].hold {
                *ask_again = now + RETRY;
            }
            self.settle_return(index, world);
        }
        self.schedule(now, world);
    }

    pub(crate) fn requested(&mut self, process: usize, now: Nanos, world: &World) {
        if let Some(index) = self.group_of(process) {
            self.request(index, world);
        }
        self.schedule(now, world);
    }

    pub(crate) fn next_output(&mut self) -> Option<Output> {
        self.outbox.pop_front()
    }

    /// Looks at quanta, idleness and who is next.
    pub(crate) fn schedule(&mut self, now: Nanos, world: &World) {
        for index in 0..self.groups.len() {
            match self.groups[index].hold {
                Hold::None => {}
                Hold::Returning { ask_again } => {
                    if ask_again <= now {
                        self.give_back(index, now, world);
                    }
                }
                Hold::Holding { since } => {
                    if !self.contended(index, world) {
                        continue;
                    }
                    let expired = now >= since + self.groups[index].quantum;
                    if expired {
                        self.expired = Some(index);
                    }
                    if expired || self.idle(index, since, now, world) {
                        self.give_back(index, now, world);
                    }
                }
            }
        }
        // Whoever waits longer has its GPUs kept free, so that a client of several is not passed over for ever.
        let mut kept: Vec<usize> = Vec::new();
        let mut granted = Vec::new();
        for &index in &self.queue {
            let gpus = self.gpus(index, world);
            if self.free(index, world) && !gpus.iter().any(|gpu| kept.contains(gpu)) {
                granted.push(index);
            }
            kept.extend(gpus);
        }
        for index in granted {
            self.queue.retain(|&waiting| waiting != index);
            self.groups[index].hold = Hold::Holding { since: now };
            self.open_all(index);
        }
    }

    /// When to look again.
    pub(crate) fn deadline(&self, now: Nanos, world: &World) -> Option<Nanos> {
        let mut next: Option<Nanos> = None;
        let mut sooner = |at: Nanos| next = Some(next.map_or(at, |next| next.min(at)));
        for (index, group) in self.groups.iter().enumerate() {
            match group.hold {
                Hold::Returning { ask_again } => sooner(ask_again),
                Hold::Holding { since } if self.contended(index, world) => {
                    sooner(since + group.quantum);
                    let idle = group.members.iter().all(|&member| idle(&world.processes[member]));
                    match self.release {
                        Release::Polled(period) => {
                            let looks = now.since(since).0 / period.0 + 1;
                            sooner(since + Nanos(period.0 * looks));
                        }
                        Release::Idle(after) if idle => sooner(last_used(group, world) + after),
                        Release::Idle(_) | Release::Known(_) => {}
                    }
                }
                Hold::None | Hold::Holding { .. } => {}
            }
        }
        next.map(|at| at.max(now + Nanos(1)))
    }

    fn idle(&self, index: usize, since: Nanos, now: Nanos, world: &World) -> bool {
        let group = &self.groups[index];
        if !group.members.iter().all(|&member| idle(&world.processes[member])) {
            return false;
        }
        let used = last_used(group, world);
        match self.release {
            Release::Polled(period) => {
                let looks = now.since(since).0 / period.0;
                looks > 0 && used + period <= since + Nanos(period.0 * looks)
            }
            Release::Idle(after) => now >= used + after,
            Release::Known(least) => {
                group.members.iter().all(|&member| match world.processes[member].state {
                    State::Cpu { until } => until.since(now) > least,
                    _ => true,
                })
            }
        }
    }

    fn gpus(&self, index: usize, world: &World) -> Vec<usize> {
        let members = self.groups[index].members.iter();
        let mut gpus: Vec<usize> =
            members.flat_map(|&member| world.processes[member].spec.gpus.clone()).collect();
        gpus.sort_unstable();
        gpus.dedup();
        gpus
    }

    /// Nobody else holds any of its GPUs.
    fn free(&self, index: usize, world: &World) -> bool {
        let gpus = self.gpus(index, world);
        (0..self.groups.len()).all(|other| {
            other == index
                || self.groups[other].hold == Hold::None
                || !self.gpus(other, world).iter().any(|gpu| gpus.contains(gpu))
        })
    }

    /// Somebody waits for one of its GPUs.
    fn contended(&self, index: usize, world: &World) -> bool {
        self.next_after(index, world).is_some()
    }

    fn next_after(&self, index: usize, world: &World) -> Option<usize> {
        let gpus = self.gpus(index, world);
        let mut waiting = self.queue.iter().copied();
        waiting.find(|&other| other != index && self.gpus(other, world).iter().any(|gpu| gpus.contains(gpu)))
    }

    /// A gate of it is not closed yet.
    fn has_running(&self, index: usize) -> bool {
        let members = &self.groups[index].members;
        self.gates.iter().any(|((process, _), gate)| members.contains(process) && gate.0 != Seen::Closed)
    }

    /// It waits for its turn, if it has work and does not have it.
    fn request(&mut self, index: usize, world: &World) {
        let group = &self.groups[index];
        let wants = group.members.iter().any(|&member| world.processes[member].state == State::Gated);
        if wants && group.hold == Hold::None && !self.queue.contains(&index) {
            self.enqueue(index);
        }
    }

    fn give_back(&mut self, index: usize, now: Nanos, world: &World) {
        self.groups[index].hold = Hold::Returning { ask_again: now + DRAIN_WITHIN + RETRY };
        for member in self.groups[index].members.clone() {
            for &gpu in &world.processes[member].spec.gpus {
                let Some(gate) = self.gates.get_mut(&(member, gpu)) else { continue };
                if gate.0 != Seen::Open {
                    continue;
                }
                *gate = (Seen::Draining, gate.1.next());
                let epoch = gate.1;
                let shortfall = if self.moves { self.shortfall(index, gpu, world) } else { Bytes::ZERO };
                self.outbox.push_back(Output::Revoke {
                    client: client_id(member),
                    gpu: gpu_id(gpu),
                    epoch,
                    drain_within: DRAIN_WITHIN,
                    shortfall,
                });
            }
        }
        self.settle_return(index, world);
    }

    /// What the next group lacks on a GPU.
    fn shortfall(&self, index: usize, gpu: usize, world: &World) -> Bytes {
        let Some(next) = self.next_after(index, world) else { return Bytes::ZERO };
        let card = &world.cards[gpu];
        let lacks = |process: &Process| {
            let seat = process.seats.iter().find(|seat| seat.gpu == gpu)?;
            let held = u32::try_from(seat.left.len()).unwrap_or(u32::MAX);
            let wanted =
                if seat.left.is_empty() { process.blocks() } else { held.max(seat.resident.count()) };
            Some(i64::from(wanted - seat.resident.count()))
        };
        let members = self.groups[next].members.iter();
        let lacking: i64 = members.filter_map(|&member| lacks(&world.processes[member])).sum();
        let blocks = (lacking - card.room()).max(0) as u64;
        Bytes(blocks * Bytes::BLOCK.0)
    }

    /// A group that has given everything back holds nothing, and waits if it still has work.
    fn settle_return(&mut self, index: usize, world: &World) {
        let group = &self.groups[index];
        let members = &group.members;
        let closed = self
            .gates
            .iter()
            .all(|((process, _), gate)| !members.contains(process) || gate.0 == Seen::Closed);
        if matches!(group.hold, Hold::Returning { .. }) && closed {
            self.groups[index].hold = Hold::None;
            self.request(index, world);
        }
    }

    fn open_all(&mut self, index: usize) {
        let members = self.groups[index].members.clone();
        for (&(process, gpu), gate) in &mut self.gates {
            if members.contains(&process) && gate.0 != Seen::Open {
                *gate = (Seen::Open, gate.1.next());
                let prefetch = if self.moves { Bytes(u64::MAX) } else { Bytes::ZERO };
                self.outbox.push_back(Output::Grant {
                    client: client_id(process),
                    gpu: gpu_id(gpu),
                    epoch: gate.1,
                    prefetch,
                });
            }
        }
    }
}

fn idle(process: &Process) -> bool {
    !matches!(process.state, State::Runs | State::Stalled | State::Gated)
}

fn last_used(group: &Group, world: &World) -> Nanos {
    group.members.iter().map(|&member| world.processes[member].last_used).max().unwrap_or_default()
}
