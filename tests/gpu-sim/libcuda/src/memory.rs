//! Allocations: what each address is, and the functions that create, free and describe memory.
//!
//! # Approach
//! Memory comes in 2 MiB blocks from the arena. Requests of up to half a block share slabs of one size class and kind, as
//! in the driver, so a program's small buffers do not cost a block each. Plain device memory takes room from the model
//! when it is mapped; managed memory is registered with it and takes room when it is touched.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::c_void,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    abi::{
        DevicePtr, HOST_MEMORY_ALREADY_REGISTERED, HOST_MEMORY_NOT_REGISTERED, Handle, ILLEGAL_ADDRESS,
        INVALID_VALUE, NOT_FOUND, OUT_OF_MEMORY, Out, Outcome,
    },
    arena::BLOCK,
    context::{self, CONTEXTS},
    entry::driver_api,
    graph,
    process::{driver, sim_error},
    registry::{handle_of, lock},
};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Kind {
    /// `cuMemAlloc` and its relatives.
    Device(usize),
    Managed,
    /// A mapping of physical memory.
    Mapped(usize),
    /// `cuMemHostAlloc`.
    Host,
    /// The program's own memory after `cuMemHostRegister`.
    Registered,
}

#[derive(Clone, Debug)]
pub(crate) struct Allocation {
    pub(crate) base: u64,
    pub(crate) len: u64,
    pub(crate) kind: Kind,
    pub(crate) gpu: usize,
    pub(crate) context: Handle,
    pub(crate) id: u64,
    pub(crate) pool: Handle,
    flags: u32,
    /// The block range it owns, or the slab it is a part of.
    slab: Option<u64>,
}

#[derive(Default)]
struct Slab {
    kind: Option<Kind>,
    class: u64,
    used: u64,
    free: Vec<u64>,
}

#[derive(Default)]
struct Memory {
    allocations: BTreeMap<u64, Allocation>,
    slabs: BTreeMap<u64, Slab>,
    /// Slabs with room, by what they hold.
    open: HashMap<(Kind, u64), Vec<u64>>,
}

static MEMORY: Mutex<Option<Memory>> = Mutex::new(None);
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// The driver's allocation alignment.
const GRAIN: u64 = 512;

fn with<T>(body: impl FnOnce(&mut Memory) -> T) -> T {
    body(lock(&MEMORY).get_or_insert_default())
}

/// Maps whole blocks of a kind and accounts for them with the model.
fn map_blocks(kind: Kind, len: u64) -> Outcome<u64> {
    let driver = driver()?;
    let len = len.checked_next_multiple_of(BLOCK).ok_or(OUT_OF_MEMORY)?;
    if let Kind::Device(gpu) = kind {
        driver.session.allocate_device(gpu, len).map_err(sim_error)?;
    }
    let undo = || {
        if let Kind::Device(gpu) = kind {
            driver.session.free_device(gpu, len);
        }
    };
    let Ok(base) = driver.arena.allocate(len) else {
        undo();
        return Err(OUT_OF_MEMORY);
    };
    if kind == Kind::Managed
        && let Err(error) = driver.session.register_managed(base, len)
    {
        driver.arena.release(base, len);
        return Err(sim_error(error));
    }
    Ok(base)
}

fn unmap_blocks(kind: Kind, base: u64, len: u64) {
    let Ok(driver) = driver() else { return };
    let len = len.next_multiple_of(BLOCK);
    match kind {
        Kind::Device(gpu) => driver.session.free_device(gpu, len),
        Kind::Managed => driver.session.unregister_managed(base, len),
        Kind::Host => {}
        Kind::Mapped(_) | Kind::Registered => return,
    }
    driver.arena.release(base, len);
}

impl Memory {
    fn take_from_slab(&mut self, kind: Kind, class: u64) -> Outcome<(u64, u64)> {
        let key = (kind, class);
        let slab = if let Some(&slab) = self.open.get(&key).and_then(|slabs| slabs.last()) {
            slab
        } else {
            let base = map_blocks(kind, BLOCK)?;
            let free = (0..BLOCK / class).rev().map(|index| base + index * class).collect();
            self.slabs.insert(base, Slab { kind: Some(kind), class, used: 0, free });
            self.open.entry(key).or_default().push(base);
            base
        };
        let room = self.slabs.get_mut(&slab).ok_or(OUT_OF_MEMORY)?;
        let address = room.free.pop().ok_or(OUT_OF_MEMORY)?;
        room.used += 1;
        if room.free.is_empty()
            && let Some(open) = self.open.get_mut(&key)
        {
            open.retain(|&base| base != slab);
        }
        Ok((address, slab))
    }

    fn give_to_slab(&mut self, slab: u64, address: u64) {
        let Some(room) = self.slabs.get_mut(&slab) else { return };
        let Some(kind) = room.kind else { return };
        let key = (kind, room.class);
        if room.free.is_empty() {
            self.open.entry(key).or_default().push(slab);
        }
        room.free.push(address);
        room.used -= 1;
        if room.used == 0 {
            self.slabs.remove(&slab);
            if let Some(open) = self.open.get_mut(&key) {
                open.retain(|&base| base != slab);
            }
            unmap_blocks(kind, slab, BLOCK);
        }
    }

