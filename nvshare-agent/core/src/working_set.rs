//! How much memory a client works with, between two bounds.
//!
//! **Problem.** What a client allocated says little about what it uses, and byte counters name no blocks.
//!
//! **Approach.** While a client has the GPU, what it needs of the memory it had lost comes back. So what is
//! still out once nothing has come or gone for a while is not used: allocated less that bounds the working set
//! from above. What came in, less what was lost again on the way, bounds it from below. A sensor that sees
//! blocks sharpens the upper bound: once things are settled, what is used is resident.
//!
//! **Invariants.** The upper bound never exceeds what is allocated and grows at once with allocations and with
//! returns; it falls only to the larger one of the last two slices. These are bounds, no miss curves: a client
//! whose sweep is longer than its slices is underestimated, which whoever packs by them must notice.

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Nanos};

/// A slice in which things were settled for less than this says nothing about what the client uses.
const TELLING: Nanos = Nanos::SECOND;
/// A bin that moves no more than this is settled.
const STILL: Bytes = Bytes::BLOCK;
/// While clients run side by side, a slice ends after this much demand.
const WINDOW: Nanos = Nanos::seconds(4);

/// What one client was seen to use.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct WorkingSet {
    slice: Option<Slice>,
    last: Option<Measured>,
    before: Option<Measured>,
}

/// One stretch of time in which the client may run.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Slice {
    demand: Nanos,
    /// Time with demand since memory last moved.
    settled: Nanos,
    brought: Bytes,
    lost: Bytes,
    /// What is out.
    out: Bytes,
    resident: Option<Bytes>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Measured {
    low: Bytes,
    high: Bytes,
    /// What was allocated then.
    allocated: Bytes,
}

/// One bin of a client that may run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Use {
    pub(crate) interval: Nanos,
    /// It had work.
    pub(crate) demand: bool,
    pub(crate) allocated: Bytes,
    /// Came back in this bin.
    pub(crate) returned: Bytes,
    /// Of that, what the client itself asked for.
    pub(crate) needed: Bytes,
    /// Was evicted in this bin.
    pub(crate) evicted: Bytes,
    /// Still out at its end.
    pub(crate) out: Bytes,
    pub(crate) resident: Option<Bytes>,
}

impl WorkingSet {
    /// A slice begins.
    pub(crate) fn begin(&mut self) {
        self.slice = Some(Slice::default());
    }

    /// A bin of the slice under way; outside of one it is ignored.
    pub(crate) fn bin(&mut self, bin: &Use) {
        let Some(slice) = &mut self.slice else { return };
        let grown = bin.resident.unwrap_or_default() - slice.resident.unwrap_or_default();
        if bin.returned.max(bin.evicted).max(grown) > STILL {
            slice.settled = Nanos::ZERO;
        } else if bin.demand {
            slice.settled += bin.interval;
        }
        if bin.demand {
            slice.demand += bin.interval;
        }
        slice.brought += bin.needed;
        slice.lost += bin.evicted;
        slice.out = bin.out;
        slice.resident = bin.resident;
        if slice.demand >= WINDOW {
            self.end(bin.allocated);
            self.begin();
        }
    }

    /// The slice ends.
    pub(crate) fn end(&mut self, allocated: Bytes) {
        let Some(slice) = self.slice.take() else { return };
        if slice.settled < TELLING {
            return;
        }
        let by_balance = allocated - slice.out;
        let high = slice.resident.map_or(by_balance, |resident| by_balance.min(resident));
        let low = (slice.brought - slice.lost).min(high);
        self.before = self.last.replace(Measured { low, high, allocated });
    }

    /// Nothing is known of the slice under way.
    pub(crate) fn void(&mut self) {
        self.slice = None;
    }

    /// It uses at least this much.
    pub(crate) fn low(&self, allocated: Bytes) -> Bytes {
        self.last.map_or(Bytes::ZERO, |last| last.low).min(allocated)
    }

