//! How a client uses the GPU in time: bursts and gaps, and how fresh its figures are.
//!
//! **Problem.** A client is idle when it shows no sign of use for longer than its signs usually lie apart; how
//! far apart they lie depends on how often its page is written and on the program itself. And whoever uses the
//! GPU shortly and seldom should not wait for those who use it for minutes.
//!
//! **Invariants.** No client is called idle sooner than [`IDLE_MIN`] after a sign, nor later than [`IDLE_MAX`].

use serde::{Deserialize, Serialize};

use crate::{benefit::duty_alone, units::Nanos};

/// Bounds of the silence after which a client counts as idle.
const IDLE_MIN: Nanos = Nanos::millis(40);
pub(crate) const IDLE_MAX: Nanos = Nanos::millis(250);
/// Bursts up to this length, and pauses from that length, make a client interactive.
const BURST_MAX: Nanos = Nanos::millis(500);
const PAUSE_MIN: Nanos = Nanos::millis(400);
/// It takes as many bursts to tell.
const BURSTS_MIN: u32 = 2;
/// A burst this much longer than usual is no burst any more.
const OUTGROWN: u64 = 8;
/// A moving mean of the share of time with use takes as many bins.
const BINS: u64 = 64;
/// Beyond this much stall, in thousandths, it cannot be told who would be busy without it.
const STALL_TOLD: u64 = 900;

/// One client's rhythm on one GPU.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Rhythm {
    /// How far apart signs of use lie while the client is at work.
    grain: Nanos,
    silence: Nanos,
    /// Share of time with use since the first, in 1/1024 of thousandths.
    seen: u64,
    burst: Nanos,
    pause: Nanos,
    bursts: u32,
    /// When the burst or the pause under way began; a burst counts from when it could run.
    since: Nanos,
    running: bool,
    spoiled: bool,
}

impl Rhythm {
    pub(crate) fn new(now: Nanos) -> Self {
        Self {
            grain: IDLE_MAX,
            silence: Nanos::ZERO,
            seen: 1000 << 10,
            burst: Nanos::ZERO,
            pause: Nanos::ZERO,
            bursts: 0,
            since: now,
            running: false,
            spoiled: false,
        }
    }

    /// The client shows signs of use, or has shown none for so long; once a bin at least.
    pub(crate) fn heard(&mut self, in_use: bool, silent_for: Nanos) {
        if in_use || silent_for < self.silence {
            // Whatever lay between two signs of work under way is no idleness.
            let seen = if self.silence < IDLE_MAX { self.silence } else { Nanos::ZERO };
            self.grain = seen.max(Nanos(self.grain.0 - self.grain.0 / 8));
        }
        self.silence = if in_use { Nanos::ZERO } else { silent_for };
    }

    /// A bin has passed in which the client could run.
    pub(crate) fn bin(&mut self, in_use: bool) {
        let target = if in_use { 1000 << 10 } else { 0 };
        self.seen = (self.seen * (BINS - 1) + target) / BINS;
    }

    /// Silence for this long is idleness.
    pub(crate) fn idle_after(&self) -> Nanos {
        (self.grain + Nanos(self.grain.0 / 4)).max(IDLE_MIN).min(IDLE_MAX)
    }

    /// Share of the time, in thousandths, in which the client would use the GPU if nothing held it up; reckoned
    /// from how it is seen while it is held up for `stall_milli`.
    pub(crate) fn duty_milli(&self, stall_milli: u64) -> u64 {
        duty_alone(self.seen >> 10, stall_milli.min(STALL_TOLD))
    }

    /// Work came up, or came to be able to run.
    pub(crate) fn began(&mut self, now: Nanos) {
        if !self.running {
            let pause = now.since(self.since);
            self.pause = if self.bursts == 0 { pause } else { mean(self.pause, pause) };
            self.running = true;
        }
        self.since = now;
    }

    /// Its memory was still on its way back: that is no part of the burst.
    pub(crate) fn restored(&mut self, now: Nanos) {
        if self.running {
            self.since = now;
        }
    }

    /// Others hold it up, by paging or by a turn of theirs: how long this burst takes says nothing.
    pub(crate) fn spoiled(&mut self) {
        self.spoiled |= self.running;
    }

    /// Work ended at `at`.
    pub(crate) fn ended(&mut self, at: Nanos) {
        if self.running {
            let burst = at.since(self.since);
            if !std::mem::take(&mut self.spoiled) {
                self.burst = if self.bursts == 0 { burst } else { mean(self.burst, burst) };
                self.bursts = self.bursts.saturating_add(1);
            }
            self.running = false;
            self.since = at.max(self.since);
        }
    }

