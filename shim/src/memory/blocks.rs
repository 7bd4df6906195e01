//! Blocks by address, in shards, so that threads rarely meet and no operation looks at more than one entry.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What a block is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Managed memory: evictable.
    Managed,
    /// Plain device memory.
    Device,
}

/// One block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) bytes: u64,
    pub(crate) slot: usize,
    pub(crate) kind: Kind,
    /// The context that it was made in, and goes with; 0 if that is not known.
    pub(crate) context: usize,
}

const SHARDS: usize = 64;

/// Multiplies: addresses differ in their middle bits, which a table needs spread over all of them.
#[derive(Debug, Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

type Shard = HashMap<u64, Block, BuildHasherDefault<AddressHasher>>;

/// A map from address (or handle) to block.
#[derive(Debug)]
pub(crate) struct Blocks {
    shards: [Mutex<Shard>; SHARDS],
}

impl Default for Blocks {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| Mutex::default()) }
    }
}

impl Blocks {
    fn shard(&self, key: u64) -> MutexGuard<'_, Shard> {
        // Blocks start at multiples of 512 bytes or 2 MiB; the fold brings both grains into the index.
        let index = (key >> 9 ^ key >> 21 ^ key) as usize % SHARDS;
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a block; returns one that was known there.
    pub(super) fn insert(&self, key: u64, block: Block) -> Option<Block> {
        self.shard(key).insert(key, block)
    }

    /// Forgets a block.
    pub(super) fn remove(&self, key: u64) -> Option<Block> {
        self.shard(key).remove(&key)
    }

    /// Forgets the blocks of a context, and tells of each.
    pub(super) fn remove_all_of(&self, context: usize, mut gone: impl FnMut(Block)) {
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.retain(|_, block| {
                let goes = block.context == context;
                if goes {
                    gone(*block);
                }
                !goes
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_a_hundred_thousand_are_found_and_spread_over_all_shards() {
        let blocks = Blocks::default();
        let block = |n: u64| Block { bytes: n, slot: 0, kind: Kind::Device, context: 1 + n as usize % 2 };
        for grain in [512u64, 2 << 20] {
            for n in 0..100_000 {
                assert_eq!(blocks.insert(0x7f00_0000_0000 + n * grain, block(n)), None);
            }
            let largest = blocks.shards.iter().map(|shard| shard.lock().unwrap().len()).max().unwrap();
            assert!(largest < 2 * 100_000 / SHARDS, "one shard holds {largest} blocks of grain {grain}");
            for n in 0..100_000 {
                assert_eq!(blocks.remove(0x7f00_0000_0000 + n * grain), Some(block(n)));
            }
            assert_eq!(blocks.remove(0x7f00_0000_0000), None);
        }
    }

    #[test]
    fn the_blocks_of_a_context_go_with_it_and_no_others() {
        let blocks = Blocks::default();
        for n in 0..1000 {
            blocks.insert(
                n << 21,
                Block { bytes: n, slot: 0, kind: Kind::Device, context: 1 + n as usize % 3 },
            );
        }
        let mut gone = 0;
        blocks.remove_all_of(2, |block| {
            assert_eq!(block.context, 2);
            gone += 1;
        });
        assert_eq!(gone, 333);
        assert_eq!(blocks.remove(1 << 21), None);
        assert!(blocks.remove(0).is_some() && blocks.remove(2 << 21).is_some());
    }
}
