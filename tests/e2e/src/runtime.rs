//! NVIDIA's real CUDA runtime as a program under test.
#![expect(clippy::expect_used, reason = "what fails here fails the test")]

use std::{ffi::CString, path::PathBuf};

use crate::pypi;

/// The oldest runtime that is supported, the first and the last of CUDA 12, and the newest.
pub const PACKAGES: [&str; 4] = [
    "nvidia-cuda-runtime-cu11==11.8.89",
    "nvidia-cuda-runtime-cu12==12.1.105",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cuda-runtime",
];

/// Set in processes that call a runtime: its library.
pub const VARIABLE: &str = "NVSHARE_TEST_CUDART";

/// The runtime's library in a package; `None`, after saying so, where the package cannot be fetched.
pub fn library(package: &str) -> Option<PathBuf> {
    Some(pypi::find(&pypi::fetched(package)?, "libcudart.so"))
}

/// Loads the runtime that the environment names and makes its first call; the call's result.
///
/// # Panics
/// If there is no runtime.
pub fn count_devices() -> i32 {
    let path = std::env::var(VARIABLE).expect("the runtime's path");
    let path = CString::new(path).expect("a path");
    // SAFETY: a real runtime, whose function has this type.
    unsafe {
        let runtime = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
        assert!(!runtime.is_null(), "the runtime cannot be loaded");
        let count = libc::dlsym(runtime, c"cudaGetDeviceCount".as_ptr());
        assert!(!count.is_null(), "the runtime has no cudaGetDeviceCount");
        let count: extern "C" fn(*mut i32) -> i32 = std::mem::transmute(count);
        let mut devices = -1;
        count(&raw mut devices)
    }
}
