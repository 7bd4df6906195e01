//! Whether a GPU is shared or taken in turns, and what it takes to change that.
//!
//! **Approach.** An alarm starts a *provisional* turn-taking, a trial with short turns. Rotations that move
//! next to nothing prove that the working sets fit together, and end it; memory that comes back once everybody
//! had a turn confirms it (the first rotation may rightly move whole working sets). A confirmed conflict ends
//! by quiet rotations, by bounds on working sets, or by a probe. An operator's order stands above all.
//!
//! **Invariants.** Leaving is harder than staying left ([`backoff`]). Only rotations that were left to the
//! driver, or that sensors followed block by block, can end turns: what the shim moves is not seen to return.

use serde::{Deserialize, Serialize};

use crate::{
    output::Mode,
    units::{Bytes, Nanos},
};

pub(crate) mod backoff;

use backoff::Backoff;

/// A rotation that moves no more than this share of the capacity (thousandths) is free of evictions.
const QUIET_MILLI: u64 = 20;
/// A rotation that brings back more than this share of the capacity (thousandths) confirms the conflict.
const CONFIRM_MILLI: u64 = 50;
/// ... if the trial so far brought back more than this: working sets that fit settle within one turnover.
const TURNOVER_MILLI: u64 = 1050;
/// Quiet rotations after which a trial ends, and after which a confirmed conflict counts as gone.
const QUIET_PROVISIONAL: u32 = 1;
const QUIET_CONFIRMED: u32 = 2;
/// The most quiet rotations that are ever asked for.
pub(crate) const QUIET_MAX: u32 = 8;
/// A trial is over after this many rotations in a row that were not quiet. It is confirmed if they cannot be judged
/// or moved much; what moves little is no conflict, and leaves it open.
const UNDECIDED_MAX: u32 = 4;
/// A confirmed conflict is given this many hand-over costs before anything but certainty ends it.
const DWELL_COSTS: u64 = 10;
const DWELL_ROTATIONS: u32 = 2;
/// Where the shim moves memory and it is open whether working sets fit, this rotation is left to the driver, and
/// again whenever there have been twice as many.
const CERTIFY_FIRST: u32 = 8;

/// Why clients take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Stage {
    /// On trial.
    Provisional,
    /// For good, until it is shown that turns are not needed.
    Confirmed,
    /// Because the operator said so.
    Ordered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Phase {
    Shared,
    Turns(Turns),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Turns {
    stage: Stage,
    since: Nanos,
    rotations: u32,
    quiet: u32,
    /// Rotations since the last quiet one, and what they brought back: each change of what clients use is given
    /// its one turnover.
    unsettled: u32,
    brought: Bytes,
    /// The last rotation brought next to nothing back.
    calm: bool,
    /// What is known of working sets leaves open whether they fit.
    open: bool,
    /// Sensors follow every client block by block.
    by_block: bool,
}

/// What one rotation moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rotated {
    /// In either direction, the larger one.
    pub(crate) moved: Bytes,
    /// What came back of what had been out.
    pub(crate) brought: Bytes,
    /// Every client's counters were readable throughout.
    pub(crate) known: bool,
    /// The shim moved some of it.
    pub(crate) by_shim: bool,
}

/// What is known of the jobs' working sets together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(crate) low: Bytes,
    pub(crate) high: Bytes,
    /// Sensors follow every client block by block.
    pub(crate) by_block: bool,
}

/// What follows from a rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Carry on.
    Stay,
    /// The conflict is real.
    Confirm,
    /// Rotations moved next to nothing.
    LeaveQuiet {
        /// Quiet rotations in a row.
        rotations: u32,
    },
    /// The working sets fit by their upper bounds.
    LeaveBounds,
    /// Nothing tells; let everybody run for a moment.
    Probe {
        /// For this long.
        length: Nanos,
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    phase: Phase,
    pub(crate) backoff: Backoff,
}

impl Plan {
    pub(crate) fn new() -> Self {
        Self { phase: Phase::Shared, backoff: Backoff::default() }
    }

    /// The mode, given whether some set has several jobs.
    pub(crate) fn mode(&self, sets: bool) -> Mode {
        match self.phase {
            Phase::Shared => Mode::Shared,
            Phase::Turns(_) if sets => Mode::Sets,
            Phase::Turns(_) => Mode::Exclusive,
        }
    }

    pub(crate) fn takes_turns(&self) -> bool {
        self.stage().is_some()
    }

    pub(crate) fn stage(&self) -> Option<Stage> {
        match self.phase {
            Phase::Shared => None,
            Phase::Turns(turns) => Some(turns.stage),
        }
    }

