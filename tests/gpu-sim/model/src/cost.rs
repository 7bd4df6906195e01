//! How long the driver's work takes.
//!
//! `t_batch = base + per_block · blocks + bytes / rate`, with rates by what happens to the bytes. The defaults were fitted to
//! an H100 on PCIe 5; the time of an eviction on the host's side has never been measured and is a plain assumption.

use std::time::Duration;

use crate::{ids::CardId, memory::Effect};

/// Rates in bytes per second, times in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// Fault service: fixed part of a batch.
    pub batch_ns: u64,
    /// Fault service: for each block in the batch.
    pub block_ns: u64,
    /// Bytes that faults bring in.
    pub fault_in: f64,
    /// Bytes that a first touch fills with zeros.
    pub zero_fill: f64,
    /// Bytes that an eviction pushes out to host pages that exist.
    pub evict: f64,
    /// Bytes pushed out when the host pages must be allocated first.
    pub first_out: f64,
    /// Bytes prefetched to the card.
    pub prefetch_in: f64,
    /// Bytes prefetched to the host, where every page is mapped afterwards.
    pub prefetch_out: f64,
    /// The same when the program's mapping is not writable: the driver skips mapping the pages.
    pub prefetch_out_protected: f64,
    /// The link, each way.
    pub link: f64,
    /// One CPU fault on memory that is on the card (a block takes up to six).
    pub cpu_fault_ns: u64,
    /// How long one process computes before another gets its turn.
    pub slice_ns: u64,
    /// Fault entries that a kernel raises for each whole block.
    pub entries_per_block: u32,
    /// Blocks on which one kernel faults at a time.
    pub fault_window: u32,
}

const GB: f64 = 1e9;

impl Costs {
    /// H100 on PCIe 5 x16.
    pub const H100_PCIE5: Self = Self {
        batch_ns: 15_000,
        block_ns: 12_000,
        fault_in: 5.4 * GB,
        zero_fill: 22.0 * GB,
        evict: 15.0 * GB,
        first_out: 4.0 * GB,
        prefetch_in: 49.0 * GB,
        prefetch_out: 14.0 * GB,
        prefetch_out_protected: 48.0 * GB,
        link: 54.0 * GB,
        cpu_fault_ns: 160_000,
        slice_ns: 2_000_000,
        // 36,000 entries per GiB on the card: about 70 per block. Half of it keeps the announcements within the time that
        // the block takes anyway.
        entries_per_block: 32,
        fault_window: 4,
    };
    /// P100 on PCIe 3 x16: rates from fits of published makespans.
    pub const P100_PCIE3: Self = Self {
        fault_in: 8.0 * GB,
        evict: 12.0 * GB,
        prefetch_in: 11.5 * GB,
        prefetch_out: 8.0 * GB,
        prefetch_out_protected: 11.5 * GB,
        link: 12.0 * GB,
        ..Self::H100_PCIE5
    };
    /// RTX 5090 on PCIe 5 x16.
    pub const RTX5090_PCIE5: Self = Self { fault_in: 22.0 * GB, evict: 20.0 * GB, ..Self::H100_PCIE5 };

    /// Time of one block's part of a batch, evictions included.
    pub fn fault_effects(&self, effects: &[Effect]) -> Duration {
        let seconds: f64 = effects
            .iter()
            .map(|effect| match *effect {
                Effect::Populated { bytes, .. } => bytes as f64 / self.zero_fill,
                Effect::Moved { to: Some(_), bytes, .. } => bytes as f64 / self.fault_in,
                Effect::Moved { to: None, bytes, first_on_host, .. } => {
                    bytes as f64 / if first_on_host { self.first_out } else { self.evict }
                }
            })
            .sum();
        Duration::from_nanos(self.block_ns) + Duration::from_secs_f64(seconds)
    }

    /// Host time of moving blocks on request, beside the link's: (to cards, to the host).
    pub fn request_effects(&self, effects: &[Effect], protected: bool) -> Duration {
        let seconds: f64 = effects
            .iter()
            .map(|effect| match *effect {
                // Zero-filling by the copy engine is far faster than any move.
                Effect::Populated { bytes, .. } => bytes as f64 / (249.0 * GB),
                Effect::Moved { to: Some(_), bytes, .. } => bytes as f64 / self.prefetch_in,
                Effect::Moved { to: None, bytes, first_on_host: true, .. } => bytes as f64 / self.first_out,
                Effect::Moved {
                    to: None,
                    bytes,
                    cause: nvshare_abi::uvm::MakeResidentCause::Eviction,
                    ..
                } => bytes as f64 / self.evict,
                Effect::Moved { to: None, bytes, .. } if protected => {
                    bytes as f64 / self.prefetch_out_protected
                }
                Effect::Moved { to: None, bytes, .. } => bytes as f64 / self.prefetch_out,
            })
            .sum();
        Duration::from_secs_f64(seconds)
    }
}

/// Bytes over each card's link: (card, in, out) for a list of effects.
pub fn link_bytes(effects: &[Effect], card: CardId) -> (u64, u64) {
    effects.iter().fold((0, 0), |(bytes_in, bytes_out), effect| match *effect {
        Effect::Moved { to: Some(to), bytes, .. } if to == card => (bytes_in + bytes, bytes_out),
        Effect::Moved { from: Some(from), bytes, .. } if from == card => (bytes_in, bytes_out + bytes),
        Effect::Moved { .. } | Effect::Populated { .. } => (bytes_in, bytes_out),
    })
}
