//! Whether the host could take in all managed memory of this process: what is evicted lies in host memory.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::sys;

/// The host's memory, looked at rarely.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    bytes: AtomicU64,
    read_ns: AtomicU64,
}

/// `/proc/meminfo` costs tens of microseconds, and what is available changes slowly against an allocation.
const EVERY_NS: u64 = 1_000_000_000;
/// The share of the host's memory that all managed blocks of one process may need when evicted, in percent: the
/// rest of the system, and the pages of the files it reads, need room too.
const SHARE_PERCENT: u64 = 90;

impl Budget {
    /// Whether `managed` bytes could be evicted to the host. A host that does not say counts as large enough.
    pub(crate) fn has_room(&self, managed: u64) -> bool {
        let now = sys::now_ns();
        let last = self.read_ns.load(Ordering::Relaxed);
        if last == 0 || now.saturating_sub(last) > EVERY_NS {
            self.read_ns.store(now, Ordering::Relaxed);
            let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
            self.bytes.store(available(&text).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        managed <= self.bytes.load(Ordering::Relaxed) / 100 * SHARE_PERCENT
    }
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
}
