//! A driver made from a table: every function that drivers export is there, notes its arguments and counts its calls.
//! The few that the shim needs an answer of give one. `table!` follows this text, with a line for each function and each
//! look-up key. Built as `libcuda.so.1`.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    ptr,
    sync::atomic::{
        AtomicU64, AtomicUsize,
        Ordering::{Relaxed, SeqCst},
    },
};

type Ptr = *mut c_void;

/// More words than any function has arguments; what a caller does not pass is garbage.
pub const WORDS: usize = 12;

struct Function {
    name: &'static str,
    address: extern "C" fn(u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64) -> c_int,
    calls: AtomicUsize,
    words: [AtomicU64; WORDS],
}

/// A look-up key: name, version, per-thread stream, index of the function.
type Key = (&'static str, c_int, bool, usize);

macro_rules! table {
    (functions: $($index:literal $name:ident)* keys: $($key:expr,)*) => {
        $(
            #[unsafe(no_mangle)]
            pub extern "C" fn $name(a: u64, b: u64, c: u64, d: u64, e: u64, f: u64, g: u64, h: u64, i: u64, j: u64, k: u64, l: u64) -> c_int {
                called($index, [a, b, c, d, e, f, g, h, i, j, k, l])
            }
        )*
        static FUNCTIONS: [Function; [$($index),*].len()] = [$(Function {
            name: stringify!($name),
            address: $name,
            calls: AtomicUsize::new(0),
            words: [const { AtomicU64::new(0) }; WORDS],
        }),*];
        static KEYS: &[Key] = &[$($key),*];
    };
}

/// Notes a call and answers it: what the shim needs answered as a driver would, everything else with a result of the
/// function's own.
fn called(index: usize, words: [u64; WORDS]) -> c_int {
    let function = &FUNCTIONS[index];
    for (place, word) in function.words.iter().zip(words) {
        place.store(word, Relaxed);
    }
    function.calls.fetch_add(1, SeqCst);
    // SAFETY: the arguments are those of this function, and pointers among them are valid as its contract says.
    unsafe {
        let put = |word: u64, value: u64, bytes: usize| {
            ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), word as *mut u8, bytes);
        };
        match function.name {
            "cuGetProcAddress" | "cuGetProcAddress_v2" => {
                let status = (index == index_of("cuGetProcAddress_v2")).then_some(words[4] as *mut c_int);
                return look_up(words[0] as *const c_char, words[1] as *mut Ptr, words[2] as c_int, words[3], status);
            }
            "cuInit" => initialise(),
            "cuGraphLaunch" => {
                launch_through_the_loader();
                return result(index);
            }
            "cuDevicePrimaryCtxRetain" => put(words[0], 0x1234, 8),
            "cuDevicePrimaryCtxGetState" => {
                put(words[1], 0, 4);
                put(words[2], 1, 4);
            }
            "cuCtxGetCurrent" | "cuCtxPopCurrent_v2" => put(words[0], 0x1234, 8),
            "cuCtxGetDevice" => put(words[0], 0, 4),
            "cuDeviceGetUuid" | "cuDeviceGetUuid_v2" => ptr::write_bytes(words[0] as *mut u8, 0xab, 16),
            "cuDeviceTotalMem_v2" => put(words[0], 1 << 30, 8),
            // One stream is always being captured.
            "cuStreamIsCapturing" | "cuStreamIsCapturing_ptsz" => put(words[1], u64::from(words[0] == 0xca), 4),
            // Addresses of host memory begin with 0x4; none is managed.
            "cuPointerGetAttribute" if words[1] as c_int == 2 => put(words[0], if words[2] >> 44 == 4 { 1 } else { 2 }, 4),
            "cuPointerGetAttribute" => put(words[0], 0, 1),
            "cuCtxPushCurrent_v2" | "cuCtxSynchronize" => {}
            _ => return result(index),
        }
    }
    0
}

fn result(index: usize) -> c_int {
    1000 + index as c_int
}

fn index_of(name: &str) -> usize {
    FUNCTIONS.iter().position(|function| function.name == name).unwrap()
}

/// The calls of a function, and the arguments of the last one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_calls(name: *const c_char, words: *mut [u64; WORDS]) -> usize {
    let function = &FUNCTIONS[index_of(unsafe { CStr::from_ptr(name) }.to_str().unwrap())];
    unsafe { *words = std::array::from_fn(|at| function.words[at].load(Relaxed)) };
    function.calls.load(SeqCst)
}

/// What a function that has no answer of its own returns.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_result(name: *const c_char) -> c_int {
    result(index_of(unsafe { CStr::from_ptr(name) }.to_str().unwrap()))
}

/// A function itself, past all look-ups.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_address(name: *const c_char) -> Ptr {
    FUNCTIONS[index_of(unsafe { CStr::from_ptr(name) }.to_str().unwrap())].address as *const () as Ptr
}

/// A function of an ABI that nobody has heard of.
#[unsafe(no_mangle)]
pub extern "C" fn fake_newer() -> c_int {
    99
}

fn answer(name: &str, version: c_int, flags: u64) -> Option<Ptr> {
    if version >= 20000 {
        return Some(fake_newer as *const () as Ptr);
    }
    // Outside the contract, but a driver may do it: a name that carries its version.
    if std::env::var_os("FAKE_SUFFIXES").is_some()
        && let Some(function) = FUNCTIONS.iter().find(|function| function.name == name)
    {
        return Some(function.address as *const () as Ptr);
    }
    let keys = KEYS.iter().filter(|key| key.0 == name && key.1 <= version && (!key.2 || flags & 2 != 0));
    keys.max_by_key(|key| (key.2, key.1)).map(|key| FUNCTIONS[key.3].address as *const () as Ptr)
}

unsafe fn look_up(name: *const c_char, place: *mut Ptr, version: c_int, flags: u64, status: Option<*mut c_int>) -> c_int {
    if version > 30000 {
        return 1;
    }
    unsafe {
        let found = answer(CStr::from_ptr(name).to_str().unwrap(), version, flags);
        *place = found.unwrap_or(ptr::null_mut());
        if let Some(status) = status.filter(|status| !status.is_null()) {
            *status = c_int::from(found.is_none());
        }
    }
    0
}

unsafe extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> Ptr;
    fn dlsym(handle: Ptr, name: *const c_char) -> Ptr;
}

/// What a program would find under this name.
fn find(name: &str) -> Ptr {
    let name = CString::new(name).unwrap();
    unsafe { dlsym(dlopen(c"libcuda.so.1".as_ptr(), 2), name.as_ptr()) }
}

/// Initialisation looks its own function up and calls it, and a hooked one, as the driver of some systems does.
fn initialise() {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    if std::env::var_os("FAKE_REENTRANT").is_none() || CALLS.fetch_add(1, SeqCst) > 0 {
        return;
    }
    let init: extern "C" fn(u64) -> c_int = unsafe { std::mem::transmute(find("cuInit")) };
    assert_eq!(init(0), 0);
    let retain: extern "C" fn(*mut u64, c_int) -> c_int =
        unsafe { std::mem::transmute(find("cuDevicePrimaryCtxRetain")) };
    assert_eq!(retain(&mut 0, 0), 0);
}

/// A graph launch that submits through another hooked function.
fn launch_through_the_loader() {
    if std::env::var_os("FAKE_REENTRANT").is_some() {
        let launch: extern "C" fn(u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64) -> c_int =
            unsafe { std::mem::transmute(find("cuLaunchKernel")) };
        launch(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    }
}

