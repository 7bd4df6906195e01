//! Why a plan changed, with the figures that led to it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    input::ModeOrder,
    units::{Bytes, Nanos},
};

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
        /// What the GPU does side by side, in thousandths of its time.
        shared_milli: u32,
        /// What it is expected to do in turns.
        turns_milli: u32,
        /// The counters could not prove that the refaults are curable; there were enough to act all the same.
        weak: bool,
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
    /// What the clients use at most fits, although what they allocated does not.
    WorkingSetsFit {
        /// Upper bounds of all working sets together.
        high: Bytes,
        /// What the GPU can hold.
        capacity: Bytes,
    },
    /// All ran together for a moment, and nobody pushed anybody out.
    ProbeHeld {
        /// How long.
        length: Nanos,
    },
    /// Clients were packed into other sets.
    Repacked {
        /// How many sets there were.
        before: u32,
        /// How many there are.
        now: u32,
        /// The largest set's upper bound.
        largest: Bytes,
        /// What the GPU can hold.
        capacity: Bytes,
    },
    /// Clients of one set pushed each other out.
    SetMisfit {
        /// Refaulted bytes in the detector's window.
        refaulted: Bytes,
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
            Self::Thrash {
                refaulted,
                stall_milli,
                committed,
                capacity,
                provisional,
                first_refault: _,
                shared_milli,
                turns_milli,
                weak,
            } => {
                write!(f, "thrash: {refaulted} came back that others had pushed out")?;
                if let Some(stall) = stall_milli {
                    write!(f, ", {} % of the time went into faults", stall / 10)?;
                }
                write!(f, ", {committed} committed on {capacity}")?;
                write!(
                    f,
                    "; side by side the GPU is of use for about {} % of the time, in turns {} %",
                    shared_milli / 10,
                    turns_milli / 10
                )?;
                if *weak {
                    f.write_str("; the counters alone do not prove it")?;
                }
                if *provisional { f.write_str(" (provisional)") } else { Ok(()) }
            }
            Self::ThrashConfirmed { moved } => write!(f, "thrash confirmed: one rotation moved {moved}"),
            Self::Fits { committed, capacity } => write!(f, "everything fits: {committed} on {capacity}"),
            Self::EvictionFree { rotations, moved } => {
                write!(f, "working sets fit: {rotations} rotations moved {moved}")
            }
            Self::WorkingSetsFit { high, capacity } => {
                write!(f, "working sets fit: at most {high} are used on {capacity}")
            }
            Self::ProbeHeld { length } => {
                write!(f, "working sets fit: all ran together for {length} and nothing was pushed out")
            }
            Self::Repacked { before, now, largest, capacity } => {
                write!(f, "{now} sets instead of {before}: the largest uses at most {largest} on {capacity}")
            }
            Self::SetMisfit { refaulted } => {
                write!(f, "a set does not fit: {refaulted} came back that its clients had pushed out")
            }
            Self::Alone => f.write_str("at most one client has work"),
            Self::Blind => f.write_str("no sensor tells what the driver does"),
            Self::Operator { mode } => write!(f, "the operator ordered {mode:?}"),
        }
    }
}
