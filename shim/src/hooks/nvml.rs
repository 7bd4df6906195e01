//! NVML's word on memory, which frameworks and monitors compare with the driver's: both tell a program the same.
//!
//! A GPU that this process does not use is shown as it is, within the process's limit.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_ulonglong},
    mem::transmute,
};

use nvshare_wire::GpuUuid;

use super::or_original;
use crate::{
    abi::{Ptr, SUCCESS},
    config,
    loader::NVML,
    memory, state,
    table::Real,
};

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Debug)]
pub struct Memory {
    total: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

/// `nvmlMemory_v2_t`.
#[repr(C)]
#[derive(Debug)]
pub struct MemoryV2 {
    version: c_uint,
    total: c_ulonglong,
    reserved: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

type Call<T> = unsafe extern "C-unwind" fn(Ptr, *mut T) -> c_int;

static INFORMATION: Real = Real::of(&NVML, c"nvmlDeviceGetMemoryInfo");
static INFORMATION_V2: Real = Real::of(&NVML, c"nvmlDeviceGetMemoryInfo_v2");
/// `NVML_ERROR_FUNCTION_NOT_FOUND`.
const NOT_FOUND: c_int = 13;
/// `NVML_DEVICE_UUID_V2_BUFFER_SIZE`.
const UUID_BYTES: usize = 96;

/// The wrapper of a function of NVML, and the function.
pub(crate) fn by_symbol(symbol: &CStr) -> Option<(Ptr, &'static Real)> {
    [
        (nvmlDeviceGetMemoryInfo as *const () as Ptr, &INFORMATION),
        (nvmlDeviceGetMemoryInfo_v2 as *const () as Ptr, &INFORMATION_V2),
    ]
    .into_iter()
    .find(|(_, real)| real.symbol() == symbol)
}

/// Runs the library's own function, and then `tell` on what it stored.
fn told<T>(real: &Real, device: Ptr, place: *mut T, tell: impl FnOnce(&mut T)) -> c_int {
    let Some(address) = real.get() else { return NOT_FOUND };
    // SAFETY: the symbol has this type in every NVML that exports it, and the caller keeps its contract.
    let code = unsafe { transmute::<Ptr, Call<T>>(address)(device, place) };
    if code == SUCCESS && !config::get().disabled {
        // SAFETY: null, or the library has just stored figures there.
        if let Some(figures) = unsafe { place.as_mut() } {
            or_original(|| tell(figures), || ());
        }
    }
    code
}

/// (free, total) of a device as its user is told, from what NVML says.
fn figures(device: Ptr, free: u64, total: u64) -> (u64, u64) {
    let slot = uuid(device).and_then(|uuid| state::get().devices.slot_of_uuid(&uuid));
    slot.and_then(|slot| memory::information_of(slot, total)).unwrap_or_else(|| {
        let told = memory::told_total(total);
        (free.min(told), told)
    })
}

/// The identity of a device of NVML.
fn uuid(device: Ptr) -> Option<GpuUuid> {
    type GetUuid = unsafe extern "C-unwind" fn(Ptr, *mut c_char, c_uint) -> c_int;
    static UUID: Real = Real::of(&NVML, c"nvmlDeviceGetUUID");
    let mut text: [c_char; UUID_BYTES] = [0; UUID_BYTES];
    // SAFETY: the symbol has this type; the buffer is live and of the given length.
    let code =
        unsafe { transmute::<Ptr, GetUuid>(UUID.get()?)(device, text.as_mut_ptr(), UUID_BYTES as c_uint) };
    if code != SUCCESS {
        return None;
    }
    *text.last_mut()? = 0;
    // SAFETY: it ends with a zero at the latest in its last place.
    parse(unsafe { CStr::from_ptr(text.as_ptr()) }.to_bytes())
}

/// `GPU-` or `MIG-` and 32 hexadecimal digits in groups.
fn parse(text: &[u8]) -> Option<GpuUuid> {
    let digits = text.strip_prefix(b"GPU-").or_else(|| text.strip_prefix(b"MIG-"))?;
    let mut nibbles = digits.iter().filter(|&&byte| byte != b'-').map(|&byte| (byte as char).to_digit(16));
    let mut uuid = [0; 16];
    for byte in &mut uuid {
        *byte = (nibbles.next()?? << 4 | nibbles.next()??) as u8;
    }
    nibbles.next().is_none().then_some(uuid)
}

/// As NVML's function of this name.
///
/// # Safety
/// As for NVML's function.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C-unwind" fn nvmlDeviceGetMemoryInfo(device: Ptr, memory: *mut Memory) -> c_int {
    told(&INFORMATION, device, memory, |memory| {
        (memory.free, memory.total) = figures(device, memory.free, memory.total);
        memory.used = memory.total - memory.free;
    })
}

/// As NVML's function of this name.
///
/// # Safety
/// As for NVML's function.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C-unwind" fn nvmlDeviceGetMemoryInfo_v2(device: Ptr, memory: *mut MemoryV2) -> c_int {
    told(&INFORMATION_V2, device, memory, |memory| {
        (memory.free, memory.total) = figures(device, memory.free, memory.total);
        memory.used = (memory.total - memory.free).saturating_sub(memory.reserved);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_identity_of_a_gpu_and_of_an_instance_is_read() {
        let mut expected = [0x11; 16];
        expected[15] = 0xaf;
        assert_eq!(parse(b"GPU-11111111-1111-1111-1111-1111111111af"), Some(expected));
        assert_eq!(parse(b"MIG-11111111-1111-1111-1111-1111111111AF"), Some(expected));
        for bad in [&b"GPU-11"[..], b"GPU-11111111-1111-1111-1111-1111111111zz", b"", b"0000:01:00.0"] {
            assert_eq!(parse(bad), None);
        }
        assert_eq!(parse(b"GPU-11111111-1111-1111-1111-1111111111af0"), None, "too long");
    }
}