    fn find(&self, address: u64) -> Option<&Allocation> {
        let (_, allocation) = self.allocations.range(..=address).next_back()?;
        (address - allocation.base < allocation.len).then_some(allocation)
    }
}

/// Allocates in the context's device; `pool` is 0 or the pool the memory belongs to.
pub(crate) fn allocate(
    kind: Kind,
    len: u64,
    context: Handle,
    gpu: usize,
    flags: u32,
    pool: Handle,
) -> Outcome<u64> {
    if len == 0 {
        return Err(INVALID_VALUE);
    }
    with(|memory| {
        let (base, slab) = if len <= BLOCK / 2 {
            let class = len.max(GRAIN).next_power_of_two();
            let (address, slab) = memory.take_from_slab(kind, class)?;
            (address, Some(slab))
        } else {
            (map_blocks(kind, len)?, None)
        };
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        memory.allocations.insert(base, Allocation { base, len, kind, gpu, context, id, pool, flags, slab });
        Ok(base)
    })
}

/// Frees the allocation that starts at `base` and satisfies `wanted`.
pub(crate) fn free(base: u64, wanted: impl FnOnce(&Allocation) -> bool) -> Outcome {
    with(|memory| {
        if !memory.allocations.get(&base).is_some_and(wanted) {
            return Err(INVALID_VALUE);
        }
        let Some(allocation) = memory.allocations.remove(&base) else { return Err(INVALID_VALUE) };
        match allocation.slab {
            Some(slab) => memory.give_to_slab(slab, base),
            None => unmap_blocks(allocation.kind, base, allocation.len),
        }
        Ok(())
    })
}

/// Physical memory is mapped at `base`.
pub(crate) fn add_mapping(base: u64, len: u64, gpu: usize) {
    let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
    let kind = Kind::Mapped(gpu);
    let mapping = Allocation { base, len, kind, gpu, context: 0, id, pool: 0, flags: 0, slab: None };
    with(|memory| memory.allocations.insert(base, mapping));
}

/// It no longer is.
pub(crate) fn remove_mapping(base: u64) {
    with(|memory| memory.allocations.remove(&base));
}

/// Frees what a destroyed context leaves behind.
pub(crate) fn free_all_of(context: Handle) {
    let bases: Vec<u64> = with(|memory| {
        memory
            .allocations
            .values()
            .filter(|allocation| {
                allocation.context == context
                    && !matches!(allocation.kind, Kind::Registered | Kind::Mapped(_))
            })
            .map(|allocation| allocation.base)
            .collect()
    });
    for base in bases {
        // Another thread may have freed it meanwhile; then there is nothing left to do.
        let _gone: Outcome = free(base, |_| true);
    }
}

/// The allocation that contains `address`.
pub(crate) fn find(address: u64) -> Option<Allocation> {
    with(|memory| memory.find(address).cloned())
}

/// Checks that `[address, address + len)` lies in one allocation; gives it.
pub(crate) fn check_device_range(address: u64, len: u64) -> Outcome<Allocation> {
    let allocation = find(address).ok_or(INVALID_VALUE)?;
    let offset = address - allocation.base;
    if len <= allocation.len - offset { Ok(allocation) } else { Err(INVALID_VALUE) }
}

/// Where a worker reaches memory that a kernel was given: an allocation, whole.
pub(crate) fn kernel_access(address: u64, len: u64) -> Outcome<(*mut u8, Kind)> {
    let allocation = check_device_range(address, len).map_err(|_outside| ILLEGAL_ADDRESS)?;
    Ok((driver()?.arena.gpu_view(address) as *mut u8, allocation.kind))
}

/// The same for copies, which may also name pageable host memory (`None`).
pub(crate) fn copy_access(address: u64, len: u64) -> Outcome<(*mut u8, Option<Kind>)> {
    match find(address) {
        Some(allocation) if len <= allocation.len - (address - allocation.base) => {
            Ok((driver()?.arena.gpu_view(address) as *mut u8, Some(allocation.kind)))
        }
        Some(_) => Err(ILLEGAL_ADDRESS),
        None => Ok((address as *mut u8, None)),
    }
}

fn allocate_in_current(
    out: Out<DevicePtr>,
    len: usize,
    kind: impl FnOnce(usize) -> Kind,
    flags: u32,
) -> Outcome {
    let context = context::current()?;
    if out.is_null() {
        return Err(INVALID_VALUE);
    }
    graph::forbid_unsafe()?;
    let gpu = context.gpu;
    out.set(allocate(kind(gpu), len as u64, handle_of(&context), gpu, flags, 0)?)
}

fn allocate_pitch(
    out: Out<DevicePtr>,
    pitch: Out<usize>,
    width: usize,
    height: usize,
    element: u32,
) -> Outcome {
    if pitch.is_null() || !matches!(element, 4 | 8 | 16) {
        return Err(INVALID_VALUE);
    }
    let row = width.checked_next_multiple_of(512).ok_or(INVALID_VALUE)?;
    let len = row.checked_mul(height).ok_or(OUT_OF_MEMORY)?;
    allocate_in_current(out, len, Kind::Device, 0)?;
    pitch.set(row)
}

