//! All state of the simulator behind one lock: the model, who is connected, who holds which VA space, who counts what.
//!
//! Invariants: a VA space ends when its program has gone, its device file is closed by all who share it, and no tracker
//! observes it, as in the driver, where each of these holds a reference on the file. Whatever changes in the model is
//! published and counted under the same lock.

use std::{collections::BTreeMap, ffi::c_void, sync::atomic::Ordering};

use nvshare_abi::{
    tools::{
        Counter,
        queue::{Migration, QueueVersion},
    },
    uvm::{EventLayout, MakeResidentCause, Processor},
};
use nvshare_gpu_sim_model::{
    cost::Costs,
    ids::{BlockId, CardId, SpaceId},
    memory::{BlockSpan, Effect, Memory, Place},
    shared::{MAX_BLOCKS, Mapped},
    sync::now_ns,
    wire::Record,
};
use serde::{Deserialize, Serialize};

use crate::{
    entry::uvm_perf_destroy_va_space_events,
    tools::{Queue, Tracker},
};

/// An open file of the device directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FileHandle(pub(crate) u64);

/// What happened to one process on one card since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub(crate) struct Account {
    /// GPU fault entries.
    pub(crate) faults: u64,
    /// Raw GPU faults, before they were merged.
    pub(crate) fault_instances: u64,
    /// Blocks served.
    pub(crate) blocks: u64,
    /// Bytes moved to the card.
    pub(crate) bytes_in: u64,
    /// Bytes moved away from the card, evictions included.
    pub(crate) bytes_out: u64,
    /// Blocks evicted.
    pub(crate) evictions: u64,
    /// Of them, those that made room for another process.
    pub(crate) evicted_by_others: u64,
    /// Service time spent for this process.
    pub(crate) service_ns: u64,
}

/// One process's memory.
#[derive(Debug)]
pub(crate) struct Space {
    /// Its process id.
    pub(crate) pid: u32,
    /// Which slot of the shared file stands for its `events*`.
    pub(crate) slot: usize,
    /// Its client slot while it is connected.
    pub(crate) client: Option<usize>,
    /// Its open device file, shared or not.
    pub(crate) file: Option<FileHandle>,
    /// CPU faults.
    pub(crate) cpu_faults: u64,
    /// One for each card.
    pub(crate) accounts: Vec<Account>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) state: Mapped,
    pub(crate) memory: Memory,
    pub(crate) costs: Costs,
    pub(crate) layout: EventLayout,
    pub(crate) processors: Vec<Processor>,
    pub(crate) uuids: Vec<[u8; 16]>,
    pub(crate) spaces: BTreeMap<SpaceId, Space>,
    pub(crate) ended: Vec<(SpaceId, Space)>,
    pub(crate) trackers: BTreeMap<FileHandle, Tracker>,
    pub(crate) queues: BTreeMap<FileHandle, Queue>,
    /// Service time of each card.
    pub(crate) service_ns: Vec<u64>,
}

/// How many spaces that have ended are remembered for the statistics.
const REMEMBERED: usize = 1024;

impl World {
    /// A program (or the bare device file) begins a VA space.
    pub(crate) fn create_space(&mut self, pid: u32) -> Result<SpaceId, String> {
        let taken: Vec<usize> = self.spaces.values().map(|space| space.slot).collect();
        let slot = (0..self.state.spaces.len()).find(|slot| !taken.contains(slot)).ok_or_else(|| {
            format!(
                "there are {} VA spaces already, the most this simulator can hold: end some programs, or \
                 close the trackers of dead ones",
                taken.len()
            )
        })?;
        let id = self.memory.create_space();
        let accounts = vec![Account::default(); self.processors.len()];
        self.spaces.insert(id, Space { pid, slot, client: None, file: None, cpu_faults: 0, accounts });
        Ok(id)
    }

    /// The space of the program in a client slot.
    pub(crate) fn space_of_client(&self, client: usize) -> Option<SpaceId> {
        self.spaces.iter().find(|(_, space)| space.client == Some(client)).map(|(&id, _)| id)
    }

    /// The `events*` of a space that has not ended.
    pub(crate) fn events(&self, space: SpaceId) -> Option<*const c_void> {
        self.spaces.get(&space).map(|space| self.state.spaces[space.slot].events())
    }

    /// The `va_space*` of a space that has not ended.
    pub(crate) fn va_space(&self, space: SpaceId) -> Option<*const c_void> {
        self.spaces.get(&space).map(|space| self.state.spaces[space.slot].va_space())
    }

    /// Ends a space that nobody holds any more.
    pub(crate) fn end_if_unheld(&mut self, id: SpaceId) {
        let tracked = self.trackers.values().any(|tracker| tracker.space == Some(id))
            || self.queues.values().any(|queue| queue.space == id);
        let held = self.spaces.get(&id).is_none_or(|space| space.client.is_some() || space.file.is_some());
        if held || tracked {
            return;
        }
        if let Some(events) = self.events(id) {
            uvm_perf_destroy_va_space_events(events);
        }
        for span in self.memory.destroy_space(id) {
            self.publish_span(span);
        }
        if let Some(space) = self.spaces.remove(&id) {
            if self.ended.len() == REMEMBERED {
                self.ended.remove(0);
            }
            self.ended.push((id, space));
        }
        self.publish_usage();
    }

