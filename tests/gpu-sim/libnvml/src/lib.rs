//! `libnvidia-ml.so.1` of the simulated GPU: what a monitor asks about cards, memory and processes, answered from the
//! state that the simulator shares.
//!
//! Functions that are not here are missing symbols, as in an old driver; clients of NVML take that as "not found".
//! Queries that make no sense for a simulated card answer `NVML_ERROR_NOT_SUPPORTED`.

use std::{
    ffi::{CStr, c_char, c_uint},
    ptr::NonNull,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Instant,
};

use nvshare_gpu_sim_model::client::{GpuInfo, Host};

/// `nvmlReturn_t`.
type Status = u32;
const SUCCESS: Status = 0;
const UNINITIALIZED: Status = 1;
const INVALID_ARGUMENT: Status = 2;
const NOT_SUPPORTED: Status = 3;
const NOT_FOUND: Status = 6;
const INSUFFICIENT_SIZE: Status = 7;
const DRIVER_NOT_LOADED: Status = 9;
const GPU_IS_LOST: Status = 15;

/// CUDA 13.0, as `nvmlSystemGetCudaDriverVersion` says it.
const CUDA_VERSION: i32 = 13000;

/// What NVML averages utilisation over is up to the driver; here it is the time since the last query, at least this.
const UTILISATION_NS: u64 = 100_000_000;

struct Nvml {
    host: Host,
    gpus: Vec<GpuInfo>,
    utilisation: Vec<Utilisation>,
}

/// The last utilisation figure of a card and the reading it ends at.
struct Utilisation {
    read: Instant,
    busy_ns: u64,
    percent: u32,
}

static NVML: Mutex<Option<Nvml>> = Mutex::new(None);
static USERS: AtomicU32 = AtomicU32::new(0);

/// A device handle: the card's index plus one, never dereferenced.
type Device = usize;

type Outcome<T = ()> = Result<T, Status>;

fn nvml() -> MutexGuard<'static, Option<Nvml>> {
    NVML.lock().unwrap_or_else(PoisonError::into_inner)
}

fn answer(body: impl FnOnce() -> Outcome) -> Status {
    match body() {
        Ok(()) => SUCCESS,
        Err(status) => status,
    }
}

fn with<T>(body: impl FnOnce(&mut Nvml) -> Outcome<T>) -> Outcome<T> {
    body(nvml().as_mut().ok_or(UNINITIALIZED)?)
}

fn with_device(device: Device, body: impl FnOnce(&mut Nvml, usize) -> Outcome) -> Status {
    answer(|| {
        with(|nvml| {
            let index =
                device.checked_sub(1).filter(|&index| index < nvml.gpus.len()).ok_or(INVALID_ARGUMENT)?;
            if nvml.host.is_lost(index) {
                return Err(GPU_IS_LOST);
            }
            body(nvml, index)
        })
    })
}

fn put<T>(to: *mut T, value: T) -> Outcome {
    let to = NonNull::new(to).ok_or(INVALID_ARGUMENT)?;
    // SAFETY: not null, and the C contract says that it points to room for one value.
    unsafe { to.write(value) };
    Ok(())
}

/// Copies a string with its NUL; the caller's room must suffice.
fn put_text(to: *mut c_char, room: c_uint, text: &str) -> Outcome {
    let to = NonNull::new(to).ok_or(INVALID_ARGUMENT)?;
    if text.len() >= room as usize {
        return Err(INSUFFICIENT_SIZE);
    }
    for (index, byte) in text.bytes().chain([0]).enumerate() {
        // SAFETY: below `room`, which the caller owns.
        unsafe { to.add(index).write(byte.cast_signed()) };
    }
    Ok(())
}

fn text<'a>(from: *const c_char) -> Outcome<&'a str> {
    if from.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: not null, and the C contract says that it is a NUL-terminated string.
    unsafe { CStr::from_ptr(from) }.to_str().map_err(|_utf8| INVALID_ARGUMENT)
}

