//! Who decides: nvshare's own engine, or what it is compared with. All speak the engine's language.

mod allocation_sum;
mod auto;
mod kind;
pub(crate) mod lock;
mod nixie;
mod oracle;
pub(crate) mod plan;
mod shared;
mod stock;

use crate::{
    id::GpuId,
    input::Input,
    output::{Mode, Output, View},
    sim::world::World,
    units::Nanos,
};

pub use kind::PolicyKind;
pub(crate) use {
    allocation_sum::AllocationSum, auto::Auto, nixie::Nixie, oracle::Oracle, shared::Shared, stock::stock,
};

/// The next thing a policy has to say.
pub(crate) enum Step {
    /// To be carried out.
    Emit(Output),
    /// The plan of a GPU is another one.
    Changed(Change),
    /// Nothing until then.
    Wait(Option<Nanos>),
}

/// A change of plan.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) gpu: GpuId,
    pub(crate) from: Mode,
    pub(crate) to: Mode,
    pub(crate) reason: String,
    /// Turns are here to stay, as opposed to a trial.
    pub(crate) confirmed: bool,
}

pub(crate) trait Policy {
    /// Takes in a fact. Only policies that are said to know more than an agent can may look at the world.
    fn handle(&mut self, now: Nanos, input: Input, world: &World);

    /// A client asks for the GPU, begins to idle or enters another phase. The engine learns of such things by its
    /// sensors instead.
    fn requested(&mut self, _now: Nanos, _process: usize, _world: &World) {}

    fn poll(&mut self, world: &World) -> Step;

    /// Clients take turns on this GPU.
    fn takes_turns(&self, gpu: usize) -> bool;

    /// What the engine shows of itself.
    fn view(&self, _now: Nanos) -> Option<View> {
        None
    }
}
