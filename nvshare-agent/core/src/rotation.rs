//! Whose turn is next: deficit round robin over jobs, in GPU time.
//!
//! Each visit adds a share of the quantum in proportion to the job's weight; a job with credit gets a turn,
//! and is charged for all of it, what it takes to hand the GPU over included. Time in which nobody else
//! waited is free. Priorities are strict classes, but whoever waited [`AGED`] is in the highest.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    id::JobId,
    plan::Rotated,
    units::{Bytes, Nanos},
};

/// Weights further apart than this count as this far apart, so that the lightest job still gets its turns.
const WEIGHT_RATIO_MAX: u32 = 100;
/// Debt beyond this many quanta is forgiven: one overlong turn must not lock a job out.
const DEBT_MAX: i64 = 4;
/// Whoever waits this long no longer stands behind higher classes; longer, where [`AGED_ROUNDS`] take longer.
const AGED: Nanos = Nanos::seconds(60);
/// Waiting for this many rounds of turns is to be expected.
const AGED_ROUNDS: u64 = 2;

/// A job that wants a turn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) job: JobId,
    pub(crate) weight_milli: u32,
    pub(crate) priority: i32,
    pub(crate) waiting: Nanos,
}

#[derive(Debug, Default)]
pub(crate) struct Rotation {
    /// Credit in nanoseconds; negative is debt.
    credit: BTreeMap<JobId, i64>,
    /// Places in the round, lowest first: behind all others for who comes anew and for who was served. Numbers of jobs do
    /// not say it: whoever comes again and again under a higher number would always be ahead.
    places: BTreeMap<JobId, u64>,
    next_place: u64,
    /// Jobs that had a turn in this rotation.
    served: BTreeSet<JobId>,
    bytes_in: Bytes,
    bytes_out: Bytes,
    own_in: Bytes,
    own_out: Bytes,
    unknown: bool,
}

impl Rotation {
    /// The job to run next.
    pub(crate) fn next(&mut self, candidates: &[Candidate], quantum: Nanos) -> Option<JobId> {
        let round = quantum.0.saturating_mul(candidates.len() as u64);
        let aged = AGED.max(Nanos(round.saturating_mul(AGED_ROUNDS)));
        let class = |candidate: &Candidate| {
            if candidate.waiting >= aged { i32::MAX } else { candidate.priority }
        };
        let top = candidates.iter().map(class).max()?;
        let contenders: Vec<&Candidate> = candidates.iter().filter(|c| class(c) == top).collect();
        let heaviest = contenders.iter().map(|c| c.weight_milli).max()?.max(1);
        let quantum = i64::try_from(quantum.0).unwrap_or(i64::MAX / 8).clamp(1, i64::MAX / 8);
        // Credit is not hoarded while there is nothing to spend it on.
        self.credit.retain(|job, credit| *credit < 0 || contenders.iter().any(|c| c.job == *job));
        for credit in self.credit.values_mut() {
            *credit = (*credit).clamp(-DEBT_MAX * quantum, quantum);
        }
        for candidate in candidates {
            if !self.places.contains_key(&candidate.job) {
                self.go_behind(candidate.job);
            }
        }
        let mut order = contenders;
        order.sort_by_key(|candidate| self.places.get(&candidate.job));
        for candidate in
            order.iter().cycle().take(order.len() * (DEBT_MAX as usize + 1) * WEIGHT_RATIO_MAX as usize)
        {
            let weight = candidate.weight_milli.max(heaviest.div_ceil(WEIGHT_RATIO_MAX));
            let share = (i128::from(quantum) * i128::from(weight) / i128::from(heaviest)).max(1) as i64;
            let credit = self.credit.entry(candidate.job).or_default();
            *credit = (*credit + share).min(quantum);
            if *credit > 0 {
                let job = candidate.job;
                self.go_behind(job);
                return Some(job);
            }
        }
        // Unreachable by the bounds on debt and weight, but a turn for anybody is better than for nobody.
        let job = order.first()?.job;
        self.go_behind(job);
        Some(job)
    }

    fn go_behind(&mut self, job: JobId) {
        self.places.insert(job, self.next_place);
        self.next_place += 1;
    }

    /// How long the turn of a job may last.
    pub(crate) fn turn_length(&self, job: JobId, quantum: Nanos, shortest: Nanos) -> Nanos {
        let credit = self.credit.get(&job).copied().unwrap_or_default();
        let credit = Nanos(u64::try_from(credit).unwrap_or(0));
        credit.min(quantum).max(shortest.min(quantum)).max(Nanos(1))
    }

    pub(crate) fn charge(&mut self, job: JobId, time: Nanos) {
        let time = i64::try_from(time.0).unwrap_or(i64::MAX);
        let credit = self.credit.entry(job).or_default();
        *credit = credit.saturating_sub(time);
    }

    /// A job is gone.
    pub(crate) fn forget(&mut self, job: JobId) {
        self.credit.remove(&job);
        self.places.remove(&job);
        self.served.remove(&job);
    }

    /// Memory moved while clients take turns.
    pub(crate) fn note_moved(&mut self, bytes_in: Bytes, bytes_out: Bytes) {
        self.bytes_in += bytes_in;
        self.bytes_out += bytes_out;
    }

