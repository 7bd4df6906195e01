//! Programs that come to the driver in other ways than a plain `dlopen`, or that bring libraries which wrap what the shim
//! wraps: each launches once, and the launch goes through the shim wherever the loader lets a preloaded library in.
#![expect(clippy::unwrap_used, reason = "a failure of the harness fails the test")]

mod table_driver;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use nvshare_tests::{compile, program::built, skip};
use table_driver::folder;

/// A program in C. It says the file of the function that it calls and of the one that the driver exports under its
/// name, whether the driver's result came back, and how many calls the driver has counted.
const PROGRAM: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void *, void *);
typedef unsigned long (*count)(const char *, unsigned long *);
typedef int (*result)(const char *);
typedef int (*get)(const char *, void **, int, unsigned long, int *);

static const char *file(void *function)
{
    Dl_info info;
    return function && dladdr(function, &info) ? strrchr(info.dli_fname, '/') + 1 : "nothing";
}

#ifdef DIRECT
int cuLaunchKernel(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void *, void *);
#endif

int run(void)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    unsigned long words[12];
    char *block = malloc(1000);
    launch function;
    if (!driver || !block)
        return 1;
    memset(block, 1, 1000);
#if defined DIRECT
    function = cuLaunchKernel;
#elif defined VERSIONED
    function = (launch)dlvsym(driver, "cuLaunchKernel", "DRIVER_1");
#elif defined LOOKED_UP
    ((get)dlsym(driver, "cuGetProcAddress_v2"))("cuLaunchKernel", (void **)&function, 7000, 2, NULL);
#else
    function = (launch)dlsym(driver, "cuLaunchKernel");
#endif
    int code = function(block, 1, 2, 3, 4, 5, 6, 7, NULL, NULL, NULL);
    free(block);
#ifdef VERSIONED
    printf("%s %d\n", file((void *)function), code);
#else
    const char *name = strcmp(file((void *)function), "nothing") ? NAME : "";
    printf("%s %s %lu\n", file((void *)function), code == ((result)dlsym(driver, "fake_result"))(name) ? "returned" : "lost",
           ((count)dlsym(driver, "fake_calls"))(name, words));
#endif
    return 0;
}

#ifdef LIBRARY
#elif defined DEEP
int main(void)
{
    void *library = dlopen(DEEP, RTLD_NOW | RTLD_DEEPBIND);
    if (!library) {
        puts(dlerror());
        return 1;
    }
    return ((int (*)(void))dlsym(library, "run"))();
}
#else
int main(void) { return run(); }
#endif
"#;

const LEGACY: &str = "-DNAME=\"cuLaunchKernel\"";

/// Compiles the program in a folder of its own.
fn program(arguments: &[&str]) -> (tempfile::TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let program = home.path().join("program");
    let defined_name = arguments.iter().any(|argument| argument.starts_with("-DNAME"));
    let name: &[&str] = if defined_name { &[] } else { &[LEGACY] };
    compile::gcc(PROGRAM, &program, &[name, arguments].concat());
    (home, program)
}

/// What a program says with these libraries preloaded.
fn says(program: &Path, preloaded: &[&Path], variables: &[(&str, &str)]) -> String {
    let preloaded: Vec<_> = preloaded.iter().map(|path| path.to_str().unwrap()).collect();
    let mut command = Command::new(program);
    command
        .env("LD_LIBRARY_PATH", folder())
        .env("LD_PRELOAD", preloaded.join(" "))
        .env("NVSHARE_RUN_DIR", "/nonexistent")
        .envs(variables.iter().copied());
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.is_empty(), "{command:?}: {}\n{errors}", output.status);
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn shim() -> PathBuf {
    built().join("libnvshare.so")
}

const THROUGH_THE_SHIM: &str = "libnvshare.so returned 1";

#[test]
fn a_program_that_looks_its_functions_up_calls_the_wrappers() {
    let (_home, by_symbol) = program(&[]);
    assert_eq!(says(&by_symbol, &[&shim()], &[]), THROUGH_THE_SHIM);
    assert_eq!(says(&by_symbol, &[], &[]), "libcuda.so.1 returned 1", "the test's own program");
    let (_home, by_address) = program(&["-DLOOKED_UP", "-DNAME=\"cuLaunchKernel_ptsz\""]);
    assert_eq!(says(&by_address, &[&shim()], &[]), THROUGH_THE_SHIM);
}

