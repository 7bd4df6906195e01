//! The thread that serves a card's faults, as the driver's `UVM GPU<n> BH` does.
//!
//! Faults lie in the programs' slots of the shared file. A run takes them, batch by batch, announces them, lets the model
//! make blocks resident, and really uses the CPU for as long as the driver would; only then the programs go on. Blocks that
//! are evicted for the batch are shown as gone at its beginning, blocks that arrive at its end.

use std::{
    collections::HashSet,
    ffi::c_void,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use nvshare_abi::{
    tools::Counter,
    uvm::{Event, FaultEntry, Processor},
};
use nvshare_gpu_sim_model::{
    fault::{Batch, FaultBuffer, Request},
    ids::{CardId, SpaceId},
    memory::Effect,
    shared::{Mapped, decode_fault},
    sync::{advance, burn_until, now_ns, wait_on},
};

use crate::{
    entry::{
        notify, notify_gpu_fault, uvm_gpu_service_replayable_faults, uvm_parent_gpu_service_replayable_faults,
    },
    world::World,
};

/// Batches in one run at most, as in the driver.
const BATCHES_PER_RUN: u32 = 20;

/// Which fault slot of which client, and what stood in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Waiter {
    client: usize,
    slot: usize,
    word: u64,
}

/// A card's service thread's own state.
#[derive(Debug)]
pub(crate) struct Service {
    world: Arc<Mutex<World>>,
    state: Mapped,
    card: CardId,
    buffer: FaultBuffer<Waiter>,
    /// Faults in `buffer`; their slots stay filled until they have been served.
    taken: HashSet<Waiter>,
    first_client: usize,
    batches: u32,
    per_run_symbol_to_555: bool,
}

/// Whether a slot's content is a fault on this card.
fn is_fault_for(content: u64, card: CardId) -> bool {
    content != 0 && decode_fault(content).1 == card.0
}