    /// Turns are short, to see soon whether they are needed. A trial that is held beyond that is no hurry.
    pub(crate) fn hurries(&self) -> bool {
        matches!(self.phase, Phase::Turns(turns)
            if turns.stage == Stage::Provisional && turns.rotations < UNDECIDED_MAX)
    }

    /// Since when clients take turns.
    pub(crate) fn since(&self) -> Option<Nanos> {
        match self.phase {
            Phase::Shared => None,
            Phase::Turns(turns) => Some(turns.since),
        }
    }

    /// Quiet rotations so far, and how many would end turns.
    pub(crate) fn quiet(&self) -> Option<(u32, u32)> {
        match self.phase {
            Phase::Shared => None,
            Phase::Turns(turns) => Some((turns.quiet, self.quiet_needed(turns.stage))),
        }
    }

    /// When turns can end at the earliest for other reasons than certainty.
    pub(crate) fn dwell_until(&self, cost: Nanos) -> Option<Nanos> {
        let Phase::Turns(turns) = self.phase else { return None };
        let hold = self.backoff.hold_until();
        match turns.stage {
            Stage::Provisional => Some(hold.max(turns.since)),
            Stage::Confirmed => Some(hold.max(turns.since + Nanos(cost.0.saturating_mul(DWELL_COSTS)))),
            Stage::Ordered => None,
        }
    }

    /// Hand-overs of this rotation are left to the driver, so that it can show whether they are needed.
    pub(crate) fn certifies(&self) -> bool {
        let Phase::Turns(turns) = self.phase else { return false };
        // What the shim brings back unasked may be memory that nobody uses: a trial is not judged by it.
        let trial = turns.stage == Stage::Provisional && turns.rotations >= 1;
        let due = turns.rotations >= CERTIFY_FIRST && turns.rotations.is_power_of_two();
        turns.calm || (turns.open && (trial || (due && !turns.by_block)))
    }

    /// Begins a trial.
    pub(crate) fn alarm(&mut self, now: Nanos) {
        self.backoff.entered(now);
        self.enter(now, Stage::Provisional);
    }

    pub(crate) fn enter(&mut self, now: Nanos, stage: Stage) {
        self.phase = Phase::Turns(Turns {
            stage,
            since: now,
            rotations: 0,
            quiet: 0,
            unsettled: 0,
            brought: Bytes::ZERO,
            calm: false,
            open: false,
            by_block: false,
        });
    }

    /// Turns end because it is certain that they are not needed, or because the operator said so.
    pub(crate) fn leave(&mut self) {
        self.phase = Phase::Shared;
    }

    /// Turns end on the strength of figures that may turn out to be wrong.
    pub(crate) fn leave_hoping(&mut self, now: Nanos) {
        self.backoff.left(now, self.stage() == Some(Stage::Confirmed));
        self.leave();
    }

    /// Memory came back that everybody's first turn does not explain: the conflict is real, although the
    /// rotation is not over yet.
    pub(crate) fn telling(&mut self, brought: Bytes, capacity: Bytes) -> bool {
        let Phase::Turns(turns) = &mut self.phase else { return false };
        let telling = turns.stage == Stage::Provisional
            && turns.rotations >= 1
            && brought > capacity.per_mille(CONFIRM_MILLI)
            && turns.brought + brought > capacity.per_mille(TURNOVER_MILLI);
        if telling {
            turns.stage = Stage::Confirmed;
        }
        telling
    }

    /// Judges a whole rotation; `cost` is what a hand-over takes.
    pub(crate) fn rotated(
        &mut self,
        now: Nanos,
        rotated: Rotated,
        bounds: Bounds,
        capacity: Bytes,
        cost: Nanos,
    ) -> Verdict {
        let dwell_until = self.dwell_until(cost);
        let Phase::Turns(turns) = &mut self.phase else { return Verdict::Stay };
        turns.rotations = turns.rotations.saturating_add(1);
        if turns.stage == Stage::Ordered {
            return Verdict::Stay;
        }
        // What was seen to move is a lower bound: it can confirm a conflict, but not rule one out.
        let certain = rotated.known && (!rotated.by_shim || bounds.by_block);
        let is_quiet = certain && rotated.moved <= capacity.per_mille(QUIET_MILLI);
        if is_quiet {
            turns.quiet += 1;
            (turns.unsettled, turns.brought) = (0, Bytes::ZERO);
        } else {
            turns.quiet = 0;
            turns.unsettled += 1;
            turns.brought += rotated.brought;
        }
        turns.calm = rotated.known && rotated.brought <= capacity.per_mille(CONFIRM_MILLI);
        turns.open = bounds.low <= capacity;
        turns.by_block = bounds.by_block;
        let turns = *turns;
        let dwelt = dwell_until.is_none_or(|until| now >= until)
            && (turns.stage == Stage::Provisional || turns.rotations >= DWELL_ROTATIONS);
        if turns.quiet >= self.quiet_needed(turns.stage) && dwelt {
            return Verdict::LeaveQuiet { rotations: turns.quiet };
        }
        // A trial that nothing has decided may end like turns that are confirmed.
        let long = turns.stage == Stage::Confirmed || turns.rotations > UNDECIDED_MAX;
        if long && dwelt && certain && bounds.high <= capacity.per_mille(crate::packing::FILL_MILLI) {
            return Verdict::LeaveBounds;
        }
        let much = rotated.brought > capacity.per_mille(CONFIRM_MILLI);
        let telling = turns.rotations >= 2 && much && turns.brought > capacity.per_mille(TURNOVER_MILLI);
        let undecided = turns.unsettled >= UNDECIDED_MAX && (much || !rotated.known);
        if turns.stage == Stage::Provisional && (telling || undecided) {
            if let Phase::Turns(turns) = &mut self.phase {
                turns.stage = Stage::Confirmed;
            }
            return Verdict::Confirm;
        }
        if long
            && dwelt
            && bounds.low <= capacity
            && let Some(length) = self.backoff.probe_due(now, turns.since, cost)
        {
            return Verdict::Probe { length };
        }
        Verdict::Stay
    }

