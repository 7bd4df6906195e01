//! What a stream does besides kernels and copies: host functions, single words of memory, other devices' semaphores.

use std::ffi::{c_uint, c_ulonglong};

use super::{both, gated};
use crate::{
    abi::{CUdeviceptr, Flavour, Ptr},
    gate::Work,
};

both! { gated;
    cuLaunchHostFunc, cuLaunchHostFunc_ptsz = c"cuLaunchHostFunc" from 10000, 10000: (stream: Ptr, function: Ptr, data: Ptr) |flavour| Work::Stream(stream, flavour);
    cuLaunchHostFunc_v2, cuLaunchHostFunc_v2_ptsz = c"cuLaunchHostFunc" from 13010, 13010: (stream: Ptr, function: Ptr, data: Ptr, mode: c_uint) |flavour| Work::Stream(stream, flavour);
    cuStreamAddCallback, cuStreamAddCallback_ptsz = c"cuStreamAddCallback" from 5000, 7000: (stream: Ptr, function: Ptr, data: Ptr, flags: c_uint) |flavour| Work::Stream(stream, flavour);
    cuStreamWaitValue32, cuStreamWaitValue32_ptsz = c"cuStreamWaitValue32" from 8000, 8000: (stream: Ptr, address: CUdeviceptr, value: c_uint, flags: c_uint) |flavour| Work::Stream(stream, flavour);
    cuStreamWaitValue32_v2, cuStreamWaitValue32_v2_ptsz = c"cuStreamWaitValue32" from 11070, 11070: (stream: Ptr, address: CUdeviceptr, value: c_uint, flags: c_uint) |flavour| Work::Stream(stream, flavour);
    cuStreamWaitValue64, cuStreamWaitValue64_ptsz = c"cuStreamWaitValue64" from 9000, 9000: (stream: Ptr, address: CUdeviceptr, value: c_ulonglong, flags: c_uint) |flavour| Work::Stream(stream, flavour);
    cuStreamWaitValue64_v2, cuStreamWaitValue64_v2_ptsz = c"cuStreamWaitValue64" from 11070, 11070: (stream: Ptr, address: CUdeviceptr, value: c_ulonglong, flags: c_uint) |flavour| Work::Stream(stream, flavour);
    cuStreamWriteValue32, cuStreamWriteValue32_ptsz = c"cuStreamWriteValue32" from 8000, 8000: (stream: Ptr, address: CUdeviceptr, value: c_uint, flags: c_uint) |flavour| Work::Stream(stream, flavour);
    cuStreamWriteValue32_v2, cuStreamWriteValue32_v2_ptsz = c"cuStreamWriteValue32" from 11070, 11070: (stream: Ptr, address: CUdeviceptr, value: c_uint, flags: c_uint) |flavour| Work::Stream(stream, flavour);
    cuStreamWriteValue64, cuStreamWriteValue64_ptsz = c"cuStreamWriteValue64" from 9000, 9000: (stream: Ptr, address: CUdeviceptr, value: c_ulonglong, flags: c_uint) |flavour| Work::Stream(stream, flavour);
    cuStreamWriteValue64_v2, cuStreamWriteValue64_v2_ptsz = c"cuStreamWriteValue64" from 11070, 11070: (stream: Ptr, address: CUdeviceptr, value: c_ulonglong, flags: c_uint) |flavour| Work::Stream(stream, flavour);
    cuStreamBatchMemOp, cuStreamBatchMemOp_ptsz = c"cuStreamBatchMemOp" from 8000, 8000: (stream: Ptr, count: c_uint, operations: Ptr, flags: c_uint) |flavour| Work::Stream(stream, flavour);
    cuStreamBatchMemOp_v2, cuStreamBatchMemOp_v2_ptsz = c"cuStreamBatchMemOp" from 11070, 11070: (stream: Ptr, count: c_uint, operations: Ptr, flags: c_uint) |flavour| Work::Stream(stream, flavour);
    cuSignalExternalSemaphoresAsync, cuSignalExternalSemaphoresAsync_ptsz = c"cuSignalExternalSemaphoresAsync" from 10000, 10000: (semaphores: Ptr, parameters: Ptr, count: c_uint, stream: Ptr) |flavour| Work::Stream(stream, flavour);
    cuWaitExternalSemaphoresAsync, cuWaitExternalSemaphoresAsync_ptsz = c"cuWaitExternalSemaphoresAsync" from 10000, 10000: (semaphores: Ptr, parameters: Ptr, count: c_uint, stream: Ptr) |flavour| Work::Stream(stream, flavour);
}
