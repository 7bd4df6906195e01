//! What the engine decides, and what it shows of itself.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    id::{ClientId, Epoch, GpuId},
    input::ModeOrder,
    units::{Bytes, Nanos},
};

pub use crate::{
    account::view::{AccountView, EffectView, PressureView, StallView},
    reason::Reason,
};

/// The answer of [`crate::Engine::poll`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Poll {
    /// Carry this out, then poll again.
    Emit(Output),
    /// Nothing more for now. At this time, if nothing else comes first, hand in [`crate::Input::Tick`].
    Wait(Option<Nanos>),
}

/// One decision to carry out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Output {
    /// Open the client's gate.
    Grant {
        /// Which client.
        client: ClientId,
        /// Which GPU.
        gpu: GpuId,
        /// The epoch this grant opens.
        epoch: Epoch,
        /// What the shim may bring back ahead of need; zero leaves it to the driver.
        prefetch: Bytes,
    },
    /// Close the client's gate.
    Revoke {
        /// Which client.
        client: ClientId,
        /// Which GPU.
        gpu: GpuId,
        /// The epoch this revocation opens.
        epoch: Epoch,
        /// The drain must end within this time.
        drain_within: Nanos,
        /// At most this is to be moved off the card; zero leaves it to the driver.
        shortfall: Bytes,
    },
    /// The plan of a GPU changed.
    Plan(PlanChange),
    /// The client did not answer a revocation in time and is scheduled around from here on.
    Unresponsive {
        /// Which client.
        client: ClientId,
        /// Which GPU.
        gpu: GpuId,
        /// The revocation it ignored.
        epoch: Epoch,
    },
    /// The client's drains keep failing; it is scheduled as one that cannot be revoked.
    NotRevocable {
        /// Which client.
        client: ClientId,
        /// Which GPU.
        gpu: GpuId,
    },
}

/// How the clients of a GPU run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// One set holds everybody: all run side by side.
    #[default]
    Shared,
    /// Sets that fit take turns.
    Sets,
    /// One job at a time.
    Exclusive,
}

impl Mode {
    /// Every mode.
    pub const ALL: [Self; 3] = [Self::Shared, Self::Sets, Self::Exclusive];

    /// The name used in JSON, metrics and for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Sets => "sets",
            Self::Exclusive => "exclusive",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A change of plan, with the figures that led to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanChange {
    /// When.
    pub at: Nanos,
    /// Which GPU.
    pub gpu: GpuId,
    /// The mode before.
    pub from: Mode,
    /// The mode after.
    pub to: Mode,
    /// Why.
    pub reason: Reason,
    /// The sets, in the order of their turns.
    pub sets: Vec<Vec<ClientId>>,
}

/// What the engine shows of itself, for status, metrics and `explain`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct View {
    /// Each GPU, by UUID.
    pub gpus: Vec<GpuView>,
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuView {
    /// Which one.
    pub gpu: GpuId,
    /// How its clients run.
    pub mode: Mode,
    /// Whether an operator forces the mode.
    pub order: ModeOrder,
    /// Why, and since when.
    pub last_change: Option<PlanChange>,
    /// What managed memory can use.
    pub capacity: Bytes,
    /// Managed memory of all clients.
    pub committed: Bytes,
    /// The quantum in force; `None` while shared.
    pub quantum: Option<Nanos>,
    /// Measured cost of a hand-over; `None` before one was measured.
    pub handover_cost: Option<Nanos>,
    /// The detector's evidence, 1000 = the threshold.
    pub score_milli: u32,
    /// Share of the window in which faults were being served, in thousandths.
    pub stall_milli: Option<u32>,
    /// Curable refaulted bytes since the start.
    pub curable_refaults: Bytes,
    /// Refaulted bytes since the start that taking turns would not have avoided.
    pub self_refaults: Bytes,
    /// What a hand-over is taken to cost: as measured, or by the link's rate before that.
    pub expected_cost: Option<Nanos>,
    /// The sets, in the order of their turns; an interactive client may be in several.
    pub sets: Vec<Vec<ClientId>>,
    /// Whose turn it is; empty while shared.
    pub holders: Vec<ClientId>,
    /// Sums of what the clients that have work use, at least and at most.
    pub working_sets: (Bytes, Bytes),
    /// What the GPU was last reckoned to do side by side and in turns, in thousandths of its time.
    pub reckoned_milli: Option<(u32, u32)>,
    /// What may change the plan next.
    pub outlook: Outlook,
    /// What paging and hand-overs cost, and what turns changed.
    pub account: AccountView,
    /// Each client on this GPU.
    pub clients: Vec<ClientView>,
}

/// What may change the plan of a GPU next, besides certainty (everything fits, one client is left).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Outlook {
    /// Shared: turns begin with the detector's alarm, which must bring this much in refaults.
    Alarm {
        /// More than zero after trials that came to nothing.
        refaults: Bytes,
    },
    /// Turns end when rotations move next to nothing.
    Quiet {
        /// Whether this is a trial.
        provisional: bool,
        /// Quiet rotations so far.
        rotations: u32,
        /// How many it takes.
        needed: u32,
        /// Not before this time.
        not_before: Nanos,
    },
    /// The operator's order holds.
    Ordered,
}

impl fmt::Display for Outlook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alarm { refaults: Bytes::ZERO } => {
                f.write_str("turns begin when clients push each other out")
            }
            Self::Alarm { refaults } => write!(
                f,
                "turns begin when clients push each other out and {refaults} came back, after trials that came to nothing"
            ),
            Self::Quiet { provisional, rotations, needed, not_before: _ } => {
                let kind = if *provisional { "the trial ends" } else { "turns end" };
                write!(
                    f,
                    "{kind} after {needed} rotations in a row that move next to nothing ({rotations} so far)"
                )
            }
            Self::Ordered => f.write_str("nothing, until the operator orders otherwise"),
        }
    }
}

/// One client on one GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientView {
    /// Which client.
    pub client: ClientId,
    /// What it is doing.
    pub state: ClientState,
    /// Managed memory.
    pub managed: Bytes,
    /// Plain device memory.
    pub device: Bytes,
    /// Share in thousandths of the default.
    pub weight_milli: u32,
    /// Its class; a higher class runs first.
    pub priority: i32,
    /// Time it held the GPU (alone or with others) while it had work.
    pub granted: Nanos,
    /// Time it had work and waited for its turn.
    pub waited: Nanos,
    /// Grants so far.
    pub grants: u64,
    /// What it uses of its managed memory, at least.
    pub working_set_low: Bytes,
    /// What it uses of its managed memory, at most.
    pub working_set_high: Bytes,
    /// It uses the GPU shortly and seldom.
    pub interactive: bool,
    /// Work-submitting calls so far.
    pub calls: u64,
    /// Time lost to waiting for memory.
    pub stalled: Nanos,
    /// Refaulted bytes that turns would have avoided.
    pub curable_refaults: Bytes,
    /// Refaulted bytes that they would not.
    pub self_refaults: Bytes,
}

/// What a client is doing on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientState {
    /// Granted, with work.
    Running,
    /// Granted, without work.
    Idle,
    /// Revoked, not yet drained.
    Draining,
    /// Gated, with work.
    Waiting,
    /// Gated, without work.
    Parked,
}

impl ClientState {
    /// Every state.
    pub const ALL: [Self; 5] = [Self::Running, Self::Idle, Self::Draining, Self::Waiting, Self::Parked];

    /// The name used in JSON, metrics and for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Idle => "idle",
            Self::Draining => "draining",
            Self::Waiting => "waiting",
            Self::Parked => "parked",
        }
    }
}
