//! One client: its identity, its page, the GPUs it uses, and the trackers on its VA space.

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError, atomic::Ordering},
};

use nvshare_core::{Activity, Bytes, ClientId, GpuId, Nanos};
use nvshare_wire::page::{GpuSlot, PAGE_LEN, PAGE_MAGIC};
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};

use super::{cgroup::Cgroup, identity::Identity};
use crate::{
    config::overrides::{Rule, RuleChange},
    observe::{
        fusion::Fused,
        uvm_counters::{CounterTotals, Tracker},
        uvm_events::queue::EventQueue,
        uvm_tools::OpenError,
    },
    sys::ClientPage,
};

/// No client has more memory than this; a larger claim is cut to it, so that sums stay meaningful.
const MEMORY_CLAIM_MAX: u64 = 1 << 46;
/// No client has more threads than this.
const THREADS_CLAIM_MAX: u32 = 1 << 16;
/// VA-space descriptors held for a client that has not said which GPU it uses.
const DESCRIPTORS_MAX: usize = 8;

/// One client.
#[derive(Debug)]
pub struct Client {
    /// Its number.
    pub id: ClientId,
    /// Who it is.
    pub identity: Identity,
    /// Its container, if the system tells them apart.
    pub cgroup: Option<Cgroup>,
    /// What it calls itself.
    pub name: String,
    /// What it asked for.
    pub wish: Wish,
    /// What is written on its pod.
    pub pod: Rule,
    /// When its session began.
    pub since: Nanos,
    page: ClientPage,
    state: Mutex<State>,
}

/// What a client asked for. It may lower what it would have, never raise it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Its share in thousandths of what its user has.
    pub weight_milli: u32,
    /// Its class below the one that its user has.
    pub priority: i32,
    /// The most that it will hold on each GPU.
    pub memory_limit: Option<Bytes>,
}

impl Wish {
    /// What is granted of these claims.
    pub fn new(weight_milli: u32, priority: i32, memory_limit: u64) -> Self {
        Self {
            weight_milli: weight_milli.clamp(1, 1000),
            priority: priority.min(0),
            memory_limit: (memory_limit != 0).then_some(Bytes(memory_limit)),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    /// What the operator changed for this client alone.
    rule: Rule,
    gone: bool,
    gpus: BTreeMap<GpuId, GpuUse>,
    descriptors: Vec<OwnedFd>,
    /// The event queue on its VA space, and a duplicate of the descriptor that took it.
    queue: Option<(EventQueue, OwnedFd)>,
}

/// A client's use of one GPU.
#[derive(Debug)]
struct GpuUse {
    slot: usize,
    /// Submitting calls at the end of the last bin.
    calls: u64,
    tracker: Option<Tracker>,
    totals: ClientTotals,
    /// The last bin's.
    figures: Fused,
}

/// What was seen of a client on a GPU since its session began. `None`: no sensor says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ClientTotals {
    /// GPU fault entries.
    pub gpu_faults: Option<u64>,
    /// CPU faults.
    pub cpu_faults: Option<u64>,
    /// Bytes brought in.
    pub bytes_in: Option<Bytes>,
    /// Bytes pushed out.
    pub bytes_out: Option<Bytes>,
    /// Bytes evicted.
    pub evicted: Option<Bytes>,
    /// Bytes evicted for others.
    pub evicted_by_others: Option<Bytes>,
}

impl ClientTotals {
    /// Both together; what one of them does not know, the other alone says.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        fn sum<T: std::ops::Add<Output = T>>(a: Option<T>, b: Option<T>) -> Option<T> {
            match (a, b) {
                (Some(a), Some(b)) => Some(a + b),
                (a, b) => a.or(b),
            }
        }
        Self {
            gpu_faults: sum(self.gpu_faults, other.gpu_faults),
            cpu_faults: sum(self.cpu_faults, other.cpu_faults),
            bytes_in: sum(self.bytes_in, other.bytes_in),
            bytes_out: sum(self.bytes_out, other.bytes_out),
            evicted: sum(self.evicted, other.evicted),
            evicted_by_others: sum(self.evicted_by_others, other.evicted_by_others),
        }
    }
}

