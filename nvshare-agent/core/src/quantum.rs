//! How long a turn lasts, from what a hand-over costs.
//!
//! **Approach.** A hand-over costs the drain of the one that leaves, and the time from the grant until the
//! bytes that come in, by whoever's hand, have fallen below a tenth of their peak. The quantum is that cost
//! divided by the share of time that hand-overs may take.
//!
//! **Invariants.** A derived quantum is never shorter than twice the cost, whatever the configured maximum
//! says: a turn that is spent bringing memory back is worse than none.

use serde::{Deserialize, Serialize};

use crate::{
    engine::Handover,
    units::{Bytes, Nanos},
};

/// A rate below this share of the peak (thousandths) means that the working set is back.
const SETTLED_MILLI: u64 = 100;
/// No derived quantum is shorter, so that a turn spans bins enough to be measured.
const FLOOR: Nanos = Nanos::millis(200);
/// The trial's quantum, in hand-over costs.
const PROVISIONAL_COSTS: u64 = 4;
/// The shortest quantum an operator can fix; below it there is nothing but hand-overs.
pub(crate) const FIXED_MIN: Nanos = Nanos::MILLI;

/// What it costs to give the GPU to one client, by who moves its memory: a driver that brings it back fault by
/// fault takes many times as long as the shim, and one says nothing about the other.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct HandoverCost {
    by_driver: Option<Nanos>,
    by_shim: Option<Nanos>,
    slice: Option<Slice>,
}

/// The turn that is being measured.
#[derive(Debug, Serialize, Deserialize)]
struct Slice {
    mover: Handover,
    granted: Nanos,
    /// Spent before the gate opened.
    before: Nanos,
    /// Bytes per second.
    peak: u64,
    /// What the shim itself took to bring memory back: the cost is no less.
    shim: Nanos,
}

impl HandoverCost {
    /// The cost as it was measured where this one moves memory.
    pub(crate) fn measured(&self, mover: Handover) -> Option<Nanos> {
        match mover {
            Handover::Demand => self.by_driver,
            Handover::Shim => self.by_shim,
        }
    }

    /// A turn begins, after a drain that took this long.
    pub(crate) fn granted(&mut self, now: Nanos, drain: Nanos, mover: Handover) {
        self.slice = Some(Slice { mover, granted: now, before: drain, peak: 0, shim: Nanos::ZERO });
    }

    /// Memory is still coming back after a grant.
    pub(crate) fn under_way(&self) -> bool {
        self.slice.is_some()
    }

    /// One bin of the turn: what came in for the GPU's faults.
    pub(crate) fn bin(&mut self, at: Nanos, interval: Nanos, bytes_in: Bytes) {
        let Some(slice) = &mut self.slice else { return };
        let begins = at.since(interval);
        let rate =
            (u128::from(bytes_in.0) * u128::from(Nanos::SECOND.0) / u128::from(interval.0.max(1))) as u64;
        let settled = rate == 0 || rate < Bytes(slice.peak).per_mille(SETTLED_MILLI).0;
        slice.peak = slice.peak.max(rate);
        // A bin that began before the grant is empty in part, and its rate says nothing about the end.
        if settled && begins >= slice.granted {
            let seen = if slice.peak == 0 { Nanos::ZERO } else { begins.since(slice.granted) };
            let (mover, cost) = (slice.mover, slice.before + seen.max(slice.shim));
            self.slice = None;
            self.learn(mover, cost);
        }
    }

    /// The shim says that it brought memory back in this time, which cannot be longer than its turn so far.
    pub(crate) fn brought_back(&mut self, now: Nanos, took: Nanos) {
        match &mut self.slice {
            Some(slice) => slice.shim = slice.shim.max(took.min(now.since(slice.granted))),
            // The bytes ebbed before the report came, or are not seen at all.
            None => self.learn(Handover::Shim, self.by_shim.unwrap_or_default().max(took)),
        }
    }

    /// The turn ends; if memory was still coming in, the cost is at least the whole turn.
    pub(crate) fn ended(&mut self, now: Nanos) {
        if let Some(slice) = self.slice.take() {
            if slice.peak > 0 {
                self.learn(slice.mover, slice.before + now.since(slice.granted));
            } else if slice.shim > Nanos::ZERO {
                self.learn(slice.mover, slice.before + slice.shim);
            }
        }
    }

    /// No figures of this client can be had, or they say nothing about a hand-over; what the shim reports still does.
    pub(crate) fn void(&mut self) {
        if let Some(slice) = self.slice.take_if(|slice| slice.shim > Nanos::ZERO) {
            self.learn(slice.mover, slice.before + slice.shim);
        }
        self.slice = None;
    }

