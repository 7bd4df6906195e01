//! Host memory that the GPU can read. Counted, because nothing can push it out.

use std::ffi::{c_uint, c_void};

use super::held;
use crate::{
    abi::{CUresult, SUCCESS},
    hooks::hooks,
};

fn pinned(code: CUresult, place: *const *mut c_void, size: usize) -> CUresult {
    if code == SUCCESS {
        // SAFETY: the driver succeeded, so it has stored an address there.
        held().pin(unsafe { *place } as u64, size as u64);
    }
    code
}

hooks! {
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
