//! Sequential test between two hypotheses: refaults are incidental, or they are what the GPU mostly does.
//!
//! Page's cumulative sum over blocks that were brought in, x = 1 if curable, with the rates p0 = 0.15 and
//! p1 = 0.5: each curable block adds ln(p1/p0), each other one adds ln((1−p1)/(1−p0)), never below zero;
//! evidence of 12 is an alarm. Those figures hold for independent blocks, but evictions and refaults come in
//! runs of hundreds, so a bin is one observation: what it adds is clipped, and no single bin can alarm.

use serde::{Deserialize, Serialize};

use crate::units::Nanos;

/// ln(0.5 / 0.15), in thousandths.
const CURABLE_STEP: i64 = 1204;
/// ln(0.5 / 0.85), in thousandths.
const OTHER_STEP: i64 = -531;
/// Evidence of an alarm, in thousandths.
pub(crate) const THRESHOLD: i64 = 12_000;
/// Evidence is not kept beyond this, so that it drains in a bounded time once the cause has gone.
const CEILING: i64 = 2 * THRESHOLD;
/// What a bin of [`BIN`] may add or take: three full bins make an alarm.
const CLIP: i64 = 5_000;
/// A bin of weak evidence adds at most one part in this many of what a strong one may.
const WEAK: i128 = 2;
/// The bin that [`CLIP`] is meant for; other lengths scale it.
const BIN: Nanos = Nanos::millis(100);

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Cusum {
    evidence: i64,
}

impl Cusum {
    /// Takes in one bin in which this many blocks were brought in; `weak`: the classification is uncertain.
    pub(crate) fn observe(&mut self, interval: Nanos, curable: u64, other: u64, weak: bool) {
        let clip = (i128::from(CLIP) * i128::from(interval.0) / i128::from(BIN.0))
            .clamp(1, i128::from(THRESHOLD - 1));
        let step = if curable == 0 && other == 0 {
            i128::from(OTHER_STEP)
        } else {
            i128::from(CURABLE_STEP) * i128::from(curable) + i128::from(OTHER_STEP) * i128::from(other)
        };
        let step = step.clamp(-clip, if weak { (clip / WEAK).max(1) } else { clip }) as i64;
        self.evidence = (self.evidence + step).clamp(0, CEILING);
    }

    pub(crate) fn reset(&mut self) {
        self.evidence = 0;
    }

    pub(crate) fn alarmed(&self) -> bool {
        self.evidence >= THRESHOLD
    }

    pub(crate) fn is_zero(&self) -> bool {
        self.evidence == 0
    }

    /// Evidence, 1000 = the threshold.
    pub(crate) fn score_milli(&self) -> u32 {
        (self.evidence * 1000 / THRESHOLD) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bin_never_alarms_whatever_its_length_and_three_full_ones_do() {
        for interval in [BIN, Nanos::SECOND, Nanos::seconds(60)] {
            let mut cusum = Cusum::default();
            cusum.observe(interval, 1_000_000, 0, false);
            assert!(!cusum.alarmed());
        }
        let mut cusum = Cusum::default();
        for _ in 0..3 {
            cusum.observe(BIN, 100, 0, false);
        }
        assert!(cusum.alarmed());
    }

    #[test]
    fn weak_evidence_takes_longer() {
        let mut cusum = Cusum::default();
        let bins = (1..100).find(|_| {
            cusum.observe(BIN, 100, 0, true);
            cusum.alarmed()
        });
        assert_eq!(bins, Some(5));
    }

    #[test]
    fn a_tenth_of_curable_blocks_gathers_no_evidence() {
        let mut cusum = Cusum::default();
        for _ in 0..10_000 {
            cusum.observe(BIN, 10, 90, false);
        }
        assert!(cusum.is_zero());
    }
}
