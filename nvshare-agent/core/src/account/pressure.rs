//! Pressure-stall figures (PSI) of GPU memory, with the kernel's names and windows.
//!
//! *some* is the share of time in which at least one client with work waited for memory, *full* the share in
//! which all of them did. A bin is the smallest unit: whoever waited in a bin is taken to have waited for all of
//! the time that the driver spent on faults in it, since faults are served one after the other by one thread.
//!
//! An average follows a bin of length t by t ÷ (window + t) of the difference, in whole billionths, so that it
//! is the same on every machine.

use serde::{Deserialize, Serialize};

use super::view::{PressureView, StallView};
use crate::units::Nanos;

const WINDOWS: [Nanos; 3] = [Nanos::seconds(10), Nanos::seconds(60), Nanos::seconds(300)];
const BILLION: i128 = 1_000_000_000;

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Pressure {
    known: bool,
    some: Line,
    full: Line,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Line {
    /// Averages in billionths, by window.
    averages: [i128; 3],
    total: Nanos,
}

impl Pressure {
    pub(super) fn observe(&mut self, interval: Nanos, some: Nanos, full: Nanos) {
        self.known = true;
        self.some.observe(interval, some);
        self.full.observe(interval, full);
    }

    /// A bin of which nothing is known: averages stand still.
    pub(super) fn unknown(&mut self) {
        self.known = false;
    }

    /// `None` while nothing is known.
    pub(super) fn view(&self) -> Option<PressureView> {
        self.known.then(|| PressureView { some: self.some.view(), full: self.full.view() })
    }
}

impl Line {
    fn observe(&mut self, interval: Nanos, stalled: Nanos) {
        let length = i128::from(interval.0.max(1));
        let share = BILLION * i128::from(stalled.0.min(interval.0)) / length;
        for (average, window) in self.averages.iter_mut().zip(WINDOWS) {
            *average += (share - *average) * length / (i128::from(window.0) + length);
        }
        self.total += stalled;
    }

    fn view(&self) -> StallView {
        let [avg10, avg60, avg300] = self.averages.map(|average| (average / 1000) as u32);
        StallView { avg10_ppm: avg10, avg60_ppm: avg60, avg300_ppm: avg300, total: self.total }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BIN: Nanos = Nanos::millis(100);

    #[test]
    fn after_one_window_of_full_stall_an_average_has_come_two_thirds_of_the_way() {
        let mut pressure = Pressure::default();
        for _ in 0..100 {
            pressure.observe(BIN, BIN, Nanos::ZERO);
        }
        let view = pressure.view().unwrap();
        // 1 − 1/e is 0.632; small steps come close to it.
        assert!((626_000..638_000).contains(&view.some.avg10_ppm), "{view:?}");
        assert!((150_000..156_000).contains(&view.some.avg60_ppm), "{view:?}");
        assert!((32_000..34_000).contains(&view.some.avg300_ppm), "{view:?}");
        assert_eq!(view.some.total, Nanos::seconds(10));
        assert_eq!(view.full, StallView::default());
    }

    #[test]
    fn averages_return_to_nothing_and_the_total_stays() {
        let mut pressure = Pressure::default();
        pressure.observe(Nanos::seconds(60), Nanos::seconds(60), Nanos::seconds(60));
        for _ in 0..36_000 {
            pressure.observe(BIN, Nanos::ZERO, Nanos::ZERO);
        }
        let view = pressure.view().unwrap();
        assert!(view.full.avg300_ppm <= 4 && view.full.avg10_ppm <= 1, "{view:?}");
        assert_eq!(view.full.total, Nanos::seconds(60));
    }
}
