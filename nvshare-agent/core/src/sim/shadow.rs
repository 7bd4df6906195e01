//! Which blocks were evicted, and how many of their owner's blocks since: what tells thrash that taking turns
//! would cure from thrash that a client makes for itself.
//!
//! **Approach.** A direct-mapped table of fixed size, as a probe in the kernel can keep it: a block that is
//! evicted leaves a shadow with the number of its owner's evictions so far. When it returns, the difference
//! plus what the owner holds bounds from above the distinct blocks the owner brought in since. If that fits
//! into the capacity, first-in-first-out alone would have kept the block: its refault is curable.
//!
//! **Invariants.** A shadow is counted once. Collisions overwrite: they hide refaults and never invent any.

use crate::sim::rng::mix;

/// Entries of a table; 16 bytes each.
const ENTRIES: usize = 1 << 18;

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// 0: no shadow.
    tag: u32,
    owner: u32,
    /// The owner's evictions when this one was made.
    evictions: u32,
}

/// What a block's return is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It was not evicted before, or its shadow is lost.
    FirstTouch,
    /// Alone, its owner would have kept it.
    Curable,
    /// Its owner would have lost it alone as well.
    Own,
}

/// The shadows of one GPU.
#[derive(Clone, Debug)]
pub struct ShadowTable {
    entries: Vec<Entry>,
    /// Evictions so far, by owner.
    evictions: Vec<u32>,
}

impl Default for ShadowTable {
    fn default() -> Self {
        Self { entries: vec![Entry::default(); ENTRIES], evictions: Vec::new() }
    }
}

impl ShadowTable {
    /// A block of this owner left the GPU for want of room.
    pub fn evicted(&mut self, owner: u32, block: u32) {
        let own = owner as usize;
        if self.evictions.len() <= own {
            self.evictions.resize(own + 1, 0);
        }
        self.evictions[own] = self.evictions[own].wrapping_add(1);
        let (index, tag) = place(owner, block);
        self.entries[index] = Entry { tag, owner, evictions: self.evictions[own] };
    }

    /// A block came to the GPU, while its owner held `resident` blocks of `capacity`.
    pub fn returned(&mut self, owner: u32, block: u32, resident: u32, capacity: u32) -> Class {
        let (index, tag) = place(owner, block);
        let entry = self.entries[index];
        if entry.tag != tag || entry.owner != owner {
            return Class::FirstTouch;
        }
        self.entries[index] = Entry::default();
        let own = self.evictions.get(owner as usize).copied().unwrap_or_default();
        let since = own.wrapping_sub(entry.evictions);
        if u64::from(since) + u64::from(resident) < u64::from(capacity) { Class::Curable } else { Class::Own }
    }
}

fn place(owner: u32, block: u32) -> (usize, u32) {
    let hash = mix(u64::from(owner) << 32 | u64::from(block));
    (hash as usize % ENTRIES, (hash >> 32) as u32 | 1)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// Clients that sweep in turn over so many blocks each, first in first out; the share of returns that are
    /// curable, by client.
    fn shares(capacity: usize, sets: &[u32]) -> Vec<f64> {
        let mut table = ShadowTable::default();
        let mut fifo: VecDeque<(u32, u32)> = VecDeque::new();
        let mut held = vec![0u32; sets.len()];
        let mut counts = vec![(0u32, 0u32); sets.len()];
        let mut cursors = vec![0u32; sets.len()];
        for turn in 0..200 {
            for (owner, &blocks) in sets.iter().enumerate() {
                for _ in 0..37 + turn % 5 {
                    let key = (owner as u32, cursors[owner]);
                    cursors[owner] = (cursors[owner] + 1) % blocks;
                    if fifo.contains(&key) {
                        continue;
                    }
                    if fifo.len() == capacity {
                        let victim = fifo.pop_front().unwrap();
                        held[victim.0 as usize] -= 1;
                        table.evicted(victim.0, victim.1);
                    }
                    match table.returned(key.0, key.1, held[owner], capacity as u32) {
                        Class::Curable => counts[owner].0 += 1,
                        Class::Own => counts[owner].1 += 1,
                        Class::FirstTouch => {}
                    }
                    held[owner] += 1;
                    fifo.push_back(key);
                }
            }
        }
        counts.iter().map(|&(curable, own)| f64::from(curable) / f64::from((curable + own).max(1))).collect()
    }

    #[test]
    fn mutual_thrash_of_clients_that_fit_alone_is_curable_and_self_thrash_is_not() {
        assert_eq!(shares(100, &[95, 95]), [1.0, 1.0]);
        assert_eq!(shares(100, &[60, 60, 60]), [1.0, 1.0, 1.0]);
        assert_eq!(shares(100, &[120]), [0.0]);
        assert_eq!(shares(100, &[120, 120]), [0.0, 0.0]);
        let mixed = shares(100, &[120, 10]);
        assert!(mixed[0] <= 0.0 && mixed[1] > 0.9, "{mixed:?}");
    }

    #[test]
    fn a_shadow_is_counted_once() {
        let mut table = ShadowTable::default();
        table.evicted(1, 5);
        assert_eq!(table.returned(1, 5, 0, 10), Class::Curable);
        assert_eq!(table.returned(1, 5, 0, 10), Class::FirstTouch);
        assert_eq!(table.returned(2, 5, 0, 10), Class::FirstTouch);
    }
}
