//! One card's memory: who has its 2 MiB chunks, and in which order managed ones would be evicted.

use std::collections::BTreeMap;

use crate::{
    client::BLOCK_BYTES,
    ids::{BlockId, SpaceId},
};

/// Bytes of a card by use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Usable memory.
    pub total: u64,
    /// Plain allocations, rounded up to whole chunks for each process.
    pub plain: u64,
    /// Managed blocks that are resident.
    pub managed: u64,
    /// Chunks that UVM keeps although nothing is in them; they count as used until their last managed user frees memory.
    pub kept: u64,
}

/// A chunk is plain, managed, kept by UVM, or free.
#[derive(Debug)]
pub(super) struct Card {
    chunks: u64,
    plain: BTreeMap<SpaceId, u64>,
    kept: u64,
    /// Resident blocks by the time they became so; the first is the next victim. Access does not change the order.
    by_arrival: BTreeMap<u64, BlockId>,
}

impl Card {
    pub(super) fn new(bytes: u64) -> Self {
        Self { chunks: bytes / BLOCK_BYTES, plain: BTreeMap::new(), kept: 0, by_arrival: BTreeMap::new() }
    }

    fn plain_chunks(&self) -> u64 {
        self.plain.values().map(|bytes| bytes.div_ceil(BLOCK_BYTES)).sum()
    }

    fn free_chunks(&self) -> u64 {
        self.chunks - self.plain_chunks() - self.kept - self.by_arrival.len() as u64
    }

    pub(super) fn usage(&self) -> Usage {
        Usage {
            total: self.chunks * BLOCK_BYTES,
            plain: self.plain_chunks() * BLOCK_BYTES,
            managed: self.by_arrival.len() as u64 * BLOCK_BYTES,
            kept: self.kept * BLOCK_BYTES,
        }
    }

    /// Bytes that could be had for plain memory by evicting everything managed.
    pub(super) fn reclaimable(&self) -> u64 {
        (self.chunks - self.plain_chunks()) * BLOCK_BYTES
    }

    pub(super) fn plain_of(&self, space: SpaceId) -> u64 {
        self.plain.get(&space).copied().unwrap_or(0)
    }

    /// Chunks that must be evicted before `space` can have `bytes` more of plain memory; `None` if that is impossible.
    pub(super) fn shortfall(&self, space: SpaceId, bytes: u64) -> Option<u64> {
        let held = self.plain_of(space);
        let wanted = held.checked_add(bytes)?.div_ceil(BLOCK_BYTES) - held.div_ceil(BLOCK_BYTES);
        if wanted * BLOCK_BYTES > self.reclaimable() {
            return None;
        }
        Some(wanted.saturating_sub(self.free_chunks() + self.kept))
    }

    /// Takes plain memory; the shortfall has been evicted.
    pub(super) fn take_plain(&mut self, space: SpaceId, bytes: u64) {
        let before = self.plain_chunks();
        let free = self.free_chunks();
        *self.plain.entry(space).or_default() += bytes;
        let more = self.plain_chunks() - before;
        self.kept -= more.saturating_sub(free);
    }

    pub(super) fn free_plain(&mut self, space: SpaceId, bytes: u64) {
        if let Some(held) = self.plain.get_mut(&space) {
            *held = held.saturating_sub(bytes);
            if *held == 0 {
                self.plain.remove(&space);
            }
        }
    }

    /// Whether a managed block can arrive without an eviction.
    pub(super) fn has_room(&self) -> bool {
        self.kept > 0 || self.free_chunks() > 0
    }

    pub(super) fn next_victim(&self) -> Option<BlockId> {
        self.by_arrival.first_key_value().map(|(_, &block)| block)
    }

    /// A block arrives; there is room. `order` grows with every arrival.
    pub(super) fn arrive(&mut self, order: u64, block: BlockId) {
        self.kept = self.kept.saturating_sub(1);
        self.by_arrival.insert(order, block);
    }

    /// A block's bytes left, but UVM keeps the chunk for the next block.
    pub(super) fn leave(&mut self, order: u64) {
        if self.by_arrival.remove(&order).is_some() {
            self.kept += 1;
        }
    }

    /// A block is freed, and its chunk with it.
    pub(super) fn discard(&mut self, order: u64) {
        self.by_arrival.remove(&order);
    }

    /// UVM gives back what it keeps.
    pub(super) fn trim(&mut self) {
        self.kept = 0;
    }
}
