//! A library to be preloaded into a program of the CUDA runtime: `cudaMalloc` gives it managed memory, and nothing else changes.
//!
//! It makes a program "that allocates managed memory itself" out of one that cannot be changed, PyTorch for example, in
//! order to tell what managed memory costs from what a shim costs. `cudaFree` frees both kinds, so it is left alone.

use std::ffi::{CStr, c_int, c_uint, c_void};

type MallocManaged = unsafe extern "C" fn(*mut *mut c_void, usize, c_uint) -> c_int;

/// `cudaErrorInitializationError`.
const NO_RUNTIME: c_int = 3;
/// `cudaMemAttachGlobal`.
const ATTACH_GLOBAL: c_uint = 1;
/// A program has one of these loaded already, since it called `cudaMalloc`.
const RUNTIMES: [&CStr; 3] = [c"libcudart.so.13", c"libcudart.so.12", c"libcudart.so.11.0"];

fn malloc_managed() -> Option<MallocManaged> {
    RUNTIMES.iter().find_map(|name| {
        // SAFETY: constant names; RTLD_NOLOAD only finds what is there. The function has the type of cuda_runtime_api.h.
        unsafe {
            let library = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD);
            if library.is_null() {
                return None;
            }
            let found = libc::dlsym(library, c"cudaMallocManaged".as_ptr());
            (!found.is_null()).then(|| std::mem::transmute::<*mut c_void, MallocManaged>(found))
        }
    })
}

/// In place of the runtime's.
///
/// # Safety
/// As the runtime says: `place` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudaMalloc(place: *mut *mut c_void, size: usize) -> c_int {
    match malloc_managed() {
        // SAFETY: handed on as it came.
        Some(allocate) => unsafe { allocate(place, size, ATTACH_GLOBAL) },
        None => NO_RUNTIME,
    }
}