fn uuid(gpu: &GpuInfo) -> String {
    let hex = format!("{:032x}", u128::from_be_bytes(gpu.uuid));
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

fn initialise() -> Status {
    answer(|| {
        let mut nvml = nvml();
        if nvml.is_none() {
            let host = Host::open().map_err(|error| {
                eprintln!("nvshare-gpu-sim libnvidia-ml: no simulated GPU: {error}");
                DRIVER_NOT_LOADED
            })?;
            let gpus = host.gpus();
            let utilisation = gpus
                .iter()
                .map(|gpu| Utilisation { read: Instant::now(), busy_ns: host.busy_ns(gpu.index), percent: 0 })
                .collect();
            *nvml = Some(Nvml { host, gpus, utilisation });
        }
        USERS.fetch_add(1, Ordering::Relaxed);
        Ok(())
    })
}

/// `nvmlInit_v2`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> Status {
    initialise()
}

/// `nvmlInitWithFlags`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlInitWithFlags(_flags: c_uint) -> Status {
    initialise()
}

/// `nvmlShutdown`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> Status {
    answer(|| {
        let mut nvml = nvml();
        if nvml.is_none() {
            return Err(UNINITIALIZED);
        }
        if USERS.fetch_sub(1, Ordering::Relaxed) == 1 {
            *nvml = None;
        }
        Ok(())
    })
}

/// `nvmlErrorString`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlErrorString(status: Status) -> *const c_char {
    let text = match status {
        SUCCESS => c"Success",
        UNINITIALIZED => c"Uninitialized",
        INVALID_ARGUMENT => c"Invalid Argument",
        NOT_SUPPORTED => c"Not Supported",
        NOT_FOUND => c"Not Found",
        INSUFFICIENT_SIZE => c"Insufficient Size",
        DRIVER_NOT_LOADED => c"Driver Not Loaded",
        GPU_IS_LOST => c"GPU is lost",
        _ => c"Unknown Error",
    };
    text.as_ptr()
}

/// `nvmlSystemGetDriverVersion`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlSystemGetDriverVersion(version: *mut c_char, room: c_uint) -> Status {
    answer(|| with(|nvml| put_text(version, room, &nvml.host.driver_version())))
}

/// `nvmlSystemGetNVMLVersion`: the driver's branch with CUDA's major version before it, as NVML itself says it.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlSystemGetNVMLVersion(version: *mut c_char, room: c_uint) -> Status {
    answer(|| with(|nvml| put_text(version, room, &format!("13.{}", nvml.host.driver_version()))))
}

/// `nvmlSystemGetCudaDriverVersion`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlSystemGetCudaDriverVersion(version: *mut i32) -> Status {
    answer(|| put(version, CUDA_VERSION))
}

/// `nvmlSystemGetCudaDriverVersion_v2`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlSystemGetCudaDriverVersion_v2(version: *mut i32) -> Status {
    answer(|| put(version, CUDA_VERSION))
}

/// `nvmlDeviceGetCount_v2`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetCount_v2(count: *mut c_uint) -> Status {
    answer(|| with(|nvml| put(count, nvml.gpus.len() as c_uint)))
}

/// `nvmlDeviceGetHandleByIndex_v2`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: *mut Device) -> Status {
    answer(|| {
        with(|nvml| {
            if index as usize >= nvml.gpus.len() {
                return Err(INVALID_ARGUMENT);
            }
            if nvml.host.is_lost(index as usize) {
                return Err(GPU_IS_LOST);
            }
            put(device, index as usize + 1)
        })
    })
}

/// `nvmlDeviceGetHandleByUUID`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetHandleByUUID(name: *const c_char, device: *mut Device) -> Status {
    answer(|| {
        let wanted = text(name)?;
        with(|nvml| {
            let index = nvml.gpus.iter().position(|gpu| uuid(gpu) == wanted).ok_or(NOT_FOUND)?;
            put(device, index + 1)
        })
    })
}

/// `nvmlDeviceGetHandleByPciBusId_v2`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetHandleByPciBusId_v2(name: *const c_char, device: *mut Device) -> Status {
    answer(|| {
        let wanted = text(name)?.to_ascii_lowercase();
        with(|nvml| {
            let index = nvml
                .gpus
                .iter()
                .position(|gpu| {
                    let (domain, bus, slot) = gpu.pci;
                    let short = format!("{domain:04x}:{bus:02x}:{slot:02x}.0");
                    wanted == short || wanted == format!("0000{short}")
                })
                .ok_or(NOT_FOUND)?;
            put(device, index + 1)
        })
    })
}

