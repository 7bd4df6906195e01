//! Types and numbers of the CUDA driver's C interface, as far as the simulated driver uses them (cuda.h 13.0).

use std::ffi::{CStr, c_char, c_void};

/// A driver result code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct CUresult(pub(crate) u32);

/// What the body of a driver function ends with.
pub(crate) type Outcome<T = ()> = Result<T, CUresult>;

macro_rules! results {
    ($($name:ident = $code:literal, $c:literal, $text:literal;)* ; $($other:literal, $oc:literal, $otext:literal;)*) => {
        $(pub(crate) const $name: CUresult = CUresult($code);)*
        /// (code, name of the constant, description); every string ends with a NUL.
        pub(crate) static RESULTS: &[(u32, &str, &str)] = &[
            $(($code, concat!($c, "\0"), concat!($text, "\0")),)*
            $(($other, concat!($oc, "\0"), concat!($otext, "\0")),)*
        ];
    };
}

results! {
    SUCCESS = 0, "CUDA_SUCCESS", "no error";
    INVALID_VALUE = 1, "CUDA_ERROR_INVALID_VALUE", "invalid argument";
    OUT_OF_MEMORY = 2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory";
    NOT_INITIALIZED = 3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error";
    NO_DEVICE = 100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected";
    INVALID_DEVICE = 101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal";
    INVALID_IMAGE = 200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid";
    INVALID_CONTEXT = 201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context";
    NO_BINARY_FOR_GPU = 209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device";
    PEER_ACCESS_UNSUPPORTED = 217, "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "peer access is not supported between these two devices";
    FILE_NOT_FOUND = 301, "CUDA_ERROR_FILE_NOT_FOUND", "file not found";
    INVALID_HANDLE = 400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle";
    NOT_FOUND = 500, "CUDA_ERROR_NOT_FOUND", "named symbol not found";
    NOT_READY = 600, "CUDA_ERROR_NOT_READY", "device not ready";
    ILLEGAL_ADDRESS = 700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered";
    CONTEXT_IS_DESTROYED = 709, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed";
    HOST_MEMORY_ALREADY_REGISTERED = 712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped";
    HOST_MEMORY_NOT_REGISTERED = 713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region";
    NOT_SUPPORTED = 801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported";
    STREAM_CAPTURE_UNSUPPORTED = 900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing";
    STREAM_CAPTURE_INVALIDATED = 901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture";
    STREAM_CAPTURE_MERGE = 902, "CUDA_ERROR_STREAM_CAPTURE_MERGE", "operation would result in a merge of separate capture sequences";
    STREAM_CAPTURE_UNMATCHED = 903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began";
    STREAM_CAPTURE_UNJOINED = 904, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work";
    STREAM_CAPTURE_IMPLICIT = 906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "operation would make the legacy stream depend on a capturing blocking stream";
    CAPTURED_EVENT = 907, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream";
    STREAM_CAPTURE_WRONG_THREAD = 908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "attempt to terminate a thread-local capture sequence from another thread";
    UNKNOWN = 999, "CUDA_ERROR_UNKNOWN", "unknown error";
    ;
    4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down";
    46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable";
    205, "CUDA_ERROR_MAP_FAILED", "mapping of buffer object failed";
    215, "CUDA_ERROR_CONTEXT_ALREADY_IN_USE", "exclusive-thread device already in use by a different thread";
    304, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS";
    401, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state";
    701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch";
    702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated";
    704, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", "peer access is already enabled";
    705, "CUDA_ERROR_PEER_ACCESS_NOT_ENABLED", "peer access has not been enabled";
    800, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted";
    905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream";
    218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed";
    708, "CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE", "cannot set while device is active in this process";
    719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure";
}

/// An output pointer as a C caller passes it: null, or room for one `T`.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Out<T>(*mut T);

// SAFETY: the caller of the driver lends the target for the length of the call, whichever thread the body runs on.
unsafe impl<T> Send for Out<T> {}

impl<T> Out<T> {
    pub(crate) fn from_raw(pointer: *mut T) -> Self {
        Self(pointer)
    }

    pub(crate) fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// Stores `value`; a null pointer is the caller's mistake.
    pub(crate) fn set(self, value: T) -> Outcome {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: not null, and the C contract says that it points to room for one value (not always aligned).
        unsafe { self.0.write_unaligned(value) };
        Ok(())
    }

    /// Stores `value` where the caller wants to know it.
    pub(crate) fn set_optional(self, value: T) {
        if !self.0.is_null() {
            // SAFETY: as in `set`.
            unsafe { self.0.write_unaligned(value) };
        }
    }

    /// Stores into element `index` of the array the caller passed.
    pub(crate) fn set_at(self, index: usize, value: T) -> Outcome {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the C contract gives the array's length with it, and callers of this function stay below it.
        unsafe { self.0.add(index).write_unaligned(value) };
        Ok(())
    }
}

impl<T: Copy> Out<T> {
    /// Reads the current value (for in-out parameters).
    pub(crate) fn get(self) -> Outcome<T> {
        In(self.0.cast_const()).get()
    }
}

/// An input pointer as a C caller passes it: null, or one or more readable `T`.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(crate) struct In<T>(*const T);

// SAFETY: as for `Out`.
unsafe impl<T> Send for In<T> {}

impl<T: Copy> In<T> {
    pub(crate) fn from_raw(pointer: *const T) -> Self {
        Self(pointer)
    }

    pub(crate) fn get(self) -> Outcome<T> {
        self.at(0)
    }

    pub(crate) fn at(self, index: usize) -> Outcome<T> {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: not null, and the C contract says that it points to at least `index + 1` values.
        Ok(unsafe { self.0.add(index).read_unaligned() })
    }
}

/// A C string argument.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Text(*const c_char);

