//! A program under the shim. Its argument says what to do; a failed assertion is its failure.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    io::{BufRead, Write},
    mem::transmute,
    ptr,
};

type Ptr = *mut c_void;
type Gpa = extern "C" fn(*const c_char, *mut Ptr, c_int, u64, *mut c_int) -> c_int;
type Gpa1 = extern "C" fn(*const c_char, *mut Ptr, c_int, u64) -> c_int;
type Launch =
    extern "C" fn(Ptr, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Ptr, Ptr, Ptr) -> c_int;

unsafe extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> Ptr;
    fn dlsym(handle: Ptr, name: *const c_char) -> Ptr;
    fn dlvsym(handle: Ptr, name: *const c_char, version: *const c_char) -> Ptr;
    fn dladdr(address: Ptr, info: *mut [usize; 4]) -> c_int;
    fn getppid() -> c_int;
}

/// The file that a function lies in.
fn file_of(function: Ptr) -> String {
    let mut info = [0usize; 4];
    assert_ne!(unsafe { dladdr(function, &raw mut info) }, 0);
    unsafe { CStr::from_ptr(info[0] as *const c_char) }.to_str().unwrap().rsplit('/').next().unwrap().to_owned()
}

struct Driver(Ptr);

impl Driver {
    fn open() -> Self {
        let handle = unsafe { dlopen(c"libcuda.so.1".as_ptr(), 2) };
        assert!(!handle.is_null());
        Self(handle)
    }
    fn get(&self, name: &CStr) -> Ptr {
        unsafe { dlsym(self.0, name.as_ptr()) }
    }
    fn gpa(&self) -> Gpa {
        unsafe { transmute::<Ptr, Gpa>(self.get(c"cuGetProcAddress_v2")) }
    }
    fn ask(&self, name: &CStr, version: c_int, flags: u64) -> Ptr {
        let (mut found, mut status) = (ptr::null_mut(), -1);
        assert_eq!(self.gpa()(name.as_ptr(), &raw mut found, version, flags, &raw mut status), 0);
        assert_eq!(status, c_int::from(found.is_null()));
        found
    }
    fn calls(&self, name: &CStr) -> usize {
        let calls: extern "C" fn(*const c_char) -> usize = unsafe { transmute(self.get(c"fake_calls")) };
        calls(name.as_ptr())
    }
    fn retain(&self) {
        let retain: extern "C" fn(*mut Ptr, c_int) -> c_int =
            unsafe { transmute(self.get(c"cuDevicePrimaryCtxRetain")) };
        let mut context = ptr::null_mut();
        assert_eq!(retain(&raw mut context, 0), 0);
    }
    fn alloc(&self, size: usize) -> (c_int, u64) {
        let alloc: extern "C" fn(*mut u64, usize) -> c_int = unsafe { transmute(self.get(c"cuMemAlloc_v2")) };
        let mut address = 0;
        (alloc(&raw mut address, size), address)
    }
    fn free(&self, address: u64) -> c_int {
        let free: extern "C" fn(u64) -> c_int = unsafe { transmute(self.get(c"cuMemFree_v2")) };
        free(address)
    }
    fn info(&self) -> (c_int, usize, usize) {
        let info: extern "C" fn(*mut usize, *mut usize) -> c_int =
            unsafe { transmute(self.get(c"cuMemGetInfo_v2")) };
        let (mut free, mut total) = (77, 88);
        (info(&raw mut free, &raw mut total), free, total)
    }
}

fn launch(function: Ptr, stream: usize, extra: usize) -> c_int {
    let launch: Launch = unsafe { transmute(function) };
    launch(ptr::null_mut(), 1, 1, 1, 1, 1, 1, 0, stream as Ptr, ptr::null_mut(), extra as Ptr)
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

fn nothing_was_started() {
    assert_eq!(threads(), 1);
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let target = std::fs::read_link(entry.path()).unwrap_or_default().to_string_lossy().into_owned();
        assert!(!target.starts_with("socket:") && !target.contains("memfd"), "{target}");
    }
}

