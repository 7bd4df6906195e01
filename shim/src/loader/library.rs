//! The driver's libraries: which one a symbol lies in, and their own functions past every wrapper.

use std::{
    ffi::{CStr, c_void},
    ptr,
    sync::atomic::{AtomicPtr, AtomicUsize, Ordering},
};

use super::dlsym_real;
use crate::abi::Ptr;

/// One library, known from the first of its symbols that anybody looks up.
#[derive(Debug)]
pub(crate) struct Library {
    /// Under which name programs load it.
    name: &'static CStr,
    /// How its file's name begins, whatever its version.
    stem: &'static [u8],
    handle: AtomicPtr<c_void>,
    /// Where it is mapped.
    base: AtomicUsize,
}

/// The CUDA driver.
pub(crate) static CUDA: Library = Library::new(c"libcuda.so.1", b"libcuda.so");
/// The management library.
pub(crate) static NVML: Library = Library::new(c"libnvidia-ml.so.1", b"libnvidia-ml.so");

impl Library {
    const fn new(name: &'static CStr, stem: &'static [u8]) -> Self {
        Self { name, stem, handle: AtomicPtr::new(ptr::null_mut()), base: AtomicUsize::new(0) }
    }

    /// Whether `address` lies in this library. The first such address makes its object the library.
    pub(super) fn holds(&self, address: *mut c_void) -> bool {
        // SAFETY: all-zero is a valid `Dl_info`, and `dladdr` accepts any address.
        let (info, found) = unsafe {
            let mut info: libc::Dl_info = std::mem::zeroed();
            let found = libc::dladdr(address, &raw mut info) != 0;
            (info, found)
        };
        if !found || info.dli_fname.is_null() {
            return false;
        }
        let known = self.base.load(Ordering::Acquire);
        if known != 0 {
            return known == info.dli_fbase as usize;
        }
        // SAFETY: `dladdr` gave a C string that lives as long as the object.
        let path = unsafe { CStr::from_ptr(info.dli_fname) };
        let file = path.to_bytes().rsplit(|&byte| byte == b'/').next().unwrap_or_default();
        if !file.starts_with(self.stem) {
            return false;
        }
        // SAFETY: only raises the reference count of an object that is loaded.
        let handle = unsafe { libc::dlopen(info.dli_fname, libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
        if handle.is_null() {
            return false;
        }
        self.handle.store(handle, Ordering::Release);
        self.base.store(info.dli_fbase as usize, Ordering::Release);
        true
    }

    /// The library's own function of this name, past every wrapper; null if there is none or the library is not loaded.
    pub(crate) fn symbol(&self, name: &CStr) -> Ptr {
        let mut handle = self.handle.load(Ordering::Acquire);
        if handle.is_null() {
            // A program linked against the library calls our exports without any look-up.
            // SAFETY: only finds an object that is loaded already.
            handle = unsafe { libc::dlopen(self.name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
            if handle.is_null() {
                return ptr::null_mut();
            }
            self.handle.store(handle, Ordering::Release);
        }
        dlsym_real(handle, name.as_ptr())
    }
}
