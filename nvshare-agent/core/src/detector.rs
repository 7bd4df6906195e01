//! Is this curable thrash?
//!
//! **Problem.** Refaults that taking turns would avoid look, in any single figure, like a cold start, a
//! model load, a phase change or one client larger than the card.
//!
//! **Approach.** Evidence is gathered from classified bytes by a sequential test over bins ([`cusum`]), and
//! counts only while the GPU is held up by paging ([`stall`]). Which bytes are refaults at all is decided
//! per client ([`refault`]); who contends, whether memory is over-committed, and whether turns are worth
//! their cost, is the caller's to say.
//!
//! **Invariants.** The detector's clock advances only while at least two jobs have demand: what happens while
//! one client works alone is neither evidence nor its expiry, so that clients that come and go do not make the
//! decision swing. Evidence expires after [`EXPIRY`] of that clock without a curable refault. One bin alone
//! never alarms.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Nanos};

mod cusum;
pub(crate) mod refault;
pub(crate) mod stall;

use cusum::Cusum;
use stall::Stall;

/// Signals older than this say nothing about the present; also the window in which demand counts.
pub(crate) const EXPIRY: Nanos = Nanos::seconds(2);
/// The figures reported with an alarm cover this much time.
const WINDOW: Nanos = Nanos::SECOND;
/// Of this many last bins, [`HELD_UP`] must show the GPU held up by paging.
const JUDGED: usize = 3;
const HELD_UP: usize = 2;
/// Bins kept at most, whatever their length.
const BINS_MAX: usize = 64;

/// What all clients of a GPU did in one bin.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) at: Nanos,
    pub(crate) interval: Nanos,
    pub(crate) fault_busy: Option<Nanos>,
    pub(crate) link_rate: Bytes,
    /// Some client's counters were readable.
    pub(crate) known: bool,
    pub(crate) bytes_in: Bytes,
    pub(crate) bytes_out: Bytes,
    /// Refaults that turns would avoid.
    pub(crate) curable: Bytes,
    /// Of these, what clients brought back that have more than the GPU can hold: their first turnover looks
    /// curable whatever they do.
    pub(crate) oversize: Bytes,
    /// Refaults that turns would not avoid.
    pub(crate) own: Bytes,
    /// Some of the curable ones are so by an uncertain classification.
    pub(crate) weak: bool,
    /// At least two jobs have demand.
    pub(crate) contended: bool,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Bin {
    /// By the detector's clock.
    end: Nanos,
    curable: Bytes,
    mostly_curable: bool,
    weak: bool,
    stall: Stall,
}

/// The figures behind an alarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alarm {
    pub(crate) first_refault: Nanos,
    /// In the detector's window.
    pub(crate) refaulted: Bytes,
    /// In the whole episode.
    pub(crate) episode: Bytes,
    /// Most of that is of clients that have more than the GPU can hold.
    pub(crate) oversize: bool,
    pub(crate) stall_milli: Option<u32>,
    /// Share of the time, by whatever sensor there is, in which paging holds the GPU up.
    pub(crate) held_up_milli: u32,
    pub(crate) weak: bool,
}

/// A run of curable refaults, judged once.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Episode {
    /// Start of the bin with the first one.
    began: Nanos,
    refaulted: Bytes,
    oversize: Bytes,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Detector {
    /// Time in which there was contention.
    clock: Nanos,
    cusum: Cusum,
    bins: VecDeque<Bin>,
    episode: Option<Episode>,
    /// By the detector's clock.
    last_curable: Nanos,
    /// Of the last bin, contended or not.
    latest: Option<u32>,
    curable_total: Bytes,
    own_total: Bytes,
}

