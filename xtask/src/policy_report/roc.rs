//! The detector's evidence against a threshold that is not its own: what it would find and cry wolf at.

use std::ops::ControlFlow;

use nvshare_core::{
    Nanos,
    input::ModeOrder,
    sim::{self, Options, PolicyKind, Scenario, Sensors},
};

use crate::gpu_bench::stats::median;

/// Evidence must cross the threshold within this time of the first round trip.
const IN_TIME: Nanos = Nanos::SECOND;
/// After the onset, as much more of a run is of interest.
const AFTER_ONSET: Nanos = Nanos::seconds(3);
/// No run is looked at for longer than this.
const LONGEST: Nanos = Nanos::seconds(1800);
/// Two crossings closer than this are one alarm.
const ONE_ALARM: Nanos = Nanos::seconds(10);
/// Share of the last bins in which paging holds the GPU up, in thousandths, below which the detector is silent.
const HELD_UP_MILLI: u32 = 250;

/// The evidence of one run over time, always shared, in thousandths of the detector's threshold.
#[derive(Clone, Debug, Default)]
pub(super) struct Trace {
    pub(super) onset: Option<Nanos>,
    /// At the end of each bin: when, the evidence, and the evidence where paging holds the GPU up.
    pub(super) bins: Vec<(Nanos, u32, u32)>,
}

/// Which evidence counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// All of it.
    None,
    /// That while paging holds the GPU up.
    Stall,
}

