//! Blocks of memory, which become managed memory where that is right.

use std::ffi::c_uint;

use super::{and_read, counted, held};
use crate::{
    abi::{CUdeviceptr, CUresult, Ptr, SUCCESS},
    config,
    hooks::{hooks, or_original},
    log::debug,
    memory::{self, Kind, Plan},
};

/// Pitch that satisfies every GPU so far; the driver itself gives this alignment.
const PITCH: usize = 512;

/// An allocation of a new block. `original` makes the call that the program asked for and returns, on success, the
/// address; `give` hands a managed address to the program.
fn allocate(
    bytes: usize,
    give: impl FnOnce(CUdeviceptr),
    original: impl FnOnce() -> Result<CUdeviceptr, CUresult>,
) -> CUresult {
    let plan = match held().plan(bytes as u64) {
        Plan::Managed(reserved) => match memory::make_managed(reserved, bytes) {
            Ok(address) => {
                give(address);
                return SUCCESS;
            }
            Err((reserved, reason)) => Plan::Original(reserved, reason),
        },
        plan => plan,
    };
    if let Plan::Original(_, reason) = &plan {
        debug!("{bytes} bytes stay as the program asked: {reason:?}");
    }
    counted(plan, original, |reserved, address| reserved.keep(&held().addresses, address, Kind::Device))
}

hooks! {
    cuMemAlloc_v2 = c"cuMemAlloc" from 3020, Legacy: (place: *mut CUdeviceptr, size: usize) |real| {
        if place.is_null() || config::get().disabled {
            return real(place, size);
        }
        or_original(
            || allocate(
                size,
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
                size,
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
            || counted(
                held().plan_original(size as u64),
                || and_read(real(place, size, flags), place),
                |reserved, address| reserved.keep(&held().addresses, address, Kind::Managed),
            ),
            || real(place, size, flags),
        )
    };
    cuMemFree_v2 = c"cuMemFree" from 3020, Legacy: (address: CUdeviceptr) |real| {
        held().free(&held().addresses, address, || real(address))
    };
    cuMemFreeAsync = c"cuMemFreeAsync" from 11020, Legacy: (address: CUdeviceptr, stream: Ptr) |real| {
        held().free(&held().addresses, address, || real(address, stream))
    };
    cuMemFreeAsync_ptsz = c"cuMemFreeAsync" from 11020, PerThread: (address: CUdeviceptr, stream: Ptr) |real| {
        held().free(&held().addresses, address, || real(address, stream))
    };
}