impl Detector {
    /// Takes in one bin of a GPU whose clients run side by side.
    pub(crate) fn observe(&mut self, bin: &Totals) {
        self.own_total += bin.own;
        let stall = self.stall(bin);
        if !bin.contended {
            self.own_total += bin.curable;
            return;
        }
        self.clock += bin.interval;
        self.push(bin, stall);
        self.curable_total += bin.curable;
        let other = bin.bytes_in - bin.curable;
        self.cusum.observe(bin.interval, blocks(bin.curable), blocks(other), bin.weak);
        if bin.curable > Bytes::ZERO {
            let began = bin.at.since(bin.interval);
            let fresh = Episode { began, refaulted: Bytes::ZERO, oversize: Bytes::ZERO };
            let episode = self.episode.get_or_insert(fresh);
            episode.refaulted += bin.curable;
            episode.oversize += bin.oversize;
            self.last_curable = self.clock;
        } else if self.clock.since(self.last_curable) >= EXPIRY {
            self.cusum.reset();
        }
        if self.cusum.is_zero() {
            self.episode = None;
        }
    }

    /// Takes in one bin of a GPU whose clients take turns: only what turns cannot avoid is counted, and no
    /// evidence is gathered, for the traffic of hand-overs is not thrash.
    pub(crate) fn observe_turns(&mut self, bin: &Totals) {
        self.stall(bin);
        self.own_total += bin.own;
    }

    /// Starts afresh; totals stay.
    pub(crate) fn reset(&mut self) {
        self.cusum.reset();
        self.bins.clear();
        self.episode = None;
    }

    /// The alarm, if the evidence suffices and paging holds the GPU up.
    pub(crate) fn alarm(&self) -> Option<Alarm> {
        let weak = self.bins.iter().any(|bin| bin.weak);
        let judged = || self.bins.iter().rev().take(JUDGED);
        let held_up = judged().filter(|bin| bin.stall.held_up(weak)).count() >= HELD_UP;
        let extreme = !weak
            && self.bins.len() >= 2
            && self.bins.iter().rev().take(2).all(|bin| bin.mostly_curable && bin.stall.extreme());
        ((self.cusum.alarmed() && held_up) || extreme).then_some(())?;
        let stalls: Vec<u32> =
            judged().filter_map(|bin| bin.stall.milli()).map(|milli| milli.min(1000)).collect();
        let episode = self.episode?;
        Some(Alarm {
            first_refault: episode.began,
            refaulted: self.bins.iter().map(|bin| bin.curable).sum(),
            episode: episode.refaulted,
            oversize: episode.oversize.0 > episode.refaulted.0 / 2,
            stall_milli: mean(judged().filter_map(|bin| bin.stall.sensed_milli)),
            held_up_milli: mean(stalls.into_iter()).unwrap_or(0),
            weak,
        })
    }

    /// Evidence, 1000 = the threshold.
    pub(crate) fn score_milli(&self) -> u32 {
        self.cusum.score_milli()
    }

    /// Mean share of fault service over those of the bins under judgement that have it, in thousandths; where
    /// there was no contention, that of the last bin.
    pub(crate) fn stall_milli(&self) -> Option<u32> {
        mean(self.bins.iter().rev().take(JUDGED).filter_map(|bin| bin.stall.sensed_milli)).or(self.latest)
    }

    pub(crate) fn curable_total(&self) -> Bytes {
        self.curable_total
    }

    pub(crate) fn own_total(&self) -> Bytes {
        self.own_total
    }

    fn stall(&mut self, bin: &Totals) -> Stall {
        let moved = bin.known.then(|| bin.bytes_in + bin.bytes_out);
        let stall = Stall::of(bin.interval, bin.fault_busy, moved, bin.link_rate);
        self.latest = stall.sensed_milli;
        stall
    }

    fn push(&mut self, bin: &Totals, stall: Stall) {
        self.bins.push_back(Bin {
            end: self.clock,
            curable: bin.curable,
            mostly_curable: bin.curable >= Bytes::BLOCK && bin.curable >= bin.bytes_in.per_mille(500),
            weak: bin.weak && bin.curable > Bytes::ZERO,
            stall,
        });
        while self.bins.len() > BINS_MAX
            || self.bins.front().is_some_and(|oldest| self.clock.since(oldest.end) >= WINDOW)
        {
            self.bins.pop_front();
        }
    }
}

