//! Which jobs may run together: sets whose working sets fit.
//!
//! **Approach.** First-fit decreasing over upper bounds of working sets, into sets of at most a share of what
//! the GPU can hold. Interactive jobs are guests of every set that has room for them, since what they need is
//! to run soon, not long.
//!
//! **Invariants.** Every job is in a set of its own choosing exactly once, and elsewhere as a guest at most. A
//! job that must be alone, or that fits nowhere, is a set of its own. The order is that of job numbers.

use crate::{id::JobId, units::Bytes};

/// Sets are filled up to this share of the room, in thousandths.
pub(crate) const FILL_MILLI: u64 = 950;

/// A job to be packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Item {
    pub(crate) job: JobId,
    /// Upper bound of its working set.
    pub(crate) size: Bytes,
    /// Must not run with others.
    pub(crate) alone: bool,
    /// Runs seldom and shortly.
    pub(crate) interactive: bool,
}

/// Packs jobs into sets; `room` is what the GPU can hold beside those that run in any case.
pub(crate) fn pack(items: &[Item], room: Bytes) -> Vec<Vec<JobId>> {
    let room = room.per_mille(FILL_MILLI);
    let mut order: Vec<&Item> = items.iter().collect();
    order.sort_by(|a, b| b.size.cmp(&a.size).then(a.job.cmp(&b.job)));
    let mut bins: Vec<(Bytes, Vec<JobId>, bool)> = Vec::new();
    for item in order {
        let fitting = bins.iter_mut().find(|(used, _, closed)| !closed && *used + item.size <= room);
        match fitting {
            Some((used, jobs, _)) if !item.alone => {
                *used += item.size;
                jobs.push(item.job);
            }
            Some(_) | None => bins.push((item.size, vec![item.job], item.alone)),
        }
    }
    let mut guests: Vec<&Item> = items.iter().filter(|item| item.interactive && !item.alone).collect();
    guests.sort_by(|a, b| a.size.cmp(&b.size).then(a.job.cmp(&b.job)));
    for (used, jobs, closed) in &mut bins {
        for guest in &guests {
            if !*closed && !jobs.contains(&guest.job) && *used + guest.size <= room {
                *used += guest.size;
                jobs.push(guest.job);
            }
        }
    }
    let mut sets: Vec<Vec<JobId>> = bins.into_iter().map(|(_, jobs, _)| jobs).collect();
    // A guest that is at home in a set of its own needs that set no longer if it is welcome everywhere.
    let everywhere = |job: &JobId, sets: &[Vec<JobId>]| sets.iter().all(|set| set.contains(job));
    let homes: Vec<JobId> = guests.iter().map(|guest| guest.job).collect();
    if sets.len() > 1 {
        let others: Vec<Vec<JobId>> =
            sets.iter().filter(|set| set.iter().any(|job| !homes.contains(job))).cloned().collect();
        if !others.is_empty() && homes.iter().all(|job| everywhere(job, &others)) {
            sets = others;
        }
    }
    for set in &mut sets {
        set.sort();
    }
    sets.sort();
    sets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(job: u64, gib: u64) -> Item {
        Item { job: JobId(job), size: Bytes::gib(gib), alone: false, interactive: false }
    }

    fn packed(items: &[Item]) -> Vec<Vec<u64>> {
        let sets = pack(items, Bytes::gib(10));
        sets.into_iter().map(|set| set.into_iter().map(|job| job.0).collect()).collect()
    }

    #[test]
    fn small_ones_ride_with_the_first_big_one_that_has_room() {
        assert_eq!(packed(&[item(1, 7), item(2, 1), item(3, 1), item(4, 6)]), [vec![1, 2, 3], vec![4]]);
        assert_eq!(packed(&[item(1, 6), item(2, 6), item(3, 3)]), [vec![1, 3], vec![2]]);
    }

    #[test]
    fn what_fits_nowhere_or_must_be_alone_is_alone() {
        assert_eq!(packed(&[item(1, 20), item(2, 1)]), [vec![1], vec![2]]);
        let alone = Item { alone: true, ..item(1, 1) };
        assert_eq!(packed(&[alone, item(2, 1), item(3, 1)]), [vec![1], vec![2, 3]]);
    }

    #[test]
    fn interactive_jobs_are_guests_wherever_there_is_room() {
        let chat = Item { interactive: true, ..item(9, 2) };
        assert_eq!(packed(&[item(1, 7), item(2, 6), chat]), [vec![1, 9], vec![2, 9]]);
        assert_eq!(packed(&[item(1, 7), item(2, 9), chat]), [vec![1, 9], vec![2]]);
        assert_eq!(packed(&[item(1, 9), item(2, 9), chat]), [vec![1], vec![2], vec![9]]);
    }

    #[test]
    fn sets_are_not_filled_to_the_brim() {
        assert_eq!(packed(&[item(1, 5), item(2, 5)]), [vec![1], vec![2]]);
    }
}
