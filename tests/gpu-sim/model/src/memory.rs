//! Where managed memory is: the rules of nvidia-uvm, without time.
//!
//! Problem: tests of a memory manager need the driver's behaviour to the block: who is evicted, for whom, how many bytes
//! move, and what does not move at all.
//!
//! Approach: every card is a number of 2 MiB chunks. Managed blocks of all processes stand in one list per card, ordered by
//! when they last became resident there (by a fault or a migration; access does not refresh). A block that needs a chunk
//! takes one that UVM kept, then a free one, then that of the head of the list. The first touch populates a block without
//! moving bytes; whatever was pushed out comes back with its bytes. Plain allocations evict managed blocks, too.
//!
//! Invariants: plain, managed, kept and free chunks add up to the card; a block is in at most one place; every byte that
//! moves is in exactly one [`Effect`].

mod card;
mod span;

use std::collections::{BTreeMap, HashMap};

use card::Card;
pub use card::Usage;
use nvshare_abi::uvm::{MakeResidentCause, PAGE_BYTES};
pub use span::BlockSpan;
use span::FreeSpans;

use crate::{
    client::BLOCK_BYTES,
    ids::{BlockId, CardId, SpaceId},
};

/// Where a block's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: never touched.
    Nowhere,
    /// In host memory.
    Host,
    /// On a card.
    Card(CardId),
}

/// What an operation did to one block, in the order in which the driver does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// A block came to be, filled with zeros, without a migration.
    Populated {
        /// Which.
        block: BlockId,
        /// Whose.
        space: SpaceId,
        /// Where.
        place: Place,
        /// Its size.
        bytes: u64,
    },
    /// A block's bytes moved.
    Moved {
        /// Which.
        block: BlockId,
        /// Whose; for an eviction that is the victim.
        space: SpaceId,
        /// Its first byte.
        address: u64,
        /// Its size.
        bytes: u64,
        /// From which card; `None` is the host.
        from: Option<CardId>,
        /// To which card; `None` is the host.
        to: Option<CardId>,
        /// Why.
        cause: MakeResidentCause,
        /// Host pages were allocated for it for the first time.
        first_on_host: bool,
    },
}

/// Why the model refuses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// No such VA space.
    #[error("the VA space is gone")]
    NoSpace,
    /// The range overlaps one that is registered, is empty, is not of whole pages, or wraps around.
    #[error(
        "the range {base:#x}+{len:#x} is empty, wraps around, is not of whole pages, or overlaps managed memory"
    )]
    BadRange {
        /// First byte.
        base: u64,
        /// Bytes.
        len: u64,
    },
    /// No such range.
    #[error("no managed range begins at {0:#x} with that length")]
    NoRange(u64),
    /// The table of blocks is full.
    #[error("managed memory of all processes together exceeds the simulator's {0} blocks of 2 MiB")]
    TooMuch(u32),
    /// Plain memory does not fit even when all managed memory is evicted.
    #[error("{wanted} bytes wanted, {free} bytes can be freed")]
    OutOfMemory {
        /// Asked for.
        wanted: u64,
        /// Could be had.
        free: u64,
    },
}

#[derive(Debug)]
struct Block {
    space: SpaceId,
    address: u64,
    bytes: u64,
    place: Place,
    order: u64,
    host_backed: bool,
}

#[derive(Debug)]
struct Range {
    len: u64,
    span: BlockSpan,
}

/// All managed and plain memory of the simulated host.
#[derive(Debug)]
pub struct Memory {
    cards: Vec<Card>,
    spaces: HashMap<SpaceId, BTreeMap<u64, Range>>,
    blocks: HashMap<BlockId, Block>,
    free: FreeSpans,
    max_blocks: u32,
    arrivals: u64,
    spaces_made: u64,
}

impl Memory {
    /// Cards of these sizes in bytes, and at most `max_blocks` managed blocks.
    pub fn new(cards: &[u64], max_blocks: u32) -> Self {
        Self {
            cards: cards.iter().map(|&bytes| Card::new(bytes)).collect(),
            spaces: HashMap::new(),
            blocks: HashMap::new(),
            free: FreeSpans::new(max_blocks),
            max_blocks,
            arrivals: 0,
            spaces_made: 0,
        }
    }

    /// A process begins.
    pub fn create_space(&mut self) -> SpaceId {
        self.spaces_made += 1;
        let id = SpaceId(self.spaces_made);
        self.spaces.insert(id, BTreeMap::new());
        id
    }

