//! Threads that wait for contexts to finish, one per GPU, so that the session keeps its deadlines.
//!
//! Only the driver's context-wide wait covers every stream of a context, including those the shim never saw, and it
//! cannot be given a deadline or be polled. So it runs here; a wait that takes too long is left to end by itself.

use std::sync::{
    Arc, Mutex, PoisonError,
    mpsc::{Sender, channel},
};

use nvshare_wire::page::SLOTS;

use crate::{devices::Drained, driver, state, sys};

/// Drains that have ended: slot, ticket, outcome; `None` if that is not known.
type Results = Arc<Mutex<Vec<(usize, u64, Option<Drained>)>>>;

#[derive(Debug, Default)]
struct Drainer {
    orders: Option<Sender<u64>>,
    busy: bool,
}

/// The threads, started when they are first needed.
#[derive(Debug, Default)]
pub(super) struct Drainers {
    slots: [Drainer; SLOTS],
    results: Results,
}

impl Drainers {
    /// Begins to drain the GPU in a slot; `false` if an earlier drain still runs or there is no thread.
    pub(super) fn begin(&mut self, slot: usize, ticket: u64) -> bool {
        let drainer = &mut self.slots[slot];
        if drainer.busy {
            return false;
        }
        if drainer.orders.is_none() {
            drainer.orders = start(slot, Arc::clone(&self.results));
        }
        drainer.busy = drainer.orders.as_ref().is_some_and(|orders| orders.send(ticket).is_ok());
        drainer.busy
    }

    /// Drains that have ended since the last call.
    pub(super) fn ended(&mut self) -> Vec<(usize, u64, Option<Drained>)> {
        let ended = std::mem::take(&mut *self.results.lock().unwrap_or_else(PoisonError::into_inner));
        for &(slot, _, _) in &ended {
            self.slots[slot].busy = false;
        }
        ended
    }
}

fn start(slot: usize, results: Results) -> Option<Sender<u64>> {
    let (orders, received) = channel();
    let state = state::get();
    let work = move || {
        // Another thread's capture must not be disturbed by what this thread asks of the driver; where the driver
        // has no such mode, the drain reports the capture.
        let _ = driver::relax_captures();
        for ticket in received {
            let drain = || state.devices.get(slot).map(|device| device.contexts.drain());
            // After a panic nobody knows what still runs.
            let outcome = std::panic::catch_unwind(drain).ok().flatten();
            results.lock().unwrap_or_else(PoisonError::into_inner).push((slot, ticket, outcome));
            state.session.kick();
        }
    };
    let thread = std::thread::Builder::new().name("nvshare-drain".into());
    sys::without_signals(|| thread.spawn(work)).ok().map(|_detached| orders)
}
