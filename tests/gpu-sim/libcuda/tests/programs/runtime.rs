//! NVIDIA's real CUDA runtime against the simulated driver, as far as it goes.
//!
//! The runtime looks up all its symbols and initialises the driver, then asks for a table by which it tests that the driver
//! is NVIDIA's own (see `src/export_table.rs`). What comes before is checked here: real look-ups, answered.

use nvshare_tests::{
    program::{Host, passed, role},
    runtime,
};

fn runtime_reaches_the_driver(test: &str, package: &str) {
    if role().is_some() {
        // cudaErrorSymbolNotFound: the driver's own answer about the table comes back unharmed.
        assert_eq!(runtime::count_devices(), 500);
        return;
    }
    let Some(library) = runtime::library(package) else { return };
    let host = Host::new("256MiB");
    let mut command = host.program(test, "main");
    let output = command.env("NVSHARE_SIM_LOG", "2").env(runtime::VARIABLE, library).output().unwrap();
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
