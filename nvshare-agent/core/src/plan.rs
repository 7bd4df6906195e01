//! Whether a GPU is shared or taken in turns, and what it takes to change that.
//!
//! **Approach.** An alarm starts a *provisional* turn-taking, a trial with short turns. Rotations that move
//! next to nothing prove that the working sets fit together, and end it; a rotation after the first that
//! still moves much confirms it (the first may rightly move whole working sets). An operator's order stands
//! above both.
//!
//! **Invariants.** Leaving is harder than staying left: whoever alarms again soon after leaving on the
//! strength of quiet rotations needs twice as many the next time, up to [`QUIET_MAX`].

use serde::{Deserialize, Serialize};

use crate::{
    output::Mode,
    units::{Bytes, Nanos},
};

/// A rotation that moves no more than this share of the capacity (thousandths) is free of evictions.
const QUIET_MILLI: u64 = 20;
/// A rotation that moves more than this share of the capacity (thousandths) confirms the conflict.
const CONFIRM_MILLI: u64 = 50;
/// Quiet rotations after which a trial ends, and after which a confirmed conflict counts as gone.
const QUIET_PROVISIONAL: u32 = 1;
const QUIET_CONFIRMED: u32 = 2;
/// The most quiet rotations that are ever asked for.
pub(crate) const QUIET_MAX: u32 = 8;
/// A trial whose rotations are neither quiet nor telling, or cannot be judged, is confirmed after this many.
const UNDECIDED_MAX: u32 = 4;
/// An alarm this long after the last leave is a new story.
const FORGIVEN_AFTER: Nanos = Nanos::seconds(60);
/// A confirmed conflict is given this many hand-over costs before quiet rotations end it.
const DWELL_COSTS: u64 = 10;

/// Why clients take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Stage {
    /// On trial.
    Provisional,
    /// For good, until rotations turn quiet.
    Confirmed,
    /// Because the operator said so.
    Ordered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Phase {
    Shared,
    Turns { stage: Stage, since: Nanos, rotations: u32, quiet: u32 },
}

/// What one rotation moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rotated {
    pub(crate) moved: Bytes,
    /// Every client's counters were readable throughout.
    pub(crate) known: bool,
}

/// What follows from a rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Carry on.
    Stay,
    /// The conflict is real.
    Confirm,
    /// The working sets fit.
    Leave {
        /// Quiet rotations in a row.
        rotations: u32,
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    phase: Phase,
    /// How often the GPU came back soon after leaving; doubles what leaving takes.
    relapses: u32,
    left_quiet_at: Option<Nanos>,
}

impl Plan {
    pub(crate) fn new() -> Self {
        Self { phase: Phase::Shared, relapses: 0, left_quiet_at: None }
    }

    pub(crate) fn mode(&self) -> Mode {
        match self.phase {
            Phase::Shared => Mode::Shared,
            Phase::Turns { .. } => Mode::Exclusive,
        }
    }

    pub(crate) fn takes_turns(&self) -> bool {
        self.stage().is_some()
    }

    pub(crate) fn stage(&self) -> Option<Stage> {
        match self.phase {
            Phase::Shared => None,
            Phase::Turns { stage, .. } => Some(stage),
        }
    }

    /// Since when clients take turns.
    pub(crate) fn since(&self) -> Option<Nanos> {
        match self.phase {
            Phase::Shared => None,
            Phase::Turns { since, .. } => Some(since),
        }
    }

    /// Begins a trial.
    pub(crate) fn alarm(&mut self, now: Nanos) {
        let relapse = self.left_quiet_at.is_some_and(|left| now.since(left) < FORGIVEN_AFTER);
        self.relapses = if relapse { self.relapses.saturating_add(1) } else { 0 };
        self.enter(now, Stage::Provisional);
    }

    pub(crate) fn enter(&mut self, now: Nanos, stage: Stage) {
        self.phase = Phase::Turns { stage, since: now, rotations: 0, quiet: 0 };
    }

    pub(crate) fn leave(&mut self) {
        self.phase = Phase::Shared;
    }

