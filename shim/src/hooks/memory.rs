//! Allocations, frees, and what a program is told about memory.

use std::ffi::{c_uint, c_ulonglong, c_void};

use super::{hooks, or_original};
use crate::{
    abi::{
        CUdevice, CUdeviceptr, CUmemAllocationProp, CUresult, LOCATION_DEVICE, OUT_OF_MEMORY, Ptr, SUCCESS,
    },
    config,
    log::debug,
    memory::{self, Kind, Memory, Plan},
    state,
};

/// Pitch that satisfies every GPU so far; the driver itself gives this alignment.
const PITCH: usize = 512;

fn held() -> &'static Memory {
    &state::get().memory
}

/// Carries an allocation plan out. `original` makes the call that the program asked for and returns, on success, the
/// address; `give` hands a managed address to the program.
fn allocate(
    plan: Plan,
    bytes: usize,
    kind: Kind,
    give: impl FnOnce(CUdeviceptr),
    original: impl FnOnce() -> Result<CUdeviceptr, CUresult>,
) -> CUresult {
    let reserved = match plan {
        Plan::Refuse => return OUT_OF_MEMORY,
        Plan::Unknown(reason) => {
            debug!("{bytes} bytes go uncounted: {reason:?}");
            return original().err().unwrap_or(SUCCESS);
        }
        Plan::Original(reserved, reason) => {
            debug!("{bytes} bytes stay as the program asked: {reason:?}");
            reserved
        }
        Plan::Managed(reserved) => match memory::make_managed(reserved, bytes) {
            Ok(address) => {
                give(address);
                return SUCCESS;
            }
            Err(reserved) => reserved,
        },
    };
    match original() {
        Ok(address) => {
            reserved.keep(&held().addresses, address, kind);
            SUCCESS
        }
        Err(code) => code,
    }
}

/// Runs a call that stores an address at `place`, and reads it back.
fn and_read(code: CUresult, place: *const CUdeviceptr) -> Result<CUdeviceptr, CUresult> {
    if code != SUCCESS {
        return Err(code);
    }
    // SAFETY: the driver succeeded, so it has stored an address there.
    Ok(unsafe { *place })
}

/// Frees through the driver what lies at `address`.
fn free(address: u64, real: impl FnOnce() -> CUresult) -> CUresult {
    held().free(&held().addresses, address, real)
}

