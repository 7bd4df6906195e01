//! Stock nvshare (thesis, NTUA 2021): one lock on the GPU, first come, first served, with a fixed quantum; an
//! idle holder gives it back at the next of the looks it takes every five seconds. Hand-overs are the driver's.

use crate::{
    input::Input,
    sim::{
        policy::{
            Policy, Step,
            lock::{Lock, Release},
        },
        world::{Engine, World, process_of},
    },
    units::Nanos,
};

pub(super) const LOOK_EVERY: Nanos = Nanos::seconds(5);

/// The lock of stock nvshare with this quantum.
pub(crate) fn stock(quantum: Nanos, handover: Engine) -> Exclusive {
    Exclusive {
        lock: Lock::new(Release::Polled(LOOK_EVERY), handover != Engine::Demand),
        quantum,
        now: Nanos::ZERO,
    }
}

/// Everybody for themselves, with the same quantum.
pub(crate) struct Exclusive {
    lock: Lock,
    quantum: Nanos,
    now: Nanos,
}

impl Policy for Exclusive {
    fn handle(&mut self, now: Nanos, input: Input, world: &World) {
        self.now = now;
        match input {
            Input::ClientJoined { client, .. } => {
                self.lock.joined(process_of(client), self.quantum, now, world);
            }
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
        self.lock.next_output().map_or_else(|| Step::Wait(self.lock.deadline(self.now, world)), Step::Emit)
    }

    fn takes_turns(&self, _gpu: usize) -> bool {
        true
    }
}
