//! Physical memory, reserved addresses, and the mappings between them.
//!
//! A piece of physical memory has its own place in the arena's file; mapping it shows that place at the reserved address
//! too, in the program's view and in the GPU's, so that what was written stays with the piece and not with the address.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::{
    abi::{
        ALLOCATION_PINNED, DevicePtr, Handle, INVALID_HANDLE, INVALID_VALUE, In, LOCATION_DEVICE,
        MemLocation, NOT_SUPPORTED, OUT_OF_MEMORY, Out, Outcome,
    },
    arena::BLOCK,
    entry::driver_api,
    memory,
    process::{driver, gpu_index, sim_error},
    registry::{Registry, lock},
};

/// The beginning of `CUmemAllocationProp`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Properties {
    kind: u32,
    handle_types: u32,
    location: MemLocation,
}

/// The beginning of `CUmemAccessDesc`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Access {
    location: MemLocation,
    flags: u32,
}

/// A piece of physical memory; it goes with its last handle and mapping.
struct Piece {
    gpu: usize,
    len: u64,
    /// Where in the arena its bytes are.
    place: u64,
    handles: AtomicU32,
}

impl Drop for Piece {
    fn drop(&mut self) {
        if let Ok(driver) = driver() {
            driver.session.free_device(self.gpu, self.len);
            driver.arena.release(self.place, self.len);
        }
    }
}

static PIECES: Registry<Piece> = Registry::new();
/// Reserved address → length.
static RESERVED: Mutex<BTreeMap<u64, u64>> = Mutex::new(BTreeMap::new());
/// Mapped address → what is there.
static MAPPED: Mutex<BTreeMap<u64, Arc<Piece>>> = Mutex::new(BTreeMap::new());

fn create(out: Out<Handle>, len: usize, properties: In<Properties>) -> Outcome {
    let properties = properties.get()?;
    if properties.kind != ALLOCATION_PINNED || len == 0 || !(len as u64).is_multiple_of(BLOCK) {
        return Err(INVALID_VALUE);
    }
    if properties.location.kind != LOCATION_DEVICE {
        return Err(NOT_SUPPORTED);
    }
    let (gpu, len) = (gpu_index(properties.location.id)?, len as u64);
    let driver = driver()?;
    driver.session.allocate_device(gpu, len).map_err(sim_error)?;
    let Ok(place) = driver.arena.allocate(len) else {
        driver.session.free_device(gpu, len);
        return Err(OUT_OF_MEMORY);
    };
    out.set(PIECES.insert(Arc::new(Piece { gpu, len, place, handles: AtomicU32::new(1) })))
}

fn map(address: DevicePtr, len: usize, offset: usize, handle: Handle) -> Outcome {
    let (piece, len) = (PIECES.get(handle)?, len as u64);
    let inside = lock(&RESERVED)
        .range(..=address)
        .next_back()
        .is_some_and(|(&base, &reserved)| address - base + len <= reserved);
    let mut mapped = lock(&MAPPED);
    let taken =
        mapped.range(..address + len).next_back().is_some_and(|(&base, piece)| base + piece.len > address);
    if offset != 0 || len != piece.len || !inside || taken || !address.is_multiple_of(BLOCK) {
        return Err(INVALID_VALUE);
    }
    driver()?.arena.show(address, len, piece.place).map_err(|_system| OUT_OF_MEMORY)?;
    memory::add_mapping(address, len, piece.gpu);
    mapped.insert(address, piece);
    Ok(())
}

fn unmap(address: DevicePtr, len: usize) -> Outcome {
    let mut mapped = lock(&MAPPED);
    let end = address + len as u64;
    let whole: Vec<(u64, u64)> = mapped.range(address..end).map(|(&base, piece)| (base, piece.len)).collect();
    if whole.iter().map(|(_, len)| len).sum::<u64>() != len as u64 || whole.is_empty() {
        return Err(INVALID_VALUE);
    }
    for (base, len) in whole {
        memory::remove_mapping(base);
        driver()?.arena.hide(base, len);
        mapped.remove(&base);
    }
    Ok(())
}

driver_api! {
    fn cuMemGetAllocationGranularity(out: Out<usize>, _properties: In<Properties>, _option: u32) {
        out.set(BLOCK as usize)
    }

    fn cuMemAddressReserve(out: Out<DevicePtr>, len: usize, _alignment: usize, _wish: DevicePtr, flags: u64) {
        if len == 0 || !(len as u64).is_multiple_of(BLOCK) || flags != 0 || out.is_null() {
            return Err(INVALID_VALUE);
        }
        let base = driver()?.arena.reserve_addresses(len as u64).map_err(|_system| OUT_OF_MEMORY)?;
        lock(&RESERVED).insert(base, len as u64);
        out.set(base)
    }

    fn cuMemAddressFree(address: DevicePtr, len: usize) {
        let driver = driver()?;
        let end = address + len as u64;
        let mut reserved = lock(&RESERVED);
        if reserved.get(&address) != Some(&(len as u64)) || lock(&MAPPED).range(address..end).next().is_some() {
            return Err(INVALID_VALUE);
        }
        reserved.remove(&address);
        driver.arena.release(address, len as u64);
        Ok(())
    }

    fn cuMemCreate(out: Out<Handle>, len: usize, properties: In<Properties>, flags: u64) {
        if flags == 0 && !out.is_null() { create(out, len, properties) } else { Err(INVALID_VALUE) }
    }

    fn cuMemRelease(handle: Handle) {
        let piece = PIECES.get(handle)?;
        if piece.handles.fetch_sub(1, Ordering::Relaxed) == 1 {
            drop(PIECES.remove(handle)?);
        }
        Ok(())
    }

    fn cuMemRetainAllocationHandle(out: Out<Handle>, address: DevicePtr) {
        let mapped = lock(&MAPPED);
        let (_, piece) = mapped.range(..=address).next_back().ok_or(INVALID_VALUE)?;
        // A piece whose handles were all released gets a handle again.
        if piece.handles.fetch_add(1, Ordering::Relaxed) == 0 {
            PIECES.insert(Arc::clone(piece));
        }
        out.set(crate::registry::handle_of(piece))
    }

    fn cuMemMap(address: DevicePtr, len: usize, offset: usize, handle: Handle, flags: u64) {
        if flags == 0 { map(address, len, offset, handle) } else { Err(INVALID_VALUE) }
    }

    fn cuMemUnmap(address: DevicePtr, len: usize) {
        unmap(address, len)
    }

    fn cuMemSetAccess(address: DevicePtr, _len: usize, access: In<Access>, count: usize) {
        for index in 0..count {
            let access = access.at(index)?;
            if access.location.kind != LOCATION_DEVICE || access.flags > 3 {
                return Err(INVALID_VALUE);
            }
        }
        if lock(&MAPPED).contains_key(&address) { Ok(()) } else { Err(INVALID_HANDLE) }
    }
}
