//! Everybody at once, whatever happens: gates stay open.

use crate::{
    input::Input,
    sim::{
        policy::{Policy, Step},
        world::World,
    },
    units::Nanos,
};

pub(crate) struct Shared;

impl Policy for Shared {
    fn handle(&mut self, _now: Nanos, _input: Input, _world: &World) {}

    fn poll(&mut self, _world: &World) -> Step {
        Step::Wait(None)
    }

    fn takes_turns(&self, _gpu: usize) -> bool {
        false
    }
}