/// The lock, whatever happened to a thread that held it: every change of the model is complete in itself.
pub(crate) fn lock(world: &Mutex<World>) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Service {
    pub(crate) fn new(world: Arc<Mutex<World>>, card: CardId, branch: u16) -> Self {
        let state = lock(&world).state;
        Self {
            world,
            state,
            card,
            buffer: FaultBuffer::new(card),
            taken: HashSet::new(),
            first_client: 0,
            batches: 0,
            per_run_symbol_to_555: branch <= 555,
        }
    }

    /// Serves until the process ends.
    pub(crate) fn serve(mut self) -> ! {
        loop {
            let state = self.state;
            let doorbell = &state.cards[self.card.0].doorbell;
            while state.cards[self.card.0].hangs.load(Ordering::Relaxed) != 0 {
                std::hint::spin_loop();
            }
            let seen = doorbell.load(Ordering::Acquire);
            self.fetch();
            if self.buffer.is_empty() {
                // A program that died before it rang leaves its fault to the next ring, or to this period.
                wait_on(doorbell, seen, Duration::from_millis(500));
                continue;
            }
            let this = (&raw mut self).cast::<c_void>();
            // SAFETY: `this` points at self, which is not used until the call returns.
            unsafe {
                if self.per_run_symbol_to_555 {
                    uvm_gpu_service_replayable_faults(this);
                } else {
                    uvm_parent_gpu_service_replayable_faults(this);
                }
            }
        }
    }

    /// One run: batches until nothing waits, or the driver's limit.
    pub(crate) fn run(&mut self) {
        for _ in 0..BATCHES_PER_RUN {
            self.fetch();
            if !self.batch() {
                break;
            }
        }
    }

    /// Takes what lies in the programs' slots; a different program goes first each time.
    fn fetch(&mut self) {
        let clients = &self.state.clients;
        let world = Arc::clone(&self.world);
        let world = lock(&world);
        for offset in 0..clients.len() {
            let client = (self.first_client + offset) % clients.len();
            if clients[client].pid.load(Ordering::Acquire) == 0 {
                continue;
            }
            let Some(space) = world.space_of_client(client) else { continue };
            for (slot, fault) in clients[client].faults.iter().enumerate() {
                let content = fault.load(Ordering::Acquire);
                let waiter = Waiter { client, slot, word: content };
                if is_fault_for(content, self.card) && self.taken.insert(waiter) {
                    let (address, _, write) = decode_fault(content);
                    self.buffer.push(Request { space, address, write, waiter });
                }
            }
        }
        self.first_client = (self.first_client + 1) % clients.len();
    }

    /// Serves one batch; false if nothing waits.
    fn batch(&mut self) -> bool {
        let start = now_ns();
        let (batch, layout, spaces) = {
            let mut guard = lock(&self.world);
            let world = &mut *guard;
            let Some(batch) = self.buffer.serve_batch(&mut world.memory, &world.costs) else { return false };
            for served in &batch.served {
                for effect in &served.effects {
                    if let Effect::Moved { block, to: None, .. } = *effect {
                        world.publish(block);
                    }
                }
            }
            let spaces: Vec<_> = world
                .spaces
                .keys()
                .filter_map(|&id| Some((id, world.va_space(id)? as usize, world.events(id)? as usize)))
                .collect();
            (batch, world.layout, (spaces, world.processors.clone()))
        };
        self.batches = self.batches.wrapping_add(1);
        self.announce(&batch, start, &layout, &spaces.0, &spaces.1);
        burn_until(start + batch.time.as_nanos() as u64);
        self.finish(&batch);
        true
    }

    fn announce(
        &self,
        batch: &Batch<Waiter>,
        now: u64,
        layout: &nvshare_abi::uvm::EventLayout,
        spaces: &[(SpaceId, usize, usize)],
        processors: &[Processor],
    ) {
        let find = |id: SpaceId| spaces.iter().find(|space| space.0 == id);
        let processor = |card: Option<CardId>| card.map_or(Processor::CPU, |card| processors[card.0]);
        for served in &batch.served {
            if let Some(&(_, va_space, events)) = find(served.request.space) {
                for &(address, instances) in &served.entries {
                    let entry = FaultEntry { address, timestamp: now, va_space: va_space as u64, instances };
                    let processor = processors[self.card.0];
                    notify_gpu_fault(events as *const c_void, &entry, processor, self.batches, layout);
                }
            }
            for effect in &served.effects {
                let Effect::Moved { space, address, bytes, from, to, cause, .. } = *effect else { continue };
                if let Some(&(_, _, events)) = find(space) {
                    let (src, dst) = (processor(from), processor(to));
                    let event = Event::Migration { dst, src, address, bytes, copy: false, cause };
                    notify(events as *const c_void, &event, layout);
                }
            }
        }
    }

    /// Counts the batch, shows what has arrived, and lets the programs go on.
    fn finish(&mut self, batch: &Batch<Waiter>) {
        let card = &self.state.cards[self.card.0];
        let mut world = lock(&self.world);
        let total = batch.time.as_nanos() as u64;
        world.service_ns[self.card.0] += total;
        let blocks = batch.served.len() as u64;
        let fixed =
            total.saturating_sub(batch.served.iter().map(|served| served.time.as_nanos() as u64).sum());
        for served in &batch.served {
            let space = served.request.space;
            let entries = served.entries.len() as u64;
            if let Some(account) = world.account(space, self.card) {
                account.faults += entries;
                account.fault_instances +=
                    served.entries.iter().map(|&(_, count)| u64::from(count)).sum::<u64>();
                account.blocks += 1;
                account.service_ns += served.time.as_nanos() as u64 + fixed / blocks;
            }
            world.count(space, Some(self.card), Counter::GpuFaults, entries);
            world.settle(&served.effects, space);
            let (bytes_in, bytes_out) = nvshare_gpu_sim_model::cost::link_bytes(&served.effects, self.card);
            card.link_bytes[0].fetch_add(bytes_in, Ordering::Relaxed);
            card.link_bytes[1].fetch_add(bytes_out, Ordering::Relaxed);
        }
        world.flush_trackers();
        drop(world);
        let mut clients = HashSet::new();
        for served in &batch.served {
            let waiter = served.request.waiter;
            self.taken.remove(&waiter);
            let client = &self.state.clients[waiter.client];
            // A slot that holds something else belongs to a program that came after the one that faulted.
            let cleared = client.faults[waiter.slot].compare_exchange(
                waiter.word,
                0,
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            if cleared.is_ok() {
                clients.insert(waiter.client);
            }
        }
        for client in clients {
            advance(&self.state.clients[client].replay);
        }
    }
}
