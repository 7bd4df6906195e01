//! The driver functions that the shim calls on its own account, past its own hooks.

use std::{
    ffi::{c_int, c_uint, c_void},
    mem::transmute,
    ptr,
};

use crate::{
    abi::{
        ATTACH_GLOBAL, CAPTURE_RELAXED, CUdevice, CUdeviceptr, CUmemPoolProps, CUresult, Flavour,
        GRAPH_MEMORY_RESERVED, INVALID_CONTEXT, MEMORY_HOST, NO_DRIVER, NOT_CAPTURING, POINTER_IS_MANAGED,
        POINTER_MEMORY_TYPE, Ptr, STREAM_NON_BLOCKING, SUCCESS,
    },
    table::Real,
};

/// Calls the driver's `$symbol`; the result is an error where the driver has no such function.
macro_rules! call {
    ($symbol:literal ( $($arg:expr),* ) : fn( $($ty:ty),* )) => {{
        static REAL: Real = Real::new($symbol);
        match REAL.get() {
            None => Err(NO_DRIVER),
            Some(address) => {
                // SAFETY: the type is that of `cuda.h` for this symbol.
                let real = unsafe { transmute::<*mut c_void, unsafe extern "C" fn($($ty),*) -> CUresult>(address) };
                // SAFETY: every pointer is to a live local of the right type; the driver checks handles.
                match unsafe { real($($arg),*) } {
                    SUCCESS => Ok(()),
                    code => Err(code),
                }
            }
        }
    }};
}

type Outcome<T = ()> = Result<T, CUresult>;

/// The device of the calling thread's current context.
pub(crate) fn current_device() -> Outcome<CUdevice> {
    let mut device = 0;
    call!(c"cuCtxGetDevice"(&raw mut device): fn(*mut CUdevice)).map(|()| device)
}

/// The UUID of a device, or of the MIG instance that it is.
pub(crate) fn uuid(device: CUdevice) -> Outcome<[u8; 16]> {
    let mut uuid = [0u8; 16];
    call!(c"cuDeviceGetUuid_v2"(uuid.as_mut_ptr(), device): fn(*mut u8, CUdevice))
        .or_else(|_| call!(c"cuDeviceGetUuid"(uuid.as_mut_ptr(), device): fn(*mut u8, CUdevice)))
        .map(|()| uuid)
}

/// Bytes of memory on a device.
pub(crate) fn total_memory(device: CUdevice) -> Outcome<u64> {
    let mut bytes = 0usize;
    call!(c"cuDeviceTotalMem_v2"(&raw mut bytes, device): fn(*mut usize, CUdevice)).map(|()| bytes as u64)
}

/// Allocates managed memory that every stream may use.
pub(crate) fn allocate_managed(size: usize) -> Outcome<CUdeviceptr> {
    let mut address = 0;
    call!(c"cuMemAllocManaged"(&raw mut address, size, ATTACH_GLOBAL): fn(*mut CUdeviceptr, usize, c_uint))
        .map(|()| address)
}

/// The calling thread's current context; an error if there is none.
pub(crate) fn current_context() -> Outcome<Ptr> {
    let mut context: Ptr = ptr::null_mut();
    call!(c"cuCtxGetCurrent"(&raw mut context): fn(*mut Ptr))?;
    if context.is_null() { Err(INVALID_CONTEXT) } else { Ok(context) }
}

/// Free and total bytes of the current device, as the driver counts them.
pub(crate) fn memory_information() -> Outcome<(u64, u64)> {
    let (mut free, mut total) = (0usize, 0usize);
    call!(c"cuMemGetInfo_v2"(&raw mut free, &raw mut total): fn(*mut usize, *mut usize))
        .map(|()| (free as u64, total as u64))
}

/// Makes a stream in the current context that orders itself by no other.
pub(crate) fn make_stream() -> Outcome<Ptr> {
    let mut stream: Ptr = ptr::null_mut();
    call!(c"cuStreamCreate"(&raw mut stream, STREAM_NON_BLOCKING): fn(*mut Ptr, c_uint)).map(|()| stream)
}