impl Text {
    pub(crate) fn get<'a>(self) -> Outcome<&'a str> {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the C contract says that it is a NUL-terminated string that outlives the call.
        unsafe { CStr::from_ptr(self.0) }.to_str().map_err(|_utf8| INVALID_VALUE)
    }
}

pub(crate) type Device = i32;
pub(crate) type DevicePtr = u64;
/// Every handle is an address that the driver made up and looks up again; it is never dereferenced.
pub(crate) type Handle = usize;
/// `CUhostFn` and the callback of `cuStreamAddCallback`.
pub(crate) type HostFn = extern "C" fn(*mut c_void);
pub(crate) type StreamCallback = extern "C" fn(Handle, u32, *mut c_void);

/// `CUuuid`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Uuid(pub(crate) [u8; 16]);

/// `CUmemLocation`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct MemLocation {
    pub(crate) kind: u32,
    pub(crate) id: i32,
}

/// `CU_MEM_LOCATION_TYPE_*`.
pub(crate) const LOCATION_DEVICE: u32 = 1;
pub(crate) const LOCATION_HOST: u32 = 2;
pub(crate) const LOCATION_HOST_NUMA: u32 = 3;
pub(crate) const LOCATION_HOST_NUMA_CURRENT: u32 = 4;
/// `CU_DEVICE_CPU`.
pub(crate) const DEVICE_CPU: Device = -1;

/// `CUDA_MEMCPY2D` with 64-bit sizes.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Memcpy2D {
    pub(crate) src_x: usize,
    pub(crate) src_y: usize,
    pub(crate) src_type: u32,
    pub(crate) src_host: u64,
    pub(crate) src_device: u64,
    pub(crate) src_array: Handle,
    pub(crate) src_pitch: usize,
    pub(crate) dst_x: usize,
    pub(crate) dst_y: usize,
    pub(crate) dst_type: u32,
    pub(crate) dst_host: u64,
    pub(crate) dst_device: u64,
    pub(crate) dst_array: Handle,
    pub(crate) dst_pitch: usize,
    pub(crate) width: usize,
    pub(crate) height: usize,
}

/// `CUDA_MEMCPY3D` with 64-bit sizes; `CUDA_MEMCPY3D_PEER` has contexts in place of the two `reserved` words.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Memcpy3D {
    pub(crate) src_x: usize,
    pub(crate) src_y: usize,
    pub(crate) src_z: usize,
    pub(crate) src_lod: usize,
    pub(crate) src_type: u32,
    pub(crate) src_host: u64,
    pub(crate) src_device: u64,
    pub(crate) src_array: Handle,
    pub(crate) reserved0: usize,
    pub(crate) src_pitch: usize,
    pub(crate) src_height: usize,
    pub(crate) dst_x: usize,
    pub(crate) dst_y: usize,
    pub(crate) dst_z: usize,
    pub(crate) dst_lod: usize,
    pub(crate) dst_type: u32,
    pub(crate) dst_host: u64,
    pub(crate) dst_device: u64,
    pub(crate) dst_array: Handle,
    pub(crate) reserved1: usize,
    pub(crate) dst_pitch: usize,
    pub(crate) dst_height: usize,
    pub(crate) width: usize,
    pub(crate) height: usize,
    pub(crate) depth: usize,
}

/// `CU_MEMORYTYPE_*`.
pub(crate) const MEMORY_HOST: u32 = 1;
pub(crate) const MEMORY_DEVICE: u32 = 2;
pub(crate) const MEMORY_ARRAY: u32 = 3;
pub(crate) const MEMORY_UNIFIED: u32 = 4;

/// `CUlaunchConfig`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct LaunchConfig {
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared_bytes: u32,
    pub(crate) stream: Handle,
    pub(crate) attributes: *const c_void,
    pub(crate) attribute_count: u32,
}

/// `CUDA_KERNEL_NODE_PARAMS_v2`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct KernelNodeParams {
    pub(crate) function: Handle,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared_bytes: u32,
    pub(crate) params: *const *const c_void,
    pub(crate) extra: *const *const c_void,
    pub(crate) kernel: Handle,
    pub(crate) context: Handle,
}

/// `CUDA_MEMSET_NODE_PARAMS_v1`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct MemsetNodeParams {
    pub(crate) dst: DevicePtr,
    pub(crate) pitch: usize,
    pub(crate) value: u32,
    pub(crate) element_size: u32,
    pub(crate) width: usize,
    pub(crate) height: usize,
}

/// `CUDA_HOST_NODE_PARAMS_v1`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct HostNodeParams {
    pub(crate) function: Option<HostFn>,
    pub(crate) argument: *mut c_void,
}

/// `CUDA_GRAPH_INSTANTIATE_PARAMS`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct GraphInstantiateParams {
    pub(crate) flags: u64,
    pub(crate) upload_stream: Handle,
    pub(crate) error_node: Handle,
    pub(crate) result: u32,
}

/// `CUmemPoolProps`, of which the head is read.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct MemPoolProps {
    pub(crate) allocation_type: u32,
    pub(crate) handle_types: u32,
    pub(crate) location: MemLocation,
}

/// `CUDA_MEM_ALLOC_NODE_PARAMS`; the pool's properties take 88 bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct MemAllocNodeParams {
    pub(crate) pool: MemPoolProps,
    unused: [u64; 9],
    access: usize,
    access_count: usize,
    pub(crate) bytes: usize,
    pub(crate) address: DevicePtr,
}

const _: () = assert!(std::mem::offset_of!(MemAllocNodeParams, bytes) == 104);

/// `CU_MEM_ALLOCATION_TYPE_*`.
pub(crate) const ALLOCATION_PINNED: u32 = 1;
pub(crate) const ALLOCATION_MANAGED: u32 = 2;
