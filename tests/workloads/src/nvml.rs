//! Free memory as NVML sees it: the truth about the card even where a preloaded library answers `cuMemGetInfo`.

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use anyhow::{Result, ensure};

use crate::cuda::Cuda;

#[repr(C)]
#[derive(Default)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// Free bytes of the device with this UUID; `None` where NVML cannot be asked.
fn free_bytes(uuid: [u8; 16]) -> Option<u64> {
    type Init = extern "C" fn() -> c_int;
    type ByUuid = extern "C" fn(*const c_char, *mut *mut c_void) -> c_int;
    type MemoryInfo = extern "C" fn(*mut c_void, *mut Memory) -> c_int;

    let hex = format!("{:032x}", u128::from_be_bytes(uuid));
    let text = format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]);
    let text = CString::new(text).ok()?;
    // SAFETY: the three functions have the types of nvml.h; every pointer outlives its call.
    unsafe {
        let library = libc::dlopen(c"libnvidia-ml.so.1".as_ptr(), libc::RTLD_NOW);
        if library.is_null() {
            return None;
        }
        let find = |name: &CStr| {
            let found = libc::dlsym(library, name.as_ptr());
            (!found.is_null()).then_some(found)
        };
        let init = std::mem::transmute::<*mut c_void, Init>(find(c"nvmlInit_v2")?);
        let by_uuid = std::mem::transmute::<*mut c_void, ByUuid>(find(c"nvmlDeviceGetHandleByUUID")?);
        let info = std::mem::transmute::<*mut c_void, MemoryInfo>(find(c"nvmlDeviceGetMemoryInfo")?);
        let mut device = std::ptr::null_mut();
        let mut memory = Memory::default();
        let ok =
            init() == 0 && by_uuid(text.as_ptr(), &raw mut device) == 0 && info(device, &raw mut memory) == 0;
        ok.then_some(memory.free)
    }
}

/// Fails if the card has less than `wanted` bytes free.
pub(crate) fn refuse_oversubscription(cuda: &Cuda, wanted: u64) -> Result<()> {
    let (told, _) = cuda.memory()?;
    let free = free_bytes(cuda.uuid).map_or(told, |seen| seen.min(told));
    ensure!(
        wanted <= free,
        "{} has {} MiB free and this program would take {} MiB. Filling a real GPU beyond its memory can hang it; take \
         less, or pass --allow-oversubscription",
        cuda.device_name,
        free >> 20,
        wanted >> 20
    );
    Ok(())
}
