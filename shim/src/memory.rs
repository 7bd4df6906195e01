//! What memory this process holds, of which kind, and what kind a new block becomes.
//!
//! **Approach.** Each GPU has one sum of bytes held, against which an allocation reserves *before* the driver is
//! asked, so that threads cannot pass a limit together. Blocks are remembered in a map of many shards, because
//! a free names only an address.
//!
//! **Invariants.** Sums are exact: a reservation ends as an entry of the map or is given back. The cost of an
//! allocation does not depend on how many blocks there are. A block that we do not know is the driver's business.

mod array;
mod blocks;
pub(crate) mod host;
mod physical;
mod pools;
mod populate;
pub(crate) mod residency;
mod usage;

pub(crate) use array::{bytes_of_array, bytes_of_mipmaps};
use blocks::Blocks;
pub(crate) use blocks::{Block, Kind};
use physical::{Gone, Physical};
use pools::Pools;
pub(crate) use pools::managed_twin;
use residency::Residency;
pub(crate) use usage::{Room, Usage};

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nvshare_wire::page::SLOTS;

use crate::{
    abi::{CUdevice, CUdeviceptr, CUresult, SUCCESS},
    config, driver, gate,
    log::warning,
    state,
};

/// Memory held by this process.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    usage: [Usage; SLOTS],
    /// Blocks by address.
    pub(crate) addresses: Blocks,
    /// Where those lie that we made managed.
    pub(crate) residency: Residency,
    /// Arrays by handle.
    pub(crate) arrays: Blocks,
    /// Physical memory of `cuMemCreate`.
    pub(crate) physical: Physical,
    /// Pools of managed memory.
    pub(crate) pools: Pools,
    /// Pinned host memory by address.
    pub(crate) pinned: Blocks,
    pinned_bytes: AtomicU64,
    host: host::Budget,
    /// What others hold of each GPU for good, as the agent says.
    unevictable: [AtomicU64; SLOTS],
    /// What the administrator allows this process on each GPU, as the agent says; 0 is any amount.
    allowed: AtomicU64,
    /// The program shares device memory with other processes.
    is_shared: AtomicBool,
    /// The program has graphs that allocate.
    has_allocating_graphs: AtomicBool,
}

/// What to do with an allocation.
#[derive(Debug)]
pub(crate) enum Plan {
    /// Make it managed memory; the bytes are reserved.
    Managed(Reserved),
    /// Let the driver make what was asked for; the bytes are reserved.
    Original(Reserved, Reason),
    /// Let the driver answer, and account nothing.
    Unknown(Reason),
    /// The limit is reached.
    Refuse,
}

impl Plan {
    /// The slot of the GPU for which bytes are reserved.
    pub(crate) fn slot(&self) -> Option<usize> {
        match self {
            Self::Managed(reserved) | Self::Original(reserved, _) => Some(reserved.slot),
            Self::Unknown(_) | Self::Refuse => None,
        }
    }
}

/// Why an allocation is left as the program asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// Nothing to allocate: the driver has its own answer.
    Empty,
    /// No context, or a GPU that is not shared.
    NoDevice,
    /// Below the size from which blocks become managed.
    Small,
    /// A stream capture is open.
    Capturing,
    /// The program shares memory with other processes, which managed memory cannot be.
    Shared,
    /// The host could not take in what this process would then be able to spill.
    HostMemory,
    /// This kind of allocation has no managed counterpart.
    Kind,
    /// The driver made no managed memory.
    Driver,
}

/// Bytes that are counted but not yet a block; dropping gives them back.
#[derive(Debug)]
#[must_use = "dropping this gives the bytes back"]
pub(crate) struct Reserved {
    slot: usize,
    bytes: u64,
    context: usize,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        state::get().memory.usage[self.slot].give_back(self.bytes);
    }
}

impl Reserved {
    /// The reservation is memory now; whoever calls this remembers it.
    fn becomes(self, kind: Kind) -> (usize, u64) {
        let (slot, bytes) = (self.slot, self.bytes);
        std::mem::forget(self);
        state::get().memory.usage[slot].became(kind, bytes);
        (slot, bytes)
    }

    /// The reservation becomes a block.
    pub(crate) fn keep(self, blocks: &Blocks, key: u64, kind: Kind) {
        let context = self.context;
        let (slot, bytes) = self.becomes(kind);
        let memory = &state::get().memory;
        // The driver has given this address to a new block, so one that we still know there is gone.
        if let Some(stale) = blocks.insert(key, Block { bytes, slot, kind, context }) {
            memory.usage[stale.slot].freed(stale.kind, stale.bytes);
        }
    }
}

impl Memory {
    /// Decides about an allocation of `bytes` on the current GPU that could be managed memory.
    pub(crate) fn plan(&self, bytes: u64) -> Plan {
        let reserved = match self.reserve_here(bytes) {
            Ok(reserved) => reserved,
            Err(plan) => return plan,
        };
        match self.against_managed(bytes) {
            Some(reason) => Plan::Original(reserved, reason),
            None => Plan::Managed(reserved),
        }
    }

