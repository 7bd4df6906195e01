//! Bytes held on one GPU, and how many may be.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Kind;
use crate::config::Config;

/// What a process may hold on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    total: u64,
    limit: u64,
    bound: u64,
}

/// What a context itself takes of a GPU (its code, its page tables, its stacks), so that a program which takes
/// all that is free does not evict itself; a sixteenth of a small GPU at most.
const CONTEXT_BYTES: u64 = 512 << 20;

impl Room {
    /// The room on a GPU of `total` bytes, of which the administrator allows `allowed`; 0 is any amount.
    pub(crate) fn of(total: u64, config: &Config, allowed: u64) -> Self {
        let allowed = if allowed == 0 { u64::MAX } else { allowed };
        let limit = config.memory_limit.unwrap_or(u64::MAX).min(allowed);
        let device = if config.allow_oversub { u64::MAX } else { total };
        Self { total, limit, bound: limit.min(device) }
    }

    /// The size that a program is told.
    pub(crate) fn told_total(&self) -> u64 {
        self.total.min(self.limit)
    }

    /// Free and total bytes that a program is told when it holds `held` and others hold `unevictable` bytes that it
    /// could not push out.
    pub(crate) fn information(&self, held: u64, unevictable: u64) -> (u64, u64) {
        let own = CONTEXT_BYTES.min(self.total / 16);
        let given = (self.total - own).saturating_sub(unevictable);
        let free = self.told_total().min(given).saturating_sub(held);
        (free, self.told_total())
    }
}

/// Bytes held on one GPU.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    /// All kinds, and reservations.
    held: AtomicU64,
    managed: AtomicU64,
    device: AtomicU64,
}

impl Usage {
    /// Takes `bytes` if they fit beside `others`, which are held but not counted here.
    pub(super) fn reserve(&self, bytes: u64, others: u64, room: Room) -> bool {
        self.held
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
                held.checked_add(bytes).filter(|sum| sum.saturating_add(others) <= room.bound)
            })
            .is_ok()
    }

    pub(super) fn give_back(&self, bytes: u64) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn of(&self, kind: Kind) -> &AtomicU64 {
        match kind {
            Kind::Managed => &self.managed,
            Kind::Device => &self.device,
        }
    }

    pub(super) fn became(&self, kind: Kind, bytes: u64) {
        self.of(kind).fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn freed(&self, kind: Kind, bytes: u64) {
        self.of(kind).fetch_sub(bytes, Ordering::Relaxed);
        self.give_back(bytes);
    }

    /// Bytes of all kinds, and reservations.
    pub(crate) fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Bytes of managed memory.
    pub(crate) fn managed(&self) -> u64 {
        self.managed.load(Ordering::Relaxed)
    }

    /// Bytes of plain device memory.
    pub(crate) fn device(&self) -> u64 {
        self.device.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn room(total: u64, limit: Option<u64>, allow_oversub: bool) -> Room {
        Room::of(total, &Config { memory_limit: limit, allow_oversub, ..Config::default() }, 0)
    }

    #[test]
    fn free_falls_by_what_is_held_and_never_below_zero() {
        for total in [1 << 20, GIB, 80 * GIB] {
            let room = room(total, None, false);
            let (free, told) = room.information(0, 0);
            assert_eq!(told, total);
            assert!(free < total && free >= total - total / 16);
            assert_eq!(room.information(free / 2, 0).0, free - free / 2);
            assert_eq!(room.information(total * 2, 0).0, 0);
        }
    }

    #[test]
    fn a_limit_is_the_size_that_the_program_sees() {
        let limited = room(80 * GIB, Some(8 * GIB), false);
        assert_eq!(limited.information(3 * GIB, 0), (5 * GIB, 8 * GIB));
        assert_eq!(room(4 * GIB, Some(8 * GIB), false).told_total(), 4 * GIB);
        assert_eq!(limited.information(GIB, 76 * GIB).0, 2 * GIB + GIB / 2, "what others hold for good");
        assert_eq!(limited.information(GIB, 90 * GIB).0, 0);
    }

    #[test]
    fn of_the_programs_own_limit_and_the_administrators_the_tighter_one_holds() {
        let told = |own, allowed| {
            Room::of(80 * GIB, &Config { memory_limit: own, ..Config::default() }, allowed).told_total()
        };
        assert_eq!(told(None, 0), 80 * GIB);
        assert_eq!(told(None, 8 * GIB), 8 * GIB);
        assert_eq!(told(Some(4 * GIB), 8 * GIB), 4 * GIB, "the administrator's limit raises nothing");
        assert_eq!(told(Some(16 * GIB), 8 * GIB), 8 * GIB);
    }

    #[test]
    fn a_process_holds_more_than_the_gpu_only_where_that_is_allowed_and_never_more_than_its_limit() {
        let usage = Usage::default();
        assert!(usage.reserve(GIB, 0, room(GIB, None, false)));
        assert!(!usage.reserve(1, 0, room(GIB, None, false)));
        assert!(usage.reserve(GIB, 0, room(GIB, None, true)));
        assert!(!usage.reserve(GIB, 0, room(GIB, Some(2 * GIB), true)));
        assert!(!usage.reserve(u64::MAX, 0, room(GIB, None, true)), "the sum overflows");
        assert!(!usage.reserve(1, 1, room(2 * GIB + 1, None, false)), "graphs hold the last byte");
        usage.give_back(2 * GIB);
        assert_eq!(usage.held(), 0);
    }

    #[test]
    fn threads_that_allocate_and_free_leave_exact_sums_and_never_pass_the_limit_together() {
        let usage = Usage::default();
        let room = room(1000, None, false);
        std::thread::scope(|scope| {
            for n in 0..16u64 {
                let usage = &usage;
                scope.spawn(move || {
                    for round in 0..2_000 {
                        let bytes = 1 + (n * 31 + round) % 200;
                        if usage.reserve(bytes, 0, room) {
                            assert!(usage.held() <= 1000);
                            usage.became(Kind::Managed, bytes);
                            usage.freed(Kind::Managed, bytes);
                        }
                    }
                });
            }
        });
        assert_eq!((usage.held(), usage.managed(), usage.device()), (0, 0, 0));
    }
}
