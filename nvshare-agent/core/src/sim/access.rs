//! Where a client's next miss is, without looking at its hits.
//!
//! **Approach.** In a sweep, touches are evenly spaced in the client's own GPU work, and the next block that is
//! not resident is found in a bitmap. With random access the work until the next miss is exponential, at a
//! rate in proportion to what is missing; it has no memory, so it is only rescaled when that changes.

use crate::{
    sim::{blocks::Blocks, rng::Rng},
    units::Nanos,
};

/// Blocks that one round of fault service brings in at most: the driver serves up to 20 batches of 256 faults
/// at once, and a streaming kernel raises some 150 faults in a block.
pub(crate) const ROUND: u32 = 16;
/// A round takes blocks from a stretch of this many, for no more touches are under way at one time.
const STRETCH: u32 = 4 * ROUND;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Order {
    Sweep,
    Random,
}

#[derive(Clone, Debug)]
pub(crate) struct Cursor {
    order: Order,
    /// The first so many blocks are in use.
    pub(crate) blocks: u32,
    /// Work between two touches, in nanoseconds.
    spacing: f64,
    /// Work at which the first touch of this phase is due.
    origin: f64,
    /// Sweep: the first touch that has not been let through.
    next: u64,
    /// Sweep: the touch that will miss.
    miss: Option<u64>,
    /// Random: what is left until the next miss, in mean distances, as of `synced`.
    exposure: f64,
    synced: f64,
    missing: u32,
    /// Work at which the next miss comes; infinite if none does.
    pub(crate) miss_at: f64,
}

impl Cursor {
    /// One that never misses.
    pub(crate) fn none() -> Self {
        Self {
            order: Order::Sweep,
            blocks: 0,
            spacing: 1.0,
            origin: 0.0,
            next: 0,
            miss: None,
            exposure: 0.0,
            synced: 0.0,
            missing: 0,
            miss_at: f64::INFINITY,
        }
    }

    /// Begins a phase at `work`, with touches counted from `origin`.
    pub(crate) fn new(
        order: Order,
        blocks: u32,
        sweep: Nanos,
        origin: f64,
        work: f64,
        rng: &mut Rng,
    ) -> Self {
        let spacing = sweep.0 as f64 / f64::from(blocks.max(1));
        Self {
            order,
            blocks,
            spacing,
            origin,
            next: ((work - origin) / spacing).ceil().max(0.0) as u64,
            miss: None,
            exposure: rng.exponential(),
            synced: work,
            missing: 0,
            miss_at: f64::INFINITY,
        }
    }

    /// Finds the next miss from scratch.
    pub(crate) fn locate(&mut self, work: f64, resident: &Blocks) {
        match self.order {
            Order::Sweep => {
                let first = self.first(work);
                let from = self.block(first);
                let found = resident
                    .next_missing(from, self.blocks)
                    .map(|block| first + u64::from(block - from))
                    .or_else(|| {
                        let block = resident.next_missing(0, from)?;
                        Some(first + u64::from(self.blocks - from + block))
                    });
                self.set_miss(found);
            }
            Order::Random => {
                self.sync(work);
                self.missing = self.blocks - resident.count_below(self.blocks);
                self.rescale();
            }
        }
    }

    /// A block is no longer resident.
    pub(crate) fn lost(&mut self, work: f64, block: u32) {
        if block >= self.blocks {
            return;
        }
        match self.order {
            Order::Sweep => {
                let first = self.first(work);
                let from = self.block(first);
                let ahead = if block >= from { block - from } else { self.blocks - from + block };
                let touch = first + u64::from(ahead);
                if self.miss.is_none_or(|miss| touch < miss) {
                    self.set_miss(Some(touch));
                }
            }
            Order::Random => {
                self.sync(work);
                self.missing += 1;
                self.rescale();
            }
        }
    }