    /// A program has gone, in whatever way: its faults, its place at the engines and its plain memory go at once.
    pub(crate) fn disconnect(&mut self, client: usize) {
        let state = self.state;
        let slot = &state.clients[client];
        for fault in &slot.faults {
            fault.store(0, Ordering::Release);
        }
        for (index, card) in state.cards.iter().enumerate().take(self.processors.len()) {
            slot.plain[index].store(0, Ordering::Relaxed);
            if let Some(next) = card.engine.pass_on(client, false)
                && let Some(next) = state.clients.get(next)
            {
                nvshare_gpu_sim_model::sync::advance(&next.grant[index]);
            }
        }
        slot.pid.store(0, Ordering::Release);
        if let Some(id) = self.space_of_client(client) {
            self.memory.free_all_plain(id);
            if let Some(space) = self.spaces.get_mut(&id) {
                space.client = None;
            }
            self.end_if_unheld(id);
        }
        self.publish_usage();
    }

    /// Shows programs where a block is.
    pub(crate) fn publish(&self, block: BlockId) {
        let word = match self.memory.place(block) {
            Place::Card(card) => card.0 as u8 + 1,
            Place::Host | Place::Nowhere => 0,
        };
        if (block.0 as usize) < MAX_BLOCKS {
            self.state.resident[block.0 as usize].store(word, Ordering::Release);
        }
    }

    /// The same for each block of a span.
    pub(crate) fn publish_span(&self, span: BlockSpan) {
        span.iter().for_each(|block| self.publish(block));
    }

    /// Shows programs how much of each card is used.
    pub(crate) fn publish_usage(&self) {
        for index in 0..self.processors.len() {
            let usage = self.memory.usage(CardId(index));
            let used = usage.plain + usage.managed + usage.kept;
            self.state.cards[index].used.store(used, Ordering::Relaxed);
        }
    }

    /// Shows and counts what happened to blocks; `on_behalf` is who caused it.
    pub(crate) fn settle(&mut self, effects: &[Effect], on_behalf: SpaceId) {
        for effect in effects {
            match *effect {
                Effect::Populated { block, .. } => self.publish(block),
                Effect::Moved { block, space, bytes, from, to, cause, .. } => {
                    self.publish(block);
                    let evicted = cause == MakeResidentCause::Eviction;
                    if let Some(account) = from.and_then(|card| self.account(space, card)) {
                        account.bytes_out += bytes;
                        account.evictions += u64::from(evicted);
                        account.evicted_by_others += u64::from(evicted && space != on_behalf);
                    }
                    if let Some(account) = to.and_then(|card| self.account(space, card)) {
                        account.bytes_in += bytes;
                    }
                    self.count(space, from, Counter::BytesOut, if from.is_some() { bytes } else { 0 });
                    self.count(space, to, Counter::BytesIn, if to.is_some() { bytes } else { 0 });
                }
            }
        }
        self.queue(effects);
        self.publish_usage();
    }

    /// Tells the event queues what moved.
    fn queue(&mut self, effects: &[Effect]) {
        let now = now_ns();
        for queue in self.queues.values_mut() {
            let version = queue.version();
            let number = |card: Option<CardId>| match (card, version) {
                (None, _) => 0,
                (Some(card), QueueVersion::V1) => card.0 as u32 + 1,
                (Some(card), QueueVersion::V2) => {
                    self.processors.get(card.0).map_or(0, |processor| processor.0)
                }
            };
            let observed = queue.space;
            queue.moved(effects.iter().filter_map(|effect| match *effect {
                Effect::Moved { space, address, bytes, from, to, cause, .. } if space == observed => {
                    Some(Migration {
                        cause: cause.migration_cause(),
                        src: number(from),
                        dst: number(to),
                        address,
                        bytes,
                        begin_ns: now,
                        end_ns: now,
                    })
                }
                Effect::Moved { .. } | Effect::Populated { .. } => None,
            }));
        }
    }

    /// A process's account on a card.
    pub(crate) fn account(&mut self, space: SpaceId, card: CardId) -> Option<&mut Account> {
        self.spaces.get_mut(&space)?.accounts.get_mut(card.0)
    }

    /// Adds to the counter of every tracker of a space that looks at this card.
    pub(crate) fn count(&mut self, space: SpaceId, card: Option<CardId>, counter: Counter, amount: u64) {
        for tracker in self.trackers.values_mut().filter(|tracker| tracker.space == Some(space)) {
            tracker.count(card, counter, amount);
        }
    }

    /// Writes changed counters into the observers' memory.
    pub(crate) fn flush_trackers(&mut self) {
        self.trackers.values_mut().for_each(Tracker::flush);
    }

    /// What the program in whose context `effects` happened announces.
    pub(crate) fn records(&self, effects: &[Effect]) -> Vec<Record> {
        let processor = |card: Option<CardId>| card.map_or(Processor::CPU, |card| self.processors[card.0]).0;
        effects
            .iter()
            .filter_map(|effect| match *effect {
                Effect::Populated { .. } => None,
                Effect::Moved { space, address, bytes, from, to, cause, .. } => Some(Record {
                    events: self.events(space)? as u64,
                    cpu_fault: false,
                    src: processor(from),
                    dst: processor(to),
                    address,
                    bytes,
                    cause: cause.value(),
                }),
            })
            .collect()
    }
}
