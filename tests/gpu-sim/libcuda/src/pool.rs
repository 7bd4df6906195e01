//! Memory pools and stream-ordered allocation.
//!
//! A pool allocation takes its memory at the call and is given back when the stream comes to the free. Pools of the type
//! `CU_MEM_ALLOCATION_TYPE_MANAGED` give managed memory, all others plain device memory.

use std::{
    collections::BTreeMap,
    ffi::c_void,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    abi::{
        ALLOCATION_MANAGED, ALLOCATION_PINNED, DevicePtr, Handle, INVALID_VALUE, In, LOCATION_DEVICE,
        MemLocation, MemPoolProps, NOT_SUPPORTED, Out, Outcome,
    },
    entry::{driver_api, stream_api},
    launch::Operation,
    memory::{self, Kind},
    process::{driver, gpu_index},
    registry::{Registry, handle_of, lock},
    stream::{Flavour, resolve},
};

pub(crate) struct Pool {
    gpu: usize,
    managed: bool,
    threshold: AtomicU64,
    used: AtomicU64,
    high: AtomicU64,
}

static POOLS: Registry<Pool> = Registry::new();
/// (device, managed) → the pool in use when none is named.
static CURRENT: Mutex<BTreeMap<(usize, bool), Handle>> = Mutex::new(BTreeMap::new());

fn make(gpu: usize, managed: bool) -> Handle {
    let pool =
        Pool { gpu, managed, threshold: AtomicU64::new(0), used: AtomicU64::new(0), high: AtomicU64::new(0) };
    POOLS.insert(Arc::new(pool))
}

fn default_pool(gpu: usize, managed: bool) -> Handle {
    static DEFAULTS: OnceLock<Mutex<BTreeMap<(usize, bool), Handle>>> = OnceLock::new();
    *lock(DEFAULTS.get_or_init(Mutex::default)).entry((gpu, managed)).or_insert_with(|| make(gpu, managed))
}

fn current_pool(gpu: usize, managed: bool) -> Handle {
    let current = lock(&CURRENT).get(&(gpu, managed)).copied();
    current.unwrap_or_else(|| default_pool(gpu, managed))
}

fn set_current(gpu: usize, managed: bool, pool: Handle) -> Outcome {
    if POOLS.get(pool)?.managed != managed {
        return Err(INVALID_VALUE);
    }
    lock(&CURRENT).insert((gpu, managed), pool);
    Ok(())
}

/// (device, managed) that a location and an allocation type name.
fn key(location: In<MemLocation>, allocation_type: u32) -> Outcome<(usize, bool)> {
    let location = location.get()?;
    let managed = match allocation_type {
        ALLOCATION_PINNED => false,
        ALLOCATION_MANAGED => true,
        _ => return Err(INVALID_VALUE),
    };
    match location.kind {
        LOCATION_DEVICE => Ok((gpu_index(location.id)?, managed)),
        _ => Err(NOT_SUPPORTED),
    }
}

fn allocate(
    out: Out<DevicePtr>,
    len: usize,
    pool: Option<Handle>,
    stream: Handle,
    flavour: Flavour,
) -> Outcome {
    let stream = resolve(stream, flavour)?;
    if out.is_null() {
        return Err(INVALID_VALUE);
    }
    if stream.capture().is_some() {
        // Memory nodes of graphs are not simulated.
        return Err(NOT_SUPPORTED);
    }
    let handle = pool.unwrap_or_else(|| current_pool(stream.gpu, false));
    let pool = POOLS.get(handle)?;
    let kind = if pool.managed { Kind::Managed } else { Kind::Device(pool.gpu) };
    let context = handle_of(&stream.context()?);
    let address = memory::allocate(kind, len as u64, context, pool.gpu, 1, handle)?;
    let used = pool.used.fetch_add(len as u64, Ordering::Relaxed) + len as u64;
    pool.high.fetch_max(used, Ordering::Relaxed);
    out.set(address)
}

/// The stream has come to `cuMemFreeAsync`.
pub(crate) fn free(address: DevicePtr) -> Outcome {
    let (len, pool) = memory::find(address).map(|known| (known.len, known.pool)).unwrap_or_default();
    memory::free(address, |known| matches!(known.kind, Kind::Device(_) | Kind::Managed))?;
    if let Ok(pool) = POOLS.get(pool) {
        pool.used.fetch_sub(len, Ordering::Relaxed);
    }
    Ok(())
}

