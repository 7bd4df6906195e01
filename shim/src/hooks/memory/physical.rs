//! Physical memory and its mappings (`cuMemCreate`, `cuMemMap`). Counted; it stays device memory.

use std::ffi::{c_ulonglong, c_void};

use super::{and_read, counted, held};
use crate::{
    abi::{CUdeviceptr, CUmemAllocationProp, LOCATION_DEVICE, SUCCESS},
    hooks::{hooks, or_original},
};

hooks! {
    cuMemCreate = c"cuMemCreate" from 10020, Legacy:
        (place: *mut c_ulonglong, size: usize, properties: *const CUmemAllocationProp, flags: c_ulonglong) |real| {
        or_original(
            || {
                // SAFETY: null or the caller's properties.
                let on_device = unsafe { properties.as_ref() }
                    .filter(|properties| properties.location_kind == LOCATION_DEVICE)
                    .map(|properties| properties.location_id);
                let Some(device) = on_device else { return real(place, size, properties, flags) };
                counted(
                    held().plan_original_on(device, size as u64),
                    || and_read(real(place, size, properties, flags), place),
                    |reserved, handle| held().physical_made(reserved, handle),
                )
            },
            || real(place, size, properties, flags),
        )
    };
    cuMemRelease = c"cuMemRelease" from 10020, Legacy: (handle: c_ulonglong) |real| {
        let code = real(handle);
        if code == SUCCESS {
            held().physical_released(handle);
        }
        code
    };
    cuMemMap = c"cuMemMap" from 10020, Legacy:
        (address: CUdeviceptr, size: usize, offset: usize, handle: c_ulonglong, flags: c_ulonglong) |real| {
        let code = real(address, size, offset, handle, flags);
        if code == SUCCESS {
            held().physical.mapped(address, size as u64, handle);
        }
        code
    };
    cuMemUnmap = c"cuMemUnmap" from 10020, Legacy: (address: CUdeviceptr, size: usize) |real| {
        let code = real(address, size);
        if code == SUCCESS {
            held().physical_unmapped(address, size as u64);
        }
        code
    };
    cuMemRetainAllocationHandle = c"cuMemRetainAllocationHandle" from 11000, Legacy:
        (place: *mut c_ulonglong, address: *mut c_void) |real| {
        match and_read(real(place, address), place) {
            Ok(handle) => {
                held().physical.retained(handle);
                SUCCESS
            }
            Err(code) => code,
        }
    };
}