fn mean(values: impl Iterator<Item = u32>) -> Option<u32> {
    let (sum, count) = values.fold((0, 0), |(sum, count), value| (sum + u64::from(value), count + 1));
    (count > 0).then(|| (sum / count) as u32)
}

fn blocks(bytes: Bytes) -> u64 {
    bytes.0.div_ceil(Bytes::BLOCK.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(detector: &mut Detector, bins: std::ops::Range<u64>, fill: impl Fn(&mut Totals)) -> Option<u64> {
        bins.into_iter().find(|&bin| {
            let mut totals = Totals {
                at: Nanos::millis(100 * (bin + 1)),
                interval: Nanos::millis(100),
                link_rate: Bytes::gib(10),
                fault_busy: Some(Nanos::millis(50)),
                known: true,
                contended: true,
                ..Totals::default()
            };
            fill(&mut totals);
            detector.observe(&totals);
            detector.alarm().is_some()
        })
    }

    fn thrash(totals: &mut Totals) {
        totals.curable = Bytes::mib(100);
        totals.bytes_in = Bytes::mib(100);
        totals.bytes_out = Bytes::mib(100);
    }

    #[test]
    fn thrash_alarms_in_its_third_bin_and_names_when_it_began() {
        let mut detector = Detector::default();
        assert_eq!(feed(&mut detector, 0..10, |_| {}), None);
        assert_eq!(feed(&mut detector, 10..20, thrash), Some(12));
        assert_eq!(detector.alarm().map(|alarm| alarm.first_refault), Some(Nanos::millis(1000)));
    }

    #[test]
    fn extreme_thrash_alarms_in_its_second_bin() {
        let mut detector = Detector::default();
        let extreme = |totals: &mut Totals| {
            thrash(totals);
            totals.bytes_in = Bytes::mib(400);
            totals.curable = Bytes::mib(400);
            totals.fault_busy = Some(Nanos::millis(95));
        };
        assert_eq!(feed(&mut detector, 0..10, extreme), Some(1));
    }

    #[test]
    fn refaults_without_stall_without_contention_or_without_bytes_stay_quiet() {
        let mut detector = Detector::default();
        let calm = |totals: &mut Totals| {
            thrash(totals);
            totals.fault_busy = Some(Nanos::millis(5));
        };
        assert_eq!(feed(&mut detector, 0..1000, calm), None);
        let mut detector = Detector::default();
        let alone = |totals: &mut Totals| {
            thrash(totals);
            totals.contended = false;
        };
        assert_eq!(feed(&mut detector, 0..1000, alone), None);
        assert_eq!(detector.curable_total(), Bytes::ZERO);
        let mut detector = Detector::default();
        let cold_start = |totals: &mut Totals| totals.fault_busy = Some(Nanos::millis(100));
        assert_eq!(feed(&mut detector, 0..1000, cold_start), None);
    }

    #[test]
    fn weak_evidence_must_be_longer_and_the_stall_higher() {
        let weak = |totals: &mut Totals| {
            thrash(totals);
            totals.weak = true;
        };
        let mut detector = Detector::default();
        assert_eq!(feed(&mut detector, 0..20, weak), Some(4));
        let mut detector = Detector::default();
        let little = |totals: &mut Totals| {
            weak(totals);
            totals.fault_busy = Some(Nanos::millis(40));
        };
        assert_eq!(feed(&mut detector, 0..100, little), None);
    }

    #[test]
    fn time_without_contention_neither_adds_evidence_nor_lets_it_expire() {
        let mut detector = Detector::default();
        assert_eq!(feed(&mut detector, 0..2, thrash), None);
        let alone = |totals: &mut Totals| {
            thrash(totals);
            totals.contended = false;
        };
        assert_eq!(feed(&mut detector, 2..100, alone), None);
        assert_eq!(feed(&mut detector, 100..101, thrash), Some(100));
    }

    #[test]
    fn one_burst_of_refaults_does_not_alarm() {
        let mut detector = Detector::default();
        assert_eq!(feed(&mut detector, 0..1, thrash), None);
        assert_eq!(feed(&mut detector, 1..100, |_| {}), None);
        assert_eq!(detector.score_milli(), 0);
    }
}
