//! Runs the body of a test as a program of its own on a simulated host of its own, and gives it the driver.

use std::{
    ffi::{CString, c_void},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Set in the processes that run test bodies.
const BODY: &str = "NVSHARE_TEST_BODY";

/// The library under test: cargo builds it next to the test.
pub(crate) fn library() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().join("libcuda.so")
}

/// Whether this machine promises everything, so that a skip is a failure.
pub(crate) fn require_all() -> bool {
    std::env::var_os("NVSHARE_REQUIRE_ALL").is_some_and(|value| value == "1")
}

/// A simulator that ends with its guard.
pub(crate) struct Simulator {
    child: Child,
    pub(crate) dir: PathBuf,
    _home: tempfile::TempDir,
}

impl Simulator {
    pub(crate) fn start(memory: &str) -> Self {
        let built = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "-p", "nvshare-gpu-sim"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .unwrap();
        assert!(built.success(), "the simulator does not build");
        let target = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_owned();
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("sim");
        let child = Command::new(target.join("nvshare-gpu-sim"))
            .arg("run")
            .arg("--dir")
            .arg(&dir)
            .args(["--memory", memory])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut simulator = Self { child, dir, _home: home };
        let deadline = Instant::now() + Duration::from_secs(20);
        while !simulator.dir.join("ready").exists() {
            assert!(simulator.child.try_wait().unwrap().is_none(), "the simulator ended");
            assert!(Instant::now() < deadline, "the simulator does not get ready");
            std::thread::sleep(Duration::from_millis(10));
        }
        simulator
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        // SAFETY: our own child, not yet waited for. SIGTERM lets it unmount its files.
        unsafe { libc::kill(self.child.id().cast_signed(), libc::SIGTERM) };
        let _ended = self.child.wait();
    }
}

/// A command that runs the body of `test` in a new process; `role` tells several processes of one test apart.
pub(crate) fn body(test: &str, role: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(BODY, role)
        .env("NVSHARE_SIM_DIR", dir);
    command
}

/// The role of this process if it runs a body.
pub(crate) fn role() -> Option<String> {
    std::env::var(BODY).ok()
}

/// (in, out): bytes of managed memory that the simulator has moved for this process.
pub(crate) fn moved() -> (u64, u64) {
    let target = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_owned();
    let output = Command::new(target.join("nvshare-gpu-sim"))
        .args(["stats", "--json", "--dir"])
        .arg(std::env::var_os("NVSHARE_SIM_DIR").unwrap())
        .output()
        .unwrap();
    let stats: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let clients = stats["gpus"][0]["clients"].as_array().unwrap();
    let own = clients.iter().find(|client| client["pid"] == std::process::id()).unwrap();
    (own["bytes_in"].as_u64().unwrap(), own["bytes_out"].as_u64().unwrap())
}

/// Runs `run` with the initialised driver in a process of its own.
pub(crate) fn program(name: &str, run: impl FnOnce(&Cuda)) {
    if role().is_some() {
        run(&Cuda::open());
        return;
    }
    let simulator = Simulator::start("256MiB");
    let output = body(name, "main", &simulator.dir).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "the body did not run: {text}");
}

pub(crate) const MODULE: &std::ffi::CStr =
    c"nvshare-sim-module 1\nsweep ptr u64 u64 u32\nfill ptr u64 u32\nadd ptr ptr ptr u64\nchecksum ptr u64 ptr\nspin u64\n";

/// The driver with a current primary context and the built-in kernels.
pub(crate) struct Cuda {
    library: *mut c_void,
    module: usize,
}

/// Calls a driver function by name, ABI version and argument types; gives its result code.
macro_rules! call {
    ($cuda:expr, $name:literal $version:literal, $($argument:expr => $type:ty),* $(,)?) => {{
        let function = $cuda.look_up($name, $version, 0);
        // SAFETY: the types are those of cuda.h for this name at this version.
        unsafe {
            let function: unsafe extern "C" fn($($type),*) -> u32 = std::mem::transmute(function);
            function($($argument),*)
        }
    }};
}

