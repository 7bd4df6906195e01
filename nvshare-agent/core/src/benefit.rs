//! Is it worth taking turns?
//!
//! Side by side, the GPU does as much of its clients' work as the time in which paging does not hold it up;
//! in turns, it does what one client at a time can use, less the hand-overs. The second figure lies between
//! the mean of the clients' duties (nobody runs in another's gaps) and what fills the GPU (the gaps are used);
//! where between them is learned from the turns that were taken.
//!
//! All figures are shares of the GPU's time in thousandths.

use serde::{Deserialize, Serialize};

use crate::units::Nanos;

/// Turns must promise this much more than running side by side, in thousandths.
const MARGIN_MILLI: u64 = 1100;
/// A rotation changes what was learned by one part in this many.
const LEARN: u64 = 4;
const FULL: u64 = 1000;
/// A stall beyond this leaves too little work to tell a duty from: an error of a hundredth would decide.
const STALL_TOLD_MILLI: u64 = 900;

/// What was learned about gaps: 0 = they are lost, 1000 = they are used.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct GapUse {
    milli: u64,
}

/// The two figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Estimate {
    /// What the GPU does side by side.
    pub(crate) shared_milli: u32,
    /// What it would do in turns.
    pub(crate) turns_milli: u32,
}

impl Estimate {
    pub(crate) fn favours_turns(self) -> bool {
        u64::from(self.turns_milli) * FULL > u64::from(self.shared_milli) * MARGIN_MILLI
    }
}

/// The share of the time that a client would use the GPU if nothing held it up, from the share of the time in
/// which it is seen using it while it is held up for `stall_milli` of that.
pub(crate) fn duty_alone(seen_milli: u64, stall_milli: u64) -> u64 {
    let seen = seen_milli.min(FULL);
    let work = seen * (FULL - stall_milli.min(STALL_TOLD_MILLI));
    let rest = (FULL - seen) * FULL;
    (work * FULL).checked_div(work + rest).unwrap_or(FULL)
}

impl GapUse {
    /// What to expect of clients with these duties when a hand-over takes `cost` of each `quantum`.
    pub(crate) fn estimate(&self, duties: &[u64], stall_milli: u64, cost: Nanos, quantum: Nanos) -> Estimate {
        let stall = stall_milli.min(FULL);
        let (low, high) = bounds(duties, cost, quantum);
        let sum: u64 = duties.iter().sum();
        Estimate {
            shared_milli: (sum.min(FULL) * (FULL - stall) / FULL) as u32,
            turns_milli: (low + (high - low) * self.milli / FULL) as u32,
        }
    }

    /// Learns from a rotation in which the GPU was used for this share of the time.
    pub(crate) fn learn(&mut self, duties: &[u64], cost: Nanos, quantum: Nanos, used_milli: u64) {
        let (low, high) = bounds(duties, cost, quantum);
        // Without gaps there is nothing to learn about their use.
        if high >= low + FULL / 20 {
            let seen = used_milli.saturating_sub(low).min(high - low) * FULL / (high - low);
            self.milli = (self.milli * (LEARN - 1) + seen) / LEARN;
        }
    }
}

fn bounds(duties: &[u64], cost: Nanos, quantum: Nanos) -> (u64, u64) {
    let count = (duties.len() as u64).max(1);
    let useful =
        FULL - (u128::from(cost.0) * u128::from(FULL) / u128::from(quantum.0.max(1))).min(1000) as u64;
    let sum: u64 = duties.iter().sum();
    (sum / count * useful / FULL, sum.min(FULL) * useful / FULL)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COST: Nanos = Nanos::millis(2500);
    const QUANTUM: Nanos = Nanos::seconds(30);

    fn favours(duty: u64, stall: u64) -> bool {
        GapUse::default().estimate(&[duty, duty], stall, COST, QUANTUM).favours_turns()
    }

    /// The published measurements of two clients on a P100: what each does with the GPU and how far it gets.
    #[test]
    fn the_published_cases_are_decided_as_their_times_say() {
        assert!(!favours(500, 0), "two that fit, half busy");
        assert!(!favours(900, 0), "two that fit, busy");
        assert!(favours(500, 882), "two that do not fit, half busy");
        assert!(favours(900, 886), "two that do not fit, busy");
    }

    #[test]
    fn little_stall_is_not_worth_turns_and_much_is() {
        assert!(!favours(1000, 100));
        assert!(favours(1000, 400));
    }

    #[test]
    fn a_client_held_up_is_seen_busier_than_it_is() {
        assert_eq!(duty_alone(1000, 500), 1000);
        assert_eq!(duty_alone(894, 882), 498);
        assert_eq!(duty_alone(500, 0), 500);
        assert_eq!(duty_alone(1000, 1000), 1000, "nothing can be told");
    }

    #[test]
    fn gaps_that_were_used_make_turns_look_better() {
        let mut gaps = GapUse::default();
        let expected = |gaps: &GapUse| gaps.estimate(&[500, 500], 0, COST, QUANTUM).turns_milli;
        let before = expected(&gaps);
        for _ in 0..20 {
            gaps.learn(&[500, 500], COST, QUANTUM, 900);
        }
        assert!(expected(&gaps) > before + 300);
    }
}
