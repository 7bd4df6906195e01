//! Scenario files: which GPUs there are, what runs on them, and what happens meanwhile.

mod check;
mod file;

use crate::{
    sim::preset::GpuModel,
    units::{Bytes, Nanos},
};

/// A scenario, checked, with clones counted out.
#[derive(Clone, Debug, PartialEq)]
pub struct Scenario {
    /// What it is about.
    pub title: Option<String>,
    /// The GPUs.
    pub gpus: Vec<GpuModel>,
    /// The clients, in the order of the file.
    pub clients: Vec<ClientSpec>,
    /// What happens, by time.
    pub events: Vec<Event>,
}

/// A client.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientSpec {
    /// Its name; clones are told apart by a number.
    pub name: String,
    /// When it starts.
    pub start: Nanos,
    /// Memory it allocates on each of its GPUs.
    pub allocated: Bytes,
    /// GPU time it needs, on each of its GPUs at once, when alone and resident.
    pub gpu_work: Nanos,
    /// GPU share of its time when alone.
    pub duty: f64,
    /// GPU time of a burst.
    pub burst: Nanos,
    /// Long stretches of CPU time, as between epochs; part of what `duty` leaves to the CPU.
    pub pause: Option<Pause>,
    /// Thousandths of the default share.
    pub weight_milli: u32,
    /// Its class.
    pub priority: i32,
    /// GPUs by index; it runs on all of them at once or not at all.
    pub gpus: Vec<usize>,
    /// Runs under the shim; if not, its memory is plain, is not evicted, and it is not gated.
    pub shim: bool,
    /// What it does with its memory, by the GPU work done so far; the first from 0 on.
    pub phases: Vec<Phase>,
}

/// A long stretch of CPU time, at the start and again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// How long.
    pub length: Nanos,
    /// GPU work between two of them.
    pub every: Nanos,
}

impl Pause {
    /// How many there are in so much GPU work.
    pub(crate) fn count(self, gpu_work: Nanos) -> u64 {
        gpu_work.0.div_ceil(self.every.0.max(1))
    }
}

/// What a client does with its memory from some point of its work on.
#[derive(Clone, Debug, PartialEq)]
pub struct Phase {
    /// From this much of its own GPU work on.
    pub after: Nanos,
    /// The first so many bytes of its memory are in use.
    pub working_set: Bytes,
    /// GPU time to touch the working set once.
    pub sweep: Nanos,
    /// In which order.
    pub access: Access,
}

/// The order in which memory is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// One block after the other, round and round.
    Cyclic,
    /// Any block of the working set, with equal chance.
    Random,
    /// All that is allocated, once, over the whole work.
    Stream,
}

/// Something that happens.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// When.
    pub at: Nanos,
    /// What.
    pub act: Act,
}

/// What happens. Clients are indices into [`Scenario::clients`].
#[derive(Clone, Debug, PartialEq)]
pub enum Act {
    /// The clients die.
    Kill(Vec<usize>),
    /// The agent dies; every gate opens.
    StopAgent,
    /// The agent is started again and knows nothing of what was before.
    StartAgent,
    /// The clients' shares change, in thousandths of the default.
    SetWeight(Vec<usize>, u32),
}

/// Why a scenario was not accepted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{name}:{line}:{column}: {message}")]
pub struct ScenarioError {
    /// The file, as the caller calls it.
    pub name: String,
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
    /// What is wrong and what would be right.
    pub message: String,
}

impl Scenario {
    /// Reads a scenario; `name` is for messages only.
    pub fn parse(name: &str, text: &str) -> Result<Self, ScenarioError> {
        file::parse(name, text)
    }
}