/// `nvmlDeviceGetIndex`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetIndex(device: Device, index: *mut c_uint) -> Status {
    with_device(device, |_, gpu| put(index, gpu as c_uint))
}

/// `nvmlDeviceGetName`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetName(device: Device, name: *mut c_char, room: c_uint) -> Status {
    with_device(device, |nvml, gpu| put_text(name, room, &nvml.gpus[gpu].name))
}

/// `nvmlDeviceGetUUID`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetUUID(device: Device, name: *mut c_char, room: c_uint) -> Status {
    with_device(device, |nvml, gpu| put_text(name, room, &uuid(&nvml.gpus[gpu])))
}

/// `nvmlMemory_t`; bytes.
#[repr(C)]
#[derive(Debug)]
pub struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// `nvmlMemory_v2_t`; bytes.
#[repr(C)]
#[derive(Debug)]
pub struct MemoryV2 {
    version: c_uint,
    total: u64,
    reserved: u64,
    free: u64,
    used: u64,
}

/// `nvmlDeviceGetMemoryInfo`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetMemoryInfo(device: Device, memory: *mut Memory) -> Status {
    with_device(device, |nvml, gpu| {
        let (free, total) = nvml.host.mem_info(gpu);
        put(memory, Memory { total, free, used: total - free.min(total) })
    })
}

/// `nvmlDeviceGetMemoryInfo_v2`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetMemoryInfo_v2(device: Device, memory: *mut MemoryV2) -> Status {
    /// `NVML_STRUCT_VERSION(Memory, 2)`.
    const VERSION: c_uint = size_of::<MemoryV2>() as c_uint | (2 << 24);
    with_device(device, |nvml, gpu| {
        let memory = NonNull::new(memory).ok_or(INVALID_ARGUMENT)?;
        // SAFETY: not null; the caller sets the version of its own structure.
        if unsafe { (*memory.as_ptr()).version } != VERSION {
            return Err(25); // NVML_ERROR_ARGUMENT_VERSION_MISMATCH
        }
        let (free, total) = nvml.host.mem_info(gpu);
        put(
            memory.as_ptr(),
            MemoryV2 { version: VERSION, total, reserved: 0, free, used: total - free.min(total) },
        )
    })
}

/// `nvmlUtilization_t`; percent.
#[repr(C)]
#[derive(Debug)]
pub struct UtilizationRates {
    gpu: c_uint,
    memory: c_uint,
}

/// `nvmlDeviceGetUtilizationRates`. The share of the time in which the card computed since the last figure.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetUtilizationRates(device: Device, rates: *mut UtilizationRates) -> Status {
    with_device(device, |nvml, gpu| {
        let last = &mut nvml.utilisation[gpu];
        let elapsed = last.read.elapsed().as_nanos() as u64;
        if elapsed >= UTILISATION_NS {
            let busy_ns = nvml.host.busy_ns(gpu);
            let busy = busy_ns.saturating_sub(last.busy_ns).min(elapsed);
            *last = Utilisation { read: Instant::now(), busy_ns, percent: (busy * 100 / elapsed) as u32 };
        }
        put(rates, UtilizationRates { gpu: last.percent, memory: 0 })
    })
}

/// `nvmlProcessInfo_t` (v2 and v3); bytes.
#[repr(C)]
#[derive(Debug)]
pub struct ProcessInfo {
    pid: c_uint,
    used_gpu_memory: u64,
    gpu_instance_id: c_uint,
    compute_instance_id: c_uint,
}

fn processes(device: Device, count: *mut c_uint, infos: *mut ProcessInfo) -> Status {
    with_device(device, |nvml, gpu| {
        let count = NonNull::new(count).ok_or(INVALID_ARGUMENT)?;
        let running = nvml.host.processes(gpu);
        // SAFETY: not null; in: the room of the array, out: the number of processes.
        let room = unsafe { count.read() } as usize;
        put(count.as_ptr(), running.len() as c_uint)?;
        if room < running.len() {
            return Err(INSUFFICIENT_SIZE);
        }
        for (index, process) in running.iter().enumerate() {
            let info = ProcessInfo {
                pid: process.pid,
                used_gpu_memory: process.plain_bytes,
                gpu_instance_id: c_uint::MAX,
                compute_instance_id: c_uint::MAX,
            };
            put(infos.wrapping_add(index), info)?;
        }
        Ok(())
    })
}

