//! Which of a client's blocks went out, and whether it would have kept those that come back.
//!
//! **Problem.** Bytes do not tell thrash that turns would cure from that of a program which is larger than the GPU.
//!
//! **Approach.** For each block that was evicted, a shadow remembers how much of the *same* client's memory had been
//! evicted by then. When a fault brings the block back, the difference is the client's own eviction distance: that and what
//! it holds on the GPU bound from above what it brought in since, so if both and the block fit into the GPU, the client
//! would have kept the block had it been alone ([`Refault::curable`]). Distances to other clients' evictions say nothing.
//!
//! **Invariants.** An eviction is counted at most once. Memory is bounded; what finds no room is counted in
//! [`Blocks::lost`] and hides refaults, never invents them. What moved unseen ([`Blocks::unseen`]) lengthens distances, so
//! that at worst a curable refault counts as the client's own.

use std::collections::{BTreeMap, btree_map::Entry};

use nvshare_abi::uvm::BLOCK_BYTES;
use nvshare_core::Bytes;
use serde::{Deserialize, Serialize};

/// Blocks of one client on one GPU that are remembered: 256 GiB.
const SHADOWS_MAX: usize = 1 << 17;
/// A move of more is not of managed memory.
const MOVE_MAX: u64 = 1 << 34;

/// What came back by faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refault {
    /// Of what came back, the bytes that the client would have kept alone.
    pub curable: Bytes,
    /// The bytes that it would have lost alone, too, or of which that is not known.
    pub own: Bytes,
}

/// What a client can have on the GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// All its managed memory.
    pub managed: Bytes,
    /// What all clients together can have there; `None` if nobody knows.
    pub capacity: Option<Bytes>,
}

#[derive(Clone, Copy, Debug)]
struct Shadow {
    /// The client's evicted bytes when this block had left.
    evicted: u64,
    /// Of this block, the bytes that are still out.
    out: u64,
}

/// The blocks of one client on one GPU.
#[derive(Debug, Default)]
pub struct Blocks {
    shadows: BTreeMap<u64, Shadow>,
    evicted: u64,
    out: u64,
    /// Of what is out, what may have been freed.
    freed: u64,
    /// Evictions that found no room.
    pub lost: u64,
}

/// The parts of a move, block by block.
fn parts(address: u64, bytes: Bytes) -> impl Iterator<Item = (u64, u64)> {
    let end = address.saturating_add(bytes.0.min(MOVE_MAX));
    let mut at = address;
    std::iter::from_fn(move || {
        let begin = at;
        (begin < end).then(|| {
            let block = begin / BLOCK_BYTES;
            at = block.saturating_add(1).saturating_mul(BLOCK_BYTES).min(end);
            (block, at - begin)
        })
    })
}

impl Blocks {
    /// Memory was evicted to make room.
    pub fn evicted(&mut self, address: u64, bytes: Bytes) {
        for (block, bytes) in parts(address, bytes) {
            self.evicted = self.evicted.saturating_add(bytes);
            let room = self.shadows.len() < SHADOWS_MAX;
            match self.shadows.entry(block) {
                // The rest of a block that leaves in pieces, or a return that was not seen: the older distance is longer.
                Entry::Occupied(mut shadow) => {
                    let shadow = shadow.get_mut();
                    let more = bytes.min(BLOCK_BYTES - shadow.out);
                    shadow.out += more;
                    self.out += more;
                }
                Entry::Vacant(entry) if room => {
                    entry.insert(Shadow { evicted: self.evicted, out: bytes });
                    self.out += bytes;
                }
                Entry::Vacant(_) => self.lost += 1,
            }
        }
    }

    /// Memory came to the GPU because it was asked for, not missed.
    pub fn brought(&mut self, address: u64, bytes: Bytes) {
        for (block, bytes) in parts(address, bytes) {
            self.take(block, bytes);
        }
    }

