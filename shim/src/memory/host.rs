//! Whether the host could take in all managed memory: what is evicted lies in host memory.
//!
//! The agent knows every client and says what is left for this one. Without an agent this process goes by what the host
//! has available, as if it were alone.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::sys;

/// What the host can take.
#[derive(Debug)]
pub(crate) struct Budget {
    /// Bytes of managed memory that this process may hold, by the agent; [`UNTOLD`] without one.
    told: AtomicU64,
    available: AtomicU64,
    read_ns: AtomicU64,
}

/// No agent has said anything.
const UNTOLD: u64 = u64::MAX;

impl Default for Budget {
    fn default() -> Self {
        Self { told: AtomicU64::new(UNTOLD), available: AtomicU64::new(0), read_ns: AtomicU64::new(0) }
    }
}

/// `/proc/meminfo` costs tens of microseconds, and what is available changes slowly against an allocation.
const EVERY_NS: u64 = 1_000_000_000;
/// The share of the host's available memory that all managed blocks may need when evicted, in percent: the
/// rest of the system, and the pages of the files it reads, need room too. The agent's share is the same.
const SHARE_PERCENT: u64 = 90;

impl Budget {
    /// Whether `managed` bytes could be evicted to the host. A host that does not say counts as large enough.
    pub(crate) fn has_room(&self, managed: u64) -> bool {
        let told = self.told.load(Ordering::Relaxed);
        if told != UNTOLD {
            return managed <= told;
        }
        let now = sys::now_ns();
        let last = self.read_ns.load(Ordering::Relaxed);
        if last == 0 || now.saturating_sub(last) > EVERY_NS {
            self.read_ns.store(now, Ordering::Relaxed);
            self.available.store(available_now(), Ordering::Relaxed);
        }
        managed <= self.available.load(Ordering::Relaxed) / 100 * SHARE_PERCENT
    }

    /// The agent says how much managed memory this process may hold.
    pub(super) fn told(&self, bytes: u64) {
        self.told.store(bytes.min(UNTOLD - 1), Ordering::Relaxed);
    }

    /// The agent is gone.
    pub(super) fn forget(&self) {
        self.told.store(UNTOLD, Ordering::Relaxed);
    }
}

/// What the host has available now; a host that does not say counts as large enough.
pub(crate) fn available_now() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    available(&text).unwrap_or(u64::MAX)
}

/// `MemAvailable` in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_available_memory_is_read_where_the_kernel_says_it() {
        assert_eq!(available("MemTotal: 10 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(available("MemTotal: 10 kB\n"), None);
        assert_eq!(available("MemAvailable: many kB\n"), None);
    }

    #[test]
    fn more_than_the_host_has_does_not_fit() {
        let budget = Budget::default();
        assert!(budget.has_room(1));
        assert!(!budget.has_room(u64::MAX));
    }

    #[test]
    fn the_agent_knows_better_while_it_is_there() {
        let budget = Budget::default();
        budget.told(0);
        assert!(!budget.has_room(1));
        budget.told(u64::MAX);
        assert!(budget.has_room(u64::MAX - 1));
        budget.forget();
        assert!(budget.has_room(1));
        assert!(!budget.has_room(u64::MAX - 1));
    }
}
