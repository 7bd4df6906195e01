//! GPU faults: the buffer, and batches as the driver takes them.
//!
//! A kernel that touches a block that is not resident raises several fault entries. One thread per card takes up to
//! [`BATCH_ENTRIES`] of them at a time, of all processes, ordered by process and address, and makes block after block
//! resident. Entries of one block are kept together: once the block is there the rest of them would find nothing to do.

use std::{collections::VecDeque, time::Duration};

use nvshare_abi::uvm::MakeResidentCause;

use crate::{
    client::BLOCK_BYTES,
    cost::Costs,
    ids::{CardId, SpaceId},
    memory::{Effect, Memory},
};

/// Fault entries that the driver takes at most in one batch.
pub const BATCH_ENTRIES: u32 = 256;

/// A kernel waits for the block at `address`. `T` finds the waiter again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<T> {
    /// Whose memory.
    pub space: SpaceId,
    /// The first byte that was touched.
    pub address: u64,
    /// A write.
    pub write: bool,
    /// For the caller.
    pub waiter: T,
}

/// What was done about the faults on one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served<T> {
    /// The request.
    pub request: Request<T>,
    /// Addresses of the fault entries, each on a page of its own.
    pub entries: Vec<(u64, u16)>,
    /// What happened, in order.
    pub effects: Vec<Effect>,
    /// How long this block took.
    pub time: Duration,
}

/// A batch that has been decided on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch<T> {
    /// Blocks in the order of service.
    pub served: Vec<Served<T>>,
    /// How long the whole batch takes.
    pub time: Duration,
}

/// Faults of one card that wait to be served, first come first served.
#[derive(Debug)]
pub struct FaultBuffer<T> {
    card: CardId,
    waiting: VecDeque<Request<T>>,
}

impl<T: Copy> FaultBuffer<T> {
    /// An empty buffer.
    pub fn new(card: CardId) -> Self {
        Self { card, waiting: VecDeque::new() }
    }

    /// A kernel faults.
    pub fn push(&mut self, request: Request<T>) {
        self.waiting.push_back(request);
    }

    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Takes a batch and serves it in the model. `None` if nothing waits.
    pub fn serve_batch(&mut self, memory: &mut Memory, costs: &Costs) -> Option<Batch<T>> {
        let mut taken = Vec::new();
        let mut room = BATCH_ENTRIES;
        while let Some(request) = self.waiting.front() {
            let entries = entries_of(memory, costs, request);
            if entries.len() as u32 > room {
                break;
            }
            room -= entries.len() as u32;
            taken.push((*request, entries));
            self.waiting.pop_front();
        }
        if taken.is_empty() {
            return None;
        }
        taken.sort_by_key(|(request, _)| (request.space, request.address));
        let mut time = Duration::from_nanos(costs.batch_ns);
        let mut served = Vec::with_capacity(taken.len());
        for (request, entries) in taken {
            let effects = memory.block_at(request.space, request.address).map_or_else(Vec::new, |block| {
                memory.bring_to_card(block, self.card, MakeResidentCause::ReplayableFault)
            });
            let block_time = costs.fault_effects(&effects);
            time += block_time;
            served.push(Served { request, entries, effects, time: block_time });
        }
        Some(Batch { served, time })
    }
}

