//! The state of one process: the connection to the simulator, the memory arena, and what a fork does to them.

use std::{
    ffi::c_void,
    io::Write as _,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use nvshare_gpu_sim_model::client::{EntryPoints, GpuInfo, Session, SimError};

use crate::{
    abi::{
        CUresult, INVALID_DEVICE, INVALID_VALUE, NO_DEVICE, NOT_INITIALIZED, OUT_OF_MEMORY, Out, Outcome,
        SUCCESS, UNKNOWN,
    },
    arena::Arena,
    entry::driver_api,
    registry::lock,
};

/// The driver's version as `cuDriverGetVersion` says it: CUDA 13.0, unless `NVSHARE_SIM_DRIVER_VERSION` names another.
pub(crate) fn driver_version() -> i32 {
    static VERSION: OnceLock<i32> = OnceLock::new();
    *VERSION.get_or_init(|| {
        let other = std::env::var("NVSHARE_SIM_DRIVER_VERSION").ok();
        other.and_then(|version| version.parse().ok()).unwrap_or(13000)
    })
}

/// What `cuInit` sets up, once per process.
pub(crate) struct Driver {
    pub(crate) session: Session,
    pub(crate) gpus: Vec<GpuInfo>,
    pub(crate) arena: Arena,
}

static DRIVER: OnceLock<Driver> = OnceLock::new();
static INITIALISING: Mutex<()> = Mutex::new(());
static FORKED: AtomicBool = AtomicBool::new(false);

/// Functions of nvidia-uvm that run in the program's own context. They exist to be probed: the simulator's model calls
/// them with the driver's arguments at the driver's occasions.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn uvm_perf_init_va_space_events(va_space: *const c_void, events: *const c_void) {
    std::hint::black_box((va_space, events));
}

/// See [`uvm_perf_init_va_space_events`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn uvm_perf_event_notify(events: *const c_void, event_id: u32, data: *const c_void) {
    std::hint::black_box((events, event_id, data));
}

fn uvm_entry_points() -> EntryPoints {
    EntryPoints { init_va_space_events: uvm_perf_init_va_space_events, event_notify: uvm_perf_event_notify }
}

/// What the driver reports for a failure of the model.
pub(crate) fn sim_error(error: SimError) -> CUresult {
    if logging() {
        log(&error.to_string());
    }
    match error {
        SimError::OutOfMemory { .. } => OUT_OF_MEMORY,
        SimError::Refused(_) => INVALID_VALUE,
        SimError::Lost(_) | SimError::Gone => UNKNOWN,
    }
}

/// Runs the body of a driver function.
pub(crate) fn enter(name: &'static str, body: impl FnOnce() -> Outcome) -> CUresult {
    if FORKED.load(Ordering::Relaxed) {
        return NOT_INITIALIZED;
    }
    let result = match body() {
        Ok(()) => SUCCESS,
        Err(code) => code,
    };
    if log_level() >= 2 {
        log(&format!("{name} = {}", result.0));
    }
    result
}

/// The initialised driver.
pub(crate) fn driver() -> Outcome<&'static Driver> {
    DRIVER.get().ok_or(NOT_INITIALIZED)
}

/// A device ordinal as an index, checked.
pub(crate) fn gpu_index(device: i32) -> Outcome<usize> {
    let index = usize::try_from(device).map_err(|_negative| INVALID_DEVICE)?;
    if index < driver()?.gpus.len() { Ok(index) } else { Err(INVALID_DEVICE) }
}

fn log_level() -> u8 {
    static LEVEL: OnceLock<u8> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        std::env::var("NVSHARE_SIM_LOG").ok().and_then(|level| level.parse().ok()).unwrap_or_default()
    })
}

/// Whether `NVSHARE_SIM_LOG` asks for notes (1) or a call log (2).
pub(crate) fn logging() -> bool {
    log_level() >= 1
}

pub(crate) fn log(message: &str) {
    let line = format!("nvshare-gpu-sim libcuda[{}]: {message}\n", std::process::id());
    // In one system call, so that lines of several threads and libraries stay whole. A program may have closed it.
    let _unwritten = std::io::stderr().write_all(line.as_bytes());
}

extern "C" fn after_fork_in_child() {
    FORKED.store(true, Ordering::Relaxed);
}

fn initialise() -> Outcome {
    let _once = lock(&INITIALISING);
    if DRIVER.get().is_some() {
        return Ok(());
    }
    let session = Session::connect(uvm_entry_points()).map_err(|error| {
        log(&format!(
            "no simulated GPU: {error}. Start one with `nvshare-gpu-sim run --dir DIR` and set NVSHARE_SIM_DIR=DIR."
        ));
        NO_DEVICE
    })?;
    let gpus = session.host().gpus();
    if gpus.is_empty() {
        return Err(NO_DEVICE);
    }
    let arena = Arena::reserve().map_err(|error| {
        log(&format!("cannot reserve address space for the simulated GPU's memory: {error}"));
        UNKNOWN
    })?;
    // SAFETY: the handler only stores to an atomic, which is allowed between fork and exec.
    unsafe { libc::pthread_atfork(None, None, Some(after_fork_in_child)) };
    DRIVER.get_or_init(|| Driver { session, gpus, arena });
    Ok(())
}

driver_api! {
    fn cuInit(flags: u32) {
        if flags != 0 { Err(INVALID_VALUE) } else { initialise() }
    }

    fn cuDriverGetVersion(version: Out<i32>) {
        version.set(driver_version())
    }
}
