//! When whose events are sampled.
//!
//! **Problem.** An open queue costs a program that lives on faults half its speed, so it must be rare; and it must be there
//! when it is not known what goes on.
//!
//! **Approach.** Samples last whole bins. A client is sampled only while pressure is suspected on one of its GPUs, rests
//! between two samples for as long as its share of time demands, and at most [`AT_ONCE`] are sampled together, those first
//! that waited longest.
//!
//! **Invariants.** Over any time, a client's sampled bins are at most its share of the bins plus one sample.

use std::collections::BTreeMap;

use nvshare_core::ClientId;

/// Clients sampled at one time: each has a ring of its own, which the driver pins.
pub const AT_ONCE: usize = 4;

/// Decides, bin by bin.
#[derive(Debug)]
pub struct Schedule {
    /// Bins of a sample.
    length: u64,
    /// Bins from the beginning of a sample to the earliest beginning of the next.
    every: u64,
    bin: u64,
    /// When each client's last sample began, and the how manieth sample of all it was.
    began: BTreeMap<ClientId, (u64, u64)>,
    samples: u64,
}

impl Schedule {
    /// Samples of this many bins (at least one), for this share of time in thousandths (at least one).
    pub fn new(length: u64, duty_milli: u32) -> Self {
        let length = length.max(1);
        let every = (length * 1000).div_ceil(u64::from(duty_milli.clamp(1, 1000)));
        Self { length, every, bin: 0, began: BTreeMap::new(), samples: 0 }
    }

    /// Whose events are to be sampled in the bin that begins. `suspects` are the clients on GPUs under suspicion of
    /// whom no better source knows; without any the queues rest, and clients that are gone are forgotten.
    pub fn next(&mut self, suspects: &[ClientId], alive: &[ClientId]) -> Vec<ClientId> {
        self.bin += 1;
        let now = self.bin;
        self.began.retain(|client, _| alive.contains(client));
        let going = |began: u64| now - began < self.length;
        let mut chosen: Vec<ClientId> =
            self.began.iter().filter(|(_, began)| going(began.0)).map(|(&client, _)| client).collect();
        let mut rested: Vec<(Option<(u64, u64)>, ClientId)> = suspects
            .iter()
            .map(|&client| (self.began.get(&client).copied(), client))
            .filter(|(began, _)| began.is_none_or(|began| now - began.0 >= self.every))
            .collect();
        // Whoever was never sampled is first.
        rested.sort_unstable();
        for (_, client) in rested {
            if chosen.len() >= AT_ONCE {
                break;
            }
            if !chosen.contains(&client) {
                chosen.push(client);
                self.samples += 1;
                self.began.insert(client, (now, self.samples));
            }
        }
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clients(count: u64) -> Vec<ClientId> {
        (1..=count).map(ClientId).collect()
    }

    #[test]
    fn nobody_is_sampled_in_calm_times() {
        let mut schedule = Schedule::new(1, 100);
        for _ in 0..100 {
            assert_eq!(schedule.next(&[], &clients(3)), []);
        }
    }

    #[test]
    fn a_suspect_is_sampled_at_once_and_for_its_share_of_time() {
        for (length, duty) in [(1, 100), (2, 100), (3, 250), (1, 1000), (1, 7)] {
            let mut schedule = Schedule::new(length, duty);
            let one = clients(1);
            let bins = 10_000;
            let sampled: Vec<bool> = (0..bins).map(|_| !schedule.next(&one, &one).is_empty()).collect();
            assert!(sampled[0], "the first bin is sampled");
            let count = sampled.iter().filter(|&&on| on).count() as u64;
            assert!(count <= bins * u64::from(duty) / 1000 + length, "{length} {duty}: {count}");
            assert!(count + length >= bins * u64::from(duty) / 1000 * 9 / 10, "{length} {duty}: {count}");
        }
    }

    #[test]
    fn many_suspects_take_turns_and_no_more_than_the_limit_is_open() {
        let mut schedule = Schedule::new(1, 500);
        let all = clients(11);
        let mut seen: BTreeMap<ClientId, usize> = BTreeMap::new();
        for _ in 0..110 {
            let chosen = schedule.next(&all, &all);
            assert!(chosen.len() <= AT_ONCE);
            for client in chosen {
                *seen.entry(client).or_default() += 1;
            }
        }
        let (least, most) = (seen.values().min(), seen.values().max());
        assert_eq!(seen.len(), 11);
        assert!(most.unwrap() - least.unwrap() <= 1, "{seen:?}");
    }

    #[test]
    fn clients_that_are_gone_are_forgotten() {
        let mut schedule = Schedule::new(5, 100);
        let two = clients(2);
        assert_eq!(schedule.next(&two, &two), two);
        assert_eq!(schedule.next(&two[..1], &two[..1]), two[..1], "a sample goes on to its end");
        assert_eq!(schedule.began.len(), 1);
    }
}