/// Destroys a stream of ours in the current context, which nothing uses.
pub(crate) fn destroy_stream(stream: Ptr) {
    // A stream that cannot be destroyed goes with its context.
    let _kept = call!(c"cuStreamDestroy_v2"(stream): fn(Ptr));
}

/// Moves managed memory to a device or, with [`crate::abi::HOST`], off it; populates what was never touched.
pub(crate) fn prefetch_to(device: CUdevice, address: CUdeviceptr, bytes: usize, stream: Ptr) -> Outcome {
    call!(c"cuMemPrefetchAsync"(address, bytes, device, stream): fn(CUdeviceptr, usize, CUdevice, Ptr))
}

/// Waits until a stream of ours has done all that it was given.
pub(crate) fn wait_for(stream: Ptr) -> Outcome {
    call!(c"cuStreamSynchronize"(stream): fn(Ptr))
}

/// Copies to managed memory of ours.
pub(crate) fn copy_in(to: CUdeviceptr, from: &[u32], stream: Ptr) -> Outcome {
    let bytes = size_of_val(from);
    call!(c"cuMemcpyHtoDAsync_v2"(to, from.as_ptr().cast(), bytes, stream):
        fn(CUdeviceptr, *const c_void, usize, Ptr))
}

/// Copies from managed memory of ours.
pub(crate) fn copy_out(to: &mut [u32], from: CUdeviceptr, stream: Ptr) -> Outcome {
    let bytes = size_of_val(to);
    call!(c"cuMemcpyDtoHAsync_v2"(to.as_mut_ptr().cast(), from, bytes, stream):
        fn(*mut c_void, CUdeviceptr, usize, Ptr))
}

/// Frees managed memory of ours.
pub(crate) fn free_managed(address: CUdeviceptr) -> Outcome {
    call!(c"cuMemFree_v2"(address): fn(CUdeviceptr))
}

/// Makes a memory pool.
pub(crate) fn make_pool(properties: &CUmemPoolProps) -> Outcome<Ptr> {
    let mut pool: Ptr = ptr::null_mut();
    call!(c"cuMemPoolCreate"(&raw mut pool, ptr::from_ref(properties)): fn(*mut Ptr, *const CUmemPoolProps))
        .map(|()| pool)
}

/// Allocates from a pool in stream order.
pub(crate) fn allocate_from(pool: Ptr, bytes: usize, stream: Ptr, flavour: Flavour) -> Outcome<CUdeviceptr> {
    let mut address = 0;
    match flavour {
        Flavour::Legacy => call!(c"cuMemAllocFromPoolAsync"(&raw mut address, bytes, pool, stream):
            fn(*mut CUdeviceptr, usize, Ptr, Ptr)),
        Flavour::PerThread => call!(c"cuMemAllocFromPoolAsync_ptsz"(&raw mut address, bytes, pool, stream):
            fn(*mut CUdeviceptr, usize, Ptr, Ptr)),
    }
    .map(|()| address)
}

/// Bytes that the memory nodes of graphs hold on a device.
pub(crate) fn graph_memory(device: CUdevice) -> Outcome<u64> {
    let mut bytes = 0u64;
    call!(c"cuDeviceGetGraphMemAttribute"(device, GRAPH_MEMORY_RESERVED, &raw mut bytes):
        fn(CUdevice, c_int, *mut u64))
    .map(|()| bytes)
}

/// Whether an address is managed memory.
pub(crate) fn is_managed(address: CUdeviceptr) -> Outcome<bool> {
    let mut managed: c_uint = 0;
    call!(c"cuPointerGetAttribute"((&raw mut managed).cast(), POINTER_IS_MANAGED, address):
        fn(*mut c_void, c_int, CUdeviceptr))
    .map(|()| managed != 0)
}

