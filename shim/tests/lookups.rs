//! What programs get from their look-ups under the shim: what the driver alone gives them, or the wrapper of that very
//! function.
#![expect(clippy::unwrap_used, reason = "a failure of the harness fails the test")]
#![expect(clippy::print_stdout, reason = "figures for whoever reads the tests; a body answers its test")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use nvshare_tests::{
    api::{self, LookUp, entry_points, functions},
    call, compile,
    cuda::{Cuda, owner},
    program::{Host, built, passed, role},
    runtime,
};

/// Where a body writes what it got: one look-up a line, the owner of the answer last.
const ANSWERS: &str = "NVSHARE_TEST_ANSWERS";

fn hooked() -> BTreeSet<&'static str> {
    functions().iter().filter(|function| function.hooked).map(|function| function.symbol).collect()
}

/// Checks look-ups under the shim against the same look-ups without it; the number of wrappers among the answers.
fn compare(alone: &str, shimmed: &str) -> usize {
    let hooked = hooked();
    let mut wrappers = 0;
    assert_eq!(alone.lines().count(), shimmed.lines().count(), "another number of look-ups");
    for (alone, shimmed) in alone.lines().zip(shimmed.lines()) {
        let expected = match alone.split_once("libcuda.so.1 ") {
            Some((asked, symbol)) if hooked.contains(symbol) => {
                wrappers += 1;
                format!("{asked}libnvshare.so {symbol}")
            }
            _ => alone.to_owned(),
        };
        assert_eq!(shimmed, expected, "without the shim: {alone}");
    }
    wrappers
}

/// Every look-up that a runtime makes, every entry point as itself, and names that are none.
fn questions() -> Vec<LookUp> {
    let mut questions = api::runtime_look_ups();
    for point in entry_points() {
        for flags in [0, 1, 2] {
            questions.push(LookUp { name: point.name, version: point.version, flags });
            // Names that carry a version are outside the contract; a driver may still know them.
            questions.push(LookUp { name: point.symbol, version: point.version, flags });
        }
    }
    for name in ["", "cu", "cuLaunchKernel_v9", "cuNoSuchThing", "notEvenClose"] {
        questions.push(LookUp { name, version: 12000, flags: 0 });
    }
    questions.push(LookUp { name: "cuLaunchKernel", version: 99000, flags: 0 });
    questions.push(LookUp { name: "cuLaunchKernel", version: 12000, flags: 1 << 40 });
    questions
}

/// Asks every question in both forms of `cuGetProcAddress`, and the newer one without a status, too.
fn ask_everything() {
    let cuda = Cuda::load();
    let mut answers = String::new();
    for LookUp { name, version, flags } in questions() {
        let (code, function, status) = cuda.query(name, version, flags);
        let mut line = |form, status: &str, code: u32, function| {
            writeln!(answers, "{form} {name}|{version}|{flags}|{code}|{status}|{}", owner(function)).unwrap();
        };
        line("new", &status.to_string(), code, function);
        let name = std::ffi::CString::new(name).unwrap();
        let mut place = std::ptr::dangling_mut();
        let code = call!(cuda, "cuGetProcAddress" 12000,
            name.as_ptr() => *const i8, &raw mut place => *mut *mut std::ffi::c_void, version => i32, flags => u64,
            std::ptr::null_mut() => *mut u32);
        line("no status", "-", code, place);
        let mut place = std::ptr::dangling_mut();
        let code = call!(cuda, "cuGetProcAddress" 11030,
            name.as_ptr() => *const i8, &raw mut place => *mut *mut std::ffi::c_void, version => i32, flags => u64);
        line("old", "-", code, place);
    }
    fs::write(std::env::var_os(ANSWERS).unwrap(), answers).unwrap();
}