    /// The blocks that one round of fault service brings in, now that the next miss is due.
    pub(crate) fn due(&self, resident: &Blocks, limit: u32, rng: &mut Rng, out: &mut Vec<u32>) {
        out.clear();
        match self.order {
            Order::Sweep => {
                let Some(miss) = self.miss else { return };
                let start = self.block(miss);
                let mut from = start;
                let end = start.saturating_add(STRETCH).min(self.blocks);
                while out.len() < limit as usize
                    && let Some(block) = resident.next_missing(from, end)
                {
                    out.push(block);
                    from = block + 1;
                }
            }
            Order::Random => {
                let count = limit.min(self.missing);
                for _ in 0..count {
                    if let Some(block) = resident.nth_missing(rng.below(self.missing), self.blocks)
                        && !out.contains(&block)
                    {
                        out.push(block);
                    }
                }
            }
        }
    }

    /// The blocks of a round are in; the miss that asked for them is over.
    pub(crate) fn served(&mut self, work: f64, count: u32, resident: &Blocks, rng: &mut Rng) {
        if let Some(miss) = self.miss.take() {
            self.next = miss + 1;
        }
        if self.order == Order::Random {
            self.synced = work;
            self.exposure = (0..count.max(1)).map(|_| rng.exponential()).sum();
        }
        self.locate(work, resident);
    }

    /// The first touch that is still to come.
    fn first(&self, work: f64) -> u64 {
        let done = ((work - self.origin) / self.spacing).floor().max(-1.0);
        self.next.max((done + 1.0) as u64)
    }

    fn block(&self, touch: u64) -> u32 {
        (touch % u64::from(self.blocks.max(1))) as u32
    }

    fn set_miss(&mut self, miss: Option<u64>) {
        self.miss = miss;
        self.miss_at = miss.map_or(f64::INFINITY, |touch| self.origin + touch as f64 * self.spacing);
    }

    fn sync(&mut self, work: f64) {
        let mean = self.spacing * f64::from(self.blocks) / f64::from(self.missing.max(1));
        if self.missing > 0 {
            self.exposure = (self.exposure - (work - self.synced) / mean).max(0.0);
        }
        self.synced = work;
    }

    fn rescale(&mut self) {
        let sweep = self.spacing * f64::from(self.blocks);
        self.miss_at = if self.missing == 0 {
            f64::INFINITY
        } else {
            self.synced + self.exposure * sweep / f64::from(self.missing)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SWEEP: Nanos = Nanos(1000);

    #[test]
    fn a_sweep_misses_where_the_first_missing_block_lies_and_an_eviction_behind_waits_for_the_next_round() {
        let mut rng = Rng::new(1);
        let mut resident = Blocks::new(100);
        (0..100).for_each(|block| {
            resident.insert(block);
        });
        let mut cursor = Cursor::new(Order::Sweep, 100, SWEEP, 0.0, 0.0, &mut rng);
        cursor.locate(0.0, &resident);
        assert!(cursor.miss_at.is_infinite());
        resident.remove(30);
        cursor.lost(405.0, 30);
        assert_eq!(cursor.miss_at.round() as u64, 1300);
        resident.remove(50);
        cursor.lost(405.0, 50);
        assert_eq!(cursor.miss_at.round() as u64, 500);
        let mut due = Vec::new();
        cursor.due(&resident, ROUND, &mut rng, &mut due);
        assert_eq!(due, [50]);
        resident.insert(50);
        cursor.served(500.0, 1, &resident, &mut rng);
        assert_eq!(cursor.miss_at.round() as u64, 1300);
    }

    #[test]
    fn random_access_misses_in_proportion_to_what_is_missing() {
        let mut rng = Rng::new(2);
        let mut resident = Blocks::new(1000);
        (0..900).for_each(|block| {
            resident.insert(block);
        });
        let mut total = 0.0;
        for _ in 0..20_000 {
            let mut cursor = Cursor::new(Order::Random, 1000, SWEEP, 0.0, 0.0, &mut rng);
            cursor.locate(0.0, &resident);
            total += cursor.miss_at;
        }
        let mean = total / 20_000.0;
        assert!((mean - 10.0).abs() < 0.3, "one miss in ten touches of 1 ns each: {mean}");
    }
}
