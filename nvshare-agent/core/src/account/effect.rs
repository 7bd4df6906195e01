//! Did taking turns help? What clients got done, and what they lost to paging, before and after.
//!
//! **Approach.** *Before* is the thrash that led to the change: the bins since its first refault. *After* is all
//! of the turns, hand-overs and waiting included. A client's progress is its rate of work-submitting calls over
//! the time in which it had work, running or waiting. What clients gained is the mean over those seen on
//! both sides.
//!
//! **Invariants.** A client that got nothing done before is taken to have made one call, so the gain is a lower
//! bound; thrash that is cured within a few bins leaves little to count.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::{Bin, view::EffectView};
use crate::{id::ClientId, units::Nanos};

/// Of the time before a change, at most this much is kept.
const KEPT: Nanos = Nanos::seconds(2);
/// A client's gain is told once it had work for this long after the change.
const TOLD_AFTER: Nanos = Nanos::SECOND;

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Effect {
    /// Calls of each client at the end of the last bin.
    calls: BTreeMap<ClientId, u64>,
    /// The last bins side by side.
    recent: VecDeque<(Nanos, Side)>,
    trial: Option<Trial>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Trial {
    before: Side,
    after: Side,
    ended: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Side {
    /// Time of which it is known how much was lost.
    time: Nanos,
    lost: Nanos,
    clients: BTreeMap<ClientId, Done>,
}

/// What one client got done while it had work.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Done {
    time: Nanos,
    calls: u64,
}

impl Effect {
    pub(super) fn bin(&mut self, bin: &Bin, lost: Option<Nanos>) {
        let mut side = Side {
            time: lost.map_or(Nanos::ZERO, |_| bin.interval),
            lost: lost.unwrap_or_default(),
            clients: BTreeMap::new(),
        };
        let mut calls = BTreeMap::new();
        for seen in &bin.clients {
            calls.insert(seen.client, seen.calls);
            let before = self.calls.get(&seen.client).copied().unwrap_or(seen.calls);
            if seen.demand {
                let done = Done { time: bin.interval, calls: seen.calls.saturating_sub(before) };
                side.clients.insert(seen.client, done);
            }
        }
        self.calls = calls;
        if let Some(trial) = self.trial.as_mut().filter(|trial| bin.turns && !trial.ended) {
            trial.after.add(&side);
        } else if !bin.turns {
            self.recent.push_back((bin.at, side));
            while self.recent.front().is_some_and(|(at, _)| bin.at.since(*at) >= KEPT) {
                self.recent.pop_front();
            }
        }
    }

    pub(super) fn began(&mut self, first_refault: Option<Nanos>) {
        let recent = std::mem::take(&mut self.recent);
        self.trial = first_refault.map(|first| {
            let mut before = Side::default();
            for (_, side) in recent.iter().filter(|(at, _)| *at > first) {
                before.add(side);
            }
            Trial { before, after: Side::default(), ended: false }
        });
    }

    pub(super) fn ended(&mut self) {
        if let Some(trial) = &mut self.trial {
            trial.ended = true;
        }
    }

    pub(super) fn view(&self) -> Option<EffectView> {
        let Trial { before, after, ended } = self.trial.as_ref()?;
        Some(EffectView {
            before_stall_milli: before.stall_milli()?,
            after_stall_milli: after.stall_milli()?,
            gain_milli: gain_milli(before, after),
            ended: *ended,
        })
    }
}

impl Side {
    fn add(&mut self, other: &Self) {
        self.time += other.time;
        self.lost += other.lost;
        for (client, done) in &other.clients {
            let sum = self.clients.entry(*client).or_default();
            sum.time += done.time;
            sum.calls += done.calls;
        }
    }

    fn stall_milli(&self) -> Option<u32> {
        let share = (u128::from(self.lost.0) * 1000).checked_div(u128::from(self.time.0))?;
        Some(share.min(1000) as u32)
    }
}

/// Progress after, as a multiple of progress before, in thousandths.
fn gain_milli(before: &Side, after: &Side) -> Option<u32> {
    let gains: Vec<u128> = after
        .clients
        .iter()
        .filter(|(_, after)| after.time >= TOLD_AFTER)
        .filter_map(|(client, after)| {
            let before = before.clients.get(client)?;
            let rate_before = u128::from(before.calls.max(1)) * u128::from(after.time.0);
            let rate_after = u128::from(after.calls) * u128::from(before.time.0);
            (rate_after * 1000).checked_div(rate_before)
        })
        .collect();
    let mean = gains.iter().sum::<u128>().checked_div(gains.len() as u128)?;
    Some(u32::try_from(mean).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::{super::Seen, *};

    const BIN: Nanos = Nanos::millis(100);

    struct Clock {
        effect: Effect,
        bins: u64,
        calls: BTreeMap<u64, u64>,
    }

    impl Clock {
        /// Bins in which each of these clients makes so many calls, and this share is lost.
        fn run(&mut self, bins: u64, turns: bool, lost_ms: u64, rates: &[(u64, u64)]) {
            for _ in 0..bins {
                self.bins += 1;
                let clients = rates.iter().map(|&(client, rate)| {
                    let calls = self.calls.entry(client).or_default();
                    *calls += rate;
                    Seen {
                        client: ClientId(client),
                        demand: true,
                        working: true,
                        stalled: true,
                        calls: *calls,
                    }
                });
                let at = Nanos(BIN.0 * self.bins);
                let bin = Bin { at, interval: BIN, turns, clients: clients.collect(), ..Bin::default() };
                self.effect.bin(&bin, Some(Nanos::millis(lost_ms)));
            }
        }
    }

    fn clock() -> Clock {
        Clock { effect: Effect::default(), bins: 0, calls: BTreeMap::new() }
    }

    #[test]
    fn the_gain_compares_the_thrash_with_the_turns_and_not_with_what_was_before_it() {
        let mut clock = clock();
        clock.run(20, false, 0, &[(1, 50), (2, 50)]);
        let first_refault = Nanos(BIN.0 * clock.bins);
        clock.run(5, false, 90, &[(1, 2), (2, 2)]);
        clock.effect.began(Some(first_refault));
        clock.run(40, true, 10, &[(1, 6), (2, 10)]);
        let view = clock.effect.view().unwrap();
        assert_eq!((view.before_stall_milli, view.after_stall_milli), (900, 100));
        assert_eq!((view.gain_milli, view.ended), (Some(4000), false));
        clock.effect.ended();
        clock.run(40, false, 100, &[(1, 0), (2, 0)]);
        let later = clock.effect.view().unwrap();
        assert_eq!((later.gain_milli, later.after_stall_milli, later.ended), (Some(4000), 100, true));
    }

    #[test]
    fn a_client_that_stood_still_counts_as_if_it_had_made_one_call() {
        let mut clock = clock();
        clock.run(10, false, 100, &[(1, 0)]);
        clock.effect.began(Some(Nanos::ZERO));
        clock.run(10, true, 0, &[(1, 3)]);
        assert_eq!(clock.effect.view().unwrap().gain_milli, Some(30_000));
    }

    #[test]
    fn turns_that_were_ordered_have_nothing_to_be_compared_with() {
        let mut clock = clock();
        clock.run(10, false, 0, &[(1, 5)]);
        clock.effect.began(None);
        clock.run(20, true, 0, &[(1, 5)]);
        assert_eq!(clock.effect.view(), None);
    }
}
