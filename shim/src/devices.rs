//! The GPUs that this process uses, in the order in which it began to.

mod contexts;

use std::sync::{
    Mutex, MutexGuard, OnceLock, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use nvshare_wire::{GpuUuid, page::SLOTS};

use crate::{
    abi::{CUdevice, CUresult},
    driver, gate,
    log::{info, warning},
};
use contexts::Contexts;
pub(crate) use contexts::{Drained, Leaving};

/// One GPU in use.
#[derive(Debug)]
pub(crate) struct Device {
    /// The driver's number for it in this process.
    pub(crate) ordinal: CUdevice,
    /// Its identity.
    pub(crate) uuid: GpuUuid,
    /// Its memory in bytes.
    pub(crate) total: u64,
    /// The program's contexts on it.
    pub(crate) contexts: Contexts,
}

/// The GPUs in use. Slots are taken in order and never given back.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    slots: [OnceLock<Device>; SLOTS],
    used: AtomicUsize,
    adding: Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Devices {
    /// GPUs in use, by slot.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &Device)> {
        self.slots[..self.used.load(Ordering::Acquire)].iter().filter_map(OnceLock::get).enumerate()
    }

    /// The GPU in a slot.
    pub(crate) fn get(&self, slot: usize) -> Option<&Device> {
        self.slots.get(slot)?.get()
    }

    /// The slot of a GPU that is in use.
    pub(crate) fn slot_of(&self, ordinal: CUdevice) -> Option<usize> {
        self.iter().find(|(_, device)| device.ordinal == ordinal).map(|(slot, _)| slot)
    }

    /// The slot of a GPU by identity.
    pub(crate) fn slot_of_uuid(&self, uuid: &GpuUuid) -> Option<usize> {
        self.iter().find(|(_, device)| device.uuid == *uuid).map(|(slot, _)| slot)
    }

    /// The slot of a GPU, which begins to be in use if it was not. `None` if the driver does not describe it or
    /// more GPUs are in use than the page has slots: such a GPU is left alone.
    pub(crate) fn slot_or_add(&self, ordinal: CUdevice) -> Option<usize> {
        self.slot_of(ordinal).or_else(|| self.add(ordinal))
    }

    fn add(&self, ordinal: CUdevice) -> Option<usize> {
        let _adding = lock(&self.adding);
        if let Some(slot) = self.slot_of(ordinal) {
            return Some(slot);
        }
        let device = match Device::describe(ordinal) {
            Ok(device) => device,
            Err(code) => {
                warning!("GPU {ordinal} is not shared: the driver does not describe it (error {code})");
                return None;
            }
        };
        let slot = self.used.load(Ordering::Relaxed);
        let Some(place) = self.slots.get(slot) else {
            warning!("GPU {ordinal} is not shared: a process can use {SLOTS} GPUs at most");
            return None;
        };
        info!("GPU {ordinal} is in use, {} MiB", device.total >> 20);
        place.set(device).ok()?;
        if slot == 1 {
            gate::many_devices();
        }
        self.used.store(slot + 1, Ordering::Release);
        Some(slot)
    }
}

impl Device {
    fn describe(ordinal: CUdevice) -> Result<Self, CUresult> {
        Ok(Self {
            ordinal,
            uuid: driver::uuid(ordinal)?,
            total: driver::total_memory(ordinal)?,
            contexts: Contexts::new(ordinal),
        })
    }
}
