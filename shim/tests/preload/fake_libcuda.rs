//! A driver of a few functions, each of which counts its calls. It holds nothing and computes nothing: it exists
//! to see which function a look-up leads to. Built as `libcuda.so.1`.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    ptr,
    sync::{
        OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
};

type Ptr = *mut c_void;

/// Calls by name; `fake_calls` reads them.
static CALLS: [(&str, AtomicUsize); 8] = [
    ("cuLaunchKernel", AtomicUsize::new(0)),
    ("cuLaunchKernel_ptsz", AtomicUsize::new(0)),
    ("cuMemAlloc_v2", AtomicUsize::new(0)),
    ("cuMemAllocManaged", AtomicUsize::new(0)),
    ("cuMemPrefetchAsync", AtomicUsize::new(0)),
    ("cuMemPrefetchAsync_v2", AtomicUsize::new(0)),
    ("newer", AtomicUsize::new(0)),
    ("cuCtxSynchronize", AtomicUsize::new(0)),
];
static NEXT: AtomicU64 = AtomicU64::new(0x7000_0000_0000);

fn count(name: &str) {
    for (known, calls) in &CALLS {
        if *known == name {
            calls.fetch_add(1, SeqCst);
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_calls(name: *const c_char) -> usize {
    let name = unsafe { CStr::from_ptr(name) }.to_str().unwrap();
    CALLS.iter().find(|(known, _)| *known == name).unwrap().1.load(SeqCst)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: c_uint) -> c_int {
    0
}

unsafe extern "C-unwind" {
    fn pause() -> c_int;
    fn pthread_exit(value: Ptr) -> !;
}
unsafe extern "C" {
    fn open(path: *const c_char, flags: c_int) -> c_int;
    fn mmap(at: Ptr, len: usize, access: c_int, flags: c_int, fd: c_int, offset: i64) -> Ptr;
}

/// Two words in the file `FAKE_TRIPWIRE`: whether the GPU is given away, and how often work came nevertheless.
fn tripwire() -> Option<&'static [AtomicU64; 2]> {
    static TRIPWIRE: OnceLock<Option<&'static [AtomicU64; 2]>> = OnceLock::new();
    *TRIPWIRE.get_or_init(|| {
        let path = CString::new(std::env::var("FAKE_TRIPWIRE").ok()?).ok()?;
        // Read and write, shared, for good.
        let at = unsafe { mmap(ptr::null_mut(), 4096, 3, 1, open(path.as_ptr(), 2), 0) };
        assert_ne!(at as isize, -1, "no {path:?}");
        Some(unsafe { &*at.cast() })
    })
}

/// Work that takes a moment, during which the GPU must not be given away.
fn work() {
    if let Some([away, violations]) = tripwire() {
        for _ in 0..20 {
            if away.load(SeqCst) != 0 {
                violations.fetch_add(1, SeqCst);
            }
            std::hint::spin_loop();
        }
    }
}

/// Launches in these streams never return.
const STAYS: usize = 0xcc;
const EXITS: usize = 0xcd;

macro_rules! launches {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        pub extern "C-unwind" fn $name(_f: Ptr, _gx: c_uint, _gy: c_uint, _gz: c_uint, _bx: c_uint, _by: c_uint,
            _bz: c_uint, _shared: c_uint, stream: Ptr, _params: Ptr, extra: Ptr) -> c_int {
            count(stringify!($name));
            work();
            match stream as usize {
                STAYS => loop {
                    unsafe { pause() };
                },
                EXITS => unsafe { pthread_exit(ptr::null_mut()) },
                _ => {}
            }
            // The last of eleven arguments comes back, so that a wrapper that shifts any is caught.
            extra as usize as c_int
        }
    )*};
}
launches! { cuLaunchKernel cuLaunchKernel_ptsz }

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD32Async(_to: u64, value: c_uint, _count: usize, _stream: Ptr) -> c_int {
    work();
    value as c_int
}
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphLaunch(_graph: Ptr, stream: Ptr) -> c_int {
    work();
    stream as usize as c_int
}
#[unsafe(no_mangle)]
pub extern "C-unwind" fn cuStreamSynchronize(stream: Ptr) -> c_int {
    if stream as usize == STAYS {
        loop {
            unsafe { pause() };
        }
    }
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(place: *mut u64, size: usize) -> c_int {
    count("cuMemAlloc_v2");
    unsafe { *place = NEXT.fetch_add(size as u64, SeqCst) };
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocManaged(place: *mut u64, size: usize, _flags: c_uint) -> c_int {
    count("cuMemAllocManaged");
    if std::env::var_os("FAKE_NO_MANAGED").is_some() {
        return 801;
    }
    unsafe { *place = NEXT.fetch_add(size as u64, SeqCst) };
    0
}
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> c_int {
    if address == 0xdead { 1 } else { 0 }
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_int {
    if std::env::var_os("FAKE_NO_INFO").is_some() {
        return 999;
    }
    unsafe {
        *free = 1 << 20;
        *total = 1 << 30;
    }
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> c_int {
    unsafe { *bytes = 1 << 30 };
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid(uuid: *mut u8, _device: c_int) -> c_int {
    unsafe { ptr::copy_nonoverlapping([0xabu8; 16].as_ptr(), uuid, 16) };
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(place: *mut Ptr, _device: c_int) -> c_int {
    unsafe { *place = 0x1234 as Ptr };
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxGetState(_device: c_int, flags: *mut c_uint, active: *mut c_int) -> c_int {
    unsafe {
        *flags = 0;
        *active = 1;
    }
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetDevice(device: *mut c_int) -> c_int {
    unsafe { *device = 0 };
    0
}
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPushCurrent_v2(_context: Ptr) -> c_int {
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPopCurrent_v2(place: *mut Ptr) -> c_int {
    unsafe { *place = ptr::null_mut() };
    0
}
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> c_int {
    count("cuCtxSynchronize");
    0
}
/// Stream 0xca is always being captured, no other ever.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(stream: Ptr, status: *mut c_int) -> c_int {
    unsafe { *status = c_int::from(stream as usize == 0xca) };
    0
}
#[unsafe(no_mangle)]
pub extern "C" fn cuMemPrefetchAsync(_address: u64, _size: usize, _device: c_int, stream: Ptr) -> c_int {
    count("cuMemPrefetchAsync");
    stream as usize as c_int
}
#[repr(C)]
pub struct Location(c_int, c_int);
#[unsafe(no_mangle)]
pub extern "C" fn cuMemPrefetchAsync_v2(_a: u64, _s: usize, at: Location, flags: c_uint, stream: Ptr) -> c_int {
    count("cuMemPrefetchAsync_v2");
    at.0 * 1000 + at.1 * 100 + flags as c_int * 10 + stream as usize as c_int
}
extern "C" fn newer() -> c_int {
    count("newer");
    0
}

fn answer(name: &str, version: c_int, flags: u64) -> Ptr {
    let per_thread = flags & 2 != 0;
    match (name, version) {
        ("cuGetProcAddress", 12000..) => cuGetProcAddress_v2 as *const () as Ptr,
        ("cuGetProcAddress", 11030..) => cuGetProcAddress as *const () as Ptr,
        ("cuInit", 2000..) => cuInit as *const () as Ptr,
        ("cuLaunchKernel", 7000..) if per_thread => cuLaunchKernel_ptsz as *const () as Ptr,
        ("cuLaunchKernel", 4000..) => cuLaunchKernel as *const () as Ptr,
        ("cuMemAlloc", 3020..) => cuMemAlloc_v2 as *const () as Ptr,
        ("cuMemPrefetchAsync", 20000..) => newer as *const () as Ptr,
        ("cuMemPrefetchAsync", 12020..) => cuMemPrefetchAsync_v2 as *const () as Ptr,
        ("cuMemPrefetchAsync", 8000..) => cuMemPrefetchAsync as *const () as Ptr,
        _ => ptr::null_mut(),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress(name: *const c_char, place: *mut Ptr, version: c_int, flags: u64) -> c_int {
    unsafe { cuGetProcAddress_v2(name, place, version, flags, ptr::null_mut()) }
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress_v2(
    name: *const c_char,
    place: *mut Ptr,
    version: c_int,
    flags: u64,
    status: *mut c_int,
) -> c_int {
    if version > 30000 {
        return 1;
    }
    let found = answer(unsafe { CStr::from_ptr(name) }.to_str().unwrap(), version, flags);
    unsafe {
        *place = found;
        if !status.is_null() {
            *status = if found.is_null() { 1 } else { 0 };
        }
    }
    0
}
