//! `cuGetProcAddress`: the newest ABI of a name that is not newer than the caller's, for the caller's default stream.

use std::{
    collections::BTreeSet,
    ffi::c_void,
    sync::{Mutex, atomic::AtomicU32, atomic::Ordering},
};

use crate::{
    abi::{INVALID_VALUE, NOT_SUPPORTED, Out, Outcome, Text},
    entry::driver_api,
    process::{self, driver_version},
    registry::lock,
};

/// One row of `data/driver-api.txt`.
pub(crate) struct Entry {
    base: &'static str,
    version: u32,
    thread: bool,
    function: Address,
}

/// Where a driver function starts.
pub(crate) struct Address(*const ());

// SAFETY: the address of a function; nothing is read through it here.
unsafe impl Sync for Address {}

mod table {
    use super::{Address, Entry};

    include!(concat!(env!("OUT_DIR"), "/driver_api.rs"));
}
use table::ENTRIES;

/// `CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM`.
const PER_THREAD: u64 = 2;
/// `CUdriverProcAddressQueryResult`.
const FOUND: u32 = 0;
const SYMBOL_NOT_FOUND: u32 = 1;
const VERSION_NOT_SUFFICIENT: u32 = 2;

static REPORTED: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
static UNSUPPORTED_CALLS: AtomicU32 = AtomicU32::new(0);

/// What a name without an implementation answers.
pub(crate) fn unsupported(name: &'static str) -> u32 {
    UNSUPPORTED_CALLS.fetch_add(1, Ordering::Relaxed);
    if process::logging() && lock(&REPORTED).insert(name) {
        process::log(&format!("{name} is not implemented by the simulated driver: CUDA_ERROR_NOT_SUPPORTED"));
    }
    NOT_SUPPORTED.0
}

fn find(name: &str, version: u32, flags: u64) -> Result<*const (), u32> {
    let mut known = false;
    let mut best: Option<&Entry> = None;
    // What came after this driver is as unknown to it as a name that never was.
    let own = driver_version().cast_unsigned();
    for entry in ENTRIES.iter().filter(|entry| entry.base == name && entry.version <= own) {
        known = true;
        if entry.version > version || (entry.thread && flags & PER_THREAD == 0) {
            continue;
        }
        // A per-thread variant beats every legacy one; among equals the newer ABI wins.
        let rank = |entry: &Entry| (entry.thread, entry.version);
        if best.is_none_or(|best| rank(entry) > rank(best)) {
            best = Some(entry);
        }
    }
    match best {
        Some(entry) => Ok(entry.function.0),
        None if known => Err(VERSION_NOT_SUFFICIENT),
        None => Err(SYMBOL_NOT_FOUND),
    }
}

fn look_up(
    symbol: Text,
    function: Out<*const c_void>,
    version: i32,
    flags: u64,
    status: Out<u32>,
) -> Outcome {
    if function.is_null() || flags & !3 != 0 || !(0..=driver_version()).contains(&version) {
        return Err(INVALID_VALUE);
    }
    let (pointer, result) = match find(symbol.get()?, version.cast_unsigned(), flags) {
        Ok(pointer) => (pointer.cast(), FOUND),
        Err(result) => (std::ptr::null(), result),
    };
    status.set_optional(result);
    function.set(pointer)
}

driver_api! {
    fn cuGetProcAddress(symbol: Text, function: Out<*const c_void>, version: i32, flags: u64) {
        look_up(symbol, function, version, flags, Out::from_raw(std::ptr::null_mut()))
    }

    fn cuGetProcAddress_v2(symbol: Text, function: Out<*const c_void>, version: i32, flags: u64, status: Out<u32>) {
        look_up(symbol, function, version, flags, status)
    }
}