    /// A process's memory goes, plain and managed. Returns its blocks, which exist no longer.
    pub fn destroy_space(&mut self, space: SpaceId) -> Vec<BlockSpan> {
        self.free_all_plain(space);
        let ranges = self.spaces.remove(&space).unwrap_or_default();
        let spans: Vec<_> = ranges.into_values().map(|range| range.span).collect();
        for &span in &spans {
            self.forget(span);
        }
        spans
    }

    /// Declares a range managed; its blocks are numbered in address order.
    pub fn register(&mut self, space: SpaceId, base: u64, len: u64) -> Result<BlockSpan, MemoryError> {
        let bad = MemoryError::BadRange { base, len };
        let whole = len > 0 && base.is_multiple_of(PAGE_BYTES) && len.is_multiple_of(PAGE_BYTES);
        let end = base.checked_add(len).filter(|_| whole).ok_or(bad.clone())?;
        let ranges = self.spaces.get_mut(&space).ok_or(MemoryError::NoSpace)?;
        let overlaps =
            ranges.range(..end).next_back().is_some_and(|(&start, range)| start + range.len > base);
        if overlaps {
            return Err(bad);
        }
        let (first, last) = (base / BLOCK_BYTES, (end - 1) / BLOCK_BYTES);
        let count = u32::try_from(last - first + 1).ok();
        let span =
            count.and_then(|count| self.free.take(count)).ok_or(MemoryError::TooMuch(self.max_blocks))?;
        for (index, id) in (first..=last).zip(span.iter()) {
            let address = base.max(index * BLOCK_BYTES);
            let bytes = end.min((index + 1) * BLOCK_BYTES) - address;
            let block = Block { space, address, bytes, place: Place::Nowhere, order: 0, host_backed: false };
            self.blocks.insert(id, block);
        }
        ranges.insert(base, Range { len, span });
        Ok(span)
    }

    /// Gives a registered range back.
    pub fn unregister(&mut self, space: SpaceId, base: u64, len: u64) -> Result<BlockSpan, MemoryError> {
        let ranges = self.spaces.get_mut(&space).ok_or(MemoryError::NoSpace)?;
        if ranges.get(&base).is_none_or(|range| range.len != len) {
            return Err(MemoryError::NoRange(base));
        }
        let span = ranges.remove(&base).map(|range| range.span).ok_or(MemoryError::NoRange(base))?;
        self.forget(span);
        Ok(span)
    }

    fn forget(&mut self, span: BlockSpan) {
        for id in span.iter() {
            if let Some(Block { place: Place::Card(card), order, .. }) = self.blocks.remove(&id) {
                self.cards[card.0].discard(order);
            }
        }
        for card in &mut self.cards {
            card.trim();
        }
        self.free.give_back(span);
    }

    /// Takes plain memory on a card, evicting managed blocks where nothing is free.
    pub fn allocate_plain(
        &mut self,
        space: SpaceId,
        card: CardId,
        bytes: u64,
    ) -> Result<Vec<Effect>, MemoryError> {
        let free = self.cards[card.0].reclaimable();
        let shortfall = self.cards[card.0]
            .shortfall(space, bytes)
            .ok_or(MemoryError::OutOfMemory { wanted: bytes, free })?;
        let mut effects = Vec::new();
        for _ in 0..shortfall {
            self.evict_one(card, &mut effects);
        }
        self.cards[card.0].take_plain(space, bytes);
        Ok(effects)
    }

    /// Gives plain memory back.
    pub fn free_plain(&mut self, space: SpaceId, card: CardId, bytes: u64) {
        self.cards[card.0].free_plain(space, bytes);
    }

    /// Gives back all plain memory of a process.
    pub fn free_all_plain(&mut self, space: SpaceId) {
        for card in &mut self.cards {
            card.free_plain(space, u64::MAX);
        }
    }

    /// Plain bytes that a process holds on a card.
    pub fn plain_of(&self, space: SpaceId, card: CardId) -> u64 {
        self.cards[card.0].plain_of(space)
    }

    /// What occupies a card.
    pub fn usage(&self, card: CardId) -> Usage {
        self.cards[card.0].usage()
    }

    /// Bytes of a process's blocks on a card.
    pub fn resident_of(&self, space: SpaceId, card: CardId) -> u64 {
        self.blocks
            .values()
            .filter(|block| block.space == space && block.place == Place::Card(card))
            .map(|block| block.bytes)
            .sum()
    }

