//! What is to be seen of the books.

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Nanos};

/// What paging and hand-overs cost on one GPU, and what turns changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountView {
    /// Time lost to waiting for memory; `None` while no sensor tells.
    pub pressure: Option<PressureView>,
    /// What the last turns that began for thrash changed; `None` before there were any.
    pub effect: Option<EffectView>,
    /// Time that drains for hand-overs took.
    pub drained: Nanos,
    /// Time of turns in which memory was brought back.
    pub refilled: Nanos,
    /// Bytes that came back during turns.
    pub handed_in: Bytes,
    /// Bytes that went out during turns.
    pub handed_out: Bytes,
}

/// Pressure stall of a GPU's memory, as the kernel has it for main memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PressureView {
    /// At least one client with work waited for memory.
    pub some: StallView,
    /// All clients with work did.
    pub full: StallView,
}

/// One line of pressure figures. Shares are in millionths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StallView {
    /// Over the last ten seconds.
    pub avg10_ppm: u32,
    /// Over the last minute.
    pub avg60_ppm: u32,
    /// Over the last five minutes.
    pub avg300_ppm: u32,
    /// Since the start.
    pub total: Nanos,
}

/// What turns that began for thrash changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EffectView {
    /// Share of the thrash that was lost to waiting for memory, in thousandths.
    pub before_stall_milli: u32,
    /// The same for the turns.
    pub after_stall_milli: u32,
    /// Progress of clients during the turns, waiting included, as a multiple of their progress during the
    /// thrash, in thousandths; at least this. `None` while there is too little to compare.
    pub gain_milli: Option<u32>,
    /// Whether those turns have ended.
    pub ended: bool,
}
