//! Memory pools and allocation in stream order.

use std::ffi::c_int;

use super::{and_read, counted, held};
use crate::{
    abi::{
        CUdevice, CUdeviceptr, CUmemLocation, CUmemPoolProps, CUresult, Flavour, INVALID_VALUE,
        LOCATION_DEVICE, OUT_OF_MEMORY, PINNED_MEMORY, Ptr, SUCCESS,
    },
    config, driver,
    hooks::{hooks, or_original},
    memory::Kind,
    state,
};

/// An allocation from the current pool.
fn unnamed(
    size: usize,
    stream: Ptr,
    flavour: Flavour,
    give: impl FnOnce(CUdeviceptr),
    original: impl Fn() -> Result<CUdeviceptr, CUresult>,
) -> CUresult {
    if config::get().disabled {
        return original().err().unwrap_or(SUCCESS);
    }
    // In a capture this becomes a node of the graph, whose memory is the driver's affair.
    if state::get().captures.any() && driver::is_capturing(stream, flavour) {
        return if held().allows_graph_node(size as u64) {
            original().err().unwrap_or(SUCCESS)
        } else {
            OUT_OF_MEMORY
        };
    }
    let plan = held().plan_original(size as u64);
    let pool = plan
        .slot()
        .filter(|_| held().host_takes(size as u64) && !held().is_shared())
        .and_then(|slot| held().pools.for_unnamed(slot));
    counted(
        plan,
        || match pool.map(|pool| driver::allocate_from(pool, size, stream, flavour)) {
            Some(Ok(address)) => {
                give(address);
                Ok((address, Kind::Managed))
            }
            None | Some(Err(_)) => original().map(|address| (address, Kind::Device)),
        },
        |reserved, (address, kind)| reserved.keep(&held().addresses, address, kind),
    )
}

/// An allocation from a pool that the program names.
fn named(size: usize, pool: Ptr, original: impl FnOnce() -> Result<CUdeviceptr, CUresult>) -> CUresult {
    let kind = if held().pools.is_managed(pool) { Kind::Managed } else { Kind::Device };
    counted(held().plan_original(size as u64), original, |reserved, address| {
        reserved.keep(&held().addresses, address, kind);
    })
}

/// The slot of the device that a location names, for pools of device memory.
fn slot_of(location: *const CUmemLocation, kind: c_int) -> Option<usize> {
    // SAFETY: null or the caller's location.
    let location = unsafe { location.as_ref() }?;
    let is_device_memory = kind as u32 == PINNED_MEMORY && location.kind() == LOCATION_DEVICE;
    if is_device_memory { state::get().devices.slot_of(location.id) } else { None }
}

/// The driver named a pool at `place`: the program is told ours.
fn told(code: CUresult, place: *mut Ptr, ours: impl FnOnce() -> Option<Ptr>) -> CUresult {
    if code == SUCCESS
        && !place.is_null()
        && !config::get().disabled
        && let Some(pool) = or_original(ours, || None)
    {
        // SAFETY: the driver has just stored a pool there.
        unsafe { *place = pool };
    }
    code
}

/// The program makes a pool the current one. Of a managed one the driver has another notion.
fn make_current(slot: Option<usize>, pool: Ptr, original: impl FnOnce() -> CUresult) -> CUresult {
    let code = if held().pools.is_managed(pool) { SUCCESS } else { original() };
    if let Some(slot) = slot
        && code == SUCCESS
    {
        held().pools.make_current(slot, pool);
    }
    code
}

