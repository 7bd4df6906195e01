use std::{sync::mpsc, thread};

use super::*;

/// Memory of this process for blocks, at a multiple of a piece.
struct Ground {
    mapped: *mut libc::c_void,
    bytes: usize,
}

impl Ground {
    fn new(pieces: u64) -> Self {
        let bytes = ((pieces + 1) * PIECE) as usize;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let mapped = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, kind, -1, 0) };
        assert_ne!(mapped, libc::MAP_FAILED);
        Self { mapped, bytes }
    }

    fn base(&self) -> u64 {
        (self.mapped as u64).next_multiple_of(PIECE)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and no reference into it exists.
        unsafe { libc::munmap(self.mapped, self.bytes) };
    }
}

const ALL: u64 = u64::MAX;

fn known(ledger: &Residency) -> (u64, u64, u64) {
    let Known { inside, outside, somewhere } = ledger.known(0);
    (inside / PIECE, outside / PIECE, somewhere / PIECE)
}

fn moved(ledger: &Residency, direction: Direction, pieces: u64) -> u64 {
    match ledger.take(0, direction, pieces.saturating_mul(PIECE)) {
        Some(_) => ledger.settle(0, true) / PIECE,
        None => 0,
    }
}

/// One populated block of 8 pieces and one that nobody has touched.
fn two_blocks() -> Residency {
    let ledger = Residency::default();
    ledger.adopt(16 * PIECE, 8 * PIECE, 0, 1, true);
    ledger.adopt(32 * PIECE, 8 * PIECE, 0, 2, false);
    ledger
}

#[test]
fn what_nobody_has_touched_is_moved_neither_way() {
    let ledger = two_blocks();
    assert_eq!(known(&ledger), (8, 0, 0));
    assert_eq!(moved(&ledger, Direction::In, ALL), 0);
    assert_eq!(moved(&ledger, Direction::Out, ALL), 8);
    assert_eq!(known(&ledger), (0, 8, 0));
    assert_eq!(moved(&ledger, Direction::Out, ALL), 0);
    ledger.displaced(0, true, true);
    assert_eq!(moved(&ledger, Direction::Out, ALL), 0, "nobody knows that it is in");
}

#[test]
fn a_write_of_whole_pieces_makes_them_known_and_one_of_parts_does_not() {
    let ledger = two_blocks();
    ledger.written(32 * PIECE, PIECE - 1);
    ledger.written(33 * PIECE + 1, 2 * PIECE - 2);
    ledger.written(40 * PIECE, 8 * PIECE);
    assert_eq!(known(&ledger), (8, 0, 0));
    ledger.written(33 * PIECE + 1, 2 * PIECE);
    assert_eq!(known(&ledger), (9, 0, 0));
    ledger.written(32 * PIECE, 8 * PIECE);
    assert_eq!(known(&ledger), (16, 0, 0));
}

#[test]
fn what_was_touched_longest_ago_leaves_first_and_comes_back_last() {
    let ledger = two_blocks();
    ledger.written(32 * PIECE, 8 * PIECE);
    ledger.written(18 * PIECE, 2 * PIECE);
    let order = |direction| {
        let mut order = Vec::new();
        while let Some(window) = ledger.take(0, direction, 4 * PIECE) {
            assert!(window.runs.iter().map(|run| run.bytes).sum::<u64>() <= 4 * PIECE);
            order.extend(
                window.runs.iter().flat_map(|run| (0..run.bytes / PIECE).map(|n| run.address / PIECE + n)),
            );
            ledger.settle(0, true);
        }
        order
    };
    let out = order(Direction::Out);
    assert_eq!(out[..6], [16, 17, 20, 21, 22, 23]);
    assert_eq!(out[6..14], [32, 33, 34, 35, 36, 37, 38, 39]);
    assert_eq!(out[14..], [18, 19]);
    assert_eq!(order(Direction::In)[..2], [18, 19]);
}

#[test]
fn at_most_what_is_asked_for_moves() {
    let ledger = two_blocks();
    assert!(ledger.take(0, Direction::Out, PIECE - 1).is_none());
    assert_eq!(moved(&ledger, Direction::Out, 3), 3);
    assert_eq!(known(&ledger), (5, 3, 0));
    assert!(ledger.take(1, Direction::Out, ALL).is_none(), "memory of another GPU");
}

#[test]
fn what_the_driver_moved_by_itself_is_known_no_more_but_still_holds_data() {
    let ledger = two_blocks();
    assert_eq!(moved(&ledger, Direction::Out, 3), 3);
    ledger.displaced(0, true, false);
    assert_eq!(known(&ledger), (5, 0, 3));
    ledger.displaced(0, false, true);
    assert_eq!(known(&ledger), (0, 0, 8));
    assert_eq!(moved(&ledger, Direction::In, ALL), 0, "nobody knows whether these bytes moved");
    assert_eq!(known(&ledger), (8, 0, 0), "all that holds data was brought in, and nothing else");
}