fn allocate_host(out: Out<*mut c_void>, len: usize, flags: u32) -> Outcome {
    let context = context::current()?;
    graph::forbid_unsafe()?;
    if out.is_null() || flags & !7 != 0 {
        return Err(INVALID_VALUE);
    }
    let base = allocate(Kind::Host, len as u64, handle_of(&context), context.gpu, flags, 0)?;
    out.set(base as *mut c_void)
}

fn register_host(address: u64, len: usize, flags: u32) -> Outcome {
    let context = context::current()?;
    if address == 0 || len == 0 {
        return Err(INVALID_VALUE);
    }
    let (handle, gpu, len) = (handle_of(&context), context.gpu, len as u64);
    with(|memory| {
        let end = address.checked_add(len).ok_or(INVALID_VALUE)?;
        let before = memory.allocations.range(..end).next_back();
        if before.is_some_and(|(_, known)| known.base + known.len > address) {
            return Err(HOST_MEMORY_ALREADY_REGISTERED);
        }
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let kind = Kind::Registered;
        let registered =
            Allocation { base: address, len, kind, gpu, context: handle, id, pool: 0, flags, slab: None };
        memory.allocations.insert(address, registered);
        Ok(())
    })
}

/// As the driver: a free waits for the work of its device.
fn synchronize_device(gpu: usize) {
    for context in CONTEXTS.all().iter().filter(|context| context.gpu == gpu) {
        for stream in context.streams() {
            stream.wait_idle();
        }
    }
}

fn address_range(base: Out<DevicePtr>, size: Out<usize>, address: DevicePtr) -> Outcome {
    context::current()?;
    let allocation = find(address).ok_or(NOT_FOUND)?;
    base.set_optional(allocation.base);
    size.set_optional(allocation.len as usize);
    Ok(())
}

fn host_device_pointer(out: Out<DevicePtr>, host: u64) -> Outcome {
    match find(host) {
        Some(Allocation { kind: Kind::Host | Kind::Registered, .. }) => out.set(host),
        _ => Err(INVALID_VALUE),
    }
}

driver_api! {
    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) {
        let context = context::current()?;
        let (free_bytes, total_bytes) = driver()?.session.host().mem_info(context.gpu);
        free.set(free_bytes as usize)?;
        total.set(total_bytes as usize)
    }

    fn cuMemAlloc_v2(out: Out<DevicePtr>, len: usize) {
        allocate_in_current(out, len, Kind::Device, 0)
    }

    fn cuMemAllocManaged(out: Out<DevicePtr>, len: usize, flags: u32) {
        // CU_MEM_ATTACH_GLOBAL, _HOST.
        if flags != 1 && flags != 2 {
            return Err(INVALID_VALUE);
        }
        allocate_in_current(out, len, |_| Kind::Managed, flags)
    }

    fn cuMemAllocPitch_v2(out: Out<DevicePtr>, pitch: Out<usize>, width: usize, height: usize, element: u32) {
        allocate_pitch(out, pitch, width, height, element)
    }

    fn cuMemFree_v2(address: DevicePtr) {
        driver()?;
        if address == 0 {
            return Ok(());
        }
        graph::forbid_unsafe()?;
        let allocation = find(address).filter(|known| known.base == address).ok_or(INVALID_VALUE)?;
        synchronize_device(allocation.gpu);
        free(address, |known| matches!(known.kind, Kind::Device(_) | Kind::Managed))
    }

    fn cuMemHostAlloc(out: Out<*mut c_void>, len: usize, flags: u32) {
        allocate_host(out, len, flags)
    }

    fn cuMemAllocHost_v2(out: Out<*mut c_void>, len: usize) {
        allocate_host(out, len, 0)
    }

    fn cuMemFreeHost(address: u64) {
        driver()?;
        let allocation = find(address).ok_or(INVALID_VALUE)?;
        synchronize_device(allocation.gpu);
        free(address, |known| known.kind == Kind::Host)
    }

    fn cuMemHostGetDevicePointer_v2(out: Out<DevicePtr>, host: u64, _flags: u32) {
        host_device_pointer(out, host)
    }

    fn cuMemHostGetFlags(out: Out<u32>, host: u64) {
        match find(host) {
            Some(Allocation { kind: Kind::Host | Kind::Registered, flags, .. }) => out.set(flags),
            _ => Err(INVALID_VALUE),
        }
    }

    fn cuMemHostRegister_v2(address: u64, len: usize, flags: u32) {
        register_host(address, len, flags)
    }

    fn cuMemHostRegister(address: u64, len: usize, flags: u32) {
        register_host(address, len, flags)
    }

    fn cuMemHostUnregister(address: u64) {
        driver()?;
        free(address, |known| known.kind == Kind::Registered).map_err(|_unknown| HOST_MEMORY_NOT_REGISTERED)
    }

    fn cuMemGetAddressRange_v2(base: Out<DevicePtr>, size: Out<usize>, address: DevicePtr) {
        address_range(base, size, address)
    }
}
