//! What the engine decides, and what it shows of itself.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    id::{ClientId, Epoch, GpuId},
    input::ModeOrder,
    units::{Bytes, Nanos},
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

/// Why a plan changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Reason {
    /// Curable refaults: clients evict each other and would not if they took turns.
    Thrash {
        /// When the first refault of this episode was seen.
        first_refault: Nanos,
        /// Refaulted bytes in the detector's window.
        refaulted: Bytes,
        /// Share of the window in which faults were being served, in thousandths; `None` without a sensor.
        stall_milli: Option<u32>,
        /// Managed memory of all clients.
        committed: Bytes,
        /// What the GPU can hold.
        capacity: Bytes,
        /// Whether this is the first, short trial of exclusive mode.
        provisional: bool,
    },
    /// The trial was confirmed: turns still move memory.
    ThrashConfirmed {
        /// Bytes moved in one rotation.
        moved: Bytes,
    },
    /// Everything allocated fits.
    Fits {
        /// Managed memory of all clients.
        committed: Bytes,
        /// What the GPU can hold.
        capacity: Bytes,
    },
    /// Whole rotations moved nothing, so the working sets fit.
    EvictionFree {
        /// How many rotations.
        rotations: u32,
        /// Bytes moved in the last one.
        moved: Bytes,
    },
    /// At most one client has work.
    Alone,
    /// No sensor can tell; back to what is right most of the time.
    Blind,
    /// The operator said so.
    Operator {
        /// What was ordered.
        mode: ModeOrder,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Thrash { refaulted, stall_milli, committed, capacity, provisional, first_refault: _ } => {
                write!(f, "thrash: {refaulted} came back that others had pushed out")?;
                if let Some(stall) = stall_milli {
                    write!(f, ", {} % of the time went into faults", stall / 10)?;
                }
                write!(f, ", {committed} committed on {capacity}")?;
                if *provisional { f.write_str(" (provisional)") } else { Ok(()) }
            }
            Self::ThrashConfirmed { moved } => write!(f, "thrash confirmed: one rotation moved {moved}"),
            Self::Fits { committed, capacity } => write!(f, "everything fits: {committed} on {capacity}"),
            Self::EvictionFree { rotations, moved } => {
                write!(f, "working sets fit: {rotations} rotations moved {moved}")
            }
            Self::Alone => f.write_str("at most one client has work"),
            Self::Blind => f.write_str("no sensor tells what the driver does"),
            Self::Operator { mode } => write!(f, "the operator ordered {mode:?}"),
        }
    }
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
    /// Each client on this GPU.
    pub clients: Vec<ClientView>,
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
