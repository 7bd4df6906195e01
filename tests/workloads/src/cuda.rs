//! The part of the CUDA driver's interface that the workloads use, looked up as the CUDA runtime does.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    mem::transmute,
    ptr,
};

use anyhow::{Context as _, Result, bail};

use crate::direct;

type Status = c_uint;
type Handle = *mut c_void;
type GetProcAddress =
    unsafe extern "C" fn(*const c_char, *mut *mut c_void, c_int, u64, *mut c_uint) -> Status;

/// `CUDA_ERROR_INVALID_IMAGE` and its like are told from others by the caller.
#[derive(Debug)]
pub(crate) struct CudaError {
    call: &'static str,
    code: Status,
    name: String,
}

impl std::fmt::Display for CudaError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} failed: {} ({})", self.call, self.name, self.code)
    }
}

impl std::error::Error for CudaError {}

macro_rules! functions {
    ($($field:ident: $name:literal $version:literal ($($type:ty),*);)*) => {
        struct Functions { $($field: unsafe extern "C" fn($($type),*) -> Status),* }

        impl Functions {
            fn load(get: GetProcAddress) -> Result<Self> {
                Ok(Self {
                    $($field: {
                        let function = look_up(get, $name, $version)?;
                        // SAFETY: the type is that of the named function at the version asked for.
                        unsafe { transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> Status>(function) }
                    }),*
                })
            }
        }
    };
}

functions! {
    init: "cuInit" 2000 (c_uint);
    error_name: "cuGetErrorName" 6000 (Status, *mut *const c_char);
    device_get: "cuDeviceGet" 2000 (*mut c_int, c_int);
    device_name: "cuDeviceGetName" 2000 (*mut c_char, c_int, c_int);
    device_uuid: "cuDeviceGetUuid" 11040 (*mut [u8; 16], c_int);
    primary_retain: "cuDevicePrimaryCtxRetain" 7000 (*mut Handle, c_int);
    set_current: "cuCtxSetCurrent" 4000 (Handle);
    mem_info: "cuMemGetInfo" 3020 (*mut usize, *mut usize);
    mem_alloc: "cuMemAlloc" 3020 (*mut u64, usize);
    mem_alloc_managed: "cuMemAllocManaged" 6000 (*mut u64, usize, c_uint);
    mem_free: "cuMemFree" 3020 (u64);
    memset: "cuMemsetD8Async" 3020 (u64, u8, usize, Handle);
    pointer_attribute: "cuPointerGetAttribute" 4000 (*mut c_void, c_uint, u64);
    copy_out: "cuMemcpyDtoH" 3020 (*mut c_void, u64, usize);
    module_load: "cuModuleLoadData" 2000 (*mut Handle, *const c_void);
    module_function: "cuModuleGetFunction" 2000 (*mut Handle, Handle, *const c_char);
    stream_create: "cuStreamCreate" 2000 (*mut Handle, c_uint);
    stream_synchronize: "cuStreamSynchronize" 2000 (Handle);
    launch: "cuLaunchKernel" 4000 (
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void
    );
}

fn look_up(get: GetProcAddress, name: &str, version: c_int) -> Result<*mut c_void> {
    let text = CString::new(name)?;
    let (mut function, mut status) = (ptr::null_mut(), 0);
    // SAFETY: all pointers outlive the call.
    let code = unsafe { get(text.as_ptr(), &raw mut function, version, 0, &raw mut status) };
    if code != 0 || function.is_null() {
        bail!("the driver has no {name} of CUDA {version} (error {code}, status {status}): it is too old");
    }
    Ok(function)
}

/// The driver, initialised, with one device's primary context current and a stream.
pub(crate) struct Cuda {
    functions: Functions,
    stream: Handle,
    pub(crate) device_name: String,
    pub(crate) uuid: [u8; 16],
}

/// `cuLaunchKernel`.
pub(crate) type LaunchKernel = unsafe extern "C" fn(
    Handle,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    Handle,
    *mut *mut c_void,
    *mut *mut c_void,
) -> Status;

/// A loaded kernel.
#[derive(Clone, Copy)]
pub(crate) struct Kernel(Handle);