driver_api! {
    fn cuDeviceGetDefaultMemPool(out: Out<Handle>, device: i32) {
        out.set(default_pool(gpu_index(device)?, false))
    }

    fn cuDeviceGetMemPool(out: Out<Handle>, device: i32) {
        out.set(current_pool(gpu_index(device)?, false))
    }

    fn cuDeviceSetMemPool(device: i32, pool: Handle) {
        set_current(gpu_index(device)?, false, pool)
    }

    fn cuMemGetDefaultMemPool(out: Out<Handle>, location: In<MemLocation>, allocation_type: u32) {
        let (gpu, managed) = key(location, allocation_type)?;
        out.set(default_pool(gpu, managed))
    }

    fn cuMemGetMemPool(out: Out<Handle>, location: In<MemLocation>, allocation_type: u32) {
        let (gpu, managed) = key(location, allocation_type)?;
        out.set(current_pool(gpu, managed))
    }

    fn cuMemSetMemPool(location: In<MemLocation>, allocation_type: u32, pool: Handle) {
        let (gpu, managed) = key(location, allocation_type)?;
        set_current(gpu, managed, pool)
    }

    fn cuMemPoolCreate(out: Out<Handle>, properties: In<MemPoolProps>) {
        driver()?;
        let properties = properties.get()?;
        let managed = match properties.allocation_type {
            ALLOCATION_PINNED => false,
            ALLOCATION_MANAGED => true,
            _ => return Err(INVALID_VALUE),
        };
        let gpu = match properties.location.kind {
            LOCATION_DEVICE => gpu_index(properties.location.id)?,
            // A managed pool need not name a preferred location.
            0 if managed => 0,
            _ => return Err(NOT_SUPPORTED),
        };
        out.set(make(gpu, managed))
    }

    fn cuMemPoolDestroy(pool: Handle) {
        POOLS.remove(pool).map(drop)
    }

    fn cuMemPoolTrimTo(pool: Handle, _keep: usize) {
        POOLS.get(pool).map(drop)
    }

    fn cuMemPoolSetAttribute(pool: Handle, attribute: u32, value: In<u64>) {
        let pool = POOLS.get(pool)?;
        match attribute {
            1..=3 => Ok(()),
            4 => {
                pool.threshold.store(value.get()?, Ordering::Relaxed);
                Ok(())
            }
            6 | 8 => {
                pool.high.store(pool.used.load(Ordering::Relaxed), Ordering::Relaxed);
                Ok(())
            }
            _ => Err(INVALID_VALUE),
        }
    }

    fn cuMemPoolGetAttribute(pool: Handle, attribute: u32, value: *mut c_void) {
        let pool = POOLS.get(pool)?;
        match attribute {
            1..=3 => Out::from_raw(value.cast::<i32>()).set(1),
            4 => Out::from_raw(value.cast::<u64>()).set(pool.threshold.load(Ordering::Relaxed)),
            5 | 7 => Out::from_raw(value.cast::<u64>()).set(pool.used.load(Ordering::Relaxed)),
            6 | 8 => Out::from_raw(value.cast::<u64>()).set(pool.high.load(Ordering::Relaxed)),
            _ => Err(INVALID_VALUE),
        }
    }

    fn cuMemPoolSetAccess(pool: Handle, _map: usize, _count: usize) {
        POOLS.get(pool).map(drop)
    }

    fn cuMemPoolGetAccess(flags: Out<u32>, pool: Handle, _location: In<MemLocation>) {
        POOLS.get(pool)?;
        flags.set(3)
    }
}

stream_api! {
    fn cuMemAllocAsync | cuMemAllocAsync_ptsz(flavour; out: Out<DevicePtr>, len: usize, stream: Handle) {
        allocate(out, len, None, stream, flavour)
    }

    fn cuMemAllocFromPoolAsync | cuMemAllocFromPoolAsync_ptsz(
        flavour; out: Out<DevicePtr>, len: usize, pool: Handle, stream: Handle,
    ) {
        allocate(out, len, Some(pool), stream, flavour)
    }

    fn cuMemFreeAsync | cuMemFreeAsync_ptsz(flavour; address: DevicePtr, stream: Handle) {
        let stream = resolve(stream, flavour)?;
        if memory::find(address).is_none_or(|known| known.base != address) {
            return Err(INVALID_VALUE);
        }
        stream.add(Operation::Free(address)).map(drop)
    }
}
