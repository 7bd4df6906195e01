//! What could be had: knows working sets, phases and arrivals, picks at each change the best plan of the
//! engine's own plan space without any delay, and pays for its hand-overs like everybody.

use std::collections::VecDeque;

use crate::{
    input::Input,
    output::Mode,
    sim::{
        policy::{
            Change, Policy, Step,
            lock::Lock,
            plan::{self, Plan},
        },
        world::{World, gpu_id, process_of},
    },
    units::Nanos,
};

pub(crate) struct Oracle {
    lock: Option<Lock>,
    plan: Option<Plan>,
    /// Who was there, and in which phase, when the plan was made.
    known: Vec<(usize, usize)>,
    /// When something will happen that is known ahead, in order.
    agenda: Vec<Nanos>,
    changes: VecDeque<Change>,
    now: Nanos,
}

impl Oracle {
    pub(crate) fn new(agenda: Vec<Nanos>) -> Self {
        Self { lock: None, plan: None, known: Vec::new(), agenda, changes: VecDeque::new(), now: Nanos::ZERO }
    }

    fn look(&mut self, now: Nanos, world: &World) {
        self.now = now;
        let there = world.alive.iter().map(|&index| (index, &world.processes[index]));
        let known: Vec<(usize, usize)> =
            there.filter(|(_, p)| p.alive()).map(|(index, p)| (index, p.next_phase)).collect();
        if known == self.known {
            return;
        }
        self.known = known;
        let change = self.agenda.iter().copied().find(|&at| at > now);
        let best = plan::best(world, change);
        let from = self.plan.as_ref().map_or(Mode::Shared, |plan| plan.mode);
        if from != best.mode {
            for gpu in 0..world.cards.len() {
                let reason = format!("{} sets, {} each", best.sets.len(), best.quantum);
                self.changes.push_back(Change {
                    gpu: gpu_id(gpu),
                    from,
                    to: best.mode,
                    reason,
                    confirmed: true,
                });
            }
        }
        let lock = self.lock.get_or_insert_with(|| plan::knowing_lock(world));
        for &(process, _) in &self.known {
            if world.processes[process].spec.shim {
                lock.note_gates(process, world);
            }
        }
        if self.plan.as_ref() != Some(&best) {
            plan::carry_out(lock, &best, now, world);
            self.plan = Some(best);
        }
    }
}

impl Policy for Oracle {
    fn handle(&mut self, now: Nanos, input: Input, world: &World) {
        self.now = now;
        if let Some(lock) = &mut self.lock {
            match input {
                Input::ClientLeft { client } => lock.left(process_of(client), now, world),
                Input::Revoked { .. } => lock.answered(now, &input, world),
                Input::Tick => lock.schedule(now, world),
                _ => {}
            }
        }
        self.look(now, world);
    }

    fn requested(&mut self, now: Nanos, process: usize, world: &World) {
        if let Some(lock) = &mut self.lock {
            lock.requested(process, now, world);
        }
        self.look(now, world);
    }

    fn poll(&mut self, world: &World) -> Step {
        if let Some(change) = self.changes.pop_front() {
            return Step::Changed(change);
        }
        let Some(lock) = &mut self.lock else { return Step::Wait(None) };
        lock.next_output().map_or_else(|| Step::Wait(lock.deadline(self.now, world)), Step::Emit)
    }

    fn takes_turns(&self, _gpu: usize) -> bool {
        self.plan.as_ref().is_some_and(|plan| plan.mode != Mode::Shared)
    }
}