    fn quiet_needed(&self, stage: Stage) -> u32 {
        let base = match stage {
            Stage::Provisional => QUIET_PROVISIONAL,
            Stage::Confirmed | Stage::Ordered => QUIET_CONFIRMED,
        };
        (base << self.backoff.relapses().min(QUIET_MAX.ilog2())).min(QUIET_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: Bytes = Bytes::gib(1);
    const COST: Nanos = Nanos::millis(100);
    const GREY: Bounds = Bounds { low: Bytes::ZERO, high: Bytes::gib(9), by_block: false };
    const CONFLICT: Bounds = Bounds { low: Bytes::gib(2), high: Bytes::gib(2), by_block: false };

    fn moved(bytes: Bytes) -> Rotated {
        Rotated { moved: bytes, brought: bytes, known: true, by_shim: false }
    }

    fn rotate(plan: &mut Plan, at: Nanos, bytes: Bytes) -> Verdict {
        plan.rotated(at, moved(bytes), CONFLICT, CAPACITY, COST)
    }

    #[test]
    fn a_trial_ends_at_the_first_quiet_rotation() {
        let mut plan = Plan::new();
        plan.alarm(Nanos::ZERO);
        assert_eq!(rotate(&mut plan, Nanos::SECOND, CAPACITY), Verdict::Stay);
        assert_eq!(rotate(&mut plan, Nanos::SECOND, Bytes::mib(5)), Verdict::LeaveQuiet { rotations: 1 });
    }

    #[test]
    fn a_second_rotation_that_moves_memory_confirms_and_then_two_quiet_ones_are_needed() {
        let mut plan = Plan::new();
        plan.alarm(Nanos::ZERO);
        let at = Nanos::seconds(5);
        assert!(!plan.telling(CAPACITY, CAPACITY), "the first turns bring whole working sets back");
        assert_eq!(rotate(&mut plan, at, CAPACITY), Verdict::Stay);
        assert_eq!(rotate(&mut plan, at, Bytes::mib(100)), Verdict::Confirm);
        assert_eq!(rotate(&mut plan, at, Bytes::ZERO), Verdict::Stay);
        assert_eq!(rotate(&mut plan, at, Bytes::ZERO), Verdict::LeaveQuiet { rotations: 2 });
    }

    #[test]
    fn a_conflict_is_confirmed_as_soon_as_memory_comes_back_a_second_time() {
        let mut plan = Plan::new();
        plan.alarm(Nanos::ZERO);
        rotate(&mut plan, Nanos::SECOND, CAPACITY);
        assert!(!plan.telling(Bytes::mib(5), CAPACITY));
        assert!(plan.telling(Bytes::mib(100), CAPACITY));
        assert_eq!(plan.stage(), Some(Stage::Confirmed));
        assert!(!plan.telling(Bytes::mib(100), CAPACITY), "once");
    }

    #[test]
    fn rotations_that_move_little_confirm_nothing_and_leave_it_to_a_probe() {
        let mut plan = Plan::new();
        plan.alarm(Nanos::ZERO);
        let little = |plan: &mut Plan, at| plan.rotated(at, moved(Bytes::mib(40)), GREY, CAPACITY, COST);
        for _ in 0..4 {
            assert_eq!(little(&mut plan, Nanos::SECOND), Verdict::Stay);
        }
        assert!(matches!(little(&mut plan, Nanos::seconds(60)), Verdict::Probe { .. }));
        assert_eq!(plan.stage(), Some(Stage::Provisional));
    }

    #[test]
    fn what_only_went_out_confirms_nothing_and_is_not_quiet() {
        let mut plan = Plan::new();
        plan.alarm(Nanos::ZERO);
        let stale = Rotated { brought: Bytes::ZERO, ..moved(Bytes::mib(300)) };
        for _ in 0..3 {
            assert_eq!(plan.rotated(Nanos::SECOND, stale, CONFLICT, CAPACITY, COST), Verdict::Stay);
        }
    }

    #[test]
    fn rotations_in_which_the_shim_moved_memory_certify_nothing_without_block_sensors() {
        let mut plan = Plan::new();
        plan.alarm(Nanos::ZERO);
        let by_shim = Rotated { by_shim: true, ..moved(Bytes::ZERO) };
        let fits = Bounds { low: Bytes::ZERO, high: Bytes::mib(100), by_block: false };
        assert_eq!(plan.rotated(Nanos::SECOND, by_shim, fits, CAPACITY, COST), Verdict::Stay);
        assert!(plan.certifies(), "the next one is left to the driver");
        let fits = Bounds { by_block: true, ..fits };
        let verdict = plan.rotated(Nanos::SECOND, by_shim, fits, CAPACITY, COST);
        assert_eq!(verdict, Verdict::LeaveQuiet { rotations: 1 });
    }

    #[test]
    fn bounds_end_turns_after_the_dwell() {
        let mut plan = Plan::new();
        plan.enter(Nanos::ZERO, Stage::Confirmed);
        let fits = Bounds { low: Bytes::ZERO, high: Bytes::mib(900), by_block: false };
        let mut rotate = |at| plan.rotated(at, moved(Bytes::mib(100)), fits, CAPACITY, COST);
        assert_eq!(rotate(Nanos::millis(600)), Verdict::Stay);
        assert_eq!(rotate(Nanos::millis(900)), Verdict::Stay);
        assert_eq!(rotate(Nanos::SECOND), Verdict::LeaveBounds);
    }

    #[test]
    fn after_a_relapse_turns_last_and_leaving_takes_more_until_that_is_forgotten() {
        let mut plan = Plan::new();
        plan.alarm(Nanos::ZERO);
        assert_eq!(rotate(&mut plan, Nanos::SECOND, Bytes::ZERO), Verdict::LeaveQuiet { rotations: 1 });
        plan.leave_hoping(Nanos::SECOND);
        plan.alarm(Nanos::seconds(60));
        assert_eq!(plan.quiet(), Some((0, 2)));
        for minute in 2..60 {
            assert_eq!(rotate(&mut plan, Nanos::seconds(60 * minute), Bytes::ZERO), Verdict::Stay);
        }
        let at = Nanos::seconds(3601);
        assert_eq!(rotate(&mut plan, at, Bytes::ZERO), Verdict::LeaveQuiet { rotations: 59 });
        plan.leave_hoping(at);
        let later = Nanos::seconds(9000);
        plan.alarm(later);
        assert_eq!(rotate(&mut plan, later, Bytes::ZERO), Verdict::LeaveQuiet { rotations: 1 });
    }

    #[test]
    fn rotations_that_cannot_be_judged_never_end_turns_and_orders_stand_above_all() {
        let mut plan = Plan::new();
        plan.alarm(Nanos::ZERO);
        let unknown = Rotated { known: false, ..moved(Bytes::ZERO) };
        let verdicts =
            [(); 5].map(|()| plan.rotated(Nanos::SECOND, unknown, CONFLICT, CAPACITY, Nanos::ZERO));
        assert_eq!(verdicts.map(|verdict| verdict == Verdict::Confirm), [false, false, false, true, false]);
        assert!(verdicts.iter().all(|verdict| !matches!(verdict, Verdict::LeaveQuiet { .. })));
        plan.enter(Nanos::ZERO, Stage::Ordered);
        assert_eq!(rotate(&mut plan, Nanos::SECOND, Bytes::ZERO), Verdict::Stay);
    }

    #[test]
    fn probes_come_only_where_the_bounds_leave_it_open() {
        let mut plan = Plan::new();
        plan.enter(Nanos::ZERO, Stage::Confirmed);
        let at = Nanos::seconds(300);
        let busy = moved(Bytes::mib(100));
        plan.rotated(at, busy, CONFLICT, CAPACITY, COST);
        assert_eq!(plan.rotated(at, busy, CONFLICT, CAPACITY, COST), Verdict::Stay);
        assert!(matches!(plan.rotated(at, busy, GREY, CAPACITY, COST), Verdict::Probe { .. }));
    }
}
