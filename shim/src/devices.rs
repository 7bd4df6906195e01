//! The GPUs that this process uses, in the order in which it began to, and the contexts it has on them.

use std::sync::{
    Mutex, MutexGuard, OnceLock, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use nvshare_wire::{GpuUuid, page::SLOTS};

use crate::{
    abi::{CUdevice, CUresult, Ptr},
    driver, gate,
    log::{info, warning},
};

/// One GPU in use.
#[derive(Debug)]
pub(crate) struct Device {
    /// The driver's number for it in this process.
    pub(crate) ordinal: CUdevice,
    /// Its identity.
    pub(crate) uuid: GpuUuid,
    /// Its memory in bytes.
    pub(crate) total: u64,
    contexts: Mutex<Vec<Context>>,
    /// Held while contexts are being drained, and to take one away.
    draining: Mutex<()>,
}

/// One context of the program.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context {
    /// The driver's handle.
    pub(crate) handle: usize,
    /// How often the program retained it; `None` for a context that it created.
    retained: Option<u32>,
    /// A stream of ours in it; 0 until one is needed. It goes with the context.
    stream: usize,
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
            contexts: Mutex::default(),
            draining: Mutex::default(),
        })
    }

    /// The program created a context.
    pub(crate) fn created(&self, context: Ptr) {
        lock(&self.contexts).push(Context { handle: context as usize, retained: None, stream: 0 });
    }

    /// The program retained the primary context.
    pub(crate) fn retained(&self, context: Ptr) {
        let mut contexts = lock(&self.contexts);
        let handle = context as usize;
        match contexts.iter_mut().find(|known| known.handle == handle) {
            Some(known) => known.retained = known.retained.map(|times| times.saturating_add(1)),
            None => contexts.push(Context { handle, retained: Some(1), stream: 0 }),
        }
    }

    /// The program is about to release the primary context once; it goes when it was released as often as it
    /// was retained. The guard keeps a drain away until the driver has done it.
    pub(crate) fn releasing(&self) -> MutexGuard<'_, ()> {
        self.remove(|context| match &mut context.retained {
            None => false,
            Some(times) => {
                *times = times.saturating_sub(1);
                *times == 0
            }
        })
    }

    /// The program is about to reset the primary context, however often it was retained.
    pub(crate) fn resetting(&self) -> MutexGuard<'_, ()> {
        self.remove(|context| context.retained.is_some())
    }

    /// The program is about to destroy this context.
    pub(crate) fn destroying(&self, context: Ptr) -> MutexGuard<'_, ()> {
        self.remove(|known| known.retained.is_none() && known.handle == context as usize)
    }

    fn remove(&self, mut goes: impl FnMut(&mut Context) -> bool) -> MutexGuard<'_, ()> {
        // The drain holds this lock only while it waits for work of these very contexts, which the driver's own
        // destruction would wait for as well.
        let guard = lock(&self.draining);
        lock(&self.contexts).retain_mut(|context| !goes(context));
        guard
    }

    /// Our own stream in a context of this GPU that is the calling thread's current one.
    pub(crate) fn own_stream(&self, context: Ptr) -> Option<Ptr> {
        let mut contexts = lock(&self.contexts);
        let known = contexts.iter_mut().find(|known| known.handle == context as usize)?;
        if known.stream == 0 {
            known.stream = driver::make_stream().ok()? as usize;
        }
        Some(known.stream as Ptr)
    }

    /// Whether this context is one of this GPU's.
    pub(crate) fn has(&self, context: Ptr) -> bool {
        lock(&self.contexts).iter().any(|known| known.handle == context as usize)
    }

    /// How many contexts there are.
    pub(crate) fn contexts(&self) -> usize {
        lock(&self.contexts).len()
    }

    /// Waits until everything submitted to this GPU has finished. For a thread that may block.
    pub(crate) fn drain(&self) -> Result<(), CUresult> {
        let _guard = lock(&self.draining);
        let contexts = lock(&self.contexts).clone();
        for context in contexts {
            if context.retained.is_some() && !driver::primary_is_active(self.ordinal) {
                // Released behind our back; touching it would bring it to life.
                continue;
            }
            driver::synchronise(context.handle as Ptr)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> Device {
        Device {
            ordinal: 0,
            uuid: [7; 16],
            total: 1 << 30,
            contexts: Mutex::default(),
            draining: Mutex::default(),
        }
    }

    #[test]
    fn the_primary_context_goes_with_its_last_release() {
        let device = device();
        let primary = 0x10 as Ptr;
        device.retained(primary);
        device.retained(primary);
        drop(device.releasing());
        assert!(device.has(primary));
        drop(device.releasing());
        assert!(!device.has(primary));
        device.retained(primary);
        device.retained(primary);
        drop(device.resetting());
        assert_eq!(device.contexts(), 0);
    }

    #[test]
    fn a_created_context_goes_when_it_is_destroyed_and_not_before() {
        let device = device();
        device.created(0x20 as Ptr);
        device.created(0x30 as Ptr);
        device.retained(0x10 as Ptr);
        drop(device.releasing());
        assert_eq!(device.contexts(), 2);
        drop(device.destroying(0x20 as Ptr));
        assert!(!device.has(0x20 as Ptr) && device.has(0x30 as Ptr));
    }
}
