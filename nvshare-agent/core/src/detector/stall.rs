//! The supporting gate: is the GPU held up by paging, or is it merely paging?
//!
//! A cold start also keeps the fault thread busy, and that thread serves every instance of a physical GPU,
//! so this gate never raises an alarm by itself. Without the sensor, the share of the link that paging takes
//! stands in: less exact (the link's rate is an upper bound, so the share reads low), hence late, not false.

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Nanos};

/// Share of a bin, in thousandths, from which paging holds the GPU up.
const ENTER_MILLI: u32 = 250;
/// The same where the evidence is weak.
const ENTER_WEAK_MILLI: u32 = 500;
/// Shares of a bin, in thousandths, of fault service and of the link, from which there is no doubt.
const EXTREME_STALL_MILLI: u32 = 600;
const EXTREME_LINK_MILLI: u32 = 300;

/// How much of one bin went into paging.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Stall {
    /// By the fault-service sensor, in thousandths.
    pub(crate) sensed_milli: Option<u32>,
    /// By the bytes moved against the link's rate in one direction, in thousandths; may exceed 1000.
    pub(crate) link_milli: Option<u32>,
}

impl Stall {
    pub(crate) fn of(
        interval: Nanos,
        fault_busy: Option<Nanos>,
        moved: Option<Bytes>,
        link_rate: Bytes,
    ) -> Self {
        let share = |part: u128, whole: u128| {
            (whole > 0).then(|| u32::try_from(part.saturating_mul(1000) / whole).unwrap_or(u32::MAX))
        };
        let interval = u128::from(interval.0);
        Self {
            sensed_milli: fault_busy
                .and_then(|busy| share(u128::from(busy.0), interval))
                .map(|milli| milli.min(1000)),
            link_milli: moved.and_then(|moved| {
                let carried = u128::from(link_rate.0) * interval / u128::from(Nanos::SECOND.0);
                share(u128::from(moved.0), carried)
            }),
        }
    }

    pub(crate) fn held_up(self, weak: bool) -> bool {
        let enter = if weak { ENTER_WEAK_MILLI } else { ENTER_MILLI };
        self.milli().is_some_and(|milli| milli >= enter)
    }

    /// By the better of what is known.
    pub(crate) fn milli(self) -> Option<u32> {
        self.sensed_milli.or(self.link_milli)
    }

    pub(crate) fn extreme(self) -> bool {
        self.sensed_milli.is_some_and(|milli| milli >= EXTREME_STALL_MILLI)
            && self.link_milli.is_some_and(|milli| milli >= EXTREME_LINK_MILLI)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_stands_in_only_where_no_sensor_speaks() {
        let busy_link = Some(Bytes::mib(1000));
        let of = |busy| Stall::of(Nanos::millis(100), busy, busy_link, Bytes::gib(10));
        assert!(of(None).held_up(false));
        assert!(!of(Some(Nanos::millis(10))).held_up(false));
        assert!(of(Some(Nanos::millis(30))).held_up(false));
    }

    #[test]
    fn nothing_known_is_not_held_up() {
        assert!(!Stall::of(Nanos::ZERO, Some(Nanos::SECOND), None, Bytes::ZERO).held_up(false));
        assert!(!Stall::of(Nanos::SECOND, None, Some(Bytes::gib(9)), Bytes::ZERO).held_up(false));
    }
}