impl Cuda {
    /// The library without `cuInit`.
    pub(crate) fn load() -> Self {
        let path = CString::new(library().to_str().unwrap()).unwrap();
        // SAFETY: a valid path.
        let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        assert!(!library.is_null(), "{} cannot be loaded", library_name());
        Self { library, module: 0 }
    }

    pub(crate) fn open() -> Self {
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
    pub(crate) fn symbol(&self, name: &str) -> *mut c_void {
        let name = CString::new(name).unwrap();
        // SAFETY: a live handle and a NUL-terminated name.
        unsafe { libc::dlsym(self.library, name.as_ptr()) }
    }

    /// (code, function, status) of `cuGetProcAddress_v2`.
    pub(crate) fn query(&self, name: &str, version: i32, flags: u64) -> (u32, *mut c_void, u32) {
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

    pub(crate) fn look_up(&self, name: &str, version: i32, flags: u64) -> *mut c_void {
        let (code, function, status) = self.query(name, version, flags);
        assert!(code == 0 && !function.is_null(), "{name} at {version}: code {code}, status {status}");
        function
    }

    pub(crate) fn kernel(&self, name: &str) -> usize {
        let (mut function, name) = (0_usize, CString::new(name).unwrap());
        let code = call!(self, "cuModuleGetFunction" 2000,
            &raw mut function => *mut usize, self.module => usize, name.as_ptr() => *const i8);
        assert_eq!(code, 0);
        function
    }

    /// Launches with arguments given as words; the driver reads as many bytes of each as its kind has.
    pub(crate) fn launch(&self, kernel: &str, stream: usize, arguments: &[u64]) -> u32 {
        let mut pointers: Vec<*const u64> = arguments.iter().map(std::ptr::from_ref).collect();
        call!(self, "cuLaunchKernel" 4000,
            self.kernel(kernel) => usize, 1 => u32, 1 => u32, 1 => u32, 32 => u32, 1 => u32, 1 => u32, 0 => u32,
            stream => usize, pointers.as_mut_ptr() => *mut *const u64, std::ptr::null_mut() => *mut c_void)
    }

    pub(crate) fn allocate(&self, bytes: usize) -> u64 {
        let mut address = 0;
        assert_eq!(call!(self, "cuMemAlloc" 3020, &raw mut address => *mut u64, bytes => usize), 0);
        address
    }

    pub(crate) fn allocate_managed(&self, bytes: usize) -> u64 {
        let mut address = 0;
        let code =
            call!(self, "cuMemAllocManaged" 6000, &raw mut address => *mut u64, bytes => usize, 1 => u32);
        assert_eq!(code, 0);
        address
    }

    pub(crate) fn stream(&self, flags: u32) -> usize {
        let mut stream = 0;
        assert_eq!(call!(self, "cuStreamCreate" 2000, &raw mut stream => *mut usize, flags => u32), 0);
        stream
    }

    pub(crate) fn synchronize(&self, stream: usize) -> u32 {
        call!(self, "cuStreamSynchronize" 2000, stream => usize)
    }

    pub(crate) fn write(&self, address: u64, words: &[u32]) {
        let code = call!(self, "cuMemcpyHtoD" 3020,
            address => u64, words.as_ptr() => *const u32, size_of_val(words) => usize);
        assert_eq!(code, 0);
    }

    pub(crate) fn read(&self, address: u64, words: usize) -> Vec<u32> {
        let mut out = vec![0xdead_beef; words];
        let code = call!(self, "cuMemcpyDtoH" 3020,
            out.as_mut_ptr() => *mut u32, address => u64, words * 4 => usize);
        assert_eq!(code, 0);
        out
    }
}

fn library_name() -> String {
    library().display().to_string()
}
pub(crate) use call;