fn every_answer_is_the_drivers_or_its_wrapper(test: &str, driver: &str, at_least: usize) {
    if role().is_some() {
        return ask_everything();
    }
    let host = Host::new("64MiB");
    let answers = |mut command: Command, name: &str| {
        let path = host.home().join(name);
        command.env(ANSWERS, &path).env("NVSHARE_SIM_DRIVER_VERSION", driver);
        let said = passed(&command.output().unwrap());
        assert!(!said.contains("nvshare:"), "look-ups alone need no words: {said}");
        fs::read_to_string(path).unwrap()
    };
    let alone = answers(host.program(test, "main"), "alone");
    let shimmed = answers(host.shimmed(test, "main", &host.home().join("nobody")), "shimmed");
    let wrappers = compare(&alone, &shimmed);
    println!("driver {driver}: {} look-ups, {wrappers} of them give wrappers", alone.lines().count());
    assert!(wrappers > at_least, "only {wrappers} look-ups gave wrappers");
}

#[test]
fn a_driver_that_knows_every_function_is_answered_as_alone_or_with_the_wrapper() {
    every_answer_is_the_drivers_or_its_wrapper(
        "a_driver_that_knows_every_function_is_answered_as_alone_or_with_the_wrapper",
        "13050",
        4000,
    );
}

#[test]
fn a_driver_a_major_version_older_is_answered_as_alone_or_with_the_wrapper() {
    every_answer_is_the_drivers_or_its_wrapper(
        "a_driver_a_major_version_older_is_answered_as_alone_or_with_the_wrapper",
        "12000",
        3000,
    );
}

/// Looks every exported name up in every way that a program has.
fn look_up_by_symbol() {
    let first = Cuda::load();
    let again = Cuda::load();
    let other = Cuda::load_from(Path::new(&std::env::var("NVSHARE_TEST_LIBCUDA").unwrap()));
    let mut answers = String::new();
    let mut note = |way: &str, name: &str, function| {
        writeln!(answers, "{way} {name}|{}", owner(function)).unwrap();
    };
    let names: BTreeSet<_> = entry_points().iter().map(|point| point.symbol).collect();
    let default = |name: &str| {
        let name = std::ffi::CString::new(name).unwrap();
        // SAFETY: a valid name.
        unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) }
    };
    for name in names.iter().copied().chain(["cuNoSuchThing", "malloc"]) {
        note("first handle", name, first.symbol(name));
        note("second handle", name, again.symbol(name));
        note("by path", name, other.symbol(name));
        if name != "malloc" {
            note("whole program, driver not in it", name, default(name));
        }
    }
    // SAFETY: a plain load of a library that is there already, this time for every later search.
    let global = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    assert!(!global.is_null());
    for name in names {
        note("whole program, driver in it", name, default(name));
    }
    fs::write(std::env::var_os(ANSWERS).unwrap(), answers).unwrap();
}

#[test]
fn every_way_to_look_a_symbol_up_gives_what_it_gives_alone_or_the_wrapper() {
    const TEST: &str = "every_way_to_look_a_symbol_up_gives_what_it_gives_alone_or_the_wrapper";
    if role().is_some() {
        return look_up_by_symbol();
    }
    let host = Host::new("64MiB");
    let answers = |mut command: Command, name: &str| {
        let path = host.home().join(name);
        let library = host.simulator().dir().join("lib/libcuda.so.1");
        passed(&command.env(ANSWERS, &path).env("NVSHARE_TEST_LIBCUDA", library).output().unwrap());
        fs::read_to_string(path).unwrap()
    };
    let alone = answers(host.program(TEST, "main"), "alone");
    let shimmed = answers(host.shimmed(TEST, "main", &host.home().join("nobody")), "shimmed");
    let wrappers = compare(&alone, &shimmed);
    assert_eq!(wrappers, 4 * hooked().len(), "hooked functions, each in the four ways that find it");
    assert!(alone.contains("driver not in it cuLaunchKernel|null"), "RTLD_DEFAULT found a local library");
}

