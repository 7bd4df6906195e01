//! Moving the program's memory at a hand-over, window by window.
//!
//! **Problem.** When memory is needed the driver moves it by faults, at a fifth of what the link does; and a plain push-out is held up
//! by the driver's mapping every page into the process.
//!
//! **Approach.** What leaves is prefetched to the host, what comes back is prefetched to the GPU; memory that leaves may not be
//! written to by the processor meanwhile, whereupon the driver skips the mapping. Whether that is right and fast here is
//! proven once, on memory of our own ([`proof`]). What moves comes from the ledger, which knows where memory is.
//!
//! **Invariants.** Runs on the GPU's own thread. Memory leaves only while the gate is closed and after a finished drain. A
//! failure anywhere ends the move and makes nothing known; the data is always where the driver says, so none can be lost.

mod proof;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use nvshare_wire::{Direction, Mover};

use super::worker::News;
use crate::{
    abi::{CUresult, HOST, NO_DRIVER},
    config::{self, Step},
    driver,
    log::{debug, info, warning},
    memory::{
        host,
        residency::{PIECE, Window},
    },
    state::State,
    sys,
};

/// What is moved at a time. Long enough for the link's full rate, and short enough to wait for: 5 ms at that rate, 64 ms
/// where host pages are being allocated.
const WINDOW: u64 = 256 << 20;

/// An order to move memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) direction: Direction,
    /// At most so many bytes.
    pub(super) bytes: u64,
}

/// What the driver does best, once that is proven, as a [`Mover`].
#[derive(Debug)]
pub(crate) struct Best(AtomicU32);

impl Default for Best {
    fn default() -> Self {
        Self(AtomicU32::new(Mover::Unproven as u32))
    }
}

impl Best {
    /// How memory is moved: as the user says, or as the driver does best.
    pub(super) fn get(&self) -> Mover {
        match config::get().handover {
            Mover::Unproven => match self.0.load(Ordering::Relaxed) {
                0 => Mover::Demand,
                1 => Mover::Plain,
                2 => Mover::Protected,
                _ => Mover::Unproven,
            },
            chosen => chosen,
        }
    }

    /// The same, with a proof if there is none yet. If it cannot be had now, nothing is moved this time.
    fn prove(&self, state: &State, slot: usize) -> Mover {
        let known = self.get();
        if known != Mover::Unproven {
            return known;
        }
        let device = state.devices.get(slot);
        let proven =
            device.and_then(|device| device.contexts.lend(|stream| proof::prove(device.ordinal, stream)));
        match proven {
            Some(Ok(proven)) => {
                info!("hand-overs are {:?} here: {proven}", proven.best());
                self.0.store(proven.best() as u32, Ordering::Relaxed);
                proven.best()
            }
            Some(Err(code)) => {
                debug!("no proof of how to move memory (error {code})");
                Mover::Demand
            }
            None => Mover::Demand,
        }
    }
}

/// Moves memory until all is moved, something fails, or `stop` is set. Calls `begun` when the first window has been moved.
pub(super) fn carry_out(
    state: &State,
    slot: usize,
    order: Move,
    stop: &AtomicBool,
    begun: impl FnOnce(),
) -> News {
    let by = state.best.prove(state, slot);
    let residency = &state.memory.residency;
    let (began_ns, mut begun) = (sys::now_ns(), Some(begun));
    let (mut left, mut moved) = (order.bytes, 0);
    while by != Mover::Demand && !stop.load(Ordering::SeqCst) {
        let Some(window) = residency.take(slot, order.direction, left.min(WINDOW)) else { break };
        let outcome = move_window(state, slot, &window, order.direction, by);
        moved += residency.settle(slot, outcome.is_ok());
        left -= window.runs.iter().map(|run| run.bytes).sum::<u64>().min(left);
        if let Err(code) = outcome {
            debug!("moving memory ended early (error {code})");
            break;
        }
        if let Some(begun) = begun.take() {
            begun();
        }
    }
    match order.direction {
        Direction::Out => residency.lift(slot),
        // The program runs, and may have had brought back what is still outside.
        Direction::In => residency.displaced(slot, true, false),
    }
    News::Moved(moved, sys::now_ns() - began_ns)
}

fn move_window(
    state: &State,
    slot: usize,
    window: &Window,
    direction: Direction,
    by: Mover,
) -> Result<(), CUresult> {
    let device = state.devices.get(slot).ok_or(NO_DRIVER)?;
    let target = match direction {
        Direction::In => device.ordinal,
        Direction::Out => HOST,
    };
    if direction == Direction::Out {
        // Host pages are allocated for what leaves for the first time. The host must not run out for our sake.
        if fails(Step::Host) || host::available_now() < 2 * WINDOW.max(PIECE) {
            warning!("the host is short of memory: what does not fit is left to the driver");
            return Err(crate::abi::OUT_OF_MEMORY);
        }
        if by == Mover::Protected && (!state.memory.residency.protect(slot) || fails(Step::Protect)) {
            return Err(crate::abi::INVALID_VALUE);
        }
    }
    let work = |stream| {
        for run in &window.runs {
            if fails(Step::Prefetch) {
                return Err(crate::abi::INVALID_VALUE);
            }
            driver::prefetch_to(target, run.address, run.bytes as usize, stream)?;
        }
        hamper();
        driver::wait_for(stream)?;
        if fails(Step::Wait) { Err(crate::abi::INVALID_VALUE) } else { Ok(()) }
    };
    device.contexts.lend(work).unwrap_or(Err(crate::abi::INVALID_CONTEXT))
}

/// Whether a test wants this step to fail now.
fn fails(step: Step) -> bool {
    static TIMES: AtomicU32 = AtomicU32::new(0);
    config::get().failing.is_some_and(|failing| {
        failing.step == step && TIMES.fetch_add(1, Ordering::Relaxed) % failing.every == failing.every - 1
    })
}

/// What tests want to happen to this thread in the middle of a move.
fn hamper() {
    assert!(!fails(Step::Panic), "a test wants it");
    if fails(Step::Vanish) {
        sys::vanish();
    }
    if fails(Step::Stall) {
        std::thread::sleep(std::time::Duration::from_secs(3));
    }
}
