//! The portable library in the userlands that containers have: old and new C libraries, two architectures, and those
//! programs which it cannot or need not enter.
#![expect(clippy::unwrap_used, reason = "a failure of the harness fails the test")]

#[path = "portable/userland.rs"]
mod userland;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use nvshare_tests::{is_root, skip};
use object::{Object as _, ObjectSymbol as _};
use userland::{Machine, Userland, done, is_program};

/// A version that the fake driver gives its symbols, so that `dlvsym` has something to find.
const DRIVER_VERSION: &str = "DRIVER";
/// Exported by the fake driver, not hooked.
const NOT_HOOKED: &str = "cuInit";

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}

/// Runs `cargo xtask shim` once, for the library and for the one that panics; whether this toolchain can.
fn is_built() -> bool {
    static BUILT: OnceLock<bool> = OnceLock::new();
    *BUILT.get_or_init(|| {
        let sysroot = done(Command::new("rustc").args(["--print", "sysroot"]));
        if !Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/std/src/lib.rs").exists() {
            skip(
                "the portable library",
                "the compiler's library sources are missing (rustup component add rust-src)",
            );
            return false;
        }
        for more in [&["--target=all"][..], &["--target=all", "--library=panics"]] {
            let mut command = Command::new(env!("CARGO"));
            command.args(["run", "--quiet", "--package=xtask", "--", "shim"]).args(more);
            done(command.current_dir(env!("CARGO_MANIFEST_DIR")));
        }
        true
    })
}

/// What `cargo xtask shim` built for a machine.
fn built(machine: Machine, name: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    target.join("portable").join(machine.name()).join(name)
}

/// The library for one machine, as it ships; `None` where it cannot be built.
fn shim(machine: Machine) -> Option<PathBuf> {
    is_built().then(|| built(machine, "libnvshare.so"))
}

/// What a library exports, with addresses.
fn exports(library: &Path) -> BTreeMap<String, u64> {
    let data = fs::read(library).unwrap();
    let file = object::File::parse(&*data).unwrap();
    let exported = file.dynamic_symbols().filter(|symbol| symbol.is_definition() && symbol.is_global());
    exported.map(|symbol| (symbol.name().unwrap().to_owned(), symbol.address())).collect()
}

/// A directory with the probe and the fake driver, linked with one C library.
struct Bench {
    userland: Userland,
    dir: PathBuf,
}

impl Bench {
    /// For each machine and C library; none where the library cannot be built.
    fn all() -> Vec<(Self, PathBuf)> {
        let userlands = Machine::usable().into_iter().flat_map(Userland::all);
        userlands
            .filter_map(|userland| {
                let shim = shim(userland.machine)?;
                Some((Self::new(userland, &exports(&shim)), shim))
            })
            .collect()
    }

    fn new(userland: Userland, hooked: &BTreeMap<String, u64>) -> Self {
        let age = if userland.is_old() { "old" } else { "current" };
        let unique = format!("portable-{}-{age}-{:?}", userland.machine.name(), std::thread::current().id());
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(unique.replace(['(', ')'], ""));
        fs::create_dir_all(&dir).unwrap();
        let special = ["cuLaunchKernel", "cuCtxSynchronize", "cuGetProcAddress_v2"];
        let mut names = format!("NAME({NOT_HOOKED})\n");
        for name in hooked.keys().filter(|name| name.starts_with("cu") && !special.contains(&name.as_str())) {
            writeln!(names, "NAME({name})").unwrap();
        }
        fs::write(dir.join("names.h"), names).unwrap();
        let versions = dir.join("versions");
        fs::write(&versions, format!("{DRIVER_VERSION} {{ global: *; }};")).unwrap();
        let script = format!("-Wl,--version-script={}", versions.display());
        let driver = dir.join("libcuda.so.1");
        userland.compile(
            &source("portable/driver.c"),
            &driver,
            &["-shared", "-Wl,-soname,libcuda.so.1", &script],
        );
        userland.compile(&source("preload/second_preload.c"), &dir.join("libsecond.so"), &["-shared"]);
        for program in ["probe", "plain"] {
            userland.compile(&source(&format!("portable/{program}.c")), &dir.join(program), &[]);
        }
        Self { userland, dir }
    }