hooks! {
    cuMemAlloc_v2 = c"cuMemAlloc" from 3020, Legacy: (place: *mut CUdeviceptr, size: usize) |real| {
        if place.is_null() || config::get().disabled {
            return real(place, size);
        }
        or_original(
            || allocate(
                held().plan(size as u64),
                size,
                Kind::Device,
                // SAFETY: not null, and valid as the driver demands.
                |address| unsafe { *place = address },
                || and_read(real(place, size), place),
            ),
            || real(place, size),
        )
    };
    cuMemAllocPitch_v2 = c"cuMemAllocPitch" from 3020, Legacy:
        (place: *mut CUdeviceptr, pitch: *mut usize, width: usize, height: usize, element: c_uint) |real| {
        let row = width.checked_next_multiple_of(PITCH);
        let size = row.and_then(|row| row.checked_mul(height));
        let (Some(row), Some(size)) = (row, size) else { return real(place, pitch, width, height, element) };
        if place.is_null() || pitch.is_null() || !matches!(element, 4 | 8 | 16) || config::get().disabled {
            return real(place, pitch, width, height, element);
        }
        or_original(
            || allocate(
                held().plan(size as u64),
                size,
                Kind::Device,
                |address| {
                    // SAFETY: neither is null, and both are valid as the driver demands.
                    unsafe {
                        *place = address;
                        *pitch = row;
                    }
                },
                || and_read(real(place, pitch, width, height, element), place),
            ),
            || real(place, pitch, width, height, element),
        )
    };
    cuMemAllocManaged = c"cuMemAllocManaged" from 6000, Legacy:
        (place: *mut CUdeviceptr, size: usize, flags: c_uint) |real| {
        or_original(
            || allocate(
                held().plan_original(size as u64),
                size,
                Kind::Managed,
                |_| {},
                || and_read(real(place, size, flags), place),
            ),
            || real(place, size, flags),
        )
    };
    cuMemAllocAsync = c"cuMemAllocAsync" from 11020, Legacy:
        (place: *mut CUdeviceptr, size: usize, stream: Ptr) |real| {
        or_original(|| queued(size, || and_read(real(place, size, stream), place)), || real(place, size, stream))
    };
    cuMemAllocAsync_ptsz = c"cuMemAllocAsync" from 11020, PerThread:
        (place: *mut CUdeviceptr, size: usize, stream: Ptr) |real| {
        or_original(|| queued(size, || and_read(real(place, size, stream), place)), || real(place, size, stream))
    };
    cuMemAllocFromPoolAsync = c"cuMemAllocFromPoolAsync" from 11020, Legacy:
        (place: *mut CUdeviceptr, size: usize, pool: Ptr, stream: Ptr) |real| {
        or_original(
            || queued(size, || and_read(real(place, size, pool, stream), place)),
            || real(place, size, pool, stream),
        )
    };
    cuMemAllocFromPoolAsync_ptsz = c"cuMemAllocFromPoolAsync" from 11020, PerThread:
        (place: *mut CUdeviceptr, size: usize, pool: Ptr, stream: Ptr) |real| {
        or_original(
            || queued(size, || and_read(real(place, size, pool, stream), place)),
            || real(place, size, pool, stream),
        )
    };
    cuMemFree_v2 = c"cuMemFree" from 3020, Legacy: (address: CUdeviceptr) |real| {
        free(address, || real(address))
    };
    cuMemFreeAsync = c"cuMemFreeAsync" from 11020, Legacy: (address: CUdeviceptr, stream: Ptr) |real| {
        free(address, || real(address, stream))
    };
    cuMemFreeAsync_ptsz = c"cuMemFreeAsync" from 11020, PerThread: (address: CUdeviceptr, stream: Ptr) |real| {
        free(address, || real(address, stream))
    };
    cuMemCreate = c"cuMemCreate" from 10020, Legacy:
        (place: *mut c_ulonglong, size: usize, properties: *const CUmemAllocationProp, flags: c_ulonglong) |real| {
        or_original(
            || {
                // SAFETY: null or the caller's properties.
                let on_device = unsafe { properties.as_ref() }
                    .filter(|properties| properties.location_kind == LOCATION_DEVICE)
                    .map(|properties| properties.location_id);
                let plan = match on_device {
                    Some(device) => held().plan_original_on(device, size as u64),
                    None => return real(place, size, properties, flags),
                };
                match plan {
                    Plan::Refuse => OUT_OF_MEMORY,
                    Plan::Unknown(_) => real(place, size, properties, flags),
                    Plan::Original(reserved, _) | Plan::Managed(reserved) => {
                        let made = and_read(real(place, size, properties, flags), place);
                        match made {
                            Ok(handle) => {
                                reserved.keep(&held().handles, handle, Kind::Device);
                                SUCCESS
                            }
                            Err(code) => code,
                        }
                    }
                }
            },
            || real(place, size, properties, flags),
        )
    };
    cuMemRelease = c"cuMemRelease" from 10020, Legacy: (handle: c_ulonglong) |real| {
        held().free(&held().handles, handle, || real(handle))
    };
    cuMemGetInfo_v2 = c"cuMemGetInfo" from 3020, Legacy: (free: *mut usize, total: *mut usize) |real| {
        let code = real(free, total);
        if code != SUCCESS || free.is_null() || total.is_null() || config::get().disabled {
            return code;
        }
        // SAFETY: the driver succeeded, so it has stored both.
        let real_total = unsafe { *total };
        if let Some((told_free, told_total)) = or_original(|| memory::information(real_total as u64), || None) {
            // SAFETY: as above.
            unsafe {
                *free = told_free as usize;
                *total = told_total as usize;
            }
        }
        code
    };
    cuDeviceTotalMem_v2 = c"cuDeviceTotalMem" from 3020, Legacy: (bytes: *mut usize, device: CUdevice) |real| {
        let code = real(bytes, device);
        if code == SUCCESS && !bytes.is_null() && !config::get().disabled {
            // SAFETY: the driver succeeded, so it has stored the size.
            unsafe { *bytes = memory::told_total(*bytes as u64) as usize };
        }
        code
    };
    cuMemHostAlloc = c"cuMemHostAlloc" from 2020, Legacy:
        (place: *mut *mut c_void, size: usize, flags: c_uint) |real| {
        pinned(real(place, size, flags), place, size)
    };
    cuMemAllocHost_v2 = c"cuMemAllocHost" from 3020, Legacy: (place: *mut *mut c_void, size: usize) |real| {
        pinned(real(place, size), place, size)
    };
    cuMemFreeHost = c"cuMemFreeHost" from 2000, Legacy: (address: *mut c_void) |real| {
        let code = real(address);
        if code == SUCCESS {
            held().unpin(address as u64);
        }
        code
    };
    cuMemHostRegister_v2 = c"cuMemHostRegister" from 6050, Legacy:
        (address: *mut c_void, size: usize, flags: c_uint) |real| {
        let code = real(address, size, flags);
        if code == SUCCESS {
            held().pin(address as u64, size as u64);
        }
        code
    };
    cuMemHostUnregister = c"cuMemHostUnregister" from 4000, Legacy: (address: *mut c_void) |real| {
        let code = real(address);
        if code == SUCCESS {
            held().unpin(address as u64);
        }
        code
    };
}

/// An allocation in stream order: it stays device memory, because a managed block would exist at once.
fn queued(size: usize, original: impl FnOnce() -> Result<CUdeviceptr, CUresult>) -> CUresult {
    allocate(held().plan_original(size as u64), size, Kind::Device, |_| {}, original)
}

fn pinned(code: CUresult, place: *const *mut c_void, size: usize) -> CUresult {
    if code == SUCCESS {
        // SAFETY: the driver succeeded, so it has stored an address there.
        held().pin(unsafe { *place } as u64, size as u64);
    }
    code
}