    /// Where a block is; nowhere if there is no such block.
    pub fn place(&self, block: BlockId) -> Place {
        self.blocks.get(&block).map_or(Place::Nowhere, |block| block.place)
    }

    /// A block's first byte and size.
    pub fn extent(&self, block: BlockId) -> Option<(u64, u64)> {
        self.blocks.get(&block).map(|block| (block.address, block.bytes))
    }

    /// The block that holds an address.
    pub fn block_at(&self, space: SpaceId, address: u64) -> Option<BlockId> {
        let (&base, range) = self.spaces.get(&space)?.range(..=address).next_back()?;
        if address >= base + range.len {
            return None;
        }
        let index = address / BLOCK_BYTES - base / BLOCK_BYTES;
        Some(BlockId(range.span.first.0 + index as u32))
    }

    /// The blocks that overlap `[base, base + len)`, in address order.
    pub fn blocks_in(&self, space: SpaceId, base: u64, len: u64) -> Vec<BlockId> {
        let end = base.saturating_add(len);
        let Some(ranges) = self.spaces.get(&space) else { return Vec::new() };
        let from = ranges.range(..=base).next_back().map_or(base, |(&start, _)| start);
        ranges
            .range(from..end.max(from))
            .flat_map(|(_, range)| range.span.iter())
            .filter(|id| {
                self.blocks
                    .get(id)
                    .is_some_and(|block| block.address < end && block.address + block.bytes > base)
            })
            .collect()
    }

    /// Makes a block resident on a card, evicting if it must. A block that is there already stays as it is, and keeps its
    /// place in the order. If the card is full of plain memory the block stays where it is (the driver maps it remotely).
    pub fn bring_to_card(&mut self, id: BlockId, card: CardId, cause: MakeResidentCause) -> Vec<Effect> {
        let mut effects = Vec::new();
        let Some(block) = self.blocks.get(&id) else { return effects };
        let from = block.place;
        if from == Place::Card(card) {
            return effects;
        }
        if !self.cards[card.0].has_room() {
            self.evict_one(card, &mut effects);
            if !self.cards[card.0].has_room() {
                return effects;
            }
        }
        // Between cards the bytes go through host memory, in two migrations.
        if let Place::Card(_) = from {
            self.push_out(id, cause, &mut effects);
        }
        self.arrivals += 1;
        let order = self.arrivals;
        self.cards[card.0].arrive(order, id);
        if let Some(block) = self.blocks.get_mut(&id) {
            block.place = Place::Card(card);
            block.order = order;
            let (space, address, bytes) = (block.space, block.address, block.bytes);
            effects.push(match from {
                Place::Nowhere => Effect::Populated { block: id, space, place: Place::Card(card), bytes },
                Place::Host | Place::Card(_) => Effect::Moved {
                    block: id,
                    space,
                    address,
                    bytes,
                    from: None,
                    to: Some(card),
                    cause,
                    first_on_host: false,
                },
            });
        }
        effects
    }

    /// Makes a block resident in host memory.
    pub fn bring_to_host(&mut self, id: BlockId, cause: MakeResidentCause) -> Vec<Effect> {
        let mut effects = Vec::new();
        match self.place(id) {
            Place::Host => {}
            Place::Card(_) => self.push_out(id, cause, &mut effects),
            Place::Nowhere => {
                if let Some(block) = self.blocks.get_mut(&id) {
                    block.place = Place::Host;
                    block.host_backed = true;
                    let (space, bytes) = (block.space, block.bytes);
                    effects.push(Effect::Populated { block: id, space, place: Place::Host, bytes });
                }
            }
        }
        effects
    }

    fn evict_one(&mut self, card: CardId, effects: &mut Vec<Effect>) {
        if let Some(victim) = self.cards[card.0].next_victim() {
            self.push_out(victim, MakeResidentCause::Eviction, effects);
        }
    }

    fn push_out(&mut self, id: BlockId, cause: MakeResidentCause, effects: &mut Vec<Effect>) {
        let Some(block) = self.blocks.get_mut(&id) else { return };
        let Place::Card(from) = block.place else { return };
        self.cards[from.0].leave(block.order);
        block.place = Place::Host;
        effects.push(Effect::Moved {
            block: id,
            space: block.space,
            address: block.address,
            bytes: block.bytes,
            from: Some(from),
            to: None,
            cause,
            first_on_host: !block.host_backed,
        });
        block.host_backed = true;
    }
}

#[cfg(test)]
mod tests;
