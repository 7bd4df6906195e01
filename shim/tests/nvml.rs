//! The driver and NVML tell a program the same about its memory.

use std::ffi::{CStr, c_void};

use nvshare_tests::{Cuda, call, program::shimmed_program};

const MIB: u64 = 1 << 20;

/// The management library as a program loads it.
struct Nvml {
    library: *mut c_void,
    device: usize,
}

impl Nvml {
    fn open() -> Self {
        // SAFETY: a valid name.
        let library = unsafe { libc::dlopen(c"libnvidia-ml.so.1".as_ptr(), libc::RTLD_NOW) };
        assert!(!library.is_null());
        let mut nvml = Self { library, device: 0 };
        // SAFETY: the functions have these types.
        unsafe {
            let init: extern "C" fn() -> i32 = std::mem::transmute(nvml.symbol(c"nvmlInit_v2"));
            assert_eq!(init(), 0);
            let by_index: extern "C" fn(u32, *mut usize) -> i32 =
                std::mem::transmute(nvml.symbol(c"nvmlDeviceGetHandleByIndex_v2"));
            assert_eq!(by_index(0, &raw mut nvml.device), 0);
        }
        nvml
    }

    fn symbol(&self, name: &CStr) -> *mut c_void {
        // SAFETY: a live handle and a C string.
        let found = unsafe { libc::dlsym(self.library, name.as_ptr()) };
        assert!(!found.is_null(), "{name:?}");
        found
    }

    /// The code and what was stored, in words.
    fn memory<const N: usize>(&self, function: &CStr, mut words: [u64; N]) -> (i32, [u64; N]) {
        // SAFETY: both functions take a device and a structure of such words.
        let function: extern "C" fn(usize, *mut u64) -> i32 =
            unsafe { std::mem::transmute(self.symbol(function)) };
        (function(self.device, words.as_mut_ptr()), words)
    }

    /// (free, total), the same in both forms.
    fn information(&self) -> (u64, u64) {
        let (code, [total, free, used]) = self.memory(c"nvmlDeviceGetMemoryInfo", [0; 3]);
        assert_eq!((code, free + used), (0, total));
        // The version word of a structure of 40 bytes.
        let version = 0x28 | 2 << 24;
        let (code, [_, total_2, reserved, free_2, used_2]) =
            self.memory(c"nvmlDeviceGetMemoryInfo_v2", [version, 0, 0, 0, 0]);
        assert_eq!((code, total_2, free_2, reserved + free_2 + used_2), (0, total, free, total));
        (free, total)
    }
}

fn driver_information(cuda: &Cuda) -> (u64, u64) {
    let (mut free, mut total) = (0, 0);
    let code = call!(cuda, "cuMemGetInfo" 3020, &raw mut free => *mut u64, &raw mut total => *mut u64);
    assert_eq!(code, 0);
    (free, total)
}

fn agree(cuda: &Cuda, total: u64) {
    let nvml = Nvml::open();
    let before = nvml.information();
    assert_eq!((before, before.1), (driver_information(cuda), total));
    cuda.allocate(10 * MIB as usize);
    assert_eq!(nvml.information(), (before.0 - 10 * MIB, total));
    assert_eq!(nvml.information(), driver_information(cuda));
    let mut size = 0_usize;
    assert_eq!(call!(cuda, "cuDeviceTotalMem" 3020, &raw mut size => *mut usize, 0 => i32), 0);
    assert_eq!(size as u64, total);
    // What NVML refuses stays as it was.
    let (code, words) = nvml.memory(c"nvmlDeviceGetMemoryInfo_v2", [7; 5]);
    assert_eq!((code, words), (25, [7; 5]));
}

#[test]
fn nvml_and_the_driver_tell_the_same() {
    shimmed_program("nvml_and_the_driver_tell_the_same", &[], |cuda| agree(cuda, 256 * MIB));
}

#[test]
fn nvml_and_the_driver_tell_the_same_under_a_limit() {
    let limit = [("NVSHARE_MEMORY_LIMIT", "64MiB")];
    let test = "nvml_and_the_driver_tell_the_same_under_a_limit";
    shimmed_program(test, &limit, |cuda| agree(cuda, 64 * MIB));
}
