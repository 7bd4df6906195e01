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
/// `CUDA_ERROR_INVALID_CONTEXT`.
pub(crate) const INVALID_CONTEXT: CUresult = 201;
/// `CUDA_ERROR_SHARED_OBJECT_INIT_FAILED`: what a call gets when no driver is there to take it.
pub(crate) const NO_DRIVER: CUresult = 303;

/// `CU_MEM_ATTACH_GLOBAL`.
pub(crate) const ATTACH_GLOBAL: u32 = 1;
/// `CU_DEVICE_CPU`: the host, as a place to move memory to.
pub(crate) const HOST: CUdevice = -1;
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
/// `CU_MEM_ALLOCATION_TYPE_PINNED`: device memory that stays where it is.
pub(crate) const PINNED_MEMORY: u32 = 1;
/// `CU_MEM_ALLOCATION_TYPE_MANAGED` (CUDA 13.0).
pub(crate) const MANAGED_MEMORY: u32 = 2;
/// `CU_MEM_HANDLE_TYPE_NONE`: not to be shared with another process.
pub(crate) const NO_HANDLE: u32 = 0;
/// `CU_GRAPH_NODE_TYPE_MEM_ALLOC`.
pub(crate) const NODE_MEM_ALLOC: c_int = 10;
/// `CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT`.
pub(crate) const GRAPH_MEMORY_RESERVED: c_int = 2;
/// `CU_STREAM_NON_BLOCKING`: does not wait for the legacy default stream.
pub(crate) const STREAM_NON_BLOCKING: u32 = 1;
/// `CU_POINTER_ATTRIBUTE_IS_MANAGED`.
pub(crate) const POINTER_IS_MANAGED: c_int = 8;
/// `CU_STREAM_PER_THREAD`.
pub(crate) const STREAM_PER_THREAD: usize = 2;

/// `CUmemLocation`, passed by value.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct CUmemLocation {
    kind: c_int,
    pub(crate) id: c_int,
}

impl CUmemLocation {
    /// What kind of place it is (`CUmemLocationType`).
    pub(crate) fn kind(self) -> u32 {
        self.kind as u32
    }
}

/// `CUmemPoolProps`, 88 bytes since it exists.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct CUmemPoolProps {
    pub(crate) kind: u32,
    pub(crate) handle_types: u32,
    pub(crate) location: CUmemLocation,
    pub(crate) security: usize,
    pub(crate) max_size: usize,
    /// Usage and fields that only newer drivers know.
    pub(crate) rest: [u8; 56],
}

impl CUmemPoolProps {
    /// A pool of managed memory that belongs on a device.
    pub(crate) fn of_managed_memory(device: CUdevice) -> Self {
        let location = CUmemLocation { kind: LOCATION_DEVICE as c_int, id: device };
        Self {
            kind: MANAGED_MEMORY,
            handle_types: NO_HANDLE,
            location,
            security: 0,
            max_size: 0,
            rest: [0; 56],
        }
    }
}

/// `CUDA_MEM_ALLOC_NODE_PARAMS`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct CUmemAllocNodeParams {
    pool: CUmemPoolProps,
    access: Ptr,
    access_count: usize,
    pub(crate) bytes: usize,
    address: CUdeviceptr,
}

/// The beginning of `CUgraphNodeParams` for a node that allocates.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct CUgraphNodeParams {
    pub(crate) kind: c_int,
    reserved: [c_int; 3],
    /// Only if `kind` is [`NODE_MEM_ALLOC`].
    pub(crate) allocation: CUmemAllocNodeParams,
}

/// `CUDA_ARRAY3D_DESCRIPTOR`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct CUarray3DDescriptor {
    pub(crate) width: usize,
    pub(crate) height: usize,
    pub(crate) depth: usize,
    pub(crate) format: u32,
    pub(crate) channels: u32,
    pub(crate) flags: u32,
}

/// `CUDA_ARRAY_DESCRIPTOR`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct CUarrayDescriptor {
    pub(crate) width: usize,
    pub(crate) height: usize,
    pub(crate) format: u32,
    pub(crate) channels: u32,
}

/// `CUipcMemHandle`, passed by value.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct CUipcMemHandle([u8; 64]);

const _: () = assert!(size_of::<CUmemPoolProps>() == 88);
const _: () = assert!(std::mem::offset_of!(CUmemAllocNodeParams, bytes) == 104);
const _: () = assert!(std::mem::offset_of!(CUgraphNodeParams, allocation) == 16);

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