    /// Judges a whole rotation; `cost` is what a hand-over takes.
    pub(crate) fn rotated(&mut self, now: Nanos, rotated: Rotated, capacity: Bytes, cost: Nanos) -> Verdict {
        let (left, relapses) = (self.left_quiet_at, self.relapses);
        let Phase::Turns { stage, since, rotations, quiet } = &mut self.phase else { return Verdict::Stay };
        *rotations = rotations.saturating_add(1);
        if *stage == Stage::Ordered {
            return Verdict::Stay;
        }
        // What was seen to move is a lower bound: it can confirm a conflict, but not rule one out.
        let is_quiet = rotated.known && rotated.moved <= capacity.per_mille(QUIET_MILLI);
        *quiet = if is_quiet { *quiet + 1 } else { 0 };
        let base = match stage {
            Stage::Provisional => QUIET_PROVISIONAL,
            Stage::Confirmed | Stage::Ordered => QUIET_CONFIRMED,
        };
        let needed = (base << relapses.min(QUIET_MAX.ilog2())).min(QUIET_MAX);
        let dwelt = *stage == Stage::Provisional || now.since(*since).0 >= cost.0.saturating_mul(DWELL_COSTS);
        if *quiet >= needed && dwelt {
            let rotations = *quiet;
            self.left_quiet_at = Some(left.map_or(now, |left| left.max(now)));
            return Verdict::Leave { rotations };
        }
        let telling = *rotations >= 2 && rotated.moved > capacity.per_mille(CONFIRM_MILLI);
        let undecided = *rotations >= UNDECIDED_MAX && *quiet == 0;
        if *stage == Stage::Provisional && (telling || undecided) {
            *stage = Stage::Confirmed;
            return Verdict::Confirm;
        }
        Verdict::Stay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: Bytes = Bytes::gib(1);

    fn rotate(plan: &mut Plan, at: Nanos, moved: Bytes) -> Verdict {
        plan.rotated(at, Rotated { moved, known: true }, CAPACITY, Nanos::millis(100))
    }

    #[test]
    fn a_trial_ends_at_the_first_quiet_rotation() {
        let mut plan = Plan::new();
        plan.alarm(Nanos::ZERO);
        assert_eq!(rotate(&mut plan, Nanos::SECOND, CAPACITY), Verdict::Stay);
        assert_eq!(rotate(&mut plan, Nanos::SECOND, Bytes::mib(5)), Verdict::Leave { rotations: 1 });
    }

    #[test]
    fn a_second_rotation_that_moves_memory_confirms_and_then_two_quiet_ones_are_needed() {
        let mut plan = Plan::new();
        plan.alarm(Nanos::ZERO);
        let at = Nanos::seconds(5);
        assert_eq!(rotate(&mut plan, at, CAPACITY), Verdict::Stay);
        assert_eq!(rotate(&mut plan, at, Bytes::mib(100)), Verdict::Confirm);
        assert_eq!(rotate(&mut plan, at, Bytes::ZERO), Verdict::Stay);
        assert_eq!(rotate(&mut plan, at, Bytes::ZERO), Verdict::Leave { rotations: 2 });
    }

    #[test]
    fn relapses_double_the_quiet_rotations_needed_up_to_a_bound() {
        let mut plan = Plan::new();
        let mut now = Nanos::ZERO;
        let mut needed = Vec::new();
        for _ in 0..6 {
            plan.alarm(now);
            let mut count = 0;
            loop {
                count += 1;
                now += Nanos::SECOND;
                if matches!(rotate(&mut plan, now, Bytes::ZERO), Verdict::Leave { .. }) {
                    break;
                }
            }
            plan.leave();
            needed.push(count);
        }
        assert_eq!(needed, [1, 2, 4, 8, 8, 8]);
        now += Nanos::seconds(3600);
        plan.alarm(now);
        assert_eq!(rotate(&mut plan, now, Bytes::ZERO), Verdict::Leave { rotations: 1 });
    }

    #[test]
    fn rotations_that_cannot_be_judged_never_end_turns_and_orders_stand_above_all() {
        let mut plan = Plan::new();
        plan.alarm(Nanos::ZERO);
        let unknown = Rotated { moved: Bytes::ZERO, known: false };
        let verdicts = [(); 5].map(|()| plan.rotated(Nanos::SECOND, unknown, CAPACITY, Nanos::ZERO));
        assert_eq!(verdicts.map(|verdict| verdict == Verdict::Confirm), [false, false, false, true, false]);
        assert!(verdicts.iter().all(|verdict| !matches!(verdict, Verdict::Leave { .. })));
        plan.enter(Nanos::ZERO, Stage::Ordered);
        assert_eq!(rotate(&mut plan, Nanos::SECOND, Bytes::ZERO), Verdict::Stay);
    }
}
