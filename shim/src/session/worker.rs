//! Threads that wait for the driver, one per GPU, so that the session keeps its deadlines: until contexts are idle, and
//! until memory has moved.
//!
//! Only the driver's context-wide wait covers every stream of a context, including those the shim never saw, and neither it
//! nor a move can be given a deadline or be polled. So they run here; one that takes too long is left to end by itself. A thread that
//! is gone is noticed, what it left undone is put right, and another takes its place.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, AtomicI32, Ordering},
    mpsc::{Sender, channel},
};

use nvshare_wire::page::SLOTS;

use super::mover::{self, Move};
use crate::{
    devices::Drained,
    driver,
    log::error,
    state::{self, State},
    sys,
};

/// What a thread is to do.
#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    /// Wait until a GPU is idle.
    Drain,
    /// Move memory.
    Move(Move),
}

/// What has come of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// The drain has ended; `None` if that is not known.
    Drained(Option<Drained>),
    /// The first of the memory has been moved.
    Begun,
    /// No more will be moved: bytes, and nanoseconds from the first to the last.
    Moved(u64, u64),
}

/// Names an order.
pub(super) type Ticket = u64;

/// Slot, order, news.
type Results = Arc<Mutex<Vec<(usize, Ticket, News)>>>;

/// What a thread and the session tell each other beside orders and results.
#[derive(Debug, Default)]
struct Shared {
    /// The thread's number, 0 before it has one.
    thread: AtomicI32,
    /// The move is to end with the window under way.
    stop: AtomicBool,
}

#[derive(Debug, Default)]
struct Worker {
    orders: Option<Sender<(Ticket, Order)>>,
    shared: Arc<Shared>,
    under_way: Option<(Ticket, Order)>,
}

/// The threads, started when they are first needed.
#[derive(Debug, Default)]
pub(super) struct Workers {
    slots: [Worker; SLOTS],
    results: Results,
    tickets: Ticket,
}

impl Workers {
    /// Gives an order for the GPU in a slot; `None` if an earlier one is still being carried out or there is no thread.
    pub(super) fn begin(&mut self, slot: usize, order: Order) -> Option<Ticket> {
        let worker = &mut self.slots[slot];
        if worker.under_way.is_some() {
            return None;
        }
        worker.shared.stop.store(false, Ordering::SeqCst);
        if worker.orders.is_none() {
            worker.shared = Arc::default();
            worker.orders = start(slot, Arc::clone(&self.results), Arc::clone(&worker.shared));
        }
        self.tickets += 1;
        let ticket = self.tickets;
        worker.orders.as_ref()?.send((ticket, order)).ok()?;
        worker.under_way = Some((ticket, order));
        Some(ticket)
    }

    /// Whether an order is being carried out.
    pub(super) fn is_busy(&self, slot: usize) -> bool {
        self.slots[slot].under_way.is_some()
    }

    /// A move that is under way there ends with the window that it is in.
    pub(super) fn stop(&self, slot: usize) {
        self.slots[slot].shared.stop.store(true, Ordering::SeqCst);
    }

    /// The same everywhere.
    pub(super) fn stop_all(&self) {
        (0..SLOTS).for_each(|slot| self.stop(slot));
    }

    /// News since the last call.
    pub(super) fn news(&mut self, state: &State) -> Vec<(usize, Ticket, News)> {
        let mut news = self.take_results();
        for slot in 0..SLOTS {
            if self.has_lost_its_thread(slot) {
                // It may have told of the end of its order before it went.
                let rest = self.take_results();
                news.extend(rest);
                news.extend(self.bury(slot, state));
            }
        }
        news
    }

    fn take_results(&mut self) -> Vec<(usize, Ticket, News)> {
        let news = std::mem::take(&mut *self.results.lock().unwrap_or_else(PoisonError::into_inner));
        for &(slot, ticket, news) in &news {
            let worker = &mut self.slots[slot];
            let is_over = !matches!(news, News::Begun);
            if is_over && worker.under_way.is_some_and(|(under_way, _)| under_way == ticket) {
                worker.under_way = None;
            }
        }
        news
    }

    fn has_lost_its_thread(&self, slot: usize) -> bool {
        let worker = &self.slots[slot];
        let thread = worker.shared.thread.load(Ordering::SeqCst);
        worker.under_way.is_some() && thread != 0 && !sys::thread_lives(thread)
    }

    /// Puts right what a thread that is gone has left undone.
    fn bury(&mut self, slot: usize, state: &State) -> Option<(usize, Ticket, News)> {
        let worker = &mut self.slots[slot];
        let (ticket, order) = worker.under_way.take()?;
        error!("a thread of nvshare has ended by itself in this program; another takes its place");
        worker.orders = None;
        Some((slot, ticket, undone(slot, order, state)))
    }
}

/// The news of an order that came to no end.
fn undone(slot: usize, order: Order, state: &State) -> News {
    match order {
        Order::Drain => News::Drained(None),
        Order::Move(_) => {
            state.memory.residency.settle(slot, false);
            state.memory.residency.lift(slot);
            News::Moved(0, 0)
        }
    }
}

fn start(slot: usize, results: Results, shared: Arc<Shared>) -> Option<Sender<(Ticket, Order)>> {
    let (orders, received) = channel();
    let state = state::get();
    let work = move || {
        shared.thread.store(sys::thread_id(), Ordering::SeqCst);
        // Another thread's capture must not be disturbed by what this thread asks of the driver; where the driver
        // has no such mode, the drain reports the capture.
        let _ = driver::relax_captures();
        for (ticket, order) in received {
            let tell = |news| {
                results.lock().unwrap_or_else(PoisonError::into_inner).push((slot, ticket, news));
                state.session.kick();
            };
            let carry_out = || match order {
                Order::Drain => News::Drained(state.devices.get(slot).map(|device| device.contexts.drain())),
                Order::Move(order) => {
                    mover::carry_out(state, slot, order, &shared.stop, || tell(News::Begun))
                }
            };
            // After a panic nobody knows what still runs, or how far it came.
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(carry_out));
            tell(outcome.unwrap_or_else(|_| undone(slot, order, state)));
        }
    };
    let thread = std::thread::Builder::new().name("nvshare-drain".into());
    sys::without_signals(|| thread.spawn(work)).ok().map(|_detached| orders)
}
