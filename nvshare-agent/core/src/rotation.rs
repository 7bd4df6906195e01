//! Whose turn is next: deficit round robin over sets of jobs, in GPU time.
//!
//! Each round adds a share of the quantum in proportion to the jobs' weights. A set that has saved up enough
//! for a turn worth its hand-over gets one, and its jobs are charged for all of it, what it takes to hand the
//! GPU over included: light jobs get turns as long as heavy ones, only less often. Time in which nobody else
//! waited is free. Priorities are strict classes, but whoever waited [`AGED`] is in the highest.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{
    id::JobId,
    plan::Rotated,
    units::{Bytes, Nanos},
};

/// Weights further apart than this count as this far apart, so that the lightest job still gets its turns.
const WEIGHT_RATIO_MAX: u64 = 100;
/// Debt beyond this many quanta is forgiven: one overlong turn must not lock a job out.
const DEBT_MAX: i64 = 4;
/// A turn is worth its hand-over from this part of the quantum on.
const SAVED: i64 = 2;
/// Whoever waits this long no longer stands behind higher classes; longer, where [`AGED_ROUNDS`] take longer.
const AGED: Nanos = Nanos::seconds(60);
/// Waiting for this many rounds of turns, which are longer for light jobs, is to be expected.
const AGED_ROUNDS: u64 = 2;

/// A set of jobs of which some want a turn.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    /// Its jobs, in order; the first is what the set goes by.
    pub(crate) jobs: Vec<JobId>,
    /// Those that want a turn, each with its weight.
    pub(crate) wanting: Vec<(JobId, u32)>,
    pub(crate) priority: i32,
    pub(crate) waiting: Nanos,
}

