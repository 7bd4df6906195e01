//! The state machine.

use serde::{Deserialize, Serialize};

use crate::{
    input::Input,
    output::{Poll, View},
    units::Nanos,
};

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
}

impl Default for Config {
    fn default() -> Self {
        Self { overhead_milli: 50, quantum_max: Nanos::seconds(30), drain_within: Nanos::seconds(5) }
    }
}

/// The engine of all GPUs of one host.
#[derive(Debug)]
pub struct Engine {
    config: Config,
}

impl Engine {
    /// An engine that knows no GPU and no client yet.
    pub fn new(config: Config) -> Self {
        Self { config }
    }

    /// Takes in one fact that became known at `at`. Times must not run backwards; an earlier one counts as
    /// the latest seen.
    pub fn handle(&mut self, _at: Nanos, _input: Input) {
        let _ = &self.config;
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Poll {
        Poll::Wait(None)
    }

    /// What is to be seen of the engine at `at`.
    pub fn view(&self, _at: Nanos) -> View {
        View::default()
    }
}