/// Why a page is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    /// Wrong size.
    #[error("the page must be {PAGE_LEN} bytes long, this file has {0}")]
    Size(i64),
    /// The client could shrink it under the agent.
    #[error("the page must be a memfd sealed against shrinking")]
    Seal,
    /// Another layout.
    #[error("the page begins with {0:#010x}, not with the known layout's mark")]
    Layout(u32),
    /// The system.
    #[error("the page cannot be mapped: {0}")]
    System(#[from] std::io::Error),
}

/// Checks and maps the page that came with `Hello`.
pub(crate) fn map_page(fd: &OwnedFd) -> Result<ClientPage, PageError> {
    let size = fstat(fd).map_err(std::io::Error::from)?.st_size;
    if size != PAGE_LEN as i64 {
        return Err(PageError::Size(size));
    }
    // Files that cannot be sealed answer with an error.
    if !fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
        return Err(PageError::Seal);
    }
    let page = ClientPage::map(fd)?;
    let magic = page.get().magic.load(Ordering::Relaxed);
    if magic != PAGE_MAGIC {
        return Err(PageError::Layout(magic));
    }
    Ok(page)
}

#[cfg(test)]
mod fuzz;

impl Client {
    pub(crate) fn new(
        id: ClientId,
        (identity, cgroup): (Identity, Option<Cgroup>),
        name: String,
        (wish, pod): (Wish, Rule),
        since: Nanos,
        page: ClientPage,
    ) -> Self {
        Self { id, identity, cgroup, name, wish, pod, since, page, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the operator changed for this client alone.
    pub fn rule(&self) -> Rule {
        self.state().rule
    }

    /// Changes that.
    pub fn change_rule(&self, change: RuleChange) {
        change.apply(&mut self.state().rule);
    }

    /// The client uses a GPU; false if the slot or the GPU is taken.
    pub fn uses(&self, gpu: GpuId, slot: usize) -> bool {
        let mut state = self.state();
        if state.gpus.contains_key(&gpu) || state.gpus.values().any(|used| used.slot == slot) {
            return false;
        }
        state.gpus.insert(
            gpu,
            GpuUse {
                slot,
                calls: 0,
                tracker: None,
                totals: ClientTotals::default(),
                figures: Fused::default(),
            },
        );
        true
    }

    /// The GPUs it uses.
    pub fn gpus(&self) -> Vec<GpuId> {
        self.state().gpus.keys().copied().collect()
    }

    /// Whether it said that it uses this GPU.
    pub fn is_on(&self, gpu: GpuId) -> bool {
        self.state().gpus.contains_key(&gpu)
    }

    /// Keeps a descriptor until a tracker was tried on it; false if there are too many.
    pub fn offer(&self, descriptor: OwnedFd) -> bool {
        let mut state = self.state();
        let room = state.descriptors.len() < DESCRIPTORS_MAX && !state.gone;
        if room {
            state.descriptors.push(descriptor);
        }
        room
    }

    /// Opens trackers for GPUs that have none. `open` is tried on each descriptor; those that hold no VA space
    /// are closed. Returns how many descriptors were closed.
    pub fn track(&self, open: impl Fn(&OwnedFd, GpuId) -> Option<Tracker>) -> usize {
        let missing: Vec<GpuId> = self
            .state()
            .gpus
            .iter()
            .filter(|(_, used)| used.tracker.is_none())
            .map(|(gpu, _)| *gpu)
            .collect();
        if missing.is_empty() {
            return 0;
        }
        // The driver is not called under the lock: it may take long, and the end of the client must not wait.
        let descriptors = std::mem::take(&mut self.state().descriptors);
        let offered = descriptors.len();
        let mut kept = Vec::new();
        for descriptor in descriptors {
            let mut accepted = false;
            for &gpu in &missing {
                let Some(tracker) = open(&descriptor, gpu) else { continue };
                accepted = true;
                let mut state = self.state();
                if state.gone {
                    return 0;
                }
                if let Some(used) = state.gpus.get_mut(&gpu) {
                    used.tracker.get_or_insert(tracker);
                }
            }
            if accepted {
                kept.push(descriptor);
            }
        }
        let closed = offered - kept.len();
        let mut state = self.state();
        if !state.gone {
            state.descriptors.append(&mut kept);
        }
        closed
    }

    /// The client is gone: lets go of everything that keeps its VA space, and with it its GPU memory, alive.
    pub fn release(&self) {
        let mut state = self.state();
        state.gone = true;
        state.descriptors.clear();
        state.queue = None;
        for used in state.gpus.values_mut() {
            used.tracker = None;
        }
    }

    /// Opens an event queue on the first descriptor that takes one, if there is none yet.
    pub fn open_queue(&self, open: impl Fn(&OwnedFd) -> Option<EventQueue>) {
        let state = self.state();
        if state.queue.is_some() || state.gone {
            return;
        }
        // Duplicates, because the driver is not called under the lock.
        let descriptors: Vec<OwnedFd> =
            state.descriptors.iter().filter_map(|descriptor| descriptor.try_clone().ok()).collect();
        drop(state);
        let opened = descriptors.into_iter().find_map(|descriptor| Some((open(&descriptor)?, descriptor)));
        let mut state = self.state();
        if !state.gone && state.queue.is_none() {
            state.queue = opened;
        }
    }

    /// Uses the event queue, outside the lock; `None` without one. One that failed is closed.
    pub fn queue<T>(
        &self,
        work: impl FnOnce(&mut EventQueue, &OwnedFd) -> Result<T, OpenError>,
    ) -> Option<Result<T, OpenError>> {
        let (mut queue, descriptor) = self.state().queue.take()?;
        let result = work(&mut queue, &descriptor);
        let mut state = self.state();
        if result.is_ok() && !state.gone {
            state.queue = Some((queue, descriptor));
        }
        Some(result)
    }

    /// Closes the event queue.
    pub fn close_queue(&self) {
        let closed = self.state().queue.take();
        // After the lock, as above.
        drop(closed);
    }

    /// How many GPUs of it have a tracker.
    pub fn trackers(&self) -> usize {
        self.state().gpus.values().filter(|used| used.tracker.is_some()).count()
    }

    /// The driver's counters on one GPU.
    pub fn counters(&self, gpu: GpuId) -> Option<CounterTotals> {
        self.state().gpus.get(&gpu)?.tracker.as_ref().map(Tracker::read)
    }

    /// What was seen on one GPU so far.
    pub fn totals(&self, gpu: GpuId) -> ClientTotals {
        self.state().gpus.get(&gpu).map(|used| used.totals).unwrap_or_default()
    }

    /// The figures of the last bin on one GPU, with their sources and bounds.
    pub fn figures(&self, gpu: GpuId) -> Fused {
        self.state().gpus.get(&gpu).map(|used| used.figures).unwrap_or_default()
    }

    /// Takes in a bin on one GPU.
    pub fn saw(&self, gpu: GpuId, figures: Fused, update: impl FnOnce(&mut ClientTotals)) {
        if let Some(used) = self.state().gpus.get_mut(&gpu) {
            used.figures = figures;
            update(&mut used.totals);
        }
    }

    /// The client's own account of a GPU since the end of the last bin. `close` ends the bin.
    pub fn activity(&self, gpu: GpuId, now: Nanos, close: bool) -> Option<Activity> {
        let mut state = self.state();
        let used = state.gpus.get_mut(&gpu)?;
        let GpuSlot { calls, inside, waiting, syncing, contexts: _, active_ns, managed, device, .. } =
            self.page.get().gpu.get(used.slot)?;
        let total = calls.load(Ordering::Relaxed);
        let threads = |claim: u32| claim.min(THREADS_CLAIM_MAX);
        let memory = |claim: u64| Bytes(claim.min(MEMORY_CLAIM_MAX));
        let waiting = threads(waiting.load(Ordering::Relaxed));
        let busy_threads =
            threads(inside.load(Ordering::Relaxed)).saturating_add(threads(syncing.load(Ordering::Relaxed)));
        let calls = total.wrapping_sub(used.calls);
        // A count that ran backwards is a wrong claim; it counts as nothing.
        let calls = if calls > u64::MAX / 2 { 0 } else { calls };
        let idle_for = if waiting > 0 || busy_threads > 0 {
            Nanos::ZERO
        } else {
            // Never older than the session: an untouched stamp is zero.
            now.since(Nanos(active_ns.load(Ordering::Relaxed)).max(self.since))
        };
        if close {
            used.calls = total;
        }
        Some(Activity {
            managed: memory(managed.load(Ordering::Relaxed)),
            device: memory(device.load(Ordering::Relaxed)),
            calls,
            waiting,
            busy_threads,
            idle_for,
        })
    }
}