/// The pages on which the request's block faults, with the raw faults that the driver merges into each entry: five for
/// two entries, near the 2.4 measured for a streaming kernel. A request for memory that is gone has none.
fn entries_of<T>(memory: &Memory, costs: &Costs, request: &Request<T>) -> Vec<(u64, u16)> {
    let Some((address, bytes)) =
        memory.block_at(request.space, request.address).and_then(|block| memory.extent(block))
    else {
        return Vec::new();
    };
    let count = (u64::from(costs.entries_per_block) * bytes / BLOCK_BYTES).clamp(1, u64::from(BATCH_ENTRIES));
    let step = (bytes / count) & !0xfff;
    (0..count).map(|index| (address + index * step, 2 + (index % 2) as u16)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Place;

    const CARD: CardId = CardId(0);

    fn faults(count: u64, chunks: u64) -> (Memory, FaultBuffer<u64>, SpaceId) {
        let mut memory = Memory::new(&[chunks * BLOCK_BYTES], 1024);
        let space = memory.create_space();
        memory.register(space, 0, count * BLOCK_BYTES).unwrap();
        let mut buffer = FaultBuffer::new(CARD);
        for waiter in 0..count {
            buffer.push(Request { space, address: waiter * BLOCK_BYTES, write: false, waiter });
        }
        (memory, buffer, space)
    }

    #[test]
    fn a_batch_has_at_most_256_entries_and_nothing_is_lost() {
        let (mut memory, mut buffer, _) = faults(100, 200);
        let mut served = Vec::new();
        while let Some(batch) = buffer.serve_batch(&mut memory, &Costs::H100_PCIE5) {
            let entries: usize = batch.served.iter().map(|served| served.entries.len()).sum();
            assert!(entries <= 256, "{entries}");
            served.extend(batch.served.iter().map(|served| served.request.waiter));
        }
        assert_eq!(served, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn a_batch_mixes_processes_and_takes_them_one_after_the_other() {
        let mut memory = Memory::new(&[64 * BLOCK_BYTES], 64);
        let spaces = [memory.create_space(), memory.create_space()];
        let mut buffer = FaultBuffer::new(CARD);
        for space in spaces {
            memory.register(space, 0, 4 * BLOCK_BYTES).unwrap();
        }
        for index in 0..3 {
            for space in spaces {
                buffer.push(Request { space, address: index * BLOCK_BYTES, write: true, waiter: () });
            }
        }
        let batch = buffer.serve_batch(&mut memory, &Costs::H100_PCIE5).unwrap();
        let order: Vec<_> = batch.served.iter().map(|served| served.request.space).collect();
        assert_eq!(order, [spaces[0], spaces[0], spaces[0], spaces[1], spaces[1], spaces[1]]);
        assert!(buffer.is_empty());
    }

    #[test]
    fn bringing_a_block_back_costs_more_than_its_first_touch_and_eviction_is_on_top() {
        let costs = Costs::H100_PCIE5;
        let (mut memory, mut buffer, space) = faults(1, 1);
        let first = buffer.serve_batch(&mut memory, &costs).unwrap();
        // 15 µs + 12 µs + 2 MiB at 22 GB/s.
        assert_eq!(first.time.as_micros(), 27 + 95);
        let block = memory.block_at(space, 0).unwrap();
        memory.bring_to_host(block, MakeResidentCause::ApiMigrate);
        buffer.push(Request { space, address: 0, write: false, waiter: 0 });
        let back = buffer.serve_batch(&mut memory, &costs).unwrap();
        // 15 µs + 12 µs + 2 MiB at 5.4 GB/s.
        assert_eq!(back.time.as_micros(), 27 + 388);
        memory.register(space, BLOCK_BYTES, BLOCK_BYTES).unwrap();
        buffer.push(Request { space, address: BLOCK_BYTES, write: false, waiter: 0 });
        let evicting = buffer.serve_batch(&mut memory, &costs).unwrap();
        // 15 µs + 12 µs + 95.3 µs as the first touch + 139.8 µs for 2 MiB out at 15 GB/s.
        assert_eq!(evicting.time.as_micros(), 262);
        assert_eq!(memory.place(block), Place::Host);
    }

    #[test]
    fn a_fault_on_memory_that_was_freed_is_answered() {
        let (mut memory, mut buffer, space) = faults(1, 1);
        memory.unregister(space, 0, BLOCK_BYTES).unwrap();
        let batch = buffer.serve_batch(&mut memory, &Costs::H100_PCIE5).unwrap();
        assert_eq!((batch.served.len(), batch.served[0].effects.len()), (1, 0));
    }
}