fn look_ups() {
    let driver = Driver::open();
    let (legacy, per_thread) = (driver.ask(c"cuLaunchKernel", 4000, 0), driver.ask(c"cuLaunchKernel", 7000, 2));
    assert_eq!((file_of(legacy), file_of(per_thread)), ("libnvshare.so".into(), "libnvshare.so".into()));
    assert_ne!(legacy, per_thread);
    assert_eq!((launch(legacy, 0, 41), launch(per_thread, 0, 42)), (41, 42));
    assert_eq!((driver.calls(c"cuLaunchKernel"), driver.calls(c"cuLaunchKernel_ptsz")), (1, 1));
    assert_eq!(driver.ask(c"cuLaunchKernel", 12080, 0), legacy);
    assert_eq!(driver.get(c"cuLaunchKernel"), legacy);

    // cuGetProcAddress itself, in both of its forms, with a status that must be written, and without one.
    let old: Gpa1 = unsafe { transmute(driver.ask(c"cuGetProcAddress", 11030, 0)) };
    let new: Gpa = unsafe { transmute(driver.ask(c"cuGetProcAddress", 12000, 0)) };
    assert_ne!(old as usize, new as usize);
    let (mut found, mut status) = (ptr::null_mut(), 0x5a5a_5a5a);
    assert_eq!(old(c"cuLaunchKernel".as_ptr(), &raw mut found, 4000, 0), 0);
    assert_eq!(found, legacy);
    assert_eq!(new(c"cuLaunchKernel".as_ptr(), &raw mut found, 4000, 0, &raw mut status), 0);
    assert_eq!((found, status), (legacy, 0));
    assert_eq!(new(c"cuLaunchKernel".as_ptr(), &raw mut found, 7000, 2, ptr::null_mut()), 0);
    assert_eq!(found, per_thread);

    // What the driver does not have, or refuses, is so with us too.
    assert!(driver.ask(c"cuMemCreate", 12000, 0).is_null());
    assert!(driver.ask(c"", 0, 0).is_null());
    (found, status) = (0x99 as Ptr, 0x5a5a);
    assert_eq!(new(c"cuLaunchKernel".as_ptr(), &raw mut found, 99000, 0, &raw mut status), 1);
    assert_eq!((found, status), (0x99 as Ptr, 0x5a5a));
    assert!(driver.get(c"cuMemCreate").is_null());
    assert!(unsafe { dlsym(ptr::null_mut(), c"cuMemCreate".as_ptr()) }.is_null());

    // Three functions of one name: two that are known, one that is newer than the shim.
    let (one, two) = (driver.ask(c"cuMemPrefetchAsync", 8000, 0), driver.ask(c"cuMemPrefetchAsync", 12020, 0));
    assert_ne!(one, two);
    let first: extern "C" fn(u64, usize, c_int, Ptr) -> c_int = unsafe { transmute(one) };
    assert_eq!(first(1, 2, 3, 5 as Ptr), 5);
    #[repr(C)]
    struct Location(c_int, c_int);
    let second: extern "C" fn(u64, usize, Location, c_uint, Ptr) -> c_int = unsafe { transmute(two) };
    assert_eq!(second(1, 2, Location(1, 2), 3, 4 as Ptr), 1234);
    assert_eq!(file_of(driver.ask(c"cuMemPrefetchAsync", 21000, 0)), "libcuda.so.1");
    assert_eq!(file_of(driver.ask(c"cuInit", 2000, 0)), "libcuda.so.1");
    nothing_was_started();
}

fn memory() {
    let driver = Driver::open();
    driver.retain();
    let mib = 1 << 20;
    let (_, before, total) = driver.info();
    assert!(before < total);
    let (code, address) = driver.alloc(100 * mib);
    assert_eq!((code, driver.calls(c"cuMemAllocManaged"), driver.calls(c"cuMemAlloc_v2")), (0, 1, 0));
    assert_eq!(driver.info().1, before - 100 * mib);
    assert_eq!(driver.alloc(mib).0, 0);
    assert_eq!((driver.calls(c"cuMemAllocManaged"), driver.calls(c"cuMemAlloc_v2")), (1, 1));
    assert_eq!(driver.alloc(2048 * mib).0, 2, "more than the GPU has");
    assert_eq!(driver.free(0xdead), 1, "the driver's own result");
    assert_eq!(driver.free(address), 0);
    assert_eq!(driver.info().1, before - mib);
    for _ in 0..4 {
        assert_eq!(driver.alloc(200 * mib).0, 0);
    }
    assert_eq!(driver.alloc(300 * mib).0, 2, "together more than the GPU has");
}

fn no_managed_memory() {
    let driver = Driver::open();
    driver.retain();
    assert_eq!(driver.alloc(8 << 20).0, 0);
    assert_eq!((driver.calls(c"cuMemAllocManaged"), driver.calls(c"cuMemAlloc_v2")), (1, 1));
    assert_eq!(driver.info(), (999, 77, 88), "a failed question leaves its outputs");
}

/// Launches once for each line of input (a stream number), and says what came of it.
fn work() {
    let driver = Driver::open();
    driver.retain();
    driver.alloc(4 << 20);
    let launch_kernel = driver.get(c"cuLaunchKernel");
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        if line == "fork" {
            let child = unsafe { fork() };
            if child == 0 {
                // The child's own launch passes, whatever the agent has told the parent.
                let code = launch(launch_kernel, 0, 7);
                println!("child {code} with {} threads", threads());
                std::io::stdout().flush().unwrap();
                unsafe { _exit(0) };
            }
            let mut status = 0;
            unsafe { waitpid(child, &raw mut status, 0) };
            continue;
        }
        let stream: usize = line.parse().unwrap();
        std::thread::spawn(move || {
            let driver = Driver::open();
            println!("launched {} {}", stream, launch(driver.get(c"cuLaunchKernel"), stream, 3));
        });
    }
}

unsafe extern "C" {
    fn fork() -> c_int;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn _exit(code: c_int) -> !;
}

fn main() {
    match std::env::args().nth(1).unwrap().as_str() {
        "lookups" => look_ups(),
        "no-cuda" => {
            assert!(unsafe { dlsym(ptr::null_mut(), c"cuLaunchKernel".as_ptr()) }.is_null());
            assert!(!unsafe { dlsym(ptr::null_mut(), c"malloc".as_ptr()) }.is_null());
            nothing_was_started();
        }
        "versioned" => {
            let driver = Driver::open();
            assert!(!unsafe { dlvsym(ptr::null_mut(), c"malloc".as_ptr(), c"GLIBC_2.2.5".as_ptr()) }.is_null());
            // The fake driver has no symbol versions, so there is nothing to find, for us as for the C library.
            assert!(unsafe { dlvsym(driver.0, c"cuMemAlloc_v2".as_ptr(), c"NONE".as_ptr()) }.is_null());
        }
        "second" => {
            let parent = unsafe { getppid() };
            assert!(parent < 0, "the second library was not called");
        }
        "disabled" => {
            let driver = Driver::open();
            assert_eq!(file_of(driver.get(c"cuLaunchKernel")), "libcuda.so.1");
            driver.retain();
            assert_eq!(driver.alloc(8 << 20).0, 0);
            assert_eq!(driver.calls(c"cuMemAllocManaged"), 0);
            nothing_was_started();
        }
        "memory" => memory(),
        "no-managed" => no_managed_memory(),
        "work" => work(),
        other => panic!("{other}?"),
    }
}