    /// The shim itself moved memory, whether or not the driver's counters show it.
    pub(crate) fn note_own_move(&mut self, bytes_in: Bytes, bytes_out: Bytes) {
        self.own_in += bytes_in;
        self.own_out += bytes_out;
    }

    /// What moved in this rotation cannot be known.
    pub(crate) fn note_unknown(&mut self) {
        self.unknown = true;
    }

    /// A turn ended. If all these jobs had theirs, the rotation is complete.
    pub(crate) fn turn_ended(
        &mut self,
        job: JobId,
        wanting: impl IntoIterator<Item = JobId>,
    ) -> Option<Rotated> {
        self.served.insert(job);
        if self.served.len() < 2 || wanting.into_iter().any(|job| !self.served.contains(&job)) {
            return None;
        }
        let moved = self.bytes_in.max(self.bytes_out).max(self.own_in).max(self.own_out);
        let rotated = Rotated { moved, known: !self.unknown };
        self.start_rotation();
        Some(rotated)
    }

    /// Credits stay; the account of what moved starts afresh.
    pub(crate) fn start_rotation(&mut self) {
        self.served.clear();
        self.bytes_in = Bytes::ZERO;
        self.bytes_out = Bytes::ZERO;
        self.own_in = Bytes::ZERO;
        self.own_out = Bytes::ZERO;
        self.unknown = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUANTUM: Nanos = Nanos::SECOND;

    fn candidate(job: u64, weight_milli: u32) -> Candidate {
        Candidate { job: JobId(job), weight_milli, priority: 0, waiting: Nanos::ZERO }
    }

    fn run(candidates: &[Candidate], turns: u32) -> BTreeMap<u64, u64> {
        let mut rotation = Rotation::default();
        let mut time = BTreeMap::new();
        for _ in 0..turns {
            let Some(job) = rotation.next(candidates, QUANTUM) else { break };
            let length = rotation.turn_length(job, QUANTUM, Nanos::millis(100));
            rotation.charge(job, length + Nanos::millis(20));
            *time.entry(job.0).or_default() += length.0 + 20_000_000;
        }
        time
    }

    #[test]
    fn equal_weights_get_equal_time() {
        let time = run(&[candidate(1, 1000), candidate(2, 1000), candidate(3, 1000)], 300);
        let (low, high) = (time.values().min(), time.values().max());
        assert_eq!(time.len(), 3);
        assert!(high.zip(low).is_some_and(|(high, low)| high - low <= 2 * QUANTUM.0), "{time:?}");
    }

    #[test]
    fn time_follows_weights() {
        let time = run(&[candidate(1, 100), candidate(2, 900)], 2000);
        let ratio = time[&2] as f64 / time[&1] as f64;
        assert!((8.5..9.5).contains(&ratio), "{ratio}");
    }

    #[test]
    fn the_lightest_job_is_not_starved_and_neither_is_one_in_debt() {
        let time = run(&[candidate(1, 1), candidate(2, u32::MAX)], 2000);
        assert!(time.contains_key(&1));
        let mut rotation = Rotation::default();
        rotation.charge(JobId(1), Nanos(u64::MAX));
        let both = [candidate(1, 1000), candidate(2, 1000)];
        let turns: Vec<_> = (0..8)
            .filter_map(|_| {
                let job = rotation.next(&both, QUANTUM)?;
                rotation.charge(job, QUANTUM);
                Some(job)
            })
            .collect();
        assert!(turns.contains(&JobId(1)), "{turns:?}");
    }

    #[test]
    fn a_higher_class_runs_first_until_the_lower_one_has_aged() {
        let mut rotation = Rotation::default();
        let high = Candidate { priority: 1, ..candidate(2, 1000) };
        for _ in 0..5 {
            assert_eq!(rotation.next(&[candidate(1, 1000), high], QUANTUM), Some(JobId(2)));
            rotation.charge(JobId(2), QUANTUM);
        }
        let aged = Candidate { waiting: AGED, ..candidate(1, 1000) };
        assert_eq!(rotation.next(&[aged, high], QUANTUM), Some(JobId(1)));
    }

    #[test]
    fn a_rotation_is_complete_when_everybody_who_wants_had_a_turn() {
        let mut rotation = Rotation::default();
        rotation.note_moved(Bytes::mib(3), Bytes::mib(5));
        assert_eq!(rotation.turn_ended(JobId(1), [JobId(1), JobId(2)]), None);
        rotation.note_own_move(Bytes::mib(4), Bytes::mib(4));
        let done = rotation.turn_ended(JobId(2), [JobId(1), JobId(2)]);
        assert_eq!(done, Some(Rotated { moved: Bytes::mib(5), known: true }));
        assert_eq!(rotation.turn_ended(JobId(1), [JobId(1)]), None, "one job alone is no rotation");
        rotation.note_unknown();
        rotation.turn_ended(JobId(1), [JobId(2)]);
        let done = rotation.turn_ended(JobId(2), [JobId(1)]);
        assert_eq!(done, Some(Rotated { moved: Bytes::ZERO, known: false }));
    }
}
