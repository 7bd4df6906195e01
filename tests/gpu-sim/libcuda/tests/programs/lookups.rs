//! The lookup contract, on every row that real CUDA runtimes ask for.

use std::ptr;

use nvshare_tests::{
    api::{LookUp, runtime_look_ups},
    call,
    cuda::Cuda,
    program::{Host, built, passed, role},
};

fn driver() -> Cuda {
    Cuda::load_from(&built().join("libcuda.so"))
}

#[test]
fn every_symbol_that_a_runtime_asks_for_resolves() {
    let cuda = driver();
    for LookUp { name, version, flags } in runtime_look_ups() {
        let (code, function, status) = cuda.query(name, version, flags);
        // Two probes of the runtimes name nothing: the empty name, and a suffixed one.
        let known = !name.is_empty() && !name.ends_with("_ptsz");
        let expected = if known { (0, false, 0) } else { (0, true, 1) };
        assert_eq!((code, function.is_null(), status), expected, "{name} at {version}, flags {flags}");
    }
}

#[test]
fn a_look_up_gives_the_newest_abi_that_is_not_newer_than_asked() {
    let cuda = driver();
    for (name, version, flags, exported) in [
        ("cuMemAlloc", 2000, 0, "cuMemAlloc"),
        ("cuMemAlloc", 3020, 0, "cuMemAlloc_v2"),
        ("cuMemAlloc", 13000, 2, "cuMemAlloc_v2"),
        ("cuMemPrefetchAsync", 12010, 0, "cuMemPrefetchAsync"),
        ("cuMemPrefetchAsync", 12020, 0, "cuMemPrefetchAsync_v2"),
        ("cuMemPrefetchAsync", 12020, 2, "cuMemPrefetchAsync_v2_ptsz"),
        ("cuLaunchKernel", 7000, 2, "cuLaunchKernel_ptsz"),
        ("cuLaunchKernel", 7000, 1, "cuLaunchKernel"),
        // Older than the per-thread variant: the legacy one.
        ("cuLaunchKernel", 4000, 2, "cuLaunchKernel"),
        ("cuMemcpyHtoD", 7000, 2, "cuMemcpyHtoD_v2_ptds"),
        ("cuGetProcAddress", 11030, 0, "cuGetProcAddress"),
        ("cuGetProcAddress", 12000, 0, "cuGetProcAddress_v2"),
        ("cuStreamGetCaptureInfo", 11030, 2, "cuStreamGetCaptureInfo_v2_ptsz"),
        ("cuCtxSynchronize", 12080, 0, "cuCtxSynchronize"),
        ("cuCtxSynchronize", 13000, 0, "cuCtxSynchronize_v2"),
    ] {
        let exported_at = cuda.symbol(exported);
        assert!(!exported_at.is_null(), "{exported} is not exported");
        assert_eq!(cuda.look_up(name, version, flags), exported_at, "{name} at {version}, flags {flags}");
    }
}

#[test]
fn a_look_up_that_fails_says_why() {
    let cuda = driver();
    assert_eq!(cuda.query("cuNoSuchThing", 13000, 0), (0, ptr::null_mut(), 1));
    assert_eq!(cuda.query("cuMemAlloc_v2", 13000, 0), (0, ptr::null_mut(), 1));
    assert_eq!(cuda.query("cuMemPrefetchAsync", 7000, 0), (0, ptr::null_mut(), 2));
    // Above the driver's version: an error, and nothing is touched.
    let (code, function, status) = cuda.query("cuInit", 13010, 0);
    assert_eq!((code, function, status), (1, ptr::dangling_mut(), 77));
}

#[test]
fn an_older_driver_does_not_know_what_came_later() {
    const TEST: &str = "lookups::an_older_driver_does_not_know_what_came_later";
    if role().is_some() {
        let cuda = Cuda::load();
        assert_eq!(cuda.look_up("cuMemAdvise", 12000, 0), cuda.symbol("cuMemAdvise"));
        assert_eq!(cuda.query("cuMemAdvise", 12020, 0).0, 1, "newer than the driver");
        assert_eq!(cuda.query("cuMemcpyBatchAsync", 12000, 0), (0, ptr::null_mut(), 1));
        return;
    }
    let host = Host::new("64MiB");
    let mut command = host.program(TEST, "main");
    passed(&command.env("NVSHARE_SIM_DRIVER_VERSION", "12000").output().unwrap());
}

#[test]
fn the_status_pointer_may_be_null_and_the_older_function_does_not_have_it() {
    let cuda = driver();
    let mut function = ptr::null_mut();
    let code = call!(cuda, "cuGetProcAddress" 12000,
        c"cuInit".as_ptr() => *const i8, &raw mut function => *mut *mut std::ffi::c_void, 12000 => i32, 0 => u64,
        ptr::null_mut() => *mut u32);
    assert_eq!((code, function), (0, cuda.symbol("cuInit")));
    // A fifth argument is not the older function's: it must stay as it is.
    let mut status = 0x5a5a_u32;
    let code = call!(cuda, "cuGetProcAddress" 11030,
        c"cuInit".as_ptr() => *const i8, &raw mut function => *mut *mut std::ffi::c_void, 11030 => i32, 0 => u64,
        &raw mut status => *mut u32);
    assert_eq!((code, function, status), (0, cuda.symbol("cuInit"), 0x5a5a));
}

#[test]
fn a_name_without_an_implementation_says_that_it_is_not_supported() {
    let cuda = driver();
    assert_eq!(call!(cuda, "cuImportExternalMemory" 10000, 0 => usize, 0 => usize), 801);
}
