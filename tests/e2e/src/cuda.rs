//! The driver as a test's program sees it: every call through a look-up, with the types of `cuda.h`.
#![expect(clippy::missing_panics_doc, clippy::unwrap_used, reason = "what fails here fails the test")]

use std::{
    ffi::{CStr, CString, c_void},
    path::Path,
};

/// The simulated driver's own kernels, with the kinds of their arguments.
pub const MODULE: &CStr =
    c"nvshare-sim-module 1\nsweep ptr u64 u64 u32\nfill ptr u64 u32\nadd ptr ptr ptr u64\nchecksum ptr u64 ptr\nspin u64\n";

/// The driver, with a current primary context and the built-in kernels once it is open.
#[derive(Debug)]
pub struct Cuda {
    library: *mut c_void,
    module: usize,
}

// SAFETY: the handle of a library that is never closed; look-ups may be made by any thread.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}

/// Calls a driver function by name, ABI version and argument types; gives its result code.
#[macro_export]
macro_rules! call {
    ($cuda:expr, $name:literal $version:literal, $($argument:expr => $type:ty),* $(,)?) => {{
        let function = $cuda.look_up($name, $version, 0);
        #[allow(clippy::macro_metavars_in_unsafe, reason = "the call is the point; its arguments are values")]
        // SAFETY: the types are those of cuda.h for this name at this version.
        unsafe {
            let function: unsafe extern "C" fn($($type),*) -> u32 = std::mem::transmute(function);
            function($($argument),*)
        }
    }};
}

impl Cuda {
    /// The driver's library as programs load it, without `cuInit`.
    pub fn load() -> Self {
        Self::load_from(Path::new("libcuda.so.1"))
    }

    /// The same, by path.
    pub fn load_from(path: &Path) -> Self {
        let name = CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: a valid path.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
        assert!(!library.is_null(), "{} cannot be loaded", path.display());
        Self { library, module: 0 }
    }

    /// The driver, initialised, with the primary context of GPU 0 current.
    pub fn open() -> Self {
        let mut cuda = Self::load();
        assert_eq!(call!(cuda, "cuInit" 2000, 0 => u32), 0);
        let mut context = 0_usize;
        assert_eq!(call!(cuda, "cuDevicePrimaryCtxRetain" 7000, &raw mut context => *mut usize, 0 => i32), 0);
        assert_eq!(call!(cuda, "cuCtxSetCurrent" 4000, context => usize), 0);
        let mut module = 0_usize;
        let image = MODULE.as_ptr().cast::<c_void>();
        assert_eq!(
            call!(cuda, "cuModuleLoadData" 2000, &raw mut module => *mut usize, image => *const c_void),
            0
        );
        cuda.module = module;
        cuda
    }

    /// A name as `dlsym` finds it.
    pub fn symbol(&self, name: &str) -> *mut c_void {
        let name = CString::new(name).unwrap();
        // SAFETY: a live handle and a NUL-terminated name.
        unsafe { libc::dlsym(self.library, name.as_ptr()) }
    }

    /// (code, function, status) of `cuGetProcAddress_v2`.
    pub fn query(&self, name: &str, version: i32, flags: u64) -> (u32, *mut c_void, u32) {
        type Get = unsafe extern "C" fn(*const i8, *mut *mut c_void, i32, u64, *mut u32) -> u32;
        let (mut function, mut status) = (std::ptr::dangling_mut(), 77);
        let name = CString::new(name).unwrap();
        // SAFETY: the type is that of the function; pointers are live.
        let code = unsafe {
            let get: Get = std::mem::transmute(self.symbol("cuGetProcAddress_v2"));
            get(name.as_ptr(), &raw mut function, version, flags, &raw mut status)
        };
        (code, function, status)
    }

    /// The function that a program gets; it must exist.
    pub fn look_up(&self, name: &str, version: i32, flags: u64) -> *mut c_void {
        let (code, function, status) = self.query(name, version, flags);
        assert!(code == 0 && !function.is_null(), "{name} at {version}: code {code}, status {status}");
        function
    }