#[test]
fn a_window_during_which_the_driver_moved_memory_makes_nothing_known() {
    for (direction, (brought, pushed), expected) in [
        (Direction::Out, (true, false), (0, 0, 8)),
        (Direction::Out, (false, true), (0, 8, 0)),
        (Direction::In, (false, true), (0, 0, 8)),
        (Direction::In, (true, false), (8, 0, 0)),
    ] {
        let ledger = two_blocks();
        if direction == Direction::In {
            assert_eq!(moved(&ledger, Direction::Out, ALL), 8);
        }
        assert!(ledger.take(0, direction, ALL).is_some());
        ledger.displaced(0, brought, pushed);
        ledger.settle(0, true);
        assert_eq!(known(&ledger), expected, "{direction:?}, brought {brought}, pushed {pushed}");
    }
    let ledger = two_blocks();
    assert!(ledger.take(0, Direction::Out, ALL).is_some());
    assert_eq!(ledger.settle(0, false), 0);
    assert_eq!(known(&ledger), (0, 0, 8), "nobody knows how far a failed window came");
}

#[test]
fn a_write_into_a_window_under_way_counts_as_the_later_of_the_two() {
    let ledger = two_blocks();
    assert_eq!(moved(&ledger, Direction::Out, ALL), 8);
    assert!(ledger.take(0, Direction::In, ALL).is_some());
    ledger.written(16 * PIECE, 2 * PIECE);
    ledger.settle(0, false);
    assert_eq!(known(&ledger), (2, 0, 6));
}

#[test]
fn a_block_in_a_window_is_freed_after_it_and_any_other_at_once() {
    let ledger = two_blocks();
    ledger.written(32 * PIECE, 8 * PIECE);
    assert!(ledger.take(0, Direction::Out, 4 * PIECE).is_some());
    assert!(ledger.release(32 * PIECE).is_some());
    thread::scope(|scope| {
        let (freed_tx, freed_rx) = mpsc::channel();
        let ledger = &ledger;
        scope.spawn(move || freed_tx.send(ledger.release(16 * PIECE).is_some()).unwrap());
        // It would have the lock long since if it did not wait.
        for _ in 0..1000 {
            assert_eq!(ledger.known(0).somewhere, 4 * PIECE);
            thread::yield_now();
        }
        assert!(freed_rx.try_recv().is_err(), "freed while it was being moved");
        ledger.settle(0, true);
        assert!(freed_rx.recv().unwrap());
    });
    assert_eq!(known(&ledger), (0, 0, 0));
}

#[test]
fn the_blocks_of_a_context_go_with_it_and_a_new_block_takes_the_place_of_a_forgotten_one() {
    let ledger = two_blocks();
    ledger.context_going(1);
    assert_eq!(known(&ledger), (0, 0, 0));
    ledger.adopt(30 * PIECE, 4 * PIECE, 0, 3, true);
    ledger.written(34 * PIECE, 4 * PIECE);
    assert_eq!(known(&ledger), (4, 0, 0), "the block at 32 overlapped the new one");
}

#[test]
fn a_block_that_could_not_be_freed_is_kept_without_what_was_known() {
    let ledger = two_blocks();
    let extent = ledger.release(16 * PIECE).unwrap();
    ledger.keep(extent);
    assert_eq!(known(&ledger), (0, 0, 8));
}

#[test]
fn protection_covers_the_blocks_of_a_window_and_goes_by_whoever_comes_first() {
    let ground = Ground::new(8);
    let base = ground.base();
    let ledger = Residency::default();
    ledger.adopt(base, 4 * PIECE, 0, 1, true);
    ledger.adopt(base + 4 * PIECE, 4 * PIECE, 0, 1, true);
    let writable = || [base, base + 3 * PIECE, base + 4 * PIECE].map(sys::may_be_written);
    assert!(ledger.take(0, Direction::Out, PIECE).is_some());
    assert!(!ledger.protect(0), "nobody said that the gate is closed");
    assert!(!ledger.may_protect_while(0, || false) && !ledger.protect(0), "it was opened just then");
    assert_eq!(writable(), [true; 3]);
    assert!(ledger.may_protect_while(0, || true));
    assert!(ledger.protect(0));
    assert_eq!(writable(), [false, false, true], "whole blocks, and no others");
    ledger.settle(0, true);
    assert!(ledger.take(0, Direction::Out, 8 * PIECE).is_some());
    assert!(ledger.protect(0));
    assert_eq!(writable(), [false; 3]);
    // The mover is gone without a word; somebody opens the gate, and the program goes on.
    ledger.lift(1);
    assert_eq!(writable(), [false; 3], "another GPU's");
    ledger.lift(0);
    assert_eq!(writable(), [true; 3]);
    assert!(!ledger.protect(0), "the gate is open");
    assert_eq!(writable(), [true; 3]);
    ledger.settle(0, true);

    assert!(ledger.may_protect_while(0, || true));
    ledger.displaced(0, true, true);
    assert_eq!(moved(&ledger, Direction::In, ALL), 0);
    assert!(ledger.take(0, Direction::Out, 8 * PIECE).is_some());
    assert!(ledger.protect(0));
    ledger.settle(0, true);
    // One is freed: it must be writable then, for whoever gets these addresses next.
    assert!(ledger.release(base).is_some());
    assert_eq!(writable(), [true, true, false]);
    ledger.lift(0);
    assert_eq!(writable(), [true; 3]);
}

#[test]
fn addresses_that_are_gone_are_not_protected_and_stop_nothing() {
    let ledger = two_blocks();
    assert!(ledger.take(0, Direction::Out, ALL).is_some());
    assert!(ledger.may_protect_while(0, || true));
    assert!(!ledger.protect(0), "nothing is mapped there");
    ledger.settle(0, false);
    ledger.lift(0);
    assert!(ledger.release(16 * PIECE).is_some());
}