    /// It uses at most this much.
    pub(crate) fn high(&self, allocated: Bytes) -> Bytes {
        let grown = |measured: Measured| measured.high + (allocated - measured.allocated);
        let Some(last) = self.last.map(grown) else { return allocated };
        let known = self.before.map(grown).map_or(last, |before| last.max(before));
        // More has come back in the slice under way than was known to be used.
        let live = self.slice.filter(|slice| slice.brought > Bytes::ZERO && slice.resident.is_none());
        let live = live.map_or(Bytes::ZERO, |slice| slice.brought - slice.lost);
        known.max(live).min(allocated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOCATED: Bytes = Bytes::mib(1000);

    fn bin(returned: u64, evicted: u64, out: u64) -> Use {
        Use {
            interval: Nanos::millis(100),
            demand: true,
            allocated: ALLOCATED,
            returned: Bytes::mib(returned),
            needed: Bytes::mib(returned),
            evicted: Bytes::mib(evicted),
            out: Bytes::mib(out),
            resident: None,
        }
    }

    fn slice(set: &mut WorkingSet, bins: &[Use]) {
        set.begin();
        for bin in bins {
            set.bin(bin);
        }
        set.end(ALLOCATED);
    }

    #[test]
    fn what_stays_out_through_whole_slices_is_not_used() {
        let mut set = WorkingSet::default();
        assert_eq!((set.low(ALLOCATED), set.high(ALLOCATED)), (Bytes::ZERO, ALLOCATED));
        slice(&mut set, &[[bin(300, 0, 600)].as_slice(), &[bin(0, 0, 600); 10]].concat());
        assert_eq!((set.low(ALLOCATED), set.high(ALLOCATED)), (Bytes::mib(300), Bytes::mib(400)));
    }

    #[test]
    fn a_slice_too_short_to_tell_changes_nothing() {
        let mut set = WorkingSet::default();
        slice(&mut set, &[bin(1, 0, 900); 5]);
        assert_eq!(set.high(ALLOCATED), ALLOCATED);
    }

    #[test]
    fn the_upper_bound_falls_after_two_slices_and_rises_at_once() {
        let mut set = WorkingSet::default();
        slice(&mut set, &[bin(0, 0, 100); 12]);
        slice(&mut set, &[bin(0, 0, 600); 12]);
        assert_eq!(set.high(ALLOCATED), Bytes::mib(900));
        slice(&mut set, &[bin(0, 0, 600); 12]);
        assert_eq!(set.high(ALLOCATED), Bytes::mib(400));
        assert_eq!(set.high(Bytes::mib(1100)), Bytes::mib(500), "an allocation may be used at once");
        set.begin();
        set.bin(&bin(600, 0, 0));
        assert_eq!(set.high(ALLOCATED), Bytes::mib(600), "more came back than was known to be used");
    }

    #[test]
    fn what_is_resident_bounds_what_is_used_once_things_are_settled() {
        let resident = |evicted| Use { resident: Some(Bytes::mib(250)), ..bin(0, evicted, 0) };
        let mut set = WorkingSet::default();
        slice(&mut set, &[resident(0); 12]);
        assert_eq!(set.high(ALLOCATED), Bytes::mib(250));
        let mut set = WorkingSet::default();
        slice(&mut set, &[resident(9); 12]);
        assert_eq!(set.high(ALLOCATED), ALLOCATED);
    }

    #[test]
    fn a_client_that_still_fills_its_memory_is_not_taken_for_small() {
        let mut set = WorkingSet::default();
        let filling: Vec<Use> =
            (0..20).map(|bin| Use { resident: Some(Bytes::mib(40 * bin)), ..self::bin(0, 0, 0) }).collect();
        slice(&mut set, &filling);
        assert_eq!(set.high(ALLOCATED), ALLOCATED);
    }

    #[test]
    fn clients_that_push_each_other_out_are_not_taken_for_small() {
        let mut set = WorkingSet::default();
        slice(&mut set, &[bin(50, 50, 500); 40]);
        assert_eq!(set.high(ALLOCATED), ALLOCATED);
    }
}