/// The look-ups of a real runtime's first call, as a library between it and the shim sees them.
fn record(host: &Host, test: &str, library: &Path, shim: Option<&Path>) -> (String, String) {
    let recorder = host.home().join("librecorder.so");
    if !recorder.exists() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lookups/recorder.rs");
        compile::rustc(&source, &recorder, &["--crate-type=cdylib"]);
    }
    let record = host.home().join(if shim.is_some() { "shimmed" } else { "alone" });
    let preload: Vec<&Path> = [Some(recorder.as_path()), shim].into_iter().flatten().collect();
    let mut command = host.program(test, "main");
    command
        .env("LD_PRELOAD", preload.iter().map(|path| path.to_str().unwrap()).collect::<Vec<_>>().join(" "))
        .env("NVSHARE_RUN_DIR", host.home().join("nobody"))
        .env("NVSHARE_TEST_RECORD", &record)
        .env("NVSHARE_SIM_LOG", "2")
        .env(runtime::VARIABLE, library);
    let output = command.output().unwrap();
    let said = format!("{}{}", passed(&output), String::from_utf8_lossy(&output.stdout));
    (fs::read_to_string(record).unwrap(), said)
}

fn calls(said: &str, function: &str) -> usize {
    said.lines().filter(|line| line.contains(&format!(": {function} = "))).count()
}

fn a_runtime_gets_wrappers(test: &str, package: &str) {
    if role().is_some() {
        println!("the first call gives {}", runtime::count_devices());
        return;
    }
    let Some(library) = runtime::library(package) else { return };
    let host = Host::new("64MiB");
    let shim: PathBuf = built().join("libnvshare.so");
    let (alone, said_alone) = record(&host, test, &library, None);
    let (shimmed, said_shimmed) = record(&host, test, &library, Some(&shim));
    let result =
        |said: &str| said.split("the first call gives ").nth(1).unwrap().lines().next().unwrap().to_owned();

    // The record is complete: as many look-ups as the driver answered.
    let answered = calls(&said_alone, "cuGetProcAddress") + calls(&said_alone, "cuGetProcAddress_v2");
    assert_eq!(alone.lines().count(), answered);
    let wrappers = compare(&alone, &shimmed);
    println!(
        "{package}: {answered} look-ups, {wrappers} of them give wrappers; the first call gives {}",
        result(&said_shimmed)
    );
    assert!(answered > 380 && wrappers > 80, "{answered} look-ups, {wrappers} wrappers");
    // The runtime goes as far as without the shim, and fails with the same code.
    assert_eq!(result(&said_shimmed), result(&said_alone));
    for function in ["cuInit", "cuDriverGetVersion", "cuGetExportTable"] {
        assert_eq!(calls(&said_shimmed, function), calls(&said_alone, function), "calls of {function}");
    }
    assert_eq!(calls(&said_shimmed, "cuInit"), 1);

    // What it asked for is known, whatever the driver made of it.
    let points = entry_points();
    let names: BTreeMap<_, _> =
        points.iter().flat_map(|point| [(point.name, point), (point.symbol, point)]).collect();
    let unknown: BTreeSet<_> = alone
        .lines()
        .map(|line| line.split('|').next().unwrap())
        .filter(|name| !name.is_empty() && !names.contains_key(name))
        .collect();
    assert!(
        unknown.is_empty(),
        "{package} looks up functions that are not classified; name them in driver-api.txt and \
         driver-functions.txt: {unknown:?}"
    );
}

#[test]
fn the_cuda_11_runtime_gets_the_drivers_answers_and_our_wrappers() {
    a_runtime_gets_wrappers(
        "the_cuda_11_runtime_gets_the_drivers_answers_and_our_wrappers",
        runtime::PACKAGES[0],
    );
}

#[test]
fn the_first_cuda_12_runtime_gets_the_drivers_answers_and_our_wrappers() {
    a_runtime_gets_wrappers(
        "the_first_cuda_12_runtime_gets_the_drivers_answers_and_our_wrappers",
        runtime::PACKAGES[1],
    );
}

#[test]
fn the_last_cuda_12_runtime_gets_the_drivers_answers_and_our_wrappers() {
    a_runtime_gets_wrappers(
        "the_last_cuda_12_runtime_gets_the_drivers_answers_and_our_wrappers",
        runtime::PACKAGES[2],
    );
}

#[test]
fn the_newest_cuda_runtime_gets_the_drivers_answers_and_our_wrappers() {
    a_runtime_gets_wrappers(
        "the_newest_cuda_runtime_gets_the_drivers_answers_and_our_wrappers",
        runtime::PACKAGES[3],
    );
}