impl Candidate {
    fn weight(&self) -> u64 {
        self.wanting.iter().map(|(_, weight)| u64::from(*weight)).sum::<u64>().max(1)
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Rotation {
    /// Credit in nanoseconds; negative is debt.
    credit: BTreeMap<JobId, i64>,
    /// Places in the round, lowest first: behind all others for who comes anew and for who had its visit. Numbers of
    /// jobs do not say it: whoever comes again and again under a higher number would always be ahead.
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
    /// The set to run next, by its place among the candidates.
    pub(crate) fn next(&mut self, candidates: &[Candidate], quantum: Nanos) -> Option<usize> {
        let all: u64 = candidates.iter().map(Candidate::weight).sum();
        let class = |candidate: &Candidate| {
            let lighter = (all / candidate.weight()).clamp(1, WEIGHT_RATIO_MAX);
            let expected = quantum.0.saturating_mul(lighter).saturating_mul(AGED_ROUNDS);
            if candidate.waiting >= AGED.max(Nanos(expected)) { i32::MAX } else { candidate.priority }
        };
        let first = candidates.first()?.priority;
        let one_class = candidates.iter().all(|candidate| candidate.priority == first);
        let class = |candidate: &Candidate| if one_class { first } else { class(candidate) };
        let top = candidates.iter().map(class).max()?;
        let mut contenders: Vec<usize> =
            (0..candidates.len()).filter(|&index| class(&candidates[index]) == top).collect();
        contenders.sort_by(|&a, &b| candidates[a].jobs.cmp(&candidates[b].jobs));
        let heaviest = contenders.iter().map(|&index| candidates[index].weight()).max()?;
        let quantum = i64::try_from(quantum.0).unwrap_or(i64::MAX / 8).clamp(1, i64::MAX / 8);
        // Credit is not hoarded while there is nothing to spend it on; a guest of several sets has one account.
        let wanting: BTreeSet<JobId> = contenders
            .iter()
            .flat_map(|&index| candidates[index].wanting.iter().map(|(job, _)| *job))
            .collect();
        self.credit.retain(|job, credit| *credit < 0 || wanting.contains(job));
        for credit in self.credit.values_mut() {
            *credit = (*credit).clamp(-DEBT_MAX * quantum, quantum);
        }
        self.seat(candidates);
        let mut order = contenders;
        order.sort_by_key(|&index| self.place_of(&candidates[index]));
        let share = |index: usize| {
            let weight = candidates[index].weight().max(heaviest.div_ceil(WEIGHT_RATIO_MAX));
            (i128::from(quantum) * i128::from(weight) / i128::from(heaviest)).max(1) as i64
        };
        let needed = (quantum / SAVED).max(1);
        let rounds = |index: usize| {
            let missing = needed.saturating_sub(self.credit_of(&candidates[index])).max(0) as u64;
            (missing.div_ceil(share(index) as u64)).max(1) as i64
        };
        let (place, rounds) = order
            .iter()
            .map(|&index| rounds(index))
            .enumerate()
            .min_by_key(|&(place, rounds)| (rounds, place))?;
        for (at, &index) in order.iter().enumerate() {
            let visits = if at <= place { rounds } else { rounds - 1 };
            self.add(&candidates[index], share(index).saturating_mul(visits), quantum);
        }
        let chosen = *order.get(place)?;
        // Whoever was passed over had its visit: it comes by again once everybody else had theirs. Otherwise it would
        // be given its share with each turn of anybody, not with each round.
        for &index in &order[..=place] {
            for &job in &candidates[index].jobs {
                self.go_behind(job);
            }
        }
        Some(chosen)
    }

    /// Gives each job that has no place in the round one behind all others.
    fn seat(&mut self, candidates: &[Candidate]) {
        let jobs: BTreeSet<JobId> = candidates.iter().flat_map(|set| set.jobs.iter().copied()).collect();
        for job in jobs {
            if !self.places.contains_key(&job) {
                self.go_behind(job);
            }
        }
    }

    fn go_behind(&mut self, job: JobId) {
        self.places.insert(job, self.next_place);
        self.next_place += 1;
    }

    /// A set stands where the first of its jobs that want a turn does: a guest that was served in another set
    /// holds nobody back.
    fn place_of(&self, candidate: &Candidate) -> Option<u64> {
        candidate.wanting.iter().filter_map(|(job, _)| self.places.get(job)).min().copied()
    }

    fn credit_of(&self, candidate: &Candidate) -> i64 {
        candidate.wanting.iter().filter_map(|(job, _)| self.credit.get(job)).sum()
    }

    /// Adds to the jobs' credit in proportion to their weights, up to `most` for the set.
    fn add(&mut self, candidate: &Candidate, amount: i64, most: i64) {
        let amount = amount.min(most.saturating_sub(self.credit_of(candidate)));
        let weight = i128::from(candidate.weight());
        for (job, of_job) in &candidate.wanting {
            let part = (i128::from(amount) * i128::from(*of_job) / weight) as i64;
            let credit = self.credit.entry(*job).or_default();
            *credit = credit.saturating_add(part);
        }
    }

    /// How long the turn of a set may last.
    pub(crate) fn turn_length(&self, jobs: &[JobId], quantum: Nanos, shortest: Nanos) -> Nanos {
        let credit: i64 = jobs.iter().filter_map(|job| self.credit.get(job)).sum();
        let credit = Nanos(u64::try_from(credit).unwrap_or(0));
        credit.min(quantum).max(shortest.min(quantum)).max(Nanos(1))
    }

    /// Charges the jobs of a set for a turn, in proportion to their weights.
    pub(crate) fn charge(&mut self, jobs: &[(JobId, u32)], time: Nanos) {
        let weight: u64 = jobs.iter().map(|(_, weight)| u64::from(*weight)).sum::<u64>().max(1);
        for (job, of_job) in jobs {
            let part = u128::from(time.0) * u128::from(*of_job) / u128::from(weight);
            let credit = self.credit.entry(*job).or_default();
            *credit = credit.saturating_sub(i64::try_from(part).unwrap_or(i64::MAX));
        }
    }

    /// What others used up entitles an idle job in debt to its share, as if it had waited.
    pub(crate) fn relieve(&mut self, job: JobId, time: Nanos, weight: u32, of: u64) {
        if let Some(credit) = self.credit.get_mut(&job)
            && *credit < 0
        {
            let part = u128::from(time.0) * u128::from(weight) / u128::from(of.max(1));
            *credit = credit.saturating_add(i64::try_from(part).unwrap_or(i64::MAX)).min(0);
        }
    }

    /// Jobs in debt.
    pub(crate) fn debtors(&self) -> Vec<JobId> {
        self.credit.iter().filter(|(_, credit)| **credit < 0).map(|(job, _)| *job).collect()
    }

    /// The job has used up no more than its share of a round ahead of time.
    pub(crate) fn solvent(&self, job: JobId, quantum: Nanos) -> bool {
        let most = i64::try_from(quantum.0 / 2).unwrap_or(i64::MAX);
        self.credit.get(&job).is_none_or(|credit| *credit > -most)
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

    /// What came back so far in this rotation.
    pub(crate) fn brought(&self) -> Bytes {
        self.bytes_in.max(self.own_in)
    }

    /// A turn was interrupted that others need not wait for to call the rotation complete.
    pub(crate) fn served(&mut self, jobs: &[JobId]) {
        self.served.extend(jobs);
    }

    /// A turn ended. If all these jobs had theirs, the rotation is complete.
    pub(crate) fn turn_ended(
        &mut self,
        jobs: &[JobId],
        wanting: impl IntoIterator<Item = JobId>,
    ) -> Option<Rotated> {
        let alone = self.served.is_empty() || self.served.iter().all(|served| jobs.contains(served));
        self.served.extend(jobs);
        if alone || wanting.into_iter().any(|job| !self.served.contains(&job)) {
            return None;
        }
        let moved = self.bytes_in.max(self.bytes_out).max(self.own_in).max(self.own_out);
        let by_shim = self.own_in > Bytes::ZERO || self.own_out > Bytes::ZERO;
        let rotated = Rotated { moved, brought: self.brought(), known: !self.unknown, by_shim };
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
        set(&[(job, weight_milli)])
    }

    fn set(jobs: &[(u64, u32)]) -> Candidate {
        let wanting: Vec<_> = jobs.iter().map(|&(job, weight)| (JobId(job), weight)).collect();
        let jobs = wanting.iter().map(|(job, _)| *job).collect();
        Candidate { jobs, wanting, priority: 0, waiting: Nanos::ZERO }
    }

    /// The time of each set, by its first job, and how many turns there were.
    fn run(candidates: &[Candidate], turns: u32) -> BTreeMap<u64, (u64, u32)> {
        let mut rotation = Rotation::default();
        let mut time: BTreeMap<u64, (u64, u32)> = BTreeMap::new();
        for _ in 0..turns {
            let Some(index) = rotation.next(candidates, QUANTUM) else { break };
            let Candidate { jobs, wanting, .. } = &candidates[index];
            let length = rotation.turn_length(jobs, QUANTUM, Nanos::millis(100));
            rotation.charge(wanting, length + Nanos::millis(20));
            let (total, turns) = time.entry(jobs[0].0).or_default();
            *total += length.0 + 20_000_000;
            *turns += 1;
        }
        time
    }

    #[test]
    fn equal_weights_get_equal_time() {
        let time = run(&[candidate(1, 1000), candidate(2, 1000), candidate(3, 1000)], 300);
        let times: Vec<u64> = time.values().map(|(time, _)| *time).collect();
        assert_eq!(time.len(), 3);
        let (low, high) = (times.iter().min(), times.iter().max());
        assert!(high.zip(low).is_some_and(|(high, low)| high - low <= 2 * QUANTUM.0), "{time:?}");
    }

    #[test]
    fn time_follows_weights_with_turns_worth_their_hand_over() {
        for (heavy, expected) in [(300, 3.0), (900, 9.0)] {
            let time = run(&[candidate(1, 100), candidate(2, heavy)], 4000);
            let ratio = time[&2].0 as f64 / time[&1].0 as f64;
            assert!((expected * 0.98..expected * 1.02).contains(&ratio), "{ratio}");
            let (light, turns) = time[&1];
            assert!(light / u64::from(turns) >= QUANTUM.0 / 2, "turns of {} ns", light / u64::from(turns));
        }
    }

    #[test]
    fn a_light_job_beside_two_heavy_ones_gets_its_share_of_rounds_not_of_turns() {
        let time = run(&[candidate(1, 100), candidate(2, 300), candidate(3, 300)], 4000);
        let ratio = (time[&2].0 + time[&3].0) as f64 / time[&1].0 as f64;
        assert!((5.9..6.1).contains(&ratio), "{ratio}");
    }

    #[test]
    fn the_order_in_which_sets_are_named_does_not_matter() {
        let mut rotation = Rotation::default();
        let candidates = [candidate(2, 1000), candidate(1, 1000)];
        let turns: Vec<_> = (0..4)
            .filter_map(|_| {
                let index = rotation.next(&candidates, QUANTUM)?;
                rotation.charge(&candidates[index].wanting, QUANTUM);
                Some(index)
            })
            .collect();
        assert_eq!(turns, [1, 0, 1, 0]);
    }

    #[test]
    fn a_set_of_two_gets_the_time_of_two() {
        let time = run(&[set(&[(1, 1000), (2, 1000)]), candidate(3, 1000)], 3000);
        let ratio = time[&1].0 as f64 / time[&3].0 as f64;
        assert!((1.95..2.05).contains(&ratio), "{ratio}");
    }

    #[test]
    fn the_lightest_job_is_not_starved_and_neither_is_one_in_debt() {
        let time = run(&[candidate(1, 1), candidate(2, u32::MAX)], 2000);
        assert!(time.contains_key(&1));
        let mut rotation = Rotation::default();
        rotation.charge(&[(JobId(1), 1)], Nanos(u64::MAX));
        let both = [candidate(1, 1000), candidate(2, 1000)];
        let turns: Vec<_> = (0..8)
            .filter_map(|_| {
                let index = rotation.next(&both, QUANTUM)?;
                rotation.charge(&both[index].wanting, QUANTUM);
                Some(index)
            })
            .collect();
        assert!(turns.contains(&0), "{turns:?}");
    }

    #[test]
    fn what_others_use_pays_an_idle_jobs_debt_but_saves_nothing() {
        let mut rotation = Rotation::default();
        rotation.charge(&[(JobId(1), 1000)], Nanos::SECOND);
        assert!(!rotation.solvent(JobId(1), QUANTUM));
        rotation.relieve(JobId(1), Nanos::millis(600), 1000, 1000);
        assert!(rotation.solvent(JobId(1), QUANTUM));
        rotation.relieve(JobId(1), Nanos::seconds(60), 1000, 1000);
        assert_eq!(rotation.debtors(), []);
        assert_eq!(rotation.turn_length(&[JobId(1)], QUANTUM, Nanos::ZERO), Nanos(1));
    }

    #[test]
    fn a_higher_class_runs_first_until_the_lower_one_has_aged() {
        let mut rotation = Rotation::default();
        let high = Candidate { priority: 1, ..candidate(2, 1000) };
        for _ in 0..5 {
            assert_eq!(rotation.next(&[candidate(1, 1000), high.clone()], QUANTUM), Some(1));
            rotation.charge(&high.wanting, QUANTUM);
        }
        let aged = Candidate { waiting: AGED, ..candidate(1, 1000) };
        assert_eq!(rotation.next(&[aged, high], QUANTUM), Some(0));
    }

    #[test]
    fn a_light_job_among_its_equals_does_not_age() {
        let light = Candidate { waiting: Nanos::seconds(9999), ..candidate(1, 100) };
        let mut rotation = Rotation::default();
        let candidates = [light, candidate(2, 900)];
        let turns = (0..100).filter_map(|_| {
            let index = rotation.next(&candidates, QUANTUM)?;
            let Candidate { jobs, wanting, .. } = &candidates[index];
            let length = rotation.turn_length(jobs, QUANTUM, Nanos::ZERO);
            rotation.charge(wanting, length);
            Some(index)
        });
        assert!(turns.filter(|&index| index == 0).count() < 25);
    }

    #[test]
    fn a_rotation_is_complete_when_everybody_who_wants_had_a_turn() {
        let mut rotation = Rotation::default();
        let (one, two) = (JobId(1), JobId(2));
        rotation.note_moved(Bytes::mib(3), Bytes::mib(5));
        assert_eq!(rotation.turn_ended(&[one], [one, two]), None);
        rotation.note_own_move(Bytes::mib(4), Bytes::mib(4));
        let done = rotation.turn_ended(&[two], [one, two]);
        let expected = Rotated { moved: Bytes::mib(5), brought: Bytes::mib(4), known: true, by_shim: true };
        assert_eq!(done, Some(expected));
        assert_eq!(rotation.turn_ended(&[one], [one]), None, "one job alone is no rotation");
        rotation.note_unknown();
        let done = rotation.turn_ended(&[two], [one]);
        assert_eq!(done.map(|rotated| rotated.known), Some(false));
    }
}
