//! XPUShare's rule, as its code has it: concurrent while the sum of allocations is at most 0.9 of the memory,
//! one at a time from the first moment on in which it is not, and never back. A turn lasts five seconds for
//! each GB allocated, within 10 s and 300 s. The memory is that of the GPU here (its default is a constant of
//! 16 GiB); all else is stock nvshare, which it derives from.

use std::collections::VecDeque;

use crate::{
    input::Input,
    output::Mode,
    sim::{
        policy::{
            Change, Policy, Step,
            lock::{Lock, Release},
            stock::LOOK_EVERY,
        },
        world::{Engine, World, gpu_id, process_of},
    },
    units::{Bytes, Nanos},
};

/// Thousandths of the memory that allocations may take.
const FITS_MILLI: u64 = 900;
const SECONDS_PER_GB: f64 = 5.0;
const QUANTUM_MIN: f64 = 10.0;
const QUANTUM_MAX: f64 = 300.0;

pub(crate) struct AllocationSum {
    lock: Lock,
    overloaded: Vec<bool>,
    changes: VecDeque<Change>,
    now: Nanos,
}

impl AllocationSum {
    pub(crate) fn new(gpus: usize, handover: Engine) -> Self {
        Self {
            lock: Lock::new(Release::Polled(LOOK_EVERY), handover != Engine::Demand),
            overloaded: vec![false; gpus],
            changes: VecDeque::new(),
            now: Nanos::ZERO,
        }
    }

    fn look(&mut self, now: Nanos, world: &World) {
        for (gpu, overloaded) in self.overloaded.iter_mut().enumerate() {
            let memory = world.cards[gpu].model.memory;
            let here = world.alive.iter().map(|&index| &world.processes[index]);
            let sum: Bytes = here
                .filter(|process| process.seats.iter().any(|seat| seat.gpu == gpu))
                .map(|process| process.spec.allocated)
                .sum();
            if sum > memory.per_mille(FITS_MILLI) && !*overloaded {
                *overloaded = true;
                self.changes.push_back(Change {
                    gpu: gpu_id(gpu),
                    from: Mode::Shared,
                    to: Mode::Exclusive,
                    reason: format!("{sum} allocated on {memory}"),
                    confirmed: true,
                });
            }
        }
        for &index in &world.alive {
            let process = &world.processes[index];
            let locked = process.seats.iter().any(|seat| self.overloaded[seat.gpu]);
            if process.spec.shim && locked && self.lock.group_of(index).is_none() {
                let gb = process.spec.allocated.0 as f64 / 1e9;
                let quantum = (gb * SECONDS_PER_GB).clamp(QUANTUM_MIN, QUANTUM_MAX);
                self.lock.joined(index, Nanos((quantum * 1e9) as u64), now, world);
            }
        }
    }
}

impl Policy for AllocationSum {
    fn handle(&mut self, now: Nanos, input: Input, world: &World) {
        self.now = now;
        match input {
            Input::ClientJoined { .. } | Input::Gpu { .. } => self.look(now, world),
            Input::ClientLeft { client } => self.lock.left(process_of(client), now, world),
            Input::Revoked { .. } => self.lock.answered(now, &input, world),
            Input::Tick => self.lock.schedule(now, world),
            _ => {}
        }
    }

    fn requested(&mut self, now: Nanos, process: usize, world: &World) {
        self.now = now;
        self.lock.requested(process, now, world);
    }

    fn poll(&mut self, world: &World) -> Step {
        if let Some(change) = self.changes.pop_front() {
            return Step::Changed(change);
        }
        self.lock.next_output().map_or_else(|| Step::Wait(self.lock.deadline(self.now, world)), Step::Emit)
    }

    fn takes_turns(&self, gpu: usize) -> bool {
        self.overloaded[gpu]
    }
}