impl Trace {
    /// Records a run in which nobody acts on the evidence; with `until_onset`, not for longer than it takes to tell.
    pub(super) fn record(scenario: &Scenario, sensors: Sensors, seed: u64, until_onset: bool) -> Self {
        let mut trace = Self::default();
        let options = Options { sensors, seed, ..Options::new(PolicyKind::Auto) };
        sim::watch(scenario, &options, ModeOrder::Shared, &mut |bin| {
            let most = |held_up: bool| {
                let told = bin.gpus.iter().filter(|gpu| !held_up || gpu.stall_milli >= Some(HELD_UP_MILLI));
                told.filter_map(|gpu| gpu.score_milli).max().unwrap_or(0)
            };
            trace.bins.push((bin.at, most(false), most(true)));
            let onset = bin.gpus.iter().filter_map(|gpu| gpu.onset).min();
            trace.onset = trace.onset.or(onset);
            let enough = until_onset && trace.onset.is_some_and(|onset| bin.at >= onset + AFTER_ONSET);
            if enough || bin.at >= LONGEST { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        trace
    }

    fn evidence(&self, gate: Gate) -> impl Iterator<Item = (Nanos, u32)> {
        self.bins.iter().map(move |&(at, all, held_up)| (at, if gate == Gate::None { all } else { held_up }))
    }

    /// Time from the onset until evidence reaches the threshold.
    fn delay(&self, threshold: u32, gate: Gate) -> Option<Nanos> {
        let onset = self.onset?;
        let reached = |&(at, evidence): &(Nanos, u32)| at >= onset && evidence >= threshold;
        self.evidence(gate).find(reached).map(|(at, _)| at.since(onset))
    }

    /// Evidence reaches the threshold in time after the onset.
    fn detected(&self, threshold: u32, gate: Gate) -> bool {
        self.delay(threshold, gate).is_some_and(|delay| delay <= IN_TIME)
    }

    /// How often evidence rises to the threshold.
    fn alarms(&self, threshold: u32, gate: Gate) -> usize {
        let mut last: Option<Nanos> = None;
        let mut alarms = 0;
        for (at, evidence) in self.evidence(gate) {
            if evidence >= threshold {
                alarms += usize::from(last.is_none_or(|last| at.since(last) > ONE_ALARM));
                last = Some(at);
            }
        }
        alarms
    }

    fn length(&self) -> Nanos {
        self.bins.last().map_or(Nanos::ZERO, |bin| bin.0)
    }
}

/// What a threshold amounts to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Point {
    /// In thousandths of the detector's own.
    pub(super) threshold: u32,
    /// Share of the thrash runs in which it is crossed in time.
    pub(super) detected: f64,
    /// Share of the benign runs in which it is crossed at all.
    pub(super) fooled: f64,
    /// Alarms in an hour of the benign runs.
    pub(super) alarms_per_hour: f64,
    /// From the onset, in seconds; infinite where it is never crossed.
    pub(super) delay_median: f64,
    pub(super) delay_worst: f64,
}

/// The curve over all thresholds, from the lowest.
pub(super) fn curve(thrash: &[Trace], benign: &[Trace], thresholds: &[u32], gate: Gate) -> Vec<Point> {
    let share = |traces: &[Trace], so: &dyn Fn(&Trace) -> bool| {
        traces.iter().filter(|trace| so(trace)).count() as f64 / traces.len().max(1) as f64
    };
    let hours = benign.iter().map(Trace::length).sum::<Nanos>().as_secs_f64() / 3600.0;
    let delays = |threshold: u32| -> Vec<f64> {
        let delay = |trace: &Trace| trace.delay(threshold, gate).map_or(f64::INFINITY, Nanos::as_secs_f64);
        thrash.iter().map(delay).collect()
    };
    let point = |&threshold: &u32| Point {
        threshold,
        detected: share(thrash, &|trace| trace.detected(threshold, gate)),
        fooled: share(benign, &|trace| trace.alarms(threshold, gate) > 0),
        alarms_per_hour: benign.iter().map(|trace| trace.alarms(threshold, gate)).sum::<usize>() as f64
            / hours.max(f64::MIN_POSITIVE),
        delay_median: median(&delays(threshold)),
        delay_worst: delays(threshold).into_iter().fold(0.0, f64::max),
    };
    thresholds.iter().map(point).collect()
}

/// Area below the curve of the shares, by trapezoids; 1 is perfect, 0.5 is chance.
pub(super) fn area(points: &[Point]) -> f64 {
    let mut corners: Vec<(f64, f64)> = points.iter().map(|point| (point.fooled, point.detected)).collect();
    corners.extend([(0.0, 0.0), (1.0, 1.0)]);
    corners.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    corners.windows(2).map(|pair| (pair[1].0 - pair[0].0) * f64::midpoint(pair[0].1, pair[1].1)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Evidence by tenths of a second; half of it while paging holds the GPU up.
    fn trace(onset: Option<u64>, evidence: &[u32]) -> Trace {
        let bins = (1..).zip(evidence).map(|(bin, &e)| (Nanos::millis(100 * bin), e, e / 2)).collect();
        Trace { onset: onset.map(Nanos::millis), bins }
    }

    #[test]
    fn a_threshold_is_crossed_in_time_or_not_at_all() {
        let late = trace(Some(100), &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1000]);
        assert!(!late.detected(1000, Gate::None), "1.1 s after the onset");
        let in_time = trace(Some(100), &[900, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1000]);
        assert!(in_time.detected(1000, Gate::None), "1 s after the onset");
        assert!(!in_time.detected(1001, Gate::None));
        assert!(!in_time.detected(1000, Gate::Stall) && in_time.detected(500, Gate::Stall));
        assert!(!trace(None, &[2000]).detected(1, Gate::None), "no onset");
        assert!(!trace(Some(200), &[2000, 0, 0]).detected(1000, Gate::None), "before the onset");
    }

    #[test]
    fn crossings_close_together_are_one_alarm() {
        let mut evidence = vec![0; 400];
        for bin in [10, 11, 13, 100, 300] {
            evidence[bin] = 1000;
        }
        let trace = trace(None, &evidence);
        assert_eq!(trace.alarms(1000, Gate::None), 2, "at 1 s to 10 s, and at 30 s");
        assert_eq!((trace.alarms(1001, Gate::None), trace.alarms(500, Gate::Stall)), (0, 2));
    }

    #[test]
    fn a_perfect_detector_has_area_1_one_that_cannot_tell_a_half_and_a_mistaken_one_0() {
        let (high, low) = (trace(Some(0), &[1500]), trace(Some(0), &[200]));
        let thresholds = [100, 500, 1000];
        let of = |thrash: &Trace, benign: &Trace| {
            area(&curve(std::slice::from_ref(thrash), std::slice::from_ref(benign), &thresholds, Gate::None))
        };
        assert!((of(&high, &low) - 1.0).abs() < 1e-9);
        assert!((of(&high, &high) - 0.5).abs() < 1e-9);
        assert!(of(&low, &high) < 1e-9);
        let points = curve(&[high.clone(), low.clone()], &[low], &thresholds, Gate::None);
        assert_eq!((points[2].threshold, points[2].alarms_per_hour), (1000, 0.0));
        assert!((points[2].detected - 0.5).abs() < 1e-9 && points[2].fooled.abs() < 1e-9);
        assert_eq!((points[0].delay_median, points[0].delay_worst), (0.1, 0.1));
        assert!(points[2].delay_worst.is_infinite(), "one never reaches it");
        assert!((points[0].alarms_per_hour - 36_000.0).abs() < 1e-6, "one in a tenth of a second");
    }
}