    /// Memory came to the GPU because of faults.
    pub fn faulted(&mut self, address: u64, bytes: Bytes, holding: Holding) -> Refault {
        let mut refault = Refault::default();
        for (block, bytes) in parts(address, bytes) {
            let resident = holding.managed.0.saturating_sub(self.out - self.freed);
            let Some((shadow, back)) = self.take(block, bytes) else { continue };
            let distance = self.evicted - shadow.evicted;
            let needed = distance.saturating_add(resident).saturating_add(back);
            if holding.capacity.is_some_and(|capacity| needed <= capacity.0) {
                refault.curable += Bytes(back);
            } else {
                refault.own += Bytes(back);
            }
        }
        refault
    }

    /// The client evicted this much while nobody looked.
    pub fn unseen(&mut self, evicted: Bytes) {
        self.evicted = self.evicted.saturating_add(evicted.0);
    }

    /// The client freed this much, which may have been on the GPU or not.
    pub fn freed(&mut self, bytes: Bytes) {
        self.freed = self.freed.saturating_add(bytes.0).min(self.out);
    }

    /// Bytes that are known to be off the GPU.
    pub fn out(&self) -> Bytes {
        Bytes(self.out)
    }

    /// Takes what came back off a block's shadow: the shadow, and how much of the block it covers.
    fn take(&mut self, block: u64, bytes: u64) -> Option<(Shadow, u64)> {
        let Entry::Occupied(mut entry) = self.shadows.entry(block) else { return None };
        let shadow = *entry.get();
        let back = bytes.min(shadow.out);
        self.out -= back;
        self.freed = self.freed.min(self.out);
        if back == shadow.out {
            entry.remove();
        } else {
            entry.get_mut().out -= back;
        }
        Some((shadow, back))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const BLOCK: Bytes = Bytes(BLOCK_BYTES);

    /// Clients that sweep through their blocks on a GPU that evicts what came first, as the driver does.
    struct Gpu {
        capacity: usize,
        resident: VecDeque<(usize, u64)>,
        clients: Vec<(Blocks, u64, Refault)>,
    }

    impl Gpu {
        fn new(capacity: usize, sizes: &[u64]) -> Self {
            let client = |&size| (Blocks::default(), size, Refault::default());
            Self { capacity, resident: VecDeque::new(), clients: sizes.iter().map(client).collect() }
        }

        fn touch(&mut self, client: usize, block: u64) {
            if self.resident.contains(&(client, block)) {
                return;
            }
            if self.resident.len() == self.capacity
                && let Some((victim, out)) = self.resident.pop_front()
            {
                self.clients[victim].0.evicted(out * BLOCK_BYTES, BLOCK);
            }
            let capacity = Some(Bytes(self.capacity as u64 * BLOCK_BYTES));
            let (blocks, size, seen) = &mut self.clients[client];
            let holding = Holding { managed: Bytes(*size * BLOCK_BYTES), capacity };
            let refault = blocks.faulted(block * BLOCK_BYTES, BLOCK, holding);
            seen.curable += refault.curable;
            seen.own += refault.own;
            self.resident.push_back((client, block));
        }

        /// Each sweeps in slices, in turns; returns the share of refaulted bytes that count as curable, in percent.
        fn run(mut self, rounds: usize, slice: u64) -> Vec<u64> {
            let mut at = vec![0; self.clients.len()];
            for _ in 0..rounds {
                for (client, at) in at.iter_mut().enumerate() {
                    for _ in 0..slice {
                        let block = *at % self.clients[client].1;
                        self.touch(client, block);
                        *at += 1;
                    }
                }
            }
            let share =
                |seen: &Refault| (seen.curable.0 * 100).checked_div((seen.curable + seen.own).0).unwrap_or(0);
            self.clients.iter().map(|(_, _, seen)| share(seen)).collect()
        }
    }

    #[test]
    fn two_that_would_fit_alone_are_curable_and_one_that_does_not_fit_is_not() {
        assert_eq!(Gpu::new(100, &[95, 95]).run(200, 10), [100, 100]);
        assert_eq!(Gpu::new(100, &[70, 70]).run(200, 10), [100, 100]);
        assert_eq!(Gpu::new(100, &[60, 60, 60]).run(200, 10), [100, 100, 100]);
        assert_eq!(Gpu::new(100, &[120]).run(200, 10), [0], "alone and too large");
        assert_eq!(Gpu::new(100, &[120, 120]).run(200, 10), [0, 0], "turns would cure neither");
    }

    #[test]
    fn an_eviction_is_counted_once_and_only_if_a_fault_brings_it_back() {
        let holding = Holding { managed: BLOCK, capacity: Some(Bytes::gib(1)) };
        let mut blocks = Blocks::default();
        assert_eq!(blocks.faulted(0, BLOCK, holding), Refault::default(), "first touch");
        blocks.evicted(0, BLOCK);
        blocks.brought(0, BLOCK);
        assert_eq!(blocks.faulted(0, BLOCK, holding), Refault::default(), "a prefetch brought it back");
        blocks.evicted(0, BLOCK);
        assert_eq!(blocks.out(), BLOCK);
        assert_eq!(blocks.faulted(0, BLOCK, holding).curable, BLOCK);
        assert_eq!(blocks.faulted(0, BLOCK, holding), Refault::default(), "only once");
        assert_eq!(blocks.out(), Bytes::ZERO);
    }

    #[test]
    fn a_block_that_moves_in_pieces_is_counted_by_its_bytes() {
        let holding = Holding { managed: BLOCK, capacity: Some(Bytes::gib(1)) };
        let mut blocks = Blocks::default();
        blocks.evicted(0, Bytes(65536));
        blocks.evicted(65536, Bytes(65536));
        assert_eq!(blocks.faulted(0, Bytes(4096), holding).curable, Bytes(4096));
        // More comes in than went out: the rest was never seen to leave.
        assert_eq!(blocks.faulted(4096, BLOCK, holding).curable, Bytes(2 * 65536 - 4096));
        // A move across blocks.
        blocks.evicted(BLOCK_BYTES - 4096, Bytes(8192));
        assert_eq!(blocks.faulted(BLOCK_BYTES, Bytes(4096), holding).curable, Bytes(4096));
        assert_eq!(blocks.out(), Bytes(4096));
    }

    #[test]
    fn what_moved_unseen_never_makes_a_refault_curable() {
        let holding = Holding { managed: BLOCK, capacity: Some(Bytes(10 * BLOCK_BYTES)) };
        let mut blocks = Blocks::default();
        blocks.evicted(0, BLOCK);
        blocks.unseen(Bytes(10 * BLOCK_BYTES));
        assert_eq!(blocks.faulted(0, BLOCK, holding), Refault { curable: Bytes::ZERO, own: BLOCK });
        let blind = Holding { managed: BLOCK, capacity: None };
        blocks.evicted(0, BLOCK);
        assert_eq!(blocks.faulted(0, BLOCK, blind).own, BLOCK, "nobody knows what fits");
    }

    #[test]
    fn memory_that_was_freed_while_it_was_out_leaves_no_room_behind() {
        let holding = Holding { managed: Bytes(5 * BLOCK_BYTES), capacity: Some(Bytes(8 * BLOCK_BYTES)) };
        let evict = |freed: u64| {
            let mut blocks = Blocks::default();
            for block in 0..6 {
                blocks.evicted(block * BLOCK_BYTES, BLOCK);
            }
            blocks.freed(Bytes(freed * BLOCK_BYTES));
            blocks.faulted(0, BLOCK, holding)
        };
        // Five blocks left since, and nothing of the five that it has is thought to be on the GPU.
        assert_eq!(evict(0).curable, BLOCK);
        // Of the six that are out, all may be gone; what it has may be on the GPU.
        assert_eq!(evict(6).own, BLOCK);
        assert_eq!(evict(u64::MAX / BLOCK_BYTES).own, BLOCK);
    }

    #[test]
    fn memory_is_bounded_and_what_finds_no_room_is_counted() {
        let mut blocks = Blocks::default();
        for block in 0..SHADOWS_MAX as u64 + 3 {
            blocks.evicted(block * BLOCK_BYTES, BLOCK);
        }
        assert_eq!((blocks.shadows.len(), blocks.lost), (SHADOWS_MAX, 3));
        // Hostile figures end soon and stay in range.
        blocks.evicted(u64::MAX - 4095, Bytes(u64::MAX));
        blocks.evicted(0, Bytes(u64::MAX));
        assert!(blocks.out().0 <= SHADOWS_MAX as u64 * BLOCK_BYTES);
    }
}