impl Cuda {
    /// Opens device `index`.
    pub(crate) fn open(index: u32) -> Result<Self> {
        // SAFETY: constant names; the function found has the type that cuda.h gives it.
        let get = unsafe {
            let library = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW);
            if library.is_null() {
                let error = libc::dlerror();
                let text = if error.is_null() {
                    "no reason given".into()
                } else {
                    CStr::from_ptr(error).to_string_lossy()
                };
                bail!(
                    "no CUDA driver: {text}. Install the NVIDIA driver, or set LD_LIBRARY_PATH to a simulated GPU's lib directory"
                );
            }
            let get = libc::dlsym(library, c"cuGetProcAddress_v2".as_ptr());
            if get.is_null() {
                bail!("the CUDA driver is older than 12.0: it has no cuGetProcAddress_v2");
            }
            transmute::<*mut c_void, GetProcAddress>(get)
        };
        let functions = Functions::load(get)?;
        let mut cuda = Self { functions, stream: ptr::null_mut(), device_name: String::new(), uuid: [0; 16] };
        let f = &cuda.functions;
        let (mut device, mut name, mut uuid, mut context, mut stream) =
            (0, [0 as c_char; 128], [0; 16], ptr::null_mut(), ptr::null_mut());
        // SAFETY: every pointer is to a live local of the type that the function writes.
        unsafe {
            cuda.check("cuInit", (f.init)(0))?;
            let index = c_int::try_from(index).context("the GPU index is too large")?;
            cuda.check("cuDeviceGet", (f.device_get)(&raw mut device, index))?;
            cuda.check("cuDeviceGetName", (f.device_name)(name.as_mut_ptr(), 128, device))?;
            cuda.check("cuDeviceGetUuid", (f.device_uuid)(&raw mut uuid, device))?;
            cuda.check("cuDevicePrimaryCtxRetain", (f.primary_retain)(&raw mut context, device))?;
            cuda.check("cuCtxSetCurrent", (f.set_current)(context))?;
            cuda.check("cuStreamCreate", (f.stream_create)(&raw mut stream, 1))?;
            cuda.device_name = CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned();
        }
        cuda.stream = stream;
        cuda.uuid = uuid;
        Ok(cuda)
    }

    fn check(&self, call: &'static str, code: Status) -> Result<(), CudaError> {
        if code == 0 {
            return Ok(());
        }
        let mut name = ptr::null();
        // SAFETY: the driver stores a pointer to a constant string, or null.
        let name = unsafe {
            (self.functions.error_name)(code, &raw mut name);
            if name.is_null() { "unknown error".into() } else { CStr::from_ptr(name).to_string_lossy() }
        };
        Err(CudaError { call, code, name: name.into_owned() })
    }

    /// (free, total) bytes as the driver tells this process.
    pub(crate) fn memory(&self) -> Result<(u64, u64), CudaError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: two live locals.
        self.check("cuMemGetInfo", unsafe { (self.functions.mem_info)(&raw mut free, &raw mut total) })?;
        Ok((free as u64, total as u64))
    }

    /// Device memory, or managed memory of the program's own.
    pub(crate) fn allocate(&self, bytes: u64, managed: bool) -> Result<u64, CudaError> {
        let mut address = 0;
        // SAFETY: a live local; CU_MEM_ATTACH_GLOBAL is 1.
        unsafe {
            if managed {
                let code = (self.functions.mem_alloc_managed)(&raw mut address, bytes as usize, 1);
                self.check("cuMemAllocManaged", code)?;
            } else {
                self.check("cuMemAlloc", (self.functions.mem_alloc)(&raw mut address, bytes as usize))?;
            }
        }
        Ok(address)
    }

    pub(crate) fn free(&self, address: u64) -> Result<(), CudaError> {
        // SAFETY: an address is checked by the driver.
        self.check("cuMemFree", unsafe { (self.functions.mem_free)(address) })
    }

    /// Whether the driver says that memory is managed (`CU_POINTER_ATTRIBUTE_IS_MANAGED`).
    pub(crate) fn is_managed(&self, address: u64) -> Result<bool, CudaError> {
        let mut managed: c_uint = 0;
        // SAFETY: a live local of the attribute's type; the address is checked by the driver.
        let code = unsafe { (self.functions.pointer_attribute)((&raw mut managed).cast(), 8, address) };
        self.check("cuPointerGetAttribute", code)?;
        Ok(managed != 0)
    }

    pub(crate) fn clear(&self, address: u64, bytes: u64) -> Result<(), CudaError> {
        // SAFETY: addresses are checked by the driver.
        let code = unsafe { (self.functions.memset)(address, 0, bytes as usize, self.stream) };
        self.check("cuMemsetD8Async", code)
    }

    /// Reads device memory.
    pub(crate) fn read(&self, address: u64, into: &mut [u32]) -> Result<(), CudaError> {
        // SAFETY: the slice is writable over its whole length.
        let code = unsafe { (self.functions.copy_out)(into.as_mut_ptr().cast(), address, size_of_val(into)) };
        self.check("cuMemcpyDtoH", code)
    }

    /// Loads the kernel `name` of a module given as text.
    pub(crate) fn kernel(&self, image: &CStr, name: &CStr) -> Result<Kernel, CudaError> {
        let (mut module, mut function) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the image ends with a NUL, as both module formats want; locals are live.
        unsafe {
            let code = (self.functions.module_load)(&raw mut module, image.as_ptr().cast());
            self.check("cuModuleLoadData", code)?;
            let code = (self.functions.module_function)(&raw mut function, module, name.as_ptr());
            self.check("cuModuleGetFunction", code)?;
        }
        Ok(Kernel(function))
    }

    /// Launches `kernel(ptr, bytes, gpu_ns, value)`.
    pub(crate) fn launch(
        &self,
        kernel: Kernel,
        address: u64,
        bytes: u64,
        gpu_ns: u64,
        value: u32,
    ) -> Result<(), CudaError> {
        // One wave of blocks, so that the kernel's own timing holds on a real card.
        self.launch_as(self.functions.launch, kernel, (128, 256), address, bytes, gpu_ns, value)
    }

    /// Launches the same kernel over no memory with one warp, so that hardly anything but the launch is left.
    pub(crate) fn launch_tiny(&self, kernel: Kernel, address: u64) -> Result<(), CudaError> {
        self.launch_tiny_by(self.functions.launch, kernel, address)
    }

    /// The same by a given function.
    pub(crate) fn launch_tiny_by(
        &self,
        launch: LaunchKernel,
        kernel: Kernel,
        address: u64,
    ) -> Result<(), CudaError> {
        self.launch_as(launch, kernel, (1, 32), address, 0, 0, 0)
    }

    /// `cuLaunchKernel` as the driver has it, and as this program was given it.
    pub(crate) fn launchers(&self) -> Result<(LaunchKernel, LaunchKernel)> {
        // Nobody comes between a program and its device's name.
        let direct = direct::address("cuLaunchKernel", self.functions.device_name as *mut c_void)?;
        // SAFETY: the driver's function of this name has this type.
        let direct = unsafe { transmute::<*mut c_void, LaunchKernel>(direct) };
        Ok((direct, self.functions.launch))
    }

    #[expect(clippy::too_many_arguments, reason = "a kernel's parameters and how it is launched")]
    fn launch_as(
        &self,
        launch: LaunchKernel,
        kernel: Kernel,
        (blocks, threads): (c_uint, c_uint),
        mut address: u64,
        mut bytes: u64,
        mut gpu_ns: u64,
        mut value: u32,
    ) -> Result<(), CudaError> {
        let mut arguments: [*mut c_void; 4] = [
            (&raw mut address).cast(),
            (&raw mut bytes).cast(),
            (&raw mut gpu_ns).cast(),
            (&raw mut value).cast(),
        ];
        // SAFETY: the arguments match the kernel's parameters; the driver copies them before it returns.
        let code = unsafe {
            let (arguments, stream) = (arguments.as_mut_ptr(), self.stream);
            launch(kernel.0, blocks, 1, 1, threads, 1, 1, 0, stream, arguments, ptr::null_mut())
        };
        self.check("cuLaunchKernel", code)
    }

    pub(crate) fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: our own stream.
        self.check("cuStreamSynchronize", unsafe { (self.functions.stream_synchronize)(self.stream) })
    }
}
