//! Stream-ordered allocation from managed pools.
//!
//! **Problem.** `cuMemAllocAsync` takes memory from a pool of the driver, and a pool of device memory cannot be
//! evicted.
//!
//! **Approach.** Drivers from r580 on have pools of managed memory. One of ours stands in for each GPU's default pool: the
//! program gets its handle wherever it asks for the default pool, so that its attributes and figures are true, and
//! allocations that name no pool come from it. The program's own pools are made managed when it makes them. The driver's notion
//! of a *current* pool is per kind of memory, so the current pool of device memory is kept here.
//!
//! A pool that is shared with other processes, or asks for more than plain memory, stays as it is; so does everything on a
//! driver without managed pools.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use nvshare_wire::page::SLOTS;

use crate::{
    abi::{CUmemPoolProps, LOCATION_DEVICE, MANAGED_MEMORY, NO_HANDLE, PINNED_MEMORY, Ptr},
    config, driver,
    log::info,
    state,
};

/// The managed pools of this process.
#[derive(Debug, Default)]
pub(crate) struct Pools {
    /// Stand-ins for the default pools, by slot; also [`UNTRIED`] and [`NONE`].
    stand_ins: [AtomicUsize; SLOTS],
    /// Pools that the program made current, by slot; 0 is the default one.
    current: [AtomicUsize; SLOTS],
    /// Every pool that gives managed memory.
    managed: Mutex<Vec<usize>>,
}

/// No stand-in was asked for yet.
const UNTRIED: usize = 0;
/// The driver makes none.
const NONE: usize = 1;

impl Pools {
    /// The pool that stands in for the default pool of the GPU in `slot`.
    pub(crate) fn stand_in(&self, slot: usize) -> Option<Ptr> {
        let device = state::get().devices.get(slot)?;
        if config::get().managed_min == u64::MAX {
            return None;
        }
        let place = &self.stand_ins[slot];
        match place.load(Ordering::Acquire) {
            UNTRIED => {}
            NONE => return None,
            pool => return Some(pool as Ptr),
        }
        let pool = match driver::make_pool(&CUmemPoolProps::of_managed_memory(device.ordinal)) {
            Ok(pool) => pool as usize,
            Err(code) => {
                info!("no managed pool on GPU {} (error {code}): pools stay on the device", device.ordinal);
                NONE
            }
        };
        // Of two threads that make one, the second's stays unused.
        let kept = match place.compare_exchange(UNTRIED, pool, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => pool,
            Err(other) => other,
        };
        if kept == NONE {
            return None;
        }
        if kept == pool {
            self.note_managed(pool as Ptr);
        }
        Some(kept as Ptr)
    }

    /// The managed pool from which an allocation on this GPU comes that names none; `None` if it is another kind
    /// of pool.
    pub(crate) fn for_unnamed(&self, slot: usize) -> Option<Ptr> {
        match self.current[slot].load(Ordering::Relaxed) {
            0 => self.stand_in(slot),
            pool => Some(pool as Ptr).filter(|&pool| self.is_managed(pool)),
        }
    }

    /// What the program is told when it asks for the current pool.
    pub(crate) fn told_current(&self, slot: usize) -> Option<Ptr> {
        match self.current[slot].load(Ordering::Relaxed) {
            0 => self.stand_in(slot),
            pool => Some(pool as Ptr),
        }
    }

    /// The program made a pool the current one.
    pub(crate) fn make_current(&self, slot: usize, pool: Ptr) {
        let is_default = self.is_stand_in(pool);
        self.current[slot].store(if is_default { 0 } else { pool as usize }, Ordering::Relaxed);
    }

    /// Whether this pool stands in for a default pool, which no program may destroy.
    pub(crate) fn is_stand_in(&self, pool: Ptr) -> bool {
        let pool = pool as usize;
        pool > NONE && self.stand_ins.iter().any(|own| own.load(Ordering::Acquire) == pool)
    }

    /// Whether a pool gives managed memory.
    pub(crate) fn is_managed(&self, pool: Ptr) -> bool {
        self.managed.lock().unwrap_or_else(PoisonError::into_inner).contains(&(pool as usize))
    }

    /// A pool gives managed memory.
    pub(crate) fn note_managed(&self, pool: Ptr) {
        self.managed.lock().unwrap_or_else(PoisonError::into_inner).push(pool as usize);
    }

    /// The primary context of the GPU in `slot` has gone or was reset, and whatever pools there were may have gone with it.
    pub(crate) fn device_reset(&self, slot: usize) {
        self.stand_ins[slot].store(UNTRIED, Ordering::Release);
        self.current[slot].store(0, Ordering::Relaxed);
    }

    /// A pool was destroyed.
    pub(crate) fn forget(&self, pool: Ptr) {
        let pool = pool as usize;
        self.managed.lock().unwrap_or_else(PoisonError::into_inner).retain(|&known| known != pool);
        for current in &self.current {
            // The driver goes back to the default pool.
            let _ = current.compare_exchange(pool, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

/// The same pool made of managed memory, if it asks for nothing but plain device memory.
pub(crate) fn managed_twin(properties: &CUmemPoolProps) -> Option<CUmemPoolProps> {
    let plain = properties.kind == PINNED_MEMORY
        && properties.handle_types == NO_HANDLE
        && properties.location.kind() == LOCATION_DEVICE
        && properties.rest.iter().all(|&byte| byte == 0);
    let wanted = plain && config::get().managed_min != u64::MAX && !config::get().disabled;
    wanted.then_some(CUmemPoolProps { kind: MANAGED_MEMORY, ..*properties })
}