/// `nvmlDeviceGetComputeRunningProcesses_v3`. As on the hardware, managed memory is in nobody's figure.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    device: Device,
    count: *mut c_uint,
    infos: *mut ProcessInfo,
) -> Status {
    processes(device, count, infos)
}

/// `nvmlDeviceGetComputeRunningProcesses_v2`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetComputeRunningProcesses_v2(
    device: Device,
    count: *mut c_uint,
    infos: *mut ProcessInfo,
) -> Status {
    processes(device, count, infos)
}

/// `nvmlDeviceGetGraphicsRunningProcesses_v3`: the simulated card runs none.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetGraphicsRunningProcesses_v3(
    device: Device,
    count: *mut c_uint,
    _infos: *mut ProcessInfo,
) -> Status {
    with_device(device, |_, _| put(count, 0))
}

/// `nvmlPciInfo_t`.
#[repr(C)]
#[derive(Debug)]
pub struct PciInfo {
    bus_id_legacy: [c_char; 16],
    domain: c_uint,
    bus: c_uint,
    device: c_uint,
    pci_device_id: c_uint,
    pci_subsystem_id: c_uint,
    bus_id: [c_char; 32],
}

fn fixed<const N: usize>(text: &str) -> [c_char; N] {
    let mut out = [0; N];
    for (to, byte) in out.iter_mut().take(N - 1).zip(text.bytes()) {
        *to = byte.cast_signed();
    }
    out
}

/// `nvmlDeviceGetPciInfo_v3`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetPciInfo_v3(device: Device, info: *mut PciInfo) -> Status {
    /// An H100 SXM5 80 GB.
    const DEVICE_ID: c_uint = 0x2330_10de;
    with_device(device, |nvml, gpu| {
        let (domain, bus, slot) = nvml.gpus[gpu].pci;
        put(
            info,
            PciInfo {
                bus_id_legacy: fixed(&format!("{domain:04X}:{bus:02X}:{slot:02X}.0")),
                domain,
                bus,
                device: slot,
                pci_device_id: DEVICE_ID,
                pci_subsystem_id: DEVICE_ID,
                bus_id: fixed(&format!("{domain:08X}:{bus:02X}:{slot:02X}.0")),
            },
        )
    })
}

/// `nvmlDeviceGetCudaComputeCapability`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetCudaComputeCapability(
    device: Device,
    major: *mut i32,
    minor: *mut i32,
) -> Status {
    with_device(device, |nvml, gpu| {
        let (first, second) = nvml.gpus[gpu].capability;
        put(major, first as i32)?;
        put(minor, second as i32)
    })
}

/// `nvmlDeviceGetMaxPcieLinkGeneration`: that of the product whose name the card bears.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetMaxPcieLinkGeneration(device: Device, generation: *mut c_uint) -> Status {
    with_device(device, |nvml, gpu| put(generation, if nvml.gpus[gpu].name.contains("P100") { 3 } else { 5 }))
}

/// `nvmlDeviceGetMaxPcieLinkWidth`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetMaxPcieLinkWidth(device: Device, lanes: *mut c_uint) -> Status {
    with_device(device, |_, _| put(lanes, 16))
}

/// `nvmlDeviceGetMigMode`: the simulated card has no instances.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetMigMode(
    device: Device,
    _current: *mut c_uint,
    _pending: *mut c_uint,
) -> Status {
    with_device(device, |_, _| Err(NOT_SUPPORTED))
}

/// `nvmlDeviceGetPcieThroughput`: the simulator does not average the link.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetPcieThroughput(
    device: Device,
    _counter: c_uint,
    _kb_per_s: *mut c_uint,
) -> Status {
    with_device(device, |_, _| Err(NOT_SUPPORTED))
}

/// `nvmlDeviceGetTemperature`: the simulated card has none.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetTemperature(device: Device, _sensor: c_uint, _celsius: *mut c_uint) -> Status {
    with_device(device, |_, _| Err(NOT_SUPPORTED))
}
