//! A second preloaded library in the usual style: it wraps `getppid` and asks for the next one by `RTLD_NEXT`.

use std::{
    ffi::{c_char, c_int, c_void},
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
};

unsafe extern "C" {
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
}

static DEPTH: AtomicUsize = AtomicUsize::new(0);

#[unsafe(no_mangle)]
pub extern "C" fn getppid() -> c_int {
    if DEPTH.fetch_add(1, SeqCst) > 0 {
        std::process::abort();
    }
    let next = unsafe { dlsym(-1isize as *mut c_void, c"getppid".as_ptr()) };
    let next: extern "C" fn() -> c_int = unsafe { std::mem::transmute(next) };
    let pid = next();
    DEPTH.fetch_sub(1, SeqCst);
    -pid
}