    /// The C libraries that this bench's programs can run with: their own and later ones.
    fn runs_with(&self) -> Vec<Userland> {
        let mut userlands = vec![self.userland.clone()];
        if self.userland.is_old() {
            userlands.push(Userland::current(self.userland.machine));
        }
        userlands
    }

    fn run(&self, on: &Userland, program: &str, words: &[&str], preload: &[&Path]) -> String {
        done(on.command(&self.dir.join(program), &self.dir, preload).args(words))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // What is left is looked at if a test fails, and overwritten by the next run.
        if !std::thread::panicking() {
            fs::remove_dir_all(&self.dir).unwrap();
        }
    }
}

/// The version with which a program refers to `name`.
fn wanted_version(program: &Path, name: &str) -> Option<String> {
    let said = done(Command::new("readelf").args(["--dyn-syms", "--wide"]).arg(program));
    let symbol = said
        .lines()
        .find_map(|line| line.split_whitespace().find(|word| word.starts_with(&format!("{name}@"))));
    symbol.and_then(|symbol| Some(symbol.split_once('@')?.1.to_owned()))
}

#[test]
fn every_program_that_looks_up_a_hooked_function_gets_ours_whatever_c_library_it_was_linked_with() {
    for (bench, shim) in Bench::all() {
        let version = bench.userland.dlsym_version();
        assert_eq!(wanted_version(&bench.dir.join("probe"), "dlsym").as_deref(), Some(version));
        let hooked = exports(&shim);
        let names: Vec<&str> =
            hooked.keys().map(String::as_str).filter(|name| name.starts_with("cu")).collect();
        for on in bench.runs_with() {
            for (function, asked) in [("dlsym", ""), ("dlvsym", DRIVER_VERSION)] {
                let words = [&["driver", asked], &names[..], &[NOT_HOOKED]].concat();
                let said = bench.run(&on, "probe", &words, &[&shim]);
                let mut expected = String::new();
                for name in &names {
                    writeln!(expected, "{function} {name}: libnvshare.so+{:x}", hooked[*name]).unwrap();
                }
                let (ours, rest) = said.split_at(expected.len().min(said.len()));
                assert_eq!(ours, expected, "{on:?}");
                assert!(
                    rest.starts_with(&format!("{function} {NOT_HOOKED}: libcuda.so.1+")),
                    "{on:?}: {rest}"
                );
            }
            let said = bench.run(&on, "probe", &["launch"], &[&shim]);
            let address = hooked["cuLaunchKernel"];
            assert_eq!(
                said,
                format!("41 0 asked cuLaunchKernel: libnvshare.so+{address:x}\n42 after 2 calls\n"),
                "{on:?}"
            );
        }
    }
}

#[test]
fn a_plain_build_exports_the_same_names() {
    let native = if cfg!(target_arch = "aarch64") { Machine::Aarch64 } else { Machine::X86_64 };
    let Some(shim) = shim(native) else { return };
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let words = ["build", "--quiet", "--package=nvshare-shim", "--release", "--target-dir"];
    done(Command::new(env!("CARGO")).args(words).arg(target).current_dir(env!("CARGO_MANIFEST_DIR")));
    let plain = exports(&target.join("release/libnvshare.so"));
    assert!(plain.keys().eq(exports(&shim).keys()), "{:?}", plain.keys());
}

#[test]
fn ordinary_look_ups_lead_where_they_lead_without_the_library_and_fail_with_the_same_words() {
    for (bench, shim) in Bench::all() {
        for on in bench.runs_with() {
            let without = bench.run(&on, "probe", &["ordinary"], &[]);
            assert!(
                without.contains("default malloc: libc") && without.contains("self none: none; "),
                "{without}"
            );
            assert_eq!(bench.run(&on, "probe", &["ordinary"], &[&shim]), without, "{on:?}");
        }
    }
}

#[test]
fn another_preloaded_library_finds_the_next_function_in_both_orders() {
    for (bench, shim) in Bench::all() {
        let second = bench.dir.join("libsecond.so");
        for on in bench.runs_with() {
            for order in [[&*shim, &*second], [&*second, &*shim]] {
                assert_eq!(bench.run(&on, "plain", &[], &order), "started loaded wrapped\n", "{on:?}");
            }
        }
    }
}