hooks! {
    cuMemAllocAsync = c"cuMemAllocAsync" from 11020, Legacy:
        (place: *mut CUdeviceptr, size: usize, stream: Ptr) |real| {
        if place.is_null() {
            return real(place, size, stream);
        }
        or_original(
            // SAFETY: not null, and valid as the driver demands.
            || unnamed(size, stream, Flavour::Legacy, |address| unsafe { *place = address }, || {
                and_read(real(place, size, stream), place)
            }),
            || real(place, size, stream),
        )
    };
    cuMemAllocAsync_ptsz = c"cuMemAllocAsync" from 11020, PerThread:
        (place: *mut CUdeviceptr, size: usize, stream: Ptr) |real| {
        if place.is_null() {
            return real(place, size, stream);
        }
        or_original(
            // SAFETY: not null, and valid as the driver demands.
            || unnamed(size, stream, Flavour::PerThread, |address| unsafe { *place = address }, || {
                and_read(real(place, size, stream), place)
            }),
            || real(place, size, stream),
        )
    };
    cuMemAllocFromPoolAsync = c"cuMemAllocFromPoolAsync" from 11020, Legacy:
        (place: *mut CUdeviceptr, size: usize, pool: Ptr, stream: Ptr) |real| {
        or_original(
            || named(size, pool, || and_read(real(place, size, pool, stream), place)),
            || real(place, size, pool, stream),
        )
    };
    cuMemAllocFromPoolAsync_ptsz = c"cuMemAllocFromPoolAsync" from 11020, PerThread:
        (place: *mut CUdeviceptr, size: usize, pool: Ptr, stream: Ptr) |real| {
        or_original(
            || named(size, pool, || and_read(real(place, size, pool, stream), place)),
            || real(place, size, pool, stream),
        )
    };
    cuDeviceGetDefaultMemPool = c"cuDeviceGetDefaultMemPool" from 11020, Legacy:
        (place: *mut Ptr, device: CUdevice) |real| {
        told(real(place, device), place, || held().pools.stand_in(state::get().devices.slot_of(device)?))
    };
    cuDeviceGetMemPool = c"cuDeviceGetMemPool" from 11020, Legacy: (place: *mut Ptr, device: CUdevice) |real| {
        told(real(place, device), place, || held().pools.told_current(state::get().devices.slot_of(device)?))
    };
    cuDeviceSetMemPool = c"cuDeviceSetMemPool" from 11020, Legacy: (device: CUdevice, pool: Ptr) |real| {
        make_current(state::get().devices.slot_of(device), pool, || real(device, pool))
    };
    cuMemGetDefaultMemPool = c"cuMemGetDefaultMemPool" from 13000, Legacy:
        (place: *mut Ptr, location: *mut CUmemLocation, kind: c_int) |real| {
        told(real(place, location, kind), place, || held().pools.stand_in(slot_of(location, kind)?))
    };
    cuMemGetMemPool = c"cuMemGetMemPool" from 13000, Legacy:
        (place: *mut Ptr, location: *mut CUmemLocation, kind: c_int) |real| {
        told(real(place, location, kind), place, || held().pools.told_current(slot_of(location, kind)?))
    };
    cuMemSetMemPool = c"cuMemSetMemPool" from 13000, Legacy:
        (location: *mut CUmemLocation, kind: c_int, pool: Ptr) |real| {
        match slot_of(location, kind) {
            Some(slot) => make_current(Some(slot), pool, || real(location, kind, pool)),
            None => real(location, kind, pool),
        }
    };
    cuMemPoolCreate = c"cuMemPoolCreate" from 11020, Legacy:
        (place: *mut Ptr, properties: *const CUmemPoolProps) |real| {
        // SAFETY: null or the caller's properties.
        let twin = unsafe { properties.as_ref() }.and_then(crate::memory::managed_twin);
        if let Some(twin) = twin
            && !place.is_null()
            && real(place, &raw const twin) == SUCCESS
        {
            // SAFETY: the driver has just stored a pool there.
            held().pools.note_managed(unsafe { *place });
            return SUCCESS;
        }
        match and_read(real(place, properties), place) {
            Ok(pool) => {
                // Its handle may have been a managed one's that went with a reset.
                held().pools.forget(pool);
                SUCCESS
            }
            Err(code) => code,
        }
    };
    cuMemPoolDestroy = c"cuMemPoolDestroy" from 11020, Legacy: (pool: Ptr) |real| {
        if held().pools.is_stand_in(pool) {
            // What the driver says of a default pool.
            return INVALID_VALUE;
        }
        let code = real(pool);
        if code == SUCCESS {
            held().pools.forget(pool);
        }
        code
    };
}