#[test]
fn a_program_that_is_linked_with_the_driver_calls_the_wrappers() {
    let library = format!("-L{}", folder().display());
    for bind in ["-Wl,-z,lazy", "-Wl,-z,now"] {
        let (_home, direct) = program(&["-DDIRECT", "-fPIE", "-pie", &library, "-l:libcuda.so.1", bind]);
        assert_eq!(says(&direct, &[&shim()], &[]), THROUGH_THE_SHIM, "{bind}");
        assert_eq!(says(&direct, &[], &[]), "libcuda.so.1 returned 1", "the test's own program");
    }
}

#[test]
fn a_library_bound_to_its_own_dependencies_works_past_the_shim() {
    let library = format!("-L{}", folder().display());
    for kind in [&["-DDIRECT"][..], &[]] {
        let link = ["-DLIBRARY", "-shared", "-fPIC", &library, "-Wl,--no-as-needed", "-l:libcuda.so.1"];
        let (_home, deep) = program(&[kind, &link].concat());
        let (_home, main) = program(&[&format!("-DDEEP=\"{}\"", deep.display())]);
        assert_eq!(says(&main, &[&shim()], &[]), says(&main, &[], &[]));
        assert_eq!(says(&main, &[&shim()], &[]), "libcuda.so.1 returned 1");
    }
}

#[test]
fn a_look_up_by_symbol_version_gives_the_wrapper() {
    // The driver of this test is a small one: its symbols have versions.
    let home = tempfile::tempdir().unwrap();
    let (script, script_argument) = (home.path().join("versions"), "-Wl,--version-script=");
    std::fs::write(&script, "DRIVER_1 { global: cu*; };\n").unwrap();
    let driver = home.path().join("libcuda.so.1");
    let versions = format!("{script_argument}{}", script.display());
    compile::gcc(
        "int cuLaunchKernel(void) { return 4321; }\n",
        &driver,
        &["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", &versions],
    );
    let (_home, program) = program(&["-DVERSIONED"]);
    let run = |preloaded: &[&Path]| {
        says(&program, preloaded, &[("LD_LIBRARY_PATH", home.path().to_str().unwrap())])
    };
    assert_eq!(run(&[]), "libcuda.so.1 4321", "the test's own program");
    assert_eq!(run(&[&shim()]), "libnvshare.so 4321");
}

/// The library of this name as the loader would find it; `None`, after saying so, where there is none.
fn installed(library: &str, package: &str) -> Option<PathBuf> {
    let folders = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"];
    let found = folders.iter().map(|folder| Path::new(folder).join(library)).find(|path| path.exists());
    if found.is_none() {
        skip(&format!("a program with {library}"), &format!("the Debian package {package} is not installed"));
    }
    found
}

#[test]
fn allocators_that_are_preloaded_too_work_before_and_behind_the_shim() {
    let (_home, program) = program(&[]);
    for (library, package) in
        [("libjemalloc.so.2", "libjemalloc2"), ("libtcmalloc_minimal.so.4", "libtcmalloc-minimal4")]
    {
        let Some(library) = installed(library, package) else { continue };
        for order in [[&shim(), &library], [&library, &shim()]] {
            let order = order.map(PathBuf::as_path);
            assert_eq!(says(&program, &order, &[]), THROUGH_THE_SHIM, "{order:?}");
        }
    }
}

#[test]
fn programs_under_the_address_sanitizer_work_with_its_library_before_behind_and_inside() {
    // The process ends with the shim's state alive, on purpose.
    let options = ("ASAN_OPTIONS", "detect_leaks=0");
    let (_home, inside) = program(&["-fsanitize=address", "-static-libasan"]);
    assert_eq!(says(&inside, &[&shim()], &[options]), THROUGH_THE_SHIM);
    let (_home, beside) = program(&["-fsanitize=address"]);
    let library = installed("libasan.so.8", "libasan8");
    if let Some(library) = &library {
        assert_eq!(says(&beside, &[library, &shim()], &[options]), THROUGH_THE_SHIM);
    }
    let any_order = ("ASAN_OPTIONS", "detect_leaks=0:verify_asan_link_order=0");
    assert_eq!(says(&beside, &[&shim()], &[any_order]), THROUGH_THE_SHIM);
}