#[test]
fn a_thread_that_is_cancelled_inside_the_driver_ends_as_without_the_library() {
    for (bench, shim) in Bench::all() {
        // An unpacked C library comes without libgcc_s, which cancelling needs.
        if !bench.userland.is_old() {
            assert_eq!(bench.run(&bench.userland, "probe", &["cancel"], &[]), "cancelled\n");
            assert_eq!(bench.run(&bench.userland, "probe", &["cancel"], &[&shim]), "cancelled\n");
        }
    }
}

#[test]
fn a_panic_inside_a_library_that_is_built_like_ours_is_caught_and_cleans_up() {
    if !is_built() {
        return;
    }
    for machine in Machine::usable() {
        let bench = Bench::new(Userland::current(machine), &BTreeMap::new());
        fs::copy(built(machine, "libpanics.so"), bench.dir.join("libpanics.so")).unwrap();
        // Nine, and the one that panics.
        assert_eq!(bench.run(&bench.userland, "probe", &["panics"], &[]), "10 frames\n");
    }
}

#[test]
fn a_program_without_the_gnu_c_library_starts_and_finds_its_functions() {
    let Some(shim) = shim(Machine::X86_64) else { return };
    if !is_program("musl-gcc") {
        return skip("programs of musl", "musl-gcc is missing (musl-tools)");
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, program) in [("plain", "plain.c"), ("probe", "probe.c")] {
        let output = dir.path().join(name);
        done(
            Command::new("musl-gcc")
                .args(["-O2", "-w", "-o"])
                .arg(&output)
                .arg(source("portable").join(program)),
        );
    }
    let run = |program: &str, words: &[&str], preload: &[&Path]| {
        let mut command = Command::new(dir.path().join(program));
        command.args(words).env_clear();
        for path in preload {
            command.env("LD_PRELOAD", path);
        }
        done(&mut command)
    };
    assert_eq!(run("plain", &[], &[&shim]), "started loaded\n");
    let without = run("probe", &["ordinary"], &[]);
    assert!(without.contains("default malloc: ") && without.contains("default none: none; "), "{without}");
    assert_eq!(run("probe", &["ordinary"], &[&shim]), without);
}

#[test]
fn static_programs_and_programs_with_a_scrubbed_environment_start_without_the_library() {
    let Some(shim) = shim(Machine::X86_64) else { return };
    let dir = tempfile::tempdir().unwrap();
    let plain = source("portable/plain.c");
    for (name, kind) in [("static", "-static"), ("static-pie", "-static-pie"), ("dynamic", "-pie")] {
        done(Command::new("gcc").args([kind, "-fPIE", "-w", "-o"]).arg(dir.path().join(name)).arg(&plain));
    }
    let run = |command: &mut Command| done(command.env("LD_PRELOAD", &shim));
    for name in ["static", "static-pie"] {
        assert_eq!(run(&mut Command::new(dir.path().join(name))), "started\n", "{name}");
    }
    let dynamic = dir.path().join("dynamic");
    assert_eq!(run(&mut Command::new(&dynamic)), "started loaded\n");
    assert_eq!(run(Command::new("env").arg("-i").arg(&dynamic)), "started\n");
}

#[test]
fn a_setuid_program_starts_without_the_library() {
    use std::os::unix::{fs::PermissionsExt as _, process::CommandExt as _};

    let Some(shim) = shim(Machine::X86_64) else { return };
    if !is_root() {
        return skip("setuid programs", "only root can make one");
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = dir.path().join("plain");
    done(Command::new("gcc").args(["-w", "-o"]).arg(&program).arg(source("portable/plain.c")));
    // The user can read it from there.
    let copy = dir.path().join("libnvshare.so");
    fs::copy(&shim, &copy).unwrap();
    let nobody = |command: &mut Command| done(command.env("LD_PRELOAD", &copy).uid(65534).current_dir("/"));
    assert_eq!(nobody(&mut Command::new(&program)), "started loaded\n");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
    assert_eq!(nobody(&mut Command::new(&program)), "started secure\n");
}
