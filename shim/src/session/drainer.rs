//! Threads that wait for contexts to finish, one per GPU, so that the session keeps its deadlines.
//!
//! Only the driver's context-wide wait covers every stream of a context, including those the shim never saw, and it
//! cannot be given a deadline or be polled. So it runs here; a wait that takes too long is left to end by itself.

use std::sync::{
    Mutex, PoisonError,
    mpsc::{Sender, channel},
};

use nvshare_wire::page::SLOTS;

use crate::{abi::CUresult, devices::Device, driver, state, sys};

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Drained {
    /// Nothing is running.
    Idle,
    /// A stream capture is open.
    Capturing,
}

/// `CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED` to `CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD`.
const CAPTURE_ERRORS: std::ops::RangeInclusive<CUresult> = 900..=908;

impl From<Result<(), CUresult>> for Drained {
    fn from(outcome: Result<(), CUresult>) -> Self {
        match outcome {
            Err(code) if CAPTURE_ERRORS.contains(&code) => Self::Capturing,
            // A context that answers with another error is broken or gone: it runs nothing any more.
            Ok(()) | Err(_) => Self::Idle,
        }
    }
}

static RESULTS: Mutex<Vec<(usize, u64, Drained)>> = Mutex::new(Vec::new());

#[derive(Debug, Default)]
struct Drainer {
    orders: Option<Sender<u64>>,
    busy: bool,
}

/// The threads, started when they are first needed.
#[derive(Debug, Default)]
pub(super) struct Drainers {
    slots: [Drainer; SLOTS],
}

impl Drainers {
    /// Begins to drain the GPU in a slot; `false` if an earlier drain still runs or there is no thread.
    pub(super) fn begin(&mut self, slot: usize, ticket: u64) -> bool {
        let drainer = &mut self.slots[slot];
        if drainer.busy {
            return false;
        }
        if drainer.orders.is_none() {
            drainer.orders = start(slot);
        }
        drainer.busy = drainer.orders.as_ref().is_some_and(|orders| orders.send(ticket).is_ok());
        drainer.busy
    }

    /// Drains that have ended since the last call: slot, ticket, outcome.
    pub(super) fn ended(&mut self) -> Vec<(usize, u64, Drained)> {
        let ended = std::mem::take(&mut *RESULTS.lock().unwrap_or_else(PoisonError::into_inner));
        for &(slot, _, _) in &ended {
            self.slots[slot].busy = false;
        }
        ended
    }
}

fn start(slot: usize) -> Option<Sender<u64>> {
    let (orders, received) = channel();
    let state = state::get();
    let work = move || {
        // Another thread's capture must not be disturbed by what this thread asks of the driver; where the driver
        // has no such mode, the drain reports the capture.
        let _ = driver::relax_captures();
        for ticket in received {
            let outcome = std::panic::catch_unwind(|| state.devices.get(slot).map_or(Ok(()), Device::drain));
            let outcome = outcome.map_or(Drained::Idle, Drained::from);
            RESULTS.lock().unwrap_or_else(PoisonError::into_inner).push((slot, ticket, outcome));
            state.session.kick();
        }
    };
    let thread = std::thread::Builder::new().name("nvshare-drain".into());
    sys::without_signals(|| thread.spawn(work)).ok().map(|_detached| orders)
}