    /// A built-in kernel.
    pub fn kernel(&self, name: &str) -> usize {
        let (mut function, name) = (0_usize, CString::new(name).unwrap());
        let code = call!(self, "cuModuleGetFunction" 2000,
            &raw mut function => *mut usize, self.module => usize, name.as_ptr() => *const i8);
        assert_eq!(code, 0);
        function
    }

    /// Launches with arguments given as words; the driver reads as many bytes of each as its kind has.
    pub fn launch(&self, kernel: &str, stream: usize, arguments: &[u64]) -> u32 {
        let mut pointers: Vec<*const u64> = arguments.iter().map(std::ptr::from_ref).collect();
        call!(self, "cuLaunchKernel" 4000,
            self.kernel(kernel) => usize, 1 => u32, 1 => u32, 1 => u32, 32 => u32, 1 => u32, 1 => u32, 0 => u32,
            stream => usize, pointers.as_mut_ptr() => *mut *const u64, std::ptr::null_mut() => *mut c_void)
    }

    /// The calling thread's current context.
    pub fn context(&self) -> usize {
        let mut context = 0;
        assert_eq!(call!(self, "cuCtxGetCurrent" 4000, &raw mut context => *mut usize), 0);
        context
    }

    /// Makes a context the calling thread's current one.
    pub fn set_context(&self, context: usize) {
        assert_eq!(call!(self, "cuCtxSetCurrent" 4000, context => usize), 0);
    }

    /// A block of `cuMemAlloc`.
    pub fn allocate(&self, bytes: usize) -> u64 {
        let mut address = 0;
        assert_eq!(call!(self, "cuMemAlloc" 3020, &raw mut address => *mut u64, bytes => usize), 0);
        address
    }

    /// A block of `cuMemAllocManaged`.
    pub fn allocate_managed(&self, bytes: usize) -> u64 {
        let mut address = 0;
        let code =
            call!(self, "cuMemAllocManaged" 6000, &raw mut address => *mut u64, bytes => usize, 1 => u32);
        assert_eq!(code, 0);
        address
    }

    /// A stream with these flags.
    pub fn stream(&self, flags: u32) -> usize {
        let mut stream = 0;
        assert_eq!(call!(self, "cuStreamCreate" 2000, &raw mut stream => *mut usize, flags => u32), 0);
        stream
    }

    /// `cuStreamSynchronize`.
    pub fn synchronize(&self, stream: usize) -> u32 {
        call!(self, "cuStreamSynchronize" 2000, stream => usize)
    }

    /// Words into device memory.
    pub fn write(&self, address: u64, words: &[u32]) {
        let code = call!(self, "cuMemcpyHtoD" 3020,
            address => u64, words.as_ptr() => *const u32, size_of_val(words) => usize);
        assert_eq!(code, 0);
    }

    /// Words out of device memory.
    pub fn read(&self, address: u64, words: usize) -> Vec<u32> {
        let mut out = vec![0xdead_beef; words];
        let code = call!(self, "cuMemcpyDtoH" 3020,
            out.as_mut_ptr() => *mut u32, address => u64, words * 4 => usize);
        assert_eq!(code, 0);
        out
    }
}

/// Which function lies at an address: the file it is in and its name there, or `null`.
#[expect(clippy::not_unsafe_ptr_arg_deref, reason = "an address to look up; nothing is read there")]
pub fn owner(function: *mut c_void) -> String {
    if function.is_null() {
        return "null".to_owned();
    }
    // SAFETY: `dladdr` takes any address; the strings that it gives live as long as their object.
    unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        if libc::dladdr(function, &raw mut info) == 0 || info.dli_sname.is_null() {
            return format!("{function:?}");
        }
        let text = |text| CStr::from_ptr(text).to_string_lossy();
        let file = text(info.dli_fname);
        format!("{} {}", file.rsplit('/').next().unwrap_or_default(), text(info.dli_sname))
    }
}
