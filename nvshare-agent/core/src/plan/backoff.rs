//! What past mistakes make harder.
//!
//! **Problem.** Clients that come and go, or change what they use, can make every single decision look right
//! and the sequence of them useless.
//!
//! **Approach.** Three memories. A trial that ended without a confirmation makes the next alarm ask for more
//! refaults than a change of phase can cause. Turns that ended on hope, and were needed again soon, are not
//! ended on hope a second time within [`HOLD`]. A failed probe doubles the time to the next one.
//!
//! **Invariants.** Entering is always possible, leaving by certainty as well. In any hour there is at most one
//! leave on hope that follows a relapse. Failed probes over a time T are O(log T)
//! until the pause reaches [`PROBE_PAUSE_MAX`].

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Nanos};

/// An alarm this long after the last leave is a new story.
const RELAPSE_WITHIN: Nanos = Nanos::seconds(600);
/// After a relapse, turns last until this long after they last ended.
const HOLD: Nanos = Nanos::seconds(3600);
/// A trial that came to nothing is forgotten after this time.
const TRIAL_FORGOTTEN: Nanos = Nanos::seconds(3600);
/// The first trial that came to nothing asks the next alarm for this share of the capacity in refaults
/// (thousandths); each further one doubles it. A change of phase refaults at most one capacity, once.
const VOLUME_MILLI: u64 = 1000;
const VOLUME_DOUBLINGS: u32 = 3;
/// Pauses between probes.
const PROBE_PAUSE_MIN: Nanos = Nanos::seconds(20);
const PROBE_PAUSE_MAX: Nanos = Nanos::seconds(600);
const PROBE_COSTS: u64 = 10;
/// A probe lasts this part of the pause before it, and no longer than a second.
const PROBE_PART: u64 = 20;
const PROBE_MAX: Nanos = Nanos::SECOND;

/// See the module.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Backoff {
    /// How often turns were needed again soon after they ended.
    relapses: u32,
    left_at: Option<Nanos>,
    hold_until: Nanos,
    /// Trials that came to nothing, and when the last of them ended.
    trials: u32,
    trial_at: Nanos,
    probes_failed: u32,
    probed_at: Option<Nanos>,
}

impl Backoff {
    /// An alarm begins a trial.
    pub(crate) fn entered(&mut self, now: Nanos) {
        let relapse = self.left_at.filter(|&at| now.since(at) < RELAPSE_WITHIN);
        self.relapses = if relapse.is_some() { self.relapses.saturating_add(1) } else { 0 };
        if let Some(at) = relapse {
            self.hold_until = at + HOLD;
        }
        self.probed_at = None;
        self.probes_failed = 0;
    }

    /// Turns ended on hope.
    pub(crate) fn left(&mut self, now: Nanos, confirmed: bool) {
        self.left_at = Some(now);
        if !confirmed {
            self.trials = self.trials_at(now).saturating_add(1);
            self.trial_at = now;
        }
    }

    pub(crate) fn relapses(&self) -> u32 {
        self.relapses
    }

    /// Turns do not end on hope before this.
    pub(crate) fn hold_until(&self) -> Nanos {
        self.hold_until
    }

    /// What an episode must have refaulted for another trial.
    pub(crate) fn volume(&self, now: Nanos, capacity: Bytes) -> Bytes {
        match self.trials_at(now) {
            0 => Bytes::ZERO,
            trials => capacity.per_mille(VOLUME_MILLI << (trials - 1).min(VOLUME_DOUBLINGS)),
        }
    }

    fn trials_at(&self, now: Nanos) -> u32 {
        let forgotten = now.since(self.trial_at).0 / TRIAL_FORGOTTEN.0;
        self.trials.saturating_sub(u32::try_from(forgotten).unwrap_or(u32::MAX))
    }

    /// How long a probe may last, if it is time for one; `since`: when turns began.
    pub(crate) fn probe_due(&self, now: Nanos, since: Nanos, cost: Nanos) -> Option<Nanos> {
        let pause = self.pause(cost);
        (now.since(self.probed_at.unwrap_or(since)) >= pause)
            .then_some(Nanos(pause.0 / PROBE_PART).min(PROBE_MAX))
    }

    fn pause(&self, cost: Nanos) -> Nanos {
        let first = PROBE_PAUSE_MIN.max(Nanos(cost.0.saturating_mul(PROBE_COSTS)));
        Nanos(first.0.saturating_mul(1 << self.probes_failed.min(20))).min(PROBE_PAUSE_MAX)
    }

    /// A probe showed that turns are needed.
    pub(crate) fn probe_failed(&mut self, now: Nanos) {
        self.probes_failed = self.probes_failed.saturating_add(1);
        self.probed_at = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: Bytes = Bytes::gib(1);

    #[test]
    fn a_relapse_holds_turns_for_an_hour() {
        let mut backoff = Backoff::default();
        backoff.entered(Nanos::ZERO);
        backoff.left(Nanos::seconds(100), true);
        assert_eq!(backoff.hold_until(), Nanos::ZERO);
        backoff.entered(Nanos::seconds(200));
        assert_eq!(backoff.hold_until(), Nanos::seconds(3700));
        backoff.left(Nanos::seconds(3700), true);
        backoff.entered(Nanos::seconds(9000));
        assert_eq!(backoff.hold_until(), Nanos::seconds(3700), "that was long after");
    }

    #[test]
    fn trials_that_came_to_nothing_ask_for_more_refaults_until_they_are_forgotten() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.volume(Nanos::ZERO, CAPACITY), Bytes::ZERO);
        backoff.left(Nanos::seconds(1), false);
        assert_eq!(backoff.volume(Nanos::seconds(1), CAPACITY), CAPACITY);
        backoff.left(Nanos::seconds(2), false);
        assert_eq!(backoff.volume(Nanos::seconds(2), CAPACITY), Bytes::gib(2));
        assert_eq!(backoff.volume(Nanos::seconds(3602), CAPACITY), CAPACITY);
        assert_eq!(backoff.volume(Nanos::seconds(7202), CAPACITY), Bytes::ZERO);
    }

    #[test]
    fn failed_probes_are_logarithmic_in_time_until_the_pause_is_at_its_longest() {
        let mut backoff = Backoff::default();
        let (mut now, mut failed) = (Nanos::ZERO, Vec::new());
        while now < Nanos::seconds(3600) {
            now += Nanos::SECOND;
            if let Some(length) = backoff.probe_due(now, Nanos::ZERO, Nanos::SECOND) {
                assert!(length <= PROBE_MAX);
                backoff.probe_failed(now);
                failed.push(now.0 / 1_000_000_000);
            }
        }
        assert_eq!(failed, [20, 60, 140, 300, 620, 1220, 1820, 2420, 3020]);
    }
}
