//! The gate with real threads. One test, because gates are per process.

use std::sync::atomic::AtomicBool;

use super::*;

/// As the driver does when it calls our exports: from a frame of its own, below the one that is inside.
#[inline(never)]
fn enter_further_down() {
    drop(enter(Work::Plain));
}

#[test]
fn nobody_submits_between_an_empty_closed_gate_and_its_opening() {
    use_membarrier();
    silence::allow(60_000);
    silence::heard();
    let (stop, given_away) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let inside = enter(Work::Plain);
                    assert!(!given_away.load(Ordering::SeqCst), "submitted while the GPU was given away");
                    std::hint::spin_loop();
                    assert!(!given_away.load(Ordering::SeqCst), "given away while submitting");
                    drop(inside);
                }
            });
        }
        for round in 0..2_000 {
            // Half of the rounds with a fence in every entry, as on a kernel without membarrier.
            if round == 1_000 {
                fence_entries();
            }
            assert!(close(0));
            while thread::sum(0).inside > 0 {
                std::thread::yield_now();
            }
            given_away.store(true, Ordering::SeqCst);
            std::thread::yield_now();
            given_away.store(false, Ordering::SeqCst);
            open(0);
        }
        stop.store(true, Ordering::SeqCst);
        open(0);
    });
    assert_eq!(thread::sum(0).inside, 0);

    // A thread inside enters again although the gate is closed, and a thread that asks is counted as waiting.
    let outer = enter(Work::Plain);
    assert!(close(0));
    enter_further_down();
    drop(outer);
    std::thread::scope(|scope| {
        let calls = thread::sum(0).calls;
        let waiter = scope.spawn(|| drop(enter(Work::Plain)));
        while waiting(0) == 0 {
            std::thread::yield_now();
        }
        assert_eq!(thread::sum(0).calls, calls, "a waiting call counts as submitted");
        open(0);
        waiter.join().unwrap();
        assert_eq!(thread::sum(0).calls, calls + 1);
    });
    assert_eq!(waiting(0), 0);

    // An agent that has gone silent does not hold a thread.
    silence::allow(0);
    assert!(close(0));
    drop(enter(Work::Plain));
    assert!(!is_closed(0));
}
