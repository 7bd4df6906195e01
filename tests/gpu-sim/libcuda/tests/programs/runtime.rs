//! NVIDIA's real CUDA runtime against the simulated driver, as far as it goes.
//!
//! The runtime looks up all its symbols and initialises the driver, then asks for a table by which it tests that the driver
//! is NVIDIA's own (see `src/export_table.rs`). What comes before is checked here: real look-ups, answered.

use std::{
    ffi::CString,
    path::{Path, PathBuf},
    process::Command,
};

use nvshare_tests::{
    everything_required,
    program::{Host, passed, role},
};

/// The runtime's library, fetched from the Python package index; `None` if that is not possible here.
fn fetch(package: &str, into: &Path) -> Option<PathBuf> {
    let fetched = Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--target"])
        .arg(into)
        .arg(package)
        .output();
    match fetched {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            eprintln!("pip cannot fetch {package}: {}", String::from_utf8_lossy(&output.stderr));
            return None;
        }
        Err(error) => {
            eprintln!("pip cannot be run: {error}");
            return None;
        }
    }
    let mut folders = vec![into.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libcudart.so"))
            {
                return Some(path);
            }
        }
    }
    panic!("{package} holds no libcudart.so");
}

fn runtime_reaches_the_driver(test: &str, package: &str) {
    if role().is_some() {
        let path = CString::new(std::env::var("NVSHARE_TEST_CUDART").unwrap()).unwrap();
        // SAFETY: a real runtime, whose function has this type.
        unsafe {
            let runtime = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
            assert!(!runtime.is_null());
            let count = libc::dlsym(runtime, c"cudaGetDeviceCount".as_ptr());
            assert!(!count.is_null());
            let count: extern "C" fn(*mut i32) -> i32 = std::mem::transmute(count);
            let mut devices = -1;
            // cudaErrorSymbolNotFound: the driver's own answer about the table comes back unharmed.
            assert_eq!(count(&raw mut devices), 500);
        }
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let Some(runtime) = fetch(package, home.path()) else {
        assert!(!everything_required(), "NVSHARE_REQUIRE_ALL=1: {package} is needed");
        eprintln!("SKIPPED {test}: {package} cannot be fetched");
        return;
    };
    let host = Host::new("256MiB");
    let output = host
        .program(test, "main")
        .env("NVSHARE_SIM_LOG", "2")
        .env("NVSHARE_TEST_CUDART", runtime)
        .output()
        .unwrap();
    let said = passed(&output);
    let calls = |line: &str| said.lines().filter(|said| said.ends_with(line)).count();
    assert!(calls("cuGetProcAddress_v2 = 0") > 380, "{} look-ups answered", calls("cuGetProcAddress_v2 = 0"));
    assert_eq!(calls("cuInit = 0"), 1, "{said}");
    assert!(said.contains("cuGetExportTable"), "{said}");
}

#[test]
fn the_cuda_13_runtime_resolves_its_symbols_and_initialises_the_driver() {
    runtime_reaches_the_driver(
        "runtime::the_cuda_13_runtime_resolves_its_symbols_and_initialises_the_driver",
        "nvidia-cuda-runtime",
    );
}

#[test]
fn the_cuda_12_runtime_resolves_its_symbols_and_initialises_the_driver() {
    runtime_reaches_the_driver(
        "runtime::the_cuda_12_runtime_resolves_its_symbols_and_initialises_the_driver",
        "nvidia-cuda-runtime-cu12",
    );
}
