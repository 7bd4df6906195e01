//! nvshare: the engine that ships.

use crate::{
    engine::{self, Config, Handover},
    input::Input,
    output::{Mode, Output, Poll, View},
    reason::Reason,
    sim::{
        policy::{Change, Policy, Step},
        world::{Engine, World, gpu_of},
    },
    units::Nanos,
};

pub(crate) struct Auto {
    engine: engine::Engine,
    /// By GPU.
    modes: Vec<Mode>,
}

impl Auto {
    pub(crate) fn new(gpus: usize, handover: Engine) -> Self {
        let handover = if handover == Engine::Demand { Handover::Demand } else { Handover::Shim };
        let config = Config { handover, ..Config::default() };
        Self { engine: engine::Engine::new(config), modes: vec![Mode::Shared; gpus] }
    }
}

impl Policy for Auto {
    fn handle(&mut self, now: Nanos, input: Input, _world: &World) {
        self.engine.handle(now, input);
    }

    fn poll(&mut self, _world: &World) -> Step {
        match self.engine.poll() {
            Poll::Wait(deadline) => Step::Wait(deadline),
            Poll::Emit(Output::Plan(change)) => {
                if let Some(mode) = self.modes.get_mut(gpu_of(change.gpu)) {
                    *mode = change.to;
                }
                Step::Changed(Change {
                    gpu: change.gpu,
                    from: change.from,
                    to: change.to,
                    reason: change.reason.to_string(),
                    confirmed: matches!(change.reason, Reason::ThrashConfirmed { .. }),
                })
            }
            Poll::Emit(output) => Step::Emit(output),
        }
    }

    fn takes_turns(&self, gpu: usize) -> bool {
        self.modes.get(gpu).is_some_and(|&mode| mode != Mode::Shared)
    }

    fn view(&self, now: Nanos) -> Option<View> {
        Some(self.engine.view(now))
    }
}
