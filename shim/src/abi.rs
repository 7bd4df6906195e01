//! The few types and constants of the CUDA driver API that the shim needs. Values are those of `cuda.h`,
//! which has kept them since the versions named in the hook tables.

use std::ffi::{c_int, c_void};

/// Status of a driver call; 0 is success.
pub(crate) type CUresult = c_int;
/// Ordinal of a device, as this process sees them.
pub(crate) type CUdevice = c_int;
/// Address in device (or unified) memory.
pub(crate) type CUdeviceptr = u64;
/// Any opaque handle or pointer that the shim only hands on.
pub(crate) type Ptr = *mut c_void;

pub(crate) const SUCCESS: CUresult = 0;
pub(crate) const INVALID_VALUE: CUresult = 1;
pub(crate) const OUT_OF_MEMORY: CUresult = 2;
/// `CUDA_ERROR_SHARED_OBJECT_INIT_FAILED`: what a call gets when no driver is there to take it.
pub(crate) const NO_DRIVER: CUresult = 303;

/// `CU_MEM_ATTACH_GLOBAL`.
pub(crate) const ATTACH_GLOBAL: u32 = 1;
/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
pub(crate) const CAPTURE_RELAXED: c_int = 2;
/// `CU_STREAM_CAPTURE_STATUS_NONE`.
pub(crate) const NOT_CAPTURING: c_int = 0;
/// `CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM`.
pub(crate) const PER_THREAD_STREAM: u64 = 2;
/// `CU_POINTER_ATTRIBUTE_MEMORY_TYPE`.
pub(crate) const POINTER_MEMORY_TYPE: c_int = 2;
/// `CU_MEMORYTYPE_HOST`.
pub(crate) const MEMORY_HOST: u32 = 1;
/// `CU_MEM_LOCATION_TYPE_DEVICE`.
pub(crate) const LOCATION_DEVICE: u32 = 1;
/// `CU_STREAM_PER_THREAD`.
pub(crate) const STREAM_PER_THREAD: usize = 2;

/// `CUmemLocation`, passed by value.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct CUmemLocation {
    kind: c_int,
    id: c_int,
}

/// The beginning of `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct CUmemAllocationProp {
    pub(crate) kind: u32,
    pub(crate) handle_types: u32,
    pub(crate) location_kind: u32,
    pub(crate) location_id: c_int,
}

/// The beginning of `CUlaunchConfig`: seven 32-bit values (grid, block, shared memory), then the stream.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct CUlaunchConfig {
    shape: [u32; 7],
    pub(crate) stream: Ptr,
}

const _: () = assert!(std::mem::offset_of!(CUlaunchConfig, stream) == 32);

/// Which default stream a variant of a call means by stream 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// The legacy default stream of the context.
    Legacy,
    /// The default stream of the calling thread (`_ptds` and `_ptsz` variants).
    PerThread,
}