    /// Why a block of this size should not be managed memory now.
    fn against_managed(&self, bytes: u64) -> Option<Reason> {
        if bytes < config::get().managed_min {
            Some(Reason::Small)
        } else if state::get().captures.any() {
            Some(Reason::Capturing)
        } else if self.is_shared() {
            Some(Reason::Shared)
        } else if !self.host_takes(bytes) {
            Some(Reason::HostMemory)
        } else {
            None
        }
    }

    /// Whether the host could take in `bytes` more of managed memory.
    pub(crate) fn host_takes(&self, bytes: u64) -> bool {
        self.host.has_room(self.managed_bytes().saturating_add(bytes))
    }

    /// Decides about an allocation that keeps its kind.
    pub(crate) fn plan_original(&self, bytes: u64) -> Plan {
        match self.reserve_here(bytes) {
            Ok(reserved) => Plan::Original(reserved, Reason::Kind),
            Err(plan) => plan,
        }
    }

    /// The same on a GPU that the call names.
    pub(crate) fn plan_original_on(&self, device: i32, bytes: u64) -> Plan {
        match self.reserve(state::get().devices.slot_or_add(device), bytes) {
            Ok(reserved) => Plan::Original(reserved, Reason::Kind),
            Err(plan) => plan,
        }
    }

    fn reserve_here(&self, bytes: u64) -> Result<Reserved, Plan> {
        let slot = driver::current_device().ok().and_then(|device| state::get().devices.slot_or_add(device));
        self.reserve(slot, bytes)
    }

    fn reserve(&self, slot: Option<usize>, bytes: u64) -> Result<Reserved, Plan> {
        if bytes == 0 {
            return Err(Plan::Unknown(Reason::Empty));
        }
        let state = state::get();
        let Some((slot, device)) = slot.and_then(|slot| Some((slot, state.devices.get(slot)?))) else {
            return Err(Plan::Unknown(Reason::NoDevice));
        };
        state.session.start();
        let graphs = self.graph_bytes(device.ordinal);
        if self.usage[slot].reserve(bytes, graphs, self.room(device.total)) {
            Ok(Reserved { slot, bytes, context: current_context() })
        } else {
            Err(Plan::Refuse)
        }
    }

    /// Frees through the driver what is known under `key` (or not known: then it is the driver's alone). The block
    /// is taken out first, so that a new block at its address is not mistaken for it.
    pub(crate) fn free(&self, blocks: &Blocks, key: u64, real: impl FnOnce() -> CUresult) -> CUresult {
        let block = blocks.remove(key);
        let is_managed = block.is_some_and(|block| block.kind == Kind::Managed);
        let extent = if is_managed { self.residency.release(key) } else { None };
        let code = real();
        self.settle(blocks, key, block, code == SUCCESS);
        if let Some(extent) = extent.filter(|_| code != SUCCESS) {
            self.residency.keep(extent);
        }
        code
    }

    /// The driver has freed the block, or refused to and the block is put back.
    fn settle(&self, blocks: &Blocks, key: u64, block: Option<Block>, freed: bool) {
        let Some(block) = block else { return };
        if freed {
            self.usage[block.slot].freed(block.kind, block.bytes);
        } else {
            blocks.insert(key, block);
        }
    }

    /// Settles what has become of physical memory.
    fn freed(&self, gone: impl IntoIterator<Item = Gone>) {
        for (slot, bytes) in gone {
            self.usage[slot].freed(Kind::Device, bytes);
        }
    }

    /// The driver made physical memory.
    pub(crate) fn physical_made(&self, reserved: Reserved, handle: u64) {
        let (slot, bytes) = reserved.becomes(Kind::Device);
        self.freed(self.physical.made(handle, slot, bytes));
    }

    /// The program released a handle of physical memory.
    pub(crate) fn physical_released(&self, handle: u64) {
        self.freed(self.physical.released(handle));
    }

    /// The program unmapped a range of addresses.
    pub(crate) fn physical_unmapped(&self, address: u64, len: u64) {
        self.freed(self.physical.unmapped(address, len));
    }

    /// The program shares memory with another process, or is about to; `refused` is memory of ours that the driver would
    /// not share.
    pub(crate) fn shares(&self, refused: Option<CUdeviceptr>) {
        let known = self.is_shared.swap(true, Ordering::Relaxed);
        if let Some(address) = refused
            && !known
            && driver::is_managed(address) == Ok(true)
        {
            warning!(
                "memory made pageable cannot be shared with another process (CUDA IPC); from now on this program's \
                 memory stays on the GPU. To keep all of it there, start it with NVSHARE_MANAGED_MIN_BYTES=never"
            );
        }
    }

    /// Whether the program shares memory with other processes.
    pub(crate) fn is_shared(&self) -> bool {
        self.is_shared.load(Ordering::Relaxed)
    }

