//! Which jobs of a GPU take their turn together.

use super::Gpu;
use crate::{
    id::JobId,
    packing::{self, Item},
    plan::Stage,
    reason::Reason,
    units::{Bytes, Nanos},
};

/// A set whose clients pushed each other out is not joined again for this long.
const APART: Nanos = Nanos::seconds(3600);

impl Gpu {
    /// A job that can be revoked has its place in some set.
    pub(crate) fn give_set(&mut self, job: JobId) {
        let takes_turns = self.plan.takes_turns() && self.jobs.contains_key(&job);
        if takes_turns && !self.sets.iter().any(|set| set.contains(&job)) {
            self.sets.push(vec![job]);
        }
    }

    /// The sets that working sets allow now; an operator's exclusive mode is one job at a time.
    fn packed(&self, now: Nanos) -> Vec<Vec<JobId>> {
        let jobs = || self.jobs.keys().copied().filter(|job| !self.exempt.contains(job));
        if self.plan.stage() == Some(Stage::Ordered) {
            return jobs().map(|job| vec![job]).collect();
        }
        let items: Vec<Item> = jobs()
            .map(|job| Item {
                job,
                size: self.working_set(job),
                alone: self.jobs.get(&job).is_some_and(|here| now < here.alone_until),
                interactive: self.interactive(job, now),
            })
            .collect();
        let taken: Bytes = self.exempt.iter().map(|&job| self.working_set(job)).sum();
        packing::pack(&items, self.capacity - taken)
    }

    /// Packs jobs anew. Only at rotation boundaries, or where there is no rotation under way.
    pub(crate) fn repack(&mut self, now: Nanos) {
        self.sets = self.packed(now);
        self.fewer = 0;
    }

    /// At a rotation boundary: packs anew if some set does not fit any more, or if fewer sets have been possible
    /// twice in a row. Says why, if it did.
    pub(crate) fn repack_if_better(&mut self, now: Nanos) -> Option<Reason> {
        let packed = self.packed(now);
        let size = |set: &Vec<JobId>| set.iter().map(|&job| self.working_set(job)).sum::<Bytes>();
        let overfull = self.sets.iter().any(|set| set.len() > 1 && size(set) > self.capacity);
        let largest = packed.iter().map(size).max().unwrap_or_default();
        self.fewer = if packed.len() < self.sets.len() { self.fewer + 1 } else { 0 };
        if packed == self.sets || !(overfull || self.fewer >= 2) {
            return None;
        }
        let before = std::mem::replace(&mut self.sets, packed).len() as u32;
        self.fewer = 0;
        Some(Reason::Repacked { before, now: self.sets.len() as u32, largest, capacity: self.capacity })
    }

    /// The jobs of a set pushed each other out: each is a set of its own for a while.
    pub(crate) fn split(&mut self, jobs: &[JobId], now: Nanos) {
        for job in jobs {
            if let Some(here) = self.jobs.get_mut(job) {
                here.alone_until = now + APART;
            }
        }
        self.repack(now);
    }

    /// A job came to be on several GPUs: it takes its turns alone from here on.
    pub(crate) fn isolate(&mut self, job: JobId) {
        let Some(here) = self.jobs.get_mut(&job) else { return };
        here.alone_until = Nanos(u64::MAX);
        if self.sets.iter().any(|set| set.len() > 1 && set.contains(&job)) {
            for set in &mut self.sets {
                set.retain(|&other| other != job);
            }
            self.sets.retain(|set| !set.is_empty());
            self.sets.push(vec![job]);
        }
        for turn in [&mut self.turn, &mut self.interrupted].into_iter().flatten() {
            if turn.jobs.len() > 1 {
                turn.jobs.retain(|&other| other != job);
            }
        }
    }

    pub(crate) fn has_sets(&self) -> bool {
        self.sets.iter().any(|set| set.len() > 1)
    }
}