    /// Rises fast and falls slowly: too short a quantum costs more than too long a one.
    fn learn(&mut self, mover: Handover, cost: Nanos) {
        let measured = match mover {
            Handover::Demand => &mut self.by_driver,
            Handover::Shim => &mut self.by_shim,
        };
        *measured = Some(measured.map_or(cost, |old| {
            if cost > old { Nanos(old.0 / 2 + cost.0 / 2) } else { Nanos(old.0 - (old.0 - cost.0) / 4) }
        }));
    }
}

/// The cost before any was measured: as much goes out over the link as comes in.
pub(crate) fn estimated_cost(working_set: Bytes, capacity: Bytes, link_rate: Bytes) -> Option<Nanos> {
    let bytes = 2 * u128::from(working_set.min(capacity).0);
    let nanos = (bytes * u128::from(Nanos::SECOND.0)).checked_div(u128::from(link_rate.0))?;
    Some(Nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
}

/// The quantum that follows from a cost; `None`: nothing is known of it.
pub(crate) fn derived(cost: Option<Nanos>, overhead_milli: u32, max: Nanos, provisional: bool) -> Nanos {
    let Some(cost) = cost else { return max.max(FLOOR) };
    let wanted = if provisional {
        cost.0.saturating_mul(PROVISIONAL_COSTS)
    } else {
        cost.0.saturating_mul(1000) / u64::from(overhead_milli.max(1))
    };
    Nanos(wanted.max(FLOOR.0).min(max.0).max(shortest(cost).0).max(FIXED_MIN.0))
}

/// The quantum as it has grown or shrunk since clients take turns.
///
/// While nobody who uses the GPU shortly waits too long, each rotation makes it longer: twofold at first, by a
/// hand-over's cost once somebody had to wait. Whenever somebody does, it is halved.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Pace {
    current: Option<Nanos>,
    /// Somebody waited too long since turns began.
    hurt: bool,
    /// In the rotation under way.
    hurt_now: bool,
}

impl Pace {
    /// Starts afresh.
    pub(crate) fn reset(&mut self) {
        *self = Self::default();
    }

    /// The quantum in force, from the derived one.
    pub(crate) fn quantum(&self, derived: Nanos, cost: Nanos, max: Nanos) -> Nanos {
        self.current.unwrap_or(derived).min(max.max(derived)).max(shortest(cost)).max(FLOOR.min(derived))
    }

    /// Somebody who uses the GPU shortly waited too long. Counts once in a rotation.
    pub(crate) fn hurt(&mut self, derived: Nanos) {
        if !self.hurt_now {
            self.current = Some(Nanos(self.current.unwrap_or(derived).0 / 2));
        }
        (self.hurt, self.hurt_now) = (true, true);
    }

    /// A rotation is complete.
    pub(crate) fn rotated(&mut self, derived: Nanos, cost: Nanos, max: Nanos) {
        if !std::mem::take(&mut self.hurt_now) {
            let now = self.quantum(derived, cost, max);
            let next = if self.hurt { now + cost } else { now + now };
            self.current = Some(next.min(max.max(derived)));
        }
    }
}

/// The shortest turn that is worth its hand-over.
pub(crate) fn shortest(cost: Nanos) -> Nanos {
    Nanos(cost.0.saturating_mul(2))
}