    /// Whether a graph of the program may allocate so much; its memory is counted when it exists.
    pub(crate) fn allows_graph_node(&self, bytes: u64) -> bool {
        self.has_allocating_graphs.store(true, Ordering::Relaxed);
        // Dropping the reservation gives it back: the driver allocates when the graph is launched.
        !matches!(self.plan_original(bytes), Plan::Refuse)
    }

    /// What the memory nodes of graphs hold on a device.
    fn graph_bytes(&self, device: CUdevice) -> u64 {
        if self.has_allocating_graphs.load(Ordering::Relaxed) {
            driver::graph_memory(device).unwrap_or(0)
        } else {
            0
        }
    }

    /// All that is held on the GPU in a slot.
    fn held(&self, slot: usize, device: CUdevice) -> u64 {
        self.usage[slot].held().saturating_add(self.graph_bytes(device))
    }

    /// The agent says what is left.
    pub(crate) fn told_room(&self, slot: Option<usize>, unevictable: u64, host: u64) {
        if let Some(place) = slot.and_then(|slot| self.unevictable.get(slot)) {
            place.store(unevictable, Ordering::Relaxed);
        }
        self.host.told(host);
    }

    /// The administrator limits what this process may hold on each GPU.
    pub(crate) fn told_limit(&self, bytes: u64) {
        self.allowed.store(bytes, Ordering::Relaxed);
    }

    /// The room on a GPU of `total` bytes: the tighter of the program's own limit and the administrator's.
    fn room(&self, total: u64) -> Room {
        Room::of(total, config::get(), self.allowed.load(Ordering::Relaxed))
    }

    /// The agent is gone, and what it said.
    pub(crate) fn forget_room(&self) {
        self.told_limit(0);
        for place in &self.unevictable {
            place.store(0, Ordering::Relaxed);
        }
        self.host.forget();
    }

    /// A context has gone, and its memory with it.
    pub(crate) fn context_gone(&self, context: usize) {
        let gone = |block: Block| self.usage[block.slot].freed(block.kind, block.bytes);
        self.addresses.remove_all_of(context, gone);
        self.arrays.remove_all_of(context, gone);
        self.pinned.remove_all_of(context, |block| {
            self.pinned_bytes.fetch_sub(block.bytes, Ordering::Relaxed);
        });
    }

    /// The program pinned host memory.
    pub(crate) fn pin(&self, address: u64, bytes: u64) {
        self.pinned_bytes.fetch_add(bytes, Ordering::Relaxed);
        let block = Block { bytes, slot: 0, kind: Kind::Device, context: current_context() };
        if let Some(stale) = self.pinned.insert(address, block) {
            self.pinned_bytes.fetch_sub(stale.bytes, Ordering::Relaxed);
        }
    }

    /// The program unpinned host memory.
    pub(crate) fn unpin(&self, address: u64) {
        if let Some(block) = self.pinned.remove(address) {
            self.pinned_bytes.fetch_sub(block.bytes, Ordering::Relaxed);
        }
    }

    /// Bytes of pinned host memory.
    pub(crate) fn pinned_bytes(&self) -> u64 {
        self.pinned_bytes.load(Ordering::Relaxed)
    }

    /// What is held on the GPU in a slot.
    pub(crate) fn usage(&self, slot: usize) -> &Usage {
        &self.usage[slot]
    }

    fn managed_bytes(&self) -> u64 {
        self.usage.iter().map(Usage::managed).fold(0, u64::saturating_add)
    }
}

/// The calling thread's context, 0 if it has none.
fn current_context() -> usize {
    driver::current_context().map_or(0, |context| context as usize)
}

/// What a program is told about the current GPU's memory: free and total bytes.
pub(crate) fn information(real_total: u64) -> Option<(u64, u64)> {
    information_of(gate::current_slot()?, real_total)
}

/// The same of the GPU in a slot.
pub(crate) fn information_of(slot: usize, real_total: u64) -> Option<(u64, u64)> {
    let state = state::get();
    let device = state.devices.get(slot)?;
    let held = state.memory.held(slot, device.ordinal);
    let unevictable = state.memory.unevictable[slot].load(Ordering::Relaxed);
    Some(state.memory.room(real_total).information(held, unevictable))
}

/// The size of a GPU as the program is told.
pub(crate) fn told_total(real_total: u64) -> u64 {
    state::get().memory.room(real_total).told_total()
}

/// Makes a managed block, or says why there is none.
pub(crate) fn make_managed(reserved: Reserved, bytes: usize) -> Result<CUdeviceptr, (Reserved, Reason)> {
    match driver::allocate_managed(bytes) {
        Ok(address) => {
            let (slot, context) = (reserved.slot, reserved.context);
            let memory = &state::get().memory;
            reserved.keep(&memory.addresses, address, Kind::Managed);
            let populated = populate::populate(slot, address, bytes as u64);
            memory.residency.adopt(address, bytes as u64, slot, context, populated);
            Ok(address)
        }
        // Whatever the reason, the program asked for another call, which may do better.
        Err(_) => Err((reserved, Reason::Driver)),
    }
}
