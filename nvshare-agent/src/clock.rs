//! The one place that reads a clock.

use std::time::Duration;

use nvshare_core::Nanos;
use rustix::time::{ClockId, clock_gettime};

/// CLOCK_MONOTONIC, the time base of clients' pages, recordings and events.
pub fn now() -> Nanos {
    let time = clock_gettime(ClockId::Monotonic);
    Nanos(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// Seconds from the epoch to the origin of [`now`], as the machine's clock has it at present.
pub fn origin_s() -> f64 {
    let time = clock_gettime(ClockId::Realtime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9 - now().as_secs_f64()
}

/// Sleeps until `at`; for ever without one.
pub async fn sleep_until(at: Option<Nanos>) {
    match at {
        Some(at) => {
            let wait = Duration::from_nanos(at.since(now()).0);
            tokio::time::sleep(wait).await;
        }
        None => std::future::pending().await,
    }
}