/// The cost of the dearest hand-over that a turn of this length is worth.
pub(crate) fn dearest(turn: Nanos) -> Nanos {
    Nanos(turn.0 / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BIN: Nanos = Nanos::millis(100);

    #[test]
    fn the_cost_ends_where_the_rate_falls_below_a_tenth_of_its_peak() {
        let mut cost = HandoverCost::default();
        cost.granted(Nanos::millis(1050), Nanos::millis(30), Handover::Demand);
        for (end, mib) in [(1100, 20), (1200, 100), (1300, 90), (1400, 15), (1500, 5), (1600, 0)] {
            cost.bin(Nanos::millis(end), BIN, Bytes::mib(mib));
        }
        assert_eq!(cost.measured(Handover::Demand), Some(Nanos::millis(350 + 30)));
    }

    #[test]
    fn what_the_driver_takes_says_nothing_about_what_the_shim_takes() {
        let mut cost = HandoverCost::default();
        let mut turn = |mover, millis| {
            cost.granted(Nanos::ZERO, Nanos::ZERO, mover);
            cost.bin(Nanos::millis(millis), Nanos::millis(millis), Bytes::mib(500));
            cost.bin(Nanos::millis(millis + 100), BIN, Bytes::ZERO);
            [Handover::Demand, Handover::Shim].map(|mover| cost.measured(mover).map(Nanos::as_millis))
        };
        assert_eq!(turn(Handover::Demand, 9000), [Some(9000), None]);
        assert_eq!(turn(Handover::Shim, 1000), [Some(9000), Some(1000)]);
    }

    #[test]
    fn a_resident_client_costs_only_the_drain() {
        let mut cost = HandoverCost::default();
        cost.granted(Nanos::ZERO, Nanos::millis(7), Handover::Demand);
        cost.bin(BIN, BIN, Bytes::ZERO);
        assert_eq!(cost.measured(Handover::Demand), Some(Nanos::millis(7)));
    }

    #[test]
    fn a_turn_that_ends_while_memory_still_comes_in_makes_the_next_one_longer() {
        let mut cost = HandoverCost::default();
        cost.granted(Nanos::ZERO, Nanos::ZERO, Handover::Demand);
        cost.bin(BIN, BIN, Bytes::mib(100));
        cost.ended(Nanos::millis(200));
        let quantum = derived(cost.measured(Handover::Demand), 1000, Nanos::MILLI, false);
        assert_eq!(quantum, Nanos::millis(400));
    }

    #[test]
    fn the_quantum_keeps_to_the_overhead_the_maximum_and_twice_the_cost_in_this_order() {
        let max = Nanos::seconds(30);
        assert_eq!(derived(Some(Nanos::millis(100)), 50, max, false), Nanos::seconds(2));
        assert_eq!(derived(Some(Nanos::millis(100)), 50, max, true), Nanos::millis(400));
        assert_eq!(derived(Some(Nanos::seconds(10)), 50, max, false), max);
        assert_eq!(derived(Some(Nanos::seconds(20)), 50, max, false), Nanos::seconds(40));
        assert_eq!(derived(None, 50, max, false), max);
        assert_eq!(derived(Some(Nanos(u64::MAX)), 0, Nanos(u64::MAX), true), Nanos(u64::MAX));
    }

    #[test]
    fn the_quantum_doubles_until_somebody_waits_and_then_grows_by_the_cost() {
        let (derived, cost, max) = (Nanos::seconds(4), Nanos::millis(200), Nanos::seconds(30));
        let mut pace = Pace::default();
        let mut seen = Vec::new();
        for round in 0..7 {
            seen.push(pace.quantum(derived, cost, max).as_millis());
            if round == 3 {
                pace.hurt(derived);
                pace.hurt(derived);
            }
            pace.rotated(derived, cost, max);
        }
        assert_eq!(seen, [4000, 8000, 16_000, 30_000, 15_000, 15_200, 15_400]);
        for _ in 0..20 {
            pace.hurt(derived);
            pace.rotated(derived, cost, max);
        }
        assert_eq!(pace.quantum(derived, cost, max), shortest(cost));
    }

    #[test]
    fn what_the_shim_took_is_the_least_cost_with_figures_or_without() {
        let took = Nanos::millis(350);
        let mut cost = HandoverCost::default();
        cost.granted(Nanos::ZERO, Nanos::millis(50), Handover::Shim);
        cost.brought_back(Nanos::SECOND, took);
        cost.bin(Nanos::millis(100), BIN, Bytes::mib(500));
        cost.bin(Nanos::millis(200), BIN, Bytes::ZERO);
        assert_eq!(
            cost.measured(Handover::Shim),
            Some(Nanos::millis(400)),
            "bins say 100 ms, the shim knows better"
        );
        let mut blind = HandoverCost::default();
        blind.granted(Nanos::ZERO, Nanos::millis(50), Handover::Shim);
        blind.brought_back(Nanos::SECOND, took);
        blind.void();
        assert_eq!(blind.measured(Handover::Shim), Some(Nanos::millis(400)));
        let mut late = HandoverCost::default();
        late.granted(Nanos::ZERO, Nanos::ZERO, Handover::Shim);
        late.void();
        late.brought_back(Nanos::SECOND, took);
        assert_eq!(late.measured(Handover::Shim), Some(took));
    }

    #[test]
    fn no_client_can_say_that_its_memory_took_longer_than_its_turn() {
        let mut cost = HandoverCost::default();
        cost.granted(Nanos::SECOND, Nanos::ZERO, Handover::Shim);
        cost.brought_back(Nanos::millis(1200), Nanos::seconds(20));
        cost.void();
        assert_eq!(cost.measured(Handover::Shim), Some(Nanos::millis(200)));
        assert_eq!(shortest(dearest(Nanos::seconds(30))), Nanos::seconds(30));
    }

    #[test]
    fn the_estimate_needs_a_link_rate_and_stops_at_the_capacity() {
        let estimate = |link| estimated_cost(Bytes::gib(9), Bytes::gib(2), link);
        assert_eq!(estimate(Bytes::gib(4)), Some(Nanos::SECOND));
        assert_eq!(estimate(Bytes::ZERO), None);
    }
}