/// Whether a stream is being captured. An error counts as yes: the driver gives one for the legacy stream
/// while another capture forbids its use.
pub(crate) fn is_capturing(stream: Ptr, flavour: Flavour) -> bool {
    let mut status: c_int = NOT_CAPTURING;
    let outcome = match flavour {
        Flavour::Legacy => call!(c"cuStreamIsCapturing"(stream, &raw mut status): fn(Ptr, *mut c_int)),
        Flavour::PerThread => {
            call!(c"cuStreamIsCapturing_ptsz"(stream, &raw mut status): fn(Ptr, *mut c_int))
        }
    };
    match outcome {
        Ok(()) => status != NOT_CAPTURING,
        Err(NO_DRIVER) => false,
        Err(_) => true,
    }
}

/// Lets the calling thread use calls that another thread's capture would forbid it.
pub(crate) fn relax_captures() -> Outcome {
    let mut mode = CAPTURE_RELAXED;
    call!(c"cuThreadExchangeStreamCaptureMode"(&raw mut mode): fn(*mut c_int))
}

/// Whether an address is ordinary or pinned host memory.
pub(crate) fn is_host_memory(address: CUdeviceptr) -> bool {
    let mut kind: c_uint = 0;
    let known = call!(c"cuPointerGetAttribute"((&raw mut kind).cast(), POINTER_MEMORY_TYPE, address):
        fn(*mut c_void, c_int, CUdeviceptr));
    match known {
        // Managed memory is never plain host memory, wherever it lies.
        Ok(()) => kind == MEMORY_HOST && is_managed(address) == Ok(false),
        // The driver does not know addresses that it never gave out.
        Err(code) => code == crate::abi::INVALID_VALUE,
    }
}

/// Whether a device's primary context is alive.
pub(crate) fn primary_is_active(device: CUdevice) -> bool {
    let (mut flags, mut active) = (0, 0);
    call!(c"cuDevicePrimaryCtxGetState"(device, &raw mut flags, &raw mut active):
        fn(CUdevice, *mut c_uint, *mut c_int))
    .is_ok()
        && active != 0
}

/// Retains a device's primary context.
pub(crate) fn retain_primary(device: CUdevice) -> Outcome<Ptr> {
    let mut context: Ptr = ptr::null_mut();
    call!(c"cuDevicePrimaryCtxRetain"(&raw mut context, device): fn(*mut Ptr, CUdevice)).map(|()| context)
}

/// Releases it once.
pub(crate) fn release_primary(device: CUdevice) -> Outcome {
    call!(c"cuDevicePrimaryCtxRelease_v2"(device): fn(CUdevice))
        .or_else(|_| call!(c"cuDevicePrimaryCtxRelease"(device): fn(CUdevice)))
}

/// The context of a stream.
pub(crate) fn context_of(stream: Ptr, flavour: Flavour) -> Outcome<Ptr> {
    let mut context: Ptr = ptr::null_mut();
    match flavour {
        Flavour::Legacy => call!(c"cuStreamGetCtx"(stream, &raw mut context): fn(Ptr, *mut Ptr)),
        Flavour::PerThread => call!(c"cuStreamGetCtx_ptsz"(stream, &raw mut context): fn(Ptr, *mut Ptr)),
    }
    .map(|()| context)
}

/// Waits until everything submitted to a context has finished.
pub(crate) fn synchronise(context: Ptr) -> Outcome {
    within(context, || call!(c"cuCtxSynchronize"(): fn()))?
}

/// Does something with a context as the calling thread's current one.
pub(crate) fn within<T>(context: Ptr, work: impl FnOnce() -> T) -> Outcome<T> {
    call!(c"cuCtxPushCurrent_v2"(context): fn(Ptr))?;
    let result = work();
    let mut popped: Ptr = ptr::null_mut();
    call!(c"cuCtxPopCurrent_v2"(&raw mut popped): fn(*mut Ptr))?;
    Ok(result)
}
