//! Nixie's published rules (OSDI'26, arXiv 2601.11743): always one at a time; five levels with quanta of 8 to
//! 128 s, a level down for whoever uses its quantum up; no switch before twice 1.5 times the footprint could
//! have crossed a link of 16 GB/s; idle after 100 ms without a call; whoever was idle for long is back on top;
//! bulk swaps in both directions at once of what the newcomer lacks.
//!
//! It is given more than it has: memory that was never touched is not moved, and a client larger than the GPU
//! runs by the driver's paging. Of its promotion rule `i − R·q > T + t` the constants are not published:
//! idle time, less the share of pending time, must exceed 1 s and the GPU time since the last promotion.

use std::collections::BTreeMap;

use crate::{
    input::Input,
    sim::{
        policy::{
            Policy, Step,
            lock::{Lock, Release},
        },
        world::{World, process_of},
    },
    units::{Bytes, Nanos},
};

const IDLE: Nanos = Nanos::millis(100);
const LEVELS: u32 = 5;
const FIRST_QUANTUM: Nanos = Nanos::seconds(8);
const ASSUMED_LINK: Bytes = Bytes(16_000_000_000);
const PROMOTED_AFTER: Nanos = Nanos::SECOND;

#[derive(Clone, Copy, Debug, Default)]
struct Standing {
    level: u32,
    /// GPU work at the last promotion.
    promoted_at: f64,
}

pub(crate) struct Nixie {
    lock: Lock,
    standings: BTreeMap<usize, Standing>,
    now: Nanos,
}

impl Nixie {
    pub(crate) fn new() -> Self {
        Self { lock: Lock::new(Release::Idle(IDLE), true), standings: BTreeMap::new(), now: Nanos::ZERO }
    }

    fn quantum(level: u32, allocated: Bytes) -> Nanos {
        let cooldown =
            Nanos((u128::from(allocated.0) * 3 * 1_000_000_000 / u128::from(ASSUMED_LINK.0)) as u64);
        Nanos(FIRST_QUANTUM.0 << level).max(cooldown)
    }

    fn place(&mut self, process: usize, world: &World) {
        let Some(group) = self.lock.group_of(process) else { return };
        let level = self.standings.get(&process).copied().unwrap_or_default().level;
        let quantum = Self::quantum(level, world.processes[process].spec.allocated);
        self.lock.rank(group, level, quantum);
    }

    /// Whoever used its quantum up is a level lower from now on.
    fn demote(&mut self, world: &World) {
        let Some(group) = self.lock.expired.take() else { return };
        let Some(&process) = self.lock.groups[group].members.first() else { return };
        let standing = self.standings.entry(process).or_default();
        standing.level = (standing.level + 1).min(LEVELS - 1);
        self.place(process, world);
    }
}

impl Policy for Nixie {
    fn handle(&mut self, now: Nanos, input: Input, world: &World) {
        self.now = now;
        match input {
            Input::ClientJoined { client, .. } => {
                let process = process_of(client);
                self.lock.joined(
                    process,
                    Self::quantum(0, world.processes[process].spec.allocated),
                    now,
                    world,
                );
            }
            Input::ClientLeft { client } => self.lock.left(process_of(client), now, world),
            Input::Revoked { .. } => self.lock.answered(now, &input, world),
            Input::Tick => self.lock.schedule(now, world),
            _ => {}
        }
        self.demote(world);
    }

    fn requested(&mut self, now: Nanos, process: usize, world: &World) {
        self.now = now;
        let client = &world.processes[process];
        let standing = self.standings.entry(process).or_default();
        let used = Nanos((client.work - standing.promoted_at) as u64);
        if now.since(client.last_used) > PROMOTED_AFTER + used {
            *standing = Standing { level: 0, promoted_at: client.work };
            self.place(process, world);
        }
        self.lock.requested(process, now, world);
        self.demote(world);
    }

    fn poll(&mut self, world: &World) -> Step {
        self.lock.next_output().map_or_else(|| Step::Wait(self.lock.deadline(self.now, world)), Step::Emit)
    }

    fn takes_turns(&self, _gpu: usize) -> bool {
        true
    }
}