    /// It uses the GPU shortly and seldom.
    pub(crate) fn interactive(&self, now: Nanos, runs: bool) -> bool {
        let outgrown = self.running
            && runs
            && now.since(self.since).0 > self.burst.0.saturating_mul(OUTGROWN).max(2 * BURST_MAX.0);
        self.bursts >= BURSTS_MIN
            && self.burst <= BURST_MAX
            && self.pause >= PAUSE_MIN
            && self.pause.0 >= self.burst.0.saturating_mul(2)
            && !outgrown
    }

    /// How long it usually is between two bursts.
    pub(crate) fn usual_pause(&self) -> Option<Nanos> {
        (self.bursts >= BURSTS_MIN).then_some(self.pause)
    }

    /// From one burst to the next, and the length of one.
    pub(crate) fn cycle(&self) -> (Nanos, Nanos) {
        (self.burst + self.pause, self.burst)
    }
}

fn mean(old: Nanos, new: Nanos) -> Nanos {
    Nanos(old.0 - old.0 / 4 + new.0 / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fresh_figures_show_idleness_sooner_than_stale_ones() {
        let mut fresh = Rhythm::new(Nanos::ZERO);
        let mut stale = Rhythm::new(Nanos::ZERO);
        assert_eq!(fresh.idle_after(), IDLE_MAX);
        for bin in 0..60 {
            fresh.heard(true, Nanos::ZERO);
            stale.heard(bin % 3 == 0, Nanos::millis(100 * (bin % 3)));
        }
        assert_eq!(fresh.idle_after(), IDLE_MIN);
        assert!(stale.idle_after() > Nanos::millis(200), "{}", stale.idle_after());
    }

    #[test]
    fn short_bursts_with_long_pauses_are_interactive_until_one_goes_on() {
        let mut rhythm = Rhythm::new(Nanos::ZERO);
        let mut now = Nanos::ZERO;
        for _ in 0..3 {
            now += Nanos::seconds(2);
            rhythm.began(now);
            now += Nanos::millis(50);
            rhythm.ended(now);
        }
        assert!(rhythm.interactive(now, false));
        now += Nanos::seconds(2);
        rhythm.began(now);
        assert!(rhythm.interactive(now, true));
        assert!(!rhythm.interactive(now + Nanos::seconds(2), true));
        assert!(rhythm.interactive(now + Nanos::seconds(2), false), "waiting is not running");
    }

    #[test]
    fn what_paging_adds_to_a_burst_is_no_part_of_it() {
        let mut rhythm = Rhythm::new(Nanos::ZERO);
        let mut burst = |start: u64, held_up: &dyn Fn(&mut Rhythm)| {
            rhythm.began(Nanos::millis(start));
            held_up(&mut rhythm);
            rhythm.ended(Nanos::millis(start + 900));
            rhythm.interactive(Nanos::millis(start + 900), false)
        };
        assert!(!burst(2000, &Rhythm::spoiled));
        assert!(!burst(4000, &|rhythm| rhythm.restored(Nanos::millis(4850))));
        assert!(burst(6000, &|rhythm| rhythm.restored(Nanos::millis(6850))), "two of 50 ms");
        assert!(burst(8000, &Rhythm::spoiled), "what is known stays");
    }

    #[test]
    fn steady_work_with_gaps_of_its_own_length_is_not_interactive() {
        let mut rhythm = Rhythm::new(Nanos::ZERO);
        for burst in 1..20 {
            rhythm.began(Nanos::millis(burst * 400));
            rhythm.ended(Nanos::millis(burst * 400 + 200));
        }
        assert!(!rhythm.interactive(Nanos::seconds(9), false));
    }

    #[test]
    fn the_duty_follows_the_share_of_bins_with_use_and_what_holds_the_client_up() {
        let mut rhythm = Rhythm::new(Nanos::ZERO);
        for bin in 0..1000 {
            rhythm.bin(bin % 2 == 0);
        }
        assert!((490..=510).contains(&rhythm.duty_milli(0)), "{}", rhythm.duty_milli(0));
        assert!((320..=345).contains(&rhythm.duty_milli(500)), "{}", rhythm.duty_milli(500));
        assert!(rhythm.duty_milli(1000) > 0, "even then it wants something");
    }
}
