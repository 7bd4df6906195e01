//! Sharing memory with other processes (CUDA IPC), which managed memory cannot be: from its first use on, new blocks
//! stay device memory.

use std::ffi::c_uint;

use super::held;
use crate::{
    abi::{CUdeviceptr, CUipcMemHandle, CUresult, Ptr, SUCCESS},
    hooks::{hooks, or_original},
};

fn opened(code: CUresult) -> CUresult {
    if code == SUCCESS {
        held().shares(None);
    }
    code
}

hooks! {
    cuIpcGetMemHandle = c"cuIpcGetMemHandle" from 4010, Legacy: (handle: Ptr, address: CUdeviceptr) |real| {
        let code = real(handle, address);
        or_original(|| held().shares((code != SUCCESS).then_some(address)), || ());
        code
    };
    cuIpcOpenMemHandle = c"cuIpcOpenMemHandle" from 4010, Legacy:
        (place: *mut CUdeviceptr, handle: CUipcMemHandle, flags: c_uint) |real| {
        opened(real(place, handle, flags))
    };
    cuIpcOpenMemHandle_v2 = c"cuIpcOpenMemHandle" from 11000, Legacy:
        (place: *mut CUdeviceptr, handle: CUipcMemHandle, flags: c_uint) |real| {
        opened(real(place, handle, flags))
    };
}
